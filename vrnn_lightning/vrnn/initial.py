"""States before the first step that are learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vrnn_lightning.errors import UserError
from vrnn_lightning.nn import MLP, MLPConfig
from vrnn_lightning.recurrence import State

__all__ = ["InitialState"]


class InitialState(nn.Module):
    """A state of parameters, the same for every sequence, plus perhaps what a network makes of its covariates.

    Args:
        like: A state of one row, whose values the parameters start from.
        num_inputs: Covariates of the first step that the network reads; 0 for none.
    """

    def __init__(self, like: State, num_inputs: int = 0) -> None:
        super().__init__()
        self.values, self.network = nn.ParameterDict(), None
        for name, x in like.tensors().items():  # one by one: a ParameterDict sorts the names of a dictionary
            self.values[name] = x[0].detach().clone()
        self.num_inputs, self.widths = num_inputs, [value.numel() for value in self.values.values()]
        if num_inputs:
            features = MLP(num_inputs, MLPConfig())
            self.network = nn.Sequential(features, nn.Linear(features.out_features, sum(self.widths), bias=False))

    def forward(self, batch_size: int, inputs: Tensor | None = None) -> State:
        """Return the state of some sequences, whose covariates of the first step have shape (batch_size, covariates).

        Raises:
            UserError: The covariates are missing or of another shape.
        """
        state = {name: value.expand(batch_size, *value.shape) for name, value in self.values.items()}
        if self.network is None:
            return State.of_tensors(state)
        expected = (batch_size, self.num_inputs)
        if inputs is None or tuple(inputs.shape) != expected:
            given = "none" if inputs is None else f"shape {tuple(inputs.shape)}"
            raise UserError(
                f"inputs: the initial state reads those of the first step, shape {expected}, but got {given}"
            )
        with torch.autocast(inputs.device.type, enabled=False):
            parts = self.network(inputs.to(next(iter(state.values())))).split(self.widths, -1)
        moved = zip(state.items(), parts, strict=True)
        return State.of_tensors({name: value + part.view_as(value) for (name, value), part in moved})
