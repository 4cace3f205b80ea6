"""Readers of pen strokes: known points, W3C's example, documents and pickles that mean harm, and damaged files."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vrnn_lightning.data import (
    quickdraw_lines,
    read_iam,
    read_inkml,
    read_quickdraw,
    read_sketch_rnn,
    rows_to_strokes,
    smooth_rows,
    strokes_to_rows,
)
from vrnn_lightning.errors import UserError

HEAD = '<?xml version="1.0" encoding="ISO-8859-1"?>\n'
IAM = (
    f"{HEAD}<WhiteboardCaptureSession>\n<StrokeSet>\n"
    '<Stroke colour="black" start_time="1" end_time="2">\n<Point x="895" y="992" time="1.5"/>\n'
    '<Point x="890" y="1000" time="1.6"/>\n</Stroke>\n'
    '<Stroke colour="black"><Point x="900" y="995" time="1.7"/></Stroke>\n<Stroke></Stroke>\n'
    "</StrokeSet>\n</WhiteboardCaptureSession>\n"
)
INKML = '<ink xmlns="http://www.w3.org/2003/InkML">\n{}\n</ink>\n'
FORMAT = "<traceFormat>{}</traceFormat>"


def channel(name: str, more: str = "") -> str:
    return f'<channel name="{name}" type="decimal" {more}/>'


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("latin-1"))
    return path


def traces(tmp_path: Path, *content: str, format: str = "") -> list[list[list[float]]]:
    """Return the points of each trace, less the first point of all."""
    path = write(tmp_path / "a.inkml", INKML.format(format + "".join(f"<trace>{text}</trace>" for text in content)))
    return [stroke.tolist() for stroke in rows_to_strokes(read_inkml(path), pen_starts_down=True)]


class TestRows:
    STROKES = [np.array([[10, 20], [13, 18], [13, 25]]), np.array([[0, 0]]), np.array([[5, 5], [6, 7]])]

    def test_known_rows(self):
        rows = [[3, -2, 0], [0, 7, 1], [-13, -25, 1], [5, 5, 0], [1, 2, 1]]
        assert strokes_to_rows(self.STROKES).tolist() == rows

    def test_sums_are_the_points_less_the_start(self):
        points = np.concatenate(self.STROKES)
        rows = strokes_to_rows(self.STROKES)
        np.testing.assert_array_equal(rows[:, :2].cumsum(0), points[1:] - points[0])
        for there, back in zip(self.STROKES, rows_to_strokes(rows, pen_starts_down=True), strict=True):
            np.testing.assert_array_equal(back, there - points[0])

    def test_without_a_pen_that_starts_down_the_first_row_is_a_point(self):
        assert [s.tolist() for s in rows_to_strokes(np.array([[1, 2, 0], [1, 0, 1]]))] == [[[1, 2], [2, 2]]]

    def test_dots_before_the_first_line_are_left_out(self):
        dot, empty = np.array([[3, 4]]), np.zeros((0, 2))
        np.testing.assert_array_equal(
            strokes_to_rows([dot, empty, dot, *self.STROKES, empty]), strokes_to_rows(self.STROKES)
        )
        for nothing in ([], [empty], [dot, dot]):
            assert strokes_to_rows(nothing).shape == (0, 3)
        assert rows_to_strokes(np.zeros((0, 3))) == []

    @pytest.mark.parametrize("width", [1, 3, 5, 9])
    @pytest.mark.parametrize("down", [False, True])
    def test_smoothing_against_a_plain_loop(self, width, down):
        generator = np.random.default_rng(width)
        rows = np.hstack([generator.normal(0, 9, (40, 2)), generator.random((40, 1)) < 0.2])
        found = rows_to_strokes(smooth_rows(rows, width, down), down)
        for smooth, stroke in zip(found, rows_to_strokes(rows, down), strict=True):
            for i, point in enumerate(smooth):
                reach = min(width // 2, i, len(stroke) - 1 - i)
                np.testing.assert_allclose(point, stroke[i - reach : i + reach + 1].mean(0), atol=1e-4)
            np.testing.assert_allclose(smooth[[0, -1]], stroke[[0, -1]], atol=1e-4)

    def test_smoothing_nothing(self):
        assert smooth_rows(np.zeros((0, 3)), 3).shape == (0, 3)


class TestIam:
    def test_known_points(self, tmp_path):
        assert read_iam(write(tmp_path / "a.xml", IAM)).tolist() == [[-5, 8, 1], [10, -5, 1]]

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("WhiteboardCaptureSession", "html", r"begins with <html>, expected <WhiteboardCaptureSession>"),
            ('x="890"', 'x="left"', r'<Point x="left" y="1000" time="1.6" /> has no numbers x and y'),
            ('y="992"', "", r"<Point x=\"895\" time=\"1.5\" /> has no numbers x and y"),
            ('x="890"', 'x="NaN"', "holds coordinates that are not finite"),
            ('x="890"', 'x="1e39"', "holds coordinates that are not finite"),
            ("</Stroke>\n<Stroke ", "</Stroke\n<Stroke ", r"is not valid XML \(not well-formed"),
            ("ISO-8859-1", "klingon", "can't be decoded|is not valid XML"),
            ("ISO-8859-1", "shift_jis", "can't be decoded"),
        ],
    )
    def test_refusals(self, tmp_path, old, new, message):
        assert old in IAM
        with pytest.raises(UserError, match=rf"a\.xml: {message}"):
            read_iam(write(tmp_path / "a.xml", IAM.replace(old, new)))

    def test_half_a_file_names_the_line(self, tmp_path):
        half = IAM[: IAM.index("890")]
        with pytest.raises(
            UserError,
            match=r"a\.xml: is not valid XML \(unclosed token: line 6, column \d+\). Fix: copy the file again",
        ):
            read_iam(write(tmp_path / "a.xml", half))

    def test_entities_read_no_other_file(self, tmp_path):
        (tmp_path / "harm").write_text("890")
        doctype = f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{tmp_path}/harm">]>'
        content = IAM.replace(HEAD, HEAD + doctype).replace("<StrokeSet>", "<StrokeSet>&x;")
        with pytest.raises(UserError, match=r"a\.xml: is not valid XML \(undefined entity &x;"):
            read_iam(write(tmp_path / "a.xml", content))

    def test_entities_do_not_grow_without_bound(self, tmp_path):
        laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha" * 20}">' for i in range(10))
        content = f"<!DOCTYPE ink [{laughs}]><ink>&l9;</ink>"
        with pytest.raises(UserError, match=r"a\.inkml: is not valid XML \(limit on input amplification"):
            read_inkml(write(tmp_path / "a.inkml", content))

    def test_entities_that_are_not_declared(self, tmp_path):
        with pytest.raises(UserError, match=r"is not valid XML \(undefined entity: line 6"):
            read_iam(write(tmp_path / "a.xml", IAM.replace('"890"', '"&e;"')))


class TestInkML:
    def test_x_and_y(self, tmp_path):
        """The separators that are allowed, signs and fractions."""
        text = "10 0, 9 14 ,8\t28\n, 7.5 -4.25,\n6-4,.5+2,"
        expected = [[0, 0], [-1, 14], [-2, 28], [-2.5, -4.25], [-4, -4], [-9.5, 2]]
        assert traces(tmp_path, text, "10 0,11 0") == [expected, [[0, 0], [1, 0]]]

    def test_other_channels_in_other_orders(self, tmp_path):
        format = FORMAT.format(channel("T") + channel("Y") + channel("F") + channel("X"))
        assert traces(tmp_path, "0 5 0.1 7, 1 6 ? 9, 2 *'T*", format=format) == [[[0, 0], [2, 1], [2, 1]]]

    def test_optional_channels(self, tmp_path):
        optional = f"<intermittentChannels>{channel('F')}</intermittentChannels>"
        format = FORMAT.format(channel("X") + channel("Y") + optional)
        assert traces(tmp_path, "1 2, 3 4 0.5, 5 6", format=format) == [[[0, 0], [2, 2], [4, 4]]]

    def test_y_that_grows_upward_is_turned(self, tmp_path):
        format = FORMAT.format(channel("X") + channel("Y", 'orientation="-ve"'))
        assert traces(tmp_path, "1 2, 3 5", format=format) == [[[0, 0], [2, -3]]]

    def test_differences(self, tmp_path):
        """Velocities, then accelerations."""
        text = """1125 18432,'23'43,"7"-8,3-5,7 -3,6 2,6 8,3 6,2 4"""
        points = [[1125, 18432], [1148, 18475], [1178, 18510], [1211, 18540], [1251, 18567], [1297, 18596],
                  [1349, 18633], [1404, 18676], [1461, 18723]]  # fmt: skip
        (found,) = traces(tmp_path, text)
        assert (np.array(found) + points[0]).tolist() == points

    def test_the_same_again_and_back_to_values(self, tmp_path):
        (found,) = traces(tmp_path, "0 0,'2'3,* *,*'1,\"1*,!100!50,* 60")
        assert found == [[0, 0], [2, 3], [4, 6], [6, 7], [9, 8], [100, 50], [100, 60]]

    def test_traces_of_a_lifted_pen_and_groups(self, tmp_path):
        inside = (
            '<definitions/><traceGroup><trace type="penDown">0 0, 1 1</trace><trace type="penUp">5 5, 6 6</trace>'
            '<trace type="indeterminate">5 5, 6 6</trace><trace/><trace id="t"> </trace></traceGroup><trace>3 3</trace>'
        )
        found = read_inkml(write(tmp_path / "a.inkml", INKML.format(inside)))
        assert found.tolist() == [[1, 1, 1], [2, 2, 1]]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("<trace>1 2, 3</trace>", "a trace has the point '3'. Fix: write X, Y"),
            ("<trace>1 2 3, 4 5 6</trace>", "a trace has the point '1 2 3'. Fix: write X, Y"),
            ("<trace>1 2,, 3 4</trace>", "a trace has the point ''"),
            ("<trace>1 two</trace>", "a trace has the point '1 two'. Fix: write X, Y"),
            ("<trace>1 NaN</trace>", "a trace has the point '1 NaN'"),
            ("<trace>'1 2, 3 4</trace>", "channel X of a point is '1'. Fix: write a number"),
            ("<trace>* 2, 3 4</trace>", r"channel X of a point is '\*'"),
            ("<trace>1 2, ? 4</trace>", r"channel X of a point is '\?'"),
            ("<trace>1 2, 3 T</trace>", "channel Y of a point is 'T'"),
            ("<trace>1 2, 1e99 2</trace>", "holds coordinates that are not finite"),
            ("<trace>1 2, 1e999 2</trace>", "holds coordinates that are not finite"),
            ('<trace continuation="begin">1 2</trace>', "has a trace with continuation, which is not read"),
            (FORMAT.format(channel("X") + channel("T")), "a traceFormat has channels X, T. Fix: add the"),
            (FORMAT.format(channel("X") + channel("Y")) + FORMAT.format(channel("Y") + channel("X")), "has a seco"),
            ("</ink><ink>", "is not valid XML"),
        ],
    )  # fmt: skip
    def test_refusals(self, tmp_path, content, message):
        with pytest.raises(UserError, match=rf"a\.inkml: {message}"):
            read_inkml(write(tmp_path / "a.inkml", INKML.format(content)))

    def test_other_roots(self, tmp_path):
        with pytest.raises(UserError, match=r"a\.inkml: begins with <svg>, expected <ink>"):
            read_inkml(write(tmp_path / "a.inkml", "<svg/>"))


class TestQuickDraw:
    def test_known_points(self, tmp_path):
        line = b'{"key_id":"55", "drawing":[[[1,2,4],[1,1,0]],[[9],[8],[0.5]],[[3,3],[4,6],[1,2]]]}'
        path = write(tmp_path / "a.ndjson", b"\n" + line + b"\r\n")
        ((name, number, found),) = quickdraw_lines(path, "a.ndjson")
        assert (name, number) == ("a.ndjson 55", 2)
        expected = [[1, 0, 0], [2, -1, 1], [5, 8, 1], [-6, -4, 0], [0, 2, 1]]
        assert read_quickdraw(path, number, found).tolist() == expected


class Harm:
    """What runs where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def member(path: Path, content: bytes, name: str = "train.npy") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def npy(pickled: bytes, header: str = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }") -> bytes:
    body = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + pickled


