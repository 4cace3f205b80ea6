"""Datasets that are fetched from where they are published, checked, and stored as datamodules read them."""

from __future__ import annotations

import hashlib
import re
import wave
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrnn_lightning.data.folders import SPLIT_NAMES, ProgressBar
from vrnn_lightning.data.ink import read_sketch_rnn
from vrnn_lightning.data.rolls import read_note_lists
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, flush

__all__ = ["SOURCES", "Source", "content_sum", "fetch"]

GITHUB, RAW = "https://github.com", "https://raw.githubusercontent.com"
TIMEOUT = 30
"""Seconds for which a server may be silent."""
CHUNK = 2**14
"""Bytes that are written at once."""
SPLITS: dict[Split, str] = {split: names[0] for split, names in SPLIT_NAMES.items()}  # their names in archives


@dataclass(frozen=True)
class Source:
    """A dataset and where it is published.

    Args:
        title: Its name in messages.
        files: Address of each file by its local name, with a checksum ``md5:...`` where the publisher's is known.
        by_hand: What to do with files that were fetched by hand; ``{root}`` is where the data belong.
        holds: Pattern of files that a folder with the data holds; ``None`` where the data are one archive.
        convert: Turns a folder of fetched files into the stored data; ``None`` stores the folder itself.
        content: SHA-256 of the stored data, by :func:`content_sum`; ``None`` where the files have checksums.
    """

    title: str
    files: dict[str, tuple[str, str | None]]
    by_hand: str
    holds: str | None = None
    convert: Callable[[Path, Path], None] | None = None
    content: str | None = None


def fetch(name: str, root: Path) -> None:
    """Put a dataset at ``root``, unless something is there already.

    Files are fetched into a temporary folder beside it, checked, and renamed to ``root`` at once when all are complete.

    Call it from ``prepare_data``, which Lightning runs in one process per node, before ``setup``::

        def prepare_data(self):
            if self.download:
                fetch("fsdd", self.root)

    Args:
        name: A key of ``SOURCES``: "fsdd", "jsb", "mnist" or "omniglot".
        root: Where the data belong: an ``.npz`` archive ("jsb", "omniglot"), or a folder that is empty or not there.

    Raises:
        UserError: A file can't be fetched or has changed since its checksum was taken, or ``root`` can't hold it.
    """
    source = SOURCES[name]
    if _is_present(source, root):
        return
    with explained(root, "--data.root"):
        root.absolute().parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{root.name}.", suffix=".part", dir=root.absolute().parent) as folder:
            _store(source, root, Path(folder))


def _is_present(source: Source, root: Path) -> bool:
    """Return whether there is nothing to fetch; raise if ``root`` can't become what is fetched."""
    archive = source.holds is None
    if archive != (root.suffix == ".npz"):
        kind = "an archive. Fix: let the name end in .npz" if archive else "a folder. Fix: give a name without .npz"
        raise UserError(f"--data.root {root}: {source.title} is downloaded as {kind}")
    if source.holds is None or not root.is_dir():
        return root.exists()
    if any(root.rglob(source.holds)):
        return True
    if any(root.iterdir()):
        raise UserError(
            f"--data.root {root}: holds other things than {source.title} ({source.holds}). Fix: "
            "name an empty folder, or a new one, to download into"
        )
    return False


def _store(source: Source, root: Path, folder: Path) -> None:
    import requests

    content = files = folder / "files"
    files.mkdir()
    for file, (address, checksum) in source.files.items():
        try:
            _download(address, files / file, checksum)
        except (requests.RequestException, ValueError) as error:
            reason = str(error) if isinstance(error, ValueError) else "no connection, or it broke off"
            raise _make_error(source, root, f"{address}: can't be downloaded ({reason})") from None
    if source.convert is not None:
        content = folder / "content"
        try:
            source.convert(files, content)
            if content_sum(content) != source.content:
                raise ValueError("its content has changed")
        except (MemoryError, OSError):
            raise
        except Exception as error:  # damaged files raise anything: BadZipFile, EOFError, wave.Error ...
            address = next(iter(source.files.values()))[0]
            reason = str(error).partition(". Fix:")[0] or type(error).__name__
            raise _make_error(source, root, f"{address}: was downloaded and removed: {reason}") from None
    for path in [*content.rglob("*"), content]:
        flush(path)
    if _is_present(source, root):  # another process was faster
        return
    content.replace(root)  # an empty folder, if anything
    flush(root.absolute().parent)


def _make_error(source: Source, root: Path, problem: str) -> UserError:
    addresses = " ".join(address for address, _ in source.files.values())
    return UserError(f"{problem}. Fix: by hand, fetch {addresses} and {source.by_hand.format(root=root)}")


def _download(address: str, path: Path, checksum: str | None) -> None:
    import requests

    with requests.get(address, stream=True, timeout=TIMEOUT) as response:
        if not response.ok:
            raise ValueError(f"the server answers {response.status_code} {response.reason}")
        total = int(response.headers.get("Content-Length", 0)) or None
        bar = ProgressBar(desc=path.name, total=total, unit="B", unit_scale=True, dynamic_ncols=True, disable=None)
        with path.open("wb") as file, bar:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if total and path.stat().st_size < total:  # urllib3 1 does not look
            raise requests.ConnectionError("it broke off")
    if checksum is not None:
        algorithm, _, known = checksum.partition(":")
        if hashlib.new(algorithm, path.read_bytes()).hexdigest() != known:
            raise ValueError("it has another checksum than the published one")


