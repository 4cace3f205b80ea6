"""One step of a VRNN, laid out on a tape once for all that need it fast."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby, repeat
from typing import cast

import torch
from torch import Tensor, nn

from vrnn_lightning.heads import Gaussian, Network
from vrnn_lightning.heads.base import require_temperature
from vrnn_lightning.nn import MLP
from vrnn_lightning.recurrence.buffers import Buffer, ParameterRef
from vrnn_lightning.recurrence.operations import (
    GRU,
    LSTM,
    Affine,
    Call,
    Cast,
    GaussianSample,
    MatMul,
    Relu,
    StandardNormal,
)
from vrnn_lightning.recurrence.placement import GIVEN, READS, Purpose, partition
from vrnn_lightning.recurrence.state import Masks, Networks, State, repeat_rows
from vrnn_lightning.recurrence.tape import Tape

__all__ = ["FastStep", "lay_features"]


class FastStep:
    """The part of a model's step that is inside the loop, laid out on a tape.

    One product with h_{t-1} serves all networks that read it. What a network reads of given values is multiplied with
    its weight for all steps, before the first one.

    Args:
        model: The networks.
        tape: The tape to add operations to.
        state: State before the first step.
        purpose: What the steps are for.
        known: The given values side by side, shape (steps, batch, width).
        widths: The width of each given value.
        noise: Standard normal, shape (steps, rows, latent); not for generation, which draws its own.
        masks: Dropout, of batch rows.
        samples: Rows per row of ``known``.
        temperature: Temperature of the emission, for generation.
    """

    prior: Buffer | None = None  # mean and spread, if it is inside and a network
    posterior: Buffer | None = None  # mean and spread
    z: Buffer | None = None
    z_features: Buffer | None = None
    emission: Buffer | None = None  # what its head reads, if it is inside
    x: Buffer | None = None  # the frame drawn

    def __init__(
        self,
        model: Networks,
        tape: Tape,
        state: State,
        purpose: Purpose,
        known: Tensor,
        widths: dict[str, int],
        noise: Tensor | None = None,
        masks: Masks | None = None,
        samples: int = 1,
        temperature: float = 1.0,
    ) -> None:
        self.model, self.tape, self.purpose = model, tape, purpose
        self.noise, self.masks, self.samples, self.temperature = noise, masks, samples, temperature
        self.states = [tape.state(part) for part in state.layers()]
        self.widths = {
            "inputs": 0,
            "future": 0,
            "x_features": model.phi_x.out_features,
            "z_features": 0 if model.phi_z is None else model.phi_z.out_features,
            "h": self.states[0].width,
            **widths,
        }
        self._known, self._known_columns = known, {GIVEN[purpose]: known}
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._sums: dict[str, Buffer] = {}
        inside = [line.value for line in partition(model, purpose).inside]
        self._lay_sums(inside)
        for value in inside:
            getattr(self, f"_lay_{value}")()

    def _lay_sums(self, inside: Sequence[str]) -> None:
        """Start the first sums of each network and cell: add what is read of given values and of h_{t-1}."""
        tape, model, count = self.tape, self.model, len(self.model.cells)
        hs, cs = self.states[:count], self.states[count:]
        narrow = [tape.cast(h, tape.narrow) for h in hs]
        self.h = hs[-1] if self.masks is None else self._masked(hs[-1], count - 1)
        cells = [cast("nn.GRUCell | nn.LSTMCell", cell) for cell in model.cells]
        self.cells = [_CellSums(tape, cell, h, c) for cell, h, c in zip(cells, hs, cs or repeat(None), strict=False)]
        networks = {"prior": model.prior, "posterior": model.encoder, "emission": model.decoder}
        firsts = {
            name: next(network.body.linears())
            for name, network in networks.items()
            if isinstance(network, Network) and name in inside
        }
        front, start = tape.buffer(sum(first.out_features for first in firsts.values())), 0
        for name, first in firsts.items():
            self._sums[name] = front.columns(start, start + first.out_features)
            start += first.out_features
            self._add_known(name, first.weight, first.bias)
        self._sums["state"] = self.cells[0].from_below
        self._add_known("state", cells[0].weight_ih, self.cells[0].bias)
        for cell in self.cells[1:]:
            tape.add(Affine(cell.from_below, tape.parameter(cell.bias)))
        for cell, h in zip(self.cells, narrow, strict=True):
            tape.add(MatMul(h, tape.parameter(cell.weight_h.t()), cell.from_h))
        if firsts:
            source = narrow[-1] if self.masks is None else tape.cast(self.h, tape.narrow)
            weights = [self._weights[name]["h"] for name in firsts]
            tape.add(MatMul(source, tape.parameter(torch.cat(weights).t()), front))

    def _add_known(self, name: str, weight: Tensor, bias: Tensor) -> None:
        """Split a network's first weight by what it reads, and start its sums from the given values."""
        given = [read for read in READS[name] if read in GIVEN[self.purpose]]
        groups = groupby(READS[name], lambda read: "given" if read in given else read)
        sizes = {key: sum(self.widths[read] for read in group) for key, group in groups}
        self._weights[name] = dict(zip(sizes, weight.split(list(sizes.values()), 1), strict=True))
        shift = self.tape.parameter(bias)
        if not sizes["given"]:
            self.tape.add(Affine(self._sums[name], shift))
            return
        known = self.tape.parameter(self._given(given))
        self.tape.add(Affine(self._sums[name], shift, known, self.tape.parameter(self._weights[name]["given"].t())))

    def _given(self, names: Sequence[str]) -> Tensor:
        """Return the columns of some given values, the same tensor each time."""
        key = tuple(names)
        if key not in self._known_columns:
            order = GIVEN[self.purpose]
            first = order.index(names[0])
            assert order[first : first + len(key)] == key, "given values that a network reads lie side by side"
            start = sum(self.widths[name] for name in order[:first])
            width = sum(self.widths[name] for name in names)
            is_whole = width == self._known.shape[-1]
            self._known_columns[key] = self._known if is_whole else self._known[..., start : start + width]
        return self._known_columns[key]

    def _mask(self, mask: Tensor, dtype: torch.dtype) -> ParameterRef:
        return self.tape.parameter(repeat_rows(mask, self.samples), dtype)

    def _masked(self, h: Buffer, layer: int) -> Buffer:
        """Return h of a layer with its dropout applied."""
        assert self.masks is not None
        masked = self.tape.buffer(h.width, self.tape.wide)
        self.tape.add(Cast(h, masked, self._mask(self.masks.h[:, layer], self.tape.wide)))
        return masked

    def _read(self, source: Buffer, name: str, reads: Sequence[str]) -> None:
        """Add to the sums of a network the product with values that were computed in the step."""
        weights = [self._weights[name][read] for read in reads]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights, 1)
        self.tape.add(MatMul(source, self.tape.parameter(weight.t()), self._sums[name]))

    def _lay_prior(self) -> None:
        if isinstance(self.model.prior, Network):
            self.prior = _lay_gaussian(self.tape, self._sums["prior"], self.model.prior)

    def _lay_posterior(self) -> None:
        encoder = cast("Network[Gaussian]", self.model.encoder)
        self.posterior = _lay_gaussian(self.tape, self._sums["posterior"], encoder)

    def _lay_z(self) -> None:
        tape, model = self.tape, self.model
        assert model.phi_z is not None
        self.z = z = tape.buffer(next(model.phi_z.linears()).in_features, tape.wide)
        if self.posterior is not None:
            noise = tape.constant(cast(Tensor, self.noise))
            moved_by = self.prior if model.residual_posterior else None
            floor = cast("Network[Gaussian]", model.encoder).head.min_std
            tape.add(GaussianSample(self.posterior, noise, z, floor, moved_by))
        elif self.prior is not None:
            self._draw(self.prior, z, cast("Network[Gaussian]", model.prior).head.min_std)
        else:
            prior = model.prior_dist
            reads = [self.h, tape.constant(self._known)] if self._known.shape[-1] else [self.h]
            tape.add(Call(lambda h, inputs=None: prior(h, inputs).sample(), reads, z))

    def _draw(self, raw: Buffer, target: Buffer, floor: float, std: float = 1.0) -> None:
        """Add a draw from a Gaussian with noise of a standard deviation."""
        noise = self.tape.buffer(target.width, target.dtype)
        self.tape.add(StandardNormal(noise, std))
        self.tape.add(GaussianSample(raw, noise, target, floor))

    def _lay_z_features(self) -> None:
        tape, masks, into = self.tape, self.masks, None
        if self.purpose == "generate":  # the cells read features of x and z at once
            self._both = tape.buffer(self.widths["x_features"] + self.widths["z_features"])
            into = self._both.columns(self.widths["x_features"], self._both.width)
        mask = None if masks is None else self._mask(masks.phi_z, tape.narrow)
        assert self.z is not None
        self.z_features = lay_features(tape, self.z, cast(MLP, self.model.phi_z), mask, into)
        if "emission" in self._sums:
            self._read(self.z_features, "emission", ["z_features"])
        if self.purpose != "generate":
            self._read(self.z_features, "state", ["z_features"])

    def _lay_emission(self) -> None:
        self.emission = _lay_perceptron(self.tape, self._sums["emission"], self.model.decoder.body.linears())

    def _lay_x(self) -> None:
        tape, head, temperature = self.tape, self.model.decoder.head, self.temperature
        wide = torch.promote_types(tape.wide, torch.float32)
        assert self.emission is not None
        self.x = tape.buffer(head.num_features, wide)
        if type(head) is Gaussian and head.covariance == "diagonal":
            require_temperature(temperature)
            raw = tape.cast(_lay_linear(tape, self.emission, head.linear), wide)
            self._draw(raw, self.x, head.min_std, math.sqrt(temperature))
        else:
            tape.add(Call(lambda features: head.draw(features, temperature), [self.emission], self.x))

    def _lay_x_features(self) -> None:
        tape, model = self.tape, self.model
        assert self.x is not None
        both = self._both if self.z_features is not None else tape.buffer(self.widths["x_features"])
        standardized = tape.buffer(next(model.phi_x.linears()).in_features)
        tape.add(Call(lambda x: model.standardize_input(x, None), [self.x], standardized))
        lay_features(tape, standardized, model.phi_x, into=both.columns(0, self.widths["x_features"]))
        self._read(both, "state", ["x_features", *["z_features"] * (self.z_features is not None)])

    def _lay_state(self) -> None:
        tape = self.tape
        self.cells[0].lay(tape)
        for i, cell in enumerate(self.cells[1:]):
            below = self.states[i].next_step()
            if self.masks is not None:
                below = self._masked(below, i)
            elif self.purpose == "filter":
                below = tape.copy(below)  # resampling overwrites the state
            tape.add(MatMul(tape.cast(below, tape.narrow), tape.parameter(cell.cell.weight_ih.t()), cell.from_below))
            cell.lay(tape)


