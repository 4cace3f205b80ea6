"""A model as a folder to send: its weights and scaler as safetensors, its options as JSON, and nothing that runs."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from vrnn_lightning.errors import UserError
from vrnn_lightning.files import write_files
from vrnn_lightning.heads import Head

__all__ = ["Pretrained", "require_numbers"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OF_TRAINING = frozenset({"optimizer", "lr_scheduler", "lr_interval", "objective", "_instantiator"})
OWN = "vrnn_lightning.heads"
FORMAT = "vrnn-lightning 1"


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
                JSON can't hold, or weights are no numbers, narrower than float32, or of a pruned layer.
        """
        save = _safetensors().torch.save
        module: Any = self
        options = {name: value for name, value in module.hparams.items() if name not in OF_TRAINING}
        weights = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
        altered = next((name for name in weights if name.endswith("_orig") or "parametrizations" in name), None)
        if altered is not None:
            raise UserError(f"{altered}: is of a pruned or parametrised layer; make it permanent first (prune.remove)")
        require_numbers("the model", weights)
        config = {"format": FORMAT, "model": options}
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

        Nothing that the folder holds is run, and no class that it names is imported but this package's own emissions.
        What it declares is compared with the weights that are there before any memory is taken for it, unless a class
        of your own is to be called.

        Args:
            folder: With ``config.json`` and ``model.safetensors``. Needs ``pip install 'vrnn-lightning[export]'``.
            trust: Modules of your own whose emissions the options may name, for example ``["my_package.heads"]``.

        Raises:
            UserError: A file is missing or damaged, the two don't belong together, a value is no number, or the options
                name a class that is not trusted.
        """
        folder = Path(folder)
        config, source = folder / CONFIG, folder / WEIGHTS
        trusted = {OWN, *([trust] if isinstance(trust, str) else trust)}
        options = _options(config)
        weights = _weights(source)
        given = {**options}
        defaults = _defaults(cls)
        for name, value in options.items():
            default = defaults.get(name)
            if isinstance(value, Mapping) and "class_path" in value:
                given[name] = _emission(config, name, value, trusted)
            elif isinstance(value, Mapping) and is_dataclass(default):
                given[name] = _made(config, type(default), value)
        for name, value in [("layers", given.get("layers")), *((k, getattr(v, "depth", 0)) for k, v in given.items())]:
            if isinstance(value, int) and value > len(weights):
                raise UserError(f"{config}: {name} is deeper than the weights of {WEIGHTS}")
        known = not trust and cls.__module__.partition(".")[0] == "vrnn_lightning"  # others' may look at their values
        with torch.device("meta") if known else nullcontext():  # no memory is taken
            declared: Any = _made(config, cls, given)
        _compare(folder, declared.state_dict(), weights)
        require_numbers(source, weights)
        module = _made(config, cls, given)
        module.to(max((value.dtype for value in weights.values() if value.is_floating_point()), key=_bits))
        module.load_state_dict(weights)
        return cast("Self", module)


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _defaults(made: type) -> dict[str, Any]:
    """Return the options that make something, and what each is if not given; those of its bases if it takes any."""
    found: dict[str, Any] = {}
    for cls in made.__mro__:
        if "__init__" not in vars(cls):
            continue
        _, *options = inspect.signature(vars(cls)["__init__"]).parameters.values()
        named = (o for o in options if o.kind not in (o.VAR_KEYWORD, o.VAR_POSITIONAL) and o.name not in OF_TRAINING)
        found = {option.name: option.default for option in named} | found
        if all(option.kind != option.VAR_KEYWORD for option in options):
            break
    return found


def _require_options(config: Path, made: type, options: Mapping[str, Any]) -> None:
    """Refuse options that something has not, or values of another kind than it has them of."""
    defaults = _defaults(made)
    for name, value in options.items():
        if name not in defaults:
            raise UserError(f"{config}: {name} is no option of {made.__name__} in this version")
        kind = type(defaults[name])
        fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if kind in (bool, int, float, str) and not fits:
            raise UserError(f"{config}: {name} {value!r} is no {kind.__name__}")


def _made(config: Path, made: type, options: Mapping[str, Any]) -> Any:
    """Call a class of ours with options of others."""
    _require_options(config, made, options)
    try:
        return made(**options)
    except (UserError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{config}: no model can be made of its options: {line}") from error


def _emission(config: Path, option: str, value: Mapping[str, Any], trusted: set[str]) -> Callable[..., Any]:
    """Return the class that an option names, with its own options, if its module is trusted."""
    named, options = value["class_path"], value.get("init_args", {})
    if not isinstance(named, str) or not isinstance(options, Mapping):
        raise UserError(f"{config}: {option} must hold a class_path and init_args")
    module, _, name = named.rpartition(".")
    if module not in trusted:
        raise UserError(
            f"{config}: names the class {named}, which is not of {OWN}; "
            f"if you trust it, from_pretrained(..., trust=['{module}'])"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{config}: {option} {named} can't be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, Head)) or inspect.isabstract(found):
        raise UserError(f"{config}: {option} {named} is no emission")
    _require_options(config, found, options)
    return partial(found, **options)


def _weights(path: Path) -> dict[str, Tensor]:
    """Return what a file of safetensors holds."""
    load = _safetensors().torch.load
    try:
        weights: dict[str, Tensor] = load(_content(path))
    except UserError:
        raise
    except Exception as error:  # the library's own errors, of a file that is cut or of another kind
        raise UserError(f"{path}: is no safetensors file, or damaged ({error})") from error
    return weights


def require_numbers(where: object, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that no density can be found with."""
    for name, value in weights.items():
        if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            raise UserError(f"{where}: {name} is of {value.dtype}; densities need float32 or float64: convert it")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{where}: {name} holds values that are no numbers; take an earlier checkpoint")
        if name.endswith(("scale_std", "input_std")) and not (value > 0).all():
            raise UserError(f"{where}: {name} must be positive")


def _compare(folder: Path, declared: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse weights of another model than the options make."""
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
    cure = "give a folder that save_pretrained wrote"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no file; {cure}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}; {cure}") from error


def _options(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_content(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    known = isinstance(config, dict) and config.get("format") == FORMAT
    if not known or not isinstance(config.get("model"), dict):
        raise UserError(f"{path}: is not what save_pretrained of this version writes (format {FORMAT!r})")
    return dict(config["model"])
