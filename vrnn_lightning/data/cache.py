"""Facts about data that do not change, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from vrnn_lightning.errors import UserError
from vrnn_lightning.files import replacing

__all__ = ["digest", "recall", "remember"]


def digest(value: Any) -> str:
    """Return a name for a value made of lists, dicts, words and numbers.

    >>> digest(["a", 1]) == digest(["a", 1]) != digest(["a", 2])
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def recall(name: str) -> Any | None:
    """Return the value of a name, or ``None`` where there is none or it is damaged."""
    try:
        return json.loads((_folder() / f"{name}.json").read_text("ascii"))
    except (OSError, RuntimeError, ValueError):  # no file, no home, another program's file
        return None


def remember(name: str, value: Any) -> None:
    """Keep a value made of lists, dicts, words and numbers, where that is possible; readers never see a part of it."""
    with suppress(UserError, RuntimeError), replacing(_folder() / f"{name}.json") as part:  # a cache may be missing
        part.write_text(json.dumps(value), encoding="ascii")


def _folder() -> Path:
    """Return ``$XDG_CACHE_HOME/vrnn_lightning``, by default in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "vrnn_lightning"