class TestSketchRnn:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_every_protocol(self, tmp_path, protocol):
        drawings = np.empty(2, dtype=object)
        drawings[:] = [np.array([[1, 2, 0], [3, 4, 1]], dtype=np.int16), np.array([[5, 6, 1]], dtype=np.int16)]
        found = read_sketch_rnn(member(tmp_path / "a.npz", npy(pickle.dumps(drawings, protocol))), "train")
        assert [x.tolist() for x in found] == [x.tolist() for x in drawings]

    def test_what_a_pickle_names_is_refused_and_not_run(self, tmp_path):
        target = tmp_path / "harm"
        objects = np.empty(2, dtype=object)
        objects[:] = [np.zeros((1, 3)), Harm(target)]
        np.savez(tmp_path / "a.npz", train=objects)
        message = (
            r"a\.npz: train is not plain data: it names (posix|nt)\.system, which is never loaded. Fix: use a source"
        )
        with pytest.raises(UserError, match=message):
            read_sketch_rnn(tmp_path / "a.npz", "train")
        assert not target.exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "can't be read"),
            (b"no array", "can't be read"),
            (npy(b""), "can't be read"),
            (npy(b"\x80\x02garbage."), "can't be read"),
            (npy(pickle.dumps(3)), "'int' object is not iterable"),
            (npy(b"12", "{'descr': '<i2', 'fortran_order': False, 'shape': (2, 3, 3), }"), "can't be read"),
            (npy(b"", "{'descr': __import__('os'), 'fortran_order': False, 'shape': (2,), }"), "can't be read"),
            (npy(b"", "(" * 100), "can't be read"),
            (b"\x93NUMPY\x09\x00" + npy(b"")[8:], "can't be read"),
        ],
    )
    def test_refusals(self, tmp_path, content, message):
        with pytest.raises(UserError, match=rf"a\.npz: .*{message}"):
            read_sketch_rnn(member(tmp_path / "a.npz", content), "train")

    def test_splits_that_are_not_there(self, tmp_path):
        with pytest.raises(UserError, match=r"a\.npz: has no array valid, it holds train. Fix: add it"):
            read_sketch_rnn(member(tmp_path / "a.npz", npy(b"")), "valid")

    def test_locked_and_damaged_archives(self, tmp_path):
        path = member(tmp_path / "a.npz", npy(pickle.dumps([])))
        content = bytearray(path.read_bytes())
        place = content.index(b"PK\x01\x02")
        for flags in (6, place + 8):  # as if it were encrypted
            content[flags] |= 1
        with pytest.raises(UserError, match=r"can't be read .*(encrypted|password)"):
            read_sketch_rnn(write(path, bytes(content)), "train")
        with pytest.raises(UserError, match="can't be read"):
            read_sketch_rnn(write(path, b"PK"), "train")


