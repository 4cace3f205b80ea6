"""Densities, masses and KL against torch, scipy and closed forms; one contract for every head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import vrnn_lightning.heads
from vrnn_lightning import UserError
from vrnn_lightning.heads import (
    AutoregressiveBernoulli,
    Bernoulli,
    Categorical,
    DiscretisedLogisticMixture,
    Factorised,
    Flow,
    Gaussian,
    GaussianMixture,
    Group,
    Head,
    Joint,
    Laplace,
    MuLaw,
    MultivariateGaussian,
    NegativeBinomial,
    Pen,
    Poisson,
    StudentT,
    log_prob,
    tempered,
)
from vrnn_lightning.heads.gamma import inverse_softplus, log_gamma_ratio, log_softplus
from vrnn_lightning.nn import MLPConfig
from vrnn_lightning.vrnn import build_vrnn


def features(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64)


@dataclass
class Case:
    """A head, data far out, what it refuses, all it can draw where that is a list, and whether any width will do.

    ``whole``: a frame is observed or missing as a whole. ``mean_draws``: the mean is estimated with so many draws.
    """

    make: Callable[[int, int], Head]
    tails: list[float]
    outside: list[float] = field(default_factory=list)
    support: Tensor | None = None
    wide: bool = True
    whole: bool = False
    mean_draws: float = math.inf

    @property
    def num_features(self) -> int:
        return 2 if self.wide else 3

    def data(self, value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.full((*shape, self.num_features), value, dtype=dtype)
        if not self.wide:
            x[..., 2] = 1.0
        return x

    def observed(self, x: Tensor) -> Tensor:
        return torch.rand(x[..., :1].shape if self.whole else x.shape).expand(x.shape) > 0.4


REAL = [0.0, 1e2, -1e6]
CASES = {
    "gaussian": Case(Gaussian, REAL),
    "gaussian, scalar": Case(partial(Gaussian, covariance="scalar"), REAL),
    "gaussian mixture": Case(partial(GaussianMixture, components=3), REAL),
    "laplace": Case(Laplace, REAL),
    "student t": Case(partial(StudentT, min_df=4.0), REAL),
    "pen": Case(partial(Pen, components=3), REAL, [0.5], wide=False),
    "bernoulli": Case(Bernoulli, [0.0, 1.0], [0.5, -1.0, math.nan], torch.arange(2.0).double()),
    "logistics, 8 bit": Case(
        partial(DiscretisedLogisticMixture, components=3),
        [0.0, 9.0, 255.0],
        [0.5, -1.0, 256.0],
        torch.arange(256.0).double(),
    ),
    "logistics, 16 bit": Case(
        partial(DiscretisedLogisticMixture, components=3, bits=16, lowest=-32768),
        [-32768.0, 0.0, 32767.0],
        [0.5, -32769.0, 32768.0, math.nan],
        torch.arange(-32768.0, 32768.0).double(),
    ),
    "mu-law": Case(
        MuLaw,
        [-1.0, 0.0, 1.0],
        [-1.01, 2.0, math.nan],
        MuLaw(1, 1)(torch.zeros(1)).base_dist.decode(torch.arange(256)).double(),
    ),
    "poisson": Case(Poisson, [0.0, 1.0, 1e5], [-1.0, 0.5, math.inf], torch.arange(200.0).double()),
    "negative binomial": Case(NegativeBinomial, [0.0, 1.0, 1e5], [-1.0, 0.5, math.nan], torch.arange(999.0).double()),
    "multivariate gaussian": Case(MultivariateGaussian, REAL),
    "categorical": Case(Categorical, [0.0], [0.5, -1.0, math.nan], torch.arange(2.0).double(), wide=False),
    "joint": Case(
        partial(Joint, groups=[Group([2], Bernoulli), Group([1], Laplace), Group("0:1")]), REAL, [0.5], wide=False
    ),
    "autoregressive bernoulli": Case(
        partial(AutoregressiveBernoulli, hidden_size=9, layers=2, dropout=0.0),
        [0.0, 1.0],
        [0.5, math.nan],
        torch.arange(2.0).double(),
        whole=True,
        mean_draws=32,
    ),
    "flow, splines": Case(partial(Flow, network=MLPConfig(8, 2)), REAL, whole=True, mean_draws=256),
    "flow, affine": Case(
        partial(Flow, kind="MAF", network=MLPConfig(8), coupling=True), REAL, whole=True, mean_draws=256
    ),
}
every_head = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
SHAPES = [(), (3,), (2, 5)]


def test_the_contract_covers_every_head():
    tested = {type(case.make(4, case.num_features)) for case in CASES.values()}
    exported = [getattr(vrnn_lightning.heads, name) for name in vrnn_lightning.heads.__all__]
    assert tested == {h for h in exported if isinstance(h, type) and issubclass(h, Head)} - {Head}


@every_head
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_types(case, shape):
    for width in (case.num_features, 1) if case.wide else (3,):
        for dtype in (torch.float32, torch.float64):
            head = case.make(4, width).to(dtype)
            d = head(features(*shape, 4).to(dtype))
            x = d.sample()
            assert d.batch_shape == shape
            assert d.event_shape == (width,)
            assert x.shape == d.mean.shape == (*shape, width)
            assert d.sample((7,)).shape == (7, *shape, width)
            assert log_prob(d, x).shape == shape
            assert log_prob(d, d.sample((7,))).shape == (7, *shape)
            assert x.dtype == d.mean.dtype == log_prob(d, x).dtype == dtype
            assert torch.isfinite(d.mean).all()
            assert not x.requires_grad
            assert head.likelihood in ("density", "mass", "mixed")


@every_head
@pytest.mark.parametrize("size", [1e4, -1e4, 1e6, -1e6])
def test_extreme_parameters_leave_values_and_gradients_finite(case, size):
    head = case.make(4, case.num_features)
    for value in case.tails:
        f = torch.full((2, 4), size, requires_grad=True)
        found = log_prob(head(f), case.data(value, 2))
        found.sum().backward()
        assert torch.isfinite(found).all(), value
        assert torch.isfinite(f.grad).all(), value
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    d = head(torch.full((2, 4), size))
    assert torch.isfinite(d.mean).all()
    assert torch.isfinite(d.sample((9,))).all()
    assert torch.isfinite(tempered(d, 0.5).sample((9,))).all()


@every_head
def test_single_parameters_may_be_extreme(case):
    """Each raw output by itself far out, the others at zero: a scale without a location, a weight without the rest."""
    head = case.make(4, case.num_features)
    for linear in [m for m in head.modules() if isinstance(m, torch.nn.Linear) and m.bias is not None]:
        for i in range(min(linear.out_features, 30)):
            for size in (-1e5, 1e5):
                with torch.no_grad():
                    for p in head.parameters():
                        p.zero_()
                    linear.bias[i] = size
                head.zero_grad()
                found = torch.stack([log_prob(head(torch.ones(4)), case.data(value)) for value in case.tails])
                found.sum().backward()
                assert torch.isfinite(found).all(), (i, size)
                assert all(torch.isfinite(p.grad).all() for p in head.parameters()), (i, size)


@every_head
def test_gradcheck(case):
    head = case.make(2, case.num_features).double()
    f = features(3, 2).requires_grad_()
    x = head(f).sample()
    assert torch.autograd.gradcheck(lambda f: log_prob(head(f), x), (f,))


@every_head
def test_parameters_stay_in_float32_under_autocast(case):
    head, f = case.make(4, case.num_features), features(2, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        d = head(f)
        assert d.mean.dtype == d.sample().dtype == log_prob(d, d.sample()).dtype == torch.float32


@every_head
def test_marginal_of_everything_and_of_nothing(case):
    d = case.make(4, case.num_features).double()(features(2, 5, 4))
    x = d.sample()
    everywhere = torch.ones_like(x, dtype=torch.bool)
    torch.testing.assert_close(log_prob(d, x, everywhere), log_prob(d, x), rtol=1e-12, atol=1e-12)
    nothing = log_prob(d, torch.full_like(x, math.nan), ~everywhere)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-12)


@every_head
def test_missing_values_do_not_matter(case):
    """Neither to the likelihood of the others nor to its gradient, not even NaN."""
    head, f = case.make(4, case.num_features).double(), features(2, 5, 4)
    x = head(f).sample()
    observed = case.observed(x)
    gradients = []
    for hole in (0.0, math.nan):
        head.zero_grad()
        found = log_prob(head(f), torch.where(observed, x, hole), observed)
        found.sum().backward()
        assert torch.isfinite(found).all()
        gradients.append([p.grad.clone() for p in head.parameters()])
    torch.testing.assert_close(*gradients)


@every_head
def test_draws_have_the_mean(case):
    torch.manual_seed(1)
    d = case.make(4, case.num_features).double()(features(4))
    n = 20000
    x = d.sample((n,))
    assert ((x.mean(0) - d.mean).abs() < 5 * x.std(0) / math.sqrt(min(n, case.mean_draws)) + 1e-9).all()


@every_head
def test_draws_follow_the_distribution(case):
    """How often the first feature falls between two values is what its marginal sums or integrates to there."""
    torch.manual_seed(2)
    width = 1 if case.whole else case.num_features
    d = case.make(4, width).double()(features(4))
    draws = d.sample((20000,))[:, 0]
    edges = draws.quantile(torch.linspace(0.05, 0.95, 11).double())
    if case.support is not None:
        between = (case.support[1:] + case.support[:-1]) / 2
        edges = between[torch.searchsorted(between, edges).clamp(max=len(between) - 1)]
        edges = torch.cat([case.support[:1] - 1, edges.unique(), case.support[-1:] + 1])
    for low, high in pairwise(edges.tolist()):
        if case.support is not None:
            places = case.support[(case.support > low) & (case.support < high)]
            weights = torch.ones_like(places)
        else:
            places = torch.linspace(low, high, 401).double()
            weights = torch.full_like(places, (high - low) / 400)
            weights[[0, -1]] /= 2
        frames = torch.stack([places] * width, 1)
        first = (torch.arange(width) == 0).expand_as(frames)
        expected = (log_prob(d, frames, first).exp() * weights).sum().item()
        found = ((draws > low) & (draws < high)).double().mean().item()
        assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / len(draws)) + 1e-4


@every_head
def test_temperature_sharpens_and_flattens(case):
    """By entropy; by variance where what is cut off at the range's ends piles up there."""
    torch.manual_seed(3)
    head = case.make(4, case.num_features).double()
    d = head(2 * features(4))
    assert tempered(d, 1.0) is d
    spreads = []
    for temperature in (0.2, 1.0, 3.0):
        at = tempered(d, temperature)
        x = at.sample((4000,))
        cut = isinstance(head, DiscretisedLogisticMixture)
        spreads.append(x.var(0).sum().log().item() if cut else -log_prob(at, x).mean().item())
        assert at.event_shape == d.event_shape
        assert at.batch_shape == d.batch_shape
        assert x.dtype == torch.float64
    assert spreads[0] + 0.05 < spreads[1] < spreads[2] - 0.05
    x = d.sample((50,))
    twice, once = tempered(tempered(d, 0.5), 3.0), tempered(d, 1.5)
    torch.testing.assert_close(log_prob(twice, x), log_prob(once, x))
    for absurd in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="temperature"):
            tempered(d, absurd)