class _CellSums:
    """The sums of a layer of the recurrence, side by side.

    Those of a GRU are n_h, r, u, n_x: h_{t-1} adds to all but the last columns, the layer's input to all but the
    first. Those of an LSTM are i, f, g, o, and both add to all.
    """

    def __init__(self, tape: Tape, cell: nn.GRUCell | nn.LSTMCell, h: Buffer, c: Buffer | None) -> None:
        size = h.width
        self.cell, self.h, self.c, self.gates = cell, h, c, tape.buffer(4 * size)
        self.bias: Tensor = cell.bias_ih + cell.bias_hh  # of the sums that the layer's input adds to
        if isinstance(cell, nn.LSTMCell):
            self.from_h = self.from_below = self.gates
            self.weight_h: Tensor = cell.weight_hh
        else:
            self.from_h, self.from_below = self.gates.columns(0, 3 * size), self.gates.columns(size, 4 * size)
            self.weight_h = cell.weight_hh.roll(size, 0)
            self.bias = torch.cat([self.bias[: 2 * size], cell.bias_ih[2 * size :]])
            tape.add(Affine(self.gates.columns(0, size), tape.parameter(cell.bias_hh[2 * size :])))

    def lay(self, tape: Tape) -> None:
        """Add the next state, once everything was added to the sums."""
        gates, new = tape.cast(self.gates, tape.wide), tape.buffer(self.h.width, tape.wide)
        if self.c is None:
            tape.add(GRU(gates, self.h, new))
        else:
            tape.add(LSTM(gates, self.h, self.c, new, tape.buffer(self.h.width, tape.wide)))


