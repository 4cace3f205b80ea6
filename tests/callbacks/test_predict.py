"""Tasks of `lightning predict`, what they leave on the disk, and fits that start from weights alone."""

from __future__ import annotations

import csv
import errno
import io
import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch import Trainer

from vrnn_lightning import SequenceDataModule, SequenceSample, UserError, VRNNLightningModule
from vrnn_lightning.callbacks import Predictions
from vrnn_lightning.callbacks.archives import ArchiveWriter
from vrnn_lightning.callbacks.predictions import GROUP, Draws
from vrnn_lightning.data import read_archive
from vrnn_lightning.metrics import DrawScores, detection, seasonal_naive
from vrnn_lightning.nn import MLPConfig

LENGTHS = (9, 4, 12, 7)
LEVELS = [k / 10 for k in range(1, 10)]


class Ramps(SequenceDataModule):
    """Two features far from zero, sequences of different lengths, some values missing."""

    scaling = "per_feature"
    missing = True
    columns = ("up", "down")

    def __init__(self, batch_size: int = 3, gaps: bool = False, nothing: bool = False, num_inputs: int = 0) -> None:
        super().__init__(2, batch_size=batch_size)
        self.gaps, self.nothing, self.num_inputs = gaps, nothing, num_inputs

    def sequences(self, split):
        generator = torch.Generator().manual_seed(0)
        found = []
        for i, length in enumerate(LENGTHS):
            t = torch.arange(length, dtype=torch.float64)
            x = torch.stack([1000 + t, -50 - 2 * t], 1) + torch.rand(length, 2, generator=generator)
            observed = torch.ones_like(x, dtype=torch.bool)
            if self.gaps:
                observed[1:3] = False
            if self.nothing and split == "test":
                observed[:] = False
            inputs = torch.zeros(length, self.num_inputs) if self.num_inputs else None
            found.append(SequenceSample(x.masked_fill(~observed, 0.0), observed, inputs, f'{split}, {"ramp" * i}"{i}"'))
        return found


def model(**options) -> VRNNLightningModule:
    torch.manual_seed(0)
    small = {"latent_size": 2, "hidden_size": 4, "missing": True}
    return VRNNLightningModule(num_features=2, **small | options)


def predict(folder: Path, data=None, module=None, **options) -> tuple[dict[str, np.ndarray], Predictions]:
    """Return what a prediction wrote, and the callback; pictures only where they are asked for."""
    options = options if options["task"] in ("encode", "score") else {"shown": 0} | options
    callback = Predictions(**{"overwrite": True} | options)
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=[callback],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    module, data = module or model(), data or Ramps()
    if callback.task.name == "sample":
        module.is_initialized.fill_(True)
        trainer.predict(module, dataloaders=Draws(callback.task.count, 2, trainer), return_predictions=False)
    else:
        trainer.predict(module, datamodule=data, return_predictions=False)
    with np.load(callback.path) as archive:
        return dict(archive), callback


def pieces(found: dict[str, np.ndarray], name: str = "test_values", copies: int = 1) -> list[np.ndarray]:
    lengths = found["test_lengths"].reshape(-1, copies)
    return np.split(found[name], (lengths.sum(1) if name == "test_values" else lengths[:, 0]).cumsum()[:-1])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_writer_orders_what_comes_in_any_order(tmp_path):
    writer = ArchiveWriter(tmp_path / "a.npz", "test")
    for index, name in ((2, "c"), (0, "a long name"), (1, "")):
        rows = np.full((index + 1, 2), float(index), np.float32)
        writer.add(index, values=rows, names=np.array([name]), there=rows[:, 0] > 0)
    assert len(writer) == 3
    writer.finish()
    with np.load(tmp_path / "a.npz") as found:
        assert found["test_values"].tolist() == [[0.0] * 2] + [[1.0] * 2] * 2 + [[2.0] * 2] * 3
        assert found["test_values"].dtype == np.float32
        assert found["test_names"].tolist() == ["a long name", "", "c"]
        assert found["test_there"].tolist() == [False] + [True] * 5
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """64 MB go through less than 2 MB."""
    piece = np.ones((500, 128), np.float32)
    tracemalloc.start()
    try:
        writer = ArchiveWriter(tmp_path / "a.npz", "test")
        for index in range(256):
            writer.add(255 - index, values=piece, names=np.array([f"sequence {index}"]))
        writer.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 64 * 1000**2
    assert peak < 2 * 1000**2


class Full(io.FileIO):
    """A file on a disk that has room for so many bytes, and no more, of all such files."""

    room = 0

    def write(self, data):
        Full.room -= len(data)
        if Full.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.fixture
def disk(monkeypatch):
    """Give the disk so much room."""
    plain = Path.open

    def opened(path, mode="r", *args, **options):
        raw = {"w+b": "w+", "wb": "w"}.get(mode)
        if raw is None:
            return plain(path, mode, *args, **options)
        file = Full(str(path), raw)
        return io.BufferedRandom(file, 16) if "+" in raw else io.BufferedWriter(file, 16)

    def fill(room):
        Full.room = room
        monkeypatch.setattr(Path, "open", opened)

    return fill


@pytest.mark.parametrize("room", [0, 100, 700, 1500])
def test_full_disk_leaves_nothing(tmp_path, disk, room):
    """While parts are written, and while they are joined."""
    disk(room)
    with pytest.raises(UserError, match=r"--trainer.default_root_dir .*test.npz: No space left.*free some space"):
        predict(tmp_path, task="forecast", prefix=3, samples=20)
    assert not list(tmp_path.iterdir())


def test_full_disk_while_the_archive_is_joined(tmp_path, monkeypatch):
    writer = ArchiveWriter(tmp_path / "a.npz", "test")
    writer.add(0, values=np.ones((3, 1)))
    (tmp_path / "a.npz").write_text("of an earlier run")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(UserError, match="No space left"):
        writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert (tmp_path / "a.npz").read_text() == "of an earlier run"