def test_no_temperature_is_said():
    with pytest.raises(UserError, match="MultivariateNormal has no temperature"):
        tempered(MultivariateNormal(torch.zeros(2), torch.eye(2)), 0.5)


@every_head
def test_check_accepts_draws_and_refuses_what_has_no_probability(case):
    head = case.make(4, case.num_features)
    x = head(features(6, 5, 4).float()).sample()
    everywhere = torch.ones_like(x, dtype=torch.bool)
    head.check(x, everywhere)
    for value in case.outside:
        feature = case.num_features - 1
        bad = x.clone()
        bad[3, 2, feature] = value
        with pytest.raises(UserError, match=f"{type(head).__name__}: feature {feature} has values from .* not .*or"):
            head.check(bad, everywhere)
        counted = everywhere.clone()
        counted[3, 2, feature] = False
        head.check(bad, counted)


@every_head
def test_head_in_a_model(case):
    model = build_vrnn(case.num_features, latent_size=2, hidden_size=5, emission=case.make)
    model.init_from_statistics(case.data(case.tails[-1]) * 0.3, torch.ones(case.num_features))
    x = model.generate(steps=6, batch_size=3).x
    assert x.shape == (3, 6, case.num_features)
    everywhere = torch.ones_like(x, dtype=torch.bool)
    model.decoder.head.check(x, everywhere)
    trace = model(vrnn_lightning.SequenceBatch(x, torch.tensor([6, 4, 1])))
    (trace.kl.sum() - trace.log_px.sum()).backward()
    assert torch.isfinite(trace.log_px).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Gaussian, min_std=0.0), "min_std 0.0"),
        (partial(Gaussian, covariance="full"), "covariance 'full'"),
        (partial(GaussianMixture, components=0), "components 0"),
        (partial(Laplace, min_scale=-1.0), "min_scale -1.0"),
        (partial(StudentT, min_scale=math.nan), "min_scale nan"),
        (partial(StudentT, min_df=0.5), "min_df 0.5"),
        (partial(Pen, components=0), "components 0"),
        (lambda i, o: Pen(i, 2), "2 features"),
        (partial(Pen, min_std=0.0), "min_std 0.0"),
        (partial(DiscretisedLogisticMixture, components=0), "components 0"),
        (partial(DiscretisedLogisticMixture, bits=0), "bits 0"),
        (partial(DiscretisedLogisticMixture, bits=32), "bits 32"),
        (partial(DiscretisedLogisticMixture, lowest=10**9), "lowest 1000000000"),
        (partial(MuLaw, bins=1), "bins 1"),
    ],
)
def test_absurd_options_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make(4, 3)


