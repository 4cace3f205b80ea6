"""What a datamodule promises, and a base class that keeps it, so that a new data set is its reading code only."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from vrnn_lightning.batch import Sequence, SequenceBatch, pad
from vrnn_lightning.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ArchiveSplit",
    "BatchSampler",
    "Modality",
    "Scaler",
    "SequenceDataModule",
    "SequenceLoader",
    "Sequences",
    "Split",
    "read_archive",
]

Modality = Literal["audio", "strokes", "series", "roll", "image"]
Split = Literal["train", "val", "test"]


class Sequences(Protocol):
    """A map-style collection of sequences: a list of them, or anything that reads one when indexed."""

    def __len__(self) -> int:
        """Return the number of sequences."""

    def __getitem__(self, index: int, /) -> Sequence:
        """Return one sequence in data units."""


@dataclass(frozen=True)
class Scaler:
    """The affine map between data units and the model's: ``scaled = (data - mean) / std``.

    Args:
        mean: Shape () for one value shared by all features, or (features,).
        std: Like ``mean``, positive.
    """

    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    std: Tensor = field(default_factory=lambda: torch.ones(()))

    def scale(self, x: Tensor) -> Tensor:
        """Return data of shape (..., features) in the model's units."""
        return (x - self.mean.to(x)) / self.std.to(x)

    def unscale(self, x: Tensor) -> Tensor:
        """Return model values of shape (..., features) in data units."""
        return x * self.std.to(x) + self.mean.to(x)


@dataclass(frozen=True)
class ArchiveSplit:
    """One split of a flat archive: its rows in one array, from which a sequence is cut when it is asked for.

    Args:
        path: The archive.
        word: What the archive calls the split: "train", "valid" or "test".
        values: The sequences' rows one after another, shape (total steps, features), in the archive's type.
        bounds: Where each sequence begins and ends, shape (sequences, 2).
        numbers: Which sequence of the archive each one is, shape (sequences,).
    """

    path: Path
    word: str
    values: NDArray[Any]
    bounds: NDArray[np.int64]
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.bounds)

    def __getitem__(self, index: int, /) -> Sequence:
        """Return one sequence, named after the split and its number in the archive, in float32 where that is exact."""
        start, end = self.bounds[index]
        exact = np.result_type(self.values.dtype, np.float32)
        x = torch.from_numpy(self.values[start:end].astype(exact))
        return Sequence(x, name=f"{self.word} {self.numbers[index]}")

    @property
    def lengths(self) -> list[int]:
        """Steps of each sequence."""
        steps: list[int] = np.diff(self.bounds, axis=1)[:, 0].tolist()
        return steps

    def no_longer_than(self, steps: int) -> ArchiveSplit:
        """Return the sequences of at most so many steps."""
        kept = np.array(self.lengths, dtype=np.int64) <= steps
        return replace(self, bounds=self.bounds[kept], numbers=self.numbers[kept])

    def rows(self) -> NDArray[Any]:
        """Return the rows of all sequences, shape (steps, features)."""
        if len(self) == 0:
            return self.values[:0]
        return np.concatenate([self.values[start:end] for start, end in self.bounds])

    def refuse(self, wrong: NDArray[np.bool_], cure: str) -> None:
        """Refuse values that the data can't hold.

        Args:
            wrong: True at them, shape (total steps, features) or fewer features from the left on.
            cure: The rest of the message, after what the first of them is and where it stands.

        Raises:
            UserError: Any is true.
        """
        if not wrong.any():
            return
        row, feature = np.unravel_index(wrong.argmax(), wrong.shape)
        i = int(np.searchsorted(self.bounds[:, 1], row, side="right"))
        place = f"{self.word} {self.numbers[i]}, step {row - self.bounds[i, 0]}, feature {feature}"
        raise UserError(f"{self.path}: {self.word}_values holds {self.values[row, feature]} at {place}; {cure}")


