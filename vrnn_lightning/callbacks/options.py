"""Checks of options that several callbacks have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vrnn_lightning.errors import UserError

__all__ = ["require_at_least", "require_columns"]

MAX_COLUMNS = 64  # side by side they are 20,000 pixels wide


def require_at_least(group: str, options: Mapping[str, Any], least: Mapping[str, float]) -> None:
    """Raise if an option of a group is below its least value or infinite; ``None`` stands for a default."""
    for name, low in least.items():
        value = options.get(name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"{group}.{name} {value}: must be at least {low}")


def require_columns(option: str, count: int) -> None:
    """Raise if a picture has no room for a number of sequences."""
    if count > MAX_COLUMNS:
        raise UserError(f"{option} {count}: must be at most {MAX_COLUMNS}, the sequences of one picture")
