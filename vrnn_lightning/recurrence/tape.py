"""The fast time loop's machinery: small step operations that walk forwards and, by hand, back again.

An autograd graph over a loop costs more than the loop's arithmetic at common sizes, so nothing in here records one. A
:class:`Tape` holds :class:`Track` s, each a preallocated buffer of one quantity at every step, and a list of
operations, each with ``forward(t)`` and ``backward(t)``. What can be done for all steps at once is: products with what
is known beforehand in ``begin``, gradients of weights, as one product per weight, in ``finish``. To autograd the whole
loop is one function, :meth:`Tape.run`.

A new kind of cell is a new operation; no operation knows another.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from vrnn_lightning.recurrence.memory import empty

__all__ = ["GRU", "LSTM", "Cast", "Known", "Operation", "Product", "Relu", "Sample", "Scale", "Tape", "Track", "Weight"]

ops: Any = torch.ops.aten
softplus: Any = F.softplus  # stubs do not know that it takes out=
CACHED = 65536  # numbers of a state's steps that are prepared at once: they stay in a core's cache


class Track:
    """One quantity at every step, and its gradient.

    Args:
        value: Shape (steps, rows, width).
        parent: The track that it is a part of.
        place: Which part.
    """

    def __init__(self, value: Tensor, parent: Track | None = None, place: Any = None) -> None:
        self.value = value
        self.width = value.shape[-1]
        self.written = False
        """Whether the gradient holds something to add to."""
        self._parent, self._place = parent, place
        self._parts: weakref.WeakSet[Track] = weakref.WeakSet()  # a circle would keep the memory beyond its pass

    def columns(self, start: int, end: int) -> Track:
        """Return some columns as a track of their own, on the same memory."""
        return self._part((..., slice(start, end)))

    def later(self) -> Track:
        """Return the track that begins one step later: a state as the next operation of the same step reads it."""
        return self._part(slice(1, None))

    def _part(self, place: Any) -> Track:
        part = Track(self.value[place], self, place)
        self._parts.add(part)
        return part

    @cached_property
    def at(self) -> Sequence[Tensor]:
        """The steps' values, each (rows, width)."""
        return self.value.unbind(0)

    @cached_property
    def grad(self) -> Tensor:
        """The gradient's buffer, shape (steps, rows, width); it holds rubbish until it is written."""
        if self._parent is not None:
            return self._parent.grad[self._place]
        return empty(self.value.shape, self.value.dtype, self.value.device)

    @cached_property
    def grad_at(self) -> Sequence[Tensor]:
        """The steps' gradients, each (rows, width)."""
        return self.grad.unbind(0)

    def release(self) -> None:
        """Let go of the value, which autograd keeps meanwhile: it may be made again for the way back."""
        for part in self._parts:
            part.release()
        self.__dict__.pop("at", None)
        del self.value

    def restore(self, value: Tensor) -> None:
        """Take the value back."""
        self.value = value
        for part in self._parts:
            part.restore(value[part._place])

    def forget_grad(self) -> None:
        """Let go of the gradient."""
        self.written = False
        for name in ("grad", "grad_at"):
            self.__dict__.pop(name, None)
        for part in self._parts:
            part.forget_grad()

    def fill_grad(self, given: Tensor | None) -> None:
        """Start the gradient of the first steps from what comes from outside the loop, and of the rest from zero."""
        if given is None:
            self.grad.zero_()
        else:
            self.grad[: len(given)].copy_(given)
            self.grad[len(given) :].zero_()
        for track in (self, *self._parts):
            track.written = True


class Weight:
    """A tensor that no step changes, and its gradient.

    Args:
        value: Without graph, in the type that products are made in.
        needs_grad: Whether its gradient is asked for.
    """

    def __init__(self, value: Tensor, needs_grad: bool = False) -> None:
        self.value = value
        self.needs_grad = needs_grad
        self.grad: Tensor | None = None

    @cached_property
    def laid(self) -> Tensor:
        """The value, laid out as small products like it best."""
        return self.value.contiguous()

    def release(self) -> None:
        """Let go of the value."""
        self.__dict__.pop("laid", None)
        del self.value

    def add(self, grad: Tensor) -> None:
        """Add to the gradient, or take this one for it."""
        self.grad = grad if self.grad is None else self.grad.add_(grad)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add a product, of as many rows as the value's leading dimensions have, to the gradient."""
        if self.grad is None:
            self.grad = (left @ right).view(self.value.shape)
        else:
            self.grad.view(left.shape[0], -1).addmm_(left, right)


