"""Flat archives: sequences end to end in one .npz file, never pickled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vrnn_lightning.batch import SequenceSample
from vrnn_lightning.data.folders import SPLIT_NAMES
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import MAX_GB, explained, require_size, undamaged, zip_members

__all__ = ["ArchiveSplit", "OpenArchive", "archive_holds", "opened_archive", "read_archive"]


@dataclass(frozen=True)
class ArchiveSplit:
    """One split of a flat archive: its rows in one array, from which a sequence is cut when it is asked for.

    Args:
        path: The archive.
        word: The split's name in the archive: "train", "valid" or "test".
        array: The name of the rows.
        values: The sequences' rows one after another, shape (total steps, features), in the archive's type.
        bounds: The first row of each sequence and the row after its last, shape (sequences, 2).
        numbers: The number of each sequence in the archive, shape (sequences,).
        names: Names of the archive's sequences by number; ``None`` names them by split and number.
        begins: The step of the archive's sequence at which each one begins, shape (sequences,); ``None`` for 0.
        more: Other arrays that lie as ``values`` does, by the name of the sample's field.
    """

    path: Path
    word: str
    array: str
    values: NDArray[Any]
    bounds: NDArray[np.int64]
    numbers: NDArray[np.int64]
    names: Sequence[str] | None = None
    begins: NDArray[np.int64] | None = None
    more: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def join(
        cls,
        path: Path,
        word: str,
        array: str,
        values: NDArray[Any],
        lengths: NDArray[np.int64],
        names: Sequence[str] | None = None,
    ) -> ArchiveSplit:
        """Return sequences whose rows lie end to end in ``values``, with the steps of each, shape (sequences,)."""
        ends = lengths.cumsum(dtype=np.int64)
        return cls(path, word, array, values, np.stack([ends - lengths, ends], 1), np.arange(len(lengths)), names)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int, /) -> SequenceSample:
        return self._cut(index, *self.bounds[index])

    def window(self, index: int, first: int, last: int, /) -> SequenceSample:
        """Return steps ``first`` to ``last - 1`` of one sequence."""
        start, end = self.bounds[index]
        return self._cut(index, start + first, min(start + last, end))

    def _cut(self, index: int, start: int, end: int) -> SequenceSample:
        exact = np.result_type(self.values.dtype, np.float32)
        x = torch.from_numpy(self.values[start:end].astype(exact))
        more = {name: torch.from_numpy(rows[start:end]) for name, rows in self.more.items()}
        return SequenceSample(x, name=self.name(index), **more)

    def name(self, index: int) -> str:
        """Return the name of a sequence."""
        number = self.numbers[index]
        whole = f"{self.word} {number}" if self.names is None else self.names[number]
        begin = 0 if self.begins is None else self.begins[index]
        return f"{whole} from step {begin}" if begin else whole

    @property
    def lengths(self) -> list[int]:
        """Steps of each sequence."""
        steps: list[int] = np.diff(self.bounds, axis=1)[:, 0].tolist()
        return steps

    def no_longer_than(self, steps: int) -> ArchiveSplit:
        """Return the sequences of at most so many steps."""
        return self.take(np.array(self.lengths, dtype=np.int64) <= steps)

    def take(self, index: NDArray[Any]) -> ArchiveSplit:
        """Return some of the sequences, by index or mask."""
        begins = None if self.begins is None else self.begins[index]
        return replace(self, bounds=self.bounds[index], numbers=self.numbers[index], begins=begins)

    def in_pieces(self, steps: int) -> ArchiveSplit:
        """Return the sequences, longer ones cut into as few pieces of at most so many steps, of like length."""
        lengths = np.array(self.lengths, dtype=np.int64)
        counts = np.maximum(1, -(-lengths // steps))
        which = np.repeat(np.arange(len(self)), counts)
        piece = np.arange(len(which)) - np.repeat(counts.cumsum() - counts, counts)
        begin, end = (lengths[which] * k // counts[which] for k in (piece, piece + 1))
        whole = self.take(which)
        before = 0 if whole.begins is None else whole.begins
        return replace(whole, bounds=whole.bounds[:, :1] + np.stack([begin, end], axis=1), begins=before + begin)

    def rows(self) -> NDArray[Any]:
        """Return the rows of all sequences, shape (steps, features)."""
        return np.concatenate([self.values[:0], *(self.values[start:end] for start, end in self.bounds)])

    def raise_if(self, wrong: NDArray[np.bool_], fix: str) -> None:
        """Raise a UserError with the first wrong value and its place, if there is one; ``fix`` ends the message.

        ``wrong`` is True at wrong values, shape (total steps, features) or fewer features from the left on.
        """
        if not wrong.any():
            return
        row, feature = np.unravel_index(wrong.argmax(), wrong.shape)
        i = int(np.searchsorted(self.bounds[:, 1], row, side="right"))
        place = f"{self.name(i)}, step {row - self.bounds[i, 0]}, feature {feature}"
        raise UserError(f"{self.path}: {self.array} holds {self.values[row, feature]} at {place}. Fix: {fix}")


def archive_holds(path: Path, split: Split) -> bool:
    """Return whether a flat archive has a split; raise a UserError if it can't be read."""
    with opened_archive(path, "--data.root") as archive:
        return f"{SPLIT_NAMES[split][0]}_values" in archive.names


