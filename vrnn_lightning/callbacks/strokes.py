"""Drawings of pen strokes as SVG, PNG and GIF files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from vrnn_lightning.callbacks.panels import draw_strokes
from vrnn_lightning.data import rows_to_strokes
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import replacing

__all__ = ["on_paper", "save_strokes", "write_strokes"]

SIDE = 400
"""Longer side of a drawing, in pixels."""
PACE, LONGEST, HOLD = 0.04, 6.0, 1.5
"""Seconds of an animation: for each point, at most for all points, and for the whole drawing at the end."""
FRAMES = 60
"""Most frames of an animation."""


def on_paper(strokes: Tensor) -> Tensor:
    """Return rows (dx, dy, lift) after a first row that puts the pen on the paper at the origin.

    Rows of datamodules with ``pen_starts_down`` need it to be drawn, for the first of them is a line already.

    Args:
        strokes: Shape (steps, 3).

    >>> on_paper(torch.tensor([[2.0, 1.0, 1.0]])).tolist()
    [[0.0, 0.0, 0.0], [2.0, 1.0, 1.0]]
    """
    return torch.cat([torch.zeros_like(strokes[:1]), strokes])


def save_strokes(strokes: Tensor, path: str | Path) -> None:
    """Write a drawing as a picture.

    Args:
        strokes: Rows (dx, dy, lift), shape (steps, 3), y growing downward; a lift above 0.5 ends a stroke.
        path: A file whose name ends in ``.svg`` or ``.png``, or ``.gif`` for an animation.

    Raises:
        UserError: The name ends otherwise, or the rows have another shape or hold NaN or infinite values.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".gif", ".png"):
        raise UserError(f"{path}: strokes are drawn as .svg, .png or .gif. Fix: choose one of these")
    with replacing(path) as temporary:
        write_strokes(strokes, temporary, path.suffix[1:])


def write_strokes(strokes: Tensor, file: Path, kind: str) -> None:
    """Write a drawing into a file, of the kind "svg", "png" or "gif"; see :func:`save_strokes`."""
    drawn, points = _read(strokes)
    if kind == "gif":
        _write_animation(drawn, points, file)
        return
    figure = Figure(figsize=(SIDE / 100, SIDE / 100), layout="constrained")
    axes = figure.subplots()
    draw_strokes(axes, strokes.detach().cpu().double().numpy(), None)
    axes.set_axis_off()
    figure.savefig(file, format=kind, dpi=100)


def _write_animation(strokes: list[np.ndarray], points: np.ndarray, path: Path) -> None:
    """Write an endless GIF in which the pen draws all points, one after the other."""
    low, size = points.min(0), float(np.ptp(points, axis=0).max()) or 1.0
    sharp = 2 * SIDE  # drawn twice as large, and shrunk: smooth lines
    places = (points - low - 0.5 * np.ptp(points, axis=0)) / size * 0.9 * sharp + sharp / 2
    starts = np.cumsum([0, *(len(stroke) for stroke in strokes)])
    canvas = Image.new("L", (sharp, sharp), 255)
    pen, frames, done = ImageDraw.Draw(canvas), [], 0
    for end in np.unique(np.linspace(1, len(points), min(FRAMES, len(points))).astype(int)).tolist():
        for i in range(done, end):
            x, y = places[i]
            if i not in starts:
                pen.line([tuple(places[i - 1]), (x, y)], fill=0, width=8)
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=0)
        done = end
        frames.append(canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    each = int(1000 * min(LONGEST, PACE * len(points)) / len(frames))
    times = [max(20, each)] * (len(frames) - 1) + [int(1000 * HOLD)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)


def _read(strokes: Tensor) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the points of each stroke, and all points, at least one, each of shape (points, 2)."""
    if strokes.ndim != 2 or strokes.shape[1] != 3:
        raise UserError(f"strokes of shape {tuple(strokes.shape)} can't be drawn, expected (steps, 3): dx, dy, lift")
    if not torch.isfinite(strokes).all():
        raise UserError("strokes with NaN or infinite values can't be drawn. Fix: remove these steps")
    drawn = list(rows_to_strokes(strokes.detach().cpu().double().numpy()))
    return drawn, np.concatenate(drawn) if drawn else np.zeros((1, 2))
