"""Flat archives: what is read of them, and every refusal."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vrnn_lightning.data import Scaler, read_archive
from vrnn_lightning.data.loading import ScaledSequences
from vrnn_lightning.errors import UserError

LENGTHS = np.array([3, 0, 4, 1], dtype=np.int32)
VALUES = np.arange(16, dtype=np.int16).reshape(8, 2)


def write(folder: Path, **arrays) -> Path:
    path = folder / "data.npz"
    np.savez(path, **{"train_values": VALUES, "train_lengths": LENGTHS} | arrays)
    return path


def test_sequences_are_cut_at_the_lengths_and_named(tmp_path):
    found = read_archive(write(tmp_path), "train", 2)
    sequences = [found[i] for i in range(len(found))]
    assert found.lengths == [3, 0, 4, 1] == [len(s.x) for s in sequences]
    assert [s.name for s in sequences] == ["train 0", "train 1", "train 2", "train 3"]
    assert torch.equal(torch.cat([s.x for s in sequences]), torch.from_numpy(VALUES).float())
    np.testing.assert_array_equal(found.rows(), VALUES)


def test_validation_sequences_are_called_valid(tmp_path):
    path = write(tmp_path, valid_values=VALUES[:2], valid_lengths=LENGTHS[3:].repeat(2))
    assert read_archive(path, "val", 2)[1].name == "valid 1"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("uint8", torch.float32),
        ("bool", torch.float32),
        ("int16", torch.float32),
        ("float16", torch.float32),
        ("float32", torch.float32),
        ("int32", torch.float64),
        ("float64", torch.float64),
    ],
)
def test_types_are_widened_until_they_are_exact(tmp_path, given, read):
    values = np.array([[0], [1]], dtype=given)
    path = write(tmp_path, train_values=values, train_lengths=np.array([2]))
    x = read_archive(path, "train", 1)[0].x
    assert x.dtype == read
    assert x.tolist() == [[0], [1]]


def test_a_change_of_a_sequence_changes_no_archive(tmp_path):
    found = read_archive(write(tmp_path, train_values=VALUES.astype("float32")), "train", 2)
    found[0].x.zero_()
    assert found[0].x.sum() > 0


def test_only_what_is_asked_for_is_read(tmp_path):
    """Other splits and arrays may even be broken."""
    path = write(tmp_path, train_labels=np.array([None, 1], dtype=object), test_values=np.array(["word"]))
    assert len(read_archive(path, "train", 2)) == 4


def test_a_compressed_archive(tmp_path):
    np.savez_compressed(tmp_path / "small.npz", train_values=VALUES, train_lengths=LENGTHS)
    assert len(read_archive(tmp_path / "small.npz", "train", 2)) == 4


def test_sequences_travel_to_other_processes(tmp_path):
    found = pickle.loads(pickle.dumps(read_archive(write(tmp_path), "train", 2)))  # as a reading process gets it
    assert found[2].x.shape == (4, 2)


def test_an_empty_split_is_no_sequences(tmp_path):
    found = read_archive(write(tmp_path, train_values=VALUES[:0], train_lengths=LENGTHS[:0]), "train", 2)
    assert len(found) == 0
    assert found.rows().shape == (0, 2)


def test_long_sequences_are_left_out_and_the_others_keep_their_names(tmp_path):
    found = read_archive(write(tmp_path), "train", 2).no_longer_than(3)
    assert [found[i].name for i in range(len(found))] == ["train 0", "train 1", "train 3"]
    np.testing.assert_array_equal(found.rows(), VALUES[[0, 1, 2, 7]])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_lengths": LENGTHS + 1}, "train_lengths adds up to 12, but train_values has 8 rows"),
        ({"train_lengths": np.array([9, -1])}, "train_lengths adds up to 9, but train_values has 8 rows"),
        ({"train_lengths": np.array([8.0])}, "train_lengths is of type float64 and shape (1,), expected integers"),
        ({"train_lengths": np.array([[8]])}, "train_lengths is of type int64 and shape (1, 1), expected integers"),
        ({"train_lengths": np.array(8)}, "train_lengths is of type int64 and shape (), expected integers"),
        ({"train_lengths": np.array([None])}, "can't be read as an .npz archive (Object arrays cannot be loaded"),
        ({"train_values": VALUES.ravel()}, "train_values has shape (16,), expected (total steps, 2)"),
        ({"train_values": VALUES[:, :1]}, "train_values has shape (8, 1), expected (total steps, 2)"),
        (
            {"train_values": VALUES.astype(str)},
            "train_values is of type <U6. Fix: save it as integers, float32 or float64",
        ),
        ({"train_values": VALUES.astype("complex64")}, "train_values is of type complex64. Fix: save it as"),
        ({"train_values": VALUES.astype(object)}, "can't be read as an .npz archive (Object arrays cannot be loaded"),
        (
            {"train_values": np.where(VALUES == 9, np.nan, VALUES)},
            "train_values holds nan at train 2, step 1, feature 1. Fix: remove or correct the sequence",
        ),
        (
            {"train_values": np.where(VALUES == 14, np.inf, VALUES)},
            "train_values holds inf at train 3, step 0, feature 0. Fix: remove or correct the sequence",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    path = write(tmp_path, **arrays)
    with pytest.raises(UserError, match=re.escape(f"{path}: {message}")) as caught:
        read_archive(path, "train", 2)
    assert "\n" not in str(caught.value)


def test_a_missing_array_is_named_with_those_that_are_there(tmp_path):
    path = write(tmp_path)
    with pytest.raises(UserError, match="has no array valid_values, it holds train_values, train_lengths"):
        read_archive(path, "val", 2)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"--data.root .*none.npz: No such file"):
        read_archive(tmp_path / "none.npz", "train", 2)


def test_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"--data.root .*: Is a directory. Fix: give an .npz archive"):
        read_archive(tmp_path, "train", 2)


@pytest.mark.parametrize("content", [b"", b"words, words", pickle.dumps([VALUES]), b"PK\x03\x04 no zip at all"])
def test_what_is_no_archive(tmp_path, content):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"can't be read as an .npz archive .* write it with numpy.savez"):
        read_archive(path, "train", 2)


def test_a_single_array(tmp_path):
    np.save(tmp_path / "data.npy", VALUES)
    with pytest.raises(UserError, match=r"is a single array, not an .npz archive"):
        read_archive(tmp_path / "data.npy", "train", 2)


@pytest.mark.parametrize("place", ["header", "middle"])
def test_a_damaged_array(tmp_path, place):
    path = write(tmp_path)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("train_values.npy").header_offset + len("train_values.npy") + 60
    content = bytearray(path.read_bytes())
    start += 100 if place == "middle" else 0
    content[start : start + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"data.npz: can't be read as an .npz archive \(.*train_values"):
        read_archive(path, "train", 2)


def test_a_damaged_compressed_array(tmp_path):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, train_values=np.random.default_rng(0).normal(size=(500, 2)), train_lengths=[500])
    content = bytearray(path.read_bytes())
    content[1000:1200] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"data.npz: can't be read as an .npz archive \(.*train_values"):
        read_archive(path, "train", 2)


def test_another_member_of_a_zip_is_no_array(tmp_path):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_values.npy", "words")
        archive.writestr("train_lengths.npy", "words")
    with pytest.raises(UserError, match=r"data\.npz: train_values is of type"):
        read_archive(path, "train", 2)


def test_a_value_too_large_for_float32_is_named_with_its_file(tmp_path):
    found = read_archive(write(tmp_path, train_values=np.full((8, 2), 1e300)), "train", 2)
    with pytest.raises(UserError, match=r"data\.npz: train 0: holds values too large for float32"):
        ScaledSequences(found, Scaler(), 2)[[0]]
