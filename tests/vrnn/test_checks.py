"""What is checked before a pass, and what is refused in it: each message names the part."""

from __future__ import annotations

import re

import pytest
import torch
from test_recurrence import make_batch, make_model
from torch import Tensor, nn

from vrnn_lightning import SequenceBatch, UserError, build_vrnn
from vrnn_lightning.filtering import Resampling
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence.operations import Relu


class Returning(nn.Module):
    """A part that returns something that no part may return."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *reads):
        return self.function(*reads)


def model_and_batch(**options):
    return make_model("gru", 4, **options), make_batch([5, 3])


def test_a_step_that_computes_something_else_is_an_error_that_names_the_part(monkeypatch):
    forward = Relu.forward
    monkeypatch.setattr(Relu, "forward", lambda self, t: (forward(self, t), self.values[t].mul_(1.001))[0])
    model, batch = model_and_batch()
    with pytest.raises(UserError, match=r"^encoder: the time loop computes other values"):
        model(batch)


def test_the_check_leaves_no_trace():
    """Random numbers, buffers, hooks and modes are as they were."""
    model, batch = model_and_batch()
    model.encoder.body.register_forward_hook(lambda part, reads, found: found * torch.rand_like(found))
    nn.utils.parametrizations.spectral_norm(model.phi_x[0])
    model.eval().phi_z.train()
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    generator, noise = torch.random.fork_rng(), Noise(batch, [0, 1])
    with generator, torch.no_grad():
        model(batch, noise.over_time(4))
        first = torch.get_rng_state()
        torch.set_rng_state(expected)
        model(batch, noise.over_time(4))  # without a check
        assert torch.equal(first, torch.get_rng_state())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert modes == [module.training for module in model.modules()]


def test_a_changed_model_is_checked_once(monkeypatch):
    from vrnn_lightning.vrnn import checks

    model, batch = model_and_batch()
    calls, check = [], checks._check_step
    monkeypatch.setattr(checks, "_check_step", lambda model: calls.append(1) or check(model))
    for _ in range(2):
        model(batch)
    model.generate(2)
    assert len(calls) == 1
    handle = model.phi_z.register_forward_hook(lambda *_: None)
    model(batch)
    model(batch)
    assert len(calls) == 2
    handle.remove()
    model(batch)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("part", "returned", "message"),
    [
        ("phi_z", lambda z: (z, z), "phi_z: returned tuple, expected floating-point numbers of shape (2, 0)"),
        ("phi_z", lambda z: z.sum(), "phi_z: returned shape ()"),
        ("phi_z", lambda z: torch.zeros(len(z), 6).long(), "phi_z: returned torch.int64, expected"),
        ("encoder", lambda reads: reads, "encoder: returned Tensor, but the latent is GaussianLatent. Fix: return"),
        (
            "encoder",
            lambda reads: torch.distributions.Independent(torch.distributions.Laplace(reads[..., :4], 1.0), 1),
            "encoder: returned Laplace, but the latent is GaussianLatent",
        ),
        (
            "encoder",
            lambda reads: torch.distributions.Independent(torch.distributions.Normal(reads[..., :3], 1.0), 1),
            "encoder: returned shape (2, 3) and (2, 3), expected (2, 4) and (2, 4)",
        ),
        ("cells.0", lambda x, h: (h, h), "cells.0: Returning returned ((2, 10), (2, 10)), expected (2, 10)"),
        (
            "cells.0",
            lambda x, h: h[:, :3],
            "cells.0: Returning returned (2, 3), expected (2, 10). Fix: return the output",
        ),
        ("cells.0", lambda x, h: h.long(), "cells.0: Returning returned torch.int64, expected"),
        ("cells.0", lambda x, h: h * torch.nan, "cells: returned NaN or infinity"),
    ],
)
def test_what_a_part_may_not_return(part, returned, message):
    model, batch = model_and_batch()
    owner, _, name = part.rpartition(".")
    setattr(model.get_submodule(owner), name, Returning(returned))
    with pytest.raises(UserError, match=re.escape(message)):
        model(batch)


def test_weights_that_are_not_finite_are_named():
    model, batch = model_and_batch()
    model.encoder.head.linear.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"^encoder: returned NaN or infinity for standard normal data"):
        model(batch)


def test_a_gradient_that_would_be_lost_is_refused():
    model, batch = model_and_batch()
    outside, inner = nn.Parameter(torch.ones(())), model.phi_z.forward
    model.phi_z.forward = lambda z: inner(z) * outside
    with pytest.raises(UserError, match=r"^phi_z: reads a parameter of shape \(\) that is not its own"):
        model(batch)
    with torch.no_grad():
        model(batch)


def test_statistics_of_a_batch_are_refused_in_training():
    model, batch = model_and_batch()
    model.phi_x[1] = nn.BatchNorm1d(model.phi_x[0].out_features)
    with pytest.raises(UserError, match=r"^phi_x.1: statistics of a batch mix"):
        model.double()(batch)


class Noisy(nn.Module):
    """Dropout from torch's own generator."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head, self.drop = part, getattr(part, "head", None), nn.Dropout(0.5)
        self.out_features = getattr(part, "out_features", None)

    def forward(self, reads: Tensor) -> Tensor:
        return self.part(self.drop(reads))


@pytest.mark.parametrize("part", ["phi_x", "phi_z", "encoder", "prior"])
def test_a_parts_own_random_numbers_are_the_same_where_a_window_is_computed_again(part):
    """The gradient is that of the values: along it they change as it says."""
    model, batch = model_and_batch()
    setattr(model, part, Noisy(getattr(model, part)))
    model.checkpoint_every = 2
    noise = Noise(batch, [0, 1])

    def value() -> Tensor:
        torch.manual_seed(0)
        (log_px, kl), _ = model.collect(batch, noise, lambda trace: (trace.log_px, trace.kl))
        return log_px.sum() - kl.sum()

    value()  # the first pass is checked
    grads = torch.autograd.grad(value(), list(model.parameters()))
    step = 1e-6
    found = []
    for sign in (1, -2):
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.data.add_(grad, alpha=sign * step)
        found.append(value().detach())
    square = sum(grad.square().sum() for grad in grads)
    assert torch.isclose((found[0] - found[1]) / (2 * step), square, rtol=1e-5)


@pytest.mark.parametrize("part", ["decoder", "prior"])
def test_a_filter_is_not_trained_on_random_numbers_that_it_can_not_draw_twice(part):
    model, batch = model_and_batch()
    setattr(model, part, Noisy(getattr(model, part)))
    with pytest.raises(UserError, match=r"^decoder or prior: draws random numbers"):
        model.filter(batch, 3, Resampling(threshold=1.0))
    model.eval().filter(batch, 3, Resampling(threshold=1.0))


def test_a_prior_that_drops_units_by_chance_is_refused_for_a_residual_posterior():
    def prior(width):
        return nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Dropout(0.2))

    model, batch = (
        build_vrnn(3, 2, prior=prior, residual_posterior=True),
        SequenceBatch(torch.randn(2, 3, 3), torch.tensor([3, 2])),
    )
    with pytest.raises(UserError, match=r"prior.body.2: drops other units .* Fix: use MLPConfig"):
        model(batch)
    assert model.eval()(batch).log_px.isfinite().all()
