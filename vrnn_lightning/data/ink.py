"""Readers of pen strokes: IAM-OnDB's XML, InkML, QuickDraw's ndjson and sketch-rnn's archives.

They return rows (dx, dy, lift), shape (steps, 3), y growing downward.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from vrnn_lightning.data.archives import opened_archive
from vrnn_lightning.data.folders import SHOWN, files_below
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.data.strokes import strokes_to_rows
from vrnn_lightning.data.unpickling import UnsafePickleError, unpickle
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import MAX_GB, explained, undamaged

__all__ = [
    "LISTS", "SECOND", "FormList", "check_sketch", "quickdraw_lines", "read_form_lists", "read_iam", "read_inkml",
    "read_quickdraw", "read_sketch_rnn",
]  # fmt: skip

TOKEN = re.compile(r"\s*([!'\"]?)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[*?TF])")
"""A value of an InkML point, with the mark of a difference."""
ORDERS = {"!": 0, "'": 1, '"': 2}
LISTS: dict[Split, str] = {"train": "trainset.txt", "val": "testset_v.txt", "test": "testset_f.txt"}
"""The list of each split of the official task t1."""
SECOND = "testset_t.txt"
"""The list of t1's second validation set."""
X_AND_Y = ElementTree.fromstring('<traceFormat><channel name="X"/><channel name="Y"/></traceFormat>')
"""InkML's format where a file has none."""


def read_iam(path: Path) -> NDArray[np.float32]:
    """Read a line of the IAM On-Line Handwriting Database: a WhiteboardCaptureSession with a StrokeSet of Strokes.

    Raises:
        UserError: The XML file can't be read, is damaged, or is not such a file.
    """
    strokes = _read_xml(path, "WhiteboardCaptureSession").iter("Stroke")
    points = [[_iam_point(path, point) for point in stroke.findall("Point")] for stroke in strokes]
    return _rows(path, [np.array(stroke).reshape(-1, 2) for stroke in points])


def _iam_point(path: Path, point: Element) -> tuple[float, float]:
    try:
        return float(point.attrib["x"]), float(point.attrib["y"])
    except (KeyError, ValueError):
        given = ElementTree.tostring(point, "unicode").strip()
        raise UserError(f"{path}: {given} has no numbers x and y. Fix: correct or remove the file") from None


class FormList(NamedTuple):
    """A list of the task: its file, and the forms that it names, in their order."""

    path: Path
    forms: list[str]

    def find(self, files: Mapping[str, Path], root: Path) -> list[str]:
        """Return the names of the forms' files; warn of forms without one, and raise a UserError if all are.

        The files below ``root`` are given by name, as ``lineStrokes/a01/a01-020/a01-020x-01.xml`` for the form
        a01-020x.
        """
        names: dict[str, list[str]] = {}
        for name, path in files.items():
            names.setdefault(path.stem.rpartition("-")[0], []).append(name)
        missing = [form for form in self.forms if form not in names]
        listed = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        if len(missing) == len(self.forms):
            raise UserError(
                f"{self.path}: none of its {len(missing)} forms has a file below {root}: {listed}. Fix: add them, as "
                "lineStrokes/a01/a01-020/a01-020x-01.xml for the form a01-020x"
            )
        if missing:
            rank_zero_warn(
                f"{self.path}: {len(missing)} of {len(self.forms)} forms have no file below {root} and are left out: "
                f"{listed}"
            )
        return [name for form in self.forms for name in names.get(form, [])]


def read_form_lists(root: Path, names: Sequence[str]) -> dict[str, FormList]:
    """Read lists of task t1, a form per line, by their names; they may lie anywhere below a folder.

    Of lists of several tasks, those in "task1" or "t1" count.

    Raises:
        UserError: A list is missing, ambiguous, empty or not text.
    """
    files = files_below(root)
    lists: dict[str, FormList] = {}
    for name in names:
        paths = [path for path in files if path.name == name]
        paths = [path for path in paths if path.parent.name in ("task1", "t1")] or paths
        if not paths:
            raise UserError(
                f"--data.root {root}: no {name} in it. Fix: put the lists of IAM-OnDB's task t1 into a folder below"
            )
        if len(paths) > 1:
            raise UserError(f"--data.root {root}: both {paths[0]} and {paths[1]}. Fix: keep the list of task t1")
        fix = "write a form per line, a01-020x for example"
        with explained(paths[0]), undamaged(f"{paths[0]}: is not text", fix):
            forms = list(dict.fromkeys(paths[0].read_text(encoding="utf-8-sig").split()))
        if not forms:
            raise UserError(f"{paths[0]}: names no form. Fix: {fix}")
        lists[name] = FormList(paths[0], forms)
    return lists


