"""Series that a function draws from a seed: what they share, and what each claims."""

from __future__ import annotations

import csv
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from vrnn_lightning.datamodules.bouncing_ball import BouncingBall
from vrnn_lightning.datamodules.double_pendulum import DoublePendulum
from vrnn_lightning.datamodules.hidden_markov import HiddenMarkov
from vrnn_lightning.datamodules.jumps import Jumps
from vrnn_lightning.datamodules.linear_gaussian import LinearGaussian
from vrnn_lightning.datamodules.lorenz import Lorenz
from vrnn_lightning.datamodules.sines import Sines
from vrnn_lightning.datamodules.spirals import Spirals
from vrnn_lightning.datamodules.stochastic_volatility import StochasticVolatility

from vrnn_lightning import UserError
from vrnn_lightning.batch import SequenceBatch, pad
from vrnn_lightning.heads import Pen
from vrnn_lightning.testing import CHECKS, changes_with_the_epoch_alone, pickles

CLASSES = (BouncingBall, DoublePendulum, Jumps, Lorenz, Spirals, StochasticVolatility)
EXACT = (Sines, LinearGaussian, HiddenMarkov)
SMALL = {"train_size": 17, "val_size": 6, "test_size": 7, "steps": 9, "min_steps": 2, "batch_size": 4}
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def stacked(data, split="train"):
    return torch.stack([s.x for s in data.split(split)]).double()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@every_class
def test_contract(cls, check):
    check(lambda **options: cls(**SMALL | options))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_where_each_epoch_is_fresh(check, window):
    check(lambda **options: Spirals(**SMALL | {"fresh": True, "window": window} | options))


@every_class
def test_a_seed_fixes_every_number(cls):
    one, same, other = (cls(**SMALL, seed=seed) for seed in (0, 0, 2**59))
    for split in ("train", "val", "test"):
        first = torch.cat([s.x for s in one.split(split)])
        assert torch.equal(first, torch.cat([s.x for s in same.split(split)]))
        assert not torch.equal(one.split(split)[0].x[:2], other.split(split)[0].x[:2])
    assert {len(s.x) for s in one.split("train")} <= set(range(2, 10))
    assert max(one.lengths("train")) > min(one.lengths("train"))


@pytest.mark.parametrize("cls", [*CLASSES, *EXACT], ids=lambda cls: cls.__name__)
def test_only_training_is_fresh_and_begins_as_the_fixed_set(cls):
    fixed, fresh = cls(**SMALL), cls(**SMALL, fresh=True)
    for split in ("train", "val", "test"):
        assert all(torch.equal(a.x, b.x) for a, b in zip(fixed.split(split), fresh.split(split), strict=True))
    assert not hasattr(fixed.split("train"), "in_epoch")
    later = [fresh.split("train").in_epoch(epoch)[0].x for epoch in (1, 2, 1)]
    assert torch.equal(later[0], later[2])
    assert not torch.equal(later[0], later[1])


@pytest.mark.parametrize("check", [changes_with_the_epoch_alone, pickles])
@pytest.mark.parametrize("cls", EXACT, ids=lambda cls: cls.__name__)
def test_contract_of_those_that_know_their_likelihood_where_each_epoch_is_fresh(cls, check):
    check(lambda: cls(**SMALL, fresh=True, **({} if cls is Sines else {"missing_rate": 0.2})))


@pytest.mark.parametrize("cls", [Jumps, *EXACT], ids=lambda cls: cls.__name__)
def test_fresh_sequences_have_the_same_law(cls):
    """Their mean log-likelihood is that of epoch 0, within errors; and they are other sequences."""
    data = cls(train_size=2000, val_size=1, test_size=1, steps=8, fresh=True)
    train = data.split("train")
    first, later = (data.exact_log_likelihood(pad(list(epoch))) for epoch in (train, train.in_epoch(3)))
    error = math.sqrt((first.var() + later.var()) / 2000)
    assert abs(first.mean() - later.mean()) < 4 * error
    assert abs(np.corrcoef(first, later)[0, 1]) < 0.1


@every_class
def test_a_sequence_of_one_step(cls):
    options = {"arms": 1} if cls is Spirals else {}
    data = cls(steps=1, train_size=3, val_size=1, test_size=1, **options)
    assert [tuple(s.x.shape) for s in data.split("train")] == [(1, data.num_features)] * 3
    assert torch.isfinite(data.scaler.std).all()


