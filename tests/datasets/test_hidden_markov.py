"""The hidden Markov chain and its forward algorithm."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from scipy.stats import bernoulli, norm
from vrnn_lightning.datamodules.hidden_markov import HiddenMarkov

from vrnn_lightning import UserError
from vrnn_lightning.batch import SequenceBatch, SequenceSample, pad
from vrnn_lightning.testing import CHECKS

SMALL = {"train_size": 21, "val_size": 9, "test_size": 7, "steps": 5, "min_steps": 1, "batch_size": 4, "channels": 3}
EMISSIONS = ["bernoulli", "gaussian"]


def small(**options) -> HiddenMarkov:
    return HiddenMarkov(**SMALL | options)


def enumerated(data: HiddenMarkov, s: SequenceSample) -> float:
    """Return log p of the measured values of a short sequence: the sum over every path of the state."""
    seen = torch.ones_like(s.x, dtype=torch.bool) if s.observed is None else s.observed
    total = torch.zeros((), dtype=torch.float64)
    for path in itertools.product(range(len(data.initial)), repeat=len(s.x)):
        p = data.initial[path[0]].clone()
        for before, after in itertools.pairwise(path):
            p *= data.transition[before, after]
        for t, state in enumerate(path):
            for d in range(data.num_features):
                value, response = float(s.x[t, d]), float(data.responses[state, d])
                logistic = 1 / (1 + math.exp(-response))
                mass = bernoulli(logistic).pmf if data.emission == "bernoulli" else norm(response).pdf
                p *= float(mass(value)) if seen[t, d] else 1.0
        total += p
    return total.log().item()


@pytest.mark.parametrize("options", [{}, {"emission": "gaussian"}, {"missing_rate": 0.4}], ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, options):
    check(lambda **more: small(**options, **more))


@pytest.mark.parametrize("missing_rate", [0.0, 0.5])
@pytest.mark.parametrize("emission", EMISSIONS)
def test_the_forward_algorithm_is_the_sum_over_all_paths(emission, missing_rate):
    data = small(emission=emission, missing_rate=missing_rate, states=3, channels=2, stay=0.7, steps=4)
    sequences = data.split("val")
    found = data.exact_log_likelihood(pad(sequences))
    assert found.dtype == torch.float64
    assert len({len(s.x) for s in sequences}) > 1
    for s, value in zip(sequences, found.tolist(), strict=True):
        assert value == pytest.approx(enumerated(data, s), rel=1e-9, abs=1e-9)


def test_the_probabilities_of_all_short_sequences_add_up_to_one():
    data = small(states=3, channels=2)
    every = [SequenceSample(torch.tensor(x).view(3, 2)) for x in itertools.product([0.0, 1.0], repeat=6)]
    assert data.exact_log_likelihood(pad(every)).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("emission", EMISSIONS)
def test_what_stands_at_missing_values_and_padding_does_not_count(emission):
    data = small(emission=emission, missing_rate=0.3)
    batch = pad(data.split("val"))
    exact = data.exact_log_likelihood(batch)
    spoiled = SequenceBatch(batch.x.where(batch.valid_mask, float("nan")), batch.lengths, batch.observed)
    assert torch.equal(data.exact_log_likelihood(spoiled), exact)


@pytest.mark.parametrize("emission", EMISSIONS)
def test_a_sequence_alone_is_as_likely_as_in_a_batch(emission):
    data = small(emission=emission)
    alone = torch.cat([data.exact_log_likelihood(pad([s])) for s in data.split("val")])
    torch.testing.assert_close(data.exact_log_likelihood(pad(data.split("val"))), alone, rtol=1e-12, atol=1e-12)


def test_no_steps_have_probability_one():
    data = small()
    assert data.exact_log_likelihood(pad([SequenceSample(torch.zeros(0, 3))])).tolist() == [0.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to hold the batch")
def test_a_batch_elsewhere():
    data = small()
    batch = pad(data.split("val"))
    there = SequenceBatch(batch.x.cuda(), batch.lengths.cuda())
    assert torch.equal(data.exact_log_likelihood(there), data.exact_log_likelihood(batch))


def test_the_chain_is_stationary():
    data = small(states=5, stay=0.8)
    torch.testing.assert_close(data.transition.sum(1), torch.ones(5).double())
    torch.testing.assert_close(data.initial @ data.transition, data.initial)
    assert data.transition.diagonal().tolist() == pytest.approx([0.8] * 5)


def test_the_draws_have_the_probabilities_they_claim():
    """Frequencies of every sequence of two steps in two channels, against their likelihoods."""
    data = small(states=3, channels=2, steps=2, min_steps=2, train_size=20000)
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))
    exact = data.exact_log_likelihood(pad([SequenceSample(x.view(2, 2)) for x in every])).exp()
    drawn = torch.stack([s.x.flatten() for s in data.split("train")])
    share = (drawn[:, None] == every).all(-1).double().mean(0)
    assert (share - exact).abs().max() < 4 * (0.25 / 20000) ** 0.5


def test_gaussian_draws_have_the_moments_they_claim():
    data = small(emission="gaussian", steps=2, min_steps=2, train_size=20000)
    x = torch.stack([s.x for s in data.split("train")]).double()
    now, mean = data.responses, data.initial @ data.responses
    assert (x.mean((0, 1)) - mean).abs().max() < 0.05
    spread = now.mT @ (data.initial[:, None] * now) - mean[:, None] * mean + torch.eye(3).double()
    assert (torch.cov(x.flatten(0, 1).T) - spread).abs().max() < 0.1
    across = now.mT @ (data.initial[:, None] * data.transition) @ now - mean[:, None] * mean
    assert ((x[:, 0] - mean).mT @ (x[:, 1] - mean) / len(x) - across).abs().max() < 0.1


def test_diagonal_loss_is_the_total_correlation_of_the_prediction():
    """For one step nothing is past: the loss is that of the mixture of all states, by enumeration of all values."""
    data = small(steps=1, train_size=40000, channels=4)
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).double()
    p = data.responses.sigmoid()
    joint = (data.initial[:, None] * (p[:, None] * every + (1 - p[:, None]) * (1 - every)).prod(-1)).sum(0)
    mean = data.initial @ p
    product = (mean * every + (1 - mean) * (1 - every)).prod(-1)
    expected = (joint * (joint.log() - product.log())).sum().item()
    assert data.diagonal_loss == pytest.approx(expected, abs=0.015)


def test_gaussian_diagonal_loss_is_what_a_fitted_diagonal_gaussian_loses():
    data = small(emission="gaussian", steps=1, train_size=20000)
    x = torch.stack([s.x[0] for s in data.split("train")]).double()
    fitted = torch.distributions.Normal(x.mean(0), x.std(0)).log_prob(x).sum(-1)
    exact = data.exact_log_likelihood(pad(data.split("train")))
    assert data.diagonal_loss == pytest.approx((exact - fitted).mean().item(), abs=0.002)


@pytest.mark.parametrize("emission", EMISSIONS)
def test_the_default_needs_a_latent(emission):
    assert HiddenMarkov(emission, train_size=500).diagonal_loss > 0.3


def test_splits_differ_and_a_seed_fixes_them():
    a, b, other = small(channels=20), small(channels=20), small(channels=20, seed=1)
    assert torch.equal(a.split("train")[0].x, b.split("train")[0].x)
    assert not torch.equal(a.split("train")[0].x[:1], other.split("train")[0].x[:1])
    assert not torch.equal(a.split("train")[0].x[:1], a.split("val")[0].x[:1])
    assert torch.equal(a.responses, other.responses)


def test_the_share_of_missing_values_is_as_asked():
    data = small(missing_rate=0.25, train_size=2000)
    seen = torch.cat([s.observed for s in data.split("train")]).double()
    assert seen.mean().item() == pytest.approx(0.75, abs=0.02)
    assert data.missing
    assert not small().missing


@pytest.mark.parametrize(
    "option",
    [
        {"emission": "poisson"},
        {"states": 1},
        {"channels": 0},
        {"steps": 0},
        {"min_steps": 6},
        {"stay": 1.0},
        {"stay": 0.0},
        {"contrast": -1.0},
        {"contrast": float("nan")},
        {"missing_rate": 1.0},
        {"test_size": 0},
        {"num_workers": -1},
    ],
    ids=str,
)
def test_absurd_options_are_named(option):
    with pytest.raises(UserError, match=f"--data.{next(iter(option))} "):
        small(**option)


@pytest.mark.parametrize("emission", ["Gaussian", "Bernoulli"])
def test_a_density_has_no_gap_to_a_probability(lightning, emission):
    """Of values that are 0 or 1 a Gaussian's density has no bound."""
    small = [f"--data.{name}_size=8" for name in ("train", "val", "test")]
    words = ["--data", "HiddenMarkov", *small, "--model.emission", emission]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = lightning("fit", *words, "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false")
    assert done.code == 0, done.err
    tested = lightning("test", "--ckpt_path", "best").out
    told = [
        str(warning.message)
        for warning in caught
        if "is a mass, but the emission has a density" in str(warning.message)
    ]
    assert len(told) == (emission == "Gaussian")
    assert ("exact log-likelihood" in done.out) == (emission == "Bernoulli")
    assert ("test/gap" in tested) == ("test/fivo_gap" in tested) == (emission == "Bernoulli")
