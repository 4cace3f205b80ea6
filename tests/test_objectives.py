"""The objective and the schedules."""

from __future__ import annotations

import itertools

import pytest
import torch

from vrnn_lightning import schedules
from vrnn_lightning.objectives import elbo


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
