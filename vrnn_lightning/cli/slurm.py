"""Jobs of SLURM: a job that is requeued continues in its run's folder by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vrnn_lightning.files import write_files

__all__ = ["interrupted_checkpoint", "mark", "requeue", "signals"]

FILE = "slurm_job.json"
"""In a run's folder: the job that it belongs to and its command line."""


def _job() -> str | None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def signals() -> tuple[int, ...]:
    """Return the signal that announces the end of a job's time, within a job: ``#SBATCH --signal=SIGUSR1@90``."""
    return (signal.SIGUSR1,) if _job() else ()


def requeue() -> None:
    """Put this job into the queue again."""
    job = _job()
    if job is None or int(os.environ.get("SLURM_PROCID", 0)):
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = (done.stderr or done.stdout).strip() if done.returncode else None
    except OSError as error:
        problem = str(error)
    failure = f"job {job} could not be requeued ({problem}). Fix: submit it again"
    print(f"job {job} is requeued" if problem is None else failure, file=sys.stderr)


def mark(folder: Path, argv: Sequence[str]) -> None:
    """Write to a run's folder which job and command line it belongs to."""
    job = _job()
    if job is not None:
        write_files({folder / FILE: json.dumps({"job": job, "command": list(argv)}, indent=1).encode()})


def interrupted_checkpoint(runs: Path, argv: Sequence[str]) -> Path | None:
    """Return the last checkpoint of the run that a requeued job began with the same command line, if there is one."""
    job = _job()
    if job is None or not int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        return None
    files = sorted(runs.glob(f"*/*/{FILE}"), key=lambda file: file.stat().st_mtime)
    own = [file.parent for file in files if _read(file) == {"job": job, "command": [*argv]}]
    last = own[-1] / "checkpoints" / "last.ckpt" if own else None
    return last if last is not None and last.is_file() else None


def _read(file: Path) -> object:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # it belongs to another job
        return None
