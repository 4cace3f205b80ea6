"""Hyperparameters as a checkpoint stores them."""

from __future__ import annotations

import sys
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import Any

from vrnn_lightning.errors import UserError

__all__ = ["make_storable"]


def make_storable(hparams: Any) -> None:
    """Replace classes, partials and dataclasses by the options that make them, which load without running pickled code.

    An optimiser or scheduler made by any other function is left out: only training needs it, and gives it again.
    """
    for name, value in list(hparams.items()):
        if is_dataclass(value) and not isinstance(value, type):
            hparams[name] = asdict(value)
        elif callable(value):
            made, options = value, {}
            if isinstance(value, partial):  # the command line's own function takes the class last
                is_wrapped = bool(value.args) and not isinstance(value.func, type)
                made, options = value.args[-1] if is_wrapped else value.func, dict(value.keywords)
            if isinstance(made, type):
                hparams[name] = {"class_path": _path(made), "init_args": options}
            elif name in ("optimizer", "lr_scheduler"):
                del hparams[name]
            else:
                raise UserError(f"{name}: can't be stored. Fix: pass a class or functools.partial(class, option=value)")
    hparams.setdefault("_instantiator", "lightning.pytorch.cli.instantiate_module")


def _path(cls: type) -> str:
    """Return where a class can be imported from: the package that shows it, as the command line names it."""
    package = cls.__module__.rpartition(".")[0]
    public = getattr(sys.modules.get(package), cls.__name__, None) is cls
    return f"{package if public else cls.__module__}.{cls.__qualname__}"
