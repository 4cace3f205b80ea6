"""Exact resumes: a fit loop whose checkpoints say what of their epoch was done, and signals that save before they end.

Lightning lets callbacks save at six different moments of an epoch and infers on a resume, from counters, what is still
to be done; after some of them it skips or repeats a validation, a schedule's step or a row of metrics. Here each
checkpoint records its moment (:class:`Stage`), and a resume does what follows that moment and nothing else.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vrnn_lightning.compatibility import OPTIMIZED
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import is_remote, replacing
from vrnn_lightning.trust import read_checkpoint

__all__ = [
    "Interruption",
    "Stage",
    "Stopped",
    "interruption",
    "make_resumable",
    "match_optimizer_states",
    "resume_record",
]

RECORD = "resume"
"""Key of the record in a checkpoint's state of the fit loop."""


class Stage(StrEnum):
    """The moment of an epoch at which a checkpoint was written."""

    BATCH_END = "batch_end"
    """In ``on_train_batch_end``: the row of metrics, a validation that is due and the epoch's end are to follow."""
    VALIDATING = "validating"
    """During a validation, which is to be repeated."""
    VALIDATED = "validated"
    """In ``on_validation_end``: the rest of the batch and the epoch's end are to follow."""
    BATCH = "batch"
    """After a batch and all that follows it; if it was the epoch's last one, the epoch's end is to follow."""
    EPOCH_END = "epoch_end"
    """In ``on_train_epoch_end``: a schedule that reads metrics is to step."""
    EPOCH = "epoch"
    """Between two epochs."""


class Stopped(SystemExit):
    """A signal ended the command: exits with 128 + its number, as a shell expects."""

    def __init__(self, signum: int, saved: str | None = None) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.saved = saved or ""
        """The checkpoint that was written before."""
        self.is_agreed = saved is not None
        """Whether all processes of the run end for it, at the same moment of a fit."""


class Interruption:
    """What a signal has asked for: to end at once, or after the next moment at which a fit can be saved.

    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signum = 0
        """The signal that was received, 0 if none."""
        self.is_deferred = False
        """Whether a fit is running that will look at :attr:`signum` itself."""

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.signum:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
        if not self.is_deferred:
            raise Stopped(signum)

    @contextmanager
    def watching(self, *signals: int) -> Iterator[None]:
        """Handle signals within a block; without effect outside the main thread, which alone receives them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signum, self.is_deferred = 0, False
        earlier = {signum: signal.signal(signum, self) for signum in signals}
        try:
            yield
        finally:
            self.signum, self.is_deferred = 0, False  # a fit from Python that follows was not asked to end
            for signum, handler in earlier.items():
                signal.signal(signum, handler)

    @property
    def is_watching(self) -> bool:
        """Whether signals come here."""
        return signal.getsignal(signal.SIGTERM) is self


interruption = Interruption()
"""That of this process; the command line watches it."""