def test_gaussian_density_is_scipys():
    head, f, x = Gaussian(4, 3).double(), features(5, 4), features(5, 3)
    d = head(f)
    mean, std = d.base_dist.loc.detach(), d.base_dist.scale.detach()
    expected = stats.norm.logpdf(x, mean, std).sum(-1)
    torch.testing.assert_close(log_prob(d, x).detach(), torch.as_tensor(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [Gaussian, Laplace, StudentT, GaussianMixture], ids=lambda h: h.__name__)
def test_density_integrates_to_one(make):
    d = make(4, 1).double()(features(1, 4))
    grid = torch.linspace(-15, 15, 400001, dtype=torch.float64).sinh()[:, None]
    assert torch.trapezoid(log_prob(d, grid).exp(), grid[:, 0]).item() == pytest.approx(1, abs=1e-6)


def test_bernoulli_sums_to_one():
    d = Bernoulli(4, 3).double()(features(1, 4))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 3)
    assert log_prob(d, corners).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_gaussian_has_finite_gradients_at_extreme_parameters():
    head = Gaussian(4, 3)
    value = log_prob(head(torch.full((2, 4), -1e4)), torch.zeros(2, 3))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    assert (head(torch.full((2, 4), -1e6)).stddev >= head.min_std).all()


def test_scalar_covariance_is_one_deviation_for_all_features():
    head = Gaussian(4, 3, covariance="scalar")
    std = head(torch.randn(5, 4)).stddev
    assert std.shape == (5, 3)
    assert (std == std[:, :1]).all()
    assert head.linear.out_features == 4