def read_archive(path: Path, split: Split, width: int) -> ArchiveSplit:
    """Read one split of a flat archive, and of the file nothing else.

    A flat archive is an ``.npz`` file, never pickled, with two arrays for each split, "train", "valid" and "test":
    ``{split}_values`` of shape (total steps, features) and ``{split}_lengths`` of shape (sequences,). Sequence i is
    ``values[sum(lengths[:i]) : sum(lengths[: i + 1])]``. Other arrays are ignored.

    Args:
        path: The file.
        split: Which split; "val" is "valid" in the file.
        width: Features that a row must have.

    Raises:
        UserError: There is no such file, it is no such archive, or its arrays don't fit together or hold values that
            are no finite numbers.
    """
    word = "valid" if split == "val" else split
    values, lengths = _arrays(path, f"{word}_values", f"{word}_lengths")
    if values.dtype.kind not in "buif" or values.dtype.itemsize > 8:
        raise UserError(f"{path}: {word}_values is of type {values.dtype}; save it as integers, float32 or float64")
    if values.ndim != 2 or values.shape[1] != width:
        raise UserError(f"{path}: {word}_values has shape {values.shape}, expected (total steps, {width})")
    if (lengths.size and lengths.dtype.kind not in "ui") or lengths.ndim != 1:
        raise UserError(
            f"{path}: {word}_lengths is of type {lengths.dtype} and shape {lengths.shape}, expected integers of shape "
            "(sequences,)"
        )
    steps = lengths.astype(np.int64)
    if (steps < 0).any():
        raise UserError(f"{path}: {word}_lengths holds {steps.min()} at {steps.argmin()}; a length is at least 0")
    if steps.sum() != len(values):
        raise UserError(
            f"{path}: {word}_lengths adds up to {steps.sum()}, but {word}_values has {len(values)} rows; "
            "write both from the same sequences"
        )
    ends = steps.cumsum()
    found = ArchiveSplit(path, word, values, np.stack([ends - steps, ends], axis=1), np.arange(len(steps)))
    if values.dtype.kind == "f":
        found.refuse(~np.isfinite(values), "remove the sequence or mend it")
    return found


def _arrays(path: Path, *names: str) -> list[NDArray[Any]]:
    """Return arrays of an npz file."""
    if not path.exists():
        raise UserError(f"--data.root {path}: no such file")
    if not path.is_file():
        raise UserError(f"--data.root {path}: is no file; give the .npz archive itself")
    try:
        with path.open("rb") as file:  # numpy leaves a file open that it can't read
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(f"{path}: is a single array, no .npz archive; write it with numpy.savez")
            return [_array(path, archive, name) for name in names]
    except (BadZipFile, EOFError, OSError, ValueError):
        raise UserError(f"{path}: can't be read as an .npz archive; write it with numpy.savez") from None


def _array(path: Path, archive: np.lib.npyio.NpzFile, name: str) -> NDArray[Any]:
    if name not in archive.files:
        holds = ", ".join(archive.files) or "nothing"
        raise UserError(f"{path}: has no array {name}; it holds {holds}")
    try:
        array: NDArray[Any] = archive[name]
    except ValueError as error:
        pickled = "allow_pickle" in str(error)
        reason = "holds pickled objects, which are never loaded" if pickled else "is damaged or no array"
        raise UserError(f"{path}: {name} {reason}; write it anew as a plain array") from None
    except (BadZipFile, EOFError, OSError, ZlibError):
        raise UserError(f"{path}: {name} is damaged; copy or write the file anew") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: {name} is damaged or no array; write it anew as a plain array")
    return array