def test_a_resume_within_an_epoch_goes_on_with_its_draws(lightning, folder):
    """Windows that another process reads: losses of a run stopped in its second epoch are those of one that was not."""
    words = [
        "fit", "--data=Jumps", "--data.fresh=true", "--data.train_size=16", "--data.val_size=2", "--data.steps=9",
        "--data.window=5", "--data.num_workers=1", "--data.batch_size=4", "--data.min_steps=3",
        "--model.latent_size=2", "--model.hidden_size=4",
        "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
        "--samples.every_n_validations=0",
    ]  # fmt: skip

    def losses(run: str, *rest: str) -> list[str]:
        done = lightning(*words, f"--trainer.default_root_dir={run}", *rest)
        assert done.code == 0, done.err
        (metrics,) = (folder / run).rglob("metrics.csv")
        with metrics.open() as file:
            return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]

    whole = losses("whole", "--trainer.max_epochs=2")
    stop = len(whole) - 2
    assert losses("broken", f"--trainer.max_steps={stop}") == whole[:stop]
    (last,) = (folder / "broken").rglob("last.ckpt")
    assert losses("broken", "--trainer.max_epochs=2", "--trainer.max_steps=-1", f"--ckpt_path={last}") == whole


WRONG = [
    (cls, {option: value})
    for cls in CLASSES
    for option, value in [
        ("steps", 0), ("min_steps", 10), ("min_steps", 0), ("train_size", 0), ("val_size", -1), ("test_size", 0),
        ("batch_size", 0), ("num_workers", -1), ("window", 0), ("seed", -1),
    ]
] + [
    (BouncingBall, {"channels": 0}), (BouncingBall, {"speed": 2.1}), (BouncingBall, {"noise": float("nan")}),
    (DoublePendulum, {"interval": 0.0}), (DoublePendulum, {"max_angle": 181}), (DoublePendulum, {"noise": -0.1}),
    (Jumps, {"channels": 1}), (Jumps, {"memory": 1.1}), (Jumps, {"jump": 0.0}), (Jumps, {"noise": 0.0}),
    (Jumps, {"correlation": 1.0}),
    (Lorenz, {"channels": 4}), (Lorenz, {"interval": 1.5}), (Lorenz, {"noise": float("inf")}),
    (Spirals, {"arms": 0}), (Spirals, {"arms": 3}), (Spirals, {"turns": 21}), (Spirals, {"noise": -1}),
    (StochasticVolatility, {"channels": 0}), (StochasticVolatility, {"persistence": 1.0}),
    (StochasticVolatility, {"volatility": -1}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "wrong"), WRONG, ids=lambda part: getattr(part, "__name__", str(part)))
def test_an_option_out_of_range_is_named_in_one_line(cls, wrong):
    ((option, value),) = wrong.items()
    with pytest.raises(UserError, match=rf"^--data\.{option} {value}: \D+") as caught:
        cls(**SMALL | wrong)
    assert "\n" not in str(caught.value)


def lorenz(t, state):
    x, y, z = state
    return [10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z]


def pendulum(t, state):
    """Two weights of 1 kg on rods of 1 m: the Lagrangian's equations, solved for the accelerations."""
    a, b, u, v = state
    mass = np.array([[2, math.cos(a - b)], [math.cos(a - b), 1]])
    force = np.array([-(v**2) * math.sin(a - b) - 2 * 9.81 * math.sin(a), u**2 * math.sin(a - b) - 9.81 * math.sin(b)])
    return [u, v, *np.linalg.solve(mass, force)]


def solved(equation, start, times):
    return solve_ivp(equation, (0, times[-1]), start, t_eval=times, rtol=1e-10, atol=1e-10).y.T


@pytest.mark.parametrize("interval", [0.02, 0.05, 0.3])
def test_lorenz_follows_its_equation(interval):
    """From each step to the next, without noise, and from the first to the eighth."""
    data = Lorenz(steps=8, interval=interval, noise=0, train_size=3, val_size=1, test_size=1)
    for path in stacked(data).numpy():
        for now, then in pairwise(path):
            np.testing.assert_allclose(solved(lorenz, now, [interval])[0], then, atol=1e-3)
        times = interval * np.arange(8)
        np.testing.assert_allclose(solved(lorenz, path[0], times), path, atol=1e-2)


def test_lorenz_is_on_its_attractor_from_the_first_step_on():
    """Its known moments, at every step alike: x and y are centred, z has mean 23.55."""
    x = stacked(Lorenz(noise=0, steps=20, train_size=2000))
    assert (x.mean(0) - torch.tensor([0, 0, 23.55])).abs().max() < 1
    assert (x.std(0) - torch.tensor([7.92, 9.01, 8.62])).abs().max() < 0.7


