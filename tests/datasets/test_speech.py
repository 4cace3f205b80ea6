"""A folder of recordings: framing, rates, channels, splits, checkpoints, and every refusal."""

from __future__ import annotations

import io
import math
import os
import pickle
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch import Trainer
from vrnn_lightning.datamodules.speech import PATTERNS, Speech

from vrnn_lightning import VRNNLightningModule
from vrnn_lightning.callbacks import Samples
from vrnn_lightning.data import audio
from vrnn_lightning.data.audio import read_header
from vrnn_lightning.data.recordings import LogMelFrames
from vrnn_lightning.errors import UserError
from vrnn_lightning.heads import DiscretisedLogisticMixture, MuLaw
from vrnn_lightning.testing import CHECKS, check_datamodule

RATE = 8000
FRAME = 20
SPLITS = ("train", "val", "test")


def write(path: Path, samples, rate: int = RATE, subtype: str | None = "PCM_16") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    form = "NIST" if path.suffix == ".sph" else None
    soundfile.write(path, np.asarray(samples), rate, subtype=subtype, format=form)
    return path


def tone(samples: int, hertz: float = 440.0, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Twenty-three ragged recordings, wav and flac, in sub-folders."""
    generator = np.random.default_rng(0)
    for i in range(23):
        name = f"speaker{i % 3}/{i}_take_{i % 7}.{('wav', 'flac')[i % 2]}"
        write(tmp_path / "corpus" / name, 0.1 * generator.standard_normal(FRAME * (2 + i % 5) + i))
    return tmp_path / "corpus"


@pytest.fixture
def reads(monkeypatch):
    """The file and the number of samples of every read, but for the last one that shows a flac file to be whole."""
    seen = []
    read = soundfile.SoundFile.read

    def reading(file, frames=-1, *options, **named):
        if frames != 1:
            seen.append((Path(file.name), frames))
        return read(file, frames, *options, **named)

    monkeypatch.setattr(soundfile.SoundFile, "read", reading)
    return seen


def speech(root: Path, **options) -> Speech:
    return Speech(str(root), **{"frame_size": FRAME} | options)


def files(datamodule: Speech, split: str) -> list[str]:
    sequences = datamodule.split(split)
    return [sequences[i].name for i in range(len(sequences))]


def all_files(datamodule: Speech) -> dict[str, list[str]]:
    return {split: files(datamodule, split) for split in SPLITS}


def every_file(datamodule: Speech) -> list[str]:
    return [name for names in all_files(datamodule).values() for name in names]


def only(root: Path, **options):
    """Return the one sequence of a folder with one file."""
    (sequence,) = list(speech(root, **{"test": 0, "val": 0} | options).split("train"))
    return sequence


def set_up(root: Path, stage: str = "fit", **options) -> None:
    speech(root, **options).setup(stage)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("tail", ["drop", "pad"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, tail, window, corpus):
    check(lambda **options: speech(corpus, tail=tail, window=window, **options))


class TestFraming:
    def test_a_ramp_survives_exactly(self, tmp_path):
        ramp = np.arange(-32768, 32767, 7, dtype=np.int16)
        write(tmp_path / "ramp.wav", ramp)
        whole = len(ramp) // FRAME * FRAME
        x = only(tmp_path).x
        assert x.dtype == torch.float32
        assert x.shape == (whole // FRAME, FRAME)
        assert np.array_equal(x.numpy().ravel() * 32768, ramp[:whole])

    @pytest.mark.parametrize("suffix", ["wav", "flac"])
    def test_every_16_bit_value_is_its_integer_over_32768(self, tmp_path, suffix):
        values = np.arange(-32768, 32768, dtype=np.int16)
        write(tmp_path / f"all.{suffix}", values)
        assert np.array_equal(only(tmp_path, frame_size=256).x.numpy().ravel(), values.astype("float64") / 32768)

    def test_tail_is_dropped(self, tmp_path):
        write(tmp_path / "a.wav", tone(3 * FRAME + 5))
        sequence = only(tmp_path, tail="drop")
        assert sequence.x.shape == (3, FRAME)
        assert sequence.observed is None

    def test_tail_is_padded_and_masked_per_sample(self, tmp_path):
        samples = np.arange(1, 3 * FRAME + 6, dtype=np.int16)
        write(tmp_path / "a.wav", samples)
        sequence = only(tmp_path, tail="pad")
        assert sequence.x.shape == sequence.observed.shape == (4, FRAME)
        assert np.array_equal(sequence.x[sequence.observed].numpy() * 32768, samples)
        assert sequence.observed.sum() == len(samples)
        assert sequence.x[~sequence.observed].count_nonzero() == 0

    def test_padding_is_zero_and_uncounted_in_the_batch(self, corpus):
        datamodule = speech(corpus, tail="pad")
        batch = next(iter(datamodule.train_dataloader()))
        assert batch.x[~batch.valid_mask].count_nonzero() == 0
        names = dict(zip(batch.names, batch.valid_mask.sum((1, 2)).tolist(), strict=True))
        assert names == {name: soundfile.info(corpus / name).frames for name in batch.names}

    def test_a_file_of_whole_frames_needs_no_mask(self, tmp_path):
        write(tmp_path / "a.wav", tone(3 * FRAME))
        assert only(tmp_path, tail="pad").observed is None

    def test_a_file_shorter_than_a_frame_is_one_padded_frame(self, tmp_path):
        write(tmp_path / "a.wav", tone(7))
        assert only(tmp_path, tail="pad").observed.sum() == 7

    def test_channels_are_averaged(self, tmp_path):
        left, right = np.arange(FRAME, dtype=np.int16), 5 * np.arange(FRAME, dtype=np.int16)
        write(tmp_path / "a.wav", np.stack([left, right], axis=1))
        assert np.array_equal(only(tmp_path).x.numpy().ravel() * 32768, 3 * np.arange(FRAME))

    def test_the_upper_case_and_the_hidden(self, tmp_path):
        write(tmp_path / "A.WAV", tone(FRAME))
        (tmp_path / "._A.WAV").write_bytes(b"resource fork")
        (tmp_path / "notes.txt").write_text("not audio")
        assert only(tmp_path).name == "A.WAV"

    def test_ogg(self, tmp_path):
        write(tmp_path / "a.ogg", tone(10 * FRAME), subtype="VORBIS")
        assert only(tmp_path).x.shape == (10, FRAME)


class TestRate:
    @pytest.mark.parametrize("rate", [8000, 11025, 44100])
    def test_a_resampled_sine_keeps_its_frequency_and_level(self, tmp_path, rate):
        write(tmp_path / "a.wav", tone(2 * rate, hertz=500, rate=rate), rate)
        x = only(tmp_path, sample_rate=16000, resample=True).x.numpy().ravel()
        assert abs(len(x) - 2 * 16000) <= FRAME
        middle = x[4000:28000]
        peak = np.abs(np.fft.rfft(middle)).argmax() * 16000 / len(middle)
        assert abs(peak - 500) < 16000 / len(middle)
        assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.5, rel=0.01)

    @pytest.mark.parametrize("rate", [7999, 11025, 12345, 44100])
    @pytest.mark.parametrize("tail", ["drop", "pad"])
    def test_lengths_foretell_the_frames_of_a_resampled_file(self, tmp_path, rate, tail):
        for samples in range(rate // 10, rate // 10 + 9):
            write(tmp_path / f"{samples}.wav", tone(samples), rate)
        datamodule = speech(tmp_path, sample_rate=RATE, resample=True, tail=tail, test=0, val=0, frame_size=3)
        assert datamodule.lengths("train") == [len(s.x) for s in datamodule.split("train")]

    def test_the_shared_rate_is_found(self, corpus):
        assert speech(corpus).sample_rate == RATE

    def test_the_option_is_the_rate(self, corpus):
        assert speech(corpus, sample_rate=16000, resample=True).sample_rate == 16000

    def test_two_rates_are_refused(self, tmp_path):
        write(tmp_path / "a.wav", tone(100), 8000)
        odd = write(tmp_path / "b.wav", tone(100), 16000)
        with pytest.raises(
            UserError, match=rf"{odd}: 16000 Hz, but .*a.wav has 8000 Hz. Fix: choose --data.sample_rate"
        ):
            set_up(tmp_path)

    def test_another_rate_is_refused_unless_resampled(self, tmp_path):
        path = write(tmp_path / "utt_003.wav", tone(4000), 44100)
        with pytest.raises(UserError) as raised:
            set_up(tmp_path, sample_rate=16000)
        assert str(raised.value) == f"{path}: 44100 Hz, but --data.sample_rate is 16000. Fix: set --data.resample true"


class TestSplits:
    @pytest.mark.parametrize(
        ("test", "val", "counts"), [(0.1, 0.1, (19, 2, 2)), (0.5, 0.25, (8, 3, 12)), (0, 0.001, (22, 1, 0))]
    )
    def test_fractions_are_exact(self, corpus, test, val, counts):
        datamodule = speech(corpus, test=test, val=val)
        assert tuple(len(datamodule.sequences(split)) for split in SPLITS) == counts

    def test_splits_share_nothing_and_leave_nothing(self, corpus):
        names = every_file(speech(corpus))
        assert sorted(names) == sorted(p.relative_to(corpus).as_posix() for p in corpus.rglob("*.*"))

    def test_the_seed_draws_them(self, corpus):
        assert all_files(speech(corpus, seed=1)) == all_files(speech(corpus, seed=1))
        assert len({tuple(files(speech(corpus, seed=seed), "test")) for seed in range(5)}) > 1

    def test_an_expression_is_searched_in_the_path(self, corpus):
        datamodule = speech(corpus, test="speaker1/", val=r"\.flac$")
        found = all_files(datamodule)
        assert {name.split("/")[0] for name in found["test"]} == {"speaker1"}
        assert {name[-5:] for name in found["val"]} == {".flac"}
        assert {name.split("/")[0] for name in found["train"] + found["val"]} == {"speaker0", "speaker2"}
        assert {name[-4:] for name in found["train"]} == {".wav"}

    def test_the_official_split_of_the_spoken_digits(self, corpus):
        assert {int(name.split("_")[2].split(".")[0]) for name in files(speech(corpus, test="fsdd"), "test")} == set(
            range(5)
        )
        assert not {5, 6} - {int(Path(n).stem[-1]) for n in files(speech(corpus, test="fsdd"), "train")}
        assert "fsdd" in PATTERNS

    @pytest.mark.parametrize("option", ["test", "val"])
    def test_an_expression_that_matches_nothing(self, corpus, option):
        with pytest.raises(UserError, match=f"--data.{option} 'nowhere': matches none of .*take"):
            set_up(corpus, **{option: "nowhere"})

    def test_a_test_split_of_everything(self, corpus):
        with pytest.raises(UserError, match=r"--data.val 'wav': matches none of 0 paths"):
            set_up(corpus, test="take", val="wav")

    def test_nothing_left_to_train_on(self, tmp_path):
        write(tmp_path / "a.wav", tone(FRAME))
        write(tmp_path / "b.wav", tone(FRAME))
        with pytest.raises(UserError, match="the train split is empty"):
            set_up(tmp_path)


class TestScaler:
    @pytest.mark.parametrize("tail", ["drop", "pad"])
    def test_is_numpy_s_over_the_training_samples(self, corpus, tail):
        datamodule = speech(corpus, tail=tail)
        samples = [soundfile.read(corpus / name)[0] for name in files(datamodule, "train")]
        whole = np.concatenate([s if tail == "pad" else s[: len(s) // FRAME * FRAME] for s in samples])
        np.testing.assert_allclose(float(datamodule.scaler.mean), whole.mean(), rtol=1e-6)
        np.testing.assert_allclose(float(datamodule.scaler.std), whole.std(), rtol=1e-6)

    def test_input_statistics_are_known_without_reading(self):
        mean, std = speech(Path("nowhere")).input_statistics()
        assert torch.equal(mean, torch.zeros(FRAME))
        assert torch.equal(std, torch.ones(FRAME))


class TestReading:
    def test_construction_touches_no_disk(self):
        assert speech(Path("nowhere")).num_features == FRAME

    def test_files_are_read_one_by_one(self, corpus, reads):
        datamodule = speech(corpus)
        datamodule.setup("fit")
        datamodule.lengths("train")
        assert reads == [], "headers are enough to set up"
        sequences = datamodule.split("train")
        name = sequences[3].name
        assert reads == [(corpus / name, soundfile.info(corpus / name).frames)]

    def test_the_scaler_reads_each_training_file_once(self, corpus, reads):
        datamodule = speech(corpus)
        _ = datamodule.scaler, datamodule.scaler
        read = [path for path, _ in reads]
        assert sorted(read) == sorted({corpus / name for name in read})
        names = files(datamodule, "train")
        assert set(read) == {corpus / name for name in names}

    @pytest.mark.parametrize("suffix", ["wav", "flac"])
    def test_a_window_of_a_long_file_reads_no_more_than_it(self, tmp_path, reads, suffix):
        write(tmp_path / f"long.{suffix}", tone(100_000 * FRAME), subtype=None)
        train = speech(tmp_path, test=0, val=0).split("train")
        assert train.window(0, 70_000, 70_040).x.shape == (40, FRAME)
        assert reads == [(tmp_path / f"long.{suffix}", 40 * FRAME)]

    def test_a_window_of_a_resampled_file_reads_little_more_than_it(self, tmp_path, reads):
        write(tmp_path / "long.wav", tone(1_000_000, rate=44100), 44100)
        train = speech(tmp_path, test=0, val=0, sample_rate=16000, resample=True).split("train")
        train.window(0, 5_000, 5_040)
        ((_, samples),) = reads
        assert samples < 40 * FRAME * 44100 / 16000 + 1000

    def test_statistics_of_a_long_file_are_taken_in_parts(self, tmp_path, reads, monkeypatch):
        monkeypatch.setattr("vrnn_lightning.data.datamodule.PIECE", 100)
        write(tmp_path / "long.wav", tone(1000 * FRAME + 7))
        datamodule = speech(tmp_path, test=0, val=0, tail="pad")
        samples, _ = soundfile.read(tmp_path / "long.wav")
        reads.clear()
        scaler = datamodule.scaler
        assert [number for _, number in reads] == [100 * FRAME] * 10 + [7]
        np.testing.assert_allclose(float(scaler.mean), samples.mean(), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(float(scaler.std), samples.std(), rtol=1e-6)

    def test_the_collection_holds_no_samples(self, corpus):
        assert len(pickle.dumps(speech(corpus).split("train"))) < 2000

    def test_every_header_is_read_once(self, corpus, monkeypatch):
        seen = []
        monkeypatch.setattr(audio, "read_header", lambda path, *_: seen.append(path) or read_header(path))
        datamodule = speech(corpus)
        datamodule.setup("fit")
        for split in ("train", "val", "test"):
            datamodule.lengths(split)
        assert len(seen) == len(set(seen)) > 0


class TestWindows:
    @pytest.mark.parametrize("units", ["scaled", "pcm16"])
    @pytest.mark.parametrize("tail", ["drop", "pad"])
    @pytest.mark.parametrize(
        ("suffix", "rate", "channels"),
        [("wav", 8000, 1), ("flac", 8000, 2), ("wav", 11025, 2), ("flac", 44100, 1), ("wav", 4000, 1)],
    )
    def test_they_are_parts_of_the_whole(self, tmp_path, suffix, rate, channels, tail, units):
        samples = np.random.default_rng(0).uniform(-0.9, 0.9, (20 * rate // 8 + 7, channels))
        write(tmp_path / f"a.{suffix}", samples, rate, subtype=None)
        datamodule = speech(tmp_path, test=0, val=0, tail=tail, units=units, sample_rate=RATE, resample=True)
        train, (length,) = datamodule.split("train"), datamodule.lengths("train")
        whole = train[0]
        assert len(whole.x) == length
        tolerance = 0 if units == "pcm16" and rate == RATE else 1e-6 if units == "scaled" else 1  # a rounded half
        for size in (1, 7, 40, length, length + 5):
            for first in range(0, length, max(size, 131)):
                part = train.window(0, first, min(first + size, length))
                expected = whole.x[first : first + size]
                torch.testing.assert_close(part.x, expected, rtol=0, atol=tolerance)
                seen = torch.ones_like(expected, dtype=torch.bool) if part.observed is None else part.observed
                there = torch.ones_like(whole.x, dtype=torch.bool) if whole.observed is None else whole.observed
                assert torch.equal(seen, there[first : first + size])
                assert part.name == whole.name

    @pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
    def test_ogg_is_decoded_whole_and_once(self, tmp_path, reads, subtype):
        write(tmp_path / "a.ogg", np.random.default_rng(0).uniform(-0.9, 0.9, 1000 * FRAME), subtype=subtype)
        datamodule = speech(tmp_path, test=0, val=0, window=10, batch_size=2)
        _ = datamodule.scaler
        loader = datamodule.train_dataloader()
        whole = loader.dataset[[0]].x[0]
        reads.clear()
        for batch in loader:
            for x, start, length in zip(batch.x, batch.start, batch.lengths, strict=True):
                assert torch.equal(x[:length], whole[start : start + length])
        assert len(reads) == 1

    def test_a_file_that_broke_off_since_its_header_was_read(self, tmp_path):
        path = write(tmp_path / "a.wav", tone(100 * FRAME))
        datamodule = speech(tmp_path, test=0, val=0, window=10)
        _ = datamodule.scaler
        loader = datamodule.train_dataloader()
        write(path, tone(50 * FRAME))
        with pytest.raises(
            UserError, match=r"a.wav: read \d+ steps from step \d+ on, expected 10. Fix: return the true lengths"
        ):
            list(loader)

    @pytest.mark.parametrize("window", [0, -1])
    def test_an_impossible_window_is_named(self, window):
        with pytest.raises(UserError, match=f"--data.window {window}: must be at least 1"):
            speech(Path("nowhere"), window=window)

    def test_it_may_differ_when_a_checkpoint_is_used_again(self):
        assert "window" in Speech.run_options
        assert speech(Path("nowhere"), window=40).hparams["window"] == 40


class TestCheckpoint:
    def test_a_split_outlives_the_seed_that_drew_it(self, corpus):
        trained, other = speech(corpus, seed=0), speech(corpus, seed=1)
        other.setup("fit")
        before = all_files(other)
        other.load_state_dict(through_a_file(trained.state_dict()))
        assert all_files(other) == all_files(trained) != before
        assert torch.equal(other.scaler.std, trained.scaler.std)

    def test_files_that_came_later_are_left_out_with_one_warning(self, corpus):
        trained = speech(corpus)
        state, before = trained.state_dict(), all_files(trained)
        write(corpus / "new" / "1.wav", tone(FRAME))
        write(corpus / "new" / "2.wav", tone(FRAME))
        grown = speech(corpus)
        grown.load_state_dict(state)
        with pytest.warns(UserWarning, match="2 files that are in no split of the checkpoint are left out") as warned:
            assert all_files(grown) == before
        assert len(warned) == 1
        assert grown.state_dict()["train"] == state["train"]

    def test_files_that_are_gone_move_no_other(self, corpus):
        trained = speech(corpus)
        state, before = trained.state_dict(), all_files(trained)
        gone = {before[split][0] for split in SPLITS}
        for name in gone:
            (corpus / name).unlink()
        shrunk = speech(corpus)
        shrunk.load_state_dict(state)
        assert all_files(shrunk) == {split: [n for n in before[split] if n not in gone] for split in SPLITS}
        assert shrunk.state_dict()["test"] == state["test"], "the next checkpoint still knows them"

    @pytest.mark.parametrize("test", [0.1, "speaker1"])
    def test_another_corpus_is_all_test(self, corpus, tmp_path, test):
        state = speech(corpus, test=test).state_dict()
        for i in range(3):
            write(tmp_path / "other" / f"{i}.wav", tone(FRAME))
        elsewhere = speech(tmp_path / "other", test=test)
        elsewhere.setup("test")
        elsewhere.load_state_dict(state)
        assert files(elsewhere, "test") == ["0.wav", "1.wav", "2.wav"]
        assert len(elsewhere.sequences("train")) == len(elsewhere.sequences("val")) == 0

    def test_a_trained_file_is_never_tested_in_another_corpus(self, corpus, tmp_path):
        trained = speech(corpus)
        shared = files(trained, "train")[0]
        write(tmp_path / "other" / shared, tone(FRAME), RATE)
        write(tmp_path / "other" / "new.wav", tone(FRAME), RATE)
        elsewhere = speech(tmp_path / "other")
        elsewhere.load_state_dict(trained.state_dict())
        assert files(elsewhere, "test") == ["new.wav"]

    def test_the_sample_rate_is_known_without_a_folder(self, corpus):
        generating = speech(Path("nowhere"))
        generating.load_state_dict(through_a_file(speech(corpus).state_dict()))
        assert generating.sample_rate == RATE
        assert float(generating.scaler.std) > 0

    def test_another_corpus_keeps_the_checkpoint_s_rate(self, corpus, tmp_path):
        path = write(tmp_path / "other" / "a.wav", tone(4 * FRAME), 2 * RATE)
        state = speech(corpus).state_dict()
        refused, resampled = speech(tmp_path / "other"), speech(tmp_path / "other", resample=True)
        for datamodule in (refused, resampled):
            datamodule.setup("test")
            datamodule.load_state_dict(state)
        with pytest.raises(UserError, match=f"{path}: 16000 Hz, but the checkpoint's sample rate is 8000"):
            refused.split("test")
        assert resampled.split("test")[0].x.shape == (2, FRAME)
        assert "resample" in Speech.run_options


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"frame_size": 0}, "--data.frame_size 0: must be at least 1"),
            ({"sample_rate": 0}, "--data.sample_rate 0: must lie between 1 and 1000000"),
            ({"batch_size": 0}, "--data.batch_size 0: must be at least 1"),
            ({"test": 1.0}, r"--data.test 1.0: must lie in \[0, 1\)"),
            ({"val": -0.1}, r"--data.val -0.1: must lie in \[0, 1\)"),
            ({"val": float("nan")}, r"--data.val nan: must lie in \[0, 1\)"),
            ({"test": 0.5, "val": 0.5}, "--data.val 0.5 and --data.test 0.5: leave nothing to train on"),
            ({"test": "("}, r"--data.test '\(': is not a regular expression"),
            ({"val": "*"}, r"--data.val '\*': is not a regular expression"),
        ],
    )
    def test_options_at_construction(self, options, message):
        with pytest.raises(UserError, match=message) as raised:
            speech(Path("nowhere"), **options)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
    def test_folders(self, tmp_path, stage):
        with pytest.raises(UserError, match=r"--data.root .*nowhere: no such file or folder"):
            set_up(tmp_path / "nowhere", stage)
        (tmp_path / "empty").mkdir()
        with pytest.raises(
            UserError, match=r"--data.root .*empty: holds no audio. Fix: give a folder of .wav, .flac, .ogg, .sph files"
        ):
            set_up(tmp_path / "empty", stage)
        path = write(tmp_path / "a.wav", tone(FRAME))
        with pytest.raises(UserError, match=r"--data.root .*a.wav: is a file. Fix: give the folder"):
            set_up(path, stage)

    @pytest.mark.parametrize("content", [b"", b"this is not an audio", b"RIFF\x00\x00\x00\x00WAVE"])
    def test_an_unreadable_file(self, corpus, content):
        (corpus / "bad.wav").write_bytes(content)
        with pytest.raises(
            UserError, match=r"corpus/bad.wav: cannot be read as audio \(.+\). Fix: remove it"
        ) as raised:
            set_up(corpus)
        assert "\n" not in str(raised.value)

    def test_an_empty_file(self, corpus):
        write(corpus / "empty.wav", [])
        with pytest.raises(UserError, match=r"corpus/empty.wav: cannot be read as audio .it holds no samples"):
            set_up(corpus)

    def test_a_file_that_breaks_off(self, tmp_path):
        path = write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, 20000))
        path.write_bytes(path.read_bytes()[:9000])
        with pytest.raises(UserError, match=r"a.flac: cannot be read as audio \(it breaks off\)"):
            only(tmp_path)

    def test_a_stream_of_unknown_length(self, tmp_path):
        path = write(tmp_path / "a.flac", tone(1000))
        content = bytearray(path.read_bytes())
        content[21] &= 0xF0  # the 36 bits of the stream's length, 13 bytes into its first block
        content[22:26] = bytes(4)
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a.flac: its \d+ bytes declare .* GB of content"):
            set_up(tmp_path)

    def test_no_file_as_long_as_a_frame(self, tmp_path):
        write(tmp_path / "a.wav", tone(FRAME - 1))
        with pytest.raises(
            UserError, match=r"no file is as long as one frame of 20 samples. Fix: lower --data.frame_size"
        ):
            set_up(tmp_path)

    def test_short_files_are_left_out_with_one_warning(self, corpus):
        for i in range(2):
            write(corpus / f"short{i}.wav", tone(FRAME - 1))
        datamodule = speech(corpus)
        with pytest.warns(UserWarning, match="2 of 25 files are shorter than one frame of 20 samples") as warned:
            names = every_file(datamodule)
        assert len(warned) == 1
        assert len(names) == 23

    def test_padding_keeps_short_files_and_says_nothing(self, corpus):
        write(corpus / "short.wav", tone(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(every_file(speech(corpus, tail="pad"))) == 24

    def test_stereo(self, corpus):
        write(corpus / "two.wav", np.zeros((FRAME, 2)))
        set_up(corpus)
        with pytest.raises(UserError, match=r"corpus/two.wav: 2 channels, but --data.stereo is refuse"):
            set_up(corpus, stereo="refuse")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("split", SPLITS)
    @pytest.mark.parametrize("resample", [False, True])
    def test_a_sample_that_is_no_number(self, corpus, split, value, resample):
        datamodule = speech(corpus, sample_rate=16000 if resample else None, resample=resample, val=0.4, test=0.4)
        _ = datamodule.scaler
        name = next(name for name in files(datamodule, split) if name.endswith(".wav"))
        samples, _ = soundfile.read(corpus / name)
        samples[3] = value
        write(corpus / name, samples, subtype="FLOAT")
        with pytest.raises(UserError, match=f"{name}: holds NaN or infinite samples"):
            list(getattr(datamodule, f"{split}_dataloader")())


@pytest.mark.skipif("VRNN_DATA" not in os.environ, reason="VRNN_DATA names no folder with the spoken digits")
def test_the_spoken_digits():
    root = Path(os.environ.get("VRNN_DATA", "")) / "speech_fsdd" / "recordings"
    datamodule = Speech(str(root), test="fsdd")
    started = time.process_time()
    datamodule.setup("fit")
    assert time.process_time() - started < 2
    assert datamodule.sample_rate == 8000
    assert [len(datamodule.sequences(split)) for split in SPLITS] == [2430, 270, 300]
    assert all(Path(name).stem[-2:] in {f"_{i}" for i in range(5)} for name in files(datamodule, "test"))
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.x.shape[2] == 200
    assert float(batch.x[batch.valid_mask].std()) == pytest.approx(1, abs=0.5)


def test_training_files_seen_from_elsewhere_are_not_tested(corpus, tmp_path):
    """A folder above, a folder moved, another format: a file is known by its name and its number of samples."""
    trained = speech(corpus)
    trained.setup("fit")
    state = trained.state_dict()
    for root in (corpus.parent, *(p for p in corpus.iterdir() if p.is_dir())):
        seen = speech(root)
        seen.setup("test")
        seen.load_state_dict(state)
        with pytest.raises(UserError, match="was trained on"):
            seen.test_dataloader()


class TestUnits:
    @pytest.mark.parametrize("tail", ["drop", "pad"])
    @pytest.mark.parametrize("units", ["amplitude", "pcm16"])
    def test_contract(self, units, tail, corpus):
        check_datamodule(lambda **options: speech(corpus, units=units, tail=tail, **options))

    def test_amplitudes_are_the_model_s(self, corpus):
        scaled, raw = speech(corpus), speech(corpus, units="amplitude")
        batch, expected = (next(iter(d.val_dataloader())) for d in (raw, scaled))
        torch.testing.assert_close(batch.x, scaled.scaler.unscale(expected.x) * expected.mask[..., None])
        assert raw.scaler.mean.tolist() == 0
        assert raw.scaler.std.tolist() == 1
        assert raw.full_scale == scaled.full_scale == 1

    def test_16_bit_numbers_are_the_file_s(self, tmp_path):
        ramp = np.arange(-32768, 32768, 1, dtype=np.int16)
        write(tmp_path / "ramp.wav", ramp)
        x = only(tmp_path, units="pcm16", frame_size=256).x
        assert x.dtype == torch.float32
        assert np.array_equal(x.numpy().ravel(), ramp)
        assert speech(tmp_path, units="pcm16").full_scale == 32768

    @pytest.mark.parametrize("units", ["amplitude", "pcm16"])
    def test_loud_samples_are_cut_off(self, tmp_path, units):
        write(tmp_path / "loud.wav", 3 * tone(FRAME * 8), subtype="FLOAT")
        x = only(tmp_path, units=units).x
        low, high = {"amplitude": (-1, 1), "pcm16": (-32768, 32767)}[units]
        assert (x.min(), x.max()) == (low, high)

    @pytest.mark.parametrize("name", ["stereo", "fine", "resampled"])
    def test_16_bit_numbers_are_whole_whatever_the_file_holds(self, tmp_path, name):
        samples = {"stereo": np.stack([tone(400), tone(400, 300)], 1)}.get(name, tone(400))
        rate = 11025 if name == "resampled" else RATE
        write(tmp_path / "a.wav", samples, rate, "PCM_24" if name == "fine" else "PCM_16")
        x = only(tmp_path, units="pcm16", sample_rate=RATE, resample=True).x
        assert torch.equal(x, x.round())
        assert x.abs().max() > 1000

    @pytest.mark.parametrize("units", ["amplitude", "pcm16"])
    def test_input_statistics_are_those_of_the_training_samples(self, corpus, units):
        datamodule = speech(corpus, units=units)
        train = datamodule.split("train")
        samples = torch.cat([train[i].x.flatten() for i in range(len(train))]).double()
        mean, std = datamodule.input_statistics()
        assert mean.shape == std.shape == (FRAME,)
        assert mean.unique().tolist() == pytest.approx([samples.mean().item()], rel=1e-5)
        assert std.unique().tolist() == pytest.approx([samples.std(correction=0).item()], rel=1e-5)

    def test_other_units_are_refused(self):
        with pytest.raises(UserError, match=r"--data.units decibel: must be one of scaled, amplitude, pcm16"):
            speech("nowhere", units="decibel")

    @pytest.mark.parametrize("tail", ["drop", "pad"])
    def test_a_padded_tail_may_be_missing(self, tail):
        assert speech("nowhere", tail=tail).missing == (tail == "pad")

    @pytest.mark.parametrize("units", ["scaled", "amplitude", "pcm16"])
    def test_real_sequences_sound_alike_in_every_unit(self, corpus, tmp_path, units):
        """The wav file that a training writes holds the recording's own samples."""
        data = speech(corpus, units=units, batch_size=4)
        module = VRNNLightningModule(num_features=FRAME, latent_size=2, hidden_size=4)
        trainer = Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            max_epochs=1,
            limit_train_batches=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Samples(count=1)],
        )
        trainer.fit(module, data)
        first = files(data, "val")[0]
        written, rate = soundfile.read(next((tmp_path / "samples").glob("*_real_0.wav")))
        recorded, _ = soundfile.read(corpus / first)
        assert rate == RATE
        np.testing.assert_allclose(written, recorded[: len(written)], atol=1 / 32768)
        for path in (tmp_path / "samples").glob("*.wav"):
            assert np.abs(soundfile.read(path)[0]).max() <= 1


