"""Interrupt runs in every way, resume them, and compare them with the run that nothing interrupted, bit for bit.

    python benchmarks/resume.py                    # every case, then 200 kills at random times
    python benchmarks/resume.py --only "SWA"       # the cases whose description contains SWA
    python benchmarks/resume.py --random 1000 --seed 3 --jobs 8

A case is a way to train, a place in the run and a fault. Its first run meets the fault at the place; then the same
command runs again with ``--ckpt_path last`` (without, in an empty folder, where no checkpoint was saved yet). The
verdict compares all rows of metrics.csv and everything in all checkpoints, optimiser and callback states included, with
those of a run that nothing interrupted:

- equal: bit for bit,
- warned: they differ, and the resume said so on stderr,
- wrong: they differ without a word; or a run could not be resumed, ended with another exit code than it should or with
  a traceback, took too long to end, or left files behind.

Every run is forked from one process that has imported everything, so that a case costs about two seconds of one core.
Linux only. A full disk is a small file system where this user may mount one, and a limit on a file's size elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vrnn_lightning.cli import main as lightning
from vrnn_lightning.cli import processes
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule

CONFIG = """
trainer: {accelerator: cpu, max_epochs: 3, log_every_n_steps: 1, enable_model_summary: false}
model:
  latent_size: 2
  hidden_size: 4
  phi_x: {width: 4, depth: 1}
  phi_z: {width: 4, depth: 1}
  prior: {width: 4, depth: 1}
  encoder: {width: 4, depth: 1}
  decoder: {width: 4, depth: 1}
data:
  class_path: Sines
  init_args: {train_size: 28, val_size: 8, test_size: 4, steps: 5, batch_size: 4}
"""
"""Three epochs of seven batches, each followed by a validation of two batches."""

COMMON = ["-c", "config.yaml"]
FIT = ["fit", *COMMON, "--samples.every_n_validations=0", "--report=false"]


def callback(name: str, **options: object) -> list[str]:
    """Return the words that add one of Lightning's callbacks."""
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in options.items())]


WAYS = {
    "plain": [],
    "accumulate 3": ["--trainer.accumulate_grad_batches=3"],
    "max_steps": ["--trainer.max_steps=17"],
    "ReduceLROnPlateau": [
        "--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/elbo",
        "--model.lr_scheduler.patience=0", "--model.lr_scheduler.threshold=10", "--model.lr_scheduler.factor=0.5",
    ],
    "SWA": callback("StochasticWeightAveraging", swa_lrs=0.002, swa_epoch_start=1, annealing_epochs=2),
    "EMA": callback("EMAWeightAveraging", decay=0.9),
    "EMA from step 9": callback("EMAWeightAveraging", decay=0.9, update_starting_at_step=9),
    "warm restarts": [
        "--model.lr_scheduler=CosineAnnealingWarmRestarts", "--model.lr_scheduler.T_0=5", "--model.lr_interval=step",
    ],
    "carried state": ["--data.window=2", "--data.train_size=12"],
    "monitored steps": ["--checkpoint.every_n_train_steps=3"],
    "two processes": ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=2"],
}  # fmt: skip
"""Ways to train, and the words that ask for them."""

SAVING = {"": [], "every 2 steps": ["--last.every_n_train_steps=2"], "every batch": ["--last.every=0.000001s"]}
"""When last.ckpt is written besides what the run does by itself."""

PLACES = {
    "mid-epoch": ("training_step", 1, 4),  # with accumulate 3, in the middle of a window
    "validation": ("validation_step", 1, 1),
    "between epochs": ("on_train_epoch_start", 2, 0),
}
"""Hook of the model, epoch, and which of the hook's calls in this epoch."""

COMMANDS = {"validate": ("validation_step", 0, 0), "test": ("test_step", 0, 0), "predict": ("predict_step", 0, 0)}
"""The same of commands that don't train."""

EXIT = {"SIGKILL": 128 + signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130, "ENOSPC": 1, "TMPDIR": 128 + signal.SIGXFSZ}
"""Faults, and the exit code that a run should end with. TMPDIR: it lies on another file system, and the run is killed
while it writes a checkpoint."""

