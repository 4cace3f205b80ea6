"""What a command line and its YAML files say, read before anything is imported or parsed for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_only

import vrnn_lightning
from vrnn_lightning.compatibility import OPTIONS, current_option, current_options
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, require_plain_yaml
from vrnn_lightning.trust import require_bounded, strings_of

__all__ = ["mentions", "named", "with_configs", "with_current_names"]


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


def in_current_names(options: Any, place: str = "") -> Any:
    """Return the options of a config, or the value of one, under the names that they have now."""
    return current_options(options, place, _say, LightningCLI.subcommands())


def with_current_names(words: list[str], defaults: Mapping[str, Any] | None = None) -> list[str]:
    """Return the command line with every option and class under the name that it has now.

    Args:
        words: The command line.
        defaults: Options that it need not state, by name: those of a checkpoint.
    """
    current: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            new = f"--{current_option(option[2:])}"
            group, _, last = new.rpartition(".")
            names = [old for old in OPTIONS if old.endswith(f".{last}")]
            for chosen in (mentions(words, group[2:]) or [(defaults or {}).get(group[2:])]) if names else ():
                made = chosen.get("class_path") if isinstance(chosen, dict) else chosen
                new = next((f"{group}.{OPTIONS[old]}" for old in names if f".{old}".endswith(f".{made}.{last}")), new)
            if new != option:
                _say(option[2:], new[2:])
            current.append(f"{new}{equals}{in_current_names(value, option)}")
        else:
            current.append(in_current_names(word, current[-1] if current else ""))
    return current


@cache
@rank_zero_only
def _say(old: str, new: str) -> None:
    print(f"--{old}: is now --{new}", file=sys.stderr)


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


def named(words: list[str]) -> set[str]:
    """Return every text that a command line and its YAML files hold, among them the classes that they name.

    >>> sorted(named(["fit", "--model.optimizer=mine.Adam"]))
    ['fit', 'mine.Adam']
    """
    texts = [word.partition("=")[2] or word for word in words]
    texts += [Path(path).read_text() for option, path in _pairs(words) if option in ("-c", "--config")]
    found = set()
    for text in texts:
        with suppress(yaml.YAMLError, ValueError):  # not every word is YAML
            value = yaml.safe_load(text)
            require_bounded(value, text[:40])
            found |= set(strings_of(value))
    return found


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
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds no options; expected lines such as `model: {{latent_size: 16}}`")
    document = in_current_names(document)
    found: list[Any] = [document, document.get(command)]
    for part in key.split("."):
        found = [
            value[name] for value in found if isinstance(value, dict) for name in (part, f"{part}+") if name in value
        ]
    return found
