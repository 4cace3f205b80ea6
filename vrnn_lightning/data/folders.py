"""Files of a dataset: all below a folder, the tables among them, those that can't be used, the progress of reading."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from tqdm import tqdm

from vrnn_lightning.data.columns import TABLE_SUFFIXES
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained

__all__ = [
    "SHOWN", "SPLIT_NAMES", "InvalidFiles", "ProgressBar", "files_below", "find_split", "find_tables", "names_below",
    "tracked",
]  # fmt: skip

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
"""Names that the files or folders of a split may have."""
SHOWN = 5
"""Files that a message names, of those that are missing or invalid."""
PATIENCE = 1.0
"""Seconds of work before a bar appears."""
T = TypeVar("T")


class ProgressBar(tqdm):
    """tqdm's bar on the standard error, without a thread: reading processes are forked from this one."""

    monitor_interval = 0


def tracked(items: Collection[T], what: str) -> Iterator[T]:
    """Yield items; on one process show a bar, called ``what``, on standard error once they take longer than a second.

    >>> list(tracked([1, 2], "counting"))
    [1, 2]
    """
    is_silent = getattr(rank_zero_only, "rank", 0) != 0
    options = {"leave": False, "dynamic_ncols": True, "disable": is_silent or None}  # None: off a terminal
    return iter(ProgressBar(items, what, delay=PATIENCE, **options))


class InvalidFiles:
    """The files that can't be used: they are skipped and counted if ``skip``, else the first raises its error.

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
        """Warn of skipped files, out of ``total``; the message calls them ``noun``, and their folder ``where``.

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


def files_below(root: Path, invalid: InvalidFiles | None = None) -> list[Path]:
    """Return all files below a folder but hidden ones, sorted; ``invalid`` decides about folders that can't be opened.

    Raises:
        UserError: A folder can't be opened, and ``invalid`` does not skip it.
    """

    def raise_error(error: OSError) -> None:
        with (invalid or InvalidFiles(skip=False)).tolerated(), explained(error.filename):
            raise error

    paths = (Path(folder, file) for folder, _, files in os.walk(root, onerror=raise_error) for file in files)
    return sorted(path for path in paths if not path.name.startswith("."))


def names_below(root: Path, suffixes: tuple[str, ...], invalid: InvalidFiles | None = None) -> list[str]:
    """Return the paths below a folder of all files with a suffix, with forward slashes, sorted as text."""
    paths = files_below(root, invalid)
    return sorted(path.relative_to(root).as_posix() for path in paths if path.name.lower().endswith(suffixes))


def _stem(name: str) -> str:
    suffix = next(s for s in TABLE_SUFFIXES if name.lower().endswith(s))
    return name[: -len(suffix)]


def _is_table(path: Path) -> bool:
    return path.name.lower().endswith(TABLE_SUFFIXES) and not path.name.startswith(".")


def find_split(root: Path, split: Split) -> Path:
    """Return the table or folder that is called as a split; raise a UserError if there is none or more than one."""
    if not root.is_dir():
        raise UserError(
            f"--data.root {root}: --data.split files needs a folder. Fix: give one with train, valid and test"
        )
    named = sorted(p for p in root.iterdir() if (_stem(p.name) if _is_table(p) else p.name) in SPLIT_NAMES[split])
    named = [path for path in named if path.is_dir() or _is_table(path)]
    if len(named) != 1:
        wanted = SPLIT_NAMES[split][0]
        raise UserError(
            f"{root}: holds {' and '.join(path.name for path in named) or f'no {wanted}'} for --data.split files. Fix: "
            f"give one folder {wanted}, or {wanted}.csv, .csv.gz or .parquet"
        )
    return named[0]


def find_tables(place: Path) -> dict[str, Path]:
    """Return the tables of a folder, or the one that a path names, by their paths without format, sorted.

    Raises:
        UserError: There is none, a folder can't be read, or two of them have the same name.
    """
    with explained(place, "--data.root"):
        if not place.exists():
            raise UserError(f"--data.root {place}: no such file or folder. Fix: check the path")
        if not place.is_dir():
            if not _is_table(place):
                raise UserError(f"--data.root {place}: is not a table. Fix: give one in {', '.join(TABLE_SUFFIXES)}")
            return {_stem(place.name): place}
        paths = [path for path in files_below(place) if _is_table(path)]
    if not paths:
        raise UserError(f"--data.root {place}: holds no table. Fix: give a folder of {', '.join(TABLE_SUFFIXES)} files")
    files: dict[str, Path] = {}
    for path in paths:
        name = _stem(path.relative_to(place).as_posix())
        if name in files:
            raise UserError(f"{path}: and {files[name]} seem to hold the same. Fix: remove one")
        files[name] = path
    return files
