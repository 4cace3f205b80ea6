"""A run's folder and what is written into it: metrics, config, checkpoints, and the same in Weights & Biases."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, flush, replacing, undamaged, write_files
from vrnn_lightning.files.locks import FolderLock
from vrnn_lightning.resuming import RunCheckpoint

__all__ = ["ElboBar", "RunCheckpoint", "RunLogger", "SaveConfig", "WandbLogger", "run_logger"]

ID_FILE = "wandb_id.txt"
METRICS_FILE = ExperimentWriter.NAME_METRICS_FILE
INIT_TIMEOUT = 20.0  # seconds that a run waits for W&B before it continues offline; WANDB_INIT_TIMEOUT says otherwise
BEST = {  # what W&B's summary holds of a figure, instead of its last value
    "max": ("val/elbo", "val/elbo_per_sequence", "val/objective"),
    "min": ("val/bits_per_dim", "val/gap"),
}


class _Rows(ExperimentWriter):
    """Writes metrics.csv; on a resume it continues below the rows that the checkpoint has behind it."""

    def __init__(self, log_dir: str, resumed: bool, first_step: int | None, kept: int | None) -> None:
        self.resumed = resumed
        self.first_step = first_step
        self.kept = kept
        self.count = 0
        """Rows that were written, those before a resume included."""
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:  # Lightning's deletes the old rows here and has no other hook
        file = Path(self.metrics_file_path)
        if not file.is_file():
            return
        if not self.resumed:
            raise UserError(f"{file}: exists already. Fix: leave the logger's `version` out, or give --ckpt_path")
        damaged = undamaged(f"{file}: is damaged", "move it away, and resume without its rows")
        with explained(file), damaged, file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            rows = [row for number, row in enumerate(reader) if self._keeps(number, row)]
            self.metrics_keys = list(reader.fieldnames or [])
        self.count = len(rows)
        self._write(rows)

    def _keeps(self, number: int, row: dict[str, str]) -> bool:
        """Return whether a row was written before the checkpoint; a line cut off by a kill was not."""
        step = row.get("step") or ""
        if not step.isdigit():
            return False
        earlier = self.first_step is None or int(step) < self.first_step
        if self.kept is None:
            return earlier
        return number < self.kept or (earlier and any(row[key] for key in row if str(key).startswith("test/")))

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Keep a row until it is saved, and count it."""
        super().log_metrics(metrics_dict, step)
        self.count += 1

    def save(self) -> None:
        """Write the rows that were kept, on the disk."""
        if not self.metrics:
            return
        with explained(self.metrics_file_path, "--trainer.logger"):
            super().save()
            flush(Path(self.metrics_file_path))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with Path(self.metrics_file_path).open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        self._write(rows)

    def _write(self, rows: list[dict[str, str]]) -> None:
        with replacing(Path(self.metrics_file_path)) as temporary, temporary.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


