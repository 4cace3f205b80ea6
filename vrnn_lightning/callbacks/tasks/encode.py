"""Codes and reconstructions: the latents that are inferred from a sequence, and the emission's means for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from matplotlib.figure import Figure

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.media import Media, Shown
from vrnn_lightning.callbacks.pictures import draw_heat
from vrnn_lightning.callbacks.tasks.base import Prediction, Task, numbers
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule as Module
from vrnn_lightning.vrnn import Trace

__all__ = ["Encode", "Reconstruct"]


@dataclass(kw_only=True, eq=False)
class Encode(Task):
    """Posterior means of each step, what auxiliary parts predict, and each sequence's ELBO in nats and scaled units."""

    name = "encode"
    needs_trace = True
    writes_media = False
    has_table = False
    seed: int = field(default=0, init=False)  # nothing is drawn

    def make(self, module: Module, batch: SequenceBatch, real: list[int], outputs: Any) -> Iterator[Prediction]:
        trace = cast(Trace, outputs)
        means = trace.z if trace.posterior is None else trace.posterior.mean
        elbo = trace.log_px.sum(1) - trace.kl.sum((1, 2))
        if module.auxiliary and trace.hidden is None:
            raise UserError("encode: a long pass keeps no states for auxiliary losses. Fix: give shorter sequences")
        parts = list(module.auxiliary)
        found = {part.name: values for part in parts if (values := part.predict(trace)) is not None}
        for i in real:
            own, rows = means[i, : batch.lengths[i]], {"real": self.truth(module, batch, i)}
            more = {name: numbers(values[i, : batch.lengths[i]]) for name, values in found.items()}
            yield self.predict(batch, i, own, rows, elbo=elbo[i : i + 1].double().cpu().numpy(), **more)

    def picture(self, shown: Sequence[Prediction], media: Media, rows: Shown) -> Figure:
        values = [torch.from_numpy(piece.arrays["values"]) for piece in shown]
        if not values[0].shape[1]:
            return super().picture(shown, media, rows)
        names = [f"z{d}" for d in range(values[0].shape[1])]
        titles = [piece.title for piece in shown]
        return draw_heat(values, names, "posterior mean", rows["real"], media.modality, media.sample_rate, titles)


class Reconstruct(Task):
    """The emission's mean at each step, with the latents inferred from the sequence."""

    name = "reconstruct"

    def make(self, module: Module, batch: SequenceBatch, real: list[int], outputs: Any) -> Iterator[Prediction]:
        if real:
            seen = "reconstructed" if module.vrnn.latent_size else "predicted"
            for i, mean in zip(real, module.reconstruct(batch.rows(real), seed=self.seed), strict=True):
                yield self.predict(batch, i, mean, {"real": self.truth(module, batch, i), seen: mean})
