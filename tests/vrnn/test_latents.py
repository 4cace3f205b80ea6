"""Latents by configuration: every kind in every pass, what each computes, and published weights copied in."""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from passes import CONFIGS, PURPOSES, make_data, make_model
from torch import Tensor, nn
from torch.distributions import Categorical, Laplace, Normal, kl_divergence

from vrnn_lightning import MLPConfig, SequenceBatch, UserError, VRNNLightningModule, build_vrnn
from vrnn_lightning.heads import (
    Bernoulli,
    CategoricalLatent,
    FlowLatent,
    FlowPriorLatent,
    GaussianLatent,
    LaplaceLatent,
)
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import ELBO, FIVO, IWAE

LATENTS = {
    "no floor": partial(GaussianLatent, min_std=0.0),
    "two maps, exp": partial(GaussianLatent, scale="exp", separate=True),
    "log-variance": partial(GaussianLatent, scale="exp_half"),
    "Laplace": LaplaceLatent,
    "Categorical": partial(CategoricalLatent, classes=3),
    "flow prior": partial(FlowPriorLatent, kind="MAF", transforms=2),
    "flow": partial(FlowLatent, kind="MAF", transforms=2),
}


def skip_without_flows(name):
    if "flow" in name and find_spec("zuko") is None:
        pytest.skip("needs zuko")


def make(name, config="gru", **options):
    skip_without_flows(name)
    residual = CONFIGS[config].get("residual_posterior", False) and name in ("no floor", "two maps, exp")
    return make_model(**{**CONFIGS[config], "residual_posterior": residual, "latent": LATENTS[name], **options})


@pytest.mark.parametrize("purpose", list(PURPOSES)[:-1])
@pytest.mark.parametrize("config", ["gru", "lstm", "smoothing", "options"])
@pytest.mark.parametrize("name", LATENTS)
def test_every_pass_equals_the_readable_one(name, config, purpose):
    if config == "smoothing" and purpose not in ("infer", "recomputed", "generate"):
        pytest.skip("a smoothing model can't follow a stream")
    model, data = make(name, config), make_data(config)
    masks = None if data.masks is None else model.draw_masks(data.noise)
    fast, readable = (run(model.eval(), data._replace(masks=masks)) for run in PURPOSES[purpose])
    assert len(fast) == len(readable)
    for one, other in zip(fast, readable, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prior", [MLPConfig(5), None], ids=["network", "standard"])
@pytest.mark.parametrize("name", list(LATENTS)[:5])
def test_the_kl_is_that_of_torch(name, prior):
    model, batch = make(name, prior=prior), make_data("gru").batch
    trace = model.eval()(batch)
    q, p = trace.posterior, trace.prior
    if name == "Categorical":
        expected = kl_divergence(Categorical(logits=q.logits), Categorical(logits=p.logits))
        assert trace.kl.shape == (*batch.mask.shape, 1)
    else:
        kind = Laplace if name == "Laplace" else Normal
        moments = [(d.base_dist.loc, d.base_dist.scale) for d in (q, p)]
        expected = kl_divergence(*(kind(*pair) for pair in moments))
    torch.testing.assert_close(trace.kl, torch.where(batch.mask[..., None], expected, 0.0))
    if prior is None:
        assert not torch.cat([x.flatten() for x in model.latent.parameters(p)]).unique().numel() > 2


@pytest.mark.parametrize("name", LATENTS)
def test_draws_have_the_distribution(name):
    """Of noise: from the posterior, and in sessions from the prior."""
    skip_without_flows(name)
    torch.manual_seed(0)
    latent, many = LATENTS[name](3), 40_000
    noise = torch.randn(many, 3).double()
    for make_head, draw in ((latent.head, latent.rsample), (latent.prior_head, latent.draw)):
        head, features = make_head(4, 3).double(), torch.randn(1, 4).double()
        dist = head(features)
        with torch.no_grad():
            found, plain = draw(head(features.expand(many, 4)), noise), dist.sample((many,))[:, 0]
        torch.testing.assert_close(found.mean(0), plain.mean(0), rtol=0.05, atol=0.05)
        torch.testing.assert_close(found.var(0), plain.var(0), rtol=0.1, atol=0.03)
        loose = 0.2 if "flow" in name else 0.05  # moments of flows are those of a few draws
        torch.testing.assert_close(found.mean(0), dist.mean[0].detach(), rtol=loose, atol=loose)
        torch.testing.assert_close(found.var(0), dist.variance[0].detach(), rtol=2 * loose, atol=loose)


def test_the_gradient_of_one_hots_goes_straight_through():
    torch.manual_seed(0)
    latent, raw = CategoricalLatent(6, classes=3, unimix=0.1), torch.randn(5, 6).double().requires_grad_()
    head = latent.head(6, 6).double()
    nn.init.eye_(head.linear.weight)
    nn.init.zeros_(head.linear.bias)
    noise, weights = torch.randn(5, 6).double(), torch.randn(5, 6).double()
    z = latent.rsample(head(raw), noise)
    assert set(z.flatten().tolist()) == {0.0, 1.0}
    assert (z.unflatten(-1, (2, 3)).sum(-1) == 1).all()
    (found,) = torch.autograd.grad((z * weights).sum(), raw)
    probs = 0.9 * raw.unflatten(-1, (2, 3)).softmax(-1) + 0.1 / 3
    (expected,) = torch.autograd.grad((probs.flatten(-2) * weights).sum(), raw)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["Categorical", "Laplace", "no floor"])
