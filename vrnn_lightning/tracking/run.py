"""A run's folder with its metrics and config, and the lines of its progress."""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, flush, replacing, undamaged, write_files
from vrnn_lightning.files.locks import FolderLock

__all__ = ["METRICS_FILE", "ElboBar", "RunLogger", "SaveConfig", "read_rows", "run_logger"]

METRICS_FILE = ExperimentWriter.NAME_METRICS_FILE


class _Resumed(NamedTuple):
    """The place of a checkpoint in its run, where a fit or a test continues; :meth:`RunLogger.resume` documents it."""

    step: int
    epoch: int
    training: bool
    rows: int | None

    def keeps(self, number: int, row: dict[str, str]) -> bool:
        """Return whether a row stays in metrics.csv; a line cut off by a kill does not."""
        step = row.get("step") or ""
        if not step.isdigit() or not self.training:
            return step.isdigit()
        is_earlier = int(step) < self.step
        if self.rows is None:
            return is_earlier
        return number < self.rows or (is_earlier and any(row[key] for key in row if str(key).startswith("test/")))


class _Rows(ExperimentWriter):
    """The writer of metrics.csv, which continues below the rows of a resumed checkpoint."""

    def __init__(self, log_dir: str, resumed: _Resumed | None) -> None:
        self.resumed = resumed
        self.count = 0
        """Rows that were written, those before a resume included."""
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:  # Lightning's deletes the old rows here and has no other hook
        file = Path(self.metrics_file_path)
        if not file.is_file():
            return
        if self.resumed is None:
            raise UserError(f"{file}: exists already. Fix: leave the logger's `version` out, or give --ckpt_path")
        damaged = undamaged(f"{file}: is damaged", "move it away, and resume without its rows")
        with explained(file), damaged, file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            rows = [row for number, row in enumerate(reader) if self.resumed.keeps(number, row)]
            self.metrics_keys = list(reader.fieldnames or [])
        self.count = len(rows)
        self._write(rows)

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        super().log_metrics(metrics_dict, step)
        self.count += 1

    def save(self) -> None:
        if not self.metrics:
            return
        with explained(self.metrics_file_path, "--trainer.logger"):
            super().save()
            flush(Path(self.metrics_file_path))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(read_rows(Path(self.metrics_file_path)))

    def _write(self, rows: list[dict[str, str]]) -> None:
        with replacing(Path(self.metrics_file_path)) as temporary, temporary.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def read_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a csv file by their column names."""
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


class RunLogger(CSVLogger):
    """A logger of metrics in ``<save_dir>/<name>/version_N/metrics.csv``; the run's other files lie beside it.

    Args:
        save_dir: Folder of all runs. Default: ``runs`` under ``--trainer.default_root_dir``.
        name: Name of the experiment. Default: the datamodule's, in lower case.
        version: Name or number of this run. Default: the next free number.
    """

    def __init__(self, save_dir: str | None = None, name: str | None = None, version: int | str | None = None) -> None:
        super().__init__(save_dir or "runs", name or "run", version)
        self._open = {key for key, value in (("save_dir", save_dir), ("name", name)) if value is None}
        self.resumed: _Resumed | None = None
        """Where the run continues, if it does."""
        self._lock: FolderLock | None = None
        self.note: Callable[[Path], None] | None = None
        """Called with the run's folder when a fit has written its config there."""

    def place(self, root: Path, name: str) -> None:
        """Set the folder of all runs (``runs`` in ``root``) and the experiment's name where no option gives them."""
        if "save_dir" in self._open:
            self._save_dir = self._root_dir = str(root.resolve() / "runs")
        if "name" in self._open:
            self._name = name

    @property
    def rows(self) -> int:
        return getattr(self._experiment, "count", 0)

    def resume(self, folder: Path, step: int, epoch: int, training: bool, rows: int | None = None) -> None:
        """Continue in the folder of an earlier run, at a checkpoint's optimiser step and epoch.

        Training drops the rows of later steps, which will come again: all but the first ``rows``, where their number is
        known. Else rows of this one step are appended.
        """
        folder = folder.resolve()
        self._save_dir = self._root_dir = str(folder.parents[1])
        self._name, self._version = folder.parent.name, folder.name
        self.resumed = _Resumed(step, epoch, training, rows)

    @property
    def version(self) -> int | str:
        """The run's version; a new one is claimed by making its folder, so that two runs never share it."""
        while self._version is None and not rank_zero_only.rank:  # type: ignore[attr-defined]
            super().version  # noqa: B018  # the base finds the next free number and keeps it
            with explained(self.log_dir, "--trainer.logger.save_dir"):
                try:
                    Path(self.log_dir).mkdir(parents=True)
                except FileExistsError:
                    if not Path(self.log_dir).is_dir():
                        raise
                    self._version = None
        return super().version

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of metrics.csv; it keeps the run's folder to this process."""
        if self._lock is None or not self._lock.is_held:
            self._lock = FolderLock(Path(self.log_dir))
            self._lock.acquire()
            for part in Path(self.log_dir).rglob(".*.part"):  # a killed process has left them
                part.unlink(missing_ok=True)
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir, self.resumed)
        return self._experiment  # type: ignore[return-value]  # the base annotates a wider class

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write a row; those of a test have the checkpoint's step and epoch."""
        if self.resumed is not None and not self.resumed.training:
            step, metrics["epoch"] = max(0, self.resumed.step - 1), self.resumed.epoch
        super().log_metrics(metrics, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what remains; a run that failed before it wrote anything leaves no folder."""
        super().finalize(status)
        if self._lock is not None:
            self._lock.release()
        with contextlib.suppress(OSError):  # a folder that holds something stays
            Path(self.log_dir).rmdir()

    def log_hyperparams(self, *_: object, **__: object) -> None:
        """Do nothing: config.yaml lies beside the metrics."""


def run_logger(trainer: Trainer) -> RunLogger | None:
    """Return the logger that knows the run's folder, if there is one."""
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)


class SaveConfig(SaveConfigCallback):
    """A callback that writes a fit's config.yaml into the run's folder, and gives the config to the other loggers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take process zero's version of the run in every process."""
        run = run_logger(trainer)
        if run is not None:
            run._version = trainer.strategy.broadcast(run._version)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, after data, model and trainer have passed their checks."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config without ``ckpt_path``: a re-run is a new run."""
        if stage != "fit":
            return
        config = self.config.clone()
        config["ckpt_path"] = None
        text = self.parser.dump(config, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                write_files({Path(logger.log_dir) / "config.yaml": text.encode()})
                if logger.note is not None:
                    logger.note(Path(logger.log_dir))
            else:
                logger.log_hyperparams(yaml.safe_load(text))


class ElboBar(RichProgressBar):
    """Progress with the bound's terms: a bar on a terminal, a line per epoch in a log file."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=True)
        self.lines = not sys.stdout.isatty()
        if self.lines:
            self.disable()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics under short names: ``train/elbo`` is elbo, ``val/elbo`` is val_elbo."""
        values = {name: value for name, value in trainer.progress_bar_metrics.items() if not name.endswith("_epoch")}
        if "val/elbo" in trainer.callback_metrics:
            values["val/elbo"] = trainer.callback_metrics["val/elbo"].item()
        return {n.removesuffix("_step").removeprefix("train/").replace("/", "_"): v for n, v in values.items()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line where there is no terminal."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.lines and trainer.is_global_zero:
            metrics = self.get_metrics(trainer, pl_module)
            text = "  ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in metrics.items())
            print(f"epoch {trainer.current_epoch}  step {trainer.global_step}  {text}", flush=True)
