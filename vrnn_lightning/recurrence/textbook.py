"""The readable reference: everything inside one loop, step by step, as the paper writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.filtering import Filtered, Resampling, particle_filter
from vrnn_lightning.heads import log_prob, tempered
from vrnn_lightning.recurrence.generation import Generated
from vrnn_lightning.recurrence.parts import Masks, Networks, State, as_state, repeat_rows

__all__ = ["Reference", "Scored", "advanced", "textbook", "textbook_filter", "textbook_generation", "textbook_step"]


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


class Scored(NamedTuple):
    """What one step found.

    Args:
        log_px: log p(x_t | z_<=t, x_<t), shape (batch,).
        kl: KL of each latent dimension, shape (batch, latent).
        log_ratio: log p(z_t | .) - log q(z_t | .) of the latent drawn, shape (batch,).
        z: The latent, shape (batch, latent).
    """

    log_px: Tensor
    kl: Tensor
    log_ratio: Tensor
    z: Tensor


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
    states = state.layers()
    future = _textbook_future(model, batch, masks)
    log_px, kl, ratio, zs = [], [], [], []
    for t in range(batch.x.shape[1]):
        real = (t < batch.lengths)[:, None]
        found, after = textbook_step(model, batch, t, states, noise[:, t], masks, [f[:, t] for f in future])
        states = tuple(torch.where(real, new, old) for new, old in zip(after, states, strict=True))
        log_px.append(torch.where(real[:, 0], found.log_px, 0.0))
        kl.append(torch.where(real, found.kl, 0.0))
        ratio.append(torch.where(real[:, 0], found.log_ratio, 0.0))
        zs.append(found.z)
    last = as_state(states, len(model.cells))
    return Reference(torch.stack(log_px, 1), torch.stack(kl, 1), torch.stack(ratio, 1), torch.stack(zs, 1), last)


def textbook_step(
    model: Networks,
    batch: SequenceBatch,
    t: int,
    states: Sequence[Tensor],
    noise: Tensor,
    masks: Masks | None,
    future: Sequence[Tensor] = (),
) -> tuple[Scored, tuple[Tensor, ...]]:
    """Take one step: prior, posterior, latent, likelihood, recurrence.

    Args:
        model: The networks.
        batch: Finite everywhere.
        t: The step.
        states: h of each layer, then c of each layer, each (batch, hidden).
        noise: Standard normal, shape (batch, latent).
        masks: Dropout.
        future: What a smoothing posterior knows of what is to come, (batch, hidden).
    """
    layers = len(model.cells)
    x, counted = batch.x[:, t], batch.counted[:, t]
    hs, cs = list(states[:layers]), list(states[layers:])
    u = [] if batch.inputs is None else [batch.inputs[:, t]]
    h = hs[-1] if masks is None else hs[-1] * masks.h[:, -1]
    phi_x = model.phi_x(model.look(x, counted))
    phi_x = phi_x if masks is None else phi_x * masks.phi_x
    phi_z = kl = z = x.new_zeros(x.shape[0], 0)  # not len: an export keeps the batch open
    log_ratio = x.new_zeros(x.shape[0])
    if model.prior is not None and model.encoder is not None and model.phi_z is not None:
        prior = model.prior(torch.cat([h, *u], -1))
        posterior = model.encoder(torch.cat([phi_x, *u, *future, h], -1))
        mean = posterior.mean + prior.mean if model.residual_posterior else posterior.mean
        z = mean + posterior.stddev * noise
        posterior = Normal(mean, posterior.stddev, validate_args=False)
        kl = kl_divergence(posterior, prior.base_dist)
        log_ratio = (prior.base_dist.log_prob(z) - posterior.log_prob(z)).sum(-1)
        phi_z = model.phi_z(z) if masks is None else model.phi_z(z) * masks.phi_z
    emission = model.decoder(torch.cat([phi_z, h, *u], -1))
    log_px = log_prob(emission, x, None if batch.observed is None else counted)
    reads = torch.cat([phi_x, *u, phi_z], -1)
    for layer, cell in enumerate(model.cells):
        if cs:
            hs[layer], cs[layer] = cell(reads, (hs[layer], cs[layer]))
        else:
            hs[layer] = cell(reads, hs[layer])
        reads = hs[layer] if masks is None else hs[layer] * masks.h[:, layer]
    return Scored(log_px, kl, log_ratio, z), (*hs, *cs)


def textbook_filter(
    model: Networks,
    batch: SequenceBatch,
    noise: Tensor,
    draws: Tensor,
    state: State,
    resampling: Resampling | None,
    masks: Masks | None = None,
    beta: float = 1.0,
) -> Filtered:
    """Run the particle filter on the textbook's steps, with a graph through all of it; not for smoothing.

    Args:
        model: The networks.
        batch: Finite everywhere.
        noise: Standard normal noise, shape (samples * batch, time, latent).
        draws: Numbers in [0, 1), shape (batch, time, numbers per resampling).
        state: State before the first step, of samples * batch rows.
        resampling: When and how particles are drawn anew.
        masks: Dropout, of batch rows.
        beta: Weight of the latent's part.
    """
    samples = len(noise) // len(batch)

    def spread(x: Tensor) -> Tensor:
        return repeat_rows(x, samples)

    observed, inputs = (None if v is None else spread(v) for v in (batch.observed, batch.inputs))
    many = SequenceBatch(spread(batch.x), spread(batch.lengths), observed, inputs)
    dropped = None if masks is None else Masks(*(spread(mask) for mask in masks))

    def step(t: int, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        found, states = textbook_step(model, many, t, states, noise[:, t], dropped)
        return (found.log_px + beta * found.log_ratio).unflatten(0, (samples, -1)), states

    uniforms = iter(draws.unbind(1))
    return particle_filter(
        step, state.layers(), batch.lengths, samples, batch.x.shape[1], resampling, lambda _: next(uniforms)
    )


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
        states = advanced(model, reads, states)
    x, mean, z = (torch.stack(part, 1) for part in zip(*drawn, strict=True))
    return Generated(x, mean, z, as_state(tuple(states), layers))


def advanced(model: Networks, reads: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Return h of each layer, then c of each layer, a step later.

    Args:
        model: The networks.
        reads: What the first layer's cell reads, shape (rows, width).
        states: As :meth:`State.layers` returns them.
    """
    states, layers = list(states), len(model.cells)
    for layer, cell in enumerate(model.cells):
        if isinstance(cell, nn.LSTMCell):
            states[layer], states[layers + layer] = cell(reads, (states[layer], states[layers + layer]))
        else:
            states[layer] = cell(reads, states[layer])
        reads = states[layer]
    return states
