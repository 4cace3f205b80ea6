"""What a trained model is for, in data units, against brute force and against the batch."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from vrnn_lightning import SequenceBatch, UserError, VRNNLightningModule
from vrnn_lightning.batch import SequenceSample, pad
from vrnn_lightning.filtering import resample
from vrnn_lightning.heads import (
    Bernoulli,
    DiscretisedLogisticMixture,
    GaussianMixture,
    Laplace,
    MuLaw,
    NegativeBinomial,
    Pen,
    Poisson,
    StudentT,
)
from vrnn_lightning.inference.imputing import _complete
from vrnn_lightning.noise import Noise

NAN = float("nan")
VARIANTS = [
    {},
    {"latent_size": 0},
    {"cell": "lstm", "layers": 2, "residual_posterior": True},
    {"emission": partial(GaussianMixture, components=3)},
    {"prior": None},
    {"missing": True},
    {"smoothing": True},
    {"dropout": 0.5},
]
variants = pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(options) or "plain")


def model(features=3, **options) -> VRNNLightningModule:
    torch.manual_seed(0)
    module = VRNNLightningModule(features, **{"latent_size": 2, "hidden_size": 6} | options).double()
    module.scale_mean.copy_(torch.linspace(1, 3, features))
    module.scale_std.copy_(torch.linspace(0.5, 2, features))
    return module


def sequences(*lengths, features=3):
    generator = torch.Generator().manual_seed(5)
    return [2 + torch.randn(n, features, generator=generator, dtype=torch.float64) for n in lengths]


@variants
def test_shapes_and_seeds(options):
    """Each call is a function of its seed, and leaves generators, mode and data as they were."""
    module, xs = model(**options), sequences(6, 1, 4)
    module.train()
    holes = [x.clone() for x in xs]
    holes[0][2:4] = NAN
    calls = {
        "sample": lambda seed: [module.sample(2, 5, seed=seed)],
        "reconstruct": lambda seed: module.reconstruct(xs, seed=seed),
        "score": lambda seed: module.score(xs, seed=seed),
        "encode": lambda seed: [part for found in module.encode(xs, seed=seed) for part in found],
        "forecast": lambda seed: [module.forecast(xs, 5, samples=3, seed=seed)],
        "impute": lambda seed: module.impute(holes, samples=3, seed=seed),
    }
    for name, call in calls.items():
        before = torch.get_rng_state()
        one, same, other = call(1), call(1), call(2)
        assert torch.equal(torch.get_rng_state(), before), name
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True)), name
        latent = module.vrnn.latent_size
        differs = any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert differs == (bool(latent) or name in ("sample", "forecast", "impute")), name
    assert module.training
    assert module.vrnn.training
    assert module.sample(2, 5).shape == (2, 5, 3)
    assert [tuple(x.shape) for x in module.reconstruct(xs)] == [(6, 3), (1, 3), (4, 3)]
    assert [tuple(x.shape) for x in module.score(xs)] == [(6,), (1,), (4,)]
    encoded = module.encode(xs)
    assert [tuple(e.mean.shape) for e in encoded] == [(n, module.vrnn.latent_size) for n in (6, 1, 4)]
    assert [tuple(e.hidden.shape) for e in encoded] == [(n, 6) for n in (6, 1, 4)]
    assert module.forecast(xs, 5, samples=4).shape == (4, 3, 5, 3)
    assert [tuple(x.shape) for x in module.impute(holes, samples=4)] == [(4, 6, 3), (4, 1, 3), (4, 4, 3)]


@variants
def test_scores_add_up_to_the_elbo_in_data_units(options):
    module, xs = model(**options).eval(), sequences(6, 1, 4)
    batch = pad([SequenceSample(module.scaler.scale(x), name=f"sequence {i}") for i, x in enumerate(xs)])
    trace = module.vrnn(batch, Noise.named(batch, 3).over_time(module.vrnn.latent_size))
    jacobian = module.scale_std.log().sum() * batch.lengths
    elbo = trace.log_px.sum(1) - trace.kl.sum((1, 2)) - jacobian
    scores = torch.stack([nats.sum() for nats in module.score(xs, seed=3)])
    torch.testing.assert_close(scores, elbo)
    torch.testing.assert_close(torch.stack([s.sum() for s in module.score(batch, seed=3)]), elbo)


@variants
def test_encodings_hold_the_states(options):
    """h_t after a step is where a pass over the first t steps ends."""
    module, (x, y) = model(**options).eval(), sequences(5, 3)
    whole = module.encode([x, y], seed=2)
    if module.vrnn.backward_rnn is None:
        for t in (1, 3, 5):
            part = module.encode([x[:t]], seed=2)[0]
            torch.testing.assert_close(part.hidden, whole[0].hidden[:t])
            torch.testing.assert_close(part.mean, whole[0].mean[:t])
    batch = pad([SequenceSample(module.scaler.scale(v), name=f"sequence {i}") for i, v in enumerate((x, y))])
    trace = module.vrnn(batch, Noise.named(batch, 2).over_time(module.vrnn.latent_size))
    for i in (0, 1):
        torch.testing.assert_close(whole[i].hidden[-1], trace.state.h[i, -1])


def test_long_sequences_are_read_in_windows_without_a_difference():
    module = model().eval()
    (x,) = sequences(2500)
    batch = pad([SequenceSample(module.scaler.scale(x), name="sequence 0")])
    trace = module.vrnn(batch, Noise.named(batch, 1).over_time(2))
    (nats,), (encoded,), (mean,) = (
        module.score([x], seed=1),
        module.encode([x], seed=1),
        module.reconstruct([x], seed=1),
    )
    torch.testing.assert_close(nats.sum(), (trace.log_px.sum() - trace.kl.sum() - 2500 * module.scale_std.log().sum()))
    torch.testing.assert_close(encoded.hidden[:-1], trace.hidden[0, 1:])
    torch.testing.assert_close(mean, module.scaler.unscale(trace.emission.mean)[0])


FOLLOWED = [*(o for o in VARIANTS if "smoothing" not in o), {"emission": Bernoulli}, {"emission": Pen}]
FOLLOWED += [{"emission": head} for head in (StudentT, Laplace, Poisson, NegativeBinomial, MuLaw)]
FOLLOWED += [{"emission": DiscretisedLogisticMixture}, {"cell": "lstm", "emission": Pen}]
followed = pytest.mark.parametrize("options", FOLLOWED, ids=str)


def followed_model(**options):
    """A model, its scaler as its emission's data have it, and two sequences of five frames in data units."""
    module, xs = model(**options).eval(), torch.stack(sequences(5, 5))
    head = module.vrnn.decoder.head
    if head.likelihood == "mixed":
        module.scale_mean[2], module.scale_std[2], xs[..., 2] = 0.0, 1.0, (xs[..., 2] > 2).double()
    if head.likelihood == "mass":
        module.scale_mean.zero_()
        module.scale_std.fill_(1.0)
        xs = (xs / 8).clamp(-1, 1) if isinstance(head, MuLaw) else (xs > 2).double()
    return module, xs