def test_a_balanced_kl_changes_gradients_alone(name):
    """As in DreamerV2: a share of the gradient goes to the prior, the rest to the posterior."""
    model, batch = make(name), make_data("gru").batch
    noise = Noise(batch, [3, 4])

    def run(objective):
        model.zero_grad()
        found = objective(model, batch, noise, 1.0, lambda x: x)
        found.value.backward()
        return found, model.prior.head.linear.weight.grad.clone()

    (plain, whole), (balanced, share), (_, none) = (run(ELBO(balance=b)) for b in (None, 0.3, 0.0))
    torch.testing.assert_close(balanced.value, plain.value)
    torch.testing.assert_close(share - none, 0.3 * (whole - none))


@pytest.mark.parametrize("objective", [ELBO(kl="sampled"), IWAE(3), FIVO(3)], ids=["ELBO", "IWAE", "FIVO"])
@pytest.mark.parametrize("name", LATENTS)
def test_every_objective_trains_it(name, objective):
    model, batch = make(name), make_data("gru").batch
    objective(model, batch, Noise(batch, [3, 4]), 0.7, lambda x: x).value.backward()
    for part in (model.prior, model.encoder, model.phi_z):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_bad_options_are_one_line():
    skip_without_flows("flow")
    for make_one, message in (
        (lambda: GaussianLatent(2, scale="relu"), "latent.scale 'relu': must be one of softplus, exp, exp_half"),
        (lambda: GaussianLatent(2, min_std=-1), r"latent.min_std -1: must lie in \[0, inf\)"),
        (lambda: CategoricalLatent(7, classes=3), "latent_size 7: must be a multiple of latent.classes, 3"),
        (lambda: CategoricalLatent(6, classes=3, unimix=1.5), "latent.unimix 1.5: must lie between 0 and 1"),
        (lambda: build_vrnn(2, 4, latent=LaplaceLatent, residual_posterior=True), "a LaplaceLatent has no mean to add"),
    ):
        with pytest.raises(UserError, match=message):
            make_one()
    model, batch = make("flow prior"), make_data("gru").batch
    with pytest.raises(UserError, match="balance: needs a KL in closed form, which FlowPriorLatent lacks"):
        ELBO(balance=0.8)(model, batch, Noise(batch), 1.0, lambda x: x)


