"""Sequences as pictures, sounds and animations, in files and in loggers."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor, nn

from vrnn_lightning.callbacks.archives import FOLDER
from vrnn_lightning.callbacks.pictures import draw_rows
from vrnn_lightning.callbacks.strokes import on_paper, write_strokes
from vrnn_lightning.data.rolls import KEYS, roll_sound, write_midi
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import csv_line, replacing

__all__ = ["Media", "MediaLogger", "Shown", "require_columns", "save_picture"]

MAX_COLUMNS = 64  # side by side they are 20,000 pixels wide
ACROSS = 10  # frames in a line
ROLL_RATE = 16000  # Hz, of a roll's sound
DATA = ("real", "given")  # rows that the data made, not the model
Shown = dict[str, list[Tensor]]
"""Name of a row to its sequences, each of shape (time, features)."""


def _as_image(x: Tensor, width: int) -> Tensor:
    """Return the complete rows of an image that comes in pieces, or frames that are images side by side, as in text."""
    if x.shape[1] <= width:
        return x.flatten()[: x.numel() // width * width].view(-1, width)
    frames = nn.functional.pad(x.unflatten(1, (-1, width)), (0, 1, 0, 1, 0, -len(x) % ACROSS), value=torch.nan)
    lines: Tensor = frames.unflatten(0, (-1, ACROSS))
    return lines.transpose(1, 2).flatten(2).flatten(0, 1)


class Media:
    """The display of a datamodule's sequences.

    Where the datamodule has them, ``modality``, ``sample_rate``, ``full_scale``, ``image_width``, ``resolution``,
    ``columns`` and ``pen_starts_down`` are read.
    """

    def __init__(self, data: Any) -> None:
        self.modality = str(getattr(data, "modality", "series"))
        self.sample_rate: int | None = getattr(data, "sample_rate", None)
        self._width: int | None = getattr(data, "image_width", None)
        self._loudest = float(getattr(data, "full_scale", 1.0))
        self._resolution = int(getattr(data, "resolution", 4))
        self._features = [str(name) for name in getattr(data, "columns", None) or []]
        self._pen_starts_down = bool(getattr(data, "pen_starts_down", False))

    def to_display(self, rows: Shown) -> Shown:
        """Return sequences in data units as they are drawn; sound and pen rest at missing values of data."""
        return {name: [self._to_display(name, x) for x in sequences] for name, sequences in rows.items()}

    def _to_display(self, name: str, x: Tensor) -> Tensor:
        x = x.detach().cpu() / self._loudest
        if name in DATA and self.modality in ("audio", "strokes"):
            x = x.nan_to_num(0.0)
        if self._width is not None:
            x = _as_image(x, self._width)
        return on_paper(x) if self.modality == "strokes" and self._pen_starts_down else x

    @property
    def has_sound(self) -> bool:
        return self.modality == "roll" or (self.modality == "audio" and self.sample_rate is not None)

    def pieces(self, features: int) -> int:
        """Return the number of steps of an image's row; 1 for other modalities."""
        return 1 if self._width is None else max(1, self._width // features)

    def draw(self, rows: Shown, titles: list[str] | None = None, shared: bool = False) -> Figure:
        """Draw the result of :meth:`to_display`, a row per name and a column per sequence, as :func:`draw_rows`."""
        return draw_rows(rows, self.modality, self.sample_rate, titles, shared, self._features)

    def write(self, rows: Shown, folder: Path, stem: str) -> dict[str, dict[str, list[Path]]]:
        """Write the result of :meth:`to_display` as files ``<stem>_<row>_<i>.<suffix>``; return them by suffix and row.

        Audio becomes wav; strokes become svg, and sampled ones animated gif; piano rolls
        become wav, and MIDI where mido is installed. Missing values of data are silent; a sequence of the model that
        holds NaN becomes no file.
        """
        files: dict[str, dict[str, list[Path]]] = {}
        for name, sequences in rows.items():
            for i, shown in enumerate(sequences):
                x = shown.nan_to_num(0.0) if name in DATA else shown
                for suffix in self._suffixes(name, x):
                    path = folder / f"{stem}_{name}_{i}.{suffix}"
                    with replacing(path, FOLDER) as temporary:
                        self._write_one(x, temporary, suffix)
                    files.setdefault(suffix, {}).setdefault(name, []).append(path)
        return files

    def _suffixes(self, name: str, x: Tensor) -> list[str]:
        if not torch.isfinite(x).all():
            return []
        if self.modality == "audio" and self.sample_rate:
            return ["wav"]
        if self.modality == "strokes" and x.shape[1] == 3:
            return ["svg", "gif"] if name.startswith("sampled") else ["svg"]
        if self.modality == "roll" and x.shape[1] == KEYS:
            return ["wav", "mid"] if _has_mido() else ["wav"]
        return []

    def _write_one(self, x: Tensor, path: Path, suffix: str) -> None:
        if suffix == "mid":
            write_midi(path, x.numpy(), self._resolution)
        elif suffix == "wav":
            import soundfile

            is_roll = self.modality == "roll"
            wave = roll_sound(x.numpy(), self._resolution, ROLL_RATE) if is_roll else x.flatten().clamp(-1, 1).float()
            content = io.BytesIO()  # libsndfile's own word for a full disk is not an OSError
            soundfile.write(content, wave, ROLL_RATE if is_roll else int(self.sample_rate or 1), format="WAV")
            path.write_bytes(content.getvalue())
        else:
            write_strokes(x, path, suffix)


def _has_mido() -> bool:
    has_mido = importlib.util.find_spec("mido") is not None
    if not has_mido:
        rank_zero_warn("piano rolls are written as pictures and sound; for MIDI pip install 'vrnn-lightning[music]'")
    return has_mido


def require_columns(option: str, count: int) -> None:
    """Raise if a picture has no room for a number of sequences."""
    if count > MAX_COLUMNS:
        raise UserError(f"{option} {count}: must be at most {MAX_COLUMNS}, the sequences of one picture")


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    with replacing(path, FOLDER) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


class MediaLogger:
    """Shows sequences of a run as files in a folder, and in the trainer's loggers that can show them."""

    def __init__(self, trainer: Trainer, folder: Path, media: Media) -> None:
        self.loggers: list[Any] = list(trainer.loggers)
        self.step, self.folder, self.media = trainer.global_step, folder, media
        self.stem = f"step_{self.step:07d}"

    @property
    def shows_tables(self) -> bool:
        """Whether a logger shows the content of files in a table."""
        return any(hasattr(logger, "log_media_table") for logger in self.loggers)

    def picture(self, key: str, figure: Figure) -> None:
        """Show a figure as ``<step>_<key>.png``, or ``<step>.png`` for the samples themselves."""
        suffix, key = ("", key) if key == "samples" else (f"_{key}", f"samples/{key}")
        path = self.folder / f"{self.stem}{suffix}.png"
        save_picture(figure, path)
        for logger in self.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(key, [str(path)])
            elif hasattr(logger.experiment, "add_figure"):
                logger.experiment.add_figure(key, figure, self.step)

    def sequences(self, rows: Shown) -> None:
        """Write sequences as the modality asks, and let loggers play sounds and animations."""
        files = self.media.write(rows, self.folder, self.stem)
        for logger in self.loggers:
            for row, paths in files.get("wav", {}).items():
                if hasattr(logger, "log_audio"):
                    logger.log_audio(f"samples/{row}", [str(path) for path in paths])
                elif hasattr(logger.experiment, "add_audio"):
                    self._add_audio(logger.experiment, row, paths)
            for row, paths in files.get("gif", {}).items():
                if hasattr(logger, "log_video"):
                    logger.log_video(f"samples/{row}", [str(path) for path in paths], format=["gif"] * len(paths))

    def _add_audio(self, experiment: Any, row: str, paths: list[Path]) -> None:
        import soundfile

        for i, path in enumerate(paths):
            wave, rate = soundfile.read(path, dtype="float32")
            experiment.add_audio(f"samples/{row}_{i}", wave[None], self.step, rate)

    def table(self, key: str, columns: list[str], lines: list[list[Any]]) -> None:
        """Show a table as ``<step>_<key>.csv``, and the content of a cell's file where a logger can."""
        named = [[cell.name if isinstance(cell, Path) else cell for cell in line] for line in lines]
        path = self.folder / f"{self.stem}_{key}.csv"
        text = "".join(map(csv_line, [columns, *named]))
        with replacing(path, FOLDER) as temporary:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
        for logger in self.loggers:
            if hasattr(logger, "log_media_table"):
                logger.log_media_table(f"samples/{key}", columns, lines)
            elif hasattr(logger, "log_table"):
                logger.log_table(f"samples/{key}", columns, named)
