"""A progress bar for work that takes long."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

__all__ = ["ProgressBar", "tracked"]

PATIENCE = 1.0
"""Seconds of work before a bar appears."""

T = TypeVar("T")


class ProgressBar(tqdm):
    """tqdm's bar on the standard error of one process, if that is a terminal."""

    monitor_interval = 0  # no thread: reading processes are forked from this one

    def __init__(self, *args: Any, **options: Any) -> None:
        is_silent = getattr(rank_zero_only, "rank", 0) != 0
        super().__init__(*args, **options, dynamic_ncols=True, disable=is_silent or None)  # None: off a terminal


def tracked(items: Collection[T], what: str) -> Iterator[T]:
    """Yield items; on one process show a bar on standard error once they take longer than a second.

    Args:
        items: The work.
        what: The bar's text.

    >>> list(tracked([1, 2], "counting"))
    [1, 2]
    """
    return iter(ProgressBar(items, what, delay=PATIENCE, leave=False))
