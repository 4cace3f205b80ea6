"""Fixtures of all tests."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from vrnn_lightning.cli import main
from vrnn_lightning.datamodules import local

TINY = """
trainer: {accelerator: cpu, max_epochs: 1, log_every_n_steps: 1, enable_model_summary: false}
model:
  latent_size: 2
  hidden_size: 4
  phi_x: {width: 4, depth: 1}
  phi_z: {width: 4, depth: 1}
  prior: {width: 4, depth: 1}
  encoder: {width: 4, depth: 1}
  decoder: {width: 4, depth: 1}
data:
  class_path: Sines
  init_args: {train_size: 8, val_size: 4, test_size: 4, steps: 5, batch_size: 4}
samples: {every_n_validations: 0}
report: false
"""


SLOW = set(Path(__file__).with_name("slow.txt").read_text().split())
"""Tests of a second and more, as ``pytest --durations=0`` finds them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests."""
    for item in items:
        if f"{item.path.name}::{item.name.partition('[')[0]}" in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes and long texts by their argument: some hold a time, which differs between workers."""
    return argname if isinstance(val, bytes) or (isinstance(val, str) and len(val) > 80) else None


class Said(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is remembered of data out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what commands change in this process is put back afterwards.

    Imported modules stay: jsonargparse resolves short names among all classes that this process ever saw. So a test's
    own classes and modules have names that no other test gives to something else.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(local, "__path__", list(local.__path__))
    environment = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(environment)
    os.environ.pop("WANDB_SERVICE", None)  # a service that the test may have ended


@pytest.fixture
def lightning(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The command line in an empty working directory."""

    def run(*words: object) -> Said:
        capfd.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture
def tiny(folder: Path) -> Path:
    """A config that trains in a moment."""
    config = folder / "tiny.yaml"
    config.write_text(TINY)
    return config
