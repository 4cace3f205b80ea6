"""What sessions, imputations and the model's methods share."""

from __future__ import annotations

from torch import Tensor

from vrnn_lightning.data import Scaler
from vrnn_lightning.errors import UserError
from vrnn_lightning.filtering import Resampling

__all__ = ["RESAMPLING", "log_std", "require", "require_shape"]

RESAMPLING = Resampling()
"""Of every particle filter here."""


def require(name: str, value: int, least: int = 1) -> None:
    """Raise if a number is too small.

    Raises:
        UserError: It is.
    """
    if value < least:
        raise UserError(f"{name} {value}: must be at least {least}")


def require_shape(name: str, given: Tensor | None, *shape: int) -> None:
    """Raise if a tensor is missing or of another shape.

    Raises:
        UserError: It is.
    """
    if given is None or given.shape != shape:
        found = "none" if given is None else f"shape {tuple(given.shape)}"
        raise UserError(f"{name}: must have shape {shape}, but got {found}")


def log_std(scaler: Scaler, valid: Tensor) -> Tensor:
    """Return the logarithm of the scaler's Jacobian at valid values, shape (...)."""
    jacobian: Tensor = (scaler.std.to(valid.device).double().log() * valid).sum(-1)
    return jacobian
