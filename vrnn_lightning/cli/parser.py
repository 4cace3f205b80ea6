"""The parser, and its one-line errors."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any, NoReturn, cast

import torch
import yaml
from jsonargparse import get_loader, set_loader, set_parsing_settings
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
from vrnn_lightning.heads import Head, Latent
from vrnn_lightning.nn import MLPConfig
from vrnn_lightning.objectives import Objective
from vrnn_lightning.trust import parameters_of, subclasses_of
from vrnn_lightning.vrnn.auxiliary import Auxiliary
from vrnn_lightning.vrnn.builder import CELLS

__all__ = ["MODE", "Parser", "one_line"]

MODE = "vrnn-lightning"
"""The name of our reader of YAML for jsonargparse."""
BEGIN, END = 600, 400
"""Characters that are kept of a longer line, which holds a text of the user's."""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")  # precise enough for densities
CHOICES: dict[str, tuple[Iterable[str], str]] = {
    "--model.cell": (CELLS, ", or the class path of a cell of your own"),
    "--prediction.task": (TASKS, ", or the class path of a Task of your own"),
    "--trainer.precision": (PRECISIONS, ""),
}
"""The values of an option, and what else it takes."""
BASES = {
    "auxiliary": Auxiliary,
    "emission": Head,
    "latent": Latent,
    "objective": Objective,
    "callbacks": Callback,
    "logger": Logger,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
}
"""The base class of the classes that an option takes."""


def _read(text: str) -> Any:
    """Read YAML, options and classes under the names that they have now."""
    require_plain_yaml(text, "an option's YAML")
    value = get_loader("yaml")(text)
    return in_current_names(value) if isinstance(value, dict) else value


def _current(options: dict[str, Any]) -> dict[str, Any]:
    """Return jsonargparse 4's options of a dump under the names of version 5, for which our reader has no dumper."""
    renamed = {{"skip_none": "skip_unset"}.get(key, key): value for key, value in options.items()}
    return {**renamed, "format": "yaml"} if renamed.get("format", "parser_mode") == "parser_mode" else renamed


register_type(torch.device, str, torch.device)  # so that configs hold devices as text
set_loader(MODE, _read, (yaml.YAMLError,))
set_parsing_settings(subclasses_enabled=[MLPConfig])  # or another class in its place would be taken for it
yaml.SafeDumper.add_multi_representer(LightningEnum, lambda dumper, word: dumper.represent_str(word.value))


def one_line(message: str) -> str:
    r"""Return a message as one line, without the middle of a very long one.

    >>> one_line("a\nb"), len(one_line(9999 * "a"))
    ('a b', 1005)
    """
    line = " ".join(message.strip().splitlines())
    return line if len(line) <= BEGIN + END else f"{line[:BEGIN]} ... {line[-END:]}"


