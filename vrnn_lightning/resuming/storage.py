"""Checkpoints on the disk, and optimiser states for parameters in another order."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities import rank_zero_warn

from vrnn_lightning.checkpoints import read_checkpoint
from vrnn_lightning.compatibility import OPTIMIZED
from vrnn_lightning.files import is_remote, replacing

__all__ = ["CheckpointConnector", "WholeCheckpoints", "match_optimizer_states"]


class CheckpointConnector(_CheckpointConnector):
    """Lightning's, without the ``hpc_ckpt`` of another SLURM job that lies in the working directory."""

    @property
    def _hpc_resume_path(self) -> None:
        return None


class WholeCheckpoints(TorchCheckpointIO):
    """Reader and writer of checkpoints; a write replaces the earlier file when the new one is complete."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the content of a checkpoint: weights, numbers and text, whatever ``weights_only`` asks for.

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
        """Remove a checkpoint, and no other file that a checkpoint's state may name as one."""
        parts = Path(path).parts
        if ".." not in parts and parts[-1].endswith(".ckpt"):
            super().remove_checkpoint(path)


def match_optimizer_states(checkpoint: dict[str, Any], names: list[list[str]]) -> None:
    """Reorder a checkpoint's optimiser states to the order of the present parameters, by name.

    Args:
        checkpoint: The checkpoint, with the names that were stored; its states are replaced.
        names: Names of each optimiser's present parameters.
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
