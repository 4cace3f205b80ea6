"""Piano rolls from flat archives, MIDI files, pickles and JSON."""

from __future__ import annotations

import builtins
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import struct
from collections import Counter
from pathlib import Path

import mido
import numpy as np
import pytest
import torch
from vrnn_lightning.datamodules.piano_rolls import PianoRolls

from vrnn_lightning.callbacks.pictures import draw_rows
from vrnn_lightning.data.rolls import Notes, read_midi, write_midi
from vrnn_lightning.errors import UserError
from vrnn_lightning.testing import CHECKS

SIZES = {"train": 17, "valid": 6, "test": 7}


@pytest.fixture
def archive(tmp_path) -> Path:
    """Thirty short random rolls."""
    generator = np.random.default_rng(0)
    arrays = {"midi_low": np.array(21)}
    for split, size in SIZES.items():
        lengths = generator.integers(1, 9, size)
        arrays[f"{split}_values"] = (generator.random((lengths.sum(), 88)) < 0.1).astype(np.uint8)
        arrays[f"{split}_lengths"] = lengths
    np.savez(tmp_path / "rolls.npz", **arrays)
    return tmp_path / "rolls.npz"


def spoil(archive: Path, value: float) -> None:
    arrays = dict(np.load(archive))
    values = arrays["valid_values"].astype(np.float32)
    values[arrays["valid_lengths"][0], 60] = value
    np.savez(archive, **arrays | {"valid_values": values})


def random_roll(generator: np.random.Generator, longest: int = 8, low: int = 0, high: int = 88) -> np.ndarray:
    roll = np.zeros((generator.integers(1, longest + 1), 88), np.uint8)
    roll[:, low:high] = generator.random((len(roll), high - low)) < 0.1
    roll[0, generator.integers(low, high)] = 1
    return roll


def folder_of_midi(root: Path, **sizes: int) -> Path:
    """Write random pieces around the middle of the keyboard, in folders where their names are not empty."""
    generator = np.random.default_rng(1)
    for folder, size in sizes.items():
        (root / folder.strip("_")).mkdir(parents=True, exist_ok=True)
        for i in range(size):
            write_midi(root / folder.strip("_") / f"{i}.mid", random_roll(generator, low=30, high=60), 4)
    return root


def lists(archive: Path) -> dict[str, list]:
    """Return the rolls of an archive as lists of notes."""
    arrays, found = np.load(archive), {}
    for split in SIZES:
        rolls = np.split(arrays[f"{split}_values"], arrays[f"{split}_lengths"].cumsum()[:-1])
        found[split] = [[(np.flatnonzero(step) + 21).tolist() for step in roll] for roll in rolls]
    return found


@pytest.fixture
def layouts(archive, tmp_path) -> dict[str, tuple[Path, dict]]:
    drawn = folder_of_midi(tmp_path / "drawn", _=12, deeper=3)
    given = folder_of_midi(tmp_path / "given", train=9, valid=3, test=4)
    (tmp_path / "rolls.json").write_text(json.dumps(lists(archive)))
    return {
        "archive": (archive, {}),
        "drawn": (drawn, {"test": 0.2, "val": 0.2}),
        "given": (given, {"transpose": 5, "window": 3}),
        "json": (tmp_path / "rolls.json", {"transpose": 88 - 1}),
    }