def content_sum(path: Path) -> str:
    """Return the SHA-256 of the content of a dataset, independent of the container's bytes.

    For an archive it is taken over, for the splits train, valid and test, a line ``{split} {sequences} {steps}
    {features}``, the lengths and the values row by row, both as little-endian 32-bit integers. For a folder of wav
    files it is taken over, for each in order, a line ``{name} {Hz} {channels} {bytes per sample}`` and its samples as
    they are in the file.
    """
    total = hashlib.sha256()
    if path.is_file():
        with np.load(path, allow_pickle=False) as archive:
            for split in SPLITS.values():
                values, lengths = archive[f"{split}_values"], archive[f"{split}_lengths"]
                total.update(f"{split} {len(lengths)} {len(values)} {values.shape[1]}\n".encode())
                total.update(lengths.astype("<i4").tobytes() + values.astype("<i4").tobytes())
        return total.hexdigest()
    for file in sorted(path.glob("*.wav")):
        with wave.open(str(file)) as sound:
            form = f"{file.name} {sound.getframerate()} {sound.getnchannels()} {sound.getsampwidth()}\n"
            total.update(form.encode() + sound.readframes(sound.getnframes()))
    return total.hexdigest()


def _unpack_recordings(files: Path, content: Path) -> None:
    content.mkdir()
    with zipfile.ZipFile(files / "recordings.zip") as archive:
        for name in archive.namelist():
            if match := re.fullmatch(r"[^/\\]+/recordings/(\w+\.wav)", name):  # without a path: it stays in the folder
                (content / match[1]).write_bytes(archive.read(name))


def _convert_chorales(files: Path, content: Path) -> None:
    parts = {word: read_note_lists(files / "chorales.json", split) for split, word in SPLITS.items()}
    _write_archive(content, {word: np.split(part.values, part.bounds[:-1, 1]) for word, part in parts.items()})


def _convert_drawings(files: Path, content: Path) -> None:
    parts = {word: read_sketch_rnn(files / "omniglot.npz", word) for word in SPLITS.values()}
    _write_archive(content, {word: [np.asarray(x, dtype=np.int16) for x in part] for word, part in parts.items()})


def _write_archive(path: Path, splits: dict[str, list[NDArray[Any]]]) -> None:
    arrays = {f"{word}_values": np.concatenate(sequences) for word, sequences in splits.items()}
    arrays |= {f"{word}_lengths": np.array([len(x) for x in sequences]) for word, sequences in splits.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes them for options


MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
DIGITS = f"{GITHUB}/Jakobovski/free-spoken-digit-dataset/archive/26eb9aaf76e81b692f806f9140c2d2777410d7a1.zip"
CHORALES = f"{RAW}/czhuang/JSB-Chorales-dataset/9a7f733ddb4ed91f48da64ac7f0f621c34aadd4d/jsb-chorales-quarter.json"
DRAWINGS = f"{RAW}/hardmaru/sketch-rnn-datasets/7c854dee76090aa18c321c7af2cede815bbd475e/omniglot/omniglot.npz"

SOURCES = {
    "fsdd": Source(
        "the spoken digits",
        {"recordings.zip": (DIGITS, None)},  # GitHub repacks it now and then: what is in it is checked
        "unpack its folder recordings as {root}",
        holds="*.wav",
        convert=_unpack_recordings,
        content="279823424f08296194e7bbb2d41df3cb6febbf5a3629c725403439b7410b34c9",
    ),
    "jsb": Source(
        "the JSB chorales",
        {"chorales.json": (CHORALES, None)},
        "give --data.root that file instead of {root}",
        convert=_convert_chorales,
        content="8004694f3be2bef51a8b564a804225a7da3c744edf878c91759117af4aaac8ec",
    ),
    "mnist": Source(
        "MNIST",
        {
            f"{name}-ubyte.gz": (f"{MNIST}/{name}-ubyte.gz", f"md5:{md5}")
            for name, md5 in (
                ("train-images-idx3", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                ("train-labels-idx1", "d53e105ee54ea40749a09fcbcd1e9432"),
                ("t10k-images-idx3", "9fb629c4189551a2d022fa330f9573f3"),
                ("t10k-labels-idx1", "ec29112dd5afa0611ce80d1b7f02629c"),
            )
        },
        "put them into the folder {root}",
        holds="*-images*idx3-ubyte*",
    ),
    "omniglot": Source(
        "the Omniglot strokes",
        {"omniglot.npz": (DRAWINGS, None)},
        "save it as {root}",
        convert=_convert_drawings,
        content="09e7a6c974adde5d79024eb77a2d03fc055ce8d79b716bff35f27c5716f1da93",
    ),
}
"""The datasets that :func:`fetch` knows."""
