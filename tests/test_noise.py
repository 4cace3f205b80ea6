"""Every sequence draws from a generator of its own."""

from __future__ import annotations

import torch

from vrnn_lightning import SequenceBatch
from vrnn_lightning.noise import Noise


def batch_of(lengths: list[int], names: list[str] | None = None, steps: int | None = None) -> SequenceBatch:
    return SequenceBatch(torch.zeros(len(lengths), steps or max(lengths), 1), torch.tensor(lengths), names=names)


def test_neither_padding_nor_order_nor_company_changes_a_draw():
    together = Noise.named(batch_of([5, 3], ["a", "b"], steps=9), 7)
    alone = Noise.named(batch_of([3], ["b"]), 7)
    torch.testing.assert_close(together.uniform_over_time(4)[1, :3], alone.uniform_over_time(4)[0], rtol=0, atol=0)
    torch.testing.assert_close(together.uniform(4)[1], alone.uniform(4)[0], rtol=0, atol=0)
    first, second = together.over_time(4, samples=2), alone.over_time(4, samples=2)
    torch.testing.assert_close(first[[1, 3], :3], second, rtol=0, atol=0)  # rows k * batch + i


def test_place_and_name_tell_draws_apart():
    drawn = [
        Noise.named(batch_of([3], [name]), *place, unnamed=unnamed).over_time(8)
        for name, place, unnamed in (
            ("a", (1, 0), ()), ("b", (1, 0), ()), ("a", (2, 0), ()), ("a", (1, 1), ()),
            ("", (1, 0), (0,)), ("", (1, 0), (1,)),
        )
    ]  # fmt: skip
    assert len({tuple(d.flatten().tolist()) for d in drawn}) == len(drawn)
    torch.testing.assert_close(Noise.named(batch_of([3], ["a"]), 1, 0, unnamed=(5,)).over_time(8), drawn[0])


def test_samples_differ():
    noise = Noise.named(batch_of([6, 6], ["a", "b"]), 0).over_time(2, samples=3)
    assert noise.shape == (6, 6, 2)
    assert len({tuple(row.flatten().tolist()) for row in noise}) == 6
