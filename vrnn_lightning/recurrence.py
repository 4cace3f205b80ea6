"""The time loop: the only room that steps a VRNN.

:func:`unroll` is what training runs: it holds only what depends on z_t. :func:`filter_step` is its step with prior and
likelihood inside, for a particle filter. :func:`textbook` is the readable reference with everything inside the loop. It
shares no step code with them, takes the same noise and is tested equal. :func:`free_run` generates.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.filtering import Step
from vrnn_lightning.heads import Factorised, Gaussian, Head, Network, log_prob, tempered
from vrnn_lightning.nn import MLP
from vrnn_lightning.noise import Noise

__all__ = [
    "Generated",
    "Masks",
    "Networks",
    "Prior",
    "Reads",
    "Reference",
    "State",
    "Steps",
    "filter_step",
    "free_run",
    "log_ratio",
    "repeat_rows",
    "textbook",
    "unroll",
]


class State(NamedTuple):
    """What is carried from step to step.

    Args:
        h: Output of each layer of the recurrence, shape (batch, layers, hidden).
        c: Cells of an LSTM, shape (batch, layers, hidden); ``None`` for a GRU.
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


class Reads(NamedTuple):
    """What the networks read of the data, for all steps at once, time first.

    Args:
        cell: phi_x(x_t) and covariates, read by the recurrence, shape (time, batch, width).
        encoder: The same and, for smoothing, the summary of what is to come, shape (time, batch, width).
        inputs: Covariates, read by prior and decoder, shape (time, batch, covariates); may have width 0.
    """

    cell: Tensor
    encoder: Tensor
    inputs: Tensor


class Steps(NamedTuple):
    """What :func:`unroll` found, batch first; the latent parts have width 0 where there is no latent.

    Args:
        hidden: h_{t-1} of the top layer for every step t as the networks read it, shape (batch, time, hidden).
        mean: Posterior mean of z_t, shape (batch, time, latent).
        std: Posterior standard deviation of z_t, shape (batch, time, latent).
        z: The latent drawn, shape (batch, time, latent).
        phi_z: Its features, shape (batch, time, width).
        prior: Mean and standard deviation of the prior where the loop needed them, each (batch, time, latent).
        state: State after the last real step of each sequence.
    """

    hidden: Tensor
    mean: Tensor
    std: Tensor
    z: Tensor
    phi_z: Tensor
    prior: tuple[Tensor, Tensor] | None
    state: State


class Prior(Protocol):
    """Maps h_{t-1} and covariates to p(z_t | x_<t, z_<t)."""

    def __call__(self, features: Tensor, /) -> Factorised:
        """Return the prior with batch shape (...) and event shape (latent,)."""


class Networks(Protocol):
    """The networks of a VRNN; the latent ones are ``None`` where the model has no latent."""

    phi_x: MLP
    phi_z: MLP | None
    prior: Prior | None
    encoder: Network[Gaussian] | None
    decoder: Network[Head]
    cells: nn.ModuleList
    backward_rnn: nn.GRU | nn.LSTM | None
    residual_posterior: bool

    def look(self, x: Tensor, counted: Tensor) -> Tensor:
        """Return what phi_x reads, shape (..., width)."""


class _Inferred(NamedTuple):
    """One step's latents, each (batch, ...), and h_{t-1} as the networks read it."""

    hidden: Tensor
    mean: Tensor
    std: Tensor
    z: Tensor
    phi_z: Tensor
    prior: Factorised | None


