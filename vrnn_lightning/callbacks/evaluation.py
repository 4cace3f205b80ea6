"""The callback of ``lightning test`` that reports tighter bounds than the ELBO, with standard errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.archives import ArchiveWriter, archive_path
from vrnn_lightning.errors import require_at_least
from vrnn_lightning.filtering import Resampling
from vrnn_lightning.metrics import Estimate
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.noise import Noise
from vrnn_lightning.vrnn import VRNN, Trace

__all__ = ["Evaluation", "importance_weighted"]


def importance_weighted(
    model: VRNN, batch: SequenceBatch, samples: int, noise: Noise, rows: int = 1024
) -> tuple[Tensor, Tensor]:
    """Return the importance-weighted bound of each sequence and the effective samples of its weights, each (batch,).

    Memory is bounded by ``rows``, the trajectories at a time, for any number of samples and any length of the
    sequences.
    """
    largest = max(1, rows // len(batch))
    sums, effective = [], []
    for start in range(0, samples, largest):
        chunk = min(largest, samples - start)
        filtered = model.filter(batch, chunk, None, noise.samples_from(start))
        sums.append(filtered.log_likelihood + math.log(chunk))
        effective.append(filtered.final_effective_samples)
    log_sums = torch.stack(sums)
    squares = 2 * log_sums - torch.stack(effective).log()
    total = log_sums.logsumexp(0)
    return total - math.log(samples), (2 * total - squares.logsumexp(0)).exp()


ENDINGS = ("", "_stderr", "_per_sequence", "_per_sequence_stderr")
SHOWN = {  # without the figures of the ELBO that the module reports
    "elbo": ("_stderr", "_per_sequence_stderr"),
    "iwae": ENDINGS,
    "fivo": ENDINGS,
    "gap": ("_stderr",),
    "iwae_gap": ("", "_stderr"),
    "fivo_gap": ("", "_stderr"),
    "iwae_effective_samples": ("",),
    "fivo_effective_samples": ("",),
}


class Evaluation(Callback):
    """Reports, in ``lightning test`` and ``lightning validate``, bounds on log p(x) that are tighter than the ELBO.

    ``test/iwae``, ``test/fivo``
        the importance-weighted bound (Burda et al. 2016) and the particle filter's (Maddison et al. 2017) with
        ``samples`` trajectories, nats per time step; like ``test/elbo`` with ``_stderr``, ``_per_sequence`` and
        ``_per_sequence_stderr``. Standard errors are over sequences.
    ``test/iwae_gap``, ``test/fivo_gap``, ``test/gap_stderr``, …
        exact log-likelihood minus the bound, where the data know their own; the errors are of paired differences.
    ``test/iwae_effective_samples``, ``test/fivo_effective_samples``
        effective sample size of the weights: of whole trajectories, mean over sequences; and at each step before
        resampling, mean over steps.

    It also writes each sequence's figures to ``evaluation.npz`` in the run's folder (``test_names``, ``test_lengths``,
    ``test_elbo``, ``test_iwae``, ``test_fivo`` in nats per sequence, ``test_kl_per_dim`` in nats per step), for paired
    comparisons of two models.

    Args:
        samples: Trajectories per sequence, K.
        rows: Trajectories at a time, of which memory holds the current step; the particle filter holds at least all
            trajectories of one sequence.
        resampling: Resampling of the particle filter: "multinomial" or "systematic".
        threshold: Resample where the effective sample size is below this share of the particles.

    Raises:
        UserError: An option is outside its range.
    """

    def __init__(
        self,
        samples: int = 40,
        rows: int = 1024,
        resampling: Literal["multinomial", "systematic"] = "systematic",
        threshold: float = 0.5,
    ) -> None:
        self.samples, self.rows = samples, rows
        require_at_least("evaluation", vars(self), {"samples": 1, "rows": 1})
        self.resampling = Resampling(resampling, threshold)
        self.kl_per_dim: Tensor | None = None
        """Nats per step of each latent dimension, after an evaluation."""
        self.path: Path | None = None
        self._estimates: dict[str, Estimate] = {}
        self._writer: ArchiveWriter | None = None
        self._steps = 0
        self._kl: list[Tensor] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._estimates, self._steps, self._kl = {}, 0, []
            self.path, self._writer = archive_path(trainer, "evaluation"), None
            if getattr(trainer, "fast_dev_run", False):  # leaves nothing behind
                self.path = None
            else:
                self._writer = ArchiveWriter(self.path, "val" if trainer.state.fn == "validate" else "test")

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: SequenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit":
            return
        module, trace = cast(VRNNLightningModule, pl_module), cast(Trace, outputs)
        with module.summon_full_params():
            bounds = self._bounds(module, batch, batch_idx)
        figures = {"elbo": trace.log_px.sum(1) - trace.kl.sum((1, 2)), **bounds}
        exact = module.exact_log_likelihood(batch)
        if exact is not None:
            exact = exact.to(figures["elbo"])
            gaps = {"gap": "elbo", "iwae_gap": "iwae", "fivo_gap": "fivo"}
            figures |= {"exact_log_likelihood": exact} | {gap: exact - figures[own] for gap, own in gaps.items()}
        for name in SHOWN.keys() & figures.keys():
            weights = batch.lengths.clamp(max=1) if name == "iwae_effective_samples" else batch.lengths
            self._estimates.setdefault(name, Estimate().to(module.device)).update(figures[name], weights)
        self._kl.append(trace.kl.double().sum((0, 1)).cpu())
        self._steps += int(batch.lengths.sum())
        if self._writer is None:
            return
        arrays = {name: values.double().cpu().numpy() for name, values in figures.items()}
        arrays["names"] = np.array(batch.names or [""] * len(batch), str)
        arrays["lengths"] = batch.lengths.cpu().numpy()
        self._writer.declare(**arrays)
        for i in batch.lengths.nonzero().flatten().tolist():
            place = 0 if batch.index is None else int(batch.index[i])
            self._writer.add(place, **{name: values[i : i + 1] for name, values in arrays.items()})

    on_test_batch_end = on_validation_batch_end

    def _bounds(self, module: VRNNLightningModule, batch: SequenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return each sequence's bounds in nats, and effective samples: of trajectories, and summed over steps."""
        model = module.vrnn
        samples = self.samples if model.has_latent else 1
        size = max(1, self.rows // samples)
        order = batch.lengths.argsort(stable=True).tolist()  # less padding
        parts = []
        for start in range(0, len(batch), size):
            part = batch.rows(order[start : start + size])
            place = (batch_idx, start, module.global_rank)
            draws = [Noise.named(part, module.noise_seed, bound, unnamed=place) for bound in ("iwae", "fivo")]
            iwae, of_trajectories = importance_weighted(model, part, samples, draws[0], self.rows)
            fivo = model.filter(part, samples, self.resampling, draws[1])
            of_steps = fivo.effective_samples * part.lengths
            parts.append(torch.stack([iwae, fivo.log_likelihood, of_trajectories, of_steps]))
        names = ("iwae", "fivo", "iwae_effective_samples", "fivo_effective_samples")[: 4 if model.has_latent else 2]
        return dict(zip(names, torch.cat(parts, 1)[:, torch.tensor(order).argsort()], strict=False))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            return
        stage = "val" if trainer.state.fn == "validate" else "test"
        shown: dict[str, Tensor] = {}
        for name, estimate in sorted(self._estimates.items()):  # every process in the same order
            figures = estimate.compute()
            shown |= {f"{name}{ending}": figures[ending] for ending in SHOWN[name] if ending in figures}
        latent = cast(VRNNLightningModule, pl_module).vrnn.has_latent
        shown["samples"] = torch.tensor(float(self.samples if latent else 1))
        pl_module.log_dict({f"{stage}/{name}": value.float() for name, value in shown.items()}, sync_dist=True)
        steps = torch.tensor(self._steps, device=pl_module.device)
        kl = torch.stack(self._kl).sum(0).to(pl_module.device)
        all_kl, all_steps = (trainer.strategy.reduce(x, reduce_op="sum") for x in (kl, steps))
        self.kl_per_dim = (all_kl / all_steps).cpu()
        if self._writer is not None:
            self._writer.finish(kl_per_dim=self.kl_per_dim.numpy())
            self._writer = None

    on_test_epoch_end = on_validation_epoch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._writer is not None:
            self._writer.discard()
            self._writer = None
