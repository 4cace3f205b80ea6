"""Where data lie."""

from __future__ import annotations

import os
from pathlib import Path

from vrnn_lightning.errors import UserError

__all__ = ["data_root"]


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
