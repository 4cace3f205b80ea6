"""Drawing sequences of every modality with matplotlib, without a display."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vrnn_lightning.data import rows_to_strokes
from vrnn_lightning.data.rolls import KEYS, LOWEST
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Fan",
    "draw_fans",
    "draw_heat",
    "draw_rows",
    "draw_scores",
    "is_binary",
    "on_paper",
    "save_animation",
    "save_strokes",
    "strokes_svg",
]

SIDE = 400
"""Longer side of a drawing, in pixels."""
PACE, LONGEST, HOLD = 0.04, 6.0, 1.5
"""Seconds that an animation takes for a point, at most for all of them, and holds the whole drawing."""
FRAMES = 60
"""Most frames of an animation."""
BANDS = (("90 %", 0.05, 0.95, "#c7ddee"), ("50 %", 0.25, 0.75, "#8fbbda"))
"""Quantiles between which a fan chart is shaded, and the colours."""
MISSING = "lightsteelblue"
"""Colour of what is missing in a picture."""
FANS = 4
"""Features that a fan chart shows."""
MOST_LINES = 12
"""Features up to which a series is drawn as lines."""
DECIBELS = 70
"""Range of a spectrogram's colours, downward from the loudest."""
MOST_LETTERS = 44
"""Of a title, for which a column has room."""


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
    from its smallest value in the first row of the grid (white) to its largest (black); what is missing is blue.
    A column's pictures have the same colours, and its lines the limits of the first row, or wider ones by at most half
    where other rows need them.

    Args:
        rows: Name of the row to its sequences, each in data units, shape (time, features).
        modality: How to show a sequence: "audio", "strokes", "series", "roll" or "image".
        sample_rate: Of audio, in Hz; ``None`` counts time in samples.
        titles: What stands above each column.
        shared: All columns have the same limits and colours, the widest of any.
        features: Names of a series' features.
    """
    from matplotlib.figure import Figure

    if modality == "series":
        modality, rows = _lines_or_pixels(rows)
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
    _name_columns(grid[0], titles)
    for axes in grid[-1]:
        axes.set_xlabel(_time(modality, sample_rate), fontsize=7)
    if len(grid[0, 0].lines) > 1 and modality == "series":
        _name_lines(grid[0, 0], features)
    for c in range(columns):
        if _time(modality, sample_rate):  # a row may end before the others do
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
        _share_limits(place[:: len(panels)], shared)
        _share_colours(place, DECIBELS if modality == "audio" else None)
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
    """Draw what each latent dimension does over time, a column per sequence, dimensions from the top downward.

    Args:
        values: Of each sequence, shape (time, latent). Colours are the same in all columns; where some are below zero,
            white is zero.
        names: Of the latent dimensions, first on top.
        label: What the values are.
        above: Sequences to draw above them, in data units, shape (time, features).
        modality: How to show those, as for :func:`draw_rows`.
        sample_rate: Of audio, in Hz.
        titles: What stands above each column.
    """
    from matplotlib.figure import Figure

    shown = {} if above is None else {"": above}
    if modality == "series" and shown:
        modality, shown = _lines_or_pixels(shown)
    panels = _PANELS.get(modality, [_series])[:1] if shown else []
    heights = [1.4] * len(panels) + [0.6 + min(0.16 * len(names), 4.0)]
    figure = Figure(figsize=(3.2 * len(values) + 0.6, sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), len(values), squeeze=False, height_ratios=heights)
    every = torch.cat(values).double().cpu()
    finite = every[torch.isfinite(every)]
    most = float(finite.abs().max()) if len(finite) else 1.0
    signed = bool((finite < 0).any())
    for c, x in enumerate(values):
        for p, panel in enumerate(panels):
            panel(grid[p, c], shown[""][c].detach().cpu().double().numpy(), sample_rate)
            if modality == "audio":
                grid[p, c].set_xlabel(_time(modality, sample_rate), fontsize=7)
        axes = grid[-1, c]
        image = axes.imshow(
            x.detach().cpu().double().numpy().T,
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r" if signed else "magma",
            vmin=-most if signed else 0.0,
            vmax=most or 1.0,
        )
        axes.set_yticks(range(len(names)), names) if c == 0 and len(names) <= 32 else axes.set_yticks([])
        axes.tick_params(labelsize=7)
        axes.set_xlabel("step", fontsize=7)
    _name_columns(grid[0], titles)
    figure.colorbar(image, ax=list(grid[-1]), label=label, pad=0.01)
    return figure


class Fan(NamedTuple):
    """Draws of what may be, in data units.

    Args:
        past: What was given, NaN where nothing was, shape (past, features).
        draws: Shape (samples, steps, features).
        truth: What turned out, NaN where that is not known, shape (steps, features).
        begin: The sequence's step that the past begins at.
        start: The sequence's step that the draws begin at.
    """

    past: Tensor
    draws: Tensor
    truth: Tensor
    begin: int
    start: int


def draw_fans(fans: list[Fan], names: list[str] | None = None, titles: list[str] | None = None) -> Figure:
    """Draw what may be as a fan, a column per sequence, a row for each of its first features.

    Shaded are the central 50 and 90 % of the draws at each step, with their median; dark is what was given, and dots
    are what turned out.

    Args:
        fans: Of each sequence.
        names: Of the features.
        titles: What stands above each column.
    """
    from matplotlib.figure import Figure

    features = min(FANS, fans[0].draws.shape[2])
    figure = Figure(figsize=(4.2 * len(fans), 1.8 * features), layout="constrained")
    grid = figure.subplots(features, len(fans), squeeze=False)
    for c, fan in enumerate(fans):
        given, cloud, known = (x.detach().cpu().double().numpy() for x in fan[:3])
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
            _few_ticks(axes)
            if c == 0:
                axes.set_ylabel(_label(names[f]) if names else f"x{f}", fontsize=8, parse_math=False)
        axes.set_xlabel("step", fontsize=7)
    _name_columns(grid[0], titles)
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
        nats: Of each sequence, shape (time,).
        threshold: Nats below which a step is flagged, if there is one.
        faulty: True at steps of each sequence that are known to be, shape (time,), if that is known.
        modality: How to show the sequences, as for :func:`draw_rows`.
        sample_rate: Of audio, in Hz.
        titles: What stands above each column.
    """
    from matplotlib.figure import Figure

    shown = {"": sequences}
    if modality == "series":
        modality, shown = _lines_or_pixels(shown)
    panel = _PANELS.get(modality, [_series])[0]
    figure = Figure(figsize=(4.2 * len(nats), 3.2), layout="constrained")
    grid = figure.subplots(2, len(nats), squeeze=False)
    for c, (x, line) in enumerate(zip(shown[""], nats, strict=True)):
        panel(grid[0, c], x.detach().cpu().double().numpy(), sample_rate)
        axes, values = grid[1, c], line.detach().cpu().double().numpy()
        _series(axes, values, None)
        if faulty is not None:
            known = faulty[c].cpu().numpy()
            bounds = np.flatnonzero(np.diff(known.astype(int), prepend=0, append=0))
            for first, last in zip(bounds[::2], bounds[1::2], strict=True):
                axes.axvspan(first - 0.5, last - 0.5, color="tab:orange", alpha=0.3, linewidth=0)
        if threshold is not None:
            below = np.flatnonzero(values < threshold)
            axes.axhline(threshold, color="tab:red", linewidth=0.6, linestyle="--")
            axes.plot(below, values[below], ".", color="tab:red", markersize=4)
        axes.set_xlabel("step", fontsize=7)
        if modality == "audio":
            grid[0, c].set_xlabel(_time(modality, sample_rate), fontsize=7)
        if c == 0:
            axes.set_ylabel("nats", fontsize=8)
    _name_columns(grid[0], titles)
    return figure


