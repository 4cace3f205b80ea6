"""The time loop: the only room that steps.

:func:`unroll` is what training runs: it holds only what depends on z_t. :func:`textbook` is the readable reference with
everything inside the loop. They share no step code, take the same noise and are tested equal.
:func:`free_run` generates.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.nn import functional as F

from vrnn_lightning.heads import Gaussian, Head, Network
from vrnn_lightning.nn import MLP

__all__ = ["Generated", "Networks", "Reference", "State", "Steps", "free_run", "textbook", "unroll"]


class State(NamedTuple):
    """What is carried from step to step.

    Args:
        h: Output of the recurrence, shape (batch, hidden).
        c: Cell of an LSTM, shape (batch, hidden); ``None`` for a GRU.
    """

    h: Tensor
    c: Tensor | None = None


class Steps(NamedTuple):
    """What :func:`unroll` found, batch first; the latent parts have width 0 where there is no latent.

    Args:
        hidden: h_{t-1} for every step t, shape (batch, time, hidden).
        mean: Posterior mean of z_t, shape (batch, time, latent).
        std: Posterior standard deviation of z_t, shape (batch, time, latent).
        z: The latent drawn, shape (batch, time, latent).
        phi_z: Its features, shape (batch, time, width).
        state: State after the last real step of each sequence.
    """

    hidden: Tensor
    mean: Tensor
    std: Tensor
    z: Tensor
    phi_z: Tensor
    state: State


class Networks(Protocol):
    """The networks of a VRNN; the latent ones are ``None`` where the model has no latent."""

    phi_x: MLP
    phi_z: MLP | None
    prior: Network[Gaussian] | None
    encoder: Network[Gaussian] | None
    decoder: Network[Head]
    cell: nn.GRUCell | nn.LSTMCell

    def centre(self, x: Tensor) -> Tensor:
        """Return what phi_x reads, shape (..., features)."""


def unroll(model: Networks, phi_x: Tensor, noise: Tensor, state: State, lengths: Tensor) -> Steps:
    """Infer z_t and h_t step by step: encoder, latent sample, phi_z and cell, and nothing else.

    Products with phi_x are made for all steps before the loop; in the loop one product serves all that read h_{t-1}.

    Args:
        model: The networks.
        phi_x: Features of the inputs, time first: shape (time, batch, width).
        noise: Standard normal noise, shape (batch, time, latent).
        state: State before the first step.
        lengths: Real steps of each sequence, shape (batch,).

    Returns:
        The steps, batch first.
    """
    width = phi_x.shape[-1]
    cell = model.cell
    gates = F.linear(phi_x, cell.weight_ih[:, :width], cell.bias_ih).unbind(0)
    weight_z = cell.weight_ih[:, width:].t()
    splits = [0, cell.weight_hh.shape[0]]
    reads_h: Tensor = cell.weight_hh
    bias_h: Tensor = cell.bias_hh
    if model.encoder is not None:
        first = next(model.encoder.body.linears())
        from_x = F.linear(phi_x, first.weight[:, :width], first.bias).unbind(0)
        reads_h = torch.cat([first.weight[:, width:], reads_h])
        bias_h = torch.cat([torch.zeros_like(first.bias), bias_h])
        splits[0] = first.out_features
    weight_h = reads_h.t()
    advance = _gru if state.c is None else _lstm
    noises = noise.transpose(0, 1).contiguous().unbind(0)

    h, c = state
    hidden, cells, latents = [], [], []
    for t, gate in enumerate(gates):
        hidden.append(h)
        if c is not None:
            cells.append(c)
        encoder_h, gate_h = torch.addmm(bias_h, h, weight_h).split(splits, 1)
        if model.encoder is not None and model.phi_z is not None:
            mean, std = _infer(model.encoder, from_x[t] + encoder_h)
            z = torch.addcmul(mean, std, noises[t])  # rsample's formula: the gradient reaches the encoder
            phi_z = model.phi_z(z)
            gate = torch.addmm(gate, phi_z, weight_z)
            latents.append((mean, std, z, phi_z))
        h, c = advance(gate, gate_h, h, c)

    empty = phi_x.new_zeros(phi_x.shape[1], len(gates), 0)
    mean, std, z, phi_z = [torch.stack(part, 1) for part in zip(*latents, strict=True)] or [empty] * 4
    before = torch.stack(hidden, 1)
    last = State(_at(before, h, lengths), None if c is None else _at(torch.stack(cells, 1), c, lengths))
    return Steps(before, mean, std, z, phi_z, last)


def _infer(encoder: Network[Gaussian], first: Tensor) -> tuple[Tensor, Tensor]:
    """Finish the encoder from its first layer's sum, shape (batch, width)."""
    features = first.relu()
    for linear in list(encoder.body.linears())[1:]:
        features = linear(features).relu()
    return encoder.head.moments(encoder.head.linear(features))


