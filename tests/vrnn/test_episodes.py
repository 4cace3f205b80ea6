"""Resets inside a sequence: a batch with ``is_first`` equals its episodes as separate sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_objectives
import test_recurrence
import torch
from readable import readable_filter, readable_loop
from test_recurrence import gradients

from vrnn_lightning import SequenceBatch, UserError, VRNNLightningModule
from vrnn_lightning.filtering import Resampling
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import ELBO, FIVO, IWAE
from vrnn_lightning.vrnn.initial import InitialState

SEEDS = [0, 1, 2]
FIRST = [(0, 2), (0, 3), (1, 1), (1, 2), (1, 4), (2, 0)]  # row and step; (1, 4) is padding
OPTIONS = {
    "plain": {},
    "LSTM": {"cell": "lstm", "layers": 2, "dropout": 0.3},
    "everything": test_recurrence.OPTIONS["all"],
    "no latent": {"latent": 0},
}
IDS = ["ELBO", "IWAE", "FIVO", "FIVO of threshold 0"]
OBJECTIVES = [ELBO(balance=0.3), IWAE(3), FIVO(3, threshold=0.9), FIVO(3, threshold=0.0)]


def make(**options):
    """A model and a batch of three sequences of two, three and one episodes more than the batch shows."""
    model, batch = test_objectives.make(**options)
    torch.manual_seed(8)
    first = torch.zeros(batch.x.shape[:2], dtype=torch.bool)
    for row, step in FIRST:
        first[row, step] = True
    return model, replace(batch, is_first=first)


def learn_start(model):
    """Let the model start from a learned state, other than zero and with another value in each layer."""
    model.initial = InitialState(model.zero_state(1)).to(model.input_mean)
    for value in model.initial.parameters():
        torch.nn.init.uniform_(value)
    return model


def separate(batch):
    """The episodes as rows of their own, in the order of the rows, and the row of each."""
    rows, first, lengths = batch.episodes()
    whole = SequenceBatch(batch.x.new_zeros(len(rows), int(lengths.max()), batch.x.shape[2]), lengths)
    for name in ("observed", "inputs"):
        values = getattr(batch, name)
        shape = (len(rows), whole.x.shape[1], *values.shape[2:]) if values is not None else None
        setattr(whole, name, None if values is None else values.new_zeros(shape))
    for e, (row, start, length) in enumerate(zip(rows.tolist(), first.tolist(), lengths.tolist(), strict=True)):
        for name in ("x", "observed", "inputs"):
            values = getattr(batch, name)
            if values is not None:
                getattr(whole, name)[e, :length] = values[row, start : start + length]
    whole.start = first
    return whole, rows.tolist()


def test_episodes_are_found():
    _, batch = make()
    rows, first, lengths = batch.episodes()
    assert list(zip(rows.tolist(), first.tolist(), lengths.tolist(), strict=True)) == [
        (0, 0, 2), (0, 2, 1), (0, 3, 3), (1, 0, 1), (1, 1, 1), (1, 2, 2), (2, 0, 1)
    ]  # fmt: skip
    whole = replace(batch, is_first=None).episodes()
    assert [part.tolist() for part in whole] == [[0, 1, 2], [0, 0, 0], [6, 4, 1]]


@pytest.mark.parametrize("is_learned", [False, True], ids=["zero", "learned"])
@pytest.mark.parametrize("is_called", [False, True], ids=["compiled", "called"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_pass_over_episodes_equals_the_readable_loop(options, is_called, is_learned):
    model, batch = make(**options)
    if is_called:
        for part in (model.cells[0], model.decoder.body[0]):
            part.register_forward_hook(lambda *_: None)
    if is_learned:
        learn_start(model)
    noise, state = test_recurrence.draw_noise(model, batch), test_recurrence.random_state(model, 3)
    masks = model.draw_masks(Noise(batch, [7] * 3))
    fast, slow = model(batch, noise, state, masks), readable_loop(model, batch, noise, state, masks)
    pairs = [(getattr(fast, name), getattr(slow, name)) for name in ("log_px", "kl", "log_ratio")]
    pairs += [(a, b) for a, b in zip(fast.state, slow.state, strict=True) if a is not None]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    found, expected = (gradients(model, *part) for part in zip(*pairs, strict=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if is_learned:
        starts = {id(p) for p in model.initial.parameters()}
        assert all((grad != 0).any() for p, grad in zip(model.parameters(), found, strict=True) if id(p) in starts)


@pytest.mark.parametrize("size", [None, 1, 4])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_episodes_equal_separate_sequences(options, objective, size):
    """Value, reported terms and every gradient, whole and in recomputed windows, with a learned initial state."""
    model, batch = make(**options)
    learn_start(model)
    alone, rows = separate(batch)
    apart = objective(model, alone, Noise(alone, rows), 0.7, lambda x: x)
    model.checkpoint_every = size
    together = objective(model, batch, Noise(batch, SEEDS), 0.7, lambda x: x)
    for name in ("value", "log_px", "kl"):
        a, b = getattr(together, name).sum(), getattr(apart, name).sum()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(model, together.value[None]), gradients(model, apart.value[None]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES[1:], ids=IDS[1:])
def test_the_bound_of_a_sequence_is_the_sum_of_its_episodes(objective, monkeypatch):
    model, batch = make(layers=2)
    alone, rows = separate(batch)
    apart = objective.of_sequences(model, alone, Noise(alone, rows))
    expected = torch.zeros(3, dtype=apart.dtype).index_add_(0, torch.tensor(rows), apart)
    for size in (64, 2):
        monkeypatch.setattr("vrnn_lightning.vrnn.model.MAX_FILTER_WINDOW", size)
        with torch.no_grad():
            torch.testing.assert_close(objective.of_sequences(model, batch, Noise(batch, SEEDS)), expected)


@pytest.mark.parametrize("rule", [None, Resampling("systematic", 0.9), Resampling("multinomial", 1.0)])
def test_the_fast_filter_of_episodes_equals_the_readable(rule):
    model, batch = make(cell="lstm", layers=2, num_inputs=2)
    noise = Noise(batch, SEEDS)
    fast = model.filter(batch, 4, rule, noise, beta=0.7)
    draws = noise.uniform_over_time(4 if rule is None else rule.draws(4))
    slow = readable_filter(model, batch, noise.over_time(4, 4), draws, model.initial_state(12), rule, beta=0.7)
    for a, b in zip(fast[:4], slow[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(model, fast.log_likelihood), gradients(model, slow.log_likelihood), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", [ELBO(), IWAE(3), FIVO(3, threshold=0.0)], ids=["ELBO", "IWAE", "FIVO"])
def test_windows_of_streams_join_to_their_episodes(objective):
    """What is carried continues an episode, and is dropped where the next one begins."""
    model, batch = make(cell="lstm")
    whole, carried, total = objective(model, batch, Noise(batch, SEEDS), 1.0, lambda x: x), None, 0.0
    for first in (0, 2, 4):
        window = batch.window(first, first + 2)
        found = objective(model, window, Noise(window, SEEDS), 1.0, lambda x: x, carried)
        total, carried = total + found.value, found.carried.reset_rows(torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(total, whole.value, rtol=1e-12, atol=1e-12)


def test_what_does_not_read_episodes_refuses_them():
    module, batch = VRNNLightningModule(3, latent_size=2), make()[1]
    batch.x = batch.x.float()
    assert [len(nats) for nats in module.score(batch)] == [6, 4, 1]
    for wrong in (batch.is_first.long(), batch.is_first[:, :-1], batch.is_first[:1]):
        with pytest.raises(UserError, match=r"is_first: must be torch.bool of shape \(3, 6\)"):
            module.score(replace(batch, is_first=wrong))
    for call in (
        module.encode,
        module.impute,
        lambda given: module.backtest(given, [3], 2),
        lambda given: module.score(given, samples=2),
    ):
        with pytest.raises(UserError, match="is_first"):
            call(batch)
    reads = VRNNLightningModule(3, latent_size=2, num_inputs=2, initial_state="inputs")
    with pytest.raises(UserError, match="is_first: the initial state reads inputs"):
        reads.score(replace(batch, inputs=torch.zeros(*batch.x.shape[:2], 2)))
    with pytest.raises(UserError, match="resampling_gradient"):
        FIVO(3, "multinomial", resampling_gradient=True)(module.vrnn, batch, Noise(batch), 1.0, lambda x: x)
