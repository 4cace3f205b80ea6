"""Heads for counts: non-negative integers."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Gamma
from torch.nn import functional as F

from vrnn_lightning.heads.base import Elementwise, Factorised, Head, SampleShape, at_least_float32
from vrnn_lightning.heads.gamma import inverse_softplus, log_gamma_ratio, log_softplus

__all__ = ["NegativeBinomial", "Poisson"]


class _CountHead(Head):
    likelihood = "mass"
    support = "integers of at least 0"
    fix = "leave counts unscaled"

    def supports(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x == x.floor()) & torch.isfinite(x)


class Poisson(_CountHead):
    r"""Independent counts of mean rate :math:`\lambda`.

    .. math:: P(x_d) = e^{-\lambda_d} \lambda_d^{x_d} / x_d!, \qquad \lambda = \log(1 + e^{W f + b})

    The rate grows linearly, so training can't overflow it; its logarithm stays exact where the rate underflows.

    >>> Poisson(4, 2)(torch.zeros(3, 4)).log_prob(torch.ones(3, 2)).shape
    torch.Size([3])
    """

    def __init__(self, in_features: int, num_features: int) -> None:
        super().__init__(in_features, num_features)
        self.linear = nn.Linear(in_features, num_features)

    def forward(self, features: Tensor) -> Factorised:
        raw = at_least_float32(self.linear(features))
        return Factorised(_Poisson(raw))

    @torch.no_grad()
    def init_from_statistics(self, mean: Tensor) -> None:
        """Set the rate's bias from the training mean, shape (num_features,)."""
        self.linear.bias.copy_(inverse_softplus(mean.clamp(min=1e-3)))


class NegativeBinomial(_CountHead):
    r"""Independent counts whose variance exceeds their mean: a Poisson whose rate is drawn from a Gamma.

    .. math:: P(x_d) = \frac{\Gamma(x_d + r_d)}{\Gamma(r_d)\, x_d!}
        \left(\frac{r_d}{r_d + m_d}\right)^{r_d} \left(\frac{m_d}{r_d + m_d}\right)^{x_d}, \qquad
        m, r = \log(1 + e^{W f + b})

    The mean is m and the variance m + m² / r; as r grows, it becomes the :class:`Poisson`.

    >>> NegativeBinomial(4, 2)(torch.zeros(3, 4)).log_prob(torch.ones(3, 2)).shape
    torch.Size([3])
    """

    def __init__(self, in_features: int, num_features: int) -> None:
        super().__init__(in_features, num_features)
        self.linear = nn.Linear(in_features, 2 * num_features)

    def forward(self, features: Tensor) -> Factorised:
        mean, size = at_least_float32(self.linear(features)).chunk(2, -1)
        return Factorised(_NegativeBinomial(mean, F.softplus(size) + 1e-4))

    @torch.no_grad()
    def init_from_statistics(self, mean: Tensor) -> None:
        """Set the mean's bias from the training mean, shape (num_features,)."""
        self.linear.bias[: self.num_features].copy_(inverse_softplus(mean.clamp(min=1e-3)))


def _wide(x: Tensor) -> Tensor:
    """Return float64 where the device has it: large counts cancel all digits of float32."""
    return x if x.device.type == "mps" else x.double()


class _Counts(Elementwise):
    """Counts whose mean is softplus(raw); ``excess`` is the variance over the mean, and how slowly the tail falls."""

    def __init__(self, raw: Tensor) -> None:
        super().__init__(raw.shape)
        self.raw = raw

    @property
    def mean(self) -> Tensor:
        return F.softplus(self.raw)

    @property
    @abstractmethod
    def excess(self) -> Tensor: ...

    @property
    def variance(self) -> Tensor:
        return self.mean * self.excess

    def tempered(self, temperature: float) -> _Tempered:
        return _Tempered(self, temperature)


class _Poisson(_Counts):
    @property
    def excess(self) -> Tensor:
        return torch.ones_like(self.raw)

    def log_prob(self, value: Tensor) -> Tensor:
        raw, count = _wide(self.raw), _wide(value)
        log_mass: Tensor = count * log_softplus(raw) - F.softplus(raw) - torch.lgamma(count + 1)
        return log_mass.to(self.raw.dtype)

    @torch.no_grad()
    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        return torch.poisson(self.mean.expand(self._extended_shape(sample_shape)))


class _NegativeBinomial(_Counts):
    def __init__(self, raw: Tensor, size: Tensor) -> None:
        super().__init__(raw)
        self.size = size

    @property
    def excess(self) -> Tensor:
        return 1 + self.mean / self.size

    def log_prob(self, value: Tensor) -> Tensor:
        raw, size, count = _wide(self.raw), _wide(self.size), _wide(value)
        log_excess = torch.log1p(F.softplus(raw) / size)
        placed = log_gamma_ratio(size, count) - torch.lgamma(count + 1)
        return (placed + count * (log_softplus(raw) - log_excess) - size * log_excess).to(self.raw.dtype)

    @torch.no_grad()
    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        rate = Gamma(self.size, torch.ones_like(self.size), validate_args=False).sample(torch.Size(sample_shape))
        return torch.poisson(rate * (self.mean / self.size))


class _Tempered(Elementwise):
    r"""Counts by :math:`p(x)^{1/T} / \sum_{x'} p(x')^{1/T}`, summed over at most 65537 counts around the mean."""

    def __init__(self, counts: _Counts, temperature: float) -> None:
        super().__init__(counts.batch_shape)
        self.counts, self.temperature = counts, temperature
        hot = max(temperature, 1.0)
        reach = 30 + 30 * hot * counts.excess + 12 * (hot * counts.variance).sqrt()
        width = int(reach.max().clamp(max=2.0**15))
        first = (counts.mean - width).floor().clamp(min=0)
        steps = torch.arange(2 * width + 1, dtype=first.dtype, device=first.device)
        self.grid = first + steps.reshape(-1, *[1] * first.dim())
        logits = counts.log_prob(self.grid) / temperature
        self.log_total = logits.logsumexp(0)
        self.weights = (logits - self.log_total).exp()

    @property
    def mean(self) -> Tensor:
        return (self.weights * self.grid).sum(0)

    @property
    def variance(self) -> Tensor:
        return (self.weights * (self.grid - self.mean) ** 2).sum(0)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.counts.log_prob(value) / self.temperature - self.log_total

    @torch.no_grad()
    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        drawn = Categorical(self.weights.movedim(0, -1), validate_args=False).sample(sample_shape)
        counts: Tensor = self.grid[0] + drawn
        return counts

    def tempered(self, temperature: float) -> _Tempered:
        return _Tempered(self.counts, self.temperature * temperature)
