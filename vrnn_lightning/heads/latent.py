"""The contract of latents: which distributions prior and posterior are, how z_t is drawn, and what the KL is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from vrnn_lightning.errors import UserError
from vrnn_lightning.heads.base import Factorised

__all__ = ["GaussianLatent", "Latent", "StandardNormal", "gaussian"]


def gaussian(mean: Tensor, std: Tensor) -> Factorised:
    """Return a Gaussian of independent dimensions, from moments of shape (..., latent)."""
    return Factorised(Normal(mean, std, validate_args=False))


class StandardNormal(nn.Module):
    """The prior N(0, I), whatever came before (VRNN-I in Chung et al. 2015).

    Args:
        latent_size: Dimensions of z_t.
    """

    def __init__(self, latent_size: int) -> None:
        super().__init__()
        self.latent_size = latent_size

    def forward(self, features: Tensor) -> Factorised:
        """Return it with the batch shape of the features, shape (..., width)."""
        zeros = features.new_zeros(*features.shape[:-1], self.latent_size)
        return gaussian(zeros, torch.ones_like(zeros))


class Latent(ABC):
    """A kind of latent: the family of the posterior, its reparameterised draw, and its KL from a prior.

    The time loop keeps a posterior as its parameters, one tensor each, and makes the distribution of them again.

    Args:
        size: Numbers of z_t.
    """

    family: ClassVar[str]
    """Distribution that the encoder returns, for messages."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.noise_size = size
        """Standard normal numbers that a draw takes."""

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """Width of each parameter."""

    @abstractmethod
    def is_own(self, dist: Distribution) -> bool:
        """Return whether a distribution is of this family, so that its parameters define it."""

    @abstractmethod
    def parameters(self, dist: Distribution) -> tuple[Tensor, ...]:
        """Return the parameters of a distribution of this family, each (..., width)."""

    def posterior_parameters(self, posterior: Distribution) -> tuple[Tensor, ...]:
        """Return the parameters of what an encoder returned, each (..., width).

        Raises:
            UserError: It is of another family.
        """
        if not (isinstance(posterior, Distribution) and self.is_own(posterior)):
            got = type(getattr(posterior, "base_dist", posterior)).__name__
            raise UserError(
                f"encoder: returned {got}, but the latent is {type(self).__name__}. "
                f"Fix: return {self.family} or choose another latent"
            )
        return self.parameters(posterior)

    @abstractmethod
    def dist(self, *parameters: Tensor) -> Distribution:
        """Return the distribution with some parameters, batch shape (...), event shape (size,)."""

    @abstractmethod
    def rsample(self, posterior: Distribution, noise: Tensor) -> Tensor:
        """Return the draw that standard normal noise, shape (..., noise_size), decides, shape (..., size)."""

    def kl(self, posterior: Distribution, prior: Distribution, z: Tensor) -> Tensor:
        r"""Return the KL in nats: of each dimension, shape (..., size), or of z_t as a whole, shape (..., 1).

        Where a pair of families has no closed form it is estimated as :math:`\log q(z) - \log p(z)` at the draw.

        Args:
            posterior: q(z_t | x_<=t, z_<t).
            prior: p(z_t | x_<t, z_<t).
            z: The draw, shape (..., size).
        """
        closed = self.closed_kl(posterior, prior)
        return self.sampled_kl(posterior, prior, z) if closed is None else closed

    @staticmethod
    def sampled_kl(posterior: Distribution, prior: Distribution, z: Tensor) -> Tensor:
        """Return log q(z) - log p(z) in nats, shape (..., 1), an unbiased estimate of the KL."""
        estimate: Tensor = (posterior.log_prob(z) - prior.log_prob(z))[..., None]
        return estimate

    def closed_kl(self, posterior: Distribution, prior: Distribution) -> Tensor | None:
        """Return the KL of each dimension in nats, shape (..., size); ``None`` where it has no closed form."""
        if not (isinstance(posterior, Independent) and isinstance(prior, Independent)):
            return None
        try:
            return kl_divergence(posterior.base_dist, prior.base_dist)
        except NotImplementedError:
            return None


class GaussianLatent(Latent):
    r"""A Gaussian with independent dimensions: :math:`z = \mu + \sigma \epsilon` (Chung et al. 2015, eq. 5 and 9)."""

    family = "Independent(Normal(mean, std), 1)"

    @property
    def widths(self) -> tuple[int, ...]:
        return self.size, self.size

    def is_own(self, dist: Distribution) -> bool:
        return isinstance(dist, Independent) and isinstance(dist.base_dist, Normal)

    def parameters(self, dist: Distribution) -> tuple[Tensor, ...]:
        base = dist.base_dist  # type: ignore[attr-defined]  # an Independent
        return base.loc, base.scale

    def dist(self, *parameters: Tensor) -> Factorised:
        return gaussian(*parameters)

    def rsample(self, posterior: Distribution, noise: Tensor) -> Tensor:
        return posterior.mean + posterior.stddev * noise
