"""The command line: ``lightning fit -c configs/synthetic.yaml``.

LightningCLI does the work; here are the options it lacks, what happens before it parses and what is said when it can't.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import vrnn_lightning
from vrnn_lightning import discovery
from vrnn_lightning.callbacks import Samples
from vrnn_lightning.errors import UserError
from vrnn_lightning.heads import Head
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.tracking import ElboBar, RunCheckpoint, RunLogger, SaveConfig, WandbLogger, run_logger

__all__ = ["CLI", "main"]

COMMON = {
    "auto_insert_metric_name": False,  # a metric's slash would make a folder
    "enable_version_counter": False,  # a resumed run replaces its files
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "checkpoint": {"monitor": "val/elbo", "mode": "max", "filename": "best", **COMMON},
    "last": {"filename": "last", **COMMON},  # `save_last` would write only where there is a new best
}
NOT_ARCHITECTURE = ("optimizer", "lr_scheduler")  # a test may be run under a YAML that trains otherwise
RUN_OPTIONS = frozenset({"root", "batch_size", "num_workers"})


def main(args: list[str] | None = None) -> int:
    """Run a command, for example ``main(["fit", "-c", "configs/synthetic.yaml"])``.

    Args:
        args: The words after ``lightning``; by default those of the command line. ``--debug`` among them shows the
            traceback of what is otherwise one line.

    Returns:
        The exit code: 0, or 1 after a :class:`~vrnn_lightning.errors.UserError`.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.append(here)  # appended, so that nothing there hides an installed package
    try:
        with warnings.catch_warnings():
            _silence()
            CLI([word for word in words if word != "--debug"])
    except UserError as error:
        if debug:
            raise
        print(f"error: {_own_line(error)}", file=sys.stderr)
        return 1
    return 0


