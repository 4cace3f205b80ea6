"""Piano rolls from a flat archive."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.piano_rolls import PianoRolls
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


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, archive):
    check(lambda **options: PianoRolls(str(archive), **options))


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
    message = f"{archive}: valid_values holds {float(value)} at valid 1, step 0, feature 60; a roll holds 0 and 1"
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
