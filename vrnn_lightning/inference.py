"""What a trained model is for: samples, reconstructions, forecasts, imputations, scores, encodings, streams.

All of it in data units, and without a Trainer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from vrnn_lightning.batch import Sequence, SequenceBatch, pad
from vrnn_lightning.data import Scaler
from vrnn_lightning.errors import UserError
from vrnn_lightning.filtering import Filtered, Resampling, Weights
from vrnn_lightning.heads import Bernoulli, Factorised, Head, Mixture, Pen, log_prob
from vrnn_lightning.heads.base import SampleShape, at_least_float32
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import State, Stream, log_ratio, repeat_rows
from vrnn_lightning.vrnn import VRNN, Particles, Trace

__all__ = ["Encoding", "Given", "Inference", "Predictive", "Session", "Step", "upcoming"]

Given = Tensor | SequenceOf[Tensor] | SequenceBatch
"""Sequences in data units: one tensor of shape (batch, time, features), or tensors of shape (time, features), NaN where
a value is missing; or a datamodule's batch, which is in scaled units."""
RESAMPLING = Resampling()
ENOUGH = 32
"""Effective particles that a gap is drawn from: fewer would be too close together."""


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


def upcoming(model: VRNN, hidden: Tensor, inputs: Tensor | None, noise: Tensor) -> Tensor:
    """Return what the emission of step t+1 reads, z_{t+1} being drawn from the prior.

    Args:
        model: The model.
        hidden: h_t of the top layer, shape (rows, hidden).
        inputs: Covariates of step t+1, shape (rows, covariates), if the model reads any.
        noise: Standard normal noise, shape (rows, latent).

    Returns:
        Features of the emission's head, shape (rows, width).
    """
    known = torch.cat([hidden, cast(Tensor, inputs).to(hidden)], -1) if model.num_inputs else hidden
    if model.prior is None or model.phi_z is None:
        return cast(Tensor, model.decoder.body(known))
    prior = model.prior(known).base_dist
    z = prior.loc + prior.scale * noise.to(known)
    return cast(Tensor, model.decoder.body(torch.cat([model.phi_z(z.to(known)), known], -1)))


