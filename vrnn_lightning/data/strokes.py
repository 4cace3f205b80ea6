"""Pen strokes: points on paper, and the rows (dx, dy, lift) that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["rows_to_strokes", "smooth_rows", "strokes_to_rows"]


def strokes_to_rows(strokes: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Return the rows (dx, dy, lift) of a drawing, from its second point on.

    A row is the offset from the last point, and lift is 1 where a stroke ends. The first point has no row, as in Chung
    et al. (2015): a row of zeros at the start of every drawing would be a density without an upper bound. The pen is
    down there, so strokes of one point before the first line are left out.

    Args:
        strokes: Points (x, y) between two lifts, each of shape (points, 2), y growing downward.

    Returns:
        Shape (points - 1, 3), (0, 3) for a drawing without a line.

    >>> strokes_to_rows([np.array([[5, 5], [7, 6]]), np.array([[1, 1]])]).tolist()
    [[2.0, 1.0, 1.0], [-6.0, -5.0, 1.0]]
    """
    lines = [np.asarray(stroke, dtype=np.float64) for stroke in strokes if len(stroke)]
    lines = lines[next((i for i, line in enumerate(lines) if len(line) > 1), len(lines)) :]
    if not lines:
        return np.zeros((0, 3), dtype=np.float32)
    points = np.concatenate(lines)
    rows = np.zeros((len(points), 3))
    rows[np.cumsum([len(line) for line in lines]) - 1, 2] = 1
    with np.errstate(over="ignore", invalid="ignore"):  # readers of files check the result
        rows[1:, :2] = np.diff(points, axis=0)
        return rows[1:].astype(np.float32)


def rows_to_strokes(rows: NDArray[Any], pen_starts_down: bool = False) -> list[NDArray[np.float64]]:
    """Return the strokes of rows (dx, dy, lift), which begin at the origin.

    Args:
        rows: Shape (steps, 3); a lift above 0.5, as a model's probability may be, ends a stroke.
        pen_starts_down: The origin is the first point of the first stroke, as for :func:`strokes_to_rows`; else the
            first row leads to that point.

    Returns:
        Points (x, y) of each stroke, each of shape (points, 2).

    >>> [s.tolist() for s in rows_to_strokes(np.array([[2, 1, 1], [-6, -5, 1]]), pen_starts_down=True)]
    [[[0.0, 0.0], [2.0, 1.0]], [[-4.0, -4.0]]]
    """
    if not len(rows):
        return []
    points, lifts = _points(rows, pen_starts_down)
    return np.split(points, np.flatnonzero(lifts[:-1]) + 1)


def smooth_rows(rows: NDArray[Any], width: int, pen_starts_down: bool = False) -> NDArray[np.floating[Any]]:
    """Return rows (dx, dy, lift) whose points are moving averages within their strokes.

    A point becomes the mean of ``width`` points of its stroke around it, of fewer near the ends, which stay in place.

    Args:
        rows: Shape (steps, 3).
        width: Odd number of points.
        pen_starts_down: As for :func:`rows_to_strokes`.

    >>> smooth_rows(np.array([[0, 0, 0], [3, 3, 0], [3, 0, 1]]), width=3).tolist()
    [[0.0, 0.0, 0.0], [3.0, 2.0, 0.0], [3.0, 1.0, 1.0]]
    """
    if not len(rows):
        return np.zeros((0, 3), dtype=np.float32)
    points, lifts = _points(rows, pen_starts_down)
    ends = np.flatnonzero(lifts)
    ends = ends if len(ends) and ends[-1] == len(points) - 1 else np.append(ends, len(points) - 1)
    sizes = np.diff(ends, prepend=-1)
    last = np.repeat(ends, sizes)
    first = np.repeat(ends - sizes + 1, sizes)
    here = np.arange(len(points))
    reach = np.minimum(width // 2, np.minimum(here - first, last - here))
    sums = np.vstack([np.zeros((1, 2)), points.cumsum(0)])
    means = (sums[here + reach + 1] - sums[here - reach]) / (2 * reach + 1)[:, None]
    means = np.where(reach[:, None] > 0, means, points)
    smooth = rows.astype(np.result_type(rows.dtype, np.float32))
    smooth[:, :2] = np.diff(means, axis=0) if pen_starts_down else np.diff(means, axis=0, prepend=np.zeros((1, 2)))
    return smooth


def _points(rows: NDArray[Any], pen_starts_down: bool) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the points (x, y) that rows lead to, and after which of them the pen is lifted."""
    points, lifts = rows[:, :2].astype(np.float64).cumsum(0), rows[:, 2] > 0.5
    if not pen_starts_down:
        return points, lifts
    return np.vstack([np.zeros((1, 2)), points]), np.append(False, lifts)
