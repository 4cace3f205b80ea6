"""Files are whole or not there, and what they hold is believed only after it was compared with their bytes."""

import csv
import errno
import io
import os
import pickle
import stat
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest

from vrnn_lightning.data import read_archive
from vrnn_lightning.data.rolls import read_midi, read_note_lists
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import (
    csv_line,
    explained,
    read_cell,
    replacing,
    require_intact_zip,
    require_local,
    require_plain_yaml,
    text_cell,
    write_files,
)
from vrnn_lightning.resuming.checkpoint import WholeCheckpoints


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def one_line(match: str):
    """Expect one line."""
    return pytest.raises(UserError, match=rf"\A[^\n]*{match}[^\n]*Fix: [^\n]+\Z")


class TestReplacing:
    def test_the_earlier_file_stays_until_the_block_ends(self, tmp_path):
        path = tmp_path / "new" / "a.txt"
        with replacing(path) as temporary:
            temporary.write_text("one")
        with replacing(path) as temporary:
            temporary.write_text("two")
            assert path.read_text() == "one"
            assert temporary.parent == path.parent, "a rename between file systems is a copy"
        assert path.read_text() == "two"
        assert left(path.parent) == ["a.txt"]

    def test_an_error_leaves_the_earlier_file(self, tmp_path):
        (tmp_path / "a").write_text("one")
        with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as temporary:
            temporary.write_text(f"tw{1 / 0}")
        assert (tmp_path / "a").read_text() == "one"
        assert left(tmp_path) == ["a"]

    def test_file_and_folder_are_flushed_in_order(self, tmp_path, monkeypatch):
        done = []
        monkeypatch.setattr(os, "fsync", lambda handle: done.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
        monkeypatch.setattr(Path, "replace", lambda *_: done.append("replace"))
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("one")
        assert done == [False, "replace", True]

    @pytest.mark.parametrize("where", ["fsync", "replace"])
    def test_a_full_disk(self, tmp_path, monkeypatch, where):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        (tmp_path / "a").write_text("one")
        monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (Path, "replace")), full)
        with one_line("--x .*/a: No space left on device"), replacing(tmp_path / "a", "--x") as new:
            new.write_text("two")
        assert (tmp_path / "a").read_text() == "one"
        assert left(tmp_path) == ["a"]

    def test_what_stands_in_the_way(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "folder").mkdir()
        for path, match in (
            (tmp_path / "folder", "Is a directory"),
            (tmp_path / "file" / "a", "(Not a directory|File exists)"),
            (tmp_path / ("x" * 300), "File name too long"),
            (tmp_path / "a\0b", "null byte"),
            (Path("/proc/nowhere/a"), "/proc"),
        ):
            with one_line(match), replacing(path, "--x") as temporary:
                temporary.write_text("yours")
        assert left(tmp_path) == ["file", "folder"]

    def test_a_name_as_long_as_names_may_be(self, tmp_path):
        with replacing(tmp_path / ("ä" * 127)) as temporary:
            temporary.write_text("one")
        assert left(tmp_path) == ["ä" * 127]

    def test_a_folder_that_is_deleted_meanwhile(self, tmp_path):
        with one_line("gone"), replacing(tmp_path / "gone" / "a") as temporary:
            temporary.parent.rmdir()
            temporary.write_text("one")

    def test_several_files_are_replaced_when_all_are_there(self, tmp_path, monkeypatch):
        write_files({tmp_path / "a": b"1", tmp_path / "b": b"1"})
        (tmp_path / "c").mkdir()
        with one_line("/c: Is a directory"):
            write_files({tmp_path / "a": b"2", tmp_path / "c": b"2"})
        assert (tmp_path / "a").read_bytes() == b"1"
        assert left(tmp_path) == ["a", "b", "c"]


class TestRemote:
    URL = "memory://bucket/run/a.ckpt"

    def test_a_checkpoint_is_written_as_lightning_writes_it(self):
        for content in ({"epoch": 1}, {"epoch": 2}):
            WholeCheckpoints().save_checkpoint(content, self.URL)
            assert WholeCheckpoints().load_checkpoint(self.URL) == content
            assert fsspec.filesystem("memory").find("/bucket") == ["/bucket/run/a.ckpt"]

    def test_folders_that_are_written_file_by_file_are_local(self, tmp_path):
        assert require_local(str(tmp_path), "--x") == tmp_path
        with one_line("--x s3://bucket: is remote"):
            require_local("s3://bucket", "--x")


