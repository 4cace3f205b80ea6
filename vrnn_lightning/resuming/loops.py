"""Lightning's fit loop and the loops in it, with checkpoints that record their moment and a resume from there."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from vrnn_lightning.errors import UserError
from vrnn_lightning.resuming.checkpoint import CheckpointConnector, RunCheckpoint, WholeCheckpoints
from vrnn_lightning.resuming.record import RECORD, Stage, callbacks_of, check_record, make_record, warn_of_differences
from vrnn_lightning.resuming.signals import Stopped, interruption

__all__ = ["ResumableEpochLoop", "ResumableFitLoop", "ResumableValidationLoop", "make_resumable"]

IN_BATCH = (Stage.BATCH_END, Stage.VALIDATING, Stage.VALIDATED)
"""Moments between the training on a batch and the batch's end."""


def make_resumable(trainer: Trainer) -> None:
    """Make a trainer's fit loop write and read records of moments, and ignore checkpoints in the working directory.

    Loops, connector and writer that are not Lightning's own are left alone.
    """
    loop, connector = trainer.fit_loop, trainer._checkpoint_connector
    if type(loop) is _FitLoop and type(loop.epoch_loop) is _TrainingEpochLoop:
        loop.__class__ = ResumableFitLoop  # it keeps its state: Lightning has made and connected it
        loop.epoch_loop.__class__ = ResumableEpochLoop
        loop.epoch_loop.val_loop.__class__ = ResumableValidationLoop
    if type(connector) is _CheckpointConnector:
        connector.__class__ = CheckpointConnector
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    if interruption.is_watching:  # our handlers are installed already
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


class ResumableValidationLoop(_EvaluationLoop):
    """Lightning's validation, which a signal may end between two batches."""

    _can_end = False
    """Whether all processes have as many batches, so that they can agree before each."""

    def on_run_start(self) -> None:
        self._can_end = interruption.is_watching and not self.trainer.sanity_checking
        if self._can_end and self.trainer.world_size > 1:
            count = sum(self.max_batches)
            most, least = _fit(self).greatest(int(count), -int(count)) if math.isfinite(count) else (1, 1)
            self._can_end = most == -least
        super().on_run_start()

    def _evaluation_step(self, *args: Any) -> None:
        if self._can_end:
            _fit(self).end_if_asked()
        super()._evaluation_step(*args)

    def teardown(self) -> None:
        """Drop the outputs, and end the processes that read ahead; the fit loop's teardown calls this one."""
        super().teardown()
        for combined in (_fit(self)._combined_loader, self._combined_loader):
            for loader in [] if combined is None else combined.flattened:
                if hasattr(loader, "close"):
                    loader.close()

    def _on_evaluation_end(self, *args: Any, **kwargs: Any) -> None:
        _fit(self).epoch_loop.stage = Stage.VALIDATED
        super()._on_evaluation_end(*args, **kwargs)


class ResumableEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, which can begin after the training on a batch."""

    stage = Stage.EPOCH
    """The moment of a checkpoint that is written now."""
    has_validated = False
    """Whether a validation followed the last batch."""
    _is_validation_due: bool | None = None
    """Whether a checkpoint's record asks for a validation, ``None`` if Lightning decides."""

    @property
    def done(self) -> bool:
        return not _fit(self).is_pending(*IN_BATCH) and super().done

    def reset(self) -> None:
        if not _fit(self).record:
            super().reset()

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on a batch, unless a checkpoint was written after it."""
        fit = _fit(self)
        if not fit.is_pending(*IN_BATCH):
            fit.record = {}
            self.stage = Stage.BATCH_END
            super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate if it is due; then everything of the batch is done."""
        fit = _fit(self)
        record, fit.record = fit.record, {}
        pending = record.get("stage")
        if pending == Stage.BATCH_END and record.get("row"):
            self.trainer._logger_connector.log_metrics(record["row"])
        self._is_validation_due = {Stage.VALIDATING: True, Stage.VALIDATED: False}.get(pending)  # type: ignore[arg-type]
        self.has_validated = False
        self.stage = Stage.VALIDATING
        super().on_advance_end(data_fetcher)
        self._is_validation_due = None
        self.stage = Stage.BATCH
        fit.at_save_point()

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        due = self._is_validation_due
        self.has_validated = super()._should_check_val_fx(data_fetcher) if due is None else due
        return self.has_validated

    def _broadcast_sigterm_tensor(self) -> None:
        if not interruption.is_watching:  # else the processes agree in at_save_point
            super()._broadcast_sigterm_tensor()


