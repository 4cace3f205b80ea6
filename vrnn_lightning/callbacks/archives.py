"""Flat archives: arrays by name in one .npz file, never pickled, whole or not at all."""

from __future__ import annotations

import zipfile
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer

from vrnn_lightning.files import explained, replacing, require_local, temporary_name

__all__ = ["FOLDER", "ArchiveWriter", "archive_path", "run_folder"]

FOLDER = "--trainer.default_root_dir"
"""The option that names the folder of all runs."""


def run_folder(trainer: Trainer) -> Path:
    """Return the run's folder, or raise if it is a remote one. A collective call."""
    return require_local(trainer.log_dir or trainer.default_root_dir, FOLDER)


def archive_path(trainer: Trainer, name: str) -> Path:
    """Return where an archive goes in the run's folder; each of several processes has its own. A collective call."""
    suffix = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
    return run_folder(trainer) / f"{name}{suffix}.npz"


@dataclass
class _Column:
    """An array of the archive, whose rows lie sequence by sequence in the writer's file."""

    empty: np.ndarray  # of its type and width; names differ in length, the longest counts
    rows: int = 0
    places: array[int] = field(default_factory=lambda: array("q"))  # where each sequence's rows begin


class ArchiveWriter:
    """Writes the archive of a split that comes sequence by sequence in any order, in memory that does not grow.

    The arrays lie in a file without a name beside the archive, which ends with the process; :meth:`finish` joins them
    in the order of the sequences. Memory holds 8 bytes for each sequence, and as many for each array of it. While they
    are joined, the disk holds everything twice.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     writer = ArchiveWriter(Path(folder) / "a.npz", "test")
    ...     writer.add(1, values=np.ones((2, 1)), names=np.array(["b"]))
    ...     writer.add(0, values=np.zeros((1, 1)), names=np.array(["alpha"]))
    ...     writer.finish()
    ...     archive = np.load(Path(folder) / "a.npz")
    ...     archive["test_names"].tolist(), archive["test_values"].ravel().tolist()
    (['alpha', 'b'], [0.0, 1.0, 1.0])
    """

    def __init__(self, path: Path, split: str) -> None:
        self.path, self.split = path, split
        self._index = array("q")
        self._columns: dict[str, _Column] = {}
        with explained(path, FOLDER):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(temporary_name(path.name))
            self._file = temporary.open("w+b")
            temporary.unlink()

    def __len__(self) -> int:
        return len(self._index)

    def declare(self, **arrays: np.ndarray) -> None:
        """Give names, types and widths of arrays, which an archive without a sequence has, too."""
        for name, values in arrays.items():
            self._columns.setdefault(name, _Column(values[:0]))

    def add(self, index: int, **arrays: np.ndarray) -> None:
        """Add a sequence: its place, and its arrays, of the same names, types and widths for each sequence."""
        self.declare(**arrays)
        with explained(self.path, FOLDER):
            for name, values in arrays.items():
                column = self._columns[name]
                if values.dtype.itemsize > column.empty.dtype.itemsize:
                    column.empty = values[:0]
                column.rows += len(values)
                column.places.append(self._file.tell())
                np.lib.format.write_array(self._file, values)
        self._index.append(index)

    def sequences(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """Yield the named arrays of each sequence, in the order of the sequences."""
        for i in np.argsort(np.array(self._index), kind="stable").tolist():
            sequence = {}
            for name in names:
                self._file.seek(self._columns[name].places[i])
                rows = np.lib.format.read_array(self._file)
                sequence[name] = rows.astype(self._columns[name].empty.dtype, copy=False)
            yield sequence

    def finish(self, **more: np.ndarray) -> None:
        """Write the archive, with further arrays whose rows are not sequences, and delete the parts."""
        try:
            with replacing(self.path, FOLDER) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
                for name, column in self._columns.items():
                    with archive.open(f"{self.split}_{name}.npy", "w", force_zip64=True) as file:
                        header = np.lib.format.header_data_from_array_1_0(column.empty)
                        header |= {"shape": (column.rows, *column.empty.shape[1:]), "fortran_order": False}
                        np.lib.format.write_array_header_1_0(file, header)
                        for sequence in self.sequences(name):
                            file.write(sequence[name].tobytes())
                for name, values in more.items():
                    with archive.open(f"{self.split}_{name}.npy", "w") as file:
                        np.lib.format.write_array(file, values)
        finally:
            self.discard()

    def discard(self) -> None:
        with suppress(OSError):  # there was no room for the rest
            self._file.close()
