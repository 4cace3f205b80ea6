"""Memory that is used again: on a CPU, a fresh buffer's first touch costs more than what is then done with it."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty"]

SMALL = 2**16  # bytes; below, malloc has memory that was touched before
ALIGNED = 64  # bytes: a cache line, and the widest vector register
PATIENCE = 256  # requests after which a block that none of them took is given back


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor; on a CPU a large one may reuse the memory of a deleted tensor."""
    if device.type != "cpu" or math.prod(shape) * dtype.itemsize < SMALL:
        return torch.empty(*shape, dtype=dtype, device=device)
    return _pool.take(math.prod(shape) * dtype.itemsize).view(dtype).view(*shape)


class _Pool:
    """Blocks of memory, each lent to one tensor at a time.

    A tensor is made from an array that nothing else refers to, a view of a block. Tensor and views of it keep the array
    alive, and when the last of them is deleted, the array's finaliser gives the block back.
    """

    def __init__(self) -> None:
        self._free: list[tuple[np.ndarray, int]] = []  # blocks, and how many were asked for when they came back
        self._returned: deque[np.ndarray] = deque()
        self._asked = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """Return so many bytes."""
        with self._lock:
            self._asked += 1
            while self._returned:
                self._free.append((self._returned.popleft(), self._asked))
            if self._asked % (PATIENCE // 4) == 0:
                self._free = [(block, since) for block, since in self._free if since + PATIENCE > self._asked]
            wanted = size + ALIGNED
            fitting = [
                (block.nbytes, i) for i, (block, _) in enumerate(self._free) if wanted <= block.nbytes <= 2 * wanted
            ]
            if fitting:
                block, _ = self._free.pop(min(fitting)[1])
            else:
                grain = 2 ** max(wanted.bit_length() - 4, 0)  # lengths vary from batch to batch: leave some room
                block = np.empty(-(-wanted // grain) * grain, np.uint8)
        start = -block.ctypes.data % ALIGNED
        array = block[start : start + size]
        # appended without the lock, which this thread may hold when an array ends
        weakref.finalize(array, self._returned.append, block).atexit = False
        return torch.from_numpy(array)


_pool = _Pool()
