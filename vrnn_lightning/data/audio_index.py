"""The headers of a corpus' files, remembered from one run to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vrnn_lightning.data.audio import AudioHeader, check_samples, read_header
from vrnn_lightning.data.cache import digest, recall, remember
from vrnn_lightning.data.invalid_files import InvalidFiles
from vrnn_lightning.data.progress import tracked
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import MAX_GB, explained

__all__ = ["IndexedFile", "index_audio"]


@dataclass(frozen=True)
class IndexedFile:
    """A file of a corpus.

    Args:
        header: What it says of itself.
        size: Bytes.
        modified: When it last changed, in nanoseconds.
        read: True where it was once read to its end.
    """

    header: AudioHeader
    size: int
    modified: int
    read: bool

    def packed(self) -> list[int]:
        """Return whole numbers from which :meth:`unpacked` makes the same again."""
        header = self.header
        return [header.samples, header.rate, header.channels, self.size, self.modified, int(self.read)]

    @classmethod
    def unpacked(cls, numbers: list[int]) -> IndexedFile:
        """Return what was packed."""
        samples, rate, channels, size, modified, read = numbers
        return cls(AudioHeader(samples, rate, channels), size, modified, bool(read))


def index_audio(root: Path, names: Sequence[str], bad: InvalidFiles, max_gb: float = MAX_GB) -> dict[str, IndexedFile]:
    """Return the headers of a corpus' files, and read no more files than are new or have another size or time.

    The index is kept in the user's cache folder. If bad files are to be skipped, each file is read to its end, once:
    so whatever is wrong with it is known before the splits are drawn.

    Args:
        root: The folder of the corpus.
        names: Paths below it.
        bad: What becomes of files that can't be used.
        max_gb: Gigabytes that the samples of a file may take, or 16 times its size.

    Raises:
        UserError: A file can't be used, and bad ones are not to be skipped.
    """
    key = f"audio-1-{digest(str(root.resolve()))}"
    remembered: dict[str, list[int]] = recall(key) or {}
    known: dict[str, IndexedFile] = {}
    changed: list[tuple[str, int, int]] = []
    for name in names:
        with bad.tolerated():
            size, modified = _stamp(root / name)
            old = IndexedFile.unpacked(remembered[name]) if name in remembered else None
            if old is not None and (old.size, old.modified) == (size, modified) and (old.read or not bad.skip):
                known[name] = old
            else:
                changed.append((name, size, modified))
    if changed:
        for name, size, modified in tracked(changed, "reading files" if bad.skip else "reading headers"):
            with bad.tolerated():
                header = read_header(root / name, max_gb)
                if bad.skip:
                    check_samples(root / name)
                known[name] = IndexedFile(header, size, modified, bad.skip)
        there = {name: numbers for name, numbers in remembered.items() if _is_there(root / name)}
        remember(key, there | {name: file.packed() for name, file in known.items()})
    return {name: known[name] for name in names if name in known}


def _stamp(path: Path) -> tuple[int, int]:
    """Return the size of a file in bytes, and when it last changed in nanoseconds."""
    with explained(path):
        found = path.stat()
    return found.st_size, found.st_mtime_ns


def _is_there(path: Path) -> bool:
    try:
        _stamp(path)
    except UserError:
        return False
    return True
