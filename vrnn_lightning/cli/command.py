"""LightningCLI with our options and defaults, and a checkpoint's options beneath the user's."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from vrnn_lightning import discovery
from vrnn_lightning.callbacks import Diagnostics, Evaluation, Loop, Predictions, Samples
from vrnn_lightning.callbacks.predictions import Draws
from vrnn_lightning.cli import processes, slurm
from vrnn_lightning.cli.argv import collect_texts, last_mention, mentions, read_config, with_configs
from vrnn_lightning.cli.checkpoint import FROM_DATA, Checkpoint, find_checkpoint, runs_folder
from vrnn_lightning.cli.failures import explain_construction, explain_run
from vrnn_lightning.cli.outcome import class_name, evaluation_lines, fit_lines, foreign_data, prediction_lines, shorten
from vrnn_lightning.cli.parser import MODE, Parser
from vrnn_lightning.datamodules import local
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import require_local, require_plain_yaml
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.report import NAME, write_report
from vrnn_lightning.resuming import callbacks_of
from vrnn_lightning.tracking import ElboBar, RunCheckpoint, SaveConfig, WandbLogger, run_logger
from vrnn_lightning.trust import Gate, is_name, path_of

__all__ = ["CLI"]

COMMON = {
    "auto_insert_metric_name": False,  # a metric's slash would make a folder
    "enable_version_counter": False,  # a resumed run replaces its files
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "checkpoint": {"monitor": "val/elbo", "mode": "max", "filename": "best", **COMMON},
    "last": {"filename": "last", "every": "15min", **COMMON},  # `save_last` would write only where there is a new best
}
GROUPS: dict[str, type] = {
    **dict.fromkeys(CHECKPOINTS, RunCheckpoint),
    "samples": Samples,
    "diagnostics": Diagnostics,
    "evaluation": Evaluation,
    "loop": Loop,
    "prediction": Predictions,
}
"""The callbacks that every run has, by the group of their options."""


class CLI(LightningCLI):
    """LightningCLI with the VRNN as its model and any datamodule as its data.

    Args:
        argv: The words after ``lightning``.
    """

    def __init__(self, argv: list[str]) -> None:
        local.use_working_directory()
        self.command_line = argv
        self.argv = with_configs(argv)
        self.is_help = bool({"-h", "--help"} & set(self.argv))
        self.trusted = _trusted(self.argv)
        values = [value for key in ("data", "data.class_path", "data.help") for value in mentions(self.argv, key)]
        self.data_classes = [discovery.load(name) for name in map(class_name, values) if name]
        self.checkpoint = self._read_checkpoint()
        self.origin = self._read_origin()
        if self.checkpoint:
            has_config = any(word.startswith("--config=") for word in self.argv)
            if self.checkpoint.folder and not has_config and "fit" in self.argv:
                config = self.checkpoint.folder / "config.yaml"
                self._require_trusted(config)
                self.argv.insert(self.argv.index("fit") + 1, f"--config={config}")
        self.data_option = foreign_data(self.argv)  # now: a config may change while a fit runs
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
        command = self.argv[0] if self.argv else ""
        return {command: commands[command]} if command in commands else commands

    def _read_checkpoint(self) -> Checkpoint | None:
        if self.is_help:
            return None
        path = find_checkpoint(self.argv, self.data_classes[-1].__name__ if self.data_classes else None)
        if path is None and "fit" in self.argv:
            path = slurm.interrupted_checkpoint(runs_folder(self.argv), self.command_line)
        if path is None:
            return None
        checkpoint = Checkpoint.read(path)
        checkpoint.require_trusted(self._gate(f"--ckpt_path {path}"))
        for data in self.data_classes:
            if checkpoint.data_class and checkpoint.data_class != path_of(data):
                own = checkpoint.data_class.rpartition(".")[2]
                raise UserError(
                    f"--data {data.__name__}: {path} was trained on {own}. Fix: leave --data out or give {own}"
                )
        return checkpoint

    def _read_origin(self) -> Checkpoint | None:
        """Return the checkpoint whose weights a fit starts from; one that is resumed has its own."""
        path = last_mention(self.argv, "init_from")
        if path is None or "fit" not in self.argv or self.is_help:
            return None
        option = f"--init_from {path}"
        if self.checkpoint:
            if any(word.partition("=")[0] == "--init_from" for word in self.argv):
                raise UserError(
                    f"{option}: --ckpt_path continues a run, which has its weights. Fix: give one of the two"
                )
            return None
        origin = Checkpoint.read(Path(path), "--init_from")
        origin.require_trusted(self._gate(option), training=False)
        return origin

    def _gate(self, source: str, folder: Path | None = None) -> Gate:
        """Return what a file may name: what is allowed in general, what this call names, and what it trusts."""
        names = collect_texts(self.argv) | {path_of(data) for data in self.data_classes}
        return Gate(source, self.trusted, frozenset(names), "add --trust {}", folder)

    def _require_trusted(self, config: Path) -> None:
        """Raise if the config beside a checkpoint names what a file may not import, or is not a config."""
        gate = self._gate(str(config), config.parent)
        groups = {"model": VRNNLightningModule, "trainer": Trainer, **GROUPS}
        for key, value in read_config(config).items():
            name = str(key).removesuffix("+")
            if not name.isidentifier():  # a parser would split it at its dots
                raise UserError(f"{config}: {key!r} is not the name of an option. Fix: nest the options, or give -c")
            if name in groups and value is not None:
                gate.check_options(groups[name], value, name)
            elif name != "trust":  # what a file says of itself does not count
                gate.check(value, LightningDataModule if name == "data" else str | bool | int | None, name)

    def setup_parser(self, *args: Any) -> None:
        """Add the short name of an option to the parser of predictions."""
        super().setup_parser(*args)
        if "predict" in self.subcommands():
            text = "Replace the answer of an earlier prediction of the task, as --prediction.overwrite true does."
            self._parser("predict").add_argument("--overwrite", action="store_true", help=text)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that every run has, and put the checkpoint's beneath the user's."""
        for group, callback in GROUPS.items():
            parser.add_lightning_class_args(callback, group)
            parser.set_defaults({f"{group}.{key}": value for key, value in CHECKPOINTS.get(group, {}).items()})
        for option, kind in FROM_DATA.items():
            read = self.num_features if option == "num_features" else partial(_read, option, kind)
            parser.link_arguments("data", f"model.{option}", compute_fn=read, apply_on="instantiate")
        text = "Fit: a checkpoint whose weights to start from, on any data, with a new optimiser, at step 0."
        parser.add_argument("--init_from", type=str | None, default=None, help=text)
        text = "A class path or module of yours that the files named by --ckpt_path and --init_from may import."
        parser.add_argument("--trust", type=str | list[str] | None, default=None, help=text)
        text = f"Fit: write {NAME}, a page with figures, pictures and sounds, into the run's folder; test and predict"
        parser.add_argument("--report", type=bool, default=True, help=f"{text} bring it up to date where it is.")
        if self.checkpoint:
            parser.set_defaults(self.checkpoint.defaults())
        elif self.origin:
            parser.set_defaults(self.origin.architecture())

    def num_features(self, data: LightningDataModule) -> int:
        """Return the data's width, which is the model's; raise if the checkpoint's model has another."""
        option = f"--data {type(data).__name__}"
        try:
            width = operator.index(getattr(data, "num_features", None))  # type: ignore[arg-type]  # checked by the call
        except TypeError:
            raise UserError(f"{option}: has no number `num_features`. Fix: set it in __init__") from None
        if self.checkpoint and width != self.checkpoint.model["num_features"]:
            own = self.checkpoint.model["num_features"]
            raise UserError(f"{option}: {width} features, but {self.checkpoint.path} has {own}. Fix: give other data")
        return width

    def parse_arguments(self, parser: LightningArgumentParser, args: object) -> None:
        """Parse, and compare the user's options with the checkpoint's."""
        self.config = parser.parse_args(self.argv)
        command = self.config["subcommand"]
        options = self.config[command]
        options["trust"] = None  # for this call alone: a saved config trusts nothing
        if options.pop("overwrite", False):
            options["prediction"]["overwrite"] = True
        if options.get("weights_only") is False:
            raise UserError("--weights_only false: a checkpoint that holds code is not loaded. Fix: leave it out")
        if self.checkpoint is None:
            return
        options["weights_only"] = True
        options["ckpt_path"] = str(self.checkpoint.path)
        text = parser.dump(self.config, skip_link_targets=False, skip_none=False, skip_validation=True)
        self.checkpoint.require_same(yaml.safe_load(text)[command], training=command == "fit")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: the checkpoint's options are beneath the user's already."""

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"--seed_everything {error}") from error

    def instantiate_classes(self) -> None:
        """Build data, model and trainer, and explain the errors of their constructors."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError, ModuleNotFoundError) as error:
            raise explain_construction(error) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with the bound's terms in the progress bar, and choose the run's folder."""
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
        except (ValueError, ModuleNotFoundError) as error:  # of a strategy, device or package that is missing
            raise UserError(f"--trainer: {error}") from error
        precision = options.get("precision")
        if precision in (16, "16", "16-mixed") and trainer.precision == "bf16-mixed" and trainer.is_global_zero:
            print(f"--trainer.precision {precision}: needs a GPU; bf16-mixed runs instead", file=sys.stderr)
        processes.remember(trainer.strategy.launcher)
        self._choose_folder(trainer)
        return trainer

    def _choose_folder(self, trainer: Trainer) -> None:
        run = run_logger(trainer)
        if run is None:
            return
        is_fit = self.subcommand == "fit"
        root = require_local(trainer.default_root_dir, "--trainer.default_root_dir")
        run.place(root, type(self.datamodule).__name__.lower())
        if self.checkpoint and self.checkpoint.folder:
            earlier = self.checkpoint
            run.resume(self.checkpoint.folder, earlier.step, earlier.epoch, is_fit, earlier.record.get("rows"))
        if is_fit:
            run.note = partial(slurm.mark, argv=self.command_line)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.run = run
                if is_fit:
                    logger.choose(trainer.checkpoint_callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (UserError, MisconfigurationException):
            raise
        except Exception as error:
            explained = explain_run(error, str(self.checkpoint.path) if self.checkpoint else None)
            if explained is None:
                raise
            raise explained from error

    def before_validate(self) -> None:
        """Print that the model is untrained, if it is."""
        if self.checkpoint is None and self.trainer.is_global_zero:
            print("no --ckpt_path: these are the figures of a model that has not been trained", file=sys.stderr)

    before_test = before_validate

    def before_predict(self) -> None:
        """Keep no predictions in memory: they are written."""
        self.before_validate()
        self.config_init["predict"]["return_predictions"] = False

    def predict(self, model: VRNNLightningModule, datamodule: LightningDataModule, **options: Any) -> None:
        """Predict; a datamodule that only shows samples is never set up."""
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
        return cast(Predictions, callbacks_of(self.trainer, Predictions)[0])

    def before_fit(self) -> None:
        """Take the weights to start from, and raise if a resumed run has all the epochs that it is to have."""
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
        """Print the best figure and the run's folder."""
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # as above
            self._print(fit_lines(self.trainer, self.datamodule, self.data_option), makes_report=True)

    def after_test(self) -> None:
        """Print what the table does not show."""
        self._print(evaluation_lines(self.trainer))

    after_validate = after_test

    def after_predict(self) -> None:
        """Print the predictions' file and figures."""
        self._print(prediction_lines(self._predictions, self.trainer))

    def _print(self, lines: Iterable[str], *, makes_report: bool = False) -> None:
        """Print lines in the first process, and write the run's page or bring an earlier one up to date."""
        if not self.trainer.is_global_zero:
            return
        for line in lines:
            print(line)
        run = run_logger(self.trainer) if self.config_init[self.subcommand].get("report") else None
        if run is not None and (makes_report or (Path(run.log_dir) / NAME).is_file()):
            print(f"report: {shorten(write_report(run.log_dir))}")


def _read(option: str, kind: type, data: LightningDataModule) -> Any:
    return kind(getattr(data, option, 0))


def _trusted(argv: list[str]) -> tuple[str, ...]:
    """Return the class paths and modules of ``--trust``; raise if it holds something else."""
    trusted: list[str] = []
    for given in mentions(argv, "trust"):
        value = given
        if isinstance(given, str):
            require_plain_yaml(given, "--trust")
            with suppress(yaml.YAMLError, ValueError):  # then it is not a name either
                value = yaml.safe_load(given)
        names = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(name, str) and is_name(name) for name in names):
            raise UserError(f"--trust {given!r}: is not a class path or module. Fix: give --trust my_package.data")
        trusted += names
    return tuple(trusted)
