"""Speech corpora as they come: which files belong to them, who speaks, and which split each file is in."""

from __future__ import annotations

import csv
import os
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from vrnn_lightning.data.audio import AUDIO_SUFFIXES
from vrnn_lightning.data.invalid_files import SHOWN, InvalidFiles
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.errors import UserError

__all__ = ["FSDD_TEST", "LAYOUTS", "Layout", "Recording", "find_recordings"]

Layout = Literal["folder", "fsdd", "timit", "ljspeech", "librispeech", "vctk", "blizzard", "manifest"]

FSDD_TEST = r"_[0-4]\.[^.]+$"
"""The official test split of the spoken digits: the first five recordings of each digit and speaker."""
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
WORDS: dict[str, Split] = {
    "train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"
}  # fmt: skip
"""What a manifest may call a split."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A file of a corpus.

    Args:
        name: Its path below the corpus' folder, with forward slashes.
        speaker: Whom splits keep together where they are drawn; the file itself where nobody is known.
        split: The split it is in, or ``None`` where splits are drawn. "unused" ones are in none, but may be asked for;
            "never" ones may not.
    """

    name: str
    speaker: str
    split: Split | Literal["unused", "never"] | None = None


def find_recordings(root: Path, layout: Layout, bad: InvalidFiles) -> list[Recording]:
    """Return the recordings of a corpus in the order of their paths; hidden files are passed over.

    Args:
        root: The corpus' folder, or one above it; for "manifest" the csv file.
        layout: How the corpus is laid out.
        bad: What becomes of files that are named but missing, and of folders that can't be opened.

    Raises:
        UserError: There is no such folder or file, nothing in it is of the layout, a manifest is damaged, or files are
            missing that are not to be skipped.
    """
    try:
        there = root.exists()
    except OSError as error:
        raise UserError(f"--data.root {root}: cannot be opened ({error.strerror})") from None
    if not there:
        raise UserError(f"--data.root {root}: no such {'file' if layout == 'manifest' else 'folder'}")
    if layout == "manifest":
        return _manifest(root, bad)
    if not root.is_dir():
        fix = "; for a manifest set --data.layout manifest" if root.suffix == ".csv" else ""
        raise UserError(f"--data.root {root}: is a file; give the folder that holds the recordings{fix}")
    names = _audio_below(root, bad)
    if not names:
        raise UserError(f"--data.root {root}: no audio in it; expected {', '.join(AUDIO_SUFFIXES)} files")
    recordings = LAYOUTS[layout](root, names, bad)
    if not recordings:
        raise UserError(
            f"--data.root {root}: none of {len(names)} audio files lies as --data.layout {layout} says, "
            f"{SHAPES[layout]}; the first is {names[0]}"
        )
    if len(recordings) < len(names):
        rank_zero_warn(
            f"{root}: {len(names) - len(recordings)} of {len(names)} audio files are left out, which --data.layout "
            f"{layout} has no place for"
        )
    return [recording for recording in recordings if recording.split != "never"]


def _folder(root: Path, names: list[str], bad: InvalidFiles) -> list[Recording]:
    return [Recording(name, name) for name in names]


def _fsdd(root: Path, names: list[str], bad: InvalidFiles) -> list[Recording]:
    """Place 3_jackson_17.wav: digit, speaker, take. Speakers are in every split."""
    found = [name for name in names if re.search(r"(?:^|/)\d_[^_/]+_\d+\.[^.]+$", name)]
    return [Recording(name, name, "test" if re.search(FSDD_TEST, name) else None) for name in found]


def _timit(root: Path, names: list[str], bad: InvalidFiles) -> list[Recording]:
    """Place TRAIN/DR1/FCJF0/SX127.WAV; the two sentences SA that all speak are in no split."""
    pattern = re.compile(r"(?:^|/)(train|test)/dr\d/([fm]\w{3}\d)/(s[aix])\d+\.(?:wav|sph|flac|ogg)$", re.IGNORECASE)
    known: dict[str, Split] = dict.fromkeys(TIMIT_VAL.split(), "val")
    known |= dict.fromkeys(TIMIT_CORE.split(), "test")
    found = []
    for name in names:
        if match := pattern.search(name):
            folder, speaker, kind = (word.lower() for word in match.groups())
            split: Split | Literal["unused", "never"] = "train" if folder == "train" else "unused"
            if folder == "test" and speaker in known:
                split = known[speaker]
            found.append(Recording(name, speaker, "never" if kind == "sa" else split))
    return found


