"""What a trained model is for: samples, reconstructions, forecasts, imputations, scores, encodings, streams.

All of it in data units, and without a Trainer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch, SequenceSample, pad
from vrnn_lightning.data import Scaler
from vrnn_lightning.errors import UserError
from vrnn_lightning.filtering import FilterResult, Particles, select_by_weight
from vrnn_lightning.heads import Bernoulli, Head, Pen
from vrnn_lightning.inference.checks import RESAMPLING, log_std, require
from vrnn_lightning.inference.imputing import Imputer
from vrnn_lightning.inference.session import Session
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import State, output, repeat_rows
from vrnn_lightning.vrnn import VRNN, Trace

__all__ = ["Encoding", "Given", "Inference"]

Given = Tensor | Sequence[Tensor] | SequenceBatch
"""Sequences in data units: one tensor of shape (batch, time, features), or tensors of shape (time, features), NaN where
a value is missing; or a datamodule's batch, which is in scaled units."""


class Encoding(NamedTuple):
    """What a model makes of one sequence.

    Args:
        mean: Posterior mean of z_t, shape (time, latent).
        std: Posterior standard deviation of z_t, shape (time, latent).
        hidden: h_t, the top layer's state after each step, shape (time, hidden).
    """

    mean: Tensor
    std: Tensor
    hidden: Tensor


