"""A model as a folder to send: its weights and scaler as safetensors, its options as JSON, and nothing that runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from vrnn_lightning.compatibility import FORMAT, current_options, current_weights, require_known_format
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import write_files
from vrnn_lightning.trust import Gate, parameters_of, read_stored

__all__ = ["Pretrained", "require_model", "require_numbers"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OF_TRAINING = frozenset({"optimizer", "lr_scheduler", "lr_interval", "objective", "_instantiator"})
NAME = "vrnn-lightning"
"""The word before the number of the format."""


class Pretrained:
    """What :class:`~vrnn_lightning.module.VRNNLightningModule` writes to a folder and reads from one."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, the options that make the networks, and ``model.safetensors``, weights and scaler.

        What only training needs, optimiser, schedule and objective, stays in the checkpoint. The files replace earlier
        ones of their names when both are whole.

        Args:
            folder: Made if it is not there. Needs ``pip install 'vrnn-lightning[export]'``.

        Raises:
            UserError: The folder can't be written to, safetensors is not installed, the emission has an option that
                JSON can't hold, or weights are not numbers, narrower than float32, or of a pruned layer.
        """
        save = _safetensors().torch.save
        module: Any = self
        options = {name: value for name, value in module.hparams.items() if name not in OF_TRAINING}
        weights = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
        altered = next((name for name in weights if name.endswith("_orig") or "parametrizations" in name), None)
        if altered is not None:
            raise UserError(f"{altered}: is of a pruned or parametrised layer; make it permanent first (prune.remove)")
        require_numbers("the model", weights)
        config = {"format": f"{NAME} {FORMAT}", "model": options}
        try:
            text = json.dumps(config, indent=2) + "\n"
        except TypeError as error:
            raise UserError(f"emission: has options that JSON can't hold ({error}); the model is not saved") from error
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # a name that no folder can have is a ValueError
            said = getattr(error, "strerror", None) or error
            raise UserError(f"{folder}: {said}; the model is not saved there") from error
        write_files({folder / WEIGHTS: save(weights), folder / CONFIG: text.encode()})

    @classmethod
    def from_pretrained(cls, folder: str | Path, trust: str | Sequence[str] = ()) -> Self:
        """Return the model that :meth:`save_pretrained` wrote, on the CPU, in the type it had.

        It is in training mode, as any new model is, so that a Trainer drops out what it should; what a model is asked
        for (``sample``, ``score``, ``session`` ...) drops nothing out in either mode.

        Nothing that the folder holds is run, and no class that it names is imported unless it passes the same check as
        a checkpoint's (:class:`~vrnn_lightning.trust.Gate`). What it declares is compared with the weights that are
        there before any memory is taken for it, unless a class of your own is to be called.

        Args:
            folder: With ``config.json`` and ``model.safetensors``. Needs ``pip install 'vrnn-lightning[export]'``.
            trust: Class paths or modules of your own that the options may name, for example ``["my_package.heads"]``.

        Raises:
            UserError: A file is missing or damaged, the two don't belong together, a value is not a number, or the
                options name a class that is not trusted.
        """
        folder = Path(folder)
        config, source = folder / CONFIG, folder / WEIGHTS
        gate = Gate.of_call(config, trust)
        options = _options(config)
        weights = current_weights(_weights(source))
        _require_options(config, cls, options)
        given = gate.build(cls, options)
        declared = _declared(config, cls, given, weights)
        _compare(folder, declared, weights)
        require_numbers(source, weights)
        module = _made(config, cls, given)
        module.to(max((value.dtype for value in weights.values() if value.is_floating_point()), key=_bits))
        module.load_state_dict(weights)
        return cast("Self", module)

    @classmethod
    def load_from_checkpoint(  # Lightning's, as far as a checkpoint of ours needs it
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        trust: str | Sequence[str] = (),
        **options: Any,
    ) -> Self:
        """Return the model of a checkpoint; what its options name passes :class:`~vrnn_lightning.trust.Gate`.

        Args:
            checkpoint_path: The file.
            map_location: Where its tensors go, as in ``torch.load``; by default where they were.
            hparams_file: Not supported: a checkpoint holds its options.
            strict: Raise unless the model has exactly the checkpoint's weights, which is the default.
            weights_only: ``False`` is not supported: nothing else is ever loaded.
            trust: Class paths or modules of your own that the options may name, for example ``["my_package.heads"]``.
            options: Options of the model in place of the checkpoint's.

        Raises:
            UserError: The file is missing, damaged or not a checkpoint of this class, or it names a class that is not
                trusted.
        """
        path, key = Path(checkpoint_path), "hyper_parameters"
        place = map_location or _here
        content, made, given = read_stored(path, key, cls, trust, options, place, hparams_file, weights_only)
        weights = content.get("state_dict", {})
        require_model(path, made, given, weights)
        module = _made(path, made, given)
        module.on_load_checkpoint(content)
        try:
            module.load_state_dict(weights, strict=strict is not False)
        except RuntimeError as error:
            raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from error
        device = next(iter(weights.values())).device if weights else "cpu"
        return cast("Self", module.to(device))


def require_model(source: object, made: type, given: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raise if a checkpoint's options do not fit its weights; they are compared before memory is taken for a model.

    Args:
        source: The file, for messages.
        made: The model's class.
        given: Its arguments.
        weights: Its ``state_dict``.

    Raises:
        UserError: They do not.
    """
    _require_options(source, made, given, of_training=True)
    declared = _declared(source, made, given, weights)
    for name in declared.keys() & weights.keys():
        there, here = tuple(weights[name].shape), tuple(declared[name].shape)
        if there != here:
            raise UserError(f"{source}: {name} has shape {there}, but the options make {here}; they do not fit")
    size, stored = (sum(value.numel() for value in part.values()) for part in (declared, weights))
    if size > stored:
        raise UserError(f"{source}: the options make a model of {size} numbers, but it holds {stored}")


