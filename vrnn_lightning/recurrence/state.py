"""What the time loops share: states, dropout masks, and the interface of the networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vrnn_lightning.heads import Factorised, Gaussian, Head, Network
from vrnn_lightning.nn import MLP

__all__ = ["Masks", "Networks", "Prior", "State", "log_ratio", "output", "repeat_rows"]

Prior = Callable[[Tensor], Factorised]
"""Maps h_{t-1} and covariates, shape (..., width), to p(z_t | x_<t, z_<t), event shape (latent,)."""


class State(NamedTuple):
    """What is carried from step to step.

    Args:
        h: Output of each layer of the recurrence, shape (batch, layers, hidden).
        c: Cell state of an LSTM, shape (batch, layers, hidden); ``None`` for a GRU.
    """

    h: Tensor
    c: Tensor | None = None

    @classmethod
    def from_layers(cls, parts: Sequence[Tensor], count: int) -> State:
        """Return the state of h of each of ``count`` layers, then c of each layer, each (batch, hidden)."""
        h, c = parts[:count], parts[count:]
        return cls(torch.stack(tuple(h), 1), torch.stack(tuple(c), 1) if c else None)

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


class Networks(Protocol):
    """What the time loops read of a model, see :class:`~vrnn_lightning.vrnn.Equations`."""

    phi_x: MLP
    phi_z: MLP | None
    prior: Prior | None
    encoder: Network[Gaussian] | None
    decoder: Network[Head]
    cells: nn.ModuleList
    backward_rnn: nn.GRU | nn.LSTM | None
    residual_posterior: bool
    num_inputs: int

    def standardize_input(self, x: Tensor, valid: Tensor | None = None) -> Tensor: ...
    def prior_dist(self, h: Tensor, inputs: Tensor | None = None) -> Factorised: ...


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
