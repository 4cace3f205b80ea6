"""The fast loop of inference: only what depends on z_t is in it, and no autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from vrnn_lightning.heads import Gaussian, Network
from vrnn_lightning.nn import MLP
from vrnn_lightning.recurrence.parts import Masks, Networks, Reads, State, Steps, as_state, repeat_rows
from vrnn_lightning.recurrence.tape import GRU, LSTM, Known, Product, Relu, Sample, Scale, Tape, Track, Weight

__all__ = ["Cell", "Choose", "Now", "features", "gaussian", "latent_features", "linear_map", "perceptron", "unroll"]


class Now(NamedTuple):
    """One step of all rows, without graph.

    Args:
        hidden: h_{t-1} as the networks read it, shape (rows, hidden).
        phi_z: Features of z_t, shape (rows, width).
        raw: Mean and spread of the posterior, as its head reads them, shape (rows, 2 * latent).
        z: The latent drawn, shape (rows, latent).
    """

    hidden: Tensor
    phi_z: Tensor
    raw: Tensor
    z: Tensor


Choose = Callable[[int, Now], Tensor | None]


class Cell:
    """A layer of the recurrence on a tape.

    Its sums stand side by side. A GRU's are n_h, r, u, n_x: h_{t-1} adds to all but the last columns, the layer's
    input to all but the first. An LSTM's are i, f, g, o: both add to all.

    Args:
        tape: Where to lay it.
        cell: Its weights.
        h: Its output.
        c: Its cell, of an LSTM.

    Attributes:
        bias: Of the sums that the layer's input adds to.
        bias_h: Of those that it does not add to.
    """

    def __init__(self, tape: Tape, cell: nn.GRUCell | nn.LSTMCell, h: Track, c: Track | None) -> None:
        size = h.width
        self.tape, self.cell, self.h, self.c = tape, cell, h, c
        self.gates = tape.track(4 * size)
        gru = isinstance(cell, nn.GRUCell)
        self.from_h = self.gates.columns(0, 3 * size if gru else 4 * size)
        self.from_below = self.gates.columns(size if gru else 0, 4 * size)
        self.weight_h: Tensor = cell.weight_hh.roll(size, 0) if gru else cell.weight_hh
        both, start = cell.bias_ih + cell.bias_hh, 2 * size
        self.bias: Tensor = torch.cat([both[:start], cell.bias_ih[start:]]) if gru else both
        self.bias_h: Tensor = cell.bias_hh[start:] if gru else both[:0]

    def hold(self) -> None:
        """Let the sums that the layer's input does not add to start from their bias."""
        if len(self.bias_h):
            self.tape.add(Known(self.gates.columns(0, len(self.bias_h)), self.tape.weight(self.bias_h)))

    def advance(self) -> None:
        """Let the state follow, once everything was added to the sums."""
        gates = self.tape.cast(self.gates, self.tape.wide)
        new = self.tape.track(self.h.width, self.tape.wide)
        if self.c is None:
            self.tape.add(GRU(gates, self.h, new))
        else:
            self.tape.add(LSTM(gates, self.h, self.c, new, self.tape.track(self.h.width, self.tape.wide)))


def perceptron(
    tape: Tape, first: Track, linears: Iterable[nn.Linear], mask: Weight | None = None, into: Track | None = None
) -> Track:
    """Lay a perceptron on a tape, from the sums of its first layer on; return its features."""
    rest = list(linears)[1:]
    tape.add(Relu(first, None if rest else mask))
    for i, linear in enumerate(rest, start=1):
        first = linear_map(tape, first, linear, into if i == len(rest) else None)
        tape.add(Relu(first, mask if i == len(rest) else None))
    return first


def features(tape: Tape, source: Track, network: MLP, mask: Weight | None = None, into: Track | None = None) -> Track:
    """Lay a perceptron on a tape, from what it reads on; return its features, which may go into a given track."""
    linears = list(network.linears())
    first = linear_map(tape, tape.cast(source, tape.narrow), linears[0], into if len(linears) == 1 else None)
    return perceptron(tape, first, linears, mask, into)


def linear_map(tape: Tape, source: Track, linear: nn.Linear, into: Track | None = None) -> Track:
    """Lay a linear map on a tape; return what it maps to, which may be a given track."""
    target = tape.track(linear.out_features) if into is None else into
    tape.add(Product(source, tape.weight(linear.weight.t()), target, tape.weight(linear.bias)))
    return target


def gaussian(tape: Tape, first: Track, network: Network[Gaussian]) -> Track:
    """Lay a network with a Gaussian head on a tape, from its first layer's sums on; return mean and spread."""
    body = perceptron(tape, first, network.body.linears())
    return tape.cast(linear_map(tape, body, network.head.linear), tape.wide)


def latent_features(
    tape: Tape, model: Networks, raw: Track, noise: Tensor, raw_prior: Track | None, mask: Weight | None
) -> tuple[Track, Track]:
    """Lay the draw of z_t and phi_z on a tape; return both.

    Args:
        tape: Where to lay it.
        model: The networks.
        raw: Mean and spread of what z_t is drawn from.
        noise: Standard normal, time first.
        raw_prior: Mean and spread of the prior whose mean is added.
        mask: Dropout of phi_z.
    """
    assert model.phi_z is not None
    assert model.encoder is not None
    z = tape.track(noise.shape[-1], tape.wide)
    tape.add(Sample(raw, tape.given(noise), z, model.encoder.head.min_std, raw_prior))
    return z, features(tape, z, model.phi_z, mask)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # whoever compiles the model: the loop has its own gradient
