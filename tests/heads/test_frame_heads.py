"""One-hot groups, full covariances and flows against torch, scipy and sums or integrals over all frames."""

from __future__ import annotations

import itertools
import math
import sys
from functools import partial

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, OneHotCategorical

from vrnn_lightning import UserError
from vrnn_lightning.heads import Categorical, Flow, MultivariateGaussian, log_prob, tempered
from vrnn_lightning.inference.imputing import _complete
from vrnn_lightning.nn import MLPConfig


def features(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64)


def test_categorical_is_torchs_of_each_group():
    head, f = Categorical(4, 6, groups=2).double(), features(5, 4)
    d = head(f)
    groups = [OneHotCategorical(logits=part) for part in head.linear(f).chunk(2, -1)]
    x = d.sample()
    expected = sum(g.log_prob(part) for g, part in zip(groups, x.chunk(2, -1), strict=True))
    torch.testing.assert_close(log_prob(d, x), expected)
    torch.testing.assert_close(d.mean, torch.cat([g.mean for g in groups], -1))
    torch.testing.assert_close(d.variance, torch.cat([g.variance for g in groups], -1))


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_temperature_of_one_hot_groups_is_the_power_normalised(temperature):
    d = Categorical(4, 6, groups=2).double()(features(4))
    frames = torch.stack([torch.cat(pair) for pair in itertools.product(torch.eye(3).double(), repeat=2)])
    expected = (log_prob(d, frames) / temperature).softmax(0)
    torch.testing.assert_close(log_prob(tempered(d, temperature), frames).exp(), expected)


def test_marginals_of_one_hot_groups_are_sums_over_what_is_missing():
    d = Categorical(4, 6, groups=2).double()(features(4))
    frames = torch.stack([torch.cat(pair) for pair in itertools.product(torch.eye(3).double(), repeat=2)])
    masses = log_prob(d, frames).exp()
    for pattern in itertools.product([False, True], repeat=6):
        observed = torch.tensor(pattern)
        same = (frames[:, None, observed] == frames[None, :, observed]).all(-1).double()
        found = log_prob(d, frames.masked_fill(~observed, math.nan), observed.expand_as(frames)).exp()
        torch.testing.assert_close(found, same @ masses)


def test_one_hot_groups_refuse_other_frames():
    head = Categorical(4, 6, groups=2)
    x = torch.tensor([[1.0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0], [1, 0, 0, 0.5, 0, 0]])
    expected = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1]]).bool()
    assert torch.equal(head.supports(x), expected)
    head.init_from_statistics(torch.tensor([0.2, 0.5, 0.3, 0.0, 0.4, 0.6]))
    torch.testing.assert_close(
        head(torch.zeros(4)).mean, torch.tensor([0.2, 0.5, 0.3, 0.001, 0.4, 0.6]), atol=1e-3, rtol=0
    )
    assert head.round_mean(torch.tensor([0.2, 0.5, 0.3, 0.1, 0.4, 0.5])).tolist() == [0, 1, 0, 0, 0, 1]


def test_full_covariance_is_scipys():
    d, x = MultivariateGaussian(4, 5).double()(features(3, 4)), features(3, 5)
    covariance = d.factor @ d.factor.mT
    for row in range(3):
        frozen = stats.multivariate_normal(d.mean[row].detach(), covariance[row].detach())
        assert log_prob(d, x)[row].item() == pytest.approx(frozen.logpdf(x[row]), rel=1e-10)
    residual = torch.eye(5) - d.weights
    torch.testing.assert_close(covariance.inverse(), residual.mT @ torch.diag_embed(d.scale**-2) @ residual)
    torch.testing.assert_close(d.variance, covariance.diagonal(dim1=-2, dim2=-1))


def test_marginals_of_a_full_covariance_are_scipys():
    d, x = MultivariateGaussian(4, 4).double()(features(4)), features(4)
    covariance = (d.factor @ d.factor.mT).detach()
    for pattern in itertools.product([False, True], repeat=4):
        seen = torch.tensor(pattern)
        expected = 0.0
        if seen.any():
            expected = stats.multivariate_normal(d.mean[seen].detach(), covariance[seen][:, seen]).logpdf(x[seen])
        assert log_prob(d, x.masked_fill(~seen, math.nan), seen).item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_marginals_of_a_full_covariance_have_gradients():
    head, f, x = MultivariateGaussian(2, 3).double(), features(4, 2).requires_grad_(), features(4, 3)
    seen = torch.tensor([[True, False, True], [False, True, True], [False, False, False], [True, True, True]])
    assert torch.autograd.gradcheck(lambda f: log_prob(head(f), x, seen), (f,))


def test_temperature_of_a_full_covariance_multiplies_it():
    d, x = MultivariateGaussian(4, 3).double()(features(4)), features(6, 3)
    hot = tempered(d, 2.5)
    expected = MultivariateNormal(d.mean, 2.5 * d.factor @ d.factor.mT).log_prob(x)
    torch.testing.assert_close(log_prob(hot, x), expected)


