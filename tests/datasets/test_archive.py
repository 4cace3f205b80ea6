"""Real-valued sequences of any width from a flat archive."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from vrnn_lightning.datamodules.archive import Archive

from vrnn_lightning.errors import UserError
from vrnn_lightning.testing import CHECKS

SIZES = {"train": 20, "valid": 4, "test": 5}
WIDTH = 4
SPLITS = ("train", "val", "test")


def write(path: Path, *splits: str, still: int | None = None, beside: bool = False) -> Path:
    generator = np.random.default_rng(0)
    arrays = {}
    for split in splits:
        lengths = generator.integers(1, 9, SIZES[split])
        values = generator.normal([0, 5, -100, 1e4], [1, 2, 0.01, 30], (lengths.sum(), WIDTH))
        if still is not None:
            values[:, still] = 7
        arrays |= {f"{split}_values": values.astype(np.float32), f"{split}_lengths": lengths}
        if beside:
            rewards = np.where(values[:, :2] > 0, values[:, :2], np.nan)
            arrays |= {
                f"{split}_inputs": values[:, :1],
                f"{split}_targets": rewards,
                f"{split}_is_first": values[:, 0] > 1,
            }
    np.savez(path, **arrays, columns=np.array(["a", "b", "c", "d"]))
    return path


@pytest.fixture
def archive(tmp_path) -> Path:
    return write(tmp_path / "whole.npz", *SIZES)


def named(data: Archive, split: str) -> list[str]:
    sequences = data.split(split)
    return [sequences[i].name for i in range(len(sequences))]


@pytest.mark.parametrize("splits", [("train", "valid", "test"), ("train",)], ids="-".join)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, splits, tmp_path):
    path = write(tmp_path / "a.npz", *splits)
    check(lambda **options: Archive(str(path), WIDTH, exclude=[1], **options))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_with_inputs_targets_and_episodes(check, window, tmp_path):
    path = write(tmp_path / "a.npz", *SIZES, beside=True)
    check(lambda **options: Archive(str(path), WIDTH, inputs=1, targets=2, **{"window": window} | options))


def test_what_lies_beside_the_values_follows_them(tmp_path):
    path = write(tmp_path / "a.npz", *SIZES, beside=True)
    data = Archive(str(path), WIDTH, inputs=1, targets=2, batch_size=3, window=2)
    data.setup("fit")
    with np.load(path) as arrays:
        ends = arrays["train_lengths"].cumsum()
        first, targets = arrays["train_is_first"], arrays["train_targets"].astype(np.float32)
    for batch in data.train_dataloader():
        for i, (row, start, length) in enumerate(zip(batch.index, batch.start, batch.lengths, strict=True)):
            if row < 0:
                continue
            begin = ends[row] - data.lengths("train")[row] + start
            place = slice(begin, begin + length)
            assert (batch.is_first[i, :length].numpy() == first[place]).all()
            np.testing.assert_array_equal(batch.targets[i, :length], targets[place])
        assert batch.targets[~batch.mask].isnan().all()
        assert not batch.is_first[~batch.mask].any()
    for option in ({"inputs": 2}, {"targets": 1}):
        with pytest.raises(UserError, match=r"of shape .*, expected numbers of shape"):
            Archive(str(path), WIDTH, **option).setup("fit")


def test_construction_opens_no_file():
    assert Archive("nowhere.npz", features=62).num_features == 62
    assert Archive("nowhere.npz", features=62, exclude=[3, 61]).num_features == 60
    with pytest.raises(UserError, match=r"--data.root nowhere.npz: No such file"):
        Archive("nowhere.npz", features=62).setup("fit")


def test_columns_that_are_left_out(archive):
    with np.load(archive) as arrays:
        kept = arrays["train_values"][:, [1, 3]]
    data = Archive(str(archive), WIDTH, exclude=[2, 0])
    np.testing.assert_array_equal(np.concatenate([s.x for s in data.split("train")]), kept)
    np.testing.assert_allclose(data.scaler.mean, kept.mean(0, dtype=np.float64))
    np.testing.assert_allclose(data.scaler.std, kept.std(0, dtype=np.float64))


def test_splits_of_its_own(archive):
    data = Archive(str(archive), WIDTH)
    for split, word in zip(SPLITS, SIZES, strict=True):
        assert named(data, split) == [f"{word} {i}" for i in range(SIZES[word])]
    assert set(data.state_dict()) == {"mean", "std"}


@pytest.mark.parametrize("test", [True, False])
def test_splits_that_are_drawn_from_training(test, tmp_path):
    path = write(tmp_path / "a.npz", "train", *["test"] * test)
    data = Archive(str(path), WIDTH, val=0.2, test=0.3)
    drawn = {split: named(data, split) for split in SPLITS}
    assert len(drawn["val"]) == 4
    assert drawn["test"] == [f"test {i}" for i in range(5)] if test else len(drawn["test"]) == 6
    mine = [name for names in drawn.values() for name in names if name.startswith("train")]
    assert sorted(mine) == sorted(f"train {i}" for i in range(20))
    assert named(Archive(str(path), WIDTH, val=0.2, test=0.3, seed=1), "val") != drawn["val"]
    other = Archive(str(path), WIDTH, val=0.2, test=0.3, seed=1)
    other.setup("test")
    other.load_state_dict(data.state_dict())
    assert {split: named(other, split) for split in SPLITS} == drawn
    x = np.concatenate([s.x.numpy() for s in data.split("train")]).astype(np.float64)
    np.testing.assert_allclose(data.scaler.mean, x.mean(0))


def test_what_was_trained_on_is_known_by_its_values(tmp_path):
    """The same sequences in another order, and other sequences at the same places."""
    trained = Archive(str(write(tmp_path / "a.npz", "train")), WIDTH)
    trained.setup("fit")
    state = trained.state_dict()
    with np.load(tmp_path / "a.npz") as kept:
        values, lengths = kept["train_values"], kept["train_lengths"]
    pieces = np.split(values, lengths.cumsum()[:-1])[::-1]
    np.savez(tmp_path / "b.npz", train_values=np.concatenate(pieces), train_lengths=lengths[::-1])
    np.savez(tmp_path / "c.npz", train_values=values + 1, train_lengths=lengths)
    found = {}
    for name in "abc":
        data = Archive(str(tmp_path / f"{name}.npz"), WIDTH)
        data.setup("test")
        data.load_state_dict(state)
        found[name] = [data.split("test")[i].x for i in range(len(data.split("test")))]
    assert len(found["a"]) == len(found["b"]) < len(lengths) == len(found["c"])
    for one, other in zip(found["a"], reversed(found["b"]), strict=True):
        assert torch.equal(one, other)


def test_a_resumed_fit_takes_the_checkpoint_s_splits(tmp_path):
    path = str(write(tmp_path / "a.npz", "train"))
    trained, resumed = Archive(path, WIDTH, seed=0), Archive(path, WIDTH, seed=1)
    for data in (trained, resumed):
        data.setup("fit")  # draws splits of its own
    names = [trained.split("val")[i].name for i in range(len(trained.split("val")))]
    assert names != [resumed.split("val")[i].name for i in range(len(resumed.split("val")))]
    resumed.load_state_dict(trained.state_dict())
    assert names == [resumed.split("val")[i].name for i in range(len(resumed.split("val")))]


def test_columns_that_never_change_are_named(tmp_path):
    path = write(tmp_path / "a.npz", *SIZES, still=2)
    message = "columns 2 hardly change in training, so that .*; leave them out: --data.exclude '\\[0, 2\\]'"
    with pytest.warns(UserWarning, match=message):
        Archive(str(path), WIDTH, exclude=[0]).setup("fit")
    Archive(str(path), WIDTH, exclude=[0, 2]).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "--data.features 0: must be at least 1"),
        ({"features": 3, "exclude": [3]}, "--data.exclude 3: must lie between 0 and 2"),
        ({"features": 3, "exclude": [-1]}, "--data.exclude -1: must lie between 0 and 2"),
        ({"features": 2, "exclude": [0, 1, 0]}, "--data.exclude [0, 1, 0]: excludes all 2 columns"),
        ({"features": 2, "val": 1}, "--data.val 1: must lie in [0, 1)"),
        ({"features": 2, "val": 0.5, "test": 0.6}, "--data.val 0.5 and --data.test 0.6: leave nothing to train on"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Archive("nowhere.npz", **options)


def test_another_width(archive):
    message = r"train_values has shape \(\d+, 4\), expected \(total steps, 3\). Fix: give its width as --data.features"
    with pytest.raises(UserError, match=message):
        Archive(str(archive), 3).setup("fit")


def test_no_training_split(tmp_path):
    with pytest.raises(UserError, match="has no array train_values"):
        Archive(str(write(tmp_path / "a.npz", "valid", "test")), WIDTH).setup("fit")


@pytest.mark.skipif("VRNN_DATA" not in os.environ, reason="VRNN_DATA names no folder with series")
@pytest.mark.parametrize(
    ("file", "features", "exclude", "sizes"),
    [
        ("handwriting_chartraj/chartraj.npz", 3, [], [1286, 143, 1429]),
        ("timeseries_mocap/cmu_mocap_30hz.npz", 62, [24, 25, 36, 37, 33, 45], [22, 2, 4]),
        ("timeseries_japanese_vowels/japanese_vowels.npz", 12, [], [243, 27, 370]),
    ],
)
def test_real_series(file, features, exclude, sizes):
    data = Archive(str(Path(os.environ["VRNN_DATA"]) / file), features, exclude)
    data.setup("fit")
    assert [len(data.split(split)) for split in SPLITS] == sizes
    batch = next(iter(data.train_dataloader()))
    assert batch.x.shape[2] == features - len(exclude)
    x = torch.cat([data.scaler.scale(s.x.double()) for s in data.split("train")])
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(x.shape[1], dtype=torch.float64))
