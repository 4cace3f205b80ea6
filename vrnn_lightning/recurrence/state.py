"""What the time loops share: states, dropout masks, and the interface of the networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vrnn_lightning.heads import Factorised, Gaussian, Head, Network
from vrnn_lightning.nn import MLP

__all__ = ["Masks", "Networks", "Prior", "State", "as_state", "log_ratio", "output", "repeat_rows"]


class State(NamedTuple):
    """What is carried from step to step.

    Args:
        h: Output of each layer of the recurrence, shape (batch, layers, hidden).
        c: Cell state of an LSTM, shape (batch, layers, hidden); ``None`` for a GRU.
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


class Prior(Protocol):
    """Maps h_{t-1} and covariates to p(z_t | x_<t, z_<t)."""

    def __call__(self, features: Tensor, /) -> Factorised:
        """Return the prior with batch shape (...) and event shape (latent,)."""


class Networks(Protocol):
    """The networks of a VRNN and its equations, see :class:`~vrnn_lightning.vrnn.Equations`."""

    phi_x: MLP
    phi_z: MLP | None
    prior: Prior | None
    encoder: Network[Gaussian] | None
    decoder: Network[Head]
    cells: nn.ModuleList
    backward_rnn: nn.GRU | nn.LSTM | None
    residual_posterior: bool

    def standardize_input(self, x: Tensor, valid: Tensor | None = None) -> Tensor: ...
    def extract_x(self, x: Tensor, valid: Tensor | None = None, masks: Masks | None = None) -> Tensor: ...
    def extract_z(self, z: Tensor, masks: Masks | None = None) -> Tensor: ...
    def prior_dist(self, h: Tensor, inputs: Tensor | None = None) -> Factorised: ...
    def posterior_dist(self, x_features: Tensor, h: Tensor, *rest: Any, **named: Any) -> Factorised: ...
    def emission_dist(self, z_features: Tensor, h: Tensor, inputs: Tensor | None = None) -> Distribution: ...
    def next_state(self, x_features: Tensor, z_features: Tensor, state: State, *rest: Any) -> tuple[Tensor, State]: ...


def output(state: State, masks: Masks | None = None) -> Tensor:
    """Return h of the top layer as the networks read it, shape (batch, hidden)."""
    h = state.h[:, -1]
    return h if masks is None else h * masks.h[:, -1]


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
