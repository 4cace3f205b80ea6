"""A run that is killed, told to end, or finds its disk full continues as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark forks, mounts and limits as Linux does")


def test_interrupted_runs_equal_the_uninterrupted(tmp_path):
    """A sample of ways to train, places and faults; one process imports everything and forks all runs."""
    words = ["--pairwise", "15", "--random", "2", "--keep", tmp_path / "runs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, FOLDER / "resume.py", *words]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture
def resume(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import resume

    return resume


def save(folder: Path, weight: float, rows: str) -> Path:
    run = folder / "runs" / "sines" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.csv").write_text(rows)
    content = {
        "state_dict": {"w": torch.tensor([weight, float("nan")])},
        "path": str(run / "a"),
        "loops": {"n": weight},
    }
    torch.save(content, run / "checkpoints" / "last.ckpt")
    return folder


def test_a_comparison_finds_every_bit(resume, tmp_path):
    rows = "epoch,step,loss\n0,0,1.5\n0,1,1.25\n"
    one = save(tmp_path / "one", 1.0, rows)
    assert resume.compare(one, save(tmp_path / "two", 1.0, rows)) == []
    after = resume.compare(one, save(tmp_path / "three", 1.0 + 2**-23, rows))
    assert after == ["last.ckpt differs in state_dict.w"]
    other = save(tmp_path / "four", 1.0, rows.replace("1.25", "1.250"))
    assert resume.compare(one, other) == ["metrics.csv differs from epoch 0 step 1 on in loss"]
    (other / "runs/sines/version_0/checkpoints/last.ckpt").write_bytes(b"PK")
    assert "last.ckpt is damaged" in resume.compare(one, other)[1]


def test_the_sample_has_every_way_place_and_fault(resume):
    names = [scenario.name for scenario in resume.pairwise(15)]
    assert len(set(names)) == 15
    for position, values in enumerate((resume.WAYS, resume.PLACES, resume.COLUMNS)):
        parts = {name.split(" / ")[position] for name in names}
        assert len(parts) == len(values)
