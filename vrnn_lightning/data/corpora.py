"""Speech corpora in their published layouts: their files, speakers and splits, which a checkpoint remembers by name."""

from __future__ import annotations

import csv
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from vrnn_lightning.data.audio import AUDIO_SUFFIXES
from vrnn_lightning.data.folders import SHOWN, InvalidFiles, names_below
from vrnn_lightning.data.random_splits import RandomSplits, draw_groups
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, undamaged

__all__ = ["PATTERNS", "CorpusSplits", "Layout", "Recording", "find_recordings", "place_recordings"]

Layout = Literal["folder", "fsdd", "timit", "ljspeech", "librispeech", "vctk", "blizzard", "manifest"]
Place = Split | Literal["unused", "never"] | None

LJSPEECH_HELD = 250
"""Clips for validation and as many for the test, as ESPnet and others take them: the last of all."""
TIMIT_CORE = (
    "mdab0 mwbt0 felc0 mtas1 mwew0 fpas0 mjmp0 mlnt0 fpkt0 mlll0 mtls0 fjlm0 "
    "mbpm0 mklt0 fnlp0 mcmj0 mjdh0 fmgd0 mgrt0 mnjm0 fdhc0 mjln0 mpam0 fmld0"
)
"""The 24 speakers of TIMIT's core test set, as its documentation lists them."""
TIMIT_VAL = (
    "faks0 fdac1 fjem0 mgwt0 mjar0 mmdb1 mmdm2 mpdf0 fcmh0 fkms0 mbdg0 mbwm0 mcsh0 fadg0 fdms0 fedw0 mgjf0 "
    "mglb0 mrtk0 mtaa0 mtdt0 mthc0 mwjg0 fnmr0 frew0 fsem0 mbns0 mmjr0 mdls0 mdlf0 mdvc0 mers0 fmah0 fdrw0 "
    "mrcs0 mrjm4 fcal1 mmwh0 fjsj0 majc0 mjsw0 mreb0 fgjd0 fjmg0 mroa0 mteb0 mjfc0 mrjr0 fmml0 mrws1"
)
"""The 50 other speakers of its test folder on which Kaldi and most others validate."""
TIMIT_HELD_OUT: dict[str, Place] = dict.fromkeys(TIMIT_VAL.split(), "val")
TIMIT_HELD_OUT |= dict.fromkeys(TIMIT_CORE.split(), "test")
WORDS: dict[str, Split] = {
    "train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"
}  # fmt: skip
"""What a manifest may call a split."""

PATTERNS = {"fsdd": r"_[0-4]\.[^.]+$"}
"""Official splits by name. ``fsdd``: the first five recordings of each spoken digit and speaker."""

SHARE = 0.1
"""The share of files, or of speakers, of a random split without an option."""
Portion = float | re.Pattern[str] | None


@dataclass(frozen=True, slots=True)
class Recording:
    """A file of a corpus.

    Args:
        name: Its path below the corpus' folder, with forward slashes.
        speaker: The group that random splits keep together; the file itself where the speaker is not known.
        split: Its split, or ``None`` where splits are random. "unused" ones are in no split, unless an option selects
            them; "never" ones can't be selected.
    """

    name: str
    speaker: str
    split: Place = None


def find_recordings(root: Path, layout: Layout, invalid: InvalidFiles) -> list[Recording]:
    """Return the recordings of a corpus in the order of their paths, without hidden files.

    The root is the corpus' folder, or one above it; for the layout "manifest" the csv file. ``invalid`` decides about
    files that are named but missing, and about folders that can't be opened.

    Raises:
        UserError: There is no such folder or file, nothing in it is of the layout, a manifest is damaged, or files are
            missing and ``invalid`` does not skip them.
    """
    with explained(root, "--data.root"):
        if not root.exists():
            raise UserError(f"--data.root {root}: no such file or folder. Fix: check the path")
    if layout == "manifest":
        return _read_manifest(root, invalid)
    if not root.is_dir():
        fix = ", or set --data.layout manifest for a manifest" if root.suffix == ".csv" else ""
        raise UserError(f"--data.root {root}: is a file. Fix: give the folder that holds the recordings{fix}")
    names = names_below(root, AUDIO_SUFFIXES, invalid)
    if not names:
        raise UserError(f"--data.root {root}: holds no audio. Fix: give a folder of {', '.join(AUDIO_SUFFIXES)} files")
    recordings = place_recordings(layout, names)
    if not recordings:
        raise UserError(
            f"--data.root {root}: none of {len(names)} audio files, {names[0]} for example, has a path of "
            f"--data.layout {layout}. Fix: choose another layout, or order the files as docs/datasets.md shows"
        )
    if len(recordings) < len(names):
        rank_zero_warn(
            f"{root}: {len(names) - len(recordings)} of {len(names)} audio files are left out, which --data.layout "
            f"{layout} has no place for"
        )
    return [recording for recording in recordings if recording.split != "never"]


def place_recordings(layout: Layout, names: list[str]) -> list[Recording]:
    """Return the recordings among the paths of audio files, which are in order, with their speakers and splits."""
    matches = [match for match in map(re.compile(PATHS[layout]).search, names) if match]
    return [
        Recording(match.string, match.groupdict().get("speaker", match.string), split)
        for match, split in zip(matches, _assign_splits(layout, matches), strict=True)
    ]


