"""The VRNN: passes over batches, particle filters, generation and streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.errors import UserError, require
from vrnn_lightning.filtering import (
    FilterResult,
    Particles,
    ParticleWeights,
    Resampling,
    WindowEstimate,
    map_tensors,
    window_estimate,
)
from vrnn_lightning.heads import log_prob
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import (
    Generated,
    InferenceSteps,
    Masks,
    Resample,
    State,
    Stream,
    generate,
    infer,
    log_ratio,
    repeat_rows,
    require_plain_weights,
)
from vrnn_lightning.vrnn.checks import prepared, random_state, weights_read, with_weights
from vrnn_lightning.vrnn.equations import Equations
from vrnn_lightning.vrnn.trace import Frames, Trace, latent_dists, make_trace

__all__ = ["VRNN"]

MAX_WINDOW = 1024  # steps that a pass without gradient holds at once
MAX_FILTER_WINDOW = 64  # the same of a particle filter, which holds many particles


class _Pass(NamedTuple):
    """What all windows of a pass share."""

    batch: SequenceBatch  # without invalid values
    noise: Noise | Tensor  # or its normal numbers, shape (samples * batch, time, latent)
    masks: Masks | None
    samples: int
    future: Tensor | None  # states of the recurrence that reads backwards, time first
    initial: tuple[Tensor, Tensor] | None = None  # KL and log-ratio of an inferred initial state, each (rows,)

    def windows(self, size: int) -> Iterator[tuple[int, _Pass]]:
        """Yield the first step of each window of ``size`` steps, and the pass over it."""
        steps = self.batch.x.shape[1]
        for first in range(0, steps, size):
            last = min(first + size, steps)
            batch = self.batch if size >= steps else self.batch.window(first, last)
            future = None if self.future is None else self.future[first:last]
            noise = cast(Noise, self.noise).window(first, last)
            initial = map_tensors(torch.zeros_like, self.initial) if first else self.initial
            yield first, self._replace(batch=batch, noise=noise, future=future, initial=initial)


class VRNN(Equations):
    """A recurrent network with a latent Gaussian at every step; see :class:`Equations` and :func:`build_vrnn`."""

    @prepared
    def forward(
        self,
        batch: SequenceBatch,
        noise: Noise | Tensor | None = None,
        state: State | None = None,
        masks: Masks | None = None,
        samples: int = 1,
    ) -> Trace:
        """Infer the latents of a batch and score it.

        Args:
            batch: Padded sequences.
            noise: The noise of the pass, or standard normal noise, shape (samples * batch, time, latent); drawn if not
                given.
            state: State before the first step, of samples * batch rows; the model's initial state if not given.
            masks: Dropout; drawn if not given, in training.
            samples: Latent trajectories per sequence, K. Row ``k * batch + i`` of the trace is trajectory k of
                sequence i.

        Returns:
            The terms of the bound, step by step. Padding changes nothing, whatever it holds.

        Raises:
            UserError: The batch has no steps, or not the covariates that the model reads.
        """
        batch = self.mask_invalid(batch)
        needs_masks = masks is None and self.training and self.dropout
        source = noise if isinstance(noise, Noise) else Noise(batch) if noise is None or needs_masks else None
        masks = self.draw_masks(source) if needs_masks and source is not None else masks
        noise = cast(Noise, source) if noise is None else noise
        return self._infer(*self._begin(batch, noise, masks, samples, state))

    def _begin(
        self, batch: SequenceBatch, noise: Noise | Tensor, masks: Masks | None, samples: int, state: State | None
    ) -> tuple[_Pass, State]:
        """Return the pass over a clean batch, and the state that it starts from: the initial one if not given."""
        initial = None
        if state is None:
            source = noise if isinstance(noise, Noise) else None
            state, initial = self.initial_state_of(batch, samples, source, masks)
        return _Pass(batch, noise, masks, samples, self.backward_states(batch, masks), initial), state

    def _infer(
        self, window: _Pass, state: State, resample: Resample | None = None, frames: Frames | None = None
    ) -> Trace:
        """Infer the latents of a window, and score it."""
        batch, noise, masks, samples, future, initial = window
        if len(state.h) != samples * len(batch):
            raise UserError(f"state: has {len(state.h)} rows, expected {samples} x {len(batch)} (samples * batch_size)")
        self.require_state(state)
        normal = noise if isinstance(noise, Tensor) else noise.over_time(self.latent.noise_size, samples)
        data, lengths = self.network_inputs(batch, masks, future), repeat_rows(batch.lengths, samples)
        noise = normal.transpose(0, 1).contiguous()
        is_first = None if batch.is_first is None else batch.is_first.t()
        steps, state = infer(self, data, noise, state, lengths, masks, samples, resample, is_first)
        frames = Frames.of_batch(batch, samples) if frames is None else frames
        trace = make_trace(self, steps, state, frames, compiled=self.compiled)
        return trace if initial is None else trace.with_initial(*initial)

    @prepared
    def collect(
        self,
        batch: SequenceBatch,
        noise: Noise,
        select: Callable[[Trace], tuple[Tensor, ...]],
        state: State | None = None,
        masks: Masks | None = None,
        samples: int = 1,
    ) -> tuple[list[Tensor], State]:
        """Return terms of a pass over windows, whose memory :attr:`checkpoint_every` bounds in training.

        Args:
            batch: Padded sequences.
            noise: The noise of the pass.
            select: Returns the terms of a window's trace, each of shape (samples * batch, time, ...).
            state: State before the first step; the model's initial state if not given.
            masks: Dropout; ``None`` for none.
            samples: Latent trajectories per sequence.

        Returns:
            The terms of all windows, joined along time, and the state after each sequence's last real step.

        Raises:
            UserError: The batch has no steps, or not the covariates that the model reads.
        """
        batch = self.mask_invalid(batch)
        whole, state = self._begin(batch, noise, masks, samples, state)
        windows: list[tuple[Tensor, ...]] = []

        def run(window: _Pass, state: State) -> tuple[tuple[Tensor, ...], State]:
            trace = self._infer(window, state)
            return select(trace), trace.state

        for _, window in whole.windows(self._window_size(batch, MAX_WINDOW)):
            terms, state = self._checkpointed(run, window, state)
            windows.append(terms)
        return [torch.cat(part, 1) if len(windows) > 1 else part[0] for part in zip(*windows, strict=True)], state

    def trace(self, batch: SequenceBatch, noise: Noise) -> Trace:
        """Infer the latents of a batch and score it, a window at a time if there is no gradient.

        The trace of sequences longer than one window has no features, and so no emission.

        Args:
            batch: Padded sequences.
            noise: The noise of the pass.

        Raises:
            UserError: The batch has no steps, or not the covariates that the model reads.
        """
        if torch.is_grad_enabled() or batch.x.shape[1] <= MAX_WINDOW:
            return cast(Trace, self(batch, noise))

        def select(trace: Trace) -> tuple[Tensor, ...]:
            dists = [dist for dist in (trace.posterior, trace.prior) if dist is not None]
            own = (x for dist in dists for x in self.latent.parameters(dist))
            return trace.log_px, trace.kl, trace.z, *own

        (log_px, kl, z, *found), state = self.collect(batch, noise, select, masks=self.draw_masks(noise))
        count = len(self.latent.widths)
        posterior, prior = (self.latent.dist(*x) if x else None for x in (found[:count], found[count:]))
        return Trace(log_px, kl, batch.mask, None, self.emission_head, posterior, prior, z, state)

    def _window_size(self, batch: SequenceBatch, most: int) -> int:
        return (self.checkpoint_every or batch.x.shape[1]) if torch.is_grad_enabled() else most

    def _checkpointed(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function; with :attr:`checkpoint_every` keep only its arguments, and call it again on the way back."""
        if self.checkpoint_every is None or not torch.is_grad_enabled():
            return function(*args)
        require_plain_weights(self, "loop.checkpoint_every")
        weights = weights_read()

        def run(*args: Any) -> Any:
            with with_weights(weights):
                return function(*args)

        # noise is given, but a part that a user adds may draw its own
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=True)

    @prepared
    def filter(
        self,
        batch: SequenceBatch,
        samples: int,
        resampling: Resampling | None = None,
        noise: Noise | None = None,
        masks: Masks | None = None,
        beta: float = 1.0,
        particles: Particles | None = None,
    ) -> FilterResult:
        r"""Bound each sequence's log-likelihood with weighted particles.

        The proposal is the posterior: a particle's weight is multiplied by :math:`p(x_t \mid z_{\le t}, x_{<t})\,
        [p(z_t \mid \cdot) / q(z_t \mid \cdot)]^\beta` at each step. Without gradient no more than a window of steps is
        held.

        Args:
            batch: Padded sequences.
            samples: Particles per sequence, K.
            resampling: When particles are resampled; ``None`` never, which is the importance-weighted bound.
            noise: The noise of the pass; from torch's global generator if not given.
            masks: Dropout.
            beta: Weight of the latent's part of the increments; 1 for a likelihood.
            particles: Particles to continue from; even ones in the initial state if not given.

        Returns:
            The bound, the weights, and the state of the particles.

        Raises:
            UserError: The batch has no steps, or not the covariates that the model reads; or the gradient is to account
                for the choice of particles in a pass that is not kept.
        """
        batch = self.mask_invalid(batch)
        noise = Noise(batch) if noise is None else noise
        state, log_weights = (None, self.even_weights(samples, len(batch))) if particles is None else particles
        if resampling is not None and resampling.gradient and self.checkpoint_every and torch.is_grad_enabled():
            raise UserError(
                "objective.resampling_gradient: weighs each choice by all that follows, which loop.checkpoint_every "
                "does not keep. Fix: give one of the two"
            )
        if resampling is not None and resampling.gradient and batch.is_first is not None:
            raise UserError(
                "objective.resampling_gradient: weighs each choice by all that follows, across the episodes of a batch "
                "with is_first. Fix: set it to false, or give episodes as separate sequences"
            )
        whole, state = self._begin(batch, noise, masks, samples, state)
        total = effective_sum = log_weights.new_zeros(len(batch))
        effective = torch.full_like(total, samples)
        for first, window in whole.windows(self._window_size(batch, MAX_FILTER_WINDOW)):
            lengths = batch.lengths - first
            particles = Particles(state, log_weights)
            estimate, state = self._checkpointed(self._filter_window, window, lengths, resampling, beta, particles)
            total, log_weights = total + estimate.log_likelihood, estimate.log_weights
            effective_sum = effective_sum + estimate.effective_sum
            effective = torch.where(lengths > 0, estimate.effective, effective)
        return FilterResult(total, effective_sum / batch.lengths.clamp(min=1), effective, log_weights, state)

    def _filter_window(
        self, window: _Pass, lengths: Tensor, resampling: Resampling | None, beta: float, particles: Particles
    ) -> tuple[WindowEstimate, State]:
        batch, samples, log_weights = window.batch, window.samples, particles.log_weights
        weights, resample, frames = None, None, Frames.of_batch(batch, samples)
        if resampling is not None and samples > 1 and resampling.threshold > 0:
            weights = ParticleWeights(lengths, log_weights.detach(), resampling, batch.is_first)
            draws = cast(Noise, window.noise).uniform_over_time(resampling.draws(samples)).unbind(1)
            resample = self._resampler(window, frames, weights, draws, beta)
        trace = self._infer(window, particles.state, resample, frames)
        increments = (trace.log_px + beta * trace.log_ratio).t().unflatten(1, (samples, -1))
        gradient = resampling is not None and resampling.gradient
        if weights is None and batch.is_first is not None:
            weights = ParticleWeights(lengths, log_weights.detach(), None, batch.is_first)
            for t, increment in enumerate(increments.detach()):
                weights.advance(t, increment, None)
        return window_estimate(increments, log_weights, weights, batch.mask.t(), gradient), trace.state

    def _resampler(
        self, window: _Pass, frames: Frames, weights: ParticleWeights, draws: tuple[Tensor, ...], beta: float
    ) -> Resample:

        def resample(t: int, step: InferenceSteps) -> Tensor | None:
            observed, inputs = (None if part is None else part[t] for part in (frames.observed, frames.inputs))
            before = random_state(step.h.device) if t == 0 and self.training else None
            features = step.emission
            if features is None:
                features = self.emission_features(step.z_features, step.h, inputs)
            increments = log_prob(self.emission_head(features), frames.x[t], observed)
            latent = latent_dists(self, step, inputs)
            if latent is not None and step.z is not None:
                increments = increments + beta * log_ratio(*latent, step.z)
            if t == 0 and window.initial is not None:
                increments = increments + beta * window.initial[1].detach()
            if before is not None and not torch.equal(before, random_state(step.h.device)):
                raise UserError(
                    "decoder or prior: draws random numbers, so that a particle filter can't weigh by the same ones "
                    "twice. Fix: take out its Dropout or choose the objective ELBO"
                )
            return weights.advance(t, increments.unflatten(0, (window.samples, -1)), draws[t].t())

        return resample

    def even_weights(self, samples: int, batch_size: int) -> Tensor:
        """Return the log-weights of ``samples`` even particles for each sequence, shape (samples, batch_size)."""
        return self.input_mean.new_full((samples, batch_size), -math.log(samples))

    @prepared
    def generate(
        self,
        steps: int,
        batch_size: int = 1,
        state: State | None = None,
        inputs: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Generated:
        """Draw sequences from the model: each z_t from the prior, each x_t from its emission.

        Args:
            steps: Frames per sequence, T.
            batch_size: Number of sequences, B; ``state`` decides it where given.
            state: State to continue from; the model's initial state if not given.
            inputs: Covariates, shape (B, T, num_inputs), for a model that reads them.
            temperature: Temperature of the emission; below 1 for the more likely frames.

        Returns:
            Frames in the model's (scaled) units, shape (B, T, features), with their means, latents and last state.

        Raises:
            UserError: No steps or sequences, or not the covariates that the model reads.
        """
        require("steps", steps, 1)
        require("batch_size", batch_size, 1)
        if state is not None:
            self.require_state(state)
            batch_size = len(state.h)
        if batch_size == 0:
            raise UserError("state: has no rows. Fix: give at least one")
        needed = (batch_size, steps, self.num_inputs)
        if self.num_inputs and (inputs is None or tuple(inputs.shape) != needed):
            given = "none" if inputs is None else f"shape {tuple(inputs.shape)}"
            raise UserError(f"inputs: the model reads covariates of shape {needed}, but got {given}")
        if state is None:
            state = self.initial_state(batch_size, None if inputs is None else inputs[:, 0])
        return generate(self, steps, state, inputs if self.num_inputs else None, temperature)

    @prepared
    def stream(
        self,
        batch_size: int = 1,
        samples: int = 1,
        state: State | None = None,
        resampling: Resampling | None = None,
        inputs: Tensor | None = None,
    ) -> Stream:
        """Follow sequences frame by frame: ``stream.step(x)`` returns an estimate of each log p(x_t | x_<t) in nats.

        Args:
            batch_size: Number of sequences, B.
            samples: Particles per sequence, K.
            state: State before the first step, of K * B rows; the model's initial state if not given.
            resampling: When particles are resampled; ``None`` never.
            inputs: Covariates of the first step, shape (B, num_inputs), for an initial state that reads them.

        Raises:
            UserError: The model smooths, or the state has other rows.

        >>> from vrnn_lightning import build_vrnn
        >>> stream = build_vrnn(num_features=3).stream(batch_size=2, samples=4)
        >>> stream.step(torch.zeros(2, 3)).shape
        torch.Size([2])
        """
        require("batch_size", batch_size, 1)
        require("samples", samples, 1)
        if state is None:
            inputs = None if inputs is None else repeat_rows(inputs, samples)
            state = self.initial_state(samples * batch_size, inputs)
        if len(state.h) != samples * batch_size:
            raise UserError(f"state: has {len(state.h)} rows, expected {samples * batch_size} (samples * batch_size)")
        self.require_state(state)
        return Stream(self, state, samples, resampling)
