"""Writing flat archives: arrays by name in one .npz file, never pickled, whole or not at all."""

from __future__ import annotations

import shutil
import zipfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from lightning.pytorch import Trainer

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.files import explained, replacing, require_local

__all__ = ["FOLDER", "ArchiveWriter", "archive_path", "described", "run_folder", "write_archive"]

FOLDER = "--trainer.default_root_dir"
"""The option that names the folder of all runs."""


def run_folder(trainer: Trainer) -> Path:
    """Return the run's folder. A collective call.

    Raises:
        UserError: It is a remote one.
    """
    return require_local(trainer.log_dir or trainer.default_root_dir, FOLDER)


def archive_path(trainer: Trainer, name: str) -> Path:
    """Return where an archive goes in the run's folder; each of several processes has its own. A collective call."""
    suffix = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
    return run_folder(trainer) / f"{name}{suffix}.npz"


def described(batch: SequenceBatch) -> dict[str, np.ndarray]:
    """Return "names", "lengths" and "index" of a batch's sequences that have a step, each of shape (sequences,)."""
    real = (batch.lengths > 0).cpu()
    names = np.array(batch.names or [""] * len(batch), str)
    index = torch.zeros_like(batch.lengths) if batch.index is None else batch.index
    return {
        "names": names[real.numpy()],
        "lengths": batch.lengths.cpu()[real].numpy(),
        "index": index.cpu()[real].numpy(),
    }


def write_archive(path: Path, parts: list[dict[str, np.ndarray]], split: str, **more: np.ndarray) -> None:
    """Join the parts' arrays end to end and write them, whole or not at all.

    Args:
        path: The file.
        parts: Arrays by name, each part of the same names, with one row for each sequence. "index", which is not
            written, says which sequence of the split each one is: they are written in this order.
        split: Goes before the names.
        more: Arrays that are not sequences of parts.

    Raises:
        UserError: The disk is full, or the folder can't be written to.
    """
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order = columns.pop("index").argsort(kind="stable")
    columns = {key: column[order] for key, column in columns.items()}
    named = {f"{split}_{key}": value for key, value in (columns | more).items()}
    with replacing(path, FOLDER) as temporary, temporary.open("wb") as file:
        np.savez(file, **named)  # type: ignore[arg-type]  # the stub takes them for allow_pickle


class ArchiveWriter:
    """Writes the archive of a corpus that comes sequence by sequence in any order, in memory that does not grow.

    What comes lies in a hidden folder beside the archive, a file for each array; :meth:`finish` joins the files in the
    order of the sequences. In memory are 8 bytes for each sequence, and 16 for each array of it. While the files are
    joined, the disk holds everything twice.

    Args:
        path: The archive.
        split: Goes before the names of its arrays.

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
        self._folder = path.with_name(f".{path.name}.parts")
        self._index = array("q")
        self._files: dict[str, IO[bytes]] = {}
        self._empty: dict[str, np.ndarray] = {}  # of each array's type and width
        self._rows: dict[str, array[int]] = {}
        self._sizes: dict[str, array[int]] = {}  # bytes of a row: names differ
        with explained(path, FOLDER):
            shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
            self._folder.mkdir(parents=True)

    def __len__(self) -> int:
        """Return the number of sequences so far."""
        return len(self._index)

    def add(self, index: int, **arrays: np.ndarray) -> None:
        """Add a sequence.

        Args:
            index: Its place among the sequences.
            arrays: By name, the same names for each sequence, and the same type and shape but for the number of rows.

        Raises:
            UserError: The disk is full, or the folder can't be written to.
        """
        with explained(self.path, FOLDER):
            for name, values in arrays.items():
                if name not in self._files:
                    self._files[name] = (self._folder / name).open("w+b")
                    self._rows[name], self._sizes[name] = array("q"), array("q")
                    self._empty[name] = values[:0]
                if values.dtype.itemsize > self._empty[name].dtype.itemsize:
                    self._empty[name] = values[:0]
                self._files[name].write(np.ascontiguousarray(values).tobytes())
                self._rows[name].append(len(values))
                self._sizes[name].append(values.dtype.itemsize)
        self._index.append(index)

    def sequences(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """Yield arrays of each sequence, in the order of the sequences.

        Args:
            names: Of the arrays.
        """
        order = np.argsort(np.array(self._index), kind="stable")
        starts = {name: np.concatenate([[0], np.cumsum(self._nbytes(name))]) for name in names}
        for i in order.tolist():
            found = {}
            for name in names:
                empty, file = self._empty[name], self._files[name]
                kind = np.dtype(f"<U{self._sizes[name][i] // 4}") if empty.dtype.kind == "U" else empty.dtype
                file.seek(int(starts[name][i]))
                raw = file.read(int(starts[name][i + 1] - starts[name][i]))
                shape = (self._rows[name][i], *empty.shape[1:])
                found[name] = np.frombuffer(raw, kind).reshape(shape).astype(empty.dtype, copy=False)
            yield found

    def _nbytes(self, name: str) -> np.ndarray:
        width = int(np.prod(self._empty[name].shape[1:]))
        nbytes: np.ndarray = np.array(self._rows[name]) * np.array(self._sizes[name]) * width
        return nbytes

    def finish(self) -> None:
        """Write the archive and let go of the parts.

        Raises:
            UserError: The disk is full, or the folder can't be written to.
        """
        try:
            with replacing(self.path, FOLDER) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
                for name, empty in self._empty.items():
                    with archive.open(f"{self.split}_{name}.npy", "w", force_zip64=True) as file:
                        header = np.lib.format.header_data_from_array_1_0(empty)
                        header["shape"] = (sum(self._rows[name]), *empty.shape[1:])
                        header["fortran_order"] = False
                        np.lib.format.write_array_header_1_0(file, header)
                        for sequence in self.sequences(name):
                            file.write(sequence[name].tobytes())
        finally:
            self.discard()

    def discard(self) -> None:
        """Delete the parts."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # what it still held has no room either
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)