def test_marginal_leaves_out_what_is_missing():
    d, x = Gaussian(4, 3).double()(features(5, 4)), features(5, 3)
    observed = torch.rand(5, 3) > 0.4
    each = d.base_dist.log_prob(x)
    torch.testing.assert_close(d.marginal_log_prob(x, observed), (each * observed).sum(-1))
    with pytest.raises(UserError, match="missing"):
        log_prob(d.base_dist, x, observed)


def test_kl_of_the_model_is_the_closed_form():
    """Per dimension: 0 for equal Gaussians, else log(s2/s1) + (s1^2 + (m1-m2)^2) / (2 s2^2) - 1/2."""
    m1, m2, s1, s2 = features(4, 6)
    s1, s2 = s1.abs() + 0.1, s2.abs() + 0.1
    q, p = Factorised(Normal(m1, s1)), Factorised(Normal(m2, s2))
    expected = (s2 / s1).log() + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5
    torch.testing.assert_close(kl_divergence(q.base_dist, p.base_dist), expected)
    assert (kl_divergence(q.base_dist, q.base_dist) == 0).all()


@pytest.mark.parametrize(
    "make", [Poisson, NegativeBinomial, partial(DiscretisedLogisticMixture, components=2), Bernoulli]
)
def test_biases_start_from_the_datas_mean(make):
    head, mean = make(4, 3), torch.tensor([0.1, 0.5, 0.0])
    if isinstance(head, DiscretisedLogisticMixture):
        mean = torch.tensor([20.0, 128.0, 200.0])
    head.init_from_statistics(mean)
    d = head(torch.zeros(4))
    if isinstance(head, DiscretisedLogisticMixture):
        torch.testing.assert_close(d.base_dist.loc, mean[:, None].expand(3, 2))
    else:
        torch.testing.assert_close(d.mean, mean.clamp(min=1e-3))
    assert all(torch.isfinite(p).all() for p in head.parameters())