class BatchSampler(DistributedSampler[list[int]]):
    """Batches of indices whose order depends on nothing but the seed and the epoch.

    Every process shuffles alike, cuts the order into global batches of ``batch_size`` times ``num_replicas`` and keeps
    every ``num_replicas``-th sequence of each. So no sequence is read twice in an epoch, and several processes see
    together what one process with the global batch sees. A process for which nothing is left in the last batch gets
    the index -1, an empty sequence.

    Args:
        lengths: Steps of each sequence. With ``shuffle``, sequences of like length share a batch.
        batch_size: Sequences per batch and process.
        shuffle: Shuffle anew in each epoch.
        seed: Seed of the order.
        num_replicas: Number of processes.
        rank: Index of this process.
    """

    def __init__(
        self, lengths: SequenceOf[int], batch_size: int, *, shuffle: bool, seed: int, num_replicas: int, rank: int
    ) -> None:
        super().__init__(range(len(lengths)), num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]  # a range is sized
        self.lengths = torch.as_tensor(lengths)
        self.kept = self.lengths.nonzero().flatten()  # a sequence of no steps counts nowhere
        self.global_batch = batch_size * num_replicas
        self.start = 0

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-len(self.kept) // self.global_batch)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's batches, from ``start`` (which only the first pass heeds)."""
        start, self.start = self.start, 0
        for batch in self._global_batches()[start:]:
            yield batch[self.rank :: self.num_replicas] or [-1]

    def _global_batches(self) -> list[list[int]]:
        size = self.global_batch
        if not self.shuffle:
            return [chunk.tolist() for chunk in self.kept.split(size)]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = self.kept[torch.randperm(len(self.kept), generator=generator)]
        pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in order.split(size * 20)]
        batches = [chunk.tolist() for pool in pools for chunk in pool.split(size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class _Scaled(Dataset[SequenceBatch]):
    """Reads, checks, scales and pads the sequences of a list of indices."""

    def __init__(self, sequences: Sequences, scaler: Scaler, num_features: int, num_inputs: int = 0) -> None:
        self.sequences = sequences
        self.scaler = scaler
        self.num_features = num_features
        self.num_inputs = num_inputs

    def __getitem__(self, indices: list[int]) -> SequenceBatch:
        batch = pad([self.read(i) for i in indices])
        batch.x = batch.x.float()
        if batch.inputs is not None:
            batch.inputs = batch.inputs.float()
        return batch

    def read(self, index: int) -> Sequence:
        """Return one sequence in scaled units, in float64: a large offset is gone before precision is."""
        if index < 0:
            return self._nothing()
        s = self.sequences[index]
        name = s.name or f"sequence {index}"
        if s.x.ndim != 2 or s.x.shape[1] != self.num_features:
            raise UserError(f"{name}: shape {tuple(s.x.shape)}, expected (time, {self.num_features})")
        if s.observed is not None:
            self._check_observed(s, name)
        real = s.x if s.observed is None else s.x[s.observed]
        if not torch.isfinite(real).all():
            raise UserError(f"{name}: holds NaN or infinite values; remove it or mend it")
        if self.num_inputs:
            self._check_inputs(s, name)
        scaled = self.scaler.scale(s.x.double())
        if s.observed is not None:
            scaled = scaled.masked_fill(~s.observed, 0.0)
        return Sequence(scaled, s.observed, s.inputs, name)

    @staticmethod
    def _check_observed(s: Sequence, name: str) -> None:
        given: Any = s.observed
        tensor = isinstance(given, Tensor)
        if not tensor or given.dtype != torch.bool or given.shape != s.x.shape:
            shown = f"{given.dtype} of shape {tuple(given.shape)}" if tensor else type(given).__name__
            raise UserError(f"{name}: observed is {shown}, expected a torch.bool tensor of shape {tuple(s.x.shape)}")

    def _check_inputs(self, s: Sequence, name: str) -> None:
        expected = (len(s.x), self.num_inputs)
        if s.inputs is None:
            raise UserError(f"{name}: has no inputs, expected shape {expected}")
        if s.inputs.shape != expected:
            raise UserError(f"{name}: inputs of shape {tuple(s.inputs.shape)}, expected {expected}")
        if not torch.isfinite(s.inputs).all():
            raise UserError(f"{name}: holds NaN or infinite inputs; remove it or mend it")

    def _nothing(self) -> Sequence:
        """Return no steps of what a sequence is made of, so that a batch of it still has its covariates."""
        s = self.read(0)
        observed, inputs = (None if v is None else v[:0] for v in (s.observed, s.inputs))
        return Sequence(s.x[:0], observed, inputs, "(none)")


class SequenceLoader:
    """Padded batches of an epoch; goes on where a checkpoint in the middle of an epoch left off.

    It holds a DataLoader and is none itself: Lightning rebuilds those, sampler and all, for prediction.

    Args:
        sequences: What to read, in data units.
        scaler: Applied to every sequence.
        num_features: Features per time step, which every sequence must have.
        sampler: Decides the batches.
        num_inputs: Covariates per time step, which every sequence must have; 0 checks none.
        options: Handed on to DataLoader.
    """

    def __init__(
        self,
        sequences: Sequences,
        scaler: Scaler,
        num_features: int,
        sampler: BatchSampler,
        num_inputs: int = 0,
        **options: Any,
    ) -> None:
        self.sampler = sampler  # where Lightning looks to announce the epoch
        self.batch_sampler = None  # where it looks next
        self.dataset = _Scaled(sequences, scaler, num_features, num_inputs)
        self._loader: DataLoader[SequenceBatch] = DataLoader(self.dataset, batch_size=None, sampler=sampler, **options)
        self.batches_read = 0

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[SequenceBatch]:
        """Yield the epoch's batches and count them."""
        self.batches_read = self.sampler.start
        try:
            for batch in self._loader:
                self.batches_read += 1
                yield batch
        except UserError as error:  # a reading process puts its whole traceback into the message
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
        self.batches_read = 0

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the epoch were read."""
        return {"batches_read": self.batches_read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that were read before the checkpoint."""
        self.sampler.start = state["batches_read"] % max(1, len(self))


class SequenceDataModule(LightningDataModule):
    """Base class of datamodules: give it :meth:`sequences`, it does scaling, batching, padding, seeds and shards.

    A subclass calls ``super().__init__`` with its number of features and defines :meth:`sequences`. Any other
    LightningDataModule whose loaders yield :class:`~vrnn_lightning.batch.SequenceBatch` and that has ``num_features``
    (right after construction), ``modality`` and ``scaler`` serves as well.

    Options travel in the checkpoint. Of these, only :attr:`run_options` may differ when a checkpoint is used again.

    Args:
        num_features: Features per time step.
        batch_size: Sequences per batch and process.
        num_workers: Processes that read ahead; 0 reads in the main process.
        seed: Seed of the order of the training batches, and of whatever the subclass draws.
    """

    modality: ClassVar[Modality] = "series"
    scaling: ClassVar[Literal["none", "scalar", "per_feature"]] = "none"
    run_options: ClassVar[frozenset[str]] = frozenset({"root", "batch_size", "num_workers"})
    num_inputs: int = 0
    """Covariates per time step, the width of ``Sequence.inputs``; where it is not 0, every sequence must have them.

    Like ``num_features`` it is known right after construction: ``__init__`` sets it."""
    missing: bool = False
    """True where sequences may come with ``observed``; the model's phi_x is then told which values are missing."""

    def __init__(self, num_features: int, batch_size: int = 32, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        for option, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise UserError(f"--data.{option} {value}: must be at least {least}")
        if not 0 <= seed < 2**60:
            raise UserError(f"--data.seed {seed}: must lie between 0 and 2^60")
        self.save_hyperparameters(logger=False)
        paths = {key: str(value) for key, value in self.hparams.items() if isinstance(value, PurePath)}
        self.hparams.update(paths)  # a checkpoint holds words, not objects
        self.num_features = num_features
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._scaler: Scaler | None = None
        self._splits: dict[str, Sequences] = {}

    def __str__(self) -> str:
        """Return the class and its options; Lightning's would open every loader."""
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.hparams.items())})"

    def sequences(self, split: Split) -> Sequences:
        """Return the sequences of a split in data units.

        Args:
            split: "train", "val" or "test".
        """
        raise NotImplementedError(f"{type(self).__name__} must define sequences(split)")

    def lengths(self, split: Split) -> SequenceOf[int]:
        """Return the steps of each sequence of a split; override it where reading them all would be slow."""
        sequences = self.split(split)
        return [len(sequences[i].x) for i in range(len(sequences))]

    def exact_log_likelihood(self, batch: SequenceBatch) -> Tensor | None:
        """Return the true log p(x) of each sequence in nats, in scaled units, shape (batch,), where it is known."""
        return None

    def input_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and std of each scaled feature over the training split, each of shape (features,)."""
        mean, std = self._moments(self.scaler)
        return mean.float(), std.float()

    def split(self, split: Split) -> Sequences:
        """Return the sequences of a split, found once.

        Raises:
            UserError: The split is empty.
        """
        if split not in self._splits:
            found = self.sequences(split)
            if len(found) == 0:
                raise UserError(f"{type(self).__name__}: the {split} split is empty; check the options that split data")
            self._splits[split] = found
        return self._splits[split]

    @property
    def scaler(self) -> Scaler:
        """The affine scaler, fitted on the training split when first asked for, or the checkpoint's."""
        if self._scaler is None:
            self._scaler = self.fit_scaler()
        return self._scaler

    def fit_scaler(self) -> Scaler:
        """Fit the scaler on the training split: none, one scalar mean and std, or one per feature (``scaling``)."""
        if self.scaling == "none":
            return Scaler()
        mean, std = self._moments(None)
        varies = std > 1e-12 * mean.abs()  # what is below is rounding: a constant feature is only centred
        return Scaler(mean, torch.where(varies, std, 1.0))

    def _moments(self, scaler: Scaler | None) -> tuple[Tensor, Tensor]:
        """Return mean and std of the training split, in one pass that large means do not harm (Chan et al. 1983)."""
        shared = scaler is None and self.scaling == "scalar"
        count = torch.zeros(1 if shared else self.num_features, dtype=torch.float64)
        mean, deviation = torch.zeros_like(count), torch.zeros_like(count)
        reader = _Scaled(self.split("train"), scaler or Scaler(), self.num_features)
        for i in range(len(reader.sequences)):
            s = reader.read(i)
            real = torch.ones_like(s.x) if s.observed is None else s.observed.to(s.x)
            x, real = (s.x.reshape(-1, 1), real.reshape(-1, 1)) if shared else (s.x, real)
            here = real.sum(0)
            center = (x * real).sum(0) / here.clamp(min=1)
            total = (count + here).clamp(min=1)
            shift = center - mean
            deviation += ((x - center).square() * real).sum(0) + shift.square() * count * here / total
            mean += shift * here / total
            count += here
        std = (deviation / count.clamp(min=1)).sqrt()
        return (mean[0], std[0]) if shared else (mean, std)

    def setup(self, stage: str) -> None:
        """Find the sequences of a stage early, so that what is wrong with them is said before training starts."""
        needed: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
        for split in needed.get(stage, ("test",)):
            self.split(split)

    def _loader(self, split: Split) -> SequenceLoader:
        trainer = self.trainer
        lengths = self.lengths(split)
        if not any(lengths):
            raise UserError(f"{type(self).__name__}: no sequence of the {split} split has a step")
        sampler = BatchSampler(
            lengths,
            self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
        )
        return SequenceLoader(
            self.split(split),
            self.scaler,
            self.num_features,
            sampler,
            self.num_inputs,
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

    def predict_dataloader(self) -> SequenceLoader:
        """Return the test batches."""
        return self._loader("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler, so that it is never fitted again on other data."""
        return {"mean": self.scaler.mean, "std": self.scaler.std}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's scaler."""
        self._scaler = Scaler(state_dict["mean"], state_dict["std"])
