"""Several processes train as one does."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

OPTIONS = {
    "data": "Sines", "data.train_size": 13, "data.val_size": 5, "data.steps": 6, "data.min_steps": 1,
    "model.latent_size": 3, "model.objective": "ELBO", "model.objective.free_bits": 0.05, "model.hidden_size": 5,
    "trainer.precision": "64-true", "trainer.max_epochs": 2,
    "trainer.log_every_n_steps": 1, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false",
    "trainer.num_sanity_val_steps": 0, "samples.every_n_validations": 1, "seed_everything": 3,
}  # fmt: skip


def fit(folder: Path, **options: object) -> Path:
    """Run a fit in processes of its own; return the run's folder."""
    words = [f"--{k}={v}" for k, v in {**OPTIONS, **options, "trainer.default_root_dir": folder}.items()]
    done = subprocess.run(
        [sys.executable, "-m", "vrnn_lightning", "fit", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs" / "sines").iterdir()
    return run


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path):
    """Parameters, losses and figures, with a latent, free bits, ragged lengths and a last batch of one sequence."""
    one = fit(tmp_path / "one", **{"data.batch_size": 4})
    two = fit(tmp_path / "two", **{"data.batch_size": 2, "trainer.devices": 2, "trainer.strategy": "ddp"})
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (one, two)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-10, atol=1e-10, msg=name)
    for name in ("train/loss", "train/elbo", "val/elbo", "val/gap", "val/bits_per_dim"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-5), name


def test_two_processes_steer_the_kl_alike(tmp_path):
    """The controller's weight, and with it every gradient, is that of one process."""
    steered = {"trainer.callbacks+": "ControlVAE", "trainer.callbacks.target": 0.02, "trainer.callbacks.ki": 0.1}
    one = fit(tmp_path / "one", **steered, **{"data.batch_size": 4})
    two = fit(tmp_path / "two", **steered, **{"data.batch_size": 2, "trainer.devices": 2, "trainer.strategy": "ddp"})
    assert len(set(column(one, "train/beta"))) > 5
    for name in ("train/beta", "train/loss", "val/elbo"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-5), name


def test_two_processes_report_what_one_reports(tmp_path):
    """Bounds, errors and effective samples of a test; the last batch leaves one process without a sequence."""
    run = fit(tmp_path / "trained", **{"trainer.max_epochs": 1, "data.batch_size": 4})
    found = []
    for devices, size in ((1, 4), (2, 2)):
        words = [
            "test", f"--ckpt_path={run}/checkpoints/last.ckpt", "--data=Sines", f"--data.batch_size={size}",
            "--evaluation.samples=3", "--trainer.precision=64-true", "--trainer.accelerator=cpu",
            f"--trainer.devices={devices}", f"--trainer.strategy={'ddp' if devices > 1 else 'auto'}",
            f"--trainer.default_root_dir={tmp_path}",
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "vrnn_lightning", *words], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        rows = [line.split("│")[1:3] for line in done.stdout.splitlines() if line.count("│") == 3]
        found.append({name.strip(): float(value) for name, value in rows})
    assert {"test/iwae", "test/fivo_stderr", "test/fivo_effective_samples"} <= set(found[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
