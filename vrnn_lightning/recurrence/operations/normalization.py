"""Layer normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vrnn_lightning.recurrence.buffers import Buffer, ParameterRef
from vrnn_lightning.recurrence.operations.base import Operation, Pass

__all__ = ["Normalize", "layer_norm_grads"]

ops: Any = torch.ops.aten


def layer_norm_grads(
    grad: Tensor, source: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    """Return the gradients that are wanted of the source, the gain and the bias, of shape (..., width) each."""
    size, like_bias = gain.shape, gain  # of the bias only the shape is read
    found: tuple[Tensor, ...] = ops.native_layer_norm_backward(grad, source, size, mean, rstd, gain, like_bias, wanted)
    return found


class Normalize(Operation):
    """``target = layer_norm(source) * gain + bias`` over the numbers of each row, or without a bias ``target += ...``.

    Args:
        source: What is normalised.
        gain: Shape (width,).
        target: The result.
        moments: Buffers of width 1, for the mean and the inverse standard deviation.
        eps: Added to each variance.
        bias: Shape (width,).
    """

    def __init__(
        self,
        source: Buffer,
        gain: ParameterRef,
        target: Buffer,
        moments: tuple[Buffer, Buffer],
        eps: float,
        bias: ParameterRef | None = None,
    ) -> None:
        self.source, self.gain, self.target, self.bias = source, gain, target, bias
        self.moments, self.eps, self.shape = moments, eps, (source.width,)

    def bind(self, values: Pass) -> None:
        self.inputs, self.sums = values.steps(self.source), values.steps(self.target)
        self.means, self.rstds = (values.steps(moment) for moment in self.moments)
        self.scale = values.parameter(self.gain)
        self.shift = None if self.bias is None else values.parameter(self.bias)

    def forward(self, t: int) -> None:
        result, mean, rstd = torch.native_layer_norm(self.inputs[t], self.shape, self.scale, self.shift, self.eps)
        self.means[t].copy_(mean)
        self.rstds[t].copy_(rstd)
        if self.shift is None:
            self.sums[t].add_(result)
        else:
            self.sums[t].copy_(result)

    def plan(self, values: Pass) -> None:
        self.bind(values)
        self.adds = values.claim(self.source)
        self.into, self.grads = values.grad_steps(self.source), values.grad_steps(self.target)

    def backward(self, t: int) -> None:
        wanted = (True, False, False)
        found = layer_norm_grads(self.grads[t], self.inputs[t], self.means[t], self.rstds[t], self.scale, wanted)[0]
        if self.adds:
            self.into[t].add_(found)
        else:
            self.into[t].copy_(found)

    def finish(self, values: Pass) -> None:
        wanted = False, self.gain.requires_grad, self.bias is not None and self.bias.requires_grad
        source, mean, rstd = (values.value(buffer).flatten(0, 1) for buffer in (self.source, *self.moments))
        grad = values.grad(self.target).flatten(0, 1)
        found = layer_norm_grads(grad, source, mean, rstd, self.scale, wanted)
        for ref, total, is_wanted in zip((self.gain, self.bias), found[1:], wanted[1:], strict=True):
            if ref is not None and is_wanted:
                values.add_grad(ref, total)
