"""A progress bar for work that takes long."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

__all__ = ["ProgressBar", "tracked"]

PATIENCE = 1.0
"""Seconds of work before a bar appears."""

T = TypeVar("T")


class ProgressBar(tqdm):
    """tqdm's bar on the standard error, without a thread: reading processes are forked from this one."""

    monitor_interval = 0


def tracked(items: Collection[T], what: str) -> Iterator[T]:
    """Yield items; on one process show a bar on standard error once they take longer than a second.

    Args:
        items: The work.
        what: The bar's text.

    >>> list(tracked([1, 2], "counting"))
    [1, 2]
    """
    is_silent = getattr(rank_zero_only, "rank", 0) != 0
    options = {"leave": False, "dynamic_ncols": True, "disable": is_silent or None}  # None: off a terminal
    return iter(ProgressBar(items, what, delay=PATIENCE, **options))
