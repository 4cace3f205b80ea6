"""Latents: the families of prior and posterior, how z_t is drawn of noise, and the KL between the two."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from vrnn_lightning.errors import UserError, require
from vrnn_lightning.heads.base import Factorised, at_least_float32
from vrnn_lightning.heads.categorical import OneHot
from vrnn_lightning.heads.continuous import FiniteLaplace, Gaussian, Laplace

__all__ = [
    "CategoricalLatent", "GaussianLatent", "LaplaceLatent", "Latent", "StandardPrior",
    "gaussian",
]  # fmt: skip


def gaussian(mean: Tensor, std: Tensor) -> Factorised:
    """Return a Gaussian of independent dimensions, from moments of shape (..., latent)."""
    return Factorised(Normal(mean, std, validate_args=False))


class Latent(ABC):
    """A kind of latent: the family of the posterior, its reparameterised draw, and its KL from a prior.

    The time loop keeps a posterior as its parameters, one tensor each, and makes the distribution of them again. To add
    a latent, write a subclass; its arguments after ``size`` become options of the command line.

    Args:
        size: Numbers of z_t.
    """

    family: ClassVar[str]
    """Distribution that the encoder returns, for messages."""
    has_closed_kl: ClassVar[bool] = True
    """Whether the KL from its own prior network has a closed form."""
    is_straight_through: ClassVar[bool] = False
    """Whether a draw's gradient is not that of its distribution, whose class has the attribute as well: importance-
    weighted bounds then use reweighted wake-sleep."""
    can_be_residual: ClassVar[bool] = False
    """Whether the prior's mean can be added to the posterior's."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.noise_size = size
        """Standard normal numbers that a draw takes."""

    @abstractmethod
    def head(self, in_features: int, size: int) -> Any:
        """Return the encoder's head, which maps features, shape (..., in_features), to a distribution of the family."""

    def prior_head(self, in_features: int, size: int) -> Any:
        """Return the head of the prior network, by default one like the encoder's."""
        return self.head(in_features, size)

    def standard(self, zeros: Tensor) -> Distribution:
        """Return the prior of a model without a prior network, batch shape (...), from zeros, shape (..., size)."""
        return gaussian(zeros, torch.ones_like(zeros))

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

    def draw(self, prior: Distribution, noise: Tensor) -> Tensor:
        """Return a draw from a prior, shape (..., size), which the noise decides if the prior is of this family."""
        return self.rsample(prior, noise) if self.is_own(prior) else prior.sample()

    def each_log_prob(self, dist: Distribution, z: Tensor) -> Tensor:
        """Return log p(z) in nats: of each dimension, shape (..., size), or of z_t as a whole, shape (..., 1)."""
        if isinstance(dist, Independent):
            return cast(Tensor, dist.base_dist.log_prob(z))
        return dist.log_prob(z)[..., None]

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


class StandardPrior(nn.Module):
    """The prior of a model without a prior network, N(0, I) for a Gaussian (VRNN-I in Chung et al. 2015)."""

    def __init__(self, latent: Latent) -> None:
        super().__init__()
        self.latent = latent

    def forward(self, features: Tensor) -> Distribution:
        """Return it with the batch shape of the features, shape (..., width)."""
        return self.latent.standard(features.new_zeros(*features.shape[:-1], self.latent.size))


class _LocationScale(Latent):
    """A latent of independent dimensions with a location and a scale."""

    kind: ClassVar[type[Distribution]]
    """The distribution of one dimension."""

    @property
    def widths(self) -> tuple[int, ...]:
        return self.size, self.size

    def is_own(self, dist: Distribution) -> bool:
        return isinstance(dist, Independent) and isinstance(dist.base_dist, self.kind)

    def parameters(self, dist: Distribution) -> tuple[Tensor, ...]:
        base = dist.base_dist  # type: ignore[attr-defined]  # an Independent
        return base.loc, base.scale


class GaussianLatent(_LocationScale):
    r"""A Gaussian with independent dimensions: :math:`z = \mu + \sigma \epsilon` (Chung et al. 2015, eq. 5 and 9).

    Args:
        size: Numbers of z_t.
        min_std: Floor under the standard deviation; 0 for none.
        scale: The standard deviation as a function of the network's output s, without the floor: "softplus" for
            log(1 + e^s), "exp" for e^s, "exp_half" for e^(s/2), where s is the logarithm of the variance.
        separate: Heads have one linear map for the mean, ``mean``, and another, ``std``, as many published models do.

    Raises:
        UserError: An option is outside its range.
    """

    family = "Independent(Normal(mean, std), 1)"
    kind = Normal
    can_be_residual = True

    def __init__(
        self,
        size: int,
        min_std: float = 1e-4,
        scale: Literal["softplus", "exp", "exp_half"] = "softplus",
        separate: bool = False,
    ) -> None:
        super().__init__(size)
        self.min_std = require("latent.min_std", min_std, 0, below=math.inf)
        if scale not in ("softplus", "exp", "exp_half"):
            raise UserError(f"latent.scale {scale!r}: must be one of softplus, exp, exp_half")
        self.scale, self.separate = scale, separate

    def head(self, in_features: int, size: int) -> Any:
        if self.scale != "softplus" or self.separate:
            return _GaussianHead(in_features, self)
        head = Gaussian(in_features, size)
        head.min_std = self.min_std  # 0 is allowed: only the likelihood of data needs a floor
        return head

    def dist(self, *parameters: Tensor) -> Factorised:
        return gaussian(*parameters)

    def rsample(self, posterior: Distribution, noise: Tensor) -> Tensor:
        return posterior.mean + posterior.stddev * noise


