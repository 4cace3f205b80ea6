"""The options that a command line and its YAML files give, read before anything is imported or parsed for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningCLI

import vrnn_lightning
from vrnn_lightning.compatibility import current_class
from vrnn_lightning.compatibility import current_options as in_current_names
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, require_bounded, require_plain_yaml
from vrnn_lightning.trust import strings_of

__all__ = ["collect_texts", "in_current_names", "last_mention", "mentions", "read_config", "with_configs"]


def with_configs(argv: list[str]) -> list[str]:
    """Return the command line with the class paths of now, and every config as ``--config=PATH``.

    The package has the configs that are not at a path.
    """
    resolved, rest = [], iter(argv)
    for word in rest:
        option, equals, value = word.partition("=")
        if option in ("-c", "--config"):
            word = f"--config={_find_config(value if equals else next(rest, ''))}"
        else:
            word = f"{option}={current_class(value)}" if equals else current_class(word)
        resolved.append(word)
    return resolved


def _find_config(path: str) -> str:
    package = Path(vrnn_lightning.__file__).parent
    with explained(path, "--config"):
        for folder in (Path(), package, package.parent):  # in a wheel, then in a checkout
            if (folder / path).is_file():
                require_plain_yaml((folder / path).read_text("utf-8", "replace"), f"--config {path}")
                return str(folder / path)
    raise UserError(f"--config {path}: no such config file. Fix: check the path")


def mentions(argv: list[str], key: str) -> list[Any]:
    """Return every value that a command line and its YAML files give to an option, in order.

    >>> mentions(["fit", "--data", "Sines", "--data=Speech"], "data")
    ['Sines', 'Speech']
    """
    values: list[Any] = []
    command = next((word for word in argv if word in LightningCLI.subcommands()), "")
    for option, value in _pairs(argv):
        if option == f"--{key}":
            values.append(value)
        elif option == "--config":
            values += _in_yaml(value, command, key)
    return [value for value in values if value is not None]


def last_mention(argv: list[str], key: str) -> Any:
    """Return the last value that a command line gives to an option and that is not empty, or ``None``."""
    return next((value for value in reversed(mentions(argv, key)) if value), None)


def collect_texts(argv: list[str]) -> set[str]:
    """Return every text that a command line and its YAML files hold, among them the classes that they name.

    >>> sorted(collect_texts(["fit", "--model.optimizer=mine.Adam"]))
    ['fit', 'mine.Adam']
    """
    texts = [word.partition("=")[2] or word for word in argv]
    texts += [Path(path).read_text() for option, path in _pairs(argv) if option == "--config"]
    names = set()
    for text in texts:
        with suppress(yaml.YAMLError, ValueError):  # not every word is YAML
            value = yaml.safe_load(text)
            require_bounded(value, text[:40])
            names |= set(strings_of(value))
    return names


def _pairs(argv: list[str]) -> Iterator[tuple[str, str]]:
    for word, following in pairwise([*argv, ""]):
        if word.startswith("-"):
            option, equals, value = word.partition("=")
            yield option, value if equals else following


def _in_yaml(path: str, command: str, key: str) -> list[Any]:
    document = in_current_names(read_config(path))
    values: list[Any] = [document, document.get(command)]
    for part in key.split("."):
        parents = [value for value in values if isinstance(value, dict)]
        values = [parent[name] for parent in parents for name in (part, f"{part}+") if name in parent]
    return values


def read_config(path: Path | str) -> dict[Any, Any]:
    """Return the options in a YAML file, or raise if it can't be read or holds none."""
    try:
        document = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: can't be read as YAML ({reason}). Fix: give another config") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds no options. Fix: write lines such as `model: {{latent_size: 16}}`")
    return document
