"""Sequences followed frame by frame, and the distribution of the next frame."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from vrnn_lightning.data import Scaler
from vrnn_lightning.errors import UserError, require
from vrnn_lightning.filtering import select_by_weight
from vrnn_lightning.heads import log_prob
from vrnn_lightning.heads.base import SampleShape, at_least_float32
from vrnn_lightning.inference.checks import log_std, require_shape
from vrnn_lightning.recurrence import State, Stream, draw_frames, repeat_rows
from vrnn_lightning.vrnn import VRNN

__all__ = ["Predictive", "Session", "Step", "upcoming"]


def upcoming(model: VRNN, hidden: Tensor, inputs: Tensor | None, noise: Tensor) -> Tensor:
    """Return what the emission of step t+1 reads, shape (rows, width), with z_{t+1} drawn from the prior.

    Args:
        model: The model.
        hidden: h_t of the top layer, shape (rows, hidden).
        inputs: Covariates of step t+1, shape (rows, covariates), if the model reads any.
        noise: Standard normal noise, shape (rows, latent).
    """
    inputs = cast(Tensor, inputs).to(hidden) if model.num_inputs else None
    z = model.latent.draw(model.prior_dist(hidden, inputs), noise.to(hidden)) if model.latent_size else noise
    return model.emission_features(model.extract_z(z.to(hidden)), hidden, inputs)


class Predictive(Distribution):
    r"""The distribution of a frame, given all before it: a mixture of emissions, in data units.

    .. math:: p(x_{t+1} \mid x_{\le t}) \approx \sum_k \bar w_t^k \frac 1 M \sum_m
        p(x_{t+1} \mid z_{t+1}^{k,m}, h_t^k), \qquad z_{t+1}^{k,m} \sim p(z_{t+1} \mid h_t^k)

    Batch shape (batch,), event shape (features,). Nothing is computed before it is asked for.

    Args:
        head: Maps features to an emission in scaled units.
        num_features: Width of a frame.
        features: The head's input for each component, shape (batch, components, width).
        log_weights: Normalised log-weights of the components, shape (batch, components).
        scaler: Between data units and the model's.
    """

    arg_constraints: ClassVar = {}

    def __init__(
        self,
        head: Callable[[Tensor], Distribution],
        num_features: int,
        features: Tensor,
        log_weights: Tensor,
        scaler: Scaler,
    ) -> None:
        super().__init__(log_weights.shape[:1], torch.Size([num_features]), validate_args=False)
        self._head, self._features, self._scaler = head, features, scaler
        self.log_weights = log_weights

    @cached_property
    @torch.no_grad()
    def components(self) -> Distribution:
        """The emissions, batch shape (batch, components), in scaled units."""
        return self._head(self._features)

    @property
    def mean(self) -> Tensor:
        """The mean, shape (batch, features)."""
        return self._scaler.unscale(self._average(self.components.mean))

    @property
    def variance(self) -> Tensor:
        """The variance, shape (batch, features); a NotImplementedError if the emission has none."""
        each = self.components.mean
        around = (each - self._average(each)[:, None]).square()
        return self._average(self.components.variance + around) * self._scaler.std.to(each).square()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-likelihood of frames, shape (..., batch, features), without values that are NaN."""
        missing = value.isnan()
        return self.marginal_log_prob(value, ~missing if missing.any() else None)

    def marginal_log_prob(self, value: Tensor, observed: Tensor | None) -> Tensor:
        """Return the log-likelihood of the observed features in nats and data units, shape (..., batch).

        Args:
            value: Frames, shape (..., batch, features); values at unobserved features are ignored.
            observed: True where a feature was measured, shape (..., batch, features); ``None`` for everywhere.
        """
        scaled = self._scaler.scale(value.double()).to(self._features)
        each = log_prob(self.components, scaled[..., None, :], None if observed is None else observed[..., None, :])
        valid = torch.ones_like(value, dtype=torch.bool) if observed is None else observed
        return (each + self.log_weights).logsumexp(-1) - log_std(self._scaler, valid).to(each)

    @torch.no_grad()
    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        """Draw frames, shape ``(*sample_shape, batch, features)``."""
        chosen = Categorical(logits=self.log_weights, validate_args=False).sample(torch.Size(sample_shape))
        rows = torch.arange(len(self._features), device=chosen.device)
        return self._scaler.unscale(draw_frames(self._head, self._features[rows, chosen]))

    def _average(self, each: Tensor) -> Tensor:
        """Return the weighted mean over components of values of shape (batch, components, features)."""
        return (self.log_weights.exp()[..., None] * each).sum(1)


