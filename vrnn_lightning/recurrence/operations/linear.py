"""Products with weights."""

from __future__ import annotations

import torch

from vrnn_lightning.recurrence.buffers import Buffer, ParameterRef
from vrnn_lightning.recurrence.operations.base import Operation, Pass

__all__ = ["Affine", "MatMul"]


class Affine(Operation):
    """``target = known W + b`` or ``target = b``, for all steps before the first one.

    Args:
        target: The result; it may have K times the rows of ``known``.
        bias: Shape (out,).
        known: Shape (steps, batch, in).
        weight: Shape (in, out).
    """

    def __init__(
        self, target: Buffer, bias: ParameterRef, known: ParameterRef | None = None, weight: ParameterRef | None = None
    ) -> None:
        self.target, self.bias, self.known, self.weight = target, bias, known, weight

    def bind(self, values: Pass) -> None:
        self.sums, self.shift = values.value(self.target), values.parameter(self.bias)
        if self.known is not None and self.weight is not None:
            self.input, self.matrix = values.parameter(self.known), values.parameter(self.weight)

    def begin(self) -> None:
        if self.known is None:
            self.sums.copy_(self.shift.expand_as(self.sums))
            return
        steps, batch, _ = self.input.shape
        rows = self.input.reshape(steps * batch, -1)
        if batch == self.sums.shape[1]:
            torch.addmm(self.shift, rows, self.matrix, out=self.sums.view(steps * batch, -1))
        else:
            product = torch.addmm(self.shift, rows, self.matrix).view(steps, 1, batch, -1)
            self.sums.unflatten(1, (-1, batch)).copy_(product)

    def finish(self, values: Pass) -> None:
        grad = values.grad(self.target)
        if self.known is not None and self.weight is not None:
            known = values.parameter(self.known)
            steps, batch, _ = known.shape
            if batch != grad.shape[1]:
                grad = grad.unflatten(1, (-1, batch)).sum(1)
            flat = grad.view(steps * batch, -1)
            if self.weight.requires_grad:
                values.add_grad(self.weight, known.reshape(steps * batch, -1).t() @ flat)
            if self.known.requires_grad:
                values.add_grad_product(self.known, flat, values.parameter(self.weight).t())
        if self.bias.requires_grad:
            values.add_grad(self.bias, grad.sum((0, 1)))


class MatMul(Operation):
    """``target = source W + b`` at each step, or without a bias ``target += source W``, or ``target = source W``.

    Args:
        source: It may have more steps than the target.
        weight: Shape (in, out).
        target: The result.
        bias: Shape (out,).
        overwrites: Whether the target, without a bias, holds nothing to add to.
    """

    def __init__(
        self,
        source: Buffer,
        weight: ParameterRef,
        target: Buffer,
        bias: ParameterRef | None = None,
        *,
        overwrites: bool = False,
    ) -> None:
        self.source, self.weight, self.target, self.bias = source, weight, target, bias
        self.overwrites = overwrites

    def bind(self, values: Pass) -> None:
        self.inputs, self.sums = values.steps(self.source), values.steps(self.target)
        self.matrix = values.parameter(self.weight).contiguous()  # small products are faster
        self.all_sums = values.value(self.target)
        self.shift = None if self.bias is None else values.parameter(self.bias)
        self.adds_bias = self.shift is not None and len(self.sums) == 1  # otherwise all sums start from the bias

    def begin(self) -> None:
        if self.shift is not None and not self.adds_bias:
            self.all_sums.copy_(self.shift.expand_as(self.all_sums))

    def forward(self, t: int) -> None:
        if self.adds_bias:
            torch.addmm(self.shift, self.inputs[t], self.matrix, out=self.sums[t])  # type: ignore[arg-type]  # there is one
        elif self.overwrites:
            torch.mm(self.inputs[t], self.matrix, out=self.sums[t])
        else:
            self.sums[t].addmm_(self.inputs[t], self.matrix)

    def plan(self, values: Pass) -> None:
        self.adds = values.claim(self.source)
        self.into, self.grads = values.grad_steps(self.source), values.grad_steps(self.target)
        self.transposed = values.parameter(self.weight).t()

    def backward(self, t: int) -> None:
        if self.adds:
            self.into[t].addmm_(self.grads[t], self.transposed)
        else:
            torch.mm(self.grads[t], self.transposed, out=self.into[t])

    def finish(self, values: Pass) -> None:
        grad = values.grad(self.target)
        rows = grad.shape[0] * grad.shape[1]
        if self.weight.requires_grad:
            source = values.value(self.source)[: len(grad)]
            values.add_grad(self.weight, source.view(rows, -1).t() @ grad.view(rows, -1))
        if self.bias is not None and self.bias.requires_grad:
            values.add_grad(self.bias, grad.sum((0, 1)))
