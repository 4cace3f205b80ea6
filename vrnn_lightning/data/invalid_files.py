"""Files that can't be used: stop at the first one, or skip and count them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_warn

from vrnn_lightning.errors import UserError

__all__ = ["InvalidFiles"]

SHOWN = 5
"""Skipped files that the warning names."""


class InvalidFiles:
    """What becomes of files that can't be used, as the option ``skip_bad`` says.

    Args:
        skip: Skip and count them; else the first of them stops the run.

    >>> bad = InvalidFiles(skip=True)
    >>> with bad.tolerated():
    ...     raise UserError("a.wav: cannot be read as audio")
    >>> len(bad.problems)
    1
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.problems: list[str] = []
        """What was wrong with each file that was skipped, with its name."""

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Leave the block at what a user got wrong with one file, if bad files are to be skipped."""
        try:
            yield
        except UserError as error:
            if not self.skip:
                raise
            self.problems.append(str(error))

    def report(self, total: int, where: object, noun: str = "files") -> None:
        """Warn of what was skipped, if anything was.

        Args:
            total: How many files there are, the skipped ones included.
            where: What they are files of: the folder.
            noun: What to call them.

        Raises:
            UserError: Nothing is left.
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
