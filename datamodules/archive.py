"""Real-valued sequences of any width from a flat archive."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from vrnn_lightning.data import (
    ArchiveSplit,
    FileDataModule,
    Modality,
    RandomSplitDataModule,
    RandomSplits,
    Split,
    archive_holds,
    read_archive,
    require,
)
from vrnn_lightning.errors import UserError

__all__ = ["Archive"]

STILL = 1e-9
"""Range of a column, next to the widest, below which it holds rounding errors alone."""


class Archive(RandomSplitDataModule, FileDataModule):
    r"""A flat archive of real-valued sequences: joint angles, cepstra, pen velocities and others.

    Splits are the archive's own. Where it has no ``valid``, or no ``test``, that split is a random part of the training
    sequences, which the checkpoint stores. Each feature is scaled by its own mean and standard deviation over the
    training split.

    Args:
        root: The ``.npz`` file: ``{split}_values`` (total steps, features) and ``{split}_lengths`` (sequences,) for the
            splits train, valid and test, and optionally ``{split}_is_first`` (total steps,), True where an episode
            begins within a sequence. It may lie elsewhere when a checkpoint is used again.
        features: Columns of the archive, the width of ``train_values``.
        exclude: Columns to leave out, counted from 0. A column that never changes has no density; a warning names it.
        val: Fraction of the training sequences for validation, where the archive has no ``valid``; at least one.
        test: Fraction of them for the test, where it has no ``test``; at least one unless it is 0.
        inputs: Columns of the archive's ``{split}_inputs`` (total steps, inputs): covariates, as they are.
        targets: Columns of ``{split}_targets`` (total steps, targets): what auxiliary losses predict, or NaN.
        unscaled: Columns that are not scaled, such as binary or categorical ones, counted from 0.
        options: The other options of ``FileDataModule``.

    Raises:
        UserError: An option outside its range. From ``setup`` on: the file is missing, no such archive or of another
            width, or holds values that are not finite.

    >>> Archive("vowels.npz", features=12, exclude=[0]).num_features
    11
    """

    modality: ClassVar[Modality] = "series"
    scaling: ClassVar[Literal["none", "scalar", "per_feature"]] = "per_feature"

    def __init__(
        self,
        root: str,
        features: int,
        exclude: list[int] | None = None,
        val: float = 0.1,
        test: float = 0.1,
        inputs: int = 0,
        targets: int = 0,
        unscaled: list[int] | None = None,
        **options: Any,
    ) -> None:
        require("features", features, 1)
        out, raw = _columns("exclude", exclude or [], features), _columns("unscaled", unscaled or [], features)
        if len(out) == features:
            raise UserError(f"--data.exclude {exclude}: excludes all {features} columns. Fix: keep at least one")
        super().__init__(root, num_features=features - len(out), **options)
        self.features = features
        self.num_inputs, self.num_targets = require("inputs", inputs, 0), require("targets", targets, 0)
        self.kept = [column for column in range(features) if column not in out]
        self.unscaled = [place for place, column in enumerate(self.kept) if column in raw]
        self._parts: dict[Split, float] = {"val": val, "test": test}
        RandomSplits(val, test, self.seed)  # checks the fractions

    def sequences(self, split: Split) -> ArchiveSplit:
        """Return the sequences of a split, each of shape (steps, features)."""
        if self.random_splits is None or split in self._own_splits:
            return self._train if split == "train" else self._read(split)
        digests = self.random_splits.names(split, self.sizes, self.root)
        places = sorted(place for digest in digests for place in self._places[digest])
        return self._train.take(np.array(places, dtype=np.int64))

    @cached_property
    def _own_splits(self) -> set[Split]:
        """The held-out splits that the archive has."""
        splits: tuple[Split, ...] = ("val", "test")
        return {split for split in splits if archive_holds(self.root, split)}

    @cached_property
    def random_splits(self) -> RandomSplits | None:
        """Random splits of the training sequences; ``None`` where the archive has all splits."""
        val, test = (0.0 if split in self._own_splits else part for split, part in self._parts.items())
        return RandomSplits(val, test, self.seed) if len(self._own_splits) < 2 else None

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        """The indices of the training sequences by a digest of their values, which does not depend on their order."""
        places: dict[str, list[int]] = {}
        for place, (start, end) in enumerate(self._train.bounds):
            values = self._train.values[start:end].astype("<f8")
            places.setdefault(hashlib.blake2b(values.tobytes(), digest_size=12).hexdigest(), []).append(place)
        return places

    @property
    def sizes(self) -> dict[str, int]:
        """The steps of the archive's training sequences, by digest."""
        steps = self._train.lengths
        return {digest: steps[places[0]] for digest, places in self._places.items()}

    @cached_property
    def _train(self) -> ArchiveSplit:
        train = self._read("train")
        spread = np.ptp(train.values.astype(np.float64), axis=0) if len(train.values) else np.ones(self.num_features)
        constant = [self.kept[i] for i in np.flatnonzero(spread <= STILL * spread.max())]
        if constant:
            out = sorted({*range(self.features)} - {*self.kept} | {*constant})
            rank_zero_warn(
                f"{self.root}: columns {', '.join(map(str, constant))} hardly change in training, so that their "
                f"density has no upper bound; leave them out: --data.exclude '{out}'"
            )
        return train

    def _read(self, split: Split) -> ArchiveSplit:
        """Return a split of the archive without the excluded columns."""
        fix = f". Fix: give its width as --data.features, which is {self.features}"
        more = {"inputs": self.num_inputs, "targets": self.num_targets}
        whole = read_archive(self.root, split, self.features, fix=fix, max_gb=self.max_gb, more=more)
        return replace(whole, values=whole.values[:, self.kept])


def _columns(option: str, given: Sequence[int], features: int) -> set[int]:
    for column in given:
        require(option, column, 0, features - 1)
    return set(given)
