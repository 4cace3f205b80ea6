"""Pickles of plain data, read without running anything that they name."""

from __future__ import annotations

import math
import pickle
import reprlib
import struct
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["UnsafePickleError", "unpickle"]


DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
    struct.error,
)
"""What Python's unpickler raises on bytes that are not a pickle."""


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle names something else than plain data and numpy arrays; the message says what."""


def unpickle(file: BinaryIO) -> Any:
    """Read a pickle of numbers, words, lists, tuples, dicts and numpy arrays of these, and nothing else.

    No name in the pickle is ever looked up: stand-ins of ours take the place of what numpy writes, and check it.
    Strings of Python 2 are read as Latin-1.

    Args:
        file: Opened for reading in binary mode, at the pickle's start.

    Raises:
        UnsafePickleError: It names a class or function that is not part of numpy's arrays.
        pickle.UnpicklingError: It is not a pickle, is damaged, or an array in it does not add up.
    """
    try:
        return _plain(_PlainUnpickler(BytesIO(file.read()), encoding="latin1").load(), {})
    except pickle.UnpicklingError:
        raise
    except DAMAGE as error:
        raise pickle.UnpicklingError(f"no pickle, or a damaged one ({error})") from None
    except RecursionError:
        raise pickle.UnpicklingError("nested too deeply") from None


class _Type:
    """Stands in for ``numpy.dtype``: numbers of a fixed size, or objects."""

    def __init__(self, code: str, *_: Any) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        dtype = np.dtype(code) if isinstance(code, str) and code[:1] in set("biufO") else None
        if dtype is None or dtype.fields is not None or dtype.shape:
            raise pickle.UnpicklingError(f"an array of type {reprlib.repr(code)}, expected numbers")
        self.dtype: np.dtype[Any] = dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for ``numpy.ndarray``."""

    array: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, *given = state
        self.array = self._built(*given)

    @staticmethod
    def _built(shape: Any, kind: Any, fortran: Any, content: Any) -> NDArray[Any]:
        if not isinstance(kind, _Type) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise pickle.UnpicklingError("an array without a type or shape")
        size = math.prod(shape)
        if kind.dtype.kind == "O":
            if not isinstance(content, list) or len(content) != size:
                raise pickle.UnpicklingError("an array of objects that are not there")
            flat = np.empty(size, dtype=object)
            known: dict[int, tuple[Any, Any]] = {}
            for i, item in enumerate(content):
                flat[i] = _plain(item, known)
        else:
            raw = content.encode("latin1") if isinstance(content, str) else content
            if not isinstance(raw, bytes) or len(raw) != size * kind.dtype.itemsize:
                raise pickle.UnpicklingError(f"an array of {size} numbers whose bytes do not add up")
            flat = np.frombuffer(raw, dtype=kind.dtype).copy()
        rows_first = kind.dtype.kind == "O" or not fortran  # numpy lists objects by rows, however they lie in memory
        result: NDArray[Any] = flat.reshape(shape, order="C" if rows_first else "F")
        return result

    @classmethod
    def of_buffer(cls, content: Any, kind: Any, shape: Any, order: Any) -> _Array:
        """Stand in for numpy's function of this name, which protocol 5 writes."""
        self = cls()
        self.array = cls._built(shape, kind, order == "F", bytes(content))
        return self


def _array(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: _Type, raw: bytes | str) -> Any:
    content = raw.encode("latin1") if isinstance(raw, str) else raw
    if kind.dtype.kind == "O" or len(content) != kind.dtype.itemsize:
        raise pickle.UnpicklingError("a number whose bytes do not add up")
    return np.frombuffer(content, dtype=kind.dtype)[0]


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"bytes encoded as {reprlib.repr(encoding)}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


SETS = {code[0] for code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)}
"""What makes sets, which are not plain data."""
STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _bytes,  # how protocols 0 to 2 write bytes
    ("__builtin__", "bytes"): _no_bytes,  # and none
    ("builtins", "bytes"): _no_bytes,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    STAND_INS[_module, "_reconstruct"] = _array
    STAND_INS[_module, "scalar"] = _scalar
    STAND_INS[_module.replace("multiarray", "numeric"), "_frombuffer"] = _Array.of_buffer


class _PlainUnpickler(pickle._Unpickler):
    """Reads in Python: the one in C takes gigabytes where a damaged byte gives a memo a large number."""

    read: Callable[[int], bytes]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    append: Callable[[Any], None]

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return STAND_INS[module, name]
        except KeyError:
            raise UnsafePickleError(f"it names {module}.{name}, which is never loaded") from None

    def persistent_load(self, pid: Any, /) -> Any:
        raise UnsafePickleError("it refers to something outside the file")

    def load_build(self) -> None:
        """Set the state of a stand-in's instance, and of nothing else: stand-ins serve the next file too."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Type, _Array)):
            raise pickle.UnpicklingError("a state of something that has none")
        self.stack[-1].__setstate__(state)

    def load_setitem(self) -> None:
        """Take an entry of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def load_setitems(self) -> None:
        """Take entries of a dict."""
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        """Take an entry under a word or number: hashing tuples of tuples may take for ever."""
        if not isinstance(key, (str, bytes, int, float)) or not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError(f"a dict with a {type(key).__name__} for a key")
        self.stack[-1][key] = value

    def load_bytearray8(self) -> None:
        """Read what is there before making room for what is said to be there."""
        (size,) = struct.unpack("<Q", self.read(8))
        content = self.read(size)
        if len(content) < size:
            raise pickle.UnpicklingError("truncated")
        self.append(bytearray(content))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {  # type: ignore[misc]  # a class variable there too
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if code not in SETS},
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _plain(value: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    """Return a value with numpy's arrays in the place of stand-ins.

    Args:
        value: What was read.
        known: Of containers that were seen, by their identities, these themselves and what came of them: a few bytes
            may hold one of them a million times.
    """
    if id(value) in known:
        return known[id(value)][1]
    plain = _plain_anew(value, known)
    if isinstance(value, (dict, list, tuple)):
        known[id(value)] = value, plain
    return plain


def _plain_anew(value: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    if isinstance(value, _Array):
        if not hasattr(value, "array"):
            raise pickle.UnpicklingError("an array without content")
        return value.array
    if isinstance(value, (_Type, type)) or callable(value):
        raise pickle.UnpicklingError("a type where data is expected")
    if isinstance(value, dict):
        return {key: _plain(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, known) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item, known) for item in value)
    return value
