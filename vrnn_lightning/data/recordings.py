"""Recordings as sequences of frames, raw or log-mel, read when they are asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from vrnn_lightning.batch import SequenceSample
from vrnn_lightning.data.audio import SEEKABLE, opened, read_samples
from vrnn_lightning.data.sequences import AugmentedSequences
from vrnn_lightning.errors import UserError

if TYPE_CHECKING:
    from soundfile import SoundFile

__all__ = ["FLOOR", "PCM16", "Crops", "LogMelFrames", "RawFrames", "Recordings", "mel_filters"]

PCM16 = 32768.0
"""What 16-bit files call an amplitude of 1."""
FLOOR = 1e-6
"""Power that is added to each band: silence has a logarithm."""
BLOCK = 1024
"""Frames that are in memory at once as windows of samples."""


@dataclass(frozen=True)
class RawFrames:
    """Frames of samples one after another; ``pad`` fills the last one, and ``units`` are those of ``Speech``."""

    size: int
    pad: bool
    units: str

    def count(self, samples: int) -> int:
        """Return the number of frames of so many samples."""
        return -(-samples // self.size) if self.pad else samples // self.size

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return the first sample of frames ``first`` to ``last - 1``, and one past the last."""
        return first * self.size, last * self.size

    def cut(self, samples: NDArray[np.floating[Any]]) -> tuple[NDArray[np.floating[Any]], NDArray[np.bool_] | None]:
        """Return the frames of samples and the mask of observed values, each of shape (frames, features)."""
        if self.units == "pcm16":
            samples = (samples * np.float32(PCM16)).round().clip(-PCM16, PCM16 - 1)
        elif self.units == "amplitude":
            samples = samples.clip(-1, 1)
        rest = len(samples) % self.size
        if rest == 0 or not self.pad:
            return samples[: len(samples) - rest].reshape(-1, self.size), None
        frames = np.pad(samples, (0, self.size - rest)).reshape(-1, self.size)
        observed = np.ones(frames.shape, dtype=bool)
        observed[-1, rest:] = False
        return frames, observed


