"""Pickles of plain data, read without running anything that they name."""

from __future__ import annotations

import math
import pickle
import reprlib
from collections.abc import Callable
from io import BytesIO
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["UnsafePickleError", "unpickle"]


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle names something other than plain data and numpy arrays; the message names it."""


def unpickle(file: BinaryIO) -> Any:
    """Read a pickle of numbers, words, lists, tuples, dicts and numpy arrays of these, and nothing else.

    No name in the pickle is ever looked up: functions of this module take the place of numpy's, and check arguments.
    Strings of Python 2 are read as Latin-1. The file is open in binary mode, at the pickle's start.

    Raises:
        UnsafePickleError: It names a class or function that is not part of numpy's arrays.
        pickle.UnpicklingError: It is not a pickle, is damaged, or an array in it does not add up.
    """
    try:
        return _PlainUnpickler(BytesIO(file.read()), encoding="latin1").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # Python's unpickler raises anything on damaged bytes
        raise pickle.UnpicklingError(f"not a pickle, or a damaged one ({error})") from None


def _make_array(*_: Any) -> NDArray[Any]:
    """Stand in for numpy's ``_reconstruct``: the array's state follows."""
    return np.empty(0, dtype="V1")


def _set_state(array: NDArray[Any], shape: Any, dtype: Any, fortran: Any, content: Any) -> NDArray[Any]:
    """Set an array's state after checking all that numpy relies on."""
    if not isinstance(dtype, np.dtype) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise pickle.UnpicklingError("an array without a type or shape")
    has_objects = dtype.kind == "O"
    raw = content.encode("latin1") if isinstance(content, str) else content
    size = math.prod(shape)
    if not isinstance(raw, list if has_objects else bytes) or len(raw) != size * (1 if has_objects else dtype.itemsize):
        raise pickle.UnpicklingError(f"an array of {size} elements whose content does not add up")
    array.__setstate__((1, tuple(shape), dtype, bool(fortran), raw))  # type: ignore[arg-type]  # numpy takes no np.bool_
    return array


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    """Stand in for numpy's function of this name, which protocol 5 writes."""
    if not isinstance(content, bytes | bytearray):
        raise pickle.UnpicklingError("an array without content")
    return _set_state(_make_array(), shape, dtype, order == "F", bytes(content))


def _make_dtype(code: Any, *_: Any) -> np.dtype[Any]:
    """Stand in for ``numpy.dtype``: numbers of a fixed size, or objects."""
    code = code.decode("latin1") if isinstance(code, bytes) else code
    dtype = np.dtype(code, copy=True) if isinstance(code, str) and code[:1] in set("biufO") else None
    if dtype is None or dtype.fields is not None or dtype.shape:
        raise pickle.UnpicklingError(f"an array of type {reprlib.repr(code)}, expected numbers")
    return dtype


def _make_scalar(dtype: Any, content: Any) -> Any:
    return _set_state(_make_array(), (), dtype, False, content)[()]


def _make_bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"bytes encoded as {reprlib.repr(encoding)}")
    return text.encode("latin1")


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _make_array,
    ("numpy", "dtype"): _make_dtype,
    ("_codecs", "encode"): _make_bytes,  # how protocols 0 to 2 write bytes
    ("__builtin__", "bytes"): _make_bytes,  # and none
    ("builtins", "bytes"): _make_bytes,
}
for _package in ("numpy.core", "numpy._core"):
    STAND_INS[f"{_package}.multiarray", "_reconstruct"] = _make_array
    STAND_INS[f"{_package}.multiarray", "scalar"] = _make_scalar
    STAND_INS[f"{_package}.numeric", "_frombuffer"] = _from_buffer


class _PlainUnpickler(pickle._Unpickler):
    """Reads in Python: the one in C takes gigabytes where a damaged byte gives a memo a large number."""

    stack: list[Any]

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return STAND_INS[module, name]
        except KeyError:
            raise UnsafePickleError(f"it names {module}.{name}, which is never loaded") from None

    def persistent_load(self, pid: Any, /) -> Any:
        raise UnsafePickleError("it refers to something outside the file")

    def load_build(self) -> None:
        """Set the state of an array, or the byte order of a type, and nothing else."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, np.ndarray):
            _set_state(target, *state[1:])
        elif not isinstance(target, np.dtype):
            raise pickle.UnpicklingError("a state of something that has none")
        elif state[1] in ("<", ">"):
            target.__setstate__(target.newbyteorder(state[1]).__reduce__()[2])  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {  # type: ignore[misc]  # a class variable there too
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
    }
