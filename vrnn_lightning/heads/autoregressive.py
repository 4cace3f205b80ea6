"""The head for binary features that depend on each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.nn import functional as F

from vrnn_lightning.errors import UserError, require
from vrnn_lightning.heads.base import FrameDistribution, SampleShape, at_least_float32
from vrnn_lightning.heads.discrete import Bernoulli
from vrnn_lightning.nn import MaskedLinear
from vrnn_lightning.nn.networks import HashedDropout
from vrnn_lightning.noise import uniform_of

__all__ = ["AutoregressiveBernoulli"]

MEAN_DRAWS = 32


class AutoregressiveBernoulli(Bernoulli):
    r"""Binary features, each given those before it, by a masked network (MADE, Germain et al. 2015, arXiv 1502.03509).

    .. math:: P(x_d = 1 \mid x_{<d}) = \sigma\big((W f + b)_d + v_d^\top h_{\le d}\big), \qquad
        h_{\le d} = \mathrm{ReLU}(A x_{<d} + U f + c)

    One pass scores all features; a draw computes each hidden unit once, after the features that it reads. A frame's
    observed features must be its first ones, all or none. A temperature divides every logit. The mean is estimated
    with 32 draws, the same in every call.

    Args:
        hidden_size: Units H of a hidden layer; unit k reads the first :math:`\lfloor k D / H \rfloor` features.
        layers: Number of hidden layers.
        dropout: Probability of dropping a hidden unit when training scores a frame. The features of the frame decide
            which, so that a recomputed pass and a resumed run drop the same ones.

    Raises:
        UserError: An option is outside its range.

    >>> AutoregressiveBernoulli(4, 6)(torch.zeros(5, 4)).log_prob(torch.zeros(5, 6)).shape
    torch.Size([5])
    """

    def __init__(
        self, in_features: int, num_features: int, hidden_size: int = 256, layers: int = 1, dropout: float = 0.5
    ) -> None:
        super().__init__(in_features, num_features)
        require("hidden_size", hidden_size, 1)
        require("layers", layers, 1)
        self.dropout = require("dropout", dropout, 0, below=1)
        self.starts = [-(-d * hidden_size // num_features) for d in range(num_features + 1)]
        degrees = torch.arange(hidden_size) * num_features // hidden_size  # how many features a unit reads
        columns = torch.arange(num_features)
        self.context = nn.Linear(in_features, hidden_size)
        self.input = MaskedLinear(columns < degrees[:, None], bias=False)
        self.hidden = nn.ModuleList(MaskedLinear(degrees <= degrees[:, None], bias=True) for _ in range(layers - 1))
        self.output = MaskedLinear(degrees <= columns[:, None], bias=False)

    def forward(self, features: Tensor) -> _Autoregressive:  # type: ignore[override]  # another distribution
        shift, logits = (at_least_float32(linear(features)) for linear in (self.context, self.linear))
        kept = self._keep(features) if self.training and self.dropout else None
        return _Autoregressive(self, shift, logits, kept)

    def _keep(self, features: Tensor) -> Tensor:
        """Return the factor of each hidden unit, shape (layers, ..., hidden_size)."""
        shape = (len(self.hidden) + 1, self.context.out_features)
        factors: Tensor = HashedDropout(self.dropout).factors(features, shape[0] * shape[1]).unflatten(-1, shape)
        return factors.movedim(-2, 0)


class _Autoregressive(FrameDistribution):
    """Binary features given those before them.

    The head gives the first hidden layer's sums over its features, shape (..., hidden_size), the logits without the
    network, shape (..., D), and in training the factors of the hidden units, shape (layers, ..., hidden_size).
    """

    def __init__(
        self,
        network: AutoregressiveBernoulli,
        shift: Tensor,
        logits: Tensor,
        kept: Tensor | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(logits.shape)
        self.network, self.shift, self.logits, self.kept, self.temperature = network, shift, logits, kept, temperature

    @property
    def mean(self) -> Tensor:
        """Average of the probabilities given the features before, over draws of these."""
        uniform = uniform_of(torch.arange(MEAN_DRAWS), self.logits.shape[-1], self.logits.dtype).to(self.logits.device)
        shaped = uniform.view(MEAN_DRAWS, *[1] * len(self.batch_shape), -1)
        return self._draw(shaped.expand(-1, *self.logits.shape))[1].mean(0)

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        return mean * (1 - mean)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._conditionals(value).sum(-1)

    def marginal_log_prob(self, value: Tensor, observed: Tensor) -> Tensor:
        """Return the log-likelihood of the observed features, which no missing one of their frame precedes."""
        if (observed[..., 1:] & ~observed[..., :-1]).any():
            fix = "let whole frames be missing, or choose Bernoulli"
            raise UserError(f"AutoregressiveBernoulli: a missing feature precedes an observed one. Fix: {fix}")
        return torch.where(observed, self._conditionals(value.masked_fill(~observed, 0.0)), 0.0).sum(-1)

    def _conditionals(self, value: Tensor) -> Tensor:
        """Return log P(x_d | x_<d), shape (..., D)."""
        h = self.network.input(value) + self.shift
        for layer, linear in enumerate([*self.network.hidden, self.network.output]):
            h = F.relu(h) if self.kept is None else F.relu(h) * self.kept[layer]
            h = linear(h)
        logits = (at_least_float32(h) + self.logits) / self.temperature
        nats: Tensor = BernoulliDistribution(logits=logits, validate_args=False).log_prob(value)
        return nats

    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        return self._draw(torch.rand_like(self.logits.expand(self._extended_shape(sample_shape))))[0]

    @torch.no_grad()
    def _draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return frames and P(x_d = 1 | x_<d) for uniform numbers, all of shape (..., D)."""
        network, x, probs = self.network, torch.zeros_like(uniform), torch.zeros_like(uniform)
        layers: list[Any] = [network.input, *network.hidden]
        shifts = [self.shift, *(linear.bias for linear in layers[1:])]
        hidden = [self.shift.new_zeros(*uniform.shape[:-1], self.shift.shape[-1]) for _ in layers]
        for d, (first, end) in enumerate(pairwise(network.starts)):
            below, reads = x, d
            for linear, shift, h in zip(layers, shifts, hidden, strict=True) if first < end else ():
                products = F.linear(below[..., :reads], linear.weight[first:end, :reads])
                h[..., first:end] = F.relu(products + shift[..., first:end])
                below, reads = h, end
            logit = self.logits[..., d] + F.linear(hidden[-1][..., :end], network.output.weight[d, None, :end])[..., 0]
            probs[..., d] = torch.sigmoid(logit / self.temperature)
            x[..., d] = uniform[..., d] < probs[..., d]
        return x, probs

    def tempered(self, temperature: float) -> _Autoregressive:
        return _Autoregressive(self.network, self.shift, self.logits, self.kept, self.temperature * temperature)
