"""Generation: the model runs on what it draws."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vrnn_lightning.heads import tempered
from vrnn_lightning.recurrence.parts import Networks, State, as_state

__all__ = ["Generated", "free_run"]


class Generated(NamedTuple):
    """What :func:`free_run` drew, batch first.

    Args:
        x: Frames, shape (batch, time, features).
        mean: Mean of the emission each frame was drawn from, shape (batch, time, features).
        z: Latents, shape (batch, time, latent).
        state: State after the last step.
    """

    x: Tensor
    mean: Tensor
    z: Tensor
    state: State


@torch.no_grad()
def free_run(
    model: Networks, steps: int, state: State, inputs: Tensor | None = None, temperature: float = 1.0
) -> Generated:
    """Generate: prior, phi_z, decoder, a draw from the emission, phi_x, cells, and again.

    Args:
        model: The networks.
        steps: Frames to draw.
        state: State before the first step; its batch size is the number of sequences.
        inputs: Covariates, shape (batch, time, covariates), if the model reads any.
        temperature: Of the emission; below 1 for the more likely frames.
    """
    states, layers = list(state.layers()), len(model.cells)
    drawn = []
    for t in range(steps):
        h = states[layers - 1]
        u = [] if inputs is None else [inputs[:, t]]
        z = phi_z = h.new_zeros(len(h), 0)
        if model.prior is not None and model.phi_z is not None:
            z = model.prior(torch.cat([h, *u], -1)).sample()
            phi_z = model.phi_z(z)
        emission = tempered(model.decoder(torch.cat([phi_z, h, *u], -1)), temperature)
        x = emission.sample()
        drawn.append((x, emission.mean, z))
        reads = torch.cat([model.phi_x(model.look(x, torch.ones_like(x, dtype=torch.bool))), *u, phi_z], -1)
        for layer, cell in enumerate(model.cells):
            if isinstance(cell, nn.LSTMCell):
                states[layer], states[layers + layer] = cell(reads, (states[layer], states[layers + layer]))
            else:
                states[layer] = cell(reads, states[layer])
            reads = states[layer]
    x, mean, z = (torch.stack(part, 1) for part in zip(*drawn, strict=True))
    return Generated(x, mean, z, as_state(tuple(states), layers))
