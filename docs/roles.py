"""MkDocs hook: shows the Sphinx roles of the docstrings, such as ``:func:`~.losses.hard_feature_loss```, as names."""

import re

_ROLE = re.compile(r":(?:class|data|func|meth):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **_: object) -> str:
    """Replace every role by its last name, in code type."""
    return _ROLE.sub(lambda role: f"<code>{role[1].rpartition('.')[2]}</code>", html)
