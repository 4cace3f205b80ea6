"""Pictures of sequences of every modality, drawn with matplotlib, without a display."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from vrnn_lightning.callbacks import panels
from vrnn_lightning.callbacks.panels import is_binary
from vrnn_lightning.callbacks.strokes import on_paper, save_strokes

__all__ = ["Fan", "draw_fans", "draw_heat", "draw_rows", "draw_scores", "is_binary", "on_paper", "save_strokes"]

BANDS = (("90 %", 0.05, 0.95, "#c7ddee"), ("50 %", 0.25, 0.75, "#8fbbda"))
"""Quantiles between which a fan chart is shaded, and the colours."""
FANS = 4
"""Features that a fan chart shows."""
MOST_LETTERS = 44
"""Letters of a title, for which a column has room."""


def draw_rows(
    rows: dict[str, list[Tensor]],
    modality: str,
    sample_rate: int | None = None,
    titles: list[str] | None = None,
    shared: bool = False,
    features: list[str] | None = None,
) -> Figure:
    """Draw sequences in a grid: a row per name, a column per sequence, audio with a spectrogram under each waveform.

    Series are lines; where there are too many, or where all are 0 or 1, a picture with a line of pixels per feature,
    from its smallest value in the first row of the grid (white) to its largest (black); missing values are blue.
    A column's pictures have the same colours, and its lines the limits of the first row, or wider ones by at most half
    where other rows need them.

    Args:
        rows: Name of the row to its sequences, each in data units, shape (time, features).
        modality: How to show a sequence: "audio", "strokes", "series", "roll" or "image".
        sample_rate: Samples per second of audio; ``None`` counts time in samples.
        titles: Titles of the columns.
        shared: All columns have the same limits and colours, the widest of any.
        features: Names of a series' features.
    """
    kind, rows = panels.find_kind(modality, rows)
    parts = panels.find_panels(kind)
    columns = max(len(sequences) for sequences in rows.values())
    height = len(rows) * len(parts)
    figure, grid = make_grid(height, columns, 3.2 * columns, 1.7 * height)
    for r, (name, sequences) in enumerate(rows.items()):
        for c, sequence in enumerate(sequences):
            for p, panel in enumerate(parts):
                axes = grid[r * len(parts) + p, c]
                panel(axes, _array(sequence), sample_rate)
                if c == 0:
                    label = axes.get_ylabel()
                    axes.set_ylabel(f"{name}\n{label}" if label else name)
    _set_titles(grid[0], titles)
    time = panels.time_label(kind, sample_rate)
    for axes in grid[-1]:
        axes.set_xlabel(time)
    if len(grid[0, 0].lines) > 1 and kind == "series":
        _add_legend(grid[0, 0], features)
    for c in range(columns):
        if time:  # a row may end before the others do
            lefts, rights = zip(*(axes.get_xlim() for axes in grid[:, c] if axes.has_data()), strict=True)
            for axes in grid[:, c]:
                axes.set_xlim(min(lefts), max(rights))
        for axes in grid[:-1, c]:  # labels are most of what drawing costs
            axes.tick_params(labelbottom=False)
        if shared and c > 0:
            for axes in grid[:, c]:
                axes.tick_params(labelleft=False)
                axes.set_ylabel("")
    for place in [grid] if shared else [grid[:, c : c + 1] for c in range(columns)]:
        _share_limits(place[:: len(parts)], widest=shared)
        _share_colours(place, panels.DECIBELS if kind == "audio" else None)
    return figure


def draw_heat(
    values: list[Tensor],
    names: list[str],
    label: str,
    above: list[Tensor] | None = None,
    modality: str = "series",
    sample_rate: int | None = None,
    titles: list[str] | None = None,
) -> Figure:
    """Draw the values of latent dimensions over time, a column per sequence, dimensions from the top downward.

    Args:
        values: Values of each sequence, shape (time, latent). Colours are the same in all columns; where some are below
            zero, white is zero.
        names: Names of the latent dimensions, first on top.
        label: Meaning of the values.
        above: Sequences to draw above them, in data units, shape (time, features).
        modality: How to show those, as for :func:`draw_rows`.
        sample_rate: Samples per second of audio.
        titles: Titles of the columns.
    """
    heights = [1.4] * (above is not None) + [0.6 + min(0.16 * len(names), 4.0)]
    figure, grid = make_grid(len(heights), len(values), 3.2 * len(values) + 0.6, sum(heights), height_ratios=heights)
    if above is not None:
        _draw_above(grid[0], above, modality, sample_rate)
    every = torch.cat(values).double().cpu()
    finite = every[torch.isfinite(every)]
    most = float(finite.abs().max()) if len(finite) else 1.0
    signed = bool((finite < 0).any())
    for c, x in enumerate(values):
        axes = grid[-1, c]
        image = axes.imshow(
            _array(x).T,
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r" if signed else "magma",
            vmin=-most if signed else 0.0,
            vmax=most or 1.0,
        )
        axes.set_yticks(range(len(names)), names) if c == 0 and len(names) <= 32 else axes.set_yticks([])
        axes.set_xlabel("step")
    _set_titles(grid[0], titles)
    figure.colorbar(image, ax=list(grid[-1]), label=label, pad=0.01)
    return figure


class Fan(NamedTuple):
    """Draws of unknown values, in data units.

    Args:
        past: Given values, NaN where there are none, shape (past, features).
        draws: Shape (samples, steps, features).
        truth: True values, NaN where they are not known, shape (steps, features).
        begin: Step of the sequence at which the past begins.
        start: Step of the sequence at which the draws begin.
    """

    past: Tensor
    draws: Tensor
    truth: Tensor
    begin: int
    start: int


def draw_fans(fans: list[Fan], names: list[str] | None = None, titles: list[str] | None = None) -> Figure:
    """Draw fan charts, a column per sequence, a row for each of its first features.

    The central 50 and 90 % of the draws at each step are shaded, with their median; given values are dark, and true
    values are dots.

    Args:
        fans: Draws of each sequence.
        names: Names of the features.
        titles: Titles of the columns.
    """
    features = min(FANS, fans[0].draws.shape[2])
    figure, grid = make_grid(features, len(fans), 4.2 * len(fans), 1.8 * features)
    for c, fan in enumerate(fans):
        given, cloud, known = map(_array, fan[:3])
        before, time = np.arange(len(given)) + fan.begin, np.arange(cloud.shape[1]) + fan.start
        for f, axes in enumerate(grid[:, c]):
            for share, low, high, colour in BANDS:
                edges = np.quantile(cloud[:, :, f], (low, high), axis=0)
                axes.fill_between(time, *edges, color=colour, linewidth=0, label=share)
            axes.plot(time, np.median(cloud[:, :, f], axis=0), color="tab:blue", linewidth=1, label="median")
            alone = "." if len(given) == 1 else None
            axes.plot(before, given[:, f], color="black", linewidth=1, label="given", marker=alone)
            axes.plot(time, known[:, f], ".", color="tab:orange", markersize=3, label="truth")
            axes.margins(x=0)
            if c == 0:
                axes.set_ylabel(_label(names[f]) if names else f"x{f}")
        axes.set_xlabel("step")
    _set_titles(grid[0], titles)
    grid[0, 0].legend(fontsize=6, loc="best", framealpha=0.6)
    return figure


def draw_scores(
    sequences: list[Tensor],
    nats: list[Tensor],
    threshold: float | None = None,
    faulty: list[Tensor] | None = None,
    modality: str = "series",
    sample_rate: int | None = None,
    titles: list[str] | None = None,
) -> Figure:
    """Draw sequences, and below each the nats of its steps: dots are those below the threshold, shades known faults.

    Args:
        sequences: In data units, each of shape (time, features).
        nats: Nats of each sequence's steps, shape (time,).
        threshold: Nats below which a step is flagged, if there is one.
        faulty: True at steps of each sequence that are known to be faulty, shape (time,), if that is known.
        modality: How to show the sequences, as for :func:`draw_rows`.
        sample_rate: Samples per second of audio.
        titles: Titles of the columns.
    """
    figure, grid = make_grid(2, len(nats), 4.2 * len(nats), 3.2)
    _draw_above(grid[0], sequences, modality, sample_rate)
    for c, line in enumerate(nats):
        axes, values = grid[1, c], _array(line)
        panels.draw_series(axes, values, None)
        if faulty is not None:
            known = faulty[c].cpu().numpy()
            bounds = np.flatnonzero(np.diff(known.astype(int), prepend=0, append=0))
            for first, last in zip(bounds[::2], bounds[1::2], strict=True):
                axes.axvspan(first - 0.5, last - 0.5, color="tab:orange", alpha=0.3, linewidth=0)
        if threshold is not None:
            below = np.flatnonzero(values < threshold)
            axes.axhline(threshold, color="tab:red", linewidth=0.6, linestyle="--")
            axes.plot(below, values[below], ".", color="tab:red", markersize=4)
        axes.set_xlabel("step")
        if c == 0:
            axes.set_ylabel("nats")
    _set_titles(grid[0], titles)
    return figure


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def make_grid(
    rows: int, columns: int, width: float, height: float, ticks: int | str = 4, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Return a figure of a size in inches, and its axes with few and small ticks, shape (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    with rc_context({"axes.labelsize": 8, "text.parse_math": False}):
        grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.locator_params(nbins=ticks)
        axes.tick_params(which="both", labelsize=7)
    return figure, grid


def _draw_above(row: np.ndarray, sequences: list[Tensor], modality: str, sample_rate: int | None) -> None:
    """Draw sequences in the first row of a grid, whose other rows count time in steps."""
    kind, rows = panels.find_kind(modality, {"": sequences})
    for axes, sequence in zip(row, rows[""], strict=True):
        panels.find_panels(kind)[0](axes, _array(sequence), sample_rate)
        if kind == "audio":
            axes.set_xlabel(panels.time_label(kind, sample_rate))


def _share_limits(grid: np.ndarray, *, widest: bool) -> None:
    """Give line plots the limits of the first, somewhat wider where others need it, so that amplitudes compare."""
    drawn = [axes for axes in grid.flat if axes.lines]
    if not drawn or not grid[0, 0].lines or drawn[0].get_aspect() != "auto":
        return
    lows, highs = zip(*(axes.get_ylim() for axes in drawn), strict=True)
    low, high = min(lows), max(highs)
    if not widest and grid[0, 0].dataLim.height > 0:  # else it is constant, or all of it missing
        more = (highs[0] - lows[0]) / 2
        low, high = max(low, lows[0] - more), min(high, highs[0] + more)
    for axes in drawn:
        axes.set_ylim(low, high)


def _share_colours(grid: np.ndarray, span: float | None) -> None:
    images = [image for axes in grid.flat for image in axes.images]
    if images:
        lows, highs = zip(*(image.get_clim() for image in images), strict=True)
        for image in images:
            image.set_clim(min(lows) if span is None else max(highs) - span, max(highs))


def _set_titles(row: np.ndarray, titles: list[str] | None) -> None:
    for axes, title in zip(row, titles or [], strict=False):
        axes.set_title(_label(title), fontsize=8)


def _label(text: str) -> str:
    """Return a text as a label: one line of characters that fonts know, the end of a long one."""
    line = " ".join(text[-4 * MOST_LETTERS :].split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= MOST_LETTERS and len(text) <= 4 * MOST_LETTERS else f"…{line[1 - MOST_LETTERS :]}"


def _add_legend(axes: Axes, names: list[str] | None) -> None:
    lines = axes.lines
    labels = names if names and len(names) == len(lines) else [f"x{i}" for i in range(len(lines))]
    legend = axes.legend(lines, [*map(_label, labels)], fontsize=5, ncols=2, loc="upper right", framealpha=0.6)
    for text in legend.get_texts():
        text.set_parse_math(False)
