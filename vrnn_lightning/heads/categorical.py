"""The head for one-hot features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Categorical as CategoricalDistribution
from torch.nn import functional as F

from vrnn_lightning.errors import UserError, require
from vrnn_lightning.heads.base import FrameDistribution, Head, SampleShape, at_least_float32

__all__ = ["Categorical", "OneHot"]


class Categorical(Head):
    r"""One-hot features: every group of columns has a single 1, at its class, and the groups are independent.

    .. math:: P(x) = \prod_g \sum_k x_{g,k} \, \mathrm{softmax}(W f + b)_{g,k}

    Args:
        groups: Number of one-hot groups of equal width, side by side in the frame.

    Raises:
        UserError: The columns can't be divided into so many groups.

    >>> Categorical(4, 6, groups=2)(torch.zeros(5, 4)).sample().sum(-1)
    tensor([2., 2., 2., 2., 2.])
    """

    likelihood = "mass"
    support = "one-hot"
    fix = "encode each group as a single 1 among zeros"
    scales_inputs = False  # a rare class, divided by its small deviation, would dominate the others

    def __init__(self, in_features: int, num_features: int, groups: int = 1) -> None:
        super().__init__(in_features, num_features)
        require("groups", groups, 1, num_features)
        if num_features % groups:
            raise UserError(f"groups {groups}: {num_features} features can't be divided into groups of equal width")
        self.groups = groups
        self.linear = nn.Linear(in_features, num_features)

    def forward(self, features: Tensor) -> OneHot:
        return OneHot(at_least_float32(self.linear(features)).unflatten(-1, (self.groups, -1)))

    def supports(self, x: Tensor) -> Tensor:
        is_binary = ((x == 0) | (x == 1)).unflatten(-1, (self.groups, -1))
        is_single = x.unflatten(-1, (self.groups, -1)).sum(-1, keepdim=True) == 1
        supported: Tensor = is_binary & (is_single | ~is_binary.all(-1, keepdim=True))
        return supported.flatten(-2)

    def round_mean(self, mean: Tensor) -> Tensor:
        return _one_hot(mean.unflatten(-1, (self.groups, -1)).argmax(-1), mean)

    @torch.no_grad()
    def init_from_statistics(self, mean: Tensor) -> None:
        """Set the bias to the logarithm of the classes' frequencies, shape (num_features,)."""
        self.linear.bias.copy_(mean.clamp(min=1e-3).log())


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    """Return frames (..., groups * classes) of classes (..., groups)."""
    return F.one_hot(index, like.shape[-1] // index.shape[-1]).flatten(-2).to(like.dtype)


class OneHot(FrameDistribution):
    """Independent one-hot groups with unnormalised logits of shape (..., groups, classes)."""

    is_straight_through = True

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits.flatten(-2).shape)
        self.logits = logits.log_softmax(-1)

    @property
    def mean(self) -> Tensor:
        return self.logits.exp().flatten(-2)

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 - self.mean)

    def log_prob(self, value: Tensor) -> Tensor:
        return (value * self.logits.flatten(-2)).sum(-1)

    def marginal_log_prob(self, value: Tensor, observed: Tensor) -> Tensor:
        """Return the log-likelihood of the observed entries: of their 1, or of the classes that their zeros leave."""
        value, observed = (part.unflatten(-1, self.logits.shape[-2:]) for part in (value, observed))
        value = value.masked_fill(~observed, 0.0)
        is_open = ~observed.all(-1) & (value.sum(-1) == 0)
        left = self.logits.masked_fill(observed & is_open[..., None], -torch.inf).logsumexp(-1)
        return torch.where(is_open, left, (value * self.logits).sum(-1)).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        index = CategoricalDistribution(logits=self.logits, validate_args=False).sample(torch.Size(sample_shape))
        return _one_hot(index, self.mean)

    def tempered(self, temperature: float) -> OneHot:
        return OneHot(self.logits / temperature)