GRACE = 10.0
"""Seconds that a run may take to save and end after SIGTERM or SIGINT."""

PATIENCE = 20.0
"""Seconds that other processes may run on after one of them died."""

ROOM = 20_000
"""Bytes left on a full disk: room for metrics.csv, not for a checkpoint."""


class Scenario(NamedTuple):
    """A run that meets a fault, and the expected result.

    Args:
        name: What happens; in a table, "row / column".
        words: The command line.
        way: Names the run that nothing interrupts, with ``saving``.
        saving: When last.ckpt is written.
        prepare: What lets the first run meet its fault.
        first: Further words of the first run alone.
        code: The exit code that the first run should end with; ``None`` for any but 0.
        limit: Seconds that it may run on after the fault.
        saves: Whether the fault makes it save last.ckpt.
        one_error: Whether it should print one line that begins with "error: ".
        small_disk: Whether its folder is a file system of its own.
        other_disk: Whether TMPDIR lies on another file system.
        copied: Whether it begins with a copy of the folder of the run that nothing interrupts, and is not resumed.
        slurm: Whether it is a job of SLURM, which starts the same command again when it is asked to.
        times: Send the run a signal at these times, as shares of what the whole training takes; resume it each time.
        signal: That signal.
        bare: Whether it is resumed without its options, which the run's config.yaml has.
    """

    name: str
    words: list[str]
    way: str
    saving: str = ""
    prepare: Callable[[], None] | None = None
    first: tuple[str, ...] = ()
    code: int | None = 0
    limit: float | None = None
    saves: bool = False
    one_error: bool = False
    small_disk: bool = False
    other_disk: bool = False
    copied: bool = False
    slurm: bool = False
    times: tuple[float, ...] = ()
    signal: signal.Signals = signal.SIGKILL
    bare: bool = False

    @property
    def is_killed(self) -> bool:
        """Whether the fault leaves the run no time to clean up."""
        return self.signal == signal.SIGKILL if self.times else self.code in (EXIT["SIGKILL"], EXIT["TMPDIR"])


class Result(NamedTuple):
    """What came of a scenario."""

    name: str
    verdict: str
    reason: str


class Ended(NamedTuple):
    """How a run ended.

    Args:
        code: Exit code.
        seconds: From the fault, or from the start, until its last process was gone.
        err: What it printed on stderr.
        time: When the fault came, ``None`` if it did not.
        step: Optimiser steps that were behind it then.
    """

    code: int
    seconds: float
    err: str
    time: float | None
    step: int


# Running


class Run:
    """A command that runs in a process forked from this one, and in those that it starts.

    Args:
        words: The command line.
        folder: Its working directory; what it prints goes to files in a folder beside it.
        prepare: Called in every process of the run before the command.
        environment: Variables that differ.
    """

    def __init__(
        self,
        words: list[str],
        folder: Path,
        prepare: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        (folder / "config.yaml").write_text(CONFIG)
        self.said = said_of(folder)
        self.said.mkdir(exist_ok=True)
        self.err = self.said / f"err-{len(list(self.said.glob('err-*')))}.txt"
        self.started, started = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            os.environ.update(environment or {})
            _be_the_command(words, folder, self.err, prepare, started)
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the child was faster
            os.setpgid(self.pid, self.pid)
        os.close(started)

    def await_start(self) -> None:
        """Wait until training starts or the run has ended."""
        os.read(self.started, 1)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, limit: float = 60) -> Ended:
        """Wait for all of its processes; those that exceed the limit are killed."""
        begin, code, over = time.time(), 0, False
        while True:
            try:
                pid, status = os.waitpid(-self.pid, os.WNOHANG)  # orphans too: this process adopts them
            except ChildProcessError:
                break
            if pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
            if pid == 0:
                if time.time() - begin > limit and not over:
                    over = True
                    self.send(signal.SIGKILL)
                time.sleep(0.005)
        end = time.time()
        os.close(self.started)
        struck = self.said / "struck"
        when, step = json.loads(struck.read_text()) if struck.is_file() else (None, 0)
        struck.unlink(missing_ok=True)
        code = 128 - code if code < 0 else code  # as a shell says it
        return Ended(code, end - (when or begin), self.err.read_text(), when, step)


