"""The particle filter on models that are known exactly, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal
from vrnn_lightning.datamodules.linear_gaussian import LinearGaussian

from vrnn_lightning import SequenceBatch, UserError
from vrnn_lightning.batch import pad
from vrnn_lightning.filtering import Resampling, particle_filter, resample

SCHEMES = [None, Resampling("multinomial", 0.5), Resampling("systematic", 0.5), Resampling("systematic", 1.0)]


def filter_linear_gaussian(
    data: LinearGaussian, batch: SequenceBatch, particles: int, resampling: Resampling | None, seed: int = 0
) -> torch.Tensor:
    """Filter with the model's own steps: each state is proposed from its transition, and weighs p(x_t | s_t)."""
    generator = torch.Generator().manual_seed(seed)
    x = batch.x.double()
    first = torch.linalg.cholesky(data.initial_covariance)
    later = torch.linalg.cholesky(data.state_covariance)
    noise = data.observation_covariance.diagonal().sqrt()
    rows, size = particles * len(batch), len(data.transition)

    def step(t, states):
        drawn = torch.randn(rows, size, generator=generator, dtype=x.dtype)
        (state,) = states
        state = drawn @ first.mT if t == 0 else state @ data.transition.mT + drawn @ later.mT
        seen = x[:, t].repeat(particles, 1)
        density = Normal(state @ data.observation.mT, noise).log_prob(seen).sum(-1)
        return density.view(particles, -1), (state,)

    def uniform(count):
        return torch.rand(len(batch), count, generator=generator, dtype=x.dtype)

    zero = torch.zeros(rows, size, dtype=x.dtype)
    return particle_filter(step, (zero,), batch.lengths, particles, x.shape[1], resampling, uniform).log_likelihood


@pytest.mark.parametrize("resampling", SCHEMES, ids=["never", "multinomial", "systematic", "always"])
def test_the_estimate_of_a_likelihood_is_unbiased(resampling):
    """E p_hat = p: over many filters of one sequence, the mean of p_hat / p is 1 within 4 standard errors."""
    data = LinearGaussian(channels=2, steps=5, observation_noise=1.0, train_size=1)
    sequence = data.sequences("train")[0]
    exact = data.exact_log_likelihood(pad([sequence])).item()
    many = pad([sequence] * 20000)
    ratio = (filter_linear_gaussian(data, many, 6, resampling) - exact).exp()
    error = ratio.std() / len(ratio) ** 0.5
    assert error < 0.05
    assert abs(ratio.mean() - 1) < 4 * error


def test_many_particles_are_tight_and_fewer_lie_below():
    """Ragged lengths; the gap per step shrinks with K, and resampling beats plain importance weights."""
    data = LinearGaussian(steps=30, min_steps=10, observation_noise=1.0, train_size=40)
    batch = pad(data.sequences("train"))
    exact = data.exact_log_likelihood(batch)
    systematic = Resampling("systematic")

    def gap(particles, resampling):
        lost = exact - filter_linear_gaussian(data, batch, particles, resampling)
        return lost.sum().item() / batch.lengths.sum().item()

    gaps = [gap(particles, systematic) for particles in (4, 32, 256)]
    assert gaps == sorted(gaps, reverse=True)
    assert abs(gap(2048, systematic)) < 0.01
    assert gap(256, None) > 5 * gaps[2]


def test_padding_and_other_sequences_change_no_sequence():
    """A sequence's weights are its own: what it gets among longer ones is what it gets alone."""
    steps, particles = 6, 4
    generator = torch.Generator().manual_seed(0)
    increments = torch.randn(steps, particles, 2, generator=generator)
    uniforms = torch.rand(steps, 2, 1, generator=generator)

    def run(columns, lengths, steps):
        """Increments that depend on what a particle was, so that wrong ancestors are seen."""
        counter = iter(range(steps))

        def step(t, states):
            new = states[0].view(particles, -1) * 0.5 + increments[t][:, columns]
            return new, (new.flatten(),)

        def draw(count):
            return uniforms[next(counter)][columns]

        zero = torch.zeros(particles * len(columns))
        return particle_filter(step, (zero,), torch.tensor(lengths), particles, steps, Resampling(), draw)

    both = run([0, 1], [3, 6], 6)
    for i, length in ((0, 3), (1, 6)):
        alone = run([i], [length], length)
        torch.testing.assert_close(both.log_likelihood[i], alone.log_likelihood[0])
        torch.testing.assert_close(both.effective_samples[i], alone.effective_samples[0])


