"""Data sets that may be fetched from where they are published, checked, and put down as datamodules read them.

pooch checks and names files; it restarts a broken download, so :class:`_Resuming` does the transfer for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
import shutil
import sys
import wave
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vrnn_lightning.data.rolls import read_note_lists
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.data.unpickling import unpickle
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, flush

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from requests import Response

__all__ = ["SOURCES", "Source", "content_sum", "fetch"]

GITHUB, RAW = "https://github.com", "https://raw.githubusercontent.com"
TIMEOUT = 30
"""Seconds for which a server may be silent."""
CHUNK = 2**14
"""Bytes that are written at once; of those that are not full, none where a transfer breaks off."""
LARGEST = 2**28
"""Bytes that an archive may unpack to."""
SPLITS: dict[Split, str] = {"train": "train", "val": "valid", "test": "test"}
"""What archives call each split."""


class _ContentError(Exception):
    """What was fetched is not what the data set holds; the message says why."""


@dataclass(frozen=True)
class Source:
    """A data set and where it is published.

    Args:
        title: What it is called in messages.
        files: Address of each file by the name that it gets, with pooch's checksum where the publisher's is known.
        by_hand: What to do with files that were fetched by hand; ``{root}`` is where the data belong.
        holds: Pattern of files that a folder with the data holds; ``None`` where the data are one archive.
        convert: Turns a folder of fetched files into what is put down; ``None`` puts down the folder itself.
        content: SHA-256 of what was put down, by :func:`content_sum`; ``None`` where the files have checksums.
    """

    title: str
    files: dict[str, tuple[str, str | None]]
    by_hand: str
    holds: str | None = None
    convert: Callable[[Path, Path], None] | None = None
    content: str | None = None


def fetch(name: str, root: Path) -> None:
    """Put a data set at ``root``, unless there is something already.

    Files are fetched into the folder ``{root}.part`` beside it, checked, and renamed into their place at once when all
    is there; so what lies at ``root`` is whole. A transfer that breaks off continues in the next call. A second process
    that fetches the same waits for the first.

    Call it from ``prepare_data``, which Lightning runs in one process per node, before ``setup``::

        def prepare_data(self):
            if self.download:
                fetch("fsdd", self.root)

    Args:
        name: A key of ``SOURCES``: "fsdd", "jsb", "mnist" or "omniglot".
        root: Where the data belong: an ``.npz`` archive ("jsb", "omniglot"), or a folder that is empty or not there.

    Raises:
        UserError: A file can't be fetched or is not what it was when the sums were taken, or ``root`` can't hold it.
    """
    source = SOURCES[name]
    if _there(source, root):
        return
    if root.exists() and Path.cwd().is_relative_to(root.resolve()):
        raise UserError(f"--data.root {root}: is the working directory; name a folder below it to download into")
    staging = root.absolute().with_name(f"{root.name}.part")
    with explained(staging, "--data.root"), _alone(staging):
        if not _there(source, root):
            _put(source, root, staging)


def _there(source: Source, root: Path) -> bool:
    """Return whether there is nothing to fetch; refuse a root that may not become what is fetched."""
    archive = source.holds is None
    if archive != (root.suffix == ".npz"):
        kind = "an archive: let the name end in .npz" if archive else "a folder: give it a name without .npz"
        raise UserError(f"--data.root {root}: {source.title} is downloaded as {kind}")
    if not root.exists():
        return False
    if source.holds is None or root.is_file():
        return True
    if any(root.rglob(source.holds)):
        return True
    if any(root.iterdir()):
        raise UserError(
            f"--data.root {root}: holds other things than {source.title} ({source.holds}); "
            "name an empty folder, or a new one, to download into"
        )
    return False


def _put(source: Source, root: Path, staging: Path) -> None:
    """Fetch, check and put down."""
    files = staging / "files"
    for file, (address, known) in source.files.items():
        try:
            _retrieve(address, files / file, known)
        except _ContentError as error:
            raise _by_hand(source, root, f"{address}: can't be downloaded ({error})") from None
    for stray in {*files.iterdir()} - {files / file for file in source.files}:
        stray.unlink()  # what pooch left when it was killed
    content = files
    if source.convert is not None:
        content = staging / "content"
        shutil.rmtree(content, ignore_errors=True)  # what was interrupted
        try:
            source.convert(files, content)
            if content_sum(content) != source.content:
                raise _ContentError("its content is not what it was")
        except (_ContentError, UserError) as error:
            shutil.rmtree(files)
            address = next(iter(source.files.values()))[0]
            raise _by_hand(source, root, f"{address}: was downloaded and removed: {error}") from None
    for path in [*content.rglob("*"), content]:
        flush(path)
    if root.is_dir():
        root.rmdir()  # it is empty
    content.replace(root)
    flush(root.parent)
    shutil.rmtree(staging)


def _by_hand(source: Source, root: Path, problem: str) -> UserError:
    addresses = " ".join(address for address, _ in source.files.values())
    return UserError(f"{problem}; by hand: fetch {addresses} and {source.by_hand.format(root=root)}")


@contextlib.contextmanager
def _alone(staging: Path) -> Iterator[None]:
    """Hold a folder for this process, waiting for others; leave nothing but what the next call can continue with."""
    from filelock import FileLock, Timeout

    staging.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(staging.with_name(f"{staging.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{staging}: waiting for another process that downloads it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        if not any(path.is_file() for path in staging.glob("files/*")):
            shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # while it is held, so that nobody else holds what is removed
            Path(lock.lock_file).unlink()
        lock.release()


def _retrieve(address: str, path: Path, known: str | None) -> None:
    """Fetch one file, unless it is there, and check it."""
    import pooch
    import requests

    pooch.get_logger().setLevel("ERROR")
    downloader = _Resuming(path.with_name(f"{path.name}.part"))
    try:
        pooch.retrieve(address, known, path.name, path.parent, downloader=downloader)
    except requests.HTTPError as error:
        answer = error.response
        reason = f"the server answers {answer.status_code} {answer.reason}" if answer is not None else str(error)
    except requests.Timeout:
        reason = f"the server was silent for {TIMEOUT} s; the next run continues"
    except requests.RequestException:
        reason = "it broke off; the next run continues" if downloader.answered else "no connection"
    except ValueError:
        reason = "it has another checksum than the published one and was removed"
    else:
        return
    raise _ContentError(reason)


class _Resuming:
    """Fetches a file for pooch; a transfer that broke off continues, where the server can do that.

    Args:
        part: Where the file is until it is whole.
    """

    def __init__(self, part: Path) -> None:
        self.part = part
        self.answered = False

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        import requests

        start = self.part.stat().st_size if self.part.is_file() else 0
        headers = {"Accept-Encoding": "identity"}  # a range of what is compressed on the way is not a range of the file
        if start:
            headers["Range"] = f"bytes={start}-"
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            span, encoded = response.headers.get("Content-Range", ""), "Content-Encoding" in response.headers
            if response.status_code == 416 and span == f"bytes */{start}":  # only its end was not heard of
                self.part.replace(output_file)
                return
            if start and response.status_code == 416:
                self.part.unlink()
                self(url, output_file, pooch)
                return
            response.raise_for_status()
            resumed = response.status_code == 206 and span.startswith(f"bytes {start}-") and not encoded
            if response.status_code == 206 and not resumed:
                raise requests.ConnectionError(f"asked for bytes from {start} on, got {span}")
            length = response.headers.get("Content-Length", "")
            start = start if resumed else 0
            total = start + int(length) if length.isdigit() and not encoded else None
            self.answered = True
            self._write(response, start, total)
        if total is not None and self.part.stat().st_size != total:
            raise requests.ConnectionError("the connection ended early")
        self.part.replace(output_file)

    def _write(self, response: Response, start: int, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with (
            self.part.open("ab" if start else "wb") as file,
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ):
            task = progress.add_task(self.part.stem, total=total, completed=start)
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                progress.advance(task, len(chunk))


def content_sum(path: Path) -> str:
    """Return the SHA-256 of what a data set holds, whatever the files around it look like.

    Of an archive: for the splits train, valid and test a line ``{split} {sequences} {steps} {features}``, the lengths
    and the values row by row, both as little-endian 32-bit integers. Of a folder of wav files: for each, by name, a
    line ``{name} {Hz} {channels} {bytes per sample}`` and its samples as they are in the file.
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
        try:
            with wave.open(str(file)) as sound:
                form = f"{file.name} {sound.getframerate()} {sound.getnchannels()} {sound.getsampwidth()}\n"
                total.update(form.encode() + sound.readframes(sound.getnframes()))
        except (EOFError, wave.Error):
            raise _ContentError(f"{file.name} can't be read as audio") from None
    return total.hexdigest()