def test_no_permission_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(VRNNLightningModule, "forecast", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(UserError, match=r"--trainer.default_root_dir .*Permission denied"):
        predict(tmp_path, task="forecast", prefix=3)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "predictions").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        predict(tmp_path, task="score")


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"task": "encode"},
        {"task": "reconstruct"},
        {"task": "score"},
        {"task": "score", "samples": 3},
        {"task": "forecast", "prefix": 3, "samples": 4},
        {"task": "forecast", "prefix": 3, "samples": 4, "steps": 2, "stride": 2},
        {"task": "impute", "samples": 3, "hide": 0.3},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_batch_size_changes_nothing_and_the_seed_does(tmp_path, options, batch_size):
    expected, _ = predict(tmp_path / "a", Ramps(batch_size=3, gaps=True), **options)
    found, _ = predict(tmp_path / "b", Ramps(batch_size=batch_size, gaps=True), **options)
    assert list(found) == list(expected)
    for name, values in expected.items():
        if values.dtype.kind in "Ub":
            assert (found[name] == values).all()
        else:
            np.testing.assert_allclose(found[name], values, rtol=2e-5, atol=2e-5)
    if options["task"] != "encode" and batch_size == 1:
        other, _ = predict(tmp_path / "c", Ramps(gaps=True), seed=1, **options)
        assert not np.allclose(other["test_values"], expected["test_values"], rtol=1e-6)


def test_reconstructions_and_scores_are_those_of_the_model(tmp_path):
    module, data = model(), Ramps()
    found, _ = predict(tmp_path, data, module, task="reconstruct")
    scores, _ = predict(tmp_path, data, module, task="score")
    sequences = data.split("test")
    for s, mean, nats in zip(sequences, pieces(found), pieces(scores), strict=True):
        batch = next(b for b in data.test_dataloader() if s.name in b.names)
        row = batch.rows([batch.names.index(s.name)])
        np.testing.assert_allclose(mean, module.reconstruct(row, seed=0)[0], rtol=1e-6)
        np.testing.assert_allclose(nats[:, 0], module.score(row, seed=0)[0], rtol=1e-5)
        assert abs(mean[:, 0].mean() - 1000) < 50, "data units"
    assert found["test_names"].tolist() == [s.name for s in sequences]
    split = read_archive(tmp_path / "predictions/reconstruct/test.npz", "test", 2)
    assert split.lengths == list(LENGTHS)
    rows = table(tmp_path / "predictions/score/test.csv")
    assert [row["nats"] for row in rows] == [f"{x:.7g}" for x in scores["test_values"][:, 0]]
    assert list(table(tmp_path / "predictions/reconstruct/test.csv")[0]) == ["sequence", "step", "up", "down"]


@pytest.mark.parametrize(
    ("prefix", "steps", "starts"), [(3, None, [3] * 4), (-2, None, [7, 2, 10, 5]), (5, 4, [5] * 3)]
)
def test_forecasts_begin_where_they_are_told_to(tmp_path, prefix, steps, starts):
    found, callback = predict(tmp_path, task="forecast", prefix=prefix, steps=steps, samples=5)
    sequences = [s for s in Ramps().split("test") if len(s.x) >= (prefix if prefix > 0 else 0)]
    assert callback.skipped == 4 - len(sequences)
    assert found["test_start"].tolist() == [start for start in starts for _ in range(5)]
    rows = iter(table(tmp_path / "predictions/forecast/test.csv"))
    paths, truths = pieces(found, copies=5), pieces(found, "test_truth", 5)
    error, inside = [], []
    for s, start, path, truth in zip(sequences, starts, paths, truths, strict=True):
        ahead = steps or len(s.x) - start
        drawn = path.reshape(5, ahead, 2)
        known = s.x[start : start + ahead].numpy()
        np.testing.assert_allclose(truth[: len(known)], known, rtol=1e-6)
        assert np.isnan(truth[len(known) :]).all()
        error.append(drawn.mean(0)[: len(known)] - known)
        low, high = np.quantile(drawn, 0.05, axis=0), np.quantile(drawn, 0.95, axis=0)
        inside.append(((low <= truth) & (truth <= high))[: len(known)])
        for t in range(ahead):
            row = next(rows)
            assert (row["sequence"], row["step"]) == (s.name, str(start + t))
            assert float(row["up_mean"]) == pytest.approx(drawn[:, t, 0].mean(), rel=1e-5)
            assert float(row["down_q95"]) == pytest.approx(high[t, 1], rel=1e-5)
            assert (row["down_true"] == "") == (t >= len(known))
    assert not list(rows)
    assert callback.figures["forecast"]["RMSE"] == pytest.approx(
        np.sqrt(np.square(np.concatenate(error)).mean()), rel=1e-4
    )
    assert callback.figures["forecast"]["coverage"] == pytest.approx(np.concatenate(inside).mean())


