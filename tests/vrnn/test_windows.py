"""Long sequences: passes in windows, recomputed windows, and states carried from window to window."""

from __future__ import annotations

import csv
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_objectives
import test_recurrence
import torch

from vrnn_lightning import UserError
from vrnn_lightning.filtering import Resampling
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import ELBO, FIVO, IWAE
from vrnn_lightning.recurrence import memory

SEEDS = [0, 1, 2]
OPTIONS = {
    "plain": {},
    "LSTM": {"cell": "lstm", "layers": 2, "dropout": 0.3},
    "everything": test_recurrence.OPTIONS["all"],
    "no latent": {"latent": 0},
}


def evaluated(objective, model, batch, carried=None):
    return objective(model, batch, Noise(batch, SEEDS), 0.7, lambda x: x, carried)


@pytest.mark.parametrize("size", [1, 4, 6])
@pytest.mark.parametrize(
    "objective", [ELBO(balance=0.3), IWAE(3), FIVO(3, threshold=0.9)], ids=["ELBO", "IWAE", "FIVO"]
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_recomputed_windows_change_no_value_and_no_gradient(options, objective, size):
    model, batch = test_objectives.make(**options)
    whole = evaluated(objective, model, batch)
    model.checkpoint_every = size
    parts = evaluated(objective, model, batch)
    for a, b in ((whole.value, parts.value), (whole.log_px, parts.log_px), (whole.kl, parts.kl)):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole.carried.trajectories.state.h, parts.carried.trajectories.state.h)
    for a, b in zip(
        test_recurrence.gradients(model, whole.value[None]),
        test_recurrence.gradients(model, parts.value[None]),
        strict=True,
    ):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", [None, Resampling("systematic", 0.9)], ids=["never", "systematic"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_evaluation_in_windows_is_exact(options, rule, monkeypatch):
    """Trace and filter, of windows of 2 steps and of all six at once."""
    model, batch = test_objectives.make(**options)
    model.eval()
    found = []
    for size in (6, 2):
        monkeypatch.setattr("vrnn_lightning.vrnn.model.MAX_WINDOW", size)
        monkeypatch.setattr("vrnn_lightning.vrnn.model.MAX_FILTER_WINDOW", size)
        with torch.no_grad():
            trace = model.trace(batch, Noise(batch, SEEDS))
            filtered = model.filter(batch, 4, rule, Noise(batch, SEEDS))
        terms = [trace.log_px, trace.kl, trace.log_ratio, trace.z * batch.mask[..., None], *trace.state]
        found.append([*terms, *filtered[:4], *filtered.state])
    for a, b in zip(*found, strict=True):
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", [ELBO(), IWAE(3), FIVO(3, threshold=0.0)], ids=["ELBO", "IWAE", "FIVO"])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["LSTM"]], ids=["plain", "LSTM"])
def test_what_is_carried_joins_windows_to_a_sequence(options, objective):
    """The values of the windows add up to the sequence's: the likelihood of each, given all before."""
    model, batch = test_objectives.make(**options)
    whole, carried, total = evaluated(objective, model, batch), None, 0.0
    for first in (0, 2, 4):
        window = batch.window(first, first + 2)
        found = evaluated(objective, model, window, carried)
        total, carried = total + found.value, found.carried.reset_rows(torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(total, whole.value, rtol=1e-12, atol=1e-12)


def test_a_stream_starts_anew_where_a_sequence_begins():
    model, batch = test_objectives.make()
    carried = evaluated(IWAE(3), model, batch).carried.reset_rows(torch.tensor([False, True, False]))
    state, log_weights = carried.trajectories
    assert not state.h.requires_grad
    assert (state.h[[1, 4, 7]] == 0).all()
    assert (state.h[[0, 2, 3]] != 0).any()
    torch.testing.assert_close(log_weights[:, 1].exp(), torch.full((3,), 1 / 3).double())
    assert (log_weights[:, 0].exp() - 1 / 3).abs().max() > 1e-3


def test_a_choice_can_not_be_weighed_by_what_is_not_kept():
    model, batch = test_objectives.make()
    model.checkpoint_every = 2
    with pytest.raises(UserError, match=r"loop\.checkpoint_every"):
        evaluated(FIVO(3, "multinomial", resampling_gradient=True), model, batch)


def test_recomputed_windows_leave_nothing_behind(monkeypatch):
    """While a loss, and with it the whole graph, lives on, no window keeps what it held on its way back."""
    monkeypatch.setattr(memory, "SMALL", 0)
    lent, loans = [], []

    def finalize(*args):
        loans.append(weakref.finalize(*args))
        return loans[-1]

    monkeypatch.setattr(memory, "weakref", SimpleNamespace(finalize=finalize))
    for steps in (20, 80):
        monkeypatch.setattr(memory, "_pool", memory._Pool())
        loans.clear()
        model, batch = test_recurrence.make_model(), test_recurrence.make_batch([steps] * 3)
        model.checkpoint_every = 10
        found = evaluated(ELBO(), model, batch)
        found.value.backward()
        lent.append(sum(loan.alive for loan in loans))
    assert memory._pool._asked == len(loans) > 0
    assert lent[1] <= lent[0] + 8


def test_memory_is_used_again_when_the_last_view_is_gone(monkeypatch):
    monkeypatch.setattr(memory, "_pool", memory._Pool())
    cpu, whole = torch.device("cpu"), memory.empty((400, 300), torch.float32, torch.device("cpu"))
    place, view = whole.data_ptr(), whole[200:].T
    del whole
    other = memory.empty((400, 300), torch.float32, cpu)
    assert other.data_ptr() != place
    del view
    assert memory.empty((300, 390), torch.float32, cpu).data_ptr() == place
    memory.empty((300, 390), torch.float64, cpu)
    for _ in range(2 * memory.PATIENCE):
        memory.empty((2, 2**15), torch.float32, cpu)
    assert len(memory._pool._free) + len(memory._pool._returned) == 1  # what nobody asked for was given back


STREAMS = [
    "--data", "Sines", "--data.train_size", "7", "--data.val_size", "3", "--data.steps", "20", "--data.min_steps", "3",
    "--data.window", "4", "--data.batch_size", "2", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1",
    "--trainer.enable_progress_bar", "false", "--samples.every_n_validations", "0", "--model.hidden_size", "5",
    "--model.latent_size", "2", "--trainer.precision", "64-true",
]  # fmt: skip


def losses(folder: Path) -> list[str]:
    (run,) = (folder / "runs" / "sines").iterdir()
    with (run / "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize("objective", ["ELBO", "FIVO"])
def test_streams_train_and_go_on_where_they_stopped(lightning, folder, objective):
    """In the middle of an epoch too: the states of the streams are in the checkpoint."""
    words = [*STREAMS, "--model.objective", objective, "--trainer.max_epochs", "2"]
    whole, broken = folder / "whole", folder / "broken"
    assert lightning("fit", *words, "--trainer.default_root_dir", whole).code == 0
    stopped = [*words, "--trainer.default_root_dir", broken]
    done = lightning("fit", *stopped, "--trainer.max_steps", 5)
    assert done.code == 0, done.err
    last = next(broken.rglob("last.ckpt"))
    assert "carried" in torch.load(last, weights_only=True)
    done = lightning("fit", *stopped, "--trainer.max_steps", -1, "--ckpt_path", last)
    assert done.code == 0, done.err
    assert len(losses(whole)) > 12
    assert losses(broken) == losses(whole)


def test_recomputing_is_an_option_of_the_run(lightning, folder):
    """The same losses with and without; a checkpoint says nothing of it; absurd values are refused."""
    words = [word for word in STREAMS if word not in ("--data.window", "4")]
    words += ["--trainer.max_epochs", "1"]
    for name, more in (("kept", ()), ("recomputed", ("--loop.checkpoint_every", 3))):
        done = lightning("fit", *words, "--trainer.default_root_dir", folder / name, *more)
        assert done.code == 0, done.err
    kept, recomputed = ([float(x) for x in losses(folder / name)] for name in ("kept", "recomputed"))
    assert recomputed == pytest.approx(kept, rel=1e-9)
    said = lightning("fit", *words, "--loop.checkpoint_every", 0)
    assert said.code == 1
    assert "loop.checkpoint_every 0" in said.err
