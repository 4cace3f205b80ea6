"""Random numbers of a pass over a batch, each a function of its sequence's seed and of its position."""

from __future__ import annotations

import copy
import hashlib
import math

import torch
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch

__all__ = ["Noise", "hash_rows", "uniform_of"]

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the increment of SplitMix64, as a signed number
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
LATENT, CHOICE, DROPOUT, INITIAL = 1, 2, 3, 4  # purposes of a stream of numbers


class Noise:
    r"""Random numbers for the sequences of a batch, each a function of the sequence's seed and the position in it.

    Padding, the other sequences of the batch, their order, the process, the device and the windows in which a sequence
    is read do not change them, and a repeated call returns the same numbers. They come from SplitMix64 (Steele et al.
    2014) with the position as its counter; normal ones by Box and Muller (1958).

    Args:
        batch: Gives the size, data type and device, and in ``start`` the position of each row's first step.
        seeds: One per sequence; by default drawn from torch's global generator.

    >>> batch = SequenceBatch(torch.zeros(2, 3, 1), torch.tensor([3, 1]))
    >>> Noise(batch, [0, 1]).over_time(4).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, batch: SequenceBatch, seeds: list[int] | None = None) -> None:
        given = torch.randint(2**62, (len(batch),)) if seeds is None else torch.tensor(seeds, dtype=torch.int64)
        self._seeds = _mix(given.to(batch.x.device))
        self._start: Tensor | None = getattr(batch, "start", None)
        self._first, self._steps = 0, batch.x.shape[1]
        self._first_sample = 0
        self._dtype = batch.x.dtype

    @classmethod
    def named(cls, batch: SequenceBatch, *place: object, unnamed: tuple[object, ...] = ()) -> Noise:
        """Derive each sequence's seed from its name and ``place``, which identifies the pass.

        A sequence without a name is identified by its row and ``unnamed``, which identifies the batch.
        """
        names = batch.names or [""] * len(batch)
        words = [" ".join(map(str, (*place, name or (*unnamed, i)))) for i, name in enumerate(names)]
        digests = [hashlib.blake2b(word.encode(), digest_size=8).digest() for word in words]
        return cls(batch, [int.from_bytes(digest, signed=True) for digest in digests])

    def window(self, first: int, last: int) -> Noise:
        """Return the noise of the steps from ``first`` to before ``last``."""
        part = copy.copy(self)
        part._first, part._steps = self._first + first, last - first
        return part

    def samples_from(self, first: int) -> Noise:
        """Return the noise of the samples from number ``first`` on."""
        part = copy.copy(self)
        part._first_sample = self._first_sample + first
        return part

    def over_time(self, width: int, samples: int = 1) -> Tensor:
        """Draw standard normal numbers.

        Returns:
            Shape (samples * batch, time, width); row ``k * batch + i`` is sample k of sequence i.
        """
        return self._normal(self._keys(LATENT), width, samples)

    def normal(self, width: int, samples: int = 1) -> Tensor:
        """Draw standard normal numbers once for a whole sequence, shape (samples * batch, width)."""
        return self._normal(_mix(self._seeds + INITIAL)[None], width, samples)[:, 0]

    def _normal(self, keys: Tensor, width: int, samples: int) -> Tensor:
        pairs = -(-width // 2)
        bits = _stream(keys, samples * pairs, self._first_sample * pairs)  # (time, batch, samples * pairs)
        if bits.numel() == 0:
            return torch.zeros(samples * len(self._seeds), len(keys), width, dtype=self._dtype, device=bits.device)
        normal = _normal(bits, self._dtype)  # (time, batch, samples * pairs, 2)
        shaped = normal.view(*bits.shape[:2], samples, 2 * pairs)[..., :width]
        return shaped.transpose(1, 2).flatten(1, 2).transpose(0, 1)

    def uniform_over_time(self, width: int) -> Tensor:
        """Draw from [0, 1), shape (batch, time, width)."""
        return _uniform(_stream(self._keys(CHOICE), width), self._dtype).transpose(0, 1)

    def uniform(self, width: int) -> Tensor:
        """Draw from [0, 1) once for a whole sequence, shape (batch, width)."""
        return _uniform(_stream(_mix(self._seeds + DROPOUT), width), self._dtype)

    def _keys(self, purpose: int) -> Tensor:
        """Return a seed for each step of each sequence, shape (time, batch)."""
        time = torch.arange(self._first, self._first + self._steps, device=self._seeds.device)[:, None]
        time = time if self._start is None else time + self._start
        return _mix(_mix(self._seeds + purpose) + (time + 1) * GOLDEN)


def hash_rows(x: Tensor) -> Tensor:
    """Return a 64-bit number for each row of an array of numbers, shape (..., width) to (...)."""
    bits = x.detach().float().contiguous().view(torch.int32).long()
    return (bits * _mix(torch.arange(1, x.shape[-1] + 1, device=x.device))).sum(-1)


def uniform_of(keys: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Draw from [0, 1), each number a function of a 64-bit key and of its position, shape (..., width).

    >>> uniform_of(torch.arange(2), 3, torch.float32).shape
    torch.Size([2, 3])
    """
    return _uniform(_stream(_mix(keys), width), dtype)


def _mix(x: Tensor) -> Tensor:
    """Return SplitMix64's output function of 64-bit numbers."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * FACTORS[0]
    x = (x ^ ((x >> 27) & (2**37 - 1))) * FACTORS[1]
    return x ^ ((x >> 31) & (2**33 - 1))


def _stream(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Return numbers ``first`` to before ``first + count`` of the generators seeded with keys, shape (..., count)."""
    places = torch.arange(first + 1, first + count + 1, device=keys.device) * GOLDEN
    return _mix(keys[..., None] + places)


def _uniform(bits: Tensor, dtype: torch.dtype) -> Tensor:
    digits = 53 if dtype == torch.float64 else 24
    whole: Tensor = (bits >> (64 - digits)) & (2**digits - 1)
    return whole.to(dtype) * 2.0**-digits


def _normal(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return two standard normal numbers for each 64 bits, shape (..., 2)."""
    wide = torch.promote_types(dtype, torch.float32)
    high, low = (bits >> 32).to(wide), (bits & (2**32 - 1)).to(wide)
    radius = high.mul_(2.0**-32).add_(0.5).clamp_(min=2.0**-33).log_().mul_(-2).sqrt_()
    angle = low.mul_(2 * math.pi * 2.0**-32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).to(dtype)
