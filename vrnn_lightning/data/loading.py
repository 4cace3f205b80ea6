"""Batches of an epoch: their order, shards and resumes, reading, scaling and padding."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from vrnn_lightning.batch import Sequence, SequenceBatch, pad
from vrnn_lightning.data.sequences import Scaler, Sequences
from vrnn_lightning.errors import UserError

__all__ = ["BatchSampler", "ScaledSequences", "SequenceLoader"]


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


class ScaledSequences(Dataset[SequenceBatch]):
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
        self.dataset = ScaledSequences(sequences, scaler, num_features, num_inputs)
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
