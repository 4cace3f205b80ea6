"""What a prediction leaves behind: each sequence's score and the latents inferred, as a flat archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.archives import archive_path, described, write_archive
from vrnn_lightning.vrnn import Trace

__all__ = ["Encodings"]


class Encodings(Callback):
    """Writes ``encodings.npz`` into the run's folder; several processes write ``encodings_0.npz`` and so on.

    ``test_values``
        means of the posteriors q(z_t | x_<=t, z_<t), shape (total steps, latent), sequence after sequence.
    ``test_lengths``
        steps of each sequence, shape (sequences,).
    ``test_elbo``
        single-sample ELBO of each sequence in nats, in scaled units, shape (sequences,).
    ``test_names``
        names of the sequences, shape (sequences,).
    """

    def __init__(self) -> None:
        self._parts: list[dict[str, np.ndarray]] = []
        self.path: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the file's name; every process takes part."""
        self.path = archive_path(trainer, "encodings")
        self._parts = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: SequenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's figures, without its padding."""
        trace: Trace = outputs
        real = batch.lengths > 0
        means = trace.z if trace.posterior is None else trace.posterior.mean
        elbo = trace.log_px.sum(1) - trace.kl.sum((1, 2))
        self._parts.append(
            {
                "values": means[batch.mask].float().cpu().numpy(),
                "elbo": elbo[real].double().cpu().numpy(),
            }
            | described(batch)
        )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the archive, whole or not at all."""
        if not self._parts or self.path is None:
            return
        write_archive(self.path, self._parts, "test")
