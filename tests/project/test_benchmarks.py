"""The benchmarks run; what they print is for people, not for a test."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vrnn_lightning.vrnn import trace

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_loop(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    benchmark = runpy.run_path(str(FOLDER / "loop.py"))
    size = benchmark["Size"](2, 3, 1, 2, 3)
    for name in ("TRAINING", "EVALUATION", "GENERATION", "FILTER"):
        benchmark[name][:] = [size, size._replace(cell="lstm")]
    benchmark["COMPILED"][:] = [("Gaussian", benchmark["Gaussian"], size)]
    traced = torch.compile(trace._score, backend="eager")  # no compiler here
    monkeypatch.setattr(trace, "_compiled_score", lambda: traced)
    benchmark["MEMORY"][:] = [("one step", size, 2)]
    benchmark["LENGTHS"][:] = []
    tables = (
        []
        if sys.platform == "linux"
        else ["training", "replaced", "rates", "evaluation", "generation", "filter", "compiled", "profile"]
    )
    benchmark["main"]([*tables, "--repeats", "1", "--threads", "1"])
    said = capsys.readouterr().out
    assert said.count("| 2 / 3 / 1, 2 x 3 |") + said.count("| LSTM, 2 / 3 / 1, 2 x 3 |") == 2 * 7
    assert "| Gaussian, 2 / 3 / 1, 2 x 3 |" in said
    assert ("| one step, 2 / 3 / 1, 2 x 3 |" in said) == (sys.platform == "linux")


def test_an_unknown_table_is_refused(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit):
        runpy.run_path(str(FOLDER / "loop.py"))["main"](["speed"])
    assert "no table speed" in capsys.readouterr().err


def test_startup(capsys):
    benchmark = runpy.run_path(str(FOLDER / "startup.py"))
    benchmark["IMPORTS"][:] = ["-c", "pass"]
    del benchmark["COMMANDS"]["`lightning fit --help`"]
    benchmark["main"](["--repeats", "1", "--warm-up", "0"])
    assert "synthetic.yaml`, one step" in capsys.readouterr().out


def test_loading(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    import loading

    words = ["--data", "Sines", "--data.train_size", "40", "--data.batch_size", "4", "--model.hidden_size", "4"]
    loading.main(["--batches", "2", "--threads", "1", *words])
    cells = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert cells[1:3] == ["4 x 50 x 3", "0.0 %"]
    assert all(float(cell.strip("| ")) > 0 for cell in cells[3:])


def test_predicting(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    benchmark = runpy.run_path(str(FOLDER / "predicting.py"))
    benchmark["SAMPLING"][:] = [benchmark["Size"](2, 3, 1, 2, 3)]
    benchmark["main"](["sampling", "--repeats", "1", "--threads", "1"])
    benchmark["measure_peak"]("score", "2")
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("| 2 / 3 / 1, 2 x 3 |")
    assert all(float(word) > 0 for word in said[-1].split())


def test_compare(capsys, monkeypatch, tmp_path):
    """Two checkouts in turns, here this one twice; the interval holds the median."""
    monkeypatch.syspath_prepend(str(FOLDER))
    small = (FOLDER / "compare.py").read_text().replace("(28, 100, 16, ", "(2, 3, 1, ").replace("1000)", "3)")
    (tmp_path / "benchmarks").mkdir()
    script = tmp_path / "benchmarks" / "compare.py"
    script.write_text(small)
    for name in ("contestants.py",):
        (tmp_path / "benchmarks" / name).write_text((FOLDER / name).read_text())
    for name in ("vrnn_lightning", "tests"):
        (tmp_path / name).symlink_to(FOLDER.parent / name)
    words = [sys.executable, str(script), str(tmp_path), "evaluation", "streaming", "--rounds", "3"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| evaluation:", "| streaming:"))]
    assert len(rows) == 4
    for row in rows:
        median, low, high = (float(x) for x in re.findall(r"\d+\.\d{3}", row.split("|")[4]))
        assert low <= median <= high
