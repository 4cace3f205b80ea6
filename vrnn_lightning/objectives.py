"""Objectives that training maximises: lower bounds on log p(x), as functions of a trace and as options of a run.

To add one, write a subclass of :class:`Objective`; its keyword arguments become options of the command line.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.compatibility import keep_old_hooks, old_names
from vrnn_lightning.errors import UserError, require
from vrnn_lightning.filtering import Particles, Resampling, log_evidence
from vrnn_lightning.heads import gaussian
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import State
from vrnn_lightning.vrnn import VRNN, Trace

__all__ = ["ELBO", "FIVO", "IWAE", "ImportanceBound", "Objective", "ObjectiveOutput", "StreamState", "elbo"]

__getattr__ = old_names(__name__, {"Carried": "StreamState", "Found": "ObjectiveOutput"})

Total = Callable[[Tensor], Tensor]


def elbo(
    log_px: Tensor, kl: Tensor, steps: Tensor, beta: float = 1.0, free_bits: float = 0.0, total: Total = lambda x: x
) -> Tensor:
    r"""Return the evidence lower bound as it is trained, summed over the batch, in nats.

    .. math:: \sum_t \log p(x_t \mid \cdot) - \beta \sum_j \max\Big(\sum_t \mathrm{KL}_{t,j},\; \lambda N\Big)

    with N the number of real steps in the global batch (free bits, Kingma et al. 2016, arXiv 1606.04934, sec. 5.2 with
    groups of one dimension). With ``beta=1, free_bits=0`` it is the ELBO.

    Args:
        log_px: Zero at padding, shape (batch, time).
        kl: Zero at padding, shape (batch, time, latent).
        steps: Number of real steps in this process's batch, shape ().
        beta: Weight of the KL.
        free_bits: Nats per step and latent dimension that cost nothing to use, :math:`\lambda`.
        total: Sums a tensor over processes, without gradient; ``free_bits`` bounds the global mean.

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


class StreamState(NamedTuple):
    """The state that one window of streams passes to the next.

    Args:
        trajectories: Trajectories that were not resampled.
        particles: The particles of a filter, if there is one.
    """

    trajectories: Particles
    particles: Particles | None = None

    def reset_rows(self, reset: Tensor, initial: Any = None) -> StreamState:
        """Return the state without gradient, reset to before the first step for some sequences.

        Args:
            reset: True for those sequences, shape (batch,).
            initial: The state before the first step, of batch rows; zero if not given.
        """
        particles = None if self.particles is None else self.particles.reset_rows(reset, initial)
        return StreamState(self.trajectories.reset_rows(reset, initial), particles)

    def tensors(self) -> list[list[Tensor]]:
        """Return log-weights and state of each of the particles."""
        return [[part.log_weights, *part.state.tensors().values()] for part in self if part is not None]

    @classmethod
    def of_tensors(cls, parts: Sequence[Sequence[Tensor]], like: State) -> StreamState:
        """Return what :meth:`tensors` was called on, with states like another one."""
        names = list(like.tensors())
        return cls(*(Particles(State.of_tensors(dict(zip(names, x, strict=True))), weights) for weights, *x in parts))


def _trajectories(
    model: VRNN, batch: SequenceBatch, samples: int, carried: StreamState | None
) -> tuple[State | None, Tensor]:
    """Return the state of the trajectories that are carried, ``None`` for new ones, and their log-weights."""
    if carried is None:
        return None, model.even_weights(samples, len(batch))
    return carried.trajectories.state, carried.trajectories.log_weights


class ObjectiveOutput(NamedTuple):
    """The value of an objective on a batch.

    Args:
        value: Objective to maximise, summed over the batch, in nats.
        log_px: Log-likelihood along trajectories without resampling, for the reported ELBO, shape (rows, time).
        kl: KL of each latent dimension along the same trajectories, shape (rows, time, latent).
        carried: State for the next window.
        auxiliary: Terms of :attr:`Objective.auxiliary` along the same trajectories.
    """

    value: Tensor
    log_px: Tensor
    kl: Tensor
    carried: StreamState
    auxiliary: tuple[Tensor, ...] = ()