class Inference:
    """What a model with a VRNN and a scaler can do; every method leaves the model in the mode that it was in.

    Sequences are given as :data:`Given` says. ``seed`` makes a call repeatable and leaves torch's generators as they
    were; ``None`` draws from them.
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
        """Draw sequences from the model.

        Args:
            count: How many.
            steps: Their length.
            temperature: Of the emission; below 1 for the more likely frames.
            inputs: Covariates, shape (count, steps, covariates), for a model that reads them.
            seed: Decides the draws.

        Returns:
            Data units, shape (count, steps, features).

        Raises:
            UserError: No sequences or steps, or not the covariates that the model reads.
        """
        require("count", count)
        require("steps", steps)
        with self._at_work(seed):
            drawn = self.vrnn.generate(steps, count, inputs=self._to_model(inputs), temperature=temperature).x
            return self.scaler.unscale(drawn)

    def reconstruct(self, sequences: Given, inputs: Given | None = None, seed: int | None = None) -> list[Tensor]:
        """Return the emission's mean at each step, with the latents inferred from the sequence itself.

        Args:
            sequences: At least one.
            inputs: Covariates of theirs, for a model that reads them.
            seed: Decides the latents.

        Returns:
            Of each sequence, data units, shape (time, features).
        """
        with self._at_work(seed):
            batch = self._batch(sequences, inputs)
            (mean,), _ = self.vrnn.collect(batch, _noise(batch, seed), lambda trace: (trace.emission.mean,))
            return _cut(self.scaler.unscale(mean), batch.lengths)

    def score(
        self, sequences: Given, samples: int = 1, inputs: Given | None = None, seed: int | None = None
    ) -> list[Tensor]:
        """Return what each step adds to a lower bound on the sequence's log-likelihood.

        Args:
            sequences: At least one.
            samples: Particles: 1 for the terms of the ELBO, more for a particle filter's estimates of
                log p(x_t | x_<t).
            inputs: Covariates of theirs, for a model that reads them.
            seed: Decides the draws.

        Returns:
            Of each sequence, nats in data units, shape (time,).

        Raises:
            UserError: More than one particle of a model that smooths.
        """
        require("samples", samples)
        with self._at_work(seed):
            batch = self._batch(sequences, inputs)
            if samples == 1:
                noise = _noise(batch, seed)
                (nats,), _ = self.vrnn.collect(batch, noise, lambda trace: (trace.log_px - trace.kl.sum(-1),))
            else:
                stream = self.vrnn.stream(len(batch), samples, resampling=RESAMPLING)
                us = [None] * batch.x.shape[1] if batch.inputs is None else batch.inputs.unbind(1)
                frames = zip(batch.x.unbind(1), batch.valid_mask.unbind(1), us, strict=True)
                nats = torch.stack([stream.step(x, seen, u) for x, seen, u in frames], 1)
            nats = nats - log_std(self.scaler, batch.valid_mask).to(nats)
            return _cut(nats, batch.lengths)

    def encode(self, sequences: Given, inputs: Given | None = None, seed: int | None = None) -> list[Encoding]:
        """Return what the model makes of each sequence: posterior moments and states.

        Args:
            sequences: At least one.
            inputs: Covariates of theirs, for a model that reads them.
            seed: Decides the latents, which later moments depend on.

        Returns:
            One for each sequence; latent parts have width 0 without a latent.
        """
        with self._at_work(seed):
            batch = self._batch(sequences, inputs)
            latent = self.vrnn.latent_size

            def of(trace: Trace) -> tuple[Tensor, ...]:
                assert trace.hidden is not None
                if trace.posterior is None:
                    return trace.z, trace.z, trace.hidden
                return trace.posterior.mean, trace.posterior.stddev, trace.hidden

            (mean, std, before), state = self.vrnn.collect(batch, _noise(batch, seed), of)
            last = (torch.arange(before.shape[1], device=before.device) == batch.lengths[:, None] - 1)[..., None]
            hidden = torch.where(last, state.h[:, -1:], before.roll(-1, 1))
            parts = (_cut(part, batch.lengths) for part in (mean[..., :latent], std[..., :latent], hidden))
            return [Encoding(*found) for found in zip(*parts, strict=True)]

    def decode(self, latents: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return what latents look like: each frame is its emission's mean, which the model then continues from.

        What is binary (a Bernoulli's frame, a pen's lift) is rounded, as the model never saw anything between.

        Args:
            latents: z_1 to z_T, shape (batch, time, latent).
            inputs: Covariates, shape (batch, time, covariates), for a model that reads them.

        Returns:
            Data units, shape (batch, time, features).

        Raises:
            UserError: The model has no latent, or one of another width; or not the covariates that it reads.
        """
        model = self.vrnn
        if model.phi_z is None or latents.ndim != 3 or latents.shape[2] != model.latent_size:
            expected = f"(batch, time, {model.latent_size})" if model.latent_size else "none: the model has no latent"
            raise UserError(f"latents: have shape {tuple(latents.shape)}, expected {expected}")
        if not latents.shape[1]:
            raise UserError("latents: have no step; give at least one")
        needed = (*latents.shape[:2], model.num_inputs)
        if model.num_inputs and (inputs is None or tuple(inputs.shape) != needed):
            raise UserError(f"inputs: the model reads covariates of shape {needed}")
        with self._at_work(None):
            known = self._to_model(inputs) if model.num_inputs else None
            state, frames = model.initial_state(len(latents)), []
            for t, z_features in enumerate(model.extract_z(latents.to(model.input_mean)).unbind(1)):
                now = None if known is None else known[:, t]
                frame = _rounded(model.decoder.head, model.emission_dist(z_features, output(state), now).mean)
                _, state = model.next_state(model.extract_x(frame), z_features, state, now)
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
        """Draw how sequences may continue.

        Particles follow each prefix, weighted by how well they explain it; those drawn by their weights at its end go
        on from there.

        Args:
            prefix: What is known of each, at least one step.
            steps: How far to go.
            samples: Paths of each, and particles.
            temperature: Of the emission.
            inputs: Covariates of the prefixes, for a model that reads them.
            future_inputs: Covariates of the steps to come, shape (batch, steps, covariates).
            seed: Decides the draws.

        Returns:
            Paths in data units, shape (samples, batch, steps, features).

        Raises:
            UserError: No steps or samples, an empty prefix, or not the covariates that the model reads.
        """
        require("steps", steps)
        require("samples", samples)
        with self._at_work(seed):
            batch = self._batch(prefix, inputs)
            filtered = self.vrnn.filter(batch, samples, RESAMPLING, _noise(batch, seed))
            return self._paths(filtered, batch.x.shape[1], steps, temperature, future_inputs, seed)

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
        """Forecast from several origins within sequences, of which each forecast knows only what lies before it.

        With a seed the paths are those that :meth:`forecast` draws from the steps before the origin alone. But the
        particles follow the sequences only once: from the states at an origin they continue to the next. A smoothing
        model, which reads what it is given from its end, starts again for each.

        Args:
            sequences: At least one, all reaching to the last origin.
            origins: Steps that forecasts begin at, 1 or later, in increasing order.
            steps: How far to go.
            samples: Paths of each, and particles.
            temperature: Of the emission.
            inputs: Covariates of the sequences, for a model that reads them, as far as the last forecast goes.
            seed: Decides the draws.

        Returns:
            For each origin in turn, paths in data units, shape (samples, batch, steps, features).

        Raises:
            UserError: No steps or samples, origins that are none, or not the covariates that the model reads.
        """
        require("steps", steps)
        require("samples", samples)
        batch = self._batch(sequences, inputs)
        shortest = int(batch.lengths.min())
        if any(later <= earlier for earlier, later in pairwise([0, *origins])):
            raise UserError(f"origins {list(origins)}: must increase, from 1 on")
        if origins and origins[-1] > shortest:
            raise UserError(f"origins: the last is {origins[-1]}, but a sequence has only {shortest} steps")
        return self._rolling(batch, origins, steps, samples, temperature, seed)

    def _rolling(
        self,
        batch: SequenceBatch,
        origins: Sequence[int],
        steps: int,
        samples: int,
        temperature: float,
        seed: int | None,
    ) -> Iterator[Tensor]:
        """Yield what :meth:`backtest` says; between two origins generators and mode are the caller's."""
        noise = _noise(batch, seed)
        particles, first = self.vrnn.new_particles(len(batch), samples), 0
        for origin in origins:
            with self._at_work(seed):
                if self.vrnn.backward_rnn is not None:
                    particles, first = self.vrnn.new_particles(len(batch), samples), 0
                window, drawn = batch.window(first, origin), noise.window(first, origin)
                filtered = self.vrnn.filter(window, samples, RESAMPLING, drawn, particles=particles)
                ahead = None if batch.inputs is None else batch.inputs[:, origin : origin + steps]
                paths = self._paths(filtered, origin, steps, temperature, ahead, seed)
                uniform = noise.window(origin - 1, origin).uniform_over_time(RESAMPLING.draws(samples))[:, 0].t()
                particles = Particles(filtered.state, filtered.log_weights).resample_where_due(RESAMPLING, uniform)
                first = origin
            yield paths

    def _paths(
        self,
        filtered: FilterResult,
        origin: int,
        steps: int,
        temperature: float,
        inputs: Tensor | None,
        seed: int | None,
    ) -> Tensor:
        """Go on from what a filter found at an origin; the seed and the origin decide the draws."""
        samples, batch = filtered.log_weights.shape
        if seed is not None:
            torch.manual_seed(_mixed(seed, origin))
        state = select_by_weight(filtered.log_weights, filtered.state, samples)
        known = None if inputs is None else repeat_rows(cast(Tensor, self._to_model(inputs)), samples)
        drawn = self.vrnn.generate(steps, state=state, inputs=known, temperature=temperature).x
        paths: Tensor = self.scaler.unscale(drawn).unflatten(0, (samples, batch))
        return paths

    def impute(
        self,
        sequences: Given,
        samples: int = 100,
        particles: int | None = None,
        lag: int = 32,
        inputs: Given | None = None,
        seed: int | None = None,
    ) -> list[Tensor]:
        r"""Draw what is missing, given all that is observed.

        A particle filter: :math:`z_t` comes from the posterior where a step has data and from the prior where it has
        none, what is missing of :math:`x_t` from the emission given what is there, and the weights are those of the
        observed part. A gap is drawn from the particles' ancestry up to ``lag`` steps behind it (Kitagawa and Sato
        2001). Where a frame in reach would leave it fewer than 32 effective ancestors (a quarter of the particles, if
        they are fewer than 128), as a frame of many features may, the frame counts with the power that leaves so many,
        and nothing behind it counts: draws are then wider than they should be, rather than one. Draws of one number in
        different gaps do not belong together, nor do those far apart in a long stretch of frames that are partly there.

        A model that was told of missing values (``missing``) continues with what it saw; any other with what was drawn.

        Args:
            sequences: At least one, NaN where a value is missing.
            samples: Draws of each.
            particles: At least as many; by default 4 times the samples.
            lag: Steps behind a gap, at most.
            inputs: Covariates, for a model that reads them.
            seed: Decides the draws.

        Returns:
            Of each sequence, data units, shape (samples, time, features); what was observed is as it was.

        Raises:
            UserError: No samples, fewer particles, or a frame that is partly missing under an emission that can't be
                conditioned on the other part.
        """
        require("samples", samples)
        require("lag", lag, 0)
        count = 4 * samples if particles is None else particles
        require("particles", count, samples)
        with self._at_work(seed):
            batch = self._batch(sequences, inputs)
            found = Imputer(self.vrnn, batch, count).run()
            drawn = [found.draws(row, samples, lag) for row in range(len(batch))]
            whole: list[Tensor] = []
            for row, paths in enumerate(drawn):
                length = int(batch.lengths[row])
                kept = self.scaler.unscale(batch.x[row, :length])
                seen = batch.valid_mask[row, :length]
                whole.append(torch.where(seen, kept, self.scaler.unscale(paths).to(kept)))
            return whole

    def session(self, batch_size: int = 1, samples: int = 1, state: State | None = None) -> Session:
        """Follow sequences frame by frame.

        Args:
            batch_size: Number of sequences.
            samples: Particles per sequence; more of them make scores and predictions better.
            state: State before the first step, of samples * batch_size rows; zero if not given.

        Raises:
            UserError: The model smooths, or the state has other rows.
        """
        resampling = RESAMPLING if samples > 1 else None
        return Session(self.vrnn.stream(batch_size, samples, state, resampling), self.vrnn, self.scaler)

    @contextmanager
    def _at_work(self, seed: int | None) -> Iterator[None]:
        """Evaluate without gradient and, with a seed, with generators of its own."""
        training = self.vrnn.training
        device = self.vrnn.input_mean.device
        self.vrnn.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else [], seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                yield
        finally:
            self.vrnn.train(training)

    def _to_model(self, inputs: Tensor | None) -> Tensor | None:
        return None if inputs is None else inputs.to(self.vrnn.input_mean)

    def _batch(self, sequences: Given, inputs: Given | None) -> SequenceBatch:
        """Return sequences as a batch in scaled units, on the model's device."""
        like = self.vrnn.input_mean
        if isinstance(sequences, SequenceBatch):
            batch = sequences
        else:
            xs = list(sequences)
            if not xs:
                raise UserError("no sequence is given")
            us: list[Tensor | None] = [None] * len(xs) if inputs is None else list(cast("Sequence[Tensor]", inputs))
            if len(us) != len(xs):
                raise UserError(f"inputs: of {len(us)} sequences, but {len(xs)} are given")
            batch = pad([self._sequence(i, x, u) for i, (x, u) in enumerate(zip(xs, us, strict=True))])
            batch.x = self.scaler.scale(batch.x.double()).masked_fill(~batch.valid_mask, 0.0)
        moved = {name: value.to(like.device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
        batch = SequenceBatch(**{**vars(batch), **moved})
        batch.x = batch.x.to(like)
        return batch

    def _sequence(self, index: int, x: Tensor, inputs: Tensor | None) -> SequenceSample:
        if x.ndim != 2 or x.shape[1] != self.vrnn.num_features or len(x) == 0:
            expected = f"(time, {self.vrnn.num_features}) with at least one step"
            raise UserError(f"sequence {index}: has shape {tuple(x.shape)}, expected {expected}")
        if x.isinf().any():
            raise UserError(f"sequence {index}: holds infinite values; fix it, or NaN says that they are missing")
        missing = x.isnan()
        observed = ~missing if missing.any() else None
        return SequenceSample(x.double().masked_fill(missing, 0.0), observed, inputs, f"sequence {index}")


def _rounded(head: Head, mean: Tensor) -> Tensor:
    """Return a mean with what is binary about it rounded."""
    if isinstance(head, Bernoulli):
        return mean.round()
    return torch.cat([mean[:, :2], mean[:, 2:].round()], -1) if isinstance(head, Pen) else mean


def _noise(batch: SequenceBatch, seed: int | None) -> Noise:
    return Noise(batch) if seed is None else Noise.named(batch, seed)


def _mixed(seed: int, place: int) -> int:
    """Return a seed of a seed and a place."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {place}".encode(), digest_size=7).digest())


def _cut(values: Tensor, lengths: Tensor) -> list[Tensor]:
    return [value[:length] for value, length in zip(values, lengths.tolist(), strict=True)]
