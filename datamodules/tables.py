"""Tables: csv and parquet files of sensors, by column names, as one or many series."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch, SequenceSample
from vrnn_lightning.data import (
    MAX_GB,
    TABLE_SUFFIXES,
    Columns,
    Modality,
    Scaler,
    SequenceDataModule,
    SequenceLoader,
    Split,
    checked_limit,
    data_root,
    read_columns,
)
from vrnn_lightning.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Tables"]

UNITS = {"us": 1, "ms": 1e3, "s": 1e6, "min": 6e7, "h": 3.6e9, "d": 8.64e10, "w": 6.048e11}
"""Microseconds of the units that a ``step`` may have."""
WORDS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
"""What the files or folders of a split may be called."""
JITTER = 1e-3
"""How far, in steps, a time may be from the grid that ``step`` lays."""
SPARSEST = 1000
"""Steps per row above which a ``step`` is taken for a mistake."""


class Tables(SequenceDataModule):
    r"""Columns of csv or parquet files: one or many series of numbers, cut by time or by series, with gaps.

    A file is one series, or holds many that a column tells apart (``id``). Its rows are in the order of time. An empty
    cell of ``columns`` (or NaN, NA, null) is a missing value: it is left out of the likelihood, and the model is told.
    Each column is scaled by its own mean and standard deviation, taken over the training split alone; ``inputs`` are
    given to the model as they are, so bring them to a range of a few units.

    Rows in messages are those a spreadsheet shows, the header being row 1; a parquet file's are counted from 0.

    With ``split`` "time", a series with times from :math:`a` to :math:`b` is training data up to the time
    :math:`b - (v + t)(b - a)`, validation data up to :math:`b - t (b - a)` and test data from there on, where :math:`v`
    and :math:`t` are the shares. These times travel in the checkpoint: longer files change none of them, and a series
    that the checkpoint doesn't know is tested from the latest of them on. With "id", the checkpoint keeps which series
    was in which split.

    Args:
        root: A file (``.csv`` with a header, ``.csv.gz`` or ``.parquet``, which needs pyarrow), or a folder that is
            searched for them. It may lie elsewhere when a checkpoint is used again.
        columns: The features, by their columns' names.
        inputs: Columns of covariates that are known beforehand (a schedule, the hour of the day, a forecast); no cell
            of theirs may be empty.
        id: A column that tells series apart, by any text or number. Rows of an id in several files are one series,
            for which ``time`` is needed. ``None``: each file is one series.
        time: A column of numbers or of ISO dates, "2016-07-01 13:00"; dates without an offset count as UTC. ``None``:
            each row is the next step, counted from the first, so that a file that is used again must begin with it.
        step: The interval between rows, in the unit of ``time`` or, of dates, as "15min" (us, ms, s, min, h, d, w).
            Times that are absent then become rows of missing values. ``None``: rows follow one another, whatever lies
            between them.
        split: "time" cuts each series in three; "id" draws whole series; "files" takes those below ``root`` that are
            called train, valid and test: a folder or a file each.
        val_share: Part of each series' time range, or of the series, that is for validation; not for "files".
        test_share: The same for the test.
        length: Cut the series of each split into windows of so many steps, and leave out what fills none. ``None``:
            whole series. This makes sequences, which start from a fresh state; ``window`` cuts these in turn, for
            training alone, and carries the state.
        stride: Steps from the beginning of one such window to the next. ``None``: ``length``, so that they don't
            overlap.
        context: ``lightning predict`` reads so many steps before each series' test part too, as the past that its
            first forecasts begin from. No other command does. Only for a split by "time". Other tasks than "forecast"
            take them for steps of the test, in scores and their figures too.
        anomaly: A column of 0 and 1 that says which steps are faulty, 1. The model never sees it: the scores of
            ``lightning predict`` are judged by it. Steps that have no row count as 0.
        missing: Allow missing values. False refuses them, and builds a model that doesn't ask.
        sort: Bring rows that are not in the order of time into it, instead of refusing them.
        delimiter: What stands between the cells of a csv file.
        max_gb: Gigabytes that the content of one file may take: a damaged or hostile file declares more than it holds.
            A file that takes no more than 16 times its own size is always read.
        options: The other options of :class:`~vrnn_lightning.SequenceDataModule`.

    Raises:
        UserError: An option is out of its range or makes no sense beside another. From ``setup`` on: there is no such
            file or it can't be read, a column is not there, a cell is not what its column holds, times are not in
            order, not unique or not on the grid of ``step``, or a split is empty.

    >>> Tables("weather.csv", ["temperature", "humidity"], time="date").num_features
    2
    """

    modality: ClassVar[Modality] = "series"
    scaling: ClassVar[Literal["none", "scalar", "per_feature"]] = "per_feature"
    run_options: ClassVar[frozenset[str]] = SequenceDataModule.run_options | {
        *("length", "stride", "context", "anomaly", "sort", "delimiter", "max_gb")
    }

    def __init__(
        self,
        root: str,
        columns: list[str],
        inputs: list[str] | None = None,
        id: str | None = None,
        time: str | None = None,
        step: float | str | None = None,
        split: Literal["time", "id", "files"] = "time",
        val_share: float = 0.1,
        test_share: float = 0.1,
        length: int | None = None,
        stride: int | None = None,
        context: int = 0,
        anomaly: str | None = None,
        missing: bool = True,
        sort: bool = False,
        delimiter: str = ",",
        max_gb: float = MAX_GB,
        **options: Any,
    ) -> None:
        super().__init__(num_features=len(columns), **options)
        self.root = data_root(root)
        self.max_gb = checked_limit(max_gb)
        self.columns = _names("columns", columns)
        self.inputs = _names("inputs", inputs or [])
        self.num_inputs = len(self.inputs)
        self.missing = missing
        self.id, self.time, self.sort, self.delimiter = id, time, sort, delimiter
        self.split_by, self.val_share, self.test_share = split, val_share, test_share
        self.length, self.stride, self.context, self.anomaly = length, stride, context, anomaly
        self._check_options()
        self.step = None if step is None else _step(step)
        if self.step is not None and time is None:
            raise UserError(f"--data.step {step}: needs --data.time, the column of times")
        self._read: dict[str, list[_Series]] = {}
        self._cuts: dict[str, list[float]] | None = None
        self._drawn: dict[str, tuple[str, int]] = {}
        self._clock = ""
        self._warned: set[str] = set()
        self._predicted: _Windows | None = None

    def _check_options(self) -> None:
        if not self.columns:
            raise UserError("--data.columns: is empty; name at least one, as in --data.columns '[temperature]'")
        both = next((name for name in self.inputs if name in self.columns), None)
        if both is not None:
            raise UserError(f"--data.inputs {both!r}: is in --data.columns too; what is known need not be modelled")
        if self.anomaly is not None and self.anomaly in (*self.columns, *self.inputs):
            option = "columns" if self.anomaly in self.columns else "inputs"
            raise UserError(f"--data.anomaly {self.anomaly!r}: is in --data.{option} too; the model may not see it")
        if self.split_by not in ("time", "id", "files"):
            raise UserError(f"--data.split {self.split_by}: must be time, id or files")
        for option, share in (("val_share", self.val_share), ("test_share", self.test_share)):
            if not 0 <= share < 1:
                raise UserError(f"--data.{option} {share}: must be at least 0 and below 1")
        if self.val_share + self.test_share >= 1:
            raise UserError(
                f"--data.val_share {self.val_share} and --data.test_share {self.test_share}: add up to 1 or more and "
                "leave nothing to train on"
            )
        for option, steps in (("length", self.length), ("stride", self.stride)):
            if steps is not None and steps < 1:
                raise UserError(f"--data.{option} {steps}: must be at least 1")
        if self.stride is not None and self.length is None:
            raise UserError(f"--data.stride {self.stride}: needs --data.length, the steps of a window")
        if self.context < 0:
            raise UserError(f"--data.context {self.context}: must be at least 0")
        if self.context and self.split_by != "time":
            raise UserError(
                f"--data.context {self.context}: only a split by time has steps before the test, this is --data.split "
                f"{self.split_by}"
            )
        if self.sort and self.time is None:
            raise UserError("--data.sort: needs --data.time, the column of times")
        if len(self.delimiter) != 1:
            raise UserError(f"--data.delimiter {self.delimiter!r}: must be one character")

    def setup(self, stage: str) -> None:
        """Read the files early, so that what is wrong with them is said before training starts."""
        if stage == "fit":
            super().setup(stage)
        else:
            self._series("val" if stage == "validate" else "test")  # cuts may be a checkpoint's, which is loaded later

    def sequences(self, split: Split) -> _Windows:
        """Return a split's series, or their windows, in the order of the files."""
        return self._cut(split, 0)

    def predict_dataloader(self) -> SequenceLoader:
        """Return the test batches, with the steps before them that ``context`` asks for."""
        windows = self._to_predict()
        return self._loader("test", windows, windows.lengths)

    def anomalies(self, batch: SequenceBatch) -> Tensor | None:
        """Return True at steps that are known to be faulty, shape (batch, time); ``None`` without ``anomaly``."""
        if self.anomaly is None or batch.index is None:
            return None
        faulty, windows = torch.zeros(batch.x.shape[:2], dtype=torch.bool), self._to_predict()
        for row, index, length in zip(faulty, batch.index.tolist(), batch.lengths.tolist(), strict=True):
            if length:
                row[:length] = windows.faulty(index)
        return faulty

    def _to_predict(self) -> _Windows:
        if not self.context:
            return self._windows("test")
        if self._predicted is None:
            self._predicted = self._cut("test", self.context)
        return self._predicted

    def _cut(self, split: Split, context: int) -> _Windows:
        """Return a split's series, or their windows, each with so many steps before it."""
        series = self._series(split)
        parts = [(i, *self._part(s, split)) for i, s in enumerate(series)]
        parts = [(i, max(0, first - context), last) for i, first, last in parts if last > first]
        if not parts:
            raise UserError(f"{self.root}: the {split} split is empty; {self._why_empty(len(series), split)}")
        if self.length is None:
            return _Windows(series, np.array(parts), self.missing)
        short = [last - first for _, first, last in parts if last - first < self.length]
        if len(short) == len(parts):
            raise UserError(
                f"{self.root}: no series of the {split} split has as many steps as --data.length {self.length}, the "
                f"longest has {max(short)}; lower it"
            )
        if short:
            self._warn(
                f"{self.root}: {len(short)} of {len(parts)} series of the {split} split are shorter than --data.length "
                f"{self.length} and are left out"
            )
        starts = [(i, t) for i, a, b in parts for t in range(a, b - self.length + 1, self.stride or self.length)]
        return _Windows(series, np.array([(i, t, t + self.length) for i, t in starts]), self.missing)

    def lengths(self, split: Split) -> Sequence[int]:
        """Return the steps of each sequence of a split."""
        return self._windows(split).lengths

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler and what was in which split.

        Of a split by time that is the last training and the last validation time of each series, of one by series the
        split and the steps of each.
        """
        state = super().state_dict()
        if self.split_by == "id":
            here = {s.name: (self._draw(s), len(s.times)) for s in self._series("train")}
            return state | {"drawn": self._drawn | here}
        if self.split_by == "files":
            return state
        series = self._series("train")
        cuts = {s.name: self._own_cuts(s) for s in series} if self._cuts is None else self._cuts
        return state | {"cuts": cuts, "clock": self._clock or series[0].clock}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's scaler and splits."""
        super().load_state_dict(state_dict)
        self._drawn = state_dict.get("drawn", {})
        self._cuts, self._clock = state_dict.get("cuts"), state_dict.get("clock", "")
        self._splits.clear()  # those that setup found were cut again
        self._predicted = None

    def _windows(self, split: Split) -> _Windows:
        found = self.split(split)
        assert isinstance(found, _Windows)
        return found

    def _moments(self, scaler: Scaler | None) -> tuple[Tensor, Tensor]:
        """Return mean and std of the training rows, each counted once however many windows it is in."""
        x = torch.from_numpy(self._windows("train").rows())
        empty = x.isnan().all(0).tolist()
        if True in empty:
            raise UserError(
                f"{self.root}: column {self.columns[empty.index(True)]!r} has no value in the training split; take it "
                "out of --data.columns"
            )
        x = x if scaler is None else scaler.scale(x)
        mean = x.nanmean(0)
        return mean, (x - mean).square().nanmean(0).sqrt()

    def _part(self, series: _Series, split: Split) -> tuple[int, int]:
        """Return the first step of a series that belongs to a split, and one past the last."""
        end = len(series.times)
        if self.split_by == "files":
            return 0, end
        if self.split_by == "id":
            return 0, end if self._draw(series) == split else 0
        cuts = self._own_cuts(series) if self._cuts is None else self._cuts.get(series.name)
        if self._cuts is not None and series.clock != self._clock:
            raise UserError(
                f"{self.root}: time is given by {series.clock}, but the checkpoint's data was split by {self._clock}; "
                "choose another --data.root"
            )
        if cuts is None:  # a series that the checkpoint doesn't know
            latest = max(test for _, test in (self._cuts or {}).values())
            return (int(np.searchsorted(series.times, latest, side="right")), end) if split == "test" else (0, 0)
        val, test = np.searchsorted(series.times, cuts, side="right").tolist()
        parts: dict[Split, tuple[int, int]] = {"train": (0, val), "val": (val, test), "test": (test, end)}
        return parts[split]

    def _draw(self, series: _Series) -> str:
        """Return the split of a whole series: the checkpoint's, or what its name and the seed say."""
        if series.name in self._drawn:
            return self._drawn[series.name][0]
        if self.id is None:
            self._refuse_trained(series)
        draw = int.from_bytes(hashlib.sha256(f"{self.seed} {series.name}".encode()).digest()[:8]) / 2**64
        return "test" if draw < self.test_share else "val" if draw < self.test_share + self.val_share else "train"

    def _refuse_trained(self, series: _Series) -> None:
        """Raise if a file of the checkpoint has another path: its split would be another one."""
        own = (PurePosixPath(series.name).name, len(series.times))
        here = {s.name for s in self._series("train")}
        for name, (split, steps) in self._drawn.items():
            if split != "test" and name not in here and (PurePosixPath(name).name, steps) == own:
                raise UserError(
                    f"{self.root}: {series.name} seems to be {name}, which the model was trained on; "
                    f"choose --data.root so that {name} lies below it"
                )

    def _own_cuts(self, series: _Series) -> list[float]:
        """Return the last time of training and the last of validation."""
        first, last = float(series.times[0]), float(series.times[-1])
        return [last - (self.val_share + self.test_share) * (last - first), last - self.test_share * (last - first)]

    def _why_empty(self, count: int, split: Split) -> str:
        if split != "train" and getattr(self, f"{split}_share") == 0:
            return f"--data.{split}_share is 0"
        if self.split_by == "id":
            less = "smaller shares" if split == "train" else f"a larger --data.{split}_share"
            return (
                f"--data.split id puts none of {count} series there; try {less}, another --data.seed or split by time"
            )
        if self._cuts is not None:
            return f"of {count} series no row lies where the checkpoint has it; choose another --data.root"
        return f"no row of {count} series lies in it; raise --data.{split}_share"

    def _series(self, split: Split) -> list[_Series]:
        """Return all series of the files that hold a split, read once."""
        part = split if self.split_by == "files" else ""
        if part not in self._read:
            place = _part_of(self.root, split) if self.split_by == "files" else self.root
            grouped = self._grouped({name: self._table(path) for name, path in _files(place).items()})
            self._read[part] = [self._made(f"{part}/{name}" if part else name, rows) for name, rows in grouped.items()]
        return self._read[part]

    def _table(self, path: Path) -> Columns:
        """Return the wanted columns of a file, all cells checked."""
        labels = [] if self.anomaly is None else [self.anomaly]
        wanted = {"columns": self.columns, "inputs": self.inputs, "anomaly": labels}
        table = read_columns(path, wanted, self.id, self.time, self.delimiter, self.max_gb)
        table.raise_if(np.isinf(table.numbers), "is infinite; fix it, or leave the cell empty")
        unknown = np.isnan(table.numbers)
        if not self.missing:
            table.raise_if(unknown[:, : self.num_features], "is empty; fill it, or set --data.missing true")
        unknown[:, : self.num_features] = False
        if labels:
            odd = np.zeros_like(unknown)
            odd[:, -1] = (table.numbers[:, -1] != 0) & (table.numbers[:, -1] != 1)
            table.raise_if(
                odd, "is neither 0 nor 1; --data.anomaly takes 1 at steps that are faulty and 0 at all others"
            )
        table.raise_if(unknown, "is empty; covariates (--data.inputs) must be known at each step: fill it")
        if self.step is not None and self.step.dated != table.dated:
            kind, fix = ("dates", "with a unit, as 1h") if table.dated else ("numbers", "without a unit")
            raise UserError(f"{path}: --data.step {self.step.word}: times are {kind}; give the step {fix}")
        return table

    def _grouped(self, tables: dict[str, Columns]) -> dict[str, _Rows]:
        """Return the rows of each series."""
        first = next(iter(tables.values()))
        odd = next((table for table in tables.values() if table.dated != first.dated), None)
        if odd is not None:
            kinds = [("numbers", "dates")[table.dated] for table in (odd, first)]
            raise UserError(
                f"{odd.path}: times are {kinds[0]}, but in {first.path} they are {kinds[1]}; write them alike"
            )
        if self.id is None:
            return {name: _Rows.of("", [(table, np.arange(len(table.rows)))]) for name, table in tables.items()}
        pieces: dict[str, list[tuple[Columns, NDArray[np.int64]]]] = {}
        for table in tables.values():
            order = np.argsort(table.codes, kind="stable")
            bounds = np.searchsorted(table.codes[order], np.arange(len(table.ids) + 1))
            for word, start, end in zip(table.ids, bounds[:-1], bounds[1:], strict=True):
                pieces.setdefault(word, []).append((table, order[start:end]))
        shared = next((word for word in pieces if len(pieces[word]) > 1), None)
        if self.time is None and shared is not None:
            one, other = (table.path for table, _ in pieces[shared][:2])
            raise UserError(
                f"{other}: id {shared!r} is in {one} too, and without --data.time its rows have no order; name the "
                "column of times, or give each file ids of its own"
            )
        return {word: _Rows.of(word, found) for word, found in pieces.items()}

    def _made(self, name: str, rows: _Rows) -> _Series:
        """Return a series in the order of time, with rows of missing values where ``step`` asks for them."""
        rows = rows.take(np.argsort(rows.times, kind="stable")) if self.sort else rows
        rows.require_sorted()
        times, numbers = rows.times, rows.numbers
        if self.step is not None:
            times, place = rows.grid(self.step.size, f"--data.step {self.step.word}")
            self._refuse_gap(rows, times, place)
            numbers = np.full((len(times), numbers.shape[1]), np.nan)
            numbers[place] = rows.numbers
        features, inputs, labels = np.split(numbers, [self.num_features, self.num_features + self.num_inputs], 1)
        return _Series(name, rows.clock, times, features.copy(), inputs.astype(np.float32), (labels == 1).any(1))

    def _refuse_gap(self, rows: _Rows, times: NDArray[Any], place: NDArray[np.int64]) -> None:
        """Raise if a row is absent where each step must be known."""
        if len(times) == len(place) or (self.missing and not self.inputs):
            return
        i = int((np.diff(place) > 1).argmax())
        absent = _stamp(times[place[i] + 1], rows.clock)
        fix = (
            "covariates (--data.inputs) must be known at each step: add the row"
            if self.inputs
            else "add the row, or set --data.missing true"
        )
        raise UserError(f"{rows.place(i)}: no row for {absent} comes after it, which --data.step asks for; {fix}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)


@dataclass(frozen=True)
class _Rows:
    """Rows of one series as the files hold them.

    Args:
        id: The id, or nothing where a file is a series.
        clock: What gives the time: "dates", "numbers" or "row order".
        times: Shape (rows,).
        numbers: Features and covariates, shape (rows, columns).
        paths: The files.
        files: Which of them holds each row, shape (rows,).
        rows: What the file's messages call it, shape (rows,).
    """

    id: str
    clock: str
    times: NDArray[Any]
    numbers: NDArray[np.float64]
    paths: list[Path]
    files: NDArray[np.int64]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, id: str, pieces: list[tuple[Columns, NDArray[np.int64]]]) -> _Rows:
        """Join some rows of some files."""
        numbers, rows = (
            np.concatenate([getattr(table, field)[index] for table, index in pieces]) for field in ("numbers", "rows")
        )
        files = np.repeat(np.arange(len(pieces)), [len(index) for _, index in pieces])
        given = [table.times[index] for table, index in pieces if table.times is not None]
        times = np.concatenate(given) if given else np.arange(len(rows))
        clock = "row order" if not given else "dates" if pieces[0][0].dated else "numbers"
        return cls(id, clock, times, numbers, [table.path for table, _ in pieces], files, rows)

    def take(self, index: NDArray[np.int64]) -> _Rows:
        """Return some rows, in that order."""
        fields = {name: getattr(self, name)[index] for name in ("times", "numbers", "files", "rows")}
        return replace(self, **fields)

    def place(self, index: int) -> str:
        """Return what messages call a row."""
        of = f", id {self.id!r}" if self.id else ""
        return f"{self.paths[self.files[index]]}: row {self.rows[index]}{of}"

    def require_sorted(self) -> None:
        """Raise if times don't increase."""
        wrong = self.times[1:] <= self.times[:-1]
        if not wrong.any():
            return
        i = int(wrong.argmax())
        stamp, last = (_stamp(time, self.clock) for time in (self.times[i + 1], self.times[i]))
        if stamp == last:
            more = "" if self.id else ", or name the column that tells series apart, --data.id"
            raise UserError(f"{self.place(i + 1)}: time {stamp} is that of {self.place(i)} too; keep one of them{more}")
        raise UserError(
            f"{self.place(i + 1)}: time {stamp} comes after {last}; order the rows by time, or set --data.sort true"
        )

    def grid(self, step: float, option: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the times of a regular grid from the first row on, and the place of each row in it."""
        exact = (self.times - self.times[0]) / step
        place = np.rint(exact).astype(np.int64)
        off = np.abs(exact - place) > JITTER
        off[1:] |= place[1:] == place[:-1]
        if off.any():
            i = int(off.argmax())
            raise UserError(
                f"{self.place(i)}: time {_stamp(self.times[i], self.clock)} is not a whole number of steps after "
                f"{_stamp(self.times[0], self.clock)} ({option}); round it, or choose a finer step"
            )
        count = int(place[-1]) + 1
        if count > SPARSEST * len(place):
            raise UserError(f"{self.place(0)}: {option} makes {count} steps of {len(place)} rows; choose a longer one")
        times = self.times[0] + np.arange(count) * (int(step) if float(step).is_integer() else step)
        return times, place


@dataclass(frozen=True)
class _Series:
    """One series in the order of time.

    Args:
        name: What messages call it.
        clock: What gives the time.
        times: Shape (steps,).
        values: NaN where they are missing, shape (steps, features).
        inputs: Covariates, shape (steps, inputs).
        faulty: True at steps that are known to be, shape (steps,).
    """

    name: str
    clock: str
    times: NDArray[Any]
    values: NDArray[np.float64]
    inputs: NDArray[np.float32]
    faulty: NDArray[np.bool_]


@dataclass(frozen=True)
class _Windows:
    """Stretches of series as sequences: ``bounds`` holds (series, first step, one past the last) of each."""

    series: list[_Series]
    bounds: NDArray[np.int64]
    missing: bool

    @property
    def lengths(self) -> list[int]:
        """Steps of each sequence."""
        steps: list[int] = (self.bounds[:, 2] - self.bounds[:, 1]).tolist()
        return steps

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int, /) -> SequenceSample:
        _, start, end = self.bounds[index].tolist()
        return self.window(index, 0, end - start)

    def window(self, index: int, first: int, last: int, /) -> SequenceSample:
        """Return steps ``first`` to ``last - 1`` of one sequence."""
        which, start, end = self.bounds[index].tolist()
        series, part = self.series[which], slice(start + first, min(start + last, end))
        x = torch.from_numpy(series.values[part])
        inputs = torch.from_numpy(series.inputs[part]) if series.inputs.shape[1] else None
        name = f"{series.name} from {_stamp(series.times[start], series.clock)}"
        return SequenceSample(x, ~x.isnan() if self.missing else None, inputs, name)

    def faulty(self, index: int) -> Tensor:
        """Return True at the steps of one sequence that are known to be faulty, shape (steps,)."""
        which, start, end = self.bounds[index].tolist()
        return torch.from_numpy(self.series[which].faulty[start:end])

    def rows(self) -> NDArray[np.float64]:
        """Return the steps that are in any sequence, each once, shape (steps, features)."""
        found = []
        for which in np.unique(self.bounds[:, 0]):
            values, bounds = self.series[which].values, self.bounds[self.bounds[:, 0] == which]
            begun = np.bincount(bounds[:, 1], minlength=len(values) + 1).cumsum()
            ended = np.bincount(bounds[:, 2], minlength=len(values) + 1).cumsum()
            found.append(values[begun[:-1] > ended[:-1]])
        return np.concatenate(found)


class _Step(NamedTuple):
    """An interval in the times' unit, microseconds where they are dates, and how it was given."""

    size: float
    dated: bool
    word: str


def _step(option: float | str) -> _Step:
    """Return a checked interval."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", str(option).lower())
    number, unit = found.groups() if found else ("", "")
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if unit in UNITS and size < math.inf:
        size *= UNITS[unit]
        size = round(size) if size < math.inf else size
    if not 0 < size < math.inf or (unit and unit not in UNITS):
        raise UserError(f"--data.step {option}: must be a positive number, of dates with a unit: {', '.join(UNITS)}")
    return _Step(size, bool(unit), str(option))


def _names(option: str, names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise UserError(f"--data.{option} {names!r}: must be a list of names, as in --data.{option} '[{names}]'")
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--data.{option} {twice!r}: is named twice")
    return list(names)


def _stamp(time: Any, clock: str) -> str:
    """Return a time for messages and names.

    >>> _stamp(1467331200000000, "dates"), _stamp(3, "row order")
    ('2016-07-01 00:00:00', '3')
    """
    if clock == "dates":
        return str(datetime(1970, 1, 1) + timedelta(microseconds=int(time)))
    return str(time.item() if isinstance(time, np.generic) else time)


def _stem(name: str) -> str:
    """Return a file's name without what tells its format."""
    suffix = next(s for s in TABLE_SUFFIXES if name.lower().endswith(s))
    return name[: -len(suffix)]


def _is_table(path: Path) -> bool:
    return path.name.lower().endswith(TABLE_SUFFIXES) and not path.name.startswith(".")


def _part_of(root: Path, split: Split) -> Path:
    """Return the folder or file of a split."""
    if not root.is_dir():
        raise UserError(f"--data.root {root}: --data.split files needs a folder with train, valid and test in it")
    found = sorted(p for p in root.iterdir() if (_stem(p.name) if _is_table(p) else p.name) in WORDS[split])
    found = [path for path in found if path.is_dir() or _is_table(path)]
    if len(found) != 1:
        wanted = WORDS[split][0]
        problem = f"both {found[0].name} and {found[1].name}; remove one" if found else f"no {wanted}"
        fix = "" if found else f"; expected a folder of that name, or {wanted}.csv, .csv.gz or .parquet"
        raise UserError(f"{root}: holds {problem}{fix}, for --data.split files")
    return found[0]


def _files(place: Path) -> dict[str, Path]:
    """Return the tables of a folder, or the one that a path names, by their paths without format, sorted."""
    try:
        if not place.exists():
            raise UserError(f"--data.root {place}: no such file or folder")
        if not place.is_dir():
            if not _is_table(place):
                raise UserError(f"--data.root {place}: is not a table; expected {', '.join(TABLE_SUFFIXES)}")
            return {_stem(place.name): place}
        walk = os.walk(place, onerror=_raise)
        paths = sorted(p for folder, _, files in walk for p in (Path(folder, file) for file in files) if _is_table(p))
    except PermissionError as error:
        raise UserError(f"{error.filename}: may not be read by you; give yourself the permission") from None
    if not paths:
        raise UserError(f"--data.root {place}: no table in it; expected {', '.join(TABLE_SUFFIXES)} files")
    found: dict[str, Path] = {}
    for path in paths:
        name = _stem(path.relative_to(place).as_posix())
        if name in found:
            raise UserError(f"{path}: and {found[name]} seem to hold the same; remove one")
        found[name] = path
    return found


def _raise(error: OSError) -> None:
    raise error
