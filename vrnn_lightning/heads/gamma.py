"""Gamma functions and softplus in forms that keep their digits in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["inverse_softplus", "log_gamma_ratio", "log_softplus"]


def log_softplus(x: Tensor) -> Tensor:
    """Return log(log(1 + exp(x))), which approaches x far below zero, where softplus underflows."""
    far = -15.0
    near = F.softplus(x.clamp(min=far)).log()
    return torch.where(x < far, x - x.clamp(max=far).exp() / 2, near)


def inverse_softplus(y: Tensor) -> Tensor:
    """Return the x with log(1 + exp(x)) = y, for positive y."""
    return y + torch.log(-torch.expm1(-y))


def log_gamma_ratio(a: Tensor, b: Tensor) -> Tensor:
    r"""Return log Γ(a + b) - log Γ(a) - b log a, which vanishes as a grows, for a > 0 and b >= 0.

    Stirling's series, used from a = 16 on, avoids the difference of two large numbers.

    >>> log_gamma_ratio(torch.tensor([1.0, 1e6]), torch.tensor(3.0)).exp().round(decimals=4)  # 3! / 0!, 1
    tensor([6., 1.])
    """
    far = 16.0
    small, large = a.clamp(max=far), a.clamp(min=far)
    direct = torch.lgamma(small + b) - torch.lgamma(small) - b * small.log()
    series = (large + b - 0.5) * torch.log1p(b / large) - b + _stirling(large + b) - _stirling(large)
    return torch.where(a < far, direct, series)


def _stirling(x: Tensor) -> Tensor:
    """Return log Γ(x) - ((x - 1/2) log x - x + log(2 pi) / 2), for x of 16 or more."""
    inverse = 1 / x
    square = inverse * inverse
    terms = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)
    total = torch.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        total = total * square + term
    return total * inverse