def lay_features(
    tape: Tape, source: Buffer, network: MLP, mask: ParameterRef | None = None, into: Buffer | None = None
) -> Buffer:
    """Add a perceptron to a tape; return its features, which may go into a given buffer."""
    linears = list(network.linears())
    first = _lay_linear(tape, tape.cast(source, tape.narrow), linears[0], into if len(linears) == 1 else None)
    return _lay_perceptron(tape, first, linears, mask, into)


def _lay_perceptron(
    tape: Tape, sums: Buffer, linears: Iterable[nn.Linear], mask: ParameterRef | None = None, into: Buffer | None = None
) -> Buffer:
    """Add a perceptron from the sums of its first layer on."""
    rest = list(linears)[1:]
    tape.add(Relu(sums, None if rest else mask))
    for i, linear in enumerate(rest, start=1):
        is_last = i == len(rest)
        sums = _lay_linear(tape, sums, linear, into if is_last else None)
        tape.add(Relu(sums, mask if is_last else None))
    return sums


def _lay_linear(tape: Tape, source: Buffer, linear: nn.Linear, into: Buffer | None = None) -> Buffer:
    target = tape.buffer(linear.out_features) if into is None else into
    tape.add(MatMul(source, tape.parameter(linear.weight.t()), target, tape.parameter(linear.bias)))
    return target


def _lay_gaussian(tape: Tape, sums: Buffer, network: Network[Gaussian]) -> Buffer:
    """Add a network with a Gaussian head, from the sums of its first layer on; return mean and spread."""
    body = _lay_perceptron(tape, sums, network.body.linears())
    return tape.cast(_lay_linear(tape, body, network.head.linear), tape.wide)
