"""Invalid files: stop at the first one, or skip and count them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_warn

from vrnn_lightning.errors import UserError

__all__ = ["InvalidFiles"]

T = TypeVar("T")
SHOWN = 5
"""Skipped files that the warning names."""


class InvalidFiles:
    """The files that can't be used and are skipped, with ``skip_bad``.

    Args:
        skip: Skip and count invalid files; else the first of them raises its error.

    >>> bad = InvalidFiles(skip=True)
    >>> with bad.tolerated():
    ...     raise UserError("a.wav: cannot be read as audio")
    >>> len(bad.problems)
    1
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.problems: list[str] = []
        """The error of each skipped file, with its name."""

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Leave the block at a UserError about one file, if invalid files are skipped."""
        try:
            yield
        except UserError as error:
            if not self.skip:
                raise
            self.problems.append(str(error))

    def read_all(
        self, readers: Iterable[tuple[str, Callable[[], T]]], where: object, noun: str = "files"
    ) -> dict[str, T]:
        """Return what each reader returns, by its name, and report those that fail, as :meth:`report` does."""
        contents: dict[str, T] = {}
        total = 0
        for name, read in readers:
            total += 1
            with self.tolerated():
                contents[name] = read()
        self.report(total, where, noun)
        return contents

    def report(self, total: int, where: object, noun: str = "files") -> None:
        """Warn of skipped files.

        Args:
            total: Number of files, with the skipped ones.
            where: The folder, for messages.
            noun: The word for them in messages.

        Raises:
            UserError: All files are skipped.
        """
        if not self.problems:
            return
        listed = "; ".join(self.problems[:SHOWN])
        more = "; ..." if len(self.problems) > SHOWN else ""
        if len(self.problems) >= total:
            raise UserError(f"{where}: none of {total} {noun} can be used: {listed}{more}")
        rank_zero_warn(
            f"{where}: {len(self.problems)} of {total} {noun} are skipped (--data.skip_bad true): {listed}{more}"
        )
