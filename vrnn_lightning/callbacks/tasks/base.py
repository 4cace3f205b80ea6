"""The base class of the tasks of ``lightning predict``: options, seeds, table and picture."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.media import Media, Shown
from vrnn_lightning.callbacks.pictures import Fan, draw_fans, is_binary
from vrnn_lightning.module import VRNNLightningModule as Module

__all__ = ["Gather", "Prediction", "Task", "first_rows", "numbers"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # the ends of the central 90 % and 50 % intervals, and the median
Gather = Callable[[list[Any]], list[Any]]
"""Returns the items of all processes."""


class Prediction(NamedTuple):
    """The result of a task for one sequence.

    Args:
        place: Index of the sequence in its split.
        arrays: Its arrays in the archive.
        rows: Its sequences in the picture, in data units, each of shape (time, features).
        fan: Its draws in a fan chart.
        faulty: True at steps that are known to be faulty, shape (time,), if that is known.
    """

    place: int
    arrays: dict[str, NDArray[Any]]
    rows: dict[str, Tensor]
    fan: Fan | None = None
    faulty: Tensor | None = None

    @property
    def title(self) -> str:
        """Name of the sequence."""
        return str(self.arrays["names"][0])


@dataclass(kw_only=True, eq=False)
class Task(ABC):
    """A task of ``lightning predict``; a subclass defines :meth:`make`.

    Its keyword arguments are options of the command line, with the same names and ranges in every task.

    Args:
        seed: Seed of the draws, which depend on it and on a sequence's name alone.
        shown: Sequences in the picture, and as files of their own; at most 64, 0 for none.
    """

    name: ClassVar[str]
    """Its name in ``--prediction.task``."""
    needs_data: ClassVar[bool] = True
    """Whether it reads test sequences."""
    needs_trace: ClassVar[bool] = False
    """Whether :meth:`make` reads the trace of a batch."""
    judges: ClassVar[tuple[str, ...]] = ()
    """Names of the draws that :class:`~vrnn_lightning.metrics.DrawScores` compares with the truth."""
    table_arrays: ClassVar[tuple[str, ...]] = ()
    """Arrays of the archive that the table needs besides values, lengths and names."""
    writes_media: ClassVar[bool] = True
    """Whether the first sequences are also written as the modality asks."""
    count = 0
    """Sequences to make, of a task that needs no data."""

    seed: int = 0
    shown: int = 4
    data: Any = field(default=None, init=False)
    """The datamodule."""
    skipped: int = field(default=0, init=False)
    """Sequences without a result."""
    longest: int = field(default=0, init=False)
    """Steps of the longest sequence."""
    scores: dict[str, Any] = field(default_factory=dict, init=False)
    """A metric for each of :attr:`judges`."""

    def check(self, module: Module) -> None:  # noqa: B027  # not every task needs it
        """Raise if the model can't do the task."""

    def start(self, data: Any) -> None:
        """Forget an earlier prediction."""
        self.data, self.skipped, self.longest = data, 0, 0

    def prepare(self, module: Module, gather: Gather) -> None:  # noqa: B027  # not every task needs it
        """Prepare the first batch, in every process."""

    @abstractmethod
    def make(self, module: Module, batch: SequenceBatch, real: list[int], outputs: Any) -> Iterator[Prediction]:
        """Yield the results of a batch.

        Args:
            module: The model.
            batch: Padded sequences.
            real: The rows that have a step.
            outputs: The result of ``predict_step``: the trace, if the task needs it.
        """

    def finish(self, gather: Gather) -> None:  # noqa: B027  # not every task needs it
        """Raise if the options left nothing to judge, in every process."""

    def figures(self, gather: Gather) -> dict[str, dict[str, float]]:
        """Return figures besides those of :attr:`judges`, by name."""
        return {}

    def remarks(self) -> list[str]:
        """Return lines that are printed at the end."""
        return []

    def why_nothing(self) -> str:
        """Return the message of the error where no sequence has a result."""
        return f"prediction.task {self.name}: no test sequence has an observed value. Fix: choose other test data"

    def predict(
        self, batch: SequenceBatch, i: int, values: Tensor, rows: dict[str, Tensor], **more: NDArray[Any]
    ) -> Prediction:
        """Return the result for row ``i`` of a batch.

        Args:
            batch: Padded sequences.
            i: The row.
            values: Of shape (time, features), or draws with one dimension before.
            rows: Its sequences in the picture.
            more: Further arrays of the archive.
        """
        draws = values[None] if values.ndim == 2 else values
        index = 0 if batch.index is None else int(batch.index[i])
        arrays = {
            "values": numbers(draws.flatten(0, 1)),
            "lengths": np.full(len(draws), draws.shape[1]),
            "names": np.array([self.name_of(batch, i)] * len(draws), str),
        }
        return Prediction(index, arrays | more, rows)

    @staticmethod
    def name_of(batch: SequenceBatch, i: int) -> str:
        """Return the name of a sequence."""
        return batch.names[i] if batch.names else ""

    def seed_of(self, batch: SequenceBatch, i: int) -> int:
        """Return the seed of a sequence's draws."""
        words = f"{self.seed} {self.name} {self.name_of(batch, i)}"
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest())

    @staticmethod
    def truth(module: Module, batch: SequenceBatch, i: int) -> Tensor:
        """Return a sequence in data units, NaN where a value is missing, shape (time, features)."""
        length = int(batch.lengths[i])
        return module.scaler.unscale(batch.x[i, :length]).masked_fill(~batch.valid_mask[i, :length], torch.nan)

    @property
    def modality(self) -> str:
        """The kind of the sequences, as the datamodule says."""
        return str(getattr(self.data, "modality", "series"))

    @property
    def has_table(self) -> bool:
        """Whether a table is written beside the archive."""
        return self.modality == "series"

    def columns(self, width: int) -> list[str]:
        """Return the names of the table's columns."""
        names = [str(name) for name in getattr(self.data, "columns", None) or []]
        return names if len(names) == width else [f"x{i}" for i in range(width)]

    def table(self, piece: dict[str, NDArray[Any]]) -> tuple[list[str], NDArray[Any]]:
        """Return header and cells of a sequence in the table, a line for each step, from its arrays of the archive."""
        draws = piece["values"].reshape(len(piece["lengths"]), -1, piece["values"].shape[1])
        columns = self.columns(draws.shape[2])
        if not self.judges:
            return columns, draws[0]
        marks = [f"q{100 * q:02.0f}" for q in QUANTILES]
        parts = [draws.mean(0), *np.quantile(draws, QUANTILES, axis=0), piece["truth"]]
        header = [f"{column}_{mark}" for column in columns for mark in ("mean", *marks, "true")]
        return header, np.stack(parts, -1).reshape(draws.shape[1], -1)

    def picture(self, shown: Sequence[Prediction], media: Media, rows: Shown) -> Figure:
        """Draw the results of the first sequences, with their rows by name as ``media`` displays them."""
        titles = [piece.title for piece in shown]
        fans = [piece.fan for piece in shown if piece.fan is not None]
        if fans and media.modality == "series" and not is_binary(rows["real"]):
            return draw_fans(fans, self.columns(fans[0].draws.shape[2]), titles)
        return media.draw(rows, titles)


def first_rows(name: str, draws: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the first three of a sequence's draws by the names of their rows in a picture."""
    return {f"{name}_{k}": draw for k, draw in enumerate(islice(draws, 3), 1)}


def numbers(x: Tensor) -> NDArray[Any]:
    """Return a tensor as float32 numbers."""
    return x.detach().float().cpu().numpy()
