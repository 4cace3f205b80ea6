"""Handwritten digits, read row by row or pixel by pixel."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vrnn_lightning.batch import SequenceSample
from vrnn_lightning.data import (
    ArchiveSplit,
    AugmentedSequences,
    FileDataModule,
    Modality,
    Sequences,
    Split,
    read_archive,
    require,
    require_size,
)
from vrnn_lightning.errors import UserError

__all__ = ["MNISTRows"]

SIDE = 28
IMAGES = 2051  # the magic number of idx files of unsigned bytes in three dimensions
SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"


class MNISTRows(FileDataModule):
    """Images of 28 x 28 pixels, MNIST's or others in its format, as sequences of 28 rows or of 784 pixels.

    A Bernoulli is a likelihood of 0 and 1 alone, so grey pixels are binarised: "static", 1 where ink covers more than
    half, or "dynamic", 1 with the grey value as probability (Burda et al. 2016, arXiv 1509.00519), resampled every
    epoch in training. A draw depends on the seed, the image and the epoch alone; validation and test images are drawn
    once. Figures of one kind do not compare with those of another. With "none" pixels stay grey, whole numbers from 0
    to 255 where the file holds bytes, for a ``DiscretisedLogisticMixture``.

    Args:
        root: A folder with the idx files ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, as they are or
            with ``.gz``, also in torchvision's ``MNIST/raw``. Or an ``.npz`` archive, for the splits train, valid and
            test: ``{split}_images`` (images, 28, 28), or flat, ``{split}_values`` (total rows, 28) and
            ``{split}_lengths`` (images,), in bytes (0 to 255, or 0 and 1 alone) or in numbers from 0 to 1. It may
            lie elsewhere when a checkpoint is used again.
        read: "rows" for 28 steps of 28 pixels, "pixels" for 784 steps of one.
        binarise: "static", "dynamic" or "none".
        val_size: Validation images, the last training images of the idx files; an archive has its own.
        download: Fetch MNIST's files (12 MB) into ``root``, where it is empty or not there yet.
        batch_size: Sequences per batch and process.
        options: The other options of ``FileDataModule``.

    Raises:
        UserError: An option outside its range. From ``setup`` on: a file is missing, damaged or holds something else.

    >>> MNISTRows("mnist").num_features, MNISTRows("mnist", read="pixels").num_features
    (28, 1)
    """

    modality: ClassVar[Modality] = "image"
    image_width: ClassVar[int] = SIDE
    run_options: ClassVar[frozenset[str]] = FileDataModule.run_options | {"download"}
    dataset: ClassVar[str] = "mnist"

    def __init__(
        self,
        root: str,
        read: Literal["rows", "pixels"] = "rows",
        binarise: Literal["static", "dynamic", "none"] = "static",
        val_size: int = 10_000,
        download: bool = False,
        batch_size: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(root, num_features=SIDE if read == "rows" else 1, batch_size=batch_size, **options)
        self.val_size = require("val_size", val_size, 1)
        self.binarise = binarise

    def sequences(self, split: Split) -> Sequences:
        images = self._archived(split) if self.root.suffix == ".npz" else self._from_idx(split)
        if self.binarise == "none":
            self._warnings.warn(
                "--data.binarise none: what a Bernoulli says of grey values is not a likelihood; choose another "
                "emission, DiscretisedLogisticMixture for one"
            )
        elif self.binarise == "static":
            images = replace(images, values=(images.values > 127.5).astype(np.uint8))
        width = self.num_features
        images = replace(images, values=images.values.reshape(-1, width), bounds=images.bounds * SIDE // width)
        if self.binarise != "dynamic":
            return images
        drawn = _DrawnImages(sequences=images, seed=self.seed, split=("train", "val", "test").index(split))
        return drawn if split == "train" else [drawn[i] for i in range(len(drawn))]  # the latter drawn once

    def _archived(self, split: Split) -> ArchiveSplit:
        images = read_archive(self.root, split, SIDE, stacked="images", max_gb=self.max_gb)
        is_whole = images.values.dtype.kind != "f"
        fix = "store grey values as whole numbers from 0 to 255, or floats from 0 to 1"
        images.raise_if((images.values < 0) | (images.values > (255 if is_whole else 1)), fix)
        if not is_whole:
            return replace(images, values=255 * images.values.astype(np.float32))
        grey = images.values.astype(np.uint8)
        return replace(images, values=grey if (grey > 1).any() else 255 * grey)  # else it is black and white already

    def _from_idx(self, split: Split) -> ArchiveSplit:
        name = "t10k" if split == "test" else "train"
        path = _find(self.root, name)
        images = _read_idx(path, self.max_gb)
        whole = ArchiveSplit.join(path, name, "images", images.reshape(-1, SIDE), np.full(len(images), SIDE))
        if split == "test":
            return whole
        if self.val_size >= len(images):
            raise UserError(
                f"--data.val_size {self.val_size}: {path} has {len(images)} images. Fix: leave some to train"
            )
        return whole.take(whole.numbers[-self.val_size :] if split == "val" else whole.numbers[: -self.val_size])


@dataclass(frozen=True, kw_only=True)
class _DrawnImages(AugmentedSequences):
    """Pixels of 0 and 1, each drawn with its grey value, from 0 to 255, as the probability; ``split`` is its number."""

    split: int

    def augmented(self, index: int, sequence: SequenceSample) -> SequenceSample:
        random = np.random.default_rng((self.seed, self.split, self.epoch, index))
        uniform = torch.from_numpy(random.random(tuple(sequence.x.shape), dtype=np.float32))
        return replace(sequence, x=(255 * uniform < sequence.x).float())

    def window(self, index: int, first: int, last: int, /) -> None:
        """Return ``None``: an image is drawn whole."""


def _find(root: Path, name: str) -> Path:
    if not root.exists():
        raise UserError(f"--data.root {root}: no such folder or archive. Fix: download MNIST's files from {SOURCE}")
    if root.is_file():
        raise UserError(f"--data.root {root}: is a file. Fix: give the folder that holds it, or an .npz archive")
    spellings = [f"{name}-images{dot}idx3-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    paths = [path for folder in (root, root / "MNIST" / "raw") for s in spellings if (path := folder / s).is_file()]
    if not paths:
        raise UserError(f"--data.root {root}: holds no {name}-images-idx3-ubyte(.gz). Fix: download it from {SOURCE}")
    return paths[0]


def _read_idx(path: Path, max_gb: float) -> NDArray[Any]:
    """Read the images of an idx file, shape (images, 28, 28), in bytes."""
    fix = f"Fix: copy it again from {SOURCE}"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(16)
            magic, count, *size = np.frombuffer(start.ljust(16, b"\0"), ">u4").tolist()
            if [magic, *size] != [IMAGES, SIDE, SIDE]:
                raise UserError(f"{path}: does not begin as idx images of {SIDE} x {SIDE} pixels do. {fix}")
            require_size(path, count * SIDE**2, max_gb)
            data = file.read(count * SIDE**2 + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path}: is damaged or not a gzip file. {fix}") from None
    if len(data) != count * SIDE**2:
        raise UserError(f"{path}: does not hold the {count} images that it declares. {fix}")
    return np.frombuffer(data, np.uint8).reshape(count, SIDE, SIDE)
