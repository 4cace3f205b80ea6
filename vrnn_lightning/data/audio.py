"""Audio files: their headers, also cached, whether their content is complete, and any part of their samples."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vrnn_lightning.data.cache import digest, recall, remember
from vrnn_lightning.data.folders import InvalidFiles, tracked
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import MAX_GB, explained, require_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from soundfile import SoundFile

__all__ = [
    "AUDIO_SUFFIXES", "HIGHEST_RATE", "SEEKABLE", "AudioFile", "check_samples", "index_audio", "opened", "read_header",
    "read_samples", "resampled_length",
]  # fmt: skip

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".sph")

HIGHEST_RATE = 10**6
"""Hz that sound may have: a resampling filter for higher rates takes gigabytes."""
SEEKABLE = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"}
"""Encodings, flac's included, of which libsndfile reads a part exactly as in the whole file."""
STREAMED = 0x7FFFF000  # programs that write into a pipe declare such sizes or larger ones
SPHERE_HEADER = 1024
LAST_PAGE = 2**16 + 512  # an ogg page is never longer
BLOCK = 2**20
"""Samples per channel that are in memory at once while a file is read to its end."""


class AudioFile(NamedTuple):
    """The samples per channel, the rate in Hz and the channels of a file, its bytes, its last change in nanoseconds."""

    samples: int
    rate: int
    channels: int
    size: int
    modified: int
    is_checked: bool = False
    """True where it was once read to its end."""


def read_header(path: Path, max_gb: float = MAX_GB) -> AudioFile:
    """Read a file's header, and check that the file is as long as it declares.

    Damage in the middle shows only when samples are read. They may take ``max_gb`` gigabytes in float32, or 16 times
    the file's size.

    Raises:
        UserError: It can't be read as audio, is empty, breaks off, or does not declare its length.
    """
    with explained(path), path.open("rb") as file:
        stat = os.fstat(file.fileno())
        head = file.read(SPHERE_HEADER)
        file.seek(max(0, stat.st_size - LAST_PAGE))
        tail = file.read()
    with opened(path) as sound:
        header = AudioFile(sound.frames, sound.samplerate, sound.channels, stat.st_size, stat.st_mtime_ns)
        if header.samples == 0:
            raise _make_error(path, "it holds no samples")
        require_size(path, 4 * header.samples * header.channels, max_gb)
        if header.rate > HIGHEST_RATE:
            raise _make_error(path, f"its header says {header.rate} Hz")
        if sound.subtype.startswith("MPEG"):
            raise _make_error(path, "it is MP3")
        if _breaks_off(sound, head, tail):
            raise _make_error(path, "it breaks off")
    return header


def _breaks_off(sound: SoundFile, head: bytes, tail: bytes) -> bool:
    """Return whether a file, given with its first and last bytes, is shorter than it declares: libsndfile reads on."""
    import soundfile

    if sound.format == "FLAC":
        with suppress(soundfile.LibsndfileError):
            sound.seek(sound.frames - 1)
            return len(sound.read(1)) == 0
        return True
    if sound.format == "NIST":
        count = re.search(rb"sample_count -i (\d+)", head)
        return count is not None and int(count[1]) > sound.frames
    if sound.format == "OGG":
        page = tail.rfind(b"OggS")
        ends = page >= 0 and len(tail) > page + 26 and tail[page + 5] & 4
        table = tail[page + 27 : page + 27 + tail[page + 26]] if ends else b""
        return not ends or page + 27 + len(table) + sum(table) > len(tail)
    log = re.search(r"^data : (\d+) \(should be|^\*\*\* Calculated frame count", sound.extra_info, re.MULTILINE)
    return log is not None and int(log[1] or 0) < STREAMED


def check_samples(path: Path) -> None:
    """Read a file to its end, block by block; raise a UserError if it is damaged or holds NaN or infinite samples."""
    with opened(path) as file:
        left = file.frames
        while left:
            samples = file.read(min(BLOCK, left), dtype="float32", always_2d=True)
            if len(samples) == 0:
                raise _make_error(path, "it breaks off")
            _require_finite(path, samples)
            left -= len(samples)


