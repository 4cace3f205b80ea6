"""Digits from idx files and archives."""

from __future__ import annotations

import gzip
import os
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vrnn_lightning.datamodules.mnist_rows import MNISTRows

from vrnn_lightning import UserError, VRNNLightningModule
from vrnn_lightning.callbacks import Samples
from vrnn_lightning.callbacks.media import Media
from vrnn_lightning.callbacks.samples import _rows
from vrnn_lightning.heads import Bernoulli, DiscretisedLogisticMixture
from vrnn_lightning.testing import CHECKS

SIZES = {"train": 17, "valid": 6, "test": 7}
TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


def digits(count: int, seed: int) -> np.ndarray:
    """Return ink of all greys on white paper, shape (count, 28, 28)."""
    generator = np.random.default_rng(seed)
    ink = generator.integers(0, 256, (count, 28, 28))
    return (ink * (generator.random(ink.shape) < 0.5)).astype(np.uint8)


def idx(images: np.ndarray, magic: int = 2051) -> bytes:
    return np.array([magic, *images.shape], ">u4").tobytes() + images.tobytes()


IMAGES = {split: digits(size, seed) for seed, (split, size) in enumerate(SIZES.items())}
ALL_TRAIN = np.concatenate([IMAGES["train"], IMAGES["valid"]])


@pytest.fixture
def folder_of_idx(tmp_path) -> Path:
    (tmp_path / TRAIN).write_bytes(idx(ALL_TRAIN))
    (tmp_path / f"{TEST}.gz").write_bytes(gzip.compress(idx(IMAGES["test"])))
    return tmp_path


@pytest.fixture
def archive(tmp_path) -> Path:
    np.savez(tmp_path / "digits.npz", **{f"{split}_images": images for split, images in IMAGES.items()})
    return tmp_path / "digits.npz"


def flat(path: Path, dtype: str = "uint8", divisor: float = 1, **more: np.ndarray) -> Path:
    values = {f"{split}_values": (images.reshape(-1, 28) / divisor).astype(dtype) for split, images in IMAGES.items()}
    lengths = {f"{split}_lengths": np.full(len(images), 28) for split, images in IMAGES.items()}
    np.savez(path, **values | lengths | more)
    return path


def of(root: Path, **options) -> MNISTRows:
    return MNISTRows(str(root), **{"val_size": SIZES["valid"]} | options)


def pixels(data: MNISTRows, split="train") -> torch.Tensor:
    sequences = data.split(split)
    return torch.stack([sequences[i].x.reshape(28, 28) for i in range(len(sequences))])


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"binarise": "dynamic"},
        {"binarise": "dynamic", "window": 5},
        {"read": "pixels"},
        {"read": "pixels", "binarise": "dynamic", "window": 300},
    ],
    ids=str,
)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, kind, folder_of_idx):
    check(lambda **options: of(folder_of_idx, **kind, **options))


@pytest.mark.filterwarnings("ignore:--data.binarise none")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_an_archive_of_grey_images(check, archive):
    check(lambda **options: of(archive, binarise="none", window=5, **options))


def test_construction_opens_no_file():
    assert MNISTRows("nowhere").num_features == 28
    assert MNISTRows("nowhere", read="pixels").num_features == 1
    with pytest.raises(
        UserError, match=r"--data.root nowhere: no such folder or archive. Fix: download MNIST's files from https"
    ):
        MNISTRows("nowhere").setup("fit")
    with pytest.raises(UserError, match=r"--data.root nowhere.npz: No such file"):
        MNISTRows("nowhere.npz").setup("fit")


@pytest.mark.parametrize(
    ("train", "packed"),
    [(TRAIN, False), (f"{TRAIN}.gz", True), ("train-images.idx3-ubyte", False), (f"MNIST/raw/{TRAIN}", False)],
)
def test_spellings_of_the_files(tmp_path, train, packed):
    (tmp_path / train).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / train).write_bytes(gzip.compress(idx(ALL_TRAIN)) if packed else idx(ALL_TRAIN))
    assert torch.equal(pixels(of(tmp_path)), torch.from_numpy(IMAGES["train"] > 127).float())


def test_validation_is_the_end_of_the_training_file(folder_of_idx):
    data = of(folder_of_idx)
    for split, images in zip(("train", "val", "test"), IMAGES.values(), strict=True):
        assert torch.equal(pixels(data, split), torch.from_numpy(images > 127).float())
    assert [data.split(split)[0].name for split in ("train", "val", "test")] == ["train 0", "train 17", "t10k 0"]
    with pytest.raises(UserError, match=r"--data.val_size 23: .*train-images-idx3-ubyte has 23 images"):
        of(folder_of_idx, val_size=23).setup("fit")


