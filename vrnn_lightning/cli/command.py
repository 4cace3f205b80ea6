"""LightningCLI with our options, defaults and refusals, and the ``main`` that the console scripts call."""

from __future__ import annotations

import argparse
import logging
import operator
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from vrnn_lightning import datamodules, discovery
from vrnn_lightning.callbacks import Diagnostics, Evaluation, Loop, Predictions, Samples
from vrnn_lightning.callbacks.predictions import Draws
from vrnn_lightning.cli import processes, slurm
from vrnn_lightning.cli.argv import mentions, named, with_configs, with_current_names
from vrnn_lightning.cli.checkpoint import Checkpoint, find_checkpoint, runs_folder
from vrnn_lightning.cli.parser import MODE, Parser, one_line
from vrnn_lightning.datamodules import local
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import require_local, require_plain_yaml
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.report import NAME, write_report
from vrnn_lightning.resuming import Stopped, interruption
from vrnn_lightning.tracking import ElboBar, RunCheckpoint, RunLogger, SaveConfig, WandbLogger, run_logger
from vrnn_lightning.trust import Gate, is_name

__all__ = ["CLI", "main"]

COMMON = {
    "auto_insert_metric_name": False,  # a metric's slash would make a folder
    "enable_version_counter": False,  # a resumed run replaces its files
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "checkpoint": {"monitor": "val/elbo", "mode": "max", "filename": "best", **COMMON},
    "last": {"filename": "last", "every": "15min", **COMMON},  # `save_last` would write only where there is a new best
}
CALLBACKS = {
    "samples": Samples,
    "diagnostics": Diagnostics,
    "evaluation": Evaluation,
    "loop": Loop,
    "prediction": Predictions,
}
GROUPS: dict[str, type] = {
    "model": VRNNLightningModule,
    "trainer": Trainer,
    **dict.fromkeys(CHECKPOINTS, RunCheckpoint),
    **CALLBACKS,
}
RESTORING = frozenset(
    {"resume_start", "restore", "_restore_modules_and_callbacks", "restore_training_state", "match_optimizer_states"}
)
"""Functions that take a checkpoint's state."""
OPTIMIZERS = str(Path(torch.optim.__file__).parent)
"""Where an optimiser or a schedule reads the state that it has taken."""
RUN_OPTIONS = frozenset({"root", "batch_size", "num_workers"})
FIX = "leave it out of dict_kwargs or of the option that passes it on"
LIGHTNING = ("lightning.pytorch.strategies.", "lightning.pytorch.callbacks.", "lightning.pytorch.loggers.")
"""Modules of classes whose options are passed on."""


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
        with warnings.catch_warnings(), interruption.watching(signal.SIGTERM, signal.SIGINT, *slurm.signals()):
            _silence()
            processes.follow_parent()
            _run([word for word in words if word != "--debug"])
    except Stopped as stopped:
        if stopped.signum in slurm.signals():
            slurm.requeue()
        resume = f"lightning fit --ckpt_path {_short(stopped.saved)}{_foreign_data(words)}"
        then = f"; continue with: {resume}" if stopped.saved else ""
        line = f"ended by {signal.Signals(stopped.signum).name}{then}"
        return processes.end(128 + stopped.signum, line, stopped)
    except (UserError, MisconfigurationException) as error:  # Lightning's own word for a user's mistake
        if debug:
            raise
        return processes.end(1, f"error: {_own_line(error)}")
    except Exception as error:
        if not debug and _is_out_of_memory(error):
            fix = "give a smaller --data.batch_size, fewer samples or particles, or a smaller --evaluation.rows"
            return processes.end(1, f"error: not enough memory. Fix: {fix}")
        if not debug and processes.is_lost_peer(error):
            return processes.end_without(error)
        if not debug and isinstance(error, ValueError) and str(error) == "embedded null byte":
            return processes.end(1, "error: a path among the options holds a null byte. Fix: remove it")
        if debug or processes.is_first_cause():
            raise
        return 1
    return 0


