"""Music as piano rolls: MIDI files, both ways, and lists of notes."""

from __future__ import annotations

import io
import json
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrnn_lightning.data.archives import ArchiveSplit
from vrnn_lightning.data.folders import SPLIT_NAMES
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.data.unpickling import unpickle
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import MAX_GB, explained, require_size, undamaged

__all__ = ["KEYS", "LOWEST", "NOTE_LISTS", "Notes", "read_midi", "read_note_lists", "roll_sound", "write_midi"]

KEYS = 88
LOWEST = 21
"""MIDI's number of a piano's lowest key; that of the highest is 108."""
NOTE_LISTS = (".json", ".pickle", ".pkl")
"""Suffixes of files of lists of notes."""
DRUMS = 9
"""General MIDI's channel of drums, counted from 0: its notes are not pitches."""
SUSTAIN = 64
"""The controller of the sustain pedal, which is down from a value of 64 on."""
MAX_QUARTERS = 20_000
"""Default of the most quarter notes of a file: more come from a damaged time stamp."""


@dataclass(frozen=True)
class Notes:
    """The notes of a piece of so many time steps.

    ``spans`` are key from 0 to 87, first step and one past the last step of each note, shape (notes, 3).
    """

    steps: int
    spans: NDArray[np.int64]

    def roll(self, first: int = 0, last: int | None = None) -> NDArray[np.uint8]:
        """Return steps ``first`` to ``last - 1`` as 0 and 1, shape (steps, 88)."""
        last = self.steps if last is None else min(last, self.steps)
        begun = np.zeros((last - first + 1, KEYS), dtype=np.int32)
        key, start, end = self.spans[(self.spans[:, 1] < last) & (self.spans[:, 2] > first)].T
        np.add.at(begun, ((start - first).clip(0), key), 1)
        np.add.at(begun, (end.clip(max=last) - first, key), -1)
        sounding: NDArray[np.uint8] = (begun[:-1].cumsum(0) > 0).astype(np.uint8)
        return sounding


def read_midi(
    path: Path, resolution: int, sustain: bool = False, max_quarters: int = MAX_QUARTERS, max_gb: float = MAX_GB
) -> Notes:
    """Read the notes of a MIDI file on a grid of so many steps per quarter note.

    Tempo has no effect. A note begins and ends at the nearest step and lasts at least one. All tracks and channels
    sound together, drums (channel 10) are left out, velocities are lost, and where a key is struck again at once it
    sounds on. The piece ends where its last track or note does: silence at its beginning and end stays.

    Args:
        path: The file, of format 0 or 1.
        resolution: Steps per quarter note.
        sustain: Let a note sound for as long as the channel's sustain pedal is down, or until its key is struck again.
        max_quarters: Longest piece, in quarter notes.
        max_gb: Gigabytes that its roll may take in float64, or 16 times the file's size.

    Raises:
        UserError: It can't be read as MIDI, counts its time in frames, or has no note or one outside a piano's keys.
    """
    file = _open(path)
    if file.ticks_per_beat <= 0:
        raise UserError(f"{path}: counts its time in frames of a film, not in beats. Fix: export it again")
    if file.type == 2:
        raise UserError(f"{path}: is of format 2, several pieces in one file. Fix: export each as a file of its own")

    beat = int(file.ticks_per_beat)

    def step(tick: int) -> int:
        return (2 * tick * resolution + beat) // (2 * beat)

    notes, end = _collect_notes(file.tracks, sustain)
    spans = [(note, step(on), max(step(off), step(on) + 1)) for note, on, off in notes]
    steps = max([step(end), *(last for _, _, last in spans)])
    if steps > max_quarters * resolution:
        raise UserError(
            f"{path}: lasts {steps // resolution} quarter notes, more than --data.max_quarters {max_quarters}. Fix: "
            "export the file again if it is damaged, or raise --data.max_quarters"
        )
    require_size(path, 8 * KEYS * steps, max_gb)
    if not spans:
        raise UserError(f"{path}: has no notes (drums are left out). Fix: remove it")
    for note, first, _ in spans:
        if not LOWEST <= note < LOWEST + KEYS:
            raise UserError(
                f"{path}: step {first} holds note {note}, but a piano's are {LOWEST} to {LOWEST + KEYS - 1}. "
                "Fix: correct or remove it"
            )
    array = np.array(sorted(spans), dtype=np.int64)
    array[:, 0] -= LOWEST
    return Notes(steps, array)


