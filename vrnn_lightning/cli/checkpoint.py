"""The checkpoint that a command starts from: its file, its options, and the options that may not differ from them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from vrnn_lightning.cli.argv import last_mention, mentions
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.pretrained import require_model
from vrnn_lightning.resuming import Stage, resume_record
from vrnn_lightning.trust import Gate, read_checkpoint
from vrnn_lightning.trust.checkpoints import FIX

__all__ = ["Checkpoint", "find_checkpoint", "runs_folder"]

FROM_DATA: dict[str, type] = {"num_features": int, "num_inputs": int, "num_targets": int, "missing": bool}
"""What the model takes from its data by a link; no option of the command line sets it."""
NOT_ARCHITECTURE = ("optimizer", "lr_scheduler", "objective")  # a test may be run under a YAML that trains otherwise
RUN_OPTIONS = frozenset({"root", "batch_size", "num_workers"})


@dataclass(frozen=True)
class Checkpoint:
    """The options and the progress of a run, as a checkpoint holds them."""

    path: Path
    step: int  # optimiser steps
    epoch: int  # that it was written in
    model: dict[str, Any]
    data: dict[str, Any]  # empty where the datamodule keeps none
    data_class: str | None  # import path
    data_state: dict[str, Any]  # besides its options
    weights: dict[str, torch.Tensor]
    record: dict[str, Any]  # the moment of its epoch, empty if it is not known

    @classmethod
    def read(cls, path: Path, option: str = "--ckpt_path") -> Checkpoint:
        """Read a file that an option names; raise if it is missing, damaged or not a checkpoint of this framework."""
        content = read_checkpoint(path, option)
        model, data = content.get("hyper_parameters", {}), content.get("datamodule_hyper_parameters", {})
        if "num_features" not in model or not {"state_dict", "global_step", "epoch"} <= content.keys():
            raise UserError(f"{option} {path}: is not a checkpoint of vrnn-lightning. Fix: {FIX}")
        if "scale_mean" not in content["state_dict"]:
            raise UserError(f"{option} {path}: holds no scaler. Fix: {FIX}")
        data_class = data.get("_class_path")
        data_state = content.get(str(data_class).rpartition(".")[2]) or {}
        if not isinstance(data_class, str | None) or not isinstance(data_state, dict):
            raise UserError(f"{option} {path}: its record of the datamodule is invalid. Fix: {FIX}")
        model, data = ({key: part[key] for key in part if not key.startswith("_")} for part in (model, data))
        step, epoch, weights = content["global_step"], content["epoch"], content["state_dict"]
        return cls(path, step, epoch, model, data, data_class, data_state, weights, resume_record(content))

    def require_trusted(self, gate: Gate, *, training: bool = True) -> None:
        """Raise if it names what a file may not import, or declares sizes that its weights do not have."""
        model = {key: value for key, value in self.model.items() if training or key not in NOT_ARCHITECTURE}
        made = VRNNLightningModule
        require_model(gate.source, made, gate.build(made, model, "model"), self.weights)
        if self.data_class and training:
            gate.check_options(gate.resolve(self.data_class, (LightningDataModule,), "data"), self.data, "data")

    @property
    def is_epoch_complete(self) -> bool:
        """Whether its epoch has ended."""
        return self.record.get("stage") in (None, Stage.EPOCH)

    @property
    def folder(self) -> Path | None:
        """The folder of its run, or ``None`` if it does not lie in one."""
        folder = self.path.resolve().parent.parent
        return folder if (folder / "config.yaml").is_file() else None

    def architecture(self, skipped: Collection[str] = (*NOT_ARCHITECTURE, "lr_interval")) -> dict[str, Any]:
        """Return the model's options as a parser's defaults, without those of training."""
        return {f"model.{key}": value for key, value in self.model.items() if key not in (*FROM_DATA, *skipped)}

    def defaults(self) -> dict[str, Any]:
        """Return all its options as a parser's defaults."""
        data = {"data": {"class_path": self.data_class, "init_args": self.data}} if self.data_class else {}
        return {**self.architecture(skipped=()), **data}

    def require_same(self, options: dict[str, Any], *, training: bool) -> None:
        """Raise if ``model`` or ``data`` differ from the checkpoint's, apart from the datamodule's ``run_options``."""
        skipped = (*FROM_DATA, *(() if training else NOT_ARCHITECTURE))
        model = {key: value for key, value in self.model.items() if key not in skipped}
        module, _, name = options["data"]["class_path"].rpartition(".")
        run_options = getattr(getattr(sys.modules[module], name), "run_options", RUN_OPTIONS)
        data = {key: value for key, value in self.data.items() if key not in run_options}
        differences = [
            *_differences("--model", model, options["model"]),
            *_differences("--data", data, options["data"].get("init_args") or {}),
        ]
        if differences:
            fix = "leave the option out to keep the checkpoint's, or start a new run without --ckpt_path"
            raise UserError(f"{'; '.join(differences)}: differs from {self.path}. Fix: {fix}")


def _differences(option: str, old: Any, new: Any) -> Iterator[str]:
    """Yield a text for each option that both have with different values."""
    if isinstance(old, dict) and isinstance(new, dict):
        if "class_path" in new and "class_path" not in old:  # a network of Python or of an earlier release
            old = {"class_path": "vrnn_lightning.MLPConfig", "init_args": old}
        for key in (key for key in old if key in new):
            inner = option if key in ("class_path", "init_args") else f"{option}.{key}"
            yield from _differences(inner, old[key], new[key])
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for before, after in zip(old, new, strict=True):
            yield from _differences(option, before, after)
    elif old != new and (old is None or new is None or isinstance(old, dict) == isinstance(new, dict)):
        yield f"{option} {_shown(new)} (checkpoint: {_shown(old)})"


def _shown(value: Any) -> Any:
    """Return a class' path in place of its options, and YAML's word for ``None``."""
    value = value.get("class_path", value) if isinstance(value, dict) else value
    return "null" if value is None else value


def find_checkpoint(argv: list[str], data: str | None) -> Path | None:
    """Return the checkpoint that a command line asks for, or raise if no run has it.

    ``last`` and ``best`` are the latest of the runs, on the datamodule if the command line names one.
    """
    path = last_mention(argv, "ckpt_path")
    if path not in ("last", "best"):
        return Path(path) if path else None
    root, name = runs_folder(argv), _run_name(argv) or (data.lower() if data else "*")
    files = sorted(root.glob(f"{name}/*/checkpoints/{path}.ckpt"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(f"--ckpt_path {path}: no run under {root / name} has a {path}.ckpt. Fix: give a file's path")
    return files[-1]


def runs_folder(argv: list[str]) -> Path:
    """Return the folder of all runs of a command line."""
    folder = last_mention(argv, "trainer.logger.save_dir") or last_mention(argv, "trainer.logger.init_args.save_dir")
    return Path(folder) if folder else Path(last_mention(argv, "trainer.default_root_dir") or "") / "runs"


def _run_name(argv: list[str]) -> str | None:
    names = mentions(argv, "trainer.logger.name") + mentions(argv, "trainer.logger.init_args.name")
    loggers = [entry for value in mentions(argv, "trainer.logger") if isinstance(value, list) for entry in value]
    ours = [entry for entry in loggers if isinstance(entry, dict) and "RunLogger" in entry.get("class_path", "")]
    names += [(entry.get("init_args") or {}).get("name") for entry in ours]
    return next((name for name in names if name), None)