class Operation:
    """One operation of a step; a method that a subclass does not have does nothing."""

    def begin(self) -> None:
        """Do what is possible before the first step."""

    def forward(self, t: int) -> None:
        """Take step t."""

    def plan(self) -> None:
        """Learn, in the order of the way back, whether a gradient is there to be added to."""

    def prepare(self, start: int, end: int) -> None:
        """Prepare to walk back through the steps from ``start`` to before ``end``."""

    def backward(self, t: int) -> None:
        """Take step t back."""

    def finish(self) -> None:
        """Find the gradients of weights, after the last step back."""


class Known(Operation):
    """What a sum starts from: ``target = known W + b``, or the bias alone.

    Args:
        target: The sum; it may have K times the rows of what is known.
        bias: Shape (out,).
        known: Shape (steps, batch, in), or ``None``.
        weight: Shape (in, out).
    """

    def __init__(self, target: Track, bias: Weight, known: Weight | None = None, weight: Weight | None = None) -> None:
        self.target, self.bias, self.known, self.weight = target, bias, known, weight

    def begin(self) -> None:
        """Make the product for all steps."""
        target = self.target.value
        if self.known is None or self.weight is None:
            target.copy_(self.bias.value.expand_as(target))
            return
        steps, batch, _ = self.known.value.shape
        known = self.known.value.reshape(steps * batch, -1)
        if batch == target.shape[1]:
            torch.addmm(self.bias.value, known, self.weight.value, out=target.view(steps * batch, -1))
        else:
            product = torch.addmm(self.bias.value, known, self.weight.value).view(steps, 1, batch, -1)
            target.unflatten(1, (-1, batch)).copy_(product)

    def finish(self) -> None:
        """Find the gradients of the weight, of the bias and of what is known."""
        grad = self.target.grad
        if self.known is not None and self.weight is not None:
            steps, batch, _ = self.known.value.shape
            if batch != grad.shape[1]:
                grad = grad.unflatten(1, (-1, batch)).sum(1)
            flat, known = grad.view(steps * batch, -1), self.known.value.reshape(steps * batch, -1)
            if self.weight.needs_grad:
                self.weight.add(known.t() @ flat)
            if self.known.needs_grad:
                self.known.add_product(flat, self.weight.value.t())
        if self.bias.needs_grad:
            self.bias.add(grad.sum((0, 1)))


class Product(Operation):
    """``target = source W + b``, or without a bias ``target += source W``.

    Args:
        source: May have more steps than the target: then the first ones.
        weight: Shape (in, out).
        target: What it goes to.
        bias: Shape (out,).
    """

    def __init__(self, source: Track, weight: Weight, target: Track, bias: Weight | None = None) -> None:
        self.source, self.weight, self.target, self.bias = source, weight, target, bias
        self.adds = False

        self.first = bias is not None and len(target.value) == 1  # of many steps, all sums start from the bias at once

    def begin(self) -> None:
        """Let all sums start from the bias."""
        if self.bias is not None and not self.first:
            self.target.value.copy_(self.bias.value.expand_as(self.target.value))

    def forward(self, t: int) -> None:
        """Make the product of a step."""
        if self.first:
            torch.addmm(self.bias.value, self.source.at[t], self.weight.laid, out=self.target.at[t])  # type: ignore[union-attr]
        else:
            self.target.at[t].addmm_(self.source.at[t], self.weight.laid)

    def plan(self) -> None:
        """Learn whether the source's gradient is there already."""
        self.adds, self.source.written = self.source.written, True
        self.back = self.weight.value.t()

    def backward(self, t: int) -> None:
        """Find the source's gradient."""
        into = self.source.grad_at[t]
        if self.adds:
            into.addmm_(self.target.grad_at[t], self.back)
        else:
            torch.mm(self.target.grad_at[t], self.back, out=into)

    def finish(self) -> None:
        """Find the gradients of weight and bias."""
        grad = self.target.grad
        rows = grad.shape[0] * grad.shape[1]
        if self.weight.needs_grad:
            source = self.source.value[: len(grad)]
            self.weight.add(source.view(rows, -1).t() @ grad.view(rows, -1))
        if self.bias is not None and self.bias.needs_grad:
            self.bias.add(grad.sum((0, 1)))


