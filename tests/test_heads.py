"""Densities and KL against torch, scipy and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence

from vrnn_lightning import UserError
from vrnn_lightning.heads import Bernoulli, Factorised, Gaussian, GaussianMixture, log_prob


def features(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64)


def test_gaussian_density_is_scipys():
    head, f, x = Gaussian(4, 3).double(), features(5, 4), features(5, 3)
    d = head(f)
    mean, std = d.base_dist.loc.detach(), d.base_dist.scale.detach()
    expected = stats.norm.logpdf(x, mean, std).sum(-1)
    torch.testing.assert_close(log_prob(d, x).detach(), torch.as_tensor(expected), rtol=1e-12, atol=1e-12)
    assert d.event_shape == (3,)
    assert d.batch_shape == (5,)


def test_gaussian_density_integrates_to_one():
    d = Gaussian(4, 1).double()(features(1, 4))
    grid = torch.linspace(-30, 30, 200001, dtype=torch.float64)[:, None]
    assert torch.trapezoid(log_prob(d, grid).exp(), grid[:, 0]).item() == pytest.approx(1, abs=1e-9)


def test_bernoulli_sums_to_one_and_survives_certainty():
    head = Bernoulli(4, 3).double()
    d = head(features(1, 4))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 3)
    assert log_prob(d, corners).exp().sum().item() == pytest.approx(1, abs=1e-12)
    sure = head(features(1, 4) * 1e6)
    value = log_prob(sure, corners)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_gaussian_has_finite_gradients_at_extreme_parameters():
    head = Gaussian(4, 3)
    value = log_prob(head(torch.full((2, 4), -1e4)), torch.zeros(2, 3))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    assert (head(torch.full((2, 4), -1e6)).stddev >= head.min_std).all()


def test_gradcheck():
    head = Gaussian(2, 2).double()
    f, x = features(3, 2).requires_grad_(), features(3, 2)
    assert torch.autograd.gradcheck(lambda f: log_prob(head(f), x), (f,))


def test_marginal_leaves_out_what_is_missing():
    d, x = Gaussian(4, 3).double()(features(5, 4)), features(5, 3)
    observed = torch.rand(5, 3) > 0.4
    each = d.base_dist.log_prob(x)
    torch.testing.assert_close(d.marginal_log_prob(x, observed), (each * observed).sum(-1))
    with pytest.raises(UserError, match="missing"):
        log_prob(d.base_dist, x, observed)


def test_parameters_stay_in_float32_under_autocast():
    head = Gaussian(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        d = head(torch.randn(2, 4))
    assert d.base_dist.loc.dtype == d.base_dist.scale.dtype == torch.float32


def test_kl_of_the_model_is_the_textbooks():
    """Per dimension: 0 for equal Gaussians, else log(s2/s1) + (s1^2 + (m1-m2)^2) / (2 s2^2) - 1/2."""
    m1, m2, s1, s2 = features(4, 6)
    s1, s2 = s1.abs() + 0.1, s2.abs() + 0.1
    q, p = Factorised(Normal(m1, s1)), Factorised(Normal(m2, s2))
    expected = (s2 / s1).log() + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5
    torch.testing.assert_close(kl_divergence(q.base_dist, p.base_dist), expected)
    assert (kl_divergence(q.base_dist, q.base_dist) == 0).all()


def test_bernoulli_starts_from_the_datas_mean():
    head, mean = Bernoulli(4, 3), torch.tensor([0.1, 0.5, 0.0])
    head.start_from(mean)
    torch.testing.assert_close(head.linear.bias.sigmoid(), torch.tensor([0.1, 0.5, 1e-3]))
    assert math.isfinite(head.linear.bias.sum().item())


def test_mixture_density_is_the_log_of_a_sum():
    """log sum_k pi_k prod_d N(x_d), with scipy's densities and weights that sum to one over the components."""
    head, f, x = GaussianMixture(4, 3, components=5).double(), features(6, 4), features(6, 3)
    d = head(f)
    weights = d.mixture_distribution.probs.detach().numpy()
    normal = d.component_distribution.base_dist
    each = stats.norm.pdf(x[:, None], normal.loc.detach(), normal.scale.detach()).prod(-1)
    expected = torch.as_tensor((weights * each).sum(-1)).log()
    torch.testing.assert_close(log_prob(d, x).detach(), expected, rtol=1e-10, atol=1e-10)
    assert d.mixture_distribution.probs.shape == (6, 5)
    assert d.event_shape == (3,)
    everywhere = torch.ones(6, 3, dtype=torch.bool)
    torch.testing.assert_close(log_prob(d, x, everywhere), log_prob(d, x))


def test_mixture_integrates_to_one_and_so_does_its_marginal():
    grid = torch.linspace(-20, 20, 100001, dtype=torch.float64)[:, None]
    one = GaussianMixture(4, 1, components=4).double()(features(1, 4))
    assert torch.trapezoid(log_prob(one, grid).exp(), grid[:, 0]).item() == pytest.approx(1, abs=1e-9)
    two = GaussianMixture(4, 2, components=4).double()(features(1, 4))
    frames = torch.cat([torch.full_like(grid, 1e9), grid], 1)
    marginal = log_prob(two, frames, torch.tensor([False, True]).expand_as(frames))
    assert torch.trapezoid(marginal.exp(), grid[:, 0]).item() == pytest.approx(1, abs=1e-9)


def test_a_mixture_of_one_is_a_gaussian():
    head, f, x = GaussianMixture(4, 3, components=1).double(), features(6, 4), features(6, 3)
    torch.testing.assert_close(log_prob(head(f), x), log_prob(head.gaussians(f), x))


def test_mixture_survives_extreme_parameters_and_samples_its_mean():
    head = GaussianMixture(4, 2)
    value = log_prob(head(torch.full((3, 4), 1e4)), torch.zeros(3, 2))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    torch.manual_seed(0)
    d = head(torch.zeros(1, 4))
    draws = d.sample((20000,))
    assert ((draws.mean(0) - d.mean).abs() < 5 * (d.variance / 20000).sqrt()).all()
    with pytest.raises(UserError, match="components 0"):
        GaussianMixture(4, 2, components=0)