def _declared(source: object, made: type, given: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that options declare, without memory for them if the model holds no class of the user's."""
    for name, value in [("layers", given.get("layers")), *((k, getattr(v, "depth", 0)) for k, v in given.items())]:
        if isinstance(value, int) and value > len(weights):
            raise UserError(f"{source}: {name} is deeper than its {len(weights)} weights")
    for value in given.values():
        if isinstance(value, partial) and _is_known(value):
            _require_options(source, cast("type", value.func), value.keywords)
    meta = _is_known(made) and all(map(_is_known, given.values()))  # others' may look at their values
    with torch.random.fork_rng(devices=[]), torch.device("meta") if meta else nullcontext():
        return cast("dict[str, Tensor]", _made(source, made, given).state_dict())


def _is_known(value: Any) -> bool:
    """Return whether an option is a plain value or of a class that is known to build on any device."""
    made = value.func if isinstance(value, partial) else value if isinstance(value, type) else type(value)
    return made.__module__.partition(".")[0] in ("vrnn_lightning", "torch", "lightning", "builtins")


def _here(storage: Any, location: str) -> Any:
    """Leave a tensor on its device, or on the CPU where this machine has no such device."""
    kind = location.partition(":")[0]
    there = kind == "cpu" or (hasattr(torch, kind) and getattr(torch, kind).is_available())
    return None if there else storage.cpu()


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _require_options(config: object, made: type, options: Mapping[str, Any], of_training: bool = False) -> None:
    """Raise if options are not those of a class."""
    known = parameters_of(made)
    for name in options:
        if name not in known or (name in OF_TRAINING and not of_training):
            raise UserError(f"{config}: {name} is not an option of {made.__name__} in this version")


def _made(source: object, made: type, options: Mapping[str, Any]) -> Any:
    """Call the model's class with options of others."""
    try:
        return made(**options)
    except (UserError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: no model can be made of its options: {line}") from error


def _weights(path: Path) -> dict[str, Tensor]:
    """Return what a file of safetensors holds."""
    load = _safetensors().torch.load
    try:
        weights: dict[str, Tensor] = load(_content(path))
    except UserError:
        raise
    except Exception as error:  # the library's own errors, of a file that is cut or of another kind
        raise UserError(f"{path}: is not a safetensors file, or damaged ({error})") from error
    return weights


def require_numbers(where: object, weights: Mapping[str, Tensor]) -> None:
    """Raise if a weight is not finite or narrower than float32."""
    for name, value in weights.items():
        if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            raise UserError(f"{where}: {name} is of {value.dtype}; densities need float32 or float64: convert it")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{where}: {name} holds values that are not numbers; take an earlier checkpoint")
        if name.endswith(("scale_std", "input_std")) and not (value > 0).all():
            raise UserError(f"{where}: {name} must be positive")


def _compare(folder: Path, declared: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise if the weights are not those of the model that the options make."""
    for name in [*declared, *weights]:
        there, here = (_described(part.get(name)) for part in (weights, declared))
        if there != here:
            raise UserError(f"{folder}: {WEIGHTS} and {CONFIG} are of different models ({name}: {there} and {here})")


def _described(value: Tensor | None) -> str:
    if value is None:
        return "none"
    return f"shape {tuple(value.shape)} of {'floats' if value.is_floating_point() else value.dtype}"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise UserError("safetensors is not installed; pip install 'vrnn-lightning[export]'") from error
    return safetensors


def _content(path: Path) -> bytes:
    fix = "give a folder that save_pretrained wrote"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a file; {fix}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}; {fix}") from error


def _options(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_content(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    name, _, number = str(config.get("format") if isinstance(config, dict) else None).partition(" ")
    if name != NAME or not number.isdecimal() or not isinstance(config.get("model"), dict):
        raise UserError(f"{path}: is not what save_pretrained writes. Fix: give the config.json that it wrote")
    require_known_format(int(number), path)
    return dict(current_options(config["model"], "model"))