@pytest.mark.parametrize("layout", ["archive", "drawn", "given", "json"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, layout, layouts):
    root, kind = layouts[layout]
    check(lambda **options: PianoRolls(str(root), **kind, **options))


def test_construction_opens_no_file():
    data = PianoRolls("nowhere.npz")
    assert data.num_features == 88
    with pytest.raises(UserError, match=r"--data.root nowhere.npz: no such file"):
        data.setup("fit")


def test_values_are_left_as_they_are(archive):
    data = PianoRolls(archive)
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(data.scaler.std, torch.ones(()))
    assert set(batch.x.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("value", [127, 0.5, -1])
def test_a_value_that_is_neither_0_nor_1(archive, value):
    spoil(archive, value)
    message = f"{archive}: valid_values holds {float(value)} at valid 1, step 0, feature 60. Fix: binarise the rolls"
    with pytest.raises(UserError, match=re.escape(message)):
        PianoRolls(archive).setup("fit")


def test_a_fit_does_not_look_at_the_test_split(archive):
    arrays = dict(np.load(archive))
    np.savez(archive, **arrays | {"test_values": arrays["test_values"] + 5})
    PianoRolls(archive).setup("fit")


@pytest.mark.skipif("VRNN_DATA" not in os.environ, reason="VRNN_DATA names no folder with the chorales")
@pytest.mark.parametrize(("file", "steps"), [("jsb.npz", (13807, 4602, 4725)), ("jsb_16th.npz", (55228, 18408, 18900))])
def test_the_chorales(file, steps):
    data = PianoRolls(Path(os.environ["VRNN_DATA"]) / "music_jsb" / file)
    data.setup("fit")
    data.setup("test")
    splits = ("train", "val", "test")
    assert [len(data.split(split)) for split in splits] == [229, 76, 77]
    assert tuple(sum(data.lengths(split)) for split in splits) == steps
    mean, _ = data.input_statistics()
    assert float(mean.sum()) == pytest.approx(3.9, abs=0.1)


# Lists of notes


def rolls_of(data: PianoRolls, split: str) -> list[list[list[int]]]:
    sequences = data.split(split)
    return [[step.nonzero().flatten().tolist() for step in sequences[i].x] for i in range(len(sequences))]


PYTHON_2 = (  # what Python 2.7's cPickle writes at protocol 0 and 2: str keys, tuples of ints
    b"(dp1\nS'train'\np2\n(lp3\n(lp4\n(I60\nI64\ntp5\na(taasS'valid'\np6\n(lp7\n(lp8\n(I21\ntp9\naasS'test'\np10\n(lp11\n"
    b"(lp12\n(I108\ntp13\naas.",
    b"\x80\x02}q\x01(U\x05trainq\x02]q\x03]q\x04(K<K@\x86q\x05)eaU\x05validq\x06]q\x07]q\x08K\x15\x85q\taaU\x04testq\n"
    b"]q\x0b]q\x0cKl\x85q\raau.",
)


@pytest.mark.parametrize("content", [*PYTHON_2, "json", "numpy"])
def test_lists_of_notes(content, tmp_path):
    data = {"train": [[(60, 64), ()]], "valid": [[(21,)]], "test": [[(108,)]]}
    root = tmp_path / ("JSB Chorales.json" if content == "json" else "JSB Chorales.pickle")
    if content == "json":
        content = json.dumps(data).encode()
    if content == "numpy":
        arrays = {
            split: [[np.array(step, dtype=np.int64) for step in roll] for roll in rolls]
            for split, rolls in data.items()
        }
        content = pickle.dumps(arrays)
    root.write_bytes(content)
    found = PianoRolls(root)
    assert [rolls_of(found, split) for split in ("train", "val", "test")] == [[[[39, 43], []]], [[[0]]], [[[87]]]]
    assert found.split("val")[0].name == "valid 0"


def test_archive_and_lists_are_the_same(layouts):
    one, other = PianoRolls(layouts["archive"][0]), PianoRolls(layouts["json"][0])
    for split in ("train", "val", "test"):
        assert rolls_of(one, split) == rolls_of(other, split)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


GOOD = {"train": [[[60]]], "valid": [[[60]]], "test": [[[60]]]}
BAD_LISTS = [
    (b"", "can't be read"),
    (b"{", "can't be read"),
    (b"\xff\xfe", "can't be read"),
    ("json", b"[" * 100_000, "can't be read as JSON"),
    ("json", b'{"train": [[[60]], "valid"', "can't be read as JSON"),
    ("pickle", PYTHON_2[1][:-4], "can't be read as a pickle of notes"),
    ("pickle", b"\x80\x02\xff.", "can't be read as a pickle of notes"),
    ("pickle", pickle.dumps(GOOD | {"train": Harm()}), "mkdir, which is never loaded"),
    ([1, 2], "has no 'train', it holds a list. Fix: add 'train', 'valid' and 'test'"),
    ({}, "it holds nothing"),
    ({"Train": [], "valid": []}, "it holds 'Train', 'valid'"),
    (GOOD | {"train": 3}, "train can't be read as notes"),
    (GOOD | {"train": {"a": 1}}, "holds note"),
    (GOOD | {"train": "words"}, "holds note"),
    (GOOD | {"train": []}, "the train split is empty"),
    (GOOD | {"train": [60]}, "train can't be read as notes"),
    (GOOD | {"train": [[[60]], [60]]}, "train can't be read as notes"),
    (GOOD | {"train": [[[60], None]]}, "train can't be read as notes"),
    (
        GOOD | {"train": [[[60], [20]]]},
        "train 0, step 1 holds note 20, but a piano's are 21 to 108. Fix: correct or remove it",
    ),
    (GOOD | {"train": [[[60]], [[60, 109]]]}, "train 1, step 0 holds note 109, but a piano's are 21 to 108"),
    (GOOD | {"train": [[[60.5]]]}, "holds note 60.5, but"),
    (GOOD | {"train": [[["C4"]]]}, "holds note 'C4', but"),
    (GOOD | {"train": [[[True]]]}, "holds note True, but"),
    (GOOD | {"train": [[[float("nan")]]]}, "holds note nan, but"),
    (GOOD | {"train": [[[10**30]]]}, "holds note 1000000000000000000000000000000, but"),
    (GOOD | {"train": [[[[60]]]]}, "holds note [60], but"),
    (GOOD | {"train": [[]]}, "all sequences of the train split are empty"),
]


@pytest.mark.parametrize("suffix", ["json", "pickle"])
@pytest.mark.parametrize("case", range(len(BAD_LISTS)))
def test_bad_lists(case, suffix, tmp_path, monkeypatch):
    *only, content, message = BAD_LISTS[case]
    if only and only != [suffix]:
        pytest.skip("of the other kind")
    if not isinstance(content, bytes):
        content = pickle.dumps(content) if suffix == "pickle" else json.dumps(content).encode()
    monkeypatch.chdir(tmp_path)
    Path(f"rolls.{suffix}").write_bytes(content)
    assert message in complaint(f"rolls.{suffix}")
    assert not Path("harm").exists()


def complaint(root, stage: str = "fit", **options) -> str:
    """Return what is said of data, one line that names them."""
    data = PianoRolls(root, **options)

    def begin() -> None:
        data.setup(stage)
        data.train_dataloader()

    with pytest.raises(UserError) as caught:
        begin()
    message = str(caught.value)
    assert "\n" not in message
    assert Path(root).name in message or message.startswith("PianoRolls: ")
    return message


# MIDI files


def midi(path: Path, *tracks: list, beat: int = 480, kind: int = 1, end: int | None = None) -> Path:
    """Write messages, whose times are ticks from the beginning."""
    made = []
    for messages in tracks:
        track, now = mido.MidiTrack(), 0
        for message in messages:
            track.append(message.copy(time=message.time - now))
            now = message.time
        if end is not None:
            track.append(mido.MetaMessage("end_of_track", time=end - now))
        made.append(track)
    path.parent.mkdir(parents=True, exist_ok=True)
    mido.MidiFile(type=kind, ticks_per_beat=beat, tracks=made).save(path)
    return path


def on(note: int, time: int, channel: int = 0, velocity: int = 64) -> mido.Message:
    return mido.Message("note_on", note=note, velocity=velocity, channel=channel, time=time)


def off(note: int, time: int, channel: int = 0) -> mido.Message:
    return mido.Message("note_off", note=note, channel=channel, time=time)


def pedal(value: int, time: int, channel: int = 0) -> mido.Message:
    return mido.Message("control_change", control=64, value=value, channel=channel, time=time)


def spans(path: Path, resolution: int = 4, **options) -> list[tuple[int, ...]]:
    """Return (MIDI note, first step, one past the last step)."""
    return [(key + 21, first, last) for key, first, last in read_midi(path, resolution, **options).spans.tolist()]


def test_notes_fall_on_the_nearest_steps(tmp_path):
    """A sixteenth is 120 ticks of 480: 59 is nearer to 0, 60 and 61 go up; the shortest note lasts a step."""
    notes = [on(60, 0), off(60, 59), on(62, 60), off(62, 241), on(64, 300), on(64, 310, velocity=0)]
    path = midi(tmp_path / "a.mid", notes)
    assert spans(path) == [(60, 0, 1), (62, 1, 2), (64, 3, 4)]
    assert spans(path, 1) == [(60, 0, 1), (62, 0, 1), (64, 1, 2)]
    assert spans(path, 12) == [(60, 0, 1), (62, 2, 6), (64, 8, 9)]


def test_tempo_moves_nothing(tmp_path):
    notes = [on(60, 480), off(60, 960)]
    tempo = [
        mido.MetaMessage("set_tempo", tempo=300_000, time=100),
        mido.MetaMessage("set_tempo", tempo=9_000_000, time=700),
    ]
    assert spans(midi(tmp_path / "a.mid", tempo, notes)) == spans(midi(tmp_path / "b.mid", notes)) == [(60, 4, 8)]


def test_all_tracks_and_channels_but_drums(tmp_path):
    right = [on(72, 0), on(30, 0, channel=9), off(72, 480), off(30, 480, channel=9)]
    left = [on(48, 240, channel=3), off(48, 480, channel=3)]
    assert spans(midi(tmp_path / "a.mid", right, left)) == [(48, 2, 4), (72, 0, 4)]


def test_a_track_ends_its_own_notes(tmp_path):
    one, other = [on(60, 0), off(60, 240)], [on(60, 0), off(60, 960)]
    assert spans(midi(tmp_path / "a.mid", one, other)) == [(60, 0, 2), (60, 0, 8)]
    roll = read_midi(tmp_path / "a.mid", 4).roll()
    assert roll[:, 39].tolist() == [1] * 8, "both sound together"


def test_a_note_that_never_ends_and_an_end_without_a_note(tmp_path):
    path = midi(tmp_path / "a.mid", [off(50, 0), on(60, 0), off(61, 120)], end=960)
    assert spans(path) == [(60, 0, 8)]


def test_silence_at_both_ends_stays(tmp_path):
    notes = read_midi(midi(tmp_path / "a.mid", [on(60, 480), off(60, 600)], end=960), 4)
    assert notes.steps == 8
    assert np.argwhere(notes.roll()).tolist() == [[4, 39]]


def test_the_sustain_pedal(tmp_path):
    """It holds what is let go while it is down, until it is up or the key is struck again, on its channel alone."""
    notes = [pedal(64, 0), on(60, 0), on(62, 0, channel=1), off(60, 120), off(62, 120, channel=1), pedal(63, 480)]
    notes += [
        pedal(127, 500),
        on(64, 600),
        off(64, 720),
        on(64, 840),
        off(64, 960),
        on(65, 960),
        pedal(0, 1200),
        off(65, 1440),
    ]
    path = midi(tmp_path / "a.mid", notes)
    assert spans(path) == [(60, 0, 1), (62, 0, 1), (64, 5, 6), (64, 7, 8), (65, 8, 12)]
    assert spans(path, sustain=True) == [(60, 0, 4), (62, 0, 1), (64, 5, 7), (64, 7, 10), (65, 8, 12)]


def test_windows_are_parts_of_the_roll():
    generator = np.random.default_rng(0)
    starts = generator.integers(0, 30, 50)
    notes = Notes(40, np.stack([generator.integers(0, 88, 50), starts, starts + generator.integers(1, 11, 50)], 1))
    whole = np.zeros((40, 88), np.uint8)
    for key, first, last in notes.spans:
        whole[first:last, key] = 1
    np.testing.assert_array_equal(notes.roll(), whole)
    for first, last in [(0, 1), (7, 19), (39, 40), (30, 99), (5, 5)]:
        np.testing.assert_array_equal(notes.roll(first, last), whole[first:last])


@pytest.mark.parametrize("resolution", [1, 4, 7, 480, 960])
def test_midi_written_and_read_is_the_same_roll(resolution, tmp_path):
    generator = np.random.default_rng(resolution)
    for i in range(20):
        roll = random_roll(generator, longest=30)
        roll = np.pad(roll, ((i % 3, i % 4), (0, 0)))  # silence before and after
        write_midi(tmp_path / "a.mid", roll, resolution)
        np.testing.assert_array_equal(read_midi(tmp_path / "a.mid", resolution).roll(), roll)


def test_successive_steps_are_one_held_note(tmp_path):
    roll = np.zeros((5, 88))
    roll[:, 39] = [0.6, 0.9, 0.5, 1, 0]
    write_midi(tmp_path / "a.mid", roll, 1)
    track = mido.MidiFile(tmp_path / "a.mid").tracks[0]
    assert [(m.type, getattr(m, "note", None), m.time) for m in track] == [
        ("note_on", 60, 0),
        ("note_off", 60, 960),
        ("note_on", 60, 480),
        ("note_off", 60, 480),
        ("end_of_track", None, 480),
    ]


def good(path: Path, note: int = 60) -> Path:
    return midi(path, [on(note, 0), off(note, 480)])


def raw(track: bytes, header: bytes = struct.pack(">hhh", 1, 1, 480), size: int | None = None) -> bytes:
    return (
        b"MThd"
        + struct.pack(">L", 6)
        + header
        + b"MTrk"
        + struct.pack(">L", len(track) if size is None else size)
        + track
    )


NOTE = b"\x00\x90\x3c\x40\x83\x60\x80\x3c\x40"
END = b"\x00\xff\x2f\x00"
BAD_MIDI = {
    "empty": (b"", "can't be read as MIDI"),
    "text": (b"no midi at all", "can't be read as MIDI (MThd not found"),
    "header alone": (raw(NOTE)[:14], "can't be read as MIDI"),
    "cut": (raw(NOTE + END)[:-6], "can't be read as MIDI"),
    "track too long": (raw(NOTE + END, size=500), "can't be read as MIDI"),
    "track too short": (raw(NOTE + END, size=5), "can't be read as MIDI"),
    "no track": (raw(NOTE).replace(b"MTrk", b"XTrk"), "can't be read as MIDI (no MTrk header"),
    "data byte": (raw(b"\x00\x90\xbc\x40" + END), "can't be read as MIDI (data byte"),
    "status": (raw(b"\x00\xf4\x00" + END), "can't be read as MIDI"),
    "running status": (raw(b"\x00\x3c\x40" + END), "can't be read as MIDI (running status"),
    "SMPTE": (raw(NOTE + END, struct.pack(">hhh", 1, 1, -6360)), "counts its time in frames"),
    "no ticks": (raw(NOTE + END, struct.pack(">hhh", 1, 1, 0)), "counts its time in frames"),
    "format 2": (raw(NOTE + END, struct.pack(">hhh", 2, 1, 480)), "is of format 2"),
    "no notes": (raw(END), "has no notes"),
    "no tracks": (raw(b"", struct.pack(">hhh", 1, 0, 480)), "has no notes"),
    "drums": (raw(b"\x00\x99\x3c\x40\x83\x60\x89\x3c\x40" + END), "has no notes (drums are left out)"),
    "low": (raw(NOTE.replace(b"\x3c", b"\x14") + END), "step 0 holds note 20, but a piano's are 21 to 108"),
    "high": (raw(b"\x81\x70\x90\x6d\x40" + NOTE + END), "step 2 holds note 109, but a piano's are 21 to 108"),
    "long": (raw(NOTE + b"\xff\xff\xff\x7f\xff\x2f\x00"), "raise --data.max_quarters"),
}


@pytest.mark.parametrize("case", BAD_MIDI)
def test_bad_midi(case, tmp_path):
    content, message = BAD_MIDI[case]
    for i in range(8):
        good(tmp_path / f"{i}.mid", 60 + i)
    (tmp_path / "bad.mid").write_bytes(content)
    said = complaint(tmp_path, test=0.0)
    assert message in said
    assert said.startswith(str(tmp_path / "bad.mid"))
    data = PianoRolls(tmp_path, test=0.0, skip_bad=True)
    with pytest.warns(UserWarning, match=r"1 of \d files are skipped \(--data.skip_bad true\).*bad.mid"):
        data.setup("fit")
    assert len(data.split("train")) + len(data.split("val")) == 8


def refusal(read) -> str | None:
    """Return what is said of data, or nothing where they can be read."""
    try:
        read()
    except UserError as error:
        return str(error)
    return None


def test_midi_with_a_spoilt_byte(tmp_path):
    """Whatever a byte becomes, a file is read or refused in one line."""
    generator = np.random.default_rng(0)
    write_midi(tmp_path / "a.mid", random_roll(generator, longest=20), 4)
    content = (tmp_path / "a.mid").read_bytes()
    refused = 0
    for _ in range(300):
        spoilt = bytearray(content)
        for place in generator.integers(0, len(spoilt), generator.integers(1, 4)):
            spoilt[place] = generator.integers(0, 256)
        (tmp_path / "b.mid").write_bytes(
            spoilt[: generator.integers(1, len(spoilt) + 1)] if generator.random() < 0.2 else spoilt
        )
        message = refusal(lambda: read_midi(tmp_path / "b.mid", 4))
        refused += message is not None
        assert "\n" not in (message or "")
    assert 50 < refused < 300


def test_pickles_and_json_with_a_spoilt_byte(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    refused = 0
    for suffix, content in (("pickle", PYTHON_2[0]), ("pickle", PYTHON_2[1]), ("json", json.dumps(GOOD).encode())):
        for _ in range(100):
            spoilt = bytearray(content)
            spoilt[generator.integers(0, len(spoilt))] = generator.integers(0, 256)
            Path(f"a.{suffix}").write_bytes(spoilt)
            message = refusal(lambda path=f"a.{suffix}": PianoRolls(path).sequences("train"))
            refused += message is not None
            assert "\n" not in (message or "")
    assert 50 < refused < 300


def test_all_bad(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.mid").write_bytes(b"?" * i)
    assert "none of 5 files can be used" in complaint(tmp_path, skip_bad=True, test=0.0)


@pytest.mark.parametrize("name", ["a.mid", "a.json", "a.pickle"])
def test_a_file_without_permission(name, tmp_path, monkeypatch):
    """Refused by a stand-in for the system's answer, for tests may run as root."""
    good(tmp_path / "train" / "a.mid")
    good(tmp_path / "valid" / "b.mid", 61)
    real = Path.open

    def locked(self, *rest, **more):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *rest, **more)

    monkeypatch.setattr(Path, "open", locked)
    root = tmp_path
    if name != "a.mid":
        root = tmp_path / name
        root.touch()
    assert f"{name}: Permission denied" in complaint(root)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    good(tmp_path / "train" / "a.mid")

    def locked(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", locked)
    assert f"{tmp_path}: Permission denied. Fix: give yourself permission" in complaint(tmp_path)


def test_without_mido(tmp_path, monkeypatch):
    good(tmp_path / "train" / "a.mid")
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "mido":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=re.escape("MIDI files need mido. Fix: pip install 'vrnn-lightning[music]'")):
        PianoRolls(tmp_path).setup("fit")


# Folders and splits


def names(data: PianoRolls, split: str) -> list[str]:
    sequences = data.split(split)
    return [sequences[i].name for i in range(len(sequences))]


def test_folders_split_the_files(tmp_path):
    for i, name in enumerate(["train/a.mid", "train/deep/b.MIDI", "val/c.mid", "test/d.mid", "train/._a.mid"]):
        good(tmp_path / name, 60 + i)
    data = PianoRolls(tmp_path)
    assert [names(data, split) for split in ("train", "val", "test")] == [
        ["train/a.mid", "train/deep/b.MIDI"],
        ["val/c.mid"],
        ["test/d.mid"],
    ]
    good(tmp_path / "other" / "e.mid", 70)
    with pytest.warns(UserWarning, match="1 files outside train, val, test are left out"):
        PianoRolls(tmp_path).setup("fit")


def test_splits_are_drawn_by_the_seed(tmp_path):
    folder_of_midi(tmp_path, a=10, b=10)
    splits = [
        tuple(tuple(names(PianoRolls(tmp_path, seed=seed), split)) for split in ("train", "val", "test"))
        for seed in (0, 0, 1)
    ]
    assert splits[0] == splits[1] != splits[2]
    assert [len(part) for part in splits[0]] == [16, 2, 2]
    more = PianoRolls(tmp_path, test=0.5, val=0.2)
    assert [len(names(more, split)) for split in ("train", "val", "test")] == [8, 2, 10]


def test_copies_share_a_split(tmp_path):
    folder_of_midi(tmp_path, a=10)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    data = PianoRolls(tmp_path)
    for split in ("train", "val", "test"):
        found = Counter(Path(name).name for name in names(data, split))
        assert found
        assert set(found.values()) == {2}


def restored(trained: PianoRolls, root: Path, **options) -> PianoRolls:
    """Return what a test from a checkpoint would use."""
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    data = PianoRolls(root, **options)
    data.setup("test")
    data.load_state_dict(torch.load(file, weights_only=True))
    return data


def fitted(root: Path, **options) -> PianoRolls:
    data = PianoRolls(root, **options)
    data.setup("fit")
    return data


def test_what_was_trained_on_is_never_tested(tmp_path):
    trained = fitted(folder_of_midi(tmp_path / "one", _=10), test=0.3)
    tested = {(tmp_path / "one" / name).read_bytes() for name in names(trained, "test")}
    other = tmp_path / "two"
    for i, path in enumerate(sorted((tmp_path / "one").glob("*.mid"), reverse=True)):
        other.mkdir(exist_ok=True)
        shutil.copy(path, other / f"renamed {i}.mid")
    good(other / "new.mid", 100)
    with pytest.warns(UserWarning, match="1 files that are in no split of the checkpoint are left out"):
        found = names(restored(trained, other, test=0.3), "test")
    assert {(other / name).read_bytes() for name in found} == tested


def test_another_corpus_is_tested_as_a_whole(tmp_path):
    trained = fitted(folder_of_midi(tmp_path / "one", _=10))
    good(tmp_path / "two" / "a.mid", 100)
    good(tmp_path / "two" / "b.mid", 101)
    known = (tmp_path / "one" / names(trained, "train")[0]).read_bytes()
    (tmp_path / "two" / "c.mid").write_bytes(known)
    assert names(restored(trained, tmp_path / "two"), "test") == ["a.mid", "b.mid"]


def test_a_model_of_an_archive_tests_a_whole_folder(archive, tmp_path):
    good(tmp_path / "two" / "a.mid", 100)
    good(tmp_path / "two" / "b.mid", 101)
    assert names(restored(fitted(archive), tmp_path / "two"), "test") == ["a.mid", "b.mid"]


def test_a_copy_of_a_training_file_in_the_folder_test(tmp_path):
    folder_of_midi(tmp_path, train=3, valid=2, test=2)
    shutil.copy(tmp_path / "train" / "1.mid", tmp_path / "test" / "innocent.mid")
    data = fitted(tmp_path)
    for found in (data, restored(data, tmp_path)):
        with pytest.raises(
            UserError, match=r"innocent.mid: is a copy of a file outside the test split. Fix: remove it"
        ):
            found.test_dataloader()


def test_files_that_came_during_training_count_as_trained(tmp_path):
    folder_of_midi(tmp_path, train=3, valid=2, test=2)
    first = fitted(tmp_path)
    good(tmp_path / "train" / "late.mid", 100)
    resumed = restored(first, tmp_path)
    assert "train/late.mid" in names(resumed, "train")
    (tmp_path / "train" / "late.mid").rename(tmp_path / "test" / "late.mid")
    with pytest.raises(UserError, match=r"late.mid: is a copy of a file outside the test split"):
        restored(resumed, tmp_path).test_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "--data.resolution 0: must lie between 1 and 960"),
        ({"resolution": 961}, "--data.resolution 961: must lie between 1 and 960"),
        ({"transpose": -1}, "--data.transpose -1: must lie between 0 and 87"),
        ({"test": 1.0}, "--data.test 1.0: must lie in [0, 1)"),
        ({"val": -0.1}, "--data.val -0.1: must lie in [0, 1)"),
    ],
)
def test_an_option_outside_its_range(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        PianoRolls("rolls.npz", **options)


@pytest.mark.parametrize("option", [{"sustain": True}, {"skip_bad": True}, {"test": 0.1}, {"val": 0.0}])
def test_options_that_would_do_nothing(option, archive, tmp_path):
    (name,) = option
    assert f"--data.{name}: does nothing, {archive} is not a folder of MIDI files" in complaint(archive, **option)
    PianoRolls(archive, **option).setup("test")  # a checkpoint brings its own
    if name in ("test", "val"):
        folder_of_midi(tmp_path / "given", train=1, valid=1, test=1)
        said = complaint(tmp_path / "given", **option)
        assert f"--data.{name}: does nothing" in said
        assert "has folders that split it (train, valid, test)" in said


def test_roots_that_are_no_music(archive, tmp_path):
    (tmp_path / "none").mkdir()
    assert "no such file or folder" in complaint(tmp_path / "nowhere")
    assert "holds no MIDI files. Fix: give a folder of .mid or .midi" in complaint(tmp_path / "none")
    assert "is a single MIDI file" in complaint(good(tmp_path / "a.mid"))
    folder_of_midi(tmp_path / "half", train=2, test=2)
    assert "its folders train and test split it, but no MIDI file is in valid or val" in complaint(tmp_path / "half")
    folder_of_midi(tmp_path / "both", train=2, val=1, valid=1)
    assert "has both valid and val. Fix: rename one of them" in complaint(tmp_path / "both")
    folder_of_midi(tmp_path / "two", _=2)
    assert "the train split is empty: it has 2 different MIDI files. Fix: add some" in complaint(tmp_path / "two")
    assert "the val split is empty" in complaint(folder_of_midi(tmp_path / "five", _=5), val=0.0)


# Transposition


def shifts(data: PianoRolls, epoch: int) -> list[int]:
    """Return by how many semitones each training roll is shifted, after checking that nothing else is."""
    plain, found = data._rolls("train"), data.split("train").in_epoch(epoch)
    moved = []
    for i in range(len(plain)):
        before, after = plain[i].x.nonzero(), found[i].x.nonzero()
        difference = after - before
        assert (difference == difference[0]).all()
        moved.append(int(difference[0, 1]))
    return moved


def test_transposition_stays_on_the_keyboard(tmp_path):
    """The lowest and highest keys bound it; within, all shifts are as likely."""
    rolls = [[[21], [60]], [[60], [108]], [[23, 107]], [[21, 108]], [[60, 64], [67]]]
    (tmp_path / "a.json").write_text(json.dumps({"train": rolls, "valid": rolls, "test": rolls}))
    data = fitted(tmp_path / "a.json", transpose=5)
    drawn = np.array([shifts(data, epoch) for epoch in range(400)])
    assert [(min(column), max(column)) for column in drawn.T.tolist()] == [(0, 5), (-5, 0), (-2, 1), (0, 0), (-5, 5)]
    for column, count in zip(drawn.T, (6, 6, 4, 1, 11), strict=True):
        seen = np.unique(column, return_counts=True)[1]
        assert len(seen) == count
        assert (abs(seen - 400 / count) < 4 * (400 / count) ** 0.5).all()
    assert shifts(data, 3) == shifts(fitted(tmp_path / "a.json", transpose=5), 3)
    assert rolls_of(data, "val") == rolls_of(PianoRolls(tmp_path / "a.json"), "val"), "validation stays as it is"


def test_silence_is_not_transposed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD | {"train": [[[], []]]}))
    data = fitted(tmp_path / "a.json", transpose=5)
    assert data.split("train").in_epoch(4)[0].x.count_nonzero() == 0


