"""Audio files of every format, what their headers give away, the index of a corpus, and log-mel frames."""

from __future__ import annotations

import os
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from vrnn_lightning.data import InvalidFiles, audio, cache, folders
from vrnn_lightning.data.audio import check_samples, index_audio, opened, read_header, read_samples, resampled_length
from vrnn_lightning.data.recordings import FLOOR, LogMelFrames, mel_filters
from vrnn_lightning.errors import UserError

RATE = 8000
RAMP = np.arange(-32768, 32768, 16, dtype=np.int16)
FORMATS = {
    "wav": ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "MS_ADPCM"),
    "flac": ("PCM_S8", "PCM_16", "PCM_24"),
    "ogg": ("VORBIS", "OPUS"),
    "sph": ("PCM_16", "PCM_24", "ULAW"),
}
EVERY = [(suffix, subtype) for suffix, subtypes in FORMATS.items() for subtype in subtypes]


def write(path: Path, samples, subtype: str | None = "PCM_16", rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nist = "NIST" if path.suffix == ".sph" else None
    soundfile.write(path, np.asarray(samples), rate, subtype=subtype, format=nist)
    return path


def sphere(path: Path, samples, coding: str = "pcm") -> Path:
    """Write a SPHERE file as TIMIT's are, by its specification."""
    samples = np.asarray(samples, dtype="<i2")
    fields = (
        "database_id -s5 TIMIT",
        "channel_count -i 1",
        f"sample_count -i {len(samples)}",
        "sample_rate -i 16000",
        "sample_n_bytes -i 2",
        "sample_byte_format -s2 01",
        f"sample_coding -s{len(coding)} {coding}",
        "end_head",
    )
    head = "NIST_1A\n   1024\n" + "\n".join(fields) + "\n"
    path.write_bytes(head.encode().ljust(1024) + samples.tobytes())
    return path


def read(path: Path, start: int = 0, stop: int | None = None):
    with opened(path) as file:
        return read_samples(path, file, file.samplerate, start, stop)


class TestFormats:
    @pytest.mark.parametrize(
        ("suffix", "subtype", "levels"),
        [("wav", "PCM_U8", 256), ("flac", "PCM_S8", 256)]
        + [(suffix, "PCM_16", 65536) for suffix in ("wav", "flac", "sph")]
        + [(suffix, subtype, 65536) for suffix in ("wav", "flac", "sph") for subtype in ("PCM_24",)]
        + [("wav", subtype, 65536) for subtype in ("PCM_32", "FLOAT", "DOUBLE")],
    )
    def test_what_the_format_can_hold_is_exact(self, tmp_path, suffix, subtype, levels):
        """Every 8-bit or 16-bit number, over half their count: what a float32 says of it."""
        values = np.arange(-levels // 2, levels // 2) / (levels / 2)
        path = write(tmp_path / f"a.{suffix}", values, subtype)
        assert read_header(path).samples == levels
        assert read(path).dtype == np.float32
        assert np.array_equal(read(path), values)

    def test_24_bits_are_exact(self, tmp_path):
        values = np.arange(-(2**23), 2**23, 997) / 2**23
        assert np.array_equal(read(write(tmp_path / "a.wav", values, "PCM_24")), values)

    @pytest.mark.parametrize("name", ["SI1.WAV", "si1.sph"])
    def test_timit_s_wav_files_are_sphere(self, tmp_path, name):
        path = sphere(tmp_path / name, RAMP)
        header = read_header(path)
        assert (header.samples, header.rate, header.channels) == (len(RAMP), 16000, 1)
        assert np.array_equal(read(path) * 32768, RAMP)
        assert np.array_equal(read(path, 100, 200) * 32768, RAMP[100:200])

    def test_compressed_sphere_is_named(self, tmp_path):
        path = sphere(tmp_path / "a.sph", RAMP, "pcm,embedded-shorten-v2.00")
        with pytest.raises(UserError, match=r"a.sph: cannot be read as audio \(.*unimplemented format"):
            read_header(path)

    def test_another_suffix_is_no_other_content(self, tmp_path):
        path = write(tmp_path / "a.flac", RAMP).rename(tmp_path / "a.wav")
        assert np.array_equal(read(path) * 32768, RAMP)


def broken(tmp_path: Path, suffix: str, subtype: str, share: float) -> Path:
    path = write(tmp_path / f"a.{suffix}", np.random.default_rng(0).uniform(-1, 1, 20000), subtype)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def told(path: Path) -> str | None:
    """Return what reading a file is refused with."""
    try:
        read_header(path)
        check_samples(path)
    except UserError as error:
        return str(error)
    return None


class TestDamage:
    @pytest.mark.parametrize("share", [0.999, 0.5, 0.1, 0.001])
    @pytest.mark.parametrize(("suffix", "subtype"), EVERY)
    def test_what_breaks_off_is_known_from_the_header(self, tmp_path, suffix, subtype, share):
        reason = r"cannot be read as audio \(.+\). Fix: remove it or convert it"
        unknown = "its .* bytes declare .*. Fix: copy the file again"  # older releases of libsndfile know no length
        with pytest.raises(UserError, match=rf"a\.\w+: ({reason}|{unknown})") as raised:
            read_header(broken(tmp_path, suffix, subtype, share))
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(("suffix", "subtype"), EVERY)
    def test_what_is_whole_is_not_refused(self, tmp_path, suffix, subtype, monkeypatch):
        monkeypatch.setattr(audio, "BLOCK", 999)
        path = broken(tmp_path, suffix, subtype, 1)
        assert read_header(path).samples >= 20000
        check_samples(path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "Format not recognised"),
            (b"this is not an audio", "Format not recognised"),
            (b"NIST_1A\n", "Format not recognised"),
            (b"NIST_1A\n   1024\nsample_count -i many\nend_head\n" + bytes(2000), "unimplemented format"),
            (b"RIFF\x24\x00\x00\x00WAVE", "No 'data' chunk marker"),
            (b"OggS" + bytes(30), "unimplemented format"),
        ],
    )
    def test_content_that_is_no_audio(self, tmp_path, content, reason):
        (tmp_path / "a.wav").write_bytes(content)
        with pytest.raises(UserError, match=rf"a.wav: cannot be read as audio \(.*{reason}"):
            read_header(tmp_path / "a.wav")

    def test_a_stream_whose_size_was_not_known_is_read_to_its_end(self, tmp_path):
        path = write(tmp_path / "a.wav", RAMP)
        content = bytearray(path.read_bytes())
        place = content.index(b"data") + 4
        content[place : place + 4] = b"\xff\xff\xff\xff"
        path.write_bytes(content)
        assert read_header(path).samples == len(RAMP)

    def test_chunks_after_and_before_the_samples_are_passed_over(self, tmp_path):
        path = write(tmp_path / "a.wav", RAMP)
        content = path.read_bytes()
        place = content.index(b"data")
        odd = b"LIST\x03\x00\x00\x00abc\x00"
        path.write_bytes(content[:place] + odd + content[place:] + odd)
        assert read_header(path).samples == len(RAMP)

    def test_a_folder_of_that_name(self, tmp_path):
        (tmp_path / "a.wav").mkdir()
        with pytest.raises(UserError, match=r"a.wav: Is a directory"):
            read_header(tmp_path / "a.wav")

    def test_no_permission(self, tmp_path, monkeypatch):
        path = write(tmp_path / "a.wav", RAMP)

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(UserError, match=r"a.wav: Permission denied"):
            read_header(path)

    def test_damage_in_the_middle_shows_when_read(self, tmp_path):
        path = write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, 200_000))
        content = bytearray(path.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 20_000] = bytes(20_000)
        path.write_bytes(content)
        read_header(path)
        with pytest.raises(UserError, match=r"a.flac: cannot be read as audio \(.+\). Fix: remove it"):
            check_samples(path)

    def test_no_bytes_give_a_traceback(self, tmp_path):
        """Bytes changed, cut out, or cut off at random: samples, or one line."""
        generator = np.random.default_rng(0)
        refused = 0
        for suffix, subtype in EVERY:
            whole = broken(tmp_path, suffix, subtype, 1).read_bytes()
            for trial in range(24):
                content = bytearray(whole)
                place = int(generator.integers(0, 120 if trial % 2 else len(whole)))
                if trial % 3 == 0:
                    content[place : place + 4] = generator.bytes(4)
                elif trial % 3 == 1:
                    del content[place : place + int(generator.integers(1, 300))]
                else:
                    del content[place:]
                path = tmp_path / f"fuzz.{suffix}"
                path.write_bytes(content)
                said = told(path)
                assert said is None or (said.startswith(f"{path}: ") and "\n" not in said)
                refused += said is not None
        assert refused > len(EVERY) * 8


