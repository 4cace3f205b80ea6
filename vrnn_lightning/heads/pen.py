"""The head for pen strokes."""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution
from torch.nn import functional as F

from vrnn_lightning.errors import UserError, require
from vrnn_lightning.heads.base import Head, SampleShape, at_least_float32, require_floor, tempered

__all__ = ["Pen"]


class Pen(Head):
    r"""Pen strokes (dx, dy, lift): a mixture of correlated Gaussians and, given the same features, a Bernoulli.

    .. math:: p(x) = P(\mathrm{lift}) \sum_k \pi_k \, \mathcal N\!\left(\begin{pmatrix} dx \\ dy \end{pmatrix};
        \mu_k, \begin{pmatrix} \sigma_{k,1}^2 & \rho_k \sigma_{k,1} \sigma_{k,2} \\
        \rho_k \sigma_{k,1} \sigma_{k,2} & \sigma_{k,2}^2 \end{pmatrix}\right), \qquad \rho = 0.999 \tanh r

    A density of the offsets times the mass of the lift (Graves 2013, arXiv 1308.0850, eq. 15 to 25).

    Args:
        in_features: Width of the features.
        num_features: Width of the frame; it must be 3.
        components: Number of Gaussians, K.
        min_std: Floor under the standard deviations, in scaled units; it bounds the likelihood.

    Raises:
        UserError: The frames are not pen strokes, or an option is outside its range.

    >>> Pen(4, 3)(torch.zeros(5, 4)).log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    likelihood = "mixed"
    support = "0 or 1"
    fix = "order the features dx, dy, lift"

    def __init__(self, in_features: int, num_features: int, components: int = 20, min_std: float = 1e-4) -> None:
        super().__init__(in_features, num_features)
        if num_features != 3:
            raise UserError(
                f"emission Pen: the data have {num_features} features per step, not the 3 of a pen stroke "
                "(dx, dy, lift). Fix: choose another emission."
            )
        require("components", components, 1, 10_000)
        require_floor("min_std", min_std)
        self.components = components
        self.min_std = min_std
        self.linear = nn.Linear(in_features, 6 * components + 1)

    def forward(self, features: Tensor) -> _PenStroke:
        raw = at_least_float32(self.linear(features))
        weights, mean, spread, bend, lift = raw.split([self.components * n for n in (1, 2, 2, 1)] + [1], -1)
        return _PenStroke(
            Categorical(logits=weights, validate_args=False),
            mean.unflatten(-1, (self.components, 2)),
            F.softplus(spread).unflatten(-1, (self.components, 2)) + self.min_std,
            0.999 * bend.tanh(),  # at 1 the density has no upper bound, and log(1 - rho^2) no gradient
            Bernoulli(logits=lift[..., 0], validate_args=False),
        )

    def supports(self, x: Tensor) -> Tensor:
        is_lift = torch.tensor([False, False, True], device=x.device)
        return ~is_lift | (x == 0) | (x == 1)

    def round_mean(self, mean: Tensor) -> Tensor:
        return torch.cat([mean[..., :2], mean[..., 2:].round()], -1)

    @torch.no_grad()
    def init_from_statistics(self, mean: Tensor) -> None:
        """Set the lift's bias to the logit of its training mean; mean has shape (3,)."""
        self.linear.bias[-1] = torch.logit(mean[2].clamp(1e-3, 1 - 1e-3))


class _PenStroke(Distribution):
    """A mixture of K correlated Gaussians over (dx, dy) and a Bernoulli over lift.

    ``loc`` and ``scale`` have shape (..., K, 2), ``correlation`` (..., K), weights and lift batch shape (...).
    """

    arg_constraints: ClassVar = {}

    def __init__(self, weights: Categorical, loc: Tensor, scale: Tensor, correlation: Tensor, lift: Bernoulli) -> None:
        super().__init__(correlation.shape[:-1], torch.Size([3]), validate_args=False)
        self.weights, self.loc, self.scale = weights, loc, scale
        self.correlation, self.lift = correlation, lift

    @property
    def mean(self) -> Tensor:
        """Expected offsets and the probability of a lift, shape (..., 3)."""
        offsets = (self.weights.probs[..., None] * self.loc).sum(-2)
        return torch.cat([offsets, self.lift.probs[..., None]], -1)

    @property
    def variance(self) -> Tensor:
        """Variance of each feature, shape (..., 3)."""
        around = self.loc - self.mean[..., None, :2]
        offsets = (self.weights.probs[..., None] * (self.scale**2 + around**2)).sum(-2)
        return torch.cat([offsets, self.lift.variance[..., None]], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.marginal_log_prob(value, torch.ones_like(value, dtype=torch.bool))

    def marginal_log_prob(self, value: Tensor, observed: Tensor) -> Tensor:
        """Return the log-likelihood of the observed features alone; missing offsets are integrated out."""
        value = value.masked_fill(~observed, 0.0)
        zx, zy = ((value[..., None, :2] - self.loc) / self.scale).unbind(-1)
        x_known, y_known, lift_known = observed[..., None].unbind(-2)
        rho, rest = self.correlation, 1 - self.correlation**2  # the share of dy's variance that dx leaves
        log_x, log_y = (-self.scale.log() - 0.5 * math.log(2 * math.pi)).unbind(-1)
        log_x = log_x - 0.5 * zx**2
        log_y_given_x = log_y - 0.5 * (zy - rho * zx) ** 2 / rest - 0.5 * rest.log()
        log_y = torch.where(x_known, log_y_given_x, log_y - 0.5 * zy**2)
        each = torch.where(x_known, log_x, 0.0) + torch.where(y_known, log_y, 0.0)
        offsets = torch.logsumexp(each + self.weights.logits.log_softmax(-1), -1)
        return offsets + torch.where(lift_known[..., 0], self.lift.log_prob(value[..., 2]), 0.0)

    @torch.no_grad()
    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        chosen = self.weights.sample(sample_shape)[..., None]
        rho = self.correlation.expand(*chosen.shape[:-1], -1).gather(-1, chosen)
        x, y = torch.randn(2, *chosen.shape, dtype=rho.dtype, device=rho.device)
        z = torch.cat([x, rho * x + (1 - rho**2).sqrt() * y], -1)
        pair = chosen[..., None].expand(*chosen.shape, 2)
        loc, scale = (p.expand(*chosen.shape[:-1], -1, -1).gather(-2, pair)[..., 0, :] for p in (self.loc, self.scale))
        return torch.cat([loc + scale * z, self.lift.sample(sample_shape)[..., None]], -1)

    def tempered(self, temperature: float) -> _PenStroke:
        weights = cast(Categorical, tempered(self.weights, temperature))
        lift = cast(Bernoulli, tempered(self.lift, temperature))
        return _PenStroke(weights, self.loc, self.scale * math.sqrt(temperature), self.correlation, lift)
