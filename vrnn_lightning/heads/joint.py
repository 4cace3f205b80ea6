"""The head for frames whose columns differ in kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vrnn_lightning.errors import UserError
from vrnn_lightning.heads.base import FrameDistribution, Head, SampleShape, log_prob, tempered
from vrnn_lightning.heads.continuous import Gaussian

__all__ = ["Group", "Joint"]


@dataclass(frozen=True)
class Group:
    """Columns of a frame and their head.

    Args:
        columns: A list of columns, counted from 0, or a range "first:end" without its end; in YAML in quotes.
        head: Called with (in_features, num_features), returns the head.
    """

    columns: str | list[int]
    head: Callable[[int, int], Head] = Gaussian

    def indices(self) -> list[int]:
        """Return the columns; a UserError if there are none."""
        columns = self.columns
        if isinstance(columns, str):
            ends = re.fullmatch(r"(\d+):(\d+)", columns)
            columns = list(range(int(ends[1]), int(ends[2]))) if ends else []
        if not columns:
            raise UserError(f"columns {self.columns!r}: must be a list or a range such as '0:3', and not empty")
        return columns


class Joint(Head):
    r"""Groups of columns, each with its own head: real, binary and categorical values in one frame.

    .. math:: p(x) = \prod_g p_g(x_g), \qquad x_g = (x_d)_{d \in g}

    The groups are independent given the features, and what a group's head can't do, the whole can't do.

    Args:
        groups: Columns and head of each group; every column is in exactly one.

    Raises:
        UserError: A column is in no group, in several, or not in the data.

    >>> from vrnn_lightning.heads import Bernoulli
    >>> Joint(4, 3, [Group("0:2"), Group([2], Bernoulli)])(torch.zeros(5, 4)).log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    order: Tensor
    inverse: Tensor

    def __init__(self, in_features: int, num_features: int, groups: list[Group]) -> None:
        super().__init__(in_features, num_features)
        columns = [group.indices() for group in groups]
        order = [column for part in columns for column in part]
        _require_partition(order, num_features)
        self.places = {column: (g, i) for g, part in enumerate(columns) for i, column in enumerate(part)}
        self.sizes = [len(part) for part in columns]
        self.parts = nn.ModuleList(g.head(in_features, size) for g, size in zip(groups, self.sizes, strict=True))
        kinds = {head.likelihood for head in self.heads}
        self.likelihood = kinds.pop() if len(kinds) == 1 else "mixed"
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("inverse", torch.tensor(order).argsort(), persistent=False)

    @property
    def heads(self) -> list[Head]:
        return [cast(Head, head) for head in self.parts]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x[..., self.order].split_with_sizes(self.sizes, -1)

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """Return the frames whose groups have the given columns."""
        return torch.cat(list(parts), -1)[..., self.inverse]

    @property
    def scales_inputs(self) -> Tensor:  # type: ignore[override]  # it follows from the heads
        flags = [torch.as_tensor(head.scales_inputs, device=self.order.device) for head in self.heads]
        return self.join(flag.expand(size) for flag, size in zip(flags, self.sizes, strict=True))

    def forward(self, features: Tensor) -> JointDistribution:
        return JointDistribution(self, [head(features) for head in self.heads])

    def supports(self, x: Tensor) -> Tensor:
        return self.join(head.supports(part) for head, part in zip(self.heads, self.split(x), strict=True))

    def round_mean(self, mean: Tensor) -> Tensor:
        return self.join(head.round_mean(part) for head, part in zip(self.heads, self.split(mean), strict=True))

    def head_of(self, feature: int) -> Head:
        group, place = self.places[feature]
        return self.heads[group].head_of(place)

    @torch.no_grad()
    def init_from_statistics(self, mean: Tensor) -> None:
        """Give each head the data's mean of its columns; mean has shape (num_features,)."""
        for head, part in zip(self.heads, self.split(mean), strict=True):
            head.init_from_statistics(part)


def _require_partition(order: list[int], num_features: int) -> None:
    known, given = set(range(num_features)), set(order)
    for problem, columns in (
        (f"not among the data's {num_features}", given - known),
        ("in no group", known - given),
        ("in two groups", {column for column in given if order.count(column) > 1}),
    ):
        if columns:
            listed = ", ".join(map(str, sorted(columns)[:8]))
            raise UserError(f"emission Joint: columns {listed} are {problem}. Fix: put each column in one group")


class JointDistribution(FrameDistribution):
    """A product of distributions over the groups of features that a head knows."""

    def __init__(self, joint: Joint, parts: list[Distribution]) -> None:
        super().__init__((*parts[0].batch_shape, joint.num_features))
        self.joint, self.parts = joint, parts

    @property
    def mean(self) -> Tensor:
        return self.joint.join(part.mean for part in self.parts)

    @property
    def variance(self) -> Tensor:
        return self.joint.join(part.variance for part in self.parts)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.stack([p.log_prob(x) for p, x in zip(self.parts, self.joint.split(value), strict=True)]).sum(0)

    def marginal_log_prob(self, value: Tensor, observed: Tensor) -> Tensor:
        split = self.joint.split
        return torch.stack(list(map(log_prob, self.parts, split(value), split(observed)))).sum(0)

    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        return self.joint.join(part.sample(torch.Size(sample_shape)) for part in self.parts)

    def tempered(self, temperature: float) -> JointDistribution:
        return JointDistribution(self.joint, [tempered(part, temperature) for part in self.parts])
