"""The particle filter: an unbiased estimate of the likelihood of any model that can take a step.

:func:`particle_filter` runs a step function. A model with its own loop passes each step's log-increments to
:class:`ParticleWeights`, which returns the particles that continue, and calls :func:`window_estimate` at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from vrnn_lightning.compatibility import old_names
from vrnn_lightning.errors import UserError, require

__all__ = [
    "FilterResult", "ParticleWeights", "Particles", "Resampling", "ResamplingEvent", "Step", "WindowEstimate",
    "draw_by_weight", "effective_samples", "log_evidence", "map_tensors", "particle_filter", "resample",
    "select_by_weight", "window_estimate",
]  # fmt: skip

OLD = {"Filtered": "FilterResult", "Move": "ResamplingEvent", "Weights": "ParticleWeights", "evidence": "log_evidence"}
__getattr__ = old_names(__name__, OLD)

StateT = TypeVar("StateT")
Step = Callable[[int, Any], tuple[Tensor, Any]]
"""Called with a step and the state; returns the log of the increments and the new state."""


def map_tensors(function: Callable[..., Tensor], state: StateT, *others: Any) -> StateT:
    """Apply a function to each tensor of a state, beside those of others: a tensor, ``None``, or a tuple of states."""
    if state is None:
        return state
    if isinstance(state, Tensor):
        return cast(StateT, function(state, *others))
    tuples = cast("tuple[tuple[Any, ...], ...]", (state, *others))
    parts = [map_tensors(function, *part) for part in zip(*tuples, strict=True)]
    return type(state)(*parts) if hasattr(state, "_fields") else cast(StateT, tuple(parts))


@dataclass(frozen=True)
class Resampling:
    """Rule for resampling particles.

    Args:
        scheme: "multinomial", independent draws; "systematic", one draw for all particles, with less variance
            (Douc & Cappé 2005).
        threshold: Resample where the effective sample size is below this share of the particles; 1 always, 0 never.
        gradient: Add the score-function gradient of the choice of ancestors (Maddison et al. 2017): unbiased at
            threshold 1, with a variance that usually harms training. Only for "multinomial", which has a density.

    Raises:
        UserError: An option is outside its range.
    """

    scheme: Literal["multinomial", "systematic"] = "systematic"
    threshold: float = 0.5
    gradient: bool = False

    def __post_init__(self) -> None:
        """Raise if an option is outside its range."""
        if self.scheme not in ("multinomial", "systematic"):
            raise UserError(f"resampling {self.scheme!r}: must be 'multinomial' or 'systematic'")
        require("threshold", self.threshold, 0, 1)
        if self.gradient and self.scheme != "multinomial":
            raise UserError(
                f"resampling_gradient: {self.scheme} draws have no density. Fix: choose resampling 'multinomial'."
            )

    def draws(self, particles: int) -> int:
        """Return how many uniform numbers one resampling of a sequence takes."""
        return particles if self.scheme == "multinomial" else 1


class FilterResult(NamedTuple):
    """Estimates of a particle filter for each sequence.

    Args:
        log_likelihood: log of the unbiased estimate of p(x) in nats, shape (batch,).
        effective_samples: Effective sample size of the weights before each resampling, mean over the real steps,
            shape (batch,).
        final_effective_samples: Effective sample size at the last real step, shape (batch,).
        log_weights: Normalised, after the last real step, shape (particles, batch).
        state: State after the last step, of the type of the initial state.
    """

    log_likelihood: Tensor
    effective_samples: Tensor
    final_effective_samples: Tensor
    log_weights: Tensor
    state: Any


class Particles(NamedTuple):
    """Weighted trajectories to continue from.

    Args:
        state: State of samples * batch rows; row ``k * batch + i`` is particle k of sequence i.
        log_weights: Normalised, shape (samples, batch).
    """

    state: Any
    log_weights: Tensor

    def reset_rows(self, reset: Tensor, initial: Any = None) -> Particles:
        """Return the particles without gradient, with even weights and the initial state for some sequences.

        Args:
            reset: True for those sequences, shape (batch,).
            initial: The initial state, of batch rows, with its gradient; zero if not given.
        """
        samples = len(self.log_weights)
        rows = reset.repeat(samples)

        def choose(x: Tensor, first: Tensor) -> Tensor:
            first = first.to(x).repeat(samples, *[1] * (x.ndim - 1))
            return torch.where(rows.view(-1, *[1] * (x.ndim - 1)), first, x.detach())

        initial = map_tensors(lambda x: torch.zeros_like(x[: len(reset)]), self.state) if initial is None else initial
        state = map_tensors(choose, self.state, initial)
        return Particles(state, torch.where(reset, -math.log(samples), self.log_weights.detach()))

    def resample_where_due(self, resampling: Resampling, draws: Tensor) -> Particles:
        """Return the particles, resampled where due; ``draws`` as for :meth:`ParticleWeights.advance`."""
        weights = ParticleWeights(None, self.log_weights, resampling)
        rows = weights.advance(0, torch.zeros_like(self.log_weights), draws)
        state = self.state if rows is None else map_tensors(lambda x: x[rows], self.state)
        return Particles(state, weights.log_weights)


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


def draw_by_weight(log_weights: Tensor, count: int) -> Tensor:
    """Return indices drawn systematically from weights (particles, batch), in random order: shape (count, batch)."""
    uniform = torch.rand(1, log_weights.shape[1], device=log_weights.device)
    places = (uniform + torch.arange(count, device=uniform.device)[:, None]) / count
    chosen = torch.searchsorted(
        log_weights.double().softmax(0).cumsum(0).t().contiguous(), places.double().t().contiguous()
    )
    chosen = chosen.clamp(max=len(log_weights) - 1).t()
    return chosen.gather(0, torch.rand(chosen.shape, device=chosen.device).argsort(0))


def select_by_weight(log_weights: Tensor, state: StateT, count: int) -> StateT:
    """Return the state of particles drawn from weights (particles, batch), in ``count * batch`` rows."""
    batch = log_weights.shape[1]
    rows = (draw_by_weight(log_weights, count) * batch + torch.arange(batch, device=log_weights.device)).flatten()
    return map_tensors(lambda x: x[rows], state)


class ParticleWeights:
    """The weights of K particles per sequence along a pass, and their resampling.

    Args:
        lengths: Real steps of each sequence, shape (batch,); ``None`` for sequences without an end.
        log_weights: Before the first step, normalised, shape (particles, batch).
        resampling: The rule; ``None`` never resamples.
        is_first: True at steps before which the weights are even, shape (batch, time); ``None`` for none.
    """

    def __init__(
        self, lengths: Tensor | None, log_weights: Tensor, resampling: Resampling | None, is_first: Tensor | None = None
    ) -> None:
        self.log_weights, self.resampling = log_weights, resampling
        self.particles, batch = log_weights.shape
        self.rows = torch.arange(batch, device=log_weights.device)
        self.lengths = torch.full_like(self.rows, 2**62) if lengths is None else lengths
        time = torch.arange(0 if is_first is None else is_first.shape[1], device=self.rows.device)[:, None]
        self.is_first = None if is_first is None else is_first.t() & (time < self.lengths)  # without padding
        self.total = log_weights.new_zeros(batch)
        self.effective_sum = torch.zeros_like(self.total)
        self.effective = torch.full_like(self.total, self.particles)
        self.events: list[ResamplingEvent] = []

    def advance(self, t: int, increments: Tensor, draws: Tensor | None) -> Tensor | None:
        """Weight the particles at step t; return the rows that continue, or ``None`` without resampling.

        Args:
            t: The step.
            increments: Shape (particles, batch), nats.
            draws: Numbers in [0, 1), shape (particles or 1, batch).
        """
        real = t < self.lengths
        if self.is_first is not None:
            self.log_weights = torch.where(self.is_first[t], -math.log(self.particles), self.log_weights)
        evidence = self.log_weights + torch.where(real, increments.to(self.log_weights.dtype), 0.0)
        gained = evidence.logsumexp(0)
        self.total = self.total + gained
        possible = gained > -math.inf  # where no particle can explain the frame, the weights become even
        self.log_weights = torch.where(possible, evidence - gained, -math.log(self.particles))
        with torch.no_grad():
            self.effective = torch.where(real, effective_samples(self.log_weights), self.effective)
            self.effective_sum = self.effective_sum + torch.where(real, self.effective, 0.0)
        if self.resampling is None or draws is None or self.particles == 1:
            return None
        due = (t + 1 < self.lengths) & (self.effective <= self.resampling.threshold * self.particles * (1 + 1e-4))
        if not due.any():
            return None
        resampled = resample(self.log_weights.detach(), draws)
        ancestors = torch.where(due, resampled, torch.arange(self.particles, device=resampled.device)[:, None])
        score = self.log_weights.gather(0, ancestors).sum(0) if self.resampling.gradient else None
        self.events.append(ResamplingEvent(t, due, ancestors, score, self.total.detach()))
        self.log_weights = torch.where(due, -math.log(self.particles), self.log_weights)
        return (ancestors * len(self.rows) + self.rows).flatten()

    def follow(self, increments: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight the particles at the next step of endless sequences, with draws from torch's generator.

        Args:
            increments: Shape (particles, batch), nats.

        Returns:
            The estimate of log p(x_t | x_<t) in nats, shape (batch,), and the rows that continue, or ``None``.
        """
        draws = None
        if self.resampling is not None and self.particles > 1:
            draws = torch.rand(self.resampling.draws(self.particles), len(self.rows)).to(increments.device)
        self.total = torch.zeros_like(self.total)
        rows = self.advance(0, increments, draws)
        self.events.clear()
        return self.total, rows


