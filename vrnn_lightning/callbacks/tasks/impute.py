"""Imputations: draws of missing values given the observed ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.pictures import Fan
from vrnn_lightning.callbacks.tasks.base import Gather, Prediction, Task, first_rows, numbers
from vrnn_lightning.errors import UserError, require
from vrnn_lightning.module import VRNNLightningModule as Module

__all__ = ["Impute"]


@dataclass(kw_only=True, eq=False)
class Impute(Task):
    """Copies of each sequence in which draws replace values that are missing, or hidden to be judged.

    Args:
        samples: Draws.
        particles: Particles, at least as many as samples; ``None`` for four times the samples.
        lag: Steps after a gap that its imputation reads.
        hide: Share of the steps to hide and to compare with the draws.
        gap: Steps in a row that are hidden together.
    """

    name = "impute"
    judges = ("imputation",)
    table_arrays = ("truth",)
    samples: int = 100
    particles: int | None = None
    lag: int = 32
    hide: float = 0.0
    gap: int = 1

    def __post_init__(self) -> None:
        require("prediction.hide", self.hide, 0, below=1)
        if self.particles is not None and self.particles < self.samples:
            raise UserError(
                f"prediction.particles {self.particles}: must be at least prediction.samples {self.samples}"
            )

    def start(self, data: object) -> None:
        super().start(data)
        self._hides = 0  # steps

    def make(self, module: Module, batch: SequenceBatch, real: list[int], outputs: Any) -> Iterator[Prediction]:
        for i in real:
            row, truth = batch.rows([i]), self.truth(module, batch, i)
            hidden = self._hidden(self.seed_of(batch, i), row.x.shape[1])
            self._hides += int(hidden.sum())
            seen = row.valid_mask & ~hidden.to(row.x.device)[None, :, None]
            self.longest = max(self.longest, row.x.shape[1])
            if not seen.any():
                self.skipped += 1
                continue
            row.x, row.observed = row.x.masked_fill(~seen, 0.0), seen
            drawn = module.impute(row, self.samples, self.particles, self.lag, seed=self.seed_of(batch, i))[0]
            is_open = ~seen[0]
            self.scores["imputation"].update(drawn, truth.to(drawn).masked_fill(~is_open, torch.nan))
            given = truth.masked_fill(is_open, torch.nan)
            more = {"truth": numbers(truth), "drawn": is_open.cpu().numpy()}
            rows = {"real": truth, "given": given, **first_rows("imputed", drawn)}
            fan = Fan(given, drawn, truth.masked_fill(~is_open, torch.nan), 0, 0)
            yield self.predict(batch, i, drawn, rows, **more)._replace(fan=fan)

    def _hidden(self, seed: int, steps: int) -> Tensor:
        """Return True at the hidden steps of a sequence, shape (steps,): the share `hide` of them, in whole gaps."""
        blocks = -(-steps // self.gap)
        count = round(self.hide * steps / self.gap)
        count = min(max(count, 1), blocks - 1) if self.hide else 0
        chosen = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)) < count
        return chosen.repeat_interleave(self.gap)[:steps]

    def finish(self, gather: Gather) -> None:
        if not self.hide:
            return
        hides, longest = zip(*gather([(self._hides, self.longest)]), strict=True)
        if not sum(hides):
            raise UserError(
                f"prediction.gap {self.gap}: leaves nothing to impute from of the longest sequence, which has "
                f"{max(longest)} steps. Fix: give a smaller one"
            )
