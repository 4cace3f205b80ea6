"""The end of a command that runs in several processes: the first cause is printed once, and no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers import subprocess_script

from vrnn_lightning.resuming import Stopped

__all__ = ["end", "end_without", "follow_parent", "is_first_cause", "is_lost_peer", "list_children", "remember"]

GRACE = 10.0
"""Seconds that other processes get to end by themselves."""
OBSERVED = 12
"""Seconds between two looks at whether a launched process has failed."""
POLL = 0.1
"""Seconds between two looks at whether it has ended."""
CAUSE = "vrnn_lightning/first_cause"
PARENT = os.getppid()

_launchers: list[Any] = []


def list_children() -> list[Any]:
    """Return the processes that this one has launched: as commands (Popen), or spawned or forked (Process)."""
    return [process for launcher in _launchers for process in launcher.procs]


def remember(launcher: Any) -> None:
    """Keep a trainer's launcher, if it has one that starts processes, and end with a process that fails."""
    _launchers[:] = [launcher] if hasattr(launcher, "procs") else []
    subprocess_script._launch_process_observer = _observe  # type: ignore[assignment, attr-defined]  # private


def _observe(children: list[subprocess.Popen[Any]]) -> None:
    """End this process, which may wait for one that failed, unless it ends by itself."""
    _ChildProcessObserver(os.getpid(), children, sleep_period=OBSERVED).start()


def is_first_cause() -> bool:
    """Return whether no other process of this run has failed before; the store that connects them counts."""
    if not _is_connected() or (_is_launched() and os.getppid() != PARENT):  # the parent keeps the store
        return True
    try:
        count: int = torch.distributed.distributed_c10d._get_default_store().add(CAUSE, 1)
    except RuntimeError:  # the process that keeps the store is gone
        return True
    return count == 1


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error only says that another process of this run is gone."""
    if not _is_connected():
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def end(code: int, line: str, stop: Stopped | None = None) -> int:
    """Print why the run ends, unless another process has, and wait for the processes that were launched.

    A signal is sent to the others too, unless all processes have agreed on it. A launched process that it ended returns
    0 in place of the exit code, as its parent's counts.
    """
    if is_first_cause():
        print(line, file=sys.stderr, flush=True)
    if stop is not None and not stop.is_agreed:
        for process in filter(_is_alive, list_children()):
            os.kill(process.pid, stop.signum)
        if _is_launched() and os.getppid() == PARENT:
            os.kill(PARENT, stop.signum)
    _wait(GRACE if stop is not None else GRACE / 4)
    return 0 if stop is not None and _is_launched() else code


def end_without(error: BaseException) -> int:
    """End because another process is gone, and print the reason where that process could not."""
    time.sleep(GRACE / 5)  # the process that failed first prints the reason
    _wait(0.0)
    codes = {rank: _code(process) for rank, process in enumerate(list_children(), 1)}
    killed = [f"process {rank} was killed by signal {-code}" for rank, code in codes.items() if code < 0]
    reason = str(error).splitlines()[0].rpartition("] ")[2][:60]  # after the place in torch's source
    problem = "; ".join(killed) or f"another process of this run ended without a message ({reason})"
    fix = "check the memory and the messages of every node, and continue with --ckpt_path last"
    return end(1, f"error: {problem}. Fix: {fix}")


def _wait(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(_is_alive, list_children())):
        time.sleep(POLL)
    for process in filter(_is_alive, list_children()):
        process.kill()


def _is_alive(process: Any) -> bool:
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def _code(process: Any) -> int:
    """Return the exit code of a process that has ended, minus the signal that ended it; 0 of one that has not."""
    return (process.returncode if isinstance(process, subprocess.Popen) else process.exitcode) or 0


def _is_connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_launched() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) > 0 and "TORCHELASTIC_RUN_ID" not in os.environ


def follow_parent() -> None:
    """End this process soon after the one that launched it, which may be killed while this one waits for it."""

    def follow() -> None:
        while os.getppid() == PARENT:
            time.sleep(1)
        time.sleep(GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    if _is_launched():
        threading.Thread(target=follow, daemon=True, name="follow-parent").start()