def test_the_filter_is_its_definition():
    """Weights, evidence, resampling at a low effective sample size, reset weights: by hand, with two particles."""
    alphas = torch.tensor([[0.9, 0.1], [0.2, 0.4], [0.5, 0.3]])  # increments of the two slots at each step
    history = []

    def step(t, states):
        history.append(states[0].tolist())
        return alphas[t].log()[:, None], (states[0],)

    drawn = iter([torch.tensor([[0.5]]), torch.tensor([[0.5]]), torch.tensor([[0.5]])])
    start = torch.tensor([0.0, 1.0])
    found = particle_filter(
        step, (start,), torch.tensor([3]), 2, 3, Resampling("systematic", 0.7), lambda count: next(drawn)
    )
    # step 0: mean 0.5; weights 0.9, 0.1: 1 / 0.82 samples < 1.4, so positions 0.25 and 0.75 both take particle 0
    # step 1: weights even again: mean 0.3; weights 1/3, 2/3: 1.8 samples, kept
    # step 2: 1/3 * 0.5 + 2/3 * 0.3
    expected = math.log(0.5) + math.log(0.3) + math.log(0.5 / 3 + 0.2)
    assert found.log_likelihood.item() == pytest.approx(expected, abs=1e-6)
    assert history == [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    last = torch.tensor([0.5 / 3, 0.2])
    sizes = [1 / 0.82, 1.8, (last.sum() ** 2 / (last**2).sum()).item()]
    assert found.effective_samples.item() == pytest.approx(sum(sizes) / 3, abs=1e-5)
    assert found.final_effective_samples.item() == pytest.approx(sizes[-1], abs=1e-5)


@pytest.mark.parametrize("scheme", ["multinomial", "systematic"])
def test_ancestors_are_drawn_in_proportion(scheme):
    weights = torch.tensor([0.5, 0.0, 0.2, 0.3]).double()
    generator = torch.Generator().manual_seed(0)
    count = 20000
    uniforms = torch.rand(4 if scheme == "multinomial" else 1, count, generator=generator)
    ancestors = resample(weights.log()[:, None].expand(4, count) + 7, uniforms)
    share = torch.stack([(ancestors == k).double().mean() for k in range(4)])
    assert ((share - weights).abs() < 5 * (weights * (1 - weights) / count).sqrt() + 1e-12).all()
    if scheme == "systematic":
        assert {(ancestors[:, i] == 0).sum().item() for i in range(100)} == {2}  # 0.5 * 4, always


def test_extreme_weights_choose_real_particles():
    weights = torch.full((100, 1), -math.inf)
    weights[37] = -1e4
    assert (resample(weights, torch.tensor([[1 - 1e-7]])) == 37).all()
    assert (resample(weights, torch.rand(100, 1)) == 37).all()


def test_the_resampling_gradient_is_that_of_the_expectation():
    """d/d theta of E log p_hat by finite differences; without the ancestors' term the estimate is off."""
    copies, particles, lengths = 200000, 2, torch.tensor([3])

    def expectation(theta: torch.Tensor, gradient: bool, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)

        def step(t, states):
            z = states[0] * 0.7 + theta * torch.randn(particles * copies, generator=generator, dtype=theta.dtype)
            return Normal(z, 0.5).log_prob(torch.tensor([1.0, -1.0, 1.0])[t]).view(particles, -1), (z,)

        def uniform(count):
            return torch.rand(copies, count, generator=generator, dtype=theta.dtype)

        rule = Resampling("multinomial", 1.0, gradient)
        zero = torch.zeros(particles * copies, dtype=theta.dtype)
        return particle_filter(step, (zero,), lengths.expand(copies), particles, 3, rule, uniform).log_likelihood

    def derivative(gradient: bool) -> float:
        theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(expectation(theta, gradient, 1).mean(), theta)
        return found.item()

    width = 0.05
    high, low = (expectation(torch.tensor(1.0 + s * width).double(), False, 2) for s in (1, -1))
    slope = ((high - low).mean() / (2 * width)).item()
    error = ((high - low).std() / (2 * width) / copies**0.5).item()
    assert abs(derivative(True) - slope) < 4 * error + 0.02
    assert abs(derivative(False) - slope) > 8 * error + 0.04


def test_a_resampling_gradient_adds_no_value():
    weights = torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(0))

    def run(rule):
        generator = torch.Generator().manual_seed(1)

        def uniform(count):
            return torch.rand(1, count, generator=generator)

        def step(t, states):
            return weights[t], states

        return particle_filter(step, (torch.zeros(4),), torch.tensor([3]), 4, 3, rule, uniform).log_likelihood

    torch.testing.assert_close(run(Resampling("multinomial", 1.0, True)), run(Resampling("multinomial", 1.0)))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"scheme": "residual"}, "residual"),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"threshold": -0.1}, "threshold -0.1"),
        ({"gradient": True}, "resampling_gradient"),
    ],
)
def test_absurd_rules_are_refused(options, word):
    with pytest.raises(UserError, match=word):
        Resampling(**options)
