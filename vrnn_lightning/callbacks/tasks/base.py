"""What all tasks share: options, seeds, names, the rows of the table and the picture."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.media import Media, Shown
from vrnn_lightning.callbacks.pictures import Fan, draw_fans, is_binary
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule as Module

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Gather", "Prediction", "Task", "numbers", "require_options"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # the ends of the central 90 % and 50 % intervals, and the median
MOST_SHOWN = 64  # side by side they are 20,000 pixels wide
ROWS = 3  # draws of a sequence that a picture shows
LEAST = {"count": 1, "samples": 1, "particles": 1, "lag": 0, "gap": 1, "season": 1, "stride": 1, "shown": 0, "seed": 0}
LEAST |= {"steps": 1}
Gather = Callable[[list[Any]], list[Any]]
"""Returns the items of all processes."""


class Prediction(NamedTuple):
    """What a task made of one sequence.

    Args:
        place: Which sequence of the split it is.
        arrays: What the archive holds of it.
        rows: What a picture shows of it: sequences in data units, each of shape (time, features).
        fan: What a fan chart shows of its draws.
        faulty: True at steps that are known to be faulty, shape (time,), if that is known.
    """

    place: int
    arrays: dict[str, NDArray[Any]]
    rows: dict[str, Tensor]
    fan: Fan | None = None
    faulty: Tensor | None = None


class Task(ABC):
    """A task; a subclass says in :meth:`make` what becomes of a sequence.

    Its keyword arguments are options of the command line, with the same names and ranges in every task.

    Args:
        seed: Seed of the draws.
        shown: Sequences in the picture.
    """

    name: ClassVar[str]
    """What ``--prediction.task`` calls it."""
    needs_data: ClassVar[bool] = True
    """Whether it reads test sequences."""
    needs_trace: ClassVar[bool] = False
    """Whether :meth:`make` reads the trace of a batch."""
    judges: ClassVar[tuple[str, ...]] = ()
    """Names of what is compared with the truth, by :class:`~vrnn_lightning.metrics.DrawScores`."""
    table_arrays: ClassVar[tuple[str, ...]] = ()
    """Arrays of the archive that the table needs besides values, lengths and names."""
    writes_media: ClassVar[bool] = True
    """Whether the first sequences are also written as the modality asks."""

    def __init__(self, *, seed: int = 0, shown: int = 4) -> None:
        self.seed, self.shown = seed, shown
        self.count = 0
        """Sequences to make, of a task that needs no data."""
        self.data: Any = None
        """The datamodule."""
        self.skipped = 0
        """Sequences of which nothing could be made."""
        self.longest = 0
        """Steps of the longest sequence."""
        self.scores: dict[str, Any] = {}
        """A metric for each of :attr:`judges`."""

    def check(self, module: Module) -> None:  # noqa: B027  # not every task needs it
        """Raise if the model can't do the task."""

    def start(self, data: Any) -> None:
        """Forget an earlier prediction."""
        self.data, self.skipped, self.longest = data, 0, 0

    def prepare(self, module: Module, gather: Gather) -> None:  # noqa: B027  # not every task needs it
        """Do what comes before the first batch, in every process."""

    @abstractmethod
    def make(self, module: Module, batch: SequenceBatch, real: list[int], outputs: Any) -> Iterator[Prediction]:
        """Yield what the task makes of a batch.

        Args:
            module: The model.
            batch: Padded sequences.
            real: The rows that have a step.
            outputs: What ``predict_step`` returned: the trace, if the task needs it.
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
        """Return the message where no sequence had anything to work on."""
        return f"prediction.task {self.name}: no test sequence has an observed value to start from"

    # ---- what a subclass uses

    def predict(
        self, batch: SequenceBatch, i: int, values: Tensor, rows: dict[str, Tensor], **more: NDArray[Any]
    ) -> Prediction:
        """Return what was made of a sequence.

        Args:
            batch: Its batch.
            i: Its row.
            values: Of shape (time, features), or draws with one dimension before.
            rows: What a picture shows.
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

    # ---- table and picture

    @property
    def modality(self) -> str:
        """What the sequences are, as the datamodule says."""
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
        """Return the header and the cells of a sequence in the table, one line for each step.

        Args:
            piece: Arrays of the archive of one sequence.
        """
        draws = piece["values"].reshape(len(piece["lengths"]), -1, piece["values"].shape[1])
        columns = self.columns(draws.shape[2])
        if not self.judges:
            return columns, draws[0]
        marks = [f"q{100 * q:02.0f}" for q in QUANTILES]
        parts = [draws.mean(0), *np.quantile(draws, QUANTILES, axis=0), piece["truth"]]
        header = [f"{column}_{mark}" for column in columns for mark in ("mean", *marks, "true")]
        return header, np.stack(parts, -1).reshape(draws.shape[1], -1)

    def picture(self, shown: Sequence[Prediction], media: Media, rows: Shown) -> Figure:
        """Draw the first sequences.

        Args:
            shown: What was made of them.
            media: How the modality is shown.
            rows: Their rows by name, ready to be shown.
        """
        titles = [str(piece.arrays["names"][0]) for piece in shown]
        fans = [piece.fan for piece in shown if piece.fan is not None]
        if fans and media.modality == "series" and not is_binary(rows["real"]):
            return draw_fans(fans, self.columns(fans[0].draws.shape[2]), titles)
        return media.draw(rows, titles)


def require_options(options: dict[str, Any]) -> None:
    """Raise if an option of a task is outside its range, the same in every task.

    Raises:
        UserError: It is.
    """
    for key, low in LEAST.items():
        value = options.get(key)
        if value is not None and value < low:
            raise UserError(f"prediction.{key} {value}: must be at least {low}")
    if options.get("shown", 0) > MOST_SHOWN:
        raise UserError(f"prediction.shown {options['shown']}: a picture has room for {MOST_SHOWN} sequences")
    if not 0 < options.get("temperature", 1.0) < float("inf"):
        raise UserError(f"prediction.temperature {options['temperature']}: must be a number above 0")


def numbers(x: Tensor) -> NDArray[Any]:
    """Return a tensor as float32 numbers."""
    return x.detach().float().cpu().numpy()
