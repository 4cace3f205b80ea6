"""What every operation has, and the pass that holds its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vrnn_lightning.recurrence.buffers import Buffer, ParameterRef
from vrnn_lightning.recurrence.memory import empty

__all__ = ["Calls", "Operation", "Pass"]

Steps = Sequence[Tensor]


@dataclass
class Calls:
    """What calls of modules keep of a pass.

    Args:
        requires_grad: Whether graphs are kept for the way back.
    """

    requires_grad: bool = False
    graphs: dict[tuple[Buffer, int], Any] = field(default_factory=dict)
    """Inputs and outputs of a call, by its first target and the step."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that the calls of each part took."""


class Pass:
    """The numbers of one walk through all steps, forwards or back.

    Args:
        values: The value of each buffer that is not a view, and of each parameter.
        calls: What calls of modules keep.
    """

    def __init__(self, values: Mapping[Buffer | ParameterRef, Tensor], calls: Calls) -> None:
        self.calls = calls
        self._values = dict(values)
        self._steps: dict[Buffer, Steps] = {}
        self._grads: dict[Buffer, Tensor] = {}
        self._grad_steps: dict[Buffer, Steps] = {}
        self._written: set[Buffer] = set()
        self.parameter_grads: dict[ParameterRef, Tensor] = {}
        """The gradient of each parameter that an operation added to."""

    def value(self, buffer: Buffer) -> Tensor:
        """Return a buffer's values, shape (steps, rows, width)."""
        if buffer not in self._values:
            assert buffer.parent is not None
            self._values[buffer] = self.value(buffer.parent)[buffer.place]
        return self._values[buffer]

    def steps(self, buffer: Buffer) -> Steps:
        """Return a buffer's values step by step, each of shape (rows, width)."""
        if buffer not in self._steps:
            self._steps[buffer] = self.value(buffer).unbind(0)
        return self._steps[buffer]

    def parameter(self, ref: ParameterRef) -> Tensor:
        """Return the value of a parameter in the type that steps read it in."""
        value = self._values[ref]
        if value.dtype != ref.dtype:
            value = self._values[ref] = value.to(ref.dtype)
        return value

    def grad(self, buffer: Buffer) -> Tensor:
        """Return the gradient of a buffer, shape (steps, rows, width); it is uninitialised until it is written."""
        if buffer not in self._grads:
            if buffer.parent is not None:
                self._grads[buffer] = self.grad(buffer.parent)[buffer.place]
            else:
                value = self.value(buffer)
                self._grads[buffer] = empty(value.shape, value.dtype, value.device)
        return self._grads[buffer]

    def grad_steps(self, buffer: Buffer) -> Steps:
        """Return the gradient of a buffer step by step, each of shape (rows, width)."""
        if buffer not in self._grad_steps:
            self._grad_steps[buffer] = self.grad(buffer).unbind(0)
        return self._grad_steps[buffer]

    def is_written(self, buffer: Buffer) -> bool:
        """Return whether the gradient of a buffer, or of what it is a view of, holds numbers to add to."""
        return buffer in self._written or (buffer.parent is not None and self.is_written(buffer.parent))

    def claim(self, buffer: Buffer) -> bool:
        """Return whether the gradient of a buffer holds numbers to add to; from now on it does."""
        is_written = self.is_written(buffer)
        self._written.add(buffer)
        return is_written

    def fill_grad(self, buffer: Buffer, first: Tensor | None) -> None:
        """Write the gradient of a buffer: ``first`` for the first steps, zero for the others."""
        grad = self.grad(buffer)
        count = 0 if first is None else len(first)
        if first is not None:
            grad[:count].copy_(first)
        grad[count:].zero_()
        self._written.add(buffer)

    def add_grad(self, ref: ParameterRef, grad: Tensor) -> None:
        """Add to the gradient of a parameter, which may keep ``grad`` itself."""
        own = self.parameter_grads.get(ref)
        self.parameter_grads[ref] = grad if own is None else own.add_(grad)

    def add_grad_product(self, ref: ParameterRef, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right``, which has as many rows as the leading dimensions of a parameter, to its gradient."""
        own = self.parameter_grads.get(ref)
        if own is None:
            self.parameter_grads[ref] = torch.mm(left, right).view(self.parameter(ref).shape)
        else:
            own.view(left.shape[0], -1).addmm_(left, right)


class Operation:
    """One operation of a step.

    An instance describes the buffers and parameters that the operation reads and writes. Each pass works on a copy of
    it, so attributes that a method below sets belong to that pass alone. Methods that a subclass does not define cost
    nothing.

    Forwards a pass calls ``bind``, ``begin`` and, for each step, ``forward``. On the way back it calls ``plan``, for
    each block of steps ``prepare``, for each step of the block ``backward``, and at the end ``finish``.
    """

    def bind(self, values: Pass) -> None:
        """Look up the tensors that ``begin`` and ``forward`` work on."""

    def begin(self) -> None:
        """Do what can be done for all steps at once, before the first one."""

    def forward(self, t: int) -> None:
        """Compute step t."""

    def plan(self, values: Pass) -> None:
        """Look up the tensors of the way back, and learn whether a gradient is written or added to.

        A gradient that :meth:`Pass.claim` calls written is added to; one that is not is overwritten.
        """

    def prepare(self, start: int, end: int) -> None:
        """Compute what the steps from ``start`` to before ``end`` need on the way back."""

    def backward(self, t: int) -> None:
        """Compute the gradients of what step t read, from those of what it wrote."""

    def finish(self, values: Pass) -> None:
        """Compute the gradients of parameters, for all steps at once."""
