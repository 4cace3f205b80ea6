"""The Lorenz attractor: deterministic chaos, seen through noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._synthetic import Floats, Lengths, MotionDataModule, integrate, require

__all__ = ["Lorenz"]


class Lorenz(MotionDataModule):
    r"""Paths on the Lorenz attractor under Gaussian noise, drawn from a seed; no files.

    .. math:: \dot x = \sigma (y - x), \quad \dot y = x (\varrho - z) - y, \quad \dot z = x y - \beta z

    with :math:`\sigma = 10`, :math:`\varrho = 28` and :math:`\beta = 8/3` (Lorenz 1963). Every path begins at a random
    place of the attractor. Each feature is scaled by its own mean and standard deviation.

    Args:
        channels: How many of x, y and z are seen, from 1 to 3.
        noise: Standard deviation of the noise, in the attractor's units; x spreads by 7.9. 0 for none.
        options: The other options of ``MotionDataModule``.

    >>> Lorenz(channels=1).num_features
    1
    """

    scaling = "per_feature"

    def __init__(self, channels: int = 3, *, noise: float = 0.5, **options: Any) -> None:
        super().__init__(channels, noise, **options)
        require("channels", channels, 1, 3)

    def draw(self, lengths: Lengths, random: np.random.Generator) -> Floats:
        anywhere = random.normal([[0], [0], [25]], 8, (3, len(lengths)))
        times = random.uniform(4, 6, len(lengths))  # by then they are on the attractor, and out of step
        start = integrate(_lorenz, anywhere, times, steps=2)[..., 1]
        path = integrate(_lorenz, start, self.interval, lengths.max())
        seen = np.moveaxis(path[: self.num_features], 0, -1)
        return seen + self.noise * random.standard_normal(seen.shape)


def _lorenz(state: Floats) -> Floats:
    x, y, z = state
    return np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])