class Published(nn.Module):
    """A VRNN as it is often published: plain torch, tanh or ReLU networks, and no floor under softplus."""

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.phi_x = nn.Sequential(nn.Linear(3, 7), act(), nn.Linear(7, 6), act())
        self.phi_z = nn.Sequential(nn.Linear(2, 5), act())
        self.enc = nn.Sequential(nn.Linear(6 + 8, 9), act(), nn.Linear(9, 4), act())
        self.enc_mean, self.enc_std = nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2), nn.Softplus())
        self.prior = nn.Sequential(nn.Linear(8, 5), act())
        self.prior_mean, self.prior_std = nn.Linear(5, 2), nn.Sequential(nn.Linear(5, 2), nn.Softplus())
        self.dec = nn.Sequential(nn.Linear(5 + 8, 6), act(), nn.Linear(6, 10), act())
        self.dec_mean = nn.Sequential(nn.Linear(10, 3), nn.Sigmoid())
        self.rnn = nn.GRU(6 + 5, 8)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return KL and log-likelihood of each step, both (time, batch), of binary x (time, batch, 3)."""
        h, kls, logs = torch.zeros(1, x.shape[1], 8).to(x), [], []
        for x_t, eps in zip(x, noise, strict=True):
            phi_x = self.phi_x(x_t)
            enc, prior = self.enc(torch.cat([phi_x, h[-1]], 1)), self.prior(h[-1])
            m, s, m0, s0 = self.enc_mean(enc), self.enc_std(enc), self.prior_mean(prior), self.prior_std(prior)
            z = self.phi_z(m + s * eps)
            mean = self.dec_mean(self.dec(torch.cat([z, h[-1]], 1)))
            h = self.rnn(torch.cat([phi_x, z], 1)[None], h)[1]
            kls.append((2 * s0.log() - 2 * s.log() + (s**2 + (m - m0) ** 2) / s0**2 - 1).sum(1) / 2)
            logs.append((x_t * mean.log() + (1 - x_t) * (1 - mean).log()).sum(1))
        return torch.stack(kls), torch.stack(logs)


@pytest.mark.parametrize("activation", ["Tanh", "ReLU"])
def test_published_weights_are_copied_in_by_configuration_alone(activation):
    torch.manual_seed(0)
    published = Published(getattr(nn, activation)).double()
    layers = partial(MLPConfig, activation=activation)
    module = VRNNLightningModule(
        num_features=3, latent_size=2, hidden_size=8, emission=Bernoulli,
        latent=partial(GaussianLatent, min_std=0.0, separate=True),
        phi_x=layers([7, 6]), phi_z=layers([5]), encoder=layers([9, 4]), prior=layers([5]), decoder=layers([6, 10]),
    ).double()  # fmt: skip
    names = {
        "enc.": "encoder.body.", "enc_mean.": "encoder.head.mean.", "enc_std.0.": "encoder.head.std.",
        "prior.": "prior.body.", "prior_mean.": "prior.head.mean.", "prior_std.0.": "prior.head.std.",
        "dec.": "decoder.body.", "dec_mean.0.": "decoder.head.linear.", "rnn.": "cells.0.",
    }  # fmt: skip
    weights = {}
    for name, value in published.state_dict().items():
        old = next((old for old in names if name.startswith(old)), "")
        weights[names.get(old, "") + name.removeprefix(old).replace("_l0", "")] = value
    model = module.vrnn
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert (set(missing), unknown) == ({"input_mean", "input_std"}, [])
    x, noise = (torch.rand(5, 4, 3) < 0.5).double(), torch.randn(5, 4, 2).double()
    kl, log_px = published(x, noise)
    trace = model(SequenceBatch(x.transpose(0, 1), torch.full((4,), 5)), noise.transpose(0, 1))
    torch.testing.assert_close(trace.kl.sum(-1).t(), kl, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(trace.log_px.t(), log_px, rtol=1e-6, atol=1e-6)


def test_from_the_command_line(lightning, tiny):
    latent = ("--model.latent", "CategoricalLatent", "--model.latent_size", "12", "--model.latent.classes", "4")
    said = lightning("fit", "-c", tiny, *latent)
    assert said.code == 0, said.err
    (path,) = Path().rglob("last.ckpt")
    assert lightning("test", "--ckpt_path", path).code == 0
    assert lightning("predict", "--ckpt_path", path).code == 0
    other = lightning("test", "--ckpt_path", path, "--model.latent.classes", "3").err
    assert "--model.latent.classes 3 (checkpoint: 4)" in other
    for options, message in (
        (("--model.latent", "CategoricalLatent", "--model.latent_size", "7"), "latent_size 7: must be a multiple"),
        (("--model.latent", "CategoricLatent"), "Did you mean 'CategoricalLatent'?"),
        (("--model.latent", "CategoricalLatent", "--model.latent.clases", "4"), "Did you mean 'classes'?"),
    ):
        said = lightning("fit", "-c", tiny, *options)
        assert said.code != 0
        assert message in said.err, said.err


class Wide(GaussianLatent):
    """A latent of one's own, with an option."""

    def __init__(self, size: int, factor: float = 1.0) -> None:
        super().__init__(size)
        self.factor = factor

    def dist(self, mean, std):
        return super().dist(mean, self.factor * std)


