"""Jumps up or down, which no single Gaussian describes; their exact log-likelihood is a mixture of two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ._synthetic import ExactDataModule, Floats, Lengths, require

__all__ = ["Jumps"]


class Jumps(ExactDataModule):
    r"""All channels jump up, or all down, in each step, with little noise, drawn from a seed; no files.

    .. math::
        x_t = \rho x_{t-1} + a s_t \mathbf 1 + \varepsilon_t, \quad P(s_t = 1) = P(s_t = -1) = \tfrac12, \quad
        \varepsilon_t \sim \mathcal N\big(0, \sigma^2 [(1 - c) I + c \mathbf 1 \mathbf 1^\top]\big)

    and :math:`x_0 = 0`. Given the past, a step is the even mixture of two Gaussians, whose
    :meth:`exact_log_likelihood` is on average minus :attr:`entropy` a step. The past does not predict the next jump. So
    a network without a latent and with a Gaussian output loses at least :attr:`gaussian_loss` nats a step, and
    :attr:`diagonal_loss` with a diagonal one; a latent can take the place of the jump.

    Args:
        channels: Features per step, D, at least 2.
        memory: How much of a value the next one keeps, rho, from 0 to 1: a random walk.
        jump: Size of a jump, a.
        noise: Standard deviation of the noise, sigma.
        correlation: Correlation of the noise between channels, c, from 0 to 0.99.
        options: The other options of ``SyntheticDataModule``.

    Raises:
        UserError: An option outside its range.

    >>> data = Jumps()
    >>> print(f"{data.entropy:.3f} {data.gaussian_loss:.3f} {data.diagonal_loss:.3f}")
    -0.225 1.132 4.541
    """

    generator = "numpy"

    def __init__(
        self,
        channels: int = 3,
        *,
        memory: float = 0.5,
        jump: float = 1.0,
        noise: float = 0.2,
        correlation: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(channels, **options)
        require("channels", channels, 2)
        self.memory = require("memory", memory, 0, 1)
        self.jump = require("jump", jump, 1e-3, 1e3)
        require("noise", noise, 1e-3, 1e3)
        require("correlation", correlation, 0, 0.99)
        identity = torch.eye(channels, dtype=torch.float64)
        self.noise_covariance = noise**2 * ((1 - correlation) * identity + correlation)
        """Covariance of the noise, R, shape (channels, channels)."""

    def draw(self, lengths: Lengths, random: np.random.Generator) -> Floats:
        root = torch.linalg.cholesky(self.noise_covariance).numpy()
        steps = (lengths.max(), len(lengths))
        signs = random.choice([-self.jump, self.jump], steps)
        moves = signs[..., None] + random.standard_normal((*steps, len(root))) @ root.T
        place = np.zeros(moves.shape[1:])
        return np.stack([place := self.memory * place + move for move in moves], 1)

    def log_density(self, x: Tensor, valid: Tensor) -> Tensor:
        r"""Return log p(x) of each sequence in nats, shape (batch,).

        .. math:: \log p(x) = \sum_t \log \tfrac12 \big[\mathcal N(x_t; \rho x_{t-1} + a \mathbf 1, R)
            + \mathcal N(x_t; \rho x_{t-1} - a \mathbf 1, R)\big]

        with :math:`R` the noise's covariance.
        """
        kept = self.memory * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        up, down = (
            MultivariateNormal(kept + jump, self.noise_covariance).log_prob(x) for jump in (self.jump, -self.jump)
        )
        return (torch.logaddexp(up, down) - math.log(2)).where(valid[..., 0], 0.0).sum(1)

    @property
    def entropy(self) -> float:
        r"""Entropy of a step given the past, in nats.

        It is :math:`\tfrac12 \log|2 \pi e R|` and what the step tells of the jump's sign. Of that
        :math:`\mathbf 1^\top R^{-1} x` tells all: a unit Gaussian around :math:`\pm d` when divided by
        :math:`d^2 / a`, with :math:`d^2 = a^2 \mathbf 1^\top R^{-1} \mathbf 1`. So it is

        .. math:: \log 2 - \mathbb E_{u \sim \mathcal N(0, 1)} \log(1 + e^{-2 d (d + u)})
        """
        d = math.sqrt(self.jump**2 * torch.linalg.inv(self.noise_covariance).sum())
        u = torch.linspace(-12, 12, 4001, dtype=torch.float64)
        weights = torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)
        doubt = float(torch.trapezoid(weights * torch.nn.functional.softplus(-2 * d * (d + u)), u))
        return self._gaussian_entropy(self.noise_covariance) + math.log(2) - doubt

    @property
    def gaussian_loss(self) -> float:
        """What the best Gaussian loses, that of the step's mean and full covariance, in nats per step."""
        return self._gaussian_entropy(self.noise_covariance + self.jump**2) - self.entropy

    @property
    def diagonal_loss(self) -> float:
        """What the best diagonal Gaussian loses, that of the step's mean and variances, in nats per step."""
        variances = (self.noise_covariance + self.jump**2).diagonal()
        return self._gaussian_entropy(torch.diag(variances)) - self.entropy

    @staticmethod
    def _gaussian_entropy(covariance: Tensor) -> float:
        return 0.5 * float(torch.logdet(2 * math.pi * math.e * covariance))
