"""How a command that runs in several processes ends: the first cause is printed once, and nobody is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import torch
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

__all__ = ["end", "end_without", "follow_parent", "is_first_cause", "is_lost_peer", "launched", "remember"]

GRACE = 10.0
"""Seconds that other processes get to end by themselves."""
POLL = 0.1
"""Seconds between two looks at them."""
CAUSE = "vrnn_lightning/first_cause"
PARENT = os.getppid()

_launchers: list[Any] = []


def launched() -> list[subprocess.Popen[bytes]]:
    """Return the processes that this one has launched."""
    return [process for launcher in _launchers for process in launcher.procs]


def remember(launcher: Any) -> None:
    """Know the processes that a trainer's launcher starts, if it has one that starts any."""
    _launchers[:] = [launcher] if isinstance(launcher, _SubprocessScriptLauncher) else []


def is_first_cause() -> bool:
    """Tell whether no other process of this run has failed before; the store that connects them counts."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return True
    if _is_launched() and os.getppid() != PARENT:  # which keeps the store
        return True
    try:
        count: int = torch.distributed.distributed_c10d._get_default_store().add(CAUSE, 1)
    except RuntimeError:  # the process that keeps the store is gone
        return True
    return count == 1


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether an error only says that another process of this run is gone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def end(code: int, line: str, is_stop: bool = False) -> int:
    """Print a line, if no other process has said why the run ends, and wait for the processes that were launched.

    Args:
        code: The exit code of this process.
        line: Why it ends.
        is_stop: Whether a signal ended it, which all processes have agreed on.

    Returns:
        The exit code; 0 for a launched process that a signal ended, as its parent's counts.
    """
    if is_first_cause():
        print(line, file=sys.stderr, flush=True)
    _wait(GRACE if is_stop else GRACE / 4)
    return 0 if is_stop and _is_launched() else code


def end_without(error: BaseException) -> int:
    """End because another process is gone; say so where that process had no time to."""
    time.sleep(GRACE / 5)  # whoever failed first prints why
    _wait(0.0)
    codes = {rank: process.returncode or 0 for rank, process in enumerate(launched(), 1)}
    killed = [f"process {rank} was killed by signal {-code}" for rank, code in codes.items() if code < 0]
    said = "; ".join(killed) or "another process of this run ended without a message"
    fix = "check the memory and the messages of every node, and continue with --ckpt_path last"
    return end(1, f"error: {said} ({str(error).splitlines()[0][:60]}). Fix: {fix}")


def _wait(seconds: float) -> None:
    """Wait for the processes that were launched, and kill those that are left."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in launched()):
        time.sleep(POLL)
    for process in launched():
        if process.poll() is None:
            process.kill()
            process.wait()
    for child in multiprocessing.active_children():  # of a strategy that spawns or forks
        child.kill()


def _is_launched() -> bool:
    """Tell whether Lightning started this process beside another one."""
    return int(os.environ.get("LOCAL_RANK", 0)) > 0 and "TORCHELASTIC_RUN_ID" not in os.environ


def follow_parent() -> None:
    """End this process soon after the one that launched it, which may be killed while this one waits for it."""
    if not _is_launched():
        return

    def follow() -> None:
        while os.getppid() == PARENT:
            time.sleep(1)
        time.sleep(GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True, name="follow-parent").start()
