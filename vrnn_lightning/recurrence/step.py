"""One step of a VRNN, laid out once for all that need it fast.

A step is a small program over named values. Training, particle filters, streams and generation differ only in which
values are given for all steps beforehand, and in which are read at each step. Which lines have to be inside the loop
follows from what depends on what: :func:`partition` computes it, and :class:`FastStep` lays those lines on a tape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby, repeat
from typing import Literal, NamedTuple, cast

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
    GaussianSample,
    MatMul,
    Relu,
    Scale,
    StandardNormal,
)
from vrnn_lightning.recurrence.state import Masks, Networks, State, repeat_rows
from vrnn_lightning.recurrence.tape import Tape

__all__ = ["FastStep", "Line", "Partition", "Purpose", "lay_features", "partition"]

Purpose = Literal["infer", "filter", "stream", "generate"]

READS = {
    "prior": ("h", "inputs"),
    "posterior": ("x_features", "inputs", "future", "h"),
    "emission": ("z_features", "h", "inputs"),
    "state": ("x_features", "inputs", "z_features"),
}
"""The values that the network computing a value reads, in the order of the columns of its first weight."""

DATA = ("x_features", "inputs", "future")
GIVEN: dict[Purpose, tuple[str, ...]] = {"infer": DATA, "filter": DATA, "stream": DATA, "generate": ("inputs",)}
"""Values that are given, or computed from given ones, for all steps beforehand; in the order of their columns."""

READ_AT_ONCE: dict[Purpose, tuple[str, ...]] = {
    "infer": (),
    "filter": ("prior", "emission"),
    "stream": ("prior", "emission"),
    "generate": ("x",),
}
"""Values that are read at each step: by the weights of particles, by the caller of a stream, by the next step."""


class Line(NamedTuple):
    """One line of a step.

    Args:
        value: What it computes.
        part: The part of the model that computes it.
        reads: The values that it depends on.
    """

    value: str
    part: str
    reads: tuple[str, ...]


class Partition(NamedTuple):
    """Where the lines of a step are computed.

    Args:
        before: For all steps at once, before the loop: what depends on given values alone.
        inside: Step by step: what is read at each step, and what the state depends on.
        after: For all steps at once, after the loop: the rest.
    """

    before: tuple[Line, ...]
    inside: tuple[Line, ...]
    after: tuple[Line, ...]

    def __str__(self) -> str:
        lines = []
        for place, part in zip(("before the loop", "inside the loop", "after the loop"), self, strict=True):
            lines.append(f"{place}:")
            lines += [f"    {i.value:<10} = {i.part}({', '.join(i.reads)})" for i in part] or ["    nothing"]
        return "\n".join(lines)


def partition(model: Networks, purpose: Purpose) -> Partition:
    """Return which lines of a model's step are before, inside and after the loop."""
    generates = purpose == "generate"
    absent = set() if model.phi_z is not None else {"prior", "posterior", "z", "z_features", "noise"}
    absent |= set() if model.backward_rnn is not None else {"future"}
    lines = [
        Line("prior", "prior", READS["prior"]),
        Line("posterior", "encoder", (*READS["posterior"], *["prior"] * model.residual_posterior)),
        Line("z", "draw", ("prior" if generates else "posterior", "noise")),
        Line("z_features", "phi_z", ("z",)),
        Line("emission", "decoder", READS["emission"]),
        Line("x", "draw", ("emission",)),
        Line("x_features", "phi_x", ("x",)),
        Line("state", "cells", (*READS["state"], "h")),
    ]
    lines = [line for line in lines if line.value not in absent | {"posterior" if generates else "x"}]
    lines = [line._replace(reads=tuple(read for read in line.reads if read not in absent)) for line in lines]
    known = {"inputs", "noise"} | (set() if generates else {"x", "future"})
    before: list[Line] = []
    for line in lines:
        if set(line.reads) <= known:
            before.append(line)
            known.add(line.value)
    needed, inside = {"state", *READ_AT_ONCE[purpose]}, []
    for line in reversed(lines):
        if line.value in needed and line not in before:
            inside.append(line)
            needed |= set(line.reads)
    after = (line for line in lines if line not in before and line not in inside)
    return Partition(tuple(before), tuple(inside[::-1]), tuple(after))


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

    Attributes:
        partition: Which lines are inside.
        states: h of each layer, then c of each layer.
        h: h_{t-1} of the top layer as networks read it.
        prior: Mean and spread of the prior, if it is inside and a network.
        posterior: Mean and spread of the posterior.
        z: The latent.
        z_features: Its features.
        emission: What the head of the emission reads, if that is inside.
        x: The frame drawn.
    """

    prior: Buffer | None = None
    posterior: Buffer | None = None
    z: Buffer | None = None
    z_features: Buffer | None = None
    emission: Buffer | None = None
    x: Buffer | None = None

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
        self.partition = partition(model, purpose)
        self.states = [tape.state(part) for part in state.layers()]
        self.widths = {
            **dict.fromkeys(("x_features", "inputs", "future"), 0),
            "x_features": model.phi_x.out_features,
            "z_features": 0 if model.phi_z is None else model.phi_z.out_features,
            "h": self.states[0].width,
            **widths,
        }
        self._known, self._known_columns = known, {"".join(GIVEN[purpose]): known}
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._sums: dict[str, Buffer] = {}
        self._lay_states()
        lay = {
            "prior": self._lay_prior,
            "posterior": self._lay_posterior,
            "z": self._lay_z,
            "z_features": self._lay_z_features,
            "emission": self._lay_emission,
            "x": self._lay_x,
            "x_features": self._lay_x_features,
            "state": self._lay_cells,
        }
        for line in self.partition.inside:
            lay[line.value]()

    def _lay_states(self) -> None:
        """Add what is read of given values and of h_{t-1}."""
        tape, masks, count = self.tape, self.masks, len(self.model.cells)
        cells = [cast("nn.GRUCell | nn.LSTMCell", cell) for cell in self.model.cells]
        hs, cs = self.states[:count], self.states[count:]
        narrow = [tape.cast(h, tape.narrow) for h in hs]
        self.h = hs[-1]
        if masks is not None:
            self.h = tape.buffer(hs[-1].width, tape.wide)
            tape.add(Scale(hs[-1], self._mask(masks.h[:, -1], tape.wide), self.h))
        self.cells = [_CellSums(tape, cell, h, c) for cell, h, c in zip(cells, hs, cs or repeat(None), strict=False)]
        networks = {
            name: network
            for name, network in (
                ("prior", self.model.prior),
                ("posterior", self.model.encoder),
                ("emission", self.model.decoder),
            )
            if isinstance(network, Network) and name in [line.value for line in self.partition.inside]
        }
        firsts = {name: next(network.body.linears()) for name, network in networks.items()}
        front, start = tape.buffer(sum(first.out_features for first in firsts.values())), 0
        for name, first in firsts.items():
            self._split(name, first.weight)
            self._sums[name] = front.columns(start, start + first.out_features)
            start += first.out_features
            self._add_known(name, first.bias)
        self._split("state", cells[0].weight_ih)
        self._sums["state"] = self.cells[0].from_below
        self._add_known("state", self.cells[0].bias)
        for cell in self.cells[1:]:
            tape.add(Affine(cell.from_below, tape.parameter(cell.bias)))
        for cell, h in zip(self.cells, narrow, strict=True):
            tape.add(MatMul(h, tape.parameter(cell.weight_h.t()), cell.from_h))
        if firsts:
            source = narrow[-1] if masks is None else tape.cast(self.h, tape.narrow)
            weights = [self._weights[name]["h"] for name in firsts]
            tape.add(MatMul(source, tape.parameter(torch.cat(weights).t()), front))

    def _split(self, name: str, weight: Tensor) -> None:
        """Split a first weight into the columns of given values, which stay together, and those of each other value."""
        given = GIVEN[self.purpose]
        groups = [list(group) for _, group in groupby(READS[name], lambda read: "given" if read in given else read)]
        sizes = [sum(self.widths[read] for read in group) for group in groups]
        parts = weight.split(sizes, 1)
        self._weights[name] = {"".join(group): part for group, part in zip(groups, parts, strict=True)}

    def _add_known(self, name: str, bias: Tensor) -> None:
        """Start the sums of a network from what it reads of given values."""
        given = [read for read in READS[name] if read in GIVEN[self.purpose]]
        shift = self.tape.parameter(bias)
        if not sum(self.widths[read] for read in given):
            self.tape.add(Affine(self._sums[name], shift))
            return
        key = "".join(given)
        known = self.tape.parameter(self._given(given))
        self.tape.add(Affine(self._sums[name], shift, known, self.tape.parameter(self._weights[name][key].t())))

    def _given(self, names: Sequence[str]) -> Tensor:
        """Return the columns of some given values."""
        key = "".join(names)
        if key not in self._known_columns:
            order = GIVEN[self.purpose]
            start = sum(self.widths[name] for name in order[: order.index(names[0])])
            width = sum(self.widths[name] for name in names)
            whole = width == self._known.shape[-1]
            self._known_columns[key] = self._known if whole else self._known[..., start : start + width]
        return self._known_columns[key]

    def _mask(self, mask: Tensor, dtype: torch.dtype) -> ParameterRef:
        return self.tape.parameter(repeat_rows(mask, self.samples), dtype)

    def _read(self, source: Buffer, reads: Sequence[str], *names: str) -> None:
        """Add the products with what was computed in the step."""
        for name in names:
            weights = [self._weights[name][read] for read in reads]
            weight = weights[0] if len(weights) == 1 else torch.cat(weights, 1)
            self.tape.add(MatMul(source, self.tape.parameter(weight.t()), self._sums[name]))

    def _lay_prior(self) -> None:
        if isinstance(self.model.prior, Network):
            self.prior = _lay_gaussian(self.tape, self._sums["prior"], self.model.prior)

    def _lay_posterior(self) -> None:
        self.posterior = _lay_gaussian(
            self.tape, self._sums["posterior"], cast("Network[Gaussian]", self.model.encoder)
        )

    def _lay_z(self) -> None:
        tape, model = self.tape, self.model
        assert model.phi_z is not None
        self.z = z = tape.buffer(next(model.phi_z.linears()).in_features, tape.wide)
        if self.posterior is not None:
            assert self.noise is not None
            moved_by = self.prior if model.residual_posterior else None
            floor = cast("Network[Gaussian]", model.encoder).head.min_std
            tape.add(GaussianSample(self.posterior, tape.constant(self.noise), z, floor, moved_by))
        elif self.prior is not None:
            noise = tape.buffer(z.width, tape.wide)
            tape.add(StandardNormal(noise))
            tape.add(GaussianSample(self.prior, noise, z, cast("Network[Gaussian]", model.prior).head.min_std))
        else:
            prior = model.prior_dist
            reads = [self.h, tape.constant(self._known)] if self._known.shape[-1] else [self.h]
            tape.add(Call(lambda h, inputs=None: prior(h, inputs).sample(), reads, z))

    def _lay_z_features(self) -> None:
        tape, masks = self.tape, self.masks
        into = None
        if self.purpose == "generate":  # the cells read features of x and z at once
            self._both = tape.buffer(self.widths["x_features"] + self.widths["z_features"])
            into = self._both.columns(self.widths["x_features"], self._both.width)
        mask = None if masks is None else self._mask(masks.phi_z, tape.narrow)
        assert self.z is not None
        self.z_features = lay_features(tape, self.z, cast(MLP, self.model.phi_z), mask, into)
        if self.emission_is_inside:
            self._read(self.z_features, ["z_features"], "emission")
        if self.purpose != "generate":
            self._read(self.z_features, ["z_features"], "state")

    @property
    def emission_is_inside(self) -> bool:
        """Whether the emission is computed step by step."""
        return "emission" in self._sums

    def _lay_emission(self) -> None:
        self.emission = _lay_perceptron(self.tape, self._sums["emission"], self.model.decoder.body.linears())

    def _lay_x(self) -> None:
        tape, head = self.tape, self.model.decoder.head
        wide = torch.promote_types(tape.wide, torch.float32)
        assert self.emission is not None
        self.x = tape.buffer(head.num_features, wide)
        if type(head) is Gaussian and head.covariance == "diagonal":
            require_temperature(self.temperature)
            raw = tape.cast(_lay_linear(tape, self.emission, head.linear), wide)
            noise = tape.buffer(self.x.width, wide)
            tape.add(StandardNormal(noise, math.sqrt(self.temperature)))
            tape.add(GaussianSample(raw, noise, self.x, head.min_std))
        else:
            temperature = self.temperature
            tape.add(Call(lambda features: head.draw(features, temperature), [self.emission], self.x))

    def _lay_x_features(self) -> None:
        tape, model = self.tape, self.model
        assert self.x is not None
        both = self._both if self.z_features is not None else tape.buffer(self.widths["x_features"])
        standardized = tape.buffer(next(model.phi_x.linears()).in_features)
        tape.add(Call(lambda x: model.standardize_input(x, None), [self.x], standardized))
        lay_features(tape, standardized, model.phi_x, into=both.columns(0, self.widths["x_features"]))
        self._read(both, ["x_features", *["z_features"] * (self.z_features is not None)], "state")

    def _lay_cells(self) -> None:
        tape, masks = self.tape, self.masks
        self.cells[0].lay(tape)
        for i, cell in enumerate(self.cells[1:]):
            below = self.states[i].next_step()
            if masks is not None:
                masked = tape.buffer(below.width, tape.wide)
                tape.add(Scale(below, self._mask(masks.h[:, i], tape.wide), masked))
                below = masked
            elif self.purpose == "filter":
                below = tape.copy(below)  # resampling overwrites the state
            tape.add(MatMul(tape.cast(below, tape.narrow), tape.parameter(cell.cell.weight_ih.t()), cell.from_below))
            cell.lay(tape)


class _CellSums:
    """The sums of a layer of the recurrence, side by side.

    Those of a GRU are n_h, r, u, n_x: h_{t-1} adds to all but the last columns, the layer's input to all but the
    first. Those of an LSTM are i, f, g, o, and both add to all.

    Args:
        tape: The tape to add operations to.
        cell: Its weights.
        h: Its output.
        c: Its cell state, of an LSTM.

    Attributes:
        bias: Of the sums that the layer's input adds to.
        weight_h: Weight of h_{t-1}, in the order of the sums.
    """

    def __init__(self, tape: Tape, cell: nn.GRUCell | nn.LSTMCell, h: Buffer, c: Buffer | None) -> None:
        size = h.width
        self.cell, self.h, self.c = cell, h, c
        self.gates = tape.buffer(4 * size)
        is_gru = isinstance(cell, nn.GRUCell)
        self.from_h = self.gates.columns(0, 3 * size if is_gru else 4 * size)
        self.from_below = self.gates.columns(size if is_gru else 0, 4 * size)
        self.weight_h: Tensor = cell.weight_hh.roll(size, 0) if is_gru else cell.weight_hh
        both, start = cell.bias_ih + cell.bias_hh, 2 * size
        self.bias: Tensor = torch.cat([both[:start], cell.bias_ih[start:]]) if is_gru else both
        if is_gru:
            tape.add(Affine(self.gates.columns(0, size), tape.parameter(cell.bias_hh[start:])))

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
    tape: Tape,
    first: Buffer,
    linears: Iterable[nn.Linear],
    mask: ParameterRef | None = None,
    into: Buffer | None = None,
) -> Buffer:
    """Add a perceptron from the sums of its first layer on."""
    rest = list(linears)[1:]
    tape.add(Relu(first, None if rest else mask))
    for i, linear in enumerate(rest, start=1):
        first = _lay_linear(tape, first, linear, into if i == len(rest) else None)
        tape.add(Relu(first, mask if i == len(rest) else None))
    return first


def _lay_linear(tape: Tape, source: Buffer, linear: nn.Linear, into: Buffer | None = None) -> Buffer:
    """Add a linear map; return its result, which may go into a given buffer."""
    target = tape.buffer(linear.out_features) if into is None else into
    tape.add(MatMul(source, tape.parameter(linear.weight.t()), target, tape.parameter(linear.bias)))
    return target


def _lay_gaussian(tape: Tape, first: Buffer, network: Network[Gaussian]) -> Buffer:
    """Add a network with a Gaussian head, from the sums of its first layer on; return mean and spread."""
    body = _lay_perceptron(tape, first, network.body.linears())
    return tape.cast(_lay_linear(tape, body, network.head.linear), tape.wide)
