"""The callback that saves checkpoints at the moments after which a resume is exact, and the writer of their files."""

from __future__ import annotations

import errno
import re
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from vrnn_lightning.errors import UserError
from vrnn_lightning.files import is_remote, replacing
from vrnn_lightning.resuming.record import Stage
from vrnn_lightning.trust import read_checkpoint

__all__ = ["CheckpointConnector", "RunCheckpoint", "WholeCheckpoints"]


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which saves where a resume is exact and finds its files in a folder that was moved.

    Without a monitor it saves when all of an epoch is done (validated or not), when training ends, after every
    validation within an epoch, every so often by the clock, and when a signal ends the run. With a monitor that a
    validation yields, it saves after validations alone, so that no score is that of earlier weights.

    Args:
        every: Also save when so much time has passed since the last save, as "15min" (s, min, h, d); ``None``: never.
        options: Those of ModelCheckpoint.

    Raises:
        UserError: ``every`` is not a length of time.
    """

    def __init__(self, every: str | None = None, **options: Any) -> None:
        intervals = [] if every is None else [_seconds(every)]
        self._saved_at = time.monotonic()
        super().__init__(**options)
        if self._train_time_interval is not None:
            intervals.append(self._train_time_interval.total_seconds())
        self.every = min(intervals, default=None)
        """Seconds from one save to the next, ``None`` if the clock asks for none."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do nothing: :meth:`on_save_point` follows, when also the batch's row of metrics is written."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best, also where a save by step has waited for this validation."""
        if self.monitor is None:
            return
        if self._defer_save_until_validation and not self._should_skip_saving_checkpoint(trainer):
            self._defer_save_until_validation = False
            self._save(trainer)
        else:
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is not None:
            super().on_train_epoch_end(trainer, pl_module)

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether the clock asks for a save; process zero's decides."""
        return self.every is not None and trainer.is_global_zero and time.monotonic() - self._saved_at >= self.every

    def on_save_point(self, trainer: Trainer, *, is_epoch_end: bool, is_late: bool, is_stopping: bool) -> None:
        """Save if it is time to, or a clock is late, now that nothing of a batch or epoch is left to be done."""
        if trainer.fast_dev_run or trainer.sanity_checking:  # type: ignore[attr-defined]  # a connector sets it
            return
        loop: Any = trainer.fit_loop.epoch_loop
        if self.monitor is not None:
            if not is_epoch_end and loop.stage != Stage.VALIDATING:
                self._save_monitored(trainer)
            return
        is_due = self._is_due_after_epoch(trainer) if is_epoch_end else self._is_due_after_batch(trainer)
        if is_due or is_stopping or (is_late and self.every is not None):
            self._save(trainer)
            self._saved_at = time.monotonic()

    def _save(self, trainer: Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _is_due_after_epoch(self, trainer: Trainer) -> bool:
        if self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            return True
        loop, epochs = trainer.fit_loop, trainer.fit_loop.epoch_progress.current
        limits = ((epochs.processed, loop.max_epochs), (trainer.global_step, loop.max_steps))  # type: ignore[attr-defined]
        return trainer.should_stop or any(most is not None and 0 <= most <= count for count, most in limits)

    def _is_due_after_batch(self, trainer: Trainer) -> bool:
        loop: Any = trainer.fit_loop.epoch_loop
        is_last = loop._num_ready_batches_reached()
        is_validated = loop.has_validated and not is_last and self._every_n_epochs >= 1
        is_new_step = self._last_global_step_saved < trainer.global_step
        return is_validated or (self._is_step_due(trainer) and is_new_step) or (loop.done and not is_last)

    def _is_step_due(self, trainer: Trainer) -> bool:
        return self._every_n_train_steps >= 1 and trainer.global_step % self._every_n_train_steps == 0

    def _save_monitored(self, trainer: Trainer) -> None:
        """Save by step or clock; where a validation yields the score, after the next one."""
        loop: Any = trainer.fit_loop.epoch_loop
        if not str(self.monitor).startswith("val/"):
            super().on_train_batch_end(trainer, trainer.lightning_module, None, None, loop.batch_idx)
        elif self._is_step_due(trainer) and self._last_global_step_saved != trainer.global_step:
            if loop.has_validated:
                self._save(trainer)
            else:
                self._defer_save_until_validation = True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "is_deferred": self._defer_save_until_validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of an earlier run in this folder; a run that starts in another one has no best yet."""
        moved = state_dict.get("dirpath") != self.dirpath
        if moved and not Path(self._here(state_dict["best_model_path"])).is_file():
            return
        paths = {key: self._here(state_dict[key]) for key in state_dict if key.endswith("_model_path")}
        best = {self._here(path): score for path, score in state_dict["best_k_models"].items()}
        state_dict = {**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath}
        self._defer_save_until_validation = state_dict.get("is_deferred", False)
        self.current_score = state_dict.get("current_score")
        super().load_state_dict(state_dict)

    def _here(self, path: str) -> str:
        """Return where a checkpoint of an earlier run lies now."""
        if path and is_remote(str(self.dirpath)):
            return f"{self.dirpath}/{Path(path).name}"
        return str(Path(self.dirpath or "", Path(path).name)) if path else path


def _seconds(text: str) -> float:
    """Return a length of time in seconds.

    >>> _seconds("15min"), _seconds("90 s")
    (900.0, 90.0)
    """
    units = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h|d)", text.strip())
    if not match or not float(match[1]):
        raise UserError(f"--last.every {text}: is not a length of time. Fix: write it as 90s, 15min, 2h or 1d, or null")
    return float(match[1]) * units[match[2]]


class CheckpointConnector(_CheckpointConnector):
    """Lightning's, without the ``hpc_ckpt`` of another SLURM job that lies in the working directory."""

    @property
    def _hpc_resume_path(self) -> None:
        return None


class WholeCheckpoints(TorchCheckpointIO):
    """Reader and writer of checkpoints; a write replaces the earlier file when the new one is complete."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the content of a checkpoint: weights, numbers and text, whatever ``weights_only`` asks for."""
        if is_remote(path):
            return super().load_checkpoint(path, weights_only=True)
        return read_checkpoint(Path(path), map_location=map_location or "cpu")

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, whole or not at all; to a remote place, given by its URL, as Lightning does."""
        if is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(str(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch hides the system's error
                hidden = error.__context__
                raise hidden if isinstance(hidden, OSError) else OSError(errno.EIO, str(error)) from error

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, and no other file that a checkpoint's state may name as one."""
        parts = Path(path).parts
        if ".." not in parts and parts[-1].endswith(".ckpt"):
            super().remove_checkpoint(path)
