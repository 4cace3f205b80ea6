"""Reading what pens wrote: IAM-OnDB's XML, InkML, QuickDraw's ndjson and sketch-rnn's archives."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn
from xml.parsers import expat

import numpy as np

from vrnn_lightning.data.archives import npy_header, opened_archive
from vrnn_lightning.data.strokes import strokes_to_rows
from vrnn_lightning.data.unpickling import UnsafePickleError, unpickle
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import MAX_GB, explained, require_size, undamaged

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["quickdraw_lines", "read_iam", "read_inkml", "read_quickdraw", "read_sketch_rnn"]

TOKEN = re.compile(r"\s*([!'\"]?)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|#[0-9A-Fa-f]+|[*?TF])")
"""A value of an InkML point, with what tells whether it is a difference."""
LONGEST = 200
"""Digits that a hexadecimal number may have, so that a float holds it."""
ORDERS = {"!": 0, "'": 1, '"': 2}


def read_iam(path: Path) -> NDArray[np.float32]:
    """Read a line of the IAM On-Line Handwriting Database: a WhiteboardCaptureSession with a StrokeSet of Strokes.

    Args:
        path: The XML file, as ``lineStrokes/a01/a01-020/a01-020x-01.xml``.

    Returns:
        Rows (dx, dy, lift), shape (steps, 3), y growing downward.

    Raises:
        UserError: It can't be read, is damaged, declares a document type, or is not such a file.
    """
    strokes: list[list[tuple[float, float]]] = []
    inside: list[str] = []

    def start(name: str, attributes: dict[str, str], line: int) -> None:
        if not inside and name != "WhiteboardCaptureSession":
            raise UserError(f"{path}: line {line}: begins with <{name}>, expected <WhiteboardCaptureSession>")
        inside.append(name)
        if name == "Stroke":
            strokes.append([])
        elif name == "Point":
            if "Stroke" not in inside:
                raise UserError(f"{path}: line {line}: a <Point> outside a <Stroke>; fix or remove the file")
            try:
                strokes[-1].append((float(attributes["x"]), float(attributes["y"])))
            except (KeyError, ValueError):
                given = " ".join(f'{key}="{value}"' for key, value in attributes.items())
                raise UserError(
                    f"{path}: line {line}: <Point {given}> has no numbers x and y; fix or remove the file"
                ) from None

    _parse_xml(path, start, lambda name, line: inside.pop())
    return _rows(path, [np.array(stroke).reshape(-1, 2) for stroke in strokes])


def read_inkml(path: Path) -> NDArray[np.float32]:
    """Read a file of the Ink Markup Language (W3C): each trace is a stroke, those of a lifted pen are passed over.

    Channels come in the order of ``traceFormat``, X and Y where there is none; values may be differences, marked with
    ``'`` and ``"``, or ``*`` for the same again.

    Args:
        path: The file.

    Returns:
        Rows (dx, dy, lift), shape (steps, 3), y growing downward.

    Raises:
        UserError: It can't be read, is damaged, declares a document type or is not InkML, has several formats or one
            without X and Y, or a trace is continued elsewhere or holds something else than points.
    """
    ink = _Ink(path)
    _parse_xml(path, ink.start, ink.end, ink.text)
    return _rows(path, ink.strokes)


class _Ink:
    """The traces of an InkML file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.strokes: list[NDArray[np.float64]] = []
        self.channels: list[str] | None = None
        self.down = {"X": 1.0, "Y": 1.0}
        self._format: list[tuple[str, float]] | None = None
        self._content: list[str] | None = None
        self._inside = 0
        self._optional = False

    def start(self, name: str, attributes: dict[str, str], line: int) -> None:
        if not self._inside and name != "ink":
            raise self._error(line, f"begins with <{name}>, expected <ink>")
        self._inside += 1
        if name == "traceFormat":
            self._format = []
        elif name == "channel" and self._format is not None:
            sign = -1.0 if attributes.get("orientation") == "-ve" else 1.0
            self._format.append((attributes.get("name", "") + "?" * self._optional, sign))
        elif name == "intermittentChannels":
            self._optional = True
        elif name == "trace":
            if "continuation" in attributes:
                raise self._error(line, "a trace with continuation, which is not read; join its parts to one trace")
            self._content = [] if attributes.get("type", "penDown") == "penDown" else None

    def text(self, content: str) -> None:
        if self._content is not None:
            self._content.append(content)

    def end(self, name: str, line: int) -> None:
        self._inside -= 1
        if name == "intermittentChannels":
            self._optional = False
        elif name == "traceFormat" and self._format:
            self._take_format(self._format, line)
        elif name == "trace" and self._content is not None:
            content, self._content = "".join(self._content), None
            if content.strip():
                self.strokes.append(self._points(content, line))
        if name == "traceFormat":
            self._format = None

    def _take_format(self, found: list[tuple[str, float]], line: int) -> None:
        channels, down = [name for name, _ in found], dict(found)
        if "X" not in channels or "Y" not in channels:
            raise self._error(line, f"a traceFormat of the channels {', '.join(channels)}, expected X and Y among them")
        if self.channels not in (None, channels) or (self.strokes and self.channels is None):
            raise self._error(line, "a second traceFormat, but one for the whole file is read; split the file")
        self.channels, self.down = channels, {"X": down["X"], "Y": down["Y"]}

    def _points(self, content: str, line: int) -> NDArray[np.float64]:
        channels = self.channels or ["X", "Y"]
        needed = [name for name in channels if not name.endswith("?")]
        levels = [[0.0, 0.0, 0.0] for _ in channels]  # value, first and second difference of each channel
        orders = [0] * len(channels)
        points: list[list[float]] = []
        for text in content.strip().strip(",").split(","):
            tokens = self._tokens(text, line)
            if not len(needed) <= len(tokens) <= len(channels):
                raise self._error(
                    line, f"a point of {len(tokens)} values, {text.strip()!r}, expected {', '.join(channels)}"
                )
            for i, (prefix, value) in enumerate(tokens):
                orders[i] = ORDERS.get(prefix, orders[i])
                self._advance(levels[i], orders[i], value, line, channels[i], first=not points)
            points.append([levels[channels.index(axis)][0] * self.down[axis] for axis in ("X", "Y")])
        return np.array(points)

    def _tokens(self, text: str, line: int) -> list[tuple[str, str]]:
        tokens, place = [], 0
        text = text.rstrip()
        while place < len(text):
            found = TOKEN.match(text, place)
            if found is None:
                raise self._error(line, f"a trace that holds {text[place:].strip()[:20]!r} where a value is expected")
            tokens.append((found[1], found[2]))
            place = found.end()
        return tokens

    def _advance(self, level: list[float], order: int, word: str, line: int, channel: str, first: bool) -> None:
        """Move a channel on to its next value."""
        if channel not in ("X", "Y"):
            return
        if word in "?TF" or (first and (order or word == "*")):
            raise self._error(line, f"{word!r} as the channel {channel} of a point; expected a number")
        if word != "*":
            digits, hexadecimal = word.lstrip("#"), word.startswith("#")
            if hexadecimal and len(digits) > LONGEST:
                raise self._error(line, f"a number of {len(digits)} digits; expected a coordinate")
            level[order] = float(int(digits, 16)) if hexadecimal else float(word)
        if order == 2:
            level[1] += level[2]
        if order:
            level[0] += level[1]

    def _error(self, line: int, problem: str) -> UserError:
        return UserError(f"{self.path}: line {line}: {problem}")


