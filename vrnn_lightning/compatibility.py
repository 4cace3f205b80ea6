"""Files of earlier releases: the number of their format, and the tables of everything that was renamed since.

A release that renames an option, a class or a part of the model adds a row here. Checkpoints, pretrained folders,
config files and command lines are read through these tables, so an old name is never given to something else.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib.machinery import PathFinder
from typing import Any

from vrnn_lightning.errors import UserError

__all__ = [
    "CLASSES", "FORMAT", "KEY", "OPTIMIZED", "OPTIONS", "WEIGHTS", "current_class", "current_option", "current_options",
    "current_weights", "keep_old_hooks", "old_names", "renamed", "require_known_format", "upgrade",
]  # fmt: skip

FORMAT = 2
"""The format of the checkpoints and pretrained folders that this version writes; 1, without a number, is 0.1.0's."""
OPTIMIZED = "optimizer_parameters"
"""Key in a checkpoint: the names of each optimiser's parameters, in the order of its state."""
KEY = "vrnn_lightning_format"
"""The format's place in a checkpoint."""
OPTIONS: dict[str, str] = {}
"""The new last part of an option by its full old name, of the command line (``model.phi_x``) or of a class
(``vrnn_lightning.heads.StudentT.min_df``); all parts but the last are current names."""
CLASSES: list[tuple[str, str]] = [
    ("datamodules.", "vrnn_lightning.datamodules."),  # 0.1.0
    ("datamodules.", "vrnn_lightning.datamodules.local."),  # 0.1.0, files of the working directory
]
"""Old and new class path, or package with a dot at its end, which counts for the modules that the new one has."""
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
    """Return the class path that a class has now; a name without a package counts where a class of that name had one.

    >>> current_class("datamodules.sines.Sines")
    'vrnn_lightning.datamodules.sines.Sines'
    >>> current_class("torch.optim.Adam")
    'torch.optim.Adam'
    """
    for old, new in CLASSES:
        if path and path in (old, old.rpartition(".")[2]):
            return new
        module, _, name = path.removeprefix(old).rpartition(".")
        if old.endswith(".") and path.startswith(old) and _is_module(new[:-1], module):
            return f"{new}{module}.{name}"
    return path


def _is_module(package: str, name: str) -> bool:
    folders = importlib.import_module(package).__path__
    return name.isidentifier() and PathFinder.find_spec(f"{package}.{name}", folders) is not None


def current_option(name: str) -> str:
    """Return the name that an option of the command line has now.

    >>> current_option("model.phi_x.width")
    'model.phi_x.width'
    """
    current: list[str] = []
    for part in name.split("."):
        current.append(OPTIONS.get(".".join([*current, part]), part))
    return ".".join(current)


def current_options(
    options: Any,
    place: str = "",
    say: Callable[[str, str], object] = lambda old, new: None,
    commands: Collection[str] = (),
) -> Any:
    """Return the options of a config file or a checkpoint under the names that they have now.

    Args:
        options: Their values by name, of any depth.
        place: The option that they belong to, ``"model"``; or the path of their class.
        say: Called with the old and the new name of each option that was renamed.
        commands: Names at the top whose options are those of the command line.

    >>> current_options({"data": {"class_path": "datamodules.sines.Sines", "init_args": {"steps": 9}}})
    {'data': {'class_path': 'vrnn_lightning.datamodules.sines.Sines', 'init_args': {'steps': 9}}}
    """
    if isinstance(options, list):
        return [current_options(value, place, say) for value in options]
    if not isinstance(options, Mapping):
        is_class = isinstance(options, str) and not place.endswith("name")
        return current_class(options) if is_class else options
    paths = [options.get(key) for key in ("class_path", "_class_path")]
    made = current_class(next((path for path in paths if isinstance(path, str)), ""))
    current = {}
    for key, value in options.items():
        if not isinstance(key, str):
            current[key] = value
            continue
        option = key.removesuffix("+")  # appends to a list
        old = f"{place}.{option}".lstrip(".")
        new = OPTIONS.get(old) or OPTIONS.get(f"{made}.{option}") or option
        full = f"{place}.{new}".lstrip(".")
        if new != option:
            say(old, full)
        within = made if key == "init_args" else "" if key in commands else full
        current[new + key[len(option) :]] = current_options(value, within, say)
    return current


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
    short = {old.rpartition(".")[2]: new.rpartition(".")[2] for old, new in CLASSES if not old.endswith(".")}
    content |= {short[key]: content.pop(key) for key in [*content] if key in short}  # the datamodule's state
    if isinstance(content.get("callbacks"), Mapping):  # their states, each below its class and perhaps options
        current = partial(re.sub, r"^\w+", lambda name: short.get(name[0], name[0]))
        content["callbacks"] = {current(key): state for key, state in content["callbacks"].items()}
    for key, group in (("hyper_parameters", "model"), ("datamodule_hyper_parameters", "data")):
        if isinstance(content.get(key), Mapping):
            content[key] = current_options(content[key], group)
    for key in ("state_dict", "current_model_state"):  # the second: weights beside their average
        if isinstance(content.get(key), Mapping):
            content[key] = current_weights(content[key])
    if isinstance(content.get(OPTIMIZED), list):  # the names of each optimiser's parameters
        content[OPTIMIZED] = [[_current_weight(name) for name in names] for names in content[OPTIMIZED]]
