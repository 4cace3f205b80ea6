"""Readers of pen strokes: IAM-OnDB's XML, InkML, QuickDraw's ndjson and sketch-rnn's archives.

They return rows (dx, dy, lift), shape (steps, 3), y growing downward.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from vrnn_lightning.data.archives import opened_archive
from vrnn_lightning.data.strokes import strokes_to_rows
from vrnn_lightning.data.unpickling import UnsafePickleError, unpickle
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import MAX_GB, explained

__all__ = ["check_sketch", "quickdraw_lines", "read_iam", "read_inkml", "read_quickdraw", "read_sketch_rnn"]

TOKEN = re.compile(r"\s*([!'\"]?)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|#[0-9A-Fa-f]+|[*?TF])")
"""A value of an InkML point, with the mark of a difference."""
LONGEST = 200
"""Digits that a hexadecimal number may have, so that a float holds it."""
ORDERS = {"!": 0, "'": 1, '"': 2}
MOST = 10_000_000
"""Elements that an XML file may have: as many take about 4 GB."""
LINE = " line"
"""Key of an element's line among its attributes, none of which has a blank in its name."""


def read_iam(path: Path) -> NDArray[np.float32]:
    """Read a line of the IAM On-Line Handwriting Database: a WhiteboardCaptureSession with a StrokeSet of Strokes.

    Raises:
        UserError: The XML file can't be read, is damaged, declares a document type, or is not such a file.
    """
    strokes = []
    for element in _read_xml(path, "WhiteboardCaptureSession").iter():
        points = element.findall("Point")
        if element.tag == "Stroke":
            strokes.append(np.array([_iam_point(path, point) for point in points]).reshape(-1, 2))
        elif points:
            raise UserError(
                f"{path}: line {points[0].get(LINE)}: a <Point> outside a <Stroke>. Fix: correct or remove the file"
            )
    return _rows(path, strokes)


def _iam_point(path: Path, point: Element) -> tuple[float, float]:
    try:
        return float(point.attrib["x"]), float(point.attrib["y"])
    except (KeyError, ValueError):
        line, given = point.attrib.pop(LINE), " ".join(f'{key}="{value}"' for key, value in point.items())
        problem = f"line {line}: <Point {given}> has no numbers x and y"
        raise UserError(f"{path}: {problem}. Fix: correct or remove the file") from None


def read_inkml(path: Path) -> NDArray[np.float32]:
    """Read a file of the Ink Markup Language (W3C): each trace is a stroke; those of a lifted pen are skipped.

    Channels come in the order of ``traceFormat``, X and Y where there is none; values may be differences, marked with
    ``'`` and ``"``, or ``*`` for the same again.

    Raises:
        UserError: The file can't be read, is damaged, declares a document type or is not InkML, has several formats or
            one without X and Y, or a trace is continued elsewhere or holds something else than points.
    """
    channels: list[tuple[str, float]] = []
    strokes: list[NDArray[np.float64]] = []
    for element in _read_xml(path, "ink").iter():
        place = f"{path}: line {element.get(LINE)}"
        if element.tag == "traceFormat" and (given := _channels(element)):
            names, earlier = ([name for name, _ in pairs] for pairs in (given, channels))
            if "X" not in names or "Y" not in names:
                raise UserError(f"{place}: a traceFormat has channels {', '.join(names)}. Fix: add the missing X or Y")
            if earlier != names and (earlier or strokes):
                raise UserError(
                    f"{place}: a second traceFormat, but one for the whole file is read. Fix: split the file"
                )
            channels = given
        elif element.tag == "trace":
            if "continuation" in element.attrib:
                raise UserError(f"{place}: a trace with continuation, which is not read. Fix: join its parts")
            text = (element.text or "").strip()
            if text and element.get("type", "penDown") == "penDown":
                strokes.append(_trace_points(place, text, channels or [("X", 1.0), ("Y", 1.0)]))
    return _rows(path, strokes)


def _channels(trace_format: Element) -> list[tuple[str, float]]:
    """Return the names of a format's channels, optional ones with a ``?``, and -1 where one grows upward, else 1."""
    optional = [channel for part in trace_format.iter("intermittentChannels") for channel in part.iter("channel")]
    return [
        (channel.get("name", "") + "?" * (channel in optional), -1.0 if channel.get("orientation") == "-ve" else 1.0)
        for channel in trace_format.iter("channel")
    ]


def _trace_points(place: str, trace: str, channels: list[tuple[str, float]]) -> NDArray[np.float64]:
    names, signs = [name for name, _ in channels], dict(channels)
    needed = sum(not name.endswith("?") for name in names)
    levels = {axis: [0.0, 0.0, 0.0] for axis in ("X", "Y")}  # value, first and second difference
    orders = dict.fromkeys(names, 0)
    points: list[list[float]] = []
    for text in trace.strip(",").split(","):
        tokens = _tokens(place, text.rstrip())
        if not needed <= len(tokens) <= len(names):
            raise UserError(
                f"{place}: the point {text.strip()!r} has {len(tokens)} values. Fix: write {', '.join(names)}"
            )
        for name, (mark, word) in zip(names, tokens, strict=False):
            orders[name] = ORDERS.get(mark, orders[name])
            if name in levels:
                if word in "?TF" or (not points and (orders[name] or word == "*")):
                    raise UserError(f"{place}: channel {name} of a point is {word!r}. Fix: write a number")
                _advance(levels[name], orders[name], word, place)
        points.append([level[0] * signs[axis] for axis, level in levels.items()])
    return np.array(points)


