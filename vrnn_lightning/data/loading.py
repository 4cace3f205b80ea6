"""Batches of an epoch: their order, shards and resumes, reading, scaling and padding."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from vrnn_lightning.batch import STEPWISE, SequenceBatch, SequenceSample, pad
from vrnn_lightning.data.sequences import ChangingSequences, Scaler, Sequences, WindowedSequences
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained

__all__ = ["BatchSampler", "ScaledSequences", "SequenceLoader", "Window"]

POOL = 50
"""Training batches whose sequences are sorted by length together: more of them pad less, and mix less."""
LINGER = 20
"""Seconds that a reading process outlives a signal that asks it to end."""


class Window(NamedTuple):
    """Steps ``first`` to ``last - 1`` of a sequence, given by its index, as a row of a batch; an empty row's is -1.

    ``reset`` is True where the row's state is reset, False where it continues from the row's last window.
    """

    sequence: int
    first: int
    last: int
    reset: bool


NOTHING = Window(-1, 0, 0, True)


class Rows(list[Any]):
    """The indices of sequences, or the windows, that a batch is read from, in the epoch of an order."""

    epoch = 0


class BatchSampler(DistributedSampler[Rows]):
    """Batches of indices or windows whose order depends on nothing but the seed and the epoch.

    Whole sequences: every process shuffles alike, cuts the order into global batches of ``batch_size`` times
    ``num_replicas`` and keeps every ``num_replicas``-th sequence of each. So no sequence is read twice in an epoch, and
    several processes see together the batches of one process with the global batch. A process without a sequence in
    the last batch gets the index -1, an empty sequence.

    With ``window`` and ``shuffle``, the rows of the global batch are streams: the shuffled sequences, end to end, are
    cut into as many contiguous stretches, equal in windows, give or take one. Row i of every batch is the next window
    of stretch i, so that a state can be carried row by row. A window ends where its sequence ends, and a row is empty
    in an epoch's last batch alone.

    Without ``shuffle``, whole sequences of like length share a batch; with ``window``, one of at most ``batch_size``
    times ``window`` steps a process, padding included, or one longer sequence. Batches come in the order of their first
    sequences, and the rows in them in that of the data.

    Args:
        lengths: Steps of each sequence. With ``shuffle``, sequences of like length share a batch.
        batch_size: Sequences, or streams, per batch and process; at most so many with ``window`` but not ``shuffle``.
        shuffle: Shuffle in each epoch.
        seed: Seed of the order.
        num_replicas: Number of processes.
        rank: Index of this process.
        window: Steps of a window; ``None`` for whole sequences.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        num_replicas: int,
        rank: int,
        window: int | None = None,
    ) -> None:
        super().__init__(range(len(lengths)), num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]  # a range is sized
        self.lengths = torch.as_tensor(lengths)
        self.nonempty = self.lengths.nonzero().flatten()  # a sequence of no steps counts nowhere
        self.window = window
        self.pieces = self.lengths.sign() if window is None else -(-self.lengths // window)  # of each sequence
        self.batch_size = batch_size
        self.global_batch = batch_size * num_replicas
        self.skipped: tuple[int | None, int] = (None, 0)  # an epoch (or any), and how many of its first batches

    @property
    def cut(self) -> list[int]:
        """What decides which sequences and steps share a batch, but for the epoch."""
        return [self.seed, self.global_batch, self.window or 0, len(self.nonempty), int(self.lengths.sum())]

    def __len__(self) -> int:
        if not self.shuffle:
            return len(self._groups)
        return -(-int(self.pieces.sum()) // self.global_batch)

    def count_skipped(self) -> int:
        """Return how many batches of this epoch are skipped."""
        epoch, count = self.skipped
        return count if epoch in (None, self.epoch) else 0

    def __iter__(self) -> Iterator[Rows]:
        start, self.skipped = self.count_skipped(), (None, 0)
        for items in self._streams(self.window, start) if self.window and self.shuffle else self._shares(start):
            rows = Rows(items)
            rows.epoch = self.epoch
            yield rows

    def _shares(self, start: int) -> Iterator[list[int]]:
        for batch in self._global_batches()[start:]:
            yield batch[self.rank :: self.num_replicas] or [-1]

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        generator.manual_seed(self.seed + self.epoch)
        return self.nonempty[torch.randperm(len(self.nonempty), generator=generator)]

    def _streams(self, window: int, start: int) -> Iterator[list[Window]]:
        """Yield the batches of this process's streams: from each the next window, or none after its end."""
        order = self._shuffled(torch.Generator())
        ends = self.pieces[order].cumsum(0)
        bounds = torch.arange(self.global_batch + 1) * self.pieces.sum() // self.global_batch
        first_piece, end_piece = (cut[self.rank :: self.num_replicas] for cut in (bounds[:-1], bounds[1:]))
        for batch in range(start, len(self)):
            piece = first_piece + batch
            place = torch.searchsorted(ends, piece, right=True).clamp(max=len(order) - 1)
            index = order[place]
            first = (piece - ends[place] + self.pieces[index]) * window
            last = (first + window).minimum(self.lengths[index])
            reset = (first == 0) | (batch == 0)
            columns = (index, first, last, reset, piece < end_piece)
            rows = zip(*(column.tolist() for column in columns), strict=True)
            yield [Window(*row) if there else NOTHING for *row, there in rows]

    @cached_property
    def _groups(self) -> list[list[int]]:
        """Global batches of like length in a fixed order, each as many sequences as its steps' budget holds."""
        longest_first = self.nonempty[self.lengths[self.nonempty].argsort(descending=True, stable=True)].tolist()
        groups: list[list[int]] = []
        while longest_first:
            rows = self.batch_size
            if self.window is not None:
                rows = min(rows, self.batch_size * self.window // int(self.lengths[longest_first[0]]))
            size = max(1, rows) * self.num_replicas
            groups.append(sorted(longest_first[:size]))
            longest_first = longest_first[size:]
        return sorted(groups)

    def _global_batches(self) -> list[list[int]]:
        if not self.shuffle:
            return self._groups
        generator = torch.Generator()
        pools = self._shuffled(generator).split(self.global_batch * POOL)
        pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in pools]
        batches = [chunk.tolist() for pool in pools for chunk in pool.split(self.global_batch)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class ScaledSequences(Dataset[SequenceBatch]):
    """Reads, checks, scales and pads the sequences of a list of indices, or their windows.

    A sequence of which the collection can't read a part is read whole, and kept until a batch does without it. A list
    that is not :class:`Rows` is read as in epoch 0.
    """

    def __init__(
        self, sequences: Sequences, scaler: Scaler, num_features: int, num_inputs: int = 0, num_targets: int = 0
    ) -> None:
        self.scaler = scaler
        self.num_features = num_features
        self.num_inputs, self.num_targets = num_inputs, num_targets
        self._changing = sequences if isinstance(sequences, ChangingSequences) else None
        self._epoch = 0
        self._set_sequences(sequences)

    def _set_sequences(self, sequences: Sequences) -> None:
        self.sequences = sequences
        by_parts = isinstance(sequences, WindowedSequences) and callable(sequences.window)  # not a mere number
        self._parts: WindowedSequences | None = sequences if by_parts else None  # type: ignore[assignment]
        self._whole: dict[int, SequenceSample] = {}

    def __getitem__(self, rows: Sequence[int] | Sequence[Window]) -> SequenceBatch:
        epoch = getattr(rows, "epoch", 0)
        if self._changing is not None and epoch != self._epoch:
            self._epoch = epoch
            self._set_sequences(self._changing.in_epoch(epoch))
        windows = [row for row in rows if isinstance(row, Window)]
        self._keep({window.sequence for window in windows})
        batch = self._scaled(rows)
        batch.x = batch.x.float()
        if batch.inputs is not None:
            batch.inputs = batch.inputs.float()
        if batch.targets is not None:
            batch.targets = batch.targets.float()
        batch.index = torch.tensor([row.sequence if isinstance(row, Window) else row for row in rows])
        if windows:
            batch.reset = torch.tensor([window.reset for window in windows])
            batch.start = torch.tensor([window.first for window in windows], dtype=torch.int64)
        return batch

    def pieces(self, index: int, length: int, steps: int) -> Iterator[SequenceBatch]:
        """Yield a sequence of so many steps in scaled units and float64, in windows of at most ``steps``."""
        self._keep({index})
        for first in range(0, length, steps):
            yield self._scaled([Window(index, first, min(first + steps, length), first == 0)])

    def _keep(self, indices: set[int]) -> None:
        """Forget the other sequences that were read whole."""
        self._whole = {index: s for index, s in self._whole.items() if index in indices}

    def _scaled(self, items: Sequence[int] | Sequence[Window]) -> SequenceBatch:
        """Return sequences padded and in scaled units, in float64: a large offset is gone before precision is."""
        with explained("the data"):
            batch = pad([self._read(item) for item in items], torch.float64)
        valid = batch.valid_mask
        self._raise_if(batch, ~torch.isfinite(batch.x) & valid, "NaN or infinite values")
        batch.x = self.scaler.scale(batch.x).masked_fill(~valid, 0.0)
        self._raise_if(batch, ~torch.isfinite(batch.x.float()), "values too large for float32")
        if batch.inputs is not None and self.num_inputs:
            self._raise_if(batch, ~torch.isfinite(batch.inputs), "NaN or infinite inputs")
            self._raise_if(batch, ~torch.isfinite(batch.inputs.float()), "inputs too large for float32")
        if batch.targets is not None and self.num_targets:
            self._raise_if(batch, batch.targets.float().isinf(), "infinite targets, or too large for float32")
        return batch

    def _raise_if(self, batch: SequenceBatch, wrong: Tensor, what: str) -> None:
        if wrong.any():
            assert batch.names is not None
            name = batch.names[int(wrong.flatten(1).any(1).nonzero()[0])]
            path = getattr(self.sequences, "path", None)  # of a collection that is one file
            raise UserError(f"{f'{path}: ' if path else ''}{name}: holds {what}. Fix: correct or remove it")

    def _read(self, item: int | Window) -> SequenceSample:
        index = item.sequence if isinstance(item, Window) else item
        if index < 0:
            return self._nothing
        if not isinstance(item, Window):
            return self._checked(index, self.sequences[index])
        _, first, last, _ = item
        s = self._part(index, first, last)
        if s is None:
            if index not in self._whole:
                self._whole[index] = self._checked(index, self.sequences[index])
            s = _steps(self._whole[index], first, last)
        if len(s.x) != last - first:
            raise UserError(
                f"{s.name}: read {len(s.x)} steps from step {first} on, expected {last - first}. "
                "Fix: return the true lengths from lengths()"
            )
        return s

    def _part(self, index: int, first: int, last: int) -> SequenceSample | None:
        """Return a window that is read alone, or ``None`` where that can't be."""
        part = None if self._parts is None else self._parts.window(index, first, last)
        return None if part is None else self._checked(index, part)

    @cached_property
    def _nothing(self) -> SequenceSample:
        """No steps of a sequence, so that a batch of it still has its covariates."""
        s = self._part(0, 0, 1) or self._checked(0, self.sequences[0])
        return replace(_steps(s, 0, 0), name="(none)")

    def _checked(self, index: int, s: SequenceSample) -> SequenceSample:
        name, observed = s.name or f"sequence {index}", cast(Any, s.observed)
        if s.x.ndim != 2 or s.x.shape[1] != self.num_features:
            raise UserError(f"{name}: shape {tuple(s.x.shape)}, expected (time, num_features={self.num_features})")
        is_tensor = isinstance(observed, Tensor)
        if observed is not None and not (is_tensor and observed.dtype == torch.bool and observed.shape == s.x.shape):
            raise UserError(f"{name}: observed must be a torch.bool tensor of shape {tuple(s.x.shape)}")
        for field, width in (("inputs", self.num_inputs), ("targets", self.num_targets)):
            values, expected = getattr(s, field), (len(s.x), width)
            given = None if values is None else tuple(values.shape)
            if width and given != expected:
                raise UserError(f"{name}: {field} of shape {given}, expected {expected}")
        if s.is_first is not None and (s.is_first.dtype != torch.bool or s.is_first.shape != s.x.shape[:1]):
            shown = f"{s.is_first.dtype} of shape {tuple(s.is_first.shape)}"
            raise UserError(f"{name}: is_first is {shown}, expected torch.bool of shape ({len(s.x)},)")
        return replace(s, name=name)


def _steps(s: SequenceSample, first: int, last: int) -> SequenceSample:
    values = {name: value for name in STEPWISE if (value := getattr(s, name)) is not None}
    return replace(s, **{name: value[first:last] for name, value in values.items()})


def _outlive_signals(worker: int) -> None:
    """Ignore signals to all processes of a run: the main process ends this one after it has saved.

    If it does not, this one ends by itself after :data:`LINGER` seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LINGER))


class SequenceLoader:
    """Padded batches of an epoch, which continue where a checkpoint in the middle of an epoch left off.

    It holds a DataLoader and is none itself: Lightning rebuilds those, sampler and all, for prediction.

    Args:
        sequences: The sequences, in data units.
        scaler: Applied to every sequence.
        num_features: Features per time step, which every sequence must have.
        sampler: Decides the batches.
        num_inputs: Covariates per time step, which every sequence must have; 0 checks none.
        num_targets: The same of targets.
        options: Those of DataLoader.
    """

    def __init__(
        self,
        sequences: Sequences,
        scaler: Scaler,
        num_features: int,
        sampler: BatchSampler,
        num_inputs: int = 0,
        num_targets: int = 0,
        **options: Any,
    ) -> None:
        self.sampler = sampler  # where Lightning looks to announce the epoch
        self.batch_sampler = None  # where it looks next
        self.dataset = ScaledSequences(sequences, scaler, num_features, num_inputs, num_targets)
        options.setdefault("worker_init_fn", _outlive_signals)
        self._loader: DataLoader[SequenceBatch] = DataLoader(self.dataset, batch_size=None, sampler=sampler, **options)
        self.batches_read = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[SequenceBatch]:
        self.batches_read = self.sampler.count_skipped()
        try:
            for batch in self._loader:
                self.batches_read += 1
                yield batch
        except UserError as error:  # a reading process puts its whole traceback into the message
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
        self.batches_read = 0

    def close(self) -> None:
        """End the processes that read ahead, now and not when memory is cleaned up, which may wait for them."""
        iterator = self._loader._iterator
        if iterator is not None and self._loader.num_workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # of the kind that has workers
            self._loader._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches of the epoch were read, of which, and how it was cut into batches."""
        read = self.batches_read % max(1, len(self))
        return {"batches_read": read, "epoch": self.sampler.epoch, "cut": self.sampler.cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the batches that were read before the checkpoint, should the rest of that epoch be read."""
        start = state["batches_read"]
        if start and state.get("cut", self.sampler.cut) != self.sampler.cut:
            rank_zero_warn("the epoch starts again: its batches were cut otherwise when the checkpoint was written")
            start = 0
        self.sampler.skipped = (state.get("epoch"), start)
