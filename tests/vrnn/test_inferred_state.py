"""An initial state that is a latent: its KL and its weight, in every bound and in every pass."""

from __future__ import annotations

import math

import pytest
import torch
from readable import readable_loop
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from vrnn_lightning import UserError, VRNNLightningModule, build_vrnn
from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.filtering import Resampling, particle_filter
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import ELBO, FIVO, IWAE
from vrnn_lightning.recurrence import output, repeat_rows


def make_model(**options):
    torch.manual_seed(3)
    model = build_vrnn(**{"num_features": 3, "latent_size": 2, "hidden_size": 5, "initial_state": "inferred"} | options)
    for value in model.initial.parameters():  # far from a posterior that is the prior
        value.data.add_(0.3 * torch.randn_like(value))
    return model.double()


def make_batch(lengths=(4, 6, 1), inputs=0, observed=False):
    generator = torch.Generator().manual_seed(1)
    shape = len(lengths), max(lengths)
    x = torch.randn(*shape, 3, generator=generator).double()
    covariates = torch.randn(*shape, inputs, generator=generator).double() if inputs else None
    seen = torch.rand(*shape, 3, generator=generator) > 0.3 if observed else None
    return SequenceBatch(x, torch.tensor(lengths), seen, covariates)


def posterior_of(model, batch, row, masks=None):
    """Return q(g | x) of a sequence by itself, read backwards by a plain GRU."""
    length = int(batch.lengths[row])
    x, valid = batch.x[row : row + 1, :length], batch.valid_mask[row : row + 1, :length]
    read = model.extract_x(x.masked_fill(~valid, 0.0), valid)
    read = read if masks is None else read * masks.phi_x[row]
    if batch.inputs is not None:
        read = torch.cat([read, batch.inputs[row : row + 1, :length]], -1)
    states, _ = model.initial.backward_rnn(read.flip(1).transpose(0, 1))
    raw = model.initial.head.linear(states[-1])
    mean, spread = raw.chunk(2, -1)
    return Independent(Normal(mean, nn.functional.softplus(spread) + 1e-4), 1)


def start_of(model, batch, noise, samples=1, masks=None):
    """Return state, KL and log-ratio of each row by the equations."""
    eps, hs, kls, ratios = noise.normal(5, samples), [], [], []
    prior = Independent(Normal(torch.zeros(1, 5).double(), torch.ones(1, 5).double()), 1)
    for k in range(samples):
        for row in range(len(batch)):
            q = posterior_of(model, batch, row, masks)
            g = q.mean + q.stddev * eps[k * len(batch) + row]
            hs.append(model.initial.values["h"] + (g @ model.initial.network.weight.t()).view(1, -1, 5))
            kls.append(kl_divergence(q, prior))
            ratios.append(prior.log_prob(g) - q.log_prob(g))
    state = model.zero_state(samples * len(batch))._replace(h=torch.cat(hs))
    return state, torch.cat(kls), torch.cat(ratios)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def gradients(model, *values):
    total = sum((value * torch.linspace(0.5, 1, value.numel()).view(value.shape)).sum() for value in values)
    return torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)