def on_paper(strokes: Tensor) -> Tensor:
    """Return rows (dx, dy, lift) with one more before them, by which the pen begins on the paper at the origin.

    Datamodules with ``pen_starts_down`` need it to be drawn, for the first of their rows is a line already.

    Args:
        strokes: Shape (steps, 3).

    >>> on_paper(torch.tensor([[2.0, 1.0, 1.0]])).tolist()
    [[0.0, 0.0, 0.0], [2.0, 1.0, 1.0]]
    """
    return torch.cat([torch.zeros_like(strokes[:1]), strokes])


def strokes_svg(strokes: Tensor, animated: bool = False) -> str:
    """Return a drawing as the text of an SVG file.

    Each stroke is a path and a single point a dot; the pen leaves the paper after a row whose lift is above 0.5. The
    line's width is a hundredth of the longer side.

    Args:
        strokes: Rows (dx, dy, lift) of any scale, shape (steps, 3), y growing downward.
        animated: Draw it stroke by stroke, again and again; what shows no animation shows the whole drawing.

    Raises:
        UserError: These are not rows of three, or hold NaN or infinite values.

    >>> strokes_svg(torch.tensor([[0.0, 0.0, 0.0], [10.0, 0.0, 1.0]])).splitlines()[1]
    '<path d="M0 0L10 0"/>'
    """
    drawn = _checked_strokes(strokes)
    points = np.concatenate(drawn) if drawn else np.zeros((1, 2))
    low, high = points.min(0), points.max(0)
    size = float((high - low).max()) or 1.0
    pen, margin = 0.01 * size, 0.05 * size
    x, y = low - margin
    width, height = high - low + 2 * margin
    scale = SIDE / max(width, height)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * scale:.0f}" height="{height * scale:.0f}" '
        f'viewBox="{x:.6g} {y:.6g} {width:.6g} {height:.6g}" fill="none" stroke="black" stroke-width="{pen:.6g}" '
        'stroke-linecap="round" stroke-linejoin="round">'
    ]
    drawing = _drawing_time(len(points))
    seconds, done = drawing + HOLD, 0
    for stroke in drawn:
        begin, end = (drawing * part / len(points) / seconds for part in (done, done + len(stroke)))
        done += len(stroke)
        if (stroke == stroke[0]).all():
            (x, y) = stroke[0]
            shape = f'<circle cx="{x:.6g}" cy="{y:.6g}" r="{pen:.6g}" fill="black" stroke="none"'
            change = _changing("opacity", [(0, 0), (begin, 0), (begin, 1), (1, 1)], seconds)
        else:
            shape = f'<path d="M{"L".join(f"{x:.6g} {y:.6g}" for x, y in stroke)}"'
            if animated:  # a dash as long as the path, moved out of sight with its round cap and then along the path
                shape += ' pathLength="1" stroke-dasharray="1 2"'
            dash = [(0, 1.5), (begin, 1.5), (begin, 1), (end, 0), (1, 0)]
            change = _changing("stroke-dashoffset", dash, seconds)
        lines.append(f"{shape}>{change}</{shape[1:].split()[0]}>" if animated else f"{shape}/>")
    return "\n".join([*lines, "</svg>", ""])