class TestLogMel:
    @pytest.mark.parametrize("options", [{"crop": 3}, {"window": 2, "tail": "pad", "mel_window": 70}], ids=str)
    def test_contract(self, options, corpus):
        options = {"features": "log_mel", "mel_bands": 4, "mel_window": 30} | options
        check_datamodule(lambda **others: speech(corpus, **options, **others))

    def test_bands_are_the_features(self):
        assert speech(Path("nowhere"), features="log_mel").num_features == 80
        assert speech(Path("nowhere"), features="log_mel", mel_bands=40).num_features == 40
        assert speech(Path("nowhere"), features="log_mel", tail="pad").missing is False
        assert speech(Path("nowhere"), features="log_mel").modality == "roll"
        assert speech(Path("nowhere")).modality == Speech.modality == "audio"

    def test_frames_are_those_of_the_samples(self, tmp_path):
        samples = np.random.default_rng(0).integers(-9000, 9000, 1000).astype(np.int16)
        write(tmp_path / "a.wav", samples)
        x = only(tmp_path, features="log_mel", mel_bands=5, mel_window=60).x
        frames = LogMelFrames(RATE, hop=FRAME, window=60, bands=5, pad=False)
        assert x.shape == ((1000 - 60) // FRAME + 1, 5)
        assert np.array_equal(x.numpy(), frames.cut((samples / 32768).astype(np.float32))[0])

    @pytest.mark.parametrize("tail", ["drop", "pad"])
    def test_windows_are_parts_of_the_whole(self, tmp_path, reads, tail):
        write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-0.9, 0.9, 5003))
        datamodule = speech(tmp_path, test=0, val=0, features="log_mel", mel_bands=6, mel_window=70, tail=tail)
        train, (length,) = datamodule.split("train"), datamodule.lengths("train")
        whole = train[0].x
        assert len(whole) == length
        reads.clear()
        for first, last in ((0, 1), (0, length), (17, 60), (length - 3, length), (length - 1, length)):
            assert torch.equal(train.window(0, first, last).x, whole[first:last])
        assert reads[2] == (tmp_path / "a.flac", 42 * FRAME + 70)

    def test_each_band_is_scaled(self, corpus):
        datamodule = speech(corpus, features="log_mel", mel_bands=4, mel_window=30)
        train = datamodule.split("train")
        rows = torch.cat([train[i].x for i in range(len(train))]).double()
        torch.testing.assert_close(datamodule.scaler.mean, rows.mean(0))
        torch.testing.assert_close(datamodule.scaler.std, rows.std(0, correction=0))
        mean, std = datamodule.input_statistics()
        assert torch.equal(mean, torch.zeros(4))
        assert torch.equal(std, torch.ones(4))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"features": "mfcc"}, "--data.features mfcc: must be one of raw, log_mel"),
            ({"mel_bands": 40}, "--data.mel_bands 40: needs --data.features log_mel"),
            ({"mel_window": 40}, "--data.mel_window 40: needs --data.features log_mel"),
            ({"features": "log_mel", "mel_bands": 0}, "--data.mel_bands 0: must be at least 1"),
            ({"features": "log_mel", "units": "pcm16"}, "--data.units pcm16: is for samples"),
            ({"features": "log_mel", "mel_window": 10}, "--data.mel_window 10: must be at least --data.frame_size, 20"),
        ],
    )
    def test_options_that_make_no_sense(self, options, message):
        with pytest.raises(UserError, match=message):
            speech(Path("nowhere"), **options)

    def test_bands_too_narrow_for_the_window(self, corpus):
        with pytest.raises(
            UserError, match=r"--data.mel_bands 80: band 0 holds no frequency of a window of 30 samples"
        ):
            set_up(corpus, features="log_mel", mel_window=30)

    def test_no_file_as_long_as_a_window(self, tmp_path):
        write(tmp_path / "a.wav", tone(79))
        with pytest.raises(
            UserError, match=r"as one frame of 80 samples. Fix: lower --data.mel_window or set --data.tail"
        ):
            set_up(tmp_path, features="log_mel", mel_bands=4)


