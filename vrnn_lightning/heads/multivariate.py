"""The head for real numbers that are correlated within a frame."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vrnn_lightning.heads.base import FrameDistribution, Head, SampleShape, at_least_float32, require_floor

__all__ = ["MultivariateGaussian"]


class MultivariateGaussian(Head):
    r"""A Gaussian with full covariance, by the regression of each feature on those before it.

    .. math:: x_d \mid x_{<d} \sim \mathcal N\Big(\mu_d + \sum_{e<d} A_{d,e} (x_e - \mu_e),\ \sigma_d^2\Big), \qquad
        \Sigma^{-1} = (I - A)^\top \mathrm{diag}(\sigma^{-2}) (I - A)

    The Cholesky factor of the precision (Williams 1996, Using neural networks to model conditional multivariate
    densities). The head has D (D + 3) / 2 outputs, so it is for frames of tens of features.

    Args:
        min_std: Floor under the standard deviations given the features before, in scaled units.

    Raises:
        UserError: The floor is not positive.

    >>> MultivariateGaussian(4, 3)(torch.zeros(5, 4)).log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    def __init__(self, in_features: int, num_features: int, min_std: float = 1e-4) -> None:
        super().__init__(in_features, num_features)
        require_floor("min_std", min_std)
        self.linear = nn.Linear(in_features, num_features * (num_features + 3) // 2)
        self.min_std = min_std

    def forward(self, features: Tensor) -> _MultivariateGaussian:
        D = self.num_features
        mean, spread, below = at_least_float32(self.linear(features)).split([D, D, D * (D - 1) // 2], -1)
        rows, columns = torch.tril_indices(D, D, -1, device=below.device)
        weights = below.new_zeros(*below.shape[:-1], D, D)
        weights[..., rows, columns] = below
        return _MultivariateGaussian(mean, weights, F.softplus(spread) + self.min_std)


class _MultivariateGaussian(FrameDistribution):
    """A Gaussian by its mean (..., D), regression weights (..., D, D) and residual standard deviations (..., D)."""

    def __init__(self, loc: Tensor, weights: Tensor, scale: Tensor) -> None:
        super().__init__(loc.shape)
        self.loc, self.weights, self.scale = loc, weights, scale

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.factor.square().sum(-1)

    @property
    def factor(self) -> Tensor:
        """The lower triangular L with covariance L L^T."""
        return self._solve(torch.diag_embed(self.scale))

    def _solve(self, x: Tensor) -> Tensor:
        """Return (I - A)^-1 x for x of shape (..., D, columns)."""
        solved: Tensor = torch.linalg.solve_triangular(-self.weights, x, upper=False, unitriangular=True)
        return solved

    def log_prob(self, value: Tensor) -> Tensor:
        centred = value - self.loc
        z = (centred - (self.weights @ centred[..., None])[..., 0]) / self.scale
        return -(0.5 * z.square() + self.scale.log() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def marginal_log_prob(self, value: Tensor, observed: Tensor) -> Tensor:
        """Return the log-likelihood of the observed features, as if missing ones were independent."""
        centred = (value - self.loc).masked_fill(~observed, 0.0)
        rows = torch.cat([self.factor * observed[..., None], torch.diag_embed((~observed).to(centred))], -1)
        upper = torch.linalg.qr(rows.mT).R  # covariance R^T R, without the squares that a Cholesky factor loses
        z = torch.linalg.solve_triangular(upper.mT, centred[..., None], upper=False)[..., 0]
        each = 0.5 * z.square() + upper.diagonal(dim1=-2, dim2=-1).abs().log() + 0.5 * math.log(2 * math.pi)
        nats: Tensor = torch.where(observed, each, 0.0).sum(-1)  # missing ones have z = 0 and a factor of 1
        return -nats

    @torch.no_grad()
    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        noise = self.scale * self.loc.new_empty(self._extended_shape(sample_shape)).normal_()
        return self.loc + self._solve(noise[..., None])[..., 0]

    def tempered(self, temperature: float) -> _MultivariateGaussian:
        return _MultivariateGaussian(self.loc, self.weights, self.scale * math.sqrt(temperature))