@pytest.mark.filterwarnings("ignore:Mean of empty slice")  # a feature of which an origin's truth knows nothing
@pytest.mark.parametrize("prefix", [3, -6])
def test_a_backtest_forecasts_from_rolling_origins(tmp_path, prefix):
    """Each origin is an entry of archive and table; figures are those of all of them, and of each step ahead."""
    options = {"task": "forecast", "prefix": prefix, "steps": 2, "stride": 3, "samples": 5, "season": 2}
    if prefix < 0:
        options["season"] = 1
    found, callback = predict(tmp_path, Ramps(gaps=True), **options)
    expected, truths, naives, scales = [], [], [], []
    season = options["season"]
    for s in Ramps(gaps=True).split("test"):
        x = np.where(s.observed.numpy(), s.x.numpy(), np.nan)
        first = prefix if prefix > 0 else len(x) + prefix
        for start in range(first, len(x) - 1, 3) if first > 0 else ():
            expected.append((s.name, start))
            truths.append(x[start : start + 2])
            naives.append(np.full((2, 2), np.nan))
            for k, feature in np.ndindex(2, 2):
                phase = [x[t, feature] for t in range(start - season + k % season, -1, -season)]
                naives[-1][k, feature] = next((value for value in phase if not np.isnan(value)), np.nan)
            past = np.abs(x[season:start] - x[: start - season])
            scales.append([np.mean(c[~np.isnan(c)]) if (~np.isnan(c)).any() else np.nan for c in past.T])
    paths = found["test_values"].reshape(-1, 5, 2, 2)
    assert found["test_names"][::5].tolist() == [name for name, _ in expected]
    assert found["test_start"][::5].tolist() == [start for _, start in expected]
    assert len(expected) > 4
    np.testing.assert_allclose(found["test_truth"].reshape(-1, 2, 2), truths, rtol=1e-6)
    rows = table(tmp_path / "predictions/forecast/test.csv")
    steps = [(name, str(start), str(start + k)) for name, start in expected for k in range(2)]
    assert [(row["sequence"], row["origin"], row["step"]) for row in rows] == steps
    assert float(rows[3]["up_q25"]) == pytest.approx(np.quantile(paths[1, :, 1, 0], 0.25), rel=1e-5)

    leads = table(tmp_path / "predictions/forecast/lead_times.csv")
    assert [(row["forecast"], row["ahead"]) for row in leads] == [
        (name, ahead) for name in ("forecast", "seasonal naive") for ahead in "12"
    ]
    truth = np.array(truths)
    for name, draws in (("forecast", paths), ("seasonal naive", np.array(naives)[:, None])):
        absolute = np.abs(draws - truth[:, None]).mean(1)
        pairs = np.abs(draws[:, :, None] - draws[:, None]).sum((1, 2)) / max(1, draws.shape[1] * (draws.shape[1] - 1))
        crps = absolute - pairs / 2
        assert callback.figures[name]["CRPS"] == pytest.approx(np.nanmean(crps), rel=1e-3)
        error = np.square(draws.mean(1) - truth)
        with np.errstate(all="ignore"):
            scaled = np.nanmean(np.abs(np.median(draws, 1) - truth), 1) / np.array(scales)
        assert callback.figures[name]["MASE"] == pytest.approx(scaled[np.isfinite(scaled)].mean(), rel=1e-3)
        for ahead in (0, 1):
            row = next(r for r in leads if r["forecast"] == name and r["ahead"] == str(ahead + 1))
            known = ~np.isnan(crps[:, ahead])
            assert float(row["values"]) == known.sum()
            assert float(row["CRPS"]) == pytest.approx(crps[:, ahead][known].mean(), rel=1e-3)
            assert float(row["RMSE"]) == pytest.approx(np.sqrt(error[:, ahead][known].mean()), rel=1e-3)
            if name == "forecast":
                low, high = np.quantile(draws, [0.05, 0.95], axis=1)
                inside = ((low <= truth) & (truth <= high))[:, ahead][known]
                assert float(row["coverage"]) == pytest.approx(inside.mean())
            else:
                assert row["coverage"] == ""


def test_a_fan_chart_has_all_it_needs(tmp_path):
    _, callback = predict(tmp_path, task="forecast", prefix=3, steps=2, stride=2, samples=5, shown=2)
    (fan, second), s = (piece.fan for piece in callback._shown), Ramps().split("test")[0]
    torch.testing.assert_close(fan.past.double(), s.x[:3])
    torch.testing.assert_close(fan.truth.double(), s.x[3:5])
    assert fan.draws.shape == (5, 2, 2)
    assert len(second.past) == 5


def test_draws_of_a_gaussian_score_as_the_closed_form():
    """CRPS of N(m, s^2) at y: s (u (2 Phi(u) - 1) + 2 phi(u) - 1 / sqrt(pi)), u = (y - m) / s (Gneiting 2005)."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    truth = torch.tensor([[2.0, -1.0], [4.5, 0.0]], dtype=torch.float64)
    mean, std = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 3.0])
    u = (truth - mean) / std
    exact = std * (u * (2 * normal.cdf(u) - 1) + 2 * normal.log_prob(u).exp() - math.pi**-0.5)
    levels = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000
    draws = mean + std * normal.icdf(levels)[:, None, None].expand(-1, 2, 2)
    score = DrawScores()
    score.update(draws, truth)
    assert score.compute()["CRPS"].item() == pytest.approx(exact.mean().item(), rel=1e-3)
    assert score.compute()["coverage"].item() == pytest.approx(((u.abs() < 1.6448).double().mean()).item())


def test_the_score_of_few_draws_is_unbiased():
    """Four draws give on average what the closed form says: E|X - y| - E|X - X'| / 2."""
    torch.manual_seed(0)
    truth = torch.full((20000, 1), 0.7, dtype=torch.float64)
    score = DrawScores()
    score.update(torch.randn(4, 20000, 1, dtype=torch.float64), truth)
    normal = torch.distributions.Normal(0.0, 1.0)
    u = torch.tensor(0.7)
    exact = u * (2 * normal.cdf(u) - 1) + 2 * normal.log_prob(u).exp() - math.pi**-0.5
    assert score.compute()["CRPS"].item() == pytest.approx(exact.item(), abs=0.01)


def test_figures_of_known_values():
    """A point forecast, by hand; what is not known counts nowhere; batches add up."""
    whole, parts = DrawScores(), DrawScores()
    truth = torch.tensor([[1.0, 10.0], [torch.nan, 30.0]])
    point = torch.tensor([[[2.0, 12.0], [99.0, 26.0]]])
    whole.update(point, truth, torch.tensor([2.0, 6.0]))
    found = {name: value.item() for name, value in whole.compute().items()}
    assert found == pytest.approx(
        {"RMSE": math.sqrt(7), "CRPS": 7 / 3, "wQL": 7 / 41, "MASE": (1 / 2 + (2 + 4) / 2 / 6) / 2}
    )
    for t in range(2):
        parts.update(point[:, t : t + 1], truth[t : t + 1])
    assert parts.compute()["CRPS"].item() == pytest.approx(7 / 3)
    constant = DrawScores()
    constant.update(point, truth, torch.tensor([0.0, torch.nan]))
    assert "MASE" not in constant.compute(), "a past that never changes scales nothing"


