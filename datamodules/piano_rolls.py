"""Piano rolls: polyphonic music as the keys that sound in each time step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch

from vrnn_lightning.batch import SequenceSample
from vrnn_lightning.data import (
    ArchiveSplit,
    AugmentedSequences,
    FileDataModule,
    InvalidFiles,
    Modality,
    Sequences,
    Split,
    explained,
    read_archive,
    require,
)
from vrnn_lightning.data.folders import SPLIT_NAMES, names_below
from vrnn_lightning.data.random_splits import draw_groups
from vrnn_lightning.data.rolls import KEYS, NOTE_LISTS, Notes, read_midi, read_note_lists
from vrnn_lightning.errors import UserError

__all__ = ["PianoRolls"]

MIDI = (".mid", ".midi")
FRACTION = 0.1
"""Files for validation, and for the test, by default."""


class PianoRolls(FileDataModule):
    """Piano rolls: 88 columns of 0 and 1, a row per time step; column c is the MIDI note 21 + c.

    The values are discrete, so the scaler is the identity, and the emission to choose is ``Bernoulli``. ``root`` is one
    of

    - a flat archive (``.npz``): ``{split}_values`` (total steps, 88) and ``{split}_lengths`` (sequences,) for the
      splits train, valid and test;
    - a pickle (``.pickle``, ``.pkl``) or JSON (``.json``) of the polyphonic music of Boulanger-Lewandowski, Bengio and
      Vincent (ICML 2012, arXiv 1206.6392): under "train", "valid" and "test" a list of sequences, each a list of
      steps, each a list of MIDI notes. A pickle is read as plain data; nothing that it names is run;
    - a folder of MIDI files, searched with its sub-folders (needs ``pip install 'vrnn-lightning[music]'``); hidden
      files are skipped. Each file is a sequence, all instruments but drums together; a note begins and ends at the
      nearest step, lasts at least one, and where a key is struck again at once it sounds on. Tempo does not matter.
      Folders train, valid (or val) and test right below the root split the files; without them splits are drawn.

    A checkpoint keeps the split of each MIDI file by its content: a file that was trained on is never tested, under
    any name or folder, and copies of one file share a split. Files that the checkpoint does not know are left out,
    unless none of its test files is there: then the folder is another corpus, and they are the test split.

    Args:
        root: The file or folder. It may lie elsewhere when a checkpoint is used again.
        resolution: Steps per quarter note, in which MIDI files are read, and samples of the model written as MIDI.
        sustain: Let notes of MIDI files sound for as long as the sustain pedal is down; else it is ignored.
        transpose: Shift each training sequence by up to so many semitones, up or down, redrawn every epoch from
            those shifts that leave every note of the sequence on the keyboard, each as likely.
        test: Fraction of the MIDI files that is drawn with ``seed`` for the test, at least one unless it is 0; ``None``
            is a tenth. Where the data bring their splits it must be ``None``.
        val: Fraction for validation of the files outside the test split.
        skip_bad: Skip and count invalid MIDI files instead of stopping at the first.
        download: Fetch the JSB chorales in quarter notes (under 1 MB) as an archive, where ``root`` does not exist.
        batch_size: Sequences per batch and process.
        max_quarters: Longest MIDI file, in quarter notes: later times come from damage.
        options: The other options of ``FileDataModule``.

    Raises:
        UserError: An option outside its range, or one without effect on the data at ``root``. From ``setup`` on:
            there is no such file or folder, it can't be read, or holds something else than 0 and 1 or keys of a piano.

    >>> PianoRolls("jsb.npz").num_features
    88
    """

    modality: ClassVar[Modality] = "roll"
    run_options: ClassVar[frozenset[str]] = FileDataModule.run_options | {"skip_bad", "download", "max_quarters"}
    dataset: ClassVar[str] = "jsb"

    def __init__(
        self,
        root: str,
        resolution: int = 4,
        sustain: bool = False,
        transpose: int = 0,
        test: float | None = None,
        val: float | None = None,
        skip_bad: bool = False,
        download: bool = False,
        batch_size: int = 16,
        *,
        max_quarters: int = 20_000,
        **options: Any,
    ) -> None:
        super().__init__(root, num_features=KEYS, batch_size=batch_size, **options)
        self.resolution = require("resolution", resolution, 1, 960)
        self.transpose = require("transpose", transpose, 0, KEYS - 1)
        self.max_quarters = require("max_quarters", max_quarters, 1, 10**9)
        self.test, self.val = require("test", test, 0, below=1), require("val", val, 0, below=1)
        self.sustain, self.skip_bad = sustain, skip_bad
        self._members: dict[Split, list[str]] | None = None
        self._notes: dict[str, Notes] = {}

    def setup(self, stage: str) -> None:
        """Look at the data early, so that mistakes in them are reported before training starts."""
        if stage == "fit":
            self._raise_if_idle()
        if stage != "fit" and self.root.is_dir():
            self._names()  # splits may be a checkpoint's, which is loaded after setup
        else:
            super().setup(stage)

    def sequences(self, split: Split) -> Sequences:
        """Return the rolls of a split, each of shape (steps, 88)."""
        rolls = self._rolls(split)
        if split != "train" or not self.transpose:
            return rolls
        reach = [_reach(rolls[i]) for i in range(len(rolls))]
        return _Transposed(sequences=rolls, seed=self.seed, most=self.transpose, reach=reach)

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler and the MIDI files of each split, by the digests of their contents."""
        members = self._known_members() if self.root.is_dir() else self._members or {}
        return super().state_dict() | {"members": dict(members)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        members = state_dict.get("members") or {}
        self._members = {split: list(members.get(split, ())) for split in SPLIT_NAMES}

    def _rolls(self, split: Split) -> ArchiveSplit | _Songs:
        suffix = self.root.suffix.lower()
        if not self.root.exists():
            raise UserError(
                f"--data.root {self.root}: no such file or folder. Fix: check the path, or set --data.download true "
                "to put the JSB chorales there"
            )
        if self.root.is_dir():
            names = self._members_of(split)
            return _Songs(names, [self._song(name) for name in names])
        if suffix in MIDI:
            raise UserError(
                f"--data.root {self.root}: is a single MIDI file. Fix: give the folder that holds it and others"
            )
        if suffix in NOTE_LISTS:
            return read_note_lists(self.root, split, self.max_gb)
        rolls = read_archive(self.root, split, KEYS, max_gb=self.max_gb)
        rolls.raise_if((rolls.values != 0) & (rolls.values != 1), "binarise the rolls to 0 and 1")
        return rolls

    def _raise_if_idle(self) -> None:
        """Raise if an option would do nothing; only in training, as a checkpoint brings its own options."""
        if not self.root.exists():
            return
        idle, reason = {"test": self.test is not None, "val": self.val is not None}, "is not a folder of MIDI files"
        if not self.root.is_dir():
            idle |= {"sustain": self.sustain, "skip_bad": self.skip_bad}
        elif self._folders:
            reason = f"has folders that split it ({', '.join(self._folders)})"
        else:
            return
        for option, is_given in idle.items():
            if is_given:
                raise UserError(f"--data.{option}: does nothing, {self.root} {reason}. Fix: leave the option out")

    def _song(self, name: str) -> Notes:
        if name not in self._notes:
            self._notes[name] = read_midi(
                self.root / name, self.resolution, self.sustain, self.max_quarters, self.max_gb
            )
        return self._notes[name]

    def _members_of(self, split: Split) -> list[str]:
        members, digests = self._known_members(), self._digests
        if self._folders:
            names = self._in_folder(split)
            if not names:
                raise UserError(
                    f"--data.root {self.root}: its folders {' and '.join(self._folders)} split it, but no MIDI file is "
                    f"in {' or '.join(SPLIT_NAMES[split])}. Fix: put some there"
                )
            trained = {*members["train"], *members["val"]} if split == "test" else set()
            for name in names:
                if digests[name] in trained:
                    raise UserError(f"{self.root / name}: is a copy of a file outside the test split. Fix: remove it")
            return names
        known = {digest for part in members.values() for digest in part}
        unknown = [name for name in digests if digests[name] not in known]
        if unknown and not set(digests.values()).intersection(members["test"]):
            members, unknown = {**members, "test": [digests[name] for name in unknown]}, []
        if unknown:
            self._warnings.warn(
                f"{self.root}: {len(unknown)} files that are in no split of the checkpoint are left out"
            )
        wanted = set(members[split])
        names = [name for name in digests if digests[name] in wanted]
        if not names:
            raise UserError(
                f"--data.root {self.root}: the {split} split is empty: it has {len(set(digests.values()))} different "
                "MIDI files. Fix: add some, or change --data.test and --data.val"
            )
        return names

    def _known_members(self) -> dict[Split, list[str]]:
        """Return the digests of each split's files: the checkpoint's with those in its folder, or drawn once."""
        digests = self._digests
        if self._folders:
            here = {split: [digests[name] for name in self._in_folder(split)] for split in SPLIT_NAMES}
            known = self._members or {}
            return {split: list(dict.fromkeys([*known.get(split, ()), *here[split]])) for split in SPLIT_NAMES}
        if self._members is None:
            generator = torch.Generator().manual_seed(self.seed)
            splits: dict[Split, list[str]] = {"train": list(dict.fromkeys(digests.values()))}
            held_out: dict[Split, float | None] = {"test": self.test, "val": self.val}
            for split, fraction in held_out.items():
                rest = splits["train"]
                share = FRACTION if fraction is None else fraction
                drawn = draw_groups({digest: digest for digest in rest}, share, generator)
                splits[split] = [digest for digest in rest if digest in drawn]
                splits["train"] = [digest for digest in rest if digest not in drawn]
            self._members = splits
        return self._members

    @cached_property
    def _folders(self) -> list[str]:
        return [name for names in SPLIT_NAMES.values() for name in names if (self.root / name).is_dir()]

    def _in_folder(self, split: Split) -> list[str]:
        folders = [name for name in SPLIT_NAMES[split] if name in self._folders]
        if len(folders) > 1:
            raise UserError(f"--data.root {self.root}: has both {' and '.join(folders)}. Fix: rename one of them")
        return [name for name in self._digests if name.partition("/")[0] in folders]

    @cached_property
    def _digests(self) -> dict[str, str]:
        """Digests of the MIDI files' contents, by their paths below the root, in the order of these."""
        names = self._names()
        if self._folders:
            inside = [name for name in names if name.partition("/")[0] in self._folders]
            if len(inside) < len(names):
                outside = len(names) - len(inside)
                self._warnings.warn(f"{self.root}: {outside} files outside {', '.join(self._folders)} are left out")
            names = inside
        return InvalidFiles(self.skip_bad).read_all(((name, partial(self._digest, name)) for name in names), self.root)

    def _digest(self, name: str) -> str:
        with explained(self.root / name):
            digest = hashlib.sha256((self.root / name).read_bytes()).hexdigest()[:32]
            if self.skip_bad:  # before splits are drawn, so that no split is made of invalid files alone
                self._song(name)
            return digest

    def _names(self) -> list[str]:
        names = names_below(self.root, MIDI)
        if not names:
            raise UserError(f"--data.root {self.root}: holds no MIDI files. Fix: give a folder of {' or '.join(MIDI)}")
        return names


@dataclass(frozen=True)
class _Songs:
    """MIDI files as rolls, by their paths below the root."""

    names: list[str]
    notes: list[Notes]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> SequenceSample:
        return self.window(index, 0, self.notes[index].steps)

    def window(self, index: int, first: int, last: int, /) -> SequenceSample:
        roll = self.notes[index].roll(first, last)
        return SequenceSample(torch.from_numpy(roll.astype(np.float32)), name=self.names[index])

    @property
    def lengths(self) -> list[int]:
        return [notes.steps for notes in self.notes]


@dataclass(frozen=True, kw_only=True)
class _Transposed(AugmentedSequences):
    """Rolls that are shifted along the keyboard, by another interval of at most ``most`` semitones in each epoch.

    ``reach`` is the lowest and the highest key of each roll.
    """

    most: int
    reach: list[tuple[int, int]]

    def augmented(self, index: int, sequence: SequenceSample) -> SequenceSample:
        low, high = self.reach[index]
        random = np.random.default_rng((self.seed, self.epoch, index))
        shift = int(random.integers(-min(self.most, low), min(self.most, KEYS - 1 - high), endpoint=True))
        return replace(sequence, x=sequence.x.roll(shift, dims=1))  # silence beyond the reach: nothing comes round


def _reach(roll: SequenceSample) -> tuple[int, int]:
    """Return the lowest and the highest key that sound, those of the whole keyboard where none does."""
    keys = roll.x.any(0).nonzero().flatten().tolist()
    return (keys[0], keys[-1]) if keys else (0, KEYS - 1)
