"""The embedded data and its exact likelihood."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal
from vrnn_lightning.datamodules.sines import Sines

from vrnn_lightning import UserError
from vrnn_lightning.batch import pad
from vrnn_lightning.testing import check_datamodule


def small(**options):
    return Sines(
        **{"train_size": 21, "val_size": 9, "test_size": 7, "steps": 9, "min_steps": 1, "batch_size": 4, **options}
    )


def test_contract():
    check_datamodule(small)


def test_contract_in_windows():
    check_datamodule(lambda **options: small(window=4, **options))


def test_exact_likelihood_is_the_dense_mixtures():
    """The closed form equals a mixture of full-covariance Gaussians written down entry by entry."""
    data = small(frequencies=3, amplitude=0.7, noise=0.4, correlation=0.8)
    sequences = list(data.split("val"))
    found = data.exact_log_likelihood(pad(sequences))
    for sequence, value in zip(sequences, found, strict=True):
        x = sequence.x.double()
        steps = torch.arange(len(x), dtype=torch.float64)
        waves = [torch.cos(w * (steps[:, None] - steps)) for w in data.omegas]
        densities = []
        for wave in waves:
            covariance = torch.kron(0.7**2 * wave, torch.eye(3).double())
            covariance += torch.kron(torch.eye(len(x)).double(), data.noise_covariance)
            densities.append(MultivariateNormal(torch.zeros(3 * len(x)).double(), covariance).log_prob(x.flatten()))
        expected = torch.stack(densities).logsumexp(0) - math.log(3)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_padding_does_not_change_the_exact_likelihood():
    data = small()
    batch = pad(list(data.split("val")))
    alone = torch.cat([data.exact_log_likelihood(pad([s])) for s in data.split("val")])
    torch.testing.assert_close(data.exact_log_likelihood(batch), alone)


def test_the_draws_have_the_moments_they_claim():
    """Variance amplitude^2 + noise^2, and the covariance between channels that the noise alone brings."""
    data = small(train_size=4000, steps=20, min_steps=None, noise=0.5, correlation=0.9)
    x = torch.stack([s.x for s in data.split("train")]).double().flatten(0, 1)
    expected = torch.eye(3).double() + data.noise_covariance
    assert (torch.cov(x.T) - expected).abs().max() < 0.05


def test_no_diagonal_gaussian_can_reach_the_exact_likelihood():
    """Told frequency and coefficients, the best diagonal Gaussian still loses what ``diagonal_loss`` says."""
    data = small(correlation=0.9)
    noise = MultivariateNormal(torch.zeros(3).double(), data.noise_covariance)
    torch.manual_seed(0)
    draws = noise.sample((20000,))
    diagonal = torch.distributions.Normal(0.0, data.noise_covariance.diagonal().sqrt()).log_prob(draws).sum(-1)
    loss = noise.log_prob(draws) - diagonal
    assert abs(loss.mean() - data.diagonal_loss) < 4 * loss.std() / 20000**0.5
    assert data.diagonal_loss == pytest.approx(1.788, abs=1e-3)


def test_splits_differ_and_a_seed_fixes_them():
    a, b, other = small(), small(), small(seed=1)
    assert torch.equal(a.split("train")[0].x, b.split("train")[0].x)
    assert not torch.equal(a.split("train")[0].x, other.split("train")[0].x)
    assert not torch.equal(a.split("train")[0].x[:1], a.split("val")[0].x[:1])


@pytest.mark.parametrize(
    "option",
    [
        {"channels": 2},
        {"steps": 0},
        {"min_steps": 10},
        {"correlation": 1.0},
        {"noise": 0.0},
        {"amplitude": float("nan")},
        {"val_size": 0},
        {"batch_size": 0},
        {"num_workers": -1},
        {"frequencies": 0},
    ],
)
def test_absurd_options_are_named(option):
    with pytest.raises(UserError, match=next(iter(option))):
        small(**option)
