"""Csv and parquet files of sensors: columns, ids, times, gaps, splits, checkpoints, and every refusal."""

from __future__ import annotations

import builtins
import csv
import gzip
import io
import os
import re
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from vrnn_lightning.datamodules.tables import Tables

from vrnn_lightning.data import read_columns
from vrnn_lightning.errors import UserError
from vrnn_lightning.testing import CHECKS

SPLITS = ("train", "val", "test")
START = datetime(2024, 2, 28)
HOUR = timedelta(hours=1)


def write(path: Path, columns: dict[str, list], delimiter: str = ",") -> Path:
    """Write a csv file; ``None`` is an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def hours(count: int, first: int = 0) -> list[str]:
    return [str(START + (first + i) * HOUR) for i in range(count)]


def noise(count: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).normal(20, 3, count).round(3).tolist()


def sensors(count: int = 6, steps: int = 40) -> dict[str, list]:
    """A long table, its sensors' rows in turn, with holes in both features and a known hour."""
    rows = [(t, s) for t in range(steps + count) for s in range(count) if t < steps + s]
    temperature, humidity = noise(len(rows)), noise(len(rows), 1)
    return {
        "date": [str(START + t * HOUR) for t, _ in rows],
        "sensor": [f"s{s}" for _, s in rows],
        "temperature": [None if i % 7 == 3 else v for i, v in enumerate(temperature)],
        "humidity": [None if i % 11 == 5 else v for i, v in enumerate(humidity)],
        "hour": [(START + t * HOUR).hour for t, _ in rows],
    }


LONG = {"columns": ["temperature", "humidity"], "inputs": ["hour"], "id": "sensor", "time": "date"}


