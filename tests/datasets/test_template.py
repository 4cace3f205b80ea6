"""The template keeps the contract, knows its density, and works when it is copied."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from vrnn_lightning.testing import CHECKS

SOURCE = Path(__file__).parents[2] / "docs" / "mydata.py"
sys.path.append(str(SOURCE.parent))
from mydata import MyData  # noqa: E402  # after the path is set


def make(**options) -> MyData:
    return MyData(**{"num_sequences": 30, "num_steps": 6} | options)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, window):
    check(lambda **options: make(window=window, **options))


def test_exact_log_likelihood_is_the_joint_gaussian():
    datamodule = make(batch_size=4)
    datamodule.setup("test")
    batch = next(iter(datamodule.test_dataloader()))
    steps = np.arange(datamodule.num_steps)
    covariance = datamodule.memory ** np.abs(steps[:, None] - steps) / (1 - datamodule.memory**2)
    mean, std = float(datamodule.scaler.mean), float(datamodule.scaler.std)
    scaled = multivariate_normal((0 - mean) / std * np.ones(len(steps)), covariance / std**2)
    expected = scaled.logpdf(batch.x[..., 0].double().numpy())
    np.testing.assert_allclose(datamodule.exact_log_likelihood(batch).numpy(), expected, rtol=1e-4)


def test_padding_changes_no_likelihood():
    datamodule = make()
    datamodule.setup("test")
    batch = next(iter(datamodule.test_dataloader()))
    exact = datamodule.exact_log_likelihood(batch)
    batch.x = torch.nn.functional.pad(batch.x, (0, 0, 0, 3))
    torch.testing.assert_close(datamodule.exact_log_likelihood(batch), exact)


def test_seeds_draw_different_data():
    one, other = make(seed=0).split("train"), make(seed=1).split("train")
    assert not torch.equal(one[0].x, other[0].x)


def test_a_file_in_the_working_directory_is_part_of_the_package_in_every_process(tmp_path):
    (tmp_path / "datamodules").mkdir()
    (tmp_path / "datamodules" / "mine.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "program.py").write_text("""
import multiprocessing
if __name__ == "__main__":
    from vrnn_lightning.datamodules.local.mine import double
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(double, [1, 2]))
""")
    environment = os.environ | {"PYTHONPATH": str(SOURCE.parent.parent)}
    environment.pop("VRNN_LIGHTNING_DATAMODULES", None)  # of a test before
    run = [sys.executable, "program.py"]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "4"], done.stderr


def test_a_copy_of_the_template_is_a_datamodule(tmp_path, monkeypatch):
    shutil.copy(SOURCE, tmp_path / "copied.py")
    monkeypatch.syspath_prepend(tmp_path)
    datamodule = importlib.import_module("copied").MyData(num_sequences=10, num_steps=3)
    datamodule.setup("fit")
    assert next(iter(datamodule.train_dataloader())).x.shape == (10, 3, 1)