class _FastStep:
    """One step, with every product that does not depend on z_t made beforehand for all steps.

    In the step, one product serves all that read the top layer's h_{t-1}. States are tuples: h of each layer, then c.

    Args:
        model: The networks.
        reads: What they read of the data.
        masks: Dropout, of the batch's rows; ``None`` for none.
        samples: Rows per sequence, K: row ``k * batch + i`` is sample k of sequence i.
    """

    def __init__(self, model: Networks, reads: Reads, masks: Masks | None, samples: int) -> None:
        self.model = model
        self.samples = samples
        self.cells = [cast("nn.GRUCell | nn.LSTMCell", cell) for cell in model.cells]
        bottom, top = self.cells[0], self.cells[-1]
        width = reads.cell.shape[-1]
        self.advance = _lstm if isinstance(bottom, nn.LSTMCell) else _gru
        self.gates = F.linear(reads.cell, bottom.weight_ih[:, :width], bottom.bias_ih).unbind(0)
        self.weight_z = bottom.weight_ih[:, width:].t()
        self.inputs = reads.inputs.unbind(0) if reads.inputs.shape[-1] else None
        self.mask_h = None if masks is None else [self.spread(m) for m in masks.h.unbind(1)]
        self.mask_z = None if masks is None else self.spread(masks.phi_z)
        self.weight_top: Tensor = top.weight_hh.t()
        self.bias_top: Tensor = top.bias_hh
        if model.encoder is not None:
            first = next(model.encoder.body.linears())
            split = reads.encoder.shape[-1]
            self.from_x = F.linear(reads.encoder, first.weight[:, :split], first.bias).unbind(0)
            self.weight_encoder = first.weight[:, split:].t()
            self.splits = [first.out_features, top.weight_hh.shape[0]]
            if masks is None:  # encoder and cell read the same h, so one product serves both
                self.weight_top = torch.cat([self.weight_encoder, self.weight_top], 1)
                self.bias_top = torch.cat([torch.zeros_like(first.bias), self.bias_top])

    def spread(self, x: Tensor) -> Tensor:
        """Repeat the rows of a batch for its samples."""
        return repeat_rows(x, self.samples)

    def reads_h(self, t: int, hidden: Tensor) -> Tensor:
        """Return what prior and decoder read beside z_t: h_{t-1} and the covariates."""
        return hidden if self.inputs is None else torch.cat([hidden, self.spread(self.inputs[t])], -1)

    def __call__(self, t: int, states: tuple[Tensor, ...], noise: Tensor) -> tuple[_Inferred, tuple[Tensor, ...]]:
        """Infer z_t and advance the states.

        Args:
            t: The step.
            states: Before it.
            noise: Standard normal, shape (rows, latent).
        """
        model, layers = self.model, len(self.cells)
        h, c = states[:layers], states[layers:]
        top = h[-1]
        hidden = top if self.mask_h is None else top * self.mask_h[-1]
        gate = self.spread(self.gates[t])
        gate_h = torch.addmm(self.bias_top, top, self.weight_top)
        mean = std = z = phi_z = hidden[:, :0]
        prior = None
        if model.encoder is not None and model.phi_z is not None and model.prior is not None:
            if self.mask_h is None:
                encoder_h, gate_h = gate_h.split(self.splits, 1)
            else:
                encoder_h = hidden @ self.weight_encoder
            mean, std = _infer(model.encoder, self.spread(self.from_x[t]) + encoder_h)
            if model.residual_posterior:
                prior = model.prior(self.reads_h(t, hidden))
                mean = mean + prior.mean
            z = torch.addcmul(mean, std, noise)  # rsample's formula: the gradient reaches the encoder
            phi_z = model.phi_z(z)
            if self.mask_z is not None:
                phi_z = phi_z * self.mask_z
            gate = torch.addmm(gate, phi_z, self.weight_z)

        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for layer, cell in enumerate(self.cells):
            if layer:
                below = hs[-1] if self.mask_h is None else hs[-1] * self.mask_h[layer - 1]
                gate = F.linear(below, cell.weight_ih, cell.bias_ih)
            own = gate_h if layer == layers - 1 else F.linear(h[layer], cell.weight_hh, cell.bias_hh)
            new_h, new_c = self.advance(gate, own, h[layer], c[layer] if c else None)
            hs.append(new_h)
            if new_c is not None:
                cs.append(new_c)
        return _Inferred(hidden, mean, std, z, phi_z, prior), (*hs, *cs)


