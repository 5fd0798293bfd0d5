"""Tables of the measurements as Markdown."""

import pandas as pd


def markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown, without its index."""
    rows = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def mean_and_range(values: pd.Series) -> str:
    """Mean of the values that are known, and the lowest and the highest where they differ."""
    values = values.dropna()
    if values.empty:
        return ""
    low, mean, high = (f"{value:.3f}" if value <= 1 else f"{value:.1f}" for value in values.agg(["min", "mean", "max"]))
    return mean if low == high else f"{mean} ({low} to {high})"
