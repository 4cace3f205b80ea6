"""What synthetic datamodules share: sequences that a function draws from a seed, once or in every epoch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from copy import copy
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch, SequenceSample
from vrnn_lightning.data import SequenceDataModule, Split, require
from vrnn_lightning.errors import UserError

__all__ = [
    "ExactDataModule", "Floats", "Lengths", "MotionDataModule", "SyntheticDataModule", "integrate", "valid_values",
    "require",
]  # fmt: skip

MAX_GB = 16.0
"""Gigabytes that a split may take while it is drawn, its values in float64."""
PER_SEQUENCE = 1000
"""Bytes of a sequence besides its values."""
Floats = NDArray[np.float64]
Lengths = NDArray[np.int64]


class SyntheticDataModule(SequenceDataModule):
    """Base class of datamodules without files: give it :meth:`draw`, it does sizes, lengths, seeds and epochs.

    Without ``scaling``, data units are the model's units.

    Each split has its own streams of random numbers: for the lengths and for each epoch's values. So any process can
    draw an epoch without those before it, in one go for all of its sequences.

    Args:
        num_features: Features per step.
        steps: Longest sequence, T.
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

    generator: ClassVar[Literal["numpy", "torch"]] = "numpy"
    noun: ClassVar[str] = ""
    """What to call a sequence; by default the words of the class's name."""
    missing_rate: float = 0.0
    """Probability of each value to be missing."""

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
        self.steps = require("steps", steps, 1)
        self.min_steps = steps if min_steps is None else min_steps
        self.fresh = fresh
        for split, size in self.sizes.items():
            require(f"{split}_size", size, 1)
        if not 1 <= self.min_steps <= self.steps:
            raise UserError(f"--data.min_steps {self.min_steps}: must lie between 1 and --data.steps, {self.steps}")
        split, size = max(self.sizes.items(), key=lambda item: item[1])
        needed = size * (self.steps * self.num_features * 8 + PER_SEQUENCE) / 1e9
        if needed > MAX_GB:
            raise UserError(
                f"--data.{split}_size {size} x --data.steps {self.steps} x {self.num_features} features: takes "
                f"{needed:.1f} GB, more than {MAX_GB:g} GB. Fix: give fewer sequences or steps"
            )

    @abstractmethod
    def draw(self, lengths: Lengths, random: Any) -> Floats | Tensor:
        """Draw sequences: values of shape (sequences, at least the longest, features).

        Args:
            lengths: Steps of each sequence.
            random: A generator of random numbers, numpy's or torch's as :attr:`generator` says.
        """

    def sequences(self, split: Split) -> list[SequenceSample]:
        return Redrawn(self) if self.fresh and split == "train" else self.epoch_of(split, 0)

    def epoch_of(self, split: Split, epoch: int) -> list[SequenceSample]:
        lengths, random = self._open_stream(split, epoch)
        values = torch.as_tensor(self.draw(lengths, random))
        seen = torch.rand(values.shape, generator=random) >= self.missing_rate if self.missing_rate else None
        noun = self.noun or "".join(f" {c.lower()}" if c.isupper() else c for c in type(self).__name__).strip()
        return [
            SequenceSample(values[i, :n].float(), None if seen is None else seen[i, :n], name=f"{split} {noun} {i}")
            for i, n in enumerate(lengths.tolist())
        ]

    def _open_stream(self, split: Split, epoch: int) -> tuple[Lengths, Any]:
        """Return the lengths of a split's sequences, the same in all epochs, and an epoch's random numbers."""
        number, size = ("train", "val", "test").index(split), self.sizes[split]
        if self.generator == "numpy":
            lengths = np.random.default_rng((self.seed, number)).integers(self.min_steps, self.steps + 1, size)
            return lengths, np.random.default_rng((self.seed, number, 1 + epoch))
        generator = torch.Generator().manual_seed(self.seed * 3 + number)
        lengths = torch.randint(self.min_steps, self.steps + 1, (size,), generator=generator).numpy()
        if epoch:
            (own,) = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64).tolist()
            generator.manual_seed(own >> 1)
        return lengths, generator


class MotionDataModule(SyntheticDataModule):
    """Base class of synthetic datamodules that follow a differential equation and add Gaussian noise.

    Args:
        num_features: Features per step.
        noise: Standard deviation of the noise; 0 for none.
        steps: Longest sequence, T.
        interval: Time between two steps, in the equation's unit (seconds for a pendulum), at most 1.
        train_size: Training sequences.
        val_size: Validation sequences.
        test_size: Test sequences.
        options: The other options of ``SyntheticDataModule``.
    """

    def __init__(
        self,
        num_features: int,
        noise: float,
        steps: int = 100,
        interval: float = 0.05,
        train_size: int = 1024,
        val_size: int = 128,
        test_size: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(num_features, steps, train_size, val_size, test_size, **options)
        self.interval = require("interval", interval, 1e-4, 1)
        self.noise = require("noise", noise, 0, 1e3)


class ExactDataModule(SyntheticDataModule):
    """Base class of synthetic datamodules whose density is known: give it :meth:`log_density` too.

    Args:
        num_features: Features per step.
        steps: Longest sequence, T.
        train_size: Training sequences.
        val_size: Validation sequences.
        test_size: Test sequences.
        options: The other options of ``SyntheticDataModule``.
    """

    generator: ClassVar[Literal["numpy", "torch"]] = "torch"

    def __init__(
        self,
        num_features: int,
        steps: int = 50,
        train_size: int = 4096,
        val_size: int = 512,
        test_size: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(num_features, steps, train_size, val_size, test_size, **options)

    @abstractmethod
    def log_density(self, x: Tensor, valid: Tensor) -> Tensor:
        """Return log p of the measured values of each sequence in nats, shape (batch,).

        Args:
            x: Values in float64 on the CPU, shape (batch, time, features), 0 where none was measured.
            valid: True where a value was measured, of the same shape.
        """

    def exact_log_likelihood(self, batch: SequenceBatch) -> Tensor:
        """Return log p(x) of the measured values of each sequence in nats, shape (batch,), on the CPU in float64."""
        return self.log_density(*valid_values(batch))


class Redrawn(list[SequenceSample]):
    """The training sequences of epoch 0, and the datamodule that draws those of another."""

    def __init__(self, source: SyntheticDataModule) -> None:
        super().__init__(source.epoch_of("train", 0))
        self.source = copy(source)
        self.source.__dict__.update(trainer=None, _splits={}, _lengths={})  # it travels to reading processes

    def in_epoch(self, epoch: int) -> list[SequenceSample]:
        return self.source.epoch_of("train", epoch) if epoch else self


def valid_values(batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Return a batch's values in float64, 0 where none was measured, and True where one was, both on the CPU."""
    valid = batch.valid_mask.cpu()
    return batch.x.detach().cpu().double().where(valid, 0.0), valid


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
