"""Scores: the log-likelihood of each step, and the steps that are unlikely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from vrnn_lightning import metrics
from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.media import Media, Shown
from vrnn_lightning.callbacks.pictures import draw_scores
from vrnn_lightning.callbacks.tasks.base import Gather, Prediction, Task
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule as Module

__all__ = ["Score"]


@dataclass(kw_only=True, eq=False)
class Score(Task):
    """Nats of each step in data units; with a quantile also the steps that score below it.

    Args:
        samples: Particles.
        quantile: Quantile of the validation steps' scores, 0.01 for example: test steps that score below it are
            flagged. Precision, recall and AUROC are reported where the datamodule knows faulty steps (``anomalies``).
    """

    name = "score"
    writes_media = False
    has_table = True
    samples: int = 1
    quantile: float | None = None
    threshold: float | None = field(default=None, init=False)
    """Nats below which steps are flagged."""
    _labelled: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)  # nats of steps, and faulty ones

    def __post_init__(self) -> None:
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise UserError(f"prediction.quantile {self.quantile}: must lie between 0 and 1")

    @property
    def table_arrays(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the options
        return () if self.threshold is None else ("flagged",)

    def prepare(self, module: Module, gather: Gather) -> None:
        self.threshold, self._labelled = None, []
        if self.quantile is None:
            return
        self.data.setup("validate")
        with module.summon_full_params():
            scores = [
                nats.cpu()
                for batch in self.data.val_dataloader()
                for nats in self._scores(module, batch, (batch.lengths > 0).nonzero().flatten().tolist())
            ]
        every = torch.cat(gather(scores)).double().numpy()
        every = every[np.isfinite(every)]
        if not len(every):
            raise UserError(f"prediction.quantile {self.quantile}: no validation score is finite. Fix: leave it out")
        self.threshold = float(np.quantile(every, self.quantile))

    def _scores(self, module: Module, batch: SequenceBatch, real: list[int]) -> list[Tensor]:
        if self.samples == 1 and real:
            return module.score(batch.rows(real), seed=self.seed)
        # particles draw together: one sequence at a time
        return [module.score(batch.rows([i]), self.samples, seed=self.seed_of(batch, i))[0] for i in real]

    def make(self, module: Module, batch: SequenceBatch, real: list[int], outputs: Any) -> Iterator[Prediction]:
        known = getattr(self.data, "anomalies", None)
        faulty = known(batch) if known is not None and self.threshold is not None else None
        for i, nats in zip(real, self._scores(module, batch, real), strict=True):
            more = {} if self.threshold is None else {"flagged": metrics.below(nats, self.threshold).cpu().numpy()}
            wrong = None if faulty is None else faulty[i, : len(nats)].cpu()
            if wrong is not None:
                self._labelled.append((nats.cpu(), wrong))
            rows = {"real": self.truth(module, batch, i)}
            yield self.predict(batch, i, nats[:, None], rows, **more)._replace(faulty=wrong)

    def figures(self, gather: Gather) -> dict[str, dict[str, float]]:
        labelled = gather(self._labelled)
        if self.threshold is None or not labelled:
            return {}
        nats, faulty = map(torch.cat, zip(*labelled, strict=True))
        return {"detection": {key: x.item() for key, x in metrics.detection(nats, faulty, self.threshold).items()}}

    def remarks(self) -> list[str]:
        return [] if self.threshold is None else [f"flagged are steps below {self.threshold:.4g} nats"]

    def columns(self, width: int) -> list[str]:
        return ["nats"]

    def table(self, piece: dict[str, NDArray[Any]]) -> tuple[list[str], NDArray[Any]]:
        header, cells = super().table(piece)
        if "flagged" not in piece:
            return header, cells
        return [*header, "flagged"], np.column_stack([cells, piece["flagged"]])

    def picture(self, shown: Sequence[Prediction], media: Media, rows: Shown) -> Figure:
        titles = [piece.title for piece in shown]
        faulty = [piece.faulty for piece in shown if piece.faulty is not None] or None
        nats = [torch.from_numpy(piece.arrays["values"])[:, 0] for piece in shown]
        return draw_scores(rows["real"], nats, self.threshold, faulty, media.modality, media.sample_rate, titles)
