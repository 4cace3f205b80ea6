"""The readable loop: every step is the model's four methods, as the paper writes them. The tests' reference.

Slow and plain: ``vrnn_lightning.recurrence.infer``, the particle filter and generation are tested against it, values
and gradients, and benchmarks time them against it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.filtering import FilterResult, Resampling, map_tensors, particle_filter
from vrnn_lightning.heads import log_prob, tempered
from vrnn_lightning.recurrence.generation import Generated
from vrnn_lightning.recurrence.state import Masks, State, log_ratio, output, repeat_rows
from vrnn_lightning.vrnn import Equations

__all__ = ["StepTerms", "readable_filter", "readable_generation", "readable_loop", "readable_step"]


class StepTerms(NamedTuple):
    """What one step, or a whole loop, computed; zero at padding.

    Args:
        log_px: log p(x_t | z_<=t, x_<t), shape (batch,), of a loop (batch, time).
        kl: KL of each latent dimension, shape (batch, latent), of a loop (batch, time, latent).
        log_ratio: log p(z_t | .) - log q(z_t | .) of the latents drawn, shape (batch,), of a loop (batch, time).
        z: The latent, shape (batch, latent), of a loop (batch, time, latent).
        state: State after the step, of a loop after the last real step of each sequence.
    """

    log_px: Tensor
    kl: Tensor
    log_ratio: Tensor
    z: Tensor
    state: State


def readable_loop(
    model: Equations, batch: SequenceBatch, noise: Tensor, state: State, masks: Masks | None = None
) -> StepTerms:
    r"""Do all of a VRNN's work step by step (Chung et al. 2015, eq. 5 to 11).

    The model generates, and infers, one step at a time::

        generation   h_{t-1} -> z_t,  (z_t, h_{t-1}) -> x_t        inference   (x_t, h_{t-1}) -> z_t
        recurrence   (x_t, z_t, h_{t-1}) -> h_t

    Args:
        model: The model.
        batch: Finite everywhere.
        noise: Standard normal noise, shape (batch, time, latent).
        state: State before the first step.
        masks: Dropout.
    """
    steps, future = [], readable_future(model, batch, masks)
    for t in range(batch.x.shape[1]):
        is_real = t < batch.lengths
        step = readable_step(model, batch, t, state, noise[:, t], masks, future)
        state = _next_where(is_real, step.state, state)
        steps.append([*(_where(is_real, term, 0.0) for term in step[:3]), step.z])
    log_px, kl, ratio, z = (torch.stack(term, 1) for term in zip(*steps, strict=True))
    return StepTerms(log_px, kl, ratio, z, state)


def readable_kl(posterior: Distribution, prior: Distribution, z: Tensor) -> Tensor:
    """Return the KL of each dimension or group, or an estimate of the whole of width 1."""
    if isinstance(posterior, Independent) and isinstance(prior, Independent):
        return kl_divergence(posterior.base_dist, prior.base_dist)
    if hasattr(posterior, "logits"):
        return kl_divergence(Categorical(logits=posterior.logits), Categorical(logits=prior.logits))
    return (posterior.log_prob(z) - prior.log_prob(z))[..., None]


def readable_step(
    model: Equations,
    batch: SequenceBatch,
    t: int,
    state: State,
    noise: Tensor,
    masks: Masks | None = None,
    future: Tensor | None = None,
    *,
    weighted: bool = False,
) -> StepTerms:
    """Take step t: prior, posterior, latent, likelihood, recurrence.

    Args:
        model: The model.
        batch: Finite everywhere.
        t: The step.
        state: State before it.
        noise: Standard normal, shape (batch, latent).
        masks: Dropout.
        future: States of the recurrence that reads backwards, for smoothing, shape (batch, time, hidden).
        weighted: Whether the rows are particles; then a straight-through draw has no gradient.
    """
    if batch.is_first is not None:
        state = _next_where(batch.is_first[:, t], model.initial_state(len(batch)), state)
    x, valid, h = batch.x[:, t], batch.valid_mask[:, t], output(state, masks)
    inputs, future = (None if values is None else values[:, t] for values in (batch.inputs, future))
    x_features = model.extract_x(x, valid, masks)
    prior = model.prior_dist(h, inputs)
    posterior = model.posterior_dist(x_features, h, prior, inputs, future)
    is_gaussian = isinstance(getattr(posterior, "base_dist", None), Normal)
    z = posterior.mean + posterior.stddev * noise if is_gaussian else model.latent.rsample(posterior, noise)
    z = z.detach() if weighted and model.latent.is_straight_through else z
    z_features = model.extract_z(z, masks)
    emission = model.emission_dist(z_features, h, inputs)
    log_px = log_prob(emission, x, None if batch.observed is None else valid)
    kl = readable_kl(posterior, prior, z)
    _, after = model.next_state(x_features, z_features, state, inputs, masks)
    return StepTerms(log_px, kl, log_ratio(prior, posterior, z), z, after)


def _where(is_real: Tensor, new: Tensor, old: Tensor | float) -> Tensor:
    return torch.where(is_real.view(-1, *[1] * (new.ndim - 1)), new, old)


def _next_where(is_real: Tensor, new: State, old: State) -> State:
    return map_tensors(lambda x, y: _where(is_real, x, y), new, old)


def readable_future(model: Equations, batch: SequenceBatch, masks: Masks | None = None) -> Tensor | None:
    """Return the states of the recurrence that reads backwards, shape (batch, time, hidden), if there is one."""
    rnn = model.backward_rnn
    if rnn is None:
        return None
    cell = (nn.GRUCell if isinstance(rnn, nn.GRU) else nn.LSTMCell)(rnn.input_size, rnn.hidden_size).to(batch.x)
    weights: dict[str, Tensor] = {name.removesuffix("_l0"): value for name, value in rnn.named_parameters()}
    a = c = batch.x.new_zeros(len(batch), rnn.hidden_size)
    states = []
    for t in reversed(range(batch.x.shape[1])):
        x_features = model.extract_x(batch.x[:, t], batch.valid_mask[:, t], masks)
        read = x_features if batch.inputs is None else torch.cat([x_features, batch.inputs[:, t]], -1)
        if batch.is_first is not None and t + 1 < batch.x.shape[1]:
            is_same = (~batch.is_first[:, t + 1, None]).to(a)  # step t ends an episode where the next one is first
            a, c = a * is_same, c * is_same
        before = a if isinstance(cell, nn.GRUCell) else (a, c)
        found = torch.func.functional_call(cell, weights, (read, before))
        new, new_c = (found, c) if isinstance(found, Tensor) else found
        is_real = (t < batch.lengths)[:, None]
        a, c = torch.where(is_real, new, a), torch.where(is_real, new_c, c)
        states.append(a)
    return torch.stack(states[::-1], 1)


def readable_filter(
    model: Equations,
    batch: SequenceBatch,
    noise: Tensor,
    draws: Tensor,
    state: State,
    resampling: Resampling | None,
    masks: Masks | None = None,
    beta: float = 1.0,
) -> FilterResult:
    """Run the particle filter on readable steps, with a graph through all of it; not for smoothing.

    Args:
        model: The model.
        batch: Finite everywhere.
        noise: Standard normal noise, shape (samples * batch, time, latent).
        draws: Numbers in [0, 1), shape (batch, time, numbers per resampling).
        state: State before the first step, of samples * batch rows.
        resampling: When and how particles are resampled.
        masks: Dropout, of batch rows.
        beta: Weight of the latent's part.
    """
    samples = len(noise) // len(batch)

    def spread(values: Tensor) -> Tensor:
        return repeat_rows(values, samples)

    fields = (batch.observed, batch.inputs, batch.is_first)
    observed, inputs, is_first = (None if values is None else spread(values) for values in fields)
    many = SequenceBatch(spread(batch.x), spread(batch.lengths), observed, inputs, is_first=is_first)
    dropped = None if masks is None else Masks(*(spread(mask) for mask in masks))

    def step(t: int, state: State) -> tuple[Tensor, State]:
        terms = readable_step(model, many, t, state, noise[:, t], dropped, weighted=samples > 1)
        return (terms.log_px + beta * terms.log_ratio).unflatten(0, (samples, -1)), terms.state

    uniforms = iter(draws.unbind(1))
    steps = batch.x.shape[1]
    return particle_filter(
        step, state, batch.lengths, samples, steps, resampling, lambda _: next(uniforms), batch.is_first
    )


@torch.no_grad()
def readable_generation(
    model: Equations, steps: int, state: State, inputs: Tensor | None = None, temperature: float = 1.0
) -> Generated:
    """Generate as :func:`vrnn_lightning.recurrence.generate` does, with its arguments."""
    drawn = []
    for t in range(steps):
        h, now = output(state), None if inputs is None else inputs[:, t]
        z = model.prior_dist(h, now).sample()
        z_features = model.extract_z(z)
        emission = tempered(model.emission_dist(z_features, h, now), temperature)
        x = emission.sample()
        drawn.append((x, emission.mean, z))
        _, state = model.next_state(model.extract_x(x), z_features, state, now)
    x, mean, z = (torch.stack(part, 1) for part in zip(*drawn, strict=True))
    return Generated(x, mean, z, state)
