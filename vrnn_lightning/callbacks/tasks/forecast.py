"""Forecasts: how sequences may continue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vrnn_lightning import metrics
from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.pictures import Fan
from vrnn_lightning.callbacks.tasks.base import Gather, Prediction, Task, first_rows, numbers
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule as Module

__all__ = ["Forecast"]

PAST = 4  # a picture shows so many times as many steps before an origin as after it


@dataclass(kw_only=True, eq=False)
class Forecast(Task):
    """Paths that continue each sequence, compared with the truth and with a seasonal naive forecast.

    Args:
        prefix: Steps that a forecast is given; -24 for all but the last 24; ``None`` for the whole sequence.
        steps: Steps of a forecast; ``None`` for those up to the sequence's end.
        stride: Steps from one origin to the next: forecasts of ``steps`` steps begin at ``prefix``, ``prefix + stride``
            and so on within the sequence, and each knows all steps before it; ``None`` for one origin.
        samples: Paths of each sequence.
        temperature: Temperature of the emission.
        season: Steps of a season, for the seasonal naive forecast.
    """

    name = "forecast"
    judges = ("forecast", "seasonal naive")
    table_arrays = ("truth", "start")
    prefix: int | None = None
    steps: int | None = None
    stride: int | None = None
    samples: int = 100
    temperature: float = 1.0
    season: int = 1

    def __post_init__(self) -> None:
        if self.prefix == 0:
            raise UserError("prediction.prefix 0: is an empty prefix. Fix: choose the task sample, which needs none")
        needed = {"steps": "the steps of each forecast", "prefix": "the origin of the first forecast"}
        for key, meaning in needed.items():
            if self.stride is not None and getattr(self, key) is None:
                raise UserError(f"prediction.stride {self.stride}: needs prediction.{key}. Fix: give {meaning}")
        if self.steps is None and self.prefix is None:
            raise UserError(
                "prediction.steps: the forecast has no length. Fix: give prediction.steps, or prediction.prefix to "
                "forecast the rest of each sequence"
            )

    def start(self, data: object) -> None:
        super().start(data)
        self._seasons = 0  # forecasts whose past is a season long

    def _origins(self, length: int) -> list[int]:
        first = length if self.prefix is None else self.prefix if self.prefix > 0 else length + self.prefix
        if not 0 < first <= length or (self.steps is None and first == length):
            return []
        return [first] if self.stride is None else list(range(first, length - (self.steps or 0) + 1, self.stride))

    def make(self, module: Module, batch: SequenceBatch, real: list[int], outputs: Any) -> Iterator[Prediction]:
        for i in real:
            row, length = batch.rows([i]), int(batch.lengths[i])
            self.longest = max(self.longest, length)
            origins = [origin for origin in self._origins(length) if row.window(0, origin).valid_mask.any()]
            if not origins:
                self.skipped += 1
                continue
            steps = self.steps or length - origins[0]
            if module.vrnn.num_inputs and origins[-1] + steps > length:
                raise UserError(
                    f"{self.name_of(batch, i)}: the model reads covariates, which the data hold for {length} steps, "
                    f"but {steps} steps after {origins[-1]} need more. Fix: give a smaller prediction.steps or "
                    "prediction.prefix"
                )
            yield from self._forecasts(module, batch, i, origins, steps)

    def _forecasts(
        self, module: Module, batch: SequenceBatch, i: int, origins: list[int], steps: int
    ) -> Iterator[Prediction]:
        known, length = self.truth(module, batch, i), int(batch.lengths[i])
        options = (steps, self.samples, self.temperature)
        drawn = module.backtest(batch.rows([i]), origins, *options, seed=self.seed_of(batch, i))
        for start, each in zip(origins, drawn, strict=True):
            paths = each[:, 0]
            past, truth = known[:start].to(paths), torch.full_like(paths[0], torch.nan)
            truth[: length - start] = known[start : start + steps].to(truth)
            naive, scale = metrics.seasonal_naive(past, steps, self.season)
            self._seasons += start >= self.season
            self.scores["forecast"].update(paths, truth, scale)
            self.scores["seasonal naive"].update(naive[None], truth.masked_fill(naive.isnan(), torch.nan), scale)
            late = past[-PAST * steps :]
            whole = (torch.cat([late, path]) for path in paths)
            rows = {"real": torch.cat([late, truth[: length - start]]), **first_rows("path", whole)}
            more = {"truth": numbers(truth), "start": np.full(self.samples, start)}
            fan = Fan(late, paths, truth, start - len(late), start)
            yield self.predict(batch, i, paths, rows, **more)._replace(fan=fan)

    def finish(self, gather: Gather) -> None:
        long_enough, longest = zip(*gather([(self._seasons, self.longest)]), strict=True)
        if not sum(long_enough):
            raise UserError(
                f"prediction.season {self.season}: is longer than the past of every forecast, of sequences of at most "
                f"{max(longest)} steps. Fix: give a smaller one, or a larger prediction.prefix"
            )

    def why_nothing(self) -> str:
        if self.prefix is None:
            return super().why_nothing()
        return (
            f"prediction.prefix {self.prefix}: no test sequence has something to forecast from and to, the longest has "
            f"{self.longest} steps. Fix: give another prefix, or prediction.steps"
        )
