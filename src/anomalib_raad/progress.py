"""Progress bars of what takes long, unless the trainer's user has switched them off."""

from collections.abc import Iterable
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

shown = ContextVar("shown", default=True)
"""Whether bars are drawn."""


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The items, under a bar that vanishes at its end.

    Args:
        items: What is worked through.
        description: What is done.
        total: Number of the items, where they do not know it.
    """
    return tqdm(items, description, total=total, leave=False, disable=not shown.get())
