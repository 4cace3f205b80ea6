"""Hyperparameters as a checkpoint stores them."""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from vrnn_lightning.errors import UserError

__all__ = ["make_storable"]


def make_storable(hparams: Any) -> None:
    """Replace classes, partials and dataclasses by the options that make them, which load without running pickled code.

    An optimiser or scheduler made by any other function is left out: only training needs it, and gives it again.
    """
    for name, value in list(hparams.items()):
        is_of_training = name in ("optimizer", "lr_scheduler")
        if is_of_training and callable(value) and not isinstance(_made_of(value)[0], type):
            del hparams[name]
        else:
            hparams[name] = _stored(name, value)
    hparams.setdefault("_instantiator", "lightning.pytorch.cli.instantiate_module")


def _stored(name: str, value: Any) -> Any:
    """Return a value as plain containers."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _stored(name, getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return type(value)(_stored(name, part) for part in value)
    if not callable(value):
        return value
    made, options = _made_of(value)
    if not isinstance(made, type):
        raise UserError(f"{name}: a checkpoint can only hold a class or functools.partial(class, option=value)")
    return {"class_path": _path(made), "init_args": {key: _stored(name, part) for key, part in options.items()}}


def _made_of(value: Any) -> tuple[Any, dict[str, Any]]:
    """Return what a factory calls, and its options."""
    if not isinstance(value, partial):
        return value, {}
    is_wrapped = bool(value.args) and not isinstance(value.func, type)  # the command line's takes the class last
    return value.args[-1] if is_wrapped else value.func, dict(value.keywords)


def _path(cls: type) -> str:
    """Return where a class can be imported from: the package that shows it, as the command line names it."""
    package = cls.__module__.rpartition(".")[0]
    public = getattr(sys.modules.get(package), cls.__name__, None) is cls
    return f"{package if public else cls.__module__}.{cls.__qualname__}"
