"""Heads: modules whose forward maps features to a torch Distribution over a frame.

To add an emission, write one subclass of :class:`Head`; its keyword arguments become options of the command line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal
from torch.nn import functional as F

from vrnn_lightning.errors import UserError
from vrnn_lightning.nn import MLP, Layers

__all__ = ["Bernoulli", "Factorised", "Gaussian", "GaussianMixture", "Head", "Mixture", "Network", "log_prob"]


class Factorised(Independent):
    """A distribution over a frame whose features are independent: event shape (features,)."""

    def __init__(self, base: Distribution) -> None:
        super().__init__(base, 1, validate_args=False)

    def marginal_log_prob(self, value: Tensor, observed: Tensor) -> Tensor:
        """Return the log-likelihood of the observed features alone.

        Args:
            value: Frames, shape (..., features); what stands at unobserved features does not count.
            observed: True where a feature was measured, shape (..., features).

        Returns:
            Nats, shape (...).
        """
        return torch.where(observed, self.base_dist.log_prob(value), 0.0).sum(-1)


class Mixture(MixtureSameFamily):
    """A mixture of :class:`Factorised` components that share one weight vector per frame: event shape (features,)."""

    def __init__(self, weights: Categorical, components: Factorised) -> None:
        super().__init__(weights, components, validate_args=False)

    def marginal_log_prob(self, value: Tensor, observed: Tensor) -> Tensor:
        """Return the log-likelihood of the observed features alone.

        Args:
            value: Frames, shape (..., features); what stands at unobserved features does not count.
            observed: True where a feature was measured, shape (..., features).

        Returns:
            Nats, shape (...).
        """
        components = cast(Factorised, self.component_distribution)
        each = components.marginal_log_prob(value[..., None, :], observed[..., None, :])
        return torch.logsumexp(each + self.mixture_distribution.logits.log_softmax(-1), -1)


def log_prob(distribution: Distribution, value: Tensor, observed: Tensor | None = None) -> Tensor:
    """Return log p(value), or of its observed part, in nats, shape (...).

    Args:
        distribution: What a head returned; event shape (features,).
        value: Frames, shape (..., features).
        observed: True where a feature was measured, shape (..., features), or ``None`` for everywhere.

    Raises:
        UserError: Values are missing, and the distribution has no ``marginal_log_prob``.
    """
    if observed is None:
        return distribution.log_prob(value)
    if not hasattr(distribution, "marginal_log_prob"):
        raise UserError(f"{type(distribution).__name__} can't leave out missing values; choose another emission")
    return cast(Tensor, distribution.marginal_log_prob(value, observed))


class Head(nn.Module, ABC):
    """A module that maps features (..., in_features) to a Distribution over frames (..., num_features).

    Parameters of the distribution are computed in float32 or better, also under autocast.

    Args:
        in_features: Width of the features.
        num_features: Width of the frame, D.
    """

    def __init__(self, in_features: int, num_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_features = num_features

    @abstractmethod
    def forward(self, features: Tensor) -> Distribution:
        """Return the distribution with batch shape (...) and event shape (num_features,)."""

    def check(self, x: Tensor, counted: Tensor) -> None:  # most densities take every number
        """Refuse data outside the distribution's support.

        Args:
            x: Frames, shape (..., num_features).
            counted: True at real, measured values, shape (..., num_features).

        Raises:
            UserError: A value has no probability; the message names its feature and range.
        """

    @torch.no_grad()
    def start_from(self, mean: Tensor) -> None:
        """Let biases start from the data's mean, shape (num_features,), so that training need not find it.

        Heads for scaled data have nothing to do.
        """


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Gaussian(Head):
    r"""A Gaussian with diagonal covariance.

    .. math:: \mu, s = W f + b, \qquad \sigma = \log(1 + e^s) + \sigma_\mathrm{min}

    Args:
        in_features: Width of the features.
        num_features: Width of the frame, D.
        min_std: Floor under the standard deviation, in scaled units; without one a likelihood has no upper bound.

    >>> head = Gaussian(4, 2)
    >>> head(torch.zeros(3, 4)).log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    def __init__(self, in_features: int, num_features: int, min_std: float = 1e-4) -> None:
        super().__init__(in_features, num_features)
        if not min_std > 0:
            raise UserError(f"min_std {min_std}: must be positive, or the likelihood can grow without bound")
        self.linear = nn.Linear(in_features, 2 * num_features)
        self.min_std = min_std

    def moments(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each (..., D), from the linear map's output (..., 2 D)."""
        mean, spread = _at_least_float32(raw).chunk(2, -1)
        return mean, F.softplus(spread) + self.min_std

    def forward(self, features: Tensor) -> Factorised:
        """Return the Gaussian with batch shape (...) and event shape (num_features,)."""
        return Factorised(Normal(*self.moments(self.linear(features)), validate_args=False))


class GaussianMixture(Head):
    r"""A mixture of Gaussians with diagonal covariance and one weight vector for the frame (Chung et al. 2015, GMM).

    .. math:: p(x) = \sum_k \pi_k \prod_d \mathcal N(x_d; \mu_{k,d}, \sigma_{k,d}^2)

    Args:
        in_features: Width of the features.
        num_features: Width of the frame, D.
        components: Number of Gaussians, K.
        min_std: Floor under the standard deviations, in scaled units; without one a likelihood has no upper bound.

    >>> head = GaussianMixture(4, 2, components=3)
    >>> head(torch.zeros(5, 4)).log_prob(torch.zeros(5, 2)).shape
    torch.Size([5])
    """

    def __init__(self, in_features: int, num_features: int, components: int = 20, min_std: float = 1e-4) -> None:
        super().__init__(in_features, num_features)
        if components < 1:
            raise UserError(f"components {components}: a mixture needs at least 1")
        self.components = components
        self.weights = nn.Linear(in_features, components)
        self.gaussians = Gaussian(in_features, components * num_features, min_std)

    def forward(self, features: Tensor) -> Mixture:
        """Return the mixture with batch shape (...) and event shape (num_features,)."""
        weights = Categorical(logits=_at_least_float32(self.weights(features)), validate_args=False)
        shape = (self.components, self.num_features)
        mean, std = self.gaussians.moments(self.gaussians.linear(features))
        components = Normal(mean.unflatten(-1, shape), std.unflatten(-1, shape), validate_args=False)
        return Mixture(weights, Factorised(components))


class Bernoulli(Head):
    r"""Independent binary features, by logits: :math:`P(x_d = 1) = 1 / (1 + e^{-(W f + b)_d})`.

    Args:
        in_features: Width of the features.
        num_features: Width of the frame, D.
    """

    def __init__(self, in_features: int, num_features: int) -> None:
        super().__init__(in_features, num_features)
        self.linear = nn.Linear(in_features, num_features)

    def forward(self, features: Tensor) -> Factorised:
        """Return the distribution with batch shape (...) and event shape (num_features,)."""
        logits = _at_least_float32(self.linear(features))
        return Factorised(BernoulliDistribution(logits=logits, validate_args=False))

    def check(self, x: Tensor, counted: Tensor) -> None:
        """Refuse values that are neither 0 nor 1: what a Bernoulli says of others is no likelihood.

        Args:
            x: Frames, shape (..., num_features).
            counted: True at real, measured values, shape (..., num_features).

        Raises:
            UserError: The message names the feature and its range.
        """
        wrong = counted & (x != 0) & (x != 1)
        if not wrong.any():
            return
        feature = int(wrong.flatten(0, -2).any(0).nonzero()[0])
        values = x[..., feature][counted[..., feature]]
        raise UserError(
            f"emission Bernoulli: feature {feature} has values from {values.min():.4g} to {values.max():.4g}, "
            "not 0 and 1 alone; binarise the data or choose another emission"
        )

    @torch.no_grad()
    def start_from(self, mean: Tensor) -> None:
        """Set the bias to the logit of the training mean, shape (num_features,)."""
        self.linear.bias.copy_(torch.logit(mean.clamp(1e-3, 1 - 1e-3)))


HeadT = TypeVar("HeadT", bound=Head)


class Network(nn.Module, Generic[HeadT]):
    """A multilayer perceptron and the head that reads it: features (..., in_features) to a Distribution.

    Args:
        in_features: Width of the input.
        layers: Size of the perceptron.
        head: Called with (in_features, num_features), returns the head.
        num_features: Width of the frame.
    """

    def __init__(self, in_features: int, layers: Layers, head: Callable[[int, int], HeadT], num_features: int) -> None:
        super().__init__()
        self.body = MLP(in_features, layers)
        self.head = head(self.body.out_features, num_features)

    def forward(self, features: Tensor) -> Distribution:
        """Return the distribution with batch shape (...) and event shape (num_features,)."""
        return cast(Distribution, self.head(self.body(features)))
