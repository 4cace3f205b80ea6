"""Generation: the model runs on what it draws."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from vrnn_lightning.heads import Gaussian, Network, tempered
from vrnn_lightning.recurrence.loop import features, gaussian, perceptron
from vrnn_lightning.recurrence.pace import Pace
from vrnn_lightning.recurrence.parts import Networks, Prior, State
from vrnn_lightning.recurrence.tape import Operation, Sample, Track

__all__ = ["Generated", "free_run"]

CHUNK = 16384  # frames whose means are found at once: the parameters of a mixture need far more room than a frame


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


class _Frame(Operation):
    """A draw of x_t from the emission, and what phi_x reads of it.

    Args:
        model: Its head, and how it looks at frames.
        read: Features of the decoder.
        x: The draw.
        seen: What phi_x reads.
        temperature: Of the emission.
    """

    def __init__(self, model: Networks, read: Track, x: Track, seen: Track, temperature: float) -> None:
        self.head, self.look, self.temperature = model.decoder.head, model.look, temperature
        self.read, self.x, self.seen = read, x, seen
        self.counted = torch.ones_like(x.at[0], dtype=torch.bool)

    def forward(self, t: int) -> None:
        """Draw, and look."""
        x = self.x.at[t].copy_(self.head.draw(self.read.at[t], self.temperature))
        self.seen.at[t].copy_(self.look(x, self.counted))


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
    prior = cast("Network[Gaussian]", model.prior) if isinstance(model.prior, Network) else None
    pace = Pace(model, state, ["prior", "decoder"] if prior is not None else ["decoder"], "u", width, rows)
    tape = pace.tape

    noise = state.h.new_empty(0)
    z = tape.track(0, tape.wide)
    if model.phi_z is not None:
        z = tape.track(next(model.phi_z.linears()).in_features, tape.wide)
        if prior is not None:
            noise = torch.empty_like(z.at[0])
            tape.add(Sample(gaussian(tape, pace.sums["prior"], prior), tape.given(noise[None]), z, prior.head.min_std))
        else:
            assert model.prior is not None
            tape.add(_Latent(model.prior, pace.hidden, None if pace.known is None else pace.known.value, z))
        phi_z = features(tape, z, model.phi_z)
        pace.read(phi_z, "z", "decoder", "cell")
    read = perceptron(tape, pace.sums["decoder"], model.decoder.body.linears())
    x = tape.track(model.decoder.head.num_features, torch.promote_types(tape.wide, torch.float32))
    seen = tape.track(next(model.phi_x.linears()).in_features)
    tape.add(_Frame(model, read, x, seen, temperature))
    pace.read(features(tape, seen, model.phi_x), "x", "cell")
    pace.advance()
    pace.start()

    kept = [(track.at[0], track.value.new_empty(steps, rows, track.width)) for track in (x, z, read)]
    places = [list(whole.unbind(0)) for _, whole in kept]
    known = None if inputs is None or pace.known is None else (pace.known.value[0], inputs.transpose(0, 1))
    for t in range(steps):
        if known is not None:
            known[0].copy_(known[1][t])
        noise.normal_()
        pace.step()
        for (now, _), place in zip(kept, places, strict=True):
            place[t].copy_(now)
    xs, zs, reads = (whole for _, whole in kept)
    chunk = max(1, CHUNK // rows)
    means = [tempered(model.decoder.head(part), temperature).mean for part in reads.split(chunk)]
    frames, mean, latents = (part.transpose(0, 1).contiguous() for part in (xs, torch.cat(means), zs))
    return Generated(frames, mean, latents, pace.state())
