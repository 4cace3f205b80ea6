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

__all__ = ["on_paper", "save_animation", "save_strokes", "strokes_svg"]

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


def strokes_svg(strokes: Tensor, animated: bool = False) -> str:
    """Return a drawing as the text of an SVG file.

    Each stroke is a path and a single point a dot; a row whose lift is above 0.5 ends a stroke. The line's width is a
    hundredth of the longer side.

    Args:
        strokes: Rows (dx, dy, lift) of any scale, shape (steps, 3), y growing downward.
        animated: Draw it stroke by stroke, again and again; viewers without animation show the whole drawing.

    Raises:
        UserError: The rows have another shape, or hold NaN or infinite values.

    >>> strokes_svg(torch.tensor([[0.0, 0.0, 0.0], [10.0, 0.0, 1.0]])).splitlines()[1]
    '<path d="M0 0L10 0"/>'
    """
    drawn, points = _read(strokes)
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
        if (stroke == stroke[0]).all():  # a dot
            (x, y) = stroke[0]
            shape = f'<circle cx="{x:.6g}" cy="{y:.6g}" r="{pen:.6g}" fill="black" stroke="none"'
            change = _svg_animation("opacity", [(0, 0), (begin, 0), (begin, 1), (1, 1)], seconds)
        else:
            shape = f'<path d="M{"L".join(f"{x:.6g} {y:.6g}" for x, y in stroke)}"'
            if animated:  # a dash as long as the path, moved out of sight with its round cap and then along the path
                shape += ' pathLength="1" stroke-dasharray="1 2"'
            dash = [(0, 1.5), (begin, 1.5), (begin, 1), (end, 0), (1, 0)]
            change = _svg_animation("stroke-dashoffset", dash, seconds)
        lines.append(f"{shape}>{change}</{shape[1:].split()[0]}>" if animated else f"{shape}/>")
    return "\n".join([*lines, "</svg>", ""])


def _svg_animation(attribute: str, course: list[tuple[float, float]], seconds: float) -> str:
    """Return an endless SVG animation of an attribute, given its value at each share of the time."""
    times, values = (";".join(f"{x:.5g}" for x in column) for column in zip(*course, strict=True))
    return (
        f'<animate attributeName="{attribute}" values="{values}" keyTimes="{times}" dur="{seconds:.5g}s" '
        'repeatCount="indefinite"/>'
    )


def save_animation(rows: Tensor, path: Path) -> None:
    """Write an endless GIF in which the pen draws rows (dx, dy, lift), shape (steps, 3).

    Raises:
        UserError: The rows have another shape, or hold NaN or infinite values.
    """
    strokes, points = _read(rows)
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
    each = int(1000 * _drawing_time(len(points)) / len(frames))
    times = [max(20, each)] * (len(frames) - 1) + [int(1000 * HOLD)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)


def save_strokes(strokes: Tensor, path: str | Path, animated: bool = False) -> None:
    """Write a drawing as a picture.

    Args:
        strokes: Rows (dx, dy, lift), shape (steps, 3), y growing downward.
        path: A file whose name ends in ``.svg`` or ``.png``, or ``.gif`` for an animation.
        animated: Animate an svg stroke by stroke.

    Raises:
        UserError: The name ends otherwise, or the rows have another shape or hold NaN or infinite values.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".gif", ".png"):
        raise UserError(f"{path}: strokes are drawn as .svg, .png or .gif. Fix: choose one of these")
    with replacing(path) as temporary:
        if path.suffix == ".svg":
            temporary.write_text(strokes_svg(strokes, animated), encoding="utf-8")
        elif path.suffix == ".gif":
            save_animation(strokes, temporary)
        else:
            _read(strokes)
            figure = Figure(figsize=(SIDE / 100, SIDE / 100), layout="constrained")
            axes = figure.subplots()
            draw_strokes(axes, strokes.detach().cpu().double().numpy(), None)
            axes.set_axis_off()
            figure.savefig(temporary, format="png", dpi=100)


def _read(strokes: Tensor) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the points of each stroke, and all points, at least one, each of shape (points, 2)."""
    if strokes.ndim != 2 or strokes.shape[1] != 3:
        raise UserError(f"strokes of shape {tuple(strokes.shape)} can't be drawn, expected (steps, 3): dx, dy, lift")
    if not torch.isfinite(strokes).all():
        raise UserError("strokes with NaN or infinite values can't be drawn. Fix: remove these steps")
    drawn = list(rows_to_strokes(strokes.detach().cpu().double().numpy()))
    return drawn, np.concatenate(drawn) if drawn else np.zeros((1, 2))


def _drawing_time(points: int) -> float:
    """Return the seconds that an animation takes to draw a number of points."""
    return min(LONGEST, PACE * points)
