"""Generation: the model runs on what it draws."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vrnn_lightning.heads import tempered
from vrnn_lightning.recurrence.state import Networks, State
from vrnn_lightning.recurrence.step import FastStep
from vrnn_lightning.recurrence.tape import Tape, TapeStepper

__all__ = ["Generated", "generate"]

CHUNK = 16384  # frames whose means are computed at once: the parameters of a mixture need far more room than a frame
CACHED = 1024  # rows of steps on the tape at once: what they need stays in a core's cache


class Generated(NamedTuple):
    """What :func:`generate` drew, batch first.

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
def generate(
    model: Networks, steps: int, state: State, inputs: Tensor | None = None, temperature: float = 1.0
) -> Generated:
    """Draw sequences: prior, latent, emission, frame, recurrence, and again.

    Args:
        model: The networks.
        steps: Frames to draw.
        state: State before the first step; its batch size is the number of sequences.
        inputs: Covariates, shape (batch, time, covariates), if the model reads any.
        temperature: Temperature of the emission; below 1 for the more likely frames.
    """
    rows, width = len(state.h), 0 if inputs is None else inputs.shape[-1]
    at_once = min(steps, max(1, CACHED // rows))
    tape = Tape(at_once, rows, state.h)
    known = state.h.new_zeros(at_once, rows, width, dtype=tape.narrow)
    step = FastStep(model, tape, state, "generate", known, {"inputs": width}, temperature=temperature)
    stepper = TapeStepper(tape)
    means = step.emission if step.mean is None else step.mean  # a mean, or what the head makes it of
    buffers = [buffer for buffer in (step.x, means, step.z) if buffer is not None]
    values = [stepper.values.value(buffer) for buffer in buffers]
    kept = [value.new_empty(steps, *value.shape[1:]) for value in values]
    for first in range(0, steps, at_once):
        count = min(at_once, steps - first)
        if inputs is not None:
            known[:count].copy_(inputs[:, first : first + count].transpose(0, 1))
        stepper.step(count)
        for whole, value in zip(kept, values, strict=True):
            whole[first : first + count] = value[:count]
    x, features, *z = kept
    chunk = max(1, CHUNK // rows)
    if step.mean is None:
        features = torch.cat([tempered(model.emission_head(x), temperature).mean for x in features.split(chunk)])
    latents = z[0] if z else x[..., :0]
    frames, mean, latents = (part.transpose(0, 1).contiguous() for part in (x, features, latents))
    last = state.with_layers([stepper.values.steps(part)[0].clone() for part in step.states])
    return Generated(frames, mean, latents, last)