def test_archives_of_every_kind_hold_the_same(tmp_path, archive):
    made = (
        archive,
        flat(tmp_path / "bytes.npz"),
        flat(tmp_path / "wide.npz", "int64"),
        flat(tmp_path / "shares.npz", "float64", 255),
    )
    for split in ("train", "val", "test"):
        expected = pixels(of(archive, binarise="dynamic"), split)
        assert all(torch.equal(pixels(of(path, binarise="dynamic"), split), expected) for path in made)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float32"])
@pytest.mark.parametrize("binarise", ["static", "dynamic"])
def test_what_is_black_and_white_stays_so(tmp_path, dtype, binarise):
    path = tmp_path / "binary.npz"
    np.savez(path, **{f"{split}_images": (images > 99).astype(dtype) for split, images in IMAGES.items()})
    assert torch.equal(pixels(of(path, binarise=binarise)), torch.from_numpy(IMAGES["train"] > 99).float())


def test_pixels_are_the_rows_end_to_end(folder_of_idx):
    for binarise in ("static", "dynamic"):
        rows, single = (of(folder_of_idx, read=read, binarise=binarise) for read in ("rows", "pixels"))
        assert rows.split("train")[3].x.shape == (28, 28)
        assert single.split("train")[3].x.shape == (784, 1)
        assert torch.equal(pixels(rows), pixels(single))