class Objective(ABC):
    """A bound to train on."""

    unsupported_options: ClassVar[dict[str, str]] = {}
    """Options of other objectives that this one lacks, by name, and the reason."""
    absent = unsupported_options
    has_auxiliary: ClassVar[bool] = False
    """Whether it returns the terms of :attr:`auxiliary`, with a gradient."""
    auxiliary: Callable[[Trace], tuple[Tensor, ...]] | None = None
    """Further terms of a trace, each (rows, time): auxiliary losses, which the module sets."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Accept :attr:`unsupported_options` under its old name."""
        super().__init_subclass__(**options)
        keep_old_hooks(cls, {"absent": "unsupported_options"})

    @abstractmethod
    def __call__(
        self,
        model: VRNN,
        batch: SequenceBatch,
        noise: Noise,
        beta: float,
        total: Total,
        carried: StreamState | None = None,
    ) -> ObjectiveOutput:
        """Evaluate the objective.

        Args:
            model: The model.
            batch: Padded sequences.
            noise: Source of random numbers.
            beta: Weight of the KL, as a callback set it.
            total: Sums a tensor over processes, without gradient.
            carried: State to continue from; ``None`` at the first step.
        """

    def require_auxiliary(self) -> None:
        """Raise if the objective does not return auxiliary terms."""
        if not self.has_auxiliary:
            name = type(self).__name__
            raise UserError(f"auxiliary: {name} has no trajectories with a gradient. Fix: use ELBO or IWAE")

    def _select_auxiliary(self, trace: Trace) -> tuple[Tensor, ...]:
        return () if self.auxiliary is None else self.auxiliary(trace)


class ELBO(Objective):
    """The evidence lower bound, with one trajectory per sequence.

    Args:
        kl: "analytic", in closed form where there is one; "sampled", log q - log p of the latents drawn, which has
            the same mean and more variance.
        free_bits: Nats per step and latent dimension that cost nothing to use (Kingma et al. 2016).
        balance: Share of the KL's gradient that goes to the prior, the rest goes to the posterior (Hafner et al. 2021,
            arXiv 2010.02193, uses 0.8); ``None`` for the whole gradient to both. The KL's value is the same.

    Raises:
        UserError: An option is outside its range, or ``balance`` is given with a sampled KL.
    """

    has_auxiliary = True

    def __init__(
        self, kl: Literal["analytic", "sampled"] = "analytic", free_bits: float = 0.0, balance: float | None = None
    ) -> None:
        if kl not in ("analytic", "sampled"):
            raise UserError(f"objective.kl {kl!r}: must be 'analytic' or 'sampled'")
        require("objective.free_bits", free_bits, 0, below=math.inf)
        if balance is not None:
            require("objective.balance", balance, 0, 1)
        if balance is not None and kl == "sampled":
            raise UserError("objective.balance needs objective.kl 'analytic'. Fix: change either.")
        self.kl = kl
        self.free_bits = free_bits
        self.balance = balance

    def __call__(
        self,
        model: VRNN,
        batch: SequenceBatch,
        noise: Noise,
        beta: float,
        total: Total,
        carried: StreamState | None = None,
    ) -> ObjectiveOutput:
        """Evaluate the objective."""
        state, log_weights = _trajectories(model, batch, 1, carried)
        same = self.kl == "analytic" and self.balance is None

        def select(trace: Trace) -> tuple[Tensor, ...]:
            own = () if same else (self._kl(trace, model),)
            return trace.log_px, trace.kl, *own, *self._select_auxiliary(trace)

        masks = model.draw_masks(noise)
        (log_px, reported, *rest), state = model.collect(batch, noise, select, state, masks)
        kl = reported[..., : reported.shape[-1] - model.infers_state] if same else rest.pop(0)
        value = elbo(log_px, kl, batch.lengths.sum(), beta, self.free_bits, total)
        value = value - beta * reported[..., kl.shape[-1] :].sum()  # of the initial state
        return ObjectiveOutput(value, log_px, reported, StreamState(Particles(state, log_weights)), tuple(rest))

    def _kl(self, trace: Trace, model: VRNN) -> Tensor:
        latent, q, p = model.latent, trace.posterior, trace.prior
        if q is None or p is None:  # no latent, or a sampled KL
            if q is not None and self.balance is not None:
                kind = type(latent if not latent.has_closed_kl else model.prior).__name__
                raise UserError(f"objective.balance: needs a KL in closed form, which {kind} lacks. Fix: leave it out")
            return trace.step_kl
        if self.balance is None and self.kl == "analytic":
            return trace.step_kl
        if self.balance is None:
            kl = latent.each_log_prob(q, trace.z) - latent.each_log_prob(p, trace.z)
        else:
            if model.residual_posterior:  # the posterior's mean holds the prior's, on which the KL then does not depend
                (mean, std), (mean_0, std_0) = latent.parameters(q), latent.parameters(p)
                q, p = gaussian(mean - mean_0, std), gaussian(torch.zeros_like(mean_0), std_0)
            fixed_q, fixed_p = (latent.dist(*(x.detach() for x in latent.parameters(dist))) for dist in (q, p))
            kl = self.balance * latent.kl(fixed_q, p, trace.z) + (1 - self.balance) * latent.kl(q, fixed_p, trace.z)
        return torch.where(trace.mask[..., None], kl, 0.0)


