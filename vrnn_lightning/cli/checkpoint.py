"""The checkpoint that a command starts from: which file is meant, what it knows, and what may not differ from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from vrnn_lightning.checkpoints import read_checkpoint
from vrnn_lightning.cli.argv import mentions
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.pretrained import require_model
from vrnn_lightning.resuming import Stage, resume_record
from vrnn_lightning.trust import Gate

__all__ = ["Checkpoint", "find_checkpoint", "runs_folder"]

FROM_DATA = ("num_features", "num_inputs", "missing")  # linked, so no option of the command line
NOT_ARCHITECTURE = ("optimizer", "lr_scheduler", "objective")  # a test may be run under a YAML that trains otherwise


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint knows about its run.

    Args:
        path: The file.
        step: Optimiser steps behind it.
        epoch: The epoch it was written in.
        model: The model's options.
        data: The datamodule's options, empty where it keeps none.
        data_class: Import path of the datamodule, or ``None``.
        data_state: What the datamodule keeps besides its options.
        weights: The model's ``state_dict``.
        rows: Rows of metrics.csv behind it, ``None`` if it is not known.
        stage: The moment of its epoch, ``None`` if it is not known.
    """

    path: Path
    step: int
    epoch: int
    model: dict[str, Any]
    data: dict[str, Any]
    data_class: str | None
    data_state: dict[str, Any]
    weights: dict[str, torch.Tensor]
    rows: int | None
    stage: str | None

    @classmethod
    def read(cls, path: Path, option: str = "--ckpt_path") -> Checkpoint:
        """Read a file.

        Args:
            path: The file.
            option: That names it.

        Raises:
            UserError: It is missing, damaged or not a checkpoint of this framework.
        """
        content = read_checkpoint(path, option)
        model, data = content.get("hyper_parameters", {}), content.get("datamodule_hyper_parameters", {})
        if "num_features" not in model or not {"state_dict", "global_step", "epoch"} <= content.keys():
            raise UserError(f"{option} {path}: is not a checkpoint that `lightning fit` of vrnn-lightning wrote")
        if "scale_mean" not in content["state_dict"]:
            raise UserError(f"{option} {path}: holds no scaler, so it is none that `lightning fit` wrote")
        data_class = data.get("_class_path")
        data_state = content.get(str(data_class).rpartition(".")[2]) or {}
        if not isinstance(data_class, str | None) or not isinstance(data_state, dict):
            raise UserError(f"{option} {path}: its datamodule is not one that `lightning fit` wrote")
        return cls(
            path,
            content["global_step"],
            content["epoch"],
            _options(model),
            _options(data),
            data_class,
            data_state,
            content["state_dict"],
            resume_record(content).get("rows"),
            resume_record(content).get("stage"),
        )

    def require_trusted(self, gate: Gate, training: bool = True) -> None:
        """Raise if it names what a file may not import, or declares sizes that its weights do not have.

        Args:
            gate: What it may name.
            training: Whether its data, objective and optimiser count, not its model alone.

        Raises:
            UserError: It does.
        """
        skipped = () if training else NOT_ARCHITECTURE
        model = {key: value for key, value in self.model.items() if key not in skipped}
        made = VRNNLightningModule
        require_model(gate.source, made, gate.build(made, model, "model"), self.weights)
        if self.data_class and training:
            gate.check_options(gate.resolve(self.data_class, (LightningDataModule,), "data"), self.data, "data")

    @property
    def is_epoch_complete(self) -> bool:
        """Whether nothing of its epoch is left to be done."""
        return self.stage in (None, Stage.EPOCH)

    @property
    def folder(self) -> Path | None:
        """The folder of its run, or ``None`` if it does not lie in one."""
        folder = self.path.resolve().parent.parent
        return folder if (folder / "config.yaml").is_file() else None

    def architecture(self) -> dict[str, Any]:
        """Return what its weights fit, as a parser's defaults."""
        skipped = (*FROM_DATA, *NOT_ARCHITECTURE, "lr_interval")
        return {f"model.{key}": value for key, value in self.model.items() if key not in skipped}

    def defaults(self) -> dict[str, Any]:
        """Return its options as a parser's defaults, beneath whatever the user states."""
        model = {f"model.{key}": value for key, value in self.model.items() if key not in FROM_DATA}
        data = {"data": {"class_path": self.data_class, "init_args": self.data}} if self.data_class else {}
        return {**model, **data}

    def check(self, stated: dict[str, Any], training: bool, run_options: frozenset[str]) -> None:
        """Raise if options differ from those of the checkpoint.

        Args:
            stated: The options ``model`` and ``data`` of this run.
            training: Also compare how the model is trained.
            run_options: Data options that may differ.

        Raises:
            UserError: At least one differs.
        """
        skipped = {*FROM_DATA, *(() if training else NOT_ARCHITECTURE)}
        differing = _differences("model", self.model, stated["model"], skipped)
        differing += _differences("data", self.data, stated["data"].get("init_args") or {}, run_options)
        if differing:
            kept = "leave the option out to keep the checkpoint's, or start a new run without --ckpt_path"
            raise UserError(f"{'; '.join(differing)}: differs from {self.path}; {kept}")