class Relu(Operation):
    """``track = max(track, 0)``, in place, and times a mask.

    Args:
        track: The sum, then the activation.
        mask: Dropout, shape (rows, width).
    """

    def __init__(self, track: Track, mask: Weight | None = None) -> None:
        self.track, self.mask = track, mask

    def forward(self, t: int) -> None:
        """Apply it."""
        value = self.track.at[t].relu_()
        if self.mask is not None:
            value.mul_(self.mask.value)

    def prepare(self, start: int, end: int) -> None:
        """Find where the activation is positive."""
        value = self.track.value[start:end]
        slope = (value > 0).to(value)
        if self.mask is not None:
            slope.mul_(self.mask.value)
        self.start, self.slope = start, slope.unbind(0)

    def backward(self, t: int) -> None:
        """Multiply."""
        self.track.grad_at[t].mul_(self.slope[t - self.start])


class Scale(Operation):
    """``target = source * mask``.

    Args:
        source: May have more steps than the target.
        mask: Dropout, shape (rows, width).
        target: What networks read.
    """

    def __init__(self, source: Track, mask: Weight, target: Track) -> None:
        self.source, self.mask, self.target = source, mask, target

    def forward(self, t: int) -> None:
        """Apply it."""
        torch.mul(self.source.at[t], self.mask.value, out=self.target.at[t])

    def backward(self, t: int) -> None:
        """Add to the gradient of the source, a state: there is always one."""
        self.source.grad_at[t].addcmul_(self.target.grad_at[t], self.mask.value)


class Cast(Operation):
    """``target = source`` in another type: products may be made in a narrower one than sums and states.

    Args:
        source: May have more steps than the target.
        target: The same numbers in its own type.
    """

    def __init__(self, source: Track, target: Track) -> None:
        self.source, self.target = source, target
        self.adds = False

    def forward(self, t: int) -> None:
        """Convert."""
        self.target.at[t].copy_(self.source.at[t])

    def plan(self) -> None:
        """Learn whether the source's gradient is there already."""
        self.adds, self.source.written = self.source.written, True

    def backward(self, t: int) -> None:
        """Convert the gradient."""
        into = self.source.grad_at[t]
        if self.adds:
            into.add_(self.target.grad_at[t])
        else:
            into.copy_(self.target.grad_at[t])


class Sample(Operation):
    r"""``z = mean + (softplus(spread) + floor) * noise``, the reparameterised draw of a Gaussian.

    Args:
        raw: Mean and spread, width 2 * latent; the mean may be moved in place.
        noise: Standard normal, width latent.
        z: The draw.
        floor: Least standard deviation.
        prior: Mean and spread of the prior, whose mean is added to ``raw``'s.
    """

    def __init__(self, raw: Track, noise: Track, z: Track, floor: float, prior: Track | None = None) -> None:
        latent = z.width
        self.raw, self.z, self.noise = raw, z, noise
        self.mean, self.spread = raw.columns(0, latent), raw.columns(latent, 2 * latent)
        self.prior_mean = None if prior is None else prior.columns(0, latent)
        self.std = torch.empty_like(z.at[0])
        self.least = self.std.new_tensor(floor)  # to add a tensor takes less time than to add a number

    def forward(self, t: int) -> None:
        """Draw."""
        mean = self.mean.at[t]
        if self.prior_mean is not None:
            mean.add_(self.prior_mean.at[t])
        softplus(self.spread.at[t], out=self.std)
        torch.addcmul(mean, self.std.add_(self.least), self.noise.at[t], out=self.z.at[t])

    def prepare(self, start: int, end: int) -> None:
        """Find what the gradient of z is multiplied by on its way to mean and spread."""
        slope = ops.softplus_backward(self.noise.value[start:end], self.spread.value[start:end], 1, 20)
        self.start, self.factor = start, torch.stack([torch.ones_like(slope), slope], 2).unbind(0)
        self.halves = self.raw.grad.unflatten(-1, (2, -1))[start:end].unbind(0)
        self.of_z = self.z.grad[start:end].unsqueeze(2).unbind(0)

    def backward(self, t: int) -> None:
        """Pass the gradient of z to mean and spread, and to the prior's mean."""
        i = t - self.start
        self.halves[i].addcmul_(self.of_z[i], self.factor[i])
        if self.prior_mean is not None:
            self.prior_mean.grad_at[t].add_(self.mean.grad_at[t])