class ImportanceBound(Objective):
    """A bound made of importance weights: the sum of one bound per sequence."""

    option: str
    """The option that holds the number of particles."""
    unsupported_options = {"kl": "importance weights need a sampled KL; for an analytic one use ELBO"}

    def count(self, model: VRNN) -> int:
        """Return the number of particles, 1 for a model without a latent; raise if the latent learns of more alone."""
        wanted: int = getattr(self, self.option)
        if model.latent_size and model.latent.is_straight_through and wanted == 1:
            kind = type(model.latent).__name__
            raise UserError(f"objective.{self.option} 1: weights of several teach a {kind}. Fix: give 2 or more")
        return wanted if model.has_latent else 1

    @abstractmethod
    def of_sequences(self, model: VRNN, batch: SequenceBatch, noise: Noise) -> Tensor:
        """Return the bound of each sequence in nats, shape (batch,), with the KL at its full weight."""


class IWAE(ImportanceBound):
    """The importance-weighted bound (Burda et al. 2016, arXiv 1509.00519), tighter than the ELBO.

    Auxiliary losses are means over the trajectories, which are draws from the posterior; they are not weighted.

    Args:
        samples: Trajectories per sequence, K.

    Raises:
        UserError: ``samples`` is below 1.
    """

    has_auxiliary = True
    option = "samples"

    def __init__(self, samples: int = 16) -> None:
        self.samples = require("objective.samples", samples, 1)

    def __call__(
        self,
        model: VRNN,
        batch: SequenceBatch,
        noise: Noise,
        beta: float,
        total: Total,
        carried: StreamState | None = None,
    ) -> ObjectiveOutput:
        """Evaluate the objective."""
        samples = self.count(model)
        state, weights = _trajectories(model, batch, samples, carried)
        masks = model.draw_masks(noise)

        def select(trace: Trace) -> tuple[Tensor, ...]:
            return trace.log_px, trace.kl, trace.log_ratio, *self._select_auxiliary(trace)

        (log_px, kl, ratio, *rest), state = model.collect(batch, noise, select, state, masks, samples)
        increments = (log_px + beta * ratio).t().unflatten(1, (samples, -1))
        is_first = None if batch.is_first is None else (batch.is_first & batch.mask).t()
        bound, log_weights = log_evidence(increments, weights, (), is_first=is_first)
        return ObjectiveOutput(bound.sum(), log_px, kl, StreamState(Particles(state, log_weights)), tuple(rest))

    def of_sequences(self, model: VRNN, batch: SequenceBatch, noise: Noise) -> Tensor:
        """Return the bound of each sequence in nats, shape (batch,)."""
        return model.filter(batch, self.count(model), None, noise).log_likelihood


class FIVO(ImportanceBound):
    """The bound of a particle filter (Maddison et al. 2017, arXiv 1705.09279), tight for long sequences.

    Args:
        particles: Per sequence, K.
        resampling: "multinomial" or "systematic".
        threshold: Resample where the effective sample size is below this share of the particles.
        resampling_gradient: Let the gradient account for the choice of ancestors; the paper found it harmful.

    Raises:
        UserError: An option is outside its range.
    """

    option = "particles"

    def __init__(
        self,
        particles: int = 16,
        resampling: Literal["multinomial", "systematic"] = "systematic",
        threshold: float = 0.5,
        resampling_gradient: bool = False,
    ) -> None:
        self.particles = require("objective.particles", particles, 1)
        self.resampling = Resampling(resampling, threshold, resampling_gradient)

    def __call__(
        self,
        model: VRNN,
        batch: SequenceBatch,
        noise: Noise,
        beta: float,
        total: Total,
        carried: StreamState | None = None,
    ) -> ObjectiveOutput:
        """Evaluate the objective; the reported ELBO comes from a separate pass without gradient or resampling."""
        masks = model.draw_masks(noise)
        state, log_weights = _trajectories(model, batch, 1, carried)
        with torch.no_grad():
            (log_px, kl), state = model.collect(batch, noise, lambda trace: (trace.log_px, trace.kl), state, masks)
        filtered = model.filter(
            batch,
            self.count(model),
            self.resampling,
            noise,
            masks,
            beta,
            None if carried is None else carried.particles,
        )
        ahead = StreamState(Particles(state, log_weights), Particles(filtered.state, filtered.log_weights))
        return ObjectiveOutput(filtered.log_likelihood.sum(), log_px, kl, ahead)

    def of_sequences(self, model: VRNN, batch: SequenceBatch, noise: Noise) -> Tensor:
        """Return the bound of each sequence in nats, shape (batch,)."""
        return model.filter(batch, self.count(model), self.resampling, noise).log_likelihood