def test_lorenz_shows_the_first_channels_under_noise():
    options = {"steps": 5, "train_size": 500, "val_size": 1, "test_size": 1}
    clean, one = stacked(Lorenz(noise=0, **options)), stacked(Lorenz(channels=1, noise=0.5, **options))
    assert (one - clean[..., :1]).std().item() == pytest.approx(0.5, rel=0.05)


def test_the_pendulum_follows_its_equation():
    """The first step tells both angles, and it begins at rest."""
    data = DoublePendulum(steps=30, noise=0, train_size=5, val_size=1, test_size=1)
    times = 0.05 * np.arange(30)
    for path in stacked(data).numpy():
        elbow, tip = path[:, :2], path[:, 2:] - path[:, :2]
        np.testing.assert_allclose(np.linalg.norm([elbow, tip], axis=-1), 1, rtol=1e-6)
        start = [math.atan2(elbow[0, 0], -elbow[0, 1]), math.atan2(tip[0, 0], -tip[0, 1]), 0, 0]
        upper, lower = solved(pendulum, start, times).T[:2]
        np.testing.assert_allclose(np.stack([np.sin(upper), -np.cos(upper)], 1), elbow, atol=1e-3)
        np.testing.assert_allclose(np.stack([np.sin(lower), -np.cos(lower)], 1), tip, atol=1e-3)


def test_the_pendulum_starts_below_its_largest_angle():
    x = stacked(DoublePendulum(steps=1, noise=0, max_angle=30, train_size=2000))
    angle = torch.atan2(x[..., 0], -x[..., 1]).rad2deg()
    assert angle.abs().max() < 30
    assert angle.std().item() == pytest.approx(30 / 3**0.5, rel=0.05)


def test_the_ball_bounces_where_small_steps_say():
    """Moved step by step, its velocity turned round at each wall that it meets."""
    checked = 0
    for path in stacked(BouncingBall(channels=3, speed=0.7, noise=0, train_size=20)).numpy():
        place, velocity = path[0].copy(), path[1] - path[0]
        if not math.isclose(np.linalg.norm(velocity), 0.7, rel_tol=1e-5):
            continue  # it met a wall at once
        checked += 1
        for expected in path[1:]:
            place = place + velocity
            for wall in (-1, 1):
                beyond = place * wall > 1
                place[beyond] = 2 * wall - place[beyond]
                velocity[beyond] *= -1
            np.testing.assert_allclose(place, expected, atol=1e-4)
    assert checked


def test_volatility_has_the_moments_it_claims():
    """E x^2 = exp(s/2) and E x^4 = 3 exp(2s), with s the stationary variance; squares remember, signs do not."""
    x = stacked(StochasticVolatility(persistence=0.8, volatility=0.3, steps=50, train_size=4000))
    s = 0.3**2 / (1 - 0.8**2)
    assert x.square().mean().item() == pytest.approx(math.exp(s / 2), rel=0.02)
    assert x.square().mean((0, 2)).numpy() == pytest.approx(math.exp(s / 2), rel=0.06)
    assert x.pow(4).mean().item() == pytest.approx(3 * math.exp(2 * s), rel=0.1)
    together = (x[:, 1:, 0].square() * x[:, :-1, 1].square()).mean().item()
    assert together == pytest.approx(math.exp(s * 1.8), rel=0.03)
    assert abs((x[:, 1:] * x[:, :-1]).mean().item()) < 0.02


@pytest.mark.parametrize(("arms", "steps"), [(1, 7), (2, 7), (3, 20)])
def test_spirals_lie_on_their_curve(arms, steps):
    """Distance from the middle grows evenly along each arm, by the same turn at each point."""
    data = Spirals(arms=arms, steps=steps, min_steps=steps - 2, turns=0.9, noise=0, train_size=8)
    for s in data.split("train"):
        x = s.x.double().numpy()
        points, ends = x[:, :2].cumsum(0), np.flatnonzero(x[:, 2]) + 1
        assert len(ends) == arms
        assert ends[-1] == len(x)
        for arm in np.split(points, ends[:-1]):
            radius = np.linalg.norm(arm, axis=1)
            assert 0.75 < radius[-1] < 1.25
            np.testing.assert_allclose(radius, radius[-1] * np.arange(1, len(arm) + 1) / len(arm), atol=1e-5)
            turn = np.diff(np.unwrap(np.arctan2(arm[:, 1], arm[:, 0])))
            np.testing.assert_allclose(np.abs(turn), 2 * math.pi * 0.9 / len(arm), atol=1e-3)


def test_a_pen_can_score_spirals():
    batch = next(iter(Spirals(**SMALL).train_dataloader()))
    Pen(4, 3).check(batch.x, batch.valid_mask)
    data = Spirals(train_size=300)
    offsets = data.scaler.scale(stacked(data))[..., :2]
    assert offsets.mean().item() == pytest.approx(0, abs=1e-6)
    assert offsets.std().item() == pytest.approx(1, abs=1e-3)


