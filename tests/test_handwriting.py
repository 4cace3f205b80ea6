"""Pen strokes from a flat archive."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.handwriting import Handwriting
from vrnn_lightning.errors import UserError
from vrnn_lightning.testing import CHECKS

SIZES = {"train": 17, "valid": 6, "test": 7}


@pytest.fixture
def archive(tmp_path) -> Path:
    """Thirty short scribbles in whole numbers."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, size in SIZES.items():
        lengths = generator.integers(1, 9, size)
        offsets = generator.normal(3, 40, (lengths.sum(), 2))
        lift = generator.random((lengths.sum(), 1)) < 0.3
        arrays[f"{split}_values"] = np.hstack([offsets, lift]).astype(np.int16)
        arrays[f"{split}_lengths"] = lengths
    np.savez(tmp_path / "strokes.npz", **arrays)
    return tmp_path / "strokes.npz"


@pytest.mark.parametrize("max_steps", [None, 5])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, max_steps, archive):
    check(lambda **options: Handwriting(str(archive), max_steps, **options))


def test_construction_opens_no_file():
    data = Handwriting("nowhere.npz")
    assert data.num_features == 3
    with pytest.raises(UserError, match=r"--data.root nowhere.npz: no such file"):
        data.setup("fit")


def test_both_offsets_share_a_scale_and_lift_has_none(archive):
    data = Handwriting(archive)
    offsets = np.load(archive)["train_values"][:, :2].astype(float)
    assert data.scaler.mean.tolist() == pytest.approx([offsets.mean(), offsets.mean(), 0])
    assert data.scaler.std.tolist() == pytest.approx([offsets.std(), offsets.std(), 1])
    batch = next(iter(data.val_dataloader()))
    assert set(batch.x[..., 2].unique().tolist()) == {0.0, 1.0}


def test_a_dot_has_a_scale(tmp_path):
    dots = {f"{split}_values": np.array([[5, 5, 1]]) for split in SIZES}
    np.savez(tmp_path / "dots.npz", **dots, **{f"{split}_lengths": np.array([1]) for split in SIZES})
    assert Handwriting(tmp_path / "dots.npz").scaler.std.tolist() == [1, 1, 1]


def test_long_sequences_are_left_out_of_training_alone(archive):
    all_of_them, some = Handwriting(archive), Handwriting(archive, max_steps=5)
    assert max(all_of_them.lengths("train")) > 5
    assert some.lengths("train") == [n for n in all_of_them.lengths("train") if n <= 5]
    assert some.lengths("val") == all_of_them.lengths("val")
    kept = torch.cat([some.split("train")[i].x[:, :2] for i in range(len(some.split("train")))]).double()
    assert float(some.scaler.mean[0]) == pytest.approx(kept.mean().item())
    assert float(some.scaler.std[0]) == pytest.approx(kept.std(correction=0).item())


@pytest.mark.parametrize("max_steps", [0, -3])
def test_max_steps_is_at_least_1(max_steps):
    with pytest.raises(UserError, match=f"--data.max_steps {max_steps}: must be at least 1"):
        Handwriting("nowhere.npz", max_steps)


def test_no_sequence_that_is_short_enough(archive):
    arrays = dict(np.load(archive))
    np.savez(archive, **arrays | {"train_lengths": np.array([len(arrays["train_values"])])})
    with pytest.raises(UserError, match=r"--data.max_steps 2: all training sequences of .* are longer, the shortest"):
        Handwriting(archive, max_steps=2).setup("fit")


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0])
def test_a_lift_that_is_neither_0_nor_1(archive, value):
    arrays = dict(np.load(archive))
    values = arrays["train_values"].astype(np.float32)
    values[0, 2] = value
    np.savez(archive, **arrays | {"train_values": values})
    message = f"{archive}: train_values holds {value} at train 0, step 0, feature 2; expected rows (dx, dy, lift)"
    with pytest.raises(UserError, match=re.escape(message)):
        Handwriting(archive).setup("fit")


@pytest.mark.skipif("VRNN_DATA" not in os.environ, reason="VRNN_DATA names no folder with handwriting")
@pytest.mark.parametrize(
    ("file", "sizes", "scale"),
    [
        ("handwriting_kanji/short_kanji.npz", [10000, 600, 500], 99.7),
        ("handwriting_omniglot/omniglot_rdp.npz", [30000, 1000, 1000], 53.4),
    ],
)
def test_real_strokes(file, sizes, scale):
    data = Handwriting(Path(os.environ["VRNN_DATA"]) / file)
    data.setup("fit")
    assert [len(data.split(split)) for split in ("train", "val", "test")] == sizes
    assert float(data.scaler.std[0]) == pytest.approx(scale, abs=0.1)
    batch = next(iter(data.val_dataloader()))
    assert float(batch.x[batch.mask][:, :2].std()) == pytest.approx(1, abs=0.3)


@pytest.mark.skipif("VRNN_DATA" not in os.environ, reason="VRNN_DATA names no folder with handwriting")
def test_velocities_and_forces_are_no_strokes():
    path = Path(os.environ["VRNN_DATA"]) / "handwriting_chartraj" / "chartraj.npz"
    with pytest.raises(UserError, match=r"chartraj.npz: train_values holds 0.50\d+ at train 0, step 0, feature 2"):
        Handwriting(path).setup("fit")
