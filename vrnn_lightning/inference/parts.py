"""What sessions, imputations and the model's methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from vrnn_lightning.data import Scaler
from vrnn_lightning.errors import UserError
from vrnn_lightning.filtering import Resampling
from vrnn_lightning.recurrence import State

__all__ = ["RESAMPLING", "choose", "drawn_by_weight", "log_std", "require", "require_shape"]

RESAMPLING = Resampling()
"""Of every particle filter here."""


def require(name: str, value: int, least: int = 1) -> None:
    """Refuse a number that is too small.

    Raises:
        UserError: It is.
    """
    if value < least:
        raise UserError(f"{name} {value}: must be at least {least}")


def require_shape(name: str, given: Tensor | None, *shape: int) -> None:
    """Refuse a tensor that is missing or of another shape.

    Raises:
        UserError: It is.
    """
    if given is None or given.shape != shape:
        found = "none" if given is None else f"shape {tuple(given.shape)}"
        raise UserError(f"{name}: must have shape {shape}, but got {found}")


def log_std(scaler: Scaler, counted: Tensor) -> Tensor:
    """Return the logarithm of the scaler's Jacobian at counted values, shape (...)."""
    jacobian: Tensor = (scaler.std.to(counted.device).double().log() * counted).sum(-1)
    return jacobian


def drawn_by_weight(log_weights: Tensor, count: int) -> Tensor:
    """Return indices drawn by weights of shape (particles, batch), systematically and in no order: (count, batch)."""
    uniform = torch.rand(1, log_weights.shape[1], device=log_weights.device)
    places = (uniform + torch.arange(count, device=uniform.device)[:, None]) / count
    chosen = torch.searchsorted(
        log_weights.double().softmax(0).cumsum(0).t().contiguous(), places.double().t().contiguous()
    )
    chosen = chosen.clamp(max=len(log_weights) - 1).t()
    return chosen.gather(0, torch.rand(chosen.shape, device=chosen.device).argsort(0))


def choose(log_weights: Tensor, state: State, count: int) -> State:
    """Return states of particles drawn by their weights, shape (samples, batch), as ``count * batch`` rows."""
    batch = log_weights.shape[1]
    rows = (drawn_by_weight(log_weights, count) * batch + torch.arange(batch, device=log_weights.device)).flatten()
    return State(state.h[rows], None if state.c is None else state.c[rows])