def test_damaged_files_raise_nothing_else(tmp_path):
    """Cut off anywhere, and with bytes changed, left out or put in: what is said is one line that names the file."""
    generator = np.random.default_rng(0)
    inkml = INKML.format(FORMAT.format(channel("X") + channel("Y")) + "<trace>1 2,'3'4,\"5*</trace>" * 3)
    objects = np.empty(3, dtype=object)
    objects[:] = [np.arange(12, dtype=np.int16).reshape(4, 3)] * 3
    np.savez_compressed(tmp_path / "whole.npz", train=objects)
    np.savez(tmp_path / "plain.npz", train=objects)
    line = json.dumps({"key_id": "1", "drawing": [[[1, 2, 4], [1, 1, 0]], [[3, 3], [4, 6], [1, 2]]]})
    kinds = [
        ("xml", IAM.encode(), read_iam),
        ("inkml", inkml.encode(), read_inkml),
        ("ndjson", line.encode(), lambda path: read_quickdraw(path, 1, path.read_bytes())),
        ("npz", (tmp_path / "whole.npz").read_bytes(), lambda path: read_sketch_rnn(path, "train")),
        ("npz", (tmp_path / "plain.npz").read_bytes(), lambda path: read_sketch_rnn(path, "train")),
    ]
    said = []
    for suffix, whole, read in kinds:
        for trial in range(400):
            content = bytearray(whole)
            if trial % 2:
                content = content[: generator.integers(len(content))]
            else:
                for place in generator.integers(len(content), size=generator.integers(1, 9)):
                    content[place : place + generator.integers(2)] = generator.bytes(generator.integers(2))
            path = write(tmp_path / f"bad.{suffix}", bytes(content))
            try:
                read(path)
            except UserError as error:
                said.append(str(error))
    assert all("/bad." in message and "\n" not in message for message in said)
    assert len(said) > 1000