class GRU(Operation):
    r"""A step of a gated recurrent unit (Cho et al. 2014, as in torch.nn.GRUCell) from its sums.

    .. math:: r, u = \sigma(\cdot), \quad n = \tanh(n_x + r \odot n_h), \quad h_t = (1 - u) \odot n + u \odot h_{t-1}

    Every gradient is that of :math:`h_t` times a factor that the way forward decides; the factors of a block of steps
    are found at once, and a step back multiplies.

    Args:
        gates: The sums n_h, r, u, n_x, width 4 * hidden, changed in place.
        h: The state, of one more step.
        new: n, apart from the gates: of columns beside others tanh takes three times as long.
    """

    def __init__(self, gates: Track, h: Track, new: Track) -> None:
        size = h.width
        self.gates, self.h, self.new = gates, h, new
        self.new_h, self.reset = gates.columns(0, size), gates.columns(size, 2 * size)
        self.update, self.new_x = gates.columns(2 * size, 3 * size), gates.columns(3 * size, 4 * size)
        self.both = gates.columns(size, 3 * size)

    def forward(self, t: int) -> None:
        """Advance."""
        self.both.at[t].sigmoid_()
        new = torch.addcmul(self.new_x.at[t], self.reset.at[t], self.new_h.at[t], out=self.new.at[t]).tanh_()
        torch.lerp(new, self.h.at[t], self.update.at[t], out=self.h.at[t + 1])

    def prepare(self, start: int, end: int) -> None:
        """Find the factors."""
        new_h, reset, update, new = (part.value[start:end] for part in (self.new_h, self.reset, self.update, self.new))
        of_new_h, of_reset, of_update, of_new = (
            part.grad[start:end] for part in (self.new_h, self.reset, self.update, self.new_x)
        )
        ops.tanh_backward.grad_input(1 - update, new, grad_input=of_new)
        ops.sigmoid_backward.grad_input(self.h.value[start:end] - new, update, grad_input=of_update)
        ops.sigmoid_backward.grad_input(new_h, reset, grad_input=of_reset)
        of_reset.mul_(of_new)
        torch.mul(of_new, reset, out=of_new_h)
        self.start, self.factors = start, self.gates.grad.unflatten(-1, (4, -1))[start:end].unbind(0)
        self.of_h = self.h.grad[start + 1 : end + 1].unsqueeze(2).unbind(0)

    def backward(self, t: int) -> None:
        """Multiply."""
        i = t - self.start
        self.factors[i].mul_(self.of_h[i])
        self.h.grad_at[t].addcmul_(self.h.grad_at[t + 1], self.update.at[t])


class LSTM(Operation):
    r"""A step of a long short-term memory (as in torch.nn.LSTMCell) from its sums.

    .. math:: c_t = f \odot c_{t-1} + i \odot g, \quad h_t = o \odot \tanh c_t

    Args:
        gates: The sums i, f, g, o, width 4 * hidden, changed in place.
        h: The output, of one more step.
        c: The cell, of one more step.
        new: g, apart from the gates.
        squashed: tanh c_t.
    """

    def __init__(self, gates: Track, h: Track, c: Track, new: Track, squashed: Track) -> None:
        size = h.width
        self.gates, self.h, self.c, self.new, self.squashed = gates, h, c, new, squashed
        self.parts = [gates.columns(k * size, (k + 1) * size) for k in range(4)]
        self.both = gates.columns(0, 2 * size)

    def forward(self, t: int) -> None:
        """Advance."""
        write, forget, sums, output = (part.at[t] for part in self.parts)
        self.both.at[t].sigmoid_()
        new = self.new.at[t].copy_(sums).tanh_()
        output.sigmoid_()
        c, squashed = self.c.at[t + 1], self.squashed.at[t]
        torch.mul(forget, self.c.at[t], out=c).addcmul_(write, new)
        torch.tanh(c, out=squashed)
        torch.mul(output, squashed, out=self.h.at[t + 1])

    def prepare(self, start: int, end: int) -> None:
        """Find the factors by which gradients of c_t, and of h_t for o, are multiplied."""
        write, forget, _, output = (part.value[start:end] for part in self.parts)
        new = self.new.value[start:end]
        of_write, of_forget, of_new, of_output = (part.grad[start:end] for part in self.parts)
        squashed = self.squashed.value[start:end]
        self.through = ops.tanh_backward(output, squashed).unbind(0)
        ops.sigmoid_backward.grad_input(new, write, grad_input=of_write)
        ops.sigmoid_backward.grad_input(self.c.value[start:end], forget, grad_input=of_forget)
        ops.tanh_backward.grad_input(write, new, grad_input=of_new)
        ops.sigmoid_backward.grad_input(squashed, output, grad_input=of_output)
        self.start, parts = start, self.gates.grad.unflatten(-1, (4, -1))[start:end]
        self.of_c, self.of_h = parts[:, :, :3].unbind(0), parts[:, :, 3].unbind(0)
        self.cells = self.c.grad[start + 1 : end + 1].unsqueeze(2).unbind(0)

    def backward(self, t: int) -> None:
        """Multiply."""
        i, grad = t - self.start, self.h.grad_at[t + 1]
        of_c = self.c.grad_at[t + 1].addcmul_(grad, self.through[i])
        self.of_c[i].mul_(self.cells[i])
        self.of_h[i].mul_(grad)
        self.c.grad_at[t].addcmul_(of_c, self.parts[1].at[t])


