"""The one reader of checkpoints, which compares all that a file declares with what it holds; and what they store."""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vrnn_lightning.compatibility import KEY, require_known_format, upgrade
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, require_bounded, require_intact_zip, undamaged
from vrnn_lightning.trust.gate import Gate, path_of

__all__ = ["Stored", "make_storable", "read_checkpoint", "read_stored", "require_types"]

FIX = "give a checkpoint that `lightning fit` wrote"
KEYS: dict[Any, tuple[str, ...]] = {
    dict: ("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "loops", "callbacks"),
    list: ("optimizer_states", "lr_schedulers", "optimizer_parameters"),
    list | tuple: ("carried",),
    int: ("global_step", "epoch", "noise_seed"),
    str: ("pytorch-lightning_version",),
}
"""Keys of a checkpoint by the type of their values."""
COUNTS = frozenset({"ready", "started", "processed", "completed", "_batches_that_stepped"})
"""Numbers that Lightning's loops count."""


def read_checkpoint(path: Path, option: str = "", map_location: Any = "cpu") -> dict[str, Any]:
    """Return what a checkpoint holds: weights, numbers, text and containers of them; no code is run.

    Args:
        path: The file.
        option: The option that names it, for messages.
        map_location: Where its tensors go, as in ``torch.load``.

    Raises:
        UserError: It is missing, damaged, holds anything else, or is not a checkpoint.
    """
    place = f"{option} {path}" if option else str(path)
    with explained(path, option, FIX):
        is_file, is_folder = path.is_file(), path.is_dir()
        is_zip = is_file and zipfile.is_zipfile(path)
    if not is_zip:
        problem = "is damaged or not a checkpoint" if is_file else "is a folder" if is_folder else "no such file"
        raise UserError(f"{place}: {problem}. Fix: {FIX}")
    require_intact_zip(path, option)
    _require_stored(path, place)
    with explained(path, option), undamaged(f"{place}: is damaged, or holds more than weights and options", FIX):
        content = torch.load(path, map_location=map_location, weights_only=True)
    if isinstance(content, dict):
        require_known_format(content.get(KEY), place)
    _require_shape(content, place)
    upgrade(content, place)
    return content  # type: ignore[no-any-return]  # checked by the call


class Stored(NamedTuple):
    """A checkpoint, and the class and the options that it names."""

    content: dict[str, Any]
    made: type
    options: dict[str, Any]


def read_stored(
    path: Path,
    key: str,
    cls: type,
    trust: str | Iterable[str],
    given: Mapping[str, Any],
    map_location: Any,
    hparams_file: object,
    weights_only: bool | None,
) -> Stored:
    """Return a checkpoint with the class, ``cls`` or one below it, and the options below ``key``, or those given."""
    if hparams_file is not None or weights_only is False:
        raise UserError(f"{path}: hparams_file and weights_only=False are not supported. Fix: leave it out")
    content = read_checkpoint(path, map_location=map_location)
    gate = Gate.of_call(path, trust, given)
    stored = content.get(key, {})
    named = stored.get("_class_path", "")
    made = cls if named in ("", path_of(cls)) else gate.resolve(named, (cls,), "_class_path")
    kept = {name: value for name, value in stored.items() if not name.startswith("_") and name not in given}
    return Stored(content, made, gate.build(made, kept) | gate.build(made, given))


def require_types(state: object, owner: object, **types: type | tuple[type, ...]) -> None:
    """Raise a UserError if a checkpoint's state lacks values of an object, or has them of other types than these."""
    for name, kind in types.items():
        value = state.get(name) if isinstance(state, Mapping) else None
        if not isinstance(value, kind):
            what = f"{name} of type {type(value).__name__}"
            raise UserError(f"{type(owner).__name__}: the checkpoint's state has a {what}. Fix: {FIX}")


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
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _stored(name, getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return type(value)(_stored(name, part) for part in value)
    if not callable(value):
        return value
    made, options = _made_of(value)
    if not isinstance(made, type):
        raise UserError(f"{name}: can't be stored. Fix: pass a class or functools.partial(class, option=value)")
    return {"class_path": _path(made), "init_args": {key: _stored(name, part) for key, part in options.items()}}


def _made_of(value: Any) -> tuple[Any, dict[str, Any]]:
    if not isinstance(value, partial):
        return value, {}
    is_wrapped = bool(value.args) and not isinstance(value.func, type)  # the command line's takes the class last
    return value.args[-1] if is_wrapped else value.func, dict(value.keywords)


def _path(cls: type) -> str:
    """Return where a class can be imported from: the package that shows it, as the command line names it."""
    package = cls.__module__.rpartition(".")[0]
    public = getattr(sys.modules.get(package), cls.__name__, None) is cls
    return f"{package if public else cls.__module__}.{cls.__qualname__}"


def _require_stored(path: Path, place: str) -> None:
    """Raise if a checkpoint's members are compressed: torch writes them as they are, so their size is the file's."""
    with zipfile.ZipFile(path) as archive:
        declared = sum(member.file_size for member in archive.infolist())
    if declared > path.stat().st_size:
        raise UserError(f"{place}: declares {declared} bytes, but the file has {path.stat().st_size}. Fix: {FIX}")


def _require_shape(content: Any, place: str) -> None:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{place}: is not a checkpoint. Fix: {FIX}")
    for key in content.keys() - {"state_dict"}:
        require_bounded(content[key], f"{place}: its {key[:80]}")
    for problem in _problems(content):
        raise UserError(f"{place}: its {problem}. Fix: {FIX}")
    _require_weights(content.get("state_dict", {}), place)


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a checkpoint's values; later checks rely on earlier ones."""
    for kind, keys in KEYS.items():
        for value, key in ((content[key], key) for key in keys if key in content):
            if not isinstance(value, kind) or isinstance(value, bool):
                yield f"{key} is of type {type(value).__name__}"
    for key in KEYS[int]:
        if not 0 <= content.get(key, 0) < 2**64:
            yield f"{key} is {content[key]}"
    if not re.fullmatch(r"\d+(\.\d+)*[.\w+]*", content.get("pytorch-lightning_version", "2")):
        yield "pytorch-lightning_version is not a version"
    for key in KEYS[dict]:
        if not all(isinstance(name, str) for name in content.get(key, {})):
            yield f"{key} has names that are not text"
    for key in ("optimizer_states", "lr_schedulers"):
        if not all(isinstance(state, dict) for state in content.get(key, [])):
            yield f"{key} are not states by name"
    named = content.get("optimizer_parameters", [])
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in named):
        yield "optimizer_parameters are not lists of names"
    yield from _miscounts(content.get("loops", {}), "loops")


def _miscounts(loops: Mapping[Any, Any], place: str) -> Iterator[str]:
    for name, value in loops.items():
        if name in COUNTS and not (isinstance(value, int) and 0 <= value < 2**63):
            yield f"{place}.{name} is not a count"
        elif isinstance(value, dict):
            yield from _miscounts(value, f"{place}.{str(name)[:80]}")


def _require_weights(weights: Mapping[Any, Any], place: str) -> None:
    """Raise if a ``state_dict`` holds anything but whole tensors: a view can declare more values than it has."""
    storages: dict[int, int] = {}
    for name, value in weights.items():
        is_plain = isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        if not is_plain or value.is_quantized or value.is_nested or value.device.type == "meta":
            raise UserError(f"{place}: {str(name)[:80]} is not a tensor of weights. Fix: {FIX}")
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    declared, held = sum(value.numel() * value.element_size() for value in weights.values()), sum(storages.values())
    if declared > held:
        raise UserError(f"{place}: its weights declare {declared} bytes, but it holds {held}. Fix: {FIX}")
