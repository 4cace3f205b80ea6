"""Prediction tasks: each knows its options, and one of a user's own is named by its class path."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from vrnn_lightning import UserError
from vrnn_lightning.callbacks import Predictions
from vrnn_lightning.callbacks.predictions import TaskName
from vrnn_lightning.callbacks.tasks import TASKS, Task

OWN = '''
import torch
from vrnn_lightning.callbacks.tasks import Task

class LengthsToAPower(Task):
    """The number of steps of each sequence, to a power."""

    name = "lengths"

    def __init__(self, *, power: float = 1.0, shown: int = 1) -> None:
        super().__init__(shown=shown)
        self.power = power

    def make(self, module, batch, real, outputs):
        for i in real:
            truth = self.truth(module, batch, i)
            yield self.predict(batch, i, torch.full((len(truth), 1), len(truth) ** self.power), {"real": truth})
'''


def test_every_name_is_a_task_and_every_option_an_option_of_the_command_line():
    """With a help text that names the task and its default."""
    assert set(TASKS) == set(TaskName.__args__)
    flags = inspect.signature(Predictions).parameters
    parser = ArgumentParser()
    parser.add_class_arguments(Predictions, "prediction")
    described = " ".join(parser.format_help().rpartition("--prediction CONFIG")[2].split())
    for name, task in TASKS.items():
        assert task.name == name
        for option, parameter in inspect.signature(task).parameters.items():
            assert parameter.kind == parameter.KEYWORD_ONLY
            assert option in flags, f"{name} {option}"
            text = described.partition(f"--prediction.{option} ")[2].partition(" --prediction.")[0]
            assert f"{name}: " in text or f"{name}, " in text, f"{name} {option}"
            assert parameter.default is None or f"Default {parameter.default}. " in text, f"{name} {option}"


def test_an_option_of_another_task_names_its_owners():
    with pytest.raises(UserError, match=r"stride 3: is not an option .* impute. Fix: leave it out or choose forecast$"):
        Predictions("impute", stride=3)
    with pytest.raises(
        UserError, match=r"prediction\.power 3: is not an option of the task impute. Fix: leave it out$"
    ):
        Predictions("impute", options={"power": 3})


def test_a_task_of_ones_own_is_named_by_its_class_path(lightning, tiny):
    Path("own_tasks.py").write_text(OWN)
    assert lightning("fit", "-c", tiny).code == 0
    words = ("predict", "--ckpt_path", "best", "--prediction.task", "own_tasks.LengthsToAPower")
    said = lightning(*words, "--prediction.options", '{"power": 2}')
    assert said.code == 0, said.err
    assert "lengths: " in said.out
    (path,) = Path("runs").rglob("predictions/lengths/test.npz")
    with np.load(path) as found:
        assert (found["test_values"] == 25).all()
        assert (found["test_lengths"] == 5).all()
    assert path.with_suffix(".csv").is_file()
    assert path.with_suffix(".png").is_file()
    said = lightning(*words, "--prediction.steps", 3)
    assert said.code == 1
    line = "prediction.steps 3: is not an option of the task lengths. Fix: leave it out or choose sample or forecast"
    assert said.err.strip().splitlines()[-1] == f"error: {line}"
    for name in ("os.path", "own_tasks.Missing", "torch.nn.Linear"):
        said = lightning(*words[:-1], name)
        assert said.code == 2
        assert said.err.strip().splitlines()[-1].startswith(f"error: --prediction.task {name}: ")


def test_a_task_needs_a_way_to_make():
    with pytest.raises(TypeError, match="abstract"):
        Task()