@pytest.mark.parametrize("samples", [1, 2, 30])
def test_figures_against_brute_force(samples):
    """Ragged sequences with holes, a feature that never changed, several updates; and of each step alone."""
    generator = np.random.default_rng(samples)
    score, every = DrawScores(), []
    for length in (4, 1, 6):
        draws, truth = generator.normal(size=(samples, length, 2)), generator.normal(size=(length, 2))
        truth[generator.random((length, 2)) < 0.3] = np.nan
        truth[0, 0] = 0.5
        scale = np.array([0.0 if length == 4 else 2.0, np.nan if length == 1 else 3.0])
        score.update(torch.tensor(draws), torch.tensor(truth), torch.tensor(scale))
        every.append((draws, truth, scale))
    score.update(torch.zeros(samples, 9, 2), torch.full((9, 2), torch.nan))
    values, scaled = [], []  # of each known value: its step, its size, and the figures of its draws
    for draws, truth, scale in every:
        with np.errstate(all="ignore"):
            errors = np.array([np.nanmean(e) for e in np.abs(np.median(draws, 0) - truth).T if not np.isnan(e).all()])
        scaled += [e / s for e, s in zip(errors, scale, strict=False) if s > 0]
        for t, feature in np.argwhere(~np.isnan(truth)):
            x, y = draws[:, t, feature], truth[t, feature]
            pairs = [abs(a - b) for i, a in enumerate(x) for b in x[:i]]
            crps = np.mean(np.abs(x - y)) - (np.mean(pairs) / 2 if pairs else 0.0)
            pinball = [2 * max(q * (y - np.quantile(x, q)), (q - 1) * (y - np.quantile(x, q))) for q in LEVELS]
            low, q25, q75, high = np.quantile(x, [0.05, 0.25, 0.75, 0.95])
            inside = (float(low <= y <= high), float(q25 <= y <= q75))
            values.append((t, abs(y), (x.mean() - y) ** 2, crps, np.mean(pinball), *inside))

    def figures(rows):
        _, size, squares, crps, pinball, inside, inside_50 = np.array(rows).T
        found = {"RMSE": np.sqrt(squares.mean()), "CRPS": crps.mean(), "wQL": pinball.sum() / size.sum()}
        return found | ({"coverage": inside.mean(), "coverage_50": inside_50.mean()} if samples > 1 else {})

    found = {name: x.item() for name, x in score.compute().items()}
    assert found == pytest.approx(figures(values) | {"MASE": np.mean(scaled)})
    steps = score.by_step()
    assert len(steps["CRPS"]) == 6
    for t in range(6):
        rows = [row for row in values if row[0] == t]
        assert steps["values"][t] == len(rows)
        here = {name: x[t].item() for name, x in steps.items() if not x[t].isnan()}
        assert here == pytest.approx({"values": len(rows), **(figures(rows) if rows else {})})


def test_processes_add_their_draws_up():
    """Each has other sequences, of other lengths; none is as good as nothing."""
    torch.manual_seed(0)
    whole, shares = DrawScores(), [DrawScores() for _ in range(3)]
    for rank, length in ((0, 3), (1, 5), (0, 2)):
        draws, truth, scale = torch.randn(7, length, 2), torch.randn(length, 2), torch.rand(2)
        whole.update(draws, truth, scale)
        shares[rank].update(draws, truth, scale)
    for share in shares:
        share.grow(5)
    first, *others = shares
    for other in others:
        first.merge_state(other)
    assert {k: v.item() for k, v in first.compute().items()} == pytest.approx(
        {k: v.item() for k, v in whole.compute().items()}
    )
    torch.testing.assert_close(first.by_step(), whole.by_step(), equal_nan=True)
    whole.reset()
    whole.update(torch.zeros(1, 2, 1), torch.full((2, 1), torch.nan))
    assert whole.compute() == {}


def test_seasonal_naive_takes_the_last_known_value_of_a_phase():
    nan = math.nan
    past = torch.tensor([[9.0, 1.0], [1.0, nan], [2.0, nan], [3.0, 4.0], [nan, nan]])
    naive, error = seasonal_naive(past, steps=3, season=2)
    assert naive[:, 0].tolist() == [3.0, 2.0, 3.0]
    assert naive[0::2, 1].tolist() == [4.0, 4.0]
    assert naive[1, 1] == 1.0, "phases do not mix"
    assert error[0] == ((2.0 - 9.0) * -1 + 2.0) / 2


def test_detection_is_that_of_all_pairs():
    torch.manual_seed(0)
    nats, faulty = torch.randint(-8, 0, (60,)).double(), torch.rand(60) < 0.3
    found = detection(nats, faulty, threshold=-5.0)
    bad, good = nats[faulty][:, None], nats[~faulty]
    assert found["AUROC"].item() == pytest.approx(((bad < good).double() + (bad == good) / 2).mean().item())
    assert found["precision"].item() == pytest.approx(faulty[nats < -5].double().mean().item())
    assert found["recall"].item() == pytest.approx((nats[faulty] < -5).double().mean().item())
    assert detection(nats, torch.zeros(60, dtype=torch.bool), threshold=-99.0) == {}


def test_planted_faults_are_flagged(tmp_path):
    """Faults far from all else have the lowest scores; the threshold is the quantile of validation."""

    class Faulty(Ramps):
        def sequences(self, split):
            found = super().sequences(split)
            if split == "test":
                for s in found:
                    s.x[2] += 500.0
            return found

        def anomalies(self, batch):
            return (torch.arange(batch.x.shape[1]) == 2).expand(len(batch), -1)

    module = model()
    found, callback = predict(tmp_path, Faulty(), module, task="score", quantile=0.1)
    val = [nats for b in Faulty().val_dataloader() for nats in module.score(b, seed=0)]
    assert callback.task.threshold == pytest.approx(np.quantile(torch.cat(val).numpy(), 0.1), rel=1e-5)
    assert (found["test_flagged"] == (found["test_values"][:, 0] < callback.task.threshold)).all()
    firsts = np.cumsum([0, *LENGTHS[:-1]])
    assert found["test_flagged"][firsts + 2].all()
    assert callback.figures["detection"]["recall"] == 1.0
    assert callback.figures["detection"]["AUROC"] > 0.9
    rows = table(tmp_path / "predictions/score/test.csv")
    assert [row["flagged"] == "1" for row in rows] == found["test_flagged"].tolist()


