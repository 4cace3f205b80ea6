"""The errors that the user can fix, and the lines that explain them."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from vrnn_lightning.cli.parser import one_line
from vrnn_lightning.errors import UserError

__all__ = ["explain_construction", "explain_run", "line_of"]

RESTORING = frozenset(
    {"resume_start", "restore", "_restore_modules_and_callbacks", "restore_training_state", "match_optimizer_states"}
)
"""Functions that take a checkpoint's state."""
OPTIMIZERS = str(Path(torch.optim.__file__).parent)
"""Where an optimiser or a schedule reads the state that it has taken."""
LIGHTNING = ("lightning.pytorch.strategies.", "lightning.pytorch.callbacks.", "lightning.pytorch.loggers.")
"""Modules of classes whose options are passed on."""
UNKNOWN = "got an unexpected keyword argument"
FIX = "leave it out of dict_kwargs or of the option that passes it on"


def line_of(error: Exception) -> str | None:
    """Return the line for an error that the user can fix, also where a DataLoader's worker wrapped it; or ``None``."""
    if isinstance(error, (UserError, MisconfigurationException)):  # the latter is Lightning's
        lines = [line.partition("UserError: ")[2] for line in str(error).splitlines() if "UserError: " in line]
        return one_line(lines[-1] if lines else str(error))
    if _is_out_of_memory(error):
        fix = "give a smaller --data.batch_size, fewer samples or particles, or a smaller --evaluation.rows"
        return f"not enough memory. Fix: {fix}"
    if isinstance(error, ValueError) and str(error) == "embedded null byte":
        return "a path among the options holds a null byte. Fix: remove it"
    return None


def explain_construction(error: Exception) -> Exception:
    """Return the user's mistake that a constructor's error shows: its own line, an option or a package; or the error.

    jsonargparse 4 wraps the constructor's error; version 5 leaves a package that is missing as it is.
    """
    unknown = re.search(rf"(\w+\.__init__\(\) {UNKNOWN} '\w+')", str(error))
    if unknown:
        return UserError(f"{unknown[1]}. Fix: {FIX}")
    missing = re.search(r"class_path '[\w.]*?(\w+)':\s*(.*(?:pip install|No module named).*)", str(error))
    if missing:
        return UserError(f"{missing[1]}: {missing[2]}")
    if isinstance(error, ModuleNotFoundError):
        return UserError(str(error).splitlines()[0])
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def explain_run(error: Exception, checkpoint: str | None) -> UserError | None:
    """Return the user's mistake that an error of a command shows; ``None`` if it shows none.

    It is an argument that one of Lightning's classes passes on to a constructor without it, or any error while the
    state of a checkpoint, given by its path, is restored.
    """
    if isinstance(error, TypeError) and UNKNOWN in str(error):
        owners = [f.f_locals["self"] for f, _ in traceback.walk_tb(error.__traceback__) if "self" in f.f_locals]
        if owners and type(owners[-1]).__module__.startswith(LIGHTNING):
            return UserError(f"{type(owners[-1]).__name__}: {error}. Fix: {FIX}")
    frames = traceback.extract_tb(error.__traceback__)
    restores = any(f.name in RESTORING or f.filename.startswith(OPTIMIZERS) for f in frames)
    if checkpoint is None or not restores or _is_out_of_memory(error):
        return None
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return UserError(
        f"--ckpt_path {checkpoint}: its state does not fit this run ({line}). Fix: give the run's own options"
    )


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "Storage size calculation overflowed"))
