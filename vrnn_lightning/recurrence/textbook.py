"""The readable reference: everything inside one loop, step by step, as the paper writes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.heads import log_prob, tempered
from vrnn_lightning.recurrence.generation import Generated
from vrnn_lightning.recurrence.parts import Masks, Networks, State, as_state

__all__ = ["Reference", "textbook", "textbook_generation"]


class Reference(NamedTuple):
    """What :func:`textbook` found, batch first; zero at padding.

    Args:
        log_px: log p(x_t | z_<=t, x_<t), shape (batch, time).
        kl: KL of each latent dimension, shape (batch, time, latent).
        log_ratio: log p(z_t | .) - log q(z_t | .) of the latents drawn, shape (batch, time).
        z: The latents, shape (batch, time, latent).
        state: State after each sequence's last real step.
    """

    log_px: Tensor
    kl: Tensor
    log_ratio: Tensor
    z: Tensor
    state: State


def textbook(
    model: Networks, batch: SequenceBatch, noise: Tensor, state: State, masks: Masks | None = None
) -> Reference:
    r"""Do all of a VRNN's work step by step, as the paper writes it (Chung et al. 2015, eq. 5 to 11).

    The model generates, and infers, one step at a time::

        generation   h_{t-1} -> z_t,  (z_t, h_{t-1}) -> x_t        inference   (x_t, h_{t-1}) -> z_t
        recurrence   (x_t, z_t, h_{t-1}) -> h_t

    Slow and plain: it is what :func:`unroll` is tested against, values and gradients, and timed against.

    Args:
        model: The networks.
        batch: Finite everywhere.
        noise: Standard normal noise, shape (batch, time, latent).
        state: State before the first step.
        masks: Dropout.
    """
    x, counted = batch.x, batch.counted
    steps = x.shape[1]
    hs = list(state.h.unbind(1))
    cs = [] if state.c is None else list(state.c.unbind(1))
    future = _textbook_future(model, batch, masks)
    log_px, kl, ratio, zs = [], [], [], []
    for t in range(steps):
        real = (t < batch.lengths)[:, None]
        u = [] if batch.inputs is None else [batch.inputs[:, t]]
        h = hs[-1] if masks is None else hs[-1] * masks.h[:, -1]
        phi_x = model.phi_x(model.look(x[:, t], counted[:, t]))
        phi_x = phi_x if masks is None else phi_x * masks.phi_x
        phi_z = kl_t = z_t = x.new_zeros(len(x), 0)
        ratio_t = x.new_zeros(len(x))
        if model.prior is not None and model.encoder is not None and model.phi_z is not None:
            prior = model.prior(torch.cat([h, *u], -1))
            posterior = model.encoder(torch.cat([phi_x, *u, *(f[:, t] for f in future), h], -1))
            mean = posterior.mean + prior.mean if model.residual_posterior else posterior.mean
            z_t = mean + posterior.stddev * noise[:, t]
            posterior = Normal(mean, posterior.stddev)
            kl_t = kl_divergence(posterior, prior.base_dist)
            ratio_t = (prior.base_dist.log_prob(z_t) - posterior.log_prob(z_t)).sum(-1)
            phi_z = model.phi_z(z_t) if masks is None else model.phi_z(z_t) * masks.phi_z
        emission = model.decoder(torch.cat([phi_z, h, *u], -1))
        scored = log_prob(emission, x[:, t], None if batch.observed is None else counted[:, t])
        log_px.append(torch.where(real[:, 0], scored, 0.0))
        kl.append(torch.where(real, kl_t, 0.0))
        ratio.append(torch.where(real[:, 0], ratio_t, 0.0))
        zs.append(z_t)
        reads = torch.cat([phi_x, *u, phi_z], -1)
        for layer, cell in enumerate(model.cells):
            if cs:
                new, c = cell(reads, (hs[layer], cs[layer]))
                cs[layer] = torch.where(real, c, cs[layer])
            else:
                new = cell(reads, hs[layer])
            hs[layer] = torch.where(real, new, hs[layer])
            reads = new if masks is None else new * masks.h[:, layer]
    last = State(torch.stack(hs, 1), torch.stack(cs, 1) if cs else None)
    return Reference(torch.stack(log_px, 1), torch.stack(kl, 1), torch.stack(ratio, 1), torch.stack(zs, 1), last)


def _textbook_future(model: Networks, batch: SequenceBatch, masks: Masks | None) -> list[Tensor]:
    """Return the states of the recurrence that reads backwards, shape (batch, time, hidden), if there is one."""
    rnn = model.backward_rnn
    if rnn is None:
        return []
    kind = nn.GRUCell if isinstance(rnn, nn.GRU) else nn.LSTMCell
    weights: dict[str, Tensor] = {name.removesuffix("_l0"): value for name, value in rnn.named_parameters()}
    x, counted = batch.x, batch.counted
    a = x.new_zeros(len(x), rnn.hidden_size)
    c, past = a, []
    cell = kind(rnn.input_size, rnn.hidden_size).to(x)
    for t in reversed(range(x.shape[1])):
        u = [] if batch.inputs is None else [batch.inputs[:, t]]
        phi_x = model.phi_x(model.look(x[:, t], counted[:, t]))
        phi_x = phi_x if masks is None else phi_x * masks.phi_x
        reads, real = torch.cat([phi_x, *u], -1), (t < batch.lengths)[:, None]
        before = a if isinstance(cell, nn.GRUCell) else (a, c)
        found = torch.func.functional_call(cell, weights, (reads, before))
        new, new_c = (found, c) if isinstance(found, Tensor) else found
        a, c = torch.where(real, new, a), torch.where(real, new_c, c)
        past.append(a)
    return [torch.stack(past[::-1], 1)]


@torch.no_grad()
def textbook_generation(
    model: Networks, steps: int, state: State, inputs: Tensor | None = None, temperature: float = 1.0
) -> Generated:
    """Generate: prior, phi_z, decoder, a draw from the emission, phi_x, cells, and again.

    Slow and plain: it is what :func:`free_run` is tested against, and timed against.

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