def said_of(folder: Path) -> Path:
    """Return where a run in a folder prints to: its own disk may be full."""
    return folder.with_name(f"{folder.name}-said")


def _be_the_command(
    words: list[str], folder: Path, err: Path, prepare: Callable[[], None] | None, started: int
) -> None:
    """Run a command as a new process would; never return."""
    code = 1
    try:
        os.chdir(folder)
        for stream, name in ((0, os.devnull), (1, err.with_name("out.txt")), (2, err)):
            file = os.open(name, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            os.dup2(file, stream)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["lightning", *words]
        tempfile.tempdir = None
        _prefork_rank()
        processes.PARENT = os.getppid()  # as on import
        _on_call("on_fit_start", lambda _: os.write(started, b"."))
        if prepare:
            prepare()
        code = lightning(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:  # as the interpreter would
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _prefork_rank() -> None:
    """Fork the process that is rank 1 as soon as Lightning starts it with the environment that it gets then."""
    reader, writer = os.pipe()
    spare = os.fork()
    if spare == 0:
        os.close(writer)
        kept = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all; this is not a process yet
        with os.fdopen(reader) as pipe:
            environment = pipe.read()
        if not environment:
            os._exit(0)
        signal.signal(signal.SIGINT, kept)
        os.environ.clear()
        os.environ.update(json.loads(environment))
        return
    os.close(reader)

    class Rank(subprocess.Popen):
        def __init__(self, args: Any, **options: Any) -> None:
            self.environment = dict(options.get("env") or {})
            super().__init__(args, **options)

        def _execute_child(self, *args: Any) -> None:
            if "LOCAL_RANK" not in self.environment:
                super()._execute_child(*args)
                return
            self.pid = spare
            self._child_created = True
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(self.environment))

    subprocess.Popen = Rank


def _rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


# Faults


def _on_call(hook: str, action: Callable[[VRNNLightningModule], object]) -> None:
    """Run an action at the start of every call of one of the model's hooks."""
    original = getattr(VRNNLightningModule, hook)

    @functools.wraps(original)
    def wrapped(self: VRNNLightningModule, *args: Any, **kwargs: Any) -> Any:
        action(self)
        return original(self, *args, **kwargs)

    setattr(VRNNLightningModule, hook, wrapped)


def strike(place: str, fault: Callable[[], object], rank: int | None = None) -> Callable[[], None]:
    """Return what lets a run meet a fault at a place, once; in one process or in all."""
    hook, epoch, number = {**PLACES, **COMMANDS}[place]

    def prepare() -> None:
        calls = itertools.count()
        struck = said_of(Path.cwd()) / "struck"

        def action(module: VRNNLightningModule) -> None:
            is_now = module.current_epoch == epoch or place in COMMANDS
            if not is_now or module.trainer.sanity_checking or next(calls) != number:
                return
            if rank in (None, _rank()):
                if _rank() == (rank or 0):
                    struck.write_text(json.dumps([time.time(), module.trainer.global_step]))
                fault()

        _on_call(hook, action)

    return prepare


def send(*signals: signal.Signals) -> Callable[[], None]:
    """Return what sends signals to its own process."""

    def fault() -> None:
        for number in signals:
            os.kill(os.getpid(), number)

    return fault


def fill_disk() -> None:
    """Leave no room for a checkpoint, nor for one that overwrites another in its place."""
    here = Path.cwd()
    if here.stat().st_dev != here.parent.stat().st_dev:  # a file system of its own
        disk = os.statvfs(here)
        (here / "ballast").write_bytes(bytes(disk.f_bavail * disk.f_frsize - ROOM))
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))


