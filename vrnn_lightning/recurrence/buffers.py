"""What the steps of a tape read and write, described: the numbers themselves belong to a pass."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Buffer", "ParameterRef"]


class Buffer:
    """One quantity at every step of a pass, shape (steps, rows, width), or a view of another buffer.

    Args:
        width: Numbers per row.
        dtype: Their type.
        parent: The buffer that this one is a view of.
        place: Index of the view in its parent.
        requires_grad: Whether its gradient is computed.
    """

    def __init__(
        self,
        width: int,
        dtype: torch.dtype,
        parent: Buffer | None = None,
        place: Any = None,
        requires_grad: bool = True,
    ) -> None:
        self.requires_grad = requires_grad
        self.width, self.dtype = width, dtype
        self.parent, self.place = parent, place

    def columns(self, start: int, end: int) -> Buffer:
        """Return the view of the columns from ``start`` to before ``end``."""
        return Buffer(end - start, self.dtype, self, (..., slice(start, end)))

    def next_step(self) -> Buffer:
        """Return the view that begins one step later: a state as a later operation of the same step reads it."""
        return Buffer(self.width, self.dtype, self, slice(1, None))


class ParameterRef:
    """A tensor that all steps read, for example a transposed weight.

    Args:
        dtype: The type that steps read it in.
        requires_grad: Whether its gradient is computed.
    """

    def __init__(self, dtype: torch.dtype, requires_grad: bool = False) -> None:
        self.dtype, self.requires_grad = dtype, requires_grad
