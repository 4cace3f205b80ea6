"""The objectives and the schedules."""

from __future__ import annotations

import itertools
import math

import pytest
import test_recurrence
import torch
from readable import readable_filter, readable_loop

from vrnn_lightning import MLPConfig, UserError, schedules
from vrnn_lightning.filtering import Resampling
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import ELBO, FIVO, IWAE, elbo


def iwae(log_px, log_ratio, samples):
    """Return the importance-weighted bound of each sequence (Burda et al. 2016): one weight per sequence."""
    return (log_px + log_ratio).sum(1).unflatten(0, (samples, -1)).logsumexp(0) - math.log(samples)


def terms():
    torch.manual_seed(0)
    return -torch.rand(3, 5, dtype=torch.float64), torch.rand(3, 5, 4, dtype=torch.float64), torch.tensor(15)


def test_elbo_is_reconstruction_minus_kl():
    log_px, kl, steps = terms()
    assert elbo(log_px, kl, steps).item() == pytest.approx((log_px.sum() - kl.sum()).item())
    assert elbo(log_px, kl, steps, beta=0.25).item() == pytest.approx((log_px.sum() - 0.25 * kl.sum()).item())


def test_free_bits_are_per_dimension_and_stop_the_gradient_below():
    log_px, kl, steps = terms()
    kl[..., 0] = 0.01
    kl.requires_grad_()
    value = elbo(log_px, kl, steps, free_bits=0.1)
    expected = log_px.sum() - kl[..., 1:].sum() - 0.1 * 15
    assert value.item() == pytest.approx(expected.item())
    value.backward()
    assert (kl.grad[..., 0] == 0).all()
    assert (kl.grad[..., 1:] == -1).all()


def test_free_bits_look_at_the_global_batch():
    """Two halves, each told the global totals, add up to the whole."""
    log_px, kl, steps = terms()
    whole = elbo(log_px, kl, steps, free_bits=0.5)
    sums = {4: kl.sum((0, 1)), 0: steps.to(kl)}

    def total(x):
        return sums[x.numel() if x.ndim else 0]

    parts = [elbo(log_px[i : i + 1], kl[i : i + 1], torch.tensor(5), free_bits=0.5, total=total) for i in range(3)]
    assert sum(parts).item() == pytest.approx(whole.item())


@pytest.mark.parametrize("schedule", [schedules.linear, schedules.cosine, schedules.sigmoid, schedules.cyclical])
def test_schedules_meet_their_end_points(schedule):
    assert schedule(0, 100, 0.2, 0.9) == pytest.approx(0.2)
    assert schedule(100, 100, 0.2, 0.9) == pytest.approx(0.9)
    assert schedule(10**6, 100, 0.2, 0.9) == pytest.approx(0.9)
    values = [schedule(step, 100, 0.2, 0.9) for step in range(101)]
    assert all(0.2 - 1e-12 <= v <= 0.9 + 1e-12 for v in values)
    assert schedule(0, 0) == 1.0


