"""The parser, and what it says of an option that it can't take."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn, cast

import torch
import yaml
from jsonargparse import get_loader, set_loader
from jsonargparse.typing import register_type
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.enums import LightningEnum  # type: ignore[attr-defined]  # its name for StrEnum
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vrnn_lightning import discovery
from vrnn_lightning.callbacks.tasks import TASKS
from vrnn_lightning.cli.argv import in_current_names
from vrnn_lightning.files import require_plain_yaml
from vrnn_lightning.heads import Head
from vrnn_lightning.objectives import Objective

__all__ = ["MODE", "Parser", "one_line"]

MODE = "vrnn-lightning"
"""What jsonargparse calls our way to read YAML."""
BEGIN, END = 600, 400
"""Characters of a longer line of which the rest is left out: it is a user's text."""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")  # those that leave the densities room


def _read(text: str) -> Any:
    """Read YAML, options and classes under the names that they have now."""
    require_plain_yaml(text, "an option's YAML")
    value = get_loader("yaml")(text)
    return in_current_names(value) if isinstance(value, dict) else value


def _current(options: dict[str, Any]) -> dict[str, Any]:
    """Return what jsonargparse 5 calls options of version 4."""
    renamed = {{"skip_none": "skip_unset"}.get(key, key): value for key, value in options.items()}
    return {**renamed, "format": "yaml"} if renamed.get("format", "parser_mode") == "parser_mode" else renamed


register_type(torch.device, str, torch.device)  # so that configs hold devices as text
set_loader(MODE, _read, (yaml.YAMLError,))
yaml.SafeDumper.add_multi_representer(LightningEnum, lambda dumper, word: dumper.represent_str(word.value))


def one_line(message: str) -> str:
    r"""Return a message as one line, without the middle of a very long one.

    >>> one_line("a\nb"), len(one_line(9999 * "a"))
    ('a b', 1005)
    """
    line = " ".join(message.strip().splitlines())
    return line if len(line) <= BEGIN + END else f"{line[:BEGIN]} ... {line[-END:]}"