def _tokens(place: str, text: str) -> list[tuple[str, str]]:
    tokens, start = [], 0
    while start < len(text):
        match = TOKEN.match(text, start)
        if match is None:
            raise UserError(f"{place}: a trace holds {text[start:].strip()[:20]!r}. Fix: write a number")
        tokens.append((match[1], match[2]))
        start = match.end()
    return tokens


def _advance(level: list[float], order: int, word: str, place: str) -> None:
    if word.startswith("#"):
        if len(word) > 1 + LONGEST:
            raise UserError(f"{place}: a coordinate has {len(word) - 1} digits. Fix: correct or remove it")
        level[order] = float(int(word[1:], 16))
    elif word != "*":
        level[order] = float(word)
    if order == 2:
        level[1] += level[2]
    if order:
        level[0] += level[1]


def _read_xml(path: Path, root: str) -> Element:
    """Return the elements of an XML file by their names without a name space, each with its line.

    A document type raises: it declares entities, which may grow without bound or read other files.
    """
    parser, builder, count = expat.ParserCreate(namespace_separator=" "), TreeBuilder(), itertools.count(1)
    parser.buffer_text = True

    def doctype(*_: Any) -> NoReturn:
        raise UserError(
            f"{path}: line {parser.CurrentLineNumber}: declares a document type, which is never read. Fix: remove it"
        )

    def start(name: str, attributes: dict[str, str]) -> None:
        if next(count) > MOST:
            raise UserError(f"{path}: has more than {MOST:,} elements. Fix: split the file, or remove it if damaged")
        builder.start(name.rpartition(" ")[2], attributes | {LINE: str(parser.CurrentLineNumber)})

    def end(name: str) -> None:
        builder.end(name.rpartition(" ")[2])

    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = doctype
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    try:
        with explained(path), path.open("rb") as file:
            parser.ParseFile(file)
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise UserError(f"{path}: line {error.lineno}: is not valid XML ({reason}). Fix: copy the file again") from None
    except (LookupError, ValueError) as error:  # an encoding that Python does not know
        raise UserError(f"{path}: can't be decoded ({error}). Fix: save it as UTF-8") from None
    tree: Element = builder.close()
    if tree.tag != root:
        raise UserError(
            f"{path}: line {tree.get(LINE)}: begins with <{tree.tag}>, expected <{root}>. Fix: remove the file"
        )
    return tree


def quickdraw_lines(path: Path, name: str) -> Iterator[tuple[str, int, bytes]]:
    """Yield the drawings of a QuickDraw file, unread: the name of each, its line's number and the line.

    Args:
        path: The ``.ndjson`` file, a JSON object per line.
        name: The file's name; a drawing's name is that and its ``key_id``, or its line where it has none.
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
    """Read a drawing of QuickDraw: ``drawing`` is a list of strokes ``[xs, ys]`` or ``[xs, ys, times]``.

    Args:
        path: The file, for messages.
        number: The line's number, for messages.
        line: A JSON object.

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
    wanted = "Fix: write [xs, ys] or [xs, ys, times], lists of numbers of one length"
    if not isinstance(stroke, list) or len(stroke) not in (2, 3) or not all(isinstance(axis, list) for axis in stroke):
        raise UserError(f"{place}: stroke {i} is not a list of lists. {wanted}")
    if len({len(axis) for axis in stroke}) > 1:
        raise UserError(f"{place}: stroke {i} has lists of {' and '.join(str(len(axis)) for axis in stroke)}. {wanted}")
    if not all(type(value) in (int, float) for axis in stroke[:2] for value in axis):
        raise UserError(f"{place}: stroke {i} holds other values than numbers. {wanted}")
    try:
        return np.array(stroke[:2], dtype=np.float64).T.reshape(-1, 2)
    except OverflowError:
        raise UserError(f"{place}: stroke {i} holds a number that is too large. {wanted}") from None


def _rows(place: object, strokes: Iterable[NDArray[np.float64]]) -> NDArray[np.float32]:
    rows = strokes_to_rows(list(strokes))
    if not np.isfinite(rows).all():
        raise UserError(f"{place}: holds coordinates that are not finite. Fix: correct or remove it")
    return rows


def read_sketch_rnn(path: Path, word: str, max_gb: float = MAX_GB) -> list[Any]:
    """Return the drawings of a split of a sketch-rnn archive, unchecked.

    Such a file holds object arrays called train, valid and test, which are pickles: only plain data and numpy arrays
    are read of them, and nothing that they name is run.

    Args:
        path: The ``.npz`` file.
        word: The array.
        max_gb: Gigabytes that it may take, or 16 times the file's size.

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
    listed = drawing.tolist() if isinstance(drawing, np.ndarray) and drawing.dtype.hasobject else drawing
    if isinstance(listed, np.ndarray):
        rows = listed
    else:  # its rows first: a few bytes of a pickle may name lists of lists without end
        is_valid = isinstance(listed, (list, tuple)) and all(map(_is_row, listed))
        rows = np.array(listed) if is_valid else np.empty(0, dtype=object)
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
    return is_flat and len(row) == 3 and all(isinstance(value, (int, float, np.number)) for value in row)
