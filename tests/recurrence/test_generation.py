"""Fast generation draws what the readable loop draws."""

from __future__ import annotations

import pytest
import torch
from readable import readable_generation
from test_recurrence import CELLS, OPTIONS, make_model, random_state
from torch import nn
from torch.distributions import Distribution, Normal

from vrnn_lightning import VRNN, UserError
from vrnn_lightning.heads import (
    Bernoulli,
    Factorised,
    Gaussian,
    GaussianMixture,
    Head,
    Laplace,
    MuLaw,
    Poisson,
    tempered,
)
from vrnn_lightning.recurrence import Generated, generation

SHOWN = {**OPTIONS, "plain": {}}


class Wide(Gaussian):
    """A Gaussian of another spread."""

    def forward(self, features: torch.Tensor) -> Factorised:
        given = super().forward(features)
        return Factorised(Normal(given.mean, 3 * given.stddev, validate_args=False))


class Uniform(Head):
    """A head with nothing but a distribution."""

    def __init__(self, in_features: int, num_features: int) -> None:
        super().__init__(in_features, num_features)
        self.linear = nn.Linear(in_features, num_features)

    def forward(self, features: torch.Tensor) -> Distribution:
        low = self.linear(features)
        return torch.distributions.Independent(torch.distributions.Uniform(low, low + 1), 1)


def draw_both(model: VRNN, steps: int = 6, rows: int = 3, temperature: float = 1.0) -> tuple[Generated, Generated]:
    state = random_state(model, rows)
    state = type(state)(*(None if part is None else part.to(model.input_mean) for part in state))
    inputs = torch.randn(rows, steps, model.num_inputs).to(model.input_mean) if model.num_inputs else None
    torch.manual_seed(8)
    fast = model.generate(steps, state=state, inputs=inputs, temperature=temperature)
    torch.manual_seed(8)
    return fast, readable_generation(model, steps, state, inputs, temperature)


def assert_equal(fast: Generated, slow: Generated, tolerance: float = 1e-9) -> None:
    for a, b in zip((*fast[:3], *fast.state), (*slow[:3], *slow.state), strict=True):
        if a is None:
            assert b is None
        else:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", SHOWN.values(), ids=SHOWN)
@pytest.mark.parametrize("latent", [4, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_readable(cell, latent, options):
    assert_equal(*draw_both(make_model(cell, latent, **options)))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("emission", [Bernoulli, Gaussian, GaussianMixture, Laplace, MuLaw, Poisson, Wide])
def test_every_emission_equals_readable(emission, temperature):
    assert_equal(*draw_both(make_model(emission=emission, depth=1), temperature=temperature))


def test_a_head_needs_nothing_but_a_distribution():
    model = make_model(emission=Uniform)
    assert_equal(*draw_both(model))
    with pytest.raises(UserError, match="no temperature"):
        model.generate(2, temperature=0.5)


@pytest.mark.parametrize("emission", [Bernoulli, Gaussian])
def test_a_temperature_is_positive(emission):
    with pytest.raises(UserError, match="temperature 0"):
        make_model(emission=emission).generate(2, temperature=0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("head", [Bernoulli(4, 3), Gaussian(4, 3), Gaussian(4, 3, covariance="scalar"), Wide(4, 3)])
def test_a_draw_is_that_of_the_distribution(head, temperature):
    features = torch.randn(5, 7, 4)
    torch.manual_seed(9)
    drawn = head.draw(features, temperature)
    torch.manual_seed(9)
    torch.testing.assert_close(drawn, tempered(head(features), temperature).sample())
    assert not drawn.requires_grad


def test_float32_and_single_rows():
    assert_equal(*draw_both(make_model(layers=2).float(), rows=1), tolerance=1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_under_autocast(cell):
    """One step's differences are those of rounding; from there on the draws part."""
    model = make_model(cell, layers=2, num_inputs=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        fast, slow = draw_both(model, steps=1)
    assert fast.x.dtype == slow.x.dtype == torch.float32
    for a, b in zip((*fast[:3], fast.state.h), (*slow[:3], slow.state.h), strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=0.05, atol=0.05)


def test_means_are_found_in_pieces(monkeypatch):
    model = make_model()
    whole = draw_both(model)[0]
    monkeypatch.setattr(generation, "CHUNK", 7)
    assert_equal(draw_both(model)[0], whole)


def test_in_inference_mode_and_without_graph():
    model = make_model()
    assert not model.generate(3).x.requires_grad
    with torch.inference_mode():
        state = model.generate(3).state
        assert model.generate(3, state=state).x.shape == (1, 3, 3)
    assert not any(p.grad is not None for p in model.parameters())
