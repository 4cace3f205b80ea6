"""Handwriting and drawings: pen strokes as offsets from point to point."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from vrnn_lightning.data import ArchiveSplit, Modality, Scaler, SequenceDataModule, Split, read_archive
from vrnn_lightning.errors import UserError

__all__ = ["Handwriting"]


class Handwriting(SequenceDataModule):
    r"""A flat archive of pen strokes: rows (dx, dy, lift), as in Chung et al. (2015, arXiv 1506.02216).

    A row is the pen's offset from the last point, and lift is 1 where the pen leaves the paper after this point, else
    0; y grows downward. One mean and one standard deviation, taken over dx and dy of the training rows together,
    scale both, which keeps the shape of a letter; lift stays as it is, for its likelihood is a mass.

    Args:
        root: The ``.npz`` file: ``{split}_values`` (total steps, 3) and ``{split}_lengths`` (sequences,) for the
            splits train, valid and test. It may lie elsewhere when a checkpoint is used again.
        max_steps: Leave longer sequences out of the training split, where a few long ones would make batches large.
            Validation and test keep all of theirs, so that figures compare. ``None`` leaves out none.
        batch_size: Sequences per batch and process.
        num_workers: Processes that read ahead; 0 reads in the main process.
        seed: Seed of the order of the training batches.
        window: Steps per window in training, between which the state is carried; ``None`` trains on whole sequences.

    Raises:
        UserError: An option outside its range. From ``setup`` on: the file is missing or no such archive, a lift is
            neither 0 nor 1, or all training sequences are longer than ``max_steps``.

    >>> Handwriting("kanji.npz").num_features
    3
    """

    modality: ClassVar[Modality] = "strokes"

    def __init__(
        self,
        root: str,
        max_steps: int | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        window: int | None = None,
    ) -> None:
        super().__init__(num_features=3, batch_size=batch_size, num_workers=num_workers, seed=seed, window=window)
        if max_steps is not None and max_steps < 1:
            raise UserError(f"--data.max_steps {max_steps}: must be at least 1")
        self.root = Path(root).expanduser()
        self.max_steps = max_steps

    def sequences(self, split: Split) -> ArchiveSplit:
        """Return the strokes of a split, each of shape (steps, 3)."""
        found = read_archive(self.root, split, 3)
        wrong = (found.values != 0) & (found.values != 1)
        wrong[:, :2] = False
        found.refuse(wrong, "expected rows (dx, dy, lift) whose lift is 0 or 1")
        if split != "train" or self.max_steps is None:
            return found
        kept = found.no_longer_than(self.max_steps)
        if len(kept) == 0 < len(found):
            raise UserError(
                f"--data.max_steps {self.max_steps}: all training sequences of {self.root} are longer, "
                f"the shortest has {min(found.lengths)} steps"
            )
        return kept

    def lengths(self, split: Split) -> list[int]:
        """Return the points of each sequence of a split."""
        return self._strokes(split).lengths

    def fit_scaler(self) -> Scaler:
        """Fit one mean and one std on dx and dy of the training rows; lift is left alone."""
        offsets = self._strokes("train").rows()[:, :2].astype(np.float64)
        mean, std = (float(offsets.mean()), float(offsets.std())) if offsets.size else (0.0, 1.0)
        std = std if std > 1e-12 * abs(mean) else 1.0
        return Scaler(torch.tensor([mean, mean, 0.0]).double(), torch.tensor([std, std, 1.0]).double())

    def _strokes(self, split: Split) -> ArchiveSplit:
        found = self.split(split)
        assert isinstance(found, ArchiveSplit)
        return found