@followed
def test_a_session_is_the_batch(options):
    """With one particle and the same noise: scores, states, and each step's emission before its frame is there."""
    module, xs = followed_model(**options)
    noise = torch.randn(2, 5, module.vrnn.latent_size, dtype=torch.float64)
    batch = SequenceBatch(module.scaler.scale(xs), torch.tensor([5, 5]))
    trace = module.vrnn(batch, noise)
    session = module.session(batch_size=2)
    jacobian = module.scale_std.log().sum()
    for t in range(5):
        as_drawn = None  # the noise that brings the prior's draw where the posterior's was
        if trace.prior is not None:
            as_drawn = (trace.z - trace.prior.mean)[:, t] / trace.prior.stddev[:, t]
        ahead = session.now.next(noise=as_drawn)
        emission = type(trace.emission)  # of frames, not of steps
        assert isinstance(ahead.components, emission)
        torch.testing.assert_close(ahead.log_prob(xs[:, t]), trace.log_px[:, t] - jacobian)
        torch.testing.assert_close(ahead.mean, module.scaler.unscale(trace.emission.mean)[:, t])
        if options.get("emission") not in (MuLaw, DiscretisedLogisticMixture):
            deviation = trace.emission.variance.sqrt()[:, t] * module.scale_std
            torch.testing.assert_close(ahead.stddev, deviation)
        nats = session.step(xs[:, t], noise=noise[:, t]).nats
        torch.testing.assert_close(nats, (trace.log_px + trace.log_ratio)[:, t] - jacobian)
    torch.testing.assert_close(session.state.h, trace.state.h)


