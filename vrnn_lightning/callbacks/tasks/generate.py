"""Sequences drawn from the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.tasks.base import Prediction, Task
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule as Module

__all__ = ["Generate"]


class Generate(Task):
    """Sequences drawn from the model; needs the checkpoint and no data.

    Args:
        count: Sequences.
        steps: Their length.
        temperature: Temperature of the emission.
        seed: Seed of the draws.
        shown: Sequences in the picture.
    """

    name = "sample"
    needs_data = False

    def __init__(
        self, *, count: int = 16, steps: int = 100, temperature: float = 1.0, seed: int = 0, shown: int = 4
    ) -> None:
        super().__init__(seed=seed, shown=shown)
        self.count, self.steps, self.temperature = count, steps, temperature

    def check(self, module: Module) -> None:
        if not module.is_initialized:
            raise UserError(
                "prediction.task sample: this model has no scaler, as it was never trained; give --ckpt_path"
            )
        if module.vrnn.num_inputs:
            raise UserError(
                f"prediction.task sample: the model reads {module.vrnn.num_inputs} covariates at each step, which are "
                "not known here; choose the task forecast, or call `module.sample(inputs=…)`"
            )

    def make(self, module: Module, batch: SequenceBatch, real: list[int], outputs: Any) -> Iterator[Prediction]:
        if real:
            drawn = module.sample(len(real), self.steps, self.temperature, seed=self.seed_of(batch, 0))
            for i in real:
                yield self.predict(batch, i, drawn[i], {"sampled": drawn[i]})
