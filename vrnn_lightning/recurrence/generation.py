"""Generation: the model runs on what it draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from vrnn_lightning.heads import Gaussian, Head, Network, tempered
from vrnn_lightning.heads.base import require_temperature
from vrnn_lightning.recurrence.loop import features, gaussian, linear_map, perceptron
from vrnn_lightning.recurrence.pace import Pace
from vrnn_lightning.recurrence.parts import Networks, Prior, State
from vrnn_lightning.recurrence.tape import Operation, Sample, Tape, Track

__all__ = ["Generated", "free_run"]

CHUNK = 16384  # frames whose means are found at once: the parameters of a mixture need far more room than a frame
LAID = 1024  # rows of steps on the tape at once: what they need stays in a core's cache


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


class _Latent(Operation):
    """A draw of z_t from a prior that is no network with a Gaussian head.

    Args:
        prior: Maps h_{t-1} and covariates to it.
        hidden: h_{t-1}.
        inputs: Covariates, shape (1, rows, covariates), if there are any.
        z: The draw.
    """

    def __init__(self, prior: Prior, hidden: Track, inputs: Tensor | None, z: Track) -> None:
        self.prior, self.hidden, self.inputs, self.z = prior, hidden, inputs, z

    def forward(self, t: int) -> None:
        """Draw."""
        hidden = self.hidden.at[t]
        known = hidden if self.inputs is None else torch.cat([hidden, self.inputs[t]], -1)
        self.z.at[t].copy_(self.prior(known).sample())


class _Noise(Operation):
    """Standard normal numbers.

    Args:
        track: Where they go.
        std: Or what their standard deviation is.
    """

    def __init__(self, track: Track, std: float = 1.0) -> None:
        self.track, self.std = track, std

    def forward(self, t: int) -> None:
        """Draw."""
        self.track.at[t].normal_(0.0, self.std)


class _Frame(Operation):
    """A draw of x_t from an emission.

    Args:
        head: Its head.
        read: Features of the decoder.
        x: The draw.
        temperature: Of the emission.
    """

    def __init__(self, head: Head, read: Track, x: Track, temperature: float) -> None:
        self.head, self.read, self.x, self.temperature = head, read, x, temperature

    def forward(self, t: int) -> None:
        """Draw."""
        self.x.at[t].copy_(self.head.draw(self.read.at[t], self.temperature))


class _Look(Operation):
    """What phi_x reads of x_t.

    Args:
        look: How the model looks at frames.
        x: The frame.
        seen: What is read.
    """

    def __init__(self, look: Callable[[Tensor, None], Tensor], x: Track, seen: Track) -> None:
        self.look, self.x, self.seen = look, x, seen

    def forward(self, t: int) -> None:
        """Look."""
        self.seen.at[t].copy_(self.look(self.x.at[t], None))


def _emission(tape: Tape, head: Head, read: Track, temperature: float) -> Track:
    """Lay the draw of x_t on a tape; return it."""
    wide = torch.promote_types(tape.wide, torch.float32)
    x = tape.track(head.num_features, wide)
    if type(head) is Gaussian and head.covariance == "diagonal":
        require_temperature(temperature)
        raw, noise = tape.cast(linear_map(tape, read, head.linear), wide), tape.track(x.width, wide)
        tape.add(_Noise(noise, math.sqrt(temperature)))
        tape.add(Sample(raw, noise, x, head.min_std))
    else:
        tape.add(_Frame(head, read, x, temperature))
    return x


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
    rows, width = len(state.h), 0 if inputs is None else inputs.shape[-1]
    at_once = min(steps, max(1, LAID // rows))
    prior = cast("Network[Gaussian]", model.prior) if isinstance(model.prior, Network) else None
    pace = Pace(model, state, ["prior", "decoder"] if prior is not None else ["decoder"], "u", width, rows, at_once)
    tape = pace.tape

    width_x, width_z = model.phi_x.out_features, 0 if model.phi_z is None else model.phi_z.out_features
    both = tape.track(width_x + width_z)
    z = tape.track(0, tape.wide)
    if model.phi_z is not None:
        z = tape.track(next(model.phi_z.linears()).in_features, tape.wide)
        if prior is not None:
            raw, noise = gaussian(tape, pace.sums["prior"], prior), tape.track(z.width, tape.wide)
            tape.add(_Noise(noise))
            tape.add(Sample(raw, noise, z, prior.head.min_std))
        else:
            assert model.prior is not None
            tape.add(_Latent(model.prior, pace.hidden, None if pace.known is None else pace.known.value, z))
        pace.read(features(tape, z, model.phi_z, into=both.columns(width_x, both.width)), "z", "decoder")
    read = perceptron(tape, pace.sums["decoder"], model.decoder.body.linears())
    x = _emission(tape, model.decoder.head, read, temperature)
    seen = tape.track(next(model.phi_x.linears()).in_features)
    tape.add(_Look(model.look, x, seen))
    features(tape, seen, model.phi_x, into=both.columns(0, width_x))
    pace.read(both, "xz" if width_z else "x", "cell")
    pace.advance()

    kept = [track.value.new_empty(steps, rows, track.width) for track in (x, z, read)]
    for first in range(0, steps, at_once):
        count = min(at_once, steps - first)
        if inputs is not None and pace.known is not None:
            pace.known.value[:count].copy_(inputs[:, first : first + count].transpose(0, 1))
        pace.step(count)
        for whole, track in zip(kept, (x, z, read), strict=True):
            whole[first : first + count] = track.value[:count]
    xs, zs, reads = kept
    chunk = max(1, CHUNK // rows)
    means = [tempered(model.decoder.head(part), temperature).mean for part in reads.split(chunk)]
    frames, mean, latents = (part.transpose(0, 1).contiguous() for part in (xs, torch.cat(means), zs))
    return Generated(frames, mean, latents, pace.state())