def _parse_xml(
    path: Path,
    start: Callable[[str, dict[str, str], int], object],
    end: Callable[[str, int], object],
    text: Callable[[str], object] | None = None,
) -> None:
    """Read an XML file; elements are handed on by their names without a name space, with their line.

    A document type is refused: it is where entities are declared that grow without bound or read other files.
    """
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True

    def doctype(*_: Any) -> NoReturn:
        raise UserError(
            f"{path}: line {parser.CurrentLineNumber}: declares a document type, which is never read; remove it"
        )

    def started(name: str, attributes: dict[str, str]) -> None:
        start(name.rpartition(" ")[2], attributes, parser.CurrentLineNumber)

    def ended(name: str) -> None:
        end(name.rpartition(" ")[2], parser.CurrentLineNumber)

    parser.StartDoctypeDeclHandler = doctype
    parser.EntityDeclHandler = doctype
    parser.StartElementHandler = started
    parser.EndElementHandler = ended
    parser.CharacterDataHandler = text
    try:
        with explained(path), path.open("rb") as file:
            parser.ParseFile(file)
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise UserError(f"{path}: line {error.lineno}: is not valid XML ({reason}); copy the file again") from None
    except (LookupError, ValueError) as error:  # an encoding that Python does not know
        raise UserError(f"{path}: can't be decoded ({error}); save it as UTF-8") from None