class Tape:
    """A loop: its tracks, its operations in order, and the tensors of autograd's graph that they read.

    Args:
        steps: T.
        rows: Rows of every track.
        like: Its type and device are those of states and draws. Under autocast products are made in autocast's type.
    """

    def __init__(self, steps: int, rows: int, like: Tensor) -> None:
        self.steps, self.rows = steps, rows
        self.lock = Lock()
        self.device, self.wide = like.device, like.dtype
        kind = like.device.type
        self.narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        self.operations: list[Operation] = []
        self.states: list[Track] = []
        self._tracks: list[Track] = []
        self._inputs: list[tuple[Tensor, Weight | Track]] = []
        self._found: list[Weight | Track] = []
        self._outputs: list[Track] = []
        self._sources: dict[int, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None
        self._begins: list[Any] = []
        self._forwards: list[Any] | None = None

    def weight(self, tensor: Tensor) -> Weight:
        """Register a tensor that products read."""
        found = next((w for given, w in self._inputs if given is tensor and isinstance(w, Weight)), None)
        if found is None:
            found = Weight(tensor.detach().to(self.narrow), tensor.requires_grad)
            self._inputs.append((tensor, found))
        return found

    def track(self, width: int, dtype: torch.dtype | None = None) -> Track:
        """Return a new track, in the type of products or in another one."""
        return self._keep(empty((self.steps, self.rows, width), dtype or self.narrow, self.device))

    def given(self, value: Tensor) -> Track:
        """Return the track of what is known for all steps and has no gradient, shape (steps, rows, width)."""
        return self._keep(value.detach())

    def state(self, initial: Tensor) -> Track:
        """Return the track of a state, one step longer, from its first value, shape (rows, width)."""
        track = self._keep(empty((self.steps + 1, *initial.shape), self.wide, self.device))
        track.value[0] = initial.detach()
        self._inputs.append((initial, track))
        self.states.append(track)
        return track

    def _keep(self, value: Tensor) -> Track:
        track = Track(value)
        self._tracks.append(track)
        return track

    def add(self, operation: Operation) -> None:
        """Let an operation follow the others."""
        self.operations.append(operation)

    def cast(self, source: Track, dtype: torch.dtype) -> Track:
        """Return a track in another type, or the same one where the types agree."""
        return source if source.value.dtype == dtype else self.copy(source, dtype)

    def copy(self, source: Track, dtype: torch.dtype | None = None) -> Track:
        """Return a track of its own with the same numbers, perhaps in another type."""
        target = self.track(source.width, dtype or source.value.dtype)
        self.add(Cast(source, target))
        return target

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # unrolled, it would take minutes and gain nothing
    def run(
        self, outputs: Sequence[Track], lengths: Tensor, choose: Callable[[int], Tensor | None] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Walk through all steps, as one function of autograd's graph.

        Args:
            outputs: Tracks of which gradients may come back.
            lengths: Real steps of each row, shape (rows,).
            choose: Called after each step; returns the rows that go on, shape (rows,), or ``None`` for all as they are.

        Returns:
            The outputs, each (steps, rows, width), and each state after its row's last real step, (rows, width).
        """
        self._outputs = list(outputs)
        self._last = lengths.clamp(max=self.steps), torch.arange(self.rows, device=self.device)
        tensors = [tensor for tensor, _ in self._inputs]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            found = cast("tuple[Tensor, ...]", _Loop.apply(self, choose, *tensors))
        else:
            found = self.walk(choose)
        return list(found[: len(self._outputs)]), list(found[len(self._outputs) :])

    @torch.no_grad()
    def walk(self, choose: Callable[[int], Tensor | None] | None) -> tuple[Tensor, ...]:
        """Take all steps."""
        for operation in self.operations:
            operation.begin()
        forwards = _methods(self.operations, "forward")
        for t in range(self.steps):
            for forward in forwards:
                forward(t)
            source = None if choose is None else choose(t)
            if source is not None:
                self._sources[t] = source
                for state in self.states:
                    state.at[t + 1].copy_(state.at[t + 1].index_select(0, source))
        values = [track.value[: self.steps] for track in self._outputs]
        return (*values, *(state.value[self._last] for state in self.states))

    @torch.no_grad()
    def step(self, steps: int = 1) -> None:
        """Take some of the steps, and let the states after them be the first ones of the next call."""
        if self._forwards is None:
            self._begins, self._forwards = _methods(self.operations, "begin"), _methods(self.operations, "forward")
        for begin in self._begins:
            begin()
        for t in range(steps):
            for forward in self._forwards:
                forward(t)
        for state in self.states:
            state.at[0].copy_(state.at[steps])

    def release(self) -> list[Tensor]:
        """Let go of all that grows with the steps, and return it for autograd to keep: inputs, then tracks."""
        kept = [*(tensor for tensor, _ in self._inputs), *(track.value for track in self._tracks)]
        self._found = [found for _, found in self._inputs]
        self._inputs.clear()
        self._release_values()
        return kept

    def restore(self, kept: Sequence[Tensor]) -> None:
        """Take it back."""
        for found, tensor in zip(self._found, kept, strict=False):
            if isinstance(found, Weight):
                found.value = tensor.detach().to(self.narrow)
        for track, value in zip(self._tracks, kept[len(self._found) :], strict=True):
            track.restore(value)

    def _release_values(self) -> None:
        for track in self._tracks:
            track.release()
        for found in self._found:
            if isinstance(found, Weight):
                found.release()

    def walk_back(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradient of every tensor that was registered.

        The graph, which may live on, holds this tape: whatever happens, it is as before afterwards.
        """
        way = self.operations[::-1]
        before = [vars(operation).copy() for operation in way]
        try:
            return self._walked_back(way, grads)
        finally:
            for operation, attributes in zip(way, before, strict=True):
                vars(operation).clear()
                vars(operation).update(attributes)
            for weight in self._found:
                if isinstance(weight, Weight):
                    weight.grad = None
            for track in self._tracks:
                track.forget_grad()
            self._release_values()

    def _walked_back(self, way: list[Operation], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        for track, grad in zip(self._outputs, grads, strict=False):
            track.fill_grad(grad)
        for state, grad in zip(self.states, grads[len(self._outputs) :], strict=True):
            if not state.written:
                state.fill_grad(None)
            if grad is not None:
                state.grad.index_put_(self._last, grad.to(state.grad), accumulate=True)
        for operation in way:
            operation.plan()
        backwards, prepares = _methods(way, "backward"), _methods(way, "prepare")
        size = max(1, CACHED // max(state.at[0].numel() for state in self.states))
        for end in range(self.steps, 0, -size):
            start = max(0, end - size)
            for prepare in prepares:
                prepare(start, end)
            for t in range(end - 1, start - 1, -1):
                if t in self._sources:
                    self._scatter(t + 1, self._sources[t])
                for backward in backwards:
                    backward(t)
        for operation in way:
            operation.finish()
        return [_collect(each) for each in self._found]

    def _scatter(self, t: int, source: Tensor) -> None:
        """Bring the gradients of the rows that went on back to where they came from."""
        for state in self.states:
            grad = state.grad_at[t]
            grad.copy_(torch.zeros_like(grad).index_add_(0, source, grad))


def _methods(operations: Sequence[Operation], name: str) -> list[Any]:
    """Return the operations' methods of a name, without those that do nothing."""
    return [getattr(o, name) for o in operations if getattr(type(o), name) is not getattr(Operation, name)]


def _collect(found: Weight | Track) -> Tensor | None:
    if isinstance(found, Track):
        return found.grad[0].clone()
    grad, found.grad = found.grad, None
    return grad


class _Loop(torch.autograd.Function):
    """A tape's walk, for autograd."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, choose: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        found = tape.walk(choose)
        ctx.tape = tape
        ctx.save_for_backward(*tape.release())  # autograd notices changes in place, and checkpointing lets go of them
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # as documented
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fast time loop has no second derivative (create_graph=True): "
                "use vrnn_lightning.recurrence.textbook for it"
            )
        # one graph may be walked back by several threads, and within another autocast than it was laid in
        with ctx.tape.lock, torch.autocast(ctx.tape.device.type, enabled=False):
            ctx.tape.restore(ctx.saved_tensors)
            return None, None, *ctx.tape.walk_back(grads)
