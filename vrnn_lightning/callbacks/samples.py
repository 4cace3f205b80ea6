"""What a run shows while it trains: real, reconstructed and sampled sequences, and what the latent holds of them."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.archives import run_folder
from vrnn_lightning.callbacks.media import Media, MediaLogger, Shown, save_picture
from vrnn_lightning.callbacks.pictures import draw_heat
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.trust import require_types
from vrnn_lightning.vrnn import Trace

__all__ = ["Samples"]

DIMENSIONS, SHIFTS = 3, (-2.0, -1.0, 0.0, 1.0, 2.0)  # of a traversal
PAIRS, PLACES = 2, (0.0, 0.25, 0.5, 0.75, 1.0)  # of an interpolation
MOST = 16  # latent dimensions in a heat map
MOST_SHOWN = 64  # side by side they are 20,000 pixels wide


class Samples(Callback):
    """Shows what the model makes of validation sequences, in ``samples/`` of the run's folder.

    After a validation it writes one picture with a row each of real sequences, of their reconstructions (the
    emission's mean with the latents inferred) and of sequences drawn from the model, and files as the modality asks:
    wav of audio; of pen strokes svg, and gif of those drawn from the model, in which the pen draws; of piano rolls wav
    and, where mido is installed (``pip install 'vrnn-lightning[music]'``), MIDI.

    At the training's end it also writes

    ``…_latent.png``
        the KL of each latent dimension over time, in nats, the largest on top, below the sequences.
    ``…_traversal.png``
        what the first sequence becomes where one latent dimension is moved by so many of its standard deviations at
        every step, for the three of the largest KL.
    ``…_interpolation.png``
        what lies between the latents of two sequences.
    ``…_table.csv``
        what is shown of each sequence, real or drawn from the model, with its ELBO in nats per step (scaled units, as
        ``val/elbo``).

    Loggers that can show pictures, tables, or play audio get the same. The draws have a random stream of their own:
    training is the same with and without this callback.

    Args:
        every_n_validations: Show after every so many validations, and at the end; 0 never.
        count: Sequences per row, at most 64.
        max_steps: Show no more than the first so many steps of a sequence, or rows of an image.
    """

    def __init__(self, every_n_validations: int = 1, count: int = 4, max_steps: int = 400) -> None:
        for option, value, least in (
            ("every_n_validations", every_n_validations, 0),
            ("count", count, 1),
            ("max_steps", max_steps, 1),
        ):
            if value < least:
                raise UserError(f"samples.{option} {value}: must be at least {least}")
        if count > MOST_SHOWN:
            raise UserError(f"samples.count {count}: a picture has room for {MOST_SHOWN} sequences")
        self.every_n_validations = every_n_validations
        self.count = count
        self.max_steps = max_steps
        self.validations = 0
        self._batch: SequenceBatch | None = None
        self._shown_at: int | None = None

    def state_dict(self) -> dict[str, int]:
        """Return how many validations there were."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting from a checkpoint."""
        require_types(state_dict, self, validations=int)
        self.validations = state_dict["validations"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what another fit has shown."""
        self._batch = self._shown_at = None

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: SequenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first sequences that have steps."""
        if self._batch is None and self._shows(trainer) and (batch.lengths > 0).any():
            self._batch = self._first(batch, Media(getattr(trainer, "datamodule", None)))

    def _first(self, batch: SequenceBatch, media: Media) -> SequenceBatch:
        """Return the beginnings of a batch's first sequences that have steps."""
        chosen = (batch.lengths > 0).nonzero().flatten()[: self.count].tolist()
        return batch.rows(chosen).window(0, self.max_steps * media.pieces(batch.x.shape[2]))

    def _shows(self, trainer: Trainer) -> bool:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        return fitting and bool(self.every_n_validations) and not getattr(trainer, "fast_dev_run", False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the first sequences again."""
        self._batch = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, write and log, on one process."""
        if not self._shows(trainer):
            return
        self.validations += 1
        if self.validations % self.every_n_validations == 0:
            self._show(trainer, cast(VRNNLightningModule, pl_module), last=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what has come of it, and what the latent holds."""
        if self._shows(trainer):
            self._show(trainer, cast(VRNNLightningModule, pl_module), last=True)

    def _show(self, trainer: Trainer, module: VRNNLightningModule, last: bool) -> None:
        folder = run_folder(trainer) / "samples"
        training = module.training
        devices = [module.device] if module.device.type == "cuda" else []
        with module.summon_full_params():  # collective calls, which every process makes
            if trainer.is_global_zero and self._batch is not None:
                module.eval()
                with torch.random.fork_rng(devices), torch.no_grad():
                    torch.manual_seed(0)
                    self._exhibit(
                        MediaLogger(trainer, folder, Media(getattr(trainer, "datamodule", None))), module, last
                    )
                module.train(training)

    def _exhibit(self, exhibition: MediaLogger, module: VRNNLightningModule, last: bool) -> None:
        batch = cast(SequenceBatch, self._batch)
        trace, drawn, rows = self._rows(module, batch)
        shown = exhibition.media.ready(rows)
        if self._shown_at != exhibition.step:  # else the last validation did
            exhibition.picture("samples", exhibition.media.draw(shown, batch.names))
            exhibition.sequences(shown)
        self._shown_at = exhibition.step
        if not last:
            return
        if trace.posterior is not None:
            self._exhibit_latent(exhibition, module, batch, trace, shown["real"])
        of_drawn = SequenceBatch(drawn, batch.lengths, inputs=batch.inputs)
        sounds = exhibition.media.sounds
        lines: list[list[Any]] = []
        for kind, found in (("real", trace), ("sampled", module.vrnn(of_drawn))):
            nats = ((found.log_px.sum(1) - found.kl.sum((1, 2))) / batch.lengths).tolist()
            for i, elbo in enumerate(nats):
                name = batch.names[i] if batch.names and kind == "real" else f"{kind} {i}"
                line: list[Any] = [kind, name, round(elbo, 6)]
                if exhibition.shows_tables:
                    line.append(exhibition.folder / f"{exhibition.stem}_{kind}_{i}.png")
                    save_picture(exhibition.media.draw({kind: [shown[kind][i]]}), line[-1])
                if sounds:
                    path = exhibition.folder / f"{exhibition.stem}_{kind}_{i}.wav"
                    line.append(path if path.is_file() else None)  # what holds NaN has none
                lines.append(line)
        columns = ["kind", "name", "elbo", *["picture"] * exhibition.shows_tables, *["sound"] * sounds]
        exhibition.table("table", columns, lines)

    def _rows(self, module: VRNNLightningModule, batch: SequenceBatch) -> tuple[Trace, Tensor, Shown]:
        """Return a pass over the sequences, others drawn from the model, and the picture's rows in data units."""
        trace = module.vrnn(batch)
        drawn = module.vrnn.generate(batch.x.shape[1], len(batch), inputs=batch.inputs).x
        unscale = module.scaler.unscale
        seen = "reconstructed" if module.vrnn.latent_size else "predicted"
        real = unscale(batch.x).masked_fill(~batch.valid_mask, torch.nan)
        frames = (("real", real), (seen, unscale(trace.emission.mean)), ("sampled", unscale(drawn)))
        lengths = batch.lengths.tolist()
        return trace, drawn, {name: [x[:n] for x, n in zip(part, lengths, strict=True)] for name, part in frames}

    def _exhibit_latent(
        self,
        exhibition: MediaLogger,
        module: VRNNLightningModule,
        batch: SequenceBatch,
        trace: Trace,
        real: list[Tensor],
    ) -> None:
        assert trace.posterior is not None
        media, lengths = exhibition.media, batch.lengths.tolist()
        order = trace.kl.sum((0, 1)).argsort(descending=True)
        kl = [x[:n, order[:MOST]] for x, n in zip(trace.kl, lengths, strict=True)]
        names = [f"z{d}" for d in order[:MOST].tolist()]
        figure = draw_heat(kl, names, "KL, nats", real, media.modality, media.sample_rate, batch.names)
        exhibition.picture("latent", figure)

        means, mask = trace.posterior.mean, batch.mask[..., None]
        spread = (
            means[mask.squeeze(-1)].var(0, unbiased=False) + trace.posterior.variance[mask.squeeze(-1)].mean(0)
        ).sqrt()
        inputs = None if batch.inputs is None else batch.inputs[:, : lengths[0]]
        moved = {}
        for d in order[:DIMENSIONS].tolist():
            z = means[:1, : lengths[0]].repeat(len(SHIFTS), 1, 1)
            z[:, :, d] += spread[d] * z.new_tensor(SHIFTS)[:, None]
            given = None if inputs is None else inputs[:1].expand(len(SHIFTS), -1, -1)
            moved[f"z{d}"] = list(module.decode(z, given))
        titles = [f"{shift:+g} std" if shift else "as inferred" for shift in SHIFTS]
        exhibition.picture("traversal", media.draw(media.ready(moved), titles, shared=True))

        between = {}
        for a in range(0, min(2 * PAIRS, len(batch) - 1), 2):
            steps = min(lengths[a : a + 2])
            share = means.new_tensor(PLACES)[:, None, None]
            z = (1 - share) * means[a, :steps] + share * means[a + 1, :steps]
            given = None if batch.inputs is None else batch.inputs[a : a + 1, :steps].expand(len(PLACES), -1, -1)
            between[f"{a} to {a + 1}"] = list(module.decode(z, given))
        if between:
            titles = [f"{100 * place:g} %" for place in PLACES]
            exhibition.picture("interpolation", media.draw(media.ready(between), titles, shared=True))
