"""Noisy sines whose exact log-likelihood is known: the embedded data set."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vrnn_lightning.errors import UserError

from ._synthetic import ExactDataModule, Lengths, require

__all__ = ["Sines"]


class Sines(ExactDataModule):
    r"""Sines of one frequency in several channels under correlated noise, drawn from a seed; no files.

    .. math::
        x_{t,d} = a_d \cos \omega t + b_d \sin \omega t + \varepsilon_{t,d}, \quad
        a_d, b_d \sim \mathcal N(0, \alpha^2), \quad
        \varepsilon_t \sim \mathcal N\big(0, \sigma^2 [(1 - \rho) I + \rho \mathbf 1 \mathbf 1^\top]\big)

    with :math:`\omega` uniform on a grid of ``frequencies`` values in (0, pi / 2). A sequence's density is a finite
    mixture of Gaussians with low-rank-plus-noise covariances. A network with a diagonal Gaussian output and no latent
    can't express the correlation of the noise: even given frequency and coefficients it loses :attr:`diagonal_loss`
    nats a step.

    Args:
        channels: Features per step, D, at least 3.
        frequencies: Number of frequencies on the grid.
        amplitude: Standard deviation of the coefficients, alpha.
        noise: Standard deviation of the noise, sigma.
        correlation: Correlation of the noise between channels, rho, in [0, 1).
        options: The other options of ``SyntheticDataModule``.

    Raises:
        UserError: An option outside its range.
    """

    noun = "sine"

    def __init__(
        self,
        channels: int = 3,
        *,
        frequencies: int = 8,
        amplitude: float = 1.0,
        noise: float = 0.5,
        correlation: float = 0.9,
        **options: Any,
    ) -> None:
        super().__init__(channels, **options)
        require("channels", channels, 3)
        require("frequencies", frequencies, 1, 1000)
        self.amplitude = require("amplitude", amplitude, 1e-6, 1e6)
        require("noise", noise, 1e-6, 1e6)
        require("correlation", correlation, 0, below=1)
        self.omegas = torch.arange(1, frequencies + 1, dtype=torch.float64) * (math.pi / 2 / (frequencies + 1))
        identity = torch.eye(channels, dtype=torch.float64)
        self.noise_covariance = noise**2 * ((1 - correlation) * identity + correlation)
        if torch.linalg.cholesky_ex(self.noise_covariance).info:
            raise UserError(f"--data.correlation {correlation}: too close to 1 to compute with. Fix: lower it")
        self.diagonal_loss = -0.5 * torch.logdet(self.noise_covariance / noise**2).item()
        """What a diagonal Gaussian loses to the noise's correlation where the rest is known, in nats per step."""

    def draw(self, lengths: Lengths, random: torch.Generator) -> Tensor:
        omega = self.omegas[torch.randint(len(self.omegas), lengths.shape, generator=random)]
        shape = (len(lengths), self.num_features, 2 + self.steps)
        draws = torch.randn(shape, generator=random, dtype=torch.float64)
        waves = self.amplitude * draws[..., :2] @ _basis(omega, self.steps)
        noise = torch.linalg.cholesky(self.noise_covariance) @ draws[..., 2:]
        x: Tensor = (waves + noise).transpose(1, 2)
        return x

    def log_density(self, x: Tensor, valid: Tensor) -> Tensor:
        r"""Return log p(x) of each sequence in nats, shape (batch,).

        Given the frequency, the coefficients c are Gaussian and the sequence is linear in them. With
        :math:`S = I / \alpha^2 + R^{-1} \otimes \Phi \Phi^\top` and :math:`b = R^{-1} X^\top \Phi^\top`, both small
        whatever the length,

        .. math:: \log p(x \mid \omega) = -\tfrac12 \big[T D \log 2\pi + T \log|R| + 2 D \log \alpha^2 + \log|S|
            + \mathrm{tr}(X R^{-1} X^\top) - b^\top S^{-1} b\big]
        """
        mask = valid[..., 0]
        size, steps, channels = x.shape
        precision = torch.linalg.inv(self.noise_covariance)
        basis = _basis(self.omegas, steps) * mask[:, None, None]  # (batch, frequencies, 2, time)
        gram = basis @ basis.mT
        whitened = x @ precision
        b = (basis @ whitened[:, None]).mT.flatten(2)  # ordered by channel, then cosine and sine
        coupling = torch.einsum("de,bkij->bkdiej", precision, gram).reshape(size, -1, 2 * channels, 2 * channels)
        s = coupling + torch.eye(2 * channels, dtype=x.dtype) / self.amplitude**2
        root = torch.linalg.cholesky(s)
        explained = torch.linalg.solve_triangular(root, b[..., None], upper=False).square().sum((-2, -1))
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 4 * channels * math.log(self.amplitude)
        constant = channels * math.log(2 * math.pi) + torch.logdet(self.noise_covariance).item()
        quadratic = (x * whitened).sum((1, 2))[:, None] - explained
        given_frequency = -0.5 * (mask.sum(1, keepdim=True).to(x) * constant + log_det + quadratic)
        density: Tensor = given_frequency.logsumexp(1) - math.log(len(self.omegas))
        return density


def _basis(omega: Tensor, steps: int) -> Tensor:
    """Return cosine and sine, shape (frequencies, 2, steps)."""
    phase = omega[:, None] * torch.arange(steps, dtype=omega.dtype)
    return torch.stack([phase.cos(), phase.sin()], 1)