def test_values_too_large_for_a_score_are_flagged(tmp_path):
    class Broken(Ramps):
        def sequences(self, split):
            found = super().sequences(split)
            for s in found if split != "train" else []:
                s.x[3] = 1e33
            return found

        def anomalies(self, batch):
            return (torch.arange(batch.x.shape[1]) == 3).expand(len(batch), -1)

    found, callback = predict(tmp_path, Broken(), task="score", quantile=0.1, shown=0)
    fourths = np.cumsum([0, *LENGTHS[:-1]]) + 3
    assert not np.isfinite(found["test_values"][fourths]).any()
    assert found["test_flagged"][fourths].all()
    assert math.isfinite(callback.task.threshold)
    assert callback.figures["detection"]["AUROC"] == 1.0
    assert callback.figures["detection"]["recall"] == 1.0


def test_seasonal_naive_repeats_what_was(tmp_path):
    naive, error = seasonal_naive(torch.arange(6.0)[:, None], steps=4, season=3)
    assert naive.ravel().tolist() == [3.0, 4.0, 5.0, 3.0]
    assert error.tolist() == [3.0]
    naive, error = seasonal_naive(torch.zeros(2, 1), steps=4, season=3)
    assert naive.isnan().all()
    assert error.isnan().all()
    _, callback = predict(tmp_path, task="forecast", prefix=3, samples=2, season=2)
    errors = [abs(x[t] - x[1 + (t - 3) % 2]) for x in (s.x for s in Ramps().split("test")) for t in range(3, len(x))]
    assert callback.figures["seasonal naive"]["CRPS"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_forecasts_beyond_the_data(tmp_path):
    found, callback = predict(tmp_path, task="forecast", steps=3, samples=2)
    assert found["test_lengths"].tolist() == [3] * 8
    assert found["test_start"].tolist() == [length for length in LENGTHS for _ in range(2)]
    assert np.isnan(found["test_truth"]).all()
    assert callback.figures == {}


@pytest.mark.parametrize("hide", [None, 0.5])
def test_imputations_keep_what_was_observed(tmp_path, hide):
    found, callback = predict(tmp_path, Ramps(gaps=True), task="impute", samples=4, hide=hide, gap=2)
    every = zip(pieces(found, copies=4), pieces(found, "test_drawn", 4), pieces(found, "test_truth", 4), strict=True)
    for s, (copies, drawn, truth) in zip(Ramps(gaps=True).split("test"), every, strict=True):
        draws = copies.reshape(4, len(s.x), 2)
        assert (np.isnan(truth) == ~s.observed.numpy()).all()
        assert drawn[~s.observed.numpy()].all()
        np.testing.assert_allclose(
            draws[:, ~drawn], np.broadcast_to(s.x.numpy()[~drawn], (4, (~drawn).sum())), rtol=1e-6
        )
        assert np.isfinite(draws).all()
        assert (draws.std(0)[drawn] > 0).all()
        if hide is None:
            assert (drawn == ~s.observed.numpy()).all()
        else:
            pairs = [drawn[t : t + 2].all() for t in range(0, len(s.x), 2)]
            assert sum(pairs) >= round(hide * len(s.x) / 2), "whole gaps"
    assert (callback.figures == {}) == (hide is None)


def test_samples_need_no_data_and_are_the_same_in_any_number_of_processes(tmp_path):
    found, _ = predict(tmp_path, task="sample", count=GROUP + 2, steps=6, shown=1)
    assert found["test_lengths"].tolist() == [6] * (GROUP + 2)
    assert found["test_names"][-1] == f"sample {GROUP + 1}"
    assert (tmp_path / "predictions/sample/test.png").stat().st_size > 1000
    again, _ = predict(tmp_path, task="sample", count=GROUP + 2, steps=6)
    assert (again["test_values"] == found["test_values"]).all()
    wholes = list(Draws(GROUP + 2, 2, SimpleNamespace(world_size=1, global_rank=0)))
    shares = [list(Draws(GROUP + 2, 2, SimpleNamespace(world_size=2, global_rank=rank))) for rank in range(2)]
    assert [batch.names for share in shares for batch in share] == [batch.names for batch in wholes]
    uneven = [list(Draws(1, 2, SimpleNamespace(world_size=2, global_rank=rank))) for rank in range(2)]
    assert [len(batch) for share in uneven for batch in share] == [1, 0], "as many batches in each process"


def test_sound_is_written_as_sound(tmp_path):
    class Tones(Ramps):
        modality = "audio"
        sample_rate = 8000
        full_scale = 2000.0

    predict(tmp_path, Tones(gaps=True), task="reconstruct", shown=2)
    folder = tmp_path / "predictions/reconstruct"
    names = [f"test_{row}_{i}.wav" for row in ("real", "reconstructed") for i in range(2)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "test.npz", "test.png"])
    wave, rate = soundfile.read(folder / "test_real_0.wav")
    assert rate == 8000
    assert wave[:2] == pytest.approx(Ramps().split("test")[0].x[0].numpy() / 2000, abs=1e-3)
    assert (wave[2:6] == 0).all(), "what is missing is silent"


@pytest.mark.parametrize(
    ("modality", "width", "suffixes"), [("strokes", 3, ("svg", "gif")), ("roll", 88, ("mid", "wav"))]
)
def test_strokes_are_drawn_and_rolls_can_be_played(tmp_path, modality, width, suffixes):
    if "mid" in suffixes:
        pytest.importorskip("mido")
    callback = Predictions("sample", steps=5, count=2)
    callback.data = SimpleNamespace(modality=modality)
    trainer = Trainer(
        default_root_dir=tmp_path, callbacks=[callback], logger=False, accelerator="cpu", enable_progress_bar=False
    )
    module = VRNNLightningModule(num_features=width, latent_size=2, hidden_size=4)
    module.is_initialized.fill_(True)
    trainer.predict(module, dataloaders=Draws(2, width, trainer), return_predictions=False)
    names = {path.name for path in (tmp_path / "predictions/sample").iterdir()}
    assert names == {"test.npz", "test.png", *(f"test_sampled_{i}.{suffix}" for suffix in suffixes for i in range(2))}


def test_a_sequence_with_nothing_observed_is_left_out(tmp_path):
    class Partly(Ramps):
        def sequences(self, split):
            found = super().sequences(split)
            found[1].observed[:] = False
            return found

    found, callback = predict(tmp_path, Partly(), task="impute", samples=2, hide=0.3)
    assert callback.skipped == 1
    assert len(found["test_names"]) == 6


