"""The fast loop: runs the operations of a step forwards and, by hand, back again.

An autograd graph over a loop costs more than the loop's arithmetic at common sizes, so nothing in here records one. A
:class:`Tape` describes the step: its buffers and its operations in order. Each walk over it is a
:class:`~vrnn_lightning.recurrence.operations.Pass` of its own. To autograd the whole loop is one function,
:meth:`Tape.run`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

from vrnn_lightning.recurrence.buffers import Buffer, ParameterRef
from vrnn_lightning.recurrence.memory import empty
from vrnn_lightning.recurrence.operations import Calls, Cast, Operation, Pass

__all__ = ["Resample", "Tape", "TapeStepper"]

CACHED = 65536  # numbers of a state's steps that are prepared at once: they stay in a core's cache

Resample = Callable[[int, Pass], Tensor | None]
"""Called after each step with its index and the numbers so far; returns the rows that continue, shape (rows,), or
``None`` to leave all as they are."""


class Tape:
    """A step: its buffers, its operations in order, and the tensors of autograd's graph that they read.

    Args:
        steps: T.
        rows: Rows of every buffer.
        like: Its type and device are those of states and draws. Under autocast products are computed in the type of
            autocast.
    """

    def __init__(self, steps: int, rows: int, like: Tensor) -> None:
        self.steps, self.rows = steps, rows
        self.device, self.wide = like.device, like.dtype
        kind = like.device.type
        self.narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        self.operations: list[Operation] = []
        self.states: list[Buffer] = []
        self.inputs: dict[Buffer | ParameterRef, Tensor] = {}
        """The tensors that are given: parameters, constants, and the first value of each state."""
        self.buffers: list[Buffer] = []
        self.shares: dict[str, float] = {}
        """Share of a run's time that calls of each part took."""

    def parameter(self, tensor: Tensor, dtype: torch.dtype | None = None) -> ParameterRef:
        """Register a tensor that all steps read, in the type of products or in another one."""
        for ref, given in self.inputs.items():
            if given is tensor and isinstance(ref, ParameterRef):
                return ref
        ref = ParameterRef(dtype or self.narrow, tensor.requires_grad)
        self.inputs[ref] = tensor
        return ref

    def buffer(self, width: int, dtype: torch.dtype | None = None) -> Buffer:
        """Return a new buffer, in the type of products or in another one."""
        self.buffers.append(Buffer(width, dtype or self.narrow))
        return self.buffers[-1]

    def constant(self, value: Tensor) -> Buffer:
        """Return the buffer of numbers that are given and have no gradient, shape (steps, rows, width)."""
        buffer = Buffer(value.shape[-1], value.dtype, requires_grad=False)
        self.inputs[buffer] = value.detach()
        return buffer

    def state(self, initial: Tensor) -> Buffer:
        """Return the buffer of a state, with one more step, from its first value, shape (rows, width)."""
        buffer = self.buffer(initial.shape[-1], self.wide)
        self.inputs[buffer] = initial
        self.states.append(buffer)
        return buffer

    def add(self, operation: Operation) -> None:
        """Append an operation."""
        self.operations.append(operation)

    def cast(self, source: Buffer, dtype: torch.dtype) -> Buffer:
        """Return a buffer in another type, or the same one where the types agree."""
        return source if source.dtype == dtype else self.copy(source, dtype)

    def copy(self, source: Buffer, dtype: torch.dtype | None = None) -> Buffer:
        """Return a buffer of its own with the same numbers, perhaps in another type."""
        target = self.buffer(source.width, dtype or source.dtype)
        self.add(Cast(source, target))
        return target

    def new_pass(self, inputs: Mapping[Buffer | ParameterRef, Tensor], calls: Calls) -> Pass:
        """Return a pass with memory for all steps."""
        values = {key: tensor.detach() for key, tensor in inputs.items()}
        for buffer in self.buffers:
            steps = self.steps + (buffer in self.states)
            values[buffer] = empty((steps, self.rows, buffer.width), buffer.dtype, self.device)
        for state in self.states:
            values[state][0] = inputs[state].detach()
        return Pass(values, calls)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # unrolled, it would take minutes and gain nothing
    def run(
        self, outputs: Sequence[Buffer], lengths: Tensor, resample: Resample | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Walk through all steps, as one function of autograd's graph.

        Args:
            outputs: Buffers of which gradients may come back.
            lengths: Real steps of each row, shape (rows,).
            resample: Called after each step, see :data:`Resample`.

        Returns:
            The outputs, each (steps, rows, width), and each state after its row's last real step, (rows, width).
        """
        inputs, self.inputs = self.inputs, {}  # autograd keeps them from here on
        last = lengths.clamp(max=self.steps), torch.arange(self.rows, device=self.device)
        loop = _Loop(self, list(outputs), last, list(inputs))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.values()):
            loop.calls.requires_grad = True
            tensors = cast("tuple[Tensor, ...]", _LoopFunction.apply(loop, resample, *inputs.values()))
        else:
            tensors = loop.forward(inputs, resample)[0]
        return list(tensors[: len(outputs)]), list(tensors[len(outputs) :])


@dataclass
class _Loop:
    """A run over a tape, with what the way back needs beside the tensors that autograd keeps."""

    tape: Tape
    outputs: list[Buffer]
    last: tuple[Tensor, Tensor]  # index of each state after its row's last real step
    inputs: list[Buffer | ParameterRef]  # what the tensors that autograd keeps are
    resampled: dict[int, Tensor] = field(default_factory=dict)  # rows that continue after the steps where some do not
    calls: Calls = field(default_factory=Calls)

    @torch.no_grad()
    def forward(
        self, inputs: Mapping[Buffer | ParameterRef, Tensor], resample: Resample | None
    ) -> tuple[tuple[Tensor, ...], Pass]:
        """Take all steps; return outputs and last states, and the pass."""
        tape = self.tape
        values, started = tape.new_pass(inputs, self.calls), perf_counter()
        begins, forwards = _bind(tape, values)
        for begin in begins:
            begin()
        for t in range(tape.steps):
            for forward in forwards:
                forward(t)
            rows = None if resample is None else resample(t, values)
            if rows is not None:
                self.resampled[t] = rows
                for state in tape.states:
                    after = values.steps(state)[t + 1]
                    after.copy_(after.index_select(0, rows))
        whole = perf_counter() - started
        tape.shares = {part: seconds / whole for part, seconds in self.calls.seconds.items()}
        outputs = [values.value(buffer)[: tape.steps] for buffer in self.outputs]
        return (*outputs, *(values.value(state)[self.last] for state in tape.states)), values

    @torch.no_grad()
    def backward(self, values: Pass, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradient of every input."""
        tape = self.tape
        for buffer, grad in zip(self.outputs, grads, strict=False):
            values.fill_grad(buffer, grad)
        for state, grad in zip(tape.states, grads[len(self.outputs) :], strict=True):
            if not values.is_written(state):
                values.fill_grad(state, None)
            if grad is not None:
                whole = values.grad(state)
                whole.index_put_(self.last, grad.to(whole), accumulate=True)
        operations = [copy.copy(operation) for operation in reversed(tape.operations)]
        for operation in operations:
            operation.plan(values)
        backwards, prepares = _methods(operations, "backward"), _methods(operations, "prepare")
        size = max(1, CACHED // max(values.value(state)[0].numel() for state in tape.states))
        for end in range(tape.steps, 0, -size):
            start = max(0, end - size)
            for prepare in prepares:
                prepare(start, end)
            for t in range(end - 1, start - 1, -1):
                if t in self.resampled:
                    self._scatter(values, t)
                for backward in backwards:
                    backward(t)
        for operation in operations:
            operation.finish(values)
        return [self._grad(values, key) for key in self.inputs]

    def _scatter(self, values: Pass, t: int) -> None:
        """Add the gradients of the rows that continued after a step to those of the rows that they came from."""
        for state in self.tape.states:
            grad = values.grad_steps(state)[t + 1]
            grad.copy_(torch.zeros_like(grad).index_add_(0, self.resampled[t], grad))

    def _grad(self, values: Pass, key: Buffer | ParameterRef) -> Tensor | None:
        if isinstance(key, ParameterRef):
            return values.parameter_grads.get(key)
        return values.grad(key)[0].clone() if key in self.tape.states else None


def _bind(tape: Tape, values: Pass) -> tuple[list[Any], list[Any]]:
    operations = [copy.copy(operation) for operation in tape.operations]
    for operation in operations:
        operation.bind(values)
    return _methods(operations, "begin"), _methods(operations, "forward")


def _methods(operations: Sequence[Operation], name: str) -> list[Any]:
    return [getattr(o, name) for o in operations if getattr(type(o), name) is not getattr(Operation, name)]


class _LoopFunction(torch.autograd.Function):
    """A loop, for autograd. A graph may be walked back several times, and by several threads: each is its own pass."""

    @staticmethod
    def forward(ctx: Any, loop: _Loop, resample: Resample | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.loop = loop
        outputs, values = loop.forward(dict(zip(loop.inputs, tensors, strict=True)), resample)
        buffers = (values.value(buffer) for buffer in loop.tape.buffers)
        ctx.save_for_backward(*tensors, *buffers)  # autograd notices changes in place, and checkpointing frees them
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # as documented
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fast time loop has no second derivative (create_graph=True). "
                "Fix: step through the model's methods, see VRNN.prior_dist, whose derivatives autograd computes"
            )
        loop = ctx.loop
        values = dict(zip([*loop.inputs, *loop.tape.buffers], ctx.saved_tensors, strict=True))
        with torch.autocast(loop.tape.device.type, enabled=False):  # the types are those of the way forwards
            return None, None, *loop.backward(Pass(values, loop.calls), grads)


class TapeStepper:
    """Takes the steps of a finished tape a few at a time, without a gradient: the next ones may depend on the last."""

    @torch.no_grad()
    def __init__(self, tape: Tape) -> None:
        self.values = tape.new_pass(tape.inputs, Calls())
        self._begins, self._forwards = _bind(tape, self.values)
        self._states = [self.values.steps(state) for state in tape.states]

    @torch.no_grad()
    def step(self, steps: int = 1) -> None:
        """Take the first steps; the states after them are where the next call starts."""
        for begin in self._begins:
            begin()
        for t in range(steps):
            for forward in self._forwards:
                forward(t)
        for state in self._states:
            state[0].copy_(state[steps])

    def select_rows(self, rows: Tensor) -> None:
        """Continue with some rows, shape (rows,), in place of all."""
        for state in self._states:
            state[0].copy_(state[0].index_select(0, rows))