class ResamplingEvent(NamedTuple):
    """A resampling of particles.

    Args:
        t: The step after which it happened.
        due: True for the sequences that it concerns, shape (batch,).
        ancestors: The particle that each one continues from, shape (particles, batch).
        score: Log-probability of the ancestors, shape (batch,), if the gradient accounts for it.
        total: Log-likelihood up to step t, shape (batch,).
    """

    t: int
    due: Tensor
    ancestors: Tensor
    score: Tensor | None
    total: Tensor


def effective_samples(log_weights: Tensor) -> Tensor:
    """Return the effective sample size of normalised log-weights, shape (particles, ...)."""
    return (-(2 * log_weights).logsumexp(0)).exp()


class WindowEstimate(NamedTuple):
    """The contribution of a window of steps to an estimate.

    Args:
        log_likelihood: Nats, shape (batch,).
        log_weights: Normalised, after the window, shape (particles, batch).
        effective_sum: Effective sample sizes, summed over the real steps, shape (batch,).
        effective: Effective sample size at the last real step, shape (batch,).
    """

    log_likelihood: Tensor
    log_weights: Tensor
    effective_sum: Tensor
    effective: Tensor


def window_estimate(
    increments: Tensor, log_weights: Tensor, weights: ParticleWeights | None, mask: Tensor, gradient: bool = False
) -> WindowEstimate:
    """Return the estimate of a window, with a graph through its increments.

    Args:
        increments: Zero at padding, shape (steps, particles, batch), nats.
        log_weights: Before the first step, normalised, shape (particles, batch).
        weights: Weights that were advanced along the window; ``None`` without resampling.
        mask: True at real steps, shape (steps, batch).
        gradient: See :class:`Resampling`.
    """
    if weights is not None:
        gained, last = log_evidence(increments, log_weights, weights.events, gradient, weights.is_first)
        return WindowEstimate(gained, last, weights.effective_sum, weights.effective)
    gained, last = log_evidence(increments, log_weights, ())
    with torch.no_grad():
        path = log_weights + increments.to(log_weights.dtype).cumsum(0)
        effective = effective_samples((path - path.logsumexp(1, keepdim=True)).transpose(0, 1))
        return WindowEstimate(gained, last, torch.where(mask, effective, 0.0).sum(0), effective[-1])


