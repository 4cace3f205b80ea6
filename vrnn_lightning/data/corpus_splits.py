"""Splits of a corpus that options and its layout select, and that a checkpoint remembers by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from vrnn_lightning.data.corpora import FSDD_TEST, Recording
from vrnn_lightning.data.random_splits import RandomSplits, draw_groups
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.errors import UserError

__all__ = ["PATTERNS", "CorpusSplits"]

PATTERNS = {"fsdd": FSDD_TEST}
"""Official splits by name. ``fsdd``: the first five recordings of each spoken digit and speaker."""

SHARE = 0.1
"""The share of files, or of speakers, of a random split without an option."""
Portion = float | re.Pattern[str] | None


class CorpusSplits(RandomSplits):
    """The files of each split: selected once, then as the checkpoint has them.

    Args:
        test: Selects the test split: a fraction of the files without an own split, an expression that is searched in
            paths, a key of ``PATTERNS``, or ``None`` for the files whose own split it is, or a tenth where there are
            none.
        val: The same for validation, out of the files outside the test split.
        seed: Seed of random splits.
        folder: The folder below which paths are, for messages.
        find: Returns all files that can be used, by path, in order.

    Raises:
        UserError: A fraction is out of its range, or an expression is not valid.
    """

    noun = "files"
    kept_part = "stem"

    def __init__(
        self,
        test: float | str | None,
        val: float | str | None,
        seed: int,
        folder: Path,
        find: Callable[[], Mapping[str, Recording]],
    ) -> None:
        self._portions = [_parse_portion("test", test), _parse_portion("val", val)]
        of_test, of_val = (
            0.0 if isinstance(portion, re.Pattern) else SHARE if portion is None else portion
            for portion in self._portions
        )
        super().__init__(of_val, of_test, seed)
        self.folder, self.find = folder, find

    def state_dict(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Return the files of each split, and the lengths of those that are not for the test."""
        state = super().state_dict(sizes)
        return {"trained": state["trained"], **state["members"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's splits."""
        members = {split: state_dict[split] for split in ("train", "val", "test")}
        super().load_state_dict({"members": members, "trained": state_dict["trained"]})

    def own_splits(self) -> Mapping[str, str | None]:
        """Return the split in which the layout has each file."""
        return {name: recording.split for name, recording in self.find().items()}

    def draw(self, names: list[str]) -> dict[Split, set[str]]:
        """Return the files of each split that options, layout and seed select."""
        recordings = self.find()
        generator = torch.Generator().manual_seed(self.seed)
        test = self._select("test", self._portions[0], recordings, generator)
        rest = {name: recording for name, recording in recordings.items() if name not in test}
        val = self._select("val", self._portions[1], rest, generator)
        spare = [name for name in rest if name not in val and rest[name].split in ("val", "test")]
        if spare:
            rank_zero_warn(
                f"{self.folder}: {len(spare)} files that the layout has for validation or test are in no split, "
                "for --data.test and --data.val name others"
            )
        train = {name for name in rest if name not in val and rest[name].split in ("train", None)}
        return {"train": train, "val": val, "test": test}

    def _select(
        self, split: Split, portion: Portion, recordings: Mapping[str, Recording], generator: torch.Generator
    ) -> set[str]:
        """Return the files of a split, out of those that no other has."""
        if isinstance(portion, re.Pattern):
            matching = {name for name in recordings if portion.search(name)}
            if not matching:
                raise UserError(
                    f"--data.{split} {portion.pattern!r}: matches none of {len(recordings)} paths below {self.folder}, "
                    f"{next(iter(recordings))!r} for example. Fix: change the expression"
                    if recordings
                    else f"--data.{split} {portion.pattern!r}: the test split leaves no file. Fix: narrow --data.test"
                )
            return matching
        own = {name for name, recording in recordings.items() if recording.split == split}
        if portion is None and own:
            return own
        speakers = {name: each.speaker for name, each in recordings.items() if each.split in ("train", None)}
        return draw_groups(speakers, SHARE if portion is None else portion, generator)


def _parse_portion(option: str, value: float | str | None) -> Portion:
    """Return a fraction, or a compiled expression."""
    if not isinstance(value, str):
        return value
    try:
        return re.compile(PATTERNS.get(value, value))
    except re.error as error:
        raise UserError(f"--data.{option} {value!r}: is not a regular expression ({error}). Fix: correct it") from None