@dataclass(frozen=True)
class LogMelFrames:
    r"""Logarithms of the power in bands of equal width on the mel scale.

    .. math:: x_{t,b} = \log\Big(\epsilon + \sum_k m_b(f_k) \big|\mathrm{DFT}_k(w \cdot s_{th .. th + n})\big|^2\Big)

    with the hop :math:`h`, a periodic Hann window :math:`w` of :math:`n` samples, filled with zeros to the next power
    of two, triangular filters :math:`m_b` and :math:`\epsilon = 10^{-6}`, for amplitudes in [-1, 1]. Frame t begins at
    sample th: there is no padding in front, so part of a recording has the frames that the whole has there.

    Args:
        rate: Hz.
        hop: Samples from the beginning of one frame to the next.
        window: Samples of a frame, at least ``hop``.
        bands: Number of filters.
        pad: Fill a last window with zeros; else the rest is left out.

    Raises:
        UserError: A band is so narrow that no frequency of the transform lies in it.
    """

    rate: int
    hop: int
    window: int
    bands: int
    pad: bool

    def __post_init__(self) -> None:
        empty = ~mel_filters(self.bands, self._size, self.rate).any(axis=0)
        if empty.any():
            raise UserError(
                f"--data.mel_bands {self.bands}: band {empty.argmax()} holds no frequency of a window of {self.window} "
                f"samples at {self.rate} Hz. Fix: lower it or raise --data.mel_window"
            )

    def count(self, samples: int) -> int:
        """Return the number of frames of so many samples."""
        beyond = samples - self.window
        if self.pad:
            return 1 + max(0, -(-beyond // self.hop)) if samples else 0
        return 1 + beyond // self.hop if beyond >= 0 else 0

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return the first sample that frames ``first`` to ``last - 1`` read, and one past the last."""
        return first * self.hop, (last - 1) * self.hop + self.window

    def cut(self, samples: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float32], None]:
        """Return the frames of samples, shape (frames, bands), and no mask: all are observed."""
        from scipy.signal.windows import hann

        frames = self.count(len(samples))
        needed = self.span(0, frames)[1] if frames else 0
        padded = np.pad(samples, (0, max(0, needed - len(samples))))[:needed]
        result = np.empty((frames, self.bands), dtype=np.float32)
        filters, window = mel_filters(self.bands, self._size, self.rate), hann(self.window, sym=False)
        for first in range(0, frames, BLOCK):
            last = min(first + BLOCK, frames)
            start, stop = self.span(first, last)
            windows = np.lib.stride_tricks.sliding_window_view(padded[start:stop], self.window)[:: self.hop]
            spectrum = np.fft.rfft(windows * window, self._size)
            power = spectrum.real**2 + spectrum.imag**2
            result[first:last] = np.log(power @ filters + FLOOR)
        return result, None

    @property
    def _size(self) -> int:
        return 1 << (self.window - 1).bit_length()


@lru_cache
def mel_filters(bands: int, size: int, rate: int) -> NDArray[np.float64]:
    r"""Return triangular filters for the power spectrum of a discrete Fourier transform.

    The corners :math:`f_0 < \dots < f_{B+1}` lie equally far apart from 0 to rate / 2 on the mel scale (O'Shaughnessy
    1987, as in HTK); filter b rises from 0 at :math:`f_b` to 1 at :math:`f_{b+1}` and falls to 0 at :math:`f_{b+2}`:

    .. math:: \mathrm{mel}(f) = 2595 \log_{10}(1 + f / 700)

    Args:
        bands: Number of filters, B.
        size: Samples of the transform.
        rate: Hz.

    Returns:
        Weights of shape (size // 2 + 1, bands).

    >>> mel_filters(2, 8, 1400).T.round(3).tolist()
    [[0.0, 0.962, 0.267, 0.0, 0.0], [0.0, 0.0, 0.733, 0.606, 0.0]]
    """
    highest = 2595 * np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, highest, bands + 2) / 2595) - 1)
    low, center, high = corners[:-2], corners[1:-1], corners[2:]
    frequencies = np.arange(size // 2 + 1)[:, None] * rate / size
    rising, falling = (frequencies - low) / (center - low), (high - frequencies) / (high - center)
    return np.maximum(0, np.minimum(rising, falling))


@dataclass(frozen=True)
class Recordings:
    """The files ``names`` below ``root`` as frames of samples at ``sample_rate`` Hz; ``lengths`` are their frames."""

    root: Path
    names: list[str]
    lengths: list[int]
    sample_rate: int
    frames: RawFrames | LogMelFrames

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> SequenceSample:
        with opened(self.root / self.names[index]) as file:
            return self._read(index, file)

    def window(self, index: int, first: int, last: int, /) -> SequenceSample | None:
        """Return frames ``first`` to ``last - 1`` of a recording, or ``None`` if its file must be read whole."""
        with opened(self.root / self.names[index]) as file:
            return self._read(index, file, *self.frames.span(first, last)) if file.subtype in SEEKABLE else None

    def _read(self, index: int, file: SoundFile, start: int = 0, stop: int | None = None) -> SequenceSample:
        name = self.names[index]
        x, observed = self.frames.cut(read_samples(self.root / name, file, self.sample_rate, start, stop))
        return SequenceSample(torch.from_numpy(x), None if observed is None else torch.from_numpy(observed), name=name)


@dataclass(frozen=True, kw_only=True)
class Crops(AugmentedSequences):
    """A stretch of ``crop`` frames of each recording, redrawn every epoch, or all of a recording that is no longer."""

    sequences: Recordings
    crop: int

    @property
    def lengths(self) -> list[int]:
        """Frames of each crop."""
        return [min(self.crop, steps) for steps in self.sequences.lengths]

    def __getitem__(self, index: int, /) -> SequenceSample:
        steps = min(self.crop, self.sequences.lengths[index])
        part = self.window(index, 0, steps)
        if part is not None:
            return part
        first, whole = self._first(index), self.sequences[index]
        observed = None if whole.observed is None else whole.observed[first : first + steps]
        return SequenceSample(whole.x[first : first + steps], observed, name=whole.name)

    def window(self, index: int, first: int, last: int, /) -> SequenceSample | None:
        """Return frames ``first`` to ``last - 1`` of a crop, or ``None`` if its file must be read whole."""
        start = self._first(index)
        return self.sequences.window(index, start + first, start + last)

    def _first(self, index: int) -> int:
        """Return the frame at which the crop of a recording begins."""
        file = crc32(os.fsencode(self.sequences.names[index]))
        spare = max(0, self.sequences.lengths[index] - self.crop)
        return int(np.random.default_rng((self.seed, self.epoch, file)).integers(spare + 1))