def read_inkml(path: Path) -> NDArray[np.float32]:
    """Read a file of the Ink Markup Language (W3C): each trace is a stroke; those of a lifted pen are skipped.

    Channels come in the order of ``traceFormat``, X and Y where there is none; values may be differences, marked with
    ``'`` and ``"``, or ``*`` for the same again.

    Raises:
        UserError: The file can't be read, is damaged or is not InkML, has several formats or one without X and Y, or a
            trace is continued elsewhere or holds something else than points.
    """
    ink = _read_xml(path, "ink")
    formats = [form for form in ink.iter("traceFormat") if form.find(".//channel") is not None] or [X_AND_Y]
    orders = {tuple(channel.get("name", "") for channel in form.iter("channel")) for form in formats}
    if len(orders) > 1:
        raise UserError(f"{path}: has a second traceFormat, but one for the whole file is read. Fix: split the file")
    names = orders.pop()
    if not {"X", "Y"}.issubset(names):
        raise UserError(f"{path}: a traceFormat has channels {', '.join(names)}. Fix: add the missing X or Y")
    strokes = []
    for trace in ink.iter("trace"):
        if "continuation" in trace.attrib:
            raise UserError(f"{path}: has a trace with continuation, which is not read. Fix: join its parts")
        text = (trace.text or "").strip()
        if text and trace.get("type", "penDown") == "penDown":
            strokes.append(_trace_points(path, text, formats[0]))
    return _rows(path, strokes)


def _trace_points(path: Path, trace: str, form: Element) -> NDArray[np.float64]:
    """Return the points of a trace, shape (points, 2), y growing downward."""
    channels = {channel.get("name", ""): channel for channel in form.iter("channel")}
    needed = len(form.findall("channel"))  # the others are intermittent
    levels = {axis: [0.0, 0.0, 0.0] for axis in ("X", "Y")}  # value, first and second difference
    signs = {axis: -1.0 if channels[axis].get("orientation") == "-ve" else 1.0 for axis in levels}
    orders = dict.fromkeys(channels, 0)
    points: list[list[float]] = []
    for text in trace.strip(",").split(","):
        tokens = TOKEN.findall(text)
        if TOKEN.sub("", text).strip() or not needed <= len(tokens) <= len(channels):
            raise UserError(f"{path}: a trace has the point {text.strip()[:40]!r}. Fix: write {', '.join(channels)}")
        for name, (mark, word) in zip(channels, tokens, strict=False):
            orders[name] = ORDERS.get(mark, orders[name])
            if name in levels:
                if word in "?TF" or (not points and (orders[name] or word == "*")):
                    raise UserError(f"{path}: channel {name} of a point is {word!r}. Fix: write a number")
                _advance(levels[name], orders[name], word)
        points.append([level[0] * signs[axis] for axis, level in levels.items()])
    return np.array(points)


def _advance(level: list[float], order: int, word: str) -> None:
    if word != "*":
        level[order] = float(word)
    if order == 2:
        level[1] += level[2]
    if order:
        level[0] += level[1]


def _read_xml(path: Path, root: str) -> Element:
    """Return the elements of an XML file by their names without a name space; no other file is ever read."""
    try:
        with explained(path), path.open("rb") as file:
            tree = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: is not valid XML ({error}). Fix: copy the file again") from None
    except (LookupError, ValueError) as error:  # an encoding that Python does not know
        raise UserError(f"{path}: can't be decoded ({error}). Fix: save it as UTF-8") from None
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2]
    if tree.tag != root:
        raise UserError(f"{path}: begins with <{tree.tag}>, expected <{root}>. Fix: remove the file")
    return tree


def quickdraw_lines(path: Path, name: str) -> Iterator[tuple[str, int, bytes]]:
    """Yield the drawings of a QuickDraw file, ``.ndjson``, unread: the name of each, its line's number and the line.

    A drawing's name is the file's ``name`` and the drawing's ``key_id``, or its line where it has none of its own.
    """
    with explained(path):
        lines = path.read_bytes().split(b"\n")
    keys = [re.search(rb'"key_id"\s*:\s*"?(\w+)', line) for line in lines]
    counts = Counter(key[1] for key in keys if key)
    for number, (line, key) in enumerate(zip(lines, keys, strict=True), start=1):
        if line.strip():
            own = key is not None and counts[key[1]] == 1
            yield f"{name} {key[1].decode() if key and own else f'line {number}'}", number, line