def test_pictures_show_whole_images_of_pixels(folder_of_idx):
    data = of(folder_of_idx, read="pixels", batch_size=2)
    model = VRNNLightningModule(1, latent_size=0, hidden_size=2, emission=Bernoulli)
    batch = next(iter(data.val_dataloader()))
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), sanity_checking=False, datamodule=data)
    for rows, shown in ((400, 784), (10, 280)):
        samples, media = Samples(count=1, max_steps=rows), Media(data)
        samples.on_validation_batch_start(trainer, model, batch, 0)
        first = samples._batch
        drawn = model.vrnn.generate(first.x.shape[1], len(first)).x
        found = _rows(model, first, model.vrnn(first), drawn)
        assert [[len(x) for x in xs] for xs in found.values()] == 3 * [[shown]]
        assert [[x.shape for x in xs] for xs in media.to_display(found).values()] == 3 * [[(shown // 28, 28)]]


def test_dynamic_pixels_have_the_grey_value_as_their_mean(folder_of_idx):
    """Over 400 epochs, to five standard errors; white and black are certain."""
    train = of(folder_of_idx, binarise="dynamic").split("train")
    grey = torch.from_numpy(IMAGES["train"][5] / 255.0)
    mean = torch.stack([train.in_epoch(epoch)[5].x for epoch in range(400)]).double().mean(0)
    assert ((mean - grey).abs() <= 5 * (grey * (1 - grey) / 400).sqrt()).all()


def test_dynamic_draws_know_seed_image_split_and_epoch_alone(tmp_path):
    alike = np.full((4, 28, 28), 128, np.uint8)
    np.savez(tmp_path / "grey.npz", **{f"{split}_images": alike for split in SIZES})
    data = of(tmp_path / "grey.npz", binarise="dynamic")
    drawn = [pixels(data, split)[i] for split in ("train", "val", "test") for i in range(4)]
    drawn += [data.split("train").in_epoch(epoch)[i].x for epoch in (1, 2) for i in range(4)]
    drawn += [pixels(of(tmp_path / "grey.npz", binarise="dynamic", seed=1))[0]]
    assert len({image.numpy().tobytes() for image in drawn}) == len(drawn)
    assert torch.equal(data.split("train").in_epoch(2)[1].x, drawn[17])


def test_grey_values_are_left_and_warned_of_once(folder_of_idx):
    data = of(folder_of_idx, binarise="none")
    with pytest.warns(UserWarning, match="a Bernoulli says of grey values is not a likelihood") as said:
        data.setup("fit")
    assert len(said) == 1
    data.setup("test")
    assert torch.equal(pixels(data), torch.from_numpy(IMAGES["train"]).float())
    batch = next(iter(data.val_dataloader()))
    DiscretisedLogisticMixture(4, 28).check(batch.x, batch.valid_mask)
    with pytest.raises(UserError, match="binarise the data"):
        Bernoulli(4, 28).check(batch.x, batch.valid_mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of(folder_of_idx, binarise="dynamic").setup("fit")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"read": "columns"}, "--data.read columns: must be one of rows, pixels"),
        ({"binarise": "always"}, "--data.binarise always: must be one of static, dynamic, none"),
        ({"val_size": 0}, "--data.val_size 0: must be at least 1"),
        ({"batch_size": 0}, "--data.batch_size 0: must be at least 1"),
    ],
)
def test_options_out_of_range(option, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        MNISTRows("nowhere", **option)


WHOLE = idx(ALL_TRAIN)
LARGE = idx(np.zeros((2, 32, 30), np.uint8))
BROKEN = {
    "truncated": (TRAIN, WHOLE[:-1], "does not hold the 23 images that it declares"),
    "cut header": (TRAIN, WHOLE[:9], "does not begin as idx images of 28 x 28 pixels do"),
    "empty": (TRAIN, b"", "does not begin as idx images"),
    "too long": (TRAIN, WHOLE + b"x", "does not hold the 23 images that it declares"),
    "labels": (TRAIN, np.array([2049, 20], ">u4").tobytes() + bytes(20), "does not begin as idx images"),
    "wrong magic": (TRAIN, idx(ALL_TRAIN, 1234), "does not begin as idx images"),
    "wrong size": (TRAIN, LARGE, "does not begin as idx images of 28 x 28 pixels do"),
    "cut gzip": (
        f"{TRAIN}.gz",
        gzip.compress(WHOLE)[:-99],
        "is damaged or not a gzip file. Fix: copy it again from https",
    ),
    "spoilt gzip": (f"{TRAIN}.gz", gzip.compress(WHOLE)[:40] + bytes(999), "is damaged or not a gzip file"),
    "no gzip": (f"{TRAIN}.gz", WHOLE, "is damaged or not a gzip file"),
    "truncated inside": (f"{TRAIN}.gz", gzip.compress(WHOLE[:-1]), "does not hold the 23 images"),
    "other file": ("t10k-labels-idx1-ubyte", b"", "holds no train-images-idx3-ubyte(.gz). Fix: download it from"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line(tmp_path, case):
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as said:
        of(tmp_path).setup("fit")
    assert "\n" not in str(said.value)
    assert str(tmp_path) in str(said.value)


def test_a_file_for_a_folder(folder_of_idx):
    with pytest.raises(UserError, match=r"--data.root .*-ubyte: is a file. Fix: give the folder that holds it, or"):
        of(folder_of_idx / TRAIN).setup("fit")


def test_a_fit_needs_no_test_images(folder_of_idx):
    (folder_of_idx / f"{TEST}.gz").unlink()
    data = of(folder_of_idx)
    data.setup("fit")
    with pytest.raises(UserError, match="holds no t10k-images-idx3-ubyte"):
        data.setup("test")


ROWS = IMAGES["train"].reshape(-1, 28)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_lengths": np.full(16, 28)}, "train_lengths adds up to 448, but train_values has 476 rows"),
        ({"train_values": ROWS[:, :27]}, "train_values has shape (476, 27), expected (total steps, 28)"),
        ({"train_values": ROWS.astype(int) - 1}, "train_values holds -1 at train 0, step 0, feature"),
        ({"train_values": ROWS * 1.0}, ". Fix: store grey values as whole numbers from 0 to 255, or floats"),
        ({"train_values": ROWS.astype(int) * 2}, ". Fix: store grey values as whole numbers from 0 to 255"),
    ],
)
def test_a_flat_archive_that_does_not_fit(tmp_path, arrays, message):
    path = flat(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=re.escape(message)) as said:
        of(path).setup("fit")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES["train"][:, :, :27], "train_images has shape (17, 28, 27), expected (sequences, steps, 28)"),
        (IMAGES["train"].reshape(17, 784), "train_images has shape (17, 784), expected (sequences, steps, 28)"),
        (IMAGES["train"].astype(str), "train_images is of type <U3. Fix: save it as integers, float32 or float64"),
        (IMAGES["train"] * 1.0, "train_images holds"),
        (None, "has no array train_values, it holds valid_images"),
    ],
)
def test_an_archive_of_images_that_does_not_fit(tmp_path, images, message):
    arrays = {"valid_images": IMAGES["valid"]} | ({} if images is None else {"train_images": images})
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=re.escape(message)):
        of(tmp_path / "bad.npz").setup("fit")


@pytest.mark.skipif("VRNN_DATA" not in os.environ, reason="VRNN_DATA names no folder with digits")
def test_real_digits():
    data = MNISTRows(Path(os.environ["VRNN_DATA"]) / "mnist_small" / "mnist_small.npz")
    data.setup("fit")
    data.setup("test")
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [10000, 2000, 10000]
    batch = next(iter(data.train_dataloader()))
    assert batch.x.shape == (128, 28, 28)
    assert batch.x.mean().item() == pytest.approx(0.13, abs=0.02)
