"""The benchmark runs; what it prints is for people, not for a test."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_step(capsys):
    benchmark = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "step.py"))
    benchmark["SIZES"][:] = [(2, 3, 1, 2, 3)]
    benchmark["main"](["--repeats", "1", "--threads", "1"])
    assert "| 2 / 3 / 1, 2 x 3 |" in capsys.readouterr().out


def test_startup(capsys):
    benchmark = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "startup.py"))
    benchmark["IMPORTS"][:] = ["-c", "pass"]
    del benchmark["COMMANDS"]["`lightning fit --help`"]
    benchmark["main"](["--repeats", "1"])
    assert "synthetic.yaml`, one step" in capsys.readouterr().out
