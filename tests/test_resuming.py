"""Signals, locks, saves by the clock, optimiser states by name, requeued jobs; benchmarks/resume.py has long runs."""

from __future__ import annotations

import csv
import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vrnn_lightning import VRNNLightningModule
from vrnn_lightning.cli import main, processes
from vrnn_lightning.compatibility import OPTIMIZED
from vrnn_lightning.errors import UserError
from vrnn_lightning.files.locks import FolderLock
from vrnn_lightning.resuming import Interruption, Stopped, interruption, match_optimizer_states
from vrnn_lightning.tracking import RunCheckpoint

LAST = Path("runs/sines/version_0/checkpoints/last.ckpt")


def in_child(action) -> int:
    """Return the exit code of a forked process, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = action() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def holds(folder: Path) -> int:
    try:
        FolderLock(folder).acquire()
    except UserError as error:
        return 7 if "another run writes there. Fix: wait" in str(error) else 1
    return 0


@pytest.fixture(params=["lock", "ENOLCK", "ENOSYS"])
def kind(request, monkeypatch):
    """The system's lock, and that of file systems that have none."""

    def refuse(*_):
        raise OSError(getattr(errno, request.param), "No locks available")

    if request.param != "lock":
        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_folder_belongs_to_one_process_until_it_ends(tmp_path, kind):
    assert in_child(lambda: holds(tmp_path)) == 0
    lock = FolderLock(tmp_path)
    lock.acquire()  # the child is gone, and its lock with it
    assert in_child(lambda: holds(tmp_path)) == 7
    lock.release()
    assert not list(tmp_path.iterdir())
    assert in_child(lambda: holds(tmp_path)) == 0


def test_two_runs_never_share_a_folder(lightning, tiny):
    version = ("--trainer.logger.version", "mine")
    lock = FolderLock(Path("runs/sines/mine"))
    lock.acquire()
    child = in_child(lambda: main(["fit", "-c", str(tiny), *version, "--trainer.enable_progress_bar", "false"]))
    assert child == 1
    assert not Path("runs/sines/mine/metrics.csv").exists()
    lock.release()


def test_a_second_signal_ends_at_once():
    def twice() -> int:
        asked = Interruption()
        with asked.watching(signal.SIGTERM):
            asked.is_deferred = True
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.signum == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
        return 0

    assert in_child(twice) == -signal.SIGTERM


