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

from vrnn_lightning.compatibility import FORMAT, current_options, current_weights, renamed, require_known_format
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, undamaged, write_files
from vrnn_lightning.inference.checks import require_numbers
from vrnn_lightning.trust import Gate, parameters_of, read_stored

__all__ = ["Pretrained", "require_model"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FIX = "give a folder that save_pretrained wrote"
OPTIONS = "give the options it was trained with"
OF_TRAINING = frozenset({"optimizer", "lr_scheduler", "lr_interval", "objective", "_instantiator"})
NAME = "vrnn-lightning"
"""The word before the number of the format."""
Options = Mapping[str, Any]


class Pretrained:
    """The part of :class:`~vrnn_lightning.module.VRNNLightningModule` that saves and loads, old names included."""

    prepared = renamed("prepared", "is_initialized")
    traced = renamed("traced", "is_tracing")
    held_out = renamed("held_out", "val_objective_metric")
    whole_parameters = renamed("whole_parameters", "summon_full_params")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load the module's own buffers, under the names of an earlier release too."""
        own = {key.removeprefix(prefix): key for key in state_dict if key.startswith(prefix)}
        for (name, key), new in zip(own.items(), current_weights(own), strict=True):
            if name != new:
                state_dict[prefix + new] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]  # torch's module follows

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, the options that make the networks, and ``model.safetensors``, weights and scaler.

        Optimiser, schedule and objective stay in the checkpoint. The files replace earlier ones when both are whole.

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
            raise UserError(f"{altered}: is of a pruned or parametrised layer. Fix: make it permanent (prune.remove)")
        require_numbers("the model", weights)
        config = {"format": f"{NAME} {FORMAT}", "model": options}
        try:
            text = json.dumps(config, indent=2) + "\n"
        except TypeError as error:
            raise UserError(f"emission: has options that JSON can't hold ({error}). Fix: give plain values") from error
        write_files({Path(folder, WEIGHTS): save(weights), Path(folder, CONFIG): text.encode()})

    @classmethod
    def from_pretrained(cls, folder: str | Path, trust: str | Sequence[str] = ()) -> Self:
        """Return the model that :meth:`save_pretrained` wrote, on the CPU, in the type it had, in training mode.

        Nothing in the folder is run, and no class that it names is imported unless it passes the same check as a
        checkpoint's (:class:`~vrnn_lightning.trust.Gate`). The options are compared with the weights before any memory
        is taken for the model, unless they name a class of your own.

        Args:
            folder: With ``config.json`` and ``model.safetensors``. Needs ``pip install 'vrnn-lightning[export]'``.
            trust: Class paths or modules of your own that the options may name, for example ``["my_package.heads"]``.

        Raises:
            UserError: A file is missing or damaged, the two don't belong together, a value is not a number, or the
                options name a class that is not trusted.
        """
        folder = Path(folder)
        config, source = folder / CONFIG, folder / WEIGHTS
        options, weights = _read_options(config), current_weights(_read_weights(source))
        _require_options(config, cls, options)
        arguments = Gate.of_call(config, trust).build(cls, options)
        require_model(folder, cls, arguments, weights, is_exact=True)
        require_numbers(source, weights)
        module = _make(folder, cls, arguments)
        dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
        module.to(max(dtypes, key=lambda dtype: torch.finfo(dtype).bits))
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
        place = map_location or _keep_device
        content, owner, arguments = read_stored(path, key, cls, trust, options, place, hparams_file, weights_only)
        weights = content.get("state_dict", {})
        require_model(path, owner, arguments, weights)
        module = _make(path, owner, arguments)
        module.on_load_checkpoint(content)
        try:
            module.load_state_dict(weights, strict=strict is not False)
        except RuntimeError as error:
            raise UserError(f"{path}: {' '.join(str(error).split())[:300]}. Fix: {OPTIONS}") from error
        device = next(iter(weights.values())).device if weights else "cpu"
        return cast("Self", module.to(device))


