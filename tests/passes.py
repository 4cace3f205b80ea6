"""The passes over a model, fast and readable, for tests that compare them: their terms and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from readable import readable_filter, readable_generation, readable_loop, readable_step
from test_recurrence import add_extras
from test_streaming import follow
from torch import Tensor, nn
from torch.distributions import Distribution

from vrnn_lightning import VRNN, MLPConfig, SequenceBatch, build_vrnn
from vrnn_lightning.data import Scaler
from vrnn_lightning.filtering import FilterResult, Resampling, map_tensors
from vrnn_lightning.inference.exporting import _program, _Step, _traceable
from vrnn_lightning.inference.session import Session
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import Masks, State, repeat_rows
from vrnn_lightning.vrnn.equations import join

WIDTHS = {"phi_x": 4, "phi_z": 4, "prior": 6, "encoder": 6, "decoder": 6}
RULE, SAMPLES, SEEDS = Resampling("systematic", 0.9), 2, [5, 6]
SCALER = Scaler(torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.5, 2.0, 1.0]).double())


CONFIGS: dict[str, dict[str, Any]] = {
    "gru": {},
    "lstm": {"cell": "lstm"},
    "smoothing": {"smoothing": True},
    "options": {"depth": 2, "residual_posterior": True, "num_inputs": 2, "missing": True, "dropout": 0.4},
}


class Written:
    """A model whose emission, too, is its equation: the decoder is called."""

    def __init__(self, model: VRNN) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def emission_dist(self, z_features: Tensor, h: Tensor, inputs: Tensor | None = None) -> Distribution:
        return self.model.decoder(join(z_features, h, inputs))


def called_future(model: VRNN, batch: SequenceBatch, masks: Masks | None = None) -> Tensor | None:
    """Return what the backward recurrence says when it is called on each sequence alone, from its end."""
    if model.backward_rnn is None:
        return None
    x_features = torch.stack(
        [
            model.extract_x(x, valid, masks)
            for x, valid in zip(batch.x.unbind(1), batch.valid_mask.unbind(1), strict=True)
        ],
        1,
    )
    reads, states = join(x_features, batch.inputs), []
    for read, length in zip(reads, batch.lengths, strict=True):
        found = model.backward_rnn(read[:length].flip(0)[:, None])[0][:, 0].flip(0)
        states.append(nn.functional.pad(found, (0, 0, 0, len(read) - length)))
    return torch.stack(states)


class Data(NamedTuple):
    """What the passes read, made before anything is replaced."""

    batch: SequenceBatch
    frames: SequenceBatch  # without gaps or padding, for streams
    noise: Noise
    masks: Masks | None
    state: State
    particles: State
    zero: State
    frame: dict[str, Tensor]  # what an exported step takes


def make_model(depth: int = 1, **options: Any) -> VRNN:
    torch.manual_seed(1)
    sizes = {name: MLPConfig(width, depth) for name, width in WIDTHS.items()}
    model = build_vrnn(3, 3, 5, **{"layers": 2} | sizes | options).double()
    model.init_from_statistics(torch.tensor([0.2, 0.4, 0.6]).double(), torch.tensor([0.5, 0.8, 1.2]).double())
    return model


@cache
def make_data(config: str) -> Data:
    model = make_model(**CONFIGS[config])
    torch.manual_seed(2)
    batch = SequenceBatch(torch.randn(2, 4, 3).double(), torch.tensor([4, 3]))
    frames = SequenceBatch(batch.x, torch.tensor([4, 4]))
    add_extras(model, batch)
    frames.inputs = batch.inputs
    noise, zero = Noise(batch, SEEDS), model.zero_state(2 * SAMPLES)
    particles = map_tensors(torch.randn_like, zero)
    state = map_tensors(lambda part: part[:2], particles)
    masks, frame = model.draw_masks(noise), {} if model.backward_rnn is not None else _Step(model, SCALER).example(3)
    return Data(model.mask_invalid(batch), frames, noise, masks, state, particles, zero, frame)


# Purposes: what a pass returns, fast and readable. In training with the gradient of every parameter.


def with_gradients(model: VRNN, *outputs: Tensor | None) -> list[Tensor]:
    found = [out for out in outputs if out is not None]
    torch.manual_seed(4)
    model.zero_grad()
    sum((out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in found).backward()
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
    return [part.detach().clone().as_subclass(Tensor) for part in (*found, *grads)]


def infer(model: VRNN, data: Data) -> list[Tensor]:
    trace = model(data.batch, data.noise.over_time(3), data.state, data.masks)
    return with_gradients(model, trace.log_px, trace.kl, trace.log_ratio, *present(trace.state))


def recomputed(model: VRNN, data: Data) -> list[Tensor]:
    model.checkpoint_every = 2
    terms, state = model.collect(
        data.batch, data.noise, lambda trace: (trace.log_px, trace.kl, trace.log_ratio), data.state, data.masks
    )
    found = with_gradients(model, *terms, *present(state))
    model.checkpoint_every = None
    return found


def readable_infer(model: VRNN, data: Data) -> list[Tensor]:
    terms = readable_loop(Written(model), data.batch, data.noise.over_time(3), data.state, data.masks)
    return with_gradients(model, terms.log_px, terms.kl, terms.log_ratio, *present(terms.state))


def filtered(model: VRNN, data: Data) -> list[Tensor]:
    return filter_terms(model, data, model.filter(data.batch, SAMPLES, RULE, data.noise, data.masks))


def readable_filtered(model: VRNN, data: Data) -> list[Tensor]:
    noise, draws = data.noise.over_time(3, SAMPLES), data.noise.uniform_over_time(1)
    return filter_terms(
        model, data, readable_filter(Written(model), data.batch, noise, draws, data.zero, RULE, data.masks)
    )


def filter_terms(model: VRNN, data: Data, found: FilterResult) -> list[Tensor]:
    real = (data.batch.lengths == 4).repeat(SAMPLES)  # the readable filter's states continue in padding
    return with_gradients(
        model, found.log_likelihood, found.log_weights, *(part[real] for part in present(found.state))
    )


def generated(model: VRNN, data: Data) -> list[Tensor]:
    torch.manual_seed(8)
    x, mean, z, state = model.generate(4, state=data.state, inputs=data.batch.inputs)
    return [x, mean, z, *present(state)]


def readable_generated(model: VRNN, data: Data) -> list[Tensor]:
    torch.manual_seed(8)
    x, mean, z, state = readable_generation(Written(model), 4, data.state, data.batch.inputs)
    return [x, mean, z, *present(state)]


def streamed(model: VRNN, data: Data) -> list[Tensor]:
    stream = model.stream(2, SAMPLES, data.particles)
    nats = follow(stream, data.frames, data.noise.over_time(3, SAMPLES))
    return [nats.cumsum(1), *present(stream.state)]


@torch.no_grad()
def readable_streamed(model: VRNN, data: Data) -> list[Tensor]:
    """Without resampling: the importance-weighted bound."""
    noise, frames = data.noise.over_time(3, SAMPLES), many(data.frames)
    terms = readable_loop(Written(model), frames, noise, data.particles)
    nats = (terms.log_px + terms.log_ratio).unflatten(0, (SAMPLES, -1)).cumsum(-1)
    return [nats.logsumexp(0) - math.log(SAMPLES), *present(terms.state)]


def in_session(model: VRNN, data: Data) -> list[Tensor]:
    session = Session(model.stream(2, SAMPLES, data.particles), model, SCALER)
    (x, after), inputs = SCALER.unscale(data.frames.x[:, :2]).unbind(1), data.frames.inputs
    u, v = (None, None) if inputs is None else inputs[:, :2].unbind(1)
    noise, later = data.noise.over_time(3, SAMPLES)[:, :2].unbind(1)
    step = session.step(x, inputs=u, noise=noise)
    predicted = step.next(inputs=v, noise=later)
    return [step.nats, predicted.mean, predicted.log_prob(after), *present(step.state)]


@torch.no_grad()
def readable_session(model: VRNN, data: Data) -> list[Tensor]:
    """One frame, and the mixture over particles of the next one's emission."""
    frames, noise = many(data.frames), data.noise.over_time(3, SAMPLES)
    nats, state, emission = step_and_next(model, frames, data.particles, *noise[:, :2].unbind(1))
    nats, jacobian = nats.unflatten(0, (SAMPLES, -1)), SCALER.std.log().sum()
    weights = nats.log_softmax(0)
    mean = (weights.exp()[..., None] * emission.mean.unflatten(0, (SAMPLES, -1))).sum(0)
    each = emission.log_prob(frames.x[:, 1]).unflatten(0, (SAMPLES, -1))
    scores = ((weights + each).logsumexp(0), nats.logsumexp(0) - math.log(SAMPLES))
    return [scores[1] - jacobian, SCALER.unscale(mean), scores[0] - jacobian, *present(state)]