def test_pen_starts_from_the_share_of_lifts():
    head = Pen(4, 3)
    head.init_from_statistics(torch.tensor([5.0, 5.0, 0.04]))
    assert head(torch.zeros(4)).mean[2].item() == pytest.approx(0.04, rel=1e-5)


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
    everywhere = torch.ones(6, 3, dtype=torch.bool)
    torch.testing.assert_close(log_prob(d, x, everywhere), log_prob(d, x))


def test_marginal_of_a_mixture_integrates_to_one():
    grid = torch.linspace(-20, 20, 100001, dtype=torch.float64)[:, None]
    two = GaussianMixture(4, 2, components=4).double()(features(1, 4))
    frames = torch.cat([torch.full_like(grid, 1e9), grid], 1)
    marginal = log_prob(two, frames, torch.tensor([False, True]).expand_as(frames))
    assert torch.trapezoid(marginal.exp(), grid[:, 0]).item() == pytest.approx(1, abs=1e-9)


def test_a_mixture_of_one_is_a_gaussian():
    head, f, x = GaussianMixture(4, 3, components=1).double(), features(6, 4), features(6, 3)
    torch.testing.assert_close(log_prob(head(f), x), log_prob(head.gaussians(f), x))


def test_temperature_of_a_gaussian_mixture_is_in_its_weights_and_variances():
    d = GaussianMixture(4, 2, components=3).double()(features(4))
    hot = tempered(d, 4.0)
    before, after = d.component_distribution, hot.component_distribution
    torch.testing.assert_close(after.variance, 4 * before.variance)
    torch.testing.assert_close(after.mean, before.mean)
    expected = (d.mixture_distribution.logits / 4).softmax(-1)
    torch.testing.assert_close(hot.mixture_distribution.probs, expected)