class Parser(LightningArgumentParser):
    """Explains in one line what is wrong with an option, with the word that was probably meant.

    Lightning 2.6 calls methods and gives arguments that jsonargparse 5 no longer has; they are translated here.
    """

    if version("jsonargparse") >= "5":

        def add_instantiator(self, instantiator: Any, class_type: type, subclasses: bool = True) -> None:
            vars(self).setdefault("instantiators", []).append((instantiator, class_type, subclasses))

        def instantiate_classes(self, config: Any) -> Any:
            return self.instantiate(config, instantiators=vars(self).get("instantiators"))

        def add_method_arguments(self, *args: Any, **kwargs: Any) -> Any:
            return super().add_method_arguments(*args, instantiate=False, **kwargs)

        def dump(self, *args: Any, **kwargs: Any) -> str:
            return cast(str, super().dump(*args, **_current(kwargs)))

        def save(self, *args: Any, **kwargs: Any) -> None:
            super().save(*args, **_current(kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser within the parser, whose caller prints the message
            super().error(message, ex)
        self.exit(2, f"error: {one_line(self._line(message))}\n")

    def _line(self, message: str) -> str:
        keys = re.findall(r'Parser key "([\w.+]+)"', message)  # a class' own option is below the option for the class
        key = f"--{'.'.join(keys)}"
        if "NestedArg(" in message:  # of a class in a list; the messages around it expect the class
            expected, value = re.findall(r"Subtypes: \[(.*)\]", message), re.findall(r"Given value: (.*)", message)
            if len(expected) > 1 and len(value) > 1:
                return _wrong_type(key, expected[-1], value[0])
        patterns: tuple[tuple[str, Callable[..., str]], ...] = (
            (r"unrecognized arguments: (?P<option>\S+)", self._unknown_option),
            (r"does not accept option '(?P<name>[\w.]+)'", lambda key, name: self._unknown_option(key, f"--{name}")),
            (r"arguments are required: (?P<name>\S+)", _required),
            (r"given class_path '(?P<path>[\w.]+)':\s+Option '(?P<name>\w+)' is not accepted", _unknown_init_arg),
            (
                r"Option '(?P<name>\w+)' is not accepted\. Got value: Namespace\(class_path='(?P<path>[\w.]+)'",
                _unknown_init_arg,
            ),
            (r"Expected a dot import path string: (?P<name>\S+)", _unknown_class),
            (r"Expected a path but (?P<name>\S+) ", _unknown_class),
            (
                r"Got value: \W*(?:class_path\W+)?(?P<name>[\w.]+)[^\n]*\n\s*Subtype errors:.*path or the name of",
                _unknown_class,
            ),
            (
                r"Expected (?:an?|type:) (?P<expected>[^\n]*?)\. Got value: (?P<value>[^\n]*?)(?:\. Got value|\n|$)",
                _wrong_type,
            ),
            (r"Subtypes: \[(?P<expected>.*?)\]\n.*Given value: (?P<value>.*)", _wrong_type),
        )
        for pattern, describe in patterns:
            match = re.search(pattern, message, re.DOTALL)
            if match:
                return describe(key, **match.groupdict())
        return " ".join(message.split())

    def _unknown_option(self, key: str, option: str) -> str:
        subparsers = [a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(parser for group in subparsers for parser in group)]
        options = {name for parser in parsers for action in parser._actions for name in action.option_strings}
        return f"{option}: no such option.{discovery.suggestion(option.partition('=')[0], options)}"


def _required(key: str, name: str) -> str:
    option = f"{key}.{name}".lstrip("-.")
    command, _, rest = option.partition(".")
    option = rest if command in LightningCLI.subcommands() else option
    known = f": one of {', '.join(discovery.known())}, or the dotted path of your own" if option == "data" else ""
    return f"--{option} is needed{known}"


def _unknown_init_arg(key: str, path: str, name: str) -> str:
    module, _, cls = path.rpartition(".")
    made = getattr(sys.modules[module], cls)
    reason = getattr(made, "unsupported_options", {}).get(name)
    explanation = f"; {reason}" if reason else f".{discovery.suggestion(name, parameters_of(made))}"
    return f"{key}.{name}: {cls} has no such option{explanation}"


def _unknown_class(key: str, name: str) -> str:
    if key in CHOICES:
        return _wrong_choice(key, name)
    bases = [BASES[part] for part in key.strip("-+").split(".") if part in BASES]
    names = {cls.__name__ for base in bases for cls in subclasses_of(base)}
    name = name.rstrip(".")
    if "." in name:
        return f"{key} {name}: no such class. Fix: give the path of one that can be imported from here"
    return f"{key} {name}: no such class.{discovery.suggestion(name, names)}"


def _wrong_type(key: str, expected: str, value: str) -> str:
    if key in CHOICES:
        return _wrong_choice(key, value)
    if "Callable" in expected and re.fullmatch(r"[\w.]+\.\w+", value):
        return _unknown_class(key, value)
    types = re.sub(r"<class '(.*?)'>", r"\1", expected).replace("typing.Literal", "one of ").replace("NoneType", "null")
    return f"{key} {' '.join(value.split())}: expected {types.replace(', null', ' or null')}"


def _wrong_choice(key: str, value: str) -> str:
    names, others = CHOICES[key]
    return f"{key} {value}: choose {', '.join(names)}{others}.{discovery.suggestion(value, names)}"
