"""Streaming: the likelihood of frames as they come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vrnn_lightning.errors import UserError
from vrnn_lightning.filtering import ParticleWeights, Resampling
from vrnn_lightning.heads import Gaussian, Network, log_prob
from vrnn_lightning.recurrence.layers import lay_features
from vrnn_lightning.recurrence.state import Networks, State, log_ratio, repeat_rows
from vrnn_lightning.recurrence.step import FastStep
from vrnn_lightning.recurrence.tape import Tape, TapeStepper

__all__ = ["Stream"]


class Stream:
    r"""A model that follows sequences frame by frame, with weighted particles.

    .. math::
        \hat p(x_t \mid x_{<t}) = \sum_k \bar w_{t-1}^k
            \frac{p(x_t, z_t^k \mid x_{<t}, z_{<t}^k)}{q(z_t^k \mid x_{\le t}, z_{<t}^k)}

    the increments of the particle filter (Maddison et al. 2017, arXiv 1705.09279); with one particle, the sampled
    bound. Nothing is rebuilt from step to step, kept for gradients or dropped out. Once the model's weights, precision
    or device have changed, make another stream.

    Args:
        model: The networks; the encoder must not read later steps.
        state: State before the first step, of samples * batch rows.
        samples: Particles per sequence, K: row ``k * batch + i`` is particle k of sequence i.
        resampling: When particles are resampled; ``None`` never.

    Raises:
        UserError: The model smooths.
    """

    def __init__(self, model: Networks, state: State, samples: int = 1, resampling: Resampling | None = None) -> None:
        if model.backward_rnn is not None:
            raise UserError("a smoothing model can't follow a stream. Fix: train one with model.smoothing false")
        self.model, self.samples, self.batch = model, samples, len(state.h) // samples
        with torch.inference_mode(False), torch.no_grad():  # steps may be taken in either mode
            self._lay(state)
        even = state.h.new_full((samples, self.batch), -math.log(samples))
        self._weights = ParticleWeights(None, even, resampling)

    def _lay(self, state: State) -> None:
        """Lay out the step, and before it the features of a frame, which all particles of a sequence share."""
        model, tape = self.model, Tape(1, len(state.h), state.h)
        width, layers = model.parts.feature_widths[0], model.parts.phi_x
        known = state.h.new_zeros(1, self.batch, width + model.num_inputs, dtype=tape.narrow)
        self._known_x, self._known_inputs = known[0, :, :width], known[0, :, width:]
        self._like, self._head = state, model.emission_head
        self._before = None if layers is None else _Features(model, layers, self.batch, state.h)
        self._noise = state.h.new_zeros(len(state.h), 0 if model.phi_z is None else model.latent.noise_size)
        widths, noise = {"inputs": model.num_inputs, "x_features": width}, self._noise[None]
        step = FastStep(model, tape, state, "stream", known, widths, noise, samples=self.samples)
        self._step, self._is_compiled = TapeStepper(tape), step.parts.posterior is not None
        self._states = [self._step.values.steps(part)[0] for part in step.states]
        self._h, self._z, self._z_features, self._emission = (
            None if buffer is None else self._step.values.steps(buffer)[0]
            for buffer in (step.h, step.z, step.z_features, step.emission)
        )
        self._reads_h = step.emission is None or not (self._is_compiled and step.prior)
        self._posterior, self._prior = (
            [self._step.values.steps(buffer)[0] for buffer in buffers] for buffers in (step.posterior, step.prior)
        )

    @property
    def log_weights(self) -> Tensor:
        """Log-weights of the particles, normalised, shape (samples, batch)."""
        return self._weights.log_weights

    @property
    def state(self) -> State:
        """State after the last step, of samples * batch rows."""
        return self._like.with_layers([part.clone() for part in self._states])

    @torch.no_grad()
    def step(
        self, x: Tensor, observed: Tensor | None = None, inputs: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Take the next frame of each sequence; return an estimate of log p(x_t | x_<t) in nats, shape (batch,).

        Args:
            x: Frames, shape (batch, features).
            observed: True at measured values, shape (batch, features); everywhere if not given.
            inputs: Covariates, shape (batch, covariates), if the model reads any.
            noise: Standard normal noise, shape (samples * batch, latent); drawn if not given.

        Raises:
            UserError: Something is missing or has another shape.
        """
        like = self._states[0]
        self._require("x", x, self.batch, self.model.num_features)
        valid = torch.ones_like(x, dtype=torch.bool) if observed is None else observed
        self._require("observed", valid, *x.shape)
        x = x.to(like) if observed is None else x.to(like).masked_fill(~valid, 0.0)
        if self.model.num_inputs:
            self._require("inputs", inputs, self.batch, self.model.num_inputs)
            self._known_inputs.copy_(cast("Tensor", inputs))
        if noise is None:
            self._noise.normal_()
        else:
            self._require("noise", noise, *self._noise.shape)
            self._noise.copy_(noise)
        model = self.model
        reads = self._before
        self._known_x.copy_(model.extract_x(x, valid) if reads is None else reads(model.standardize_input(x, valid)))
        h = cast("Tensor", self._h).clone() if self._reads_h else cast("Tensor", self._h)  # the step overwrites it
        self._step.step()
        inputs = repeat_rows(self._known_inputs, self.samples).to(h) if model.num_inputs else None
        seen = None if observed is None else repeat_rows(observed, self.samples)
        features = self._emission
        if features is None:
            features = model.emission_features(self._z_features, h, inputs)
        increments = log_prob(self._head(features), repeat_rows(x, self.samples), seen)
        increments = increments.to(self.log_weights) + self._log_ratio(h, inputs)
        nats, rows = self._weights.follow(increments.unflatten(0, (self.samples, self.batch)))
        if rows is not None:
            self._step.select_rows(rows)
        return nats

    def _log_ratio(self, h: Tensor, inputs: Tensor | None) -> Tensor | float:
        """Return log p(z_t | .) - log q(z_t | .) of the step's latents, shape (rows,)."""
        if not self._posterior:
            return 0.0
        z, model = cast("Tensor", self._z), self.model
        if not self._is_compiled:
            return log_ratio(model.prior_dist(h, inputs), model.latent.dist(*self._posterior), z)
        _, std = cast("Network[Gaussian]", model.encoder).head.moments(self._posterior[0])
        if not self._prior:
            log_p: Tensor = model.prior_dist(h, inputs).log_prob(z) + z.shape[-1] * 0.5 * math.log(2 * math.pi)
        else:
            mean_0, std_0 = cast("Network[Gaussian]", model.prior).head.moments(self._prior[0])
            log_p = -(0.5 * ((z - mean_0) / std_0).square() + std_0.log()).sum(-1)
        return log_p + (0.5 * self._noise.square() + std.log()).sum(-1)

    @staticmethod
    def _require(name: str, given: Tensor | None, *shape: int) -> None:
        if given is None or given.shape != shape:
            got = "none" if given is None else f"shape {tuple(given.shape)}"
            raise UserError(f"{name}: a step takes shape {shape}, but got {got}")


class _Features:
    """Compiled features of a frame."""

    def __init__(self, model: Networks, layers: Sequence[nn.Module], batch: int, like: Tensor) -> None:
        tape = Tape(1, batch, like)
        x = tape.buffer(cast(nn.Linear, layers[0]).in_features)
        features = lay_features(tape, x, layers)
        self._stepper = TapeStepper(tape)
        self._x, self._features = (self._stepper.values.steps(buffer)[0] for buffer in (x, features))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the features of what phi_x reads, until the next call."""
        self._x.copy_(x)
        self._stepper.step()
        return self._features