def read_archive(
    path: Path,
    split: Split,
    width: int,
    stacked: str | None = None,
    fix: str = "",
    max_gb: float = MAX_GB,
    more: Mapping[str, int] = MappingProxyType({}),
) -> ArchiveSplit:
    """Read one split of a flat archive, and nothing else of the file.

    A flat archive is an ``.npz`` file, never pickled, with two arrays for each split, "train", "valid" and "test":
    ``{split}_values`` of shape (total steps, features) and ``{split}_lengths`` of shape (sequences,). Sequence i is
    ``values[sum(lengths[:i]) : sum(lengths[: i + 1])]``. An array ``{split}_is_first`` (total steps,), bool, is read
    where there is one; ``more`` names further ones. Other arrays are ignored.

    Args:
        path: The file.
        split: The split; "val" is "valid" in the file.
        width: Features that a row must have.
        stacked: With "images", an array ``{split}_images`` of shape (sequences, steps, features) may replace
            ``{split}_values``.
        fix: The end of the message about another number of features.
        max_gb: Gigabytes that an array may take, or 16 times the file's size.
        more: The width of each further array ``{split}_NAME`` to read, "inputs" or "targets"; 0 reads none.

    Raises:
        UserError: The file is missing or not such an archive, its arrays don't fit together or hold values that are not
            finite.
    """
    word = SPLIT_NAMES[split][0]
    name, stack = f"{word}_values", f"{word}_{stacked}"
    with opened_archive(path, "--data.root") as archive:
        if stacked and stack in archive.names and name not in archive.names:
            name, axes = stack, "sequences, steps"
        else:
            axes = "total steps"
        values = archive.read(name, max_gb)
        if values.dtype.kind not in "buif" or values.dtype.itemsize > 8:
            raise UserError(f"{path}: {name} is of type {values.dtype}. Fix: save it as integers, float32 or float64")
        if values.ndim != (3 if name == stack else 2) or values.shape[-1] != width:
            raise UserError(f"{path}: {name} has shape {values.shape}, expected ({axes}, {width}){fix}")
        if name == stack:
            steps = np.full(*values.shape[:2])
        else:
            steps = _steps(path, word, archive.read(f"{word}_lengths", max_gb), len(values))
        values = values.reshape(-1, width)
        wanted: dict[str, tuple[int, ...]] = {key: (len(values), columns) for key, columns in more.items() if columns}
        if f"{word}_is_first" in archive.names:
            wanted["is_first"] = (len(values),)
        beside = {key: _beside(archive, f"{word}_{key}", expected, max_gb) for key, expected in wanted.items()}
    sequences = replace(ArchiveSplit.join(path, word, name, values, steps), more=beside)
    if values.dtype.kind == "f":
        sequences.raise_if(~np.isfinite(values), "remove or correct the sequence")
    return sequences


def _beside(archive: OpenArchive, name: str, expected: tuple[int, ...], max_gb: float) -> NDArray[Any]:
    """Return an array that lies beside the values: truth values, or numbers in float32."""
    values = archive.read(name, max_gb)
    shape, dtype = values.shape, values.dtype
    kinds = "b" if len(expected) == 1 else "buif"
    if shape != expected or dtype.kind not in kinds:
        kind = "bool" if kinds == "b" else "numbers"
        raise UserError(f"{archive.path}: {name} is {dtype} of shape {shape}, expected {kind} of shape {expected}")
    return values if kinds == "b" else values.astype(np.float32)


def _steps(path: Path, word: str, lengths: NDArray[Any], rows: int) -> NDArray[np.int64]:
    if (lengths.size and lengths.dtype.kind not in "ui") or lengths.ndim != 1:
        raise UserError(
            f"{path}: {word}_lengths is of type {lengths.dtype} and shape {lengths.shape}, expected integers of shape "
            "(sequences,)"
        )
    steps = lengths.astype(np.int64)
    if (steps < 0).any() or steps.sum() != rows:
        raise UserError(
            f"{path}: {word}_lengths adds up to {steps.clip(0).sum()}, but {word}_values has {rows} rows. "
            "Fix: write both from the same sequences"
        )
    return steps


@contextmanager
def opened_archive(path: Path, option: str = "") -> Iterator[OpenArchive]:
    """Open an .npz file; raise a UserError if it, or an array that the block reads, is missing or damaged."""
    if path.suffix == ".npy":
        raise UserError(f"{path}: is a single array, not an .npz archive. Fix: write it with numpy.savez")
    with (
        explained(path, option, "give an .npz archive"),
        undamaged(f"{path}: can't be read as an .npz archive", "copy it again, or write it with numpy.savez"),
        path.open("rb") as file,
        np.load(file, allow_pickle=False) as content,
    ):
        for member in zip_members(content.zip):  # a damaged name would hide an array
            content.zip.open(member).close()
        yield OpenArchive(path, content)


@dataclass(frozen=True)
class OpenArchive:
    """The .npz file ``path``, and its arrays by name as numpy reads them, never pickled."""

    path: Path
    content: Any

    @property
    def names(self) -> list[str]:
        """The names of its arrays."""
        return list(self.content.files)

    def read(self, name: str, max_gb: float = MAX_GB) -> NDArray[Any]:
        """Return an array that takes at most ``max_gb`` gigabytes, or 16 times the file's size."""
        self.require(name, max_gb)
        try:
            return np.asarray(self.content[name])
        except MemoryError as error:  # of a damaged shape
            raise UserError(f"{self.path}: {name} can't be read ({error}). Fix: copy the file again") from error

    def require(self, name: str, max_gb: float) -> None:
        """Raise if there is no such array, or one that takes too much memory."""
        if name not in self.names:
            raise UserError(
                f"{self.path}: has no array {name}, it holds {', '.join(self.names)[:200] or 'nothing'}. Fix: add it"
            )
        require_size(self.path, self.content.zip.getinfo(f"{name}.npy").file_size, max_gb)
