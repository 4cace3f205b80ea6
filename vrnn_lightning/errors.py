"""The one exception for mistakes of the user, the checks of a number's range, and the word that was meant."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

__all__ = ["UserError", "require", "require_at_least", "suggestion"]

T = TypeVar("T", bound=float)


class UserError(Exception):
    """A mistake in data, options or files that the user can fix.

    The message is one line that names the file or option and the fix. The command line prints that line alone and
    exits with code 1 (``--debug`` adds the traceback); every other exception keeps its traceback.
    """


def require(option: str, value: T, least: float, most: float | None = None, *, below: float | None = None) -> T:
    """Return an option's value if it lies between ``least`` and ``most``, or below ``below``; NaN does not.

    Raises:
        UserError: The value is outside.

    >>> require("dropout", 0.5, 0, below=1)
    0.5
    """
    if most is not None:
        is_allowed, bound = least <= value <= most, f"lie between {least} and {most}"
    elif below is not None:
        is_allowed, bound = least <= value < below, f"lie in [{least}, {below})"
    else:
        is_allowed, bound = value >= least, f"be at least {least}"
    if not is_allowed:
        raise UserError(f"{option} {value}: must {bound}")
    return value


def require_at_least(group: str, options: Mapping[str, Any], least: Mapping[str, float]) -> None:
    """Raise if an option of a group is below its least value or infinite; ``None`` stands for a default."""
    for name, low in least.items():
        value = options.get(name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"{group}.{name} {value}: must be at least {low}")


def suggestion(word: str, words: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the word nearest to a mistyped one, or nothing.

    >>> suggestion("Sine", ["Sines", "Speech"])
    " Did you mean 'Sines'?"
    """
    by_lower = {w.lower(): w for w in words}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""
