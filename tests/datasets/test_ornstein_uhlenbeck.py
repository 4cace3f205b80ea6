"""An Ornstein-Uhlenbeck process at irregular times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal

from vrnn_lightning.testing import CHECKS

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from ornstein_uhlenbeck import OrnsteinUhlenbeck

SMALL = {"train_size": 21, "val_size": 9, "test_size": 7, "steps": 5, "min_steps": 1, "batch_size": 4}


@pytest.mark.parametrize("dt", [True, False])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, dt):
    check(lambda **options: OrnsteinUhlenbeck(dt=dt, **SMALL | options))


def test_the_likelihood_is_that_of_the_joint_normal_distribution():
    """Two steps have the covariance exp(-time between them / relaxation) of the state."""
    data = OrnsteinUhlenbeck(3, relaxation=1.7, noise=0.4, **SMALL)
    data.setup("test")
    for batch in data.test_dataloader():
        for exact, x, inputs, n in zip(
            data.exact_log_likelihood(batch), batch.x.double(), batch.inputs.double(), batch.lengths, strict=True
        ):
            times = inputs[:n, 0].cumsum(0)
            state = (-(times[:, None] - times).abs() / 1.7).exp()
            covariance = torch.kron(state, torch.ones(3, 3).double()) + 0.16 * torch.eye(3 * n, dtype=torch.float64)
            expected = MultivariateNormal(torch.zeros(3 * n).double(), covariance).log_prob(x[:n].flatten())
            torch.testing.assert_close(exact, expected)


def test_the_paths_follow_the_process():
    data = OrnsteinUhlenbeck(2, steps=200, train_size=400, val_size=1, test_size=1)
    x = torch.stack([s.x for s in data.split("train")]).double()
    dt = torch.stack([s.inputs for s in data.split("train")])[..., 0].double()
    assert (dt[:, 0] == 0).all()
    assert dt[:, 1:].mean().item() == pytest.approx(1, abs=0.02)
    assert x.var().item() == pytest.approx(1.09, abs=0.03)
    product = (x[:, 1:] * x[:, :-1]).mean(-1)
    assert (product - (-dt[:, 1:]).exp()).mean().item() == pytest.approx(0, abs=0.02)
