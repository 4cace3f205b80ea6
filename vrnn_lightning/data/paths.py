"""Where data lie."""

from __future__ import annotations

import os
from pathlib import Path

from vrnn_lightning.errors import UserError

__all__ = ["checked_limit", "data_root"]


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
    except FileNotFoundError:
        return path
    except (RuntimeError, ValueError) as error:  # no such user; a null byte
        raise UserError(f"--data.root {root}: {str(error).rstrip('.')}; write the whole path") from error
    except OSError as error:
        if not isinstance(error, PermissionError | NotADirectoryError):
            raise UserError(f"--data.root {root[:80]}: {error.strerror}; give a path of this machine") from error
    return path


def checked_limit(max_gb: float) -> float:
    """Return the option ``max_gb`` of a datamodule, which must be positive.

    Raises:
        UserError: It is not.
    """
    if not max_gb > 0:
        raise UserError(f"--data.max_gb {max_gb}: must be positive, in gigabytes")
    return max_gb