class Step:
    """A session after one frame: the frame's score, and what forecasts need; it stays valid as the session continues.

    Args:
        nats: An estimate of log p(x_t | x_<t) in nats and data units, shape (batch,); zeros before the first frame.
        state: State of the particles, of samples * batch rows; row ``k * batch + i`` is particle k of sequence i.
        log_weights: Normalised log-weights of the particles, shape (samples, batch).
        model: The model.
        scaler: Between data units and the model's.
    """

    def __init__(self, nats: Tensor, state: State, log_weights: Tensor, model: VRNN, scaler: Scaler) -> None:
        self.nats, self.state, self.log_weights = nats, state, log_weights
        self._model, self._scaler = model, scaler

    @torch.no_grad()
    def next(self, draws: int = 1, inputs: Tensor | None = None, noise: Tensor | None = None) -> Predictive:
        """Return p(x_{t+1} | x_<=t), a mixture over the particles and over draws of z_{t+1} from each one's prior.

        It is exact without a latent; with one, more particles and draws bring it closer.

        Args:
            draws: Draws of z_{t+1} for each particle.
            inputs: Covariates of step t+1, shape (batch, covariates), if the model reads any.
            noise: Standard normal noise for the draws, shape (draws * samples * batch, latent), row
                ``(m * samples + k) * batch + i`` for draw m of particle k of sequence i; drawn if not given.

        Raises:
            UserError: No draws, or a tensor is missing or has another shape.
        """
        require("draws", draws, 1)
        model, (samples, batch) = self._model, self.log_weights.shape
        draws = draws if model.latent_size else 1
        rows = draws * samples * batch
        if model.num_inputs:
            require_shape("inputs of the next step", inputs, batch, model.num_inputs)
            inputs = repeat_rows(cast(Tensor, inputs), draws * samples)
        if noise is None:
            noise = torch.randn(rows, model.latent.noise_size)
        require_shape("noise of the next step", noise, rows, model.latent.noise_size)
        features = upcoming(model, repeat_rows(self.state.h[:, -1], draws), inputs, noise)
        features = features.unflatten(0, (draws * samples, batch)).transpose(0, 1)
        log_weights = self.log_weights.repeat(draws, 1).t().to(at_least_float32(features)) - math.log(draws)
        return Predictive(model.emission_head, model.num_features, features, log_weights, self._scaler)

    @torch.no_grad()
    def forecast(
        self, steps: int = 1, samples: int = 100, temperature: float = 1.0, inputs: Tensor | None = None
    ) -> Tensor:
        """Draw paths that continue the sequences, in data units, shape (samples, batch, steps, features).

        Each path starts from a particle drawn by its weight.

        Args:
            steps: Length of a path.
            samples: Paths of each sequence.
            temperature: Temperature of the emission.
            inputs: Covariates of the paths, shape (batch, steps, covariates), if the model reads any.

        Raises:
            UserError: No steps or samples, or not the covariates that the model reads.
        """
        require("steps", steps, 1)
        require("samples", samples, 1)
        state = select_by_weight(self.log_weights, self.state, samples)
        inputs = None if inputs is None else repeat_rows(inputs.to(state.h), samples)
        paths = self._model.generate(steps, state=state, inputs=inputs, temperature=temperature).x
        return cast(Tensor, self._scaler.unscale(paths).unflatten(0, (samples, self.log_weights.shape[1])))


class Session:
    """Sequences followed frame by frame, in data units, with the scores of a pass over the whole sequences.

    Args:
        stream: The sequences so far, in scaled units.
        model: The model.
        scaler: Between data units and the model's.

    >>> from vrnn_lightning import VRNNLightningModule
    >>> session = VRNNLightningModule(num_features=3).session(batch_size=2, samples=4)
    >>> step = session.step(torch.zeros(2, 3))
    >>> step.nats.shape, step.next(draws=8).mean.shape, step.forecast(steps=5, samples=10).shape
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
        """The last :meth:`step`; before the first one, the start, whose ``next()`` is p(x_1)."""
        return Step(self._nats, self._stream.state, self._stream.log_weights, self._model, self._scaler)

    def step(
        self, x: Tensor, observed: Tensor | None = None, inputs: Tensor | None = None, noise: Tensor | None = None
    ) -> Step:
        """Take the next frame of each sequence; return its score and the distribution of the next frame.

        Args:
            x: Frames in data units, shape (batch, features).
            observed: True at measured values, shape (batch, features); where x is not NaN if not given.
            inputs: Covariates, shape (batch, covariates), if the model reads any.
            noise: Standard normal noise, shape (samples * batch, latent); drawn if not given.

        Raises:
            UserError: A tensor is missing or has another shape, or a measured value is not a number.
        """
        model = self._model
        require_shape("x", x, self._stream.batch, model.num_features)
        x = x.to(model.input_mean.device)
        if observed is not None and observed.dtype != torch.bool:
            raise UserError(f"observed: must be torch.bool, True where a value was measured, but got {observed.dtype}")
        if model.num_inputs and inputs is not None and not inputs.isfinite().all():
            raise UserError("inputs: holds a value that is not a number. Fix: correct it")
        observed = None if observed is None else observed.to(x.device)
        if not x.sum().isfinite():
            observed = ~x.isnan() if observed is None else observed
            require_shape("observed", observed, *x.shape)
            if not x[observed].isfinite().all():
                raise UserError("x: holds a value that is not a number. Fix: correct it, or give NaN if it is missing")
        nats = self._stream.step(self._scaler.scale(x.double()), observed, inputs, noise)
        jacobian = self._jacobian if observed is None else log_std(self._scaler, observed)
        self._nats = nats - jacobian.to(nats)
        return self.now
