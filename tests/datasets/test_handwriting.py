"""Pen strokes from a flat archive."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from vrnn_lightning.datamodules.handwriting import Handwriting

from vrnn_lightning import VRNNLightningModule
from vrnn_lightning.callbacks import Samples
from vrnn_lightning.callbacks.media import Media
from vrnn_lightning.callbacks.pictures import on_paper
from vrnn_lightning.errors import UserError
from vrnn_lightning.heads import Pen
from vrnn_lightning.testing import CHECKS

SIZES = {"train": 17, "valid": 6, "test": 7}
SPLITS = ("train", "val", "test")
FORMS = {
    "trainset": ["a01-000u", "a01-001", "b02-003z"],
    "testset_v": ["a01-000"],
    "testset_f": ["c03-010x", "c03-011"],
}


def drawing(seed: int) -> list[np.ndarray]:
    """Return strokes of whole numbers; the second is a dot."""
    generator = np.random.default_rng(seed)
    sizes = [2 + seed % 4, 1, 3]
    return [generator.integers(0, 500, (size, 2)) for size in sizes]


def rows_of(strokes: list[np.ndarray]) -> np.ndarray:
    """Return rows (dx, dy, lift) in the slowest, plainest way."""
    points = [(x, y, i + 1 == len(stroke)) for stroke in strokes for i, (x, y) in enumerate(stroke.tolist())]
    return np.array([(x - a, y - b, lift) for (a, b, _), (x, y, lift) in itertools.pairwise(points)])


def iam(path: Path, strokes: list[np.ndarray]) -> Path:
    """Write a file as the database has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    points = ["".join(f'<Point x="{x}" y="{y}" time="0.1"/>\n' for x, y in stroke.tolist()) for stroke in strokes]
    body = "".join(f'<Stroke colour="black" start_time="1.0" end_time="2.0">\n{text}</Stroke>\n' for text in points)
    path.write_text(
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<WhiteboardCaptureSession>\n<WhiteboardDescription>\n'
        '<SensorLocation corner="top_left"/>\n</WhiteboardDescription>\n<StrokeSet>\n'
        f"{body}</StrokeSet>\n</WhiteboardCaptureSession>\n"
    )
    return path


def line_file(root: Path, form: str, line: int) -> Path:
    place = form.rstrip("uxz")
    return root / "lineStrokes" / place[:3] / place / f"{form}-{line:02}.xml"