def log_evidence(
    increments: Tensor,
    log_weights: Tensor,
    events: Sequence[ResamplingEvent],
    gradient: bool = False,
    is_first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return the log-likelihood of each sequence and the last weights, for all steps at once.

    Between two resamplings the factors of the estimate telescope: their product is the mean, over the particles, of the
    exponential of the increments' sum. An episode's first step closes the weights, too, and starts from even ones.

    Args:
        increments: Zero at padding, shape (steps, particles, batch).
        log_weights: Before the first step, normalised, shape (particles, batch).
        events: The resamplings, from :class:`ParticleWeights`.
        gradient: See :class:`Resampling`.
        is_first: True at the real first steps of episodes, shape (steps, batch); ``None`` for none.

    Returns:
        Nats, shape (batch,), and normalised log-weights, shape (particles, batch).
    """
    increments = increments.to(log_weights.dtype)
    if not events and is_first is None:
        final = log_weights + increments.sum(0)
        total = final.logsumexp(0)
        return total, torch.where(total > -math.inf, final - total, -math.log(len(final)))
    steps, particles, batch = increments.shape
    due = torch.zeros(steps + 1, batch, dtype=torch.int64, device=increments.device)
    for event in events:
        due[event.t + 1] = event.due
    if is_first is not None:
        due[:-1] |= is_first
    stretch = due.cumsum(0)  # the number of resamplings before each step
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
        for event in events:
            ended = stretch[event.t].expand(1, batch)
            own = weights.gather(0, ended[:, None].expand(1, particles, batch))[0]
            score = own.gather(0, event.ancestors).sum(0)
            ahead = up_to[-1] - up_to.gather(0, ended)[0]
            total = total + torch.where(event.due, (score - score.detach()) * ahead, 0.0)  # zero, with a gradient
    return total, last


def particle_filter(
    step: Step,
    state: Any,
    lengths: Tensor,
    particles: int,
    steps: int,
    resampling: Resampling | None,
    uniform: Callable[[int], Tensor],
    is_first: Tensor | None = None,
) -> FilterResult:
    r"""Estimate a likelihood with weighted particles (Maddison et al. 2017, arXiv 1705.09279).

    .. math::
        \hat p(x_{1:T}) = \prod_t \sum_k \bar w_{t-1}^k \alpha_t^k, \qquad
        \bar w_t^k \propto \bar w_{t-1}^k \alpha_t^k

    with :math:`\bar w = 1 / K` at first and after each resampling. :math:`\mathbb E \hat p = p`, so the expected
    log-likelihood is a lower bound. Without resampling it is the importance-weighted bound (Burda et al. 2016).
    Each sequence resamples according to its own weights, and only at its real steps.

    Args:
        step: Called with t and the state; returns the log of the increments
            :math:`\alpha_t = p(x_t, z_t \mid \cdot) / q(z_t \mid \cdot)`, shape (particles, batch), and the new state.
        state: Tensors whose first dimension is particles * batch, or tuples of them; row ``k * batch + i`` is particle
            k of sequence i.
        lengths: Real steps of each sequence, shape (batch,).
        particles: K.
        steps: Length of the longest sequence.
        resampling: The rule; ``None`` never resamples.
        uniform: Called with a number n, returns fresh numbers in [0, 1), shape (batch, n).
        is_first: True at the first steps of episodes, shape (batch, steps): their weights start even, and ``step``
            starts from a fresh state. Not together with ``resampling.gradient``.
    """
    weights: ParticleWeights | None = None
    for t in range(steps):
        increments, state = step(t, state)
        if weights is None:
            even = torch.full_like(increments, -math.log(particles))
            weights = ParticleWeights(lengths, even, resampling, is_first)
        draws = None if resampling is None or particles == 1 else uniform(resampling.draws(particles)).t()
        rows = weights.advance(t, increments, draws)
        if rows is not None:
            state = map_tensors(lambda x, rows=rows: x.index_select(0, rows), state)  # type: ignore[misc]
    assert weights is not None, "a filter needs a step"
    total = final = weights.total
    for event in weights.events:
        if event.score is not None:
            score = torch.where(event.due, event.score, 0.0)
            total = total + (score - score.detach()) * (final.detach() - event.total)  # zero, with a gradient
    effective = weights.effective_sum / lengths.clamp(min=1)
    return FilterResult(total, effective, weights.effective, weights.log_weights, state)