def jumps(**options):
    return Jumps(**SMALL | {"channels": 2, "steps": 6, "noise": 0.4, "memory": 0.7} | options)


def test_the_likelihood_of_jumps_is_the_sum_over_all_their_signs():
    """Each of the 2^T ways up and down makes the whole sequence one Gaussian."""
    data = jumps()
    batch = pad(list(data.split("val")))
    for sequence, found in zip(data.split("val"), data.exact_log_likelihood(batch), strict=True):
        x = sequence.x.double().numpy()
        steps = len(x)
        reach = np.tril(0.7 ** np.abs(np.arange(steps)[:, None] - np.arange(steps)))
        covariance = np.kron(reach @ reach.T, data.noise_covariance.numpy())
        ways = np.array(np.meshgrid(*[[-1, 1]] * steps)).reshape(steps, -1).T
        each = [multivariate_normal(np.kron(reach @ way, np.ones(2)), covariance).logpdf(x.ravel()) for way in ways]
        assert found.item() == pytest.approx(logsumexp(each) - steps * math.log(2), rel=1e-6)


def test_padding_changes_no_likelihood_of_jumps():
    data = jumps()
    batch = pad(list(data.split("val")))
    batch.x[~batch.mask] = 7.0
    alone = torch.cat([data.exact_log_likelihood(pad([s])) for s in data.split("val")])
    torch.testing.assert_close(data.exact_log_likelihood(batch), alone)


def test_the_density_of_a_jump_integrates_to_one():
    data = jumps(steps=2, min_steps=2)
    axis = torch.linspace(-4, 4, 161, dtype=torch.float64)
    step = torch.cartesian_prod(axis, axis)
    past = torch.tensor([0.8, 1.3], dtype=torch.float64).expand_as(step)
    both = SequenceBatch(torch.stack([past, step], 1), torch.full((len(step),), 2))
    first = SequenceBatch(past[:1, None], torch.ones(1, dtype=torch.int64))
    density = (data.exact_log_likelihood(both) - data.exact_log_likelihood(first)).exp()
    assert float(density.sum()) * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"noise": 1.0}, {"channels": 4, "correlation": 0.0, "memory": 1.0}])
def test_jumps_are_as_likely_as_their_entropy_says(options):
    """And what the best Gaussians lose is their own entropy less that."""
    data = Jumps(steps=20, train_size=2000, val_size=1, test_size=1, **options)
    batch = pad(data.split("train"))
    each = data.exact_log_likelihood(batch) / 20
    error = 3 * each.std().item() / 2000**0.5
    assert each.mean().item() == pytest.approx(-data.entropy, abs=error)
    x = batch.x.double()
    moves = (x - data.memory * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)).flatten(0, 1)
    for loss, covariance in ((data.gaussian_loss, torch.cov(moves.T)), (data.diagonal_loss, torch.diag(moves.var(0)))):
        fitted = multivariate_normal(moves.mean(0), covariance).logpdf(moves).mean()
        assert each.mean().item() - fitted == pytest.approx(loss, abs=0.02)


def test_what_a_gaussian_loses_of_jumps():
    data = Jumps()
    assert data.gaussian_loss == pytest.approx(1.132, abs=1e-3)
    assert data.diagonal_loss == pytest.approx(4.541, abs=1e-3)
    assert jumps(jump=0.001).gaussian_loss == pytest.approx(0, abs=1e-5)
    wide = Jumps(jump=100.0, noise=0.01)  # well apart, the sign is known for certain
    assert wide.entropy == pytest.approx(math.log(2) + 0.5 * torch.logdet(2 * math.pi * math.e * wide.noise_covariance))


@pytest.mark.parametrize("cls", CLASSES + EXACT, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("option", ["steps", "train_size", "val_size", "test_size"])
def test_sizes_are_bounded_before_anything_is_allocated(cls, option):
    with pytest.raises(UserError, match=rf"--data.{option} {10**30}: must be below 2\^31"):
        cls(**{option: 10**30})
    with pytest.raises(UserError, match=r"--data.\w+_size \d+ x --data.steps \d+ x \d+ features: takes .* GB. Fix:"):
        cls(**{option: 2**31 - 1})


def test_a_width_is_bounded():
    for cls in (BouncingBall, Sines, HiddenMarkov, LinearGaussian):
        with pytest.raises(UserError, match=r"--data\.\w+ .*: (must be below 2\^31|takes .* GB)"):
            cls(channels=10**30)