def unroll(
    model: Networks,
    reads: Reads,
    noise: Tensor,
    state: State,
    lengths: Tensor,
    masks: Masks | None = None,
    samples: int = 1,
) -> Steps:
    """Infer z_t and h_t step by step: encoder, latent sample, phi_z and cells, and nothing else.

    Args:
        model: The networks.
        reads: What they read of the data.
        noise: Standard normal noise, shape (samples * batch, time, latent).
        state: State before the first step, of samples * batch rows.
        lengths: Real steps of each row, shape (samples * batch,).
        masks: Dropout, of batch rows.
        samples: Rows per sequence.

    Returns:
        The steps, batch first, samples * batch rows.
    """
    step = _FastStep(model, reads, masks, samples)
    noises = noise.transpose(0, 1).contiguous().unbind(0)
    states = state.layers()
    before, inferred = [], []
    for t, drawn in enumerate(noises):
        before.append(states)
        found, states = step(t, states, drawn)
        inferred.append(found)
    hidden, mean, std, z, phi_z = (torch.stack(part, 1) for part in zip(*(i[:-1] for i in inferred), strict=True))
    priors = [i.prior for i in inferred if i.prior is not None]
    prior = None
    if priors:
        prior = torch.stack([p.mean for p in priors], 1), torch.stack([p.stddev for p in priors], 1)
    last = tuple(
        _at(torch.stack(past, 1), now, lengths) for past, now in zip(zip(*before, strict=True), states, strict=True)
    )
    return Steps(hidden, mean, std, z, phi_z, prior, _as_state(last, len(model.cells)))


def filter_step(
    model: Networks,
    reads: Reads,
    batch: SequenceBatch,
    noise: Noise,
    samples: int,
    masks: Masks | None = None,
    beta: float = 1.0,
) -> Step:
    r"""Return the step of a particle filter whose proposal is the posterior.

    Its increments are :math:`\log p(x_t \mid z_{\le t}, x_{<t}) + \beta\,[\log p(z_t \mid \cdot) - \log q(z_t \mid
    \cdot)]` with the z drawn.

    Args:
        model: The networks.
        reads: What they read of the data.
        batch: The data, finite also where they do not count.
        noise: Draws standard normal noise, a step's at a time.
        samples: Particles per sequence, K.
        masks: Dropout, of batch rows.
        beta: Weight of the latent's part; 1 for a likelihood.
    """
    step = _FastStep(model, reads, masks, samples)
    observed = None if batch.observed is None else batch.counted
    latent = model.encoder.head.num_features if model.encoder is not None else 0

    def advance(t: int, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        drawn = noise.normal(samples, latent).transpose(0, 1).flatten(0, 1)
        found, states = step(t, states, drawn)
        features = step.reads_h(t, found.hidden)
        x, seen = step.spread(batch.x[:, t]), None if observed is None else step.spread(observed[:, t])
        log_weight = log_prob(model.decoder(torch.cat([found.phi_z, features], -1)), x, seen)
        if model.prior is not None:
            prior = model.prior(features) if found.prior is None else found.prior
            posterior = Factorised(Normal(found.mean, found.std, validate_args=False))
            log_weight = log_weight + beta * log_ratio(prior, posterior, found.z)
        return log_weight.unflatten(0, (samples, -1)), states

    return advance


def repeat_rows(x: Tensor, samples: int) -> Tensor:
    """Return a batch's rows, shape (batch, ...), for each of its samples: row ``k * batch + i`` is row i."""
    return x if samples == 1 else x.repeat(samples, *[1] * (x.ndim - 1))


def log_ratio(prior: Factorised, posterior: Factorised, z: Tensor) -> Tensor:
    """Return log p(z) - log q(z) in nats, shape (...), of latents of shape (..., latent)."""
    ratio: Tensor = prior.log_prob(z) - posterior.log_prob(z)
    return ratio


def _as_state(states: tuple[Tensor, ...], layers: int) -> State:
    c = states[layers:]
    return State(torch.stack(states[:layers], 1), torch.stack(c, 1) if c else None)


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
    return Generated(x, mean, z, _as_state(tuple(states), layers))
