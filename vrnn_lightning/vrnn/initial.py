"""States before the first step that are learned, or inferred."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.errors import UserError
from vrnn_lightning.heads import Gaussian
from vrnn_lightning.nn import MLP, MLPConfig
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import State, log_ratio, repeat_rows, run_backward

__all__ = ["InferredState", "Initial", "InitialState"]


class Initial(NamedTuple):
    """The state before the first step of some sequences.

    Args:
        state: Of samples * batch rows.
        terms: KL of an inferred state's latent g from its prior, and log p(g) - log q(g) of the one drawn, each (rows,)
            in nats, zero for sequences of no steps; ``None`` for a state that is not inferred.
    """

    state: State
    terms: tuple[Tensor, Tensor] | None = None


class InitialState(nn.Module):
    """A state of parameters, the same for every sequence, plus perhaps what a network makes of its covariates.

    Args:
        like: A state of one row, whose values the parameters start from.
        num_inputs: Covariates of the first step that the network reads; 0 for none.
    """

    def __init__(self, like: State, num_inputs: int = 0) -> None:
        super().__init__()
        self.values = nn.ParameterDict()
        self.network: nn.Module | None = None
        for name, x in like.tensors().items():  # one by one: a ParameterDict sorts the names of a dictionary
            self.values[name] = x[0].detach().clone()
        self.num_inputs, self.widths = num_inputs, [value.numel() for value in self.values.values()]
        self.reads = "inputs" if num_inputs else None
        """What of a sequence it reads, in words."""
        if num_inputs:
            features = MLP(num_inputs, MLPConfig())
            self.network = nn.Sequential(features, nn.Linear(features.out_features, sum(self.widths), bias=False))

    def forward(self, batch_size: int, inputs: Tensor | None = None) -> State:
        """Return the state of some sequences, whose covariates of the first step have shape (batch_size, covariates).

        Raises:
            UserError: The covariates are missing or of another shape.
        """
        expected = (batch_size, self.num_inputs)
        if self.network is not None and (inputs is None or tuple(inputs.shape) != expected):
            given = "none" if inputs is None else f"shape {tuple(inputs.shape)}"
            raise UserError(
                f"inputs: the initial state reads those of the first step, shape {expected}, but got {given}"
            )
        return self.moved(batch_size, None if self.network is None else inputs)

    def require_whole(self, batch: SequenceBatch) -> None:
        """Raise if a state would begin inside a sequence whose beginning it reads."""
        if batch.is_first is not None and self.reads is not None:
            raise UserError(f"is_first: the initial state reads {self.reads}. Fix: give episodes as separate sequences")
        if batch.reset is not None and isinstance(self, InferredState):
            raise UserError(
                "initial_state 'inferred': reads whole sequences, but the data carry the state from window to window. "
                "Fix: choose 'learned', or leave out data.window"
            )

    def moved(self, batch_size: int, by: Tensor | None) -> State:
        """Return the parameters' state, moved by what the network makes of something, shape (batch_size, width)."""
        state = {name: value.expand(batch_size, *value.shape) for name, value in self.values.items()}
        if by is None or self.network is None:
            return State.of_tensors(state)
        with torch.autocast(by.device.type, enabled=False):
            parts = self.network(by.to(next(iter(state.values())))).split(self.widths, -1)
        moved = zip(state.items(), parts, strict=True)
        return State.of_tensors({name: value + part.view_as(value) for (name, value), part in moved})


class InferredState(InitialState):
    r"""A state that a recurrence infers from the whole sequence, as LFADS does (Pandarinath et al. 2018).

    .. math::
        g \sim \mathcal N(0, I), \qquad s_0 = b + W g, \qquad
        q(g \mid x_{1:T}) = \mathcal N(\mu, \sigma^2), \quad [\mu, \sigma] = \mathrm{head}(\mathrm{GRU}(x_T, ..., x_1))

    What g knows of the frames is paid for: its KL is part of the ELBO, and p(g) / q(g) is part of a particle's weight.
    Without the sequence, in generation and streams, g is drawn from its prior.

    Args:
        like: A state of one row, which b starts from.
        in_features: Width of what the recurrence reads of a step.
    """

    def __init__(self, like: State, in_features: int) -> None:
        super().__init__(like)
        self.size = hidden = like.h.shape[-1]
        self.reads = "the whole sequence"
        self.network = nn.Linear(self.size, sum(self.widths), bias=False)
        self.backward_rnn, self.head = nn.GRU(in_features, hidden), Gaussian(hidden, self.size)

    def forward(self, batch_size: int, inputs: Tensor | None = None) -> State:
        """Return the state of some sequences, drawn from the prior with torch's global generator."""
        b = self.values["h"]
        return self.moved(batch_size, torch.randn(batch_size, self.size, dtype=b.dtype, device=b.device))

    def infer(self, reads: Tensor, batch: SequenceBatch, noise: Noise, samples: int) -> Initial:
        """Return the state of each sequence, drawn ``samples`` times from the posterior.

        ``reads`` is what the recurrence reads of a clean batch, shape (time, batch, in_features).
        """
        features = run_backward(self.backward_rnn, reads, batch)[0]
        with torch.autocast(features.device.type, enabled=False):
            posterior = self.head(features.to(self.values["h"]))
        mean, std = (repeat_rows(x, samples) for x in (posterior.mean, posterior.stddev))
        q = Independent(Normal(mean, std), 1)
        prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(std)), 1)
        g = mean + std * noise.normal(self.size, samples).to(mean)
        is_real = repeat_rows(batch.lengths > 0, samples)
        kl, ratio = (torch.where(is_real, x, 0.0) for x in (kl_divergence(q, prior), log_ratio(prior, q, g)))
        return Initial(self.moved(len(g), g), (kl, ratio))