def read_quickdraw(path: Path, number: int, line: bytes) -> NDArray[np.float32]:
    """Read a drawing of QuickDraw, a line of JSON; messages name the file and the line's number.

    Its ``drawing`` is a list of strokes ``[xs, ys]`` or ``[xs, ys, times]``.

    Raises:
        UserError: The line is not such an object.
    """
    place = f"{path}: line {number}"
    try:
        content = json.loads(line)
    except (RecursionError, ValueError) as error:
        problem = f"is not a valid JSON object ({str(error)[:200]})"
        raise UserError(f"{place}: {problem}. Fix: remove the line or copy the file again") from None
    drawing = content.get("drawing") if isinstance(content, dict) else None
    if not isinstance(drawing, list):
        raise UserError(f'{place}: has no list "drawing", as QuickDraw\'s files have. Fix: remove the line')
    return _rows(place, [_quickdraw_stroke(place, i, stroke) for i, stroke in enumerate(drawing)])


def _quickdraw_stroke(place: str, i: int, stroke: Any) -> NDArray[np.float64]:
    with suppress(KeyError, TypeError, ValueError):
        points = np.array(stroke[:2])
        if points.ndim == 2 and len(points) == 2 and points.dtype.kind in "iuf":
            return points.T.astype(np.float64)
    wanted = "Fix: write [xs, ys] or [xs, ys, times], lists of numbers of one length"
    raise UserError(f"{place}: stroke {i} is not a list of points. {wanted}")


def _rows(place: object, strokes: Iterable[NDArray[np.float64]]) -> NDArray[np.float32]:
    rows = strokes_to_rows(list(strokes))
    if not np.isfinite(rows).all():
        raise UserError(f"{place}: holds coordinates that are not finite. Fix: correct or remove it")
    return rows


def read_sketch_rnn(path: Path, word: str, max_gb: float = MAX_GB) -> list[Any]:
    """Return the drawings of a split of a sketch-rnn archive, unchecked.

    Such a file, ``.npz``, holds object arrays called train, valid and test, which are pickles: only plain data and
    numpy arrays are read of them, and nothing that they name is run. The array ``word`` may take ``max_gb`` gigabytes,
    or 16 times the file's size.

    Raises:
        UserError: It can't be read, holds no such array, or its pickle names anything else.
    """
    with opened_archive(path, "--data.root") as archive:
        archive.require(word, max_gb)
        with archive.content.zip.open(f"{word}.npy") as file:
            np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
            *_, dtype = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
            try:
                return list(unpickle(file) if dtype.hasobject else archive.content[word])
            except UnsafePickleError as error:
                raise UserError(f"{path}: {word} is not plain data: {error}. Fix: use a source you trust") from None


def check_sketch(place: str, drawing: Any) -> NDArray[Any]:
    """Return a drawing of sketch-rnn as an array; raise a UserError unless it holds finite rows with lifts 0 or 1."""
    if isinstance(drawing, np.ndarray) and drawing.dtype.hasobject:
        drawing = drawing.tolist()
    if isinstance(drawing, (list, tuple)):  # a few bytes of a pickle may name lists of lists without end
        drawing = np.array(drawing if all(map(_is_row, drawing)) else None)
    rows = np.asarray(drawing)
    if rows.dtype.kind not in "iuf" or rows.dtype.itemsize > 8 or rows.ndim != 2 or rows.shape[1] != 3:
        raise UserError(f"{place}: is {rows.dtype} of shape {rows.shape}. Fix: write numbers of shape (steps, 3)")
    if not np.isfinite(rows).all():
        raise UserError(f"{place}: holds values that are not finite. Fix: correct or remove it")
    wrong = (rows[:, 2] != 0) & (rows[:, 2] != 1)
    if wrong.any():
        step = int(wrong.argmax())
        raise UserError(f"{place}: lift is {rows[step, 2]} at step {step}. Fix: write rows (dx, dy, lift), lift 0 or 1")
    return rows


def _is_row(row: Any) -> bool:
    is_flat = isinstance(row, (list, tuple)) or (isinstance(row, np.ndarray) and row.ndim == 1)
    return is_flat and len(row) == 3 and all(map(np.isscalar, row))
