"""Heads for values of a finite set: bits, grey values, quantised sound."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Categorical
from torch.nn import functional as F

from vrnn_lightning.errors import require
from vrnn_lightning.heads.base import Elementwise, Factorised, Head, SampleShape, at_least_float32, require_temperature

__all__ = ["Bernoulli", "DiscretisedLogisticMixture", "MuLaw"]


class Bernoulli(Head):
    r"""Independent binary features, by logits: :math:`P(x_d = 1) = 1 / (1 + e^{-(W f + b)_d})`."""

    likelihood = "mass"
    support = "0 or 1"  # the result is not a likelihood for grey values
    fix = "binarise the data"
    scales_inputs = False  # a rare feature, divided by its small deviation, would dominate the others

    def __init__(self, in_features: int, num_features: int) -> None:
        super().__init__(in_features, num_features)
        self.linear = nn.Linear(in_features, num_features)

    def forward(self, features: Tensor) -> Factorised:
        logits = at_least_float32(self.linear(features))
        return Factorised(BernoulliDistribution(logits=logits, validate_args=False))

    @torch.no_grad()
    def draw(self, features: Tensor, temperature: float = 1.0) -> Tensor:
        require_temperature(temperature)
        logits = at_least_float32(self.linear(features))
        return torch.bernoulli(torch.sigmoid(logits if temperature == 1 else logits / temperature))

    def supports(self, x: Tensor) -> Tensor:
        return (x == 0) | (x == 1)

    def round_mean(self, mean: Tensor) -> Tensor:
        return mean.round()

    @torch.no_grad()
    def init_from_statistics(self, mean: Tensor) -> None:
        """Set the bias to the logit of the training mean, shape (num_features,)."""
        self.linear.bias.copy_(torch.logit(mean.clamp(1e-3, 1 - 1e-3)))


class DiscretisedLogisticMixture(Head):
    r"""Whole numbers of a range, each feature a mixture of logistics cut into bins of width 1.

    .. math:: P(x_d) = \sum_k \pi_{d,k} \left[ \sigma\!\left(\tfrac{x_d + 1/2 - \mu_{d,k}}{s_{d,k}}\right)
        - \sigma\!\left(\tfrac{x_d - 1/2 - \mu_{d,k}}{s_{d,k}}\right) \right]

    The bins at both ends hold the tails beyond them (Salimans et al. 2017, arXiv 1701.05517). Locations and scales are
    computed in units of half the range, so they and the cost do not depend on the number of bits.

    Args:
        components: Number of logistics, K.
        bits: The range holds 2^bits whole numbers.
        lowest: The first of them; -32768 with 16 bits for PCM sound.

    Raises:
        UserError: An option is outside its range.

    >>> DiscretisedLogisticMixture(4, 2)(torch.zeros(3, 4)).log_prob(torch.full((3, 2), 255.0)).shape
    torch.Size([3])
    """

    likelihood = "mass"
    fix = "set bits and lowest to cover the unscaled data"

    def __init__(
        self, in_features: int, num_features: int, components: int = 10, bits: int = 8, lowest: int = 0
    ) -> None:
        super().__init__(in_features, num_features)
        require("components", components, 1, 10_000)
        require("bits", bits, 1, 16)
        require("lowest", lowest, -(2**20), 2**20)
        self.components = components
        self.lowest, self.highest = lowest, lowest + 2**bits - 1
        self.support = f"integers from {self.lowest} to {self.highest}"
        self.linear = nn.Linear(in_features, 3 * num_features * components)

    def forward(self, features: Tensor) -> Factorised:
        raw = at_least_float32(self.linear(features)).unflatten(-1, (3, self.num_features, self.components))
        logits, place, spread = raw.unbind(-3)
        half, centre = (self.highest - self.lowest) / 2, (self.highest + self.lowest) / 2
        loc = centre + half * place
        scale = half * F.softplus(spread) + 1 / 32  # narrower ones fill one bin too
        weights = Categorical(logits=logits, validate_args=False)
        return Factorised(_LogisticBins(weights, loc, scale, self.lowest, self.highest))

    def supports(self, x: Tensor) -> Tensor:
        inside: Tensor = (x >= self.lowest) & (x <= self.highest) & (x == x.floor())
        return inside

    @torch.no_grad()
    def init_from_statistics(self, mean: Tensor) -> None:
        """Set the locations' bias from the training mean, shape (num_features,)."""
        half, centre = (self.highest - self.lowest) / 2, (self.highest + self.lowest) / 2
        places = self.linear.bias.unflatten(0, (3, self.num_features, self.components))[1]
        places.copy_(((mean - centre) / half)[:, None].expand_as(places))


