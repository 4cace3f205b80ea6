"""The batch that every datamodule yields and every model reads: padded sequences and their masks."""

from __future__ import annotations

import collections.abc
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vrnn_lightning.compatibility import old_names, renamed
from vrnn_lightning.errors import UserError

__all__ = ["STEPWISE", "SequenceBatch", "SequenceSample", "pad"]
__getattr__ = old_names(__name__, {"Sequence": "SequenceSample"})

STEPWISE = ("x", "observed", "inputs", "is_first", "targets")
"""The fields of a batch and of a sample that have steps."""


@dataclass
class SequenceSample:
    """One sequence, as a dataset returns it.

    Args:
        x: Values, shape (time, features), in data units.
        observed: True where ``x`` was measured, shape (time, features); ``None`` means everywhere. A datamodule with
            missing values sets ``missing``; the model then reads the mask too.
        inputs: Covariates known beforehand, shape (time, covariates), or ``None``. A datamodule gives their number in
            ``num_inputs``, and :class:`~vrnn_lightning.vrnn.VRNN` conditions on them at each step.
        name: Name of the sequence in messages, for example a file name. Sequences with the same name get the same
            noise; one without a name is identified by its place.
        is_first: True at the first step of each episode, shape (time,), or ``None`` for one episode.
        targets: What auxiliary losses predict, shape (time, targets), NaN where unknown, or ``None``. The model never
            reads them. A datamodule gives their number in ``num_targets``.
    """

    x: Tensor
    observed: Tensor | None = None
    inputs: Tensor | None = None
    name: str = ""
    is_first: Tensor | None = None
    targets: Tensor | None = None


@dataclass
class SequenceBatch:
    """Padded sequences, batch first.

    Steps at or past a sequence's length are padding: they change no loss, metric, gradient, sample or state.

    Args:
        x: Values in scaled units, shape (batch, time, features), float.
        lengths: Real steps of each sequence, shape (batch,), int64.
        observed: True where ``x`` was measured, shape (batch, time, features), or ``None`` for everywhere.
        inputs: Covariates, shape (batch, time, covariates), or ``None``; the VRNN conditions on them.
        reset: True for rows whose carried state is reset, shape (batch,), bool; ``None`` where the batch is not part
            of a stream and nothing is carried.
        names: One name per sequence for messages, or ``None``.
        start: The step of its sequence at which each row begins, shape (batch,), int64; ``None`` means 0 everywhere.
        index: Number of each row's sequence in its split, shape (batch,), int64, -1 for none; ``None`` where unknown.
            Answers are written in this order.
        is_first: True at the first step of each episode, shape (batch, time), bool; ``None`` for one episode per row.
            The state before such a step is the model's initial state, and no network reads across it: the row's terms
            are those of its episodes as separate sequences. Dropout has one mask per row.
        targets: What auxiliary losses predict, shape (batch, time, targets), NaN where unknown and at padding, or
            ``None``. The model never reads them.
    """

    x: Tensor
    lengths: Tensor
    observed: Tensor | None = None
    inputs: Tensor | None = None
    reset: Tensor | None = None
    names: list[str] | None = None
    start: Tensor | None = None
    index: Tensor | None = None
    is_first: Tensor | None = None
    targets: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def mask(self) -> Tensor:
        """True at real steps, shape (batch, time)."""
        return torch.arange(self.x.shape[1], device=self.x.device) < self.lengths[:, None]

    @property
    def valid_mask(self) -> Tensor:
        """True at real, measured values, shape (batch, time, features)."""
        mask = self.mask[..., None].expand_as(self.x)
        return mask if self.observed is None else mask & self.observed

    counted = renamed("counted", "valid_mask")

    def rows(self, index: collections.abc.Sequence[int]) -> SequenceBatch:
        """Return some of the sequences, padded to the longest of them."""
        rows = list(index)
        steps = max(1, int(self.lengths[rows].max()))
        reset, start, places = (None if v is None else v[rows] for v in (self.reset, self.start, self.index))
        names = None if self.names is None else [self.names[i] for i in rows]
        cut = replace(self, lengths=self.lengths[rows], reset=reset, names=names, start=start, index=places)
        return replace(cut, **self._stepwise((rows, slice(steps))))

    def _stepwise(self, place: Any) -> dict[str, Any]:
        """Return what has steps, at some rows and steps."""
        values = {name: getattr(self, name) for name in STEPWISE}
        return {name: None if value is None else value[place] for name, value in values.items()}

    def episodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return row, first step and length of each episode, in the order of the rows, each of shape (episodes,)."""
        starts = self.mask.new_zeros(self.mask.shape) if self.is_first is None else self.is_first & self.mask
        starts[:, 0] = True
        rows, first = starts.nonzero(as_tuple=True)
        is_last = torch.cat([rows[1:] != rows[:-1], rows.new_ones(1, dtype=torch.bool)])
        return rows, first, torch.where(is_last, self.lengths[rows], first.roll(-1)) - first

    def window(self, first: int, last: int) -> SequenceBatch:
        """Return steps ``first`` to ``last - 1`` of every row; a row that ended before has length 0 there.

        ``start`` advances, and ``reset`` applies to the batch's first step alone. The window has at least one step.

        >>> batch = pad([SequenceSample(torch.ones(2, 3)), SequenceSample(torch.ones(5, 3))])
        >>> window = batch.window(1, 4)
        >>> tuple(window.x.shape), window.lengths.tolist(), window.start.tolist()
        ((2, 3, 3), [1, 3], [1, 1])
        """
        begin = min(first, self.x.shape[1] - 1)
        steps = slice(begin, max(last, begin + 1))
        lengths = (self.lengths - first).clamp(0, max(0, last - first))
        start = (torch.zeros_like(self.lengths) if self.start is None else self.start) + first
        reset = self.reset if self.reset is None or first == 0 else torch.zeros_like(self.reset)
        part = replace(self, lengths=lengths, reset=reset, start=start)
        return replace(part, **self._stepwise((slice(None), steps)))

    def pin_memory(self) -> SequenceBatch:
        """Return the same batch in page-locked memory."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        pinned: dict[str, Any] = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in values.items()}
        return SequenceBatch(**pinned)


