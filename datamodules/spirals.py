"""Spirals, drawn with a pen."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch

from vrnn_lightning.data import Modality, Scaler
from vrnn_lightning.errors import UserError

from ._synthetic import Floats, Lengths, SyntheticDataModule, require

__all__ = ["Spirals"]


class Spirals(SyntheticDataModule):
    r"""Drawings of spirals as pen strokes (dx, dy, lift), in the format of handwriting, drawn from a seed; no files.

    The arms of a drawing all begin in the middle, evenly turned, and the pen leaves the paper after each. Point s of
    the S points of arm a of A lies, with a random start :math:`\phi`, sense :math:`\pm` and size r, at

    .. math:: \tfrac sS r \,(\cos, \sin)\big(\phi + 2 \pi \tfrac aA \pm 2 \pi\, \mathrm{turns}\, \tfrac sS\big)
        + \varepsilon, \quad \varepsilon \sim \mathcal N(0, \sigma^2 I)

    A row is the pen's offset from the last point, the middle at first; lift is 1 at the end of an arm, else 0. One
    mean and one standard deviation scale dx and dy; lift stays as it is. The emission to choose is ``Pen``.

    Args:
        arms: Spirals of a drawing, A; at most ``min_steps``.
        turns: How often each goes round, at most 20.
        steps: Points of the longest drawing.
        noise: Standard deviation of each point, sigma; a drawing is of size 1, give or take a quarter. 0 for none.
        options: The other options of ``SyntheticDataModule``.

    >>> Spirals(arms=2, steps=6).split("test")[0].x[:, 2].tolist()
    [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    """

    modality: ClassVar[Modality] = "strokes"

    def __init__(
        self, arms: int = 2, turns: float = 1.5, steps: int = 60, *, noise: float = 0.01, **options: Any
    ) -> None:
        super().__init__(num_features=3, steps=steps, **options)
        self.arms = require("arms", arms, 1)
        if arms > self.min_steps:
            raise UserError(f"--data.arms {arms}: must be at most --data.min_steps, {self.min_steps}")
        self.turns = require("turns", turns, 0, 20)
        self.noise = require("noise", noise, 0, 1e3)

    def draw(self, lengths: Lengths, random: np.random.Generator) -> Floats:
        count, points = len(lengths), np.arange(lengths.max())
        ends = np.arange(1, self.arms + 1) * lengths[:, None] // self.arms  # of the arms, shape (drawings, arms)
        arm = (points[:, None] >= ends[:, None]).sum(-1).clip(max=self.arms - 1)
        first = np.take_along_axis(ends - np.diff(ends, axis=1, prepend=0), arm, 1)
        last = np.take_along_axis(ends, arm, 1) - 1
        share = (points - first + 1) / (last - first + 1)
        start, size = random.uniform(0, 2 * math.pi, (count, 1)), random.uniform(0.75, 1.25, (count, 1))
        sense = random.choice([-1, 1], (count, 1))
        angle = start + 2 * math.pi * (arm / self.arms + sense * self.turns * share)
        ink = (size * share)[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
        ink += self.noise * random.standard_normal(ink.shape)
        lift: Floats = (points == last).astype(np.float64)
        return np.concatenate([np.diff(ink, axis=1, prepend=0.0), lift[..., None]], -1)

    def fit_scaler(self) -> Scaler:
        """Fit one mean and one std on dx and dy of the training rows; lift is left alone."""
        train = self.split("train")
        offsets = torch.cat([train[i].x[:, :2] for i in range(len(train))]).double()
        return Scaler.from_moments(offsets.mean().expand(2), offsets.std(correction=0).expand(2), unscaled=1)