class Predictive(Distribution):
    r"""What a frame may be, given all before it: a mixture of emissions, in data units.

    .. math:: p(x_{t+1} \mid x_{\le t}) \approx \sum_k \bar w_t^k \frac 1 M \sum_m
        p(x_{t+1} \mid z_{t+1}^{k,m}, h_t^k), \qquad z_{t+1}^{k,m} \sim p(z_{t+1} \mid h_t^k)

    Batch shape (batch,), event shape (features,). What is asked of it is found when it is asked for.

    Args:
        head: Maps features to an emission in scaled units.
        features: What it reads of each component, shape (batch, components, width).
        log_weights: Of the components, normalised, shape (batch, components).
        scaler: Between data units and the model's.
    """

    arg_constraints: ClassVar = {}

    def __init__(self, head: Head, features: Tensor, log_weights: Tensor, scaler: Scaler) -> None:
        super().__init__(log_weights.shape[:1], torch.Size([head.num_features]), validate_args=False)
        self._head, self._features, self._scaler = head, features, scaler
        self.log_weights = log_weights

    @cached_property
    @torch.no_grad()
    def components(self) -> Distribution:
        """The emissions, batch shape (batch, components), in scaled units."""
        return cast(Distribution, self._head(self._features))

    @property
    def mean(self) -> Tensor:
        """Shape (batch, features)."""
        return self._scaler.unscale(self._average(self.components.mean))

    @property
    def variance(self) -> Tensor:
        """Of each feature, shape (batch, features).

        Raises:
            NotImplementedError: The emission has none.
        """
        each = self.components.mean
        around = (each - self._average(each)[:, None]).square()
        return self._average(self.components.variance + around) * self._scaler.std.to(each).square()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-likelihood of frames in nats and data units; of what is no NaN, as a session's step does.

        Args:
            value: Frames, shape (..., batch, features).

        Returns:
            Shape (..., batch).
        """
        missing = value.isnan()
        return self._log_prob(value, ~missing if missing.any() else None)

    def marginal_log_prob(self, value: Tensor, observed: Tensor) -> Tensor:
        """Return the log-likelihood of the observed features alone.

        Args:
            value: Frames, shape (..., batch, features); what stands at unobserved features does not count.
            observed: True where a feature was measured, shape (..., batch, features).

        Returns:
            Nats in data units, shape (..., batch).
        """
        return self._log_prob(value, observed)

    @torch.no_grad()
    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        """Draw frames, shape (*sample_shape, batch, features)."""
        chosen = Categorical(logits=self.log_weights, validate_args=False).sample(torch.Size(sample_shape))
        rows = torch.arange(len(self._features), device=chosen.device)
        return self._scaler.unscale(self._head.draw(self._features[rows, chosen]))

    def _log_prob(self, value: Tensor, observed: Tensor | None) -> Tensor:
        scaled = self._scaler.scale(value.double()).to(self._features)
        seen = None if observed is None else observed[..., None, :]
        each = log_prob(self.components, scaled[..., None, :], seen)
        counted = torch.ones_like(value, dtype=torch.bool) if observed is None else observed
        return (each + self.log_weights).logsumexp(-1) - _log_std(self._scaler, counted).to(each)

    def _average(self, each: Tensor) -> Tensor:
        """Return the weighted mean over components of values of shape (batch, components, features)."""
        return (self.log_weights.exp()[..., None] * each).sum(1)


class Step:
    """Where a session stands after a frame: what the frame scored, and all that is needed to look ahead.

    Looking ahead costs nothing until it is asked for, and a step stands where it does when the session has gone on.

    Args:
        nats: An estimate of log p(x_t | x_<t) in nats and data units, shape (batch,); zeros before the first frame.
        state: State of the particles, of samples * batch rows; row ``k * batch + i`` is particle k of sequence i.
        log_weights: Of the particles, normalised, shape (samples, batch).
        model: The model.
        scaler: Between data units and the model's.
    """

    def __init__(self, nats: Tensor, state: State, log_weights: Tensor, model: VRNN, scaler: Scaler) -> None:
        self.nats, self.state, self.log_weights = nats, state, log_weights
        self._model, self._scaler = model, scaler

    @torch.no_grad()
    def next(self, draws: int = 1, inputs: Tensor | None = None, noise: Tensor | None = None) -> Predictive:
        """Return p(x_{t+1} | x_<=t), a mixture over the particles and over draws of z_{t+1} from each one's prior.

        Exact without a latent; with one, the closer, the more particles and draws there are. Of one particle and one
        draw it is the emission of a single z_{t+1}.

        Args:
            draws: Of z_{t+1} for each particle.
            inputs: Covariates of step t+1, shape (batch, covariates), if the model reads any.
            noise: Standard normal noise for the draws, shape (draws * samples * batch, latent), row
                ``(m * samples + k) * batch + i`` for draw m of particle k of sequence i; torch's generator decides if
                not given.

        Returns:
            A distribution of batch shape (batch,) and event shape (features,), in data units.

        Raises:
            UserError: No draws, or something is missing or has another shape.
        """
        _require("draws", draws)
        model, (samples, batch) = self._model, self.log_weights.shape
        draws = draws if model.latent_size else 1
        rows = draws * samples * batch
        if model.num_inputs:
            _require_shape("inputs of the next step", inputs, batch, model.num_inputs)
            inputs = repeat_rows(cast(Tensor, inputs), draws * samples)
        if noise is None:
            noise = torch.randn(rows, model.latent_size)
        _require_shape("noise of the next step", noise, rows, model.latent_size)
        features = upcoming(model, repeat_rows(self.state.h[:, -1], draws), inputs, noise)
        features = features.unflatten(0, (draws * samples, batch)).transpose(0, 1)
        log_weights = self.log_weights.repeat(draws, 1).t().to(at_least_float32(features)) - math.log(draws)
        return Predictive(model.decoder.head, features, log_weights, self._scaler)

    @torch.no_grad()
    def forecast(
        self, steps: int = 1, samples: int = 100, temperature: float = 1.0, inputs: Tensor | None = None
    ) -> Tensor:
        """Draw how the sequences may go on, each path from a particle drawn by the weights.

        Args:
            steps: How far to go.
            samples: Paths of each sequence.
            temperature: Of the emission.
            inputs: Covariates of the steps to come, shape (batch, steps, covariates), if the model reads any.

        Returns:
            Data units, shape (samples, batch, steps, features).

        Raises:
            UserError: No steps or samples, or not the covariates that the model reads.
        """
        _require("steps", steps)
        _require("samples", samples)
        state = _choose(self.log_weights, self.state, samples)
        known = None if inputs is None else repeat_rows(inputs.to(state.h), samples)
        drawn = self._model.generate(steps, state=state, inputs=known, temperature=temperature).x
        paths: Tensor = self._scaler.unscale(drawn).unflatten(0, (samples, self.log_weights.shape[1]))
        return paths


class Session:
    """Sequences followed frame by frame, in data units; it finds what a pass over the whole sequences would.

    Args:
        stream: Where they are, in scaled units.
        model: The model.
        scaler: Between the two.

    >>> from vrnn_lightning import VRNNLightningModule
    >>> session = VRNNLightningModule(num_features=3).session(batch_size=2, samples=4)
    >>> found = session.step(torch.zeros(2, 3))
    >>> found.nats.shape, found.next(draws=8).mean.shape, found.forecast(steps=5, samples=10).shape
    (torch.Size([2]), torch.Size([2, 3]), torch.Size([10, 2, 5, 3]))
    """

    def __init__(self, stream: Stream, model: VRNN, scaler: Scaler) -> None:
        self._stream, self._model = stream, model
        self._scaler = Scaler(scaler.mean.double(), scaler.std.double())
        self._jacobian = self._scaler.std.log().expand(model.num_features).sum()  # of a frame without gaps
        self._nats = stream.log_weights.new_zeros(stream.batch)

    @property
    def state(self) -> State:
        """State after the last frame, of samples * batch rows."""
        return self._stream.state

    @property
    def now(self) -> Step:
        """What the last :meth:`step` returned, or where the session began: from there p(x_1) can be asked for."""
        return Step(self._nats, self._stream.state, self._stream.log_weights, self._model, self._scaler)

    def step(
        self, x: Tensor, observed: Tensor | None = None, inputs: Tensor | None = None, noise: Tensor | None = None
    ) -> Step:
        """Take the next frame of each sequence.

        Args:
            x: Frames in data units, shape (batch, features).
            observed: True at measured values, shape (batch, features); where x is no NaN if not given.
            inputs: Covariates, shape (batch, covariates), if the model reads any.
            noise: Standard normal noise, shape (samples * batch, latent); torch's generator decides if not given.

        Returns:
            Its ``nats``, shape (batch,), estimate log p(x_t | x_<t) in data units, and its ``next()`` is the
            distribution of the step to come.

        Raises:
            UserError: Something is missing or has another shape, or a measured value is no number.
        """
        model = self._model
        _require_shape("x", x, self._stream.batch, model.num_features)
        x = x.to(model.input_mean.device)
        if observed is not None and observed.dtype != torch.bool:
            raise UserError(f"observed: is of {observed.dtype}, and must be bool: True where a value was measured")
        counted = torch.ones_like(x, dtype=torch.bool) if observed is None else observed.to(x.device)
        if model.num_inputs and inputs is not None and not inputs.isfinite().all():
            raise UserError("inputs: holds a value that is no number")
        if not x.sum().isfinite():
            if observed is None:
                observed = counted = ~x.isnan()
            _require_shape("observed", counted, *x.shape)
            if not x[counted].isfinite().all():
                raise UserError("x: holds a value that is no number; mend it, or let NaN say that it is missing")
        scaled = self._scaler.scale(x.double())
        nats = self._stream.step(scaled, None if observed is None else counted, inputs, noise)
        jacobian = self._jacobian if observed is None else _log_std(self._scaler, counted)
        self._nats = nats - jacobian.to(nats)
        return self.now


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
        _require("count", count)
        _require("steps", steps)
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
            (mean,), _ = self.vrnn.terms(batch, _noise(batch, seed), lambda trace: (trace.emission.mean,))
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
        _require("samples", samples)
        with self._at_work(seed):
            batch = self._batch(sequences, inputs)
            if samples == 1:
                noise = _noise(batch, seed)
                (nats,), _ = self.vrnn.terms(batch, noise, lambda trace: (trace.log_px - trace.kl.sum(-1),))
            else:
                stream = self.vrnn.stream(len(batch), samples, resampling=RESAMPLING)
                us = [None] * batch.x.shape[1] if batch.inputs is None else batch.inputs.unbind(1)
                frames = zip(batch.x.unbind(1), batch.counted.unbind(1), us, strict=True)
                nats = torch.stack([stream.step(x, seen, u) for x, seen, u in frames], 1)
            nats = nats - _log_std(self.scaler, batch.counted).to(nats)
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

            (mean, std, before), state = self.vrnn.terms(batch, _noise(batch, seed), of)
            last = (torch.arange(before.shape[1], device=before.device) == batch.lengths[:, None] - 1)[..., None]
            hidden = torch.where(last, state.h[:, -1:], before.roll(-1, 1))
            parts = (_cut(part, batch.lengths) for part in (mean[..., :latent], std[..., :latent], hidden))
            return [Encoding(*found) for found in zip(*parts, strict=True)]

    def decode(self, latents: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return what latents look like: each frame is its emission's mean, which the model then goes on from.

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
            states = list(model.initial_state(len(latents)).layers())
            frames = []
            for t, phi_z in enumerate(model.phi_z(latents.to(model.input_mean)).unbind(1)):
                u = [] if known is None else [known[:, t]]
                frame = _rounded(
                    model.decoder.head, model.decoder(torch.cat([phi_z, states[len(model.cells) - 1], *u], -1)).mean
                )
                seen = model.phi_x(model.look(frame, None))
                states = _advanced(model, torch.cat([seen, *u, phi_z], -1), states)
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
        """Draw how sequences may go on.

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
        _require("steps", steps)
        _require("samples", samples)
        with self._at_work(seed):
            batch = self._batch(prefix, inputs)
            filtered = self.vrnn.filter(batch, samples, RESAMPLING, _noise(batch, seed))
            return self._paths(filtered, batch.x.shape[1], steps, temperature, future_inputs, seed)

    def backtest(
        self,
        sequences: Given,
        origins: SequenceOf[int],
        steps: int,
        samples: int = 100,
        temperature: float = 1.0,
        inputs: Given | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Forecast from several origins within sequences, of which each forecast knows only what lies before it.

        With a seed the paths are those that :meth:`forecast` draws from the steps before the origin alone. But the
        particles follow the sequences only once: the states at an origin are kept, and go on to the next. A smoothing
        model, which reads what it is given from its end, begins anew for each.

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
        _require("steps", steps)
        _require("samples", samples)
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
        origins: SequenceOf[int],
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
                filtered = self.vrnn.filter(window, samples, RESAMPLING, drawn, carried=particles)
                ahead = None if batch.inputs is None else batch.inputs[:, origin : origin + steps]
                paths = self._paths(filtered, origin, steps, temperature, ahead, seed)
                particles, first = _resampled(filtered, noise.window(origin - 1, origin)), origin
            yield paths

    def _paths(
        self,
        filtered: Filtered,
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
        state = _choose(filtered.log_weights, State(*filtered.states), samples)
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

        A model that was told of missing values (``missing``) goes on with what it saw; any other with what was drawn.

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
        _require("samples", samples)
        _require("lag", lag, 0)
        count = 4 * samples if particles is None else particles
        _require("particles", count, samples)
        with self._at_work(seed):
            batch = self._batch(sequences, inputs)
            found = _Imputer(self.vrnn, batch, count).run()
            drawn = [found.draws(row, samples, lag) for row in range(len(batch))]
            whole: list[Tensor] = []
            for row, paths in enumerate(drawn):
                length = int(batch.lengths[row])
                kept = self.scaler.unscale(batch.x[row, :length])
                seen = batch.counted[row, :length]
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
            us: list[Tensor | None] = [None] * len(xs) if inputs is None else list(cast("SequenceOf[Tensor]", inputs))
            if len(us) != len(xs):
                raise UserError(f"inputs: of {len(us)} sequences, but {len(xs)} are given")
            batch = pad([self._sequence(i, x, u) for i, (x, u) in enumerate(zip(xs, us, strict=True))])
            batch.x = self.scaler.scale(batch.x.double()).masked_fill(~batch.counted, 0.0)
        moved = {name: value.to(like.device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
        batch = SequenceBatch(**{**vars(batch), **moved})
        batch.x = batch.x.to(like)
        return batch

    def _sequence(self, index: int, x: Tensor, inputs: Tensor | None) -> Sequence:
        if x.ndim != 2 or x.shape[1] != self.vrnn.num_features or len(x) == 0:
            expected = f"(time, {self.vrnn.num_features}) with at least one step"
            raise UserError(f"sequence {index}: has shape {tuple(x.shape)}, expected {expected}")
        if x.isinf().any():
            raise UserError(f"sequence {index}: holds infinite values; mend it, or NaN says that they are missing")
        missing = x.isnan()
        observed = ~missing if missing.any() else None
        return Sequence(x.double().masked_fill(missing, 0.0), observed, inputs, f"sequence {index}")


class _Imputer:
    """Particles that follow sequences with gaps, and remember what they drew.

    Args:
        model: The networks.
        batch: Sequences in scaled units.
        particles: Per sequence, K.
    """

    def __init__(self, model: VRNN, batch: SequenceBatch, particles: int) -> None:
        self.model, self.particles = model, particles
        self.batch = model._clean(batch)
        size = len(batch)
        self.weights = Weights(batch.lengths, batch.x.new_full((particles, size), -math.log(particles)), RESAMPLING)
        self.frames: list[Tensor] = []  # as drawn, each (particles, batch, features)
        self.ancestors: list[Tensor | None] = []  # of the particles after a step, each (particles, batch)
        self.log_weights: list[Tensor] = []  # before a step
        self.increments: list[Tensor] = []  # what the step's frame adds to them

    def run(self) -> _Imputer:
        """Follow the sequences to their ends."""
        model, batch, count = self.model, self.batch, self.particles
        state = model.initial_state(count * len(batch))
        states, layers = list(state.layers()), len(model.cells)
        future = model._future(batch, None)
        for t in range(batch.x.shape[1]):
            x, counted = (repeat_rows(part[:, t], count) for part in (batch.x, batch.counted))
            u = [] if batch.inputs is None else [repeat_rows(batch.inputs[:, t], count)]
            ahead = [] if future is None else [repeat_rows(future[t], count)]
            known = torch.cat([states[layers - 1], *u], -1)
            increments, phi_z = self._latent(x, counted, known, [*u, *ahead, states[layers - 1]])
            emission = model.decoder(torch.cat([phi_z, known], -1))
            increments = increments + log_prob(emission, x, None if counted.all() else counted)
            frame = _completed(emission, x, counted)
            seen = model.look(x, counted) if model.missing else model.look(frame, None)
            states = _advanced(model, torch.cat([model.phi_x(seen), *u, phi_z], -1), states)
            draws = torch.rand(RESAMPLING.draws(count), len(batch), device=x.device)
            self.frames.append(frame.unflatten(0, (count, -1)))
            self.log_weights.append(self.weights.log_weights)
            self.increments.append(increments.unflatten(0, (count, -1)))
            source = self.weights.advance(t, self.increments[-1], draws)
            if source is not None:
                states = [part[source] for part in states]
            self.ancestors.append(None if source is None else source.unflatten(0, (count, -1)) // len(batch))
        return self

    def _latent(self, x: Tensor, counted: Tensor, known: Tensor, rest: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Draw z_t; return what it adds to the log-weights, shape (rows,), and phi_z(z_t)."""
        model = self.model
        if model.prior is None or model.encoder is None or model.phi_z is None:
            return x.new_zeros(len(x)), x.new_zeros(len(x), 0)
        prior = model.prior(known)
        posterior = cast(Factorised, model.encoder(torch.cat([model.phi_x(model.look(x, counted)), *rest], -1)))
        mean, std = posterior.base_dist.loc, posterior.base_dist.scale
        if model.residual_posterior:
            mean = mean + prior.mean
        posterior = Factorised(torch.distributions.Normal(mean, std, validate_args=False))
        there = counted.any(-1)
        z = torch.where(there[:, None], posterior.sample(), prior.sample())
        return torch.where(there, log_ratio(prior, posterior, z), 0.0), model.phi_z(z)

    def draws(self, row: int, samples: int, lag: int) -> Tensor:
        """Return a sequence with its gaps filled, shape (samples, time, features), in scaled units."""
        length = int(self.batch.lengths[row])
        paths = self.batch.x[row, :length].expand(samples, -1, -1).clone()
        open_steps = (~self.batch.counted[row, :length]).any(-1).tolist()
        stop = length
        while stop > 0:
            if not open_steps[stop - 1]:
                stop -= 1
                continue
            shares = self._shares(row, stop - 1, min(stop - 1 + lag, length - 1))
            chosen = _drawn(shares.log()[:, None], samples)[:, 0]
            apart = len(chosen.unique())
            while stop > 0 and open_steps[stop - 1] and len(chosen.unique()) >= apart / 2:
                stop -= 1
                paths[:, stop] = self.frames[stop][chosen, row]
                chosen = self._before(stop - 1, row, chosen) if stop else chosen
        return paths

    def _before(self, t: int, row: int, chosen: Tensor) -> Tensor:
        """Return which particles of step t those that go on from it were."""
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


def _completed(emission: Distribution, x: Tensor, counted: Tensor) -> Tensor:
    """Return frames with what is missing drawn from the emission, given what is there."""
    if counted.all():
        return x
    partly = counted.any(-1) & ~counted.all(-1)
    if isinstance(emission, Mixture) and partly.any():
        components = cast(Factorised, emission.component_distribution)
        fits = components.marginal_log_prob(x[:, None], counted[:, None])
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
    return torch.where(counted, x, drawn.to(x))


def _rounded(head: Head, mean: Tensor) -> Tensor:
    """Return a mean with what is binary about it rounded."""
    if isinstance(head, Bernoulli):
        return mean.round()
    return torch.cat([mean[:, :2], mean[:, 2:].round()], -1) if isinstance(head, Pen) else mean


def _advanced(model: VRNN, reads: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Return h of each layer, then c of each layer, a step later."""
    states, layers = list(states), len(model.cells)
    for layer, cell in enumerate(model.cells):
        if isinstance(cell, nn.LSTMCell):
            states[layer], states[layers + layer] = cell(reads, (states[layer], states[layers + layer]))
        else:
            states[layer] = cell(reads, states[layer])
        reads = states[layer]
    return states


def _noise(batch: SequenceBatch, seed: int | None) -> Noise:
    return Noise(batch) if seed is None else Noise.named(batch, seed)


def _mixed(seed: int, place: int) -> int:
    """Return a seed of a seed and a place."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {place}".encode(), digest_size=7).digest())


def _resampled(filtered: Filtered, noise: Noise) -> Particles:
    """Return the particles that a filter goes on with after its last step, drawn anew where that is due."""
    log_weights, state = filtered.log_weights, State(*filtered.states)
    samples, batch = log_weights.shape
    endless = torch.full((batch,), 2**62, device=log_weights.device)
    weights = Weights(endless, log_weights, RESAMPLING)
    draws = noise.uniform_over_time(RESAMPLING.draws(samples))[:, 0].t()
    source = weights.advance(0, torch.zeros_like(log_weights), draws)
    if source is not None:
        state = State(state.h[source], None if state.c is None else state.c[source])
    return Particles(state, weights.log_weights)


def _require(name: str, value: int, least: int = 1) -> None:
    if value < least:
        raise UserError(f"{name} {value}: must be at least {least}")


def _require_shape(name: str, given: Tensor | None, *shape: int) -> None:
    if given is None or given.shape != shape:
        found = "none" if given is None else f"shape {tuple(given.shape)}"
        raise UserError(f"{name}: must have shape {shape}, but got {found}")


def _cut(values: Tensor, lengths: Tensor) -> list[Tensor]:
    return [value[:length] for value, length in zip(values, lengths.tolist(), strict=True)]


def _log_std(scaler: Scaler, counted: Tensor) -> Tensor:
    """Return the logarithm of the scaler's Jacobian at counted values, shape (...)."""
    jacobian: Tensor = (scaler.std.to(counted.device).double().log() * counted).sum(-1)
    return jacobian


def _drawn(log_weights: Tensor, count: int) -> Tensor:
    """Return indices drawn by weights of shape (particles, batch), systematically and in no order: (count, batch)."""
    uniform = torch.rand(1, log_weights.shape[1], device=log_weights.device)
    places = (uniform + torch.arange(count, device=uniform.device)[:, None]) / count
    chosen = torch.searchsorted(
        log_weights.double().softmax(0).cumsum(0).t().contiguous(), places.double().t().contiguous()
    )
    chosen = chosen.clamp(max=len(log_weights) - 1).t()
    return chosen.gather(0, torch.rand(chosen.shape, device=chosen.device).argsort(0))


def _choose(log_weights: Tensor, state: State, count: int) -> State:
    """Return states of particles drawn by their weights, shape (samples, batch), as ``count * batch`` rows."""
    batch = log_weights.shape[1]
    rows = (_drawn(log_weights, count) * batch + torch.arange(batch, device=log_weights.device)).flatten()
    return State(state.h[rows], None if state.c is None else state.c[rows])