def test_laplace_and_student_densities_are_scipys():
    f, x = features(5, 4), 3 * features(5, 3)
    d = Laplace(4, 3).double()(f)
    expected = stats.laplace.logpdf(x, d.base_dist.loc.detach(), d.base_dist.scale.detach()).sum(-1)
    torch.testing.assert_close(log_prob(d, x).detach(), torch.as_tensor(expected), rtol=1e-12, atol=1e-12)
    d = StudentT(4, 3, min_df=2.5).double()(f)
    t = d.base_dist
    assert (t.df > 2.5).all()
    frozen = stats.t(t.df.detach(), t.loc.detach(), t.scale.detach())
    torch.testing.assert_close(
        log_prob(d, x).detach(), torch.as_tensor(frozen.logpdf(x).sum(-1)), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(t.variance.detach(), torch.as_tensor(frozen.var()))


def test_student_becomes_a_gaussian_in_float32_too():
    head = StudentT(1, 1)
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.copy_(torch.tensor([0.0, 0.0, 1e6]))
    d, x = head(torch.zeros(1)), torch.linspace(-3, 3, 50)[:, None]
    torch.testing.assert_close(log_prob(d, x), Normal(0.0, d.base_dist.scale).log_prob(x)[:, 0], rtol=1e-5, atol=1e-5)


def test_gamma_functions_are_scipys():
    a = torch.logspace(-4, 7, 200, dtype=torch.float64)
    for b in (0.0, 0.5, 1.0, 7.25):
        exact = torch.as_tensor(np.log(special.poch(a.numpy(), b))) - b * a.log()
        torch.testing.assert_close(log_gamma_ratio(a, torch.full_like(a, b)), exact, rtol=1e-9, atol=2e-8)
    for b in (0.5, 7.25, 300.0):
        below, above = (log_gamma_ratio(a[:1] * 0 + at, torch.full_like(a[:1], b)) for at in (16.0 - 1e-12, 16.0))
        torch.testing.assert_close(below, above, rtol=1e-11, atol=1e-12)
    x = torch.linspace(-40, 15, 300, dtype=torch.float64)
    torch.testing.assert_close(
        log_softplus(x), torch.as_tensor(np.log(np.log1p(np.exp(x.numpy())))), rtol=1e-12, atol=1e-12
    )
    y = torch.logspace(-3, 4, 50)
    torch.testing.assert_close(torch.nn.functional.softplus(inverse_softplus(y)), y)


def test_counts_are_scipys_and_sum_to_one():
    f, x = features(4, 4), torch.arange(0.0, 400.0, dtype=torch.float64)[:, None, None]
    poisson = Poisson(4, 1).double()(5 * f)
    assert log_prob(poisson, x).exp().sum(0).detach().numpy() == pytest.approx(1, abs=1e-10)
    expected = stats.poisson.logpmf(x[..., 0], poisson.mean.detach()[:, 0])
    torch.testing.assert_close(log_prob(poisson, x).detach(), torch.as_tensor(expected), rtol=1e-9, atol=1e-9)
    negative = NegativeBinomial(4, 1).double()(5 * f)
    base = negative.base_dist
    m, r = base.mean.detach()[:, 0], base.size.detach()[:, 0]
    frozen = stats.nbinom(r, r / (r + m))
    torch.testing.assert_close(
        log_prob(negative, x).detach(), torch.as_tensor(frozen.logpmf(x[..., 0])), rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(negative.variance.detach()[:, 0], torch.as_tensor(frozen.var()))
    slow = NegativeBinomial(4, 1).double()(f)
    far = torch.arange(0.0, 4000.0, dtype=torch.float64)[:, None, None]
    assert log_prob(slow, far).exp().sum(0).detach().numpy() == pytest.approx(1, abs=1e-9)


def test_negative_binomial_becomes_a_poisson_in_float32_too():
    head = NegativeBinomial(1, 1)
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.copy_(torch.tensor([7.0, 1e6]))
    d, x = head(torch.zeros(1)), torch.arange(0.0, 30.0)[:, None]
    expected = torch.as_tensor(stats.poisson.logpmf(x[:, 0], d.mean.item())).float()
    torch.testing.assert_close(log_prob(d, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [Poisson, NegativeBinomial])
@pytest.mark.parametrize("temperature", [0.3, 2.5])
def test_tempered_counts_are_the_power_normalised(make, temperature):
    d = make(4, 2).double()(3 * features(3, 4))
    grid = torch.arange(0.0, 3000.0, dtype=torch.float64)[:, None, None].expand(-1, 3, 2)
    power = (d.base_dist.log_prob(grid) / temperature).softmax(0)
    at = tempered(d, temperature)
    torch.testing.assert_close(at.base_dist.log_prob(grid).exp(), power, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(at.mean, (power * grid).sum(0), rtol=1e-7, atol=1e-7)
    spread = at.variance / d.variance
    assert (spread < 1).all() if temperature < 1 else (spread > 1).all()


@pytest.mark.parametrize(("bits", "lowest"), [(1, 0), (8, 0), (8, -100), (16, -32768)])
def test_discretised_logistics_sum_to_one(bits, lowest):
    head = DiscretisedLogisticMixture(4, 2, components=3, bits=bits, lowest=lowest)
    x = torch.arange(2.0**bits, dtype=torch.float64)[:, None] + lowest
    for size in (0.1, 1.0, 30.0):  # 30: some components narrower than a bin, some outside the range
        mass = log_prob(
            head.double()(size * features(4)), x.expand(-1, 2), (x == x) & torch.tensor([True, False])
        ).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-9)
        single = log_prob(
            head.float()(size * features(4).float()), x.float().expand(-1, 2), (x == x) & torch.tensor([True, False])
        )
        assert single.double().exp().sum().item() == pytest.approx(1, abs=2e-3)


def test_discretised_logistic_masses_are_differences_of_scipys_cdf():
    d = DiscretisedLogisticMixture(4, 1, components=3).double()(features(4))
    base = d.base_dist
    weights, loc, scale = (p.detach()[0].numpy() for p in (base.weights.probs, base.loc, base.scale))
    x = np.arange(256.0)[:, None]
    above = np.where(x == 255, 1.0, stats.logistic.cdf(x + 0.5, loc, scale))
    below = np.where(x == 0, 0.0, stats.logistic.cdf(x - 0.5, loc, scale))
    expected = torch.as_tensor(np.log((weights * (above - below)).sum(-1)))
    torch.testing.assert_close(log_prob(d, torch.as_tensor(x)).detach(), expected, rtol=1e-9, atol=1e-9)


def test_mean_of_discretised_logistics_of_any_width():
    """Within half a bin of the exact sum, from a hundredth of the range's scale to a million of it."""
    x = torch.arange(256.0).double()
    for loc in (-300.0, 3.3, 128.0, 254.0, 900.0):
        for scale in (0.04, 1.0, 60.0, 1e4, 1e8):
            d = DiscretisedLogisticMixture(1, 1, components=1).double()(torch.zeros(1).double())
            d.base_dist.loc, d.base_dist.scale = (torch.full_like(d.base_dist.loc, v) for v in (loc, scale))
            exact = (log_prob(d, x[:, None]).exp() * x).sum().item()
            assert d.mean.item() == pytest.approx(exact, abs=0.5 if scale < 1 else 1e-2)


def test_mulaw_sums_to_one_and_decodes_what_it_encodes():
    for bins in (2, 256, 1024):
        for dtype in (torch.float32, torch.float64):
            d = MuLaw(4, 1, bins=bins).to(dtype)(features(4).to(dtype))
            index = torch.arange(bins)
            amplitudes = d.base_dist.decode(index)
            assert torch.equal(d.base_dist.encode(amplitudes), index)
            assert log_prob(d, amplitudes[:, None]).exp().sum().item() == pytest.approx(1, abs=1e-5)
            assert amplitudes[[0, -1]].tolist() == pytest.approx([-1, 1])


def test_mulaw_is_the_formula():
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    companded = torch.sign(x) * torch.log(1 + 255 * x.abs()) / math.log(256)
    expected = ((companded + 1) / 2 * 255 + 0.5).floor().long()
    d = MuLaw(4, 1).double()(features(4))
    assert torch.equal(d.base_dist.encode(x), expected)
    logits = d.base_dist.bins.logits[0]
    torch.testing.assert_close(log_prob(d, x[:, None]), logits.log_softmax(-1)[expected])


def pen(*shape: int):
    return Pen(4, 3, components=4).double()(2 * features(*shape, 4))


def test_pen_density_is_the_log_of_a_sum():
    d, x = pen(6), features(6, 3)
    x[:, 2] = (x[:, 2] > 0).double()
    rho, (sx, sy) = d.correlation, d.scale.unbind(-1)
    covariance = torch.stack([sx**2, rho * sx * sy, rho * sx * sy, sy**2], -1).unflatten(-1, (2, 2)).detach().numpy()
    weights, loc = d.weights.probs.detach().numpy(), d.loc.detach().numpy()
    expected = [
        math.log(
            sum(weights[i, k] * stats.multivariate_normal.pdf(x[i, :2], loc[i, k], covariance[i, k]) for k in range(4))
        )
        + stats.bernoulli.logpmf(x[i, 2], d.lift.probs[i].item())
        for i in range(6)
    ]
    torch.testing.assert_close(log_prob(d, x).detach(), torch.tensor(expected).double(), rtol=1e-9, atol=1e-9)


def test_pen_sums_and_integrates_to_one():
    d = pen(1)
    side = torch.linspace(-12, 12, 401, dtype=torch.float64)
    total = 0.0
    for lift in (0.0, 1.0):
        frames = torch.cartesian_prod(side, side, torch.tensor([lift]).double())
        total += log_prob(d, frames).exp().sum().item() * (side[1] - side[0]).item() ** 2
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("missing", [0, 1])
def test_missing_pen_offset_is_integrated_out(missing):
    d, side = pen(1), torch.linspace(-15, 15, 6001, dtype=torch.float64)
    frames = torch.tensor([[0.3, -0.2, 1.0]]).double().repeat(len(side), 1)
    frames[:, missing] = side
    observed = torch.tensor([True, True, True])
    integral = torch.trapezoid(log_prob(d, frames).exp(), side).item()
    observed[missing] = False
    found = log_prob(d, frames, observed.expand_as(frames))[0].exp().item()
    assert found == pytest.approx(integral, rel=1e-6)


def test_missing_lift_leaves_the_offsets():
    d, x = pen(5), torch.tensor([0.3, -0.2, 1.0]).double().expand(5, 3)
    known = torch.tensor([True, True, False]).expand(5, 3)
    torch.testing.assert_close(log_prob(d, x, known) + d.lift.log_prob(x[:, 2]), log_prob(d, x))


def test_pen_draws_are_as_correlated_as_said():
    torch.manual_seed(0)
    head = Pen(4, 3, components=1).double()
    d = head(features(4))
    x = d.sample((40000,))
    assert torch.corrcoef(x[:, :2].T)[0, 1].item() == pytest.approx(d.correlation.item(), abs=0.025)
    torch.testing.assert_close(x.var(0), d.variance, rtol=0.05, atol=0.01)
    assert (head(1e9 * features(4)).correlation.abs() < 1).all()


@pytest.mark.parametrize("count", [1e5, 1e6, 1e7])
def test_large_counts_keep_their_digits(count):
    """In float32, at the mode; the parameters are those that float32 holds."""
    value = torch.tensor([[count]])
    poisson = Poisson(2, 1)
    negative = NegativeBinomial(2, 1)
    with torch.no_grad():
        for head in (poisson, negative):
            head.linear.weight.zero_()
            head.linear.bias.fill_(count)
        negative.linear.bias[1] = 10.0
        found = [log_prob(head(torch.zeros(1, 2)), value).item() for head in (poisson, negative)]
        size = negative(torch.zeros(1, 2)).base_dist.size.item()
    expected = [stats.poisson.logpmf(count, count), stats.nbinom.logpmf(count, size, size / (size + count))]
    assert found == pytest.approx(expected, abs=1e-3)


def test_the_loudest_bin_is_in_its_own_support():
    head = MuLaw(2, 1, bins=65536)
    amplitudes = head(torch.zeros(1, 2)).base_dist.decode(torch.tensor([0, 65535]))
    assert amplitudes.tolist() == [-1.0, 1.0]