def test_a_signal_before_training_ends_the_command():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stopped, interruption.watching(signal.SIGINT):
        os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.code == 130
    assert not interruption.signum
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("command", "step"), [("test", "test_step"), ("predict", "predict_step")])
def test_test_and_predict_just_end(lightning, tiny, monkeypatch, command, step):
    assert lightning("fit", "-c", tiny).code == 0
    before = LAST.read_bytes()
    monkeypatch.setattr(VRNNLightningModule, step, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    said = lightning(command, "--ckpt_path", "last")
    assert said.code == 143
    assert said.err.splitlines()[-1] == "ended by SIGTERM"
    assert LAST.read_bytes() == before


def test_last_is_saved_by_the_clock(lightning, tiny, monkeypatch):
    saved = []
    save = RunCheckpoint._save_topk_checkpoint
    monkeypatch.setattr(
        RunCheckpoint,
        "_save_topk_checkpoint",
        lambda self, trainer, x: (saved.append((self.monitor, trainer.global_step)), save(self, trainer, x)),
    )
    assert lightning("fit", "-c", tiny, "--last.every", "0.001s", "--data.train_size", 12).code == 0
    assert [step for monitor, step in saved if monitor is None] == [1, 2, 3, 3]
    said = lightning("fit", "-c", tiny, "--last.every", "soon")
    assert said.code == 1
    assert "--last.every soon" in said.err


def test_optimiser_states_follow_their_parameters():
    module = VRNNLightningModule(num_features=2, latent_size=1, hidden_size=3)
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    names = [name for name, _ in module.named_parameters()]
    checkpoint = {"optimizer_states": [optimizer.state_dict()], OPTIMIZED: [names]}
    turned = torch.optim.Adam([dict(module.named_parameters())[name] for name in reversed(names)])
    match_optimizer_states(checkpoint, [names[::-1]])
    turned.load_state_dict(checkpoint["optimizer_states"][0])
    for parameter in module.parameters():
        assert torch.equal(turned.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    with pytest.warns(UserWarning, match=r"added.weight.*start without"):
        match_optimizer_states({**checkpoint, OPTIMIZED: [names]}, [[*names, "added.weight"]])


def test_a_requeued_job_continues_by_itself(lightning, tiny, folder, monkeypatch):
    (folder / "scontrol").write_text('#!/bin/sh\necho "$@" > requeued.txt\n')
    (folder / "scontrol").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    step, calls = VRNNLightningModule.training_step, []

    def signalled(*args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(*args)

    monkeypatch.setattr(VRNNLightningModule, "training_step", signalled)
    words = ("fit", "-c", tiny, "--trainer.max_epochs", 3)
    assert lightning(*words).code == 128 + signal.SIGUSR1
    assert Path("requeued.txt").read_text().split() == ["requeue", "41"]
    assert not list(folder.glob("hpc_ckpt*"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert lightning(*words).code == 0
    assert torch.load(LAST, weights_only=True)["global_step"] == 6
    assert len(calls) == 6
    assert lightning(*words).code == 0, "what is complete is not trained again"
    assert len(calls) == 6
    assert lightning(*words, "--data.seed", 1).code == 0, "another command of the job is another run"
    assert len(list(folder.glob("runs/sines/*"))) == 2


def test_the_first_cause_is_said_once(monkeypatch, capfd):
    finished = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    finished.wait()
    monkeypatch.setattr(processes, "list_children", lambda: [finished])
    monkeypatch.setattr(processes, "GRACE", 0.01)
    assert processes.end_without(RuntimeError("Connection closed by peer")) == 1
    assert "process 1 was killed by signal 9" in capfd.readouterr().err
    monkeypatch.setattr(processes, "is_first_cause", lambda: False)
    assert processes.end(1, "error: twice") == 1
    assert "twice" not in capfd.readouterr().err


def scores(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as lines:
        return [float(row["val/elbo"]) for row in csv.DictReader(lines) if row["val/elbo"]]


def test_a_save_by_step_waits_for_the_next_validation(lightning, tiny):
    words = (
        "fit",
        "-c",
        tiny,
        "--data.train_size",
        12,
        "--trainer.max_epochs",
        3,
        "--checkpoint.every_n_train_steps",
        2,
    )
    assert lightning(*words).code == 0
    best = torch.load(LAST.with_name("best.ckpt"), weights_only=True)
    assert best["global_step"] in (3, 6, 9), "after a validation, and not at step 2, 4 or 8"
    (state,) = [state for key, state in best["callbacks"].items() if "val/elbo" in key]
    assert state["best_model_score"].item() in scores(LAST.parents[1])


@pytest.mark.parametrize(
    "limit",
    [("--trainer.max_epochs", 3), ("--trainer.max_epochs", 5, "--trainer.max_steps", 9)],
    ids=["epochs", "steps"],
)
def test_the_last_checkpoint_of_a_run_that_saves_by_step_is_its_end(lightning, tiny, limit):
    """Whether or not the number of steps is a multiple of it, so that an interrupted run ends with the same file."""
    words = ("fit", "-c", tiny, "--data.train_size", 12, *limit, "--last.every_n_train_steps", 2)
    assert lightning(*words).code == 0
    assert torch.load(LAST, weights_only=True)["global_step"] == 9


def test_a_save_by_step_comes_before_the_end_that_a_signal_asks_for(lightning, tiny, monkeypatch):
    step = VRNNLightningModule.training_step

    def signalled(self, batch, number):
        if self.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number)

    monkeypatch.setattr(VRNNLightningModule, "training_step", signalled)
    saves = ("--checkpoint.every_n_train_steps", 2, "--checkpoint.save_top_k=-1", "--checkpoint.filename", "at{step}")
    words = ("fit", "-c", tiny, "--data.train_size", 12, "--checkpoint.monitor", "train/elbo", *saves)
    assert lightning(*words).code == 143
    assert (LAST.parent / "at2.ckpt").is_file()


def test_a_row_of_a_validation_between_accumulated_batches_is_kept(lightning, tiny, monkeypatch):
    more = ("--data.train_size", 24, "--trainer.accumulate_grad_batches", 2, "--trainer.val_check_interval", 0.5)
    words = ("fit", "-c", tiny, *more, "--trainer.max_epochs", 2)
    assert lightning(*words).code == 0
    step, calls = VRNNLightningModule.validation_step, []

    def signalled(*args):
        calls.append(args)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(VRNNLightningModule, "validation_step", signalled)
    assert lightning(*words).code == 143
    assert lightning(*words, "--ckpt_path", "last").code == 0
    runs = [Path("runs/sines") / version for version in ("version_0", "version_1")]
    assert runs[0].joinpath("metrics.csv").read_text() == runs[1].joinpath("metrics.csv").read_text()


def test_a_checkpoint_of_an_exception_says_that_its_batch_is_repeated(lightning, tiny, monkeypatch):
    words = ("fit", "-c", tiny, "--data.train_size", 20, "--trainer.max_epochs", 2)
    assert lightning(*words).code == 0
    step = VRNNLightningModule.training_step

    def broken(self, batch, number):
        if self.global_step == 7:
            raise UserError("broken")
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(VRNNLightningModule, "training_step", broken)
        assert lightning(*words, "--last.save_on_exception=true").code == 1
    with pytest.warns(UserWarning, match="within a batch, which is trained on again"):
        assert lightning(*words, "--ckpt_path", "runs/sines/version_1/checkpoints/last.ckpt").code == 0
    runs = [Path("runs/sines") / version for version in ("version_0", "version_1")]
    assert scores(runs[0]) == scores(runs[1])


@pytest.mark.parametrize(
    "record",
    [
        [],
        {"stage": "noon"},
        {"stage": "batch", "conditions": {}, "rows": None, "gradients": {"vrnn.phi_x.0.weight": torch.zeros(1, 3)}},
        {"stage": "batch", "conditions": {}, "rows": "all"},
    ],
    ids=str,
)
def test_a_record_that_is_not_ours_is_one_line(lightning, tiny, record):
    assert lightning("fit", "-c", tiny).code == 0
    found = torch.load(LAST, weights_only=True)
    found["loops"]["fit_loop"]["state_dict"]["resume"] = record
    torch.save(found, LAST)
    said = lightning("fit", "-c", tiny, "--ckpt_path", "last", "--trainer.max_epochs", 3)
    assert said.code == 1
    assert "Traceback" not in said.err
    assert "Fix: " in said.err.splitlines()[-1]
