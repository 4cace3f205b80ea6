"""The headers of a corpus' files, cached from one run to the next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vrnn_lightning.data.audio import check_samples, read_header
from vrnn_lightning.data.cache import digest, recall, remember
from vrnn_lightning.data.invalid_files import InvalidFiles
from vrnn_lightning.data.progress import tracked
from vrnn_lightning.files import MAX_GB, explained

__all__ = ["IndexedFile", "index_audio"]


class IndexedFile(NamedTuple):
    """A file of a corpus: the content of its header, its size in bytes, and its last change in nanoseconds."""

    samples: int
    rate: int
    channels: int
    size: int
    modified: int
    is_checked: bool
    """True where it was once read to its end."""


def index_audio(
    root: Path, names: Sequence[str], invalid: InvalidFiles, max_gb: float = MAX_GB
) -> dict[str, IndexedFile]:
    """Return the headers of a corpus' files, from the user's cache folder where size and time are the same.

    If invalid files are skipped, each file is read to its end, once: all damage is known before the splits are drawn.

    Args:
        root: The folder of the corpus.
        names: Paths below it.
        invalid: Decides about files that can't be used.
        max_gb: Gigabytes that the samples of a file may take, or 16 times its size.

    Raises:
        UserError: A file can't be used, and ``invalid`` does not skip it.
    """
    key = f"audio-1-{digest(str(root.resolve()))}"
    cached: dict[str, list[int]] = recall(key) or {}
    known: dict[str, IndexedFile] = {}
    changed: list[tuple[str, int, int]] = []
    for name in names:
        with invalid.tolerated(), explained(root / name):
            stat = (root / name).stat()
            file = IndexedFile(*cached[name]) if name in cached else None  # type: ignore[arg-type]  # JSON
            if (
                file
                and (file.size, file.modified) == (stat.st_size, stat.st_mtime_ns)
                and (file.is_checked or not invalid.skip)
            ):
                known[name] = file
            else:
                changed.append((name, stat.st_size, stat.st_mtime_ns))
    for name, size, modified in tracked(changed, "reading files" if invalid.skip else "reading headers"):
        with invalid.tolerated():
            header = read_header(root / name, max_gb)
            if invalid.skip:
                check_samples(root / name)
            known[name] = IndexedFile(*header, size, modified, invalid.skip)
    if changed:
        remember(key, cached | known)
    return {name: known[name] for name in names if name in known}
