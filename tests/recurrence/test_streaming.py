"""Step by step a stream finds what a pass over the whole sequence finds."""

from __future__ import annotations

import pytest
import torch
from test_recurrence import CELLS, OPTIONS, add_extras, draw_noise, make_batch, make_model, random_state

from vrnn_lightning import SequenceBatch, UserError
from vrnn_lightning.filtering import Resampling
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import Stream

SHOWN = {"plain": {}, **{name: {**options, "smoothing": False} for name, options in OPTIONS.items()}}


def follow(stream: Stream, batch: SequenceBatch, noise: torch.Tensor | None) -> torch.Tensor:
    """Return the nats of every step, shape (batch, time)."""
    found = [
        stream.step(
            batch.x[:, t],
            None if batch.observed is None else batch.observed[:, t],
            None if batch.inputs is None else batch.inputs[:, t],
            None if noise is None else noise[:, t],
        )
        for t in range(batch.x.shape[1])
    ]
    return torch.stack(found, 1)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("options", SHOWN.values(), ids=SHOWN)
@pytest.mark.parametrize("latent", [4, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_a_pass_over_the_sequence(cell, latent, options, samples):
    """Without resampling every prefix has the importance-weighted bound, and one particle the sampled one."""
    model, batch = make_model(cell, latent, **options).eval(), make_batch([6, 6])
    add_extras(model, batch)
    noise, state = draw_noise(model, batch, samples), random_state(model, 2 * samples)
    stream = model.stream(2, samples, state)
    found = follow(stream, batch, noise)
    with torch.no_grad():
        trace = model(batch, noise, state, samples=samples)
    nats = (trace.log_px + trace.log_ratio).unflatten(0, (samples, 2)).cumsum(-1)
    bound = nats.logsumexp(0) - torch.tensor(samples, dtype=nats.dtype).log()
    torch.testing.assert_close(found.cumsum(1), bound, rtol=1e-9, atol=1e-9)
    for a, b in zip(stream.state, trace.state, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_missing_values_count_nothing():
    model, batch = make_model().eval(), make_batch([4])
    batch.observed = torch.rand_like(batch.x) > 0.3
    noise = draw_noise(model, batch)
    rubbish = SequenceBatch(batch.x.masked_fill(~batch.observed, float("nan")), batch.lengths, batch.observed)
    found = [follow(model.stream(), each, noise) for each in (batch, rubbish)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    with torch.no_grad():
        trace = model(batch, noise)
    torch.testing.assert_close(found[0], trace.log_px + trace.log_ratio, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", ["multinomial", "systematic"])
def test_resampled_particles_estimate_the_same_likelihood(scheme):
    """Means over many streams of the estimated likelihood agree within 5 standard errors."""
    model, (batch,) = make_model().eval(), [make_batch([4])]
    many = SequenceBatch(batch.x.expand(4000, -1, -1), torch.full((4000,), 4))
    torch.manual_seed(10)
    plain, resampled = (
        follow(model.stream(4000, 4, resampling=resampling), many, None).sum(1).exp()
        for resampling in (None, Resampling(scheme, 1.0))
    )
    error = (plain.var() / 4000 + resampled.var() / 4000).sqrt()
    assert (plain.mean() - resampled.mean()).abs() < 5 * error


@pytest.mark.parametrize("scheme", ["systematic", "multinomial"])
def test_resampling_is_the_filter_s(scheme, monkeypatch):
    model, batch, rule = make_model().eval(), make_batch([9, 9]), Resampling(scheme, 0.9)
    noise = Noise(batch, [5, 6])
    with torch.no_grad():
        filtered = model.filter(batch, 4, rule, noise)
    draws = [step.t() for step in noise.uniform_over_time(rule.draws(4)).unbind(1)]
    monkeypatch.setattr(torch, "rand", lambda *shape: draws.pop(0))
    found = follow(model.stream(2, 4, resampling=rule), batch, noise.over_time(4, 4))
    torch.testing.assert_close(found.sum(1), filtered.log_likelihood, rtol=1e-9, atol=1e-9)
    assert filtered.effective_samples.min() < 4 * 0.9


def test_resampling_moves_particles_with_their_states():
    model, batch = make_model("lstm").eval(), make_batch([1, 1])
    stream = model.stream(2, 5, random_state(model, 10), Resampling(threshold=1.0))
    before = model.stream(2, 5, random_state(model, 10))
    noise = draw_noise(model, batch, 5)
    for each in (stream, before):
        each.step(batch.x[:, 0], noise=noise[:, 0])
    torch.testing.assert_close(stream.log_weights.exp(), torch.full((5, 2), 0.2).double())
    for after, first in zip(stream.state, before.state, strict=True):
        for row, state in enumerate(after):
            same = (first == state).flatten(1).all(1).nonzero().flatten()
            assert len(same) == 1
            assert same[0] % 2 == row % 2


def test_a_stream_goes_on_from_a_state_and_in_inference_mode():
    model, batch = make_model().eval(), make_batch([6])
    noise = draw_noise(model, batch)
    whole = follow(model.stream(), batch, noise)
    with torch.inference_mode():
        first = model.stream()
        a = follow(first, SequenceBatch(batch.x[:, :3], torch.tensor([3])), noise[:, :3])
    second = model.stream(state=first.state)
    b = follow(second, SequenceBatch(batch.x[:, 3:], torch.tensor([3])), noise[:, 3:])
    torch.testing.assert_close(torch.cat([a, b], 1), whole, rtol=0, atol=1e-12)
    first.step(batch.x[:, 0])
    assert not whole.requires_grad


def test_under_autocast():
    model, batch = make_model(layers=2).float().eval(), make_batch([3])
    batch.x, noise = batch.x.float(), draw_noise(model, batch).float()
    exact = follow(model.stream(), batch, noise)
    with torch.autocast("cpu", torch.bfloat16):
        found = follow(model.stream(), batch, noise)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.2)


def test_what_a_stream_refuses():
    with pytest.raises(UserError, match="smoothing"):
        make_model(smoothing=True).stream()
    with pytest.raises(UserError, match="samples 0"):
        make_model().stream(samples=0)
    with pytest.raises(UserError, match="state: has 2 rows, expected 3"):
        make_model().stream(3, state=random_state(make_model(), 2))
    stream = make_model(num_inputs=2).stream(2)
    x = torch.zeros(2, 3).double()
    with pytest.raises(UserError, match=r"x: a step takes shape \(2, 3\), but got shape \(3,\)"):
        stream.step(x[0])
    with pytest.raises(UserError, match=r"inputs: a step takes shape \(2, 2\), but got none"):
        stream.step(x)