def test_windows_are_shifted_as_the_whole(tmp_path):
    folder_of_midi(tmp_path, train=3, valid=2, test=2)
    rolls = fitted(tmp_path, transpose=5).split("train").in_epoch(7)
    for i in range(3):
        assert torch.equal(rolls.window(i, 0, 1).x, rolls[i].x[:1])


# Pictures and samples


def test_the_picture_of_a_roll():
    roll = torch.zeros(6, 88)
    roll[2, 39] = 0.25  # middle C, C4
    (axes,) = draw_rows({"real": [roll]}, "roll").axes
    (image,) = axes.images
    assert image.get_extent() == [-0.5, 5.5, 20.5, 108.5]
    assert image.get_clim() == (0, 1)
    assert image.get_array().tolist() == roll.T.double().tolist()
    assert dict(zip([label.get_text() for label in axes.get_yticklabels()], axes.get_yticks(), strict=True))["C4"] == 60
    assert axes.get_ylim() == (20.5, 108.5), "higher is up"


@pytest.fixture
def sampled(lightning, tiny, archive):
    def run(*words):
        data = ("--data", "PianoRolls", "--data.root", archive, "--data.resolution", 2)
        samples = ("--samples.every_n_validations", 1, "--samples.count", 1, "--model.emission", "Bernoulli")
        return lightning("fit", "-c", tiny, *data, *samples, *words)

    return run