def test_sequences_of_one_step_one_at_a_time(tmp_path):
    class Short(Ramps):
        def sequences(self, split):
            return [SequenceSample(s.x[:1], s.observed[:1], None, s.name) for s in super().sequences(split)]

    for task in ("encode", "reconstruct", "score"):
        found, _ = predict(tmp_path, Short(batch_size=1), task=task)
        assert found["test_lengths"].tolist() == [1] * 4
        assert np.isfinite(found["test_values"]).all()
    found, _ = predict(tmp_path, Short(batch_size=1), task="forecast", prefix=1, steps=2, samples=3)
    assert found["test_lengths"].tolist() == [2] * 12
    with pytest.raises(UserError, match="prefix 1: no test sequence has something to forecast from and to"):
        predict(tmp_path, Short(batch_size=1), task="forecast", prefix=1)


@pytest.mark.parametrize("options", [{"latent_size": 0}, {"smoothing": True}, {"layers": 2, "cell": "lstm"}])
def test_each_task_of_other_models(tmp_path, options):
    """A smoothing model has no filter whose particles could score a step; it says so."""
    module, data = model(**options), Ramps(gaps=True)
    width = options.get("latent_size", 2)
    for task, more, columns in (
        ("encode", {}, width),
        ("sample", {"count": 2, "steps": 3}, 2),
        ("reconstruct", {}, 2),
        ("score", {}, 1),
        ("forecast", {"prefix": 3, "steps": 2, "stride": 2, "samples": 3}, 2),
        ("impute", {"samples": 3, "hide": 0.3}, 2),
    ):
        found, _ = predict(tmp_path, data, module, task=task, **more)
        assert found["test_values"].shape[1] == columns
        assert np.isfinite(found["test_values"]).all()
    if "smoothing" in options:
        with pytest.raises(UserError, match="a smoothing model can't follow a stream"):
            predict(tmp_path, data, module, task="score", samples=3)


def test_a_full_disk_while_a_picture_is_drawn(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full(figure, path, **_):
        Path(path).write_text("a part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(UserError, match=r"test.png: No space left on device"):
        predict(tmp_path, task="reconstruct", shown=2)
    names = {path.name for path in (tmp_path / "predictions/reconstruct").iterdir()}
    assert names == {"test.npz", "test.csv"}


def test_a_debugging_run_leaves_nothing(tmp_path):
    trainer = Trainer(
        default_root_dir=tmp_path,
        callbacks=[Predictions("reconstruct")],
        fast_dev_run=True,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
    )
    trainer.predict(model(), datamodule=Ramps(), return_predictions=False)
    assert not list(tmp_path.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_fails_changes_nothing_of_an_earlier_prediction(tmp_path, monkeypatch):
    """The archive is joined last; where that fails, nothing new takes an old one's place."""
    options = {"task": "forecast", "prefix": 3, "samples": 4}
    predict(tmp_path, **options, shown=1)
    folder = tmp_path / "predictions/forecast"
    before = contents(folder)
    assert before.keys() == {"test.npz", "test.csv", "test.png", "figures.json", "lead_times.csv"}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", full)
        with pytest.raises(UserError, match="No space left"):
            predict(tmp_path, **options, seed=1)
    with pytest.raises(UserError, match="no test sequence has something to forecast"):
        predict(tmp_path, task="forecast", prefix=99)
    assert contents(folder) == before


def test_an_earlier_answer_is_replaced_only_where_that_is_asked_for(tmp_path):
    for task in ({"task": "score"}, {"task": "encode"}):
        (_, callback) = predict(tmp_path, **task, overwrite=False)
        before = callback.path.read_bytes()
        with pytest.raises(
            UserError, match=r"(test|encodings)\.npz: is an earlier answer\. Fix: give --prediction\.over"
        ):
            predict(tmp_path, **task, overwrite=False)
        assert callback.path.read_bytes() == before
        predict(tmp_path, **task)


def test_nothing_of_an_earlier_prediction_stays_beside_a_new_one(tmp_path):
    """Neither its picture and figures, nor archives of more processes; what is none of ours stays."""
    predict(tmp_path, task="forecast", prefix=3, samples=4, shown=1)
    folder = tmp_path / "predictions/forecast"
    for name in ("test_0.npz", "test_1.csv", "test_sampled_0.wav", "notes.txt", "test.txt"):
        (folder / name).write_text("")
    predict(tmp_path, task="forecast", steps=2, samples=4)
    assert contents(folder).keys() == {"test.npz", "test.csv", "notes.txt", "test.txt"}
    for name in ("encodings_1.npz", "figures.json"):
        (tmp_path / name).write_text("")
    predict(tmp_path, task="encode", shown=0)
    assert {path.name for path in tmp_path.iterdir()} == {"encodings.npz", "predictions", "figures.json"}


def test_a_refused_prediction_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="no test sequence has something to forecast"):
        predict(tmp_path / "runs" / "new", task="forecast", prefix=99)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"task": "smple"}, "prediction.task smple: must be one of encode, sample"),
        ({"task": "sample", "count": 0}, "prediction.count 0"),
        ({"task": "sample", "steps": 0}, "prediction.steps 0"),
        ({"task": "sample", "temperature": 0.0}, "prediction.temperature 0"),
        ({"task": "sample", "temperature": math.inf}, "prediction.temperature inf"),
        ({"task": "sample", "seed": -1}, "prediction.seed -1"),
        ({"task": "sample", "shown": 1000}, "prediction.shown 1000: must be at most 64, the sequences of one picture"),
        (
            {"task": "sample", "prefix": 3},
            "prediction.prefix 3: is not an option of the task sample. Fix: leave it out or choose forecast",
        ),
        ({"task": "encode", "seed": 3}, "prediction.seed 3: is not an option of the task encode"),
        ({"task": "forecast"}, "prediction.steps: the forecast has no length. Fix: give"),
        ({"task": "forecast", "prefix": 0}, "prediction.prefix 0: is an empty prefix"),
        ({"task": "forecast", "prefix": 3, "samples": 0}, "prediction.samples 0"),
        ({"task": "forecast", "prefix": 3, "steps": 0}, "prediction.steps 0"),
        ({"task": "forecast", "prefix": 3, "season": 0}, "prediction.season 0"),
        ({"task": "forecast", "prefix": 3, "steps": 2, "stride": 0}, "prediction.stride 0: must be at least 1"),
        ({"task": "forecast", "prefix": 3, "stride": 2}, "prediction.stride 2: needs prediction.steps"),
        ({"task": "forecast", "steps": 3, "stride": 2}, "prediction.stride 2: needs prediction.prefix"),
        (
            {"task": "impute", "stride": 2},
            "prediction.stride 2: is not an option of the task impute. Fix: leave it out or choose forecast",
        ),
        ({"task": "impute", "hide": 1.0}, "prediction.hide 1.0"),
        ({"task": "score", "quantile": 1.0}, "prediction.quantile 1.0"),
        ({"task": "impute", "gap": 0}, "prediction.gap 0"),
        ({"task": "impute", "lag": -1}, "prediction.lag -1"),
        ({"task": "impute", "particles": 7}, "prediction.particles 7: must be at least prediction.samples 100"),
    ],
)
def test_bad_options(options, line):
    with pytest.raises(UserError) as error:
        Predictions(**options)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "options", "line"),
    [
        (Ramps, {"task": "forecast", "prefix": 12}, "prefix 12: no test sequence .* the longest has 12 steps"),
        (Ramps, {"task": "forecast", "prefix": -12}, "prefix -12: no test sequence"),
        (Ramps, {"task": "forecast", "prefix": 8, "steps": 5, "stride": 1}, "prefix 8: no test sequence"),
        (Ramps, {"task": "forecast", "prefix": 3, "season": 13}, "season 13: is longer than the past of every"),
        (lambda: Ramps(nothing=True), {"task": "forecast", "steps": 2}, "forecast: no test sequence has an observed"),
        (
            Ramps,
            {"task": "impute", "samples": 2, "hide": 0.1, "gap": 12},
            "gap 12: leaves nothing to impute from of .* has 12 steps",
        ),
        (lambda: Ramps(nothing=True), {"task": "impute"}, "impute: no test sequence has an observed value"),
    ],
)
def test_data_that_a_task_can_make_nothing_of(tmp_path, data, options, line):
    with pytest.raises(UserError, match=line):
        predict(tmp_path, data(), **options)
    assert not list(tmp_path.iterdir())