CONFIGS = {
    "plain": {},
    "no other latent": {"latent_size": 0},
    "covariates": {"num_inputs": 2},
    "smoothing": {"smoothing": True, "layers": 2},
    "missing": {"missing": True},
    "dropout": {"dropout": 0.4},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_pass_is_the_readable_loop_from_the_inferred_state(config):
    """Values, the KL of the state in a column of its own, and every gradient."""
    model = make_model(**CONFIGS[config]).train(config == "dropout")
    batch, size = make_batch(inputs=model.num_inputs, observed=config == "missing"), model.latent.noise_size
    noise = Noise(batch, [5, 6, 7])
    masks = model.draw_masks(noise)
    trace = model(batch, noise, masks=masks)
    state, kl, ratio = start_of(model, batch, noise, masks=masks)
    clean = model.mask_invalid(batch)
    slow = readable_loop(model, clean, noise.over_time(size), state, masks)
    first = torch.zeros_like(trace.kl[..., -1:])
    first[:, 0, 0] = kl
    with_ratio = slow.log_ratio + nn.functional.pad(ratio[:, None], (0, batch.x.shape[1] - 1))
    expected = [slow.log_px, torch.cat([slow.kl, first], -1), with_ratio, *slow.state.tensors().values()]
    found = [trace.log_px, trace.kl, trace.log_ratio, *trace.state.tensors().values()]
    close(found, expected)
    grads = gradients(model, *found)
    close(grads, gradients(model, *expected))
    assert all(
        (grad != 0).any() for (name, _), grad in zip(model.named_parameters(), grads, strict=True) if "initial" in name
    )


@pytest.mark.parametrize("objective", [ELBO(), ELBO(kl="sampled"), ELBO(balance=0.8), ELBO(free_bits=50.0), IWAE(3)])
def test_each_bound_pays_for_the_state(objective):
    model, batch, beta = make_model(), make_batch(), 0.7
    noise = Noise(batch, [5, 6, 7])
    out = objective(model, batch, noise, beta, lambda x: x)
    samples = 3 if isinstance(objective, IWAE) else 1
    state, kl, ratio = start_of(model, batch, noise, samples)
    many = SequenceBatch(batch.x.repeat(samples, 1, 1), batch.lengths.repeat(samples))
    slow = readable_loop(model, many, noise.over_time(2, samples), state)
    if isinstance(objective, IWAE):
        weights = (slow.log_px + beta * slow.log_ratio).sum(1) + beta * ratio
        expected = (weights.unflatten(0, (3, 3)).logsumexp(0) - math.log(3)).sum()
    else:
        own = {"sampled": -slow.log_ratio.sum()}.get(objective.kl, slow.kl.sum())
        own = 50.0 * batch.lengths.sum() * 2 if objective.free_bits else own  # of z_t only: the state has no free bits
        expected = slow.log_px.sum() - beta * (own + kl.sum())
    close([out.value, out.kl.sum()], [expected, slow.kl.sum() + kl.sum()])
    if not isinstance(objective, ELBO) or objective.balance is None:
        close(gradients(model, out.value), gradients(model, expected))


@pytest.mark.parametrize("rule", [None, Resampling(threshold=1.0), Resampling("multinomial", 1.0)])
def test_the_filter_weighs_the_state_at_the_first_step(rule):
    model, batch, samples = make_model(), make_batch(), 4
    noise = Noise(batch, [5, 6, 7])
    state, _, ratio = start_of(model, batch, noise, samples)
    many = SequenceBatch(batch.x.repeat(samples, 1, 1), batch.lengths.repeat(samples))
    normal = noise.over_time(2, samples)

    def step(t, state):
        h = output(state)
        x_features = model.extract_x(many.x[:, t])
        prior, posterior = model.prior_dist(h), model.posterior_dist(x_features, h)
        z = posterior.mean + posterior.stddev * normal[:, t]
        gained = model.emission_dist(model.extract_z(z), h).log_prob(many.x[:, t])
        gained = gained + prior.log_prob(z) - posterior.log_prob(z) + (ratio if t == 0 else 0.0)
        return gained.unflatten(0, (samples, -1)), model.next_state(x_features, model.extract_z(z), state)[1]

    draws = iter(noise.uniform_over_time((rule or Resampling()).draws(samples)).unbind(1))
    slow = particle_filter(step, state, batch.lengths, samples, 6, rule, lambda _: next(draws), None)
    fast = model.filter(batch, samples, rule, noise)
    close([fast.log_likelihood, fast.log_weights], [slow.log_likelihood, slow.log_weights])
    close(gradients(model, fast.log_likelihood), gradients(model, slow.log_likelihood))


@pytest.mark.parametrize("objective", [ELBO(), IWAE(4000), FIVO(4000)], ids=["ELBO", "IWAE", "FIVO"])
def test_bounds_are_at_most_the_exact_likelihood(objective):
    """With a state of one number and no other latent the likelihood is an integral over it."""
    model, batch = make_model(hidden_size=1, latent_size=0), make_batch((5,))
    places = torch.linspace(-9, 9, 4001).double()
    many = SequenceBatch(batch.x.expand(4001, -1, -1), batch.lengths.expand(4001))
    with torch.no_grad():
        slow = readable_loop(model, many, batch.x.new_zeros(4001, 5, 0), model.initial.moved(4001, places[:, None]))
        joint = Normal(0.0, 1.0).log_prob(places) + slow.log_px.sum(1)
        exact = joint.logsumexp(0) + (places[1] - places[0]).log()
        values = torch.stack([objective(model, batch, Noise(batch, [i]), 1.0, lambda x: x).value for i in range(40)])
    mean, error = values.mean(), values.std() / 40**0.5
    assert mean <= exact + 3 * error
    if not isinstance(objective, ELBO):
        assert abs(values.exp().mean() / exact.exp() - 1) < 0.05
        assert mean > exact - 0.05


def test_padding_windows_and_other_rows_change_nothing():
    model, batch = make_model().train(), make_batch()
    noise = Noise(batch, [5, 6, 7])

    def value(part, noise):
        loss = ELBO()(model, part, noise, 0.7, lambda x: x).value
        return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)]

    whole = value(batch, noise)
    batch.x[0, 4:] = float("nan")
    close(value(batch, noise), whole)
    model.checkpoint_every = 2
    close(value(batch, noise), whole)
    fivo = FIVO(3)(model, batch, noise, 0.7, lambda x: x).value
    model.checkpoint_every = None
    close([FIVO(3)(model, batch, noise, 0.7, lambda x: x).value], [fivo])
    one = make_batch((4,))
    one.x[:] = batch.x[:1, :4]
    alone, together = model(one, Noise(one, [5])), model(batch, noise)
    close([alone.kl[0]], [together.kl[0, :4]])
    empty = SequenceBatch(batch.x, torch.tensor([4, 6, 0]))
    assert model(empty, noise).kl[2].abs().sum() == 0
    long = SequenceBatch(torch.randn(1, 1500, 3).double(), torch.tensor([1500]))
    with torch.no_grad():
        close([model.trace(long, Noise(long, [1])).kl], [model(long, Noise(long, [1])).kl])


