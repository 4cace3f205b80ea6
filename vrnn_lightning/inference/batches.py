"""Sequences in data units as batches of a model, and its evaluation on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch, SequenceSample, pad
from vrnn_lightning.data import Scaler
from vrnn_lightning.errors import UserError
from vrnn_lightning.noise import Noise
from vrnn_lightning.vrnn import VRNN

__all__ = ["Given", "evaluating", "make_batch", "make_noise", "trim"]

Given = Tensor | Sequence[Tensor] | SequenceBatch
"""Sequences in data units: one tensor of shape (batch, time, features), or tensors of shape (time, features), NaN where
a value is missing; or a datamodule's batch, which is in scaled units."""


@contextmanager
def evaluating(model: VRNN, seed: int | None) -> Iterator[None]:
    """Evaluate a model without gradient and, with a seed, with generators of its own."""
    is_training = model.training
    device = model.input_mean.device
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else [], seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        model.train(is_training)


def make_batch(
    model: VRNN, scaler: Scaler, sequences: Given, inputs: Given | None, *, is_stepped: bool = False
) -> SequenceBatch:
    """Return sequences as a batch in scaled units, on the model's device; raise for ``is_first`` if ``is_stepped``."""
    like = model.input_mean
    if isinstance(sequences, SequenceBatch):
        batch = sequences
        if is_stepped and batch.is_first is not None and (batch.is_first & batch.mask)[:, 1:].any():
            raise UserError("the batch has is_first, which this method does not read. Fix: give each episode by itself")
    else:
        xs = list(sequences)
        if not xs:
            raise UserError("no sequence is given. Fix: give at least one")
        us: list[Tensor | None] = [None] * len(xs) if inputs is None else list(cast("Sequence[Tensor]", inputs))
        if len(us) != len(xs):
            raise UserError(f"inputs: of {len(us)} sequences, but {len(xs)} are given. Fix: give one tensor for each")
        samples = enumerate(zip(xs, us, strict=True))
        batch = pad([_make_sample(f"sequence {i}", x, u, model.num_features) for i, (x, u) in samples])
        batch.x = scaler.scale(batch.x.double()).masked_fill(~batch.valid_mask, 0.0)
    tensors: dict[str, Any] = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    moved = {name: value.to(like.device) for name, value in tensors.items()}
    return replace(batch, **moved | {"x": batch.x.to(like)})


def _make_sample(name: str, x: Tensor, inputs: Tensor | None, width: int) -> SequenceSample:
    if x.ndim != 2 or x.shape[1] != width or len(x) == 0:
        raise UserError(f"{name}: has shape {tuple(x.shape)}, expected (time, {width}) with at least one step")
    if x.isinf().any():
        raise UserError(f"{name}: holds infinite values. Fix: correct them, or give NaN where they are missing")
    missing = x.isnan()
    return SequenceSample(x.double().masked_fill(missing, 0.0), ~missing if missing.any() else None, inputs, name)


def make_noise(batch: SequenceBatch, seed: int | None) -> Noise:
    """Return the noise of a pass over a batch; ``None`` draws its seeds from torch's generator."""
    return Noise(batch) if seed is None else Noise.named(batch, seed)


def trim(values: Tensor, lengths: Tensor) -> list[Tensor]:
    """Return the values of each sequence, shape (time, ...), without padding."""
    return [value[:length] for value, length in zip(values, lengths.tolist(), strict=True)]
