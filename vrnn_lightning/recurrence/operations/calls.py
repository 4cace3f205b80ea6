"""Calls of what the loop does not compile, with the gradient that autograd computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from vrnn_lightning.errors import UserError
from vrnn_lightning.recurrence.buffers import Buffer, ParameterRef
from vrnn_lightning.recurrence.operations.base import Operation, Pass

__all__ = ["Call", "Given"]


class Given(Operation):
    """``target = given``, for all steps before the first one.

    Args:
        given: Shape (steps, batch, width).
        target: It may have K times the rows of ``given``.
    """

    def __init__(self, given: ParameterRef, target: Buffer) -> None:
        self.given, self.target = given, target

    def bind(self, values: Pass) -> None:
        self.input, self.result = values.parameter(self.given), values.value(self.target)

    def begin(self) -> None:
        self.result.unflatten(1, (-1, self.input.shape[1])).copy_(self.input.unsqueeze(1))

    def finish(self, values: Pass) -> None:
        if self.given.requires_grad:
            rows = values.parameter(self.given).shape[1]
            values.add_grad(self.given, values.grad(self.target).unflatten(1, (-1, rows)).sum(1))


class Call(Operation):
    """``targets = function(*sources)`` of a step's values, each (rows, width).

    In a pass with a gradient the function is called under autograd, and the graph of each step is kept for the way
    back.

    Args:
        function: Returns a tensor for each target; dimensions after the first are flattened.
        sources: What it reads.
        targets: The results.
        tensors: Other tensors with a gradient that it reads, such as a module's parameters.
        name: The part that it calls, for messages.
    """

    def __init__(
        self,
        function: Callable[..., Tensor | Sequence[Tensor]],
        sources: Sequence[Buffer],
        targets: Sequence[Buffer],
        tensors: Sequence[tuple[ParameterRef, Tensor]] = (),
        name: str = "",
    ) -> None:
        self.function, self.sources, self.targets, self.name = function, tuple(sources), tuple(targets), name
        self.refs, self.tensors = tuple(ref for ref, _ in tensors), tuple(tensor for _, tensor in tensors)

    def bind(self, values: Pass) -> None:
        self.inputs = [values.steps(source) for source in self.sources]
        self.results = [values.steps(target) for target in self.targets]
        self.calls = values.calls

    def forward(self, t: int) -> None:
        start, inputs = perf_counter(), [steps[t] for steps in self.inputs]
        if not self.calls.requires_grad:
            outputs = self._call(inputs)
        else:
            with torch.enable_grad():  # .data: other steps change other parts of the same memory
                leaves = [
                    x.data.requires_grad_(source.requires_grad) for x, source in zip(inputs, self.sources, strict=True)
                ]
                outputs = self._call(leaves)
            if t == 0:
                self._require_own_tensors(leaves, outputs)
            self.calls.graphs[self.targets[0], t] = leaves, outputs
        for result, output in zip(self.results, outputs, strict=True):
            result[t].copy_(output)
        if self.name:
            seconds = self.calls.seconds
            seconds[self.name] = seconds.get(self.name, 0.0) + perf_counter() - start

    def _call(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        returned = self.function(*inputs)
        outputs = [returned] if isinstance(returned, Tensor) else returned
        shapes = [tuple(steps[0].shape) for steps in self.results]
        flat = [x.flatten(1) if x.ndim > 2 else x for x in outputs]
        if [tuple(x.shape) for x in flat] != shapes:
            got = " and ".join(str(tuple(x.shape)) for x in flat)
            raise UserError(f"{self.name}: returned shape {got}, expected {' and '.join(map(str, shapes))}")
        return flat

    def _require_own_tensors(self, leaves: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Raise if the graph of a step leads to a parameter whose gradient would be lost."""
        known = {id(x) for x in (*leaves, *self.tensors)}
        seen = {x.grad_fn for x in self.tensors}
        nodes: list[Any] = [x.grad_fn for x in outputs]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                raise UserError(
                    f"{self.name}: reads a parameter of shape {tuple(leaf.shape)} that is not its own. "
                    "Fix: make it a parameter or submodule of the part that reads it"
                )
            nodes += [next_node for next_node, _ in node.next_functions]

    def plan(self, values: Pass) -> None:
        self.calls = values.calls
        self.adds = [values.claim(source) for source in self.sources]
        self.into = [values.grad_steps(source) for source in self.sources]
        for target in self.targets:
            if not values.is_written(target):
                values.fill_grad(target, None)
        self.grads = [values.grad_steps(target) for target in self.targets]
        self.sums: list[Tensor | None] = [None] * len(self.tensors)

    def backward(self, t: int) -> None:
        leaves, outputs = self.calls.graphs[self.targets[0], t]
        wanted = [(x, grads[t].to(x.dtype)) for x, grads in zip(outputs, self.grads, strict=True) if x.requires_grad]
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        found: list[Tensor | None] = [None] * (len(inputs) + len(self.tensors))
        if wanted:
            found = _gradients([x for x, _ in wanted], [grad for _, grad in wanted], [*inputs, *self.tensors])
        rest = iter(found)
        for leaf, into, adds in zip(leaves, self.into, self.adds, strict=True):
            grad = next(rest) if leaf.requires_grad else None
            if not adds:
                into[t].zero_() if grad is None else into[t].copy_(grad)
            elif grad is not None:
                into[t].add_(grad)
        for i, grad in enumerate(rest):
            if grad is not None:
                own = self.sums[i]
                self.sums[i] = grad.clone() if own is None else own.add_(grad)

    def finish(self, values: Pass) -> None:
        for ref, total in zip(self.refs, self.sums, strict=True):
            if total is not None and ref.requires_grad:
                values.add_grad(ref, total)


def _gradients(outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return gradients without hooks of tensors, which run once on the gradient of the whole loop."""
    hooks = [x._backward_hooks for x in inputs]
    try:
        for x in inputs:
            x._backward_hooks = None
        return list(torch.autograd.grad(outputs, inputs, grads, allow_unused=True, retain_graph=True))
    finally:
        for x, own in zip(inputs, hooks, strict=True):
            if own:
                x._backward_hooks = own