def _ljspeech(root: Path, names: list[str], bad: InvalidFiles) -> list[Recording]:
    """Place wavs/LJ001-0001.wav: of all clips in order, the last 250 are the test, the 250 before them validation.

    Of a part of the corpus with fewer than 5000 clips, the last twentieth and the one before it.
    """
    clips = [name for name in names if re.search(r"(?:^|/)wavs/[^/]+$", name)]
    for folder in sorted({posixpath.dirname(posixpath.dirname(name)) for name in clips}):
        table = root / folder / "metadata.csv"
        if _is_file(table):
            there = {posixpath.splitext(name)[0] for name in clips}
            rows = _text(table).splitlines()
            named = [posixpath.join(folder, "wavs", row.partition("|")[0].strip()) for row in rows if row.strip()]
            _refuse_missing(table, len(named), [f"{name}.wav" for name in named if name not in there], bad)
    held = min(LJSPEECH_HELD, max(1, len(clips) // 20))
    test, val = set(clips[-held:]), set(clips[-2 * held : -held])
    return [Recording(name, "LJ", "test" if name in test else "val" if name in val else "train") for name in clips]


def _librispeech(root: Path, names: list[str], bad: InvalidFiles) -> list[Recording]:
    """Place train-clean-100/19/198/19-198-0001.flac: set, speaker, chapter."""
    pattern = re.compile(r"(?:^|/)(train|dev|test)-(?:clean|other)(?:-\d+)?/(\d+)/\d+/[^/]+$")
    matches = ((name, pattern.search(name)) for name in names)
    return [Recording(name, match[2], WORDS[match[1]]) for name, match in matches if match]


def _vctk(root: Path, names: list[str], bad: InvalidFiles) -> list[Recording]:
    """Place wav48/p225/p225_001.wav or wav48_silence_trimmed/p225/p225_001_mic1.flac.

    Each utterance is used once: where the trimmed folder is there, from it, and of two microphones the first.
    """
    pattern = re.compile(r"(?:^|/)(wav48(?:_silence_trimmed)?)/(p\d+|s5)/\2_\d+(?:_mic([12]))?\.[^.]+$")
    matches = [(name, match) for name in names if (match := pattern.search(name))]
    trimmed = any(match[1] != "wav48" for _, match in matches)
    return [
        Recording(name, match[2], "never" if match[3] == "2" or (trimmed and match[1] == "wav48") else None)
        for name, match in matches
    ]


LAYOUTS: dict[str, Callable[[Path, list[str], InvalidFiles], list[Recording]]] = {
    "folder": _folder,
    "fsdd": _fsdd,
    "timit": _timit,
    "ljspeech": _ljspeech,
    "librispeech": _librispeech,
    "vctk": _vctk,
    "blizzard": _folder,
}
"""How each layout but the manifest places the paths of audio files."""

SHAPES = {
    "fsdd": "as 3_jackson_17.wav",
    "timit": "as TRAIN/DR1/FCJF0/SX127.WAV",
    "ljspeech": "as wavs/LJ001-0001.wav",
    "librispeech": "as train-clean-100/19/198/19-198-0001.flac",
    "vctk": "as wav48_silence_trimmed/p225/p225_001_mic1.flac",
}


def _manifest(path: Path, bad: InvalidFiles) -> list[Recording]:
    """Read a csv file with the columns path (below the manifest's folder) and, if wanted, split and speaker."""
    if not _is_file(path):
        raise UserError(f"--data.root {path}: is a folder; --data.layout manifest takes the csv file itself")
    try:
        rows = list(csv.reader(_text(path).splitlines(), strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as csv ({error}); write it with a header and commas") from None
    header = [cell.strip() for cell in rows[0]] if rows else []
    if "path" not in header:
        raise UserError(f"{path}: has no column path; its first row is {','.join(header)[:80]!r}")
    found: dict[str, tuple[int, Recording]] = {}
    rows_of: dict[str, int] = {}
    above = path.parent.absolute().as_posix()
    for number, row in enumerate(rows[1:], start=2):
        if any(cell.strip() for cell in row):
            recording = _row(
                path, number, dict(zip_longest(header, (cell.strip() for cell in row[: len(header)]), fillvalue=""))
            )
            place = posixpath.normpath(posixpath.join(above, recording.name))  # however a row spells it
            if place in rows_of:
                raise UserError(f"{path}: row {number} names {recording.name} again, after row "
                                f"{rows_of[place]}; keep one of them")  # fmt: skip
            rows_of[place] = number
            found[recording.name] = (number, recording)
    if not found:
        raise UserError(f"{path}: names no files; write a row for each")
    folder = path.parent
    missing = [name for name in found if not _is_file(folder / name)]
    if bad.skip and len(missing) == len(found):
        raise UserError(
            f"{path}: none of {len(found)} files that it names is there, {missing[0]} for one; fix the list"
        )
    _refuse_missing(path, len(found), missing, bad)
    gone = set(missing)
    return [recording for name, (_, recording) in sorted(found.items()) if name not in gone]


def _row(path: Path, number: int, cells: dict[str, str]) -> Recording:
    given = cells.get("path", "")
    if not given:
        raise UserError(f"{path}: row {number} has no path; write one or remove the row")
    if not given.lower().endswith(AUDIO_SUFFIXES):
        raise UserError(f"{path}: row {number} names {given}; expected {', '.join(AUDIO_SUFFIXES)} files")
    word = cells.get("split", "").lower() if "split" in cells else None
    if word is not None and word not in WORDS:
        raise UserError(f"{path}: row {number} has the split {word!r}; expected train, valid or test")
    name = posixpath.normpath(given.replace("\\", "/"))
    return Recording(name, cells.get("speaker") or name, None if word is None else WORDS[word])


def _refuse_missing(path: Path, total: int, missing: list[str], bad: InvalidFiles) -> None:
    """Raise if files that a list names are missing, or skip them."""
    if not missing:
        return
    listed = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
    line = f"{path}: {len(missing)} of {total} files that it names are missing: {listed}"
    if not bad.skip:
        raise UserError(f"{line}; fix the list, or skip them by --data.skip_bad true")
    rank_zero_warn(f"{line}; they are skipped (--data.skip_bad true)")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _text(path: Path) -> str:
    """Return the text of a list of files."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); fix its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None


def _audio_below(root: Path, bad: InvalidFiles) -> list[str]:
    """Return the paths of all audio files below a folder, relative and with forward slashes, sorted."""

    def raise_error(error: OSError) -> None:
        with bad.tolerated():
            raise UserError(f"{error.filename}: cannot be opened ({error.strerror}); fix its permissions") from None

    found: list[str] = []
    for folder, _, files in os.walk(root, onerror=raise_error):
        below = Path(folder).relative_to(root).as_posix()
        audio = (file for file in files if file.lower().endswith(AUDIO_SUFFIXES) and not file.startswith("."))
        found += [posixpath.normpath(posixpath.join(below, file)) for file in audio]
    return sorted(found)
