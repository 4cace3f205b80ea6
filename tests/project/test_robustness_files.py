"""Damaged files and hostile texts, a few of those that ``benchmarks/robustness_files.py`` reads."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked")


@pytest.fixture
def robustness(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import robustness_files

    return robustness_files


@pytest.mark.filterwarnings("ignore")  # a process with threads is forked
def test_damaged_files_are_one_line_or_what_they_were(robustness):
    pytest.importorskip("mido"), pytest.importorskip("pyarrow"), pytest.importorskip("safetensors")
    kinds = tuple(robustness.KINDS)
    found = robustness.damaged(seed=1, count=2 * len(kinds), kinds=kinds)
    wrong = {key: found[key] for key in ("tracebacks", "slow", "died", "loads that differ")}
    assert wrong == dict.fromkeys(wrong, 0), found["examples"]
    assert found["files"] > len(kinds)
    assert found["peak bytes per byte"] < 1000


def test_a_reader_that_fails_is_counted(robustness, tmp_path):
    """The counts can be other than zero."""

    def read(path: Path) -> object:
        raise KeyError(path)

    assert robustness.read_apart(read, tmp_path).what == "traceback"
    assert robustness.read_apart(lambda path: bytearray(2**26).count(0), tmp_path).peak > 2**25


def test_hostile_names(robustness, monkeypatch):
    short = [text for text in robustness.TEXTS if len(text) < 99]
    monkeypatch.setattr(robustness, "TEXTS", ("<script>alert(1)</script>", "\udcff\x00", "=1+1\r", "../a"))
    found = robustness.hostile_text(count=50)
    assert {key: value for key, value in found.items() if value} == {"texts": 54}, found["examples"]
    for text in short:
        assert robustness._as_cell(Path(), text) is None
