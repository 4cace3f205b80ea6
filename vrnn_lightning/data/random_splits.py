"""Splits that are drawn from a seed and that a checkpoint remembers by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import WarningCache

from vrnn_lightning.compatibility import keep_old_hooks
from vrnn_lightning.data.datamodule import SequenceDataModule, require
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.errors import UserError
from vrnn_lightning.trust import require_types

__all__ = ["RandomSplitDataModule", "RandomSplits", "draw_groups", "require_untrained"]


class RandomSplits:
    """Splits of sequences by name: drawn once, then those of the checkpoint.

    A sequence that was trained on is never tested, whatever the folder holds later: sequences that the checkpoint does
    not know are left out, unless none of its test sequences is there. Then the folder holds other data, all of which is
    for the test, and a file of the name and size of one that was trained on raises an error.

    Args:
        val: Fraction for validation; at least one sequence unless it is 0.
        test: Fraction for the test split.
        seed: Seed of the draw.

    Raises:
        UserError: A fraction outside its range.
    """

    noun: ClassVar[str] = "sequences"
    kept_part: ClassVar[Literal["name", "stem"]] = "name"
    """The part of a path that a file keeps in another folder."""

    def __init__(self, val: float, test: float, seed: int) -> None:
        for option, value in (("val", val), ("test", test)):
            require(option, value, 0, below=1)
        if val + test >= 1:
            raise UserError(f"--data.val {val} and --data.test {test}: leave nothing to train on. Fix: lower them")
        self.val, self.test, self.seed = val, test, seed
        self._members: dict[Split, list[str]] | None = None
        self._trained: dict[str, int] = {}
        self._has_resumed = False
        self._warnings = WarningCache()

    def names(self, split: Split, sizes: Mapping[str, int], root: object) -> list[str]:
        """Return the present sequences of a split, in the order of ``sizes``; messages call their folder ``root``.

        ``sizes`` has all present sequences by name, with a size that tells a sequence from another of the same name.

        Raises:
            UserError: Data that the checkpoint does not know hold a sequence that it was trained on.
        """
        members = self._members_of(sizes)
        unknown: list[str] = []
        if self._has_resumed:
            known, own = {name for names in members.values() for name in names}, self.own_splits()
            unknown = [name for name in sizes if name not in known and own.get(name) != "unused"]
        if unknown and not sizes.keys() & members["test"]:
            require_untrained({name: sizes[name] for name in unknown}, self._trained, root, self.kept_part)
            test = [name for name in unknown if own.get(name) == "test"]
            members, unknown = {**members, "test": test or unknown}, []
        if unknown:
            self._warnings.warn(
                f"{root}: {len(unknown)} {self.noun} that are in no split of the checkpoint are left out"
            )
        wanted = set(members[split])
        return [name for name in sizes if name in wanted]

    def state_dict(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Return the names of each split, and the sizes of the training and validation sequences."""
        members = self._members_of(sizes)
        seen = [name for name in [*members["train"], *members["val"]] if name in sizes]
        return {"members": dict(members), "trained": self._trained | {name: sizes[name] for name in seen}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's splits."""
        require_types(state_dict, self, members=dict, trained=dict)
        self._members, self._trained = state_dict["members"], state_dict["trained"]
        self._has_resumed = True

    def draw(self, names: list[str]) -> dict[Split, set[str]]:
        """Draw the names of each split."""
        generator = torch.Generator().manual_seed(self.seed)
        order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        test, val = (max(1, round(part * len(names))) if part else 0 for part in (self.test, self.val))
        rest = order[test:]
        return {"train": set(rest[val:]), "val": set(rest[:val]), "test": set(order[:test])}

    def own_splits(self) -> Mapping[str, str | None]:
        """Return the splits that the data give to sequences, by name; those that are "unused" stay out of all."""
        return {}

    def _members_of(self, names: Iterable[str]) -> dict[Split, list[str]]:
        if self._members is None:
            present = list(names)
            splits = self.draw(present)
            self._members = {split: [name for name in present if name in drawn] for split, drawn in splits.items()}
        return self._members


def require_untrained(
    unknown: Mapping[str, int], trained: Mapping[str, int], root: object, kept_part: Literal["name", "stem"] = "name"
) -> None:
    """Raise if unknown sequences, given as sizes by name, hold one that was trained on, under another path."""
    places = {(getattr(PurePosixPath(name), kept_part), size): name for name, size in trained.items()}
    for name, size in unknown.items():
        known = places.get((getattr(PurePosixPath(name), kept_part), size))
        if known is not None:
            raise UserError(
                f"{root}: {name} seems to be {known}, which the model was trained on. Fix: "
                f"choose --data.root so that {known} lies below it"
            )


def draw_groups(names: Mapping[str, str], share: float, generator: torch.Generator) -> set[str]:
    """Draw a share of the groups of names, at least one unless it is 0, and return the names in them."""
    groups = list(dict.fromkeys(names.values()))
    count = max(1, round(share * len(groups))) if share > 0 else 0
    drawn = {groups[i] for i in torch.randperm(len(groups), generator=generator)[:count].tolist()}
    return {name for name, group in names.items() if group in drawn}


class RandomSplitDataModule(SequenceDataModule):
    """Base class of datamodules whose splits are random where the data have none of their own.

    A subclass defines :attr:`random_splits` and :attr:`sizes`, and reads the :meth:`RandomSplits.names` of a split in
    ``sequences``.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        keep_old_hooks(cls, {"drawn": "random_splits"})

    @property
    def random_splits(self) -> RandomSplits | None:
        """The random splits; ``None`` where the data have their own."""
        raise NotImplementedError(f"{type(self).__name__} must define random_splits")

    drawn = random_splits

    @property
    def sizes(self) -> Mapping[str, int]:
        """All sequences whose split is random, as :meth:`RandomSplits.names` takes them."""
        raise NotImplementedError(f"{type(self).__name__} must define sizes")

    def setup(self, stage: str) -> None:
        """Make the sequences of a stage, so that errors in them are raised before training starts."""
        if stage == "fit" or self.random_splits is None:
            super().setup(stage)
        else:
            len(self.sizes)  # only that: the splits may be a checkpoint's, which is loaded after setup

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler and the random splits."""
        return super().state_dict() | (self.random_splits.state_dict(self.sizes) if self.random_splits else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's scaler and splits."""
        super().load_state_dict(state_dict)
        if "trained" in state_dict and self.random_splits:
            self.random_splits.load_state_dict(state_dict)
            self._splits.clear()  # those that setup found were drawn again
