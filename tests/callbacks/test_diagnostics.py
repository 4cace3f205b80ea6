"""Warnings of a collapsed latent and of exploding gradients: they come where they should, once, and nowhere else."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from vrnn_lightning.datamodules.sines import Sines

from vrnn_lightning import MLPConfig, UserError, VRNNLightningModule
from vrnn_lightning.callbacks import ConstantKLWeight, ControlVAE, Diagnostics, GradientNorms, LinearKLAnnealing


def fit(folder, *callbacks, latent=2, epochs=1, size=256, batch_size=16, ckpt_path=None, **options):
    """Train a small model; return it and its trainer."""
    seed_everything(1, verbose=False)
    layers = dict.fromkeys(("phi_x", "phi_z", "prior", "encoder", "decoder"), MLPConfig(16))
    optimizer = partial(torch.optim.Adam, lr=4e-3)
    model = VRNNLightningModule(3, latent_size=latent, hidden_size=16, optimizer=optimizer, **layers)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    usual = {"accelerator": "cpu", "num_sanity_val_steps": 1, "logger": False, "log_every_n_steps": 1, **quiet}
    trainer = Trainer(default_root_dir=folder, callbacks=list(callbacks), max_epochs=epochs, **{**usual, **options})
    trainer.fit(model, Sines(train_size=size, val_size=32, steps=8, batch_size=batch_size), ckpt_path=ckpt_path)
    return model, trainer


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("vrnn_lightning")]


def test_a_collapse_is_said_once_with_what_to_try(tmp_path, caplog):
    fit(tmp_path, ConstantKLWeight(50.0), Diagnostics(), epochs=8)
    (line,) = lines(caplog)
    assert line.startswith("warning: the latent collapses: val/kl is ")
    assert "at beta 50, below 0.01 in 5 validations in a row" in line
    assert "0 of 2 latent dimensions are active" in line
    for fix in ("LinearKLAnnealing", "--model.objective.free_bits", "ControlVAE", "smaller weight", "IWAE", "decoder"):
        assert fix in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("annealer", "epochs"),
    [(LinearKLAnnealing(32, end=50.0), 2), (ConstantKLWeight(50.0), 2), (ControlVAE(2.0), 3)],
    ids=["annealing ends late", "patience", "controller"],
)
def test_no_collapse_is_said_too_early(tmp_path, caplog, annealer, epochs):
    threshold = 1e3 if isinstance(annealer, LinearKLAnnealing) else 0.01
    fit(tmp_path, annealer, Diagnostics(min_kl=threshold, patience=3 if epochs == 2 else 1), epochs=epochs)
    assert lines(caplog) == []


def test_validations_count_from_the_end_of_the_annealing(tmp_path, caplog):
    watch = Diagnostics(min_kl=1e3, patience=9)
    fit(tmp_path, LinearKLAnnealing(32), watch, epochs=4)
    assert watch.low == 3


@pytest.mark.parametrize(
    ("options", "latent"), [({"min_kl": 0.0}, 2), ({"min_kl": 1e3}, 0)], ids=["switched off", "no latent"]
)
def test_there_is_no_collapse_where_none_is_looked_for(tmp_path, caplog, options, latent):
    fit(tmp_path, ConstantKLWeight(50.0), Diagnostics(patience=1, **options), latent=latent, epochs=3)
    assert lines(caplog) == []


def test_a_latent_that_comes_back_starts_the_count_anew():
    watch, model = Diagnostics(patience=9), SimpleNamespace(vrnn=SimpleNamespace(latent_size=2), beta=1.0)
    for kl, count in ((0.001, 1), (0.001, 2), (0.5, 0), (0.001, 1)):
        watch.on_validation_end(fake(**{"val/kl": kl}), model)
        assert watch.low == count


class Jump(Callback):
    """Sets a learning rate from some step on."""

    def __init__(self, step, lr):
        self.step, self.lr = step, lr

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.optimizers[0].param_groups[0]["lr"] = self.lr


def test_an_explosion_is_said_once_with_what_to_try(tmp_path, caplog):
    watch = Diagnostics(min_kl=0.0, window=40)
    fit(tmp_path, Jump(48, 1.0), watch, epochs=5)
    (line,) = lines(caplog)
    assert line.startswith("warning: the gradient explodes: train/grad_norm is ")
    assert "in 3 of the last 40 steps it was more than 50 times its running median" in line
    assert "lower learning rate" in line
    assert "--trainer.gradient_clip_val " in line
    assert "min_std" in line
    assert "\n" not in line


@pytest.mark.parametrize("annealer", [LinearKLAnnealing(64), ControlVAE(1.0)], ids=lambda a: type(a).__name__)
def test_a_healthy_run_is_silent(tmp_path, caplog, annealer):
    watch = Diagnostics(window=40)
    fit(tmp_path, annealer, watch, epochs=10)
    assert lines(caplog) == []
    assert len(watch.norms) == 40


def fake(step=0, clip=None, **metrics):
    """What the callback sees of a trainer."""
    figures = {"val/active_units": 0.0, **metrics}
    return SimpleNamespace(
        global_step=step,
        callback_metrics={name: torch.tensor(float(value)) for name, value in figures.items()},
        callbacks=[],
        is_global_zero=True,
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
        gradient_clip_val=clip,
    )


def feed(watch, norms, clip=None, start=0):
    for step, norm in enumerate(norms, start + 1):
        watch.on_train_batch_end(fake(step, clip, **{"train/grad_norm": norm}), None, None, None, 0)


@pytest.mark.parametrize(
    ("norms", "said"),
    [
        ([1.0] * 60 + [100.0] * 3, 1),
        ([1.0] * 60 + [100.0] * 20, 1),
        ([1.0] * 60 + [100.0] * 2, 0),
        ([1.0] * 60 + ([100.0] + [1.0] * 20) * 10, 0),
        ([1.0] * 60 + [40.0] * 30, 0),
        ([1000.0, 1.0, 0.01] * 5 + [1.0] * 30, 0),
        ([1.0] * 10 + [1e6] * 5 + [1.0] * 60, 0),
        ([1.0] * 60 + [float("inf")] * 5, 0),
    ],
    ids=["three", "many", "two", "rare", "below", "start", "burn-in", "skipped"],
)
def test_what_counts_as_an_explosion(caplog, norms, said):
    feed(Diagnostics(window=40), norms)
    assert len(lines(caplog)) == said


@pytest.mark.parametrize(
    ("clip", "part"),
    [
        (None, "lower learning rate (--model.optimizer.lr), --trainer.gradient_clip_val 25 or a larger"),
        (1000.0, "--trainer.gradient_clip_val 25 (now 1000) or a larger"),
        (5.0, "lower learning rate (--model.optimizer.lr) or a larger"),
    ],
)
def test_the_clipping_to_try_comes_of_the_median(caplog, clip, part):
    feed(Diagnostics(window=40), [12.345] * 40 + [1e4] * 3, clip)
    (line,) = lines(caplog)
    assert part in line


def test_a_checkpoint_keeps_what_was_seen_and_said(caplog):
    """A run stopped anywhere and resumed says what the uninterrupted one says."""
    norms = [1.0] * 60 + [100.0] * 20
    for stop in (30, 61, 62, 63, 70):
        caplog.clear()
        first, second = Diagnostics(window=40), Diagnostics(window=40)
        feed(first, norms[:stop])
        second.load_state_dict(first.state_dict())
        second.on_train_start(fake(stop), None)
        feed(second, norms[stop:], start=stop)
        assert len(lines(caplog)) == 1


def test_a_resumed_fit_does_not_repeat_itself(tmp_path, caplog):
    _, trainer = fit(tmp_path, Diagnostics(min_kl=1e3, patience=1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["Diagnostics"]["warned"] == ["latent"]
    fit(tmp_path, Diagnostics(min_kl=1e3, patience=1), epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert len(lines(caplog)) == 1


def test_training_is_the_same_with_and_without(tmp_path):
    plain, _ = fit(tmp_path)
    watched, _ = fit(tmp_path, Diagnostics(min_kl=1e3, patience=1, window=6))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_accumulated_batches_are_one_norm(tmp_path):
    watch = Diagnostics()
    fit(tmp_path, watch, accumulate_grad_batches=4)
    assert len(watch.norms) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"min_kl": -1.0},
        {"patience": 0},
        {"max_ratio": -1.0},
        {"max_ratio": 0.5},
        {"window": 2},
        {"min_kl": float("nan")},
    ],
)
def test_absurd_options_are_one_line(options):
    (name,) = options
    with pytest.raises(UserError, match=f"diagnostics.{name}"):
        Diagnostics(**options)


def test_every_command_has_it_and_it_speaks_on_stderr(tiny, lightning):
    """In a process of its own: pytest takes the log for itself."""
    words = ("fit", "-c", tiny, "--diagnostics.min_kl=1e3", "--diagnostics.patience=1", "--trainer.max_epochs=2")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-m", "vrnn_lightning", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [line[:31] for line in done.stderr.splitlines() if "latent" in line] == ["warning: the latent collapses: "]
    assert "min_kl: 1000.0" in Path("runs/sines/version_0/config.yaml").read_text()
    for command in ("validate", "test", "predict"):
        said = lightning(command, "-c", "runs/sines/version_0/config.yaml", "--ckpt_path", "last")
        assert said.code == 0, said.err
        assert "collapses" not in said.err
    assert "--diagnostics.max_ratio MAX_RATIO" in lightning("fit", "--help").out


class Gradients(Callback):
    """Keeps each step's gradient by network, as the optimiser gets it."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        vrnn = module.vrnn
        parts = {name: list(part.parameters()) for name, part in vrnn.named_children() if list(part.parameters())}
        self.steps.append({name: torch.cat([p.grad.flatten() for p in of]).clone() for name, of in parts.items()})


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 1e-3}])
def test_the_norms_of_the_networks_make_up_the_gradients(tmp_path, options):
    every, seen, logger = 2, Gradients(), CSVLogger(tmp_path)
    fit(tmp_path, seen, GradientNorms(), latent=2, size=96, epochs=3, logger=logger, log_every_n_steps=every, **options)
    logger.save()
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/grad_norm"]]
    taken = 6 if "accumulate_grad_batches" in options else 18
    assert [int(row["step"]) for row in rows] == list(range(1, taken, every))
    assert set(seen.steps[0]) == {"phi_x", "phi_z", "prior", "encoder", "decoder", "cells"}
    for row in rows:
        gradients = seen.steps[int(row["step"])]
        for name, gradient in gradients.items():
            assert float(row[f"train/grad_norm/{name}"]) == pytest.approx(gradient.norm().item(), rel=1e-5), name
        squares = sum(float(row[f"train/grad_norm/{name}"]) ** 2 for name in gradients)
        assert squares == pytest.approx(float(row["train/grad_norm"]) ** 2, rel=1e-5)


def test_norms_are_computed_where_they_are_logged_and_nowhere_else(tmp_path, monkeypatch):
    counted = []
    whole = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda of: counted.append(len(of)) or whole(of))
    for every, extra in ((4, 4 * 6), (0, 0)):
        counted.clear()
        fit(tmp_path, GradientNorms(), size=256, log_every_n_steps=every)
        assert len(counted) == 16 + extra  # the module's own in each of 16 steps; six networks in every fourth


def test_a_network_without_a_gradient_has_the_norm_zero(tmp_path):
    class Freeze(Callback):
        def on_train_start(self, trainer, module):
            module.vrnn.prior.requires_grad_(False)

    _, trainer = fit(tmp_path, Freeze(), GradientNorms())
    norms = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("train/grad_norm")}
    assert norms.pop("train/grad_norm/prior") == 0
    total = norms.pop("train/grad_norm")
    assert sum(norm**2 for norm in norms.values()) == pytest.approx(total**2, rel=1e-5)
