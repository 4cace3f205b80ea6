"""What a pass of inference over a batch computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.heads import Factorised, gaussian, log_prob
from vrnn_lightning.recurrence import InferenceSteps, State, log_ratio, repeat_rows
from vrnn_lightning.vrnn.equations import Equations, join

__all__ = ["Frames", "Trace", "latent_dists", "make_trace"]


@dataclass
class Trace:
    """One pass of inference over a batch; every tensor is batch first, with samples * batch rows.

    Args:
        log_px: log p(x_t | z_<=t, x_<t) in nats, zero at padding, shape (batch, time).
        kl: KL of each latent dimension in nats, zero at padding, shape (batch, time, latent); of width 1 if it is
            estimated for the whole latent.
        mask: True at real steps, shape (batch, time).
        features: What the emission's head reads, shape (batch, time, width); ``None`` if a long pass did not keep it.
        head: What makes the emission of the features, the head of the decoder or the decoder.
        posterior: q(z_t | x_<=t, z_<t), or ``None`` without a latent.
        prior: p(z_t | x_<t, z_<t), or ``None`` without a latent. A prior of another family than the latent's is
            ``None`` as well, and its KL is log q(z) - log p(z) of the latents drawn.
        z: The latents drawn, shape (batch, time, latent).
        state: State after the last real step of each sequence.
        hidden: h_{t-1} of the top layer before each step, shape (batch, time, hidden); ``None`` if a long pass did not
            keep it.
        targets: What auxiliary losses predict, shape (batch, time, targets), if the batch has it.
        initial: KL and log-ratio of an inferred initial state, see :class:`~vrnn_lightning.vrnn.initial.Initial`. The
            last column of ``kl`` holds this KL, at the first step.
    """

    log_px: Tensor
    kl: Tensor
    mask: Tensor
    features: Tensor | None
    head: Callable[[Tensor], Distribution]
    posterior: Distribution | None
    prior: Distribution | None
    z: Tensor
    state: State
    hidden: Tensor | None = None
    targets: Tensor | None = None
    initial: tuple[Tensor, Tensor] | None = None

    def with_initial(self, kl: Tensor, log_ratio: Tensor) -> Trace:
        """Return the trace of a window with the terms of its initial state, each (rows,); zero if it continues."""
        column = F.pad(kl[:, None, None], (0, 0, 0, self.kl.shape[1] - 1))
        return replace(self, kl=torch.cat([self.kl, column.to(self.kl)], -1), initial=(kl, log_ratio))

    @property
    def step_kl(self) -> Tensor:
        """KL of each dimension of z_t, shape (batch, time, latent): ``kl`` without that of the initial state."""
        return self.kl if self.initial is None else self.kl[..., :-1]

    @property
    def emission(self) -> Distribution:
        """p(x_t | z_<=t, x_<t), batch shape (batch, time)."""
        assert self.features is not None, "a pass in windows does not keep its emission"
        return self.head(self.features)

    @property
    def log_ratio(self) -> Tensor:
        """Log p(z_t | .) - log q(z_t | .) of the latents drawn in nats, zero at padding, shape (batch, time).

        The first step's has the initial state's latent in it.
        """
        if self.prior is None or self.posterior is None:
            ratio = -self.step_kl.sum(-1)
        else:
            ratio = torch.where(self.mask, log_ratio(self.prior, self.posterior, self.z), 0.0)
        if self.initial is None:
            return ratio
        return ratio + F.pad(self.initial[1][:, None], (0, ratio.shape[1] - 1)).to(ratio)


class Frames(NamedTuple):
    """The frames of a batch, a row for each trajectory, time first."""

    x: Tensor  # shape (time, rows, features)
    mask: Tensor  # true at real steps, shape (time, rows)
    observed: Tensor | None  # true at measured values, shape (time, rows, features); None for all
    inputs: Tensor | None  # covariates, shape (time, rows, covariates), if the model reads any
    targets: Tensor | None = None  # shape (time, rows, targets)

    @classmethod
    def of_batch(cls, batch: SequenceBatch, samples: int) -> Frames:
        """Return the frames of a batch, for some trajectories per sequence."""
        observed = None if batch.observed is None else batch.valid_mask
        x, mask, *rest = (
            None if part is None else repeat_rows(part, samples).transpose(0, 1)
            for part in (batch.x, batch.mask, observed, batch.inputs, batch.targets)
        )
        return cls(cast(Tensor, x), cast(Tensor, mask), *rest)


def latent_dists(
    model: Equations, steps: InferenceSteps, inputs: Tensor | None
) -> tuple[Factorised, Distribution] | None:
    """Return prior and posterior of steps, batch shape (..., rows); ``None`` without a latent."""
    if steps.posterior is None:
        return None
    prior = model.prior_dist(steps.h, inputs) if steps.prior is None else gaussian(*steps.prior)
    return prior, model.latent.dist(*steps.posterior)


def make_trace(model: Equations, steps: InferenceSteps, state: State, frames: Frames, *, compiled: bool) -> Trace:
    """Return the trace of all steps of a loop, scored on frames with or without :func:`torch.compile`."""
    body, head = model.emission_parts
    score = _compiled_score() if compiled and body is not None else _score
    terms = score(model, body, head, steps, frames)
    features, log_px, *latent = (part.transpose(0, 1) for part in (*terms, *(steps.posterior or ())))
    hidden, mask = steps.h.transpose(0, 1), frames.mask.t()
    targets = None if frames.targets is None else frames.targets.transpose(0, 1)
    if steps.posterior is None or steps.z is None:
        none = hidden[..., :0]
        return Trace(log_px, none, mask, features, head, None, None, none, state, hidden, targets)
    kl, *latent = latent
    posterior = model.latent.dist(*latent[-len(steps.posterior) :])
    prior = model.latent.dist(*latent[: -len(steps.posterior)]) if len(latent) > len(steps.posterior) else None
    z = steps.z.transpose(0, 1)
    return Trace(log_px, kl, mask, features, head, posterior, prior, z, state, hidden, targets)


def _score(
    model: Equations, body: nn.Module | None, head: Callable[..., Any], steps: InferenceSteps, frames: Frames
) -> tuple[Tensor, ...]:
    """Return what the emission's head reads, log p(x_t | .), the KL and the parameters of an own prior, time first.

    ``body`` and ``head`` are the model's :attr:`~Equations.emission_parts`. The last two are there with a latent.
    """
    features = steps.emission
    if features is None:
        features = join(steps.z_features, steps.h, frames.inputs)
        features = features if body is None else body(features)
    log_px = torch.where(frames.mask, log_prob(head(features), frames.x, frames.observed), 0.0)
    latent = latent_dists(model, steps, frames.inputs)
    if latent is None:
        return features, log_px
    prior, posterior = latent
    is_own = model.latent.is_own(prior)
    z = cast(Tensor, steps.z)
    kl = model.latent.kl(posterior, prior, z) if is_own else model.latent.sampled_kl(posterior, prior, z)
    kl = torch.where(frames.mask[..., None], kl, 0.0)
    return features, log_px, kl, *(model.latent.parameters(prior) if is_own else ())


@cache
def _compiled_score() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_score)
