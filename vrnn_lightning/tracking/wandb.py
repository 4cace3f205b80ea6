"""The same numbers, media and checkpoints in Weights & Biases."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only

from vrnn_lightning.errors import UserError
from vrnn_lightning.files import write_files
from vrnn_lightning.tracking.run import METRICS_FILE, RunLogger, read_rows

__all__ = ["WandbLogger"]

ID_FILE = "wandb_id.txt"
INIT_TIMEOUT = 20.0
"""Seconds that a run waits for W&B before it continues offline, unless ``WANDB_INIT_TIMEOUT`` sets them."""
BEST = {
    **dict.fromkeys(("val/elbo", "val/elbo_per_sequence", "val/objective"), "max"),
    **dict.fromkeys(("val/bits_per_dim", "val/gap"), "min"),
}
"""Metrics whose greatest or smallest value W&B's summary holds, in place of the last one."""


class WandbLogger(LightningWandbLogger):
    """Sends the run's numbers and media to Weights & Biases; its files lie in the run's folder.

    The W&B run is called ``<name>/<version>`` like the folder, and a resumed run continues in the same W&B run. Its
    summary holds the best of each bound: ``val/elbo.max``, ``val/gap.min``. ``WANDB_MODE=offline`` keeps everything on
    this machine, ``WANDB_MODE=disabled`` writes nothing. A run without a login or a network continues offline.

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
        for option in ("anonymous", "resume"):  # wandb warns about the one, and about the other offline
            self._wandb_init.pop(option, None)
        if "WANDB_SWEEP_ID" in os.environ:
            del self._wandb_init["project"]  # the sweep has one
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            self._wandb_init["settings"] = {"init_timeout": INIT_TIMEOUT}
        self.run: RunLogger | None = None
        self.log_best = log_model == "best"
        self._best: ModelCheckpoint | None = None
        """The source of the best checkpoint."""

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
        """Write the W&B run into a folder, and continue the one that the folder belongs to."""
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / ID_FILE
        earlier = id_file.read_text().strip() if id_file.is_file() else self._id
        self._wandb_init.update(dir=str(folder), name=self._name or f"{folder.parent.name}/{folder.name}", id=earlier)
        if earlier and os.environ.get("WANDB_MODE") != "offline":
            self._wandb_init["resume"] = "allow"

    def _start(self) -> None:
        """Start the W&B run, offline if the server can't be reached; raise where W&B does not accept an option."""
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
        for name, goal in BEST.items():
            run.define_metric(name, step_metric="trainer/global_step", summary=goal)
        if self.run is not None:
            write_files({Path(self.run.log_dir) / ID_FILE: f"{run.id}\n".encode()})

    def choose(self, checkpoints: Sequence[Callback]) -> None:
        """Choose the first ModelCheckpoint with a monitor as the source of the best one; raise if that is missing."""
        monitored = (c for c in checkpoints if isinstance(c, ModelCheckpoint) and c.monitor is not None)
        self._best = next(monitored, None)
        if self.log_best and self._best is None:
            raise UserError(
                "--trainer.logger.log_model best: no checkpoint has a monitor. Fix: give --checkpoint.monitor"
            )

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Log a checkpoint while the run trains, if ``log_model`` asks for it."""
        if self._best is None and checkpoint_callback.monitor is not None:
            self._best = checkpoint_callback
        super().after_save_checkpoint(checkpoint_callback)

    def _scan_and_log_checkpoints(self, checkpoint_callback: ModelCheckpoint) -> None:
        kind = "last" if checkpoint_callback.monitor is None else "model"  # Lightning's alias for either is "best"
        self._checkpoint_name = f"{kind}-{self.experiment.id}"
        super()._scan_and_log_checkpoints(checkpoint_callback)

    def _log_best(self, checkpoint: ModelCheckpoint) -> None:
        """Make the best checkpoint an artifact; W&B adds no version if it has logged the same file before."""
        import wandb

        path, score = Path(checkpoint.best_model_path), checkpoint.best_model_score
        if not path.is_file() or score is None:
            return
        stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        metadata = {"monitor": checkpoint.monitor, "mode": checkpoint.mode, "score": score.item()}
        metadata |= {"step": stored["global_step"], "epoch": stored["epoch"]}
        artifact = wandb.Artifact(f"model-{self.experiment.id}", "model", metadata=metadata)
        artifact.add_file(str(path), "model.ckpt")
        self.experiment.log_artifact(artifact, aliases=["best", "latest", f"step-{metadata['step']}"])

    def _summarise(self, folder: Path) -> None:
        """Write the best values of a resumed run into the summary: W&B has seen those of this process alone."""
        file = folder / METRICS_FILE
        rows = read_rows(file) if file.is_file() else []
        for name, goal in BEST.items():
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
