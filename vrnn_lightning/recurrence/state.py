"""What the time loops share: states, dropout masks, and the interface of the networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from vrnn_lightning.heads import Factorised

__all__ = ["Masks", "Networks", "Prior", "State", "log_ratio", "output", "repeat_rows"]

Prior = Callable[[Tensor], Factorised]
"""Maps h_{t-1} and covariates, shape (..., width), to p(z_t | x_<t, z_<t), event shape (latent,)."""


class State(NamedTuple):
    """What is carried from step to step.

    Args:
        h: Output of each layer of the recurrence, shape (batch, layers, hidden).
        c: Cell state of an LSTM, shape (batch, layers, hidden); of other cells their state as a tuple of tensors, each
            (batch, ...); ``None`` for a cell whose state is its output.
    """

    h: Tensor
    c: Tensor | tuple[Tensor, ...] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name: h, and c, or c_0, c_1 and so on of a tuple."""
        c = {f"c_{i}": x for i, x in enumerate(self.c)} if isinstance(self.c, tuple) else {"c": self.c}
        return {"h": self.h, **{name: x for name, x in c.items() if x is not None}}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> State:
        """Return the state that :meth:`tensors` names."""
        own = tuple(x for name, x in tensors.items() if name.startswith("c_"))
        return cls(tensors["h"], own or tensors.get("c"))

    def layers(self) -> tuple[Tensor, ...]:
        """Return h of each layer, then each part of c, each (batch, width)."""
        c = self.c.unbind(1) if isinstance(self.c, Tensor) else [x.flatten(1) for x in self.c or ()]
        return (*self.h.unbind(1), *c)

    def with_layers(self, parts: Sequence[Tensor]) -> State:
        """Return a state like this one from what :meth:`layers` returns, with any number of rows."""
        h, c = torch.stack(tuple(parts[: self.h.shape[1]]), 1), parts[self.h.shape[1] :]
        if isinstance(self.c, tuple):
            return State(h, tuple(x.reshape(-1, *like.shape[1:]) for x, like in zip(c, self.c, strict=True)))
        return State(h, torch.stack(tuple(c), 1) if c else None)


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

    def repeat(self, samples: int) -> Masks:
        """Return the dropout of each sample's rows."""
        return Masks(*(repeat_rows(mask, samples) for mask in self))


Networks = Any
"""A model, see :class:`~vrnn_lightning.vrnn.Equations`, whose module imports this one."""


def output(state: State, masks: Masks | None = None) -> Tensor:
    """Return h of the top layer as the networks read it, shape (batch, hidden)."""
    h = state.h[:, -1]
    return h if masks is None else h * masks.h[:, -1]


def repeat_rows(x: Tensor, samples: int) -> Tensor:
    """Return a batch's rows, shape (batch, ...), for each of its samples: row ``k * batch + i`` is row i."""
    return x if samples == 1 else x.repeat(samples, *[1] * (x.ndim - 1))


def log_ratio(prior: Distribution, posterior: Distribution, z: Tensor) -> Tensor:
    """Return log p(z) - log q(z) in nats, shape (...), of latents of shape (..., latent).

    Its gradient follows reweighted wake-sleep where a draw has none of its own: the posterior is moved to latents of
    large weight, by the gradient of + log q(z) (Bornschein & Bengio 2015, arXiv 1406.2751; Le et al. 2019, 1805.10469).
    """
    log_p, log_q = prior.log_prob(z), posterior.log_prob(z)
    is_pathwise = not getattr(posterior, "is_straight_through", False)
    ratio: Tensor = log_p - log_q if is_pathwise else log_p + log_q - 2 * log_q.detach()
    return ratio