def require_model(
    source: object, owner: type, arguments: Options, weights: Mapping[str, Tensor], *, is_exact: bool = False
) -> None:
    """Raise a :class:`UserError` if options do not fit the weights beside them, before a model takes memory."""
    _require_options(source, owner, arguments, is_training=True)
    declared = _declare_weights(source, owner, arguments, weights)
    for name in [*declared, *weights] if is_exact else declared.keys() & weights.keys():
        stored, expected = (_describe(part.get(name)) for part in (weights, declared))
        if stored != expected:
            raise UserError(f"{source}: {name} has {stored}, but the options make {expected}. Fix: {OPTIONS}")
    size, limit = (sum(value.numel() for value in part.values()) for part in (declared, weights))
    if size > limit:
        raise UserError(f"{source}: the options make a model of {size} numbers, but it holds {limit}. Fix: {OPTIONS}")


def _declare_weights(
    source: object, owner: type, arguments: Options, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights that options declare, without memory for them if the model holds no class of the user's."""
    for name, value in arguments.items():
        depth = value if name == "layers" else getattr(value, "depth", 0)
        if isinstance(depth, int) and depth > len(weights):
            raise UserError(f"{source}: {name} is deeper than its {len(weights)} weights. Fix: {OPTIONS}")
        if isinstance(value, partial) and _is_known(value):
            _require_options(source, cast("type", value.func), value.keywords)
    can_be_meta = _is_known(owner) and all(map(_is_known, arguments.values()))  # others may look at their values
    with torch.random.fork_rng(devices=[]), torch.device("meta") if can_be_meta else nullcontext():
        return cast("dict[str, Tensor]", _make(source, owner, arguments).state_dict())


def _is_known(value: Any) -> bool:
    """Return whether an option is a plain value or of a class that is known to build on any device."""
    owner = value.func if isinstance(value, partial) else value if isinstance(value, type) else type(value)
    return owner.__module__.partition(".")[0] in ("vrnn_lightning", "torch", "lightning", "builtins")


def _keep_device(storage: Any, location: str) -> Any:
    """Leave a tensor on its device, or on the CPU where this machine has no such device."""
    kind = location.partition(":")[0]
    is_available = kind == "cpu" or (hasattr(torch, kind) and getattr(torch, kind).is_available())
    return None if is_available else storage.cpu()


def _require_options(config: object, owner: type, options: Options, *, is_training: bool = False) -> None:
    known = parameters_of(owner)
    for name in options:
        if name not in known or (name in OF_TRAINING and not is_training):
            raise UserError(
                f"{config}: {name} is not an option of {owner.__name__}. Fix: remove it or update the package"
            )


def _make(source: object, owner: type, options: Options) -> Any:
    try:
        return owner(**options)
    except (UserError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: {owner.__name__} can't be made of its options: {line}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    load, content = _safetensors().torch.load, _read(path)
    with undamaged(f"{path}: is not a safetensors file, or damaged", FIX):
        return cast("dict[str, Tensor]", load(content))


def _describe(value: Tensor | None) -> str:
    if value is None:
        return "no values"
    return f"shape {tuple(value.shape)} of {'floats' if value.is_floating_point() else value.dtype}"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise UserError("safetensors is not installed. Fix: pip install 'vrnn-lightning[export]'") from error
    return safetensors


def _read(path: Path) -> bytes:
    with explained(path, fix=FIX):
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a file. Fix: {FIX}")
        return path.read_bytes()


def _read_options(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}). Fix: {FIX}") from error
    name, _, number = str(config.get("format") if isinstance(config, dict) else None).partition(" ")
    if name != NAME or not number.isdecimal() or not isinstance(config.get("model"), dict):
        raise UserError(f"{path}: is not what save_pretrained writes. Fix: give the config.json that it wrote")
    require_known_format(int(number), path)
    return dict(current_options(config["model"]))