def _run(words: list[str]) -> None:
    """Run a command; of two processes that a signal is to end, one may notice first that the other one is gone."""
    try:
        _report(words[1:]) if words[:1] == ["report"] else CLI(words)
    except Exception as error:
        if interruption.signum and processes.is_lost_peer(error):
            raise Stopped(interruption.signum) from None
        raise


def _report(words: list[str]) -> None:
    """Write the report of a run that is there already."""
    parser = argparse.ArgumentParser("lightning report", description="Write report.html of a run.", allow_abbrev=False)
    parser.add_argument("folder", help="the run's folder, runs/NAME/VERSION")
    print(f"report: {_short(str(write_report(parser.parse_args(words).folder)))}")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "Storage size calculation overflowed"))


def _silence() -> None:
    """Silence what Lightning says about things that are as they should be."""
    for message in (
        "Checkpoint directory .* exists and is not empty",  # a resumed run's
        ".*could not find the monitored key",  # a run that max_steps ends before its first validation
        ".* does not have many workers",  # sequences in memory need none
        "Be aware that when using `ckpt_path`, callbacks",  # a test needs no callback that chose its checkpoint
        ".*isinstance\\(treespec, LeafSpec\\)",  # Lightning's own call of torch
        ".* AMP with fp16 is not supported on CPU",  # we say what runs instead
        "`precision=.*` is supported for historical reasons",  # 16 and bf16 mean what everyone means by them
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "Tip:" not in message and "Automatic Mixed Precision" not in message  # the one asked for is not news


def _own_line(error: Exception) -> str:
    """Return the user's line, also of an error that a DataLoader's worker wrapped into its traceback."""
    lines = str(error).strip().splitlines()
    named = [line.partition("UserError: ")[2] for line in lines if "UserError: " in line]
    return one_line(named[-1] if named else str(error))


class CLI(LightningCLI):
    """LightningCLI with the VRNN as its model and any datamodule as its data.

    Args:
        words: The command line.
    """

    def __init__(self, words: list[str]) -> None:
        local.use_working_directory()
        self.command_line = words
        self.words = with_current_names(with_configs(words))
        self.trusted = _trusted(self.words)
        names = [
            _class_name(value)
            for key in ("data", "data.class_path", "data.help")
            for value in mentions(self.words, key)
        ]
        classes = [discovery.load(name) for name in names if name]
        self.checkpoint = self._read_checkpoint(classes)
        self.origin = self._read_origin()
        if self.checkpoint:
            self.words = with_current_names(self.words, self.checkpoint.defaults())
        if self.checkpoint and self.checkpoint.folder and not _has_config(self.words) and "fit" in self.words:
            config = self.checkpoint.folder / "config.yaml"
            self._require_trusted(config, classes)
            self.words.insert(self.words.index("fit") + 1, f"--config={config}")
        epilog = (
            f"Datamodules: {', '.join(discovery.known()) or 'none'}. `--data.help NAME` shows one's options. "
            "`lightning report FOLDER` writes the page of a run."
        )
        commands = {command: {"allow_abbrev": False, "epilog": epilog} for command in self.subcommands()}
        super().__init__(
            VRNNLightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"logger": [{"class_path": "vrnn_lightning.tracking.RunLogger"}]},
            parser_class=Parser,
            parser_kwargs={"allow_abbrev": False, "parser_mode": MODE, **commands},
            seed_everything_default=0,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static there, and never called so
        """Return the command that the words begin with, or all of them: each costs a parser, half a second."""
        commands: dict[str, set[str]] = LightningCLI.subcommands()
        asked = self.words[0] if self.words else ""
        return {asked: commands[asked]} if asked in commands else commands

    def _read_checkpoint(self, classes: list[type[LightningDataModule]]) -> Checkpoint | None:
        if {"-h", "--help"} & set(self.words):
            return None
        path = find_checkpoint(self.words, classes[-1].__name__ if classes else None)
        if path is None and "fit" in self.words:
            path = self._requeued()
        if path is None:
            return None
        checkpoint = Checkpoint.read(path)
        checkpoint.require_trusted(self._gate(f"--ckpt_path {path}", classes))
        for data in classes:
            if checkpoint.data_class and checkpoint.data_class != f"{data.__module__}.{data.__qualname__}":
                own = checkpoint.data_class.rpartition(".")[2]
                raise UserError(f"--data {data.__name__}: {path} was trained on {own}; leave --data out or give {own}")
        return checkpoint

    def _requeued(self) -> Path | None:
        """Return the checkpoint from which a requeued SLURM job continues, if it had come to one."""
        folder = slurm.interrupted_run(runs_folder(self.words), self.command_line)
        if folder is None:
            return None
        path = folder / "checkpoints" / "last.ckpt"
        return path if path.is_file() else None

    def _read_origin(self) -> Checkpoint | None:
        """Return the checkpoint whose weights a fit starts from; one that is resumed has its own."""
        paths = [path for path in mentions(self.words, "init_from") if path]
        if not paths or "fit" not in self.words or {"-h", "--help"} & set(self.words):
            return None
        if self.checkpoint and any(word.partition("=")[0] == "--init_from" for word in self.words):
            raise UserError(
                f"--init_from {paths[-1]}: --ckpt_path continues a run, which has its weights; give one of the two"
            )
        if self.checkpoint:
            return None
        origin = Checkpoint.read(Path(paths[-1]), "--init_from")
        origin.require_trusted(self._gate(f"--init_from {paths[-1]}", []), training=False)
        return origin

    def _gate(self, source: str, classes: list[type[LightningDataModule]], folder: Path | None = None) -> Gate:
        """Return what a file may name: what is allowed in general, what this call names, and what it trusts."""
        names = {f"{data.__module__}.{data.__qualname__}" for data in classes}
        return Gate(source, self.trusted, frozenset(named(self.words) | names), "add --trust {}", folder)

    def _require_trusted(self, config: Path, classes: list[type[LightningDataModule]]) -> None:
        """Raise if the config beside a checkpoint names what a file may not import.

        Raises:
            UserError: It does, or it is not a config.
        """
        gate = self._gate(str(config), classes, config.parent)
        try:
            document = yaml.safe_load(config.read_text())
        except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{config}: can't be read ({' '.join(str(error).split())}). Fix: give -c") from error
        if not isinstance(document, dict):
            raise UserError(f"{config}: holds no options. Fix: give -c")
        for key, value in document.items():
            name = str(key).removesuffix("+")
            if not name.isidentifier():  # a parser would split it at its dots
                raise UserError(f"{config}: {key!r} is not the name of an option. Fix: nest the options, or give -c")
            if name in GROUPS and value is not None:
                gate.check_options(GROUPS[name], value, name)
            elif name != "trust":  # what a file says of itself does not count
                gate.check(value, LightningDataModule if name == "data" else str | bool | int | None, name)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every run has, and put the checkpoint's options beneath the user's."""
        for group, defaults in CHECKPOINTS.items():
            parser.add_lightning_class_args(RunCheckpoint, group)
            parser.set_defaults({f"{group}.{key}": value for key, value in defaults.items()})
        for group, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, group)
        parser.link_arguments("data", "model.num_features", compute_fn=self.num_features, apply_on="instantiate")
        parser.link_arguments("data", "model.num_inputs", compute_fn=_num_inputs, apply_on="instantiate")
        parser.link_arguments("data", "model.missing", compute_fn=_missing, apply_on="instantiate")
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="Fit: a checkpoint whose weights to start from, on any data, with a new optimiser, at step 0.",
        )
        parser.add_argument(
            "--trust",
            type=str | list[str] | None,
            default=None,
            help="A class path or module of yours that the files named by --ckpt_path and --init_from may import.",
        )
        parser.add_argument(
            "--report",
            type=bool,
            default=True,
            help=f"Fit: write {NAME}, a page with the run's figures, pictures and sounds, into its folder; test and "
            "predict bring it up to date where it is.",
        )
        if self.checkpoint:
            parser.set_defaults(self.checkpoint.defaults())
        elif self.origin:
            parser.set_defaults(self.origin.architecture())

    def num_features(self, data: LightningDataModule) -> int:
        """Return the data's width, which is the model's.

        Raises:
            UserError: The datamodule has none, or the checkpoint's model has another.
        """
        try:
            width = operator.index(getattr(data, "num_features", None))  # type: ignore[arg-type]  # checked by the call
        except TypeError:
            line = f"--data {type(data).__name__}: has no number `num_features` after its construction"
            raise UserError(line) from None
        if self.checkpoint and width != self.checkpoint.model["num_features"]:
            own = self.checkpoint.model["num_features"]
            raise UserError(f"--data {type(data).__name__}: {width} features, but {self.checkpoint.path} has {own}")
        return width

    def parse_arguments(self, parser: LightningArgumentParser, args: object) -> None:
        """Parse, and compare what was stated with the checkpoint."""
        self.config = parser.parse_args(self.words)
        command = self.config["subcommand"]
        self.config[command]["trust"] = None  # for this call alone: a saved config trusts nothing
        if self.config[command].get("weights_only") is False:
            raise UserError("--weights_only false: a checkpoint that holds code is not loaded. Fix: leave it out")
        if self.checkpoint is None:
            return
        self.config[command]["weights_only"] = True
        self.config[command]["ckpt_path"] = str(self.checkpoint.path)
        dumped = yaml.safe_load(
            parser.dump(self.config, skip_link_targets=False, skip_none=False, skip_validation=True)
        )
        module, _, name = dumped[command]["data"]["class_path"].rpartition(".")
        run_options = getattr(getattr(sys.modules[module], name), "run_options", RUN_OPTIONS)
        self.checkpoint.check(dumped[command], command == "fit", run_options)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: the checkpoint's options are beneath the user's already, and none differs in silence."""

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"--seed_everything {error}") from error

    def instantiate_classes(self) -> None:
        """Build data, model and trainer.

        Raises:
            UserError: As a datamodule's constructor raised it; jsonargparse wraps it. Or a logger's package is missing,
                or a constructor has no such argument.
        """
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            unknown = re.search(r"(\w+\.__init__\(\) got an unexpected keyword argument '\w+')", str(error))
            if unknown:
                raise UserError(f"{unknown[1]}. Fix: {FIX}") from error
            absent = re.search(r"class_path '[\w.]*?(\w+)':\s*(.*(?:pip install|No module named).*)", str(error))
            if absent:
                raise UserError(f"{absent[1]}: {absent[2]}") from error
            raise _user_error(error) or error from error
        except ModuleNotFoundError as error:  # as jsonargparse 5 leaves it
            raise UserError(str(error).splitlines()[0]) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with the bound's terms in the progress bar, and settle the run's folder."""
        options = self._get(self.config_init, "trainer")
        given = options.get("callbacks") or []
        callbacks = [given] if isinstance(given, Callback) else list(given)
        if options.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(ElboBar())
        if options.get("enable_checkpointing") is False or options.get("fast_dev_run"):
            keys = self._parser(self.subcommand).callback_keys
            keys[:] = [key for key in keys if key not in CHECKPOINTS]  # refused, or would leave an empty folder
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (ValueError, ModuleNotFoundError) as error:  # a strategy, device or package that there is not
            raise UserError(f"--trainer: {error}") from error
        asked = options.get("precision")
        if asked in (16, "16", "16-mixed") and trainer.precision == "bf16-mixed" and trainer.is_global_zero:
            print(f"--trainer.precision {asked}: needs a GPU; bf16-mixed runs instead", file=sys.stderr)
        processes.remember(trainer.strategy.launcher)
        run = run_logger(trainer)
        if run is not None:
            self._settle(run, trainer)
        return trainer

    def _settle(self, run: RunLogger, trainer: Trainer) -> None:
        root = require_local(trainer.default_root_dir, "--trainer.default_root_dir")
        run.place(root, type(self.datamodule).__name__.lower())
        if self.checkpoint and self.checkpoint.folder:
            training = self.subcommand == "fit"
            at = self.checkpoint
            run.resume(self.checkpoint.folder, at.step, at.epoch, training, at.rows)
        if self.subcommand == "fit":
            run.note = partial(slurm.mark, words=self.command_line)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.run = run
                if self.subcommand == "fit":
                    logger.choose(trainer.checkpoint_callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; whatever is raised while a checkpoint's state is restored is the checkpoint's fault.

        Raises:
            UserError: The state is not one that this run could have written.
        """
        try:
            super()._run_subcommand(subcommand)
        except (UserError, MisconfigurationException):
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            unknown = _unknown_argument(error)
            if unknown:
                raise unknown from error
            restores = any(f.name in RESTORING or f.filename.startswith(OPTIMIZERS) for f in frames)
            if self.checkpoint is None or not restores or _is_out_of_memory(error):
                raise
            line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"--ckpt_path {self.checkpoint.path}: its state does not fit this run ({line})") from error

    def before_validate(self) -> None:
        """Say that the model is untrained, if it is."""
        if self.checkpoint is None and self.trainer.is_global_zero:
            print("no --ckpt_path: these are the figures of a model that has not been trained", file=sys.stderr)

    before_test = before_validate

    def before_predict(self) -> None:
        """Keep no predictions in memory: they are written."""
        self.before_validate()
        self.config_init["predict"]["return_predictions"] = False

    def after_test(self) -> None:
        """Print what the table has no room for."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # a connector sets it
            if isinstance(callback, Evaluation) and self.trainer.is_global_zero and callback.kl_per_dim is not None:
                kl = " ".join(f"{value:.3g}" for value in callback.kl_per_dim.sort(descending=True).values.tolist())
                if kl:
                    print(f"IWAE and FIVO with {callback.samples} samples; errors are standard errors over sequences")
                    print(f"KL per latent dimension, nats per step: {kl}")
                else:
                    print(
                        "no latent: all three are the exact log-likelihood; errors are standard errors over sequences"
                    )
                if callback.path is not None:
                    print(f"figures of each sequence: {self._of_every_process(callback.path)}")
        self._write_report(create=False)

    after_validate = after_test

    def _of_every_process(self, path: Path) -> str:
        name = _short(str(path))
        return name.replace("_0.npz", "_*.npz") if self.trainer.world_size > 1 else name

    def predict(self, model: VRNNLightningModule, datamodule: LightningDataModule, **options: Any) -> None:
        """Predict; to draw samples the datamodule only says how to show them, and is never set up."""
        predictions, task = self._predictions, self._predictions.task
        if task.needs_data:
            self.trainer.predict(model, datamodule=datamodule, **options)
            return
        if self.checkpoint and self.checkpoint.data_state:
            datamodule.load_state_dict(self.checkpoint.data_state)
        predictions.data = datamodule
        loader = Draws(task.count, model.vrnn.num_features, self.trainer)
        self.trainer.predict(model, dataloaders=loader, **options)

    @property
    def _predictions(self) -> Predictions:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
        return next(callback for callback in callbacks if isinstance(callback, Predictions))

    def after_predict(self) -> None:
        """Print where the predictions are, and how good where that is known."""
        found = self._predictions
        if not self.trainer.is_global_zero or found.path is None:
            return
        if found.skipped:
            print(f"{found.skipped} sequences left out: too short, or nothing observed to start from")
        for line in found.task.remarks():
            print(line)
        for name, figures in found.figures.items():
            print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in figures.items())}")
        what = "encodings and scores" if found.task.name == "encode" else found.task.name
        print(f"{what}: {self._of_every_process(found.path)}")
        self._write_report(create=False)

    def _write_report(self, create: bool) -> None:
        """Write the run's page, or bring one up to date that is there."""
        run = run_logger(self.trainer)
        fitted = self.config_init[self.subcommand].get("report") and run is not None and self.trainer.is_global_zero
        if fitted and run is not None and (create or (Path(run.log_dir) / NAME).is_file()):
            print(f"report: {_short(str(write_report(run.log_dir)))}")

    def before_fit(self) -> None:
        """Take the weights to start from, and compare the epochs of a resumed run with those that it is to have.

        Raises:
            UserError: It has, or the weights are those of another architecture.
        """
        if self.origin:
            try:
                self.model.init_from(self.origin.weights)
            except UserError as error:
                raise UserError(f"--init_from {self.origin.path}: {error}") from None
        wanted = self.trainer.max_epochs
        if not self.checkpoint or wanted is None or wanted < 0 or wanted > self.checkpoint.epoch + 1:
            return
        done = f"{self.checkpoint.path} has {self.checkpoint.epoch + 1} epochs behind it"
        if wanted <= self.checkpoint.epoch:
            raise UserError(f"--trainer.max_epochs {wanted}: {done}. Fix: give more epochs than that")
        if self.checkpoint.is_epoch_complete and self.trainer.is_global_zero:
            print(f"{done}; more of them need a larger --trainer.max_epochs than {wanted}", file=sys.stderr)

    def after_fit(self) -> None:
        """Print what came of it."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # as above
            print("\n".join(self._summary()))
            self._write_report(create=True)

    def _summary(self) -> Iterator[str]:
        checkpoint, metrics = self.trainer.checkpoint_callback, self.trainer.callback_metrics
        best = getattr(checkpoint, "best_model_score", None)
        if best is not None:
            monitor = getattr(checkpoint, "monitor", None)
            per_step = monitor in ("val/elbo", "val/objective")
            yield f"best {monitor}: {best:.4f}{' nats per step' if per_step else ''}"
            exact = metrics.get("val/exact_log_likelihood")
            if exact is not None and per_step:
                yield f"exact log-likelihood: {exact:.4f} nats per step, gap {exact - best:.4f}"
            loss = getattr(self.datamodule, "diagonal_loss", None)
            if loss is not None:
                yield f"the best diagonal predictor without a latent would lose {loss:.4f} nats per step"
        run = run_logger(self.trainer)
        if run is not None:
            yield f"run folder: {_short(run.log_dir)}"
        if best is not None and checkpoint is not None:
            path = _short(getattr(checkpoint, "best_model_path", ""))
            yield f"test it: lightning test --ckpt_path {path}{_foreign_data(self.words)}"


def _num_inputs(data: LightningDataModule) -> int:
    return int(getattr(data, "num_inputs", 0))


def _missing(data: LightningDataModule) -> bool:
    return bool(getattr(data, "missing", False))


def _has_config(words: list[str]) -> bool:
    return any(word in ("-c", "--config") or word.startswith("--config=") for word in words)


def _trusted(words: list[str]) -> tuple[str, ...]:
    """Return the class paths and modules of ``--trust``.

    Raises:
        UserError: It holds something else.
    """
    trusted: list[str] = []
    for given in mentions(words, "trust"):
        value = given
        if isinstance(given, str):
            require_plain_yaml(given, "--trust")
            with suppress(yaml.YAMLError, ValueError):  # then it is not a name either
                value = yaml.safe_load(given)
        names = value if isinstance(value, list) else [] if value is None else [value]
        for name in names:
            if not isinstance(name, str) or not is_name(name):
                raise UserError(f"--trust {given!r}: is not a class path or module. Fix: give --trust my_package.data")
        trusted += names
    return tuple(trusted)


def _unknown_argument(error: Exception) -> UserError | None:
    """Return a line for an argument that one of Lightning's classes passes on to a constructor without it."""
    if not isinstance(error, TypeError) or "got an unexpected keyword argument" not in str(error):
        return None
    owners = [f.f_locals["self"] for f, _ in traceback.walk_tb(error.__traceback__) if "self" in f.f_locals]
    owner = type(owners[-1]) if owners else CLI
    if not owner.__module__.startswith(LIGHTNING):
        return None
    return UserError(f"{owner.__name__}: {error}. Fix: {FIX}")


def _class_name(value: object) -> str | None:
    """Return the datamodule's name from ``Name`` or ``{class_path: Name}``."""
    name = value.get("class_path") if isinstance(value, dict) else value
    return name if isinstance(name, str) and not name.startswith("-") else None


def _foreign_data(words: list[str]) -> str:
    """Return the words that name a datamodule which a checkpoint alone may not name."""
    named = [value for value in map(_class_name, mentions(words, "data")) if value]
    found = discovery.known().get(named[-1]) if named else None
    is_ours = found is not None and all(isinstance(p, Path) and p.parent == datamodules.INSTALLED for p in found.places)
    return f" --data {named[-1]}" if named and not is_ours else ""


def _short(path: str) -> str:
    """Return a path relative to the working directory where it lies below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError that an exception wraps."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