def index_audio(
    root: Path, names: Sequence[str], invalid: InvalidFiles, max_gb: float = MAX_GB
) -> dict[str, AudioFile]:
    """Return the headers of files below a folder, from the user's cache folder where size and time are the same.

    If ``invalid`` skips files that can't be used, each file is read to its end, once: all damage is known before the
    splits are drawn. ``max_gb`` is that of :func:`read_header`.

    Raises:
        UserError: A file can't be used, and ``invalid`` does not skip it.
    """
    key = f"audio-1-{digest(str(root.resolve()))}"
    cached = {name: AudioFile(*file) for name, file in (recall(key) or {}).items()}
    files: dict[str, AudioFile] = {}
    for name in tracked(names, "reading files" if invalid.skip else "reading headers"):
        path = root / name
        with invalid.tolerated(), explained(path):
            stat, file = path.stat(), cached.get(name)
            stamp = stat.st_size, stat.st_mtime_ns
            if file is None or (file.size, file.modified) != stamp or (invalid.skip and not file.is_checked):
                file = read_header(path, max_gb)
                if invalid.skip:
                    check_samples(path)
                    file = file._replace(is_checked=True)
            files[name] = file
    if any(cached.get(name) != file for name, file in files.items()):
        remember(key, cached | files)
    return files


@contextmanager
def opened(path: Path) -> Iterator[SoundFile]:
    """Open a file for :func:`read_samples`; raise a UserError for what can't be read in the block."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            yield file
    except soundfile.LibsndfileError as error:
        raise _make_error(path, error.error_string) from None
    except UnicodeEncodeError:
        raise _make_error(path, "its name is not UTF-8") from None


def read_samples(
    path: Path, file: SoundFile, sample_rate: int, start: int = 0, stop: int | None = None
) -> NDArray[np.floating[Any]]:
    """Return the mean of the channels in [-1, 1], shape (samples,), and read no more of the file than needed.

    Args:
        path: The file's name, for messages.
        file: The file.
        sample_rate: Hz of the result.
        start: The first sample, counted at ``sample_rate``.
        stop: One past the last sample; ``None``, or a number past the end, for the file's end.

    Raises:
        UserError: Samples are missing, or are not finite.
    """
    up, down = _reduce_ratio(file.samplerate, sample_rate)
    end = resampled_length(file.frames, file.samplerate, sample_rate)
    start, stop = min(start, end), end if stop is None else min(stop, end)
    begin, end = (start, stop) if up == down else _find_source_span(start, stop, up, down, file.frames)
    if begin:
        file.seek(begin)
    samples = file.read(end - begin, dtype="float32", always_2d=True)
    if len(samples) < end - begin:
        raise _make_error(path, "it breaks off")
    mono: NDArray[np.floating[Any]] = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    _require_finite(path, mono)
    if up == down:
        return mono
    from scipy.signal import resample_poly

    before = begin * up // down
    converted: NDArray[np.floating[Any]] = resample_poly(mono, up, down)[start - before : stop - before]
    return converted.astype(mono.dtype, copy=False)


def resampled_length(samples: int, rate: int, wanted: int) -> int:
    """Return the number of samples after a change of rate, both in Hz.

    >>> resampled_length(44101, 44100, 16000)
    16001
    """
    up, down = _reduce_ratio(rate, wanted)
    return -(-samples * up // down)


def _require_finite(path: Path, samples: NDArray[np.floating[Any]]) -> None:
    if not math.isfinite(samples.sum(dtype="float64")):
        raise UserError(f"{path}: holds NaN or infinite samples. Fix: correct or remove it")


def _find_source_span(start: int, stop: int, up: int, down: int, length: int) -> tuple[int, int]:
    """Return the span of a file of ``length`` samples on which resampled ones from ``start`` to ``stop`` depend.

    Its first sample coincides with a resampled one, so that a part is resampled in step with the whole.
    """
    half = 10 * max(up, down) // up + 1  # samples to each side that resample_poly's filter spans
    begin = max(0, start * down // up - half) // down * down
    return begin, min(length, -(-stop * down // up) + half)


def _reduce_ratio(rate: int, wanted: int) -> tuple[int, int]:
    common = math.gcd(rate, wanted)
    return wanted // common, rate // common


def _make_error(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: cannot be read as audio ({reason.strip() or 'it is damaged'}). Fix: remove it or convert it to wav"
    )
