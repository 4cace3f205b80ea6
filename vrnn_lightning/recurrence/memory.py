"""Memory that is used again: on a CPU, a fresh buffer's first touch costs more than what is then done with it."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty"]

SMALL = 2**16  # bytes; below, malloc has memory that was touched before
ALIGNED = 64  # bytes: a cache line, and the widest vector register
PATIENCE = 256  # buffers asked for until one that nobody wants is given back


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor, on a CPU perhaps on memory that no other tensor lies on any more."""
    if device.type != "cpu" or math.prod(shape) * dtype.itemsize < SMALL:
        return torch.empty(*shape, dtype=dtype, device=device)
    return _pool.take(math.prod(shape) * dtype.itemsize).view(dtype).view(*shape)


class _Pool:
    """Arrays, each lent to one tensor at a time.

    A tensor made from an array holds a reference to it for as long as it, or any view of it, lives, whoever has it: an
    array that the pool alone refers to is free.
    """

    def __init__(self) -> None:
        self._arrays: list[tuple[np.ndarray, int]] = []
        self._asked = 0
        self._lock = threading.Lock()
        self._arrays.append((np.empty(0, np.uint8), 0))
        self._alone = self._references(0)
        self._arrays.clear()

    def take(self, size: int) -> Tensor:
        """Return so many bytes."""
        with self._lock:
            self._asked += 1
            if self._asked % (PATIENCE // 4) == 0:
                self._give_back()
            wanted = size + ALIGNED
            fitting = [
                (array.nbytes, i) for i, (array, _) in enumerate(self._arrays) if wanted <= array.nbytes <= 2 * wanted
            ]
            place = next((i for _, i in sorted(fitting) if self._references(i) == self._alone), len(self._arrays))
            if place == len(self._arrays):
                grain = 2 ** max(wanted.bit_length() - 4, 0)  # lengths vary from batch to batch: leave some room
                self._arrays.append((np.empty(-(-wanted // grain) * grain, np.uint8), 0))
            array = self._arrays[place][0]
            self._arrays[place] = (array, self._asked)
            start = -array.ctypes.data % ALIGNED
            return torch.from_numpy(array)[start : start + size]

    def _references(self, place: int) -> int:
        return sys.getrefcount(self._arrays[place][0])

    def _give_back(self) -> None:
        self._arrays = [
            self._arrays[i]
            for i, (_, asked) in enumerate(self._arrays)
            if asked + PATIENCE > self._asked or self._references(i) != self._alone
        ]


_pool = _Pool()