def pad(sequences: collections.abc.Sequence[SequenceSample], dtype: torch.dtype | None = None) -> SequenceBatch:
    """Stack sequences of different lengths into one batch of at least one step, padded with zeros.

    Args:
        sequences: At least one, all with the same number of features; a sequence may have no steps.
        dtype: Type of ``x`` and ``inputs``; by default the first sequence's.

    Returns:
        The padded batch, with each optional field that at least one sequence has.

    Raises:
        UserError: A sequence is not (time, features), or widths, covariates or targets differ.

    >>> batch = pad([SequenceSample(torch.ones(2, 3)), SequenceSample(torch.ones(4, 3))])
    >>> tuple(batch.x.shape), batch.lengths.tolist()
    ((2, 4, 3), [2, 4])
    """
    width = sequences[0].x.shape[-1]
    for s in sequences:
        if s.x.ndim != 2 or s.x.shape[1] != width:
            raise UserError(f"{s.name or 'a sequence'}: shape {tuple(s.x.shape)}, expected (time, {width})")
    for name in ("inputs", "targets", "is_first"):
        values = [getattr(s, name) for s in sequences]
        width = next((v.shape[-1] for v in values if v is not None), 0)
        for s, v in zip(sequences, values, strict=True):
            expected = (len(s.x), width)[: 1 if name == "is_first" else 2]
            if v is not None and v.shape != expected:
                raise UserError(f"{s.name or 'a sequence'}: {name} of shape {tuple(v.shape)}, expected {expected}")
    lengths = torch.tensor([len(s.x) for s in sequences], dtype=torch.int64)
    steps = max(1, int(lengths.max()))

    def stack(values: list[Tensor | None], fill: float, dtype: torch.dtype | None = None) -> Tensor | None:
        given = next((v for v in values if v is not None), None)
        if given is None:
            return None
        out = given.new_full((len(values), steps, *given.shape[1:]), fill, dtype=dtype)
        for row, value, length in zip(out, values, lengths.tolist(), strict=True):
            if value is not None:
                row[:length] = value
        return out

    x = stack([s.x for s in sequences], 0.0, dtype)
    assert x is not None
    return SequenceBatch(
        x=x,
        lengths=lengths,
        observed=stack([s.observed for s in sequences], True),
        inputs=stack([s.inputs for s in sequences], 0.0, dtype),
        names=[s.name for s in sequences],
        is_first=stack([s.is_first for s in sequences], False),
        targets=stack([s.targets for s in sequences], math.nan, dtype or torch.get_default_dtype()),
    )