@pytest.fixture
def corpus(tmp_path) -> Path:
    for i in range(6):
        write(tmp_path / "corpus" / f"{i}.wav", RAMP[: 100 + i])
    return tmp_path / "corpus"


@pytest.fixture
def headers(monkeypatch):
    """The files whose headers were read."""
    seen = []
    monkeypatch.setattr(audio, "read_header", lambda path, *_: seen.append(path.name) or read_header(path))
    return seen


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vrnn_lightning"


def indexed(corpus: Path, skip: bool = False):
    return index_audio(corpus, sorted(path.name for path in corpus.iterdir()), InvalidFiles(skip))


class TestIndex:
    def test_files_are_opened_once(self, corpus, headers):
        first = indexed(corpus)
        assert len(headers) == 6
        assert indexed(corpus) == first
        assert len(headers) == 6
        assert [file.samples for file in first.values()] == [100, 101, 102, 103, 104, 105]

    def test_a_file_that_changed_is_opened_again(self, corpus, headers):
        indexed(corpus)
        headers.clear()
        write(corpus / "2.wav", RAMP[:50])
        stat = (corpus / "3.wav").stat()
        write(corpus / "3.wav", RAMP[200:303], rate=16000)  # as many bytes
        os.utime(corpus / "3.wav", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        (corpus / "4.wav").unlink()
        write(corpus / "6.wav", RAMP)
        found = indexed(corpus)
        assert headers == ["2.wav", "3.wav", "6.wav"]
        assert found["2.wav"].samples == 50
        assert found["3.wav"].rate == 16000
        assert "4.wav" not in found

    def test_corpora_are_kept_apart(self, corpus, tmp_path, headers):
        write(tmp_path / "other" / "0.wav", RAMP)
        stat = (corpus / "0.wav").stat()
        os.utime(tmp_path / "other" / "0.wav", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        indexed(corpus)
        assert indexed(tmp_path / "other")["0.wav"].samples == len(RAMP)

    @pytest.mark.parametrize("damage", ["cut", "other", "empty"])
    def test_a_damaged_index_is_built_again(self, corpus, headers, cached, damage):
        first = indexed(corpus)
        (file,) = cached.iterdir()
        content = file.read_text()
        file.write_text({"cut": content[:-9], "other": "[]", "empty": ""}[damage])
        headers.clear()
        assert indexed(corpus) == first
        assert len(headers) == 6
        headers.clear()
        assert indexed(corpus) == first
        assert headers == []

    def test_bytes_that_are_no_text(self, corpus, headers, cached):
        first = indexed(corpus)
        next(cached.iterdir()).write_bytes(bytes(range(256)))
        assert indexed(corpus) == first

    def test_a_cache_that_cannot_be_written_is_no_error(self, corpus, tmp_path, monkeypatch, headers):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert len(indexed(corpus)) == len(indexed(corpus)) == 6
        assert len(headers) == 12
        assert (tmp_path / "file").read_text() == ""

    def test_a_full_disk_leaves_no_part(self, corpus, cached, monkeypatch):
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        indexed(corpus)
        assert list(cached.iterdir()) == []

    def test_the_cache_lies_where_the_user_s_caches_do(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        for given in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", given)
            cache.remember(f"a{given}", [1.5, "ü", None])
            assert cache.recall(f"a{given}") == [1.5, "ü", None]
            assert (tmp_path / "home" / ".cache" / "vrnn_lightning" / f"a{given}.json").is_file()

    def test_writers_at_once_leave_one_whole_value(self, cached):
        values = [[i] * 20_000 for i in range(4)]

        def write_and_read(value):
            for _ in range(10):
                cache.remember("a", value)
                seen.append(cache.recall("a"))

        seen: list = []
        threads = [threading.Thread(target=write_and_read, args=(value,)) for value in values]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 40
        assert all(value in values for value in seen)
        assert [path.name for path in cached.iterdir()] == ["a.json"]

    def test_numbers_come_back_exactly(self):
        values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308]
        cache.remember("numbers", values)
        assert cache.recall("numbers") == values

    def test_bad_files_are_skipped_and_counted(self, corpus):
        (corpus / "1.wav").write_bytes(b"text")
        (corpus / "2.wav").write_bytes((corpus / "2.wav").read_bytes()[:80])
        nan = np.zeros(100)
        nan[50] = np.nan
        write(corpus / "3.wav", nan, "FLOAT")
        with pytest.raises(UserError, match=r"1.wav: cannot be read as audio"):
            indexed(corpus)
        bad = InvalidFiles(skip=True)
        names = sorted(path.name for path in corpus.iterdir())
        assert list(index_audio(corpus, [*names, "gone.wav"], bad)) == ["0.wav", "4.wav", "5.wav"]
        assert [re.split(r" \(| or dir", line.split("corpus/")[1])[0] for line in bad.problems] == [
            "1.wav: cannot be read as audio",
            "2.wav: cannot be read as audio",
            "3.wav: holds NaN or infinite samples. Fix: correct or remove it",
            "gone.wav: No such file",
        ]

    def test_files_are_read_to_their_end_once_if_bad_ones_are_skipped(self, corpus, monkeypatch):
        seen = []
        monkeypatch.setattr(audio, "check_samples", lambda path: seen.append(path.name))
        indexed(corpus)
        assert seen == []
        indexed(corpus, skip=True)
        assert len(seen) == 6
        indexed(corpus, skip=True)
        indexed(corpus)
        assert len(seen) == 6

    def test_a_mended_file_is_found_again(self, corpus):
        content = (corpus / "1.wav").read_bytes()
        (corpus / "1.wav").write_bytes(content[:90])
        assert len(indexed(corpus, skip=True)) == 5
        (corpus / "1.wav").write_bytes(content)
        assert len(indexed(corpus, skip=True)) == 6


class TestProgress:
    @pytest.fixture
    def count(self, monkeypatch, capsys):
        """Return what standard error shows of counting."""

        def run(terminal: bool = True) -> str:
            monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
            assert list(folders.tracked(range(5), "counting")) == [0, 1, 2, 3, 4]
            return capsys.readouterr().err

        return run

    def test_quick_work_shows_none(self, count):
        assert "counting" not in count()

    def test_long_work_shows_one(self, count, monkeypatch):
        monkeypatch.setattr(folders, "PATIENCE", 0)
        assert "counting:   0%" in count()
        assert count(terminal=False) == ""

    def test_other_processes_show_none(self, count, monkeypatch):
        monkeypatch.setattr(folders, "PATIENCE", 0)
        monkeypatch.setattr(folders.rank_zero_only, "rank", 1)
        assert count() == ""


class TestLogMel:
    def test_the_scale_is_htk_s(self):
        """1000 Hz is 999.99 mel; by hand for two bands up to 700 Hz, whose mel is 2595 log10(2)."""
        filters = mel_filters(2, 1400, 1400)
        corners = [700 * (2 ** (k / 3) - 1) for k in range(4)]
        for band in range(2):
            low, center, high = corners[band : band + 3]
            for hertz in range(701):
                rise, fall = (hertz - low) / (center - low), (high - hertz) / (high - center)
                assert filters[hertz, band] == pytest.approx(max(0.0, min(rise, fall)), abs=1e-12)

    def test_neighbours_sum_to_one_between_the_outer_centers(self):
        filters = mel_filters(40, 4096, 16000)
        middle = filters.argmax(0)
        inner = filters[middle[0] + 1 : middle[-1]]
        np.testing.assert_allclose(inner.sum(1), 1, atol=1e-12)
        assert (np.diff(middle) > 0).all()

    def test_a_tone_lands_in_its_band(self):
        frames = LogMelFrames(16000, hop=160, window=400, bands=40, pad=False)
        centers = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42)[1:-1] / 2595) - 1)
        for band in (5, 20, 35):
            tone = 0.5 * np.sin(2 * np.pi * centers[band] * np.arange(1600) / 16000)
            x, _ = frames.cut(tone.astype(np.float32))
            assert (x.argmax(1) == band).all()

    def test_a_frame_is_its_definition(self):
        samples = np.random.default_rng(0).uniform(-1, 1, 50).astype(np.float32)
        frames = LogMelFrames(8000, hop=10, window=20, bands=3, pad=False)
        x, observed = frames.cut(samples)
        assert x.shape == (4, 3)
        assert observed is None
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(20) / 20)
        for t in range(4):
            part = np.zeros(32)
            part[:20] = samples[10 * t : 10 * t + 20] * hann
            bins = np.exp(-2j * np.pi * np.outer(np.arange(17), np.arange(32)) / 32) @ part
            expected = np.log(np.abs(bins) ** 2 @ mel_filters(3, 32, 8000) + FLOOR)
            np.testing.assert_allclose(x[t], expected, rtol=1e-5)

    def test_silence_is_the_floor(self):
        x, _ = LogMelFrames(8000, 10, 20, 3, False).cut(np.zeros(40, dtype=np.float32))
        np.testing.assert_allclose(x, np.log(FLOOR), rtol=1e-6)

    @pytest.mark.parametrize("pad", [False, True])
    def test_parts_are_those_of_the_whole(self, pad):
        frames = LogMelFrames(8000, hop=30, window=100, bands=8, pad=pad)
        for length in (*range(95, 140), 100_003):
            samples = np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)
            whole, _ = frames.cut(samples)
            assert len(whole) == frames.count(length)
            for first, last in {
                (0, len(whole)),
                (len(whole) // 2, len(whole)),
                (len(whole) - 1, len(whole)),
                (7, 2000),
            }:
                if 0 <= first < last <= len(whole):
                    start, stop = frames.span(first, last)
                    part, _ = frames.cut(samples[start:stop])
                    assert np.array_equal(part, whole[first:last])

    def test_a_tail_is_dropped_or_filled(self):
        assert [LogMelFrames(8000, 30, 100, 8, False).count(n) for n in (0, 99, 100, 129, 130)] == [0, 0, 1, 1, 2]
        assert [LogMelFrames(8000, 30, 100, 8, True).count(n) for n in (0, 1, 100, 101, 130, 131)] == [0, 1, 1, 2, 2, 3]

    def test_bands_that_hold_nothing_are_refused(self):
        with pytest.raises(
            UserError, match=r"--data.mel_bands 200: band 0 holds no frequency of a window of 100 samples"
        ):
            LogMelFrames(8000, 50, 100, 200, False)

    def test_it_travels_light(self):
        frames = LogMelFrames(16000, 200, 800, 80, False)
        again = pickle.loads(pickle.dumps(frames))
        assert len(pickle.dumps(frames)) < 500
        samples = np.random.default_rng(0).uniform(-1, 1, 2000).astype(np.float32)
        assert np.array_equal(again.cut(samples)[0], frames.cut(samples)[0])


def test_resampled_lengths():
    assert [resampled_length(n, 44100, 16000) for n in (0, 1, 44100, 44101)] == [0, 1, 16000, 16001]


def test_a_rate_that_no_sound_has(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(100), 8000)
    content = path.read_bytes()
    path.write_bytes(content[:24] + b"\xff\xff\xff\x7f" + content[28:])
    with pytest.raises(UserError, match="its header says 2147483647 Hz"):
        read_header(path)
