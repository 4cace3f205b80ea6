"""The fast loop of inference: only what depends on z_t is in it, and no autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.heads import Gaussian, Network
from vrnn_lightning.recurrence.buffers import Buffer
from vrnn_lightning.recurrence.operations import Pass
from vrnn_lightning.recurrence.placement import Purpose
from vrnn_lightning.recurrence.state import Masks, Networks, State
from vrnn_lightning.recurrence.step import FastStep
from vrnn_lightning.recurrence.tape import Tape

__all__ = ["InferenceSteps", "NetworkInputs", "Resample", "infer", "run_backward"]

Moments = tuple[Tensor, Tensor]


class NetworkInputs(NamedTuple):
    """What the networks read of the data, for all steps at once, time first.

    Args:
        x_features: Features of x_t, shape (time, batch, width).
        inputs: Covariates, shape (time, batch, covariates), if the model reads any.
        future: State of the recurrence that reads backwards, for smoothing, shape (time, batch, hidden).
    """

    x_features: Tensor
    inputs: Tensor | None = None
    future: Tensor | None = None


class InferenceSteps(NamedTuple):
    """What the loop computed of one step, or of all steps, time first.

    Args:
        h: h_{t-1} of the top layer as the networks read it, shape (..., rows, hidden).
        posterior: Parameters of the posterior, of a Gaussian mean and standard deviation, each (..., rows, width); with
            a latent.
        z: The latent drawn, shape (..., rows, latent); with a latent.
        z_features: Its features, shape (..., rows, width); with a latent.
        prior: Mean and standard deviation of the prior, each (..., rows, latent), if it was computed step by step.
        emission: What the head of the emission reads, shape (..., rows, width), if it was computed step by step.
    """

    h: Tensor
    posterior: tuple[Tensor, ...] | None = None
    z: Tensor | None = None
    z_features: Tensor | None = None
    prior: Moments | None = None
    emission: Tensor | None = None


Resample = Callable[[int, InferenceSteps], Tensor | None]
"""Called after each step, without gradient; returns the rows that continue, shape (rows,), or ``None`` to leave all as
they are."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the loop has a gradient of its own
def infer(
    model: Networks,
    data: NetworkInputs,
    noise: Tensor,
    state: State,
    lengths: Tensor,
    masks: Masks | None = None,
    samples: int = 1,
    resample: Resample | None = None,
    is_first: Tensor | None = None,
) -> tuple[InferenceSteps, State]:
    """Infer z_t and h_t step by step; return them, and the state after the last real step of each row.

    To autograd the loop is one function, without a second derivative.

    Args:
        model: The networks.
        data: What they read of the data.
        noise: Standard normal noise, shape (time, samples * batch, latent).
        state: State before the first step, of samples * batch rows.
        lengths: Real steps of each row, shape (samples * batch,).
        masks: Dropout, of batch rows.
        samples: Rows per sequence, K: row ``k * batch + i`` is sample k of sequence i.
        resample: Called after each step, see :data:`Resample`: how a particle filter resamples. With it, prior and
            emission are computed step by step.
        is_first: True at steps whose row starts from the initial state, shape (time, batch); ``None`` for none.
    """
    tape = Tape(noise.shape[0], noise.shape[1], state.h)
    given = {name: value for name, value in data._asdict().items() if value is not None}
    known = data.x_features if len(given) == 1 else torch.cat(list(given.values()), -1)
    widths = {name: value.shape[-1] for name, value in given.items()}
    purpose: Purpose = "infer" if resample is None else "filter"
    restarts = None if is_first is None else is_first.repeat(1, samples)
    step = FastStep(model, tape, state, purpose, known, widths, noise, masks, samples, is_first=restarts)
    buffers: dict[str, tuple[Buffer, ...]] = {}
    for name in InferenceSteps._fields:
        found = getattr(step, name) or ()
        buffers |= {name: found if isinstance(found, tuple) else (found,)} if found else {}

    def read(tensors: list[Tensor]) -> InferenceSteps:
        rest = iter(tensors)
        values = {name: tuple(next(rest) for _ in found) for name, found in buffers.items()}
        parts: dict[str, Any] = {name: found[0] for name, found in values.items()}
        for name, network, is_compiled in (
            ("posterior", model.encoder, step.parts.posterior is not None),
            ("prior", model.prior, True),
        ):
            if name in parts:
                head = cast("Network[Gaussian]", network).head if is_compiled else None
                parts[name] = values[name] if head is None else head.moments(parts[name])
        return InferenceSteps(**parts)

    def resample_step(t: int, values: Pass) -> Tensor | None:
        assert resample is not None
        return resample(t, read([values.steps(buffer)[t] for buffer in flat]))

    flat = [buffer for found in buffers.values() for buffer in found]
    tensors, last = tape.run(flat, lengths, None if resample is None else resample_step)
    model.called_parts.update(tape.shares)
    return read(tensors), state.with_layers(last)


def run_backward(rnn: nn.GRU | nn.LSTM, reads: Tensor, batch: SequenceBatch) -> Tensor:
    """Return what a recurrence makes of each episode of a batch, read from its end, shape (time, batch, hidden)."""
    lengths = batch.lengths
    time = torch.arange(len(reads), device=lengths.device)[:, None]
    rows = torch.arange(len(lengths), device=lengths.device)
    if batch.is_first is not None:
        rows, first, lengths = batch.episodes()
        time = time[: max(1, int(lengths.max()))]
    mirrored = torch.where(time < lengths, lengths - 1 - time, time)
    places = mirrored if batch.is_first is None else (mirrored + first).clamp(max=len(reads) - 1)
    kind = reads.device.type
    narrow = kind != "cpu" and torch.is_autocast_enabled(kind)  # few CPUs have a narrow LSTM
    with torch.autocast(kind, enabled=narrow):
        states: Tensor = rnn(reads[places, rows].to(next(rnn.parameters())))[0]
    if batch.is_first is None:
        return states[mirrored, rows]
    is_real = time < lengths
    found = states.new_zeros(len(reads), len(batch), states.shape[-1])
    return found.index_put((places[is_real], rows.expand_as(is_real)[is_real]), states[is_real])