def die_in_write() -> None:
    """Kill this process in the next write into the folder of checkpoints, when it comes to ``ROOM`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and any(f"{os.sep}checkpoints" in str(arg) for arg in args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))

    sys.addaudithook(audit)


EVENTS = {"open", "os.mkdir", "os.rename", "shutil.copyfile", "shutil.move"}


def raise_error(error: Exception) -> Callable[[], None]:
    """Return what raises an error."""

    def fault() -> None:
        raise error

    return fault


FAULTS: dict[str, Callable[[], object]] = {
    "SIGKILL": send(signal.SIGKILL),
    "SIGTERM": send(signal.SIGTERM),
    "SIGINT": send(signal.SIGINT),
    "ENOSPC": fill_disk,
    "TMPDIR": die_in_write,
}


# Comparing


def the_run(folder: Path) -> Path | None:
    """Return the folder of the one run below a folder, if there is one."""
    runs = [file for file in folder.glob("runs/*/*") if file.is_dir()]
    if len(runs) > 1:
        raise AssertionError(f"{len(runs)} run folders")
    return runs[0] if runs else None


def compare(expected: Path, found: Path) -> list[str]:
    """Return how the runs below two folders differ, one line per file."""
    one, two = the_run(expected), the_run(found)
    if one is None or two is None:
        return ["no run folder"]
    differences = _compare_rows(one / "metrics.csv", two / "metrics.csv")
    names = [sorted(file.name for file in (run / "checkpoints").glob("*.ckpt")) for run in (one, two)]
    if names[0] != names[1]:
        differences.append(f"checkpoints {names[1]}, not {names[0]}")
    for name in sorted(set(names[0]) & set(names[1])):
        try:
            a, b = (_values(run / "checkpoints" / name, (str(one), str(two))) for run in (one, two))
        except Exception as error:  # a damaged file raises anything
            differences.append(f"{name} is damaged: {type(error).__name__}")
            continue
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        if keys:
            differences.append(f"{name} differs in {_some(keys)}")
    return differences


def _compare_rows(expected: Path, found: Path) -> list[str]:
    one, two = (file.read_text().splitlines() if file.is_file() else [] for file in (expected, found))
    if one == two:
        return []
    if one[:1] != two[:1]:
        return ["metrics.csv has other columns"]
    found_rows = (
        f"metrics.csv has {len(two) - 1} rows, not {len(one) - 1}, and" if len(one) != len(two) else "metrics.csv"
    )
    for a, b in ((a.split(","), b.split(",")) for a, b in zip(one[1:], two[1:], strict=False)):
        if a != b:
            columns = [name for name, x, y in zip(one[0].split(","), a, b, strict=False) if x != y]
            return [f"{found_rows} differs from epoch {a[0]} step {a[1]} on in {_some(columns)}"]
    return [found_rows.removesuffix(", and")]


def _values(path: Path, folders: tuple[str, str]) -> dict[str, object]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    own = re.compile("|".join(map(re.escape, folders)))  # a run's own folder has another name in each
    return {
        own.sub("", key): own.sub("", value) if isinstance(value, str) else value
        for key, value in _flatten(content)
        if not key.startswith(NOT_COMPARED)
    }


NOT_COMPARED = "loops."  # counters; what matters of them shows in the next resume


def _flatten(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values in nested containers by their keys, tensors as bytes and others as text."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _flatten(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)) and value:
        for number, part in enumerate(value):
            yield from _flatten(part, f"{key}.{number}")
    elif isinstance(value, torch.Tensor):
        plain = value.detach().contiguous().reshape(-1).view(torch.uint8)
        yield key, (value.dtype, value.shape, plain.numpy().tobytes())
    else:
        yield key, repr(value)


def _some(names: Sequence[str]) -> str:
    names = [re.sub(r"\{'monitor': '?([\w/]+)'?.*?\}", r"(\1)", name) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# Judging


def judge(scenario: Scenario, references: Path, folder: Path) -> Result:
    """Run a scenario in a folder, and compare its result with the run that nothing interrupted."""
    trial = Trial(scenario, references / _key(scenario.way, scenario.saving), folder)
    differences: list[str] = []
    try:
        trial.interrupt()
        if not scenario.copied:
            trial.resume()
        differences = compare(trial.reference, folder)
    except AssertionError as error:
        trial.problems.append(str(error))
    finally:
        shutil.rmtree(trial.temporary)
    warning = " ".join(trial.warnings)
    if trial.problems or (differences and not warning):
        return Result(scenario.name, "wrong", "; ".join([*trial.problems, *differences]))
    if differences:
        return Result(scenario.name, "warned", f"{warning} [{'; '.join(differences)}]")
    return Result(scenario.name, "equal", f"but warned: {warning}" if warning else "")


class Trial:
    """A scenario that happens in a folder, and what is found to be wrong meanwhile."""

    def __init__(self, scenario: Scenario, reference: Path, folder: Path) -> None:
        self.scenario = scenario
        self.reference = reference
        self.folder = folder
        self.problems: list[str] = []
        self.warnings: list[str] = []
        disk = ELSEWHERE if scenario.other_disk and ELSEWHERE.is_dir() else folder.parent
        self.temporary = Path(tempfile.mkdtemp(prefix="resume-tmp-", dir=disk))
        self.environment = {"TMPDIR": str(self.temporary)}
        folder.mkdir(parents=True)
        if scenario.small_disk:
            _mount(folder)
        if scenario.copied:
            shutil.copytree(reference / "runs", folder / "runs")
        if scenario.slurm:
            self.environment |= _slurm(folder)

    def interrupt(self) -> None:
        """Run until the fault, or several times until a signal, and look at how the run ended."""
        words = [*self.scenario.words, *self.scenario.first]
        if not self.scenario.times:
            ended = Run(words, self.folder, self.scenario.prepare, self.environment).wait()
            self.problems += self._wrong_endings(ended)
        duration = float((self.reference / "duration").read_text())
        for share in self.scenario.times:
            run = Run(words, self.folder, None, self.environment)
            run.await_start()
            time.sleep(share * duration)
            run.send(self.scenario.signal)
            begin = time.time()
            ended = run.wait()
            if time.time() - begin > GRACE:
                self.problems.append(f"ends {time.time() - begin:.0f} s after the signal")
            if ended.code != 128 + self.scenario.signal:  # it was faster, or it is wrong
                self._check_success(ended)
                break
            words = self._words_to_resume()
        (self.folder / "ballast").unlink(missing_ok=True)
        if not self.scenario.is_killed:
            self._check_files()

    def resume(self) -> None:
        """Start the run again, which should now come to its end."""
        words, environment = self._words_to_resume(), self.environment
        if self.scenario.slurm:  # the same command again, as SLURM does
            words, environment = self.scenario.words, {**environment, "SLURM_RESTART_COUNT": "1"}
        ended = Run(words, self.folder, None, environment).wait()
        self._check_success(ended)
        usual = (said_of(self.reference) / "err-0.txt").read_text()
        lines = [line for line in ended.err.splitlines() if line not in usual]
        self.warnings += [line for line in lines if WARNING.search(line) and not line.startswith("error: ")]
        self._check_files()

    def _wrong_endings(self, ended: Ended) -> Iterator[str]:
        """Yield what is wrong with how a run ended after its fault."""
        scenario = self.scenario
        if scenario.prepare and ended.time is None:
            yield f"the fault did not come: exit code {ended.code}, {_last_line(ended.err)}"
            return
        if ended.code != scenario.code if scenario.code is not None else ended.code == 0:
            yield f"exit code {ended.code}, not {scenario.code or 'an error'} ({_last_line(ended.err)})"
        if scenario.limit is not None and ended.seconds > scenario.limit:
            yield f"ends after {ended.seconds:.0f} s"
        if "Traceback" in ended.err:
            yield f"a traceback ({_last_line(ended.err)})"
        errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        if scenario.one_error and len(errors) != 1:
            yield f"{len(errors)} error lines, not 1"
        steps = {}
        for file in self.folder.glob("runs/*/*/checkpoints/*.ckpt"):
            try:
                steps[file.name] = torch.load(file, map_location="cpu", weights_only=True)["global_step"]
            except Exception as error:  # a damaged file raises anything
                yield f"{file.name} is damaged ({type(error).__name__})"
        if scenario.saves and steps.get("last.ckpt", -1) < ended.step:
            yield f"last.ckpt is of step {steps.get('last.ckpt')}, not {ended.step}"
        if scenario.slurm:
            asked = self.folder / "scontrol.txt"
            if not asked.is_file() or asked.read_text() != "requeue 77\n":
                yield "`scontrol requeue 77` was not called once"

    def _check_success(self, ended: Ended) -> None:
        """Note what is wrong with a run that should come to its end, or has nothing more to do."""
        if ended.code and "behind it" not in ended.err:
            self.problems.append(f"exit code {ended.code} where it should end: {_last_line(ended.err)}")
        elif "Traceback" in ended.err:
            self.problems.append(f"a traceback in a run that succeeds: {_last_line(ended.err)}")

    def _words_to_resume(self) -> list[str]:
        """Return the words that resume the run; where nothing was saved, it begins again in an empty folder."""
        if any(self.folder.glob("runs/*/*/checkpoints/last.ckpt")):
            return ["fit", "--ckpt_path=last"] if self.scenario.bare else [*self.scenario.words, "--ckpt_path=last"]
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        return self.scenario.words

    def _check_files(self) -> None:
        """Note files that should have been removed, or written into the run's folder; not what a killed run can't."""
        known = {"runs", "config.yaml", "scontrol", "scontrol.txt"}
        strange = {file.name for file in self.folder.iterdir()} - known
        strange |= {file.name for file in self.folder.rglob("*") if file.name.startswith("hpc_ckpt")}
        strange |= {file.name for file in self.folder.rglob("*.part")}
        if not self.scenario.is_killed:
            strange |= {file.name for file in self.temporary.iterdir()}
        if strange:
            self.problems.append(f"leaves {_some(sorted(strange))}")


WARNING = re.compile(r"\b(resum|differ)", re.IGNORECASE)


def _last_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b|error: ", line)]
    return (errors or lines or ["nothing on stderr"])[-1][:200]


def _slurm(folder: Path) -> dict[str, str]:
    """Return the environment of a job, with a ``scontrol`` that notes what it is asked to do."""
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol.txt\n')
    program.chmod(0o755)
    job = {"JOB_ID": "77", "NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    return {f"SLURM_{key}": value for key, value in job.items()} | {"PATH": f"{folder}:{os.environ['PATH']}"}


def _mount(folder: Path) -> None:
    """Make a folder a small file system of its own that vanishes with this process, if this user may."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) == 0 and libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0:
        libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=16m")


