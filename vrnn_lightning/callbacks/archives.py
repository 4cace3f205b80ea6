"""Writing flat archives: arrays by name in one .npz file, never pickled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer

__all__ = ["archive_path", "write_archive"]


def archive_path(trainer: Trainer, name: str) -> Path:
    """Return where an archive goes in the run's folder; each of several processes has its own. A collective call."""
    suffix = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
    return Path(trainer.log_dir or trainer.default_root_dir) / f"{name}{suffix}.npz"


def write_archive(path: Path, parts: list[dict[str, np.ndarray]], split: str, **more: np.ndarray) -> None:
    """Join the parts' arrays end to end and write them, whole or not at all.

    Args:
        path: The file.
        parts: Arrays by name, each part of the same names.
        split: Goes before the names.
        more: Arrays that are no sequence of parts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    temporary = path.with_suffix(".part.npz")
    named = {f"{split}_{key}": value for key, value in (columns | more).items()}
    np.savez(temporary, **named)  # type: ignore[arg-type]  # the stub takes them for allow_pickle
    temporary.replace(path)
