"""What training maximises: pure functions of a trace's terms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["elbo"]


def elbo(
    log_px: Tensor,
    kl: Tensor,
    steps: Tensor,
    beta: float = 1.0,
    free_bits: float = 0.0,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    r"""Return the training objective, summed over the batch, in nats.

    .. math:: \sum_t \log p(x_t \mid \cdot) - \beta \sum_j \max\Big(\sum_t \mathrm{KL}_{t,j},\; \lambda N\Big)

    with N the number of real steps in the global batch: a latent dimension j whose KL averages less than
    :math:`\lambda` nats per step costs the same as one with :math:`\lambda`, and is not pressed further
    (free bits, Kingma et al. 2016, arXiv 1606.04934, sec. 5.2 with groups of one dimension).
    With ``beta=1, free_bits=0`` it is the ELBO.

    Args:
        log_px: Zero at padding, shape (batch, time).
        kl: Zero at padding, shape (batch, time, latent).
        steps: Number of real steps in this process's batch, shape ().
        beta: Weight of the KL.
        free_bits: Nats per step and latent dimension that cost nothing to use, :math:`\lambda`.
        total: Sums a tensor over processes (without gradient); the mean that is held against ``free_bits`` is global.

    >>> log_px, kl = torch.tensor([[-1.0, -2.0]]), torch.tensor([[[0.5], [0.1]]])
    >>> round(elbo(log_px, kl, torch.tensor(2)).item(), 4)
    -3.6
    >>> round(elbo(log_px, kl, torch.tensor(2), free_bits=1.0).item(), 4)
    -5.0
    """
    per_dim = kl.sum((0, 1))
    if free_bits > 0:
        count = steps.to(kl)
        below = total(per_dim.detach().clone()) < free_bits * total(count.clone())
        per_dim = torch.where(below, free_bits * count, per_dim)
    return log_px.sum() - beta * per_dim.sum()
