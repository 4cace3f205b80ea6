"""States before the first step that are learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vrnn_lightning.errors import UserError
from vrnn_lightning.nn import MLP, MLPConfig
from vrnn_lightning.recurrence import State

__all__ = ["InitialState", "StateFromInputs"]


class InitialState(nn.Module):
    """A state of parameters, the same for every sequence.

    Args:
        like: A state of one row, whose values the parameters start from.
    """

    def __init__(self, like: State) -> None:
        super().__init__()
        self.values = nn.ParameterDict()
        for name, x in like.tensors().items():  # one by one: a ParameterDict sorts the names of a dictionary
            self.values[name] = x[0].detach().clone()

    def forward(self, batch_size: int, inputs: Tensor | None = None) -> State:
        """Return the state of ``batch_size`` rows."""
        rows = {name: value.expand(batch_size, *value.shape) for name, value in self.values.items()}
        return State.of_tensors(rows)


class StateFromInputs(InitialState):
    """A state that a network computes of each sequence's covariates of its first step, added to parameters.

    Args:
        like: A state of one row, whose values the parameters start from.
        num_inputs: Covariates per step.
        size: Size of the network.
    """

    def __init__(self, like: State, num_inputs: int, size: MLPConfig) -> None:
        super().__init__(like)
        widths = {name: value.numel() for name, value in self.values.items()}
        features = MLP(num_inputs, size)
        self.network = nn.Sequential(features, nn.Linear(features.out_features, sum(widths.values()), bias=False))
        self.widths = list(widths.values())

    def forward(self, batch_size: int, inputs: Tensor | None = None) -> State:
        """Return the state of ``batch_size`` sequences.

        Args:
            batch_size: Number of rows.
            inputs: Covariates of the first step, shape (batch_size, covariates).

        Raises:
            UserError: The covariates are missing or of another shape.
        """
        network, first = self.network, next(iter(self.values.values()))
        expected = (batch_size, network[0][0].in_features)  # type: ignore[index]  # an MLP
        if inputs is None or tuple(inputs.shape) != expected:
            given = "none" if inputs is None else f"shape {tuple(inputs.shape)}"
            raise UserError(
                f"inputs: the initial state reads covariates of the first step, shape {expected}, but got {given}"
            )
        with torch.autocast(first.device.type, enabled=False):
            parts = network(inputs.to(first)).split(self.widths, -1)
        moved = zip(super().forward(batch_size).tensors().items(), parts, strict=True)
        return State.of_tensors({name: value + part.view_as(value) for (name, value), part in moved})
