"""Auxiliary losses: parts that predict targets from what was inferred, trained beside the bound, never part of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.errors import UserError, require
from vrnn_lightning.heads import Factorised, Gaussian, Network, log_prob
from vrnn_lightning.nn import MLPConfig
from vrnn_lightning.vrnn.trace import Trace

__all__ = ["Auxiliary", "AuxiliaryLosses", "Classification", "Regression"]

TAKEN = {
    "loss", "objective", "beta", "padding", "grad", "active", "bits", "gap", "iwae", "fivo", "samples", "exact", "elbo",
    "reconstruction", "kl",
}  # fmt: skip
"""The first words of other figures' names."""


class Auxiliary(nn.Module, ABC):
    r"""A loss beside the bound: training minimises minus the objective plus ``weight`` times the sum of its steps.

    A subclass takes the sizes (hidden_size, latent_size, num_targets) first; its other arguments are options.

    Args:
        name: It is logged as ``train/NAME``, ``val/NAME`` and ``test/NAME``, the mean of the steps that count.
        weight: Weight in training.

    Raises:
        UserError: The weight is negative or infinite.
    """

    def __init__(self, name: str, weight: float = 1.0) -> None:
        super().__init__()
        self.name, self.weight = name, require("auxiliary.weight", weight, 0, below=math.inf)

    @abstractmethod
    def forward(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Return the loss of each step, 0 where it does not count, and True where it does, each (rows, time)."""

    def predict(self, trace: Trace) -> Tensor | None:
        """Return what the prediction task "encode" writes, shape (rows, time, width); ``None`` for nothing."""
        return None

    def check(self, targets: Tensor | None, mask: Tensor) -> None:
        """Raise if targets, shape (batch, time, targets), are not what the loss is defined for at real steps."""


class AuxiliaryLosses(nn.Module):
    """The auxiliary losses of a model: their terms in training, and their means in evaluation."""

    def __init__(self, parts: Iterable[Auxiliary]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        names = [part.name for part in self]
        for name in names:
            if name.partition("_")[0] in TAKEN | {""} or names.count(name) > 1:
                raise UserError(f"auxiliary: the name {name!r} is in use. Fix: give another as its option name")
        self.means = nn.ModuleList(MeanMetric() for _ in names)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Auxiliary]:
        return iter(cast("list[Auxiliary]", self.parts))

    def terms(self, trace: Trace) -> tuple[Tensor, ...]:
        """Return the loss of each part and whether it counts, alternately, each (rows, time)."""
        return tuple(term for part in self for term in part(trace))

    def check(self, batch: SequenceBatch) -> None:
        """Raise if a batch has not the targets that the losses are defined for."""
        for part in self:
            part.check(batch.targets, batch.mask)

    @staticmethod
    def sums(terms: Sequence[Tensor], samples: int, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the sum of each loss and the number of its steps, of one trajectory per sequence."""
        losses, counts = ([term.to(like).sum() / samples for term in terms[start::2]] for start in (0, 1))
        return losses, counts

    def named_means(self, losses: Iterable[Tensor], counts: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the mean of each loss that counts somewhere, by its name."""
        return {part.name: a / n for part, a, n in zip(self, losses, counts, strict=True) if n}

    def update(self, terms: Sequence[Tensor]) -> None:
        """Add the terms of a batch to the means of an evaluation."""
        losses, counts = self.sums(terms, 1, torch.zeros(()))
        for mean, loss, count in zip(self.means, losses, counts, strict=True):
            if count:
                cast(MeanMetric, mean).update(loss / count, count)

    def compute(self) -> dict[str, Tensor]:
        """Return the means of an evaluation by name, and begin another."""
        means = {part.name: cast(MeanMetric, mean).compute() for part, mean in zip(self, self.means, strict=True)}
        for mean in self.means:
            cast(MeanMetric, mean).reset()
        return means


class _Readout(Auxiliary):
    """A network that reads h_{t-1} and z_t."""

    def __init__(
        self, hidden_size: int, latent_size: int, num_targets: int, columns: list[int] | None, name: str, weight: float
    ) -> None:
        super().__init__(name, weight)
        if not num_targets:
            raise UserError(f"auxiliary {name}: the data have no targets. Fix: set `num_targets` in the datamodule")
        self.in_features = hidden_size + latent_size
        self.columns = list(range(num_targets)) if columns is None else columns
        if not self.columns:
            raise UserError(f"auxiliary {name}: columns is empty. Fix: name a target")
        for column in self.columns:
            require("auxiliary.columns", column, 0, num_targets - 1)

    def read(self, trace: Trace) -> Tensor:
        """Return what the network reads, shape (rows, time, width)."""
        assert trace.hidden is not None, "a long pass in windows keeps no states"
        return torch.cat([trace.hidden, trace.z], -1)

    def targets(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Return the targets, 0 where one is unknown, and True where it is known, each (rows, time, columns)."""
        targets = cast(Tensor, trace.targets)[..., self.columns]
        known = ~targets.isnan() & trace.mask[..., None]
        return torch.where(known, targets, 0.0), known

    def check(self, targets: Tensor | None, mask: Tensor) -> None:
        """Raise if there are none."""
        if targets is None:
            raise UserError(f"auxiliary {self.name}: the batch has no targets. Fix: let the datamodule give them")


class Regression(_Readout):
    """Predicts real targets, such as a reward, from h_{t-1} and z_t.

    Args:
        hidden_size: Given by the model.
        latent_size: Given by the model.
        num_targets: Given by the data.
        columns: The targets that are predicted, counted from 0; ``None`` for all.
        loss: "gaussian", minus the log-density of a normal distribution in nats; "mse", the squared error of its mean.
        network: The network before the output.
        name: It is logged as ``{stage}/NAME``.
        weight: Weight in training.
    """

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        num_targets: int,
        columns: list[int] | None = None,
        loss: Literal["gaussian", "mse"] = "gaussian",
        network: MLPConfig = MLPConfig(),
        name: str = "regression",
        weight: float = 1.0,
    ) -> None:
        super().__init__(hidden_size, latent_size, num_targets, columns, name, weight)
        self.loss = loss
        self.network = Network(self.in_features, network, Gaussian, len(self.columns))

    def predict(self, trace: Trace) -> Tensor:
        """Return the mean of each target, shape (rows, time, columns)."""
        return cast(Factorised, self.network(self.read(trace))).mean

    def forward(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Return the loss of each step, and True where a target is known."""
        targets, known = self.targets(trace)
        dist = cast(Factorised, self.network(self.read(trace)))
        if self.loss == "gaussian":
            return -log_prob(dist, targets, known), known.any(-1)
        return ((dist.mean - targets).square() * known).sum(-1), known.any(-1)


class Classification(_Readout):
    """Predicts a label, a target that counts classes from 0, from h_{t-1} and z_t, by its cross-entropy in nats.

    Args:
        hidden_size: Given by the model.
        latent_size: Given by the model.
        num_targets: Given by the data.
        classes: Number of classes.
        column: The target that is predicted, counted from 0.
        network: The network before the output.
        name: It is logged as ``{stage}/NAME``.
        weight: Weight in training.
    """

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        num_targets: int,
        classes: int = 2,
        column: int = 0,
        network: MLPConfig = MLPConfig(),
        name: str = "classification",
        weight: float = 1.0,
    ) -> None:
        super().__init__(hidden_size, latent_size, num_targets, [column], name, weight)
        self.classes = require("auxiliary.classes", classes, 2)
        body = network(self.in_features)
        self.network = nn.Sequential(body, nn.Linear(body.out_features, classes))

    def predict(self, trace: Trace) -> Tensor:
        """Return the probability of each class, shape (rows, time, classes)."""
        return cast(Tensor, self.network(self.read(trace))).softmax(-1)

    def forward(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Return the loss of each step, and True where the label is known."""
        labels, known = (part[..., 0] for part in self.targets(trace))
        logits = cast(Tensor, self.network(self.read(trace)))
        return cross_entropy(logits.movedim(-1, 1), labels.long(), reduction="none") * known, known

    def check(self, targets: Tensor | None, mask: Tensor) -> None:
        """Raise if a known label is not one of the classes."""
        super().check(targets, mask)
        labels = cast(Tensor, targets)[..., self.columns[0]][mask]
        wrong = (labels != labels.round()) | (labels < 0) | (labels >= self.classes)
        wrong &= ~labels.isnan()
        if wrong.any():
            value = labels[wrong][0].item()
            raise UserError(
                f"auxiliary {self.name}: a label is {value}. Fix: count classes from 0 to {self.classes - 1}"
            )
