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
from vrnn_lightning.inference.checks import RESAMPLING
from vrnn_lightning.recurrence import log_ratio, output, repeat_rows
from vrnn_lightning.vrnn import VRNN

__all__ = ["Imputer"]

ENOUGH = 32
"""Effective particles that a gap is drawn from: fewer would be too close together."""


class Imputer:
    """Particles that follow sequences with gaps, and remember what they drew.

    Args:
        model: The networks.
        batch: Sequences in scaled units.
        particles: Per sequence, K.
    """

    def __init__(self, model: VRNN, batch: SequenceBatch, particles: int) -> None:
        self.model, self.particles = model, particles
        self.batch = model.mask_invalid(batch)
        size = len(batch)
        self.weights = ParticleWeights(
            batch.lengths, batch.x.new_full((particles, size), -math.log(particles)), RESAMPLING
        )
        self.frames: list[Tensor] = []  # as drawn, each (particles, batch, features)
        self.ancestors: list[Tensor | None] = []  # of the particles after a step, each (particles, batch)
        self.log_weights: list[Tensor] = []  # before a step
        self.increments: list[Tensor] = []  # what the step's frame adds to them

    def run(self) -> Imputer:
        """Follow the sequences to their ends."""
        model, batch, count = self.model, self.batch, self.particles
        state, future = model.initial_state(count * len(batch)), model.backward_states(batch, None)
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
            frame = _completed(emission, x, valid)
            x_features = model.extract_x(x, valid) if model.missing else model.extract_x(frame)
            _, state = model.next_state(x_features, z_features, state, inputs)
            draws = torch.rand(RESAMPLING.draws(count), len(batch), device=x.device)
            self.frames.append(frame.unflatten(0, (count, -1)))
            self.log_weights.append(self.weights.log_weights)
            self.increments.append(increments.unflatten(0, (count, -1)))
            source = self.weights.advance(t, self.increments[-1], draws)
            if source is not None:
                state = map_tensors(lambda x, rows=source: x[rows], state)  # type: ignore[misc]
            self.ancestors.append(None if source is None else source.unflatten(0, (count, -1)) // len(batch))
        return self

    def draws(self, row: int, samples: int, lag: int) -> Tensor:
        """Return a sequence with its gaps filled, shape (samples, time, features), in scaled units."""
        length = int(self.batch.lengths[row])
        paths = self.batch.x[row, :length].expand(samples, -1, -1).clone()
        open_steps = (~self.batch.valid_mask[row, :length]).any(-1).tolist()
        stop = length
        while stop > 0:
            if not open_steps[stop - 1]:
                stop -= 1
                continue
            shares = self._shares(row, stop - 1, min(stop - 1 + lag, length - 1))
            chosen = draw_by_weight(shares.log()[:, None], samples)[:, 0]
            apart = len(chosen.unique())
            while stop > 0 and open_steps[stop - 1] and len(chosen.unique()) >= apart / 2:
                stop -= 1
                paths[:, stop] = self.frames[stop][chosen, row]
                chosen = self._before(stop - 1, row, chosen) if stop else chosen
        return paths

    def _before(self, t: int, row: int, chosen: Tensor) -> Tensor:
        """Return which particles of step t those that continue from it were."""
        ancestors = self.ancestors[t]
        return chosen if ancestors is None else ancestors[chosen, row]

    def _shares(self, row: int, t: int, end: int) -> Tensor:
        """Return weights of the particles of step t, given all frames until ``end``, shape (particles,).

        The first frame that would leave fewer effective ancestors than enough is tempered, and is the last to count.
        """
        descent = lineage = torch.arange(self.particles, device=self.batch.x.device)
        enough = min(ENOUGH, self.particles / 4)

        def found(power: float) -> Tensor:
            weights = (self.log_weights[s][:, row] + power * increments).softmax(0)
            return torch.zeros_like(weights).index_add(0, lineage, weights)

        for s in range(t, end + 1):
            lineage = descent if s == t else lineage[self._before(s - 1, row, descent)]
            impossible = -1e30  # where all particles find it so, they are even
            increments = self.increments[s][:, row].double().nan_to_num(nan=impossible, neginf=impossible)
            shares = found(1.0)
            if shares.square().sum() * enough > 1:
                low, high = 0.0, 1.0
                for _ in range(30):
                    middle = (low + high) / 2
                    narrow = found(middle).square().sum() * enough > 1
                    low, high = (low, middle) if narrow else (middle, high)
                return found(low)
        return shares


def _completed(emission: Distribution, x: Tensor, valid: Tensor) -> Tensor:
    """Return frames with what is missing drawn from the emission, given what is there."""
    if valid.all():
        return x
    partly = valid.any(-1) & ~valid.all(-1)
    if isinstance(emission, Mixture) and partly.any():
        components = cast(Factorised, emission.component_distribution)
        fits = components.marginal_log_prob(x[:, None], valid[:, None])
        logits = emission.mixture_distribution.logits.log_softmax(-1) + fits
        which = Categorical(logits=logits).sample()[:, None, None]
        drawn = components.sample()
        drawn = drawn.gather(1, which.expand(-1, 1, drawn.shape[-1]))[:, 0]
    elif isinstance(emission, (Factorised, Mixture)) or not partly.any():
        drawn = emission.sample()
    else:
        raise UserError(
            f"{type(emission).__name__}: can't fill a part of a frame; let whole steps be missing, or choose an "
            "emission with independent features"
        )
    return torch.where(valid, x, drawn.to(x))
