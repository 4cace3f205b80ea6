"""The contract of heads, distributions over frames, their marginals and their temperature."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import singledispatch
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, MixtureSameFamily, Normal

from vrnn_lightning.compatibility import keep_old_hooks
from vrnn_lightning.errors import UserError
from vrnn_lightning.nn import NetworkFactory, feature_width

__all__ = [
    "Elementwise", "Factorised", "FrameDistribution", "Head", "Mixture", "Network", "SampleShape", "at_least_float32",
    "log_prob", "require_floor", "require_temperature", "tempered",
]  # fmt: skip

SampleShape = torch.Size | list[int] | tuple[int, ...]


class Elementwise(Distribution):
    """A distribution of single numbers, batch shape (..., features), for :class:`Factorised` to join to frames.

    Subclasses have ``log_prob``, ``sample``, ``mean`` and ``tempered``. Their ``log_prob`` is finite at padding and at
    unobserved values too, so arguments are not validated.
    """

    arg_constraints: ClassVar = {}

    def __init__(self, batch_shape: torch.Size) -> None:
        super().__init__(batch_shape, validate_args=False)


class FrameDistribution(Distribution):
    """A distribution over frames of a shape (..., features): event shape (features,)."""

    arg_constraints: ClassVar = {}

    def __init__(self, shape: SampleShape) -> None:
        super().__init__(torch.Size(shape[:-1]), torch.Size(shape[-1:]), validate_args=False)


class Factorised(Independent):
    """A distribution over a frame whose features are independent: event shape (features,)."""

    def __init__(self, base: Distribution) -> None:
        super().__init__(base, 1, validate_args=False)

    def marginal_log_prob(self, value: Tensor, observed: Tensor) -> Tensor:
        """Return the log-likelihood of the observed features alone.

        Args:
            value: Frames, shape (..., features); values at unobserved features are ignored.
            observed: True where a feature was measured, shape (..., features).

        Returns:
            Nats, shape (...).
        """
        value = value.masked_fill(~observed, 0.0)  # a NaN there would reach the gradient
        return torch.where(observed, self.base_dist.log_prob(value), 0.0).sum(-1)

    def tempered(self, temperature: float) -> Factorised:
        """Return the distribution with each feature at a temperature, see :func:`tempered`."""
        return Factorised(tempered(self.base_dist, temperature))


class Mixture(MixtureSameFamily):
    """A mixture of :class:`Factorised` components that share one weight vector per frame: event shape (features,)."""

    def __init__(self, weights: Categorical, components: Factorised) -> None:
        super().__init__(weights, components, validate_args=False)

    def marginal_log_prob(self, value: Tensor, observed: Tensor) -> Tensor:
        """Return the log-likelihood of the observed features alone, as :meth:`Factorised.marginal_log_prob` does."""
        components = cast(Factorised, self.component_distribution)
        each = components.marginal_log_prob(value[..., None, :], observed[..., None, :])
        return torch.logsumexp(each + self.mixture_distribution.logits.log_softmax(-1), -1)

    def tempered(self, temperature: float) -> Mixture:
        """Return the mixture with its weights and its components at a temperature, see :func:`tempered`."""
        weights = cast(Categorical, tempered(self.mixture_distribution, temperature))
        return Mixture(weights, cast(Factorised, tempered(self.component_distribution, temperature)))


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
        raise UserError(
            f"{type(distribution).__name__} has no likelihood for missing values. Fix: choose another emission."
        )
    return cast(Tensor, distribution.marginal_log_prob(value, observed))


def tempered(distribution: Distribution, temperature: float) -> Distribution:
    r"""Return a distribution of the same kind, sharper below temperature 1 and flatter above.

    The result is the normalised :math:`p(x)^{1/T}` where that is of the same kind: logits of binary features, bins and
    mixture weights are divided by T, and a Gaussian's variance is multiplied by T. The variance of other densities, of
    each component of a mixture and of a flow's base is multiplied by T as well, and autoregressive features are
    tempered one by one, each given those before it: a proper distribution with an exact density, but not the power.

    Args:
        distribution: What a head returned, or a part of it.
        temperature: T; 1 returns the distribution itself.

    Raises:
        UserError: The temperature is not positive, or the distribution has none.

    >>> sharp = tempered(Normal(torch.zeros(2), torch.ones(2)), 0.25)
    >>> sharp.stddev
    tensor([0.5000, 0.5000])
    """
    require_temperature(temperature)
    return distribution if temperature == 1 else _tempered(distribution, temperature)


@singledispatch
def _tempered(distribution: Distribution, temperature: float) -> Distribution:
    if not hasattr(distribution, "tempered"):
        raise UserError(f"{type(distribution).__name__} has no temperature. Fix: use 1 or choose another emission.")
    return cast(Distribution, distribution.tempered(temperature))


@_tempered.register
def _(distribution: Normal, temperature: float) -> Normal:
    return Normal(distribution.loc, distribution.scale * math.sqrt(temperature), validate_args=False)


@_tempered.register
def _(distribution: Bernoulli, temperature: float) -> Bernoulli:
    return Bernoulli(logits=distribution.logits / temperature, validate_args=False)


@_tempered.register
def _(distribution: Categorical, temperature: float) -> Categorical:
    return Categorical(logits=distribution.logits / temperature, validate_args=False)


class Head(nn.Module, ABC):
    """A module that maps features (..., in_features) to a Distribution over frames (..., num_features).

    To add an emission, write one subclass; its keyword arguments become options of the command line. Parameters of the
    distribution are computed in float32 or better, also under autocast.

    Args:
        in_features: Width of the features.
        num_features: Width of the frame, D.
    """

    likelihood: Literal["density", "mass", "mixed"] = "density"
    """Kind of number that ``log_prob`` is the logarithm of; "mixed" if features differ in it."""
    scales_inputs: bool | Tensor = True
    """Whether phi_x reads values divided by the data's standard deviation, or values that are only centred: for all
    features, or for each, shape (num_features,)."""

    support: str = "numbers"
    """Description of the values that have a probability, for messages."""
    fix: str = "fix the data"
    """The user's remedy for other values, for messages."""

    def __init__(self, in_features: int, num_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_features = num_features

    @abstractmethod
    def forward(self, features: Tensor) -> Distribution:
        """Return the distribution with batch shape (...) and event shape (num_features,)."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Accept hooks under their old names; a subclass with its own distribution draws from that one."""
        super().__init_subclass__(**options)
        keep_old_hooks(cls, {"start_from": "init_from_statistics", "cure": "fix"})
        if "forward" in vars(cls) and "draw" not in vars(cls):
            cls.draw = Head.draw  # type: ignore[method-assign]  # an inherited draw knows another distribution

    @torch.no_grad()
    def draw(self, features: Tensor, temperature: float = 1.0) -> Tensor:
        """Draw frames, shape (..., num_features), as the distribution at a temperature would from the same generator.

        Override it to draw without creating distributions: generation calls it at every step.

        Args:
            features: Shape (..., in_features).
            temperature: See :func:`tempered`.
        """
        return tempered(self(features), temperature).sample()

    def supports(self, x: Tensor) -> Tensor:
        """Return True at values that have a probability.

        Args:
            x: Frames, shape (..., num_features).
        """
        return torch.ones_like(x, dtype=torch.bool)

    def check(self, x: Tensor, valid: Tensor) -> None:
        """Raise if data are outside the distribution's support.

        Args:
            x: Frames, shape (..., num_features).
            valid: True at real, measured values, shape (..., num_features).

        Raises:
            UserError: A value has no probability.
        """
        wrong = valid & ~self.supports(x)
        if not wrong.any():
            return
        feature = int(wrong.flatten(0, -2).any(0).nonzero()[0])
        values, head = x[..., feature][valid[..., feature]], self.head_of(feature)
        fix = vars(head).get("cure", head.fix)  # its old name
        raise UserError(
            f"emission {type(self).__name__}: feature {feature} has values from {values.min():.6g} to "
            f"{values.max():.6g}, not {head.support}. Fix: {fix} or choose another emission."
        )

    def head_of(self, feature: int) -> Head:
        """Return the head that scores a feature: itself, or a part of a composed head."""
        return self

    def round_mean(self, mean: Tensor) -> Tensor:
        """Return the frame that represents a mean, shape (..., num_features): binary features are rounded."""
        return mean

    @torch.no_grad()
    def init_from_statistics(self, mean: Tensor) -> None:
        """Set biases from the data's mean, shape (num_features,); heads for scaled data do nothing."""

    start_from = init_from_statistics
    cure = fix


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require_floor(option: str, value: float) -> None:
    """Raise if ``value`` is not a positive, finite standard deviation."""
    if not 0 < value < math.inf:
        raise UserError(f"{option} {value}: must be positive, or the likelihood has no upper bound")


def require_temperature(temperature: float) -> None:
    """Raise if a temperature is not positive and finite."""
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature {temperature}: must be positive; 1 keeps the distribution")


HeadT = TypeVar("HeadT", bound=Head)


class Network(nn.Module, Generic[HeadT]):
    """A network and the head that reads it: features (..., in_features) to a Distribution.

    Args:
        in_features: Width of the input.
        network: Called with the width of the input, returns the network.
        head: Called with (in_features, num_features), returns the head.
        num_features: Width of the frame.
        part: Its name in messages.
    """

    def __init__(
        self,
        in_features: int,
        network: NetworkFactory,
        head: Callable[[int, int], HeadT],
        num_features: int,
        *,
        part: str = "a network",
    ) -> None:
        super().__init__()
        self.body = network(in_features)
        self.head = head(feature_width(self.body, in_features, part), num_features)

    def forward(self, features: Tensor) -> Distribution:
        """Return the distribution with batch shape (...) and event shape (num_features,)."""
        return cast(Distribution, self.head(self.body(features)))
