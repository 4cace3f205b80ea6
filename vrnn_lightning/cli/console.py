"""The function that the console scripts call: it runs a command and turns mistakes into one line."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from vrnn_lightning.cli import processes, slurm
from vrnn_lightning.cli.argv import with_configs
from vrnn_lightning.cli.command import CLI
from vrnn_lightning.cli.failures import line_of
from vrnn_lightning.cli.outcome import foreign_data, shorten
from vrnn_lightning.errors import UserError
from vrnn_lightning.report import write_report
from vrnn_lightning.resuming import Stopped, interruption

__all__ = ["main"]


def main(args: list[str] | None = None) -> int:
    """Run a command, for example ``main(["fit", "-c", "configs/synthetic.yaml"])``.

    Args:
        args: The words after ``lightning``; by default those of the command line. With ``--debug`` among them an error
            keeps its traceback.

    Returns:
        The exit code: 0, or 1 after a :class:`~vrnn_lightning.errors.UserError`.
    """
    argv = list(sys.argv[1:] if args is None else args)
    is_debugging = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.append(here)  # appended, so that nothing there hides an installed package
    try:
        with warnings.catch_warnings(), interruption.watching(signal.SIGTERM, signal.SIGINT, *slurm.signals()):
            _silence()
            processes.follow_parent()
            _run(argv)
    except Stopped as stopped:
        return _end_stopped(stopped, argv)
    except Exception as error:
        line = None if is_debugging else line_of(error)
        if line is not None:
            return processes.end(1, f"error: {line}")
        if not is_debugging and processes.is_lost_peer(error):
            return processes.end_without(error)
        if is_debugging or processes.is_first_cause():
            raise
        return 1
    return 0


def _run(argv: list[str]) -> None:
    """Run a command; of two processes that a signal is to end, one may notice first that the other one is gone."""
    try:
        _report(argv[1:]) if argv[:1] == ["report"] else CLI(argv)
    except Exception as error:
        if interruption.signum and processes.is_lost_peer(error):
            raise Stopped(interruption.signum) from None
        raise


def _report(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("lightning report", description="Write report.html of a run.", allow_abbrev=False)
    parser.add_argument("folder", help="the run's folder, runs/NAME/VERSION")
    print(f"report: {shorten(write_report(parser.parse_args(argv).folder))}")


def _end_stopped(stopped: Stopped, argv: list[str]) -> int:
    if stopped.signum in slurm.signals():
        slurm.requeue()
    line = f"ended by {signal.Signals(stopped.signum).name}"
    if stopped.saved:
        line = f"{line}; continue with: lightning fit --ckpt_path {shorten(stopped.saved)}"
        with suppress(UserError):  # a config that has changed since the start
            line = f"{line}{foreign_data(with_configs(argv))}"
    return processes.end(128 + stopped.signum, line, stopped)


def _silence() -> None:
    """Silence Lightning's warnings about what is intended here."""
    for message in (
        "Checkpoint directory .* exists and is not empty",  # a resumed run's
        ".*could not find the monitored key",  # a run that max_steps ends before its first validation
        ".* does not have many workers",  # sequences in memory need none
        "Be aware that when using `ckpt_path`, callbacks",  # a test needs no callback that chose its checkpoint
        ".*isinstance\\(treespec, LeafSpec\\)",  # Lightning's own call of torch
        ".* AMP with fp16 is not supported on CPU",  # we say what runs instead
        "`precision=.*` is supported for historical reasons",  # 16 and bf16 mean what everyone means by them
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "Tip:" not in message and "Automatic Mixed Precision" not in message  # the one asked for is not news
