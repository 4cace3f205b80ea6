"""Layer normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vrnn_lightning.recurrence.buffers import Buffer, ParameterRef
from vrnn_lightning.recurrence.operations.base import Operation, Pass

__all__ = ["Normalize", "layer_norm_grad"]

ops: Any = torch.ops.aten


def layer_norm_grad(grad: Tensor, source: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor) -> Tensor:
    """Return the gradient of what is normalised, shape (rows, width), from that of the result."""
    wanted = (True, False, False)
    found: Tensor = ops.native_layer_norm_backward(grad, source, gain.shape, mean, rstd, gain, None, wanted)[0]
    return found


class Normalize(Operation):
    """``target += layer_norm(source) * gain``, over the numbers of each row.

    Args:
        source: What is normalised.
        gain: Shape (width,).
        target: The result.
        eps: Added to each variance.
    """

    def __init__(self, source: Buffer, gain: ParameterRef, target: Buffer, eps: float) -> None:
        self.source, self.gain, self.target, self.eps, self.shape = source, gain, target, eps, (source.width,)

    def bind(self, values: Pass) -> None:
        self.inputs, self.sums = values.steps(self.source), values.steps(self.target)
        self.scale = values.parameter(self.gain)

    def forward(self, t: int) -> None:
        self.sums[t].add_(torch.native_layer_norm(self.inputs[t], self.shape, self.scale, None, self.eps)[0])

    def plan(self, values: Pass) -> None:
        self.adds = values.claim(self.source)
        self.value, self.inputs = values.value(self.source), values.steps(self.source)
        self.into, self.grads = values.grad_steps(self.source), values.grad_steps(self.target)
        self.scale = values.parameter(self.gain)
        self.moments: list[tuple[Tensor, Tensor]] = []

    def prepare(self, start: int, end: int) -> None:
        self.moments.append(torch.native_layer_norm(self.value[start:end], self.shape, None, None, self.eps)[1:])
        self.start, self.block = start, list(zip(*self.moments[-1], strict=True))

    def backward(self, t: int) -> None:
        found = layer_norm_grad(self.grads[t], self.inputs[t], *self.block[t - self.start], self.scale)
        if self.adds:
            self.into[t].add_(found)
        else:
            self.into[t].copy_(found)

    def finish(self, values: Pass) -> None:
        if self.gain.requires_grad:
            mean, rstd = (torch.cat(parts[::-1]) for parts in zip(*self.moments, strict=True))
            grad = values.grad(self.target)
            values.add_grad(self.gain, ((self.value - mean) * rstd * grad).sum((0, 1)))