def _recordings(files: Path, content: Path) -> None:
    """Unpack the recordings, and of the archive nothing else."""
    content.mkdir()
    try:
        with zipfile.ZipFile(files / "recordings.zip") as archive:
            named = (
                (re.fullmatch(r"[^/\\]+/recordings/(\w+\.wav)", info.filename), info) for info in archive.infolist()
            )
            found = {match[1]: info for match, info in named if match}  # names without a path: all stay in the folder
            if sum(info.file_size for info in found.values()) > LARGEST:
                raise _ContentError(f"it unpacks to more than {LARGEST} bytes")
            for name, info in found.items():
                (content / name).write_bytes(archive.read(info))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        raise _ContentError("it is not a zip archive, or a damaged one") from None


def _chorales(files: Path, content: Path) -> None:
    parts = {split: read_note_lists(files / "chorales.json", split) for split in SPLITS}
    _write_archive(content, {SPLITS[split]: (part.values, np.array(part.lengths)) for split, part in parts.items()})


def _drawings(files: Path, content: Path) -> None:
    """Read an archive whose arrays hold an array for each drawing, as pickles."""
    found: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    try:
        with zipfile.ZipFile(files / "omniglot.npz") as archive:
            for split in SPLITS.values():
                with archive.open(f"{split}.npy") as file:
                    major, _ = np.lib.format.read_magic(file)
                    header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                    header(file)
                    drawings = [np.asarray(drawing, dtype=np.int16) for drawing in unpickle(BytesIO(file.read()))]
                found[split] = np.concatenate(drawings), np.array([len(drawing) for drawing in drawings])
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, NotImplementedError, RuntimeError):
        raise _ContentError("it is not a zip archive, or a damaged one") from None
    except (OverflowError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise _ContentError(f"it holds no drawings ({error})") from None
    _write_archive(content, found)


def _write_archive(path: Path, splits: dict[str, tuple[NDArray[Any], NDArray[Any]]]) -> None:
    arrays = {f"{split}_values": values for split, (values, _) in splits.items()}
    arrays |= {f"{split}_lengths": lengths for split, (_, lengths) in splits.items()}
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
        convert=_recordings,
        content="279823424f08296194e7bbb2d41df3cb6febbf5a3629c725403439b7410b34c9",
    ),
    "jsb": Source(
        "the JSB chorales",
        {"chorales.json": (CHORALES, None)},
        "give --data.root that file instead of {root}",
        convert=_chorales,
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
        convert=_drawings,
        content="09e7a6c974adde5d79024eb77a2d03fc055ce8d79b716bff35f27c5716f1da93",
    ),
}
"""The data sets that :func:`fetch` knows."""
