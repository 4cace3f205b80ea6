"""Writing flat archives: arrays by name in one .npz file, never pickled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer

from vrnn_lightning.batch import SequenceBatch

__all__ = ["archive_path", "described", "write_archive"]


def archive_path(trainer: Trainer, name: str) -> Path:
    """Return where an archive goes in the run's folder; each of several processes has its own. A collective call."""
    suffix = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
    return Path(trainer.log_dir or trainer.default_root_dir) / f"{name}{suffix}.npz"


def described(batch: SequenceBatch) -> dict[str, np.ndarray]:
    """Return "names", "lengths" and "index" of a batch's sequences that have a step, each of shape (sequences,)."""
    real = (batch.lengths > 0).cpu()
    names = np.array(batch.names or [""] * len(batch), str)
    index = torch.zeros_like(batch.lengths) if batch.index is None else batch.index
    return {
        "names": names[real.numpy()],
        "lengths": batch.lengths.cpu()[real].numpy(),
        "index": index.cpu()[real].numpy(),
    }


def write_archive(path: Path, parts: list[dict[str, np.ndarray]], split: str, **more: np.ndarray) -> None:
    """Join the parts' arrays end to end and write them, whole or not at all.

    Args:
        path: The file.
        parts: Arrays by name, each part of the same names; of an array called "values" each sequence has as many rows
            as "lengths" says, of others one. "index", which is not written, says which sequence of the split each one
            is: they are written in this order.
        split: Goes before the names.
        more: Arrays that are no sequence of parts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order = columns.pop("index").argsort(kind="stable")
    values = columns.get("values")
    columns = {key: column if key == "values" else column[order] for key, column in columns.items()}
    if values is not None and len(order):
        pieces = np.split(values, np.concatenate([part["lengths"] for part in parts]).cumsum()[:-1])
        columns["values"] = np.concatenate([pieces[i] for i in order])
    temporary = path.with_suffix(".part.npz")
    named = {f"{split}_{key}": value for key, value in (columns | more).items()}
    np.savez(temporary, **named)  # type: ignore[arg-type]  # the stub takes them for allow_pickle
    temporary.replace(path)