def _drawing_time(points: int) -> float:
    """Return the seconds that an animation takes for so many points."""
    return min(LONGEST, PACE * points)


def _changing(attribute: str, course: list[tuple[float, float]], seconds: float) -> str:
    """Return an endless SVG animation of an attribute, which has a value at each share of the animation's time."""
    times, values = (";".join(f"{x:.5g}" for x in column) for column in zip(*course, strict=True))
    return (
        f'<animate attributeName="{attribute}" values="{values}" keyTimes="{times}" dur="{seconds:.5g}s" '
        'repeatCount="indefinite"/>'
    )


def save_animation(rows: Tensor, path: Path) -> None:
    """Write a GIF in which the pen draws rows (dx, dy, lift), shape (steps, 3), without end.

    Raises:
        UserError: These are not strokes.
    """
    from PIL import Image, ImageDraw

    strokes = _checked_strokes(rows)
    points = np.concatenate(strokes) if strokes else np.zeros((1, 2))
    low, size = points.min(0), float(np.ptp(points, axis=0).max()) or 1.0
    sharp = 2 * SIDE  # drawn twice as large, and shrunk: smooth lines
    places = (points - low - 0.5 * np.ptp(points, axis=0)) / size * 0.9 * sharp + sharp / 2
    starts = np.cumsum([0, *(len(stroke) for stroke in strokes)])
    canvas = Image.new("L", (sharp, sharp), 255)
    pen, frames = ImageDraw.Draw(canvas), []
    shown = np.unique(np.linspace(1, len(points), min(FRAMES, len(points))).astype(int))
    done = 0
    for end in shown.tolist():
        for i in range(done, end):
            x, y = places[i]
            if i not in starts:
                pen.line([tuple(places[i - 1]), (x, y)], fill=0, width=8)
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=0)
        done = end
        frames.append(canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    each = int(1000 * _drawing_time(len(points)) / len(frames))
    times = [max(20, each)] * (len(frames) - 1) + [int(1000 * HOLD)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)


def save_strokes(strokes: Tensor, path: str | Path, animated: bool = False) -> None:
    """Write a drawing as a picture.

    Args:
        strokes: Rows (dx, dy, lift), shape (steps, 3), y growing downward.
        path: A file whose name ends in ``.svg`` or ``.png``, or ``.gif`` for an animation.
        animated: Of an svg: draw it stroke by stroke.

    Raises:
        UserError: It ends otherwise, or these are not strokes.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".gif", ".png"):
        raise UserError(f"{path}: strokes are drawn as .svg, .png or .gif; choose one of these")
    with replacing(path) as temporary:
        if path.suffix == ".svg":
            temporary.write_text(strokes_svg(strokes, animated), encoding="utf-8")
        elif path.suffix == ".gif":
            save_animation(strokes, temporary)
        else:
            _save_still(strokes, temporary)


def _save_still(strokes: Tensor, path: Path) -> None:
    from matplotlib.figure import Figure

    _checked_strokes(strokes)
    figure = Figure(figsize=(SIDE / 100, SIDE / 100), layout="constrained")
    axes = figure.subplots()
    _strokes(axes, strokes.detach().cpu().double().numpy(), None)
    axes.set_axis_off()
    figure.savefig(path, format="png", dpi=100)


def _checked_strokes(strokes: Tensor) -> list[np.ndarray]:
    """Return the points of each stroke of something that can be drawn."""
    if strokes.ndim != 2 or strokes.shape[1] != 3:
        raise UserError(f"strokes of shape {tuple(strokes.shape)} can't be drawn, expected (steps, 3): dx, dy, lift")
    if not torch.isfinite(strokes).all():
        raise UserError("strokes that hold NaN or infinite values can't be drawn")
    return list(rows_to_strokes(strokes.detach().cpu().double().numpy()))


def is_binary(sequences: list[Tensor]) -> bool:
    """Return whether sequences of more than one feature hold nothing but 0, 1 and NaN."""
    every = torch.cat(sequences)
    return every.shape[1] > 1 and bool(((every == 0) | (every == 1) | every.isnan()).all())


def _lines_or_pixels(rows: dict[str, list[Tensor]]) -> tuple[str, dict[str, list[Tensor]]]:
    """Return how to show series, and what to draw of them."""
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


def _share_limits(grid: np.ndarray, widest: bool) -> None:
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
    """Give pictures the same colours, over so much below the largest value if that is said."""
    images = [image for axes in grid.flat for image in axes.images]
    if images:
        lows, highs = zip(*(image.get_clim() for image in images), strict=True)
        for image in images:
            image.set_clim(min(lows) if span is None else max(highs) - span, max(highs))


def _name_columns(row: np.ndarray, titles: list[str] | None) -> None:
    """Write titles above axes, the ends of long ones, and nothing of them taken for a formula."""
    for axes, title in zip(row, titles or [], strict=False):
        axes.set_title(_label(title), fontsize=8, parse_math=False)


def _label(text: str) -> str:
    """Return a text as a label: one line of characters that fonts know, the end of a long one."""
    line = " ".join(text[-4 * MOST_LETTERS :].split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= MOST_LETTERS and len(text) <= 4 * MOST_LETTERS else f"…{line[1 - MOST_LETTERS :]}"


def _name_lines(axes: Axes, names: list[str] | None) -> None:
    """Say which line is which feature."""
    lines = axes.lines
    known = (
        [_label(name) for name in names] if names and len(names) == len(lines) else [f"x{i}" for i in range(len(lines))]
    )
    legend = axes.legend(lines, known, fontsize=5, ncols=2, loc="upper right", framealpha=0.6)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _time(modality: str, sample_rate: int | None) -> str:
    """Return what is counted to the right."""
    if modality == "audio":
        return "s" if sample_rate else "sample"
    return "step" if modality in ("series", "pixels", "roll") else ""


def _series(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    axes.plot(x, linewidth=1, marker="." if len(x) == 1 else None)
    axes.margins(x=0)
    _few_ticks(axes)


def _few_ticks(axes: Axes) -> None:
    axes.locator_params(nbins=4)
    axes.tick_params(labelsize=7)


def _waveform(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    wave = x.ravel()
    axes.plot(np.arange(wave.size) / (sample_rate or 1), wave, linewidth=0.4)
    axes.margins(x=0)
    axes.set_ylabel("amplitude", fontsize=7)
    _few_ticks(axes)


def _spectrogram(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    from scipy.signal import ShortTimeFFT

    wave, rate = np.where(np.isfinite(x), x, 0.0).ravel(), sample_rate or 1
    window = np.hanning(min(256, wave.size) + 2)[1:-1]
    transform = ShortTimeFFT(window, hop=max(1, window.size // 4), fs=rate)
    power = 20 * np.log10(np.abs(transform.stft(wave)) + 1e-6)
    top = power.max()
    axes.imshow(
        power,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=top - DECIBELS,
        vmax=top,
        extent=transform.extent(wave.size),
    )
    axes.set_xlim(0, wave.size / rate)
    axes.set_ylabel("Hz" if sample_rate else "cycles / sample", fontsize=7)
    _few_ticks(axes)


def _roll(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    """Draw time to the right and keys upward, black where one surely sounds; a piano's with the C of each octave."""
    lowest = LOWEST if x.shape[1] == KEYS else 0
    _grid(axes, x, lowest)
    if lowest:
        axes.set_yticks(range(24, LOWEST + KEYS, 12), [f"C{octave}" for octave in range(1, 9)])
        axes.grid(axis="y", linewidth=0.3, alpha=0.5)


def _pixels(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    """Draw time to the right and features upward, from white, 0, to black, 1."""
    _grid(axes, x, 0)
    axes.set_ylabel("feature", fontsize=7)
    _few_ticks(axes)


def _grid(axes: Axes, x: np.ndarray, lowest: int) -> None:
    steps, lines = x.shape
    axes.set_facecolor(MISSING)
    extent = (-0.5, steps - 0.5, lowest - 0.5, lowest + lines - 0.5)
    axes.imshow(
        x.T, origin="lower", aspect="auto", cmap="gray_r", interpolation="nearest", extent=extent, vmin=0, vmax=1
    )
    axes.tick_params(labelsize=7)


def _image(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    known = x[np.isfinite(x)]
    axes.set_facecolor(MISSING)
    axes.imshow(x, cmap="gray_r", interpolation="nearest", vmin=known.min(initial=0.0), vmax=known.max(initial=0.0))
    axes.set_xticks([])
    axes.set_yticks([])


def _strokes(axes: Axes, x: np.ndarray, sample_rate: int | None) -> None:
    """Draw (dx, dy, lift) rows: the pen leaves the paper after a row whose lift is 1, or more likely 1 than 0."""
    for stroke in rows_to_strokes(x):
        dot = "." if (stroke == stroke[0]).all() else None
        axes.plot(stroke[:, 0], stroke[:, 1], color="black", linewidth=1, marker=dot)
    axes.invert_yaxis()
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])


_PANELS: dict[str, list[Callable[[Axes, np.ndarray, int | None], None]]] = {
    "audio": [_waveform, _spectrogram],
    "image": [_image],
    "pixels": [_pixels],
    "roll": [_roll],
    "series": [_series],
    "strokes": [_strokes],
}
