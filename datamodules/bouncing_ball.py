"""A ball that bounces in a box."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._synthetic import Floats, Lengths, SyntheticDataModule, require

__all__ = ["BouncingBall"]


class BouncingBall(SyntheticDataModule):
    r"""The place of a ball that bounces off a box's walls, under Gaussian noise, drawn from a seed; no files.

    It starts anywhere in :math:`[-1, 1]^D`, in any direction, and keeps its speed; a wall turns round the part of the
    velocity that meets it. With :math:`u_t = p + t v` where it would be without walls,

    .. math:: x_t = 1 - \big|\,(u_t + 1) \bmod 4 - 2\,\big| + \varepsilon_t, \quad
        \varepsilon_t \sim \mathcal N(0, \sigma^2 I)

    Args:
        channels: Dimensions of the box, D.
        steps: Longest sequence.
        speed: Way of one step, at most 2: from wall to wall.
        noise: Standard deviation of the noise, sigma; 0 for none.
        options: The other options of ``SyntheticDataModule``.

    >>> ball = BouncingBall(channels=1, speed=0.5, noise=0, seed=3)
    >>> [round(float(x), 2) for x in ball.split("test")[0].x[:8]]
    [0.66, 0.16, -0.34, -0.84, -0.66, -0.16, 0.34, 0.84]
    """

    def __init__(
        self, channels: int = 2, steps: int = 60, *, speed: float = 0.2, noise: float = 0.05, **options: Any
    ) -> None:
        super().__init__(num_features=channels, steps=steps, **options)
        require("channels", channels, 1)
        self.speed = require("speed", speed, 0, 2)
        self.noise = require("noise", noise, 0, 1e3)

    def draw(self, lengths: Lengths, random: np.random.Generator) -> Floats:
        start = random.uniform(-1, 1, (len(lengths), 1, self.num_features))
        direction = random.standard_normal(start.shape)
        velocity = self.speed * direction / np.linalg.norm(direction, axis=-1, keepdims=True)
        unbounded = start + velocity * np.arange(lengths.max())[:, None]
        place: Floats = 1 - np.abs((unbounded + 1) % 4 - 2)  # space, reflected at every wall
        return place + self.noise * random.standard_normal(place.shape)
