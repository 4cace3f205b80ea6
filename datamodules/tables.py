"""Tables: csv and parquet files of sensors, by column names, as one or many series."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.data import Columns, FileDataModule, Modality, Scaler, SequenceLoader, Split, read_columns, require
from vrnn_lightning.data.folders import find_split, find_tables
from vrnn_lightning.data.random_splits import require_untrained
from vrnn_lightning.data.series import Rows, Series, SeriesWindows, format_time, group_rows, parse_step
from vrnn_lightning.errors import UserError

__all__ = ["Tables"]


class Tables(FileDataModule):
    r"""Columns of csv or parquet files: one or many series of numbers, cut by time or by series, with gaps.

    A file is one series, or holds many that a column tells apart (``id``). Its rows are in the order of time. An empty
    cell of ``columns`` (or NaN, NA, null) is a missing value: it is left out of the likelihood, and the model is told.
    Each column is scaled by its own mean and standard deviation over the training split; ``inputs`` are given to the
    model as they are, so bring them to a range of a few units.

    Rows in messages are those a spreadsheet shows, the header being row 1; a parquet file's are counted from 0.

    With ``split`` "time", a series with times from :math:`a` to :math:`b` is training data up to the time
    :math:`b - (v + t)(b - a)`, validation data up to :math:`b - t (b - a)` and test data from there on, where :math:`v`
    and :math:`t` are the shares. These times travel in the checkpoint: longer files change none of them, and a series
    that the checkpoint doesn't know is tested from the latest of them on. With "id", the checkpoint keeps the split of
    each series.

    Args:
        root: A file (``.csv`` with a header, ``.csv.gz`` or ``.parquet``, which needs pyarrow), or a folder that is
            searched for them. It may lie elsewhere when a checkpoint is used again.
        columns: The features, by their columns' names.
        inputs: Columns of covariates that are known beforehand (a schedule, the hour of the day, a forecast); none of
            their cells may be empty.
        id: A column that tells series apart, by any text or number. Rows of an id in several files are one series,
            for which ``time`` is needed. ``None``: each file is one series.
        time: A column of numbers or of ISO dates, "2016-07-01 13:00"; dates without an offset count as UTC. ``None``:
            each row is the next step, counted from the first, so a file that is used again must begin with it.
        step: The interval between rows, in the unit of ``time`` or, of dates, as "15min" (us, ms, s, min, h, d, w).
            Times that are absent become rows of missing values. ``None``: rows follow one another.
        dt: Add the time since the row before as the last covariate, 0 in a series' first row, divided by this interval,
            which is given as ``step`` is: "1h" counts hours between dates. ``None`` adds none.
        split: "time" cuts each series in three; "id" draws whole series; "files" takes the folders or files below
            ``root`` that are called train, valid and test.
        val_share: Share of each series' time range, or of the series, for validation; not for "files".
        test_share: The same for the test.
        length: Cut the series of each split into windows of so many steps, and leave out a shorter rest. ``None``:
            whole series. Each window starts from a fresh state; ``window`` cuts these in turn, for training alone,
            and carries the state.
        stride: Steps from the beginning of one such window to the next. ``None``: ``length``, without overlap.
        context: ``lightning predict`` reads so many steps before each series' test part too, as the past of its first
            forecasts. No other command does. Only for a split by "time". Other tasks than "forecast" take them for
            steps of the test, in scores and figures too.
        anomaly: A column of 0 and 1, 1 at faulty steps. The model never sees it: the scores of ``lightning predict``
            are judged by it. Steps that have no row count as 0.
        missing: Allow missing values. False refuses them, and builds a model that doesn't ask.
        sort: Bring rows that are not in the order of time into it, instead of refusing them.
        delimiter: The character between the cells of a csv file.
        unscaled: Those of ``columns`` that are not scaled, such as binary or categorical ones.
        options: The other options of ``FileDataModule``.

    Raises:
        UserError: An option is out of its range or makes no sense beside another. From ``setup`` on: a file is missing
            or can't be read, a column is missing, a cell does not fit its column, times are not in order, not unique or
            not on the grid of ``step``, or a split is empty.

    >>> Tables("weather.csv", ["temperature", "humidity"], time="date").num_features
    2
    """

    modality: ClassVar[Modality] = "series"
    scaling: ClassVar[Literal["none", "scalar", "per_feature"]] = "per_feature"
    run_options: ClassVar[frozenset[str]] = FileDataModule.run_options | {
        *("length", "stride", "context", "anomaly", "sort", "delimiter")
    }

    def __init__(
        self,
        root: str,
        columns: list[str],
        inputs: list[str] | None = None,
        id: str | None = None,
        time: str | None = None,
        step: float | str | None = None,
        dt: float | str | None = None,
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
        unscaled: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root, num_features=len(columns), **options)
        self._check_columns(columns, inputs or [], anomaly)
        self.columns, self.inputs = list(columns), list(inputs or [])
        for name in unscaled or []:
            if name not in columns:
                raise UserError(f"--data.unscaled {name!r}: is not in --data.columns. Fix: name one of {columns}")
        self.unscaled = [place for place, name in enumerate(columns) if name in (unscaled or [])]
        self.num_inputs = len(self.inputs) + (dt is not None)
        self.missing = missing
        self.id, self.time, self.sort, self.delimiter = id, time, sort, delimiter
        self.split_by, self.anomaly = split, anomaly
        self.val_share = require("val_share", val_share, 0, below=1)
        self.test_share = require("test_share", test_share, 0, below=1)
        self.length, self.stride = require("length", length, 1), require("stride", stride, 1)
        self.context = require("context", context, 0)
        self.step = None if step is None else parse_step(step)
        self.dt = None if dt is None else parse_step(dt, "dt")
        self._check_options()
        self._series_of: dict[str, list[Series]] = {}
        self._cuts: dict[str, list[float]] | None = None
        self._split_of: dict[str, tuple[str, int]] = {}
        self._clock = ""

    @staticmethod
    def _check_columns(columns: Sequence[str], inputs: Sequence[str], anomaly: str | None) -> None:
        if not columns:
            raise UserError("--data.columns: is empty. Fix: name at least one, as in --data.columns '[temperature]'")
        reasons = {"inputs": "what is known need not be modelled", "anomaly": "the model may not see it"}
        labels = [] if anomaly is None else [anomaly]
        used: dict[str, str] = {}
        for option, names in (("columns", columns), ("inputs", inputs), ("anomaly", labels)):
            if isinstance(names, str):
                raise UserError(f"--data.{option} {names!r}: must be a list. Fix: write --data.{option} '[{names}]'")
            for name in names:
                if name in used:
                    problem = f"is in --data.{used[name]} too, but {reasons.get(option)}. Fix: keep one"
                    problem = "is named twice. Fix: remove one" if used[name] == option else problem
                    raise UserError(f"--data.{option} {name!r}: {problem}")
                used[name] = option

    def _check_options(self) -> None:
        val, test, problem = self.val_share, self.test_share, ""
        step = f"step {self.step.word}" if self.step else ""
        of_time = ("sort" if self.sort else "") or step or ("dt" if self.dt else "")
        if val + test >= 1:
            problem = f"val_share {val} and --data.test_share {test}: leave nothing to train on. Fix: lower them"
        elif self.stride is not None and self.length is None:
            problem = f"stride {self.stride}: needs --data.length. Fix: give the steps of a window"
        elif self.context and self.split_by != "time":
            needs = f"needs a split by time, but --data.split is {self.split_by}. Fix: set it to time"
            problem = f"context {self.context}: {needs}"
        elif of_time and self.time is None:
            problem = f"{of_time}: needs --data.time. Fix: name the column of times"
        elif len(self.delimiter) != 1:
            problem = f"delimiter {self.delimiter!r}: must be one character"
        if problem:
            raise UserError(f"--data.{problem}")

    def setup(self, stage: str) -> None:
        """Read the files early, so that mistakes in them are reported before training starts."""
        if stage == "fit":
            super().setup(stage)
        else:
            self._series("val" if stage == "validate" else "test")  # cuts may be a checkpoint's, which is loaded later

    def sequences(self, split: Split) -> SeriesWindows:
        """Return a split's series, or their windows, in the order of the files."""
        return self._cut(split, 0)

    def _windows(self, split: Split) -> SeriesWindows:
        windows = self.split(split)
        assert isinstance(windows, SeriesWindows)
        return windows

    def predict_dataloader(self) -> SequenceLoader:
        """Return the test batches, with the steps before them that ``context`` asks for."""
        windows = self._to_predict
        return self._loader("test", windows, windows.lengths)

    def anomalies(self, batch: SequenceBatch) -> Tensor | None:
        """Return True at steps that are known to be faulty, shape (batch, time); ``None`` without ``anomaly``."""
        if self.anomaly is None or batch.index is None:
            return None
        faulty, windows = torch.zeros(batch.x.shape[:2], dtype=torch.bool), self._to_predict
        for row, index, length in zip(faulty, batch.index.tolist(), batch.lengths.tolist(), strict=True):
            if length:
                row[:length] = windows.faulty(index)
        return faulty

    @cached_property
    def _to_predict(self) -> SeriesWindows:
        return self._cut("test", self.context) if self.context else self._windows("test")

    def _cut(self, split: Split, context: int) -> SeriesWindows:
        """Return a split's series, or their windows, each with so many steps before it."""
        series = self._series(split)
        parts = [(i, *self._part(s, split)) for i, s in enumerate(series)]
        parts = [(i, max(0, first - context), last) for i, first, last in parts if last > first]
        if not parts:
            raise UserError(f"{self.root}: the {split} split is empty, {self._why_empty(len(series), split)}")
        if self.length is None:
            return SeriesWindows(series, np.array(parts), self.missing)
        short = [last - first for _, first, last in parts if last - first < self.length]
        if len(short) == len(parts):
            raise UserError(
                f"{self.root}: no series of the {split} split has as many steps as --data.length {self.length}, the "
                f"longest has {max(short)}. Fix: lower it"
            )
        if short:
            self._warnings.warn(
                f"{self.root}: {len(short)} of {len(parts)} series of the {split} split are shorter than --data.length "
                f"{self.length} and are left out"
            )
        starts = [(i, t) for i, a, b in parts for t in range(a, b - self.length + 1, self.stride or self.length)]
        return SeriesWindows(series, np.array([(i, t, t + self.length) for i, t in starts]), self.missing)

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler and the splits: by time the cuts of each series, by series the split and steps of each."""
        state = super().state_dict()
        if self.split_by == "files":
            return state
        series = self._series("train")
        if self.split_by == "id":
            return state | {"drawn": self._split_of | {s.name: (self._draw(s), len(s.times)) for s in series}}
        cuts = {s.name: self._own_cuts(s) for s in series} if self._cuts is None else self._cuts
        return state | {"cuts": cuts, "clock": self._clock or series[0].clock}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._split_of = state_dict.get("drawn", {})
        self._cuts, self._clock = state_dict.get("cuts"), state_dict.get("clock", "")
        vars(self).pop("_to_predict", None)

    def _moments(self, scaler: Scaler | None) -> tuple[Tensor, Tensor]:
        """Return mean and std of the training rows, each counted once however many windows it is in."""
        x = torch.from_numpy(self._windows("train").rows())
        empty = x.isnan().all(0).tolist()
        if True in empty:
            raise UserError(
                f"{self.root}: column {self.columns[empty.index(True)]!r} has no value in the training split. "
                "Fix: take it out of --data.columns"
            )
        x = x if scaler is None else scaler.scale(x)
        mean = x.nanmean(0)
        return mean, (x - mean).square().nanmean(0).sqrt()

    def _part(self, series: Series, split: Split) -> tuple[int, int]:
        """Return the first step of a series that belongs to a split, and one past the last."""
        end = len(series.times)
        if self.split_by == "files":
            return 0, end
        if self.split_by == "id":
            return 0, end if self._draw(series) == split else 0
        cuts = self._own_cuts(series) if self._cuts is None else self._cuts.get(series.name)
        if self._cuts is not None and series.clock != self._clock:
            raise UserError(
                f"{self.root}: time is given by {series.clock}, but the checkpoint's data was split by {self._clock}. "
                "Fix: choose another --data.root"
            )
        if cuts is None:  # a series that the checkpoint doesn't know
            latest = max(test for _, test in (self._cuts or {}).values())
            return (int(np.searchsorted(series.times, latest, side="right")), end) if split == "test" else (0, 0)
        val, test = np.searchsorted(series.times, cuts, side="right").tolist()
        parts: dict[Split, tuple[int, int]] = {"train": (0, val), "val": (val, test), "test": (test, end)}
        return parts[split]

    def _draw(self, series: Series) -> str:
        """Return the split of a whole series: the checkpoint's, or a function of its name and the seed."""
        if series.name in self._split_of:
            return self._split_of[series.name][0]
        if self.id is None:
            self._raise_if_trained(series)
        draw = int.from_bytes(hashlib.sha256(f"{self.seed} {series.name}".encode()).digest()[:8]) / 2**64
        return "test" if draw < self.test_share else "val" if draw < self.test_share + self.val_share else "train"

    def _raise_if_trained(self, series: Series) -> None:
        """Raise if a file of the checkpoint has another path: its split would be another one."""
        here = {s.name for s in self._series("train")}
        known = {n: steps for n, (split, steps) in self._split_of.items() if split != "test" and n not in here}
        require_untrained({series.name: len(series.times)}, known, self.root)

    def _own_cuts(self, series: Series) -> list[float]:
        """Return the last time of training and the last of validation."""
        first, last = float(series.times[0]), float(series.times[-1])
        return [last - (self.val_share + self.test_share) * (last - first), last - self.test_share * (last - first)]

    def _why_empty(self, count: int, split: Split) -> str:
        if split != "train" and getattr(self, f"{split}_share") == 0:
            return f"as --data.{split}_share is 0. Fix: raise it"
        if self.split_by == "id":
            less = "smaller shares" if split == "train" else f"a larger --data.{split}_share"
            return (
                f"as --data.split id puts none of {count} series there. Fix: try {less}, another --data.seed or "
                "--data.split time"
            )
        if self._cuts is not None:
            return f"as no row of {count} series lies where the checkpoint has it. Fix: choose another --data.root"
        return f"as no row of {count} series is in it. Fix: raise --data.{split}_share"

    def _series(self, split: Split) -> list[Series]:
        part = split if self.split_by == "files" else ""
        if part not in self._series_of:
            place = find_split(self.root, split) if part else self.root
            tables = {name: self._table(path) for name, path in find_tables(place).items()}
            rows = group_rows(tables, by_id=self.id is not None, sort=self.sort)
            prefix = f"{part}/" if part else ""
            self._series_of[part] = [self._make_series(f"{prefix}{name}", of) for name, of in rows.items()]
        return self._series_of[part]

    def _table(self, path: Path) -> Columns:
        labels = [] if self.anomaly is None else [self.anomaly]
        wanted = {"columns": self.columns, "inputs": self.inputs, "anomaly": labels}
        table = read_columns(path, wanted, self.id, self.time, self.delimiter, self.max_gb)
        numbers, column = table.numbers, np.arange(table.numbers.shape[1])
        is_feature, is_label = column < self.num_features, column >= self.num_features + len(self.inputs)
        empty = np.isnan(numbers)
        for wrong, fix in (
            (np.isinf(numbers), "is infinite. Fix: correct it, or leave the cell empty"),
            (empty & (is_feature & (not self.missing)), "is empty. Fix: fill it, or set --data.missing true"),
            (
                (numbers != 0) & (numbers != 1) & is_label,
                "is neither 0 nor 1 (--data.anomaly). Fix: write 1 at faulty steps and 0 at all others",
            ),
            (empty & ~is_feature, "is empty, but covariates (--data.inputs) must be known at each step. Fix: fill it"),
        ):
            table.raise_if(wrong, fix)
        for option, interval in (("step", self.step), ("dt", self.dt)):
            if interval is not None and interval.dated != table.dated:
                kind, fix = ("dates", "with a unit, as 1h") if table.dated else ("numbers", "without a unit")
                raise UserError(
                    f"{path}: --data.{option} {interval.word}: times are {kind}. Fix: give the {option} {fix}"
                )
        return table

    def _make_series(self, name: str, rows: Rows) -> Series:
        """Return a series in the order of time, with rows of missing values where ``step`` asks for them."""
        rows.require_sorted()
        times, numbers = rows.times, rows.numbers
        if self.step is not None:
            times, place = rows.grid(self.step)
            self._raise_if_gap(rows, times, place)
            numbers = np.full((len(times), numbers.shape[1]), np.nan)
            numbers[place] = rows.numbers
        features, inputs, labels = np.split(numbers, [self.num_features, self.num_features + len(self.inputs)], 1)
        if self.dt is not None:
            since = np.diff(times, prepend=times[:1]) / self.dt.size
            inputs = np.concatenate([inputs, since[:, None]], 1)
        return Series(name, rows.clock, times, features.copy(), inputs.astype(np.float32), (labels == 1).any(1))

    def _raise_if_gap(self, rows: Rows, times: NDArray[Any], place: NDArray[np.int64]) -> None:
        """Raise if a row is absent where each step must be known."""
        if len(times) == len(place) or (self.missing and not self.inputs):
            return
        i = int((np.diff(place) > 1).argmax())
        absent = format_time(times[place[i] + 1], rows.clock)
        fix = "add the row, as covariates (--data.inputs) must be known at each step"
        fix = fix if self.inputs else "add the row, or set --data.missing true"
        raise UserError(f"{rows.place(i)}: no row for {absent} comes after it, which --data.step asks for. Fix: {fix}")
