"""Columns of a table by name: csv files, and parquet files with pyarrow."""

from __future__ import annotations

import csv
import difflib
import gzip
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrnn_lightning.errors import UserError
from vrnn_lightning.files import MAX_GB, explained, read_cell, require_size, undamaged

__all__ = ["TABLE_SUFFIXES", "Columns", "read_columns"]

TABLE_SUFFIXES = (".csv", ".csv.gz", ".parquet")
CHUNK = 65536
"""Rows that are held as text at once."""
MISSING = {"", "nan", "na", "n/a", "null"}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
NO_DATE = np.iinfo(np.int64).min
"""numpy's NaT as a number."""


@dataclass(frozen=True)
class Columns:
    """Some columns of one file, in the order of its rows.

    Args:
        path: The file.
        rows: The names of the rows in messages, shape (rows,): lines of a csv file, whose header is row 1, else places
            from 0 on.
        names: The number columns.
        numbers: Their values, NaN where a cell is empty, shape (rows, columns).
        ids: The distinct entries of the id column, in the order of their first rows; empty without such a column.
        codes: The place of each row's entry in ``ids``, shape (rows,).
        times: Numbers, or microseconds since 1970 in UTC, shape (rows,); ``None`` without a time column.
        dated: True where times are dates.
    """

    path: Path
    rows: NDArray[np.int64]
    names: list[str]
    numbers: NDArray[np.float64]
    ids: list[str]
    codes: NDArray[np.int64]
    times: NDArray[Any] | None
    dated: bool

    def raise_if(self, wrong: NDArray[np.bool_], fix: str) -> None:
        """Raise a UserError with the place of the first wrong number, if there is one; ``fix`` ends the message.

        ``wrong`` is True at wrong numbers, shape (rows, columns) or fewer columns from the left on.
        """
        if wrong.any():
            row, column = np.unravel_index(wrong.argmax(), wrong.shape)
            raise _Place(self.path, self.names[int(column)], self.rows).error(int(row), fix)


def read_columns(
    path: Path,
    wanted: Mapping[str, Sequence[str]],
    id: str | None,
    time: str | None,
    delimiter: str = ",",
    max_gb: float = MAX_GB,
) -> Columns:
    """Read columns of one file, and of a parquet file nothing else.

    Empty cells and those that hold NaN, NA, N/A or null are missing numbers. Dates are read as ISO 8601; those without
    an offset count as UTC.

    Args:
        path: A ``.csv`` file with a header, UTF-8, gzipped where it ends in ``.csv.gz``, or a ``.parquet`` file.
        wanted: The number columns, by the option that asks for them, which messages name.
        id: The column that tells series apart, or ``None``.
        time: The column of times, or ``None``.
        delimiter: The character between the cells of a csv file.
        max_gb: Gigabytes that its columns may take, or 16 times the file's size.

    Raises:
        UserError: The file can't be read, is damaged or has no rows, lacks a column, or a cell does not fit its column.
    """
    asked = [(name, option) for option, names in wanted.items() for name in names]
    numbers = [name for name, _ in asked]
    asked += [(name, option) for option, name in (("id", id), ("time", time)) if name is not None]
    ids: dict[str, int] = {}
    dated: bool | None = None
    count = 0
    parts: list[tuple[NDArray[Any], ...]] = []
    for rows, cells in _chunks(path, asked, delimiter):
        count += len(rows)
        require_size(path, 8 * count * (len(numbers) + 1), max_gb)
        table = np.empty((len(rows), len(numbers)))
        for i, name in enumerate(numbers):
            table[:, i] = _numbers(cells[name], _Place(path, name, rows))
        codes, times = np.zeros(len(rows), dtype=np.int64), np.zeros(0)
        if id is not None:
            codes[:] = [ids.setdefault(word, len(ids)) for word in _ids(cells[id], _Place(path, id, rows))]
        if time is not None:
            times, dated = _times(cells[time], dated, _Place(path, time, rows))
        parts.append((rows, table, codes, times))
    if not parts:
        raise UserError(f"{path}: is empty, it has no row of data. Fix: remove it")
    rows, table, codes, times = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Columns(path, rows, numbers, table, list(ids), codes, None if time is None else times, bool(dated))


@dataclass(frozen=True)
class _Place:
    path: Path
    column: str
    rows: NDArray[np.int64]

    def error(self, index: int, problem: str) -> UserError:
        return UserError(f"{self.path}: row {self.rows[index]}, column {self.column!r}: {problem}")


Cells = Any
"""Cells of a column: text as a list of words and ``None``, else an array of numbers or datetime64."""
Chunk = tuple["NDArray[np.int64]", dict[str, Cells]]


def _chunks(path: Path, asked: list[tuple[str, str]], delimiter: str) -> Iterator[Chunk]:
    kind = "parquet" if path.name.lower().endswith(".parquet") else "csv"
    with explained(path), undamaged(f"{path}: can't be read as {kind}", "copy or write it again"):
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty, it has not even a header. Fix: remove it")
        try:
            yield from _parquet_chunks(path, asked) if kind == "parquet" else _csv_chunks(path, asked, delimiter)
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8 text. Fix: save it as UTF-8") from None


def _csv_chunks(path: Path, asked: list[tuple[str, str]], delimiter: str) -> Iterator[Chunk]:
    text: dict[str, Any] = {"mode": "rt", "encoding": "utf-8-sig", "newline": ""}
    with gzip.open(path, **text) if path.name.lower().endswith(".gz") else path.open(**text) as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        header = [read_cell(name).strip() for name in next(reader, [])]
        places = _locate(path, header, asked, delimiter)
        numbered = ((reader.line_num, row) for row in reader if row)
        while chunk := list(islice(numbered, CHUNK)):
            for line, row in chunk:
                if len(row) != len(header):
                    raise UserError(
                        f"{path}: row {line} has {len(row)} cells, the header has {len(header)}. Fix: correct it"
                    )
            columns = list(zip(*(row for _, row in chunk), strict=True))
            rows = np.array([line for line, _ in chunk], dtype=np.int64)
            yield rows, {name: columns[place] for name, place in places.items()}