class RunLogger(CSVLogger):
    """Keeps a run's numbers in ``<save_dir>/<name>/version_N/metrics.csv``; the run's other files lie beside it.

    Args:
        save_dir: Folder of all runs. Default: ``runs`` under ``--trainer.default_root_dir``.
        name: Name of the experiment. Default: the datamodule's, in lower case.
        version: Name or number of this run. Default: the next free number.
    """

    def __init__(self, save_dir: str | None = None, name: str | None = None, version: int | str | None = None) -> None:
        super().__init__(save_dir or "runs", name or "run", version)
        self._open = {key for key, value in (("save_dir", save_dir), ("name", name)) if value is None}
        self.resumed = False
        self.first_step: int | None = None
        self.kept_rows: int | None = None
        self._lock: FolderLock | None = None
        self.note: Callable[[Path], None] | None = None
        """Called with the run's folder when a fit has written its config there."""
        self.place_in_time: tuple[int, int] | None = None

    def place(self, root: Path, name: str) -> None:
        """Fill in what the user left open.

        Args:
            root: The folder that ``runs`` lies in.
            name: Name of the experiment.
        """
        if "save_dir" in self._open:
            self._save_dir = self._root_dir = str(root.resolve() / "runs")
        if "name" in self._open:
            self._name = name

    @property
    def rows(self) -> int:
        """Rows that metrics.csv has."""
        return getattr(self._experiment, "count", 0)

    def resume(self, folder: Path, step: int, epoch: int, training: bool, rows: int | None = None) -> None:
        """Continue in the folder of an earlier run.

        Args:
            folder: That folder, ``<save_dir>/<name>/<version>``.
            step: Optimiser steps that the checkpoint has behind it.
            epoch: The epoch it was written in.
            training: Drop the rows of later steps, which will come again; else append rows of this one step.
            rows: Rows of training and validation that were written before the checkpoint; ``None`` if it is not known.
        """
        folder = folder.resolve()
        self._save_dir = self._root_dir = str(folder.parents[1])
        self._name, self._version = folder.parent.name, folder.name
        self.resumed = True
        self.first_step = step if training else None
        self.kept_rows = rows if training else None
        self.place_in_time = None if training else (max(0, step - 1), epoch)

    def share(self, trainer: Trainer) -> None:
        """Take process zero's version in every process."""
        self._version = trainer.strategy.broadcast(self._version)

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
            for part in Path(self.log_dir).rglob(".*.part"):  # what a kill has left
                part.unlink(missing_ok=True)
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir, self.resumed, self.first_step, self.kept_rows)
        return self._experiment  # type: ignore[return-value]  # the base annotates a wider class

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write a row; what a test says of a checkpoint stands at the checkpoint's step and epoch."""
        if self.place_in_time is not None:
            step, metrics["epoch"] = self.place_in_time
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
    """Writes a fit's config.yaml into the run's folder and gives the same, nested, to the other loggers once."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the run's folder."""
        run = run_logger(trainer)
        if run is not None:
            run.share(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, now that nothing is wrong with data, model and trainer."""
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
                with replacing(Path(logger.log_dir) / "config.yaml") as temporary:
                    temporary.write_text(text)
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


class WandbLogger(LightningWandbLogger):
    """Sends the run's numbers and media to Weights & Biases; its files lie in the run's folder.

    The W&B run is called ``<name>/<version>`` like the folder, and a resumed run continues in the same W&B run. Its
    summary holds the best of each bound: ``val/elbo.max``, ``val/gap.min``. ``WANDB_MODE=offline`` keeps everything on
    this machine, ``WANDB_MODE=disabled`` writes nothing; without a login or a network the run is kept as offline is.

    Args:
        project: The W&B project. Default: ``WANDB_PROJECT``, or vrnn-lightning.
        name: Name of the W&B run. Default: ``WANDB_NAME``, or the run's folder.
        entity: The W&B user or team. Default: your own.
        group: Puts runs together in the W&B page.
        job_type: What the run is for, to tell runs of a group apart.
        tags: Words to filter runs by.
        notes: A longer description.
        log_model: Which checkpoints become artifacts ``model-<id of the W&B run>``. "best": the best one by its
            monitor, once, when a fit ends in whatever way. Lightning's: True, each ModelCheckpoint's at the end of a
            fit that succeeds; "all", each while it trains; those without a monitor become ``last-<id>``.
    """

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        log_model: Literal["best", "all"] | bool = False,
    ) -> None:
        super().__init__(
            name=name or os.environ.get("WANDB_NAME"),
            project=project or os.environ.get("WANDB_PROJECT") or "vrnn-lightning",
            log_model=False if log_model == "best" else log_model,
            entity=entity,
            group=group,
            job_type=job_type,
            tags=tags,
            notes=notes,
        )
        # Lightning offers no other way to leave these two out: wandb warns about the one, and about the other offline.
        self._wandb_init.pop("anonymous", None)
        self._wandb_init.pop("resume", None)
        if "WANDB_SWEEP_ID" in os.environ:
            del self._wandb_init["project"]  # the sweep's, whatever is said here
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            self._wandb_init["settings"] = {"init_timeout": INIT_TIMEOUT}
        self.run: RunLogger | None = None
        self.log_best = log_model == "best"
        self._best: ModelCheckpoint | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started when first asked for."""
        if self._experiment is None:
            if self.run is not None:
                self._settle(Path(self.run.log_dir))
            self._start()
        return super().experiment

    def _settle(self, folder: Path) -> None:
        """Use a folder for the W&B run: the one that the folder belongs to, if there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / ID_FILE
        earlier = id_file.read_text().strip() if id_file.is_file() else self._id
        self._wandb_init.update(dir=str(folder), name=self._name or f"{folder.parent.name}/{folder.name}", id=earlier)
        if earlier and os.environ.get("WANDB_MODE") != "offline":
            self._wandb_init["resume"] = "allow"

    def _start(self) -> None:
        """Start the W&B run, offline where there is no way to the server.

        Raises:
            UserError: An option that W&B takes nowhere.
        """
        import wandb
        import wandb.sdk.lib

        if not hasattr(wandb.sdk.lib, "RunDisabled"):  # Lightning 2.6 imports it to compare the run's class with
            setattr(wandb.sdk.lib, "RunDisabled", type("RunDisabled", (), {}))  # noqa: B010  # unknown to mypy
        try:
            try:
                run = super().experiment
            except wandb.Error as error:
                self._wandb_init.pop("resume", None)
                self._wandb_init["mode"] = "offline"
                run = super().experiment
                cause, folder = str(error).splitlines()[0].rstrip("."), Path(run.dir).parent
                print(f"W&B: {cause}; the run continues offline, `wandb sync {folder}` sends it later", file=sys.stderr)
        except (wandb.Error, ValueError) as error:
            raise UserError(f"--trainer.logger WandbLogger: {' '.join(str(error).split())}") from error
        for goal, names in BEST.items():
            for name in names:
                run.define_metric(name, step_metric="trainer/global_step", summary=goal)
        if self.run is not None:
            write_files({Path(self.run.log_dir) / ID_FILE: f"{run.id}\n".encode()})

    def choose(self, checkpoints: Sequence[Callback]) -> None:
        """Choose the first ModelCheckpoint with a monitor as the source of the best checkpoint.

        Raises:
            UserError: There is none, but its best is to be an artifact.
        """
        monitored = [c for c in checkpoints if isinstance(c, ModelCheckpoint) and c.monitor is not None]
        if self.log_best and not monitored:
            raise UserError("--trainer.logger.log_model best: no checkpoint has a monitor; give --checkpoint.monitor")
        self._best = monitored[0] if monitored else None

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Log checkpoints while the run trains, where that is wanted."""
        if self._best is None and checkpoint_callback.monitor is not None:
            self._best = checkpoint_callback
        super().after_save_checkpoint(checkpoint_callback)

    def _scan_and_log_checkpoints(self, checkpoint_callback: ModelCheckpoint) -> None:
        kind = "last" if checkpoint_callback.monitor is None else "model"  # Lightning's alias for either is "best"
        self._checkpoint_name = f"{kind}-{self.experiment.id}"
        super()._scan_and_log_checkpoints(checkpoint_callback)

    def _log_best(self, checkpoint: ModelCheckpoint) -> None:
        """Make the best checkpoint an artifact, which W&B adds no version of where it is the one logged before."""
        import wandb

        path, score = Path(checkpoint.best_model_path), checkpoint.best_model_score
        if not path.is_file() or score is None:
            return
        stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        step, epoch = stored["global_step"], stored["epoch"]
        metadata = {"monitor": checkpoint.monitor, "mode": checkpoint.mode, "score": score.item()}
        artifact = wandb.Artifact(
            f"model-{self.experiment.id}", "model", metadata={**metadata, "step": step, "epoch": epoch}
        )
        artifact.add_file(str(path), "model.ckpt")
        self.experiment.log_artifact(artifact, aliases=["best", "latest", f"step-{step}"])

    def _summarise(self, folder: Path) -> None:
        """Count what came before a resume among what the summary holds the best of: W&B knows this process' part."""
        file = folder / METRICS_FILE
        if not file.is_file():
            return
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        for goal, names in BEST.items():
            for name in names:
                values = [float(row[name]) for row in rows if row.get(name)]
                finite = [value for value in values if math.isfinite(value)]
                if finite:
                    self.experiment.summary[name] = {goal: max(finite) if goal == "max" else min(finite)}

    @rank_zero_only
    def log_media_table(self, key: str, columns: list[str], lines: list[list[Any]]) -> None:
        """Log a table; a cell that is a picture's or a sound's file shows or plays it."""
        import wandb

        kinds = {".png": wandb.Image, ".wav": wandb.Audio}
        shown = [[kinds[cell.suffix](str(cell)) if isinstance(cell, Path) else cell for cell in line] for line in lines]
        self.log_table(key, columns, shown)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload what remains and close the W&B run, so that the next fit in this process gets its own."""
        super().finalize(status)
        if self._experiment is not None:
            if self.run is not None and self.run.resumed:
                self._summarise(Path(self.run.log_dir))
            if self.log_best and self._best is not None:
                self._log_best(self._best)
            self._id = self._wandb_init["id"] = self._experiment.id
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None
        self._best = None
