"""Recurrent cells, from the sums that their gates are functions of."""

from __future__ import annotations

from typing import Any

import torch

from vrnn_lightning.recurrence.buffers import Buffer
from vrnn_lightning.recurrence.operations.base import Operation, Pass

__all__ = ["GRU", "LSTM"]

ops: Any = torch.ops.aten


class GRU(Operation):
    r"""A step of a gated recurrent unit (Cho et al. 2014, as in torch.nn.GRUCell) from its sums.

    .. math:: r, u = \sigma(\cdot), \quad n = \tanh(n_x + r \odot n_h), \quad h_t = (1 - u) \odot n + u \odot h_{t-1}

    Every gradient is that of :math:`h_t` times a factor that the values decide. The factors of a block of steps are
    computed at once, and a step back multiplies.

    Args:
        gates: The sums n_h, r, u, n_x, width 4 * hidden, changed in place.
        h: The state, with one more step.
        new: n, apart from the gates, as tanh of columns beside others takes three times as long.
    """

    def __init__(self, gates: Buffer, h: Buffer, new: Buffer) -> None:
        size = h.width
        self.gates, self.h, self.new = gates, h, new
        self.new_h, self.reset = gates.columns(0, size), gates.columns(size, 2 * size)
        self.update, self.new_x = gates.columns(2 * size, 3 * size), gates.columns(3 * size, 4 * size)
        self.both = gates.columns(size, 3 * size)

    def bind(self, values: Pass) -> None:
        self.states, self.news, self.boths = values.steps(self.h), values.steps(self.new), values.steps(self.both)
        self.resets, self.updates = values.steps(self.reset), values.steps(self.update)
        self.news_h, self.news_x = values.steps(self.new_h), values.steps(self.new_x)

    def forward(self, t: int) -> None:
        self.boths[t].sigmoid_()
        new = torch.addcmul(self.news_x[t], self.resets[t], self.news_h[t], out=self.news[t]).tanh_()
        torch.lerp(new, self.states[t], self.updates[t], out=self.states[t + 1])

    def plan(self, values: Pass) -> None:
        self.values = [values.value(part) for part in (self.new_h, self.reset, self.update, self.new, self.h)]
        self.grads = [values.grad(part) for part in (self.new_h, self.reset, self.update, self.new_x)]
        self.gate_grads, self.h_grads = values.grad(self.gates).unflatten(-1, (4, -1)), values.grad(self.h)
        self.h_grad_steps, self.updates = values.grad_steps(self.h), values.steps(self.update)

    def prepare(self, start: int, end: int) -> None:
        new_h, reset, update, new, h = (value[start:end] for value in self.values)
        new_h_grad, reset_grad, update_grad, new_grad = (grad[start:end] for grad in self.grads)
        ops.tanh_backward.grad_input(1 - update, new, grad_input=new_grad)
        ops.sigmoid_backward.grad_input(h - new, update, grad_input=update_grad)
        ops.sigmoid_backward.grad_input(new_h, reset, grad_input=reset_grad)
        reset_grad.mul_(new_grad)
        torch.mul(new_grad, reset, out=new_h_grad)
        self.start, self.factors = start, self.gate_grads[start:end].unbind(0)
        self.h_grad_columns = self.h_grads[start + 1 : end + 1].unsqueeze(2).unbind(0)

    def backward(self, t: int) -> None:
        i = t - self.start
        self.factors[i].mul_(self.h_grad_columns[i])
        self.h_grad_steps[t].addcmul_(self.h_grad_steps[t + 1], self.updates[t])


class LSTM(Operation):
    r"""A step of a long short-term memory (Hochreiter & Schmidhuber 1997, as in torch.nn.LSTMCell) from its sums.

    .. math:: c_t = f \odot c_{t-1} + i \odot g, \quad h_t = o \odot \tanh c_t

    Args:
        gates: The sums i, f, g, o, width 4 * hidden, changed in place.
        h: The output, with one more step.
        c: The cell state, with one more step.
        new: g, apart from the gates.
        squashed: tanh c_t.
    """

    def __init__(self, gates: Buffer, h: Buffer, c: Buffer, new: Buffer, squashed: Buffer) -> None:
        size = h.width
        self.gates, self.h, self.c, self.new, self.squashed = gates, h, c, new, squashed
        self.parts = [gates.columns(k * size, (k + 1) * size) for k in range(4)]
        self.both = gates.columns(0, 2 * size)

    def bind(self, values: Pass) -> None:
        self.sums = list(zip(*(values.steps(part) for part in (self.both, *self.parts)), strict=True))
        self.states, self.cells = values.steps(self.h), values.steps(self.c)
        self.news, self.tanhs = values.steps(self.new), values.steps(self.squashed)

    def forward(self, t: int) -> None:
        both, write, forget, sums, output = self.sums[t]
        both.sigmoid_()
        new = self.news[t].copy_(sums).tanh_()
        output.sigmoid_()
        c, squashed = self.cells[t + 1], self.tanhs[t]
        torch.mul(forget, self.cells[t], out=c).addcmul_(write, new)
        torch.tanh(c, out=squashed)
        torch.mul(output, squashed, out=self.states[t + 1])

    def plan(self, values: Pass) -> None:
        self.values = [values.value(part) for part in (*self.parts, self.new, self.squashed, self.c)]
        self.grads = [values.grad(part) for part in self.parts]
        self.gate_grads = values.grad(self.gates).unflatten(-1, (4, -1))
        self.c_grads, self.forgets = values.grad(self.c), values.steps(self.parts[1])
        self.h_grad_steps, self.c_grad_steps = values.grad_steps(self.h), values.grad_steps(self.c)

    def prepare(self, start: int, end: int) -> None:
        write, forget, _, output, new, squashed, c = (value[start:end] for value in self.values)
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
        c_grad = self.c_grad_steps[t + 1].addcmul_(grad, self.through[i])
        self.c_factors[i].mul_(self.c_grad_columns[i])
        self.h_factors[i].mul_(grad)
        self.c_grad_steps[t].addcmul_(c_grad, self.forgets[t])
