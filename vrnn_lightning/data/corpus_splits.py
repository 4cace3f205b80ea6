"""Splits of a corpus that options and its layout select, and that a checkpoint remembers by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from vrnn_lightning.data.corpora import FSDD_TEST, Recording
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.errors import UserError

__all__ = ["PATTERNS", "CorpusSplits"]

PATTERNS = {"fsdd": FSDD_TEST}
"""Official splits by name. ``fsdd``: the first five recordings of each spoken digit and speaker."""

SHARE = 0.1
"""The share of files, or of speakers, of a random split without an option."""


class CorpusSplits:
    """The files of each split: selected once, then as the checkpoint has them.

    Args:
        test: Of the test split: a fraction of the files without an own split, an expression that is searched in paths,
            a key of ``PATTERNS``, or ``None`` for the files whose own split it is, or a tenth where there are none.
        val: The same for validation, out of the files outside the test split.
        seed: Of random splits.
        folder: The folder below which paths are, for messages.

    Raises:
        UserError: A fraction is out of its range, or an expression is not valid.
    """

    def __init__(self, test: float | str | None, val: float | str | None, seed: int, folder: Path) -> None:
        self.test, self.val = _parse_portion("test", test), _parse_portion("val", val)
        shares = [SHARE if portion is None else portion for portion in (self.test, self.val)]
        if sum(share for share in shares if isinstance(share, float)) >= 1:
            raise UserError(
                f"--data.test {shares[0]} and --data.val {shares[1]}: add up to 1 or more and leave no training file"
            )
        self.seed, self.folder = seed, folder
        self._members: dict[Split, list[str]] | None = None
        self._trained: dict[str, int] = {}
        self._has_resumed = self._has_warned = False

    def names(self, split: Split, recordings: Mapping[str, Recording], samples: Mapping[str, int]) -> list[str]:
        """Return the files of a split that are there.

        Args:
            split: Which split.
            recordings: All files that can be used, by path, in order.
            samples: The length of each, which tells it from another file of the same name.

        Raises:
            UserError: Another corpus than the checkpoint's holds a file that was trained on, or a split is impossible.
        """
        members = self._select_members(recordings)
        unknown: list[str] = []
        if self._has_resumed:
            known = {name for names in members.values() for name in names}
            unknown = [name for name in recordings if name not in known and recordings[name].split != "unused"]
        if unknown and not recordings.keys() & members["test"]:
            self._require_untrained(unknown, samples)
            own = [name for name in unknown if recordings[name].split == "test"]
            members, unknown = {**members, "test": own or unknown}, []
        if unknown and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(f"{self.folder}: {len(unknown)} files that are in no split of the checkpoint are left out")
        wanted = set(members[split])
        return [name for name in recordings if name in wanted]

    def state_dict(self, recordings: Mapping[str, Recording], samples: Mapping[str, int]) -> dict[str, Any]:
        """Return the files of each split, and the lengths of those that are not for the test."""
        members = self._select_members(recordings)
        seen = [name for name in [*members["train"], *members["val"]] if name in samples]
        state: dict[str, Any] = {"trained": self._trained | {name: samples[name] for name in seen}}
        return state | dict(members)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's splits."""
        self._members = {"train": state_dict["train"], "val": state_dict["val"], "test": state_dict["test"]}
        self._trained = state_dict["trained"]
        self._has_resumed = True

    def _select_members(self, recordings: Mapping[str, Recording]) -> dict[Split, list[str]]:
        """Return the files of each split: the checkpoint's, or those that options, layout and seed select."""
        if self._members is None:
            generator = torch.Generator().manual_seed(self.seed)
            test = self._select("test", self.test, recordings, generator)
            rest = {name: recording for name, recording in recordings.items() if name not in test}
            val = self._select("val", self.val, rest, generator)
            spare = [name for name in rest if name not in val and rest[name].split in ("val", "test")]
            if spare:
                rank_zero_warn(
                    f"{self.folder}: {len(spare)} files that the layout has for validation or test are in no split, "
                    "for --data.test and --data.val name others"
                )
            train = {name for name in rest if name not in val and rest[name].split in ("train", None)}
            selected: dict[Split, set[str]] = {"train": train, "val": val, "test": test}
            self._members = {split: [name for name in recordings if name in names] for split, names in selected.items()}
        return self._members

    def _select(
        self,
        split: Split,
        portion: float | re.Pattern[str] | None,
        recordings: Mapping[str, Recording],
        generator: torch.Generator,
    ) -> set[str]:
        """Return the files of a split, out of those that no other has."""
        if isinstance(portion, re.Pattern):
            matching = {name for name in recordings if portion.search(name)}
            if not matching:
                raise UserError(
                    f"--data.{split} {portion.pattern!r}: matches none of {len(recordings)} paths below {self.folder}, "
                    f"{next(iter(recordings))!r} for example"
                    if recordings
                    else f"--data.{split} {portion.pattern!r}: the test split leaves no file in {self.folder}"
                )
            return matching
        own = {name for name, recording in recordings.items() if recording.split == split}
        if portion is None and own:
            return own
        share = SHARE if portion is None else portion
        speakers = {name: each.speaker for name, each in recordings.items() if each.split in ("train", None)}
        groups = list(dict.fromkeys(speakers.values()))
        count = max(1, round(share * len(groups))) if share > 0 else 0
        drawn = {groups[i] for i in torch.randperm(len(groups), generator=generator)[:count].tolist()}
        return {name for name, speaker in speakers.items() if speaker in drawn}

    def _require_untrained(self, names: list[str], samples: Mapping[str, int]) -> None:
        """Raise if another corpus holds a file of the checkpoint under another path."""
        trained = {(PurePosixPath(name).stem, length): name for name, length in self._trained.items()}
        for name in names:
            known = trained.get((PurePosixPath(name).stem, samples[name]))
            if known is not None:
                raise UserError(
                    f"{self.folder / name}: seems to be {known}, which the model was trained on. Fix: "
                    f"choose --data.root so that {known} lies below it"
                )


def _parse_portion(option: str, value: float | str | None) -> float | re.Pattern[str] | None:
    """Return a checked fraction or a compiled expression."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            return re.compile(PATTERNS.get(value, value))
        except re.error as error:
            raise UserError(f"--data.{option} {value!r}: not a regular expression ({error})") from None
    if not 0 <= value < 1:
        raise UserError(f"--data.{option} {value}: a fraction of the files must be at least 0 and below 1")
    return float(value)
