"""Flat archives: sequences end to end in one .npz file, never pickled."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import torch

from vrnn_lightning.batch import Sequence
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ArchiveSplit", "archive_holds", "read_archive"]


@dataclass(frozen=True)
class ArchiveSplit:
    """One split of a flat archive: its rows in one array, from which a sequence is cut when it is asked for.

    Args:
        path: The archive.
        word: What the archive calls the split: "train", "valid" or "test".
        array: What it calls the rows.
        values: The sequences' rows one after another, shape (total steps, features), in the archive's type.
        bounds: Where each sequence begins and ends, shape (sequences, 2).
        numbers: Which sequence of the archive each one is, shape (sequences,).
        names: What to call each sequence of the archive, by its number; ``None`` calls it after the split and its
            number.
        begins: At which step of the archive's sequence each one begins, shape (sequences,); ``None`` where they are
            whole.
    """

    path: Path
    word: str
    array: str
    values: NDArray[Any]
    bounds: NDArray[np.int64]
    numbers: NDArray[np.int64]
    names: SequenceOf[str] | None = None
    begins: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.bounds)

    def __getitem__(self, index: int, /) -> Sequence:
        """Return one sequence, in float32 where that is exact."""
        return self._cut(index, *self.bounds[index])

    def window(self, index: int, first: int, last: int, /) -> Sequence:
        """Return steps ``first`` to ``last - 1`` of one sequence."""
        start, end = self.bounds[index]
        return self._cut(index, start + first, min(start + last, end))

    def _cut(self, index: int, start: int, end: int) -> Sequence:
        exact = np.result_type(self.values.dtype, np.float32)
        x = torch.from_numpy(self.values[start:end].astype(exact))
        return Sequence(x, name=self.name(index))

    def name(self, index: int) -> str:
        """Return what a sequence is called."""
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
        """Return some of the sequences, by their places or by True at them."""
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
        starts = whole.bounds[:, :1]
        return replace(whole, bounds=starts + np.stack([begin, end], axis=1), begins=before + begin)

    def rows(self) -> NDArray[Any]:
        """Return the rows of all sequences, shape (steps, features)."""
        if len(self) == 0:
            return self.values[:0]
        return np.concatenate([self.values[start:end] for start, end in self.bounds])

    def refuse(self, wrong: NDArray[np.bool_], cure: str) -> None:
        """Refuse values that the data can't hold.

        Args:
            wrong: True at them, shape (total steps, features) or fewer features from the left on.
            cure: The rest of the message, after what the first of them is and where it stands.

        Raises:
            UserError: Any is true.
        """
        if not wrong.any():
            return
        row, feature = np.unravel_index(wrong.argmax(), wrong.shape)
        i = int(np.searchsorted(self.bounds[:, 1], row, side="right"))
        place = f"{self.name(i)}, step {row - self.bounds[i, 0]}, feature {feature}"
        raise UserError(f"{self.path}: {self.array} holds {self.values[row, feature]} at {place}; {cure}")


def archive_holds(path: Path, split: Split) -> bool:
    """Return True where a flat archive has a split of its own.

    Raises:
        UserError: There is no such file, or it is no archive.
    """
    with _opened(path) as archive:
        return f"{_word(split)}_values" in archive.files


def read_archive(path: Path, split: Split, width: int, stacked: str | None = None, cure: str = "") -> ArchiveSplit:
    """Read one split of a flat archive, and of the file nothing else.

    A flat archive is an ``.npz`` file, never pickled, with two arrays for each split, "train", "valid" and "test":
    ``{split}_values`` of shape (total steps, features) and ``{split}_lengths`` of shape (sequences,). Sequence i is
    ``values[sum(lengths[:i]) : sum(lengths[: i + 1])]``. Other arrays are ignored.

    Args:
        path: The file.
        split: Which split; "val" is "valid" in the file.
        width: Features that a row must have.
        stacked: What sequences of one length may be called: with "images" an array ``{split}_images`` of shape
            (sequences, steps, features) is read where there is no ``{split}_values``.
        cure: What to do about another number of features, for that message's end.

    Raises:
        UserError: There is no such file, it is no such archive, or its arrays don't fit together or hold values that
            are no finite numbers.
    """
    word = _word(split)
    name, stack = f"{word}_values", f"{word}_{stacked}"
    values, *rest = _arrays(path, name, f"{word}_lengths", instead=stack if stacked else None)
    name, shape = (name, "total steps") if rest else (stack, "sequences, steps")
    if values.dtype.kind not in "buif" or values.dtype.itemsize > 8:
        raise UserError(f"{path}: {name} is of type {values.dtype}; save it as integers, float32 or float64")
    if values.ndim != (2 if rest else 3) or values.shape[-1] != width:
        raise UserError(f"{path}: {name} has shape {values.shape}, expected ({shape}, {width}){cure}")
    lengths = rest[0] if rest else np.full(len(values), values.shape[1])
    values = values.reshape(-1, width)
    if (lengths.size and lengths.dtype.kind not in "ui") or lengths.ndim != 1:
        raise UserError(
            f"{path}: {word}_lengths is of type {lengths.dtype} and shape {lengths.shape}, expected integers of shape "
            "(sequences,)"
        )
    steps = lengths.astype(np.int64)
    if (steps < 0).any():
        raise UserError(f"{path}: {word}_lengths holds {steps.min()} at {steps.argmin()}; a length is at least 0")
    if steps.sum() != len(values):
        raise UserError(
            f"{path}: {word}_lengths adds up to {steps.sum()}, but {word}_values has {len(values)} rows; "
            "write both from the same sequences"
        )
    ends = steps.cumsum()
    found = ArchiveSplit(path, word, name, values, np.stack([ends - steps, ends], axis=1), np.arange(len(steps)))
    if values.dtype.kind == "f":
        found.refuse(~np.isfinite(values), "remove the sequence or mend it")
    return found


def _word(split: Split) -> str:
    """Return what archives call a split."""
    return "valid" if split == "val" else split


def _arrays(path: Path, *names: str, instead: str | None = None) -> list[NDArray[Any]]:
    """Return arrays of an npz file, or another one where the first of them is not there but that one is."""
    with _opened(path) as archive:
        if instead in archive.files and names[0] not in archive.files:
            return [_array(path, archive, str(instead))]
        return [_array(path, archive, name) for name in names]


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an npz file; whatever goes wrong with it is the user's to mend."""
    if not path.exists():
        raise UserError(f"--data.root {path}: no such file")
    if not path.is_file():
        raise UserError(f"--data.root {path}: is no file; give the .npz archive itself")
    try:
        with path.open("rb") as file:  # numpy leaves a file open that it can't read
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(f"{path}: is a single array, no .npz archive; write it with numpy.savez")
            yield archive
    except (BadZipFile, EOFError, OSError, ValueError):
        raise UserError(f"{path}: can't be read as an .npz archive; write it with numpy.savez") from None


def _array(path: Path, archive: np.lib.npyio.NpzFile, name: str) -> NDArray[Any]:
    if name not in archive.files:
        holds = ", ".join(archive.files) or "nothing"
        raise UserError(f"{path}: has no array {name}; it holds {holds}")
    try:
        array: NDArray[Any] = archive[name]
    except ValueError as error:
        pickled = "allow_pickle" in str(error)
        reason = "holds pickled objects, which are never loaded" if pickled else "is damaged or no array"
        raise UserError(f"{path}: {name} {reason}; write it anew as a plain array") from None
    except (BadZipFile, EOFError, OSError, ZlibError):
        raise UserError(f"{path}: {name} is damaged; copy or write the file anew") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: {name} is damaged or no array; write it anew as a plain array")
    return array
