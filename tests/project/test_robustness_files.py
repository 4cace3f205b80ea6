"""Damaged files and hostile texts, a few of those that ``benchmarks/robustness_files.py`` reads."""

import mmap
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

    def take_memory(path: Path) -> object:
        with mmap.mmap(-1, 2**26) as fresh:  # not from a heap, which may have as much to spare
            return sum(fresh.write_byte(1) or fresh.seek(2**12 - 1, 1) or 1 for _ in range(2**14 - 1))

    assert robustness.read_apart(read, tmp_path).what == "traceback"
    assert robustness.read_apart(take_memory, tmp_path).peak > 2**25


def test_hostile_names(robustness, monkeypatch):
    short = [text for text in robustness.TEXTS if len(text) < 99]
    monkeypatch.setattr(robustness, "TEXTS", ("<script>alert(1)</script>", "\udcff\x00", "=1+1\r", "../a"))
    found = robustness.hostile_text(count=50)
    assert {key: value for key, value in found.items() if value} == {"texts": 54}, found["examples"]
    for text in short:
        assert robustness._as_cell(Path(), text) is None