CLONE_NEWNS, MS_REC, MS_PRIVATE, PR_SET_CHILD_SUBREAPER = 0x20000, 0x4000, 0x40000, 36
ELSEWHERE = Path("/dev/shm")


def refer(way: str, saving: str, references: Path) -> Result:
    """Train without an interruption."""
    folder = references / _key(way, saving)
    folder.mkdir()
    run = Run(words_of(way, saving), folder, None, {"TMPDIR": str(references)})
    run.await_start()
    begin = time.time()
    ended = run.wait()
    (folder / "duration").write_text(str(time.time() - begin))
    return Result(folder.name, "wrong" if ended.code else "equal", _last_line(ended.err) if ended.code else "")


def _key(way: str, saving: str) -> str:
    return f"{way} {saving}".strip().replace(" ", "-")


def in_processes(tasks: Sequence[Callable[[], Result]], jobs: int, folder: Path) -> Iterator[Result]:
    """Call functions in forked processes, so many at once; yield what they return as they end."""
    waiting, running = list(enumerate(tasks)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            number, task = waiting.pop(0)
            answer = folder / f"answer-{number}.json"
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
                    answer.write_text(json.dumps(task()))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            running[pid] = answer
        pid, status = os.wait()
        answer = running.pop(pid)
        if status:
            raise RuntimeError(f"{answer.name}: the benchmark itself failed; its traceback is above")
        yield Result(*json.loads(answer.read_text()))


# What happens


def words_of(way: str, saving: str = "") -> list[str]:
    """Return the command line of a way to train."""
    return [*FIT, *WAYS[way], *SAVING[saving]]


def scenario(way: str, place: str, fault: str, saving: str = "") -> Scenario:
    """Return a cell of the table."""
    name = f"{way} / {place} / {fault}{f', saved {saving}' if saving else ''}"
    common = {"words": words_of(way, saving), "way": way, "saving": saving}
    if fault == "stopped earlier":
        return Scenario(name, **common, first=(_stop(way, place),))
    return Scenario(
        name,
        **common,
        prepare=strike(place, FAULTS[fault]),
        code=EXIT[fault],
        limit=GRACE if fault in ("SIGTERM", "SIGINT") else None,
        saves=fault in ("SIGTERM", "SIGINT"),
        one_error=fault == "ENOSPC",
        small_disk=fault == "ENOSPC",
        other_disk=fault == "TMPDIR",
    )


def _stop(way: str, place: str) -> str:
    """Return the word that ends a run early: within an epoch, at its end, or before the next one."""
    steps = {"accumulate 3": 3, "carried state": 9}.get(way, 7)
    if place == "between epochs":
        return "--trainer.max_epochs=2"
    return f"--trainer.max_steps={2 * steps if place == 'validation' else steps + steps // 2}"


COLUMNS = [(fault, "") for fault in FAULTS] + [("SIGKILL", saving) for saving in SAVING if saving]
COLUMNS.append(("stopped earlier", ""))


def table() -> list[Scenario]:
    """Return all ways x places x faults."""
    cells = itertools.product(WAYS, PLACES, COLUMNS)
    return [scenario(way, place, fault, saving) for way, place, (fault, saving) in cells]


def further() -> list[Scenario]:
    """Return what has no place in the table."""
    plain, two = words_of("plain"), words_of("two processes")
    found = [
        Scenario(
            f"plain / {place} / SIGTERM twice",
            plain,
            "plain",
            code=143,
            limit=2.0,
            prepare=strike(place, send(signal.SIGTERM, signal.SIGTERM)),
        )
        for place in PLACES
    ]
    found += [
        Scenario(
            f"plain / {place} / SLURM requeue",
            plain,
            "plain",
            code=None,
            limit=GRACE,
            saves=True,
            slurm=True,
            prepare=strike(place, send(signal.SIGUSR1)),
        )
        for place in PLACES
    ]
    for command in ("validate", "test", "predict"):
        for number in (signal.SIGTERM, signal.SIGINT):
            copy = "--ckpt_path=runs/sines/version_0/checkpoints/best.ckpt"
            found.append(
                Scenario(
                    f"{command} / {number.name}",
                    [command, *COMMON, copy],
                    "plain",
                    code=128 + number,
                    limit=GRACE,
                    copied=True,
                    prepare=strike(command, send(number)),
                )
            )
    for rank in (0, 1):
        name = f"two processes / one rank / rank {rank}"
        found.append(
            Scenario(
                f"{name} is killed",
                two,
                "two processes",
                code=None,
                limit=PATIENCE,
                one_error=rank == 1,
                prepare=strike("mid-epoch", send(signal.SIGKILL), rank),
            )
        )
        found.append(
            Scenario(
                f"{name} gets SIGTERM",
                two,
                "two processes",
                code=143,
                limit=GRACE,
                saves=True,
                prepare=strike("mid-epoch", send(signal.SIGTERM), rank),
            )
        )
        for error in (UserError("what one rank found"), MemoryError()):
            found.append(
                Scenario(
                    f"{name} raises {type(error).__name__}",
                    two,
                    "two processes",
                    code=1,
                    limit=PATIENCE,
                    one_error=True,
                    prepare=strike("mid-epoch", raise_error(error), rank),
                )
            )
    return found  # fmt: skip


def at_random(kills: int, seed: int) -> list[Scenario]:
    """Return runs that are killed at random times, up to three times in a row, and a quarter as many other signals."""
    draw = random.Random(seed)
    found = []
    for index in range(kills + kills // 4):
        way, saving, bare = draw.choice(list(WAYS)), draw.choice(list(SAVING)), draw.random() < 0.5
        times = tuple(draw.random() for _ in range(draw.choice((1, 1, 2, 3))))
        sent = signal.SIGKILL if index < kills else draw.choice((signal.SIGTERM, signal.SIGINT))
        shares = ", ".join(f"{share:.2f}" for share in times)
        name = f"{_key(way, saving)} / {seed}-{index} / {sent.name} at {shares}{', bare' if bare else ''}"
        found.append(Scenario(name, words_of(way, saving), way, saving, times=times, signal=sent, bare=bare))
    return found


def pairwise(number: int, seed: int = 0) -> list[Scenario]:
    """Return cells of the table that have as many pairs of way, place and fault among them as so many can have."""
    cells = list(itertools.product(WAYS, PLACES, COLUMNS))
    random.Random(seed).shuffle(cells)
    chosen: list[tuple[str, str, tuple[str, str]]] = []
    pairs: set[tuple[object, ...]] = set()
    trained: set[tuple[str, str]] = set()
    for _ in range(number):
        new = [(len(_pairs(cell) - pairs), (cell[0], cell[2][1]) in trained, cell) for cell in cells]
        best = max(new, key=lambda gain: gain[:2])[2]  # of equal ones, one that needs no further run to compare with
        cells.remove(best)
        chosen.append(best)
        pairs |= _pairs(best)
        trained.add((best[0], best[2][1]))
    return [scenario(way, place, fault, saving) for way, place, (fault, saving) in chosen]


def _pairs(cell: tuple[object, ...]) -> set[tuple[object, ...]]:
    return set(itertools.combinations(cell, 2)) | {(value,) for value in cell}


def run_all(scenarios: Sequence[Scenario], jobs: int, folder: Path) -> Iterator[Result]:
    """Train without interruptions what is needed for comparison, then let every scenario happen."""
    folder = folder.resolve()
    references = folder / "references"
    references.mkdir(parents=True)
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "WANDB_MODE": "disabled"}
    ways = sorted({(s.way, s.saving) for s in scenarios})
    tasks = [functools.partial(refer, way, saving, references) for way, saving in ways]
    for result in in_processes(tasks, jobs, folder):
        if result.verdict != "equal":
            raise RuntimeError(f"{result.name} can't be trained: {result.reason}")
    tasks = [functools.partial(judge, s, references, folder / f"case-{i}") for i, s in enumerate(scenarios)]
    yield from in_processes(tasks, jobs, folder)


def print_tables(results: Sequence[Result]) -> None:
    """Print verdicts as tables, then every case that is not equal with its reason, then totals."""
    rows: dict[str, dict[str, str]] = {}
    for result in results:
        row, _, column = result.name.rpartition(" / ")
        rows.setdefault(row, {})[column] = result.verdict
    groups: dict[tuple[str, ...], list[str]] = {}
    for row, cells in rows.items():
        groups.setdefault(tuple(cells), []).append(row)
    for columns, names in groups.items():
        print(f"| | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
        for row in names:
            print(f"| {row} | {' | '.join(rows[row].values())} |")
        print()


def print_totals(results: Sequence[Result]) -> None:
    """Print every case that is not equal, with its reason, and how many there are of each kind."""
    for result in results:
        if result.reason:
            print(f"- {result.name}: {result.verdict}: {result.reason}")
    count = {verdict: sum(r.verdict == verdict for r in results) for verdict in ("equal", "warned", "wrong")}
    print(f"\n{len(results)} cases: {', '.join(f'{verdict} {n}' for verdict, n in count.items())}\n")


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; return 1 if a case is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the case's name contains")
    parser.add_argument("--random", type=int, default=200, help="runs that are killed at random times (default: 200)")
    parser.add_argument("--pairwise", type=int, help="instead of the whole table, so many of its cells")
    parser.add_argument("--seed", type=int, default=0, help="of the random times and of the sample (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="cases at once (default: 1)")
    parser.add_argument("--keep", type=Path, help="an empty folder to leave the runs in")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells = [*table(), *further()] if options.pairwise is None else pairwise(options.pairwise, options.seed)
    parts = (
        [s for s in part if re.search(options.only, s.name)]
        for part in (cells, at_random(options.random, options.seed))
    )
    chosen, drawn = parts
    order = {s.name: i for i, s in enumerate([*chosen, *drawn])}
    begin = time.time()
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = []
        for result in run_all([*chosen, *drawn], options.jobs, folder):
            results.append(result)
            print(f"{len(results)}/{len(order)} {result.name}: {result.verdict}", file=sys.stderr, flush=True)
    results.sort(key=lambda result: order[result.name])
    head, tail = results[: len(chosen)], results[len(chosen) :]
    print(f"torch {torch.__version__}, {time.time() - begin:.0f} s, {options.jobs} at once\n")
    if head:
        print_tables(head)
        print_totals(head)
    if tail:
        print("killed at random times:\n")
        print_totals(tail)
    return int(any(result.verdict == "wrong" for result in results))


if __name__ == "__main__":
    sys.exit(main())