def test_covariates_that_nobody_knows(tmp_path):
    with pytest.raises(UserError, match=r"sample: the model reads 1 covariates"):
        predict(tmp_path, module=model(num_inputs=1), task="sample")
    reads = model(num_inputs=1)
    with pytest.raises(UserError, match=r"test, .*covariates, which the data hold for .* steps"):
        predict(tmp_path, Ramps(num_inputs=1), reads, task="forecast", prefix=3, steps=9)
    found, _ = predict(tmp_path, Ramps(num_inputs=1), reads, task="forecast", prefix=3, samples=2)
    assert found["test_lengths"].tolist() == [6, 6, 1, 1, 9, 9, 4, 4]


@pytest.mark.parametrize("task", ["encode", "sample", "reconstruct", "score", "impute"])
def test_a_model_that_lost_its_numbers(tmp_path, task):
    module = model()
    with torch.no_grad():
        module.vrnn.decoder.head.linear.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"weights of this model are not numbers.*earlier checkpoint"):
        predict(tmp_path, None, module, task=task)
    assert not list(tmp_path.iterdir())


def test_an_untrained_model_can_not_sample(tmp_path):
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[Predictions("sample")], logger=False, accelerator="cpu")
    with pytest.raises(UserError, match="no scaler, as it was never trained"):
        trainer.predict(model(), dataloaders=Draws(2, 2, trainer), return_predictions=False)


