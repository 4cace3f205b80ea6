"""Random numbers of a pass over a batch, from a generator per sequence."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch

__all__ = ["Noise"]


class Noise:
    """Draws for every sequence of a batch from a generator of its own.

    What a sequence gets depends on its seed and on what was drawn for it before, not on padding, on the other sequences
    of the batch, on their order or on the process that holds it.

    Args:
        batch: Its lengths, data type and device are those of the draws.
        seeds: One per sequence; drawn from torch's global generator if not given.

    >>> batch = SequenceBatch(torch.zeros(2, 3, 1), torch.tensor([3, 1]))
    >>> noise = Noise(batch, [0, 1]).over_time(4)
    >>> noise.shape, bool((noise[1, 1:] == 0).all())
    (torch.Size([2, 3, 4]), True)
    """

    def __init__(self, batch: SequenceBatch, seeds: list[int] | None = None) -> None:
        seeds = torch.randint(2**62, (len(batch),)).tolist() if seeds is None else seeds
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._lengths: list[int] = batch.lengths.tolist()
        self._steps = batch.x.shape[1]
        self._like = batch.x

    @classmethod
    def named(cls, batch: SequenceBatch, *place: object, unnamed: tuple[object, ...] = ()) -> Noise:
        """Make seeds of each sequence's name and of ``place``, whatever tells this pass from others.

        A sequence without a name is known by its row, and by ``unnamed``, whatever tells this batch from others.
        """
        names = batch.names or [""] * len(batch)
        words = [" ".join(map(str, (*place, name or (*unnamed, i)))) for i, name in enumerate(names)]
        digests = [hashlib.blake2b(word.encode(), digest_size=8).digest() for word in words]
        return cls(batch, [int.from_bytes(digest, signed=True) for digest in digests])

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers, shape (batch, *shape)."""
        return self._stack([torch.randn(shape, generator=g, dtype=self._like.dtype) for g in self._generators])

    def uniform(self, *shape: int) -> Tensor:
        """Draw from [0, 1), shape (batch, *shape)."""
        return self._stack([torch.rand(shape, generator=g, dtype=self._like.dtype) for g in self._generators])

    def over_time(self, width: int, samples: int = 1) -> Tensor:
        """Draw standard normal numbers for the real steps, zero at padding.

        Returns:
            Shape (samples * batch, time, width); row ``k * batch + i`` is sample k of sequence i.
        """
        drawn = torch.zeros(samples, len(self._lengths), self._steps, width, dtype=self._like.dtype)
        for i, (generator, length) in enumerate(zip(self._generators, self._lengths, strict=True)):
            size = (samples, length, width)
            drawn[:, i, :length] = torch.randn(size, generator=generator, dtype=self._like.dtype)
        return drawn.flatten(0, 1).to(self._like.device)

    def _stack(self, drawn: list[Tensor]) -> Tensor:
        return torch.stack(drawn).to(self._like.device)
