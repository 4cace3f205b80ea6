r"""Schedules of the KL's weight: pure functions of the optimiser step.

Each rises from ``start`` at step 0 to ``end`` at step ``steps`` and stays there; steps outside are clamped.
"""

from __future__ import annotations

import math

__all__ = ["cosine", "cyclical", "linear", "sigmoid"]


def _progress(step: int, steps: int) -> float:
    return min(max(step / steps, 0.0), 1.0) if steps > 0 else 1.0


def linear(step: int, steps: int, start: float = 0.0, end: float = 1.0) -> float:
    """Return the weight on a straight line (Bowman et al. 2016; Sønderby et al. 2016).

    >>> linear(25, 100)
    0.25
    """
    return start + (end - start) * _progress(step, steps)


def cosine(step: int, steps: int, start: float = 0.0, end: float = 1.0) -> float:
    """Return the weight on half a cosine wave: flat at both ends.

    >>> round(cosine(50, 100), 6)
    0.5
    """
    return start + (end - start) * (1 - math.cos(math.pi * _progress(step, steps))) / 2


def sigmoid(step: int, steps: int, start: float = 0.0, end: float = 1.0, steepness: float = 10.0) -> float:
    """Return the weight on a logistic curve centred at half of ``steps`` (Bowman et al. 2016, arXiv 1511.06349).

    The curve is stretched so that it meets ``start`` and ``end`` exactly.

    >>> sigmoid(0, 100), round(sigmoid(50, 100), 6), sigmoid(100, 100)
    (0.0, 0.5, 1.0)
    """
    reach = math.tanh(steepness / 4)
    rise = math.tanh(steepness / 2 * (_progress(step, steps) - 0.5)) / reach
    return start + (end - start) * (1 + rise) / 2


def cyclical(step: int, steps: int, start: float = 0.0, end: float = 1.0, cycles: int = 4, ramp: float = 0.5) -> float:
    """Return the weight that rises linearly ``cycles`` times (Fu et al. 2019, arXiv 1903.10145, eq. 6 and 7).

    Each cycle spends the share ``ramp`` of its steps rising and the rest at ``end``.

    >>> [cyclical(step, 100, cycles=2) for step in (0, 20, 25, 49, 50, 100)]
    [0.0, 0.8, 1.0, 1.0, 0.0, 1.0]
    """
    if step >= steps:
        return end
    within = max(step, 0) * cycles % steps / steps
    return start + (end - start) * min(within / ramp, 1.0)
