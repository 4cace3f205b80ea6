"""Reconstructions: the emission's mean, with the latents inferred."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.tasks.base import Prediction, Task
from vrnn_lightning.module import VRNNLightningModule as Module

__all__ = ["Reconstruct"]


class Reconstruct(Task):
    """The emission's mean at each step, with the latents inferred from the sequence."""

    name = "reconstruct"

    def make(self, module: Module, batch: SequenceBatch, real: list[int], outputs: Any) -> Iterator[Prediction]:
        if real:
            seen = "reconstructed" if module.vrnn.latent_size else "predicted"
            for i, mean in zip(real, module.reconstruct(batch.rows(real), seed=self.seed), strict=True):
                yield self.predict(batch, i, mean, {"real": self.truth(module, batch, i), seen: mean})
