"""Recurrent cells, from the sums that their gates are functions of."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from vrnn_lightning.recurrence.buffers import Buffer
from vrnn_lightning.recurrence.operations.base import Operation, Pass
from vrnn_lightning.recurrence.operations.normalization import Normalize

__all__ = ["GRU", "LSTM", "RNN", "LayerNormLSTM"]

ops: Any = torch.ops.aten


class RNN(Operation):
    """A step of a plain recurrent network, ``h_t = tanh(sums)`` or ``max(sums, 0)``.

    Args:
        sums: The sums, changed in place: resampling may overwrite the state.
        h: The output, with one more step.
        is_relu: Whether the nonlinearity is a ReLU.
    """

    def __init__(self, sums: Buffer, h: Buffer, *, is_relu: bool = False) -> None:
        self.sums, self.h, self.is_relu = sums, h, is_relu

    def bind(self, values: Pass) -> None:
        self.values, self.states = values.steps(self.sums), values.steps(self.h)

    def forward(self, t: int) -> None:
        value = self.values[t]
        self.states[t + 1].copy_(value.relu_() if self.is_relu else value.tanh_())

    def plan(self, values: Pass) -> None:
        self.results, self.grads = values.value(self.sums), values.grad_steps(self.sums)
        self.h_grads = values.grad_steps(self.h)

    def prepare(self, start: int, end: int) -> None:
        value = self.results[start:end]
        slopes = (value > 0).to(value) if self.is_relu else 1 - value.square()
        self.start, self.slopes = start, slopes.unbind(0)

    def backward(self, t: int) -> None:
        torch.mul(self.h_grads[t + 1], self.slopes[t - self.start], out=self.grads[t])


class _Cell(Operation):
    """A step of a cell. Its gradients are those of its states times factors, which are computed for many steps at once.

    Args:
        gates: The sums, four of width hidden, changed in place.
        h: The output, with one more step.
        new: The tanh of one of the sums, apart from them, as tanh of columns beside others takes three times as long.
        first: The first of the two adjacent sums that go through one sigmoid.
    """

    def __init__(self, gates: Buffer, h: Buffer, new: Buffer, first: int) -> None:
        self.gates, self.h, self.new, size = gates, h, new, h.width
        self.parts = tuple(gates.columns(k * size, (k + 1) * size) for k in range(4))
        self.both = gates.columns(first * size, (first + 2) * size)

    def bind(self, values: Pass) -> None:
        self.sums = list(zip(*(values.steps(part) for part in (self.both, *self.parts)), strict=True))
        self.states, self.news = values.steps(self.h), values.steps(self.new)

    def plan(self, values: Pass) -> None:
        self.part_values = [values.value(part) for part in (*self.parts, self.new)]
        self.grads = [values.grad(part) for part in self.parts]
        self.gate_grads = values.grad(self.gates).unflatten(-1, (4, -1))
        self.h_grad_steps = values.grad_steps(self.h)


class GRU(_Cell):
    r"""A step of a gated recurrent unit (Cho et al. 2014, as in torch.nn.GRUCell) from its sums.

    .. math:: r, u = \sigma(\cdot), \quad n = \tanh(n_x + r \odot n_h), \quad h_t = (1 - u) \odot n + u \odot h_{t-1}

    The sums are n_h, r, u, n_x, and ``new`` is n.
    """

    def __init__(self, gates: Buffer, h: Buffer, new: Buffer) -> None:
        super().__init__(gates, h, new, first=1)

    def forward(self, t: int) -> None:
        both, new_h, reset, update, new_x = self.sums[t]
        both.sigmoid_()
        new = torch.addcmul(new_x, reset, new_h, out=self.news[t]).tanh_()
        torch.lerp(new, self.states[t], update, out=self.states[t + 1])

    def plan(self, values: Pass) -> None:
        super().plan(values)
        self.hs, self.h_grads, self.updates = values.value(self.h), values.grad(self.h), values.steps(self.parts[2])

    def prepare(self, start: int, end: int) -> None:
        new_h, reset, update, _, new = (value[start:end] for value in self.part_values)
        new_h_grad, reset_grad, update_grad, new_grad = (grad[start:end] for grad in self.grads)
        ops.tanh_backward.grad_input(1 - update, new, grad_input=new_grad)
        ops.sigmoid_backward.grad_input(self.hs[start:end] - new, update, grad_input=update_grad)
        ops.sigmoid_backward.grad_input(new_h, reset, grad_input=reset_grad)
        reset_grad.mul_(new_grad)
        torch.mul(new_grad, reset, out=new_h_grad)
        self.start, self.factors = start, self.gate_grads[start:end].unbind(0)
        self.h_grad_columns = self.h_grads[start + 1 : end + 1].unsqueeze(2).unbind(0)

    def backward(self, t: int) -> None:
        i = t - self.start
        self.factors[i].mul_(self.h_grad_columns[i])
        self.h_grad_steps[t].addcmul_(self.h_grad_steps[t + 1], self.updates[t])


class LSTM(_Cell):
    r"""A step of a long short-term memory (Hochreiter & Schmidhuber 1997, as in torch.nn.LSTMCell) from its sums.

    .. math:: c_t = f \odot c_{t-1} + i \odot g, \quad h_t = o \odot \tanh c_t

    The sums are i, f, g, o, and ``new`` is g.

    Args:
        c: The cell state, with one more step.
        squashed: Its tanh.
    """

    def __init__(self, gates: Buffer, h: Buffer, c: Buffer, new: Buffer, squashed: Buffer) -> None:
        super().__init__(gates, h, new, first=0)
        self.c, self.squashed = c, squashed

    def bind(self, values: Pass) -> None:
        super().bind(values)
        self.cells, self.tanhs = values.steps(self.c), values.steps(self.squashed)

    def forward(self, t: int) -> None:
        both, write, forget, sums, output = self.sums[t]
        both.sigmoid_()
        new = self.news[t].copy_(sums).tanh_()
        output.sigmoid_()
        c = self.cells[t + 1]
        torch.mul(forget, self.cells[t], out=c).addcmul_(write, new)
        torch.mul(output, self.squash(t, c), out=self.states[t + 1])

    def squash(self, t: int, c: Tensor) -> Tensor:
        """Return what the output gate multiplies."""
        return torch.tanh(c, out=self.tanhs[t])

    def plan(self, values: Pass) -> None:
        super().plan(values)
        self.part_values += [values.value(self.squashed), values.value(self.c)]
        self.c_grads, self.c_grad_steps = values.grad(self.c), values.grad_steps(self.c)
        self.forgets = values.steps(self.parts[1])

    def prepare(self, start: int, end: int) -> None:
        write, forget, _, output, new, squashed, c = (value[start:end] for value in self.part_values)
        write_grad, forget_grad, new_grad, output_grad = (grad[start:end] for grad in self.grads)
        self.through = ops.tanh_backward(output, squashed).unbind(0)
        ops.sigmoid_backward.grad_input(new, write, grad_input=write_grad)
        ops.sigmoid_backward.grad_input(c, forget, grad_input=forget_grad)
        ops.tanh_backward.grad_input(write, new, grad_input=new_grad)
        ops.sigmoid_backward.grad_input(squashed, output, grad_input=output_grad)
        self.start, parts = start, self.gate_grads[start:end]
        self.c_factors, self.h_factors = parts[:, :, :3].unbind(0), parts[:, :, 3].unbind(0)
        self.c_grad_columns = self.c_grads[start + 1 : end + 1].unsqueeze(2).unbind(0)

    def backward(self, t: int) -> None:
        i, grad = t - self.start, self.h_grad_steps[t + 1]
        c_grad = self.squash_backward(t, grad)
        self.c_factors[i].mul_(self.c_grad_columns[i])
        self.h_factors[i].mul_(grad)
        self.c_grad_steps[t].addcmul_(c_grad, self.forgets[t])

    def squash_backward(self, t: int, grad: Tensor) -> Tensor:
        """Add to the gradient of c_t what comes through h_t, whose gradient is ``grad``; return it."""
        return self.c_grad_steps[t + 1].addcmul_(grad, self.through[t - self.start])


class LayerNormLSTM(LSTM):
    r"""An LSTM step whose output reads a normalised cell state, :math:`h_t = o \odot \tanh \mathrm{LN}(c_t)`.

    Args:
        before: c_t as it is normalised: resampling may overwrite the state.
        norm: Normalises it, into the argument of the tanh.
    """

    def __init__(
        self, gates: Buffer, h: Buffer, c: Buffer, new: Buffer, squashed: Buffer, before: Buffer, norm: Normalize
    ) -> None:
        super().__init__(gates, h, c, new, squashed)
        self.before, self.norm = before, norm

    def bind(self, values: Pass) -> None:
        super().bind(values)
        self.norm = copy.copy(self.norm)
        self.norm.bind(values)
        self.befores = values.steps(self.before)

    def squash(self, t: int, c: Tensor) -> Tensor:
        self.befores[t].copy_(c)
        self.norm.forward(t)
        return self.tanhs[t].tanh_()

    def plan(self, values: Pass) -> None:
        super().plan(values)
        self.norm = copy.copy(self.norm)
        self.norm.plan(values)
        self.before_grads, self.squashed_grads = values.grad_steps(self.before), values.grad_steps(self.squashed)

    def squash_backward(self, t: int, grad: Tensor) -> Tensor:
        torch.mul(grad, self.through[t - self.start], out=self.squashed_grads[t])
        self.norm.backward(t)
        return self.c_grad_steps[t + 1].add_(self.before_grads[t])

    def finish(self, values: Pass) -> None:
        self.norm.finish(values)
