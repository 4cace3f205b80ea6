"""The examples in docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(f for package in ("vrnn_lightning", "datamodules") for f in (ROOT / package).rglob("*.py"))
NAMES = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in FILES if ">>>" in f.read_text()]
MODULES = [f"vrnn_lightning.{name}" if name.startswith("datamodules.") else name for name in NAMES]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed
