"""Piano rolls: polyphonic music as the keys that sound in each time step."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from vrnn_lightning.data import ArchiveSplit, Modality, SequenceDataModule, Split, read_archive

__all__ = ["PianoRolls"]

KEYS = 88


class PianoRolls(SequenceDataModule):
    """A flat archive of piano rolls: 88 columns of 0 and 1, a row per time step; column c is the MIDI note 21 + c.

    The values are discrete, so the scaler is the identity, and the emission to choose is ``Bernoulli``. Splits are
    the archive's, as those of the polyphonic music of Boulanger-Lewandowski, Bengio and Vincent (ICML 2012,
    arXiv 1206.6392).

    Args:
        root: The ``.npz`` file: ``{split}_values`` (total steps, 88) and ``{split}_lengths`` (sequences,) for the
            splits train, valid and test. It may lie elsewhere when a checkpoint is used again.
        batch_size: Sequences per batch and process.
        num_workers: Processes that read ahead; 0 reads in the main process.
        seed: Seed of the order of the training batches.
        window: Steps per window in training, between which the state is carried; ``None`` trains on whole sequences.

    Raises:
        UserError: An option outside its range. From ``setup`` on: the file is missing or no such archive, or a value
            is neither 0 nor 1.

    >>> PianoRolls("jsb.npz").num_features
    88
    """

    modality: ClassVar[Modality] = "roll"

    def __init__(
        self, root: str, batch_size: int = 16, num_workers: int = 0, seed: int = 0, window: int | None = None
    ) -> None:
        super().__init__(num_features=KEYS, batch_size=batch_size, num_workers=num_workers, seed=seed, window=window)
        self.root = Path(root).expanduser()

    def sequences(self, split: Split) -> ArchiveSplit:
        """Return the rolls of a split, each of shape (steps, 88)."""
        found = read_archive(self.root, split, KEYS)
        found.refuse((found.values != 0) & (found.values != 1), "a roll holds 0 and 1: binarise it")
        return found

    def lengths(self, split: Split) -> list[int]:
        """Return the steps of each roll of a split."""
        found = self.split(split)
        assert isinstance(found, ArchiveSplit)
        return found.lengths
