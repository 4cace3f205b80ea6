"""Checks of options that datamodules share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from vrnn_lightning import errors
from vrnn_lightning.errors import UserError

__all__ = ["checked_limit", "data_root", "require"]

T = TypeVar("T", bound="float | None")


def data_root(root: str) -> Path:
    """Return a file or folder that ``--data.root`` names, which need not be there.

    Args:
        root: Its path; ``~`` is a user's home.

    Raises:
        UserError: No path of this machine can be called so.
    """
    try:
        path = Path(root).expanduser()
        os.lstat(path)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return path
    except (RuntimeError, ValueError) as error:  # no such user; a null byte
        raise UserError(f"--data.root {root}: {str(error).rstrip('.')}. Fix: write the whole path") from error
    except OSError as error:
        raise UserError(f"--data.root {root[:80]}: {error.strerror}. Fix: give a path of this machine") from error
    return path


def checked_limit(max_gb: float) -> float:
    """Return the option ``max_gb`` of a datamodule; raise a UserError unless it is positive."""
    if not max_gb > 0:
        raise UserError(f"--data.max_gb {max_gb}: must be positive, in gigabytes")
    return max_gb


def require(option: str, value: T, least: float, most: float | None = None, *, below: float | None = None) -> T:
    """Return an option of a datamodule that is in its range, or ``None``; NaN is outside.

    Args:
        option: Its name.
        value: Its value.
        least: The smallest allowed value.
        most: The largest allowed value.
        below: The end of the range, which is not allowed; by default, without ``most``, 2^31.

    Raises:
        UserError: The value is outside.

    >>> require("memory", 0.5, 0, below=1)
    0.5
    """
    if value is None:
        return value
    if most is None and below is None and value >= 2**31:
        raise UserError(f"--data.{option} {value}: must be below 2^31")
    return errors.require(f"--data.{option}", value, least, most, below=below)