@followed
def test_what_comes_next_is_a_distribution(options):
    """It is torch's mixture of its parts, and its draws have its moments."""
    module, xs = followed_model(**options)
    session = module.session(batch_size=2, samples=3)
    ahead = session.step(xs[:, 0]).next(draws=4)
    parts = 12 if module.vrnn.latent_size else 3
    assert (ahead.batch_shape, ahead.event_shape) == ((2,), (3,))
    assert ahead.log_weights.shape == (2, parts)
    torch.testing.assert_close(ahead.log_weights.logsumexp(-1).exp(), torch.ones(2).double())
    mixture = MixtureSameFamily(Categorical(logits=ahead.log_weights), ahead.components, validate_args=False)
    scaled = module.scaler.scale(xs[:, 1])
    torch.testing.assert_close(ahead.log_prob(xs[:, 1]), mixture.log_prob(scaled) - module.scale_std.log().sum())
    torch.testing.assert_close(ahead.mean, module.scaler.unscale(mixture.mean))
    torch.manual_seed(1)
    drawn = ahead.sample((4000,))
    assert drawn.shape == (4000, 2, 3)
    assert ahead.sample().shape == (2, 3)
    assert module.vrnn.decoder.head.supports(module.scaler.scale(drawn)).all()
    clipped = 0.5 if options.get("emission") is DiscretisedLogisticMixture else 0.0  # its mean is so to half a bin
    assert ((drawn.mean(0) - ahead.mean).abs() < 5 * drawn.std(0) / math.sqrt(4000) + clipped).all()
    if options.get("emission") not in (MuLaw, DiscretisedLogisticMixture):
        torch.testing.assert_close(ahead.variance, mixture.variance * module.scale_std**2)
        if options.get("emission") is not StudentT:  # whose draws' deviation is a poor estimate
            torch.testing.assert_close(drawn.std(0), ahead.stddev, rtol=0.15, atol=0.02)


@pytest.mark.parametrize("options", [o for o in FOLLOWED if "latent_size" not in o], ids=str)
def test_decoded_frames_are_the_emissions_of_a_pass_over_them(options):
    """A pass whose noise brings its latents where they were said to be emits the frames that were decoded."""
    module, _ = followed_model(**options)
    target = torch.randn(2, 4, module.vrnn.latent_size, dtype=torch.float64)
    decoded = module.scaler.scale(module.decode(target))
    noise = torch.zeros_like(target)
    for t in range(4):
        posterior = module.vrnn(SequenceBatch(decoded, torch.tensor([4, 4])), noise).posterior
        noise[:, t] = ((target - posterior.mean) / posterior.stddev)[:, t]
    trace = module.vrnn(SequenceBatch(decoded, torch.tensor([4, 4])), noise)
    torch.testing.assert_close(trace.z, target)
    mean = trace.emission.mean
    if module.vrnn.decoder.head.likelihood == "mixed":
        mean = torch.cat([mean[..., :2], mean[..., 2:].round()], -1)
    elif options.get("emission") is Bernoulli:
        mean = mean.round()
    torch.testing.assert_close(mean, decoded)


def test_the_density_of_what_comes_next_integrates_to_one():
    module = model(1).eval()
    ahead = module.session(samples=4).step(torch.ones(1, 1)).next(draws=3)
    grid = torch.linspace(-40, 40, 20_001, dtype=torch.float64)[:, None, None]
    total = torch.trapezoid(ahead.log_prob(grid)[:, 0].exp(), grid[:, 0, 0])
    assert total.item() == pytest.approx(1, abs=1e-6)
    moment = torch.trapezoid(ahead.log_prob(grid)[:, 0].exp() * grid[:, 0, 0], grid[:, 0, 0])
    assert moment.item() == pytest.approx(ahead.mean.item(), abs=1e-6)