class ResumableFitLoop(_FitLoop):
    """Lightning's loop over epochs, which records the moment of each checkpoint and resumes from there."""

    epoch_loop: ResumableEpochLoop
    record: dict[str, Any] = {}
    """The record of the checkpoint's moment, until what follows that moment is done."""

    def is_pending(self, *stages: Stage) -> bool:
        """Return whether the fit is being resumed from one of some moments."""
        return self.record.get("stage") in stages

    # ---- saving

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return Lightning's counters as they are when the moment's batch, and its epoch if it ended, are done."""
        state = super().state_dict(*args, **kwargs)
        stage = state["state_dict"][RECORD]["stage"]
        for kind in ("total", "current"):
            batches = state["epoch_loop.batch_progress"][kind]
            batches.update(dict.fromkeys(("ready", "started", "completed"), batches["processed"]))
            validated = state["epoch_loop.val_loop.batch_progress"][kind]
            validated.update(dict.fromkeys(validated, 0))
            epochs = state["epoch_progress"][kind]
            if stage == Stage.EPOCH:
                epochs.update(dict.fromkeys(("ready", "started", "completed"), epochs["processed"]))
            elif stage != Stage.EPOCH_END:
                epochs.update(processed=epochs["completed"])
        return state

    def on_save_checkpoint(self) -> dict[str, Any]:
        state = {
            **super().on_save_checkpoint(),
            RECORD: make_record(self.trainer, self.epoch_loop, self.epoch_loop.stage),
        }
        if state[RECORD]["is_within"]:
            for loader in state.get("combined_loader", []):
                if isinstance(loader, dict) and "batches_read" in loader:  # ours, which has read one more
                    loader["batches_read"] = cast(Any, self.epoch_loop.batch_progress.current).processed
        return state

    def greatest(self, *numbers: int) -> list[int]:
        """Return the greatest of each number over all processes."""
        if self.trainer.world_size == 1:
            return list(numbers)
        reduced = torch.tensor(numbers, device=self.trainer.strategy.root_device)
        torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX)
        return cast("list[int]", reduced.tolist())

    def at_save_point(self, *, is_epoch_end: bool = False) -> None:
        """Call the callbacks that save, after a batch or an epoch; end the run if a signal asked for it."""
        savers = callbacks_of(self.trainer, RunCheckpoint)
        timed = [c for c in savers if c.every is not None and c.monitor is None]
        signum, is_late = interruption.signum, int(any(c.is_due(self.trainer) for c in timed))
        if timed or interruption.is_watching:
            signum, is_late = self.greatest(signum, is_late)
        self._save(signum, is_epoch_end=is_epoch_end, is_late=bool(is_late))

    def end_if_asked(self) -> None:
        """Save and end between two batches of a validation, if a signal asked for it."""
        (signum,) = self.greatest(interruption.signum)
        if signum:
            for callback in callbacks_of(self.trainer, WeightAveraging):
                if callback._average_model is not None:  # its weights take the place of the model's in a validation
                    callback._swap_models(self.trainer.lightning_module)
            self._save(signum)

    def _save(self, signum: int, *, is_epoch_end: bool = False, is_late: bool = False) -> None:
        """Call the callbacks that save; end the run if there is a signal."""
        savers = callbacks_of(self.trainer, RunCheckpoint)
        for saver in savers:
            saver.on_save_point(self.trainer, is_epoch_end=is_epoch_end, is_late=is_late, is_stopping=bool(signum))
        if signum:
            raise Stopped(signum, next((c.best_model_path for c in savers if c.monitor is None), ""))

    # ---- resuming

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        super().on_load_checkpoint(state_dict)
        self.record = check_record(state_dict.get(RECORD))

    @property
    def restarting(self) -> bool:
        return self._restarting

    @restarting.setter
    def restarting(self, restarting: bool) -> None:
        if self.record:
            _Loop.restarting.fset(self, restarting)  # type: ignore[attr-defined]  # a property, which types don't see
        else:
            _FitLoop.restarting.fset(self, restarting)  # type: ignore[attr-defined]

    @property
    def done(self) -> bool:
        is_last = self.is_pending(Stage.BATCH) and self.epoch_loop.batch_progress.is_last_batch
        return not is_last and not self.is_pending(*IN_BATCH, Stage.EPOCH_END) and super().done

    def reset(self) -> None:
        """Begin, or take the state of the moment at which a checkpoint was written."""
        interruption.is_deferred = interruption.is_watching
        if not self.record:
            super().reset()
            return
        torch.set_grad_enabled(True)
        warn_of_differences(self.trainer, self.record)
        self.restarting = False
        self.trainer._logger_connector._callback_metrics.update(self.record.get("metrics", {}))
        if self.is_pending(Stage.EPOCH_END):
            self.epoch_loop._update_learning_rates(interval="epoch", update_plateau_schedulers=True)
            self.epoch_progress.increment_completed()
        should_stop = bool(self.record.get("should_stop"))
        if self.is_pending(Stage.EPOCH, Stage.EPOCH_END):
            self.record = {}
            self._resuming_from_checkpoint = False
        early = callbacks_of(self.trainer, EarlyStopping)
        if should_stop and any(c.stopped_epoch or c.wait_count >= c.patience for c in early):
            self.trainer.should_stop = True

    def on_run_start(self) -> None:
        """Call the hooks of a training's start, and restore the gradients that were accumulated."""
        module = self.trainer.lightning_module
        if not self.trainer.global_step:
            for callback in callbacks_of(self.trainer, WeightAveraging):
                if callback._average_model is not None:  # copied before the data's scaler and statistics were known
                    callback._average_model.module.load_state_dict(module.state_dict())
        super().on_run_start()
        gradients = self.record.get("gradients") or {}
        for name, parameter in module.named_parameters():
            if name in gradients:
                own = gradients[name][self.trainer.global_rank % len(gradients[name])]
                if own.shape != parameter.shape:
                    raise UserError(f"the checkpoint's gradient of {name} does not fit. Fix: give another checkpoint")
                parameter.grad = own.to(parameter, copy=True)

    def on_advance_start(self) -> None:
        """Begin an epoch, unless a checkpoint was written within it."""
        averaging = callbacks_of(self.trainer, StochasticWeightAveraging)
        starting = [c for c in averaging if not c._initialized and c._scheduler_state is not None]
        groups = [dict(group) for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        if not self.record:
            super().on_advance_start()
        else:
            self.setup_data()
            assert self._combined_loader is not None
            for loader in self._combined_loader.flattened:
                _set_sampler_epoch(loader, self.trainer.current_epoch)
            for callback in averaging:
                callback.on_train_epoch_start(self.trainer, self.trainer.lightning_module)
        if starting:  # a schedule that is made again changes the options that the optimiser's state has restored
            now = (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups)
            for group, before in zip(now, groups, strict=True):
                group.update({key: value for key, value in before.items() if key != "params"})

    def advance(self) -> None:
        """Run an epoch; save if reading data fails because a signal ended the processes that read."""
        try:
            super().advance()
        except Exception:
            progress = self.epoch_loop.batch_progress.current
            if not interruption.signum or self.trainer.world_size > 1 or progress.ready != progress.completed:
                raise
            if self.epoch_loop.stage is Stage.VALIDATING:
                self.end_if_asked()
            self.epoch_loop.stage = Stage.BATCH if progress.completed else Stage.EPOCH
            self._save(interruption.signum)

    def on_advance_end(self) -> None:
        """End an epoch; then nothing of it is left."""
        self.record = {}
        is_complete = self.epoch_loop._num_ready_batches_reached()
        self.epoch_loop.stage = Stage.EPOCH_END
        super().on_advance_end()
        self.epoch_loop.stage = Stage.EPOCH
        if is_complete:
            progress = self.epoch_progress.current
            progress.completed -= 1  # callbacks see the epoch that ended, as in on_train_epoch_end
            try:
                self.at_save_point(is_epoch_end=True)
            finally:
                progress.completed += 1

    def on_run_end(self) -> None:
        """Call the hooks of a training's end; from here on a signal ends the command at once."""
        interruption.is_deferred = False
        if interruption.signum:
            raise Stopped(interruption.signum)
        super().on_run_end()


def _fit(loop: _Loop) -> ResumableFitLoop:
    return cast(ResumableFitLoop, loop.trainer.fit_loop)
