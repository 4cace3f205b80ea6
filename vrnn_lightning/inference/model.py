"""Samples, reconstructions, forecasts, imputations, scores, encodings and streams of a model, without a Trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from vrnn_lightning.data import Scaler
from vrnn_lightning.errors import UserError, require
from vrnn_lightning.filtering import FilterResult, Particles
from vrnn_lightning.inference.batches import Given, evaluating, make_batch, make_noise, trim
from vrnn_lightning.inference.checks import RESAMPLING, log_std, require_numbers, require_shape
from vrnn_lightning.inference.exporting import export_step
from vrnn_lightning.inference.imputing import Imputer
from vrnn_lightning.inference.session import Session, Step
from vrnn_lightning.recurrence import State, output
from vrnn_lightning.vrnn import VRNN, Trace

__all__ = ["Encoding", "Inference"]


class Encoding(NamedTuple):
    """The posterior and the states of one sequence.

    Args:
        mean: Posterior mean of z_t, shape (time, latent).
        std: Posterior standard deviation of z_t, shape (time, latent).
        hidden: h_t, the top layer's state after each step, shape (time, hidden).
    """

    mean: Tensor
    std: Tensor
    hidden: Tensor


class Inference:
    """Methods of a model with a VRNN and a scaler; each leaves the model in the mode that it was in.

    ``sequences`` are at least one, as :data:`~vrnn_lightning.inference.Given` describes, and ``inputs`` their
    covariates, for a model that reads them. ``seed`` makes a call repeatable and leaves torch's generators as they
    were; ``None`` draws from them. Results are in data units.
    """

    vrnn: VRNN

    @property
    def scaler(self) -> Scaler:
        """The affine map between data units and the model's."""
        raise NotImplementedError

    def sample(
        self,
        count: int = 1,
        steps: int = 100,
        temperature: float = 1.0,
        inputs: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Draw sequences from the model, in data units, shape (count, steps, features).

        Args:
            count: Number of sequences.
            steps: Their length.
            temperature: Temperature of the emission; below 1 for the more likely frames.
            inputs: Covariates, shape (count, steps, covariates), for a model that reads them.
            seed: Seed of the draws.

        Raises:
            UserError: No sequences or steps, or not the covariates that the model reads.
        """
        require("count", count, 1)
        require("steps", steps, 1)
        with evaluating(self.vrnn, seed):
            return self.scaler.unscale(self.vrnn.generate(steps, count, inputs=inputs, temperature=temperature).x)

    def reconstruct(self, sequences: Given, inputs: Given | None = None, seed: int | None = None) -> list[Tensor]:
        """Return the emission's mean at each step of each sequence, shape (time, features), with inferred latents."""
        with evaluating(self.vrnn, seed):
            batch = make_batch(self.vrnn, self.scaler, sequences, inputs)
            (mean,), _ = self.vrnn.collect(batch, make_noise(batch, seed), lambda trace: (trace.emission.mean,))
            return trim(self.scaler.unscale(mean), batch.lengths)

    def score(
        self, sequences: Given, samples: int = 1, inputs: Given | None = None, seed: int | None = None
    ) -> list[Tensor]:
        """Return the terms of a lower bound on each sequence's log-likelihood in nats, shape (time,).

        Args:
            sequences: At least one.
            samples: Particles: 1 for the terms of the ELBO, more for a filter's estimates of log p(x_t | x_<t).
            inputs: Their covariates, for a model that reads them.
            seed: Seed of the draws.

        Raises:
            UserError: More than one particle of a model that smooths.
        """
        require("samples", samples, 1)
        with evaluating(self.vrnn, seed):
            batch = make_batch(self.vrnn, self.scaler, sequences, inputs, is_stepped=samples > 1)
            if samples == 1:
                noise = make_noise(batch, seed)
                (nats,), _ = self.vrnn.collect(batch, noise, lambda trace: (trace.log_px - trace.kl.sum(-1),))
            else:
                us = [None] * batch.x.shape[1] if batch.inputs is None else batch.inputs.unbind(1)
                stream = self.vrnn.stream(len(batch), samples, resampling=RESAMPLING, inputs=us[0])
                frames = zip(batch.x.unbind(1), batch.valid_mask.unbind(1), us, strict=True)
                nats = torch.stack([stream.step(x, valid, u) for x, valid, u in frames], 1)
            return trim(nats - log_std(self.scaler, batch.valid_mask).to(nats), batch.lengths)

    def encode(self, sequences: Given, inputs: Given | None = None, seed: int | None = None) -> list[Encoding]:
        """Return the posterior moments and the states of each sequence; the moments depend on the latents drawn."""

        def select(trace: Trace) -> tuple[Tensor, ...]:
            assert trace.hidden is not None
            q = trace.posterior
            return (trace.z, trace.z, trace.hidden) if q is None else (q.mean, q.stddev, trace.hidden)

        with evaluating(self.vrnn, seed):
            batch = make_batch(self.vrnn, self.scaler, sequences, inputs, is_stepped=True)
            (*moments, before), state = self.vrnn.collect(batch, make_noise(batch, seed), select)
            is_last = (torch.arange(before.shape[1], device=before.device) == batch.lengths[:, None] - 1)[..., None]
            hidden = torch.where(is_last, state.h[:, -1:], before.roll(-1, 1))
            mean, std = (part[..., : self.vrnn.latent_size] for part in moments)
            parts = (trim(part, batch.lengths) for part in (mean, std, hidden))
            return [Encoding(*encoding) for encoding in zip(*parts, strict=True)]

    def decode(self, latents: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return the emission's mean, shape (batch, time, features), where each frame continues from the one before.

        Binary features (a Bernoulli's frame, a pen's lift) are rounded, as the model never read values between.

        Args:
            latents: z_1 to z_T, shape (batch, time, latent).
            inputs: Covariates, shape (batch, time, covariates), for a model that reads them.

        Raises:
            UserError: The model has no latent, or one of another width; or not the covariates that it reads.
        """
        model = self.vrnn
        if model.phi_z is None or latents.ndim != 3 or latents.shape[2] != model.latent_size:
            expected = f"(batch, time, {model.latent_size})" if model.latent_size else "none: the model has no latent"
            raise UserError(f"latents: have shape {tuple(latents.shape)}, expected {expected}")
        if not latents.shape[1]:
            raise UserError("latents: have no step. Fix: give at least one")
        if model.num_inputs:
            require_shape("inputs", inputs, *latents.shape[:2], model.num_inputs)
        with evaluating(self.vrnn, None):
            like, frames = model.input_mean, []
            inputs = inputs.to(like) if model.num_inputs and inputs is not None else None
            state = model.initial_state(len(latents), None if inputs is None else inputs[:, 0], mean=True)
            for t, z_features in enumerate(model.extract_z(latents.to(like)).unbind(1)):
                u = None if inputs is None else inputs[:, t]
                frame = model.head.round_mean(model.emission_dist(z_features, output(state), u).mean)
                _, state = model.next_state(model.extract_x(frame), z_features, state, u)
                frames.append(frame)
            return self.scaler.unscale(torch.stack(frames, 1))

    def forecast(
        self,
        prefix: Given,
        steps: int,
        samples: int = 100,
        temperature: float = 1.0,
        inputs: Given | None = None,
        future_inputs: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Draw paths that continue sequences, shape (samples, batch, steps, features).

        Particles follow each prefix, weighted by how well they explain it; paths continue from particles that are drawn
        by their weights at its end.

        Args:
            prefix: The known part of each sequence, at least one step.
            steps: Length of a path.
            samples: Paths of each sequence, and particles.
            temperature: Temperature of the emission.
            inputs: Covariates of the prefixes, for a model that reads them.
            future_inputs: Covariates of the paths, shape (batch, steps, covariates).
            seed: Seed of the draws.

        Raises:
            UserError: No steps or samples, an empty prefix, or not the covariates that the model reads.
        """
        require("steps", steps, 1)
        require("samples", samples, 1)
        with evaluating(self.vrnn, seed):
            batch = make_batch(self.vrnn, self.scaler, prefix, inputs, is_stepped=True)
            filtered = self.vrnn.filter(batch, samples, RESAMPLING, make_noise(batch, seed))
            step = self._step_before(batch.x.shape[1], filtered, seed)
            return step.forecast(steps, samples, temperature, future_inputs)

    def backtest(
        self,
        sequences: Given,
        origins: Sequence[int],
        steps: int,
        samples: int = 100,
        temperature: float = 1.0,
        inputs: Given | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Forecast from each origin within sequences, given only the steps before it; paths as in :meth:`forecast`.

        With a seed the paths are those that :meth:`forecast` draws from these steps alone, but the particles follow
        the sequences only once. A smoothing model, which reads a sequence from its end, starts again for each origin.

        Args:
            sequences: At least one, all reaching to the last origin.
            origins: Steps that forecasts begin at, 1 or later, in increasing order.
            steps: Length of a path.
            samples: Paths of each sequence, and particles.
            temperature: Temperature of the emission.
            inputs: Covariates of the sequences to the last forecast's end, for a model that reads them.
            seed: Seed of the draws.

        Raises:
            UserError: No steps or samples, origins out of order or range, or not the covariates that the model reads.
        """
        require("steps", steps, 1)
        require("samples", samples, 1)
        batch = make_batch(self.vrnn, self.scaler, sequences, inputs, is_stepped=True)
        shortest = int(batch.lengths.min())
        if any(later <= earlier for earlier, later in pairwise([0, *origins])):
            raise UserError(f"origins {list(origins)}: must increase, from 1 on")
        if origins and origins[-1] > shortest:
            raise UserError(f"origins: {origins[-1]} is beyond the {shortest} steps of a sequence. Fix: lower it")

        def paths() -> Iterator[Tensor]:  # between two origins, generators and mode are the caller's
            noise, particles, first = make_noise(batch, seed), None, 0
            for origin in origins:
                with evaluating(self.vrnn, seed):
                    if self.vrnn.backward_rnn is not None or self.vrnn.infers_state:
                        particles, first = None, 0
                    window, draws = batch.window(first, origin), noise.window(first, origin)
                    filtered = self.vrnn.filter(window, samples, RESAMPLING, draws, particles=particles)
                    future = None if batch.inputs is None else batch.inputs[:, origin : origin + steps]
                    step = self._step_before(origin, filtered, seed)
                    forecast = step.forecast(steps, samples, temperature, future)
                    uniform = noise.window(origin - 1, origin).uniform_over_time(RESAMPLING.draws(samples))[:, 0].t()
                    particles = Particles(filtered.state, filtered.log_weights).resample_where_due(RESAMPLING, uniform)
                    first = origin
                yield forecast

        return paths()

    def impute(
        self,
        sequences: Given,
        samples: int = 100,
        particles: int | None = None,
        lag: int = 32,
        inputs: Given | None = None,
        seed: int | None = None,
    ) -> list[Tensor]:
        r"""Draw missing values of each sequence, given all observed ones: shape (samples, time, features).

        A particle filter: :math:`z_t` comes from the posterior where a step has data and from the prior where it has
        none, the missing part of :math:`x_t` from the emission given the observed part, which alone counts for the
        weights. A gap is drawn from the particles' ancestry up to ``lag`` steps behind it (Kitagawa and Sato 2001).
        Where a frame in reach would leave it fewer than 32 effective ancestors (a quarter of fewer than 128 particles),
        as a frame of many features may, that frame is tempered to leave as many, and later ones are ignored: draws are
        then too wide rather than all alike. Draws of one number in different gaps do not belong together, nor do those
        far apart in a long stretch of partly observed frames.

        A model that reads which values are missing (``missing``) continues with the observed values, others with the
        draws.

        Args:
            sequences: At least one, NaN where a value is missing.
            samples: Draws of each sequence.
            particles: At least as many; by default 4 times the samples.
            lag: Steps behind a gap, at most.
            inputs: Covariates, for a model that reads them.
            seed: Seed of the draws.

        Raises:
            UserError: No samples, fewer particles, or a frame that is partly missing under an emission that can't be
                conditioned on the other part.
        """
        require("samples", samples, 1)
        require("lag", lag, 0)
        particles = 4 * samples if particles is None else particles
        require("particles", particles, samples)
        with evaluating(self.vrnn, seed):
            batch = make_batch(self.vrnn, self.scaler, sequences, inputs, is_stepped=True)
            imputer = Imputer(self.vrnn, batch, particles)
            return [self.scaler.unscale(paths) for paths in imputer.draw(samples, lag)]

    def session(
        self, batch_size: int = 1, samples: int = 1, state: State | None = None, inputs: Tensor | None = None
    ) -> Session:
        """Follow sequences frame by frame.

        Args:
            batch_size: Number of sequences.
            samples: Particles per sequence; more of them make scores and predictions better.
            state: State before the first step, of samples * batch_size rows; the model's initial state if not given.
            inputs: Covariates of the first step, shape (batch_size, covariates), for an initial state that reads them.

        Raises:
            UserError: The model smooths, or the state has other rows.
        """
        resampling = RESAMPLING if samples > 1 else None
        return Session(self.vrnn.stream(batch_size, samples, state, resampling, inputs), self.vrnn, self.scaler)

    def export(self, path: str | Path) -> None:
        """Write the step of :meth:`session`, with one particle, as a program for any number of sequences.

        Its arguments are, in this order, those that the model reads of:

        ========================= ======================= ==============================================================
        ``x``                     (batch, features)       the frame, in data units
        ``observed``              (batch, features)       bool, where it was measured; if the model reads it
        ``inputs``                (batch, covariates)     its covariates
        ``noise``                 (batch, latent)         standard normal, for the posterior's draw
        ``next_inputs``           (batch, covariates)     covariates of the next step
        ``next_noise``            (batch, latent)         standard normal, for the prior's draw of the next step
        ``h``, and ``c`` of LSTMs (batch, layers, hidden) the state, first ``vrnn.initial_state``
        ========================= ======================= ==============================================================

        It returns, in this order:

        ========================= ======================= ==============================================================
        ``nats``                  (batch,)                log p(x_t, z_t | .) - log q(z_t | .), in data units
        ``next_mean``             (batch, features)       mean of the next frame, given the prior's draw, in data units
        ``next_std``              (batch, features)       its standard deviation, if the emission has one
        ``h_next``, ``c_next``    (batch, layers, hidden) the state to continue with
        ========================= ======================= ==============================================================

        A call with ``next_noise`` drawn is one part of the mixture that :meth:`~vrnn_lightning.inference.Step.next`
        returns; rows repeated with other noise are others. The program holds the current weights.

        Args:
            path: ``.pt2`` for ``torch.export.load``, in the module's precision, or ``.onnx``, in float32, which is
                compared with torch before it is kept and needs ``pip install 'vrnn-lightning[export]'``.

        Raises:
            UserError: Another suffix, a model that smooths, weights that are not numbers, a missing library or folder,
                a full disk, or an emission that ONNX can't express.
        """
        require_numbers("the model", cast(nn.Module, self).state_dict())
        export_step(self.vrnn, self.scaler, Path(path))

    def _step_before(self, origin: int, filtered: FilterResult, seed: int | None) -> Step:
        """Return the last filtered step; the seed and the origin decide the draws from there."""
        if seed is not None:
            digest = hashlib.blake2b(f"{seed} {origin}".encode(), digest_size=7).digest()
            torch.manual_seed(int.from_bytes(digest))
        return Step(filtered.log_likelihood, filtered.state, filtered.log_weights, self.vrnn, self.scaler)