def quickdraw_lines(path: Path, name: str) -> Iterator[tuple[str, int, bytes]]:
    """Yield the drawings of a QuickDraw file, unread: what to call each, its line's number and the line.

    Args:
        path: The ``.ndjson`` file, a JSON object per line.
        name: What the file is called; a drawing's name is that and its ``key_id``, or its line where it has none.
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

    Returns:
        Rows (dx, dy, lift), shape (steps, 3), y growing downward.

    Raises:
        UserError: It is not such an object.
    """
    place = f"{path}: line {number}"
    try:
        found = json.loads(line)
    except (RecursionError, ValueError) as error:
        reason = str(error)[:200]
        raise UserError(
            f"{place}: is not a valid JSON object ({reason}); remove the line or copy the file again"
        ) from None
    drawing = found.get("drawing") if isinstance(found, dict) else None
    if not isinstance(drawing, list):
        raise UserError(f'{place}: has no list "drawing", as QuickDraw\'s files have; remove the line')
    return _rows(place, [_quickdraw_stroke(place, i, stroke) for i, stroke in enumerate(drawing)])


def _quickdraw_stroke(place: str, i: int, stroke: Any) -> NDArray[np.float64]:
    wanted = "expected [xs, ys] or [xs, ys, times], lists of numbers of one length"
    if not isinstance(stroke, list) or len(stroke) not in (2, 3) or not all(isinstance(axis, list) for axis in stroke):
        raise UserError(f"{place}: stroke {i} is something else; {wanted}")
    if len({len(axis) for axis in stroke}) > 1:
        raise UserError(f"{place}: stroke {i} has lists of {' and '.join(str(len(axis)) for axis in stroke)}; {wanted}")
    if not all(type(value) in (int, float) for axis in stroke[:2] for value in axis):
        raise UserError(f"{place}: stroke {i} holds something else than numbers; {wanted}")
    try:
        return np.array(stroke[:2], dtype=np.float64).T.reshape(-1, 2)
    except OverflowError:
        raise UserError(f"{place}: stroke {i} holds a number that is too large; {wanted}") from None


def _rows(place: object, strokes: Iterable[NDArray[np.float64]]) -> NDArray[np.float32]:
    rows = strokes_to_rows(list(strokes))
    if not np.isfinite(rows).all():
        raise UserError(f"{place}: holds coordinates that are not finite; fix or remove it")
    return rows


def read_sketch_rnn(path: Path, word: str, max_gb: float = MAX_GB) -> list[Any]:
    """Return the drawings of a split of a sketch-rnn archive, whatever they are.

    Such a file holds object arrays called train, valid and test, which are pickles: nothing but plain data and numpy
    arrays is read of them, and nothing that they name is run.

    Args:
        path: The ``.npz`` file.
        word: The array.
        max_gb: Gigabytes that it may take, or 16 times the file's size.

    Raises:
        UserError: It can't be read, holds no such array, or its pickle names anything else.
    """
    with opened_archive(path, "--data.root") as archive:
        if f"{word}.npy" not in archive.archive.namelist():
            raise UserError(f"{path}: has no array {word}; a sketch-rnn archive holds train, valid and test")
        require_size(path, archive.archive.getinfo(f"{word}.npy").file_size, max_gb)
        damaged = undamaged(f"{path}: {word} can't be read", "copy the file again")
        with damaged, archive.archive.open(f"{word}.npy") as file:
            try:
                drawings = _object_array(file)  # to its end, where its checksum is compared
            except UnsafePickleError as error:
                raise UserError(
                    f"{path}: {word} is not plain data: {error}; get the file from where you trust it"
                ) from None
    require_size(path, sum(map(_nbytes, drawings)), max_gb)
    return drawings


def _nbytes(drawing: Any) -> int:
    """Return the bytes of a drawing, of which a few bytes of a pickle may name thousands."""
    return (
        int(drawing.nbytes)
        if isinstance(drawing, np.ndarray)
        else 24 * len(drawing)
        if isinstance(drawing, list | tuple)
        else 0
    )


def _object_array(file: IO[bytes]) -> list[Any]:
    """Read an ``.npy`` file, with our own unpickler in the place of numpy's."""
    shape, fortran, dtype = npy_header(file)
    if dtype.hasobject:
        found = unpickle(file)  # type: ignore[arg-type]  # a member of a zip reads like any binary file
        if not isinstance(found, (np.ndarray, list)):
            raise ValueError(f"a {type(found).__name__} in the place of an array")
        return list(found)
    if dtype.kind not in "iuf" or len(shape) != 3:
        raise ValueError(f"an array of type {dtype} and shape {shape} in the place of drawings")
    content = file.read()
    if len(content) != int(np.prod(shape)) * dtype.itemsize:
        raise ValueError("its bytes do not add up")
    return list(np.frombuffer(content, dtype=dtype).reshape(shape, order="F" if fortran else "C"))
