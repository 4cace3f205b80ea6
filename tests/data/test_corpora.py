"""Speech corpora on files of their shape: splits, speakers, what is left out; manifests; files to be skipped."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from vrnn_lightning.datamodules.speech import Speech

from vrnn_lightning.data import corpora
from vrnn_lightning.data.audio import read_header
from vrnn_lightning.errors import UserError
from vrnn_lightning.testing import check_datamodule

FRAME = 20
SPLITS = ("train", "val", "test")


def corpus(root: Path, names, length: int = 5) -> Path:
    """Write recordings of a few frames, each with other samples."""
    generator = np.random.default_rng(0)
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = 0.1 * generator.standard_normal(FRAME * (length + i % 3) + i % FRAME)
        sphere = path.name.endswith((".WAV", ".sph"))
        subtype = "VORBIS" if path.suffix == ".ogg" else "PCM_16"
        soundfile.write(path, samples, 8000, subtype=subtype, format="NIST" if sphere else None)
    return root


def fsdd() -> list[str]:
    return [
        f"recordings/{digit}_{who}_{take}.wav" for digit in (0, 7) for who in ("jackson", "theo") for take in range(9)
    ]


def timit() -> list[str]:
    people = {"TRAIN": ["FCJF0", "MDAC0"], "TEST": ["MDAB0", "FELC0", "FAKS0", "MDAC1"]}  # two core, one val, one other
    return [
        f"TIMIT/{folder}/DR1/{who}/{text}.WAV"
        for folder, speakers in people.items()
        for who in speakers
        for text in ("SA1", "SA2", "SI648", "SX127")
    ]


def ljspeech() -> list[str]:
    return [f"wavs/LJ{book:03d}-{clip:04d}.wav" for book in (1, 2) for clip in range(1, 31)]


def librispeech() -> list[str]:
    sets = ("train-clean-100", "train-other-500", "dev-clean", "dev-other", "test-clean", "test-other")
    return [f"LibriSpeech/{s}/{who}/5/{who}-5-{i:04d}.flac" for n, s in enumerate(sets) for who in (19 + n, 39 + n)
            for i in range(2)]  # fmt: skip


def vctk() -> list[str]:
    return [
        f"wav48_silence_trimmed/p{225 + who}/p{225 + who}_{i:03d}_mic{mic}.flac"
        for who in range(12)
        for i in range(1, 4)
        for mic in (1, 2)
    ]


def blizzard() -> list[str]:
    return [f"emma/chapter{i:02d}.ogg" for i in range(12)]


MADE = {
    "fsdd": fsdd,
    "timit": timit,
    "ljspeech": ljspeech,
    "librispeech": librispeech,
    "vctk": vctk,
    "blizzard": blizzard,
}


def speech(root: Path, layout: str, **options) -> Speech:
    long = {"window": 2} if layout == "blizzard" else {}
    return Speech(str(root), **{"layout": layout, "frame_size": FRAME} | long | options)


def files(datamodule: Speech, split: str) -> list[str]:
    sequences = datamodule.sequences(split)
    return [sequences[i].name for i in range(len(sequences))]


def all_files(datamodule: Speech) -> dict[str, list[str]]:
    return {split: files(datamodule, split) for split in SPLITS}


def read_all(datamodule: Speech) -> None:
    datamodule.setup("fit")
    for _ in datamodule.train_dataloader():
        pass


def refusal(datamodule: Speech) -> str:
    with pytest.raises(UserError) as raised:
        datamodule.setup("fit")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("layout", MADE)
def test_contract(layout, tmp_path):
    corpus(tmp_path / "corpus", MADE[layout]())
    check_datamodule(lambda **options: speech(tmp_path / "corpus", layout, **options))


class TestSplits:
    def test_fsdd(self, tmp_path):
        corpus(tmp_path, [*fsdd(), "recordings/notes.wav"])
        datamodule = speech(tmp_path, "fsdd")
        with pytest.warns(UserWarning, match="1 of 37 audio files are left out, which --data.layout fsdd has no place"):
            found = all_files(datamodule)
        assert Counter(int(name[-5]) for name in found["test"]) == dict.fromkeys(range(5), 4)
        assert {int(name[-5]) for name in found["train"] + found["val"]} == {5, 6, 7, 8}
        assert len(found["val"]) == 2

    def test_fsdd_is_the_pattern_of_that_name(self, tmp_path):
        corpus(tmp_path, fsdd())
        assert all_files(speech(tmp_path, "fsdd")) == all_files(speech(tmp_path, "folder", test="fsdd"))

    @pytest.mark.parametrize("case", [str.upper, str.lower])
    def test_timit(self, tmp_path, case):
        names = [case(name) for name in timit()]
        corpus(tmp_path, [name if name.endswith(".WAV") else name[:-3] + "sph" for name in names])
        found = all_files(speech(tmp_path, "timit"))
        speakers = {split: {name.split("/")[3].upper() for name in found[split]} for split in SPLITS}
        assert speakers == {"train": {"FCJF0", "MDAC0"}, "val": {"FAKS0"}, "test": {"MDAB0", "FELC0"}}
        assert not any("/SA" in name.upper() for names in found.values() for name in names)
        assert len(found["train"]) == 4

    def test_timit_s_lists(self):
        core, val = corpora.TIMIT_CORE.split(), corpora.TIMIT_VAL.split()
        assert (len(core), len(val), len({*core, *val})) == (24, 50, 74)
        assert Counter(name[0] for name in core) == {"m": 16, "f": 8}  # two men and a woman of each of eight regions
        assert all(re.fullmatch(r"[fm][a-z]{3}\d", name) for name in core + val)

    def test_timit_s_whole_test_folder(self, tmp_path):
        corpus(tmp_path, timit())
        found = all_files(speech(tmp_path, "timit", test="/TEST/", val=0.5))
        assert {name.split("/")[3] for name in found["test"]} == {"MDAB0", "FELC0", "FAKS0", "MDAC1"}
        assert len(found["test"]) == 8
        assert len({name.split("/")[3] for name in found["val"]}) == 1

    def test_ljspeech_has_the_last_clips_held_out(self, tmp_path):
        corpus(tmp_path, ljspeech())
        found = all_files(speech(tmp_path, "ljspeech"))
        assert found["test"] == [f"wavs/LJ002-{i:04d}.wav" for i in (28, 29, 30)]
        assert found["val"] == [f"wavs/LJ002-{i:04d}.wav" for i in (25, 26, 27)]
        assert len(found["train"]) == 54

    def test_the_whole_ljspeech(self):
        names = [f"LJSpeech-1.1/wavs/LJ{i // 260:03d}-{i % 260:04d}.wav" for i in range(13100)]
        found = corpora.place_recordings("ljspeech", names)
        assert [r.split for r in found] == ["train"] * 12600 + ["val"] * 250 + ["test"] * 250

    def test_librispeech(self, tmp_path):
        corpus(tmp_path, librispeech())
        found = all_files(speech(tmp_path, "librispeech"))
        assert {split: {name.split("/")[1].split("-")[0] for name in found[split]} for split in SPLITS} == {
            "train": {"train"},
            "val": {"dev"},
            "test": {"test"},
        }
        assert [len(found[split]) for split in SPLITS] == [8, 8, 8]

    def test_one_of_librispeech_s_test_sets(self, tmp_path):
        corpus(tmp_path, librispeech())
        datamodule = speech(tmp_path, "librispeech", test="test-clean", val="dev-clean")
        with pytest.warns(UserWarning, match="8 files that the layout has for validation or test are in"):
            found = all_files(datamodule)
        assert {name.split("/")[1] for name in found["test"]} == {"test-clean"}
        assert {name.split("/")[1] for name in found["val"]} == {"dev-clean"}
        assert {name.split("/")[1] for name in found["train"]} == {"train-clean-100", "train-other-500"}

    def test_a_fraction_is_drawn_from_the_speakers_of_training(self, tmp_path):
        corpus(tmp_path, librispeech())
        datamodule = speech(tmp_path, "librispeech", val=0.25)
        with pytest.warns(UserWarning, match="8 files that the layout has"):
            found = all_files(datamodule)
        who = {split: {name.split("/")[2] for name in found[split]} for split in SPLITS}
        assert len(who["val"]) == 1
        assert len(who["train"]) == 3
        assert not who["val"] & who["train"]
        assert {name.split("/")[1] for name in found["val"]} <= {"train-clean-100", "train-other-500"}

    def test_vctk_keeps_speakers_apart(self, tmp_path):
        corpus(tmp_path, [*vctk(), "wav48/p225/p225_001.wav"])
        drawn = set()
        for seed in range(4):
            found = all_files(speech(tmp_path, "vctk", seed=seed, test=0.25))
            speakers = {split: {name.split("/")[1] for name in found[split]} for split in SPLITS}
            assert [len(speakers[split]) for split in SPLITS] == [8, 1, 3]
            assert len(set.union(*speakers.values())) == 12
            assert sum(map(len, found.values())) == 36, "one microphone, and no recording twice"
            assert all(name.endswith("_mic1.flac") for name in found["train"])
            drawn.add(frozenset(speakers["test"]))
        assert len(drawn) > 1

    def test_the_first_vctk(self, tmp_path):
        corpus(tmp_path, [f"wav48/p{225 + who}/p{225 + who}_{i:03d}.wav" for who in range(10) for i in range(3)])
        found = all_files(speech(tmp_path, "vctk"))
        assert [len(found[split]) for split in SPLITS] == [24, 3, 3]

    def test_blizzard_is_not_trained_on_whole(self):
        with pytest.raises(UserError, match=r"--data.layout blizzard: .* set --data.window 40, .*, or --data.crop 400"):
            Speech("nowhere", layout="blizzard")
        assert Speech("nowhere", layout="blizzard", crop=400).crop == 400

    @pytest.mark.parametrize("layout", ["fsdd", "timit", "ljspeech", "librispeech", "vctk"])
    def test_a_folder_of_another_shape(self, layout, tmp_path):
        corpus(tmp_path, ["a.wav", "b.wav"])
        line = refusal(speech(tmp_path, layout))
        problem = f"none of 2 audio files, a.wav for example, has a path of --data.layout {layout}"
        assert line.startswith(f"--data.root {tmp_path}: {problem}. Fix: choose another layout, or order the files as ")

    def test_no_such_layout(self):
        with pytest.raises(UserError, match=r"--data.layout tedlium: must be one of folder, fsdd, .* manifest"):
            Speech("nowhere", layout="tedlium")

    def test_an_empty_split_is_named(self, tmp_path):
        corpus(tmp_path, [name for name in librispeech() if "train" not in name])
        assert "the train split is empty" in refusal(speech(tmp_path, "librispeech"))

    def test_another_corpus_is_tested_on_its_own_test_split(self, tmp_path):
        state = speech(corpus(tmp_path / "own", [f"{i}.wav" for i in range(20)]), "folder").state_dict()
        other = speech(corpus(tmp_path / "libri", librispeech(), length=9), "librispeech")
        other.load_state_dict(state)
        assert {name.split("/")[1] for name in files(other, "test")} == {"test-clean", "test-other"}

    def test_a_checkpoint_says_nothing_of_what_no_split_wants(self, tmp_path):
        corpus(tmp_path, timit())
        state = speech(tmp_path, "timit").state_dict()
        again = speech(tmp_path, "timit")
        again.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert all_files(again) == all_files(speech(tmp_path, "timit"))


def manifest(root: Path, text: str) -> Speech:
    (root / "list.csv").write_text(text)
    return speech(root / "list.csv", "manifest")


class TestManifest:
    NAMES = [f"clips/{i}.wav" for i in range(12)]

    def test_contract(self, tmp_path):
        root = corpus(tmp_path / "corpus", self.NAMES)
        splits = ["train"] * 6 + ["dev"] * 3 + ["test"] * 3
        rows = [f"{name},{split},x" for name, split in zip(self.NAMES, splits, strict=True)]
        (root / "list.csv").write_text("\n".join(["path,split,text", *rows]))
        check_datamodule(lambda **options: speech(root / "list.csv", "manifest", **options))

    def test_rows_decide(self, tmp_path):
        corpus(tmp_path, [*self.NAMES[:4], "elsewhere.wav"])
        text = 'text, path ,split\nhm,clips/1.wav,VALID\n"a, b",./clips/0.wav,train\n\n,clips\\3.wav,test\n'
        assert all_files(manifest(tmp_path, "\ufeff" + text)) == {
            "train": ["clips/0.wav"],
            "val": ["clips/1.wav"],
            "test": ["clips/3.wav"],
        }

    def test_what_they_leave_open_is_drawn_by_speaker(self, tmp_path):
        corpus(tmp_path, self.NAMES)
        found = all_files(manifest(tmp_path, "path,speaker\n" + "".join(f"{n},{n[6]}\n" for n in self.NAMES)))
        assert sorted(chain(*found.values())) == sorted(self.NAMES)
        who = {split: {name[6] for name in found[split]} for split in SPLITS}
        assert not who["train"] & who["test"]
        assert not who["train"] & who["val"]

    def test_files_outside_its_folder(self, tmp_path):
        corpus(tmp_path / "audio", ["a.wav", "b.wav", "c.wav"])
        (tmp_path / "lists").mkdir()
        text = f"path,split\n../audio/a.wav,train\n{tmp_path}/audio/b.wav,val\n../audio/c.wav,test\n"
        found = all_files(manifest(tmp_path / "lists", text))
        assert found == {"train": ["../audio/a.wav"], "val": [f"{tmp_path}/audio/b.wav"], "test": ["../audio/c.wav"]}

    def test_missing_files_are_counted_and_listed_to_five(self, tmp_path):
        corpus(tmp_path, self.NAMES[:6])
        text = "path,split\n" + "".join(
            f"{n},{s}\n" for n, s in zip(self.NAMES, ["train", "val", "test"] * 4, strict=True)
        )
        line = refusal(manifest(tmp_path, text))
        listed = ", ".join(self.NAMES[6:11])
        assert line.startswith(
            f"{tmp_path}/list.csv: 6 of 12 files that it names are missing: {listed} and more. Fix: "
        )
        lenient = speech(tmp_path / "list.csv", "manifest", skip_bad=True)
        with pytest.warns(UserWarning, match="6 of 12 files that it names are missing"):
            assert [len(names) for names in all_files(lenient).values()] == [2, 2, 2]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "has no column path, its first row is ''"),
            ("file,split\na.wav,train\n", "has no column path, its first row is 'file,split'"),
            ("path,split\n", "0 of 0 files that it names are missing"),
            ("path,split\n,train\n", "row 2 names ''"),
            ("path,split\na.wav,train\na.txt,test\n", "row 3 names 'a.txt'. Fix: name .wav, .flac, .ogg, .sph files"),
            ("path,split\na.wav,training\n", "row 2 has the split 'training'. Fix: write train, valid or test"),
            ("path,split\na.wav\n", "row 2 has the split ''. Fix: write train, valid or test"),
            ("path,split\na.wav,train\n./a.wav,test\n", "row 3 names a.wav again"),
            ("path,split\na/b.wav,train\n{folder}/a/b.wav,test\n", "row 3 names {folder}/a/b.wav again"),
            ("path,split\n../{name}/a.wav,train\na.wav,test\n", "row 3 names a.wav again"),
            ('path,split\n"a.wav,train\n', "cannot be read as csv"),
            ("path,split\na\x00b.wav,train\n", ""),
        ],
    )
    def test_damage(self, tmp_path, text, message):
        text, message = (
            words.replace("{folder}", str(tmp_path)).replace("{name}", tmp_path.name) for words in (text, message)
        )
        assert refusal(manifest(tmp_path, text)).startswith(f"{tmp_path}/list.csv: {message}")

    def test_none_of_the_files_is_there(self, tmp_path):
        manifest(tmp_path, "path\na.wav\nb.wav\n")
        line = refusal(speech(tmp_path / "list.csv", "manifest", skip_bad=True))
        assert line.startswith(f"{tmp_path}/list.csv: 2 of 2 files that it names are missing: a.wav, b.wav. Fix: ")

    def test_what_is_no_manifest(self, tmp_path):
        assert "Is a directory" in refusal(speech(tmp_path, "manifest"))
        assert "no such file" in refusal(speech(tmp_path / "nowhere.csv", "manifest"))
        (tmp_path / "list.csv").write_bytes(b"path\n\xff.wav\n")
        assert "list.csv: cannot be read as csv ('utf-8' codec" in refusal(speech(tmp_path / "list.csv", "manifest"))
        assert "or set --data.layout manifest for a manifest" in refusal(speech(tmp_path / "list.csv", "folder"))


class TestSkipBad:
    @pytest.fixture
    def root(self, tmp_path) -> Path:
        """Twelve good files, and one of every kind of bad ones."""
        root = corpus(tmp_path / "corpus", [f"{i:02d}.wav" for i in range(12)])
        (root / "cut.wav").write_bytes((root / "00.wav").read_bytes()[:150])
        (root / "text.wav").write_text("this is a transcript")
        (root / "zero.flac").write_bytes(b"")
        soundfile.write(root / "none.wav", [], 8000)
        samples = np.zeros(200)
        samples[100] = np.nan
        soundfile.write(root / "nan.wav", samples, 8000, subtype="FLOAT")
        soundfile.write(root / "middle.flac", np.random.default_rng(0).uniform(-1, 1, 100_000), 8000)
        content = bytearray((root / "middle.flac").read_bytes())
        content[60_000:80_000] = bytes(20_000)
        (root / "middle.flac").write_bytes(content)
        read_header(root / "middle.flac")  # which tells nothing
        return root

    BAD = ("cut.wav", "middle.flac", "nan.wav", "none.wav", "text.wav", "zero.flac")

    def test_they_are_skipped_and_counted(self, root):
        datamodule = speech(root, "folder", skip_bad=True)
        with pytest.warns(
            UserWarning, match=r"6 of 18 files are skipped \(--data.skip_bad true\): .*; \.\.\."
        ) as warned:
            datamodule.setup("fit")
        assert len(warned) == 1
        for split in SPLITS:
            for batch in getattr(datamodule, f"{split}_dataloader")():
                assert torch.isfinite(batch.x).all()
        assert sorted(chain(*all_files(datamodule).values())) == [f"{i:02d}.wav" for i in range(12)]

    @pytest.mark.parametrize("name", BAD)
    def test_each_stops_the_run_otherwise(self, root, name):
        for other in self.BAD:
            if other != name:
                (root / other).unlink()
        datamodule = speech(root, "folder", test="0[0-3]", val="0[4-7]")
        with pytest.raises(UserError, match=rf"{name}: (cannot be read as audio \(|holds )") as raised:
            read_all(datamodule)
        assert "\n" not in str(raised.value)

    def test_nothing_is_left(self, tmp_path):
        for i in range(3):
            (tmp_path / f"{i}.wav").write_text("no audio")
        line = refusal(speech(tmp_path, "folder", skip_bad=True))
        assert line.startswith(f"{tmp_path}: none of 3 files can be used: {tmp_path}/0.wav: cannot be read as audio")

    def test_a_folder_without_permission(self, root, monkeypatch):
        for name in self.BAD:
            (root / name).unlink()
        (root / "locked").mkdir()
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        assert refusal(speech(root, "folder")).startswith(
            f"{root}/locked: Permission denied. Fix: give yourself permission"
        )
        datamodule = speech(root, "folder", skip_bad=True)
        with pytest.warns(UserWarning, match=r"1 of 13 files are skipped .*locked: Permission denied"):
            datamodule.setup("fit")

    def test_a_root_that_cannot_be_reached(self, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "stat", refuse)
        monkeypatch.setattr(Path, "exists", refuse)
        assert refusal(speech(tmp_path, "folder")).startswith(f"--data.root {tmp_path}: Permission denied. Fix: ")

    def test_it_may_differ_when_a_checkpoint_is_used_again(self):
        assert {"skip_bad", "layout", "crop"} <= Speech.run_options