class Parser(LightningArgumentParser):
    """Says in one line what is wrong with an option, with the word that was probably meant.

    Lightning 2.6 calls methods and gives arguments that jsonargparse 5 no longer has; they are translated here.
    """

    if version("jsonargparse") >= "5":

        def add_instantiator(self, instantiator: Any, class_type: type, subclasses: bool = True) -> None:
            """Keep a function that makes the objects of a class for :meth:`instantiate_classes`."""
            vars(self).setdefault("instantiators", []).append((instantiator, class_type, subclasses))

        def instantiate_classes(self, config: Any) -> Any:
            """Make the objects of a config."""
            return self.instantiate(config, instantiators=vars(self).get("instantiators"))

        def add_method_arguments(self, *args: Any, **kwargs: Any) -> Any:
            """Add the options of a method, whose values stay as they are."""
            return super().add_method_arguments(*args, instantiate=False, **kwargs)

        def dump(self, *args: Any, **kwargs: Any) -> str:
            """Return a config as text; ``skip_none`` is now ``skip_unset``, and our way to read YAML has no dumper."""
            return cast(str, super().dump(*args, **_current(kwargs)))

        def save(self, *args: Any, **kwargs: Any) -> None:
            """Write a config as :meth:`dump` returns it."""
            super().save(*args, **_current(kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with one line."""
        if not self.exit_on_error:  # a parser within the parser, whose caller says it
            super().error(message, ex)
        self.exit(2, f"error: {one_line(self._line(message))}\n")

    def _line(self, message: str) -> str:
        keys = re.findall(r'Parser key "([\w.+]+)"', message)  # a class' own option stands below the option it is for
        option = f"--{'.'.join(keys)}"
        if "NestedArg(" in message:  # of a class in a list; what is outside of it expects the class
            expected, value = re.findall(r"Subtypes: \[(.*)\]", message), re.findall(r"Given value: (.*)", message)
            if len(expected) > 1 and len(value) > 1:
                return self._wrong_type(option, expected[-1], value[0])
        for pattern, line in (
            (r"unrecognized arguments: (\S+)", self._unknown_option),
            (r"does not accept option '([\w.]+)'", self._unknown_key),
            (r"arguments are required: (\S+)", lambda name: self._required(".".join([*keys, name]))),
            (
                r"given class_path '([\w.]+)':\s+Option '(\w+)' is not accepted",
                lambda path, name: self._unknown_init_arg(option, path, name),
            ),
            (
                r"Option '(\w+)' is not accepted\. Got value: Namespace\(class_path='([\w.]+)'",
                lambda name, path: self._unknown_init_arg(option, path, name),
            ),
            (r"Expected a dot import path string: (\S+)", lambda name: self._unknown_class(option, name)),
            (
                r"Got value: \W*(?:class_path\W+)?([\w.]+)[^\n]*\n\s*Subtype errors:.*path or the name of a known",
                lambda name: self._unknown_class(option, name),
            ),
            (
                r"Expected (?:an?|type:) ([^\n]*?)\. Got value: ([^\n]*?)(?:\. Got value|\n|$)",
                partial(self._wrong_type, option),
            ),
            (r"Subtypes: \[(.*?)\]\n.*Given value: (.*)", partial(self._wrong_type, option)),
        ):
            match = re.search(pattern, message, re.DOTALL)
            if match:
                return line(*match.groups())
        return " ".join(message.split())

    def _options(self) -> set[str]:
        subparsers = [a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(parser for group in subparsers for parser in group)]
        return {option for parser in parsers for action in parser._actions for option in action.option_strings}

    def _unknown_option(self, option: str) -> str:
        return f"{option}: no such option.{discovery.suggestion(option.partition('=')[0], self._options())}"

    def _unknown_key(self, key: str) -> str:
        return self._unknown_option(f"--{key}")

    @staticmethod
    def _required(option: str) -> str:
        name = option.partition(".")[2] if option.startswith(tuple(LightningCLI.subcommands())) else option
        known = f": one of {', '.join(discovery.known())}, or the dotted path of your own" if name == "data" else ""
        return f"--{name} is needed{known}"

    @staticmethod
    def _unknown_init_arg(key: str, class_path: str, option: str) -> str:
        module, _, cls = class_path.rpartition(".")
        meant = getattr(sys.modules[module], cls)
        why = getattr(meant, "unsupported_options", {}).get(option)
        if why:
            return f"{key}.{option}: {cls} has no such option; {why}"
        bases = [vars(base) for base in inspect.getmro(meant) if "__init__" in vars(base)]
        accepted = {name for base in bases for name in inspect.signature(base["__init__"]).parameters}
        return f"{key}.{option}: {cls} has no such option.{discovery.suggestion(option, accepted)}"

    @staticmethod
    def _unknown_task(key: str, name: str) -> str:
        known = f"choose {', '.join(TASKS)}, or the class path of a Task of your own"
        return f"{key} {name}: {known}.{discovery.suggestion(name, TASKS)}"

    @staticmethod
    def _unknown_class(key: str, name: str) -> str:
        if key == "--prediction.task":
            return Parser._unknown_task(key, name)
        bases = {
            "emission": Head,
            "objective": Objective,
            "callbacks": Callback,
            "logger": Logger,
            "optimizer": Optimizer,
            "lr_scheduler": LRScheduler,
        }
        meant = [base for word, base in bases.items() if word in key.strip("-+").split(".")]
        names = {cls.__name__ for base in meant for cls in _subclasses(base)}
        return f"{key} {name}: no such class.{discovery.suggestion(name, names)}"

    @staticmethod
    def _wrong_type(key: str, expected: str, value: str) -> str:
        if key == "--prediction.task":
            return Parser._unknown_task(key, value)
        if key == "--trainer.precision":
            return f"{key} {value}: choose {', '.join(PRECISIONS)}.{discovery.suggestion(value, PRECISIONS)}"
        kinds = (
            re.sub(r"<class '(.*?)'>", r"\1", expected).replace("typing.Literal", "one of ").replace("NoneType", "null")
        )
        return f"{key} {' '.join(value.split())}: expected {kinds.replace(', null', ' or null')}"


def _subclasses(base: type) -> set[type]:
    below: list[type] = base.__subclasses__()
    return {base}.union(*map(_subclasses, below))