def _assign_splits(layout: Layout, matches: list[re.Match[str]]) -> Sequence[Place]:
    if layout == "fsdd":
        return ["test" if re.search(PATTERNS["fsdd"], match.string) else None for match in matches]
    if layout == "timit":  # all speakers speak the sentences SA
        return [
            "never"
            if match["sentence"].lower() == "sa"
            else "train"
            if match["folder"].lower() == "train"
            else TIMIT_HELD_OUT.get(match["speaker"].lower(), "unused")
            for match in matches
        ]
    if layout == "ljspeech":  # of a part of the corpus the last twentieth, and the twentieth before it
        count = min(LJSPEECH_HELD, max(1, len(matches) // 20))
        test, val = len(matches) - count, len(matches) - 2 * count
        return ["test" if i >= test else "val" if i >= val else "train" for i in range(len(matches))]
    if layout == "librispeech":
        return [WORDS[match["set"]] for match in matches]
    if layout == "vctk":  # each utterance once: trimmed if it is there, and the first of two microphones
        has_trimmed = any(match["trimmed"] for match in matches)
        is_spare = [match["microphone"] == "2" or (has_trimmed and not match["trimmed"]) for match in matches]
        return ["never" if spare else None for spare in is_spare]
    return [None] * len(matches)


PATHS = {
    "folder": "",
    "fsdd": r"(?:^|/)\d_[^_/]+_\d+\.[^.]+$",
    "timit": r"(?i)(?:^|/)(?P<folder>train|test)/dr\d/(?P<speaker>[fm]\w{3}\d)/(?P<sentence>s[aix])\d+\."
    r"(?:wav|sph|flac|ogg)$",
    "ljspeech": r"(?:^|/)(?P<speaker>wavs)/[^/]+$",  # one speaker for all
    "librispeech": r"(?:^|/)(?P<set>train|dev|test)-(?:clean|other)(?:-\d+)?/(?P<speaker>\d+)/\d+/[^/]+$",
    "vctk": r"(?:^|/)wav48(?P<trimmed>_silence_trimmed)?/(?P<speaker>p\d+|s5)/(?P=speaker)_\d+"
    r"(?:_mic(?P<microphone>[12]))?\.[^.]+$",
    "blizzard": "",
}
"""Paths of the files of each layout but the manifest; speakers are apart in random splits."""


def _read_manifest(path: Path, invalid: InvalidFiles) -> list[Recording]:
    """Read a csv file with the columns path (below the manifest's folder) and optionally split and speaker."""
    fix = "write it in UTF-8, with a header and commas"
    with explained(path), undamaged(f"{path}: cannot be read as csv", fix), path.open(encoding="utf-8-sig") as file:
        header, *lines = list(csv.reader(file, strict=True)) or [[]]
    names = [name.strip() for name in header]
    if "path" not in names:
        raise UserError(f"{path}: has no column path, its first row is {','.join(names)[:80]!r}. Fix: add it")
    recordings: dict[str, Recording] = {}
    folder = path.parent.absolute().as_posix()
    for number, cells in enumerate(lines, start=2):
        if any(map(str.strip, cells)):
            recording = _read_row(path, number, dict(zip_longest(names, cells[: len(names)], fillvalue="")))
            place = posixpath.normpath(posixpath.join(folder, recording.name))  # one file may have several spellings
            if place in recordings:
                raise UserError(f"{path}: row {number} names {recording.name} again. Fix: keep one")
            recordings[place] = recording
    with explained(path):
        missing = {recording.name: place for place, recording in recordings.items() if not Path(place).is_file()}
    line = f"{path}: {len(missing)} of {len(recordings)} files that it names are missing: "
    line += ", ".join(list(missing)[:SHOWN]) + (" and more" if len(missing) > SHOWN else "")
    if len(missing) == len(recordings) or (missing and not invalid.skip):
        raise UserError(f"{line}. Fix: correct the list, or skip them by --data.skip_bad true")
    if missing:
        rank_zero_warn(f"{line}; they are skipped (--data.skip_bad true)")
    found = (recording for recording in recordings.values() if recording.name not in missing)
    return sorted(found, key=lambda recording: recording.name)


def _read_row(path: Path, number: int, cells: dict[str, str]) -> Recording:
    cells = {name: cell.strip() for name, cell in cells.items()}
    given, word = cells["path"], cells.get("split")
    if not given.lower().endswith(AUDIO_SUFFIXES):
        raise UserError(f"{path}: row {number} names {given!r}. Fix: name {', '.join(AUDIO_SUFFIXES)} files")
    if word is not None and word.lower() not in WORDS:
        raise UserError(f"{path}: row {number} has the split {word!r}. Fix: write train, valid or test")
    name = posixpath.normpath(given.replace("\\", "/"))
    return Recording(name, cells.get("speaker") or name, None if word is None else WORDS[word.lower()])


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
        if isinstance(portion, re.Pattern):
            matching = {name for name in recordings if portion.search(name)}
            if not matching:
                example = f", {next(iter(recordings))!r} for example" if recordings else ""
                raise UserError(
                    f"--data.{split} {portion.pattern!r}: matches none of {len(recordings)} paths below {self.folder}"
                    f"{example}. Fix: change the expression"
                )
            return matching
        own = {name for name, recording in recordings.items() if recording.split == split}
        if portion is None and own:
            return own
        speakers = {name: each.speaker for name, each in recordings.items() if each.split in ("train", None)}
        return draw_groups(speakers, SHARE if portion is None else portion, generator)


def _parse_portion(option: str, value: float | str | None) -> Portion:
    if not isinstance(value, str):
        return value
    try:
        return re.compile(PATTERNS.get(value, value))
    except re.error as error:
        raise UserError(f"--data.{option} {value!r}: is not a regular expression ({error}). Fix: correct it") from None
