"""The callback that shows sequences while a model trains: real, reconstructed and sampled ones, and their latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.archives import run_folder
from vrnn_lightning.callbacks.media import Media, MediaLogger, Shown, require_columns, save_picture
from vrnn_lightning.callbacks.pictures import draw_heat
from vrnn_lightning.errors import require_at_least
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.trust import require_types
from vrnn_lightning.vrnn import Trace

__all__ = ["Samples"]

DIMENSIONS, SHIFTS = 3, (-2.0, -1.0, 0.0, 1.0, 2.0)  # of a traversal
PAIRS, PLACES = 2, (0.0, 0.25, 0.5, 0.75, 1.0)  # of an interpolation
MOST = 16  # latent dimensions in a heat map
LEAST = {"every_n_validations": 0, "count": 1, "max_steps": 1}


class Samples(Callback):
    """Shows validation sequences, reconstructions and samples as files in ``samples/`` of the run's folder.

    After a validation it writes one picture with a row each of real sequences, of their reconstructions (the
    emission's mean with the latents inferred) and of sequences drawn from the model, and files as the modality asks:
    wav of audio; svg of pen strokes, and gif of those drawn from the model, in which the pen draws; wav of piano rolls
    and, where mido is installed (``pip install 'vrnn-lightning[music]'``), MIDI.

    At the training's end it also writes

    ``…_latent.png``
        the KL of each latent dimension over time, in nats, the largest on top, below the sequences.
    ``…_traversal.png``
        the first sequence with one latent dimension moved by a number of its standard deviations at every step, for
        the three of the largest KL.
    ``…_interpolation.png``
        sequences between the latents of two sequences.
    ``…_table.csv``
        files of each sequence, real or drawn from the model, with its ELBO in nats per step (scaled units, as
        ``val/elbo``).

    Loggers that can show pictures, tables, or play audio get the same. The draws have a random stream of their own:
    training is the same with and without this callback.

    Args:
        every_n_validations: Validations from one picture to the next; 0 for none.
        count: Sequences per row, at most 64.
        max_steps: Steps of a sequence, or rows of an image, that are shown at most.
    """

    def __init__(self, every_n_validations: int = 1, count: int = 4, max_steps: int = 400) -> None:
        self.every_n_validations, self.count, self.max_steps = every_n_validations, count, max_steps
        require_at_least("samples", vars(self), LEAST)
        require_columns("samples.count", count)
        self.validations = 0
        self._batch: SequenceBatch | None = None
        self._shown_at: int | None = None

    def state_dict(self) -> dict[str, int]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        require_types(state_dict, self, validations=int)
        self.validations = state_dict["validations"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch = self._shown_at = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: SequenceBatch, *_: Any, **__: Any
    ) -> None:
        if self._batch is None and self._shows(trainer) and (batch.lengths > 0).any():
            first = (batch.lengths > 0).nonzero().flatten()[: self.count].tolist()
            steps = self.max_steps * Media(getattr(trainer, "datamodule", None)).pieces(batch.x.shape[2])
            self._batch = batch.rows(first).window(0, steps)

    def _shows(self, trainer: Trainer) -> bool:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        return fitting and bool(self.every_n_validations) and not getattr(trainer, "fast_dev_run", False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._shows(trainer):
            return
        self.validations += 1
        if self.validations % self.every_n_validations == 0:
            self._show(trainer, cast(VRNNLightningModule, pl_module), is_last=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._shows(trainer):
            self._show(trainer, cast(VRNNLightningModule, pl_module), is_last=True)

    def _show(self, trainer: Trainer, module: VRNNLightningModule, *, is_last: bool) -> None:
        folder = run_folder(trainer) / "samples"
        training = module.training
        devices = [module.device] if module.device.type == "cuda" else []
        with module.summon_full_params():  # collective calls, which every process makes
            if trainer.is_global_zero and self._batch is not None:
                logger = MediaLogger(trainer, folder, Media(getattr(trainer, "datamodule", None)))
                module.eval()
                with torch.random.fork_rng(devices), torch.no_grad():
                    torch.manual_seed(0)
                    self._log(logger, module, self._batch, is_last=is_last)
                module.train(training)

    def _log(self, logger: MediaLogger, module: VRNNLightningModule, batch: SequenceBatch, *, is_last: bool) -> None:
        trace = module.vrnn(batch)
        drawn = module.vrnn.generate(batch.x.shape[1], len(batch), inputs=batch.inputs).x
        shown = logger.media.to_display(_rows(module, batch, trace, drawn))
        if self._shown_at != logger.step:  # else the last validation did
            logger.picture("samples", logger.media.draw(shown, batch.names))
            logger.sequences(shown)
        self._shown_at = logger.step
        if not is_last:
            return
        if trace.posterior is not None:
            _log_latent(logger, module, batch, trace, shown["real"])
        columns = ["kind", "name", "elbo", *["picture"] * logger.shows_tables, *["sound"] * logger.media.has_sound]
        lines: list[list[Any]] = []
        of_drawn = SequenceBatch(drawn, batch.lengths, inputs=batch.inputs)
        for kind, one in (("real", trace), ("sampled", module.vrnn(of_drawn))):
            nats = ((one.log_px.sum(1) - one.kl.sum((1, 2))) / batch.lengths).tolist()
            for i, elbo in enumerate(nats):
                name = batch.names[i] if batch.names and kind == "real" else f"{kind} {i}"
                lines.append([kind, name, round(elbo, 6), *_files(logger, kind, i, shown[kind][i])])
        logger.table("table", columns, lines)


def _rows(module: VRNNLightningModule, batch: SequenceBatch, trace: Trace, drawn: Tensor) -> Shown:
    unscale = module.scaler.unscale
    frames = {
        "real": unscale(batch.x).masked_fill(~batch.valid_mask, torch.nan),
        "reconstructed" if module.vrnn.latent_size else "predicted": unscale(trace.emission.mean),
        "sampled": unscale(drawn),
    }
    return {name: _without_padding(x, batch) for name, x in frames.items()}


def _files(logger: MediaLogger, kind: str, i: int, sequence: Tensor) -> list[Path | None]:
    """Return the files of a sequence in the table, after its picture is drawn."""
    files: list[Path | None] = []
    path = logger.folder / f"{logger.stem}_{kind}_{i}"
    if logger.shows_tables:
        files.append(path.with_suffix(".png"))
        save_picture(logger.media.draw({kind: [sequence]}), path.with_suffix(".png"))
    if logger.media.has_sound:
        sound = path.with_suffix(".wav")
        files.append(sound if sound.is_file() else None)  # a sequence that holds NaN has none
    return files


def _log_latent(
    logger: MediaLogger, module: VRNNLightningModule, batch: SequenceBatch, trace: Trace, real: list[Tensor]
) -> None:
    """Show the KL of latent dimensions, a traversal and an interpolation."""
    assert trace.posterior is not None
    media, lengths = logger.media, batch.lengths.tolist()
    order = trace.step_kl.sum((0, 1)).argsort(descending=True)
    kl = _without_padding(trace.kl[:, :, order[:MOST]], batch)
    names = [f"z{d}" for d in order[:MOST].tolist()]
    logger.picture("latent", draw_heat(kl, names, "KL, nats", real, media.modality, media.sample_rate, batch.names))

    means = trace.posterior.mean
    spread = (means[batch.mask].var(0, unbiased=False) + trace.posterior.variance[batch.mask].mean(0)).sqrt()
    moved = {}
    for d in order[:DIMENSIONS].tolist():
        z = means[:1, : lengths[0]].repeat(len(SHIFTS), 1, 1)
        z[:, :, d] += spread[d] * z.new_tensor(SHIFTS)[:, None]
        moved[f"z{d}"] = _decode(module, z, batch, 0)
    titles = [f"{shift:+g} std" if shift else "as inferred" for shift in SHIFTS]
    logger.picture("traversal", media.draw(media.to_display(moved), titles, shared=True))

    between = {}
    for a in range(0, min(2 * PAIRS, len(batch) - 1), 2):
        steps = min(lengths[a : a + 2])
        share = means.new_tensor(PLACES)[:, None, None]
        z = (1 - share) * means[a, :steps] + share * means[a + 1, :steps]
        between[f"{a} to {a + 1}"] = _decode(module, z, batch, a)
    if between:
        titles = [f"{100 * place:g} %" for place in PLACES]
        logger.picture("interpolation", media.draw(media.to_display(between), titles, shared=True))


def _decode(module: VRNNLightningModule, z: Tensor, batch: SequenceBatch, row: int) -> list[Tensor]:
    """Decode latents, shape (sequences, time, latent), with the covariates of a row of a batch."""
    inputs = None if batch.inputs is None else batch.inputs[row : row + 1, : z.shape[1]].expand(len(z), -1, -1)
    return list(module.decode(z, inputs))


def _without_padding(x: Tensor, batch: SequenceBatch) -> list[Tensor]:
    return [row[:length] for row, length in zip(x, batch.lengths.tolist(), strict=True)]
