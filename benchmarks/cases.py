"""Cases of broken and hostile files, each run in a process of its own that is forked after one import."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vrnn_lightning import UserError

__all__ = ["MARKER", "Case", "Outcome", "play", "play_all"]

MARKER = "ROBUSTNESS_MARKER"
"""Environment variable with the path of a file that a payload writes when it runs."""
LIMIT = 120.0


@dataclass(frozen=True)
class Case:
    """What is done with a broken or hostile file.

    Args:
        name: Tells it from others.
        run: Makes the file in a folder, which is the working directory, and reads it; returns the exit code.
        refused: Whether it has to end with an error.
    """

    name: str
    run: Callable[[Path], object]
    refused: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Args:
        case: The case.
        executed: A payload ran.
        trace: It ended with a traceback, was killed by a signal or took longer than its limit.
        refused: It ended with an error.
        seconds: How long it took.
        peak: Largest resident memory of its process, in bytes.
        said: What it wrote to its standard error.
    """

    case: Case
    executed: bool
    trace: bool
    refused: bool
    seconds: float
    peak: int
    said: str

    @property
    def wrong(self) -> bool:
        """Whether it ended otherwise than it has to."""
        return self.executed or self.trace or (self.case.refused and not self.refused)


def play(case: Case, limit: float = LIMIT) -> Outcome:
    """Run a case in a forked process and an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        work, said, marker = Path(folder) / "work", Path(folder) / "said", Path(folder) / "marker"
        work.mkdir()
        start = time.perf_counter()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _child(case, work, said, marker)
        status, usage = _waited(child, limit)
        seconds = time.perf_counter() - start
        text = said.read_text(errors="replace") if said.exists() else ""
        code = os.waitstatus_to_exitcode(status)
        trace = "Traceback (most recent call last)" in text or code not in (0, 1, 2)
        return Outcome(case, marker.exists(), trace, code != 0, seconds, usage * 1024, text)


def play_all(cases: Iterable[Case]) -> Iterator[Outcome]:
    """Run cases one after another."""
    torch.set_num_threads(1)
    yield from map(play, cases)


def _child(case: Case, work: Path, said: Path, marker: Path) -> None:
    code = 3
    try:
        os.setsid()
        os.chdir(work)
        os.environ[MARKER] = str(marker)
        sys.argv[:] = ["lightning"]
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            try:
                code = int(case.run(work) or 0)  # type: ignore[call-overload]  # whatever a case returns counts as a number
            except UserError as error:
                print(f"error: {error}", file=file)
                code = 1
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc(file=file)
    finally:
        os._exit(code)


def _waited(child: int, limit: float) -> tuple[int, int]:
    """Wait for a process, and end it with its children after the limit."""
    end = time.monotonic() + limit
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage.ru_maxrss
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.002)