def test_samples_are_written_as_midi(sampled, archive, folder):
    said = sampled()
    assert said.code == 0, said.err
    (samples,) = folder.glob("runs/*/*/samples")
    written = {path.name.split("_", 2)[2]: path for path in samples.glob("*.mid")}
    assert set(written) == {"real_0.mid", "reconstructed_0.mid", "sampled_0.mid"}
    arrays = np.load(archive)
    first = arrays["valid_values"][: arrays["valid_lengths"][0]]
    np.testing.assert_array_equal(read_midi(written["real_0.mid"], 2).roll(), first)
    assert {path.with_suffix(".wav").name for path in written.values()} == {p.name for p in samples.glob("*.wav")}


def test_samples_without_mido(sampled, folder, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "mido" else real(name, *rest))
    with pytest.warns(UserWarning, match=re.escape("for MIDI pip install 'vrnn-lightning[music]'")):
        said = sampled("--trainer.max_epochs", 2)
    assert said.code == 0, said.err
    assert len(list(folder.glob("runs/*/*/samples/*.wav"))) == 6
    assert not list(folder.glob("runs/*/*/samples/*.mid"))


def test_bad_files_are_skipped_before_splits_are_drawn(tmp_path):
    """However many are bad, no split is made of them alone."""
    for i in range(6):
        (tmp_path / f"bad{i}.mid").write_bytes(b"MThd" + bytes([i]))
        write_midi(tmp_path / f"good{i}.mid", np.eye(88)[20 + i : 24 + i], 4)
    data = PianoRolls(tmp_path, skip_bad=True, seed=3)
    with pytest.warns(UserWarning, match=r"6 of 12 files are skipped"):
        found = [len(data.split(split)) for split in ("train", "val", "test")]
    assert found == [4, 1, 1]
