"""One step of a VRNN, laid out on a tape once for all that need it fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby, repeat
from typing import Any, cast

import torch
from torch import Tensor, nn

from vrnn_lightning.heads import Gaussian, Network, tempered
from vrnn_lightning.heads.base import require_temperature
from vrnn_lightning.recurrence.buffers import Buffer, ParameterRef
from vrnn_lightning.recurrence.layers import CellSums, lay_features, lay_gaussian, lay_layers, lay_linear
from vrnn_lightning.recurrence.operations import (
    Affine,
    Apply,
    Call,
    Cast,
    GaussianSample,
    Given,
    MatMul,
    Restart,
    StandardNormal,
)
from vrnn_lightning.recurrence.parts import draw_frames, is_plain, trained_tensors
from vrnn_lightning.recurrence.placement import GIVEN, READS, Purpose, partition
from vrnn_lightning.recurrence.state import Masks, Networks, State, repeat_rows
from vrnn_lightning.recurrence.tape import Tape

__all__ = ["FastStep"]


class FastStep:
    """The part of a model's step that is inside the loop, laid out on a tape.

    A part that the loop knows is compiled. One product with h_{t-1} serves all networks that read it. What a network
    reads of given values is multiplied with its weight for all steps, before the first one. Any other part is called at
    each step, by the model's own method.

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
        is_first: True at the steps before which rows restart from the initial state, shape (steps, rows).
    """

    prior: tuple[Buffer, ...] = ()  # mean and spread, if it is inside and compiled
    posterior: tuple[Buffer, ...] = ()  # mean and spread, or the parameters that the latent keeps
    z: Buffer | None = None
    z_features: Buffer | None = None
    emission: Buffer | None = None  # what its head reads, if it is inside and compiled
    x: Buffer | None = None  # the frame drawn
    mean: Buffer | None = None  # the mean of its emission, if that is called

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
        is_first: Tensor | None = None,
    ) -> None:
        self.model, self.tape, self.purpose = model, tape, purpose
        self.noise, self.masks, self.samples, self.temperature = noise, masks, samples, temperature
        self.parts, self.state = model.parts, state
        self.states = [tape.state(part) for part in state.layers()]
        self._overwrites = purpose == "filter" or is_first is not None  # states, after the step that computed them
        if is_first is not None:
            for own, first in zip(self.states, model.initial_state(len(state.h)).layers(), strict=True):
                tape.add(Restart(own, tape.parameter(first, tape.wide), is_first))
        x_width, z_width = self.parts.feature_widths
        self.widths = {"inputs": 0, "future": 0, "x_features": x_width, "z_features": z_width}
        self.widths |= {"h": self.states[0].width, **widths}
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
        cells = [cast("nn.GRUCell", cell) for cell in model.cells if self.parts.cells]
        self.cells = [CellSums(tape, cell, h, c) for cell, h, c in zip(cells, hs, cs or repeat(None), strict=False)]
        networks = {name: getattr(self.parts, name) for name in ("prior", "posterior", "emission") if name in inside}
        firsts = {name: cast(nn.Linear, layers[0]) for name, layers in networks.items() if layers is not None}
        front, start = tape.buffer(sum(first.out_features for first in firsts.values())), 0
        for name, first in firsts.items():
            self._sums[name] = front.columns(start, start + first.out_features)
            start += first.out_features
            bias = first.weight.new_zeros(first.out_features) if first.bias is None else first.bias
            self._add_known(name, first.weight, bias)
        if self.cells:
            self._sums["state"] = self.cells[0].from_below
            self._add_known("state", cells[0].weight_ih, self.cells[0].bias)
        for cell in self.cells[1:]:
            tape.add(Affine(cell.from_below, tape.parameter(cell.bias)))
        for cell, h in zip(self.cells, narrow, strict=False):
            tape.add(MatMul(h, tape.parameter(cell.weight_h.t()), cell.from_h, overwrites=cell.is_normed))
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
        assert self.masks is not None
        masked = self.tape.buffer(h.width, self.tape.wide)
        self.tape.add(Cast(h, masked, self._mask(self.masks.h[:, layer], self.tape.wide)))
        return masked

    def _read(self, source: Buffer, name: str, reads: Sequence[str]) -> None:
        """Add to the sums of a network the product with values that were computed in the step."""
        weights = [self._weights[name][read] for read in reads]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights, 1)
        self.tape.add(MatMul(source, self.tape.parameter(weight.t()), self._sums[name]))

    def _sources(self, *names: str) -> dict[str, Buffer]:
        """Return buffers of the values that a call reads, without those that this model or purpose does not have."""
        found: dict[str, Buffer] = {}
        for name in names:
            if name in GIVEN[self.purpose] and self.widths[name]:
                found[name] = self.tape.buffer(self.widths[name])
                self.tape.add(Given(self.tape.parameter(self._given([name])), found[name]))
            elif name in ("h", "x_features", "z_features") and getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found

    def _call(
        self,
        function: Callable[..., Tensor | Sequence[Tensor]],
        sources: Sequence[Buffer],
        targets: Sequence[Buffer],
        *modules: nn.Module | None,
        name: str = "",
    ) -> None:
        tensors = trained_tensors(*(module for module in modules if module is not None))
        refs = [(self.tape.parameter(tensor, tensor.dtype), tensor) for tensor in tensors]
        self.tape.add(Call(function, sources, targets, refs, name))

    def _lay_prior(self) -> None:
        if self.parts.prior is not None:
            self.prior = (lay_gaussian(self.tape, self._sums["prior"], self.parts.prior, self.model.prior),)

    def _lay_posterior(self) -> None:
        tape, model, latent = self.tape, self.model, self.model.latent
        if self.parts.posterior is not None:
            self.posterior = (lay_gaussian(tape, self._sums["posterior"], self.parts.posterior, model.encoder),)
            return
        self.posterior = tuple(tape.buffer(width, tape.wide) for width in latent.widths)
        sources = self._sources("x_features", "h", "inputs", "future")

        def posterior(*values: Tensor) -> Any:
            return latent.posterior_parameters(model.posterior_dist(**dict(zip(sources, values, strict=True))))

        prior = model.prior if model.residual_posterior and isinstance(model.prior, nn.Module) else None
        self._call(posterior, list(sources.values()), self.posterior, model.encoder, prior, name="encoder")

    def _lay_z(self) -> None:
        tape, model, latent = self.tape, self.model, self.model.latent
        self.z = z = tape.buffer(latent.size, tape.wide)
        if self.purpose == "generate":
            if self.prior:
                self._draw(self.prior[0], z, cast("Network[Gaussian]", model.prior).head.min_std)
                return
            sources = self._sources("h", "inputs")
            tape.add(Apply(lambda *values: model.prior_dist(*values).sample(), list(sources.values()), z))
            return
        noise = tape.constant(cast(Tensor, self.noise))
        if self.parts.draws_gaussian:
            moved_by = self.prior[0] if model.residual_posterior else None
            floor = cast("Network[Gaussian]", model.encoder).head.min_std
            tape.add(GaussianSample(self.posterior[0], noise, z, floor, moved_by))
            return
        is_fixed = self.samples > 1 and latent.is_straight_through  # see log_ratio

        def rsample(*values: Tensor) -> Tensor:
            drawn: Tensor = latent.rsample(latent.dist(*values[:-1]), values[-1])
            return drawn.detach() if is_fixed else drawn

        self._call(rsample, [*self.posterior, noise], [z], model.encoder)

    def _draw(self, raw: Buffer, target: Buffer, floor: float, std: float = 1.0) -> None:
        noise = self.tape.buffer(target.width, target.dtype)
        self.tape.add(StandardNormal(noise, std))
        self.tape.add(GaussianSample(raw, noise, target, floor))

    def _lay_z_features(self) -> None:
        tape, model, masks, into = self.tape, self.model, self.masks, None
        assert self.z is not None
        if self.purpose == "generate":  # the cells read features of x and z at once
            self._both = tape.buffer(self.widths["x_features"] + self.widths["z_features"])
            into = self._both.columns(self.widths["x_features"], self._both.width)
        if self.parts.phi_z is not None:
            mask = None if masks is None else self._mask(masks.phi_z, tape.narrow)
            self.z_features = lay_features(tape, self.z, self.parts.phi_z, mask, into)
        else:
            self.z_features = tape.buffer(self.widths["z_features"]) if into is None else into
            rows = None if masks is None else masks.repeat(self.samples)
            self._call(lambda z: model.extract_z(z, rows), [self.z], [self.z_features], model.phi_z, name="phi_z")
        if "emission" in self._sums:
            self._read(self.z_features, "emission", ["z_features"])
        if self.purpose != "generate" and self.cells:
            self._read(self.z_features, "state", ["z_features"])

    def _lay_emission(self) -> None:
        if self.parts.emission is not None:
            self.emission = lay_layers(self.tape, self._sums["emission"], self.parts.emission[1:])

    def _lay_x(self) -> None:
        tape, model, temperature = self.tape, self.model, self.temperature
        wide = torch.promote_types(tape.wide, torch.float32)
        self.x = tape.buffer(model.num_features, wide)
        head = model.emission_head
        if self.emission is None:
            require_temperature(temperature)
            self.mean = tape.buffer(model.num_features, wide)
            sources = self._sources("z_features", "h", "inputs")

            def draw(*values: Tensor) -> Sequence[Tensor]:
                emission = tempered(model.emission_dist(**dict(zip(sources, values, strict=True))), temperature)
                return emission.sample(), emission.mean

            self._call(draw, list(sources.values()), [self.x, self.mean])
        elif is_plain(head, Gaussian) and is_plain(head.linear, nn.Linear) and head.covariance == "diagonal":
            require_temperature(temperature)
            raw = tape.cast(lay_linear(tape, self.emission, head.linear), wide)
            self._draw(raw, self.x, head.min_std, math.sqrt(temperature))
        else:
            tape.add(Apply(lambda features: draw_frames(head, features, temperature), [self.emission], self.x))

    def _lay_x_features(self) -> None:
        tape, model = self.tape, self.model
        assert self.x is not None
        both = self._both if self.z_features is not None else tape.buffer(self.widths["x_features"])
        self.x_features = both.columns(0, self.widths["x_features"])
        if self.parts.phi_x is None:
            self._call(model.extract_x, [self.x], [self.x_features], name="phi_x")
        else:
            standardized = tape.buffer(cast(nn.Linear, self.parts.phi_x[0]).in_features)
            tape.add(Apply(model.standardize_input, [self.x], standardized))
            lay_features(tape, standardized, self.parts.phi_x, into=self.x_features)
        if self.cells:
            self._read(both, "state", ["x_features", *["z_features"] * (self.z_features is not None)])

    def _lay_state(self) -> None:
        tape = self.tape
        if not self.cells:
            self._call_cells()
            return
        self.cells[0].lay(tape)
        for i, cell in enumerate(self.cells[1:]):
            below = self.states[i].next_step()
            if self.masks is not None:
                below = self._masked(below, i)
            elif self._overwrites:
                below = tape.copy(below)
            tape.add(MatMul(tape.cast(below, tape.narrow), tape.parameter(cell.cell.weight_ih.t()), cell.from_below))
            cell.lay(tape)

    def _call_cells(self) -> None:
        model, like = self.model, self.state
        masks = None if self.masks is None else self.masks.repeat(self.samples)
        sources = self._sources("x_features", "z_features", "inputs")

        def next_state(*values: Tensor) -> Any:
            reads: dict[str, Any] = {"z_features": None, **dict(zip(sources, values, strict=False))}
            state = like.with_layers(values[len(sources) :])
            return model.next_state(**reads, state=state, masks=masks)[1].layers()

        after = [state.next_step() for state in self.states]
        self._call(next_state, [*sources.values(), *self.states], after, model.cells, name="cells")
