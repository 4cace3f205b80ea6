"""The layers and the cells that the time loop knows, as operations on a tape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vrnn_lightning.heads import Gaussian, Network
from vrnn_lightning.nn import LayerNormGRUCell, Residual
from vrnn_lightning.nn.networks import HashedDropout
from vrnn_lightning.recurrence.buffers import Buffer, ParameterRef
from vrnn_lightning.recurrence.operations import (
    GRU,
    LSTM,
    RNN,
    Add,
    Affine,
    Cast,
    Elementwise,
    LayerNormLSTM,
    MatMul,
    Normalize,
    Relu,
)
from vrnn_lightning.recurrence.parts import is_plain
from vrnn_lightning.recurrence.tape import Tape

__all__ = ["CellSums", "lay_features", "lay_gaussian", "lay_layers", "lay_linear"]


class CellSums:
    """The sums of a layer of the recurrence, side by side.

    Those of a GRU are n_h, r, u, n_x: h_{t-1} adds to all but the last columns, the layer's input to all but the
    first. Those of an LSTM are i, f, g, o, and both add to all, as they do to those of a plain network. A cell with
    layer normalisation has buffers of its own for both products, which are normalised on their way to the sums.
    """

    def __init__(self, tape: Tape, cell: Any, h: Buffer, c: Buffer | None) -> None:
        size, self.cell, self.h, self.c = h.width, cell, h, c
        self.weight_h: Tensor = cell.weight_hh
        self.bias: Tensor = cell.bias_ih + cell.bias_hh  # of the sums that the layer's input adds to
        self.is_gru, self.is_normed = is_plain(cell, nn.GRUCell, LayerNormGRUCell), hasattr(cell, "gain_hh")
        width = self.weight_h.shape[0]
        self.gates = tape.buffer(width + size * self.is_gru, tape.wide if self.is_normed else tape.narrow)
        self.to_h = self.gates.columns(0, width)
        self.to_below = self.gates.columns(size * self.is_gru, self.gates.width)
        if self.is_gru:
            self.weight_h = cell.weight_hh.roll(size, 0)
            self.bias = torch.cat([self.bias[: 2 * size], cell.bias_ih[2 * size :]])
            tape.add(Affine(self.gates.columns(0, size), tape.parameter(cell.bias_hh[2 * size :], self.gates.dtype)))
        self.from_h, self.from_below, self.shift = self.to_h, self.to_below, self.bias
        if self.is_normed:
            self.from_h, self.from_below = tape.buffer(width), tape.buffer(width)
            self.bias = torch.zeros_like(self.bias, requires_grad=False)

    def lay(self, tape: Tape) -> None:
        """Add the next state, once everything was added to the sums."""
        size, cell = self.h.width, self.cell
        if self.is_normed:
            gain_h = cell.gain_hh.roll(size, 0) if self.is_gru else cell.gain_hh
            tape.add(self._norm(tape, tape.cast(self.from_below, tape.wide), cell.gain_ih, self.to_below, self.shift))
            tape.add(self._norm(tape, tape.cast(self.from_h, tape.wide), gain_h, self.to_h))
        gates = tape.cast(self.gates, tape.wide)
        if self.c is None and not self.is_gru:
            tape.add(RNN(gates, self.h, is_relu=cell.nonlinearity == "relu"))
            return
        new = tape.buffer(size, tape.wide)
        if self.c is None:
            tape.add(GRU(gates, self.h, new))
            return
        buffers = gates, self.h, self.c, new, tape.buffer(size, tape.wide)
        if not self.is_normed:
            tape.add(LSTM(*buffers))
            return
        before = tape.buffer(size, tape.wide)
        norm = self._norm(tape, before, cell.gain_c, buffers[-1], cell.bias_c)
        tape.add(LayerNormLSTM(*buffers, before, norm))

    def _norm(self, tape: Tape, source: Buffer, gain: Tensor, target: Buffer, bias: Tensor | None = None) -> Normalize:
        moments = tape.buffer(1, tape.wide), tape.buffer(1, tape.wide)
        shift = None if bias is None else tape.parameter(bias, tape.wide)
        return Normalize(source, tape.parameter(gain, tape.wide), target, moments, self.cell.eps, shift)


def lay_features(
    tape: Tape,
    source: Buffer,
    layers: Sequence[nn.Module],
    mask: ParameterRef | None = None,
    into: Buffer | None = None,
) -> Buffer:
    """Add a network to a tape; return its features, which may go into a given buffer."""
    layers = _acting(layers)
    is_one = all(isinstance(layer, nn.ReLU) for layer in layers[1:])
    first = lay_linear(tape, tape.cast(source, tape.narrow), layers[0], into if is_one else None)
    return lay_layers(tape, first, layers[1:], mask, into)


def _acting(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the layers that do something: dropout only in training."""
    return [layer for layer in layers if layer.training or not isinstance(layer, HashedDropout)]


