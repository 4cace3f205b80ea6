"""What a pass of inference over a batch computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, kl_divergence

from vrnn_lightning.heads import Factorised, Head, log_prob
from vrnn_lightning.recurrence import InferenceSteps, State, log_ratio
from vrnn_lightning.vrnn.equations import Equations

__all__ = ["Trace", "gaussian", "make_trace"]


@dataclass
class Trace:
    """One pass of inference over a batch; every tensor is batch first, with samples * batch rows.

    Args:
        log_px: log p(x_t | z_<=t, x_<t) in nats, zero at padding, shape (batch, time).
        kl: KL of each latent dimension in nats, zero at padding, shape (batch, time, latent).
        mask: True at real steps, shape (batch, time).
        features: What the emission's head reads, shape (batch, time, width); ``None`` if a long pass did not keep it.
        head: The emission's head.
        posterior: q(z_t | x_<=t, z_<t), or ``None`` without a latent.
        prior: p(z_t | x_<t, z_<t), or ``None`` without a latent.
        z: The latents drawn, shape (batch, time, latent).
        state: State after the last real step of each sequence.
        hidden: h_{t-1} of the top layer before each step, shape (batch, time, hidden); ``None`` if a long pass did not
            keep it.
    """

    log_px: Tensor
    kl: Tensor
    mask: Tensor
    features: Tensor | None
    head: Head
    posterior: Factorised | None
    prior: Factorised | None
    z: Tensor
    state: State
    hidden: Tensor | None = None

    @property
    def emission(self) -> Distribution:
        """p(x_t | z_<=t, x_<t), batch shape (batch, time)."""
        assert self.features is not None, "a pass in windows does not keep its emission"
        return cast(Distribution, self.head(self.features))

    @property
    def log_ratio(self) -> Tensor:
        """Log p(z_t | .) - log q(z_t | .) of the latents drawn in nats, zero at padding, shape (batch, time)."""
        if self.prior is None or self.posterior is None:
            return torch.zeros_like(self.log_px)
        return torch.where(self.mask, log_ratio(self.prior, self.posterior, self.z), 0.0)


def gaussian(mean: Tensor, std: Tensor) -> Factorised:
    """Return a Gaussian of independent dimensions, from moments of shape (..., latent)."""
    return Factorised(Normal(mean, std, validate_args=False))


def make_trace(
    model: Equations,
    steps: InferenceSteps,
    x: Tensor,
    mask: Tensor,
    observed: Tensor | None,
    inputs: Tensor | None,
    compiled: bool,
) -> Trace:
    """Return the trace of what the loop computed.

    Args:
        model: The model.
        steps: What the loop computed, time first.
        x: Frames, shape (rows, time, features).
        mask: True at real steps, shape (rows, time).
        observed: True at measured values, shape (rows, time, features).
        inputs: Covariates, shape (rows, time, covariates), if the model reads any.
        compiled: Score with :func:`torch.compile`.
    """
    score = _compiled_score() if compiled else _score
    seen, covariates = (None if part is None else part.transpose(0, 1) for part in (observed, inputs))
    found = score(model, steps, x.transpose(0, 1), mask.t(), seen, covariates)
    features, log_px, *latent = (part.transpose(0, 1) for part in (*found, *(steps.posterior or ()), steps.h))
    head, hidden = model.decoder.head, latent.pop()
    if steps.posterior is None or steps.z is None:
        none = hidden[..., :0]
        return Trace(log_px, none, mask, features, head, None, None, none, steps.state, hidden)
    kl, prior_mean, prior_std, mean, std = latent
    posterior, prior = gaussian(mean, std), gaussian(prior_mean, prior_std)
    z = steps.z.transpose(0, 1)
    return Trace(log_px, kl, mask, features, head, posterior, prior, z, steps.state, hidden)


def _score(
    model: Equations, steps: InferenceSteps, x: Tensor, mask: Tensor, observed: Tensor | None, inputs: Tensor | None
) -> tuple[Tensor, ...]:
    """Score what the loop computed, for all steps at once and time first.

    Returns:
        What the emission's head reads, and log p(x_t | .); with a latent also the KL of each of its dimensions and the
        prior's mean and standard deviation.
    """
    features = steps.emission
    if features is None:
        features = model.emission_features(steps.z_features, steps.h, inputs)
    log_px = torch.where(mask, log_prob(model.decoder.head(features), x, observed), 0.0)
    if steps.posterior is None:
        return features, log_px
    posterior = Normal(*steps.posterior, validate_args=False)
    if steps.prior is None:
        prior = model.prior_dist(steps.h, inputs).base_dist
    else:
        prior = Normal(*steps.prior, validate_args=False)
    kl = torch.where(mask[..., None], kl_divergence(posterior, prior), 0.0)
    return features, log_px, kl, prior.loc, prior.scale


@cache
def _compiled_score() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_score)
