"""Compiled, the model says what it says otherwise."""

from __future__ import annotations

import copy
import csv
import shutil

import pytest
import torch
from test_recurrence import assert_equal_terms, make_batch, make_model

from vrnn_lightning.heads import GaussianMixture
from vrnn_lightning.vrnn import trace

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")


@pytest.mark.parametrize("options", [{"emission": GaussianMixture, "residual_posterior": True}, {"latent": 0}], ids=str)
def test_equals_readable(options, monkeypatch):
    """What is traced; the code that is made of it is the next test's."""
    traced = torch.compile(trace._score, backend="aot_eager")
    monkeypatch.setattr(trace, "_compiled_score", lambda: traced)
    model = make_model(**options)
    names = list(model.state_dict())
    model.compiled = True
    assert_equal_terms(model, make_batch([6, 4, 1]))
    assert_equal_terms(copy.deepcopy(model), make_batch([5, 2]))
    assert list(model.state_dict()) == names


@needs_compiler
def test_it_is_an_option_of_the_run(lightning, tiny, folder):
    """The same losses with and without, and a checkpoint that says nothing of it."""
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        words = ["fit", "-c", tiny, "--seed_everything", 0, "--loop.compile", compiled]
        done = lightning(*words, "--trainer.default_root_dir", folder / name)
        assert done.code == 0, done.err
    plain, compiled = (next((folder / name).rglob("metrics.csv")) for name in ("plain", "compiled"))
    losses = [
        [float(row["train/loss"]) for row in csv.DictReader(file.open()) if row["train/loss"]]
        for file in (plain, compiled)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    kept = [torch.load(next((folder / name).rglob("last.ckpt")), weights_only=True) for name in ("plain", "compiled")]
    assert list(kept[0]["state_dict"]) == list(kept[1]["state_dict"])
    assert kept[0]["hyper_parameters"] == kept[1]["hyper_parameters"]


def test_without_a_compiler_a_line_says_so(lightning, tiny, monkeypatch, tmp_path):
    torch._dynamo.reset()  # of what this process has compiled
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no compiler")))
    said = lightning("fit", "-c", tiny, "--loop.compile", "true")
    assert said.code == 1
    line = said.err.strip().splitlines()[-1]
    assert line.startswith("error: loop.compile: torch.compile does not work here")
    assert "leave the option out" in line