@pytest.fixture
def long(tmp_path) -> Path:
    return write(tmp_path / "sensors.csv", sensors())


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve files, a series each, of different lengths and formats."""
    for i in range(12):
        columns = {"x": noise(20 + i, i), "y": noise(20 + i, 50 + i)}
        path = tmp_path / "folder" / f"sub{i % 2}" / f"{i}.csv{('', '.gz')[i % 3 == 1]}"
        if i % 3 == 2:
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pyarrow.table(columns), path.with_suffix(".parquet"))
        else:
            write(path, columns)
    return tmp_path / "folder"


@pytest.fixture
def three(tmp_path) -> Path:
    """A file for train, one for test, and a folder for valid."""
    for i, name in enumerate(("train.csv", "valid/a.csv", "valid/b.csv", "test.csv")):
        write(tmp_path / "three" / name, {"t": list(range(30)), "x": noise(30, i)})
    return tmp_path / "three"


def series(**options):
    """Return the windows of each split of a datamodule."""
    data = Tables(**options)
    return {split: data.split(split) for split in SPLITS}


def whole(root, columns=("x",), **options):
    """Return the one series of a table, which is all training data."""
    (found,) = list(Tables(root, list(columns), **{"val_share": 0, "test_share": 0} | options).split("train"))
    return found


def refused(root, *patterns: str, columns=("x",), stage: str = "fit", **options) -> str:
    """Check that setup ends in one line that holds all patterns, and return it."""
    with pytest.raises(UserError) as caught:
        Tables(root, list(columns), **options).setup(stage)
    message = str(caught.value)
    assert "\n" not in message
    for pattern in patterns:
        assert re.search(pattern, message), message
    return message


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


VARIANTS = {
    "long": ("long", LONG),
    "long, windows": ("long", LONG | {"length": 4, "stride": 3}),
    "long, streams": ("long", LONG | {"window": 5, "val_share": 0.2, "test_share": 0.3}),
    "long, windows in streams": ("long", LONG | {"length": 5, "window": 3, "val_share": 0.2, "test_share": 0.2}),
    "long, by id": ("long", LONG | {"split": "id", "val_share": 0.3, "test_share": 0.3, "seed": 1}),
    "long, stepped": ("long", LONG | {"inputs": None, "step": "30min", "length": 6}),
    "folder": ("folder", {"columns": ["y", "x"], "length": 2}),
    "folder, by id": ("folder", {"columns": ["x"], "split": "id", "val_share": 0.3, "test_share": 0.3, "length": 7}),
    "folder, nothing missing": ("folder", {"columns": ["x", "y"], "missing": False, "window": 4, "length": 2}),
    "files": ("three", {"columns": ["x"], "time": "t", "split": "files", "length": 8, "stride": 5}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, variant, request):
    fixture, options = VARIANTS[variant]
    root = request.getfixturevalue(fixture)
    check(lambda **more: Tables(root, **options | more))


def test_construction_opens_no_file():
    data = Tables("nowhere.csv", ["a", "b"], inputs=["c"], missing=False)
    assert (data.num_features, data.num_inputs, data.missing) == (2, 1, False)
    assert Tables("nowhere.csv", ["a"]).missing
    with pytest.raises(UserError, match=r"--data.root nowhere.csv: no such file"):
        data.setup("fit")


class TestReading:
    def test_values_masks_and_covariates_are_the_table_s(self, long):
        """Row by row against the table itself, whatever the order of its rows."""
        table = sensors()
        data = Tables(long, **LONG, length=3)
        seen = 0
        for split in SPLITS:
            windows = data.split(split)
            for i in range(len(windows)):
                s = windows[i]
                sensor, start = s.name.split(" from ")
                for t in range(3):
                    date = str(datetime.fromisoformat(start) + t * HOUR)
                    rows = zip(table["date"], table["sensor"], strict=True)
                    (row,) = [r for r, found in enumerate(rows) if found == (date, sensor)]
                    assert s.inputs[t].tolist() == [table["hour"][row]]
                    for c, name in enumerate(LONG["columns"]):
                        value = table[name][row]
                        assert bool(s.observed[t, c]) == (value is not None)
                        assert value is None or s.x[t, c] == value
                    seen += 1
        assert seen > 150

    def test_a_batch_keeps_them_aligned(self, long):
        data = Tables(long, **LONG, batch_size=1)
        table = sensors()
        for batch in data.test_dataloader():
            sensor, start = batch.names[0].split(" from ")
            rows = [r for r, name in enumerate(table["sensor"]) if name == sensor and table["date"][r] >= start]
            assert batch.lengths.tolist() == [len(rows)]
            values = torch.tensor([[table[c][r] or np.nan for c in LONG["columns"]] for r in rows])
            assert torch.equal(batch.observed[0], ~values.isnan())
            restored = data.scaler.unscale(batch.x[0])
            torch.testing.assert_close(restored[batch.observed[0]], values[~values.isnan()])
            assert batch.x[~batch.observed].count_nonzero() == 0
            assert batch.inputs[0, :, 0].tolist() == [table["hour"][r] for r in rows]

    @pytest.mark.parametrize("suffix", ["csv.gz", "parquet"])
    def test_formats_are_equal(self, long, tmp_path, suffix):
        table = sensors()
        path = tmp_path / "again" / f"sensors.{suffix}"
        if suffix == "parquet":
            path.parent.mkdir()
            dates = [datetime.fromisoformat(date) for date in table["date"]]
            words = pyarrow.array(table["sensor"]).dictionary_encode()
            parquet.write_table(pyarrow.table(table | {"date": dates, "sensor": words}), path, row_group_size=50)
        else:
            write(path, table)
        one, other = Tables(long, **LONG, length=4), Tables(path, **LONG, length=4)
        assert torch.equal(one.scaler.mean, other.scaler.mean)
        for split in SPLITS:
            assert list(one.lengths(split)) == list(other.lengths(split))
            for a, b in zip(list(one.split(split)), list(other.split(split)), strict=True):
                assert a.name == b.name
                assert torch.equal(a.x.nan_to_num(-1), b.x.nan_to_num(-1))
                assert torch.equal(a.observed, b.observed)
                assert torch.equal(a.inputs, b.inputs)

    def test_parquet_types(self, tmp_path):
        """Whatever holds a number is one; nulls are missing."""
        columns = {
            "i": pyarrow.array([1, None, 3], pyarrow.int32()),
            "u": pyarrow.array([1, 2, 3], pyarrow.uint8()),
            "f": pyarrow.array([1.5, None, 3], pyarrow.float32()),
            "d": pyarrow.array([Decimal("1.25"), Decimal(2), Decimal(3)], pyarrow.decimal128(20, 2)),
            "b": pyarrow.array([True, False, None]),
            "s": pyarrow.array(["1.5", "", None]),
            "n": pyarrow.array([1.0, float("nan"), 3]),
        }
        parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        x = whole(tmp_path / "a.parquet", columns).x
        nan = float("nan")
        expected = [[1, 1, 1.5, 1.25, 1, 1.5, 1], [nan, 2, nan, 2, 0, nan, nan], [3, 3, 3, 3, nan, nan, 3]]
        np.testing.assert_array_equal(x.numpy(), expected)

    @pytest.mark.parametrize("cell", ["", " ", "nan", "NaN", "NA", "n/a", "null", '""'])
    def test_what_counts_as_missing(self, tmp_path, cell):
        path = text(tmp_path / "a.csv", f"t,x\n0,1\n1,{cell}\n2,3\n")
        assert whole(path).observed[:, 0].tolist() == [True, False, True]

    def test_large_offsets_keep_their_digits(self, tmp_path):
        """In 32 bits neighbours of 16777216.25 would be two apart."""
        values = [2**24 + i / 4 for i in range(40)]
        data = Tables(write(tmp_path / "a.csv", {"x": values}), ["x"], batch_size=1)
        assert data.scaler.std.item() == pytest.approx(np.std(values[:32]), rel=1e-9)
        batch = next(iter(data.test_dataloader()))
        assert batch.x[0, :, 0].diff().tolist() == pytest.approx([0.25 / data.scaler.std.item()] * 3, rel=1e-4)

    @pytest.mark.parametrize(
        "content", ["\ufeffx,y\n1,2\n3,4\n", "x, y\r\n1, 2\r\n\r\n3, 4\r\n\r\n", '"x","y"\n"1","2"\n3,4']
    )
    def test_csv_in_the_wild(self, tmp_path, content):
        assert whole(text(tmp_path / "a.csv", content), ["y", "x"]).x.tolist() == [[2, 1], [4, 3]]

    def test_many_rows_are_read_in_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr("vrnn_lightning.data.columns.CHUNK", 7)
        path = write(tmp_path / "a.csv", {"t": [*range(10), *np.arange(10, 20, 0.5)], "x": list(range(30))})
        assert whole(path, time="t").x[:, 0].tolist() == list(range(30))
        assert read_columns(path, {"columns": ["x"]}, None, "t").times.tolist() == [*range(10), *np.arange(10, 20, 0.5)]

    def test_the_same_moment_in_other_words(self, tmp_path):
        dates = ["2024-02-28T23:00Z", "2024-02-29 00:00:00", "2024-02-29T03:00+02:00", "2024-02-29 02:00:00.5"]
        path = write(tmp_path / "a.csv", {"t": dates, "x": [1, 2, 3, 4]})
        hour = 3600 * 10**6
        times = read_columns(path, {"columns": ["x"]}, None, "t").times
        assert np.diff(times).tolist() == [hour, hour, hour + 500_000]

    def test_whole_numbers_are_exact_times(self, tmp_path):
        """Nanoseconds since 1970 are more than a float holds."""
        first = 1_700_000_000_000_000_001
        path = write(tmp_path / "a.csv", {"t": [first, first + 1, first + 3], "x": [1, 2, 3]})
        assert whole(path, time="t", step=1).observed[:, 0].tolist() == [True, True, False, True]

    def test_other_delimiters(self, tmp_path):
        path = write(tmp_path / "a.csv", {"x": [1, 2], "y": [3, 4]}, delimiter=";")
        assert whole(path, ["y"], delimiter=";").x.tolist() == [[3], [4]]
        refused(path, r"a\.csv: has no column 'x'", r"--data\.delimiter ';'")

    def test_a_folder_holds_a_series_per_file(self, folder):
        (folder / ".hidden.csv").write_text("nonsense")
        (folder / "notes.txt").write_text("nonsense")
        found = list(Tables(folder, ["x"]).split("train"))
        assert [s.name for s in found[:2]] == ["sub0/0 from 0", "sub0/10 from 0"]
        assert len(found) == 12

    def test_an_id_in_several_files_is_one_series(self, tmp_path):
        for month in range(3):
            columns = {"t": hours(10, 10 * month) * 2, "s": ["a"] * 10 + ["b"] * 10, "x": noise(20, month)}
            write(tmp_path / f"{month}.csv", columns)
        data = Tables(tmp_path, ["x"], id="s", time="t", step="1h", val_share=0, test_share=0)
        assert data.lengths("train") == [30, 30]
        assert data.split("train")[1].x[10:20, 0].tolist() == noise(20, 1)[10:]
        refused(tmp_path, r"1\.csv: id 'a' is in .*0\.csv too, and without --data\.time", id="s")

    def test_sort(self, tmp_path):
        path = write(tmp_path / "a.csv", {"t": [3, 1, 2], "x": [30, 10, 20]})
        assert whole(path, time="t", sort=True).x[:, 0].tolist() == [10, 20, 30]
        refused(path, r"a\.csv: row 3: time 1 comes after 3", r"--data\.sort true", time="t")

    def test_several_columns_of_text_are_left_alone(self, tmp_path):
        path = text(tmp_path / "a.csv", "note,x\nhello,1\nworld,2\n")
        assert whole(path).x.tolist() == [[1], [2]]


class TestGaps:
    def test_absent_times_become_missing_rows(self, tmp_path):
        dates = [hours(10)[i] for i in (0, 1, 4, 5, 9)]
        path = write(tmp_path / "a.csv", {"t": dates, "x": [0, 1, None, 5, 9]})
        s = whole(path, time="t", step="1h")
        assert s.observed[:, 0].tolist() == [i in (0, 1, 5, 9) for i in range(10)]
        assert s.x[s.observed].tolist() == [0, 1, 5, 9]
        assert len(whole(path, time="t").x) == 5

    @pytest.mark.parametrize("step", ["60min", "3600s", "1 h", "1H", "3.6e6ms"])
    def test_units(self, tmp_path, step):
        path = write(tmp_path / "a.csv", {"t": [hours(10)[i] for i in (0, 7)], "x": [0, 1]})
        assert len(whole(path, time="t", step=step).x) == 8

    @pytest.mark.parametrize("step", [0.1, "0.1"])
    def test_numbers_that_are_not_exact(self, tmp_path, step):
        path = write(tmp_path / "a.csv", {"t": [5.0, 5.1, 5.3, 5.7], "x": [0, 1, 3, 7]})
        s = whole(path, time="t", step=step)
        assert s.observed[:, 0].nonzero()[:, 0].tolist() == [0, 1, 3, 7]

    def test_times_off_the_grid(self, tmp_path):
        path = write(tmp_path / "a.csv", {"t": [0, 1, 2.25], "x": [0, 1, 2]})
        refused(path, r"a\.csv: row 4: time 2\.25 is not a whole number of steps after 0", r"step 1", time="t", step=1)
        path = write(tmp_path / "b.csv", {"t": [0, 0.0001, 2], "x": [0, 1, 2]})
        refused(path, r"row 3: time 0\.0001", time="t", step=1)

    def test_a_step_far_too_short(self, tmp_path):
        path = write(tmp_path / "a.csv", {"t": ["2000-01-01", "2024-01-01"], "x": [0, 1]})
        refused(path, r"--data\.step 1ms makes \d+ steps of 2 rows", time="t", step="1ms")

    def test_a_gap_has_no_covariates(self, tmp_path):
        path = write(tmp_path / "a.csv", {"t": [0, 1, 3], "x": [0, 1, 2], "u": [0, 1, 2]})
        refused(path, r"a\.csv: row 3: no row for 2 comes after it", "--data.inputs", time="t", step=1, inputs=["u"])

    def test_a_gap_where_nothing_may_be_missing(self, tmp_path):
        path = write(tmp_path / "a.csv", {"t": hours(9)[:2] + hours(9)[3:], "x": noise(8)})
        refused(
            path, "row 3: no row for 2024-02-28 02:00:00", "--data.missing true", time="t", step="1h", missing=False
        )

    @pytest.mark.parametrize(("times", "step", "said"), [(hours(3), 1, "dates"), ([0, 1, 2], "1h", "numbers")])
    def test_a_step_of_the_other_kind(self, tmp_path, times, step, said):
        path = write(tmp_path / "a.csv", {"t": times, "x": [0, 1, 2]})
        refused(path, rf"a\.csv: --data\.step {step}: times are {said}", time="t", step=step)


class TestSplits:
    def test_shares_of_a_regular_series_are_shares_of_its_rows(self, tmp_path):
        path = write(tmp_path / "a.csv", {"x": list(range(1000))})
        found = series(root=path, columns=["x"], val_share=0.15, test_share=0.2)
        values = {split: found[split][0].x[:, 0].tolist() for split in SPLITS}
        assert values == {"train": list(range(650)), "val": list(range(650, 800)), "test": list(range(800, 1000))}

    def test_cuts_are_by_time_not_by_row(self, tmp_path):
        """Nine tenths of the rows lie in the first tenth of the time."""
        times = [*range(90), *range(100, 1000, 90)]
        path = write(tmp_path / "a.csv", {"t": times, "x": times})
        found = series(root=path, columns=["x"], time="t", val_share=0.3, test_share=0.3)
        values = {split: found[split][0].x[:, 0] for split in SPLITS}
        assert len(values["train"]) > 90
        assert values["train"].max() <= 910 * 0.4 < values["val"].min()
        assert values["val"].max() <= 910 * 0.7 < values["test"].min()
        assert torch.cat(list(values.values())).tolist() == times

    @pytest.mark.parametrize("stride", [1, 3, 5, 9])
    @pytest.mark.parametrize("split", ["time", "id"])
    def test_windows_cross_neither_cuts_nor_ids(self, tmp_path, split, stride):
        """Each value tells its sensor and time: 1000 times the sensor plus the time."""
        rows = [(t, s) for t in range(60) for s in range(8)]
        columns = {"t": [t for t, _ in rows], "s": [s for _, s in rows], "x": [1000 * s + t for t, s in rows]}
        path = write(tmp_path / "a.csv", columns)
        options = {"split": split, "val_share": 0.3, "test_share": 0.3, "seed": 2}
        found = series(root=path, columns=["x"], id="s", time="t", length=5, stride=stride, **options)
        seen = {name: set() for name in SPLITS}
        for name in SPLITS:
            for i in range(len(found[name])):
                x = found[name][i].x[:, 0].long()
                assert len(x) == 5
                assert (x // 1000).unique().numel() == 1
                assert x.diff().tolist() == [1] * 4
                assert found[name].lengths[i] == 5
                seen[name] |= set(x.tolist())
        assert not seen["train"] & seen["val"]
        assert not seen["test"] & (seen["train"] | seen["val"])
        if split == "time":
            times = {name: {value % 1000 for value in seen[name]} for name in SPLITS}
            assert max(times["train"]) < min(times["val"])
            assert max(times["val"]) < min(times["test"])
        else:
            sensors = {name: {value // 1000 for value in seen[name]} for name in SPLITS}
            assert sum(len(s) for s in sensors.values()) == 8

    @pytest.mark.parametrize(
        ("length", "stride", "expected"), [(4, None, [0, 4]), (4, 2, [0, 2, 4, 6]), (3, 5, [0, 5])]
    )
    def test_where_windows_begin(self, tmp_path, length, stride, expected):
        path = write(tmp_path / "a.csv", {"x": list(range(11))})
        data = Tables(path, ["x"], length=length, stride=stride, val_share=0, test_share=0)
        windows = data.split("train")
        assert [windows[i].x[:, 0].tolist() for i in range(len(windows))] == [
            list(range(start, start + length)) for start in expected
        ]

    @pytest.mark.parametrize(("length", "stride"), [(None, None), (4, 3)])
    def test_a_prediction_begins_before_the_test(self, tmp_path, length, stride):
        """And the test does not; nor does a series begin before its first step."""
        more = 5 if length is None else 0
        path = write(tmp_path / "a.csv", {"s": ["a"] * 40 + ["b"] * more, "x": list(range(40 + more))})
        options = {"columns": ["x"], "id": "s", "test_share": 0.2, "length": length, "stride": stride}
        data, plain = Tables(path, context=6, **options), Tables(path, **options)
        data.setup("predict")
        found = []
        for batch in data.predict_dataloader():
            x = data.scaler.unscale(batch.x)[..., 0].round().int().tolist()
            found += [row[:steps] for row, steps in zip(x, batch.lengths.tolist(), strict=True)]
        own = [s.x[:, 0].int().tolist() for s in list(data.split("test"))]
        assert own == [s.x[:, 0].int().tolist() for s in list(plain.split("test"))]
        if length is None:
            assert own == [list(range(32, 40)), [44]]
            assert sorted(found) == [list(range(26, 40)), [40, 41, 42, 43, 44]]
        else:
            assert sorted(found) == [list(range(t, t + 4)) for t in (26, 29, 32, 35)]

    @pytest.mark.parametrize("context", [0, 3])
    def test_labels_of_steps(self, tmp_path, context):
        """They belong to the rows whose values stand beside them; absent rows are not faulty."""
        times = [t for t in range(60) if t != 55]
        columns = {"t": times, "x": [t % 7 for t in times], "f": [int(t % 7 == 2) for t in times]}
        options = {"time": "t", "step": 1, "anomaly": "f", "test_share": 0.3, "length": 4, "stride": 3}
        data = Tables(write(tmp_path / "a.csv", columns), ["x"], context=context, **options)
        assert data.num_features == 1
        assert "f" in data.hparams.values()
        count = 0
        for batch in data.predict_dataloader():
            faulty, x = data.anomalies(batch), data.scaler.unscale(batch.x)[..., 0].round()
            assert torch.equal(faulty, (x == 2) & batch.valid_mask[..., 0])
            count += int(faulty.sum())
        assert count > 2
        assert Tables(tmp_path / "a.csv", ["x"]).anomalies(batch) is None

    @pytest.mark.parametrize("split", ["time", "id"])
    def test_what_is_tested_influences_nothing_else(self, tmp_path, split):
        """Other values, holes and all, in the test part: scaler, training and validation stay bit for bit."""
        table = sensors(9)
        options = LONG | {"split": split, "length": 5, "stride": 2, "val_share": 0.3, "test_share": 0.3}
        one = Tables(write(tmp_path / "a.csv", table), **options)
        tested = {name for s in list(one.split("test")) for name in [s.name.split(" from ")[0]]}
        latest = max(s.name.split(" from ")[1] for s in list(one.split("val")))
        end = str(datetime.fromisoformat(latest) + 5 * HOUR)
        rows = zip(table["sensor"], table["date"], strict=True)
        change = [s in tested if split == "id" else date >= end for s, date in rows]
        assert 20 < sum(change) < len(change) / 2
        for column in LONG["columns"]:
            values = enumerate(zip(table[column], change, strict=True))
            table[column] = [(1e6 * i if i % 3 else None) if changed else v for i, (v, changed) in values]
        other = Tables(write(tmp_path / "b.csv", table), **options)
        assert not torch.equal(one.split("test")[-1].x, other.split("test")[-1].x)
        assert torch.equal(one.scaler.mean, other.scaler.mean)
        assert torch.equal(one.scaler.std, other.scaler.std)
        for stage in ("train", "val"):
            for a, b in zip(list(one.split(stage)), list(other.split(stage)), strict=True):
                assert torch.equal(a.x.nan_to_num(-1), b.x.nan_to_num(-1))

    def test_the_scaler_is_that_of_the_training_values(self, long):
        data = Tables(long, **LONG)
        x = torch.cat([s.x for s in list(data.split("train"))])
        for c in range(2):
            values = x[:, c][~x[:, c].isnan()]
            assert data.scaler.mean[c].item() == pytest.approx(values.mean().item())
            assert data.scaler.std[c].item() == pytest.approx(values.std(correction=0).item())

    @pytest.mark.parametrize(("length", "stride"), [(4, 1), (4, 3), (4, 4), (3, 7), (26, 1)])
    def test_the_scaler_counts_a_row_once_however_many_windows_hold_it(self, tmp_path, length, stride):
        path = write(tmp_path / "a.csv", {"s": ["a"] * 40 + ["b"] * 50, "x": noise(90), "y": [None, 7.5, 7.5] * 30})
        data = Tables(path, ["x", "y"], id="s", length=length, stride=stride, val_share=0.2, test_share=0.1)
        windows = list(data.split("train"))
        cells = {(s.name[0], int(s.name[7:]) + t): s.x[t, 0].item() for s in windows for t in range(length)}
        values = np.array(list(cells.values()))
        assert data.scaler.mean.tolist() == pytest.approx([values.mean(), 7.5])
        assert data.scaler.std.tolist() == pytest.approx([values.std(), 1])
        mean, std = data.input_statistics()
        assert mean.tolist() == pytest.approx([0, 0], abs=1e-6)
        assert std.tolist() == pytest.approx([1, 0])

    def test_a_series_keeps_its_split_whatever_the_others_are(self, tmp_path):
        """In another order, and with sensors added."""

        def split_of(ids: list[str], seed: int = 0) -> dict[str, str]:
            path = write(tmp_path / "a.csv", {"s": ids * 3, "x": noise(3 * len(ids))})
            found = series(root=path, columns=["x"], id="s", split="id", val_share=0.3, test_share=0.3, seed=seed)
            return {s.name.split(" from ")[0]: split for split in SPLITS for s in list(found[split])}

        few = [f"s{i}" for i in range(20)]
        one = split_of(few)
        assert set(one) == set(few)
        assert split_of(few[::-1]) == one
        more = split_of([f"new{i}" for i in range(20)] + few)
        assert {name: more[name] for name in few} == one
        assert split_of(few, seed=1) != one
        assert sum(split == "train" for split in more.values()) in range(8, 25)

    def test_files(self, three):
        found = series(root=three, columns=["x"], split="files")
        names = {split: [s.name for s in list(found[split])] for split in SPLITS}
        assert names == {
            "train": ["train/train from 0"],
            "val": ["val/a from 0", "val/b from 0"],
            "test": ["test/test from 0"],
        }
        assert found["test"][0].x[:, 0].tolist() == noise(30, 3)

    def test_files_that_are_not_there_or_twice(self, three, tmp_path):
        refused(tmp_path / "three" / "train.csv", "needs a folder", split="files")
        write(three / "test.csv.gz", {"x": [1]})
        refused(three, r"three: holds test\.csv and test\.csv\.gz", split="files", stage="test")
        (three / "test.csv").unlink()
        (three / "test.csv.gz").unlink()
        refused(three, r"three: holds no test for --data.split files. Fix: give", split="files", stage="test")

    def test_only_the_files_of_the_stage_are_read(self, three):
        (three / "test.csv").write_text("nonsense")
        Tables(three, ["x"], split="files").setup("fit")
        refused(three, "test.csv: has no column 'x'", split="files", stage="test")

    def test_an_empty_split(self, tmp_path):
        path = write(tmp_path / "a.csv", {"x": [1, 2, 3]})
        refused(path, r"a\.csv: the val split is empty", "--data.val_share is 0", val_share=0)
        refused(path, r"the val split is empty", "1 series", "--data.seed", split="id", val_share=0.01)
        data = Tables(path, ["x"], test_share=0, val_share=0.4)
        data.setup("fit")
        with pytest.raises(UserError, match=r"the test split is empty, as --data.test_share is 0"):
            data.test_dataloader()

    def test_series_that_are_too_short(self, tmp_path):
        columns = {"s": ["a"] * 40 + ["b"] * 4 + ["c"] * 3, "x": noise(47)}
        path = write(tmp_path / "a.csv", columns)
        options = {"columns": ["x"], "id": "s", "length": 5, "val_share": 0.4, "test_share": 0}
        data = Tables(path, **options)
        with pytest.warns(UserWarning, match="2 of 3 series of the train split are shorter than --data.length 5"):
            data.split("train")
        assert {s.name.split(" from ")[0] for s in list(data.split("train"))} == {"a"}
        data._splits.clear()
        data.split("train")  # a warning is an error: it was said once
        refused(
            path,
            r"no series of the train split has as many steps as --data\.length 30",
            "longest has 24",
            **options | {"length": 30},
        )


class TestCheckpoints:
    def test_longer_files_move_no_cut(self, tmp_path):
        """A log that grew: what was trained on is not tested."""
        path = write(tmp_path / "log.csv", {"t": hours(100), "x": noise(100)})
        trained = Tables(path, ["x"], time="t")
        trained.setup("fit")
        state = through_a_file(trained.state_dict())
        write(path, {"t": hours(500), "x": noise(500)})
        grown, again = Tables(path, ["x"], time="t"), Tables(path, ["x"], time="t")
        grown.setup("fit")  # as a resumed fit does, before it loads
        grown.load_state_dict(state)
        assert grown.split("train")[0].x.tolist() == trained.split("train")[0].x.tolist()
        assert grown.split("test")[0].x[:, 0].tolist() == noise(500)[90:]
        assert torch.equal(grown.scaler.mean, trained.scaler.mean)
        assert len(again.split("test")[0].x) == 50
        write(path, {"t": hours(60), "x": noise(60)})
        cut = Tables(path, ["x"], time="t")
        cut.setup("test")
        cut.load_state_dict(state)
        with pytest.raises(
            UserError, match="test split is empty, as no row of 1 series lies where the checkpoint has it"
        ):
            cut.test_dataloader()

    def test_series_it_does_not_know_are_tested_after_its_latest_cut(self, tmp_path):
        trained = Tables(write(tmp_path / "a.csv", {"t": hours(100), "x": noise(100)}), ["x"], time="t")
        trained.setup("fit")
        for i, (first, expected) in enumerate([(0, 10), (50, 60), (100, 100)]):
            path = write(tmp_path / f"renamed{i}.csv", {"t": hours(100, first), "x": noise(100)})
            other = Tables(path, ["x"], time="t")
            other.load_state_dict(through_a_file(trained.state_dict()))
            assert other.lengths("test") == [expected]
            with pytest.raises(UserError, match="train split is empty"):
                other.split("train")
            assert other.state_dict()["cuts"] == trained.state_dict()["cuts"]  # however often it is saved again

    def test_the_latest_cut_is_that_of_all_series(self, tmp_path):
        """Whatever it knows keeps its own cut beside it."""
        columns = {"s": ["a"] * 50 + ["b"] * 100, "t": hours(50) + hours(100), "x": noise(150)}
        trained = Tables(write(tmp_path / "a.csv", columns), ["x"], id="s", time="t")
        state = through_a_file(trained.state_dict())
        columns = {"s": ["c"] * 100 + ["a"] * 60, "t": hours(100) + hours(60), "x": noise(160)}
        other = Tables(write(tmp_path / "b.csv", columns), ["x"], id="s", time="t")
        other.load_state_dict(state)
        assert other.lengths("test") == [10, 15]
        assert other.lengths("train") == trained.lengths("train")[:1]

    def test_times_of_another_kind(self, tmp_path):
        path = write(tmp_path / "a.csv", {"t": hours(50), "x": noise(50)})
        trained = Tables(path, ["x"], time="t")
        write(tmp_path / "b.csv", {"t": list(range(50)), "x": noise(50)})
        other = Tables(tmp_path / "b.csv", ["x"], time="t")
        other.load_state_dict(through_a_file(trained.state_dict()))
        with pytest.raises(UserError, match=r"time is given by numbers, but the checkpoint's data was split by dates"):
            other.split("test")

    def test_a_test_reads_no_split_before_the_checkpoint_is_there(self, tmp_path):
        """By its own shares this table would have no test part."""
        path = write(tmp_path / "a.csv", {"x": noise(50)})
        trained = Tables(path, ["x"])
        state = trained.state_dict()
        data = Tables(path, ["x"], test_share=0)
        data.setup("test")
        data.load_state_dict(state)
        assert data.lengths("test") == [5]

    def test_which_options_may_change(self):
        may = {
            "root",
            "batch_size",
            "num_workers",
            "window",
            "length",
            "stride",
            "context",
            "anomaly",
            "sort",
            "delimiter",
            "max_gb",
        }
        assert Tables.run_options == may


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"columns": []}, "--data.columns: is empty"),
            ({"columns": "temperature"}, r"--data.columns 'temperature': must be a list"),
            ({"columns": ["a", "a"]}, "--data.columns 'a': is named twice"),
            ({"inputs": ["u", "u"]}, "--data.inputs 'u': is named twice"),
            ({"inputs": ["a"]}, "--data.inputs 'a': is in --data.columns too"),
            ({"split": "random"}, "--data.split random: must be one of time, id, files"),
            ({"val_share": -0.1}, "--data.val_share -0.1"),
            ({"test_share": 1}, "--data.test_share 1"),
            ({"val_share": 0.5, "test_share": 0.5}, "leave nothing to train on"),
            ({"length": 0}, "--data.length 0: must be at least 1"),
            ({"length": 5, "stride": 0}, "--data.stride 0: must be at least 1"),
            ({"stride": 5}, "--data.stride 5: needs --data.length"),
            ({"context": -1}, "--data.context -1: must be at least 0"),
            ({"context": 5, "split": "id"}, "--data.context 5: needs a split by time, but --data.split is"),
            ({"anomaly": "a"}, "--data.anomaly 'a': is in --data.columns too"),
            ({"anomaly": "u", "inputs": ["u"]}, "--data.anomaly 'u': is in --data.inputs too"),
            ({"sort": True}, "--data.sort: needs --data.time"),
            ({"step": 1}, "--data.step 1: needs --data.time"),
            ({"time": "t", "step": "1month"}, "--data.step 1month: must be"),
            ({"time": "t", "step": -1}, "--data.step -1: must be"),
            ({"time": "t", "step": "0h"}, "--data.step 0h: must be"),
            ({"time": "t", "step": "1.2.3h"}, "--data.step 1.2.3h: must be"),
            ({"time": "t", "step": "1e305h"}, "--data.step 1e305h: must be"),
            ({"delimiter": ""}, "--data.delimiter '': must be one character"),
            ({"window": 0}, "--data.window 0"),
        ],
    )
    def test_options(self, options, said):
        with pytest.raises(UserError, match=said):
            Tables("nowhere.csv", **{"columns": ["a"]} | options)

    @pytest.mark.parametrize(
        ("content", "options", "said"),
        [
            ("x\n1\nhigh\n", {}, r"a\.csv: row 3, column 'x': 'high' is not a number"),
            ("x\n1\n12_34\n", {}, r"a\.csv: row 3, column 'x': '12_34' is not a number"),
            ("t,x\n0,1\n1_0,2\n", {"time": "t"}, r"row 3, column 't': '1_0' is not a number"),
            ('x\n1\n"2,5"\n', {}, r"row 3, column 'x': '2,5' is not a number. Fix: write a decimal point"),
            ("x\n1\ninf\n", {}, r"a\.csv: row 3, column 'x': is infinite"),
            ("x\n1\n-Infinity\n", {}, r"row 3, column 'x': is infinite"),
            ("x\n1\n\n2\n1e999\n", {}, r"row 5, column 'x': is infinite"),
            ("t,x\n0,1\n1,\n", {"missing": False}, r"row 3, column 'x': is empty. Fix: .*--data\.missing true"),
            ("u,x\n0,1\n,2\n", {"inputs": ["u"]}, r"row 3, column 'u': is empty, but covariates"),
            ("u,x\n0,\nlow,2\n", {"inputs": ["u"]}, r"row 3, column 'u': 'low' is not a number"),
            ("u,x\n0,1\ninf,2\n", {"inputs": ["u"]}, r"row 3, column 'u': is infinite"),
            (
                "f,x\n0,1\n2,2\n",
                {"anomaly": "f"},
                r"row 3, column 'f': is neither 0 nor 1 \(--data\.anomaly\). Fix: write 1",
            ),
            ("f,x\n0,1\n,2\n", {"anomaly": "f"}, r"row 3, column 'f': is neither 0 nor 1"),
            ("f,x\n0,1\n", {"anomaly": "g"}, r"a\.csv: has no column 'g' \(--data\.anomaly\)"),
            ("x\n1,2\n", {}, r"a\.csv: row 2 has 2 cells, the header has 1"),
            ("t,x\n1\n", {}, r"a\.csv: row 2 has 1 cells, the header has 2"),
            ("", {}, r"a\.csv: is empty, it has not even a header"),
            ("x\n", {}, r"a\.csv: is empty, it has no row"),
            ("x,x\n1,2\n", {}, r"a\.csv: has 2 columns called 'x'"),
            ('x\n"1\n2\n', {}, r"a\.csv: can't be read as csv"),
            ("t,x\n0,1\n1,2\n1,3\n", {"time": "t"}, r"a\.csv: row 4: time 1 is that of .*a\.csv: row 3 too"),
            ("t,x\n0,1\n2,2\n1,3\n", {"time": "t"}, r"a\.csv: row 4: time 1 comes after 2. .*--data\.sort true"),
            ("t,x\n1,1\n0,2\n1,3\n", {"time": "t", "sort": True}, r"row 4: time 1 is that of .*row 2 too"),
            ("t,x\n0,1\n,2\n", {"time": "t"}, r"row 3, column 't': is empty. Fix: write the time of each row"),
            ("t,x\n2024-01-01,1\n,2\n", {"time": "t"}, r"row 3, column 't': is empty. Fix: write the time of each row"),
            ("t,x\n0,1\ninf,2\n", {"time": "t"}, r"row 3, column 't': is infinite"),
            ("t,x\n0,1\nnoon,2\n", {"time": "t"}, r"row 3, column 't': 'noon' is not a number"),
            ("t,x\n01.02.2024,1\n", {"time": "t"}, r"row 2, column 't': '01.02.2024' is not a time. Fix: .*ISO date"),
            ("s,x\na,1\n,2\n", {"id": "s"}, r"row 3, column 's': is empty. Fix: write the id of each row"),
            ("s,t,x\na,0,1\nb,0,1\na,0,2\n", {"id": "s", "time": "t"}, r"row 4, id 'a': time 0 is .*row 2, id 'a'"),
        ],
    )
    def test_csv(self, tmp_path, content, options, said):
        refused(text(tmp_path / "a.csv", content), said, **options)

    def test_a_duplicate_date_names_id_and_time(self, tmp_path):
        columns = {"s": ["a", "b", "b"], "t": hours(2) + hours(1, 1), "x": [1, 2, 3]}
        path = write(tmp_path / "a.csv", columns)
        refused(path, r"row 4, id 'b': time 2024-02-28 01:00:00 is that of .*row 3", id="s", time="t")

    @pytest.mark.parametrize(
        ("option", "hint"), [("columns", "x"), ("inputs", "humidity"), ("id", "sensor"), ("time", "date")]
    )
    def test_unknown_columns(self, long, option, hint):
        wrong = {"columns": "temprature", "inputs": "humidty", "id": "Sensor", "time": "dates"}[option]
        near = "temperature" if option == "columns" else hint
        value = [wrong] if option in ("columns", "inputs") else wrong
        options = {"columns": ["temperature"]} | {option: value}
        message = refused(long, rf"has no column '{wrong}' \(--data\.{option}\)", f"Fix: name '{near}'", **options)
        assert "it has date, sensor, temperature, humidity, hour." in message

    def test_a_column_that_one_file_lacks(self, folder):
        write(folder / "sub1" / "odd.csv", {"x": [1, 2], "z": [1, 2]})
        refused(folder, r"odd\.csv: has no column 'y' \(--data\.columns\)", "it has x, z", columns=["x", "y"])

    def test_a_wide_table_is_not_listed_in_full(self, tmp_path):
        path = write(tmp_path / "a.csv", {f"c{i:03}": [1] for i in range(200)})
        assert len(refused(path, "c029, c030", columns=["nothing"])) < 400

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            (["1", "high"], r"a\.parquet: row 1, column 'x': 'high' is not a number"),
            ([1.0, float("inf")], r"a\.parquet: row 1, column 'x': is infinite"),
            ([START, START], r"row 0, column 'x': is a date"),
            ([[1], [2]], r"a\.parquet: column 'x' is of type list"),
            ([], r"a\.parquet: is empty, it has no row"),
        ],
    )
    def test_parquet(self, tmp_path, values, said):
        parquet.write_table(pyarrow.table({"x": values}), tmp_path / "a.parquet")
        refused(tmp_path / "a.parquet", said)

    def test_rows_of_parquet_are_counted_over_its_groups(self, tmp_path, monkeypatch):
        monkeypatch.setattr("vrnn_lightning.data.columns.CHUNK", 4)
        times = pyarrow.array([0, 1, 2, 3, 4, 5, None])
        parquet.write_table(pyarrow.table({"t": times, "x": noise(7)}), tmp_path / "a.parquet", row_group_size=3)
        refused(tmp_path / "a.parquet", r"row 6, column 't': is empty. Fix: write the time of each row", time="t")

    @pytest.mark.parametrize("name", ["a.csv.gz", "a.parquet"])
    @pytest.mark.parametrize("damage", ["cut", "other"])
    def test_damaged_files(self, tmp_path, name, damage):
        columns = {"x": noise(500)}
        path = tmp_path / name
        if name.endswith("gz"):
            write(path, columns)
        else:
            parquet.write_table(pyarrow.table(columns), path)
        path.write_bytes(path.read_bytes()[:-40] if damage == "cut" else b"x\n1\n2\n3\n" * 20)
        refused(path, rf"{re.escape(name)}: can't be read")

    def test_text_of_another_encoding(self, tmp_path):
        (tmp_path / "a.csv").write_bytes("x,°C\n1,2\n".encode("latin-1"))
        refused(tmp_path / "a.csv", r"a\.csv: is not UTF-8 text")

    def test_files_without_permission(self, long, monkeypatch):
        opened = Path.open

        def refuse(path, *options, **named):
            if path == long:
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *options, **named)

        monkeypatch.setattr(Path, "open", refuse)
        refused(long, r"sensors\.csv: Permission denied", **LONG)

    def test_folders_without_permission(self, folder, monkeypatch):
        walked = os.walk

        def refuse(top, onerror):
            onerror(PermissionError(13, "Permission denied", str(folder / "sub1")))
            return walked(top)

        monkeypatch.setattr(os, "walk", refuse)
        refused(folder, r"sub1: Permission denied. Fix: give yourself permission")

    def test_roots(self, tmp_path):
        refused(tmp_path / "nowhere", "--data.root .*nowhere: no such file or folder")
        refused(tmp_path, "holds no table. Fix: give a folder of .csv, .csv.gz, .parquet files")
        refused(text(tmp_path / "a.xlsx", "x"), r"a\.xlsx: is not a table. Fix: give one in .csv")

    def test_the_same_table_in_two_formats(self, tmp_path):
        write(tmp_path / "a.csv", {"x": [1]})
        write(tmp_path / "a.csv.gz", {"x": [1]})
        refused(tmp_path, r"a\.csv\.gz: and .*a\.csv seem to hold the same. Fix: remove one")

    def test_times_of_two_kinds(self, tmp_path):
        write(tmp_path / "a.csv", {"t": hours(3), "x": [1, 2, 3]})
        write(tmp_path / "b.csv", {"t": [1, 2, 3], "x": [1, 2, 3]})
        refused(tmp_path, r"b\.csv: times are numbers, but in .*a\.csv they are dates", time="t")

    def test_a_column_without_a_training_value(self, tmp_path):
        path = write(tmp_path / "a.csv", {"x": noise(20), "y": [None] * 17 + [1, 2, 3]})
        data = Tables(path, ["x", "y"])
        with pytest.raises(UserError, match=r"column 'y' has no value in the training split. Fix: take it out of"):
            data.train_dataloader()

    def test_without_pyarrow(self, tmp_path, monkeypatch):
        """Parquet says what to install; csv works."""
        parquet.write_table(pyarrow.table({"x": noise(20)}), tmp_path / "a.parquet")
        write(tmp_path / "b.csv", {"x": noise(20)})
        imported = builtins.__import__

        def without(name, *options, **named):
            if name.startswith("pyarrow"):
                raise ModuleNotFoundError(f"No module named {name!r}")
            return imported(name, *options, **named)

        monkeypatch.setattr(builtins, "__import__", without)
        refused(
            tmp_path / "a.parquet", r"a\.parquet: parquet needs pyarrow. Fix: pip install 'vrnn-lightning\[tables\]'"
        )
        Tables(tmp_path / "b.csv", ["x"]).setup("fit")


class TestCommandLine:
    QUICK = ("--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
    SMALL = ("--model.latent_size=2", "--model.hidden_size=4", "--samples.every_n_validations=0")

    def test_a_run_and_its_test(self, lightning, tmp_path):
        """The test needs the checkpoint and the place of the data, and reads no row that was trained on."""
        root = write(tmp_path / "data" / "sensors.csv", sensors())
        options = ("--data=Tables", f"--data.root={root}", "--data.columns=[temperature,humidity]", "--data.time=date")
        more = ("--data.inputs=[hour]", "--data.id=sensor", "--data.length=4", "--data.step=1h")
        fitted = lightning("fit", *options, *more, *self.QUICK, *self.SMALL)
        assert fitted.code == 0, fitted.err
        assert "best val/elbo" in fitted.out + fitted.err
        moved = write(tmp_path / "elsewhere" / "sensors.csv.gz", sensors())
        words = ("--data=Tables", f"--data.root={moved}", *self.QUICK[1:])
        tested = lightning("test", "--ckpt_path=best", *words)
        assert tested.code == 0, tested.err
        assert "test/elbo" in tested.out
        refusal = lightning("test", "--ckpt_path=best", *words, "--data.test_share=0.3")
        assert refusal.code == 1
        assert "--data.test_share" in refusal.err

    def test_a_mistake_is_one_line(self, lightning, tmp_path):
        root = write(tmp_path / "a.csv", {"x": [1, 2, "high"]})
        said = lightning("fit", "--data=Tables", f"--data.root={root}", "--data.columns=[x]", *self.QUICK, *self.SMALL)
        assert said.code == 1
        (line,) = [line for line in said.err.splitlines() if "high" in line]
        assert "a.csv: row 4, column 'x': 'high' is not a number" in line
        assert "Traceback" not in said.err


@pytest.mark.skipif(
    "VRNN_DATA" not in os.environ, reason="VRNN_DATA names no folder with the transformers' temperatures"
)
class TestTransformers:
    ROOT = Path(os.environ.get("VRNN_DATA", ""), "timeseries_ett", "ETTh1.csv")
    COLUMNS = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]

    def test_all_rows_are_there_in_order(self):
        rows = np.loadtxt(self.ROOT, delimiter=",", skiprows=1, usecols=range(1, 8))
        data = Tables(self.ROOT, self.COLUMNS, time="date", step="1h", val_share=0.2, test_share=0.2)
        x = torch.cat([data.split(split)[0].x for split in SPLITS])
        assert np.array_equal(x.numpy(), rows)
        assert [data.lengths(split)[0] for split in SPLITS] == [10452, 3484, 3484]
        assert data.scaler.mean.tolist() == pytest.approx(rows[:10452].mean(0).tolist())
        assert data.scaler.std.tolist() == pytest.approx(rows[:10452].std(0).tolist())
        assert data.split("test")[0].name == "ETTh1 from 2018-02-01 16:00:00"

    def test_windows(self):
        data = Tables(self.ROOT, ["OT"], inputs=["HUFL"], time="date", length=168, stride=24)
        rows = np.loadtxt(self.ROOT, delimiter=",", skiprows=1, usecols=(1, 7), dtype=np.float32)
        windows = data.split("train")
        assert len(windows) == (13936 - 168) // 24 + 1
        assert np.array_equal(windows[10].inputs[:, 0].numpy(), rows[240:408, 0])
        np.testing.assert_allclose(windows[10].x[:, 0].numpy(), rows[240:408, 1], rtol=1e-6)


class TestFilesDrawnWhole:
    OPTIONS = {"columns": ["x"], "split": "id", "val_share": 0.2, "test_share": 0.3}

    def trained(self, folder):
        for i in range(20):
            write(folder / f"all/sub/f{i}.csv", {"x": list(range(100 * i, 100 * i + 9))})
        return Tables(folder / "all", **self.OPTIONS)

    def test_a_trained_file_under_another_path_is_not_tested(self, tmp_path):
        state = self.trained(tmp_path).state_dict()
        moved = Tables(tmp_path / "all/sub", **self.OPTIONS)
        moved.setup("test")
        moved.load_state_dict(state)
        with pytest.raises(UserError, match="f0 seems to be sub/f0, which the model was trained on"):
            moved.split("test")

    def test_new_files_beside_those_of_the_checkpoint(self, tmp_path):
        trained = self.trained(tmp_path)
        state, tested = trained.state_dict(), [s.name for s in list(trained.split("test"))]
        for i in range(20):
            write(tmp_path / f"all/new/f{i}.csv", {"x": list(range(9))})
        grown = Tables(tmp_path / "all", **self.OPTIONS)
        grown.load_state_dict(state)
        found = [s.name for s in list(grown.split("test"))]
        assert [name for name in found if name.startswith("sub/")] == tested
        assert len(found) > len(tested)


def test_values_whose_spread_no_float_holds_are_refused(tmp_path):
    path = write(tmp_path / "a.csv", {"x": [1e300, -1e300] * 20})
    with pytest.raises(UserError, match="too large or too small for float32"):
        _ = Tables(path, ["x"]).scaler


def test_the_time_since_the_row_before_is_a_covariate(tmp_path):
    """In the unit that is asked for, 0 in a series' first row, and after the other covariates."""
    gaps = np.random.default_rng(0).integers(1, 90, 29)
    minutes = [0, *gaps.cumsum().tolist()]
    dates = [str(START + timedelta(minutes=m)) for m in minutes]
    root = write(tmp_path / "a.csv", {"date": dates, "minute": minutes, "a": noise(30), "hour": [1] * 30})
    for time, dt, size in (("date", "1h", 60), ("minute", 30, 30)):
        data = Tables(str(root), ["a"], ["hour"], time=time, dt=dt, length=3)
        assert data.num_inputs == 2
        data.setup("fit")
        inputs = torch.cat([s.inputs for s in data.split("train")])
        assert (inputs[:, 0] == 1).all()
        expected = torch.tensor([0, *gaps.tolist()])[: len(inputs)] / size
        torch.testing.assert_close(inputs[:, 1], expected)
    for options, message in (
        ({"dt": "1h"}, "--data.dt: needs --data.time"),
        ({"dt": "1 parsec", "time": "date"}, "--data.dt 1 parsec: must be a positive number"),
        ({"dt": 1, "time": "date"}, "--data.dt 1: times are dates"),
    ):
        with pytest.raises(UserError, match=message):
            Tables(str(root), ["a"], **options).setup("fit")