def _parquet_chunks(path: Path, asked: list[tuple[str, str]]) -> Iterator[Chunk]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow. Fix: pip install 'vrnn-lightning[tables]'") from None
    start = 0
    with path.open("rb") as source:
        try:
            file = parquet.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
            names = list(_locate(path, list(file.schema_arrow.names), asked))
            # no threads: reading processes are forked from this one
            for batch in file.iter_batches(CHUNK, columns=names, use_threads=False):
                rows = np.arange(start, start + len(batch))
                start += len(batch)
                yield rows, {name: _cells(batch.column(name), path, name) for name in names}
        except MemoryError as error:  # pyarrow's too, for the sizes that a damaged file declares
            raise UserError(f"{path}: can't be read as parquet ({error}). Fix: write it again") from None


def _cells(array: Any, path: Path, column: str) -> Cells:
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if str(kind).endswith(("string", "string_view")):
        return array.to_pylist()
    is_whole = types.is_integer(kind) and array.null_count == 0
    target = pyarrow.timestamp("us") if types.is_timestamp(kind) or types.is_date(kind) else pyarrow.float64()
    try:
        array = array.cast(pyarrow.int64()) if is_whole else array.cast(target, safe=False)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: column {column!r} is of type {kind}. Fix: write numbers, text or dates") from error
    return array.to_numpy(zero_copy_only=False)


def _locate(path: Path, header: list[str], asked: list[tuple[str, str]], delimiter: str = "") -> dict[str, int]:
    for name, option in asked:
        count = header.count(name)
        if count == 1:
            continue
        if count:
            raise UserError(f"{path}: has {count} columns called {name!r} (--data.{option}). Fix: rename one")
        near = difflib.get_close_matches(name, header, n=1)
        fix = f"name {near[0]!r}" if near else f"name one of its columns as --data.{option}"
        other = next((d for d in ";\t|" if delimiter and len(header) == 1 and d in header[0]), "")
        fix = f"set --data.delimiter {other!r}" if other else fix
        listed = ", ".join(header)[:200]
        raise UserError(f"{path}: has no column {name!r} (--data.{option}), it has {listed}. Fix: {fix}")
    return {name: header.index(name) for name, _ in asked}


def _numbers(cells: Cells, place: _Place) -> NDArray[np.float64]:
    """Return numbers, NaN where one is missing."""
    if isinstance(cells, np.ndarray):
        if cells.dtype.kind == "M":
            raise place.error(0, "is a date. Fix: write a number")
        return cells.astype(np.float64)
    return np.array(_parse(cells, place, _number, np.nan))


def _parse(cells: Cells, place: _Place, parse: Callable[[str], Any], missing: Any) -> list[Any]:
    values = []
    for i, cell in enumerate(cells):
        word = (cell or "").strip()
        try:
            values.append(missing if word.lower() in MISSING else parse(word))
        except ValueError as error:
            raise place.error(i, f"{word!r} {error}") from None
    return values


def _number(word: str) -> float:
    with suppress(ValueError):
        if "_" not in word:  # Python reads 1_000 as a thousand
            return float(word)
    fix = "write a decimal point" if "," in word else "correct it, or leave the cell empty where nothing was measured"
    raise ValueError(f"is not a number. Fix: {fix}")


def _date(word: str) -> int:
    """Return microseconds since 1970 in UTC."""
    try:
        date = datetime.fromisoformat(word)
    except ValueError:
        raise ValueError("is not a time. Fix: write a number or an ISO date, 2016-07-01 13:00") from None
    return (date.replace(tzinfo=date.tzinfo or UTC) - EPOCH) // MICROSECOND


def _ids(cells: Cells, place: _Place) -> list[str]:
    listed = cells.tolist() if isinstance(cells, np.ndarray) else cells
    words = ["" if cell is None or cell != cell else read_cell(str(cell)).strip() for cell in listed]  # NaN != NaN
    if "" in words:
        raise place.error(words.index(""), "is empty. Fix: write the id of each row")
    return words


def _times(cells: Cells, dated: bool | None, place: _Place) -> tuple[NDArray[Any], bool]:
    """Return numbers, or microseconds since 1970, and whether they are dates; the file's first cell decides."""
    if isinstance(cells, np.ndarray):
        dated = cells.dtype.kind == "M"
        times = cells.astype("datetime64[us]").astype(np.int64) if dated else cells
    else:
        dated = not _is_number(cells[0]) if dated is None else dated
        times = np.array(_parse(cells, place, _date, NO_DATE), dtype=np.int64) if dated else _ticks(cells, place)
    empty = times == NO_DATE if dated else np.isnan(times)
    if empty.any():
        raise place.error(int(empty.argmax()), "is empty. Fix: write the time of each row")
    if np.isinf(times).any():
        raise place.error(int(np.isinf(times).argmax()), "is infinite. Fix: write the time")
    return times, dated


def _is_number(cell: str | None) -> bool:
    try:
        float(cell or "")
    except ValueError:
        return False
    return True


def _ticks(cells: Sequence[str], place: _Place) -> NDArray[Any]:
    """Return times that are numbers, whole ones exactly."""
    with suppress(OverflowError, TypeError, ValueError):
        if "_" not in "".join(cells):
            return np.array([int(cell) for cell in cells], dtype=np.int64)
    return _numbers(cells, place)