def _options(hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in hyper_parameters.items() if not key.startswith("_")}


def _differences(group: str, old: dict[str, Any], new: dict[str, Any], skipped: Iterable[str]) -> list[str]:
    both = [key for key in old if key in new and key not in skipped]
    absent = [key for key in both if (old[key] is None) != (new[key] is None) and _is_size(old[key] or new[key])]
    both = [key for key in both if key not in absent]
    kept, given = old, new
    old = {key: old[key] for key in both}
    new = {key: {"class_path": None} if new[key] is None and isinstance(old[key], dict) else new[key] for key in both}
    old = {key: {"class_path": None} if old[key] is None and isinstance(new[key], dict) else old[key] for key in both}
    old, new = _flat(old), _flat(new)
    keys = [key for key in old if key in new and old[key] != new[key]]
    found = [f"--{group}.{key.removesuffix('.class_path')} {new[key]} (checkpoint: {old[key]})" for key in keys]
    return found + [f"--{group}.{key} {_word(given[key])} (checkpoint: {_word(kept[key])})" for key in absent]


def _is_size(value: Any) -> bool:
    return isinstance(value, dict) and "class_path" not in value


def _word(value: Any) -> Any:
    return "null" if value is None else value


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict):
            flat |= _flat(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def find_checkpoint(words: list[str], data: str | None) -> Path | None:
    """Return the checkpoint that a command line asks for; ``last`` and ``best`` are looked for among the runs.

    Args:
        words: The command line.
        data: Name of the datamodule, if it is said.

    Raises:
        UserError: There is no run with such a checkpoint.
    """
    asked = [value for value in mentions(words, "ckpt_path") if value]
    if not asked:
        return None
    if asked[-1] not in ("last", "best"):
        return Path(asked[-1])
    root = runs_folder(words)
    name = _run_name(words) or (data.rpartition(".")[2].lower() if data else "*")
    found = sorted(root.glob(f"{name}/*/checkpoints/{asked[-1]}.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"--ckpt_path {asked[-1]}: no run under {root / name} has a {asked[-1]}.ckpt")
    return found[-1]


def runs_folder(words: list[str]) -> Path:
    """Return the folder of all runs that a command line says."""
    said = mentions(words, "trainer.logger.save_dir") or mentions(words, "trainer.logger.init_args.save_dir")
    return Path(said[-1]) if said else Path(*mentions(words, "trainer.default_root_dir")[-1:]) / "runs"


def _run_name(words: list[str]) -> str | None:
    names = mentions(words, "trainer.logger.name") + mentions(words, "trainer.logger.init_args.name")
    loggers = [entry for value in mentions(words, "trainer.logger") if isinstance(value, list) for entry in value]
    ours = [entry for entry in loggers if isinstance(entry, dict) and "RunLogger" in entry.get("class_path", "")]
    names += [(entry.get("init_args") or {}).get("name") for entry in ours]
    return next((name for name in names if name), None)