def lay_layers(
    tape: Tape, value: Buffer, layers: Sequence[nn.Module], mask: ParameterRef | None = None, into: Buffer | None = None
) -> Buffer:
    """Add layers after a linear map; mask and ``into`` are for the features.

    A ReLU works in place on what the layer before it has written.
    """
    layers = _acting(layers)
    for i, layer in enumerate(layers):
        rest = layers[i + 1 :]
        target = into if all(isinstance(later, nn.ReLU) for later in rest) else None
        last_mask = mask if not rest else None
        if isinstance(layer, nn.ReLU):
            tape.add(Relu(value, last_mask))
            continue
        if isinstance(layer, nn.Linear):
            value = lay_linear(tape, tape.cast(value, tape.narrow), layer, target)
        elif isinstance(layer, nn.LayerNorm):
            value = _lay_norm(tape, value, layer, target)
        elif isinstance(layer, Residual):
            inner = lay_layers(tape, lay_linear(tape, tape.cast(value, tape.narrow), layer[0]), list(layer)[1:])
            both = tape.buffer(value.width) if target is None else target
            tape.add(Add(tape.cast(value, both.dtype), tape.cast(inner, both.dtype), both))
            value = both
        else:
            source, value = value, tape.buffer(value.width) if target is None else target
            tape.add(Elementwise(tape.cast(source, value.dtype), value, layer.forward, last_mask))
            continue
        if last_mask is not None:
            source, value = value, tape.buffer(value.width)
            tape.add(Elementwise(source, value, torch.clone, last_mask))
    return value


def _lay_norm(tape: Tape, source: Buffer, norm: nn.LayerNorm, into: Buffer | None) -> Buffer:
    """Add a layer norm, which is computed in the wide type."""
    target = tape.buffer(source.width, tape.wide)
    gain, bias = (tape.parameter(cast(Tensor, x), tape.wide) for x in (norm.weight, norm.bias))
    moments = tape.buffer(1, tape.wide), tape.buffer(1, tape.wide)
    tape.add(Normalize(tape.cast(source, tape.wide), gain, target, moments, norm.eps, bias))
    if into is None:
        return tape.cast(target, tape.narrow)
    tape.add(Cast(target, into))
    return into


def lay_linear(tape: Tape, source: Buffer, layer: nn.Module, into: Buffer | None = None) -> Buffer:
    """Add a linear map; return its sums, which may go into a given buffer."""
    linear = cast(nn.Linear, layer)
    target = tape.buffer(linear.out_features) if into is None else into
    bias = None if linear.bias is None else tape.parameter(linear.bias)
    tape.add(MatMul(source, tape.parameter(linear.weight.t()), target, bias, overwrites=bias is None))
    return target


def lay_gaussian(tape: Tape, sums: Buffer, layers: Sequence[nn.Module], network: object) -> Buffer:
    """Add a network with a Gaussian head, from the sums of its first layer on; return mean and spread."""
    head = cast("Network[Gaussian]", network).head
    return tape.cast(
        lay_linear(tape, tape.cast(lay_layers(tape, sums, layers[1:]), tape.narrow), head.linear), tape.wide
    )
