"""The datamodule contract, and the base class that does all of it but reading."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from vrnn_lightning import errors
from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.data.loading import BatchSampler, ScaledSequences, SequenceLoader
from vrnn_lightning.data.sequences import Modality, Scaler, Sequences, Split
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained
from vrnn_lightning.trust import read_stored, require_types

__all__ = ["SequenceDataModule", "require"]

PIECE = 1024
"""Steps of a sequence that are in memory at once while moments are taken."""

T = TypeVar("T", bound="float | None")


def require(option: str, value: T, least: float, most: float | None = None, *, below: float | None = None) -> T:
    """Return the value of ``--data.{option}`` if it is ``None``, between ``least`` and ``most``, or below ``below``.

    Without ``most`` the range ends below 2^31; NaN is outside.

    Raises:
        UserError: The value is outside.

    >>> require("memory", 0.5, 0, below=1)
    0.5
    """
    if value is None:
        return value
    if most is None and below is None and value >= 2**31:
        raise UserError(f"--data.{option} {value}: must be below 2^31")
    return errors.require(f"--data.{option}", value, least, most, below=below)


class SequenceDataModule(LightningDataModule):
    """Base class of datamodules: give it :meth:`sequences`, it does scaling, batching, padding, seeds and shards.

    A subclass calls ``super().__init__`` with its number of features and defines :meth:`sequences`. Any other
    LightningDataModule whose loaders yield :class:`~vrnn_lightning.batch.SequenceBatch` and that has ``num_features``
    (right after construction), ``modality`` and ``scaler`` serves as well.

    The checkpoint stores the options; only :attr:`run_options` may differ when it is used again.

    Args:
        num_features: Features per time step.
        batch_size: Sequences per batch and process.
        num_workers: Processes that read ahead; 0 reads in the main process.
        seed: Seed of the order of the training batches, and of the data that are random.
        window: Steps per window in training: the sequences form ``batch_size`` streams, whose windows the model reads
            one after another, carrying its state from each to the next of the same sequence, so that memory does not
            grow with a sequence's length. Validation and test read whole sequences, as many at once as fit into
            ``batch_size`` windows. ``None`` trains on whole sequences.
    """

    modality: ClassVar[Modality] = "series"
    scaling: ClassVar[Literal["none", "scalar", "per_feature"]] = "none"
    run_options: ClassVar[frozenset[str]] = frozenset({"root", "batch_size", "num_workers", "window"})
    num_inputs: int = 0
    """Covariates per time step, which ``__init__`` sets; where it is not 0, every sequence must have them."""
    num_targets: int = 0
    """Targets of auxiliary losses per time step, which ``__init__`` sets; as for :attr:`num_inputs`."""
    unscaled: Sequence[int] = ()
    """Features that keep their units, which ``__init__`` sets: those that are binary or categorical."""
    missing: bool = False
    """True where sequences may come with ``observed``; the model's phi_x is then told which values are missing."""

    def __init__(
        self, num_features: int, batch_size: int = 32, num_workers: int = 0, seed: int = 0, window: int | None = None
    ) -> None:
        super().__init__()
        self.batch_size = require("batch_size", batch_size, 1)
        self.num_workers = require("num_workers", num_workers, 0)
        self.window = require("window", window, 1)
        if not 0 <= seed < 2**60:
            raise UserError(f"--data.seed {seed}: must lie between 0 and 2^60")
        self.save_hyperparameters(logger=False)
        paths = {key: str(value) for key, value in self.hparams.items() if isinstance(value, PurePath)}
        self.hparams.update(paths)  # a checkpoint holds no objects
        self.num_features = num_features
        self.seed = seed
        self._scaler: Scaler | None = None
        self._splits: dict[str, Sequences] = {}
        self._lengths: dict[str, tuple[Sequences, list[int]]] = {}

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        weights_only: bool | None = None,
        trust: str | Sequence[str] = (),
        **options: Any,
    ) -> Self:
        """Return the datamodule of a checkpoint; the classes of its options pass :class:`~vrnn_lightning.trust.Gate`.

        Args:
            checkpoint_path: The file.
            map_location: Where its tensors go, as in ``torch.load``.
            hparams_file: Not supported: a checkpoint holds its options.
            weights_only: ``False`` is not supported: nothing else is ever loaded.
            trust: Class paths or modules of your own that the checkpoint may name, for example ``["my_package.data"]``.
            options: Options in place of the checkpoint's.

        Raises:
            UserError: The file is missing, damaged or not a checkpoint of this class, or it names an untrusted class.
        """
        path = Path(checkpoint_path)
        key = "datamodule_hyper_parameters"
        content, made, given = read_stored(path, key, cls, trust, options, map_location, hparams_file, weights_only)
        try:
            data = cast("Self", made(**given))
            if made.__qualname__ in content:
                data.load_state_dict(content[made.__qualname__])
        except UserError:
            raise
        except Exception as error:  # of any datamodule, for options and a state that are not its own
            line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"{path}: does not fit {made.__name__} ({line}). Fix: give another checkpoint") from error
        return data

    def __str__(self) -> str:
        """Return the class and its options; Lightning's would open every loader."""
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.hparams.items())})"

    def sequences(self, split: Split) -> Sequences:
        """Return the sequences of a split, "train", "val" or "test", in data units."""
        raise NotImplementedError(f"{type(self).__name__} must define sequences(split)")

    def lengths(self, split: Split) -> Sequence[int]:
        """Return the steps of each sequence of a split: the list ``lengths`` of its collection, else by reading all."""
        sequences = self.split(split)
        if isinstance(known := getattr(sequences, "lengths", None), list):
            return known
        if split not in self._lengths or self._lengths[split][0] is not sequences:
            self._lengths[split] = sequences, [len(sequences[i].x) for i in range(len(sequences))]
        return self._lengths[split][1]

    def exact_log_likelihood(self, batch: SequenceBatch) -> Tensor | None:
        """Return the true log p(x) of each sequence in nats, in scaled units, shape (batch,), where it is known."""
        return None

    def anomalies(self, batch: SequenceBatch) -> Tensor | None:
        """Return True at faulty steps, shape (batch, time), where they are known, to judge a detection by score.

        ``batch.names`` and ``batch.index`` tell the sequences.
        """
        return None

    def input_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and std of each scaled feature over the training split, each of shape (features,)."""
        mean, std = self._moments(self.scaler)
        return mean.float(), std.float()

    def split(self, split: Split) -> Sequences:
        """Return the sequences of a split, made once; raise a UserError if there are none."""
        if split not in self._splits:
            with explained(getattr(self, "root", type(self).__name__), "--data.root"):
                sequences = self.sequences(split)
            if len(sequences) == 0:
                raise UserError(
                    f"{type(self).__name__}: the {split} split is empty. Fix: check the options that split data"
                )
            self._splits[split] = sequences
        return self._splits[split]

    @property
    def scaler(self) -> Scaler:
        """The affine scaler, fitted on the training split when first needed, or the checkpoint's.

        Raises:
            UserError: Training values are so large or small that float32 can't hold their mean or std.
        """
        if self._scaler is None:
            scaler = self.fit_scaler()
            kept = torch.stack([scaler.mean, scaler.std]).float()  # as models keep it
            if not kept.isfinite().all() or (kept[1] == 0).any():
                raise UserError(
                    f"{type(self).__name__}: training values have a mean or std that is too large or too small for "
                    "float32. Fix: write them in another unit"
                )
            self._scaler = scaler
        return self._scaler

    def fit_scaler(self) -> Scaler:
        """Fit the scaler on the training split: none, one scalar mean and std, or one per feature (``scaling``)."""
        if self.scaling == "none":
            return Scaler()
        scaler = Scaler.from_moments(*self._moments(None))
        if self.unscaled:
            scaler.mean[list(self.unscaled)], scaler.std[list(self.unscaled)] = 0.0, 1.0
        return scaler

    def fitted_on(self) -> tuple[Sequences, Iterable[int]]:
        """Return the sequences that the moments are taken over, and their steps: by default the training split."""
        return self.split("train"), self.lengths("train")

    def _moments(self, scaler: Scaler | None) -> tuple[Tensor, Tensor]:
        """Return mean and std of the training split, in one numerically stable pass (Chan et al. 1983)."""
        shared = scaler is None and self.scaling == "scalar"
        count = torch.zeros(1 if shared else self.num_features, dtype=torch.float64)
        mean, deviation = torch.zeros_like(count), torch.zeros_like(count)
        sequences, lengths = self.fitted_on()
        reader = ScaledSequences(sequences, scaler or Scaler(), self.num_features)
        pieces = (reader.pieces(i, steps, PIECE) for i, steps in enumerate(lengths))
        for piece in chain.from_iterable(pieces):
            x = piece.x[0].reshape(-1, 1) if shared else piece.x[0]
            if piece.observed is None:
                here = torch.full_like(count, len(x))
                center = x.mean(0)
                around = (x - center).square_().sum(0)
            else:
                real = piece.observed[0].to(x).reshape(x.shape)
                here = real.sum(0)
                center = (x * real).sum(0) / here.clamp(min=1)
                around = ((x - center).square() * real).sum(0)
            total = (count + here).clamp(min=1)
            shift = center - mean
            deviation += around + shift.square() * count * here / total
            mean += shift * here / total
            count += here
        std = (deviation / count.clamp(min=1)).sqrt()
        return (mean[0], std[0]) if shared else (mean, std)

    def setup(self, stage: str) -> None:
        """Make the sequences of a stage, so that errors in them are raised before training starts."""
        needed: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
        for split in needed.get(stage, ("test",)):
            self.split(split)

    def _loader(
        self, split: Split, sequences: Sequences | None = None, lengths: Sequence[int] | None = None
    ) -> SequenceLoader:
        trainer = self.trainer
        sequences = self.split(split) if sequences is None else sequences
        lengths = self.lengths(split) if lengths is None else lengths
        if not any(lengths):
            raise UserError(f"{type(self).__name__}: all sequences of the {split} split are empty. Fix: add data")
        sampler = BatchSampler(
            lengths,
            self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            window=self.window,
        )
        return SequenceLoader(
            sequences,
            self.scaler,
            self.num_features,
            sampler,
            self.num_inputs,
            self.num_targets,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )

    def train_dataloader(self) -> SequenceLoader:
        """Return the shuffled training batches."""
        return self._loader("train")

    def val_dataloader(self) -> SequenceLoader:
        """Return the validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> SequenceLoader:
        """Return the test batches."""
        return self._loader("test")

    predict_dataloader = test_dataloader

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler, so that it is never fitted again on other data."""
        return {"mean": self.scaler.mean, "std": self.scaler.std}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's scaler."""
        require_types(state_dict, self, mean=Tensor, std=Tensor)
        if any(state_dict[name].numel() not in (1, self.num_features) for name in ("mean", "std")):
            raise UserError(
                f"the checkpoint's scaler is not for {self.num_features} features. Fix: give another checkpoint"
            )
        self._scaler = Scaler(state_dict["mean"], state_dict["std"])
