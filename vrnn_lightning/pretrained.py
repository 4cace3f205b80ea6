"""A model as a folder to send: its weights and scaler as safetensors, its options as JSON, and nothing that runs."""

from __future__ import annotations

import json
import os
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.cli import instantiate_module

from vrnn_lightning.errors import UserError

__all__ = ["Pretrained", "replace_file"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OF_TRAINING = frozenset({"optimizer", "lr_scheduler", "lr_interval", "objective", "_instantiator"})
OWN = "vrnn_lightning.heads"


class Pretrained:
    """What :class:`~vrnn_lightning.module.VRNNLightningModule` writes to a folder and reads from one."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, the options that make the networks, and ``model.safetensors``, weights and scaler.

        What only training needs, optimiser, schedule and objective, stays in the checkpoint. Each file replaces an
        earlier one of its name when it is whole.

        Args:
            folder: Made if it is not there. Needs ``pip install 'vrnn-lightning[export]'``.

        Raises:
            UserError: The folder can't be written to, or safetensors is not installed.
        """
        save = _safetensors().torch.save
        module: Any = self
        options = {name: value for name, value in module.hparams.items() if name not in OF_TRAINING}
        weights = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
        config = {"format": "vrnn-lightning 1", "model": options}
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror or error}; the model is not saved there") from error
        replace_file(folder / WEIGHTS, save(weights))
        replace_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path, trust: Sequence[str] = ()) -> Self:
        """Return the model that :meth:`save_pretrained` wrote, in evaluation mode, on the CPU, in the type it had.

        Nothing that the folder holds is run, and no class that it names is imported but this package's own outputs.

        Args:
            folder: With ``config.json`` and ``model.safetensors``. Needs ``pip install 'vrnn-lightning[export]'``.
            trust: Modules of your own whose classes the options may name, for example ``["my_package.heads"]``.

        Raises:
            UserError: A file is missing or damaged, the two don't belong together, or the options name a class that is
                not trusted.
        """
        folder = Path(folder)
        options = _options(folder / CONFIG)
        for named in _class_paths(options):
            if named.rpartition(".")[0] not in {OWN, *trust}:
                raise UserError(
                    f"{folder / CONFIG}: names the class {named}, which is not of {OWN}; "
                    f"if you trust it, from_pretrained(..., trust=['{named.rpartition('.')[0]}'])"
                )
        load = _safetensors().torch.load
        try:
            weights = load((folder / WEIGHTS).read_bytes())
        except OSError as error:
            raise UserError(f"{folder / WEIGHTS}: {error.strerror or error}") from error
        except Exception as error:  # the library's own errors, of a file that is cut or of another kind
            raise UserError(f"{folder / WEIGHTS}: is no safetensors file, or damaged ({error})") from error
        try:
            module: Any = instantiate_module(cls, options)  # type: ignore[type-var]
        except (UserError, ValueError, TypeError, KeyError, ArgumentError) as error:
            line = " ".join(str(error).split())
            raise UserError(f"{folder / CONFIG}: no model can be made of its options: {line}") from error
        floating = [value.dtype for value in weights.values() if value.is_floating_point()]
        if floating:
            module.to(max(floating, key=lambda dtype: torch.finfo(dtype).bits))
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            line = " ".join(str(error).split())[:300]
            raise UserError(f"{folder}: {WEIGHTS} and {CONFIG} are of different models ({line})") from error
        return module.eval()  # type: ignore[no-any-return]


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise UserError("safetensors is not installed; pip install 'vrnn-lightning[export]'") from error
    return safetensors


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that is whole or, where that fails, as it was.

    Raises:
        UserError: It can't be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            part.write_bytes(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; it is not written") from error


def _options(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give a folder that save_pretrained wrote") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    known = isinstance(config, dict) and config.get("format") == "vrnn-lightning 1"
    if not known or not isinstance(config.get("model"), dict):
        raise UserError(f"{path}: is not what save_pretrained of this version writes")
    return dict(config["model"])


def _class_paths(value: Any) -> Iterator[str]:
    """Yield every class that options name, however deep."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == "class_path":
                yield str(inner)
            yield from _class_paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _class_paths(inner)