def test_the_parts_of_what_comes_next_are_the_particles():
    """Each of its draws from each particle's prior, with the particle's weight, by hand."""
    module, xs = model().eval(), torch.stack(sequences(2, 2))
    vrnn, (samples, draws) = module.vrnn, (3, 2)
    found = module.session(batch_size=2, samples=samples).step(xs[:, 0])
    weights = found.log_weights.exp()
    assert (weights.std(0) > 0.01).all(), "all particles weigh the same: the test can't fail"
    noise = torch.randn(draws * samples * 2, 2, dtype=torch.float64)
    ahead = found.next(draws, noise=noise)
    for i in range(2):
        density = 0.0
        for k in range(samples):
            h = found.state.h[k * 2 + i, -1]
            for m in range(draws):
                prior = vrnn.prior(h)
                z = prior.mean + prior.stddev * noise[(m * samples + k) * 2 + i]
                emission = vrnn.decoder(torch.cat([vrnn.phi_z(z), h]))
                p = emission.log_prob(module.scaler.scale(xs[i, 1])).exp() / module.scale_std.prod()
                density = density + weights[k, i] * p / draws
        torch.testing.assert_close(ahead.log_prob(xs[:, 1])[i], density.log())


def test_what_was_said_to_come_scores_as_the_step_that_came():
    """Both estimate p(x_t | x_<t) without bias from the same particles: their mean over many sessions is one."""
    module, xs = model(1, residual_posterior=True), 1 + torch.tensor([0.8, -0.5, 0.4], dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.vrnn.parameters():
            parameter.mul_(1.5)
        module.vrnn.encoder.head.linear.bias[2:] = 2.0  # wider than the prior: weights of a small variance
    many = 2_000
    session = module.session(batch_size=many, samples=6)
    torch.manual_seed(3)
    for t, x in enumerate(xs):
        frames, ahead = x.expand(many, 1), session.now.next(draws=3)
        foretold, found = ahead.log_prob(frames).exp(), session.step(frames).nats.exp()
        error = ((foretold - found).var() / many).sqrt()
        assert (foretold.mean() - found.mean()).abs() < 5 * error, t
        assert error < 0.03 * found.mean(), "the estimates are too rough for the test to fail"


def test_a_step_stands_where_it_was_when_the_session_goes_on():
    module, xs = model().eval(), torch.stack(sequences(4, 4))
    noise = torch.randn(2 * 3 * 2, 2, dtype=torch.float64)
    session = module.session(batch_size=2, samples=3)
    first = session.step(xs[:, 0])
    before = first.next(2, noise=noise).mean
    session.step(xs[:, 1])
    torch.testing.assert_close(first.next(2, noise=noise).mean, before, rtol=0, atol=0)
    assert not torch.equal(session.now.next(2, noise=noise).mean, before)
    again = module.session(2, 3, state=first.state)
    torch.testing.assert_close(again.state.h, first.state.h)


def test_paths_from_a_session_are_forecasts():
    """Of one step they have the moments of the distribution to come, and more steps continue."""
    module, (x,) = model().eval(), sequences(3)
    session = module.session(samples=200)
    for frame in x:
        found = session.step(frame[None])
    torch.manual_seed(0)
    paths, ahead = found.forecast(samples=4_000), found.next(draws=50)
    assert paths.shape == (4_000, 1, 1, 3)
    error = paths.std(0)[:, 0] * math.sqrt(2 / 4_000)
    assert ((paths.mean(0)[:, 0] - ahead.mean).abs() < 5 * error).all()
    torch.testing.assert_close(paths.std(0)[:, 0], ahead.stddev, rtol=0.1, atol=0)
    assert found.forecast(steps=4, samples=3).shape == (3, 1, 4, 3)


def test_a_session_with_gaps_scores_what_is_there():
    module, (x,) = model(missing=True).eval(), sequences(4)
    x[1] = NAN
    x[2, 0] = NAN
    session = module.session(samples=3)
    nats = [session.step(frame[None]).nats for frame in x]
    assert all(torch.isfinite(n) for n in nats)
    ahead = session.now.next(5)
    seen = torch.tensor([[False, True, True]])
    torch.testing.assert_close(ahead.log_prob(x[2][None]), ahead.marginal_log_prob(torch.ones(1, 3) * x[2], seen))
    assert ahead.log_prob(x[1][None]).item() == pytest.approx(0)


def test_a_session_reads_whole_numbers_as_numbers():
    """Their type is not the scaler's."""
    module = model()
    module.scale_mean.fill_(0.5)
    noise = torch.zeros(1, 2)
    whole, real = (module.session().step(torch.full((1, 3), 2, dtype=d), noise=noise) for d in (torch.int64, None))
    torch.testing.assert_close(whole.nats, real.nats)
    ahead = real.next(noise=noise)
    torch.testing.assert_close(ahead.log_prob(torch.full((1, 3), 2)), ahead.log_prob(torch.full((1, 3), 2.0)))


def test_the_next_step_s_covariates_are_asked_for():
    module, xs = model(num_inputs=2, latent_size=0), torch.stack(sequences(2, 2))
    us = torch.randn(2, 2, 2, dtype=torch.float64)
    session = module.session(batch_size=2, samples=2)
    found = session.step(xs[:, 0], inputs=us[:, 0])
    with pytest.raises(UserError, match=r"inputs of the next step: must have shape \(2, 2\), but got none"):
        found.next()
    with pytest.raises(UserError, match="covariates"):
        found.forecast()
    ahead = found.next(inputs=us[:, 1])
    torch.testing.assert_close(ahead.log_prob(xs[:, 1]), session.step(xs[:, 1], inputs=us[:, 1]).nats)
    assert not torch.equal(ahead.mean, found.next(inputs=us[:, 0]).mean)
    assert found.forecast(3, 4, inputs=us[:, :1].expand(2, 3, 2)).shape == (4, 2, 3, 3)


@torch.no_grad()
def joint(module, x, draws):
    """Draw latents and what is missing of x from the model, weighted by what is there: x of shape (T, 1)."""
    vrnn, scaler = module.vrnn, module.scaler
    h = torch.zeros(draws, vrnn.hidden_size, dtype=torch.float64)
    log_weight, frames = torch.zeros(draws, dtype=torch.float64), []
    for value in scaler.scale(x)[:, 0]:
        z = vrnn.prior(h).sample()
        emission = vrnn.decoder(torch.cat([vrnn.phi_z(z), h], -1))
        frame = emission.sample() if value.isnan() else value.expand(draws, 1)
        if not value.isnan():
            log_weight = log_weight + emission.log_prob(frame)
        frames.append(frame)
        h = vrnn.cells[0](torch.cat([vrnn.phi_x(vrnn.standardize_input(frame)), vrnn.phi_z(z)], -1), h)
    weights = log_weight.softmax(0)
    return scaler.unscale(torch.stack(frames, 1))[..., 0], weights


def sharp(features=1, **options):
    """A model whose gaps depend on both sides."""
    module = model(features, residual_posterior=True, **options)
    with torch.no_grad():
        for parameter in module.vrnn.parameters():
            parameter.mul_(2.5)
        module.vrnn.decoder.head.linear.bias[features:] -= 1.5  # little noise: neighbours of a gap say more
        linear = module.vrnn.encoder.head.linear  # wider than the prior: weights of a small variance
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    return module.eval()


@pytest.mark.parametrize("gap", [(1, 2), (1, 3), (0, 1)])
def test_imputed_draws_have_the_moments_of_the_posterior(gap):
    """Against brute-force importance sampling, to five standard errors."""
    module = sharp()
    x = 1 + torch.tensor([[0.8], [-0.5], [0.4], [1.0]], dtype=torch.float64)
    x[gap[0] : gap[1]] = NAN
    frames, weights = joint(module, x, 100_000)
    effective = 1 / weights.square().sum()
    assert effective > 300
    drawn = module.impute([x], samples=4_000, particles=10_000, seed=0)[0][..., 0]
    for t in range(*gap):
        mean = (weights * frames[:, t]).sum()
        std = (weights * (frames[:, t] - mean).square()).sum().sqrt()
        error = std * math.sqrt(1 / effective + 4 / 4_000)
        assert abs(drawn[:, t].mean() - mean) < 5 * error
        assert abs(drawn[:, t].std() - std) < 5 * error / math.sqrt(2)
        alone = frames[:, t].mean()  # of the past alone, without weights
        if t == gap[0] > 0:
            assert abs(alone - mean) > 5 * error, "the observed part says nothing: the test can't fail"


def test_a_sharp_frame_leaves_a_gap_more_than_one_ancestor():
    """Of 40 features no particle meets the next frame: what is drawn spreads as what may come of the past."""
    module = sharp(40)
    xs = module.sample(1, 12, seed=0)
    holes = xs.clone()
    holes[:, 5:8] = NAN
    (drawn,) = module.impute(holes, samples=100, seed=0)
    free = module.forecast(xs[:, :5], 3, samples=400, seed=0)[:, 0]
    spread = drawn[:, 5:8].std(0) / free.std(0)
    assert 0.7 < spread.mean() < 1.1
    assert spread.min() > 0.3


def test_early_draws_of_a_feature_that_is_never_seen_do_not_descend_from_one():
    module = sharp(40)
    holes = module.sample(1, 60, seed=0)
    holes[..., 0] = NAN
    (drawn,) = module.impute(holes, samples=100, seed=0)
    apart = [len(frame.unique()) for frame in drawn[..., 0].T]
    assert min(apart) >= 12
    assert sum(apart) / len(apart) > 25


def test_missing_steps_that_no_particle_can_explain():
    """A value that the emission rules out says nothing about what is missing before it."""
    module = VRNNLightningModule(2, latent_size=2, hidden_size=3, emission=Bernoulli)
    x = torch.tensor([[1.0, 1.0], [NAN, NAN], [1.0, 1.0]])
    with torch.no_grad():
        module.vrnn.decoder.head.linear.bias[0] = -math.inf  # never 1
    (drawn,) = module.impute([x], samples=20, seed=0)
    assert set(drawn[:, 1, 0].tolist()) == {0.0}
    assert set(drawn[:, 1, 1].tolist()) == {0.0, 1.0}


def test_a_missing_end_is_a_forecast():
    module, x = sharp(), torch.tensor([[0.8], [-0.5], [0.4]], dtype=torch.float64)
    paths = module.forecast([x], 3, samples=5_000, seed=1)[:, 0, :, 0]
    open_end = torch.cat([x, torch.full((3, 1), NAN, dtype=torch.float64)])
    drawn = module.impute([open_end], samples=5_000, particles=5_000, seed=2)[0][:, 3:, 0]
    error = paths.std(0) * math.sqrt(4 / 5_000)
    assert ((paths.mean(0) - drawn.mean(0)).abs() < 5 * error).all()
    torch.testing.assert_close(paths.std(0), drawn.std(0), rtol=0.1, atol=0)
    free = module.sample(5_000, 3, seed=3)[..., 0]
    assert ((free.mean(0) - paths.mean(0)).abs() > 5 * error).any(), "the prefix says nothing: the test can't fail"


@variants
def test_a_backtest_is_a_forecast_from_each_origin(options, monkeypatch):
    """Particles that follow a sequence once are those that follow each prefix again, resampled or not."""
    module, xs = model(**options).eval(), sequences(67, 70)
    for parameter in module.vrnn.parameters():
        parameter.detach().mul_(2)  # for uneven weights
    xs[0][20:30] = NAN
    moves = []
    monkeypatch.setattr("vrnn_lightning.filtering.resample", lambda *a: moves.append(1) or resample(*a))
    origins = [1, 2, 3, 66]
    found = list(module.backtest(xs, origins, 4, samples=6, seed=3))
    for origin, paths in zip(origins, found, strict=True):
        again = module.forecast([x[:origin] for x in xs], 4, samples=6, seed=3)
        torch.testing.assert_close(paths, again, rtol=1e-9, atol=1e-9)
    assert bool(moves) == bool(module.vrnn.latent_size), "never resampled: the test can't fail"
    assert not torch.equal(found[0], found[1])


def test_a_backtest_leaves_mode_and_generators_alone_between_origins():
    module, xs = model(num_inputs=1), sequences(9, 9)
    us = torch.linspace(0, 1, 18, dtype=torch.float64).reshape(2, 9, 1)
    before, module = torch.get_rng_state(), module.train()
    for origin, paths in zip((3, 5), module.backtest(xs, [3, 5], 4, 2, inputs=us, seed=0), strict=True):
        assert module.vrnn.training
        assert torch.equal(torch.get_rng_state(), before)
        given = {"inputs": us[:, :origin], "future_inputs": us[:, origin : origin + 4]}
        again = module.forecast([x[:origin] for x in xs], 4, 2, seed=0, **given)
        torch.testing.assert_close(paths, again)
    with pytest.raises(UserError, match="covariates of shape"):
        list(module.backtest(xs, [7], 4, 2, inputs=us))


@variants
def test_what_is_observed_stays(options):
    module, xs = model(**options).eval(), sequences(6, 3)
    xs[0][2:4] = NAN
    xs[1][:, 1] = NAN
    for x, drawn in zip(xs, module.impute(xs, samples=5), strict=True):
        there = ~x.isnan()
        assert torch.isfinite(drawn).all()
        torch.testing.assert_close(drawn[:, there], x[there].expand(5, -1))
        assert (drawn[:, ~there].std(0) > 0).all()
    (whole,) = module.impute(sequences(4), samples=2)
    torch.testing.assert_close(whole, torch.stack(sequences(4) * 2))


def test_a_part_of_a_frame_is_drawn_given_the_other():
    """Of a mixture the component depends on what is there."""
    head = GaussianMixture(1, 2, components=2).double().requires_grad_(False)
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
        head.gaussians.linear.bias[:4] = torch.tensor([-3.0, -1.0, 3.0, 1.0])  # means of two components
    emission = head(torch.zeros(5_000, 1, dtype=torch.float64))
    x = torch.tensor([[1.0, NAN]], dtype=torch.float64).expand(5_000, 2)
    drawn = _complete(emission, x.nan_to_num(), ~x.isnan())
    assert (drawn[:, 0] == 1).all()
    std = head.gaussians.moments(head.gaussians.linear.bias)[1][0]
    fits = torch.stack([Normal(m, std).log_prob(torch.tensor(1.0)) for m in (-3.0, 3.0)]).softmax(0).double()
    assert drawn[:, 1].mean().item() == pytest.approx(float(fits @ torch.tensor([-1.0, 1.0]).double()), abs=0.03)


def test_binary_frames():
    module = VRNNLightningModule(4, latent_size=2, hidden_size=5, emission=Bernoulli)
    x = torch.bernoulli(torch.full((5, 4), 0.5))
    x[3] = NAN
    (drawn,) = module.impute([x], samples=6)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    assert set(module.forecast([x], 3, samples=2).unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    "options", [{}, {"cell": "lstm", "layers": 2}, {"emission": Bernoulli}, {"num_inputs": 2}], ids=str
)
def test_latents_decode_to_what_a_sample_of_no_noise_is(options):
    """At a temperature near zero a frame is its emission's mean, or the likelier of two values."""
    module = model(features=2, **options)
    if "emission" in options:
        module.scale_mean.zero_()
        module.scale_std.fill_(1.0)
    inputs = torch.randn(3, 7, 2, dtype=torch.float64) if "num_inputs" in options else None
    drawn = module.eval().vrnn.generate(7, 3, inputs=inputs, temperature=1e-18)
    decoded = module.decode(drawn.z, inputs)
    torch.testing.assert_close(decoded, module.scaler.unscale(drawn.x), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(module.decode(drawn.z + 3, inputs), decoded)


def test_latents_of_another_width():
    with pytest.raises(UserError, match=r"latents: have shape \(1, 4, 3\), expected \(batch, time, 2\)"):
        model().decode(torch.zeros(1, 4, 3))
    with pytest.raises(UserError, match="latents: have no step"):
        model().decode(torch.zeros(1, 0, 2))
    with pytest.raises(UserError, match=r"the model has no latent"):
        model(latent_size=0).decode(torch.zeros(1, 4, 0))
    with pytest.raises(UserError, match=r"inputs: must have shape \(1, 4, 2\)"):
        model(num_inputs=2).decode(torch.zeros(1, 4, 2))


def test_covariates():
    module, xs = model(num_inputs=2), sequences(5, 3)
    us = [torch.randn(len(x), 2, dtype=torch.float64) for x in xs]
    assert [len(s) for s in module.score(xs, inputs=us)] == [5, 3]
    assert [len(s) for s in module.score(xs, samples=4, inputs=us)] == [5, 3]
    one, two = (module.forecast(xs, 2, 3, inputs=us, future_inputs=k * torch.ones(2, 2, 2), seed=0) for k in (0, 5))
    assert not torch.equal(one, two)
    assert module.sample(2, 4, inputs=torch.zeros(2, 4, 2)).shape == (2, 4, 3)
    with pytest.raises(UserError, match="covariates"):
        module.forecast(xs, 2, 3, inputs=us)
    with pytest.raises(UserError, match="covariates"):
        module.score(xs)
    with pytest.raises(UserError, match="of 1 sequences, but 2"):
        module.score(xs, inputs=us[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample(0), "count 0: must be at least 1"),
        (lambda m: m.sample(1, 0), "steps 0: must be at least 1"),
        (lambda m: m.sample(1, 3, temperature=0.0), "temperature 0"),
        (
            lambda m: m.forecast([torch.zeros(0, 3)], 2),
            "sequence 0: has shape (0, 3), expected (time, 3) with at least",
        ),
        (lambda m: m.forecast([torch.zeros(4, 2)], 2), "sequence 0: has shape (4, 2), expected (time, 3)"),
        (lambda m: m.forecast(torch.zeros(1, 4, 3), 0), "steps 0"),
        (lambda m: m.backtest([torch.zeros(4, 3)], [2, 2], 1), "origins [2, 2]: must increase, from 1 on"),
        (lambda m: m.backtest([torch.zeros(4, 3)], [0, 2], 1), "origins [0, 2]: must increase, from 1 on"),
        (lambda m: m.backtest([torch.zeros(4, 3)], [3, 5], 1), "origins: 5 is beyond the 4 steps of a sequence"),
        (lambda m: m.backtest([torch.zeros(4, 3)], [3], 0), "steps 0: must be at least 1"),
        (lambda m: m.score([]), "no sequence is given"),
        (lambda m: m.score([torch.full((2, 3), math.inf)]), "sequence 0: holds infinite values"),
        (lambda m: m.impute([torch.zeros(2, 3)], samples=5, particles=4), "particles 4: must be at least 5"),
        (lambda m: m.impute([torch.zeros(2, 3)], lag=-1), "lag -1: must be at least 0"),
        (lambda m: m.session().now.next(0), "draws 0"),
        (lambda m: m.session().now.next(noise=torch.zeros(2, 2)), "noise of the next step: must have shape (1, 2)"),
        (lambda m: m.session().now.forecast(0), "steps 0"),
        (lambda m: m.session().now.forecast(samples=0), "samples 0"),
        (lambda m: m.session().step(torch.zeros(1, 1)), "x: must have shape (1, 3), but got shape (1, 1)"),
        (lambda m: m.session().step(torch.ones(1, 3), torch.ones(1, 3)), "observed: must be torch.bool"),
        (
            lambda m: model(num_inputs=1).session().step(torch.ones(1, 3), inputs=torch.ones(1, 1) * NAN),
            "inputs: holds",
        ),
        (lambda m: m.session().step(torch.full((1, 3), math.inf)), "x: holds a value that is not a number"),
        (lambda m: m.session().step(torch.full((1, 3), NAN), torch.ones(1, 3).bool()), "x: holds a value that is no"),
        (lambda m: model(smoothing=True).session(), "smooth"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(UserError) as said:
        call(model())
    assert message in str(said.value)
    assert "\n" not in str(said.value)


def test_a_stroke_is_filled_whole_or_not_at_all():
    module = VRNNLightningModule(3, latent_size=2, hidden_size=5, emission=Pen)
    x = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.1, 1.0], [0.3, -0.2, 0.0]])
    x[1] = NAN
    assert torch.isfinite(module.impute([x], samples=3)[0]).all()
    x[1, 0] = 0.3
    with pytest.raises(UserError, match="can't fill a part of a frame"):
        module.impute([x], samples=3)


def test_all_missing_is_a_sample():
    module = sharp()
    x = torch.full((3, 1), NAN, dtype=torch.float64)
    drawn, free = module.impute([x], samples=5_000, particles=5_000)[0][..., 0], module.sample(5_000, 3)[..., 0]
    error = free.std(0) * math.sqrt(4 / 5_000)
    assert ((drawn.mean(0) - free.mean(0)).abs() < 5 * error).all()
    assert float(sum(module.score([x])[0])) <= 0