@pytest.mark.parametrize("schedule", [schedules.linear, schedules.cosine, schedules.sigmoid])
def test_schedules_rise(schedule):
    values = [schedule(step, 100) for step in range(101)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert values[50] == pytest.approx(0.5)


def test_cyclical_returns_to_its_start():
    values = [schedules.cyclical(step, 100, cycles=4, ramp=0.5) for step in range(100)]
    assert [step for step, v in enumerate(values) if v == 0] == [0, 25, 50, 75]
    assert max(values[:25]) == 1


def make(**options):
    model = test_recurrence.make_model(**options)
    batch = test_recurrence.make_batch([6, 4, 1])
    test_recurrence.add_extras(model, batch)
    return model, batch


def evaluate(objective, model, batch, beta=1.0, seeds=(0, 1, 2)):
    return objective(model, batch, Noise(batch, list(seeds)), beta, lambda x: x)


def gradient(value, model):
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_one_sample_of_every_objective_is_the_sampled_elbo():
    """IWAE with K = 1 and FIVO with one particle are the single-sample bound."""
    model, batch = make()
    sampled = evaluate(ELBO(kl="sampled"), model, batch)
    torch.testing.assert_close(evaluate(IWAE(1), model, batch).value, sampled.value)
    noise = Noise(batch, [0, 1, 2])
    trace = model(batch, noise.over_time(4))
    filtered = model.filter(batch, 1, Resampling(), Noise(batch, [0, 1, 2]))
    torch.testing.assert_close(filtered.log_likelihood, (trace.log_px + trace.log_ratio).sum(1))


@pytest.mark.parametrize("options", [{}, {"residual_posterior": True, "layers": 2, "cell": "lstm"}, {"prior": None}])
def test_a_filter_that_never_resamples_is_the_importance_weighted_bound(options):
    """Value and gradient; the filter steps with prior and likelihood inside, the bound is hoisted."""
    model, batch = make(**options)
    samples, noise = 5, Noise(batch, [0, 1, 2])
    trace = model(batch, noise.over_time(4, samples), samples=samples)
    hoisted = iwae(trace.log_px, trace.log_ratio, samples)
    stepped = model.filter(batch, samples, None, Noise(batch, [0, 1, 2]))
    torch.testing.assert_close(stepped.log_likelihood, hoisted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        gradient(stepped.log_likelihood.sum(), model), gradient(hoisted.sum(), model), rtol=1e-9, atol=1e-9
    )
    never = model.filter(batch, samples, Resampling(threshold=0.0), Noise(batch, [0, 1, 2]))
    assert never.log_likelihood.isfinite().all()


FILTERED = {
    "plain": {},
    "LSTM": {"cell": "lstm", "layers": 2},
    "residual": {"residual_posterior": True},
    "standard": {"prior": None},
    "dropout": {"dropout": 0.4, "layers": 2},
    "extras": {"num_inputs": 2, "missing": True, "residual_posterior": True},
}
RULES = [Resampling("systematic", 0.9), Resampling("multinomial", 1.0, gradient=True), Resampling("multinomial", 0.7)]


@pytest.mark.parametrize("rule", RULES, ids=["systematic", "gradient", "multinomial"])
@pytest.mark.parametrize("options", FILTERED.values(), ids=FILTERED)
def test_the_fast_filter_equals_the_readable(options, rule):
    """Value, effective samples, last weights and states, and every gradient, along resampled particles."""
    model, batch = make(**options)
    samples, noise = 4, Noise(batch, [0, 1, 2])
    masks = model.draw_masks(noise)
    fast = model.filter(batch, samples, rule, noise, masks, beta=0.7)
    z, draws = noise.over_time(4, samples), noise.uniform_over_time(rule.draws(samples))
    state = model.initial_state(3 * samples)
    slow = readable_filter(model, batch, z, draws, state, rule, masks, beta=0.7)
    assert slow.effective_samples[0] < 3.9
    for a, b in zip(fast[:4], slow[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    longest = (batch.lengths == 6).repeat(samples)  # the readable loop's states continue in padding
    torch.testing.assert_close(fast.state.h[longest], slow.state.h[longest], rtol=1e-9, atol=1e-9)
    weights = torch.tensor([1.0, -0.5, 2.0]).double()
    torch.testing.assert_close(
        gradient((fast.log_likelihood * weights).sum(), model),
        gradient((slow.log_likelihood * weights).sum(), model),
        rtol=1e-9,
        atol=1e-9,
    )


def test_a_filter_reads_the_covariates():
    model, batch = make(num_inputs=2, residual_posterior=True)
    noise = Noise(batch, [0, 1, 2])
    z = noise.over_time(4, 3)
    trace = model(batch, z, samples=3)
    hoisted = iwae(trace.log_px, trace.log_ratio, 3)
    torch.testing.assert_close(model.filter(batch, 3, None, Noise(batch, [0, 1, 2])).log_likelihood, hoisted)
    reference = readable_loop(model, batch, z[:3], model.initial_state(3))
    first = (trace.log_px + trace.log_ratio)[:3]
    torch.testing.assert_close(first, reference.log_px + reference.log_ratio)


def test_iwae_sums_over_time_before_the_mean_over_samples():
    log_px, ratio = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    weights = (log_px + ratio).sum(1).view(3, 2)  # row k * batch + i
    expected = weights.exp().mean(0).log()
    torch.testing.assert_close(iwae(log_px, ratio, 3), expected)


def test_the_bounds_are_in_order():
    """On average: ELBO <= IWAE_4 <= IWAE_16, paired over 400 draws, three standard errors apart or more."""
    model, batch = make()
    many = batch.rows([0] * 400)
    with torch.no_grad():
        noise = Noise(many, list(range(400)))
        elbos = model(many, noise.over_time(4))
        single = elbos.log_px.sum(1) - elbos.kl.sum((1, 2))
        four, sixteen = (model.filter(many, k, None, noise).log_likelihood for k in (4, 16))
    for lower, upper in ((single, four), (four, sixteen)):
        difference = upper - lower
        assert difference.mean() > 3 * difference.std() / 20


def test_analytic_and_sampled_kl_agree_on_average():
    model, batch = make()
    many = batch.rows([0] * 2000)
    with torch.no_grad():
        trace = model(many, Noise(many, list(range(2000))).over_time(4))
    difference = trace.kl.sum((1, 2)) + trace.log_ratio.sum(1)
    assert difference.mean().abs() < 4 * difference.std() / 2000**0.5


@pytest.mark.parametrize("objective", [ELBO(), ELBO("sampled"), ELBO(balance=0.8), IWAE(3), FIVO(3)])
def test_every_objective_reports_the_same_bound(objective):
    """The trace is the same unresampled one: for IWAE the mean over its samples, else the very trajectories."""
    model, batch = make()
    found = evaluate(objective, model, batch)
    samples = len(found.log_px) // 3
    reference = model(batch, Noise(batch, [0, 1, 2]).over_time(4, samples), samples=samples)
    torch.testing.assert_close(found.log_px, reference.log_px)
    torch.testing.assert_close(found.kl, reference.kl)
    assert samples == (3 if isinstance(objective, IWAE) else 1)


@pytest.mark.parametrize("objective", [ELBO(), ELBO("sampled"), IWAE(3), FIVO(3)])
def test_beta_weighs_the_latents_part_alone(objective):
    """At beta 0 the value is one of reconstructions; the reported terms do not move."""
    model, batch = make()
    without, with_beta = (evaluate(objective, model, batch, beta) for beta in (0.0, 1.0))
    torch.testing.assert_close(without.kl, with_beta.kl)
    assert without.value > with_beta.value
    if isinstance(objective, ELBO):
        torch.testing.assert_close(without.value, without.log_px.sum())


def test_balance_shares_the_gradient_of_the_kl_and_keeps_its_value():
    model, batch = make(prior=MLPConfig(7, 2))
    whole, prior_only, posterior_only, half = (
        evaluate(ELBO(balance=balance), model, batch) for balance in (None, 1.0, 0.0, 0.5)
    )
    torch.testing.assert_close(whole.value, half.value)

    def kl_gradient(found, parameters):
        reconstruction = found.log_px.sum()
        found = torch.autograd.grad(reconstruction - found.value, parameters, allow_unused=True, retain_graph=True)
        return torch.cat([torch.zeros(1).double() if g is None else g.flatten() for g in found])

    head = list(model.prior.head.parameters())
    own = list(model.encoder.head.parameters())
    assert (kl_gradient(posterior_only, head) == 0).all()
    torch.testing.assert_close(kl_gradient(prior_only, head), kl_gradient(whole, head))
    torch.testing.assert_close(kl_gradient(half, head), 0.5 * kl_gradient(whole, head))
    assert (kl_gradient(whole, own) != 0).any()


def test_balance_of_a_residual_posterior_is_a_share_of_the_gradient():
    """The KL does not depend on the prior's mean, which the posterior's holds; in one step, no latent feeds a next."""
    model, _ = make(residual_posterior=True)
    batch = test_recurrence.make_batch([1, 1, 1])
    trace = model(batch, Noise(batch, [0, 1, 2]).over_time(4))
    whole, half, posterior_only = (ELBO(balance=b)._kl(trace, model).sum() for b in (None, 0.5, 0.0))
    torch.testing.assert_close(half, whole)
    head = next(iter(model.prior.head.parameters()))
    torch.testing.assert_close(gradient(half, model), 0.5 * gradient(whole, model))
    (found,) = torch.autograd.grad(whole, head, retain_graph=True)
    assert (found[:4].abs() < 1e-12).all()
    assert (found[4:].abs() > 1e-12).any()
    unmoved = torch.autograd.grad(posterior_only, head, allow_unused=True, retain_graph=True)[0]
    assert unmoved is None or (unmoved == 0).all()


def test_without_a_latent_every_objective_is_the_likelihood():
    model, batch = make(latent=0)
    values = [evaluate(objective, model, batch).value for objective in (ELBO(), IWAE(4), FIVO(4))]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0])


@pytest.mark.parametrize("lengths", [[1], [1, 1], [3, 0], [5]], ids=["one step", "steps", "empty", "one sequence"])
@pytest.mark.parametrize("objective", [ELBO(balance=0.5), IWAE(3), FIVO(3, threshold=1.0)])
def test_small_and_empty_batches_train(objective, lengths):
    model = test_recurrence.make_model(dropout=0.2, residual_posterior=True)
    batch = test_recurrence.make_batch(lengths)
    batch.x[:] = 1.0  # constant
    found = evaluate(objective, model, batch, seeds=range(len(lengths)))
    found.value.backward()
    assert found.value.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("make_it", "word"),
    [
        (lambda: IWAE(0), "objective.samples 0"),
        (lambda: FIVO(-1), "objective.particles -1"),
        (lambda: ELBO(kl="exact"), "must be 'analytic' or 'sampled'"),
        (lambda: ELBO(free_bits=-1.0), "free_bits -1.0"),
        (lambda: ELBO(free_bits=float("nan")), "free_bits nan"),
        (lambda: ELBO(balance=2.0), "balance 2.0"),
        (lambda: ELBO(kl="sampled", balance=0.5), "needs objective.kl 'analytic'"),
    ],
)
def test_absurd_objectives_are_refused(make_it, word):
    with pytest.raises(UserError, match=word):
        make_it()
