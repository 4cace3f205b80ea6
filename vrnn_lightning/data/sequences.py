"""The sequences of a split, and the affine map between data units and the model's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from vrnn_lightning.batch import SequenceSample

__all__ = ["AugmentedSequences", "ChangingSequences", "Modality", "Scaler", "Sequences", "Split", "WindowedSequences"]

Modality = Literal["audio", "strokes", "series", "roll", "image"]
Split = Literal["train", "val", "test"]


class Sequences(Protocol):
    """A map-style collection of sequences: a list of them, or anything that reads one when indexed."""

    def __len__(self) -> int:
        """Return the number of sequences."""

    def __getitem__(self, index: int, /) -> SequenceSample:
        """Return one sequence in data units."""


@runtime_checkable
class WindowedSequences(Sequences, Protocol):
    """A collection that also reads a part of a sequence, so that memory does not grow with a sequence's length."""

    def window(self, index: int, first: int, last: int, /) -> SequenceSample | None:
        """Return steps ``first`` to ``last - 1`` of one sequence in data units, under the whole sequence's name.

        ``None`` where this sequence can only be read whole.
        """


@runtime_checkable
class ChangingSequences(Sequences, Protocol):
    """A collection that is redrawn every epoch; indexed itself, it is that of epoch 0."""

    def in_epoch(self, epoch: int, /) -> Sequences:
        """Return the sequences of an epoch: as many, of the same names and lengths, and a function of it alone."""


@dataclass(frozen=True, kw_only=True)
class AugmentedSequences:
    """Sequences that are augmented differently in each epoch: give it :meth:`augmented`.

    Args:
        sequences: The sequences without augmentation.
        seed: Seed of the draws, which should depend on it, the epoch and the sequence's index alone.
        epoch: The epoch.
    """

    sequences: WindowedSequences
    seed: int
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int, /) -> SequenceSample:
        return self.augmented(index, self.sequences[index])

    @property
    def lengths(self) -> list[int] | None:
        """Steps of each sequence, if the sequences without augmentation have this list."""
        return getattr(self.sequences, "lengths", None)

    def window(self, index: int, first: int, last: int, /) -> SequenceSample | None:
        """Return steps ``first`` to ``last - 1`` of one sequence of the epoch."""
        part = self.sequences.window(index, first, last)
        return None if part is None else self.augmented(index, part)

    def in_epoch(self, epoch: int, /) -> Self:
        """Return the sequences of an epoch."""
        return replace(self, epoch=epoch)

    def augmented(self, index: int, sequence: SequenceSample) -> SequenceSample:
        """Return a sequence, or part of one, in data units, augmented but of the same length, name and features.

        ``index`` is that of the whole sequence.
        """
        raise NotImplementedError(f"{type(self).__name__} must define augmented(index, sequence)")


@dataclass(frozen=True)
class Scaler:
    """The affine map between data units and the model's: ``scaled = (data - mean) / std``.

    Args:
        mean: Shape () for one value shared by all features, or (features,).
        std: Like ``mean``, positive.
    """

    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    std: Tensor = field(default_factory=lambda: torch.ones(()))

    @classmethod
    def from_moments(cls, mean: Tensor, std: Tensor, unscaled: int = 0) -> Self:
        """Return the scaler of data with these moments; a constant feature is only centred.

        Args:
            mean: Shape () or (features,).
            std: Shape of ``mean``; below 1e-12 of the mean it is rounding.
            unscaled: Number of features after those that are left as they are.

        >>> Scaler.from_moments(torch.tensor([2.0, 3.0]), torch.tensor([0.5, 0.0]), unscaled=1)
        Scaler(mean=tensor([2., 3., 0.]), std=tensor([0.5000, 1.0000, 1.0000]))
        """
        std = torch.where(std > 1e-12 * mean.abs(), std, 1.0)
        if unscaled:
            mean, std = torch.cat([mean, mean.new_zeros(unscaled)]), torch.cat([std, std.new_ones(unscaled)])
        return cls(mean, std)

    def scale(self, x: Tensor) -> Tensor:
        """Return data of shape (..., features) in the model's units."""
        return (x - self.mean.to(x)) / self.std.to(x)

    def unscale(self, x: Tensor) -> Tensor:
        """Return model values of shape (..., features) in data units."""
        return x * self.std.to(x) + self.mean.to(x)
