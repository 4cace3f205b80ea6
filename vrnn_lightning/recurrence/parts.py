"""What the time loops share: states, masks, what networks read, and the networks' interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vrnn_lightning.heads import Factorised, Gaussian, Head, Network
from vrnn_lightning.nn import MLP

__all__ = ["Masks", "Networks", "Prior", "Reads", "State", "Steps", "as_state", "log_ratio", "repeat_rows"]


class State(NamedTuple):
    """What is carried from step to step.

    Args:
        h: Output of each layer of the recurrence, shape (batch, layers, hidden).
        c: Cells of an LSTM, shape (batch, layers, hidden); ``None`` for a GRU.
    """

    h: Tensor
    c: Tensor | None = None

    def layers(self) -> tuple[Tensor, ...]:
        """Return h of each layer, then c of each layer, each (batch, hidden)."""
        return (*self.h.unbind(1), *(() if self.c is None else self.c.unbind(1)))


class Masks(NamedTuple):
    """Dropout of a pass, the same at every step of a sequence: 0 or 1 / (1 - probability).

    Args:
        phi_x: Shape (batch, width).
        phi_z: Shape (batch, width); of width 0 where there is no latent.
        h: Shape (batch, layers, hidden). It masks what networks and the layer above read of h, not what a layer
            reads of itself (Zaremba et al. 2014, arXiv 1409.2329).
    """

    phi_x: Tensor
    phi_z: Tensor
    h: Tensor


class Reads(NamedTuple):
    """What the networks read of the data, for all steps at once, time first.

    Args:
        cell: phi_x(x_t) and covariates, read by the recurrence, shape (time, batch, width).
        encoder: The same and, for smoothing, the summary of what is to come, shape (time, batch, width).
        inputs: Covariates, read by prior and decoder, shape (time, batch, covariates); may have width 0.
    """

    cell: Tensor
    encoder: Tensor
    inputs: Tensor


class Steps(NamedTuple):
    """What :func:`unroll` found, time first; the latent parts have width 0 where there is no latent.

    Args:
        hidden: h_{t-1} of the top layer for every step t as the networks read it, shape (time, batch, hidden).
        mean: Posterior mean of z_t, shape (time, batch, latent).
        std: Posterior standard deviation of z_t, shape (time, batch, latent).
        z: The latent drawn, shape (time, batch, latent).
        phi_z: Its features, shape (time, batch, width).
        prior: Mean and standard deviation of the prior where the loop needed them, each (time, batch, latent).
        state: State after the last real step of each sequence.
    """

    hidden: Tensor
    mean: Tensor
    std: Tensor
    z: Tensor
    phi_z: Tensor
    prior: tuple[Tensor, Tensor] | None
    state: State


class Prior(Protocol):
    """Maps h_{t-1} and covariates to p(z_t | x_<t, z_<t)."""

    def __call__(self, features: Tensor, /) -> Factorised:
        """Return the prior with batch shape (...) and event shape (latent,)."""


class Networks(Protocol):
    """The networks of a VRNN; the latent ones are ``None`` where the model has no latent."""

    phi_x: MLP
    phi_z: MLP | None
    prior: Prior | None
    encoder: Network[Gaussian] | None
    decoder: Network[Head]
    cells: nn.ModuleList
    backward_rnn: nn.GRU | nn.LSTM | None
    residual_posterior: bool

    def look(self, x: Tensor, counted: Tensor | None) -> Tensor:
        """Return what phi_x reads, shape (..., width)."""


def repeat_rows(x: Tensor, samples: int) -> Tensor:
    """Return a batch's rows, shape (batch, ...), for each of its samples: row ``k * batch + i`` is row i."""
    return x if samples == 1 else x.repeat(samples, *[1] * (x.ndim - 1))


def log_ratio(prior: Factorised, posterior: Factorised, z: Tensor) -> Tensor:
    """Return log p(z) - log q(z) in nats, shape (...), of latents of shape (..., latent)."""
    ratio: Tensor = prior.log_prob(z) - posterior.log_prob(z)
    return ratio


def as_state(states: Sequence[Tensor], layers: int) -> State:
    """Return the state of h of each layer, then c of each layer, each (batch, hidden)."""
    c = states[layers:]
    return State(torch.stack(tuple(states[:layers]), 1), torch.stack(tuple(c), 1) if c else None)
