"""What README and documentation show of the command line runs as it stands there, at a tiny size."""

from __future__ import annotations

import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from pages import COMMANDS, ROOT, block, write_files

from vrnn_lightning import cli
from vrnn_lightning.datamodules import local

FITS = [
    c.partition("lightning ")[2] for c in COMMANDS if "lightning fit" in c and "ddp" not in c and "init_from" not in c
]
TINY = [
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.enable_progress_bar=false",
    "--samples.every_n_validations=0",
    "--report=false",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with recordings, a table and the files that the pages write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "recordings").mkdir()
    for i in range(12):
        noise = 0.1 * np.random.default_rng(i).standard_normal(900)
        soundfile.write(f"recordings/a_{i}.wav", noise, 8000)
    rows = [f"2024-01-{1 + t // 24:02}T{t % 24:02}:00,s{s},{20 + s},50,{t % 24}" for s in range(3) for t in range(240)]
    (tmp_path / "sensors.csv").write_text("\n".join(["date,sensor,temperature,humidity,hour", *rows]))
    episodes = {f"{split}_lengths": np.array([60, 40]) for split in ("train", "valid", "test")}
    for split in ("train", "valid", "test"):
        episodes |= {f"{split}_{name}": noise[: 100 * n].reshape(100, n) for name, n in (("values", 8), ("targets", 1))}
    np.savez("episodes.npz", **episodes)
    write_files(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(local, "__path__", list(local.__path__))
    return tmp_path


@pytest.mark.parametrize("command", FITS)
def test_fit_commands(command, here):
    """In the order of the page; their checkpoints are tested as the page says."""
    assert cli.main([*shlex.split(command), *TINY]) == 0
    data = "Speech" if "speech" in command else "LinearGaussian" if "exact" in command else None
    for test in (c for c in COMMANDS if c.startswith("lightning test") and data and data in c):
        quick = ["--trainer.limit_test_batches=1", "--trainer.enable_progress_bar=false", "--evaluation.samples=4"]
        assert cli.main([*shlex.split(test)[1:], *quick]) == 0


def test_what_is_done_with_a_run(here):
    assert cli.main(["fit", "-c", "configs/synthetic.yaml", *TINY]) == 0
    then = [c for c in COMMANDS if c.startswith(("lightning predict", "lightning test")) or "init_from" in c]
    then = [c for c in then if "--data" not in c or "init_from" in c]  # test_predict backtests a table
    assert len(then) == 6
    for command in then:
        few = {"--prediction.samples": 3, "--prediction.steps": 5, "--evaluation.samples": 3} | (
            {} if "fit" in command else {"--data.batch_size": 4}
        )
        tiny = (
            TINY
            if "fit" in command
            else ["--trainer.enable_progress_bar=false", f"--trainer.limit_{command.split()[1]}_batches=1"]
        )
        tiny = [*tiny, *(f"{k}={v}" for k, v in few.items() if k in command or "batch" in k)]
        assert cli.main([*shlex.split(command)[1:], *tiny]) == 0


def test_the_datamodule_has_twenty_lines():
    code = [line for line in block("python", "# datamodules/walks.py").splitlines() if line.strip()]
    assert len(code) <= 20


def test_the_datamodule_keeps_every_promise(here):
    Path("test_walks.py").write_text(block("python", "# tests/test_walks.py"))
    found = runpy.run_path("test_walks.py")
    for check in found["CHECKS"]:
        found["test_walks"](check)


def test_the_test_command_is_the_one_that_ci_runs():
    command = next(c for c in COMMANDS if "pytest" in c).rpartition("&& ")[2]
    assert command in (ROOT / ".ci" / "run").read_text()
