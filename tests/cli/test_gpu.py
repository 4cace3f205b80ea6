"""On a GPU, every strategy and precision trains as the CPU does."""

from __future__ import annotations

import math

import pytest
import torch
from test_processes import assert_same, column, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]

GPU = {"trainer.accelerator": "gpu", "trainer.devices": 1, "data.batch_size": 4}
FIGURES = ("train/loss", "train/elbo", "val/elbo")


def assert_near(run, expected, tolerance):
    for name in FIGURES:
        assert all(map(math.isfinite, column(run, name)))
        assert column(run, name) == pytest.approx(column(expected, name), rel=tolerance), name


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("64-true", 1e-10)])
def test_a_gpu_equals_a_cpu(tmp_path, precision, tolerance):
    option = {"trainer.precision": precision}
    cpu = fit(tmp_path / "cpu", **option, **{"data.batch_size": 4})
    gpu = fit(tmp_path / "gpu", **option, **GPU)
    assert_same((cpu, gpu), tolerance)
    assert_near(gpu, cpu, max(tolerance, 1e-5))  # logged in single precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_near_single(tmp_path, precision):
    single = fit(tmp_path / "single", **GPU, **{"trainer.precision": "32-true"})
    mixed = fit(tmp_path / "mixed", **GPU, **{"trainer.precision": precision})
    assert_near(mixed, single, 5e-2)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 1e-2), ("16-mixed", 1e-2)])
@pytest.mark.parametrize("devices", [1, 2])
def test_fsdp_trains_as_one_process_does(tmp_path, precision, tolerance, devices):
    """Clipped by norm, with pictures, and with the same checkpoint."""
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} GPUs")
    options = {**GPU, "trainer.precision": precision, "trainer.gradient_clip_val": 5}
    one = fit(tmp_path / "one", **options)
    shared = {"trainer.strategy": "fsdp", "trainer.devices": devices, "data.batch_size": 4 // devices}
    many = fit(tmp_path / "many", **{**options, **shared})
    assert_near(many, one, tolerance)
    if precision == "32-true":
        assert_same((one, many), tolerance)
        assert column(many, "train/grad_norm") == pytest.approx(column(one, "train/grad_norm"), rel=tolerance)
