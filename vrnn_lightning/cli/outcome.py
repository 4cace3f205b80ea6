"""The lines that a command prints when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import LightningDataModule, Trainer

from vrnn_lightning import datamodules, discovery
from vrnn_lightning.callbacks import Evaluation, Predictions
from vrnn_lightning.cli.argv import mentions
from vrnn_lightning.resuming import callbacks_of
from vrnn_lightning.tracking import run_logger

__all__ = ["class_name", "evaluation_lines", "fit_lines", "foreign_data", "prediction_lines", "shorten"]


def fit_lines(trainer: Trainer, datamodule: LightningDataModule, data_option: str) -> Iterator[str]:
    """Yield the best figure of a fit, its references, its folder and the command that tests it."""
    checkpoint = trainer.checkpoint_callback
    best = getattr(checkpoint, "best_model_score", None)
    if best is not None:
        monitor = getattr(checkpoint, "monitor", None)
        per_step = monitor in ("val/elbo", "val/objective")
        yield f"best {monitor}: {best:.4f}{' nats per step' if per_step else ''}"
        exact = trainer.callback_metrics.get("val/exact_log_likelihood")
        if exact is not None and per_step:
            yield f"exact log-likelihood: {exact:.4f} nats per step, gap {exact - best:.4f}"
        loss = getattr(datamodule, "diagonal_loss", None)
        if loss is not None:
            yield f"the best diagonal predictor without a latent would lose {loss:.4f} nats per step"
    run = run_logger(trainer)
    if run is not None:
        yield f"run folder: {shorten(run.log_dir)}"
    if best is not None:
        path = shorten(getattr(checkpoint, "best_model_path", ""))
        yield f"test it: lightning test --ckpt_path {path}{data_option}"


def evaluation_lines(trainer: Trainer) -> Iterator[str]:
    """Yield what the table of figures does not show."""
    for callback in callbacks_of(trainer, Evaluation):
        if callback.kl_per_dim is not None:
            kl = " ".join(f"{value:.3g}" for value in callback.kl_per_dim.sort(descending=True).values.tolist())
            if kl:
                yield f"IWAE and FIVO with {callback.samples} samples; errors are standard errors over sequences"
                yield f"KL per latent dimension, nats per step: {kl}"
            else:
                yield "no latent: all three are the exact log-likelihood; errors are standard errors over sequences"
            if callback.path is not None:
                yield f"figures of each sequence: {_of_every_process(callback.path, trainer)}"


def prediction_lines(predictions: Predictions, trainer: Trainer) -> Iterator[str]:
    """Yield the predictions' figures, where they are known, and their file."""
    if predictions.path is None:
        return
    if predictions.skipped:
        yield f"{predictions.skipped} sequences left out: too short, or nothing observed to start from"
    yield from predictions.task.remarks()
    for name, figures in predictions.figures.items():
        yield f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in figures.items())}"
    title = "encodings and scores" if predictions.task.name == "encode" else predictions.task.name
    yield f"{title}: {_of_every_process(predictions.path, trainer)}"


def _of_every_process(path: Path, trainer: Trainer) -> str:
    name = shorten(path)
    return name.replace("_0.npz", "_*.npz") if trainer.world_size > 1 else name


def foreign_data(argv: list[str]) -> str:
    """Return the option for a datamodule that a checkpoint alone may not name, or nothing."""
    names = [name for name in map(class_name, mentions(argv, "data")) if name]
    name = names[-1] if names else ""
    short = name.rpartition(".")[2] if name.startswith(f"{datamodules.__name__}.") else name
    places = discovery.known().get(short, ())
    is_own = bool(places) and all(isinstance(p, Path) and p.parent == datamodules.INSTALLED for p in places)
    return f" --data {name}" if name and not is_own else ""


def class_name(value: object) -> str | None:
    """Return the datamodule's name from ``Name`` or ``{class_path: Name}``."""
    name = value.get("class_path") if isinstance(value, dict) else value
    return name if isinstance(name, str) and not name.startswith("-") else None


def shorten(path: Path | str) -> str:
    """Return a path relative to the working directory where it lies below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here) if Path(path).is_relative_to(here) else path)
