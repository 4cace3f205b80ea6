"""Real, reconstructed and sampled sequences side by side, as files and in the loggers that show media."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.pictures import draw_rows, on_paper, strokes_svg
from vrnn_lightning.data.rolls import KEYS, write_midi
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Samples"]


class Samples(Callback):
    """Shows what the model makes of validation sequences, in ``samples/`` of the run's folder.

    After a validation it writes one picture with a row each of real sequences, of their reconstructions (the
    emission's mean with the latents inferred) and of sequences drawn from the model; for audio wav files as well, for
    pen strokes svg files, for piano rolls MIDI files where mido is installed (``pip install 'vrnn-lightning[music]'``).
    Loggers that can show pictures or play audio get the same.

    The draws have a random stream of their own: training is the same with and without this callback.

    Args:
        every_n_validations: Show after every so many validations; 0 never.
        count: Sequences per row.
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
        self.every_n_validations = every_n_validations
        self.count = count
        self.max_steps = max_steps
        self.validations = 0
        self._batch: SequenceBatch | None = None
        self._said = False

    def state_dict(self) -> dict[str, int]:
        """Return how many validations there were."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting from a checkpoint."""
        self.validations = state_dict["validations"]

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: SequenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first batch that has steps."""
        if self._batch is None and (batch.lengths > 0).any():
            self._batch = batch

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, write and log, on one process."""
        batch, self._batch = self._batch, None
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self.every_n_validations:
            return
        self.validations += 1
        if self.validations % self.every_n_validations:
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"  # a collective: every process asks
        module = cast(VRNNLightningModule, pl_module)
        data = getattr(trainer, "datamodule", None)
        width = getattr(data, "image_width", None)
        with module.whole_parameters():  # likewise
            found = self._rows(module, batch, width) if trainer.is_global_zero and batch is not None else None
        if found is None:
            return
        modality, rate = getattr(data, "modality", "series"), getattr(data, "sample_rate", None)
        loudest = getattr(data, "full_scale", 1.0)
        rows = {name: [_in_rows(x / loudest, width) for x in sequences] for name, sequences in found.items()}
        if modality == "strokes" and getattr(data, "pen_starts_down", False):
            rows = {name: [on_paper(x) for x in sequences] for name, sequences in rows.items()}
        figure = draw_rows(rows, modality, rate)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{trainer.global_step:07d}"
        figure.savefig(folder / f"{name}.png", dpi=100)
        if modality == "strokes":
            _write_drawings(rows, folder, name)
        waves = _write_waves(rows, folder, name, int(rate)) if modality == "audio" and rate else {}
        if modality == "roll":
            self._write_midi(rows, folder, name, int(getattr(data, "resolution", 4)))
        for logger in trainer.loggers:
            _log_media(logger, figure, folder / f"{name}.png", waves, trainer.global_step)

    def _write_midi(self, rows: dict[str, list[Tensor]], folder: Path, name: str, resolution: int) -> None:
        """Write each roll as a MIDI file of what sounds more likely than not; say once where that can't be done."""
        if importlib.util.find_spec("mido") is None:
            if not self._said:
                rank_zero_warn("samples are written as pictures alone; for MIDI pip install 'vrnn-lightning[music]'")
            self._said = True
            return
        for row, sequences in rows.items():
            for i, x in enumerate(sequences):
                if x.shape[1] == KEYS:
                    write_midi(folder / f"{name}_{row}_{i}.mid", x.detach().cpu().numpy(), resolution)

    def _rows(self, pl_module: VRNNLightningModule, batch: SequenceBatch, width: int | None) -> dict[str, list[Tensor]]:
        """Return the rows of the picture, in data units."""
        head = batch.rows((batch.lengths > 0).nonzero().flatten()[: self.count].tolist())
        pieces = 1 if width is None else width // head.x.shape[2]  # of a row
        lengths = head.lengths.clamp(max=self.max_steps * pieces).tolist()
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(0)
            mean = pl_module.vrnn(head).emission.mean
            inputs = None if head.inputs is None else head.inputs[:, : max(lengths)]
            drawn = pl_module.vrnn.generate(max(lengths), len(head), inputs=inputs).x
        unscale = pl_module.scaler.unscale
        seen = "reconstructed" if pl_module.vrnn.latent_size else "predicted"
        return {
            name: [unscale(x)[:length] for x, length in zip(frames, lengths, strict=True)]
            for name, frames in (("real", head.x), (seen, mean), ("sampled", drawn))
        }


def _in_rows(x: Tensor, width: int | None) -> Tensor:
    """Return an image that was read in other pieces as the rows that are complete; anything else as it is.

    >>> _in_rows(torch.arange(7)[:, None], width=3).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    return x if width is None else x.flatten()[: x.numel() // width * width].view(-1, width)


def _write_waves(rows: dict[str, list[Tensor]], folder: Path, name: str, rate: int) -> dict[str, list[Path]]:
    """Write each sequence as a wav file of its values, which are amplitudes; beyond -1 and 1 they are cut off."""
    import soundfile

    written: dict[str, list[Path]] = {}
    for row, sequences in rows.items():
        for i, x in enumerate(sequences):
            path = folder / f"{name}_{row}_{i}.wav"
            soundfile.write(path, x.flatten().clamp(-1, 1).float().cpu().numpy(), rate)
            written.setdefault(row, []).append(path)
    return written


def _write_drawings(rows: dict[str, list[Tensor]], folder: Path, name: str) -> None:
    """Write each sequence of strokes as an svg file; a model that has lost its numbers draws none."""
    for row, sequences in rows.items():
        for i, x in enumerate(sequences):
            if torch.isfinite(x).all():
                (folder / f"{name}_{row}_{i}.svg").write_text(strokes_svg(x))


def _log_media(logger: Any, figure: Figure, picture: Path, waves: dict[str, list[Path]], step: int) -> None:
    """Hand the picture and the sounds to a logger that can show them; others have the files."""
    if hasattr(logger, "log_image"):
        logger.log_image("samples", [str(picture)])
    elif hasattr(logger.experiment, "add_figure"):
        logger.experiment.add_figure("samples", figure, step)
    if hasattr(logger, "log_audio"):
        for row, paths in waves.items():
            logger.log_audio(f"samples/{row}", [str(p) for p in paths])