def resume_record(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of its moment; nothing if it was written by an older version or another loop."""
    found: Any = checkpoint
    for key in ("loops", "fit_loop", "state_dict", RECORD):
        found = found.get(key) if isinstance(found, dict) else None
    return _checked(found)


def _checked(record: Any) -> dict[str, Any]:
    """Return the record of a checkpoint, or nothing where there is none.

    Raises:
        UserError: It is not what this loop writes.
    """
    if record is None:
        return {}
    parts = [record.get(key) or {} for key in ("metrics", "row", "gradients")] if isinstance(record, dict) else [None]
    is_named = all(isinstance(part, dict) and all(isinstance(key, str) for key in part) for part in parts)
    metrics, row, gradients = cast("list[dict[str, Any]]", parts if is_named else [{}, {}, {}])
    if not (
        is_named
        and all(isinstance(value, Tensor) and value.numel() == 1 for value in metrics.values())
        and "step" not in row
        and all(isinstance(value, float) for value in row.values())
        and all(isinstance(value, Tensor) and value.ndim and len(value) for value in gradients.values())
        and record.get("stage") in list(Stage)
        and isinstance(record.get("conditions"), dict)
        and isinstance(record.get("rows"), int | None)
    ):
        raise UserError("the checkpoint's record of its moment is damaged. Fix: give another checkpoint of the run")
    return cast("dict[str, Any]", record)


def make_resumable(trainer: Trainer) -> None:
    """Make a trainer's fit loop write and read records of moments, and ignore checkpoints in the working directory.

    Loops, connector and writer that are not Lightning's own are left alone.
    """
    loop = trainer.fit_loop
    if type(loop) is _FitLoop and type(loop.epoch_loop) is _TrainingEpochLoop:
        loop.__class__ = ResumableFitLoop  # it keeps its state: Lightning has made and connected it
        loop.epoch_loop.__class__ = ResumableEpochLoop
        loop.epoch_loop.val_loop.__class__ = ResumableValidationLoop
    connector = trainer._checkpoint_connector
    if type(connector) is _CheckpointConnector:
        connector.__class__ = CheckpointConnector
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    signals = trainer._signal_connector
    if interruption.is_watching:
        signals.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # ours are there already


def match_optimizer_states(checkpoint: dict[str, Any], names: list[list[str]]) -> None:
    """Bring a checkpoint's optimiser states into the order of the parameters that are there now, by name.

    Args:
        checkpoint: With the names that were stored; its states are replaced.
        names: Those of each optimiser's parameters now.
    """
    states = checkpoint.get("optimizer_states", [])
    for number, (state, stored, present) in enumerate(zip(states, checkpoint[OPTIMIZED], names, strict=False)):
        if stored == present or any(not isinstance(key, int) for key in state["state"]):  # FSDP's are by name already
            continue
        new = [name for name in present if name not in stored]
        gone = [name for name in stored if name not in present]
        if new or gone:
            rank_zero_warn(
                f"the optimiser's state has none of {', '.join(new) or 'no new parameter'}, which start without one, "
                f"and drops that of {', '.join(gone) or 'no parameter'}"
            )
        moved = {place: stored.index(name) for place, name in enumerate(present) if name in stored}
        entries = {place: state["state"][old] for place, old in moved.items() if old in state["state"]}
        groups = [dict(group) for group in state["param_groups"]]
        if len(groups) == 1:
            groups[0]["params"] = list(range(len(present)))
        states[number] = {**state, "state": entries, "param_groups": groups}


class CheckpointConnector(_CheckpointConnector):
    """Lightning's, but no ``hpc_ckpt`` of another SLURM job that lies in the working directory is picked up."""

    @property
    def _hpc_resume_path(self) -> None:
        return None


class ResumableValidationLoop(_EvaluationLoop):
    """Lightning's validation, which a signal may end between two batches."""

    _may_end = False
    """Whether all processes have as many batches, so that they can agree before each."""

    def on_run_start(self) -> None:
        """Begin a validation."""
        self._may_end = interruption.is_watching and not self.trainer.sanity_checking
        if self._may_end and self.trainer.world_size > 1:
            count = sum(self.max_batches)
            most, least = self._fit.greatest(int(count), -int(count)) if math.isfinite(count) else (1, 1)
            self._may_end = most == -least
        super().on_run_start()

    @property
    def _fit(self) -> ResumableFitLoop:
        return cast(ResumableFitLoop, self.trainer.fit_loop)

    def _evaluation_step(self, *args: Any) -> None:
        if self._may_end:
            self._fit.end_if_asked()
        super()._evaluation_step(*args)

    def teardown(self) -> None:
        """Drop what was evaluated, and end the processes that read ahead."""
        super().teardown()
        self._fit.close_loaders()

    def _on_evaluation_end(self, *args: Any, **kwargs: Any) -> None:
        cast(ResumableEpochLoop, self.trainer.fit_loop.epoch_loop).stage = Stage.VALIDATED
        super()._on_evaluation_end(*args, **kwargs)


class ResumableEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, which can begin with what follows a batch."""

    stage = Stage.EPOCH
    """The moment that a checkpoint written now belongs to."""
    has_validated = False
    """Whether a validation followed the last batch."""
    _is_validation_due: bool | None = None

    @property
    def _fit(self) -> ResumableFitLoop:
        return cast(ResumableFitLoop, self.trainer.fit_loop)

    @property
    def done(self) -> bool:
        """Whether nothing of the epoch is left."""
        return not self._fit.is_pending(Stage.BATCH_END, Stage.VALIDATING, Stage.VALIDATED) and super().done

    def reset(self) -> None:
        """Begin an epoch at its first batch, or where a checkpoint was written."""
        if not self._fit.record:
            super().reset()

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on a batch, unless a checkpoint was written after it."""
        if self._fit.is_pending(Stage.BATCH_END, Stage.VALIDATING, Stage.VALIDATED):
            return
        self._fit.record = {}
        self.stage = Stage.BATCH_END
        super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate if it is due; then everything of the batch is done."""
        pending, record = self._fit.stage_to_resume, self._fit.record
        self._fit.record = {}
        if pending is Stage.BATCH_END and record.get("row"):
            self.trainer._logger_connector.log_metrics(record["row"])
        self._is_validation_due = {Stage.VALIDATING: True, Stage.VALIDATED: False}.get(pending) if pending else None
        self.has_validated = False
        self.stage = Stage.VALIDATING
        super().on_advance_end(data_fetcher)
        self._is_validation_due = None
        self.stage = Stage.BATCH
        self._fit.at_save_point()

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        due = self._is_validation_due
        self.has_validated = super()._should_check_val_fx(data_fetcher) if due is None else due
        return self.has_validated

    def _broadcast_sigterm_tensor(self) -> None:
        if not interruption.is_watching:  # else the processes agree in at_save_point
            super()._broadcast_sigterm_tensor()


class ResumableFitLoop(_FitLoop):
    """Lightning's loop over epochs, which records the moment of each checkpoint and resumes from there."""

    record: dict[str, Any] = {}
    """What a checkpoint said of its moment, while what follows that moment is still to be done."""

    @property
    def stage_to_resume(self) -> Stage | None:
        """The moment from which this fit is being resumed; ``None`` once it is a fit like any other."""
        return Stage(self.record["stage"]) if self.record else None

    def is_pending(self, *stages: Stage) -> bool:
        """Return whether the fit is being resumed from one of some moments."""
        return self.stage_to_resume in stages

    @property
    def _loop(self) -> ResumableEpochLoop:
        return cast(ResumableEpochLoop, self.epoch_loop)

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
        """Return Lightning's state with the record of the moment."""
        state = {**super().on_save_checkpoint(), RECORD: self._new_record()}
        if state[RECORD].get("is_within"):
            for loader in state.get("combined_loader", []):
                if isinstance(loader, dict) and "batches_read" in loader:  # ours, which has read one more
                    loader["batches_read"] = cast(Any, self.epoch_loop.batch_progress.current).processed
        return state

    def _new_record(self) -> dict[str, Any]:
        loop, trainer = self._loop, self.trainer
        stage = loop.stage
        if stage is Stage.EPOCH_END and not loop._num_ready_batches_reached():
            stage = Stage.BATCH  # max_steps or an early stop ended the epoch, which a resume continues
        progress: Any = loop.batch_progress.current
        is_within = stage is Stage.BATCH_END and progress.ready != progress.processed  # an exception was raised there
        if is_within:
            stage = Stage.BATCH if progress.processed else Stage.EPOCH
        record: dict[str, Any] = {
            "stage": stage.value,
            "is_within": is_within,
            "should_stop": trainer.should_stop,
            "metrics": {key: value.detach().cpu().clone() for key, value in trainer.callback_metrics.items()},
            "conditions": _conditions(trainer),
            "rows": next((logger.rows for logger in trainer.loggers if hasattr(logger, "rows")), None),
        }
        within = stage not in (Stage.EPOCH, Stage.EPOCH_END)
        if within and any(getattr(value, "meta", None) and value.meta.on_epoch for value in loop._results.values()):
            record["averages"] = True
        counted = record["rows"] is not None  # then metrics.csv is cut to them on a resume
        if counted and stage is Stage.BATCH_END and trainer._logger_connector.should_update_logs:
            row = {} if loop._should_accumulate() else trainer._logger_connector.metrics["log"]
            record["row"] = {key: float(value) for key, value in row.items() if torch.as_tensor(value).numel() == 1}
        if within and loop._should_accumulate():
            record["gradients"] = self._gradients()
        return record

    def _gradients(self) -> dict[str, Tensor] | None:
        """Return the gradients of a window of accumulation that is not complete, shape (processes, ...)."""
        if isinstance(self.trainer.strategy, FSDPStrategy):
            return None
        module, one = self.trainer.lightning_module, self.trainer.world_size == 1
        present = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        return {
            name: grad[None].clone() if one else cast(Tensor, module.all_gather(grad)) for name, grad in present.items()
        }

    def greatest(self, *numbers: int) -> list[int]:
        """Return the greatest of each number over all processes."""
        if self.trainer.world_size == 1:
            return list(numbers)
        found = torch.tensor(numbers, device=self.trainer.strategy.root_device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return cast("list[int]", found.tolist())

    def at_save_point(self, is_epoch_end: bool = False) -> None:
        """Call the callbacks that save, after a batch or an epoch; end the run if a signal asked for it."""
        timed = [c for c in _callbacks(self.trainer) if getattr(c, "every", None) is not None and hasattr(c, "is_due")]
        stop, save = interruption.signum, int(any(c.is_due(self.trainer) for c in timed))
        if timed or interruption.is_watching:
            stop, save = self.greatest(stop, save)
        self._call_save_point(is_epoch_end, bool(save), bool(stop))
        if stop:
            raise Stopped(stop, _last_checkpoint(self.trainer))

    def end_if_asked(self) -> None:
        """Save and end between two batches of a validation, if a signal asked for it."""
        trainer, (stop,) = self.trainer, self.greatest(interruption.signum)
        if not stop:
            return
        averaging = [c for c in _callbacks(trainer) if isinstance(c, WeightAveraging) and c._average_model is not None]
        for callback in averaging:  # they put the average in place of the weights for the time of a validation
            callback._swap_models(trainer.lightning_module)
        self._call_save_point(is_epoch_end=False, save=False, stop=True)
        raise Stopped(stop, _last_checkpoint(trainer))

    def _call_save_point(self, is_epoch_end: bool, save: bool, stop: bool) -> None:
        for callback in _callbacks(self.trainer):
            if hasattr(callback, "on_save_point"):
                module = self.trainer.lightning_module
                callback.on_save_point(self.trainer, module, is_epoch_end, save=save, stop=stop)

    # ---- resuming

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Take the record of the moment."""
        super().on_load_checkpoint(state_dict)
        self.record = _checked(state_dict.get(RECORD))

    @property
    def restarting(self) -> bool:
        """Whether loaded counters are still to be taken up."""
        return self._restarting

    @restarting.setter
    def restarting(self, restarting: bool) -> None:
        if self.record:
            _Loop.restarting.fset(self, restarting)  # type: ignore[attr-defined]  # a property, which types don't see
        else:
            _FitLoop.restarting.fset(self, restarting)  # type: ignore[attr-defined]

    @property
    def done(self) -> bool:
        """Whether nothing of the fit is left."""
        last = self.is_pending(Stage.BATCH) and self.epoch_loop.batch_progress.is_last_batch
        if last or self.is_pending(Stage.BATCH_END, Stage.VALIDATING, Stage.VALIDATED, Stage.EPOCH_END):
            return False
        return super().done

    def reset(self) -> None:
        """Begin, or take the state of the moment at which a checkpoint was written."""
        interruption.is_deferred = interruption.is_watching
        if not self.record:
            super().reset()
            return
        torch.set_grad_enabled(True)
        self._warn_of_differences()
        self.restarting = False
        connector = self.trainer._logger_connector
        connector._callback_metrics.update(self.record.get("metrics", {}))
        if self.is_pending(Stage.EPOCH_END):
            self.epoch_loop._update_learning_rates(interval="epoch", update_plateau_schedulers=True)
            self.epoch_progress.increment_completed()
        should_stop = bool(self.record.get("should_stop"))
        if self.is_pending(Stage.EPOCH, Stage.EPOCH_END):
            self.record = {}
            self._resuming_from_checkpoint = False
        early = [c for c in _callbacks(self.trainer) if isinstance(c, EarlyStopping)]
        if should_stop and any(c.stopped_epoch or c.wait_count >= c.patience for c in early):
            self.trainer.should_stop = True

    def on_run_start(self) -> None:
        """Call the hooks of a training's start, and put back what no hook does."""
        averages = [c for c in _callbacks(self.trainer) if isinstance(c, WeightAveraging) and c._average_model]
        if not self.trainer.global_step:
            for callback in averages:  # copied before the data's scaler and statistics were known
                average = cast(Any, callback._average_model).module
                average.load_state_dict(self.trainer.lightning_module.state_dict())
        super().on_run_start()
        gradients = self.record.get("gradients")
        if gradients:
            for name, parameter in self.trainer.lightning_module.named_parameters():
                if name in gradients:
                    own = gradients[name][self.trainer.global_rank % len(gradients[name])]
                    if own.shape != parameter.shape:
                        raise UserError(
                            f"the checkpoint's gradient of {name} does not fit. Fix: give another checkpoint"
                        )
                    parameter.grad = own.to(parameter, copy=True)

    def on_advance_start(self) -> None:
        """Begin an epoch, unless a checkpoint was written within it."""
        averaging = [c for c in _callbacks(self.trainer) if isinstance(c, StochasticWeightAveraging)]
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
        """Run an epoch; where reading data fails because a signal ended the processes that read, save what is there."""
        try:
            super().advance()
        except Exception:
            progress = self.epoch_loop.batch_progress.current
            if not interruption.signum or self.trainer.world_size > 1 or progress.ready != progress.completed:
                raise
            if self._loop.stage is Stage.VALIDATING:
                self.end_if_asked()
            self._loop.stage = Stage.BATCH if progress.completed else Stage.EPOCH
            self._call_save_point(is_epoch_end=False, save=False, stop=True)
            raise Stopped(interruption.signum, _last_checkpoint(self.trainer)) from None

    def on_advance_end(self) -> None:
        """End an epoch; then nothing of it is left."""
        self.record = {}
        is_complete = self.epoch_loop._num_ready_batches_reached()
        self._loop.stage = Stage.EPOCH_END
        super().on_advance_end()
        self._loop.stage = Stage.EPOCH
        if is_complete:
            for progress in (self.epoch_progress.total, self.epoch_progress.current):
                progress.completed -= 1  # callbacks see the epoch that ended, as in on_train_epoch_end
            try:
                self.at_save_point(is_epoch_end=True)
            finally:
                for progress in (self.epoch_progress.total, self.epoch_progress.current):
                    progress.completed += 1

    def teardown(self) -> None:
        """Drop the data, and end the processes that read ahead."""
        super().teardown()
        self.close_loaders()

    def close_loaders(self) -> None:
        """End the processes that read ahead."""
        for combined in (self._combined_loader, self.epoch_loop.val_loop._combined_loader):
            for loader in [] if combined is None else combined.flattened:
                if hasattr(loader, "close"):
                    loader.close()

    def on_run_end(self) -> None:
        """Call the hooks of a training's end; from here on a signal ends the command at once."""
        interruption.is_deferred = False
        if interruption.signum:
            raise Stopped(interruption.signum)
        super().on_run_end()

    def _warn_of_differences(self) -> None:
        """Say what keeps a resumed run from being the uninterrupted one bit for bit, if anything does."""
        record, trainer = self.record, self.trainer
        for callback in _callbacks(trainer):
            if isinstance(callback, GradientAccumulationScheduler):  # it acts at an epoch's start alone
                callback.on_train_epoch_start(trainer)
        earlier, now = record["conditions"], _conditions(trainer)
        differing = [key for key in now if earlier.get(key, now[key]) != now[key]]
        reasons = [f"{key} was {' '.join(str(earlier.get(key)).split())[:80]} and is {now[key]}" for key in differing]
        if record.get("is_within"):
            reasons.append("the checkpoint was written within a batch, which is trained on again")
        within = not self.is_pending(Stage.EPOCH, Stage.EPOCH_END)
        loaders = [] if self._combined_loader is None else self._combined_loader.flattened
        if within and not all(hasattr(loader, "load_state_dict") for loader in loaders):
            reasons.append("the loader can't continue in mid-epoch, so the epoch's data begin again")
        if within and record.get("averages"):
            reasons.append("averages over the epoch begin again")
        if record.get("gradients", {}) is None:
            reasons.append("gradients accumulated under FSDP are lost")
        if getattr(trainer, "_val_check_time_interval", None) is not None:
            reasons.append("validations follow the clock")
        if reasons:
            rank_zero_warn(f"the resumed run may differ from an uninterrupted one: {'; '.join(reasons)}")


def _callbacks(trainer: Trainer) -> list[Any]:
    return cast("list[Any]", getattr(trainer, "callbacks", []))  # a connector sets them


def _last_checkpoint(trainer: Trainer) -> str:
    savers = [c for c in _callbacks(trainer) if hasattr(c, "on_save_point") and getattr(c, "monitor", None) is None]
    return str(getattr(savers[0], "best_model_path", "")) if savers else ""


def _conditions(trainer: Trainer) -> dict[str, Any]:
    """Return what else decides a run's numbers."""
    swa = any(isinstance(c, StochasticWeightAveraging) for c in _callbacks(trainer))
    return {
        "processes": trainer.world_size,
        "device": trainer.strategy.root_device.type,
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        **({"max_epochs": trainer.max_epochs} if swa else {}),  # its schedule counts from there
        "callbacks with a state": " ".join(sorted(type(c).__name__ for c in _callbacks(trainer) if _has_state(c))),
    }


def _has_state(callback: Callback) -> bool:
    return type(callback).state_dict is not Callback.state_dict and not isinstance(callback, Checkpoint)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints that are whole or not there, beside the earlier ones that they replace, and reads such."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return what a checkpoint holds: weights, numbers and text, whatever else is asked for.

        Raises:
            UserError: It is missing or damaged, or holds anything else.
        """
        if is_remote(path):
            return super().load_checkpoint(path, weights_only=True)
        return read_checkpoint(Path(path), map_location=map_location or "cpu")

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            UserError: The system can't write there.
        """
        with replacing(str(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch hides the system's error
                hidden = error.__context__
                raise hidden if isinstance(hidden, OSError) else OSError(errno.EIO, str(error)) from error

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, and nothing else that a checkpoint's state may name as one."""
        parts = Path(path).parts
        if ".." not in parts and parts[-1].endswith(".ckpt"):
            super().remove_checkpoint(path)
