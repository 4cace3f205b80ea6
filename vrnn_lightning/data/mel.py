"""Log-mel frames of sound."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrnn_lightning.errors import UserError

__all__ = ["LogMelFrames", "mel_filters"]

FLOOR = 1e-6
"""Power that is added to each band: silence has a logarithm."""
BLOCK = 1024
"""Frames that are in memory at once as windows of samples."""


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