def write_midi(path: Path, roll: NDArray[Any], resolution: int) -> None:
    """Write a piano roll as a MIDI file of 120 quarter notes a minute.

    Successive steps of a key become one held note: a roll does not tell whether it was struck again. Reading the file
    at the same resolution gives the same roll. It needs mido.

    Args:
        path: The file, which is overwritten.
        roll: Shape (steps, 88); values above one half sound.
        resolution: Steps per quarter note.
    """
    mido = _mido()
    ticks = max(1, 480 // resolution)
    change = _changes(roll)
    track, now = mido.MidiTrack(), 0
    for step in np.flatnonzero(change.any(1)).tolist():
        for key in sorted(np.flatnonzero(change[step]).tolist(), key=lambda key: change[step, key]):  # ends come first
            kind = "note_on" if change[step, key] > 0 else "note_off"
            track.append(mido.Message(kind, note=LOWEST + key, velocity=64, time=(step - now) * ticks))
            now = step
    track.append(mido.MetaMessage("end_of_track", time=(len(roll) - now) * ticks))
    mido.MidiFile(type=0, ticks_per_beat=ticks * resolution, tracks=[track]).save(path)


def _changes(roll: NDArray[Any]) -> NDArray[Any]:
    """Return 1 where a key is struck, -1 one step past its end, else 0, shape (steps + 1, 88)."""
    silence = np.zeros((1, KEYS), dtype=np.int8)
    return np.diff((np.asarray(roll) > 0.5).astype(np.int8), axis=0, prepend=silence, append=silence)


def roll_sound(roll: NDArray[Any], resolution: int, sample_rate: int = 16000) -> NDArray[np.float32]:
    """Return the sound of a piano roll at 120 quarter notes a minute: each note a few harmonics that die away.

    Successive steps of a key are one held note, as for :func:`write_midi`.

    Args:
        roll: Shape (steps, 88); values above one half sound.
        resolution: Steps per quarter note.
        sample_rate: In Hz.

    Returns:
        Amplitudes of at most 0.9, shape (samples,).

    >>> roll = np.zeros((4, KEYS)); roll[:, 69 - LOWEST] = 1  # an A of 440 Hz for one quarter
    >>> sound = roll_sound(roll, resolution=4)
    >>> sound.shape, int(np.abs(np.fft.rfft(sound)).argmax() / 0.5)
    ((8000,), 440)
    """
    step = sample_rate / (2 * resolution)
    change = _changes(roll)
    sound = np.zeros(round(len(roll) * step))
    for key in np.flatnonzero(change.any(0)).tolist():
        pitch = 440.0 * 2 ** ((key + LOWEST - 69) / 12)
        for first, last in zip(np.flatnonzero(change[:, key] > 0), np.flatnonzero(change[:, key] < 0), strict=True):
            start, end = round(first * step), round(last * step)
            time = np.arange(end - start) / sample_rate
            harmonics = [n for n in range(1, 6) if n * pitch < sample_rate / 2]
            wave = sum(np.sin(2 * np.pi * n * pitch * time) * np.exp(-n * time) / n**1.5 for n in harmonics)
            edge = np.minimum(1.0, np.minimum(time, time[::-1]) / 0.008)  # no click where it begins and ends
            sound[start:end] += wave * edge
    loudest = np.abs(sound).max(initial=0.0)
    quiet: NDArray[np.float32] = (0.9 * sound / (loudest or 1.0)).astype(np.float32)
    return quiet


def read_note_lists(path: Path, split: Split, max_gb: float = MAX_GB) -> ArchiveSplit:
    """Read one split of a pickle or JSON of notes, in the format of Boulanger-Lewandowski et al. (2012).

    It is a dict whose entries "train", "valid" and "test" are lists of sequences; a sequence is a list of steps, and a
    step a list of the MIDI notes that sound in it. The file is JSON where its name ends in ``.json``, else a pickle,
    also Python 2's, which is read as plain data. Its rolls may take ``max_gb`` gigabytes, or 16 times the file's size.

    Raises:
        UserError: It can't be read, has another structure, or holds a note outside a piano's keys.
    """
    word = SPLIT_NAMES[split][0]
    content = _load(path)
    if not isinstance(content, dict) or word not in content:
        is_dict = isinstance(content, dict)
        holds = ", ".join(map(reprlib.repr, content))[:200] if is_dict else f"a {type(content).__name__}"
        raise UserError(f"{path}: has no {word!r}, it holds {holds or 'nothing'}. Fix: add 'train', 'valid' and 'test'")

    rolls = content[word]
    try:
        require_size(path, KEYS * sum(map(len, rolls)), max_gb)
        parts = [_roll(path, f"{word} {i}", steps) for i, steps in enumerate(rolls)]
    except TypeError as error:
        fix = "write a list of sequences, each a list of steps, each a list of notes"
        raise UserError(f"{path}: {word} can't be read as notes ({error}). Fix: {fix}") from None
    values = np.concatenate([np.zeros((0, KEYS), dtype=np.uint8), *parts])
    return ArchiveSplit.join(path, word, word, values, np.array([len(part) for part in parts], dtype=np.int64))


def _roll(path: Path, name: str, steps: Sequence[Iterable[Any]]) -> NDArray[np.uint8]:
    roll = np.zeros((len(steps), KEYS), dtype=np.uint8)
    for t, notes in enumerate(steps):
        for note in notes:
            if not isinstance(note, (int, np.integer)) or not LOWEST <= note < LOWEST + KEYS:
                shown = " ".join(reprlib.repr(note).split())[:40]
                raise UserError(
                    f"{path}: {name}, step {t} holds note {shown}, but a piano's are {LOWEST} to {LOWEST + KEYS - 1}. "
                    "Fix: correct or remove it"
                )
            roll[t, int(note) - LOWEST] = 1
    return roll


def _mido() -> ModuleType:
    try:
        import mido
    except ImportError:
        raise UserError("MIDI files need mido. Fix: pip install 'vrnn-lightning[music]'") from None
    module: ModuleType = mido
    return module


def _open(path: Path) -> Any:
    mido = _mido()
    with explained(path), undamaged(f"{path}: can't be read as MIDI", "remove it or export it again"):
        return mido.MidiFile(file=io.BytesIO(path.read_bytes()))


def _collect_notes(tracks: list[Any], sustain: bool) -> tuple[list[tuple[int, int, int]], int]:
    """Return each note with the ticks at which it begins and ends, and the tick at which the last track ends."""
    events: list[tuple[int, int, Any]] = []
    end = 0
    for number, track in enumerate(tracks):
        tick = 0
        for message in track:
            tick += message.time
            if message.type in ("note_on", "note_off", "control_change") and message.channel != DRUMS:
                events.append((tick, number, message))
        end = max(end, tick)
    events.sort(key=lambda event: event[0])

    notes: list[tuple[int, int, int]] = []
    held: dict[tuple[int, int, int], list[int]] = {}  # by channel, track and note: a track's end of a note is its own
    released: dict[tuple[int, int, int], list[int]] = {}  # those that only the pedal holds
    down: set[int] = set()
    for tick, number, message in events:
        channel = message.channel
        if message.type == "control_change":
            if message.control == SUSTAIN and message.value >= 64:
                down.add(channel)
            elif message.control == SUSTAIN:
                down.discard(channel)
                for key in [key for key in released if key[0] == channel]:
                    notes += [(key[2], start, tick) for start in released.pop(key)]
            continue
        key = (channel, number, message.note)
        if message.type == "note_on" and message.velocity:
            notes += [(message.note, start, tick) for start in released.pop(key, [])]
            held.setdefault(key, []).append(tick)
        elif sustain and channel in down:
            released.setdefault(key, []).extend(held.pop(key, []))
        else:
            notes += [(message.note, start, tick) for start in held.pop(key, [])]
    for open_notes in (held, released):
        notes += [(note, start, end) for (_, _, note), starts in open_notes.items() for start in starts]
    return notes, end


def _load(path: Path) -> Any:
    load, kind = (json.load, "JSON") if path.suffix.lower() == ".json" else (unpickle, "a pickle of notes")
    with explained(path, "--data.root"), undamaged(f"{path}: can't be read as {kind}", "copy or write it again"):
        return load(io.BytesIO(path.read_bytes()))