class TestCrops:
    @pytest.mark.parametrize("options", [{}, {"window": 2, "tail": "pad", "units": "pcm16"}], ids=str)
    def test_contract(self, options, corpus):
        check_datamodule(lambda **others: speech(corpus, crop=3, **options, **others))

    @pytest.mark.parametrize("suffix", ["wav", "ogg"])
    def test_they_are_stretches_of_the_whole(self, tmp_path, suffix):
        """Every stretch comes up, none other does; an ogg file, which can't be read in parts, is cropped as well."""
        write(tmp_path / f"a.{suffix}", np.random.default_rng(0).uniform(-0.9, 0.9, 10 * FRAME), subtype=None)
        options = {"test": 0, "val": 0, "units": "amplitude"}
        (whole,) = list(speech(tmp_path, **options).split("train"))
        crops = speech(tmp_path, crop=7, **options).split("train")
        starts = set()
        for epoch in range(60):
            (crop,) = list(crops.in_epoch(epoch))
            assert crop.name == whole.name
            assert crop.x.shape == (7, FRAME)
            (start,) = [first for first in range(4) if torch.equal(crop.x, whole.x[first : first + 7])]
            starts.add(start)
        assert starts == {0, 1, 2, 3}
        assert torch.equal(crops[0].x, next(iter(crops.in_epoch(0))).x)

    def test_they_follow_from_seed_epoch_and_path_alone(self, corpus, tmp_path):
        def drawn(root: Path, **options) -> dict[str, torch.Tensor]:
            train = speech(root, crop=2, test=0, val=0, units="pcm16", **options).split("train").in_epoch(5)
            return {train[i].name: train[i].x for i in range(len(train))}

        first, seeded = drawn(corpus), drawn(corpus, seed=1)
        assert any(not torch.equal(first[name], seeded[name]) for name in first)
        for path in sorted(corpus.rglob("*.wav"))[:5]:
            path.unlink()
        fewer = drawn(corpus)
        assert 0 < len(fewer) < len(first)
        assert all(torch.equal(first[name], fewer[name]) for name in fewer)

    def test_a_shorter_recording_is_whole(self, tmp_path):
        write(tmp_path / "a.wav", tone(3 * FRAME + 5))
        datamodule = speech(tmp_path, crop=9, test=0, val=0, tail="pad")
        assert datamodule.lengths("train") == [4]
        assert datamodule.split("train").in_epoch(3)[0].observed.sum() == 3 * FRAME + 5

    def test_the_scaler_is_that_of_all_samples(self, corpus):
        cropped, whole = speech(corpus, crop=1), speech(corpus)
        assert torch.equal(cropped.scaler.std, whole.scaler.std)
        assert torch.equal(cropped.scaler.mean, whole.scaler.mean)
        for split in ("val", "test"):
            assert cropped.lengths(split) == whole.lengths(split)

    def test_no_more_is_read_than_the_crop(self, tmp_path, reads):
        write(tmp_path / "long.wav", tone(100_000 * FRAME))
        train = speech(tmp_path, test=0, val=0, crop=40).split("train")
        assert train[0].x.shape == (40, FRAME)
        assert reads == [(tmp_path / "long.wav", 40 * FRAME)]

    def test_an_impossible_crop_is_named(self):
        with pytest.raises(UserError, match=r"--data.crop 0: must be at least 1"):
            speech(Path("nowhere"), crop=0)


