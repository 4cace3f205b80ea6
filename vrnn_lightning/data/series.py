"""Series of tables: rows in the order of time, on a regular grid where one is asked for, and windows of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vrnn_lightning.batch import SequenceSample
from vrnn_lightning.data.columns import Columns
from vrnn_lightning.errors import UserError

__all__ = ["Rows", "Series", "SeriesWindows", "Step", "format_time", "group_rows", "parse_step"]

UNITS = {"us": 1, "ms": 1e3, "s": 1e6, "min": 6e7, "h": 3.6e9, "d": 8.64e10, "w": 6.048e11}
"""Microseconds of the units that a step may have."""
JITTER = 1e-3
"""The largest distance, in steps, of a time from the grid."""
SPARSEST = 1000
"""Steps per row above which a step is taken for a mistake."""


class Step(NamedTuple):
    """An interval in the unit of the times, microseconds where they are dates, and the option's text."""

    size: float
    dated: bool
    word: str


def parse_step(option: float | str, name: str = "step") -> Step:
    """Return the interval that an option gives: a number, or "15min" and the like."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", str(option).lower())
    number, unit = match.groups() if match else ("", "")
    size = 0.0
    with suppress(KeyError, OverflowError, ValueError):
        size = round(float(number) * UNITS[unit]) if unit else float(number)
    if not 0 < size < math.inf:
        units = ", ".join(UNITS)
        raise UserError(f"--data.{name} {option}: must be a positive number, for dates with a unit of {units}")
    return Step(size, bool(unit), str(option))


def format_time(time: Any, clock: str) -> str:
    """Return a time for messages and names; that of the clock "dates" is in microseconds since 1970.

    >>> format_time(1467331200000000, "dates"), format_time(3, "row order")
    ('2016-07-01 00:00:00', '3')
    """
    if clock == "dates":
        return str(datetime(1970, 1, 1) + timedelta(microseconds=int(time)))
    return str(time.item() if isinstance(time, np.generic) else time)


@dataclass(frozen=True)
class Rows:
    """Rows of one series, with their places in the files."""

    id: str  # "" where a file is a series
    clock: str  # "dates", "numbers" or "row order"
    paths: list[Path]
    times: NDArray[Any]  # shape (rows,)
    numbers: NDArray[np.float64]  # features, covariates and labels, shape (rows, columns)
    files: NDArray[np.int64]  # the place in paths of each row's file, shape (rows,)
    rows: NDArray[np.int64]  # the name of each row in messages, shape (rows,)

    @classmethod
    def join(cls, id: str, pieces: list[tuple[Columns, NDArray[np.int64]]], *, sort: bool) -> Rows:
        """Join rows of files, in the order of time if ``sort``; a piece is a file with the places of its rows."""
        rows = np.concatenate([table.rows[index] for table, index in pieces])
        numbers = np.concatenate([table.numbers[index] for table, index in pieces])
        files = np.repeat(np.arange(len(pieces)), [len(index) for _, index in pieces])
        given = [table.times[index] for table, index in pieces if table.times is not None]
        times = np.concatenate(given) if given else np.arange(len(rows))
        clock = "row order" if not given else "dates" if pieces[0][0].dated else "numbers"
        columns: tuple[NDArray[Any], ...] = (times, numbers, files, rows)
        if sort:
            order = np.argsort(times, kind="stable")
            columns = tuple(column[order] for column in columns)
        return cls(id, clock, [table.path for table, _ in pieces], *columns)

    def time(self, index: int) -> str:
        """Return the time of a row for messages."""
        return format_time(self.times[index], self.clock)

    def place(self, index: int) -> str:
        """Return the place of a row for messages."""
        of = f", id {self.id!r}" if self.id else ""
        return f"{self.paths[self.files[index]]}: row {self.rows[index]}{of}"

    def require_sorted(self) -> None:
        """Raise if times don't increase."""
        wrong = self.times[1:] <= self.times[:-1]
        if not wrong.any():
            return
        i = int(wrong.argmax())
        place, time, last = self.place(i + 1), self.time(i + 1), self.time(i)
        if time == last:
            more = "" if self.id else ", or name the column that tells series apart, --data.id"
            raise UserError(f"{place}: time {time} is that of {self.place(i)} too. Fix: keep one of them{more}")
        raise UserError(
            f"{place}: time {time} comes after {last}. Fix: order the rows by time, or set --data.sort true"
        )

    def grid(self, step: Step) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the times of a regular grid from the first row on, and the place of each row in it."""
        exact = (self.times - self.times[0]) / step.size
        place = np.rint(exact).astype(np.int64)
        off = np.abs(exact - place) > JITTER
        off[1:] |= place[1:] == place[:-1]
        option = f"--data.step {step.word}"
        if off.any():
            i = int(off.argmax())
            raise UserError(
                f"{self.place(i)}: time {self.time(i)} is not a whole number of steps after {self.time(0)} ({option}). "
                "Fix: round it, or choose a finer step"
            )
        count = int(place[-1]) + 1
        if count > SPARSEST * len(place):
            raise UserError(
                f"{self.place(0)}: {option} makes {count} steps of {len(place)} rows. Fix: choose a longer one"
            )
        size = int(step.size) if float(step.size).is_integer() else step.size
        return self.times[0] + np.arange(count) * size, place


def group_rows(tables: Mapping[str, Columns], *, by_id: bool, sort: bool) -> dict[str, Rows]:
    """Return the rows of each series by its name: those of an id in any file if ``by_id``, else those of a file.

    With ``sort`` they are brought into the order of time.

    Raises:
        UserError: Times are dates in one file and numbers in another, or an id is in two files without times.
    """
    first = next(iter(tables.values()))
    for table in tables.values():
        if table.dated != first.dated:
            kinds = ("dates", "numbers") if table.dated else ("numbers", "dates")
            raise UserError(
                f"{table.path}: times are {kinds[0]}, but in {first.path} they are {kinds[1]}. Fix: write them alike"
            )
    if not by_id:
        return {name: Rows.join("", [(table, np.arange(len(table.rows)))], sort=sort) for name, table in tables.items()}
    pieces: dict[str, list[tuple[Columns, NDArray[np.int64]]]] = {}
    for table in tables.values():
        order = np.argsort(table.codes, kind="stable")
        bounds = np.searchsorted(table.codes[order], np.arange(len(table.ids) + 1))
        for word, start, end in zip(table.ids, bounds[:-1], bounds[1:], strict=True):
            pieces.setdefault(word, []).append((table, order[start:end]))
            if first.times is None and len(pieces[word]) > 1:
                raise UserError(
                    f"{table.path}: id {word!r} is in {pieces[word][0][0].path} too, and without --data.time its rows "
                    "have no order. Fix: name the column of times, or give each file ids of its own"
                )
    return {word: Rows.join(word, parts, sort=sort) for word, parts in pieces.items()}


@dataclass(frozen=True)
class Series:
    """One series in the order of time."""

    name: str
    clock: str  # "dates", "numbers" or "row order"
    times: NDArray[Any]  # shape (steps,)
    values: NDArray[np.float64]  # NaN where one is missing, shape (steps, features)
    inputs: NDArray[np.float32]  # covariates, shape (steps, inputs)
    faulty: NDArray[np.bool_]  # True at steps that are known to be faulty, shape (steps,)


@dataclass(frozen=True)
class SeriesWindows:
    """Stretches of series as sequences."""

    series: list[Series]
    bounds: NDArray[np.int64]  # series, first step and one past the last of each stretch, shape (sequences, 3)
    missing: bool  # tell the model which values are missing

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
        name = f"{series.name} from {format_time(series.times[start], series.clock)}"
        return SequenceSample(x, ~x.isnan() if self.missing else None, inputs, name)

    def faulty(self, index: int) -> torch.Tensor:
        """Return True at the steps of one sequence that are known to be faulty, shape (steps,)."""
        which, start, end = self.bounds[index].tolist()
        return torch.from_numpy(self.series[which].faulty[start:end])

    def rows(self) -> NDArray[np.float64]:
        """Return the steps that are in any sequence, each once, shape (steps, features)."""
        parts = []
        for which in np.unique(self.bounds[:, 0]):
            values, bounds = self.series[which].values, self.bounds[self.bounds[:, 0] == which]
            begun, ended = (np.bincount(bounds[:, i], minlength=len(values) + 1).cumsum() for i in (1, 2))
            parts.append(values[begun[:-1] > ended[:-1]])
        return np.concatenate(parts)