def test_draws_of_a_full_covariance_are_as_correlated():
    torch.manual_seed(1)
    d = MultivariateGaussian(4, 3).double()(2 * features(4))
    x = d.sample((100_000,))
    torch.testing.assert_close(x.T.cov(), d.factor @ d.factor.mT, rtol=0.05, atol=0.03)


FLOWS = {
    "splines": partial(Flow, network=MLPConfig(16, 2), transforms=2),
    "splines, coupling": partial(Flow, network=MLPConfig(16, 2), transforms=2, coupling=True),
    "affine": partial(Flow, kind="MAF", network=MLPConfig(16)),
}
every_flow = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS.keys())


def bent(make, width: int) -> tuple[Flow, Tensor]:
    head = make(4, width).double()
    return head, features(4)


@every_flow
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_density_of_a_flow_integrates_to_one(make, temperature):
    head, f = bent(make, 2)
    side = torch.linspace(-10, 10, 251).double()
    frames = torch.cartesian_prod(side, side)
    d = tempered(head(f), temperature)
    total = log_prob(d, frames).exp().sum().item() * (side[1] - side[0]).item() ** 2
    assert total == pytest.approx(1, abs=2e-3)


@every_flow
def test_density_of_a_flow_is_the_change_of_variables(make):
    head, f = bent(make, 3)
    d, x = head(f), features(3)
    z = d.transform(x)
    jacobian = torch.autograd.functional.jacobian(d.transform, x)
    expected = stats.norm.logpdf(z.detach()).sum() + jacobian.det().abs().log().item()
    assert log_prob(d, x).item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(d.of_noise(z.detach()), x)


@every_flow
def test_draws_of_a_flow_have_its_density(make):
    """By the probability integral transform: mapped back, draws are Gaussian; and their moments are the density's."""
    head, f = bent(make, 2)
    torch.manual_seed(2)
    x = head.draw(f.expand(4_000, 4))
    assert stats.kstest(head(f).transform(x).detach().flatten(), "norm").pvalue > 1e-3
    side = torch.linspace(-10, 10, 251).double()
    frames = torch.cartesian_prod(side, side)
    masses = log_prob(head(f), frames).softmax(0)[:, None]
    expected = (masses * frames).sum(0)
    error = x.std(0)
    assert ((x.mean(0) - expected).abs() < 5 * error / 4_000**0.5 + 1e-3).all()
    assert ((head(f).mean - expected).abs() < 0.2 * error).all()


def test_flow_scores_whole_frames_only():
    head, f = bent(FLOWS["splines"], 2)
    x, seen = features(3, 2), torch.tensor([[True, True], [False, False], [True, True]])
    found = log_prob(head(f), x.masked_fill(~seen, math.nan), seen)
    torch.testing.assert_close(found, log_prob(head(f), x) * seen[:, 0])
    with pytest.raises(UserError, match=r"Flow: can't score a part of a frame. Fix:"):
        log_prob(head(f), x, torch.tensor([True, False]).expand(3, 2))


def test_mean_of_a_flow_draws_nothing_from_the_generator():
    head, f = bent(FLOWS["splines"], 2)
    state = torch.get_rng_state()
    assert torch.equal(head(f).mean, head(f).mean)
    assert torch.equal(torch.get_rng_state(), state)


def test_zuko_leaves_the_validation_of_distributions_on():
    for name in [name for name in sys.modules if name.partition(".")[0] == "zuko"]:
        del sys.modules[name]
    Flow(4, 2)
    assert Distribution._validate_args is __debug__


def test_flow_needs_zuko(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(UserError, match=r"zuko is not installed. Fix: pip install 'vrnn-lightning\[flows\]'"):
        Flow(4, 2)


@pytest.mark.parametrize("make", [MultivariateGaussian, Flow, partial(Categorical, groups=2)])
def test_a_part_of_a_frame_is_not_drawn_without_the_other(make):
    d = make(4, 4)(torch.zeros(2, 4))
    valid = torch.tensor([[True, False, False, True]]).expand(2, 4)
    with pytest.raises(UserError, match="can't fill a part of a frame"):
        _complete(d, torch.zeros(2, 4), valid)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Categorical, groups=0), "groups 0"),
        (partial(Categorical, groups=2), "groups 2: 3 features can't be divided"),
        (partial(MultivariateGaussian, min_std=0.0), "min_std 0.0"),
        (partial(Flow, transforms=0), "transforms 0"),
        (partial(Flow, kind="CNF"), "kind 'CNF': choose"),
    ],
)
def test_absurd_options_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make(4, 3)


@pytest.mark.parametrize("name", ["Categorical", "MultivariateGaussian", "Flow"])
def test_on_the_command_line(lightning, tiny, name):
    assert "--model.emission." in lightning("fit", "--model.emission.help", name).out
    said = lightning("fit", "-c", tiny, "--model.emission", name)
    if name == "Categorical":
        assert "emission Categorical: feature 0 has values" in said.err
        assert "not one-hot" in said.err
    else:
        assert said.code == 0, said.err
