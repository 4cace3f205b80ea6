"""What a command line and its YAML files say, read before anything is imported or parsed for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningCLI

import vrnn_lightning
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, require_plain_yaml

__all__ = ["mentions", "with_configs"]


def shipped(path: str) -> str:
    """Return a config's path; what is missing here but comes with the package is found there.

    Raises:
        UserError: There is no such file, it can't be read, or its aliases multiply.
    """
    package = Path(vrnn_lightning.__file__).parent
    with explained(path, "--config"):
        for folder in (Path(), package, package.parent):  # in a wheel, then in a checkout
            if (folder / path).is_file():
                require_plain_yaml((folder / path).read_text("utf-8", "replace"), f"--config {path}")
                return str(folder / path)
    raise UserError(f"{path}: no such config file")


def with_configs(words: list[str]) -> list[str]:
    """Return the command line with every config's path resolved."""
    resolved, is_config = [], False
    for word in words:
        option, equals, value = word.partition("=")
        if is_config:
            word = shipped(word)
        elif option in ("-c", "--config") and equals:
            word = f"--config={shipped(value)}"
        is_config = word in ("-c", "--config")
        resolved.append(word)
    return resolved


def mentions(words: list[str], key: str) -> list[Any]:
    """Return every value that a command line and its YAML files give to an option, in order.

    >>> mentions(["fit", "--data", "Sines", "--data=Speech"], "data")
    ['Sines', 'Speech']
    """
    found = []
    for option, value in _pairs(words):
        if option == f"--{key}":
            found.append(value)
        elif option in ("-c", "--config"):
            found += _in_yaml(value, _command(words), key)
    return [value for value in found if value is not None]


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("-"):
            option, equals, value = word.partition("=")
            yield option, value if equals else following


def _command(words: list[str]) -> str:
    return next((word for word in words if word in LightningCLI.subcommands()), "")


def _in_yaml(path: str, command: str, key: str) -> list[Any]:
    try:
        document = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds no options; expected lines such as `model: {{latent_size: 16}}`")
    found: list[Any] = [document, document.get(command)]
    for part in key.split("."):
        found = [
            value[name] for value in found if isinstance(value, dict) for name in (part, f"{part}+") if name in value
        ]
    return found