class TestMemory:
    """What is remembered between runs, in a cache of the test's own."""

    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    @pytest.mark.parametrize("options", [{}, {"units": "pcm16"}, {"features": "log_mel", "mel_bands": 4}], ids=str)
    def test_the_second_run_reads_no_samples_to_start(self, corpus, reads, options):
        options = {"tail": "pad"} | options
        first = speech(corpus, **options)
        expected = (first.scaler.mean, first.scaler.std, *first.input_statistics())
        assert reads
        reads.clear()
        second = speech(corpus, **options)
        second.setup("fit")
        found = (second.scaler.mean, second.scaler.std, *second.input_statistics())
        assert reads == []
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))

    @pytest.mark.parametrize(
        "change",
        [{"tail": "pad"}, {"frame_size": 7}, {"seed": 3}, {"units": "amplitude"}, {"sample_rate": 4000}],
        ids=str,
    )
    def test_other_samples_have_other_statistics(self, corpus, change):
        write(corpus / "loud.wav", 9 * tone(FRAME * 50 + 11), subtype="FLOAT")
        options = {"resample": True, "sample_rate": RATE, "test": "1_take", "val": 0.3}
        _ = speech(corpus, **options).input_statistics(), speech(corpus, **options).scaler
        changed = speech(corpus, **options | change)
        mean, std = changed.fit_scaler().mean, changed.input_statistics()[1]
        cached = (float(mean), float(std[0]))
        for file in (corpus.parent / "cache" / "vrnn_lightning").glob("moments-*"):
            file.unlink()
        again = speech(corpus, **options | change)
        assert cached == (float(again.fit_scaler().mean), float(again.input_statistics()[1][0]))

    def test_a_training_file_that_changed_counts(self, corpus):
        before = speech(corpus).scaler.std
        name = files(speech(corpus), "train")[0]
        write(corpus / name, 0.9 * np.ones(40 * FRAME))
        assert float(speech(corpus).scaler.std) > 1.1 * float(before)

    def test_one_process_prepares_what_the_others_need(self, corpus, reads, monkeypatch):
        first = speech(corpus)
        first.prepare_data()
        seen = []
        monkeypatch.setattr(audio, "read_header", lambda path, *_: seen.append(path) or read_header(path))
        speech(corpus).setup("fit")
        assert seen == []

    def test_what_is_wrong_is_said_in_setup(self, tmp_path):
        datamodule = speech(tmp_path / "nowhere")
        datamodule.prepare_data()
        with pytest.raises(UserError, match="no such file or folder"):
            datamodule.setup("fit")


