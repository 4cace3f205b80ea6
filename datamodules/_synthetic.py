"""What synthetic datamodules share: sequences that a function draws from a seed, once or in every epoch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator

from vrnn_lightning.batch import SequenceSample
from vrnn_lightning.data import SequenceDataModule, Split
from vrnn_lightning.errors import UserError

__all__ = [
    "Draw",
    "Floats",
    "Redrawn",
    "SyntheticDataModule",
    "integrate",
    "measured",
    "opening",
    "require",
    "require_sizes",
]

MAX_GB = 16.0
"""Gigabytes that a split may take while it is drawn, its values in float64."""
PER_SEQUENCE = 1000
"""Bytes of a sequence besides its values."""
Floats = NDArray[np.float64]
Draw = Callable[[NDArray[np.int64], np.random.Generator], Floats]
"""Draws sequences of given lengths, shape (sequences,), as values of shape (sequences, longest, features)."""


class SyntheticDataModule(SequenceDataModule):
    """Base class of datamodules without files: give it :meth:`drawing`, it does sizes, lengths, seeds and epochs.

    Each split has streams of random numbers of its own: one for the lengths and, for each epoch, one for the values. So
    an epoch can be drawn without those before it, by any process, in one go for all of its sequences.

    Args:
        num_features: Features per step.
        steps: Longest sequence.
        train_size: Training sequences.
        val_size: Validation sequences.
        test_size: Test sequences.
        min_steps: Shortest sequence; lengths are uniform in between. ``None`` makes all of them ``steps`` long.
        fresh: Redraw the training sequences every epoch, in the same lengths.
        batch_size: Sequences per batch and process.
        options: The other options of :class:`~vrnn_lightning.SequenceDataModule`.

    Raises:
        UserError: An option outside its range.
    """

    def __init__(
        self,
        num_features: int,
        steps: int,
        train_size: int = 2048,
        val_size: int = 256,
        test_size: int = 256,
        min_steps: int | None = None,
        fresh: bool = False,
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(num_features=num_features, batch_size=batch_size, **options)
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        require_sizes(self.sizes, steps, min_steps, num_features)
        self.steps = steps
        self.min_steps = steps if min_steps is None else min_steps
        self.fresh = fresh

    @abstractmethod
    def drawing(self) -> Draw:
        """Return what draws the values; a function of a module or a partial, for it travels to reading processes."""

    def sequences(self, split: Split) -> list[SequenceSample]:
        """Draw a split's sequences."""
        stream = (self.seed, ("train", "val", "test").index(split))
        lengths = np.random.default_rng(stream).integers(self.min_steps, self.steps + 1, self.sizes[split])
        noun = "".join(f" {c.lower()}" if c.isupper() else c for c in type(self).__name__)
        draw = partial(_sequences, self.drawing(), lengths, stream, f"{split}{noun}")
        return Redrawn(draw) if self.fresh and split == "train" else draw(0)


class Redrawn(list[SequenceSample]):
    """The sequences of epoch 0, and what draws those of another."""

    def __init__(self, draw: Callable[[int], list[SequenceSample]]) -> None:
        super().__init__(draw(0))
        self.draw = draw

    def in_epoch(self, epoch: int) -> list[SequenceSample]:
        """Return the sequences of an epoch."""
        return self.draw(epoch) if epoch else self


def opening(split: Split, size: int, shortest: int, longest: int, seed: int, epoch: int) -> tuple[list[int], Generator]:
    """Return the lengths of a split's sequences, the same in all epochs, and an epoch's stream of random numbers."""
    generator = torch.Generator().manual_seed(seed * 3 + ("train", "val", "test").index(split))
    lengths: list[int] = torch.randint(shortest, longest + 1, (size,), generator=generator).tolist()
    if epoch:
        (own,) = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64).tolist()
        generator.manual_seed(own >> 1)
    return lengths, generator


def measured(
    name: str, x: torch.Tensor, lengths: list[int], missing_rate: float, generator: Generator
) -> list[SequenceSample]:
    """Return sequences of values of shape (sequences, longest, features), each of which may be missing."""
    seen = torch.rand(x.shape, generator=generator) >= missing_rate if missing_rate else None
    return [
        SequenceSample(x[i, :n].float(), None if seen is None else seen[i, :n], name=f"{name} {i}")
        for i, n in enumerate(lengths)
    ]


def _sequences(
    draw: Draw, lengths: NDArray[np.int64], stream: tuple[int, int], name: str, epoch: int
) -> list[SequenceSample]:
    values = torch.from_numpy(draw(lengths, np.random.default_rng((*stream, 1 + epoch)))).float()
    return [
        SequenceSample(x[:n], name=f"{name} {i}") for i, (x, n) in enumerate(zip(values, lengths.tolist(), strict=True))
    ]


def integrate(derivative: Callable[[Floats], Floats], state: Floats, interval: float | Floats, steps: int) -> Floats:
    """Follow an autonomous differential equation from many states, with the classical Runge-Kutta rule.

    Args:
        derivative: Of states of shape (variables, ...) with respect to time.
        state: Where to begin, shape (variables, ...).
        interval: Time between two steps, one or of shape (...); the rule itself steps by at most 0.01.
        steps: How many to return, the first of them ``state``.

    Returns:
        States of shape (variables, ..., steps).

    >>> integrate(lambda x: -x, np.ones(1), interval=1.0, steps=3)[0].round(9).tolist()
    [1.0, 0.367879441, 0.135335283]
    """
    substeps = math.ceil(np.max(interval) / 0.01)
    dt = interval / substeps
    path = [state]
    for _ in range(steps - 1):
        for _ in range(substeps):
            k1 = derivative(state)
            k2 = derivative(state + dt / 2 * k1)
            k3 = derivative(state + dt / 2 * k2)
            k4 = derivative(state + dt * k3)
            state = state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        path.append(state)
    return np.stack(path, -1)


def require(option: str, value: float, least: float, most: float | None = None) -> None:
    """Raise if an option is outside its range, whose ends are allowed; NaN is outside."""
    if most is None and not value >= least:
        raise UserError(f"--data.{option} {value}: must be at least {least}")
    if most is None and not value < 2**31:
        raise UserError(f"--data.{option} {value}: must be below 2^31")
    if most is not None and not least <= value <= most:
        raise UserError(f"--data.{option} {value}: must lie between {least} and {most}")


def require_sizes(sizes: Mapping[Split, int], steps: int, min_steps: int | None, num_features: int) -> None:
    """Raise if sizes of drawn data are outside their range, or take too much memory together.

    Args:
        sizes: Sequences of each split.
        steps: Longest sequence.
        min_steps: Shortest sequence, if there is one.
        num_features: Features per step.

    Raises:
        UserError: One of them is, or they do.
    """
    for option, value in (("steps", steps), *((f"{split}_size", size) for split, size in sizes.items())):
        require(option, value, 1)
    if min_steps is not None and not 1 <= min_steps <= steps:
        raise UserError(f"--data.min_steps {min_steps}: must lie between 1 and --data.steps, {steps}")
    split = max(sizes, key=lambda split: sizes[split])
    size = sizes[split]
    needed = size * (steps * num_features * 8 + PER_SEQUENCE) / 1e9
    if needed > MAX_GB:
        raise UserError(
            f"--data.{split}_size {size} x --data.steps {steps} x {num_features} features: takes {needed:.1f} GB, more "
            f"than {MAX_GB:g} GB. Fix: give fewer sequences or steps"
        )