def unroll(
    model: Networks,
    reads: Reads,
    noise: Tensor,
    state: State,
    lengths: Tensor,
    masks: Masks | None = None,
    samples: int = 1,
    choose: Choose | None = None,
) -> Steps:
    """Infer z_t and h_t step by step: encoder, latent sample, phi_z and cells, and nothing else.

    To autograd it is one function, without a second derivative.

    Args:
        model: The networks.
        reads: What they read of the data.
        noise: Standard normal noise, time first, shape (time, samples * batch, latent).
        state: State before the first step, of samples * batch rows.
        lengths: Real steps of each row, shape (samples * batch,).
        masks: Dropout, of batch rows.
        samples: Rows per sequence, K: row ``k * batch + i`` is sample k of sequence i.
        choose: Called after each step; returns the rows that go on, shape (samples * batch,), or ``None`` for all as
            they are. It is how a particle filter resamples.

    Returns:
        The steps, time first, samples * batch rows.
    """
    tape = Tape(noise.shape[0], noise.shape[1], state.h)
    cells = [cast("nn.GRUCell | nn.LSTMCell", cell) for cell in model.cells]
    states = [tape.state(part) for part in state.layers()]
    hs, cs = states[: len(cells)], states[len(cells) :]
    own = [tape.cast(h, tape.narrow) for h in hs]

    def dropped(mask: Tensor) -> Weight:
        return Weight(repeat_rows(mask, samples).to(state.h))

    hidden = hs[-1]
    if masks is not None:
        hidden = tape.track(hs[-1].width, tape.wide)
        tape.add(Scale(hs[-1], dropped(masks.h[:, -1]), hidden))
    # prior and encoder read the same h_{t-1}: one product serves both
    residual = model.residual_posterior and isinstance(model.prior, Network)
    readers = [
        cast("Network[Gaussian]", n) for n in (model.prior if residual else None, model.encoder) if n is not None
    ]
    firsts = [next(reader.body.linears()) for reader in readers]
    width = sum(linear.out_features for linear in firsts)
    laid = [Cell(tape, cell, h, cs[i] if cs else None) for i, (cell, h) in enumerate(zip(cells, hs, strict=True))]
    for layer in laid:
        layer.hold()
    front = tape.track(width)
    weights, start, size = [], 0, hs[-1].width
    sums: list[Track] = []
    for reader, linear in zip(readers, firsts, strict=True):
        sums.append(front.columns(start, start + linear.out_features))
        start += linear.out_features
        known = reads.encoder if reader is model.encoder else reads.inputs
        known_first = reader is model.encoder  # the encoder reads [known, h], the prior [h, known]
        parts = linear.weight.split([known.shape[-1], size] if known_first else [size, known.shape[-1]], 1)
        of_known, of_h = parts if known_first else parts[::-1]
        weights.append(of_h)
        if known.shape[-1]:
            tape.add(Known(sums[-1], tape.weight(linear.bias), tape.weight(known), tape.weight(of_known.t())))
        else:
            tape.add(Known(sums[-1], tape.weight(linear.bias)))
    bottom = laid[0]
    of_x, of_z = cells[0].weight_ih.split([reads.cell.shape[-1], cells[0].input_size - reads.cell.shape[-1]], 1)
    tape.add(Known(bottom.from_below, tape.weight(bottom.bias), tape.weight(reads.cell), tape.weight(of_x.t())))
    for layer in laid[1:]:
        tape.add(Known(layer.from_below, tape.weight(layer.bias)))

    for layer, h in zip(laid, own, strict=True):
        tape.add(Product(h, tape.weight(layer.weight_h.t()), layer.from_h))
    if weights:
        read = own[-1] if masks is None else tape.cast(hidden, tape.narrow)
        tape.add(Product(read, tape.weight(torch.cat(weights).t()), front))

    outputs = [hidden]
    if model.encoder is not None:
        raws = [gaussian(tape, first, reader) for first, reader in zip(sums, readers, strict=True)]
        mask_z = None if masks is None else Weight(repeat_rows(masks.phi_z, samples).to(tape.narrow))
        z, phi_z = latent_features(tape, model, raws[-1], noise, raws[0] if residual else None, mask_z)
        tape.add(Product(phi_z, tape.weight(of_z.t()), bottom.from_below))
        outputs += [phi_z, raws[-1], z, *raws[:-1]]
    bottom.advance()
    for i, layer in enumerate(laid[1:]):
        below = hs[i].later()
        if masks is not None:
            masked = tape.track(below.width, tape.wide)
            tape.add(Scale(below, dropped(masks.h[:, i]), masked))
            below = masked
        elif choose is not None:
            below = tape.copy(below)  # whoever is not chosen is overwritten
        tape.add(Product(tape.cast(below, tape.narrow), tape.weight(layer.cell.weight_ih.t()), layer.from_below))
        layer.advance()

    def choose_now(t: int) -> Tensor | None:
        assert choose is not None
        if model.encoder is None:
            return choose(t, Now(hidden.at[t], noise[t], noise[t], noise[t]))
        return choose(t, Now(hidden.at[t], phi_z.at[t], raws[-1].at[t], z.at[t]))

    found, last = tape.run(outputs, lengths, None if choose is None else choose_now)
    after = as_state(last, len(cells))
    if model.encoder is None:
        nothing = found[0][..., :0]
        return Steps(found[0], nothing, nothing, nothing, nothing, None, after)
    mean, std = model.encoder.head.moments(found[2])
    prior = cast("Network[Gaussian]", model.prior).head.moments(found[4]) if residual else None
    return Steps(found[0], mean, std, found[3], found[1], prior, after)
