"""A datamodule to copy: put this file into a folder ``datamodules/`` where you work, then make it yours.

The documentation's page on your own data and parts lists the hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import Normal

from vrnn_lightning.batch import SequenceBatch, SequenceSample
from vrnn_lightning.data import Modality, SequenceDataModule, Sequences, Split

__all__ = ["MyData"]


class MyData(SequenceDataModule):
    """A first-order autoregression: each value is ``memory`` times the last one plus unit Gaussian noise.

    Args:
        num_sequences: Training sequences; validation and test get a tenth of that each, at least one.
        num_steps: Time steps of each sequence.
        memory: How much of a value the next one keeps, between -1 and 1.
        options: The options of :class:`~vrnn_lightning.SequenceDataModule`.
    """

    modality: ClassVar[Modality] = "series"
    scaling: ClassVar[Literal["none", "scalar", "per_feature"]] = "per_feature"

    def __init__(self, num_sequences: int = 500, num_steps: int = 50, memory: float = 0.9, **options: Any) -> None:
        super().__init__(num_features=1, **options)
        self.num_sequences = num_sequences
        self.num_steps = num_steps
        self.memory = memory

    def sequences(self, split: Split) -> Sequences:
        """Return the sequences of a split, each of shape (num_steps, 1)."""
        count = self.num_sequences if split == "train" else max(1, self.num_sequences // 10)
        generator = torch.Generator().manual_seed(3 * self.seed + ("train", "val", "test").index(split))
        x = torch.randn(count, self.num_steps, 1, generator=generator)
        x[:, 0] /= (1 - self.memory**2) ** 0.5  # the spread that the recursion keeps
        for t in range(1, self.num_steps):
            x[:, t] += self.memory * x[:, t - 1]
        return [SequenceSample(row, name=f"{split} {i}") for i, row in enumerate(x)]

    def lengths(self, split: Split) -> Sequence[int]:
        """Return the steps of each sequence of a split."""
        return [self.num_steps] * len(self.split(split))

    def exact_log_likelihood(self, batch: SequenceBatch) -> Tensor:
        """Return the true log p(x) of each sequence in nats, in scaled units, shape (batch,)."""
        x = self.scaler.unscale(batch.x)
        mean = torch.cat([torch.zeros_like(x[:, :1]), self.memory * x[:, :-1]], dim=1)
        std = torch.ones_like(x)
        std[:, 0] = (1 - self.memory**2) ** -0.5
        density: Tensor = Normal(mean, std).log_prob(x) + self.scaler.std.to(x).log()  # the scaler's Jacobian
        return (density * batch.valid_mask).sum((1, 2))
