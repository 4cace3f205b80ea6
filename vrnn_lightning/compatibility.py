"""Files of earlier releases: the number of their format, and the tables of everything that was renamed since.

A release that moves a package of classes or renames a part of the model adds a row here. Checkpoints, pretrained
folders, config files and command lines are read through these tables, so an old name is never given to something else.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from typing import Any

from vrnn_lightning.errors import UserError

__all__ = [
    "FORMAT", "KEY", "OPTIMIZED", "PACKAGES", "WEIGHTS", "current_class", "current_options", "current_weights",
    "keep_old_hooks", "old_names", "renamed", "require_known_format", "upgrade",
]  # fmt: skip

FORMAT = 2
"""The format of the checkpoints and pretrained folders that this version writes; 1, without a number, is 0.1.0's."""
OPTIMIZED = "optimizer_parameters"
"""Key in a checkpoint: the names of each optimiser's parameters, in the order of its state."""
KEY = "vrnn_lightning_format"
"""The format's place in a checkpoint."""
PACKAGES = (
    ("datamodules", "vrnn_lightning.datamodules"),  # 0.1.0
    ("datamodules", "vrnn_lightning.datamodules.local"),  # 0.1.0, files of the working directory
)
"""Old and new package of classes, which counts for the modules that the new one has."""
WEIGHTS: dict[str, str] = {"prepared": "is_initialized"}
"""The new name of a part of the model by its old one, as in ``state_dict`` (``vrnn.phi_x``)."""


def require_known_format(number: object, place: object) -> None:
    """Raise a UserError if a file's format is not a number or one that this version does not know.

    >>> require_known_format(1, "last.ckpt")
    """
    if number is None:
        return
    if type(number) is not int or number < 1:
        shown = repr(number)[:80] if isinstance(number, (int, float, str)) else f"of type {type(number).__name__}"
        reason = "is below 1" if type(number) is int else "is not a number"
        raise UserError(f"{place}: its format {shown} {reason}. Fix: give a file that vrnn-lightning wrote")
    if number > FORMAT:
        raise UserError(
            f"{place}: has format {number}, but this version of vrnn-lightning reads formats up to {FORMAT}. "
            "Fix: pip install --upgrade vrnn-lightning"
        )


def keep_old_hooks(cls: type, hooks: Mapping[str, str]) -> None:
    """Accept overrides of hooks under their old names, with a warning: ``{old: new}``; the base class has both."""
    for old, new in hooks.items():
        owner = next(c for c in cls.__mro__ if old in vars(c) or new in vars(c))  # cls, or a mixin before the base
        if new in vars(owner):
            if owner is cls:
                setattr(cls, old, vars(cls)[new])  # a subclass of this one may call it by the old name
            continue
        warnings.warn(f"{cls.__qualname__}.{old} is now called {new}. Fix: rename it", FutureWarning, stacklevel=3)
        is_plain = not hasattr(vars(owner)[old], "__get__")  # an instance may have a value of its own
        setattr(cls, new, _Renamed(old) if is_plain else vars(owner)[old])


class _Renamed:
    """An attribute that is read under another name, of a class too."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> Any:
        return getattr(owner if instance is None else instance, self.name)


def renamed(old: str, new: str) -> Any:
    """Return a property that reads and sets an attribute under its old name, with a warning."""

    def access(instance: object, *value: Any) -> Any:
        warnings.warn(f"{type(instance).__name__}.{old} is now called {new}", FutureWarning, stacklevel=2)
        return setattr(instance, new, *value) if value else getattr(instance, new)

    return property(access, access, doc=f"The old name of :attr:`{new}`.")


def old_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module that finds what was renamed under its old name, with a warning."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now called {names[name]}", FutureWarning, stacklevel=2)
        return getattr(importlib.import_module(module), names[name])

    return find


def current_class(path: str) -> str:
    """Return the class path that a class has now.

    >>> current_class("datamodules.sines.Sines")
    'vrnn_lightning.datamodules.sines.Sines'
    >>> current_class("torch.optim.Adam")
    'torch.optim.Adam'
    """
    for old, new in PACKAGES:
        module, _, name = path.removeprefix(f"{old}.").rpartition(".")
        if path.startswith(f"{old}.") and _is_module(new, module):
            return f"{new}.{module}.{name}"
    return path


def _is_module(package: str, name: str) -> bool:
    folders = importlib.import_module(package).__path__
    return name.isidentifier() and PathFinder.find_spec(f"{package}.{name}", folders) is not None


def current_options(options: Any) -> Any:
    """Return the options of a config file or a checkpoint, of any depth, with the class paths that classes have now.

    >>> current_options({"data": {"class_path": "datamodules.sines.Sines", "init_args": {"steps": 9}}})
    {'data': {'class_path': 'vrnn_lightning.datamodules.sines.Sines', 'init_args': {'steps': 9}}}
    """
    if isinstance(options, list):
        return [current_options(value) for value in options]
    if isinstance(options, Mapping):
        return {key: current_options(value) for key, value in options.items()}
    return current_class(options) if isinstance(options, str) else options


def current_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """Return a ``state_dict`` under the names that the parts of the model have now."""
    names = [_current_weight(name) for name in weights]
    return weights if names == list(weights) else dict(zip(names, weights.values(), strict=True))


def _current_weight(name: str) -> str:
    part = next((part for part in WEIGHTS if f"{name}.".startswith(f"{part}.")), None)
    return name if part is None else WEIGHTS[part] + name[len(part) :]


def upgrade(content: dict[str, Any], place: object) -> None:
    """Give everything in a checkpoint the name that it has now, in place; ``place`` is its file, for the message."""
    require_known_format(content.get(KEY), place)
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if key in content:
            content[key] = current_options(content[key])
    for key in ("state_dict", "current_model_state"):  # the second: weights beside their average
        if isinstance(content.get(key), Mapping):
            content[key] = current_weights(content[key])
    if isinstance(content.get(OPTIMIZED), list):  # the names of each optimiser's parameters
        content[OPTIMIZED] = [[_current_weight(name) for name in names] for names in content[OPTIMIZED]]