def _silence() -> None:
    """Silence what Lightning says about things that are as they should be."""
    for message in (
        "Checkpoint directory .* exists and is not empty",  # a resumed run's
        ".* does not have many workers",  # sequences in memory need none
        ".*isinstance\\(treespec, LeafSpec\\)",  # Lightning's own call of torch
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def _own_line(error: UserError) -> str:
    """Return the user's line, also of an error that a DataLoader's worker wrapped into its traceback."""
    lines = str(error).strip().splitlines()
    named = [line.partition("UserError: ")[2] for line in lines if "UserError: " in line]
    return named[-1] if named else " ".join(lines)


# Reading the command line before it is parsed ------------------------------------------------------------------------


def shipped(path: str) -> str:
    """Return a config's path; what is missing here but comes with the package is found there.

    Raises:
        UserError: There is no such file.
    """
    package = Path(vrnn_lightning.__file__).parent
    for folder in (Path(), package, package.parent):  # in a wheel, then in a checkout
        if (folder / path).is_file():
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
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("-"):
            option, equals, value = word.partition("=")
            yield option, value if equals else following


def _command(words: list[str]) -> str:
    return next((word for word in words if word in LightningCLI.subcommands()), "")


def _in_yaml(path: str, command: str, key: str) -> list[Any]:
    try:
        document = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    found: list[Any] = [document, document.get(command) if isinstance(document, dict) else None]
    for part in key.split("."):
        found = [
            value[name] for value in found if isinstance(value, dict) for name in (part, f"{part}+") if name in value
        ]
    return found


# Checkpoints ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint knows about its run.

    Args:
        path: The file.
        step: Optimiser steps behind it.
        epoch: The epoch it was written in.
        model: The model's options.
        data: The datamodule's options, empty where it keeps none.
        data_class: Import path of the datamodule, or ``None``.
    """

    path: Path
    step: int
    epoch: int
    model: dict[str, Any]
    data: dict[str, Any]
    data_class: str | None

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a file.

        Raises:
            UserError: It is missing, damaged or not a checkpoint of this framework.
        """
        if not path.is_file():
            raise UserError(f"--ckpt_path {path}: no such file")
        if not zipfile.is_zipfile(path):
            raise UserError(f"--ckpt_path {path}: is damaged or no checkpoint")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            raise UserError(f"--ckpt_path {path}: is damaged, or holds more than weights and options") from error
        model = content.get("hyper_parameters") if isinstance(content, dict) else None
        if not isinstance(model, dict) or "num_features" not in model:
            raise UserError(f"--ckpt_path {path}: is no checkpoint that `lightning fit` of vrnn-lightning wrote")
        data = dict(content.get("datamodule_hyper_parameters") or {})
        return cls(
            path, content["global_step"], content["epoch"], _options(model), _options(data), data.get("_class_path")
        )

    @property
    def folder(self) -> Path | None:
        """The folder of its run, or ``None`` if it does not lie in one."""
        folder = self.path.resolve().parent.parent
        return folder if (folder / "config.yaml").is_file() else None

    def defaults(self) -> dict[str, Any]:
        """Return its options as a parser's defaults, beneath whatever the user states."""
        model = {f"model.{key}": value for key, value in self.model.items() if key != "num_features"}
        data = {"data": {"class_path": self.data_class, "init_args": self.data}} if self.data_class else {}
        return {**model, **data}

    def check(self, stated: dict[str, Any], training: bool, run_options: frozenset[str]) -> None:
        """Refuse options that differ from its own.

        Args:
            stated: The options ``model`` and ``data`` of this run.
            training: Also compare how the model is trained.
            run_options: Data options that may differ.

        Raises:
            UserError: At least one differs.
        """
        skipped = {"num_features", *(() if training else NOT_ARCHITECTURE)}
        differing = _differences("model", self.model, stated["model"], skipped)
        differing += _differences("data", self.data, stated["data"].get("init_args") or {}, run_options)
        if differing:
            kept = "leave the option out to keep the checkpoint's, or start a new run without --ckpt_path"
            raise UserError(f"{'; '.join(differing)}: differs from {self.path}; {kept}")


def _options(hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in hyper_parameters.items() if not key.startswith("_")}


def _differences(group: str, old: dict[str, Any], new: dict[str, Any], skipped: Iterable[str]) -> list[str]:
    old = _flat({key: value for key, value in old.items() if key in new and key not in skipped})
    new = _flat(new)
    keys = [key for key in old if key in new and old[key] != new[key]]
    return [f"--{group}.{key.removesuffix('.class_path')} {new[key]} (checkpoint: {old[key]})" for key in keys]


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict):
            flat |= _flat(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def find_checkpoint(words: list[str], data: str | None) -> Path | None:
    """Return the checkpoint that a command line asks for; ``last`` and ``best`` are looked for among the runs.

    Args:
        words: The command line.
        data: Name of the datamodule, if it is said.

    Raises:
        UserError: There is no run with such a checkpoint.
    """
    asked = [value for value in mentions(words, "ckpt_path") if value]
    if not asked:
        return None
    if asked[-1] not in ("last", "best"):
        return Path(asked[-1])
    root = Path(*mentions(words, "trainer.default_root_dir")[-1:]) / "runs"
    name = _run_name(words) or (data.rpartition(".")[2].lower() if data else "*")
    found = sorted(root.glob(f"{name}/*/checkpoints/{asked[-1]}.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"--ckpt_path {asked[-1]}: no run under {root / name} has a {asked[-1]}.ckpt")
    return found[-1]


def _run_name(words: list[str]) -> str | None:
    names = mentions(words, "trainer.logger.name") + mentions(words, "trainer.logger.init_args.name")
    loggers = [entry for value in mentions(words, "trainer.logger") if isinstance(value, list) for entry in value]
    ours = [entry for entry in loggers if isinstance(entry, dict) and "RunLogger" in entry.get("class_path", "")]
    names += [(entry.get("init_args") or {}).get("name") for entry in ours]
    return next((name for name in names if name), None)


# Messages of the parser -----------------------------------------------------------------------------------------------


class Parser(LightningArgumentParser):
    """Says in one line what is wrong with an option, with the word that was probably meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with one line."""
        if not self.exit_on_error:  # a parser within the parser, whose caller says it
            super().error(message, ex)
        self.exit(2, f"error: {self._line(message)}\n")

    def _line(self, message: str) -> str:
        for pattern, line in (
            (r"unrecognized arguments: (\S+)", self._unknown_option),
            (r"does not accept option '([\w.]+)'", self._unknown_key),
            (r"arguments are required: (\S+)", self._required),
            (r"given class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", self._unknown_init_arg),
            (r'Parser key "([\w.+]+)"[^:]*:.*?Expected a dot import path string: (\S+)', self._unknown_class),
            (r'Parser key "([\w.+]+)":\s+Expected an? (.*?)\. Got value: (.*)', self._wrong_type),
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
        name = option.rpartition(".")[2]
        known = f" one of {', '.join(discovery.known())}, or the dotted path of your own" if name == "data" else ""
        return f"--{name} is needed:{known}" if known else f"--{name} is needed"

    @staticmethod
    def _unknown_init_arg(class_path: str, option: str) -> str:
        module, _, cls = class_path.rpartition(".")
        bases = [vars(base) for base in inspect.getmro(getattr(sys.modules[module], cls)) if "__init__" in vars(base)]
        accepted = {name for base in bases for name in inspect.signature(base["__init__"]).parameters}
        return f"{option}: {cls} has no such option.{discovery.suggestion(option, accepted)}"

    @staticmethod
    def _unknown_class(key: str, name: str) -> str:
        bases = {
            "emission": Head,
            "callbacks": Callback,
            "logger": Logger,
            "optimizer": Optimizer,
            "lr_scheduler": LRScheduler,
        }
        meant = [base for word, base in bases.items() if word in key.rstrip("+").split(".")]
        names = {cls.__name__ for base in meant for cls in _subclasses(base)}
        return f"--{key} {name}: no such class.{discovery.suggestion(name, names)}"

    @staticmethod
    def _wrong_type(key: str, expected: str, value: str) -> str:
        kind = re.sub(r"<class '(.*?)'>", r"\1", expected)
        return f"--{key} {' '.join(value.split())}: expected {kind}"


def _subclasses(base: type) -> set[type]:
    below: list[type] = base.__subclasses__()
    return {base}.union(*map(_subclasses, below))


# The command line -----------------------------------------------------------------------------------------------------


class CLI(LightningCLI):
    """LightningCLI with the VRNN as its model and any datamodule as its data.

    Args:
        words: The command line.
    """

    def __init__(self, words: list[str]) -> None:
        self.words = with_configs(words)
        names = [
            _class_name(value)
            for key in ("data", "data.class_path", "data.help")
            for value in mentions(self.words, key)
        ]
        classes = [discovery.load(name) for name in names if name]
        self.checkpoint = self._read_checkpoint(classes)
        epilog = f"Datamodules: {', '.join(discovery.known()) or 'none'}. `--data.help NAME` shows one's options."
        commands = {command: {"epilog": epilog} for command in self.subcommands()}
        super().__init__(
            VRNNLightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"logger": [{"class_path": "vrnn_lightning.tracking.RunLogger"}]},
            parser_class=Parser,
            parser_kwargs={"allow_abbrev": False, **{c: {"allow_abbrev": False, **kw} for c, kw in commands.items()}},
            seed_everything_default=0,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
        )

    def _read_checkpoint(self, classes: list[type[LightningDataModule]]) -> Checkpoint | None:
        path = find_checkpoint(self.words, classes[-1].__name__ if classes else None)
        if path is None or {"-h", "--help"} & set(self.words):
            return None
        checkpoint = Checkpoint.read(path)
        if checkpoint.data_class and not classes:
            discovery.load(_class_name(checkpoint.data_class) or "")
        for data in classes:
            if checkpoint.data_class and checkpoint.data_class != f"{data.__module__}.{data.__qualname__}":
                own = checkpoint.data_class.rpartition(".")[2]
                raise UserError(f"--data {data.__name__}: {path} was trained on {own}; leave --data out or give {own}")
        return checkpoint

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every run has, and put the checkpoint's options beneath the user's."""
        for group, defaults in CHECKPOINTS.items():
            parser.add_lightning_class_args(RunCheckpoint, group)
            parser.set_defaults({f"{group}.{key}": value for key, value in defaults.items()})
        parser.add_lightning_class_args(Samples, "samples")
        parser.link_arguments("data", "model.num_features", compute_fn=self.num_features, apply_on="instantiate")
        if self.checkpoint:
            parser.set_defaults(self.checkpoint.defaults())

    def num_features(self, data: LightningDataModule) -> int:
        """Return the data's width, which is the model's.

        Raises:
            UserError: The datamodule has none, or the checkpoint's model has another.
        """
        width = getattr(data, "num_features", None)
        if not isinstance(width, int):
            raise UserError(f"--data {type(data).__name__}: has no number `num_features` after its construction")
        if self.checkpoint and width != self.checkpoint.model["num_features"]:
            own = self.checkpoint.model["num_features"]
            raise UserError(f"--data {type(data).__name__}: {width} features, but {self.checkpoint.path} has {own}")
        return width

    def parse_arguments(self, parser: LightningArgumentParser, args: object) -> None:
        """Parse, and compare what was stated with the checkpoint."""
        self.config = parser.parse_args(self.words)
        if self.checkpoint is None:
            return
        command = self.config["subcommand"]
        self.config[command]["ckpt_path"] = str(self.checkpoint.path)
        dumped = yaml.safe_load(
            parser.dump(self.config, skip_link_targets=False, skip_none=False, skip_validation=True)
        )
        module, _, name = dumped[command]["data"]["class_path"].rpartition(".")
        run_options = getattr(getattr(sys.modules[module], name), "run_options", RUN_OPTIONS)
        self.checkpoint.check(dumped[command], command == "fit", run_options)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: the checkpoint's options are beneath the user's already, and none differs in silence."""

    def instantiate_classes(self) -> None:
        """Build data, model and trainer.

        Raises:
            UserError: As a datamodule's constructor raised it; jsonargparse wraps it.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise _user_error(error) or error from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with the bound's terms in the progress bar, and settle the run's folder."""
        options = self._get(self.config_init, "trainer")
        callbacks = list(options.get("callbacks") or [])
        if options.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(ElboBar())
        if options.get("enable_checkpointing") is False or options.get("fast_dev_run"):
            keys = self._parser(self.subcommand).callback_keys
            keys[:] = [key for key in keys if key not in CHECKPOINTS]  # refused, or would leave an empty folder
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        run = run_logger(trainer)
        if run is not None:
            self._settle(run, trainer)
        return trainer

    def _settle(self, run: RunLogger, trainer: Trainer) -> None:
        run.place(Path(trainer.default_root_dir), type(self.datamodule).__name__.lower())
        if self.checkpoint and self.checkpoint.folder:
            training = self.subcommand == "fit"
            run.resume(self.checkpoint.folder, self.checkpoint.step, self.checkpoint.epoch, training)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.run = run

    def before_fit(self) -> None:
        """Refuse to resume what has more epochs behind it than it is to have.

        Raises:
            UserError: It has.
        """
        wanted = self.trainer.max_epochs
        if self.checkpoint and wanted is not None and -1 < wanted <= self.checkpoint.epoch:
            done = f"{self.checkpoint.path} has {self.checkpoint.epoch + 1} epochs behind it"
            raise UserError(f"--trainer.max_epochs {wanted}: {done}; give more")

    def after_fit(self) -> None:
        """Print what came of it."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            print("\n".join(self._summary()))

    def _summary(self) -> Iterator[str]:
        checkpoint, metrics = self.trainer.checkpoint_callback, self.trainer.callback_metrics
        best = getattr(checkpoint, "best_model_score", None)
        if best is not None:
            yield f"best val/elbo: {best:.4f} nats per step"
            exact = metrics.get("val/exact_log_likelihood")
            if exact is not None:
                yield f"exact log-likelihood: {exact:.4f} nats per step, gap {exact - best:.4f}"
        run = run_logger(self.trainer)
        if run is not None:
            yield f"run folder: {_short(run.log_dir)}"
        if best is not None and checkpoint is not None:
            yield f"test it: lightning test --ckpt_path {_short(getattr(checkpoint, 'best_model_path', ''))}"


def _class_name(value: object) -> str | None:
    """Return the datamodule's name from ``Name``, ``{class_path: Name}`` or the path of a file in ``datamodules``."""
    name = value.get("class_path") if isinstance(value, dict) else value
    if not isinstance(name, str) or name.startswith("-"):
        return None
    package, _, rest = name.partition(".")
    return rest.rpartition(".")[2] if package == "datamodules" and rest else name


def _short(path: str) -> str:
    """Return a path relative to the working directory where it lies below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError that an exception wraps."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
