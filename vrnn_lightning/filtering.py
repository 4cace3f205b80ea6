"""The particle filter: an unbiased estimate of a likelihood from any model that can take a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vrnn_lightning.errors import UserError

__all__ = ["Filtered", "Resampling", "Step", "particle_filter", "resample"]

Step = Callable[[int, tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Resampling:
    """When and how particles are drawn anew.

    Args:
        scheme: "multinomial", independent draws; "systematic", one draw for all, of less variance
            (Douc & Cappé 2005).
        threshold: Resample where the effective sample size is below this share of the particles; 1 always, 0 never.
        gradient: Let the gradient account for the choice of ancestors (Maddison et al. 2017): that of the
            expected bound, unbiased at threshold 1, and of a variance that usually spoils training. Only for
            "multinomial", whose draws have a density.
    """

    scheme: Literal["multinomial", "systematic"] = "systematic"
    threshold: float = 0.5
    gradient: bool = False

    def __post_init__(self) -> None:
        """Refuse what can't be done."""
        if self.scheme not in ("multinomial", "systematic"):
            raise UserError(f"resampling {self.scheme!r}: choose 'multinomial' or 'systematic'")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold {self.threshold}: is a share of the particles, between 0 and 1")
        if self.gradient and self.scheme != "multinomial":
            raise UserError(
                f"resampling_gradient: {self.scheme} draws have no density; choose resampling 'multinomial'"
            )


class Filtered(NamedTuple):
    """What a particle filter found of each sequence.

    Args:
        log_likelihood: log of the unbiased estimate of p(x) in nats, shape (batch,).
        effective_samples: Effective sample size of the weights before each resampling, mean over the real steps,
            shape (batch,).
        final_effective_samples: The same of the last real step alone, shape (batch,).
    """

    log_likelihood: Tensor
    effective_samples: Tensor
    final_effective_samples: Tensor


def resample(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    r"""Draw ancestors in proportion to weights.

    Args:
        log_weights: Of K particles, normalised or not, shape (K, batch).
        uniforms: Numbers in [0, 1): shape (K, batch) for independent draws, (1, batch) for systematic ones, at
            :math:`(u + k) / K`.

    Returns:
        Indices of particles, shape (K, batch).

    >>> resample(torch.tensor([[0.25], [0.0], [0.75]]).log(), torch.tensor([[0.5]])).flatten().tolist()
    [0, 2, 2]
    """
    count = len(log_weights)
    cumulative = log_weights.double().softmax(0).cumsum(0).t().contiguous()
    positions = uniforms.double()
    if len(uniforms) == 1:
        positions = (positions + torch.arange(count, device=uniforms.device)[:, None]) / count
    scaled = positions.t() * cumulative[:, -1:]
    return torch.searchsorted(cumulative, scaled.contiguous(), right=True).clamp(max=count - 1).t()


def particle_filter(
    step: Step,
    states: tuple[Tensor, ...],
    lengths: Tensor,
    particles: int,
    steps: int,
    resampling: Resampling | None,
    uniform: Callable[[int], Tensor],
) -> Filtered:
    r"""Estimate a likelihood with weighted particles (Maddison et al. 2017, arXiv 1705.09279).

    .. math::
        \hat p(x_{1:T}) = \prod_t \sum_k \bar w_{t-1}^k \alpha_t^k, \qquad
        \bar w_t^k \propto \bar w_{t-1}^k \alpha_t^k

    with :math:`\bar w = 1 / K` at first and after each resampling. :math:`\mathbb E \hat p = p`, so the expected
    log-likelihood is a lower bound. Without resampling it is the importance-weighted bound (Burda et al. 2016).
    Each sequence resamples when its own weights ask for it, and only among its real steps.

    Args:
        step: Called with the time t and the states; returns the log of the increments
            :math:`\alpha_t = p(x_t, z_t \mid \cdot) / q(z_t \mid \cdot)`, shape (particles, batch), and the new
            states.
        states: Any tensors whose first dimension is particles * batch; row ``k * batch + i`` is particle k of
            sequence i.
        lengths: Real steps of each sequence, shape (batch,).
        particles: K.
        steps: Length of the longest sequence.
        resampling: When and how; ``None`` never.
        uniform: Called with a number n, returns fresh numbers in [0, 1), shape (batch, n).
    """
    batch = len(lengths)
    rows = torch.arange(batch, device=lengths.device)
    even = -math.log(particles)
    weights = evidence = states[0].new_full((particles, batch), even)
    total = ess_sum = states[0].new_zeros(batch)
    ess = torch.full_like(ess_sum, particles)
    chosen: list[tuple[Tensor, Tensor]] = []  # log-probability of the ancestors, and evidence up to then
    for t in range(steps):
        increments, states = step(t, states)
        real = t < lengths
        evidence = weights + torch.where(real, increments.to(weights.dtype), 0.0)
        gained = evidence.logsumexp(0)
        total = total + gained
        weights = evidence - gained
        with torch.no_grad():
            ess = torch.where(real, (-(2 * weights).logsumexp(0)).exp(), ess)
            ess_sum = ess_sum + torch.where(real, ess, 0.0)
            due = real & (t + 1 < lengths)
        if resampling is None or particles == 1:
            continue
        due = due & (ess <= resampling.threshold * particles * (1 + 1e-4))
        draws = uniform(particles if resampling.scheme == "multinomial" else 1).t()
        if not due.any():
            continue
        ancestors = resample(weights.detach(), draws)
        if resampling.gradient:
            chosen.append((torch.where(due, weights.gather(0, ancestors).sum(0), 0.0), total.detach()))
        ancestors = torch.where(due, ancestors, torch.arange(particles, device=ancestors.device)[:, None])
        source = (ancestors * batch + rows).flatten()
        states = tuple(s.index_select(0, source) for s in states)
        weights = torch.where(due, even, weights)
    final = total.detach()
    for score, before in chosen:
        total = total + (score - score.detach()) * (final - before)  # adds nothing but its gradient
    return Filtered(total, ess_sum / lengths.clamp(min=1), ess)
