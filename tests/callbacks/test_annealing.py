"""The controller of the KL: signs, bounds, a plant of known gain, real fits, resumes."""

from __future__ import annotations

import csv
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from vrnn_lightning.datamodules.sines import Sines

from vrnn_lightning import MLPConfig, UserError, VRNNLightningModule
from vrnn_lightning.callbacks import ConstantKLWeight, ControlVAE, CyclicalKLAnnealing, LinearKLAnnealing


def fit(folder, *callbacks, latent=2, size=32, batch_size=4, ckpt_path=None, **options):
    """Train a small model; return it and its trainer."""
    seed_everything(1, verbose=False)
    layers = dict.fromkeys(("phi_x", "phi_z", "prior", "encoder", "decoder"), MLPConfig(16))
    optimizer = partial(torch.optim.Adam, lr=4e-3)
    model = VRNNLightningModule(3, latent_size=latent, hidden_size=16, optimizer=optimizer, **layers)
    logger = CSVLogger(folder, name="", version="")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "max_epochs": 1}
    usual = {"accelerator": "cpu", "num_sanity_val_steps": 0, "limit_val_batches": 0, **quiet}
    trainer = Trainer(default_root_dir=folder, logger=logger, callbacks=list(callbacks), **{**usual, **options})
    trainer.fit(model, Sines(train_size=size, val_size=4, steps=8, batch_size=batch_size), ckpt_path=ckpt_path)
    return model, trainer


def column(folder, name):
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_the_weight_is_the_paper_s_formula():
    """Kp / (1 + exp(e)) - Ki * sum of e + beta_min, as long as no bound is met."""
    control, errors = ControlVAE(2.0, kp=0.02, ki=0.01, beta_min=0.1, beta_max=9.0), []
    for kl in (7.0, 5.0, 2.5, 1.0, 1.9):
        control.observe(kl)
        errors.append(2.0 - kl)
        assert control.beta(0) == pytest.approx(0.02 / (1 + math.exp(errors[-1])) - 0.01 * sum(errors) + 0.1)


@pytest.mark.parametrize(("kl", "rises"), [(5.0, True), (1.0, False)])
def test_a_large_kl_raises_the_weight_and_a_small_one_lowers_it(kl, rises):
    control = ControlVAE(3.0)
    control.integral = 0.5
    weights = []
    for _ in range(5):
        control.observe(kl)
        weights.append(control.weight)
    assert weights == sorted(weights, reverse=not rises)
    assert len(set(weights)) == 5


@pytest.mark.parametrize("kl", [0.0, 100.0])
def test_at_a_bound_the_sum_does_not_wind_up(kl):
    """After any time at a bound, the weight leaves it with the first error of the other sign."""
    control = ControlVAE(10.0, kp=0.01, ki=0.01, beta_min=0.2, beta_max=1.0)
    for _ in range(1000):
        control.observe(kl)
        assert 0.2 <= control.weight <= 1.0
    held = control.weight
    assert held == pytest.approx(0.2 if kl < 10 else 1.0, abs=0.01)
    control.observe(10.0 - 4 * math.copysign(1, kl - 10))
    assert abs(control.weight - held) > 0.03


def test_an_error_of_any_size_is_taken():
    control = ControlVAE(5000.0)
    control.observe(0.0)
    assert control.weight == 0.0
    control.observe(1e6)
    assert control.weight == 10.0


@pytest.mark.parametrize("target", [0.3, 2.0])
def test_a_simulated_plant_comes_to_its_target(target):
    """A KL that follows log(4 / beta) with a lag, starting near nothing."""
    control, kl = ControlVAE(target, ki=0.005), 0.01
    for _ in range(4000):
        asked = max(0.0, math.log(4 / max(control.beta(0), 1e-3)))
        kl += 0.02 * (asked - kl)
        control.observe(kl)
    assert kl == pytest.approx(target, rel=0.01)
    assert control.weight == pytest.approx(4 * math.exp(-target), rel=0.05)


