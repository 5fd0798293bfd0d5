"""Tables of the measurements as Markdown."""

import pandas as pd


def markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown, without its index."""
    rows = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
