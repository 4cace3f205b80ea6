"""What the methods of a model, its sessions, imputations and exports share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vrnn_lightning.data import Scaler
from vrnn_lightning.errors import UserError
from vrnn_lightning.filtering import Resampling

__all__ = ["RESAMPLING", "log_std", "require_numbers", "require_shape"]

RESAMPLING = Resampling()
"""The resampling of every particle filter here."""


def require_shape(name: str, value: Tensor | None, *shape: int) -> None:
    """Raise a :class:`UserError` if a tensor is missing or of another shape."""
    if value is None or value.shape != shape:
        given = "none" if value is None else f"shape {tuple(value.shape)}"
        raise UserError(f"{name}: must have shape {shape}, but got {given}")


def require_numbers(source: object, weights: Mapping[str, Tensor]) -> None:
    """Raise a :class:`UserError` if a weight is not finite or narrower than float32."""
    for name, value in weights.items():
        if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            raise UserError(f"{source}: {name} is {value.dtype}. Fix: convert it to float32 or float64")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{source}: {name} holds values that are not numbers. Fix: take an earlier checkpoint")
        if name.endswith(("scale_std", "input_std")) and not (value > 0).all():
            raise UserError(f"{source}: {name} is not positive. Fix: take an earlier checkpoint")


def log_std(scaler: Scaler, valid: Tensor) -> Tensor:
    """Return the logarithm of the scaler's Jacobian at valid values, shape (...)."""
    jacobian: Tensor = (scaler.std.to(valid.device).double().log() * valid).sum(-1)
    return jacobian
