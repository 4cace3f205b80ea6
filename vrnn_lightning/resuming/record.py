"""The record of a checkpoint's moment, and the comparison of a checkpoint with the run that resumes it."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vrnn_lightning.compatibility import OPTIMIZED
from vrnn_lightning.errors import UserError

__all__ = [
    "RECORD", "Stage", "callbacks_of", "check_record", "make_record", "match_optimizer_states", "resume_record",
    "warn_of_differences",
]  # fmt: skip

RECORD = "resume"
"""Key of the record in a checkpoint's state of the fit loop."""


class Stage(StrEnum):
    """The moment of an epoch at which a checkpoint was written."""

    BATCH_END = "batch_end"
    """In ``on_train_batch_end``: the row of metrics, a validation that is due and the epoch's end follow."""
    VALIDATING = "validating"
    """During a validation, which is repeated."""
    VALIDATED = "validated"
    """In ``on_validation_end``: the rest of the batch and the epoch's end follow."""
    BATCH = "batch"
    """After a batch and all that follows it; if it was the epoch's last one, the epoch's end follows."""
    EPOCH_END = "epoch_end"
    """In ``on_train_epoch_end``: the step of a schedule that reads metrics follows."""
    EPOCH = "epoch"
    """Between two epochs."""


def callbacks_of(trainer: Trainer, kind: Any = object) -> list[Any]:
    """Return a trainer's callbacks of some class."""
    return [c for c in getattr(trainer, "callbacks", []) if isinstance(c, kind)]  # a connector sets them


def resume_record(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a checkpoint; it is empty if an older version or another loop wrote the checkpoint."""
    found: Any = checkpoint
    for key in ("loops", "fit_loop", "state_dict", RECORD):
        found = found.get(key) if isinstance(found, dict) else None
    return check_record(found)


def check_record(record: Any) -> dict[str, Any]:
    """Return a record, empty for ``None``; raise if the fit loop can't have written it."""
    if record is None:
        return {}
    if not isinstance(record, dict) or record.get("stage") not in list(Stage):
        raise UserError("the checkpoint's record of its moment is damaged. Fix: give another checkpoint of the run")
    return record


def make_record(trainer: Trainer, loop: _TrainingEpochLoop, stage: Stage) -> dict[str, Any]:
    """Return the record of a checkpoint that is written now, at a stage of the epoch."""
    if stage is Stage.EPOCH_END and not loop._num_ready_batches_reached():
        stage = Stage.BATCH  # max_steps or an early stop ended the epoch, which a resume continues
    progress: Any = loop.batch_progress.current
    is_within = stage is Stage.BATCH_END and progress.ready != progress.processed  # an exception was raised there
    if is_within:
        stage = Stage.BATCH if progress.processed else Stage.EPOCH
    connector = trainer._logger_connector
    record: dict[str, Any] = {
        "stage": stage.value,
        "is_within": is_within,
        "should_stop": trainer.should_stop,
        "metrics": {key: value.detach().cpu().clone() for key, value in trainer.callback_metrics.items()},
        "conditions": _conditions(trainer),
        "rows": next((logger.rows for logger in trainer.loggers if hasattr(logger, "rows")), None),
    }
    is_mid_epoch = stage not in (Stage.EPOCH, Stage.EPOCH_END)
    if is_mid_epoch and any(getattr(value, "meta", None) and value.meta.on_epoch for value in loop._results.values()):
        record["averages"] = True
    if record["rows"] is not None and stage is Stage.BATCH_END and connector.should_update_logs:
        row = {} if loop._should_accumulate() else connector.metrics["log"]
        record["row"] = {key: float(value) for key, value in row.items() if torch.as_tensor(value).numel() == 1}
    if is_mid_epoch and loop._should_accumulate():
        record["gradients"] = _gradients(trainer)
    return record


def _gradients(trainer: Trainer) -> dict[str, Tensor] | None:
    """Return the gradients of a window of accumulation that is not complete, shape (processes, ...)."""
    if isinstance(trainer.strategy, FSDPStrategy):
        return None
    module, one = trainer.lightning_module, trainer.world_size == 1
    present = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {
        name: grad[None].clone() if one else cast(Tensor, module.all_gather(grad)) for name, grad in present.items()
    }


def _conditions(trainer: Trainer) -> dict[str, Any]:
    """Return the conditions besides options and data that decide a run's numbers."""
    return {
        "processes": trainer.world_size,
        "device": trainer.strategy.root_device.type,
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        # the schedule of SWA counts from there
        **({"max_epochs": trainer.max_epochs} if callbacks_of(trainer, StochasticWeightAveraging) else {}),
        "callbacks with a state": " ".join(sorted(type(c).__name__ for c in callbacks_of(trainer) if _has_state(c))),
    }


def _has_state(callback: Callback) -> bool:
    return type(callback).state_dict is not Callback.state_dict and not isinstance(callback, Checkpoint)


def warn_of_differences(trainer: Trainer, record: dict[str, Any]) -> None:
    """Warn if a resumed run may differ from an uninterrupted one, and name the reasons."""
    for callback in callbacks_of(trainer, GradientAccumulationScheduler):  # it acts at an epoch's start alone
        callback.on_train_epoch_start(trainer)
    earlier, now = record["conditions"], _conditions(trainer)
    reasons = [
        f"{key} was {' '.join(str(earlier[key]).split())[:80]} and is {now[key]}"
        for key in now
        if earlier.get(key, now[key]) != now[key]
    ]
    if record.get("is_within"):
        reasons.append("the checkpoint was written within a batch, which is trained on again")
    if record["stage"] not in (Stage.EPOCH, Stage.EPOCH_END):
        combined = trainer.fit_loop._combined_loader
        loaders = [] if combined is None else combined.flattened
        if not all(hasattr(loader, "load_state_dict") for loader in loaders):
            reasons.append("the loader can't continue in mid-epoch, so the epoch's data begin again")
        if record.get("averages"):
            reasons.append("averages over the epoch begin again")
    if record.get("gradients", {}) is None:
        reasons.append("gradients accumulated under FSDP are lost")
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        reasons.append("validations follow the clock")
    if reasons:
        rank_zero_warn(f"the resumed run may differ from an uninterrupted one: {'; '.join(reasons)}")


def match_optimizer_states(checkpoint: dict[str, Any], names: list[list[str]]) -> None:
    """Reorder a checkpoint's optimiser states from the stored order of each one's parameters to the present names."""
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