class TestReading:
    def test_an_error_names_the_file_and_the_option(self, tmp_path):
        with one_line(f"--x {tmp_path}/a: No such file"), explained(tmp_path, "--x"):
            (tmp_path / "a").read_text()

    def test_a_zip_with_a_flipped_bit(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a", "w") as archive:
            archive.writestr("one", bytes(100))
        require_intact_zip(tmp_path / "a")
        content = bytearray((tmp_path / "a").read_bytes())
        content[60] ^= 1
        (tmp_path / "a").write_bytes(content)
        with one_line("--x .*/a: is damaged"):
            require_intact_zip(tmp_path / "a", "--x")

    def test_a_renamed_array_is_damage(self, tmp_path):
        """Otherwise a flipped bit would hide the validation split, and another would be drawn."""
        path = tmp_path / "a.npz"
        np.savez(path, train_values=np.zeros((1, 1)), train_lengths=np.ones(1, int), valid_values=np.zeros((1, 1)))
        content = path.read_bytes()
        place = content.rindex(b"valid_values")
        path.write_bytes(content[:place] + b"w" + content[place + 1 :])
        with one_line("can't be read as an .npz archive"):
            read_archive(path, "train", 1)

    def test_a_directory_without_members_is_damage(self, tmp_path):
        path = tmp_path / "a.npz"
        np.savez(path, test_values=np.zeros((1, 1)))
        content = path.read_bytes()
        path.write_bytes(content[:-14] + bytes(14))  # what tells how many there are, and where
        for read in (require_intact_zip, lambda path: read_archive(path, "train", 1)):
            with one_line("its directory lacks members"):
                read(path)

    @pytest.mark.parametrize("order", ["C", "F"])
    def test_arrays_are_those_that_numpy_reads(self, tmp_path, order):
        values = np.asarray(np.random.default_rng(0).normal(size=(7, 3)), order=order)
        np.savez_compressed(tmp_path / "a.npz", train_values=values.astype(">f4"), train_lengths=np.array([3, 4]))
        found = read_archive(tmp_path / "a.npz", "train", 3)
        assert np.array_equal(found.values, values.astype("f4"))

    def test_a_zip_bomb_has_a_limit(self, tmp_path):
        path = tmp_path / "a.npz"
        np.savez_compressed(path, train_values=np.zeros((10**6, 1)), train_lengths=np.array([10**6]))
        with one_line(r"a.npz: its \d+ bytes declare 0.0 GB of content, more than --data.max_gb 0.001"):
            read_archive(path, "train", 1, max_gb=0.001)
        assert len(read_archive(path, "train", 1).values) == 10**6

    def test_a_note_far_away(self, tmp_path):
        mido = pytest.importorskip("mido")
        track = mido.MidiTrack()
        for gap in (0, 2**27):
            track.append(mido.Message("note_on", note=60, velocity=64, time=gap))
            track.append(mido.Message("note_off", note=60, time=96))
        mido.MidiFile(ticks_per_beat=96, tracks=[track]).save(tmp_path / "a.mid")
        with one_line(r"a.mid: lasts \d+ quarter notes, more than --data.max_quarters 20000"):
            read_midi(tmp_path / "a.mid", 4)
        with one_line("--data.max_gb 0.1"):
            read_midi(tmp_path / "a.mid", 4, max_quarters=10**7, max_gb=0.1)
        assert len(read_midi(tmp_path / "a.mid", 1, max_quarters=10**7).spans) == 2

    def test_a_roll_that_a_pickle_names_many_times(self, tmp_path):
        path, roll = tmp_path / "a.pickle", [[60]] * 10000
        path.write_bytes(pickle.dumps({"train": [roll] * 10000}))
        with one_line("8.8 GB of content"):
            read_note_lists(path, "train")

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("a: &a [x, x]\n" + "".join(f"{'b' * i}: &x{i} [*a, *a]\n" for i in range(1, 3)), None),
            (
                "x0: &x0 [1, 1]\n" + "".join(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 25)),
                "more than 200000 values",
            ),
            ("[" * 300 + "]" * 300, "nested"),
            ("[" * 9999, "nested"),
            ("{a: [1, 2", None),
        ],
    )
    def test_yaml(self, text, match):
        if match is None:
            require_plain_yaml(text, "a.yaml")
        else:
            with one_line(f"a.yaml: .*{match}"):
                require_plain_yaml(text, "a.yaml")

    def test_a_config_of_aliases_is_one_line(self, lightning, folder):
        lines = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}' if i else 'x'] * 9)}]\n" for i in range(9)]
        (folder / "a.yaml").write_text("".join(lines))
        for words in (("-c", "a.yaml"), ("--data", "Sines", "--trainer", "a.yaml")):
            said = lightning("fit", *words)
            assert said.code == 1
            assert "holds more than 200000 values" in said.err


class TestCells:
    def test_texts_are_restored_and_never_run(self):
        letters = list("='+-@\t\r\n\",;\\ \0a1.")
        random = np.random.default_rng(0)
        for _ in range(2000):
            text = "".join(random.choice(letters, random.integers(0, 7)))
            (cells,) = csv.reader(io.StringIO(csv_line([text, 2.5]), newline=""), strict=True)
            assert read_cell(cells[0]) == text
            assert cells[1] == "2.5"
            try:
                float(cells[0])
            except ValueError:
                assert not cells[0].startswith(("=", "+", "-", "@", "\t", "\r"))

    def test_numbers_stay_numbers(self):
        assert [text_cell(text) for text in ("-1.5", "+3", "-1e-5", "1")] == ["-1.5", "+3", "-1e-5", "1"]
        assert text_cell("-inf") == "'-inf"
