"""Streaming: the likelihood of frames as they come."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from vrnn_lightning.errors import UserError
from vrnn_lightning.filtering import Resampling, Weights
from vrnn_lightning.heads import Gaussian, Network, log_prob
from vrnn_lightning.recurrence.loop import features, gaussian, latent_features, perceptron
from vrnn_lightning.recurrence.pace import Pace
from vrnn_lightning.recurrence.parts import Networks, State, repeat_rows
from vrnn_lightning.recurrence.tape import Tape, Track

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
        model: The networks; the encoder may not read what is to come.
        state: State before the first step, of samples * batch rows.
        samples: Particles per sequence, K: row ``k * batch + i`` is particle k of sequence i.
        inputs: Width of the covariates.
        resampling: When particles are drawn anew; ``None`` never.

    Raises:
        UserError: The model smooths.
    """

    def __init__(
        self, model: Networks, state: State, samples: int = 1, inputs: int = 0, resampling: Resampling | None = None
    ) -> None:
        if model.backward_rnn is not None:
            raise UserError("a smoothing model reads each sequence from its end: it can't follow one as it comes")
        with torch.inference_mode(False), torch.no_grad():  # steps may be taken in either mode
            self._lay(model, state, samples, inputs)
        self.model, self.samples, self.inputs, self.resampling = model, samples, inputs, resampling
        even = self._pace.hs[0].value.new_full((samples, self.batch), -math.log(samples))
        endless = torch.full((self.batch,), 2**62, device=even.device)
        self._weights = Weights(endless, even, resampling)

    def _lay(self, model: Networks, state: State, samples: int, inputs: int) -> None:
        rows = len(state.h)
        self.batch = rows // samples
        prior = cast("Network[Gaussian]", model.prior) if isinstance(model.prior, Network) else None
        looking = Tape(1, self.batch, state.h)
        self._seen = looking.track(next(model.phi_x.linears()).in_features)
        phi_x = features(looking, self._seen, model.phi_x)
        self._look = looking.step
        networks = [*["prior"] * (prior is not None), *["encoder"] * (model.encoder is not None), "decoder"]
        self._pace = pace = Pace(model, state, networks, "xu", inputs, self.batch)
        assert pace.known is not None
        self._phi_x, width = phi_x.at[0], phi_x.width
        self._known_x, self._known_u = pace.known.value[0, :, :width], pace.known.value[0, :, width:]
        tape = pace.tape
        self._noise = torch.zeros(rows, 0 if model.phi_z is None else next(model.phi_z.linears()).in_features).to(
            state.h
        )
        self._raw: Track | None = None
        self._raw_prior: Track | None = None
        if model.encoder is not None:
            self._raw = gaussian(tape, pace.sums["encoder"], model.encoder)
            self._raw_prior = None if prior is None else gaussian(tape, pace.sums["prior"], prior)
            residual = self._raw_prior if model.residual_posterior else None
            self._z, phi_z = latent_features(tape, model, self._raw, self._noise[None], residual, None)
            pace.read(phi_z, "z", "decoder", "cell")
        self._read = perceptron(tape, pace.sums["decoder"], model.decoder.body.linears())
        pace.advance()

    @property
    def log_weights(self) -> Tensor:
        """Log-weights of the particles, normalised, shape (samples, batch)."""
        return self._weights.log_weights

    @property
    def state(self) -> State:
        """State after the last step, of samples * batch rows."""
        return self._pace.state()

    @torch.no_grad()
    def step(
        self, x: Tensor, observed: Tensor | None = None, inputs: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Take the next frame of each sequence.

        Args:
            x: Frames, shape (batch, features).
            observed: True at measured values, shape (batch, features); everywhere if not given.
            inputs: Covariates, shape (batch, covariates), if the model reads any.
            noise: Standard normal noise, shape (samples * batch, latent); torch's generator decides if not
                given.

        Returns:
            An estimate of log p(x_t | x_<t) in nats, shape (batch,).

        Raises:
            UserError: Something is missing or has another shape.
        """
        like = self._pace.hidden.value
        self._require("x", x, self.batch, self.model.decoder.head.num_features)
        counted = torch.ones_like(x, dtype=torch.bool) if observed is None else observed
        self._require("observed", counted, *x.shape)
        x = x.to(like) if observed is None else x.to(like).masked_fill(~counted, 0.0)
        if self.inputs:
            self._require("inputs", inputs, self.batch, self.inputs)
            self._known_u.copy_(cast("Tensor", inputs))
        if noise is None:
            self._noise.normal_()
        else:
            self._require("noise", noise, *self._noise.shape)
            self._noise.copy_(noise)
        self._seen.at[0].copy_(self.model.look(x, counted))
        self._look()
        self._known_x.copy_(self._phi_x)
        hidden = None if self._raw is None or self._raw_prior is not None else self._pace.hidden.at[0].clone()
        self._pace.step()
        emission = self.model.decoder.head(self._read.at[0])
        spread = repeat_rows(x, self.samples)
        increments = log_prob(emission, spread, None if observed is None else repeat_rows(counted, self.samples))
        increments = increments.to(self.log_weights) + self._log_ratio(hidden)
        return self._weigh(increments.unflatten(0, (self.samples, self.batch)))

    def _log_ratio(self, hidden: Tensor | None) -> Tensor | float:
        """Return log p(z_t | .) - log q(z_t | .) of the step's latents, shape (rows,)."""
        if self._raw is None:
            return 0.0
        encoder = cast("Network[Gaussian]", self.model.encoder)
        z, (_, std) = self._z.at[0], encoder.head.moments(self._raw.at[0])
        if self._raw_prior is None:
            assert hidden is not None
            assert self.model.prior is not None
            inputs = repeat_rows(self._known_u, self.samples)
            distribution = self.model.prior(torch.cat([hidden, inputs.to(hidden)], -1))
            log_p: Tensor = distribution.log_prob(z) + z.shape[-1] * 0.5 * math.log(2 * math.pi)
        else:
            mean_0, std_0 = cast("Network[Gaussian]", self.model.prior).head.moments(self._raw_prior.at[0])
            log_p = -(0.5 * ((z - mean_0) / std_0).square() + std_0.log()).sum(-1)
        return log_p + (0.5 * self._noise.square() + std.log()).sum(-1)

    def _weigh(self, increments: Tensor) -> Tensor:
        """Return the step's nats, shape (batch,), and let the weights, and where due the particles, follow."""
        weights, draws = self._weights, None
        if self.resampling is not None and self.samples > 1:
            draws = torch.rand(self.resampling.draws(self.samples), self.batch).to(increments.device)
        weights.total = torch.zeros_like(weights.total)  # of this step alone: a stream has no end
        source = weights.advance(0, increments, draws)
        weights.moves.clear()
        if source is not None:
            for state in self._pace.tape.states:
                state.at[0].copy_(state.at[0].index_select(0, source))
        return weights.total

    @staticmethod
    def _require(name: str, given: Tensor | None, *shape: int) -> None:
        if given is None or given.shape != shape:
            found = "none" if given is None else f"shape {tuple(given.shape)}"
            raise UserError(f"{name}: a step takes shape {shape}, but got {found}")
