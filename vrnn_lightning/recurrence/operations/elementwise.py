"""Operations on each number alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vrnn_lightning.recurrence.buffers import Buffer, ParameterRef
from vrnn_lightning.recurrence.operations.base import Operation, Pass

__all__ = ["Add", "Cast", "Elementwise", "Relu", "Restart"]


class Restart(Operation):
    """``state = initial`` at some rows, before anything else of a step reads the state.

    Args:
        state: Its gradient is always written.
        initial: Shape (rows, width).
        where: True at the rows of each step that restart, shape (steps, rows).
    """

    def __init__(self, state: Buffer, initial: ParameterRef, where: Tensor) -> None:
        self.state, self.initial = state, initial
        self.where, self.steps = where[..., None].unbind(0), set(where.any(1).nonzero().flatten().tolist())

    def bind(self, values: Pass) -> None:
        self.states, self.first = values.steps(self.state), values.parameter(self.initial)

    def forward(self, t: int) -> None:
        if t in self.steps:
            self.states[t].copy_(torch.where(self.where[t], self.first, self.states[t]))

    def plan(self, values: Pass) -> None:
        self.grads, self.sum = values.grad_steps(self.state), torch.zeros_like(values.parameter(self.initial))

    def backward(self, t: int) -> None:
        if t in self.steps:
            self.sum.addcmul_(self.grads[t], self.where[t].to(self.sum))
            self.grads[t].masked_fill_(self.where[t], 0.0)

    def finish(self, values: Pass) -> None:
        if self.initial.requires_grad:
            values.add_grad(self.initial, self.sum)


class Relu(Operation):
    """``buffer = max(buffer, 0)`` in place, times a mask of shape (rows, width) if there is one."""

    def __init__(self, buffer: Buffer, mask: ParameterRef | None = None) -> None:
        self.buffer, self.mask = buffer, mask

    def bind(self, values: Pass) -> None:
        self.values = values.steps(self.buffer)
        self.kept = None if self.mask is None else values.parameter(self.mask)

    def forward(self, t: int) -> None:
        value = self.values[t].relu_()
        if self.kept is not None:
            value.mul_(self.kept)

    def plan(self, values: Pass) -> None:
        self.results, self.grads = values.value(self.buffer), values.grad_steps(self.buffer)
        self.kept = None if self.mask is None else values.parameter(self.mask)

    def prepare(self, start: int, end: int) -> None:
        value = self.results[start:end]
        slope = (value > 0).to(value)
        if self.kept is not None:
            slope.mul_(self.kept)
        self.start, self.slopes = start, slope.unbind(0)

    def backward(self, t: int) -> None:
        self.grads[t].mul_(self.slopes[t - self.start])


class Cast(Operation):
    """``target = source`` in the target's own type, times a mask if there is one.

    Args:
        source: It may have more steps than the target.
        target: The result.
        mask: Shape (rows, width); only for a source whose gradient is always written, as that of a state.
    """

    def __init__(self, source: Buffer, target: Buffer, mask: ParameterRef | None = None) -> None:
        self.source, self.target, self.mask = source, target, mask

    def bind(self, values: Pass) -> None:
        self.inputs, self.results = values.steps(self.source), values.steps(self.target)
        self.kept = None if self.mask is None else values.parameter(self.mask)

    def forward(self, t: int) -> None:
        if self.kept is None:
            self.results[t].copy_(self.inputs[t])
        else:
            torch.mul(self.inputs[t], self.kept, out=self.results[t])

    def plan(self, values: Pass) -> None:
        self.adds = values.claim(self.source)
        self.into, self.grads = values.grad_steps(self.source), values.grad_steps(self.target)
        self.kept = None if self.mask is None else values.parameter(self.mask)

    def backward(self, t: int) -> None:
        if self.kept is not None:
            self.into[t].addcmul_(self.grads[t], self.kept)
        elif self.adds:
            self.into[t].add_(self.grads[t])
        else:
            self.into[t].copy_(self.grads[t])


class Elementwise(Operation):
    """``target = function(source)``, a function of each number alone, times a mask if there is one.

    Args:
        source: The argument.
        target: The result, in the same type.
        function: Of a tensor; autograd computes its slope.
        mask: Shape (rows, width).
    """

    def __init__(
        self, source: Buffer, target: Buffer, function: Callable[[Tensor], Tensor], mask: ParameterRef | None = None
    ) -> None:
        self.source, self.target, self.function, self.mask = source, target, function, mask

    def bind(self, values: Pass) -> None:
        self.inputs, self.results = values.steps(self.source), values.steps(self.target)
        self.kept = None if self.mask is None else values.parameter(self.mask)

    def forward(self, t: int) -> None:
        result = self.results[t].copy_(self.function(self.inputs[t]))
        if self.kept is not None:
            result.mul_(self.kept)

    def plan(self, values: Pass) -> None:
        self.bind(values)
        self.arguments, self.adds = values.value(self.source), values.claim(self.source)
        self.into, self.grads = values.grad_steps(self.source), values.grad_steps(self.target)

    def prepare(self, start: int, end: int) -> None:
        with torch.enable_grad():
            argument = self.arguments[start:end].detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.function(argument).sum(), argument)
        if self.kept is not None:
            slope = slope * self.kept
        self.start, self.slopes = start, slope.unbind(0)

    def backward(self, t: int) -> None:
        slope = self.slopes[t - self.start]
        if self.adds:
            self.into[t].addcmul_(self.grads[t], slope)
        else:
            torch.mul(self.grads[t], slope, out=self.into[t])


class Add(Operation):
    """``target = one + other``, all in the same type."""

    def __init__(self, one: Buffer, other: Buffer, target: Buffer) -> None:
        self.sources, self.target = (one, other), target

    def bind(self, values: Pass) -> None:
        self.inputs, self.sums = [values.steps(source) for source in self.sources], values.steps(self.target)

    def forward(self, t: int) -> None:
        torch.add(self.inputs[0][t], self.inputs[1][t], out=self.sums[t])

    def plan(self, values: Pass) -> None:
        self.grads = values.grad_steps(self.target)
        self.into = [(values.claim(source), values.grad_steps(source)) for source in self.sources]

    def backward(self, t: int) -> None:
        for adds, into in self.into:
            if adds:
                into[t].add_(self.grads[t])
            else:
                into[t].copy_(self.grads[t])