@pytest.mark.parametrize("target", [1.0, 3.0])
def test_a_fit_comes_to_its_target(tmp_path, target):
    fit(tmp_path, ControlVAE(target, ki=0.005), size=512, batch_size=32, max_epochs=20)
    kl, beta = column(tmp_path, "train/kl"), column(tmp_path, "train/beta")
    assert sum(kl[-60:]) / 60 == pytest.approx(target, rel=0.15)
    assert beta[0] == 0.0
    assert min(beta[-60:]) > 0


def test_every_step_s_weight_comes_of_the_kl_before(tmp_path):
    fit(tmp_path, ControlVAE(0.02, ki=0.1), max_epochs=2)
    control, weights = ControlVAE(0.02, ki=0.1), [0.0]
    for kl in column(tmp_path, "train/kl"):
        control.observe(kl)
        weights.append(control.weight)
    assert column(tmp_path, "train/beta") == pytest.approx(weights[:-1], rel=1e-5)
    assert len(set(weights)) > 8


class Calls(Callback):
    """Keeps the KL of every batch and the weight of every step."""

    def __init__(self):
        self.kls, self.betas = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.kls.append(trainer.callback_metrics["train/kl"].item())
        self.betas.append(pl_module.beta)


def test_accumulated_batches_are_one_step_of_control(tmp_path):
    calls, control = Calls(), ControlVAE(0.02, ki=0.1)
    fit(tmp_path, calls, ControlVAE(0.02, ki=0.1), accumulate_grad_batches=3)
    expected = []
    for start in range(0, 8, 3):
        kls = calls.kls[start : start + 3]
        expected += [control.weight] * len(kls)
        control.observe(sum(kls) / len(kls))
    assert calls.betas == pytest.approx(expected)
    assert len(set(expected)) == 3


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a resume into another folder, to compare the two
@pytest.mark.parametrize("step", [3, 8])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, step):
    def run(folder, ckpt=None):
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        return fit(folder, ControlVAE(0.02, ki=0.1), saver, max_epochs=2, ckpt_path=ckpt)[0]

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", tmp_path / "straight" / f"step={step}.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    for name in ("train/beta", "train/kl", "train/loss"):
        assert column(tmp_path / "resumed", name) == column(tmp_path / "straight", name)[step:]
    assert len(set(column(tmp_path / "resumed", "train/beta"))) > 5


def test_a_model_without_a_latent_is_refused_in_training_alone(tmp_path):
    with pytest.raises(UserError, match="latent_size 0"):
        fit(tmp_path, ControlVAE(1.0), latent=0)
    model, _ = fit(tmp_path, latent=0)
    Trainer(callbacks=[ControlVAE(1.0)], logger=False, enable_progress_bar=False, accelerator="cpu").validate(
        model, Sines(train_size=4, val_size=4, steps=4, batch_size=4), verbose=False
    )


def test_a_second_annealer_is_refused(tmp_path):
    with pytest.raises(UserError, match="ControlVAE and ConstantKLWeight"):
        fit(tmp_path, ControlVAE(1.0), ConstantKLWeight())


@pytest.mark.parametrize(
    "options",
    [
        {"target": 0.0},
        {"target": -1.0},
        {"target": math.nan},
        {"target": math.inf},
        {"target": 1.0, "kp": -1.0},
        {"target": 1.0, "ki": -1.0},
        {"target": 1.0, "ki": math.nan},
        {"target": 1.0, "beta_min": -1.0},
        {"target": 1.0, "beta_min": 1.0, "beta_max": 1.0},
    ],
)
def test_absurd_options_are_one_line(options):
    with pytest.raises(UserError) as error:
        ControlVAE(**options)
    assert len(str(error.value).splitlines()) == 1


def test_ramps_are_settled_at_their_end():
    assert [LinearKLAnnealing(10).settled(step) for step in (0, 9, 10, 11)] == [False, False, True, True]
    assert not CyclicalKLAnnealing(10).settled(3)
    assert ConstantKLWeight(50.0).settled(0)


def test_a_controller_is_settled_where_it_can_lower_no_more():
    control = ControlVAE(2.0)
    for _ in range(50):
        control.observe(10.0)
    assert not control.settled(50)
    for _ in range(1000):
        control.observe(0.001)
    assert control.settled(1050)
