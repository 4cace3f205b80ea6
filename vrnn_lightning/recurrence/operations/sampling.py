"""Draws from distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vrnn_lightning.recurrence.buffers import Buffer
from vrnn_lightning.recurrence.operations.base import Operation, Pass

__all__ = ["Apply", "GaussianSample", "StandardNormal"]

ops: Any = torch.ops.aten
softplus: Any = F.softplus  # its stub lacks out=


class GaussianSample(Operation):
    r"""``z = mean + (softplus(spread) + floor) * noise``, the reparameterised draw of a Gaussian.

    Gradients of ``raw``, ``z`` and ``prior`` are always written.

    Args:
        raw: Mean and spread, width 2 * latent; the mean may be moved in place.
        noise: Standard normal, width latent.
        z: The draw.
        floor: Smallest standard deviation.
        prior: Mean and spread of the prior, whose mean is added to that of ``raw``.
    """

    def __init__(self, raw: Buffer, noise: Buffer, z: Buffer, floor: float, prior: Buffer | None = None) -> None:
        self.raw, self.noise, self.z, self.floor = raw, noise, z, floor
        self.mean, self.spread = raw.columns(0, z.width), raw.columns(z.width, 2 * z.width)
        self.prior_mean = None if prior is None else prior.columns(0, z.width)

    def bind(self, values: Pass) -> None:
        self.means, self.spreads = values.steps(self.mean), values.steps(self.spread)
        self.noises, self.draws = values.steps(self.noise), values.steps(self.z)
        self.prior_means = None if self.prior_mean is None else values.steps(self.prior_mean)
        self.std = torch.empty_like(self.draws[0])
        self.least = self.std.new_tensor(self.floor)  # adding a tensor takes less time than adding a number

    def forward(self, t: int) -> None:
        mean = self.means[t]
        if self.prior_means is not None:
            mean.add_(self.prior_means[t])
        softplus(self.spreads[t], out=self.std)
        torch.addcmul(mean, self.std.add_(self.least), self.noises[t], out=self.draws[t])

    def plan(self, values: Pass) -> None:
        self.all_noise, self.all_spreads = values.value(self.noise), values.value(self.spread)
        self.all_raw_grads, self.all_z_grads = values.grad(self.raw), values.grad(self.z)
        self.mean_grads = values.grad_steps(self.mean)
        self.prior_grads = None if self.prior_mean is None else values.grad_steps(self.prior_mean)

    def prepare(self, start: int, end: int) -> None:
        slope = ops.softplus_backward(self.all_noise[start:end], self.all_spreads[start:end], 1, 20)
        self.start, self.factors = start, torch.stack([torch.ones_like(slope), slope], 2).unbind(0)
        self.raw_grads = self.all_raw_grads.unflatten(-1, (2, -1))[start:end].unbind(0)
        self.z_grads = self.all_z_grads[start:end].unsqueeze(2).unbind(0)

    def backward(self, t: int) -> None:
        i = t - self.start
        self.raw_grads[i].addcmul_(self.z_grads[i], self.factors[i])
        if self.prior_grads is not None:
            self.prior_grads[t].add_(self.mean_grads[t])


class StandardNormal(Operation):
    """``target = std * noise``, normal numbers from torch's generator, without a gradient."""

    def __init__(self, target: Buffer, std: float = 1.0) -> None:
        self.target, self.std = target, std

    def bind(self, values: Pass) -> None:
        self.draws = values.steps(self.target)

    def forward(self, t: int) -> None:
        self.draws[t].normal_(0.0, self.std)


class Apply(Operation):
    """``target = function(*sources)`` of a step's values, each (rows, width), without a gradient."""

    def __init__(self, function: Callable[..., Tensor], sources: Sequence[Buffer], target: Buffer) -> None:
        self.function, self.sources, self.target = function, tuple(sources), target

    def bind(self, values: Pass) -> None:
        self.inputs = [values.steps(source) for source in self.sources]
        self.results = values.steps(self.target)

    def forward(self, t: int) -> None:
        self.results[t].copy_(self.function(*(steps[t] for steps in self.inputs)))
