"""Drawing sequences of every modality with matplotlib, without a display."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from vrnn_lightning.data.rolls import KEYS, LOWEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_rows"]


def draw_rows(rows: dict[str, list[Tensor]], modality: str, sample_rate: int | None = None) -> Figure:
    """Draw sequences in a grid: a row per name, a column per sequence, audio with a spectrogram under each waveform.

    Args:
        rows: Name of the row to its sequences, each in data units, shape (time, features).
        modality: How to show a sequence: "audio", "strokes", "series", "roll" or "image".
        sample_rate: Of audio, in Hz; ``None`` counts time in samples.
    """
    from matplotlib.figure import Figure

    panels = _PANELS.get(modality, [_series])
    columns = max(len(sequences) for sequences in rows.values())
    size = (3.2 * columns, 1.7 * len(rows) * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows) * len(panels), columns, squeeze=False)
    for r, (name, sequences) in enumerate(rows.items()):
        for c, sequence in enumerate(sequences):
            for p, panel in enumerate(panels):
                axes = grid[r * len(panels) + p, c]
                panel(axes, sequence.detach().cpu().double().numpy(), sample_rate)
                if c == 0:
                    label = axes.get_ylabel()
                    axes.set_ylabel(f"{name}\n{label}" if label else name)
    _share_limits(grid, list(rows), len(panels))
    return figure


def _share_limits(grid: np.ndarray, names: list[str], panels: int) -> None:
    """Give every line plot of a column the limits of its first row, so that amplitudes compare."""
    for c in range(grid.shape[1]):
        if not grid[0, c].lines or grid[0, c].get_aspect() != "auto":
            continue
        for r in range(1, len(names)):
            low, high = grid[0, c].get_ylim()
            grid[r * panels, c].set_ylim(low, high)


def _series(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    axes.plot(x, linewidth=1, marker="." if len(x) == 1 else None)
    axes.margins(x=0)
    axes.tick_params(labelsize=7)


def _waveform(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    wave = x.ravel()
    axes.plot(np.arange(wave.size) / (sample_rate or 1), wave, linewidth=0.4)
    axes.margins(x=0)
    axes.set_ylabel("amplitude", fontsize=7)
    axes.tick_params(labelsize=7)


def _spectrogram(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    from scipy.signal import ShortTimeFFT

    wave, rate = x.ravel(), sample_rate or 1
    window = np.hanning(min(256, wave.size) + 2)[1:-1]
    transform = ShortTimeFFT(window, hop=max(1, window.size // 4), fs=rate)
    power = 20 * np.log10(np.abs(transform.stft(wave)) + 1e-6)
    top = power.max()
    axes.imshow(
        power, origin="lower", aspect="auto", cmap="magma", vmin=top - 70, vmax=top, extent=transform.extent(wave.size)
    )
    axes.set_xlim(0, wave.size / rate)
    axes.set_ylabel("Hz" if sample_rate else "cycles / sample", fontsize=7)
    axes.tick_params(labelsize=7)


def _roll(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    """Draw time to the right and keys upward, black where one surely sounds; a piano's with the C of each octave."""
    steps, keys = x.shape
    lowest = LOWEST if keys == KEYS else 0
    extent = (-0.5, steps - 0.5, lowest - 0.5, lowest + keys - 0.5)
    axes.imshow(
        x.T, origin="lower", aspect="auto", cmap="gray_r", interpolation="nearest", extent=extent, vmin=0, vmax=1
    )
    if keys == KEYS:
        axes.set_yticks(range(24, LOWEST + KEYS, 12), [f"C{octave}" for octave in range(1, 9)])
        axes.grid(axis="y", linewidth=0.3, alpha=0.5)
    axes.tick_params(labelsize=7)


def _image(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    axes.imshow(x, cmap="gray_r", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _strokes(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    """Draw (dx, dy, lift) rows: the pen leaves the paper after a row whose lift is 1, or more likely 1 than 0."""
    path = x[:, :2].cumsum(0)
    for stroke in np.split(path, np.flatnonzero(x[:-1, 2] > 0.5) + 1):
        axes.plot(stroke[:, 0], stroke[:, 1], color="black", linewidth=1, marker="." if len(stroke) == 1 else None)
    axes.invert_yaxis()
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])


_PANELS: dict[str, list[Callable[[Axes, np.ndarray, int | None], None]]] = {
    "audio": [_waveform, _spectrogram],
    "image": [_image],
    "roll": [_roll],
    "series": [_series],
    "strokes": [_strokes],
}
