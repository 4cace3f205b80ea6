"""An Ornstein-Uhlenbeck process that is seen at irregular times, with its exact log-likelihood."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vrnn_lightning.datamodules._synthetic import Lengths, SyntheticDataModule, require, valid_values

from vrnn_lightning.batch import SequenceBatch, SequenceSample
from vrnn_lightning.data import Split

__all__ = ["OrnsteinUhlenbeck"]


class OrnsteinUhlenbeck(SyntheticDataModule):
    r"""Noisy channels of one process in continuous time, seen after random intervals, drawn from a seed; no files.

    .. math::
        s_t = a_t s_{t-1} + \sqrt{1 - a_t^2}\, w_t, \quad a_t = e^{-\Delta_t / \tau}, \quad
        x_t = s_t \mathbf 1 + r v_t, \quad \Delta_t \sim \mathrm{Exp}(1)

    with standard normal :math:`s_1, w_t, v_t` and :math:`\Delta_1 = 0`. The covariate of a step is :math:`\Delta_t`.

    Args:
        channels: Features per step, D.
        dt: Let the model read the interval before each step.
        relaxation: Time in which the process forgets, tau, in mean intervals.
        noise: Standard deviation of the channels' noise, r.
        steps: Longest sequence.
        options: The other options of ``SyntheticDataModule``.

    Raises:
        UserError: An option outside its range.
    """

    generator = "torch"
    noun = "path"

    def __init__(
        self,
        channels: int = 2,
        *,
        dt: bool = True,
        relaxation: float = 1.0,
        noise: float = 0.3,
        steps: int = 50,
        **options: Any,
    ) -> None:
        super().__init__(channels, steps, **options)
        require("channels", channels, 1)
        self.relaxation = require("relaxation", relaxation, 1e-3, 1e3)
        self.noise = require("noise", noise, 1e-3, 1e3)
        self.num_inputs = int(dt)

    def draw(self, lengths: Lengths, random: torch.Generator) -> Tensor:
        """Draw paths; the last column is the interval."""
        shape = len(lengths), self.steps, self.num_features + 2
        uniform, *noise = torch.randn(shape, generator=random, dtype=torch.float64).unbind(-1)
        interval = -torch.special.ndtr(uniform).log().float().double()
        interval[:, 0] = 0.0
        kept = (-interval / self.relaxation).exp()
        path = [noise[0][:, 0]]
        for a, w in zip(kept.unbind(1)[1:], noise[0].unbind(1)[1:], strict=True):
            path.append(a * path[-1] + (1 - a.square()).sqrt() * w)
        state = torch.stack(path, 1)
        return torch.stack([*(state + self.noise * v for v in noise[1:]), interval], -1)

    def epoch_of(self, split: Split, epoch: int) -> list[SequenceSample]:
        """Return a split's sequences as they are in an epoch."""
        whole = super().epoch_of(split, epoch)
        return [replace(s, x=s.x[:, :-1], inputs=s.x[:, -1:]) for s in whole]

    def exact_log_likelihood(self, batch: SequenceBatch) -> Tensor:
        r"""Return log p(x | intervals) of each sequence in nats, shape (batch,), by the Kalman filter."""
        x, valid = valid_values(batch)
        assert batch.inputs is not None
        r, d = self.noise**2, self.num_features
        mean, variance, total = x.new_zeros(len(x)), x.new_ones(len(x)), x.new_zeros(len(x))
        for value, seen, interval in zip(
            x.unbind(1), valid.unbind(1), batch.inputs.cpu().double().unbind(1), strict=True
        ):
            a = (-interval[:, 0] / self.relaxation).exp()
            mean, variance = a * mean, a.square() * variance + 1 - a.square()
            surprise, spread = value - mean[:, None], r + d * variance
            summed = surprise.sum(1)
            square = (surprise.square().sum(1) - variance * summed.square() / spread) / r
            density = -0.5 * (square + (d - 1) * math.log(r) + spread.log() + d * math.log(2 * math.pi))
            total = total + density.where(seen[:, 0], 0.0)
            mean, variance = mean + variance * summed / spread, variance * r / spread
        return total
