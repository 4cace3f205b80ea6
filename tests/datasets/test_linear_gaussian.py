"""The linear-Gaussian state-space model and its Kalman filter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from scipy.stats import multivariate_normal
from torch.distributions import MultivariateNormal
from vrnn_lightning.datamodules.linear_gaussian import LinearGaussian

from vrnn_lightning import UserError
from vrnn_lightning.batch import SequenceBatch, SequenceSample, pad
from vrnn_lightning.testing import CHECKS

SMALL = {"train_size": 21, "val_size": 9, "test_size": 7, "steps": 9, "min_steps": 1, "batch_size": 4}
SYSTEMS = [{}, {"state_size": 1}, {"state_size": 3, "channels": 2}, {"state_size": 5, "memory": 0.0, "loading": 0.7}]


def small(**options) -> LinearGaussian:
    return LinearGaussian(**SMALL | options)


def joint_covariance(data: LinearGaussian, steps: int) -> np.ndarray:
    """Return the covariance of all values of a sequence, written down block by block, shape (steps D, steps D)."""
    a, c = data.transition.numpy(), data.observation.numpy()
    stationary = solve_discrete_lyapunov(a, data.state_covariance.numpy())
    blocks = [[None] * steps for _ in range(steps)]
    for t in range(steps):
        for s in range(t + 1):
            blocks[t][s] = c @ np.linalg.matrix_power(a, t - s) @ stationary @ c.T
            blocks[s][t] = blocks[t][s].T
        blocks[t][t] = blocks[t][t] + data.observation_covariance.numpy()
    return np.block(blocks)


def joint_log_density(data: LinearGaussian, x: torch.Tensor, seen: torch.Tensor | None = None) -> float:
    """Return the log-density of the measured values of one sequence of shape (time, channels)."""
    keep = np.ones(x.numel(), dtype=bool) if seen is None else seen.flatten().numpy()
    if not keep.any():
        return 0.0
    covariance = joint_covariance(data, len(x))[np.ix_(keep, keep)]
    values = x.double().flatten().numpy()[keep]
    by_scipy = multivariate_normal(np.zeros(keep.sum()), covariance).logpdf(values)
    by_torch = MultivariateNormal(torch.zeros(int(keep.sum())).double(), torch.from_numpy(covariance))
    assert by_torch.log_prob(torch.from_numpy(values)).item() == pytest.approx(by_scipy, rel=1e-9, abs=1e-9)
    return float(by_scipy)


@pytest.mark.parametrize("missing_rate", [0.0, 0.4])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, missing_rate):
    check(lambda **options: small(missing_rate=missing_rate, **options))


@pytest.mark.parametrize("missing_rate", [0.0, 0.6])
@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_the_filter_is_the_joint_gaussian(system, missing_rate):
    """Ragged lengths from one step on, with and without missing values."""
    data = small(**system, missing_rate=missing_rate, val_size=20)
    sequences = data.split("val")
    found = data.exact_log_likelihood(pad(sequences))
    assert found.dtype == torch.float64
    assert min(len(s.x) for s in sequences) == 1
    for s, value in zip(sequences, found.tolist(), strict=True):
        assert value == pytest.approx(joint_log_density(data, s.x, s.observed), rel=1e-9, abs=1e-9)


def test_steps_without_any_measurement_are_bridged():
    data = small()
    x, seen = data.split("val")[0].x.new_zeros(6, 4).normal_(), torch.ones(6, 4, dtype=torch.bool)
    seen[[0, 2, 3]] = False
    (value,) = data.exact_log_likelihood(pad([SequenceSample(x, seen)])).tolist()
    assert value == pytest.approx(joint_log_density(data, x, seen), rel=1e-9)
    nothing = data.exact_log_likelihood(pad([SequenceSample(x, torch.zeros_like(seen))]))
    assert nothing.tolist() == [0.0]


def test_what_stands_at_missing_values_and_padding_does_not_count():
    data = small(missing_rate=0.3)
    batch = pad(data.split("val"))
    exact = data.exact_log_likelihood(batch)
    spoiled = SequenceBatch(batch.x.where(batch.valid_mask, float("nan")), batch.lengths, batch.observed)
    assert torch.equal(data.exact_log_likelihood(spoiled), exact)


def test_a_sequence_alone_is_as_likely_as_in_a_batch():
    data = small()
    alone = torch.cat([data.exact_log_likelihood(pad([s])) for s in data.split("val")])
    torch.testing.assert_close(data.exact_log_likelihood(pad(data.split("val"))), alone, rtol=1e-12, atol=1e-12)


def test_no_steps_have_probability_one():
    data = small()
    assert data.exact_log_likelihood(pad([SequenceSample(torch.zeros(0, 4))])).tolist() == [0.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to hold the batch")
def test_a_batch_elsewhere():
    data = small()
    batch = pad(data.split("val"))
    there = SequenceBatch(batch.x.cuda(), batch.lengths.cuda())
    assert torch.equal(data.exact_log_likelihood(there), data.exact_log_likelihood(batch))


@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_the_system_is_what_it_says(system):
    data = small(**system)
    memory = torch.linalg.eigvals(data.transition).abs()
    torch.testing.assert_close(memory, torch.full_like(memory, data.hparams["memory"]))
    stationary = solve_discrete_lyapunov(data.transition.numpy(), data.state_covariance.numpy())
    np.testing.assert_allclose(data.initial_covariance.numpy(), stationary, rtol=1e-12, atol=1e-15)
    loading = data.observation.norm(dim=1)
    torch.testing.assert_close(loading, torch.full_like(loading, data.hparams["loading"]))
    assert torch.linalg.matrix_rank(data.observation) == min(data.observation.shape)
    noise = data.observation_covariance
    assert torch.equal(noise, noise.diagonal().diag())


def test_the_draws_have_the_covariance_they_claim():
    data = small(train_size=20000, steps=3, min_steps=3)
    x = torch.stack([s.x for s in data.split("train")]).double().flatten(1)
    expected = torch.from_numpy(joint_covariance(data, 3))
    assert (torch.cov(x.T) - expected).abs().max() < 0.06
    assert x.mean(0).abs().max() < 0.04


def test_no_diagonal_gaussian_can_reach_the_exact_likelihood():
    """A predictor with the right means and variances of each channel loses what ``diagonal_loss`` says."""
    data = small(train_size=2000, steps=12, min_steps=2)
    batch = pad(data.split("train"))
    exact, diagonal = data.exact_log_likelihood(batch), torch.zeros(2000).double()
    for length in batch.lengths.unique().tolist():
        rows = batch.lengths == length
        covariance = torch.from_numpy(joint_covariance(data, length))
        values = batch.x[rows, :length].double().flatten(1)
        for t in range(length):
            past, now = slice(0, 4 * t), slice(4 * t, 4 * t + 4)
            weights = torch.linalg.solve(covariance[past, past], covariance[past, now]).mT
            spread = covariance[now, now] - weights @ covariance[past, now]
            torch.testing.assert_close(data.predictive_covariances()[t], spread)
            predictor = torch.distributions.Normal(values[:, past] @ weights.mT, spread.diagonal().sqrt())
            diagonal[rows] += predictor.log_prob(values[:, now]).sum(-1)
    lost = exact - diagonal - data.diagonal_loss * batch.lengths
    assert abs(lost.mean()) < 4 * lost.std() / 2000**0.5
    assert lost.std() < 6


def test_the_default_needs_a_latent():
    assert LinearGaussian().diagonal_loss == pytest.approx(0.878, abs=1e-3)


def test_splits_differ_and_a_seed_fixes_them():
    a, b, other = small(), small(), small(seed=1)
    assert torch.equal(a.split("train")[0].x, b.split("train")[0].x)
    assert not torch.equal(a.split("train")[0].x[:1], other.split("train")[0].x[:1])
    assert not torch.equal(a.split("train")[0].x[:1], a.split("val")[0].x[:1])
    assert torch.equal(a.observation, other.observation)


def test_the_share_of_missing_values_is_as_asked():
    data = small(missing_rate=0.25, train_size=2000)
    seen = torch.cat([s.observed for s in data.split("train")]).double()
    assert seen.mean().item() == pytest.approx(0.75, abs=0.01)
    assert data.missing
    assert not small().missing


@pytest.mark.parametrize(
    "option",
    [
        {"state_size": 0},
        {"channels": 1},
        {"steps": 0},
        {"min_steps": 10},
        {"memory": 1.0},
        {"memory": float("nan")},
        {"state_noise": 0.0},
        {"observation_noise": -1.0},
        {"loading": float("inf")},
        {"missing_rate": 1.0},
        {"train_size": 0},
        {"batch_size": 0},
        {"observation_noise": 1e-3, "loading": 1e3},
    ],
    ids=str,
)
def test_absurd_options_are_named(option):
    with pytest.raises(UserError, match=f"--data.{next(iter(option))} "):
        small(**option)


@pytest.mark.parametrize("extreme", [{"observation_noise": 1e-3}, {"loading": 1e3}, {"state_noise": 1e3}], ids=str)
def test_extremes_are_still_the_joint_gaussian(extreme):
    data = small(**extreme)
    found = data.exact_log_likelihood(pad(data.split("val")))
    for s, value in zip(data.split("val"), found.tolist(), strict=True):
        exact = MultivariateNormal(
            torch.zeros(s.x.numel()).double(), torch.from_numpy(joint_covariance(data, len(s.x)))
        )
        assert value == pytest.approx(exact.log_prob(s.x.double().flatten()).item(), rel=1e-4)