class _GaussianHead(nn.Module):
    """The head of a Gaussian whose scale or linear maps are not those that the time loop compiles."""

    def __init__(self, in_features: int, latent: GaussianLatent) -> None:
        super().__init__()
        self.num_features, self.scale, self.min_std = latent.size, latent.scale, latent.min_std
        names = {"mean": 1, "std": 1} if latent.separate else {"linear": 2}
        self.maps = tuple(names)
        for name, count in names.items():
            self.add_module(name, nn.Linear(in_features, count * latent.size))

    def forward(self, features: Tensor) -> Factorised:
        raw = torch.cat([getattr(self, name)(features) for name in self.maps], -1)
        mean, spread = at_least_float32(raw).chunk(2, -1)
        if self.scale == "softplus":
            return gaussian(mean, nn.functional.softplus(spread) + self.min_std)
        return gaussian(mean, (spread if self.scale == "exp" else spread / 2).exp() + self.min_std)


class LaplaceLatent(_LocationScale):
    r"""A Laplace distribution with independent dimensions.

    Args:
        size: Numbers of z_t.
        min_scale: Floor under the scale.

    Raises:
        UserError: The floor is not positive.
    """

    family = "Independent(Laplace(loc, scale), 1)"
    kind = torch.distributions.Laplace

    def __init__(self, size: int, min_scale: float = 1e-4) -> None:
        super().__init__(size)
        self.min_scale = min_scale

    def head(self, in_features: int, size: int) -> Any:
        return Laplace(in_features, size, self.min_scale)

    def standard(self, zeros: Tensor) -> Distribution:
        return self.dist(zeros, torch.ones_like(zeros))

    def dist(self, *parameters: Tensor) -> Factorised:
        loc, scale = parameters
        return Factorised(FiniteLaplace(loc, scale, validate_args=False))

    def rsample(self, posterior: Distribution, noise: Tensor) -> Tensor:
        loc, scale = self.parameters(posterior)
        tail = torch.special.log_ndtr(-noise.abs()) + math.log(2)  # log P(|noise| or more), at most 0
        drawn: Tensor = loc - scale * noise.sign() * tail
        return drawn


class CategoricalLatent(Latent):
    r"""One-hot groups with straight-through gradients (Hafner et al. 2021, DreamerV2, arXiv 2010.02193).

    .. math:: z = \mathrm{onehot}\big(\arg\max_c (\log \pi_c + g_c)\big) + \pi - \mathrm{stop}(\pi), \qquad
        g_c = -\log(-\log \Phi(\epsilon_c)), \quad \pi = (1 - u)\, \mathrm{softmax}(s) + u / C

    The KL is that of each group. IWAE and FIVO do without straight-through gradients, see
    :func:`~vrnn_lightning.recurrence.log_ratio`.

    Args:
        size: Numbers of z_t, groups times classes.
        classes: Classes of each group, C.
        unimix: Share of the uniform distribution in the probabilities, u (Hafner et al. 2023, arXiv 2301.04104).

    Raises:
        UserError: An option is outside its range, or the size is not a multiple of the classes.
    """

    family = "OneHot(logits)"
    is_straight_through = True

    def __init__(self, size: int, classes: int = 8, unimix: float = 0.01) -> None:
        super().__init__(size)
        self.classes, self.unimix = require("latent.classes", classes, 2), require("latent.unimix", unimix, 0, 1)
        if size % classes:
            raise UserError(f"latent_size {size}: must be a multiple of latent.classes, {classes}")

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.size,)

    def head(self, in_features: int, size: int) -> Any:
        return _CategoricalHead(in_features, self)

    def standard(self, zeros: Tensor) -> Distribution:
        return self.dist(zeros)

    def is_own(self, dist: Distribution) -> bool:
        return isinstance(dist, OneHot) and dist.logits.shape[-2:] == (self.size // self.classes, self.classes)

    def parameters(self, dist: Distribution) -> tuple[Tensor, ...]:
        return (cast(OneHot, dist).logits.flatten(-2),)

    def dist(self, *parameters: Tensor) -> Distribution:
        return OneHot(parameters[0].unflatten(-1, (-1, self.classes)))

    def rsample(self, posterior: Distribution, noise: Tensor) -> Tensor:
        logits, probs = cast(OneHot, posterior).logits, posterior.mean
        gumbel = -(-torch.special.log_ndtr(noise.unflatten(-1, (-1, self.classes)))).log()
        drawn = (logits + gumbel).argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, drawn, 1.0).flatten(-2) + (probs - probs.detach())

    def each_log_prob(self, dist: Distribution, z: Tensor) -> Tensor:
        if not isinstance(dist, OneHot):
            return super().each_log_prob(dist, z)
        each: Tensor = z.unflatten(-1, (-1, self.classes))
        return (each * dist.logits).sum(-1)

    def closed_kl(self, posterior: Distribution, prior: Distribution) -> Tensor | None:
        """Return the KL of each group in nats, shape (..., groups); ``None`` from a prior of another family."""
        if not (isinstance(posterior, OneHot) and isinstance(prior, OneHot)):
            return None
        return (posterior.logits.exp() * (posterior.logits - prior.logits)).sum(-1)


class _CategoricalHead(nn.Module):
    def __init__(self, in_features: int, latent: CategoricalLatent) -> None:
        super().__init__()
        self.num_features, self.classes, self.unimix = latent.size, latent.classes, latent.unimix
        self.linear = nn.Linear(in_features, latent.size)

    def forward(self, features: Tensor) -> OneHot:
        raw = at_least_float32(self.linear(features)).unflatten(-1, (-1, self.classes))
        return OneHot(((1 - self.unimix) * raw.softmax(-1) + self.unimix / self.classes).log() if self.unimix else raw)
