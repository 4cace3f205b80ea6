"""Recordings as sequences of frames, read when they are asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from vrnn_lightning.batch import SequenceSample
from vrnn_lightning.data.audio import SEEKABLE, opened, read_samples
from vrnn_lightning.data.mel import LogMelFrames
from vrnn_lightning.data.sequences import AugmentedSequences

if TYPE_CHECKING:
    from soundfile import SoundFile

__all__ = ["PCM16", "Crops", "RawFrames", "Recordings"]

PCM16 = 32768.0
"""What 16-bit files call an amplitude of 1."""


@dataclass(frozen=True)
class RawFrames:
    """Frames of samples one after another; ``pad`` fills the last one, and ``units`` are those of ``Speech``."""

    size: int
    pad: bool
    units: str

    def count(self, samples: int) -> int:
        """Return the number of frames of so many samples."""
        return -(-samples // self.size) if self.pad else samples // self.size

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return the first sample of frames ``first`` to ``last - 1``, and one past the last."""
        return first * self.size, last * self.size

    def cut(self, samples: NDArray[np.floating[Any]]) -> tuple[NDArray[np.floating[Any]], NDArray[np.bool_] | None]:
        """Return the frames of samples and the mask of observed values, each of shape (frames, features)."""
        if self.units == "pcm16":
            samples = (samples * np.float32(PCM16)).round().clip(-PCM16, PCM16 - 1)
        elif self.units == "amplitude":
            samples = samples.clip(-1, 1)
        rest = len(samples) % self.size
        if rest == 0 or not self.pad:
            return samples[: len(samples) - rest].reshape(-1, self.size), None
        frames = np.pad(samples, (0, self.size - rest)).reshape(-1, self.size)
        observed = np.ones(frames.shape, dtype=bool)
        observed[-1, rest:] = False
        return frames, observed


@dataclass(frozen=True)
class Recordings:
    """The files ``names`` below ``root`` as frames of samples at ``sample_rate`` Hz; ``lengths`` are their frames."""

    root: Path
    names: list[str]
    lengths: list[int]
    sample_rate: int
    frames: RawFrames | LogMelFrames

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> SequenceSample:
        with opened(self.root / self.names[index]) as file:
            return self._read(index, file)

    def window(self, index: int, first: int, last: int, /) -> SequenceSample | None:
        """Return frames ``first`` to ``last - 1`` of a recording, or ``None`` if its file must be read whole."""
        with opened(self.root / self.names[index]) as file:
            return self._read(index, file, *self.frames.span(first, last)) if file.subtype in SEEKABLE else None

    def _read(self, index: int, file: SoundFile, start: int = 0, stop: int | None = None) -> SequenceSample:
        name = self.names[index]
        x, observed = self.frames.cut(read_samples(self.root / name, file, self.sample_rate, start, stop))
        return SequenceSample(torch.from_numpy(x), None if observed is None else torch.from_numpy(observed), name=name)


@dataclass(frozen=True, kw_only=True)
class Crops(AugmentedSequences):
    """A stretch of ``crop`` frames of each recording, redrawn every epoch, or all of a recording that is no longer."""

    sequences: Recordings
    crop: int

    @property
    def lengths(self) -> list[int]:
        """Frames of each crop."""
        return [min(self.crop, steps) for steps in self.sequences.lengths]

    def __getitem__(self, index: int, /) -> SequenceSample:
        steps = min(self.crop, self.sequences.lengths[index])
        part = self.window(index, 0, steps)
        if part is not None:
            return part
        first, whole = self._first(index), self.sequences[index]
        observed = None if whole.observed is None else whole.observed[first : first + steps]
        return SequenceSample(whole.x[first : first + steps], observed, name=whole.name)

    def window(self, index: int, first: int, last: int, /) -> SequenceSample | None:
        """Return frames ``first`` to ``last - 1`` of a crop, or ``None`` if its file must be read whole."""
        start = self._first(index)
        return self.sequences.window(index, start + first, start + last)

    def _first(self, index: int) -> int:
        """Return the frame at which the crop of a recording begins."""
        file = crc32(os.fsencode(self.sequences.names[index]))
        spare = max(0, self.sequences.lengths[index] - self.crop)
        return int(np.random.default_rng((self.seed, self.epoch, file)).integers(spare + 1))