def inkml(path: Path, strokes: list[np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    traces = ["<trace>" + ", ".join(f"{x} {y}" for x, y in stroke.tolist()) + "</trace>" for stroke in strokes]
    path.write_text(f'<ink xmlns="http://www.w3.org/2003/InkML">{"".join(traces)}</ink>')
    return path


def quickdraw(path: Path, drawings: dict[str, list[np.ndarray]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"word": "cat", "key_id": key, "recognized": True, "drawing": [stroke.T.tolist() for stroke in strokes]}
        for key, strokes in drawings.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sketch_rnn(path: Path, **splits: list) -> Path:
    arrays = {}
    for split, drawings in splits.items():
        arrays[split] = np.empty(len(drawings), dtype=object)
        arrays[split][:] = drawings
    np.savez_compressed(path, **arrays)
    return path


@pytest.fixture
def iam_tree(tmp_path) -> Path:
    """Ten lines of six forms, one of which no list names, and lists with stray blanks in a folder of their own."""
    root = tmp_path / "iam"
    for i, (form, lines) in enumerate([(form, 1 + (form != "a01-000")) for f in FORMS.values() for form in f]):
        for line in range(1, lines + 1):
            iam(line_file(root, form, line), drawing(10 * i + line))
    iam(line_file(root, "a01-000x", 1), drawing(99))
    (root / "task1").mkdir()
    for name, forms in FORMS.items():
        (root / "task1" / f"{name}.txt").write_text(
            "\ufeff\n " + " \r\n\t".join(forms) + "  \r\n\r\n", encoding="utf-8"
        )
    (root / "task1" / "testset_t.txt").write_text("a01-000x \n")
    return root


@pytest.fixture
def sources(tmp_path, iam_tree) -> dict[str, Path]:
    """Small data of every layout that is not a flat archive."""
    inkmls, drawn = tmp_path / "inkml", tmp_path / "quickdraw"
    for i in range(14):
        inkml(inkmls / f"writer{i % 3}" / f"{i}.inkml", drawing(i))
    quickdraw(drawn / "cat.ndjson", {str(100 + i): drawing(i) for i in range(11)})
    quickdraw(drawn / "dog.ndjson", {str(100 + i): drawing(50 + i) for i in range(5)})
    objects = [rows_of(drawing(i)).astype(np.int16) for i in range(30)]
    sketches = sketch_rnn(tmp_path / "sketch.npz", train=objects[:17], valid=objects[17:23], test=objects[23:])
    return {"iam": iam_tree, "inkml": inkmls, "quickdraw": drawn, "sketch-rnn": sketches}


def found(root: Path, split: str = "train", **options) -> dict[str, np.ndarray]:
    """Return the sequences of a split by name."""
    sequences = Handwriting(str(root), **options).split(split)
    return {s.name: s.x.numpy() for s in (sequences[i] for i in range(len(sequences)))}


def refused(root: Path, *patterns: str, stage: str = "fit", **options) -> None:
    """Check that setup ends in one line that holds all patterns."""
    with pytest.raises(UserError) as caught:
        Handwriting(str(root), **options).setup(stage)
    message = str(caught.value)
    assert "\n" not in message
    for pattern in patterns:
        assert re.search(pattern, message), message


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture
def archive(tmp_path) -> Path:
    """Thirty short scribbles in whole numbers."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, size in SIZES.items():
        lengths = generator.integers(1, 9, size)
        offsets = generator.normal(3, 40, (lengths.sum(), 2))
        lift = generator.random((lengths.sum(), 1)) < 0.3
        arrays[f"{split}_values"] = np.hstack([offsets, lift]).astype(np.int16)
        arrays[f"{split}_lengths"] = lengths
    np.savez(tmp_path / "strokes.npz", **arrays)
    return tmp_path / "strokes.npz"


@pytest.mark.parametrize("max_steps", [None, 5])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, max_steps, archive):
    check(lambda **options: Handwriting(str(archive), max_steps, **options))


@pytest.mark.parametrize("layout", ["iam", "inkml", "quickdraw", "sketch-rnn"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_layouts(check, layout, sources):
    check(lambda **options: Handwriting(str(sources[layout]), **options))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_options(check, archive):
    options = {"max_steps": 3, "too_long": "split", "clip": 50, "smooth": 3, "augment": 0.2, "scale": "per_axis"}
    check(lambda **more: Handwriting(str(archive), window=2, **options, **more))


def test_construction_opens_no_file():
    data = Handwriting("nowhere.npz")
    assert data.num_features == 3
    with pytest.raises(UserError, match=r"--data.root nowhere.npz: no such file"):
        data.setup("fit")


def test_both_offsets_share_a_scale_and_lift_has_none(archive):
    data = Handwriting(archive)
    offsets = np.load(archive)["train_values"][:, :2].astype(float)
    assert data.scaler.mean.tolist() == pytest.approx([offsets.mean(), offsets.mean(), 0])
    assert data.scaler.std.tolist() == pytest.approx([offsets.std(), offsets.std(), 1])
    batch = next(iter(data.val_dataloader()))
    assert set(batch.x[..., 2].unique().tolist()) == {0.0, 1.0}


def test_a_dot_has_a_scale(tmp_path):
    dots = {f"{split}_values": np.array([[5, 5, 1]]) for split in SIZES}
    np.savez(tmp_path / "dots.npz", **dots, **{f"{split}_lengths": np.array([1]) for split in SIZES})
    assert Handwriting(tmp_path / "dots.npz").scaler.std.tolist() == [1, 1, 1]


def test_long_sequences_are_left_out_of_training_alone(archive):
    all_of_them, some = Handwriting(archive), Handwriting(archive, max_steps=5)
    assert max(all_of_them.lengths("train")) > 5
    assert some.lengths("train") == [n for n in all_of_them.lengths("train") if n <= 5]
    assert some.lengths("val") == all_of_them.lengths("val")
    kept = torch.cat([some.split("train")[i].x[:, :2] for i in range(len(some.split("train")))]).double()
    assert float(some.scaler.mean[0]) == pytest.approx(kept.mean().item())
    assert float(some.scaler.std[0]) == pytest.approx(kept.std(correction=0).item())


@pytest.mark.parametrize("max_steps", [0, -3])
def test_max_steps_is_at_least_1(max_steps):
    with pytest.raises(UserError, match=f"--data.max_steps {max_steps}: must be at least 1"):
        Handwriting("nowhere.npz", max_steps)


def test_no_sequence_that_is_short_enough(archive):
    arrays = dict(np.load(archive))
    np.savez(archive, **arrays | {"train_lengths": np.array([len(arrays["train_values"])])})
    with pytest.raises(UserError, match=r"--data.max_steps 2: all training sequences of .* are longer, the shortest"):
        Handwriting(archive, max_steps=2).setup("fit")


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0])
def test_a_lift_that_is_neither_0_nor_1(archive, value):
    arrays = dict(np.load(archive))
    values = arrays["train_values"].astype(np.float32)
    values[0, 2] = value
    np.savez(archive, **arrays | {"train_values": values})
    message = f"{archive}: train_values holds {value} at train 0, step 0, feature 2. Fix: write rows (dx, dy, lift)"
    with pytest.raises(UserError, match=re.escape(message)):
        Handwriting(archive).setup("fit")


@pytest.mark.skipif("VRNN_DATA" not in os.environ, reason="VRNN_DATA names no folder with handwriting")
@pytest.mark.parametrize(
    ("file", "sizes", "scale"),
    [
        ("handwriting_kanji/short_kanji.npz", [10000, 600, 500], 99.7),
        ("handwriting_omniglot/omniglot_rdp.npz", [30000, 1000, 1000], 53.4),
    ],
)
def test_real_strokes(file, sizes, scale):
    data = Handwriting(Path(os.environ["VRNN_DATA"]) / file)
    data.setup("fit")
    assert [len(data.split(split)) for split in ("train", "val", "test")] == sizes
    assert float(data.scaler.std[0]) == pytest.approx(scale, abs=0.1)
    batch = next(iter(data.val_dataloader()))
    assert float(batch.x[batch.mask][:, :2].std()) == pytest.approx(1, abs=0.3)


@pytest.mark.skipif("VRNN_DATA" not in os.environ, reason="VRNN_DATA names no folder with handwriting")
def test_velocities_and_forces_are_no_strokes():
    path = Path(os.environ["VRNN_DATA"]) / "handwriting_chartraj" / "chartraj.npz"
    with pytest.raises(UserError, match=r"chartraj.npz: train_values holds 0.50\d+ at train 0, step 0, feature 2"):
        Handwriting(path).setup("fit")


class TestLayouts:
    def test_iam(self, iam_tree):
        """Each list's forms and no other's, though names begin alike; values from known points."""
        train = found(iam_tree)
        assert list(train) == [
            f"lineStrokes/{form[:3]}/{form[:7]}/{form}-0{line}.xml" for form in FORMS["trainset"] for line in (1, 2)
        ]
        np.testing.assert_array_equal(train["lineStrokes/a01/a01-001/a01-001-02.xml"], rows_of(drawing(12)))
        assert list(found(iam_tree, "val")) == ["lineStrokes/a01/a01-000/a01-000-01.xml"]
        assert [Path(name).stem for name in found(iam_tree, "test")] == [
            "c03-010x-01", "c03-010x-02", "c03-011-01", "c03-011-02"
        ]  # fmt: skip

    @pytest.mark.parametrize("split", SPLITS)
    def test_the_second_validation_set(self, iam_tree, split):
        second = "lineStrokes/a01/a01-000/a01-000x-01.xml"
        assert all(second not in found(iam_tree, part) for part in SPLITS)
        assert [part for part in SPLITS if second in found(iam_tree, part, testset_t=split)] == [split]

    def test_inkml_and_quickdraw(self, sources):
        for layout, names, number in (
            ("inkml", {f"writer{i % 3}/{i}.inkml" for i in range(14)}, lambda name: int(Path(name).stem)),
            (
                "quickdraw",
                {f"cat.ndjson {100 + i}" for i in range(11)} | {f"dog.ndjson {100 + i}" for i in range(5)},
                lambda name: int(name[-3:]) - 100 + 50 * name.startswith("dog"),
            ),
        ):
            parts = {split: found(sources[layout], split, val=0.2, test=0.25) for split in SPLITS}
            assert set().union(*parts.values()) == names
            assert sum(map(len, parts.values())) == len(names)
            assert [len(parts[split]) for split in SPLITS[1:]] == [round(0.2 * len(names)), round(0.25 * len(names))]
            for name, x in (parts["train"] | parts["val"] | parts["test"]).items():
                np.testing.assert_array_equal(x, rows_of(drawing(number(name))))
            other = found(sources[layout], "test", val=0.2, test=0.25, seed=1)
            assert set(other) != set(parts["test"])

    def test_sketch_rnn(self, sources):
        train = found(sources["sketch-rnn"])
        assert list(train) == [f"train {i}" for i in range(17)]
        for i, x in enumerate(train.values()):
            np.testing.assert_array_equal(x, rows_of(drawing(i)))
        np.testing.assert_array_equal(found(sources["sketch-rnn"], "val")["valid 0"], rows_of(drawing(17)))

    def test_sketch_rnn_whose_drawings_have_one_length(self, tmp_path):
        """numpy makes one array of them, of numbers or of objects."""
        x = np.arange(2 * 4 * 3).reshape(2, 4, 3)
        x[..., 2] = [0, 0, 1, 1]
        for kind in (np.int16, object, np.float64):
            for array in (x, np.asfortranarray(x)):
                np.savez(tmp_path / "a.npz", train=array.astype(kind), valid=x, test=x)
                np.testing.assert_array_equal(list(found(tmp_path / "a.npz").values()), x)

    def test_one_file_of_quickdraw(self, sources):
        names = found(sources["quickdraw"] / "cat.ndjson", val=0, test=0)
        assert list(names) == [f"cat.ndjson {100 + i}" for i in range(11)]

    def test_keys_that_are_given_twice_or_not_at_all(self, tmp_path):
        quickdraw(tmp_path / "a.ndjson", {"7": drawing(0), "8": drawing(1)})
        text = (tmp_path / "a.ndjson").read_text()
        bare = re.sub(r'"key_id": "\d+", ', "", text)
        (tmp_path / "a.ndjson").write_text(text + "\n" + text.splitlines()[0] + "\n" + bare)
        names = ["a.ndjson line 1", "a.ndjson 8", "a.ndjson line 4", "a.ndjson line 5", "a.ndjson line 6"]
        assert list(found(tmp_path, val=0, test=0)) == names

    def test_the_layout_is_found_by_looking(self, sources, archive):
        for layout, root in {**sources, "archive": archive}.items():
            data = Handwriting(str(root))
            assert data._layout == layout
            assert data.pen_starts_down == (layout in ("iam", "inkml", "quickdraw"))
            data.setup("fit")

    def test_drawings_without_a_line_are_left_out(self, tmp_path, caplog):
        dot, line = [np.array([[1, 2]])], [np.array([[1, 2], [3, 4]])]
        quickdraw(tmp_path / "a.ndjson", {"1": dot, "2": line, "3": [], "4": [np.zeros((0, 2))]})
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            assert list(found(tmp_path, val=0, test=0)) == ["a.ndjson 2"]
        assert "3 of 4 drawings (drawing) hold no line, left out" in caplog.text


class TestOptions:
    def test_clip(self, archive, caplog):
        plain, cut = found(archive), None
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            cut = found(archive, clip=30.5)
        count = sum((np.abs(x[:, :2]) > 30.5).sum() for x in plain.values())
        total = sum(x[:, :2].size for x in plain.values())
        assert f"{count} of {total} offsets of the train split are cut to 30.5 (--data.clip)" in caplog.text
        for name, x in plain.items():
            np.testing.assert_array_equal(cut[name][:, :2], x[:, :2].clip(-30.5, 30.5))
            np.testing.assert_array_equal(cut[name][:, 2], x[:, 2])
        assert max(np.abs(x[:, :2]).max() for x in found(archive, "test", clip=30.5).values()) == 30.5

    def test_scales(self, archive):
        offsets = np.load(archive)["train_values"][:, :2].astype(float)
        offsets[:, 1] *= 9
        values = dict(np.load(archive)) | {"train_values": np.load(archive)["train_values"] * [1, 9, 1]}
        np.savez(archive, **values)
        each = Handwriting(archive, scale="per_axis").scaler
        assert each.mean.tolist() == pytest.approx([*offsets.mean(0), 0])
        assert each.std.tolist() == pytest.approx([*offsets.std(0), 1])
        shared = Handwriting(archive).scaler
        assert shared.std.tolist() == pytest.approx([offsets.std(), offsets.std(), 1])
        none = Handwriting(archive, scale="none").scaler
        assert (none.mean.tolist(), none.std.tolist()) == (0.0, 1.0)

    def test_smooth_reads_points_within_strokes_alone(self, tmp_path):
        """Zigzag strokes of five points far apart, the first beginning at the origin."""
        zigzag = np.array([[0, 0], [2, 6], [4, 0], [6, 6], [8, 0]])
        quickdraw(tmp_path / "a.ndjson", {"1": [zigzag, zigzag + 1000]})
        smooth = np.array([[0, 0], [2, 2], [4, 4], [6, 2], [8, 0]])
        (x,) = found(tmp_path, val=0, test=0, smooth=3).values()
        np.testing.assert_allclose(x, rows_of([smooth, smooth + 1000]))

    def test_too_long_split(self, archive, caplog):
        whole = found(archive)
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            pieces = found(archive, max_steps=3, too_long="split")
        longer = {name: x for name, x in whole.items() if len(x) > 3}
        count = len(pieces) - (len(whole) - len(longer))
        message = f"{len(longer)} of 17 training sequences are longer than 3 steps and are cut into {count} pieces"
        assert message in caplog.text
        assert max(map(len, pieces.values())) <= 3
        for name, x in whole.items():
            own = {key: piece for key, piece in pieces.items() if key.partition(" from")[0] == name}
            assert len(own) == -(-len(x) // 3)
            begins = np.cumsum([0, *map(len, own.values())])[:-1]
            assert list(own) == [name if begin == 0 else f"{name} from step {begin}" for begin in begins]
            np.testing.assert_array_equal(np.concatenate(list(own.values())), x)
            assert np.ptp([len(piece) for piece in own.values()]) <= 1
        assert found(archive, "val", max_steps=3, too_long="split").keys() == found(archive, "val").keys()
        assert max(map(len, found(archive, "val", max_steps=3, too_long="split").values())) > 3

    def test_too_long_drop_says_how_many(self, archive, caplog):
        longer = sum(len(x) > 5 for x in found(archive).values())
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            found(archive, max_steps=5)
        message = f"{longer} of 17 training sequences are longer than 5 steps and are left out (--data.too_long drop)"
        assert message in caplog.text

    def test_augment_stretches_training_alone(self, archive):
        """By a factor for each sequence and axis, in the range, redrawn every epoch, known by seed and epoch."""
        plain, data = found(archive), Handwriting(str(archive), augment=0.25)
        assert torch.equal(data.scaler.std, Handwriting(str(archive)).scaler.std)
        factors = {}
        for epoch in (0, 1, 7):
            sequences = data.split("train").in_epoch(epoch)
            again = Handwriting(str(archive), augment=0.25).split("train").in_epoch(epoch)
            other = Handwriting(str(archive), augment=0.25, seed=1).split("train").in_epoch(epoch)
            assert all(torch.equal(sequences[i].x, again[i].x) for i in range(17))
            assert not any(torch.equal(sequences[i].x, other[i].x) for i in range(17))
            factors[epoch] = []
            for s in (sequences[i] for i in range(17)):
                stretched, x = s.x.numpy(), plain[s.name]
                np.testing.assert_array_equal(stretched[:, 2], x[:, 2])
                total = np.abs(stretched[:, :2]).sum(0) / np.abs(x[:, :2]).sum(0)
                np.testing.assert_allclose(stretched[:, :2], x[:, :2] * total, rtol=1e-5)
                factors[epoch].append(total)
        drawn = np.array(list(factors.values()))
        assert drawn.min() >= 0.75
        assert drawn.max() <= 1.25
        assert len(np.unique(drawn.round(6))) == drawn.size
        assert np.ptp(drawn) > 0.4
        for split in ("val", "test"):
            for name, x in found(archive, split, augment=0.25).items():
                np.testing.assert_array_equal(x, found(archive, split)[name])

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("clip", 0, "must be positive, in data units"),
            ("clip", float("nan"), "must be positive"),
            ("clip", float("inf"), "must be positive"),
            ("smooth", 2, "must be an odd number of points, at least 1"),
            ("smooth", 0, "must be an odd number of points"),
            ("augment", 1.0, "must lie in [0, 1)"),
            ("augment", -0.1, "must lie in [0, 1)"),
            ("val", 1.5, "must lie in [0, 1)"),
            ("test", -1, "must lie in [0, 1)"),
            ("scale", "std", "must be one of shared, per_axis, none"),
            ("too_long", "cut", "must be one of drop, split"),
            ("layout", "xml", "must be one of auto, archive, sketch-rnn, quickdraw, inkml, iam"),
            ("testset_t", "all", "must be one of none, train, val, test"),
        ],
    )
    def test_refusals(self, option, value, message):
        with pytest.raises(UserError, match=f"--data.{option} {value}: {re.escape(message)}"):
            Handwriting("nowhere.npz", **{option: value})

    def test_fractions_that_leave_nothing(self):
        with pytest.raises(UserError, match=r"--data.val 0.5 and --data.test 0.5: leave nothing to train on"):
            Handwriting("nowhere.npz", val=0.5, test=0.5)


@pytest.mark.parametrize("layout", ["quickdraw", "sketch-rnn"])
def test_samples_are_drawn(layout, sources, tmp_path):
    """As svg files too; the first line begins at the origin where the data's rows begin with a line."""
    data = Handwriting(str(sources[layout]), val=0.3, batch_size=4)
    module = VRNNLightningModule(num_features=3, latent_size=2, hidden_size=4, emission=Pen)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        limit_train_batches=1,
        callbacks=[Samples(count=2)],
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    ).fit(module, data)
    written = {p.name.removeprefix("step_0000001") for p in (tmp_path / "samples").iterdir()}
    rows = {f"_{row}_{i}.svg" for row in ("real", "reconstructed", "sampled") for i in (0, 1)}
    assert {name for name in written if name.endswith(".svg")} == rows
    assert {name for name in written if name.endswith(".gif")} == {"_sampled_0.gif", "_sampled_1.gif"}
    assert {".png", "_latent.png", "_traversal.png", "_interpolation.png", "_table.csv"} <= written
    batch = next(iter(data.val_dataloader()))
    for i in (0, 1):
        x = data.scaler.unscale(batch.x[i])[: batch.lengths[i]]
        ElementTree.parse(tmp_path / "samples" / f"step_0000001_real_{i}.svg")
        (shown,) = Media(data).to_display({"real": [x]})["real"]
        assert torch.equal(shown, on_paper(x) if layout == "quickdraw" else x)


class TestCheckpoints:
    """Splits that are drawn are those of the checkpoint."""

    @pytest.mark.parametrize("layout", ["inkml", "quickdraw"])
    def test_what_was_trained_on_is_never_tested(self, layout, sources):
        root = sources[layout]
        trained = Handwriting(str(root))
        trained.setup("fit")
        state = through_a_file(trained.state_dict())
        before = {split: set(found(root, split)) for split in SPLITS}
        if layout == "inkml":
            for i in range(20, 40):
                inkml(root / f"{i}.inkml", drawing(i))
        else:
            quickdraw(root / "ant.ndjson", {str(i): drawing(i) for i in range(20)})
        later = Handwriting(str(root))
        later.setup("test")
        later.load_state_dict(state)
        with pytest.warns(UserWarning, match="20 sequences that are in no split of the checkpoint are left out"):
            names = {split: {s.name for s in map(later.split(split).__getitem__, range(len(later.split(split))))}
                     for split in SPLITS}  # fmt: skip
        assert names == before
        assert set(found(root, "test")) != before["test"]  # what would be drawn now

    @pytest.mark.parametrize("layout", ["inkml", "quickdraw"])
    def test_other_data_are_tested_as_a_whole(self, layout, sources, tmp_path):
        trained = Handwriting(str(sources[layout]))
        trained.setup("fit")
        other = tmp_path / "other"
        if layout == "inkml":
            names = {f"{i}.inkml" for i in range(70, 75)}
            for i in range(70, 75):
                inkml(other / f"{i}.inkml", drawing(i))
        else:
            names = {f"ant.ndjson {i}" for i in range(5)}
            quickdraw(other / "ant.ndjson", {str(i): drawing(i) for i in range(5)})
        data = Handwriting(str(other))
        data.setup("test")
        data.load_state_dict(through_a_file(trained.state_dict()))
        sequences = data.split("test")
        assert {sequences[i].name for i in range(len(sequences))} == names

    def test_trained_files_under_another_path_are_refused(self, sources):
        root = sources["inkml"]
        trained = Handwriting(str(root))
        trained.setup("fit")
        state = trained.state_dict()
        name = state["members"]["train"][0]
        data = Handwriting(str(root / Path(name).parent))
        data.setup("test")
        data.load_state_dict(state)
        with pytest.raises(UserError, match=f"seems to be {name}, which the model was trained on"):
            data.split("test")

    def test_checkpoints_of_archives_hold_a_scaler_alone(self, archive, iam_tree):
        for root in (archive, iam_tree):
            assert set(Handwriting(str(root)).state_dict()) == {"mean", "std"}


class TestBadInput:
    """One line each, or skipped and counted."""

    def test_lists(self, iam_tree):
        lists = iam_tree / "task1"
        forms = " ".join(f"z{i:02}-000" for i in range(7))
        (lists / "trainset.txt").write_text(f"a01-000u {forms}")
        message = (
            f"{lists / 'trainset.txt'}: 7 of 8 forms have no file below {iam_tree} and are left out: "
            "z00-000, z01-000, z02-000, z03-000, z04-000, ..."
        )
        with pytest.warns(UserWarning, match=re.escape(message)):
            assert len(found(iam_tree)) == 2
        (lists / "trainset.txt").write_text(forms)
        refused(iam_tree, r"trainset\.txt: none of its 7 forms has a file below", r"z04-000, \.\.\.. Fix: add them")
        (lists / "trainset.txt").write_text(" \n\n")
        refused(iam_tree, r"trainset\.txt: names no form. Fix: write a form per line")
        (lists / "trainset.txt").write_bytes(b"\xff\xfe\x00")
        refused(iam_tree, r"trainset\.txt: is not text")
        (lists / "trainset.txt").unlink()
        refused(iam_tree, r"no trainset\.txt in it. Fix: put the lists of IAM-OnDB's task t1 into a folder below")

    def test_lists_of_two_tasks(self, iam_tree):
        (iam_tree / "task2").mkdir()
        (iam_tree / "task2" / "trainset.txt").write_text("c03-011")
        assert len(found(iam_tree)) == 6  # those in task1
        (iam_tree / "task1").rename(iam_tree / "lists")
        refused(iam_tree, r"both .*trainset\.txt and .*trainset\.txt. Fix: keep the list of task t1")

    @pytest.mark.parametrize("layout", ["iam", "inkml"])
    def test_bad_files(self, layout, sources):
        files = sorted((sources[layout] / ("lineStrokes" if layout == "iam" else "")).rglob("*.*ml"))
        text = files[0].read_text()
        files[0].write_text(text[: len(text) // 2])
        files[1].write_text("")
        part = {"val": 0.0, "test": 0.0} if layout == "inkml" else {}
        if layout == "iam":
            (sources["iam"] / "task1" / "trainset.txt").write_text("a01-000x a01-000u a01-001")
            (sources["iam"] / "task1" / "testset_t.txt").write_text("")
            files = [file for file in files if file.stem[:-3] in ("a01-000x", "a01-000u", "a01-001")]
            files[0].write_text(text[: len(text) // 2])
        with pytest.raises(UserError, match=r"ml: is not valid XML \(.*line \d+.*\). Fix: copy the file again"):
            found(sources[layout], **part)
        with pytest.warns(UserWarning, match=r"\d of \d+ files are skipped \(--data.skip_bad true\): .*not valid XML"):
            kept = found(sources[layout], skip_bad=True, **part)
        assert files[0].relative_to(sources[layout]).as_posix() not in kept
        assert files[-1].relative_to(sources[layout]).as_posix() in kept
        for file in files:
            file.write_text("")
        with pytest.raises(UserError, match=r"none of \d+ files can be used"):
            found(sources[layout], skip_bad=True, **part)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"drawing": [[[1, 2], [3', "is not a valid JSON object"),
            ("\x00\x01", "is not a valid JSON object"),
            ("[" * 100_000, "is not a valid JSON object"),
            ("[1, 2]", 'has no list "drawing"'),
            ('{"drawing": 3}', 'has no list "drawing"'),
            ('{"word": "cat"}', 'has no list "drawing"'),
            ('{"drawing": [[1, 2]]}', r"stroke 0 is not a list of points. Fix: write \[xs, ys\]"),
            ('{"drawing": [[[1], [2]], {"x": 1}]}', "stroke 1 is not a list of points"),
            ('{"drawing": [[[1, 2], [3]]]}', "stroke 0 is not a list of points"),
            ('{"drawing": [[[1, "2"], [3, 4]]]}', "stroke 0 is not a list of points"),
            ('{"drawing": [[[1, null], [3, 4]]]}', "stroke 0 is not a list of points"),
            ('{"drawing": [[[1, NaN], [3, 4]]]}', "holds coordinates that are not finite"),
            ('{"drawing": [[[1, 1e300], [3, 4]]]}', "holds coordinates that are not finite"),
            ('{"drawing": [[[1, 1%s], [3, 4]]]}' % ("0" * 400), "stroke 0 is not a list of points"),
            ('{"drawing": [[[1, 1%s], [3, 4]]]}' % ("0" * 5000), "is not a valid JSON object"),
        ],
    )
    def test_bad_drawings(self, line, message, sources):
        path = sources["quickdraw"] / "cat.ndjson"
        path.write_text(path.read_text() + "\n" + line + "\n")
        refused(sources["quickdraw"], rf"cat\.ndjson: line 13: {message}")
        with pytest.warns(UserWarning, match=r"1 of 17 drawings are skipped \(--data.skip_bad true\): .*line 13"):
            assert len(found(sources["quickdraw"], skip_bad=True, val=0, test=0)) == 16

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (np.array([[1, 2, 3]]), "lift is 3 at step 0"),
            (np.array([[1, 2, 0], [1, np.nan, 0]]), "not finite"),
            (np.array([[1, 2], [3, 4]]), r"is int64 of shape \(2, 2\). Fix: write numbers of shape \(steps, 3\)"),
            (np.array(["a", "b"], dtype=object), "Fix: write numbers"),
            ([[1, 2, 0], [1]], "Fix: write numbers"),
            (None, "Fix: write numbers"),
        ],
    )
    def test_bad_sketches(self, bad, message, tmp_path):
        good = [rows_of(drawing(i)) for i in range(3)]
        path = sketch_rnn(tmp_path / "a.npz", train=[*good, bad], valid=good, test=good)
        refused(path, rf"a\.npz: train 3: .*{message}")
        with pytest.warns(UserWarning, match=r"1 of 4 drawings of train are skipped"):
            assert list(found(path, skip_bad=True)) == ["train 0", "train 1", "train 2"]
        with pytest.raises(UserError, match="none of 2 drawings of train can be used"):
            found(sketch_rnn(tmp_path / "b.npz", train=[bad, bad]), skip_bad=True)

    def test_roots(self, tmp_path, sources):
        refused(tmp_path / "nowhere", "--data.root .*nowhere: no such file or folder")
        (tmp_path / "empty").mkdir()
        refused(tmp_path / "empty", "holds no handwriting. Fix: give an .npz archive .* lineStrokes")
        (tmp_path / "a.txt").write_text("")
        refused(tmp_path / "a.txt", "is not a handwriting dataset. Fix: give an .npz")
        refused(tmp_path, "holds iam and quickdraw and inkml. Fix: choose one with --data.layout")
        assert len(found(tmp_path, layout="inkml", val=0, test=0)) == 14
        refused(
            sources["inkml"], r"holds no \*.ndjson. Fix: check the path and --data.layout quickdraw", layout="quickdraw"
        )
        refused(sources["inkml"], r"holds no lineStrokes/\*\*/\*.xml. Fix: check", layout="iam")
        refused(tmp_path / "a.txt", "is a file. Fix: give the folder that holds lineStrokes", layout="iam")
        refused(sources["inkml"], "Is a directory. Fix: give an .npz archive", layout="archive")
        refused(sources["inkml"], "Is a directory", layout="sketch-rnn")

    def test_folders_without_permission(self, sources, monkeypatch):
        walked = os.walk

        def refuse(top, onerror):
            onerror(PermissionError(13, "Permission denied", str(Path(top) / "writer1")))
            return walked(top)

        monkeypatch.setattr(os, "walk", refuse)
        refused(sources["inkml"], "writer1: Permission denied. Fix: give yourself permission")

    @pytest.mark.parametrize("layout", ["iam", "inkml", "quickdraw"])
    def test_files_without_permission(self, layout, sources, monkeypatch):
        opened = Path.open

        def refuse(path, mode="r", *options, **named):
            if path.suffix in (".xml", ".inkml", ".ndjson"):
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, mode, *options, **named)

        monkeypatch.setattr(Path, "open", refuse)
        refused(sources[layout], "(ml|ndjson): Permission denied")


@pytest.mark.parametrize("seed", range(4))
def test_bad_and_empty_inkml_files_are_no_split_of_their_own(tmp_path, seed):
    for i in range(6):
        (tmp_path / f"bad{i}.inkml").write_text("<ink><trace>0 0, 1")
        (tmp_path / f"empty{i}.inkml").write_text("<ink/>")
        (tmp_path / f"good{i}.inkml").write_text(f"<ink><trace>0 0, {i} 1</trace></ink>")
    data = Handwriting(str(tmp_path), skip_bad=True, seed=seed)
    with pytest.warns(UserWarning, match="6 of 18 files are skipped"):
        found = [len(data.split(split)) for split in ("train", "val", "test")]
    assert found == [4, 1, 1]
