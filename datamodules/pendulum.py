"""A pendulum that is pushed, as small pictures, with rewards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vrnn_lightning.batch import SequenceSample
from vrnn_lightning.data import Split

from ._synthetic import Floats, Lengths, SyntheticDataModule, require

__all__ = ["Pendulum"]

SIDE = 16
INTERVAL = 0.1


class Pendulum(SyntheticDataModule):
    r"""Pictures of 16 x 16 pixels of a pendulum under random pushes, drawn from a seed; no files.

    .. math:: \ddot\theta = 15 \sin\theta + 6 u - 0.1 \dot\theta, \qquad r = \cos\theta

    A frame's pixels, row by row, lie in [0, 1]: a bright bob at angle :math:`\theta` from the top. The covariate of a
    step is the push :math:`u_{t-1}` in [-1, 1] that led to it, 0 at an episode's first step; it is kept for a few
    steps. The target is the reward r of the frame. Every ``episode`` steps the pendulum is let go at a new angle, where
    ``is_first`` is true: a training sequence holds several episodes, one of validation or test the first of its own.
    Steps are 0.1 s apart.

    Args:
        steps: Longest sequence.
        episode: Steps of an episode; the last of a sequence may be shorter.
        noise: Standard deviation of the pixels' noise; 0 for none.
        train_size: Training sequences.
        val_size: Validation sequences.
        test_size: Test sequences.
        options: The other options of ``SyntheticDataModule``.
    """

    modality = "image"
    image_width = SIDE

    def __init__(
        self,
        *,
        steps: int = 100,
        episode: int = 50,
        noise: float = 0.02,
        train_size: int = 512,
        val_size: int = 64,
        test_size: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(SIDE**2, steps, train_size, val_size, test_size, **options)
        self.episode = require("episode", episode, 1)
        self.noise = require("noise", noise, 0, 1e3)
        self.num_inputs = self.num_targets = 1

    def draw(self, lengths: Lengths, random: np.random.Generator) -> Floats:
        """Draw sequences; the last three columns are push, reward and whether an episode begins."""
        size, steps = len(lengths), int(lengths.max())
        pushes = np.repeat(random.uniform(-1, 1, (size, steps // 5 + 1)), 5, axis=1)[:, :steps]
        starts = random.uniform(-np.pi, np.pi, (size, steps))
        angle, speed, frames = starts[:, 0], np.zeros(size), []
        axis = np.linspace(-1.3, 1.3, SIDE)
        for t in range(steps):
            push, is_first = pushes[:, t], t % self.episode == 0
            if is_first:
                angle, speed, push = starts[:, t], np.zeros(size), np.zeros(size)
            for _ in range(0 if is_first else 10):
                speed = speed + INTERVAL / 10 * (15 * np.sin(angle) + 6 * push - 0.1 * speed)
                angle = angle + INTERVAL / 10 * speed
            away = (axis - np.sin(angle)[:, None])[:, None] ** 2 + (axis + np.cos(angle)[:, None])[:, :, None] ** 2
            beside = np.stack([push, np.cos(angle), np.full(size, is_first)], 1)
            frames.append(np.concatenate([np.exp(-away.reshape(size, -1) / 0.08), beside], 1))
        values = np.stack(frames, 1)
        values[..., : SIDE**2] += self.noise * random.standard_normal((size, steps, SIDE**2))
        return values

    def epoch_of(self, split: Split, epoch: int) -> list[SequenceSample]:
        return [
            replace(s, x=x[:, :-3], inputs=x[:, -3:-2], targets=x[:, -2:-1], is_first=x[:, -1].to(torch.bool))
            for s in super().epoch_of(split, epoch)
            for x in (s.x if split == "train" else s.x[: self.episode],)
        ]