class TestDiscreteLikelihoods:
    """From the numbers of a 16-bit file to their probability, without a rounding."""

    @pytest.fixture
    def ramp(self, tmp_path) -> Path:
        values = np.arange(-32768, 32768, dtype=np.int16)
        for i in range(4):
            write(tmp_path / "ramp" / f"{i}.{('wav', 'flac', 'sph', 'wav')[i]}", np.roll(values, 7 * i))
        return tmp_path / "ramp"

    def batch(self, ramp: Path, units: str, **options):
        datamodule = speech(ramp, units=units, frame_size=256, test="0", val="1", batch_size=2, **options)
        datamodule.setup("fit")
        return next(iter(datamodule.train_dataloader()))

    @pytest.mark.parametrize("options", [{}, {"window": 50}, {"crop": 256}], ids=str)
    def test_every_16_bit_number_reaches_the_mixture(self, ramp, options):
        x = self.batch(ramp, "pcm16", **options).x
        if not options.get("window"):
            assert sorted(x[0].flatten().tolist()) == list(range(-32768, 32768))
        head = DiscretisedLogisticMixture(3, 256, components=2, bits=16, lowest=-32768)
        assert head.supports(x).all()
        assert torch.isfinite(head(torch.zeros(*x.shape[:2], 3)).log_prob(x)).all()
        assert not head.supports(x + 0.25).any()

    def test_every_16_bit_number_reaches_its_mu_law_bin(self, ramp):
        x = self.batch(ramp, "amplitude").x
        head = MuLaw(3, 256)
        assert head.supports(x).all()
        numbers = x[0].flatten().double() * 32768
        assert sorted(numbers.tolist()) == list(range(-32768, 32768))
        with torch.no_grad():
            for weights in (head.linear.weight, head.linear.bias):
                weights.zero_()
            head.linear.bias.view(256, 256)[:] = torch.arange(256) / 10
        features = torch.zeros(x.shape[1], 3)
        frames = head(features).log_prob(x[0].detach())
        companded = numbers.sign() * (255 * (numbers / 32768).abs()).log1p() / math.log(256)
        bins = ((companded + 1) / 2 * 255).round().view(-1, 256)
        expected = (bins / 10 - torch.logsumexp(torch.arange(256).double() / 10, 0)).sum(1)
        torch.testing.assert_close(frames.double(), expected, rtol=1e-5, atol=1e-3)

    @pytest.mark.parametrize(
        ("units", "emission"),
        [("pcm16", partial(DiscretisedLogisticMixture, components=2, bits=16, lowest=-32768)), ("amplitude", MuLaw)],
    )
    def test_a_model_trains_on_them(self, corpus, tmp_path, units, emission):
        module = VRNNLightningModule(num_features=FRAME, latent_size=2, hidden_size=4, emission=emission)
        trainer = Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, speech(corpus, units=units, batch_size=8))
        assert math.isfinite(trainer.callback_metrics["val/elbo"])


@pytest.mark.parametrize("option", [{"tail": "cut"}, {"stereo": "left"}, {"sample_rate": 10**7}])
def test_words_and_rates_that_no_option_knows(option):
    (name,) = option
    with pytest.raises(UserError, match=f"--data.{name} {option[name]}: must "):
        Speech("recordings", **option)