def test_weights_of_another_training():
    old = model()
    old.vrnn.init_from_statistics(torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0]))
    old.scale_mean.fill_(7.0)
    new = VRNNLightningModule(num_features=2, latent_size=2, hidden_size=4, missing=True)
    new.init_from(old.state_dict())
    pairs = zip(new.vrnn.state_dict().values(), old.vrnn.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert new.vrnn.input_mean.tolist() == [3.0, 4.0]
    assert new.scale_mean.tolist() == [0.0, 0.0], "the new data bring their own scaler"
    with pytest.raises(UserError, match=r"^vrnn.phi_x.0.weight: shape .* there, shape .* here"):
        model(phi_x=MLPConfig(width=3)).init_from(old.state_dict())
    with pytest.raises(UserError, match=r"^vrnn.cells.1.* none there, shape .* here"):
        model(layers=2).init_from(old.state_dict())


PLUGIN = """
from pathlib import Path

import torch
from vrnn_lightning import SequenceSample, SequenceDataModule, UserError


class Numbered(SequenceDataModule):
    scaling = "per_feature"

    def __init__(self, root: str = "numbers.txt", batch_size: int = 2, offset: float = 0.0) -> None:
        super().__init__(1, batch_size=batch_size)
        self.root, self.offset = root, offset

    def sequences(self, split):
        if not Path(self.root).is_file():
            raise UserError(f"--data.root {self.root}: no such file")
        draws = torch.randn(4, 6, 1, generator=torch.Generator().manual_seed(0))
        return [SequenceSample(100.0 + self.offset + x, name=f"{split} {i}") for i, x in enumerate(draws)]
"""
QUICK = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def test_command_line(lightning, folder):
    """Samples without data, a forecast from another path, and a fit that starts from weights alone."""
    (folder / "datamodules").mkdir()
    (folder / "datamodules" / "numbered.py").write_text(PLUGIN)
    numbers = folder / "numbers.txt"
    numbers.write_text("")
    fit = ("fit", "--data=Numbered", *QUICK, "--trainer.max_epochs=1", "--samples.every_n_validations=0")
    assert lightning(*fit, "--model.hidden_size=4", "--model.latent_size=2").code == 0
    best = "runs/numbered/version_0/checkpoints/best.ckpt"
    numbers.rename("moved.txt")
    own = ("--data=Numbered", *QUICK)  # the checkpoint alone may not name a file of the working directory
    said = lightning("predict", "--ckpt_path", best, "--prediction.task=sample", "--prediction.count=3", *own)
    assert said.code == 0, said.err
    written = Path("runs/numbered/version_0/predictions/sample")
    assert f"sample: {written}/test.npz" in said.out
    with np.load(written / "test.npz") as found:
        assert found["test_values"].shape == (300, 1)
        assert abs(found["test_values"].mean() - 100) < 10, "data units"
    task = ("predict", "--ckpt_path", best, "--prediction.task=forecast", "--prediction.prefix=4", *own)
    assert "no such file" in lightning(*task).err
    said = lightning(*task, "--data.root=moved.txt")
    assert said.code == 0, said.err
    assert "RMSE" in said.out

    start = (*fit, "--data.root=moved.txt", "--data.offset=50", "--init_from", best)
    said = lightning(*start, "--model.optimizer.lr=0")
    assert said.code == 0, said.err
    old, new = (torch.load(f"runs/numbered/version_{i}/checkpoints/last.ckpt", weights_only=True) for i in (0, 1))
    for name, value in new["state_dict"].items():
        if name.startswith("vrnn."):
            assert torch.equal(value, old["state_dict"][name]), name
    assert new["state_dict"]["scale_mean"] - old["state_dict"]["scale_mean"] == pytest.approx(50, abs=1e-3)
    assert new["global_step"] == 2
    for words, line in (
        (["--model.hidden_size=5"], f"error: --init_from {best}: vrnn."),
        (["--init_from=gone.ckpt"], "error: --init_from gone.ckpt: no such file"),
        (["--ckpt_path", best], f"error: --init_from {best}: --ckpt_path continues a run"),
    ):
        said = lightning(*start, *words)
        assert said.code == 1
        assert said.err.strip().splitlines()[-1].startswith(line)

    torch.save({**old, "state_dict": {k: v for k, v in old["state_dict"].items() if k != "scale_mean"}}, "bare.ckpt")
    said = lightning("predict", "--ckpt_path=bare.ckpt", "--prediction.task=sample", *QUICK)
    assert said.err.strip().splitlines()[-1].startswith("error: --ckpt_path bare.ckpt: holds no scaler")
    said = lightning("predict", "--ckpt_path", best, "--prediction.task=smple", *own)
    assert said.code == 2
    assert said.err.strip().splitlines()[-1].startswith("error: --prediction.task smple: choose encode")


def sensor(path: Path, steps: int = 400) -> dict[str, np.ndarray]:
    """Write an hourly series of two columns with faults planted into its last tenth, and what says where they are."""
    generator = np.random.default_rng(0)
    t = np.arange(steps)
    broken = (t >= 360) & (generator.random(steps) < 0.2)
    heat = 20 + 5 * np.sin(2 * np.pi * t / 24) + generator.normal(0, 0.3, steps) + 30 * broken
    columns = {"heat": heat.round(4), "load": (1000 + 50 * generator.normal(size=steps)).round(3), "broken": broken * 1}
    dates = np.datetime64("2024-03-01T00") + t.astype("timedelta64[h]")
    lines = (",".join(map(str, row)) for row in zip(dates, *columns.values(), strict=True))
    path.write_text("\n".join(["date,heat,load,broken", *lines]))
    return columns


def test_a_table_is_backtested_and_its_faults_are_found(lightning, folder):
    """Through the command line, from what a user has: one csv file with a column of labels."""
    columns = sensor(folder / "sensor.csv")
    fit = (
        *("fit", "--data=Tables", "--data.root=sensor.csv", "--data.columns=[heat,load]", "--data.time=date"),
        *("--data.length=24", "--data.anomaly=broken", "--trainer.max_epochs=3", "--samples.every_n_validations=0"),
        *("--model.hidden_size=8", "--model.latent_size=2", *QUICK),
    )
    said = lightning(*fit)
    assert said.code == 0, said.err
    run, test = Path("runs/tables/version_0"), slice(360, 400)
    predict = ("predict", f"--ckpt_path={run}/checkpoints/best.ckpt", "--data.length=null", *QUICK)
    said = lightning(*predict, "--prediction.task=score", "--prediction.quantile=0.05")
    assert said.code == 0, said.err
    rows, faulty = table(run / "predictions/score/test.csv"), columns["broken"][test] == 1
    nats = np.array([float(row["nats"]) for row in rows])
    flagged = np.array([row["flagged"] == "1" for row in rows])
    assert len(nats) == len(faulty) == 40
    pairs = (nats[faulty][:, None] < nats[~faulty]) + (nats[faulty][:, None] == nats[~faulty]) / 2
    figures = {"precision": faulty[flagged].mean(), "recall": flagged[faulty].mean(), "AUROC": pairs.mean()}
    assert f"detection: {', '.join(f'{name} {value:.4g}' for name, value in figures.items())}" in said.out
    assert figures["AUROC"] > 0.9

    forecast = ("--prediction.task=forecast", "--prediction.samples=4", "--prediction.shown=0")
    backtest = (*forecast, "--prediction.prefix=48", "--prediction.steps=6", "--prediction.stride=6")
    said = lightning(*predict, *backtest, "--prediction.season=24", "--data.context=48")
    assert said.code == 0, said.err
    assert "seasonal naive: RMSE" in said.out
    rows = table(run / "predictions/forecast/test.csv")
    origins = list(range(48, 48 + 40 - 5, 6))
    assert [int(row["step"]) for row in rows] == [origin + ahead for origin in origins for ahead in range(6)]
    for row in rows:
        assert row["sequence"] == "sensor from 2024-03-14 00:00:00"  # row 312, 48 hours before the test
        assert float(row["heat_true"]) == pytest.approx(columns["heat"][312 + int(row["step"])], abs=1e-4)
    for words, line in (
        (("--data.length=24", *backtest), "prediction.prefix 48: no test sequence has something to forecast from"),
        ((*forecast, "--prediction.prefix=12", "--prediction.season=30"), "prediction.season 30: is longer than"),
    ):
        said = lightning(*predict, *words, "--prediction.overwrite=true")
        assert said.code == 1
        assert said.err.strip().splitlines()[-1].startswith(f"error: {line}")