def test_a_latent_of_ones_own_is_the_one_that_is_trained_and_resumed(lightning, tiny):
    said = lightning("fit", "-c", tiny, "--model.latent", "test_latents.Wide", "--model.latent.factor", "2.0")
    assert said.code == 0, said.err
    (path,) = Path().rglob("last.ckpt")
    assert "--trust test_latents" in lightning("test", "--ckpt_path", path).err
    trusted = ("--ckpt_path", path, "--trust", "test_latents")
    assert lightning("test", *trusted).code == 0
    assert (
        "--model.latent.factor 3.0 (checkpoint: 2.0)" in lightning("test", *trusted, "--model.latent.factor", "3.0").err
    )
    own = VRNNLightningModule.load_from_checkpoint(path, trust=["test_latents"]).vrnn.latent
    assert (type(own), own.factor) == (Wide, 2.0)
    assert lightning("fit", "-c", tiny, *trusted, "--trainer.max_epochs", "3").code == 0


@pytest.mark.parametrize("objective", [IWAE(3), FIVO(3, threshold=0.0)], ids=["IWAE", "FIVO"])
def test_importance_weights_teach_a_categorical_latent_by_reweighted_wake_sleep(objective):
    """Weights times the gradient of log p(x, z) + log q(z), with the draws as they are."""
    model = build_vrnn(3, 8, 5, latent=partial(CategoricalLatent, classes=4)).double()
    batch = SequenceBatch(torch.randn(2, 1, 3).double(), torch.tensor([1, 1]))
    noise = Noise(batch, [1, 2])
    value = objective(model, batch, noise, 1.0, lambda x: x).value
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
    state = model.initial_state(6)
    x, h = batch.x[:, 0].repeat(3, 1), state.h[:, -1]
    prior, posterior = model.prior_dist(h), model.posterior_dist(model.extract_x(x), h)
    z = model.latent.rsample(posterior, noise.over_time(model.latent.noise_size, 3)[:, 0]).detach()
    joint = model.emission_dist(model.extract_z(z), h).log_prob(x) + prior.log_prob(z)
    log_q = posterior.log_prob(z)
    log_weights = (joint - log_q).detach().view(3, 2)
    weights = log_weights.softmax(0).flatten()
    torch.testing.assert_close(value, (log_weights.logsumexp(0) - math.log(3)).sum(), rtol=1e-9, atol=1e-9)
    wake = (weights * (joint + log_q)).sum()
    expected = torch.autograd.grad(wake, list(model.parameters()), allow_unused=True, materialize_grads=True)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_one_particle_teaches_a_categorical_latent_nothing():
    model = build_vrnn(3, 8, 5, latent=partial(CategoricalLatent, classes=4)).double()
    batch = SequenceBatch(torch.randn(2, 3, 3).double(), torch.tensor([3, 2]))
    for objective, option in ((IWAE(1), "samples"), (FIVO(1), "particles")):
        with pytest.raises(UserError, match=rf"objective.{option} 1: .* CategoricalLatent. Fix: give 2 or more"):
            objective(model, batch, Noise(batch), 1.0, lambda x: x)