def test_every_use_of_a_trained_model():
    module = VRNNLightningModule(3, latent_size=2, hidden_size=5, initial_state="inferred").eval()
    xs = [torch.randn(6, 3), torch.randn(4, 3)]
    assert module.sample(4, 3).shape == (4, 3, 3)
    assert module.session(2, 3).step(torch.zeros(2, 3)).nats.isfinite().all()
    assert (module.decode(torch.zeros(2, 4, 2)) == module.decode(torch.zeros(2, 4, 2))).all()
    assert all(part.isfinite().all() for part in module.score(xs, samples=5, seed=1))
    nats = module.score(xs, seed=1)
    assert [len(part) for part in nats] == [6, 4]
    (after,) = module.backtest(xs, [4], 3, 8, seed=2)
    torch.testing.assert_close(after, module.forecast([x[:4] for x in xs], 3, 8, seed=2))
    gaps = xs[0].clone()
    gaps[2] = float("nan")
    filled = module.impute([gaps], samples=3, seed=1)[0]
    assert (filled[:, 0] == gaps[0]).all()
    assert filled.isfinite().all()
    first = SequenceBatch(torch.zeros(1, 3, 3), torch.tensor([3]), is_first=torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(UserError, match=r"is_first: the initial state reads the whole sequence. Fix: "):
        module.vrnn(first)
    carried = SequenceBatch(torch.zeros(1, 3, 3), torch.tensor([3]), reset=torch.tensor([True]))
    with pytest.raises(UserError, match="initial_state 'inferred': reads whole sequences, but the data carry"):
        module.vrnn(carried)


def test_particles_of_a_stream_begin_in_draws_from_the_prior():
    model = make_model()
    model.initial.network.weight.data.copy_(torch.eye(5))
    torch.manual_seed(0)
    h = model.stream(3000, 2).state.h
    b = model.initial.values["h"]
    torch.testing.assert_close(h.mean(0), b, atol=0.06, rtol=0)
    torch.testing.assert_close(h.std(0), torch.ones_like(b), atol=0.06, rtol=0)
    assert (h[0] != h[3000]).all()  # two particles of one sequence
    assert repeat_rows(h, 2).shape[0] == 12000


def test_from_the_command_line_and_resumed(lightning, folder):
    words = [
        "--data",
        "Sines",
        "--data.train_size",
        "40",
        "--data.val_size",
        "8",
        "--data.test_size",
        "8",
        "--model.initial_state",
        "inferred",
        "--model.hidden_size",
        "8",
    ]
    words += ["--trainer.max_epochs", "2"]
    whole, broken = folder / "whole", folder / "broken"
    done = lightning("fit", *words, "--trainer.default_root_dir", whole)
    assert done.code == 0, done.err
    stopped = [*words, "--trainer.default_root_dir", broken]
    assert lightning("fit", *stopped, "--trainer.max_steps", 1).code == 0
    last = next(broken.rglob("last.ckpt"))
    done = lightning("fit", *stopped, "--trainer.max_steps", -1, "--ckpt_path", last)
    assert done.code == 0, done.err
    weights = [torch.load(next(place.rglob("last.ckpt")), weights_only=True)["state_dict"] for place in (whole, broken)]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    done = lightning("test", "--ckpt_path", next(whole.rglob("last.ckpt")))
    assert done.code == 0, done.err
