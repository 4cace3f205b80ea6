"""A progress bar for work that takes long."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, TypeVar

from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

__all__ = ["make_bar", "tracked"]

PATIENCE = 1.0
"""Seconds of work before a bar appears."""

T = TypeVar("T")


def tracked(items: Collection[T], what: str) -> Iterator[T]:
    """Yield items; on one process show a bar on standard error once they take longer than a second.

    Args:
        items: The work.
        what: The bar's text.

    >>> list(tracked([1, 2], "counting"))
    [1, 2]
    """
    started = time.monotonic()
    bar: Progress | None = None
    try:
        for done, item in enumerate(items):
            if bar is None and getattr(rank_zero_only, "rank", 0) == 0 and time.monotonic() - started > PATIENCE:
                from rich.progress import MofNCompleteColumn

                bar = make_bar(MofNCompleteColumn(), transient=True)
                task = bar.add_task(what, total=len(items))
                bar.start()
            if bar is not None:
                bar.update(task, completed=done)
            yield item
    finally:
        if bar is not None:
            bar.stop()


def make_bar(count: ProgressColumn, *, transient: bool) -> Progress:
    """Return a bar on a terminal's standard error, with a column that counts what is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)