def _gru(gate_x: Tensor, gate_h: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Advance a GRU (Cho et al. 2014, as in torch.nn.GRUCell) from its two sums, each (batch, 3 hidden)."""
    splits = [2 * h.shape[1], h.shape[1]]
    sum_x, new_x = gate_x.split(splits, 1)
    sum_h, new_h = gate_h.split(splits, 1)
    reset, update = (sum_x + sum_h).sigmoid().chunk(2, 1)
    new = torch.addcmul(new_x, reset, new_h).tanh()
    return new.to(h.dtype).lerp(h, update.to(h.dtype)), None  # under autocast the state stays wide


def _lstm(gate_x: Tensor, gate_h: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Advance an LSTM (as in torch.nn.LSTMCell) from its two sums, each (batch, 4 hidden)."""
    write, forget, new, output = (gate_x + gate_h).chunk(4, 1)
    assert c is not None
    c = forget.sigmoid() * c + write.sigmoid() * new.tanh()
    return output.sigmoid() * c.tanh(), c


def _at(before: Tensor, after: Tensor, lengths: Tensor) -> Tensor:
    """Pick the state after each sequence's last real step, which is the one before its first padded step."""
    steps = before.shape[1]
    rows = torch.arange(len(lengths), device=lengths.device)
    picked = before[rows, lengths.clamp(max=steps - 1)]
    return torch.where((lengths >= steps)[:, None], after, picked)


class Reference(NamedTuple):
    """What :func:`textbook` found, batch first; zero at padding."""

    log_px: Tensor
    kl: Tensor
    z: Tensor
    state: State


def textbook(model: Networks, x: Tensor, lengths: Tensor, noise: Tensor, state: State) -> Reference:
    r"""Do all of a VRNN's work step by step, as the paper writes it (Chung et al. 2015, eq. 5 to 11).

    The model generates, and infers, one step at a time::

        generation   h_{t-1} -> z_t,  (z_t, h_{t-1}) -> x_t        inference   (x_t, h_{t-1}) -> z_t
        recurrence   (x_t, z_t, h_{t-1}) -> h_t

    Slow and plain: it is what :func:`unroll` is tested against, values and gradients, and timed against.

    Args:
        model: The networks.
        x: Frames, shape (batch, time, features).
        lengths: Real steps of each sequence, shape (batch,).
        noise: Standard normal noise, shape (batch, time, latent).
        state: State before the first step.

    Returns:
        log p(x_t | z_<=t, x_<t), shape (batch, time); the KL of each latent dimension, shape (batch, time, latent);
        the latents; and the state after each sequence's last real step.
    """
    h, c = state
    log_px, kl, zs = [], [], []
    for t in range(x.shape[1]):
        real = (t < lengths)[:, None]
        phi_x = model.phi_x(model.centre(x[:, t]))
        reads, features = [phi_x], [h]
        kl_t = z_t = x.new_zeros(len(x), 0)
        if model.prior is not None and model.encoder is not None and model.phi_z is not None:
            prior = model.prior(h)
            posterior = model.encoder(torch.cat([phi_x, h], -1))
            z_t = posterior.mean + posterior.stddev * noise[:, t]
            kl_t = kl_divergence(posterior.base_dist, prior.base_dist)
            phi_z = model.phi_z(z_t)
            reads, features = [phi_x, phi_z], [phi_z, h]
        emission = model.decoder(torch.cat(features, -1))
        log_px.append(torch.where(real[:, 0], emission.log_prob(x[:, t]), 0.0))
        kl.append(torch.where(real, kl_t, 0.0))
        zs.append(z_t)
        inputs = torch.cat(reads, -1)
        if c is None:
            h = torch.where(real, model.cell(inputs, h), h)
        else:
            h_new, c_new = model.cell(inputs, (h, c))
            h, c = torch.where(real, h_new, h), torch.where(real, c_new, c)
    return Reference(torch.stack(log_px, 1), torch.stack(kl, 1), torch.stack(zs, 1), State(h, c))


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
def free_run(model: Networks, steps: int, state: State) -> Generated:
    """Generate: prior, phi_z, decoder, a draw from the emission, phi_x, cell, and again.

    Args:
        model: The networks.
        steps: Frames to draw.
        state: State before the first step; its batch size is the number of sequences.
    """
    h, c = state
    drawn = []
    for _ in range(steps):
        z = h.new_zeros(len(h), 0)
        reads, features = [], [h]
        if model.prior is not None and model.phi_z is not None:
            z = model.prior(h).sample()
            phi_z = model.phi_z(z)
            reads, features = [phi_z], [phi_z, h]
        emission: Distribution = model.decoder(torch.cat(features, -1))
        x = emission.sample()
        drawn.append((x, emission.mean, z))
        inputs = torch.cat([model.phi_x(model.centre(x)), *reads], -1)
        if c is None:
            h = model.cell(inputs, h)
        else:
            h, c = model.cell(inputs, (h, c))
    x, mean, z = (torch.stack(part, 1) for part in zip(*drawn, strict=True))
    return Generated(x, mean, z, State(h, c))
