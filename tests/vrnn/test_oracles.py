"""Bounds against exact likelihoods: of a VRNN that is factor analysis, and of data that know their own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal
from vrnn_lightning.datamodules.hidden_markov import HiddenMarkov
from vrnn_lightning.datamodules.linear_gaussian import LinearGaussian

from vrnn_lightning import VRNN, MLPConfig, SequenceBatch, build_vrnn
from vrnn_lightning.batch import pad
from vrnn_lightning.filtering import Resampling
from vrnn_lightning.heads import Bernoulli, Gaussian
from vrnn_lightning.noise import Noise


def factor_analysis() -> tuple[VRNN, MultivariateNormal]:
    """Return a VRNN whose frames are independent, x_t = W z_t + b + noise with z_t ~ N(0, I), and p(x_t).

    A recurrence without weights stays at 0. Each linear map is written as the difference of two halves of a ReLU layer.
    """
    torch.manual_seed(0)
    latent, features = 2, 3
    layers = {
        "phi_z": MLPConfig(2 * latent),
        "decoder": MLPConfig(2 * features),
        "encoder": MLPConfig(8),
        "phi_x": MLPConfig(8),
    }
    model = build_vrnn(features, latent, 4, prior=None, **layers).double()
    loading, bias = torch.randn(features, latent).double(), torch.randn(features).double()
    spread = torch.full((features,), 0.3).double()
    identity = torch.eye(latent).double()
    with torch.no_grad():
        for p in (*model.cells.parameters(), *model.phi_z.parameters(), *model.decoder.parameters()):
            p.zero_()
        model.phi_z[0].weight.copy_(torch.cat([identity, -identity]))
        body, head = model.decoder.body[0], model.decoder.head
        linear = torch.cat([loading, -loading], 1)
        body.weight[:, : 2 * latent].copy_(torch.cat([linear, -linear]))
        head.linear.weight[:features].copy_(torch.cat([torch.eye(features), -torch.eye(features)], 1))
        head.linear.bias[:features].copy_(bias)
        head.linear.bias[features:].copy_((spread - head.min_std).expm1().log())
        model.encoder.head.linear.weight.mul_(0.3)
    covariance = loading @ loading.T + spread.square().diag()
    return model, MultivariateNormal(bias, covariance)


def test_importance_weights_estimate_the_models_own_likelihood():
    """E p_hat = p for K = 8, over many draws; with many samples the bound is tight; the ELBO lies below."""
    model, exact = factor_analysis()
    x = exact.sample((3,))
    copies = 10000
    batch = SequenceBatch(x.expand(copies, 3, 3).contiguous(), torch.full((copies,), 2))  # the third is padding
    log_p = exact.log_prob(x[:2]).sum().item()
    with torch.no_grad():
        for resampling in (None, Resampling()):
            found = model.filter(batch, 8, resampling, Noise(batch, list(range(copies)))).log_likelihood
            ratio = (found - log_p).exp()
            error = ratio.std().item() / copies**0.5
            assert error < 0.2
            assert abs(ratio.mean().item() - 1) < 4 * error
        one = batch.rows([0])
        many = model.filter(one, 20000, None, Noise(one, [0])).log_likelihood.item()
        assert many == pytest.approx(log_p, abs=0.1)
        trace = model(batch, Noise(batch, list(range(copies))).over_time(2))
        elbo = trace.log_px.sum(1) - trace.kl.sum((1, 2))
        gap = log_p - elbo
        assert gap.mean() > 4 * gap.std() / copies**0.5


@pytest.mark.parametrize(
    ("source", "emission"),
    [
        (LinearGaussian(steps=12, min_steps=1, train_size=300), Gaussian),
        (HiddenMarkov(steps=12, min_steps=1, train_size=300), Bernoulli),
    ],
    ids=["linear-Gaussian", "hidden Markov"],
)
def test_no_model_beats_the_truth_on_average(source, emission):
    """ELBO <= IWAE <= log p_model <= log p_true: paired differences over sequences, three standard errors."""
    torch.manual_seed(0)
    model = build_vrnn(source.num_features, 3, 16, emission=emission)
    model.init_from_statistics(*source.input_statistics())
    batch = pad(source.sequences("train"))
    batch.x = batch.x.float()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(40):
        trace = model(batch, Noise(batch, [step * 1000 + i for i in range(300)]).over_time(3))
        optimizer.zero_grad()
        (trace.kl.sum() - trace.log_px.sum()).div(300).backward()
        optimizer.step()
    held_out = pad(source.sequences("val"))
    held_out.x = held_out.x.float()
    with torch.no_grad():
        noise = Noise(held_out, list(range(len(held_out))))
        trace = model(held_out, noise.over_time(3, samples=8), samples=8)
        elbos = (trace.log_px.sum(1) - trace.kl.sum((1, 2))).unflatten(0, (8, -1))
        bounds = [elbos.mean(0)]
        bounds += [model.filter(held_out, 32, rule, noise).log_likelihood for rule in (None, Resampling())]
    exact = source.exact_log_likelihood(held_out).float()
    for bound in bounds:
        lost = exact - bound
        assert lost.mean() > -3 * lost.std() / math.sqrt(len(lost))
    tighter = bounds[1] - bounds[0]
    assert tighter.mean() > 3 * tighter.std() / math.sqrt(len(tighter))


@pytest.fixture(scope="module")
def built():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        import oracles
    data = LinearGaussian(steps=12)
    exact = oracles.Exact.of(data, 12, data.state_covariance)
    torch.manual_seed(0)
    return oracles, oracles.built(data), exact, exact.sample(6)


class TestBuilt:
    """A VRNN whose weights make it a linear-Gaussian system, against conditioning on what is known of all its steps."""

    def test_the_joint_gaussian_is_the_kalman_filters(self, built):
        data = LinearGaussian(steps=12, test_size=3)
        batch = pad([replace(s, x=s.x.double()) for s in data.sequences("test")])
        stationary = built[0].Exact.of(data, 12, data.initial_covariance)
        torch.testing.assert_close(stationary.log_likelihood(batch.x), data.exact_log_likelihood(batch))

    def test_scores_and_samples_are_the_systems(self, built):
        _, module, exact, x = built
        scores = torch.stack([nats.sum() for nats in module.score(x, samples=2000, seed=0)])
        assert (scores - exact.log_likelihood(x)).abs().max() < 0.3
        drawn = module.sample(4000, 12, seed=0).flatten(1)
        covariance = exact.root @ exact.root.T
        std = covariance.diagonal().sqrt()
        assert (((drawn.T @ drawn / 4000) - covariance) / std / std[:, None]).abs().max() < 5 * 2**0.5 / 4000**0.5

    @pytest.mark.parametrize("task", ["imputation", "prediction"])
    def test_errors_vanish_with_particles(self, built, monkeypatch, task):
        """To what as many exact draws have, beside that of particles that descend from each other."""
        oracles, module, exact, x = built
        monkeypatch.setattr(oracles, "GAPS", (slice(4, 6),))
        torch.manual_seed(0)
        few, *_ = getattr(oracles, task)(module, exact, x, 16, 16)
        many, ideal, *_ = getattr(oracles, task)(module, exact, x, 1000, 4000)
        assert ideal["error"] < 0.05
        assert many["error"] < {"imputation": 0.1, "prediction": 0.06}[task]
        assert few["error"] > 2 * many["error"]
        assert many["spread"] == pytest.approx(1, abs=0.03)

    def test_a_forecast_is_the_systems(self, built):
        _, module, exact, x = built
        hidden = torch.arange(12) >= 8
        mean, covariance = exact.smoothed(x, hidden)
        std = covariance.diagonal().sqrt().unflatten(0, (4, 4))
        paths = module.forecast(x[:, :8], 4, samples=4000, seed=0)
        assert ((paths.mean(0) - mean) / std).abs().max() < 0.1
        assert (paths.std(0) / std - 1).abs().max() < 0.06