class _LogisticBins(Elementwise):
    """Mixtures of logistics, batch shape (..., features, components) of weights, location and scale, in bins."""

    def __init__(self, weights: Categorical, loc: Tensor, scale: Tensor, lowest: int, highest: int) -> None:
        super().__init__(loc.shape[:-1])
        self.weights, self.loc, self.scale = weights, loc, scale
        self.lowest, self.highest = lowest, highest

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture clipped to the range; rounding moves it by half a bin at most."""
        above, width = (self.loc - self.highest) / self.scale, (self.highest - self.lowest) / self.scale
        wide = torch.log1p(above.sigmoid() * torch.expm1(width.clamp(max=1.0)))
        clipped = torch.where(width < 1, wide, F.softplus(above + width) - F.softplus(above))
        each = (self.lowest + self.scale * clipped).clamp(self.lowest, self.highest)
        return (self.weights.probs * each).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Use s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)) for the logistic function s: exact in both tails."""
        value = value[..., None]
        centred = value - self.loc
        below = F.logsigmoid((centred + 0.5) / self.scale)
        above = F.logsigmoid((0.5 - centred) / self.scale)
        inside = torch.log(-torch.expm1(-1 / self.scale))
        first, last = value <= self.lowest, value >= self.highest
        each = torch.where(last, 0.0, below) + torch.where(first, 0.0, above) + torch.where(first | last, 0.0, inside)
        return torch.logsumexp(each + self.weights.logits.log_softmax(-1), -1)

    @torch.no_grad()
    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        chosen = self.weights.sample(sample_shape)[..., None]
        loc, scale = (p.expand(*chosen.shape[:-1], -1).gather(-1, chosen)[..., 0] for p in (self.loc, self.scale))
        drawn = loc + scale * torch.rand_like(loc).logit()
        return drawn.round().clamp(self.lowest, self.highest)

    def tempered(self, temperature: float) -> _LogisticBins:
        weights = Categorical(logits=self.weights.logits / temperature, validate_args=False)
        return _LogisticBins(weights, self.loc, self.scale * math.sqrt(temperature), self.lowest, self.highest)


class MuLaw(Head):
    r"""Amplitudes from -1 to 1, companded and cut into bins that a softmax weighs: a mass over bins.

    .. math:: F(x) = \mathrm{sign}(x) \frac{\log(1 + \mu |x|)}{\log(1 + \mu)}, \qquad \mu = \mathrm{bins} - 1

    As in WaveNet (van den Oord et al. 2016, arXiv 1609.03499), after ITU-T G.711. An amplitude counts as its bin; a
    draw is the amplitude that its bin decodes to.

    Args:
        bins: Number of bins.

    Raises:
        UserError: ``bins`` is outside 2 to 65536.

    >>> MuLaw(4, 2)(torch.zeros(3, 4)).log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    likelihood = "mass"
    support = "from -1 to 1"
    fix = "scale the amplitudes"

    def __init__(self, in_features: int, num_features: int, bins: int = 256) -> None:
        super().__init__(in_features, num_features)
        require("bins", bins, 2, 65536)
        self.bins = bins
        self.linear = nn.Linear(in_features, num_features * bins)

    def forward(self, features: Tensor) -> Factorised:
        logits = at_least_float32(self.linear(features)).unflatten(-1, (self.num_features, self.bins))
        return Factorised(_Companded(Categorical(logits=logits, validate_args=False)))

    def supports(self, x: Tensor) -> Tensor:
        return x.abs() <= 1


class _Companded(Elementwise):
    """Amplitudes by the bins of their mu-law code."""

    def __init__(self, bins: Categorical) -> None:
        super().__init__(bins.batch_shape)
        self.bins = bins
        self.mu = bins.logits.shape[-1] - 1

    def encode(self, value: Tensor) -> Tensor:
        """Return the index of each amplitude's bin."""
        companded = value.sign() * torch.log1p(self.mu * value.abs()) / math.log1p(self.mu)
        return ((companded + 1) / 2 * self.mu + 0.5).floor().long().clamp(0, self.mu)

    def decode(self, index: Tensor) -> Tensor:
        """Return the amplitude of each bin."""
        companded = 2 * index.to(self.bins.logits.dtype) / self.mu - 1
        amplitude = torch.expm1(companded.abs() * math.log1p(self.mu)) / self.mu
        return companded.sign() * amplitude.clamp(max=1)  # rounding may exceed 1

    @property
    def mean(self) -> Tensor:
        amplitudes = self.decode(torch.arange(self.mu + 1, device=self.bins.logits.device))
        return (self.bins.probs * amplitudes).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        log_mass: Tensor = self.bins.log_prob(self.encode(value))
        return log_mass

    @torch.no_grad()
    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        return self.decode(self.bins.sample(sample_shape))

    def tempered(self, temperature: float) -> _Companded:
        return _Companded(Categorical(logits=self.bins.logits / temperature, validate_args=False))
