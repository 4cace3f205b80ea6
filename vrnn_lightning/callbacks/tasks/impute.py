"""Imputations: what is missing, drawn given what is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.pictures import Fan
from vrnn_lightning.callbacks.tasks.base import ROWS, Gather, Prediction, Task, numbers
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule as Module

__all__ = ["Impute"]


class Impute(Task):
    """Copies of each sequence with what was missing, or was hidden to be judged, drawn.

    Args:
        samples: Draws.
        particles: Particles, at least as many; ``None`` for four times the samples.
        lag: Steps behind a gap from which it is imputed.
        hide: Share of the steps to hide.
        gap: Steps in a row that are hidden together.
        seed: Seed of the draws and of what is hidden.
        shown: Sequences in the picture.
    """

    name = "impute"
    judges = ("imputation",)
    table_arrays = ("truth",)

    def __init__(
        self,
        *,
        samples: int = 100,
        particles: int | None = None,
        lag: int = 32,
        hide: float = 0.0,
        gap: int = 1,
        seed: int = 0,
        shown: int = 4,
    ) -> None:
        super().__init__(seed=seed, shown=shown)
        if not 0 <= hide < 1:
            raise UserError(f"prediction.hide {hide}: must be at least 0 and below 1")
        if particles is not None and particles < samples:
            raise UserError(f"prediction.particles {particles}: must be at least prediction.samples {samples}")
        self.samples, self.particles, self.lag, self.hide, self.gap = samples, particles, lag, hide, gap

    def start(self, data: object) -> None:
        super().start(data)
        self._hides = 0  # steps

    def make(self, module: Module, batch: SequenceBatch, real: list[int], outputs: Any) -> Iterator[Prediction]:
        for i in real:
            row = batch.rows([i])
            truth = self.truth(module, batch, i)
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
            shown = {f"imputed_{k + 1}": path for k, path in enumerate(drawn[:ROWS])}
            given = truth.masked_fill(is_open, torch.nan)
            more = {"truth": numbers(truth), "drawn": is_open.cpu().numpy()}
            rows = {"real": truth, "given": given, **shown}
            fan = Fan(given, drawn, truth.masked_fill(~is_open, torch.nan), 0, 0)
            yield self.predict(batch, i, drawn, rows, **more)._replace(fan=fan)

    def _hidden(self, seed: int, steps: int) -> Tensor:
        """Return which steps of a sequence are hidden, shape (steps,): the share that was asked for, in whole gaps."""
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
                f"prediction.gap {self.gap}: leaves nothing of the longest sequence, which has "
                f"{max(longest)} steps, to impute from; give a smaller one"
            )