def step_and_next(
    model: VRNN, frames: SequenceBatch, state: State, noise: Tensor, later: Tensor
) -> tuple[Tensor, State, Distribution]:
    """Return log p - log q of the first frame, the state after it, and the emission of the second."""
    written, inputs = Written(model), None if frames.inputs is None else frames.inputs[:, 1]
    terms = readable_step(written, frames, 0, state, noise)
    h = terms.state.h[:, -1]
    z = model.latent.draw(written.prior_dist(h, inputs), later)
    z_features = written.extract_z(z)
    return terms.log_px + terms.log_ratio, terms.state, written.emission_dist(z_features, h, inputs)


def exported(model: VRNN, data: Data, program: bool = False) -> list[Tensor]:
    """The step that is exported; with ``program`` what torch makes of it."""
    with _traceable():
        step = _Step(model, SCALER)
        given = step.example(3)
        return list(_program(step).module()(*given.values()) if program else step.take(given).values())


@torch.no_grad()
def readable_exported(model: VRNN, data: Data) -> list[Tensor]:
    given = data.frame
    frames = SequenceBatch(SCALER.scale(given["x"])[:, None], torch.ones(3, dtype=torch.int64))
    if "inputs" in given:
        frames.inputs = torch.stack([given["inputs"], given["next_inputs"]], 1)
    state = State.of_tensors({name: x for name, x in given.items() if name == "h" or name.startswith("c")})
    nats, state, emission = step_and_next(model, frames, state, given["noise"], given["next_noise"])
    moments = SCALER.unscale(emission.mean), emission.variance.sqrt() * SCALER.std
    return [nats - SCALER.std.log().sum(), *moments, *present(state)]


def present(state: State) -> list[Tensor]:
    return list(state.tensors().values())


def many(frames: SequenceBatch) -> SequenceBatch:
    """Return a row for each particle."""
    inputs = None if frames.inputs is None else repeat_rows(frames.inputs, SAMPLES)
    return SequenceBatch(repeat_rows(frames.x, SAMPLES), repeat_rows(frames.lengths, SAMPLES), inputs=inputs)


Run = Callable[[VRNN, Data], list[Tensor]]
PURPOSES: dict[str, tuple[Run, Run]] = {
    "infer": (infer, readable_infer),
    "recomputed": (recomputed, readable_infer),
    "filter": (filtered, readable_filtered),
    "generate": (generated, readable_generated),
    "stream": (streamed, readable_streamed),
    "session": (in_session, readable_session),
    "export": (exported, readable_exported),
    "program": (partial(exported, program=True), readable_exported),  # slow
}
