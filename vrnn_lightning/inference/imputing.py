"""Particles that fill the gaps of sequences."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.errors import UserError
from vrnn_lightning.filtering import ParticleWeights, draw_by_weight, map_tensors
from vrnn_lightning.heads import Factorised, Mixture, log_prob
from vrnn_lightning.heads.joint import JointDistribution
from vrnn_lightning.inference.checks import RESAMPLING
from vrnn_lightning.recurrence import log_ratio, output, repeat_rows
from vrnn_lightning.vrnn import VRNN

__all__ = ["Imputer"]

MIN_EFFECTIVE = 32
"""Effective particles that a gap is drawn from: fewer would be too close together."""


class Imputer:
    """Particles that follow sequences with gaps, in scaled units, and remember their draws."""

    def __init__(self, model: VRNN, batch: SequenceBatch, particles: int) -> None:
        self.particles, self.batch = particles, model.mask_invalid(batch)
        self.frames: list[Tensor] = []  # with the missing part drawn, each (particles, batch, features)
        self.ancestors: list[Tensor | None] = []  # of the particles after a step, each (particles, batch)
        self.log_weights: list[Tensor] = []  # before a step
        self.increments: list[Tensor] = []  # of the weights, by the step's frame
        self._follow(model)

    def _follow(self, model: VRNN) -> None:
        batch, count, size = self.batch, self.particles, len(self.batch)
        weights = ParticleWeights(batch.lengths, batch.x.new_full((count, size), -math.log(count)), RESAMPLING)
        state, terms = model.initial_state_of(batch, count)
        future = model.backward_states(batch, None)
        for t in range(batch.x.shape[1]):
            x, valid = (repeat_rows(part[:, t], count) for part in (batch.x, batch.valid_mask))
            inputs = None if batch.inputs is None else repeat_rows(batch.inputs[:, t], count)
            later, h = None if future is None else repeat_rows(future[t], count), output(state)
            prior = model.prior_dist(h, inputs)
            posterior = model.posterior_dist(model.extract_x(x, valid), h, prior, inputs, later)
            is_seen = valid.any(-1)
            z = torch.where(is_seen[:, None], posterior.sample(), prior.sample())
            z_features = model.extract_z(z)
            emission = model.emission_dist(z_features, h, inputs)
            increments = torch.where(is_seen, log_ratio(prior, posterior, z), 0.0)
            increments = increments + log_prob(emission, x, None if valid.all() else valid)
            if t == 0 and terms is not None:
                increments = increments + terms[1]
            frame = _complete(emission, x, valid)
            x_features = model.extract_x(x, valid) if model.missing else model.extract_x(frame)
            _, state = model.next_state(x_features, z_features, state, inputs)
            uniform = torch.rand(RESAMPLING.draws(count), size, device=x.device)
            self.frames.append(frame.unflatten(0, (count, -1)))
            self.log_weights.append(weights.log_weights)
            self.increments.append(increments.unflatten(0, (count, -1)))
            rows = weights.advance(t, self.increments[-1], uniform)
            if rows is not None:
                state = map_tensors(lambda x, rows=rows: x[rows], state)  # type: ignore[misc]
            self.ancestors.append(None if rows is None else rows.unflatten(0, (count, -1)) // size)

    def draw(self, samples: int, lag: int) -> list[Tensor]:
        """Return each sequence with its gaps filled, shape (samples, time, features), in scaled units."""
        return [self._draw(row, samples, lag) for row in range(len(self.batch))]

    def _draw(self, row: int, samples: int, lag: int) -> Tensor:
        length = int(self.batch.lengths[row])
        paths = self.batch.x[row, :length].expand(samples, -1, -1).clone()
        has_gap = (~self.batch.valid_mask[row, :length]).any(-1).tolist()
        stop = length
        while stop > 0:
            if not has_gap[stop - 1]:
                stop -= 1
                continue
            weights = self._smoothed_weights(row, stop - 1, min(stop - 1 + lag, length - 1))
            chosen = draw_by_weight(weights.log()[:, None], samples)[:, 0]
            distinct = len(chosen.unique())
            while stop > 0 and has_gap[stop - 1] and len(chosen.unique()) >= distinct / 2:
                stop -= 1
                paths[:, stop] = self.frames[stop][chosen, row]
                chosen = self._ancestors(stop - 1, row, chosen) if stop else chosen
        return paths

    def _ancestors(self, t: int, row: int, particles: Tensor) -> Tensor:
        """Return the particles of step t from which particles of the next step continue."""
        ancestors = self.ancestors[t]
        return particles if ancestors is None else ancestors[particles, row]

    def _smoothed_weights(self, row: int, t: int, end: int) -> Tensor:
        """Return weights of the particles of step t, given all frames until ``end``, shape (particles,).

        The first frame that would leave too few effective ancestors is tempered, and later ones are ignored.
        """
        every = lineage = torch.arange(self.particles, device=self.batch.x.device)
        least = min(MIN_EFFECTIVE, self.particles / 4)

        def weigh(power: float) -> Tensor:
            weights = (self.log_weights[s][:, row] + power * increments).softmax(0)
            return torch.zeros_like(weights).index_add(0, lineage, weights)

        def is_narrow(weights: Tensor) -> bool:
            return bool(weights.square().sum() * least > 1)

        for s in range(t, end + 1):
            lineage = every if s == t else lineage[self._ancestors(s - 1, row, every)]
            impossible = -1e30  # a frame that no particle can explain leaves them even
            increments = self.increments[s][:, row].double().nan_to_num(nan=impossible, neginf=impossible)
            weights = weigh(1.0)
            if is_narrow(weights):
                low, high = 0.0, 1.0
                for _ in range(30):
                    middle = (low + high) / 2
                    low, high = (low, middle) if is_narrow(weigh(middle)) else (middle, high)
                return weigh(low)
        return weights


def _complete(emission: Distribution, x: Tensor, valid: Tensor) -> Tensor:
    if valid.all():
        return x
    if isinstance(emission, JointDistribution):
        split = emission.joint.split
        return emission.joint.join(map(_complete, emission.parts, split(x), split(valid)))
    is_partly_missing = bool((valid.any(-1) & ~valid.all(-1)).any())
    if isinstance(emission, Mixture) and is_partly_missing:
        components = cast(Factorised, emission.component_distribution)
        fits = components.marginal_log_prob(x[:, None], valid[:, None])
        logits = emission.mixture_distribution.logits.log_softmax(-1) + fits
        chosen = Categorical(logits=logits).sample()[:, None, None]
        each = components.sample()
        frame = each.gather(1, chosen.expand(-1, 1, each.shape[-1]))[:, 0]
    elif isinstance(emission, (Factorised, Mixture)) or not is_partly_missing:
        frame = emission.sample()
    else:
        fix = "let whole steps be missing, or choose an emission with independent features"
        raise UserError(f"{type(emission).__name__}: can't fill a part of a frame. Fix: {fix}")
    return torch.where(valid, x, frame.to(x))
