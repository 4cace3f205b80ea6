"""Pictures of a single sequence of each modality, drawn into matplotlib's axes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.axes import Axes
from scipy.signal import ShortTimeFFT
from torch import Tensor

from vrnn_lightning.data import rows_to_strokes
from vrnn_lightning.data.rolls import KEYS, LOWEST

__all__ = ["DECIBELS", "draw_series", "draw_strokes", "find_kind", "find_panels", "is_binary", "time_label"]

MISSING = "lightsteelblue"
"""Colour of missing values."""
MOST_LINES = 12
"""Features up to which a series is drawn as lines."""
DECIBELS = 70
"""Range of a spectrogram's colours, downward from the loudest."""
Panel = Callable[[Axes, np.ndarray, int | None], None]
"""Draws a sequence, shape (time, features), with the sample rate of audio."""


def is_binary(sequences: list[Tensor]) -> bool:
    """Return whether sequences of more than one feature hold nothing but 0, 1 and NaN."""
    every = torch.cat(sequences)
    return every.shape[1] > 1 and bool(((every == 0) | (every == 1) | every.isnan()).all())


def find_panels(kind: str) -> list[Panel]:
    """Return the functions that draw a kind of pictures, one below the other."""
    return _PANELS.get(kind, [draw_series])


def find_kind(modality: str, rows: dict[str, list[Tensor]]) -> tuple[str, dict[str, list[Tensor]]]:
    """Return the kind of pictures that show a modality, and the values to draw: series are lines or "pixels"."""
    if modality != "series":
        return modality, rows
    first = torch.cat(next(iter(rows.values())))
    finite = torch.isfinite(first)
    binary = is_binary([first])
    if not finite.any() or (first.shape[1] <= MOST_LINES and not binary):
        return "series", rows
    low, high = first.masked_fill(~finite, torch.inf).amin(0), first.masked_fill(~finite, -torch.inf).amax(0)
    if binary:
        low, high = torch.zeros_like(low), torch.ones_like(high)
    low = torch.where(low <= high, low, torch.zeros_like(low))  # of a feature that is missing throughout
    spread = torch.where(high > low, high - low, torch.ones_like(low))
    return "pixels", {name: [(x - low) / spread for x in sequences] for name, sequences in rows.items()}


def time_label(kind: str, sample_rate: int | None) -> str:
    """Return the unit of the time axis."""
    if kind == "audio":
        return "s" if sample_rate else "sample"
    return "step" if kind in ("series", "pixels", "roll") else ""


def draw_series(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    """Draw a line for each feature."""
    axes.plot(x, linewidth=1, marker="." if len(x) == 1 else None)
    axes.margins(x=0)


def _draw_waveform(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    wave = x.ravel()
    axes.plot(np.arange(wave.size) / (sample_rate or 1), wave, linewidth=0.4)
    axes.margins(x=0)
    axes.set_ylabel("amplitude")


def _draw_spectrogram(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    wave, rate = np.where(np.isfinite(x), x, 0.0).ravel(), sample_rate or 1
    window = np.hanning(min(256, wave.size) + 2)[1:-1]
    transform = ShortTimeFFT(window, hop=max(1, window.size // 4), fs=rate)
    power = 20 * np.log10(np.abs(transform.stft(wave)) + 1e-6)
    top, extent = power.max(), transform.extent(wave.size)
    axes.imshow(power, origin="lower", aspect="auto", cmap="magma", vmin=top - DECIBELS, vmax=top, extent=extent)
    axes.set_xlim(0, wave.size / rate)
    axes.set_ylabel("Hz" if sample_rate else "cycles / sample")


def _draw_roll(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    """Draw time to the right and keys upward, black for a certain sound; a piano's with the C of each octave."""
    lowest = LOWEST if x.shape[1] == KEYS else 0
    _draw_grid(axes, x, lowest)
    if lowest:
        axes.set_yticks(range(24, LOWEST + KEYS, 12), [f"C{octave}" for octave in range(1, 9)])
        axes.grid(axis="y", linewidth=0.3, alpha=0.5)


def _draw_pixels(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    """Draw time to the right and features upward, from white, 0, to black, 1."""
    _draw_grid(axes, x, 0)
    axes.set_ylabel("feature")


def _draw_grid(axes: Axes, x: np.ndarray, lowest: int) -> None:
    steps, lines = x.shape
    area = (-0.5, steps - 0.5, lowest - 0.5, lowest + lines - 0.5)
    axes.set_facecolor(MISSING)
    axes.imshow(x.T, origin="lower", aspect="auto", cmap="gray_r", interpolation="nearest", extent=area, vmin=0, vmax=1)


def _draw_image(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    known = x[np.isfinite(x)]
    axes.set_facecolor(MISSING)
    axes.imshow(x, cmap="gray_r", interpolation="nearest", vmin=known.min(initial=0.0), vmax=known.max(initial=0.0))
    axes.set(xticks=[], yticks=[])


def draw_strokes(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    """Draw rows (dx, dy, lift): a row whose lift is above 0.5 ends a stroke."""
    for stroke in rows_to_strokes(x):
        dot = "." if (stroke == stroke[0]).all() else None
        axes.plot(stroke[:, 0], stroke[:, 1], color="black", linewidth=1, marker=dot)
    axes.invert_yaxis()
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xticks=[], yticks=[])


_PANELS: dict[str, list[Panel]] = {
    "audio": [_draw_waveform, _draw_spectrogram],
    "image": [_draw_image],
    "pixels": [_draw_pixels],
    "roll": [_draw_roll],
    "series": [draw_series],
    "strokes": [draw_strokes],
}
