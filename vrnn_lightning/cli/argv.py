"""The options that a command line and its YAML files give, read before anything is imported or parsed for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from itertools import pairwise
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

__all__ = ["collect_texts", "last_mention", "mentions", "read_config", "with_configs", "with_current_names"]


def with_configs(argv: list[str]) -> list[str]:
    """Return the command line with every config as ``--config=PATH``; the package has those that are not at a path."""
    resolved, rest = [], iter(argv)
    for word in rest:
        option, equals, path = word.partition("=")
        if option in ("-c", "--config"):
            word = f"--config={_find_config(path if equals else next(rest, ''))}"
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


def in_current_names(options: Any, place: str = "") -> Any:
    """Return the options of a config, or the value of one, under the names that they have now."""
    return current_options(options, place, _print_renamed, LightningCLI.subcommands())


def with_current_names(argv: list[str], defaults: Mapping[str, Any] | None = None) -> list[str]:
    """Return the command line with every option and class under its present name, given a checkpoint's options."""
    current: list[str] = []
    for word in argv:
        option, equals, value = word.partition("=")
        if not option.startswith("--"):
            current.append(in_current_names(word, current[-1] if current else ""))
            continue
        new = current_option(option[2:])
        group, _, last = new.rpartition(".")
        names = [old for old in OPTIONS if old.endswith(f".{last}")]
        for chosen in (mentions(argv, group) or [(defaults or {}).get(group)]) if names else ():
            path = chosen.get("class_path") if isinstance(chosen, dict) else chosen
            new = next((f"{group}.{OPTIONS[old]}" for old in names if f".{old}".endswith(f".{path}.{last}")), new)
        if new != option[2:]:
            _print_renamed(option[2:], new)
        current.append(f"--{new}{equals}{in_current_names(value, option)}")
    return current


@cache
@rank_zero_only
def _print_renamed(old: str, new: str) -> None:
    print(f"--{old}: is now --{new}", file=sys.stderr)


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
