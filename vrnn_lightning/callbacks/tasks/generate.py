"""Sequences drawn from the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.tasks.base import Prediction, Task
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule as Module

__all__ = ["Generate"]


@dataclass(kw_only=True, eq=False)
class Generate(Task):
    """Sequences drawn from the model; needs the checkpoint and no data.

    The draws depend on ``seed``, ``count`` and ``steps``.

    Args:
        count: Sequences to draw.
        steps: Length of a sequence.
        temperature: Temperature of the emission.
    """

    name = "sample"
    needs_data = False
    count: int = 16
    steps: int = 100
    temperature: float = 1.0

    def check(self, module: Module) -> None:
        if not module.is_initialized:
            raise UserError(
                "prediction.task sample: this model has no scaler, as it was never trained. Fix: give --ckpt_path"
            )
        if module.vrnn.num_inputs:
            raise UserError(
                f"prediction.task sample: the model reads {module.vrnn.num_inputs} covariates at each step, which are "
                "not known here. Fix: choose the task forecast, or call `module.sample(inputs=…)`"
            )

    def make(self, module: Module, batch: SequenceBatch, real: list[int], outputs: Any) -> Iterator[Prediction]:
        if real:
            drawn = module.sample(len(real), self.steps, self.temperature, seed=self.seed_of(batch, 0))
            for i in real:
                yield self.predict(batch, i, drawn[i], {"sampled": drawn[i]})
