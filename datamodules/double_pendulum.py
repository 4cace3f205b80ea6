"""The double pendulum: two weights on rods, let go from anywhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._synthetic import Floats, Lengths, MotionDataModule, integrate, require

__all__ = ["DoublePendulum"]

GRAVITY = 9.81


class DoublePendulum(MotionDataModule):
    r"""The places of a double pendulum's two weights under Gaussian noise, drawn from a seed; no files.

    Both weights are equal, both rods weigh nothing and are 1 m long; :math:`\theta_1, \theta_2` are their angles from
    the vertical, :math:`\delta = \theta_1 - \theta_2`, :math:`g = 9.81`:

    .. math::
        \ddot\theta_1 &= \frac{-3 g \sin\theta_1 - g \sin(\theta_1 - 2 \theta_2)
            - 2 \sin\delta \, (\dot\theta_2^2 + \dot\theta_1^2 \cos\delta)}{3 - \cos 2 \delta} \\
        \ddot\theta_2 &= \frac{2 \sin\delta \, (2 \dot\theta_1^2 + 2 g \cos\theta_1
            + \dot\theta_2^2 \cos\delta)}{3 - \cos 2 \delta}

    It is let go at rest, with angles uniform up to ``max_angle`` on both sides. A step's four features are
    :math:`x_1, y_1, x_2, y_2` in metres from the pivot, y upward: velocities are not seen. One mean and standard
    deviation scale all four.

    Args:
        max_angle: Largest angle at the start, in degrees, up to 180.
        noise: Standard deviation of the noise, in metres; 0 for none.
        options: The other options of ``MotionDataModule``.

    >>> DoublePendulum().num_features
    4
    """

    scaling = "scalar"

    def __init__(self, *, max_angle: float = 120.0, noise: float = 0.05, **options: Any) -> None:
        super().__init__(4, noise, **options)
        self.max_angle = require("max_angle", max_angle, 1, 180)

    def draw(self, lengths: Lengths, random: np.random.Generator) -> Floats:
        widest = math.radians(self.max_angle)
        angles = random.uniform(-widest, widest, (2, len(lengths)))
        start = np.concatenate([angles, np.zeros_like(angles)])
        upper, lower = integrate(_pendulum, start, self.interval, lengths.max())[:2]
        elbow = np.stack([np.sin(upper), -np.cos(upper)], -1)
        seen = np.concatenate([elbow, elbow + np.stack([np.sin(lower), -np.cos(lower)], -1)], -1)
        return seen + self.noise * random.standard_normal(seen.shape)


def _pendulum(state: Floats) -> Floats:
    """Return the derivative of (upper angle, lower angle, their velocities)."""
    upper, lower, u, v = state
    sin, cos = np.sin(upper - lower), np.cos(upper - lower)
    inertia = 2 + 2 * sin**2  # 3 - cos 2 delta
    pull = -3 * GRAVITY * np.sin(upper) - GRAVITY * np.sin(upper - 2 * lower)
    du = (pull - 2 * sin * (v**2 + u**2 * cos)) / inertia
    dv = 2 * sin * (2 * u**2 + 2 * GRAVITY * np.cos(upper) + v**2 * cos) / inertia
    return np.array([u, v, du, dv])
