"""The fast loop of inference: only what depends on z_t is in it, and no autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from vrnn_lightning.heads import Gaussian, Network
from vrnn_lightning.recurrence.operations import Pass
from vrnn_lightning.recurrence.state import Masks, Networks, State, as_state
from vrnn_lightning.recurrence.step import FastStep, Purpose
from vrnn_lightning.recurrence.tape import Tape

__all__ = ["InferenceSteps", "NetworkInputs", "Resample", "StepView", "infer"]

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


class StepView(NamedTuple):
    """One step of all rows, without gradient. Latent parts are ``None`` without a latent.

    Args:
        h: h_{t-1} as the networks read it, shape (rows, hidden).
        emission: What the head of the emission reads, shape (rows, width).
        posterior: Mean and spread of the posterior, as its head reads them, shape (rows, 2 * latent).
        prior: The same of the prior; ``None`` if it is not a network.
        z: The latent drawn, shape (rows, latent).
    """

    h: Tensor
    emission: Tensor
    posterior: Tensor | None
    prior: Tensor | None
    z: Tensor | None


Resample = Callable[[int, StepView], Tensor | None]
"""Called after each step; returns the rows that continue, shape (rows,), or ``None`` to leave all as they are."""


class InferenceSteps(NamedTuple):
    """What :func:`infer` computed, time first. Latent parts are ``None`` without a latent.

    Args:
        h: h_{t-1} of the top layer for every step t as the networks read it, shape (time, rows, hidden).
        posterior: Mean and standard deviation of the posterior, each (time, rows, latent).
        z: The latent drawn, shape (time, rows, latent).
        z_features: Its features, shape (time, rows, width).
        prior: Mean and standard deviation of the prior, each (time, rows, latent), if it was computed step by step.
        emission: What the head of the emission reads, shape (time, rows, width), if it was computed step by step.
        state: State after the last real step of each row.
    """

    h: Tensor
    posterior: Moments | None
    z: Tensor | None
    z_features: Tensor | None
    prior: Moments | None
    emission: Tensor | None
    state: State


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
) -> InferenceSteps:
    """Infer z_t and h_t step by step.

    To autograd the loop is one function, without a second derivative.

    Args:
        model: The networks.
        data: What they read of the data.
        noise: Standard normal noise, shape (time, samples * batch, latent).
        state: State before the first step, of samples * batch rows.
        lengths: Real steps of each row, shape (samples * batch,).
        masks: Dropout, of batch rows.
        samples: Rows per sequence, K: row ``k * batch + i`` is sample k of sequence i.
        resample: Called after each step, see :data:`Resample`: how a particle filter resamples.
    """
    tape = Tape(noise.shape[0], noise.shape[1], state.h)
    given = {name: value for name, value in data._asdict().items() if value is not None}
    known = data.x_features if len(given) == 1 else torch.cat(list(given.values()), -1)
    widths = {name: value.shape[-1] for name, value in given.items()}
    purpose: Purpose = "infer" if resample is None else "filter"
    step = FastStep(model, tape, state, purpose, known, widths, noise, masks, samples)
    parts = {
        name: buffer
        for name in ("h", "z_features", "posterior", "z", "prior", "emission")
        if (buffer := getattr(step, name)) is not None
    }

    def resample_step(t: int, values: Pass) -> Tensor | None:
        assert resample is not None
        now = {name: values.steps(parts[name])[t] if name in parts else None for name in StepView._fields}
        return resample(t, StepView(**now))  # type: ignore[arg-type]  # h and emission are always there

    found, last = tape.run(list(parts.values()), lengths, None if resample is None else resample_step)
    values = dict(zip(parts, found, strict=True))
    return InferenceSteps(
        values["h"],
        _moments(model.encoder, values.get("posterior")),
        values.get("z"),
        values.get("z_features"),
        _moments(model.prior, values.get("prior")),
        values.get("emission"),
        as_state(last, len(model.cells)),
    )


def _moments(network: object, raw: Tensor | None) -> Moments | None:
    return None if raw is None else cast("Network[Gaussian]", network).head.moments(raw)
