"""The particle filter: an unbiased estimate of a likelihood from any model that can take a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vrnn_lightning.errors import UserError

__all__ = [
    "Filtered",
    "Move",
    "Resampling",
    "Step",
    "Weights",
    "effective_samples",
    "evidence",
    "particle_filter",
    "resample",
]

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

    def draws(self, particles: int) -> int:
        """Return how many uniform numbers one resampling of a sequence takes."""
        return particles if self.scheme == "multinomial" else 1


class Filtered(NamedTuple):
    """What a particle filter found of each sequence.

    Args:
        log_likelihood: log of the unbiased estimate of p(x) in nats, shape (batch,).
        effective_samples: Effective sample size of the weights before each resampling, mean over the real steps,
            shape (batch,).
        final_effective_samples: The same of the last real step alone, shape (batch,).
        log_weights: Normalised, after the last real step, shape (particles, batch).
        states: After the last step, as the filter was given them.
    """

    log_likelihood: Tensor
    effective_samples: Tensor
    final_effective_samples: Tensor
    log_weights: Tensor
    states: tuple[Tensor, ...]


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


class Weights:
    """Weights of K particles per sequence, and when to draw them anew.

    Args:
        lengths: Real steps of each sequence, shape (batch,).
        log_weights: Before the first step, normalised, shape (particles, batch).
        resampling: When and how; ``None`` never.
    """

    def __init__(self, lengths: Tensor, log_weights: Tensor, resampling: Resampling | None) -> None:
        self.lengths, self.log_weights, self.resampling = lengths, log_weights, resampling
        self.particles, batch = log_weights.shape
        self.rows = torch.arange(batch, device=lengths.device)
        self.total = log_weights.new_zeros(batch)
        self.effective_sum = torch.zeros_like(self.total)
        self.effective = torch.full_like(self.total, self.particles)
        self.moves: list[Move] = []

    def advance(self, t: int, increments: Tensor, draws: Tensor | None) -> Tensor | None:
        """Weigh the particles of step t; return the rows that go on, or ``None`` if none is drawn anew.

        Args:
            t: The step.
            increments: Shape (particles, batch), nats.
            draws: Numbers in [0, 1), shape (particles or 1, batch).
        """
        real = t < self.lengths
        evidence = self.log_weights + torch.where(real, increments.to(self.log_weights.dtype), 0.0)
        gained = evidence.logsumexp(0)
        self.total = self.total + gained
        possible = gained > -math.inf  # a frame that no particle can explain leaves them even
        self.log_weights = torch.where(possible, evidence - gained, -math.log(self.particles))
        with torch.no_grad():
            self.effective = torch.where(real, effective_samples(self.log_weights), self.effective)
            self.effective_sum = self.effective_sum + torch.where(real, self.effective, 0.0)
        if self.resampling is None or draws is None or self.particles == 1:
            return None
        due = (t + 1 < self.lengths) & (self.effective <= self.resampling.threshold * self.particles * (1 + 1e-4))
        if not due.any():
            return None
        drawn = resample(self.log_weights.detach(), draws)
        ancestors = torch.where(due, drawn, torch.arange(self.particles, device=drawn.device)[:, None])
        score = self.log_weights.gather(0, ancestors).sum(0) if self.resampling.gradient else None
        self.moves.append(Move(t, due, ancestors, score, self.total.detach()))
        self.log_weights = torch.where(due, -math.log(self.particles), self.log_weights)
        return (ancestors * len(self.rows) + self.rows).flatten()


class Move(NamedTuple):
    """One time at which particles were drawn anew.

    Args:
        t: After which step.
        due: Of which sequences, shape (batch,).
        ancestors: What each particle goes on from, shape (particles, batch).
        score: Log-probability of the ancestors of each sequence, shape (batch,), if the gradient accounts for it.
        total: Log-likelihood up to there, shape (batch,).
    """

    t: int
    due: Tensor
    ancestors: Tensor
    score: Tensor | None
    total: Tensor


def effective_samples(log_weights: Tensor) -> Tensor:
    """Return the effective sample size of normalised log-weights, shape (particles, ...)."""
    return (-(2 * log_weights).logsumexp(0)).exp()


def evidence(
    increments: Tensor, log_weights: Tensor, moves: Sequence[Move], gradient: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Return the log-likelihood of each sequence and the last weights, for all steps at once.

    Between two resamplings the factors of the estimate telescope: their product is the mean, over the particles, of the
    exponential of the increments' sum.

    Args:
        increments: Zero at padding, shape (steps, particles, batch).
        log_weights: Before the first step, normalised, shape (particles, batch).
        moves: When particles were drawn anew, from :class:`Weights`.
        gradient: Let it account for the choice of ancestors.

    Returns:
        Nats, shape (batch,), and normalised log-weights, shape (particles, batch).
    """
    increments = increments.to(log_weights.dtype)
    if not moves:
        final = log_weights + increments.sum(0)
        total = final.logsumexp(0)
        return total, torch.where(total > -math.inf, final - total, -math.log(len(final)))
    steps, particles, batch = increments.shape
    due = torch.zeros(steps + 1, batch, dtype=torch.int64, device=increments.device)
    for move in moves:
        due[move.t + 1] = move.due
    stretch = due.cumsum(0)  # which stretch between resamplings a step belongs to
    count = int(stretch[-1].max()) + 1
    start = log_weights.new_full((count, particles, batch), -math.log(particles))
    start = torch.cat([log_weights[None], start[1:]])
    sums = start.scatter_add(0, stretch[:-1, None].expand_as(increments), increments)
    gained = sums.logsumexp(1)
    total = gained.sum(0)
    weights = torch.where(gained[:, None] > -math.inf, sums - gained[:, None], -math.log(particles))
    last = weights.gather(0, stretch[-1].expand(1, particles, batch))[0]
    if gradient:
        up_to = gained.detach().cumsum(0)
        for move in moves:
            ended = stretch[move.t].expand(1, batch)
            own = weights.gather(0, ended[:, None].expand(1, particles, batch))[0]
            score = own.gather(0, move.ancestors).sum(0)
            ahead = up_to[-1] - up_to.gather(0, ended)[0]
            total = total + torch.where(move.due, (score - score.detach()) * ahead, 0.0)  # only its gradient counts
    return total, last


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

    It takes any model that can take a step; ``VRNN.filter`` does the same for a VRNN without a graph in its loop.

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
    even = states[0].new_full((particles, len(lengths)), -math.log(particles))
    weights = Weights(lengths, even, resampling)
    for t in range(steps):
        increments, states = step(t, states)
        draws = None if resampling is None or particles == 1 else uniform(resampling.draws(particles)).t()
        source = weights.advance(t, increments, draws)
        if source is not None:
            states = tuple(s.index_select(0, source) for s in states)
    total = final = weights.total
    for move in weights.moves:
        if move.score is not None:
            score = torch.where(move.due, move.score, 0.0)
            total = total + (score - score.detach()) * (final.detach() - move.total)  # adds nothing but its gradient
    effective = weights.effective_sum / lengths.clamp(min=1)
    return Filtered(total, effective, weights.effective, weights.log_weights, states)
