"""Warnings of failures that raise no error, and the gradient's norm in each network."""

from __future__ import annotations

import logging
import math
from collections import deque
from statistics import median
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.annealing import KLAnnealing
from vrnn_lightning.errors import UserError, require_at_least
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.resuming import callbacks_of
from vrnn_lightning.trust import require_types

__all__ = ["Diagnostics", "GradientNorms"]

log = logging.getLogger(__name__)

SPIKES = 3
LEAST = {"min_kl": 0, "patience": 1, "max_ratio": 0, "window": 2 * SPIKES}


class Diagnostics(Callback):
    """Warns once of a collapsed latent, and once of an exploding gradient, with a list of fixes.

    The latent has collapsed if ``val/kl`` lies below ``min_kl`` in ``patience`` validations in a row after the end of
    the KL's annealing. The gradient explodes if ``train/grad_norm`` is more than ``max_ratio`` times the median of the
    steps before it, in three of the last ``window`` steps; the first ``window / 2`` steps are not judged.

    It reads logged figures and does not change the training. Warnings go through Python's ``logging``, by default to
    stderr, from one process.

    Args:
        min_kl: Nats per time step below which the latent counts as collapsed; 0 for no such warning.
        patience: Validations in a row.
        max_ratio: Gradient norm over its running median that counts as exploded; 0 for no such warning.
        window: Optimiser steps of the median and the count.

    Raises:
        UserError: An option out of range.
    """

    def __init__(self, min_kl: float = 0.01, patience: int = 5, max_ratio: float = 50.0, window: int = 200) -> None:
        self.min_kl, self.patience, self.max_ratio, self.window = min_kl, patience, max_ratio, window
        require_at_least("diagnostics", vars(self), LEAST)
        if 0 < max_ratio <= 1:
            raise UserError(f"diagnostics.max_ratio {max_ratio}: must be larger than 1, or 0 to switch it off")
        self.low = 0
        self.norms: deque[float] = deque(maxlen=window)
        self.spikes: list[int] = []
        self.warned: set[str] = set()
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"low": self.low, "norms": list(self.norms), "spikes": list(self.spikes), "warned": sorted(self.warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        require_types(state_dict, self, low=int, spikes=list, norms=list, warned=(list, set))
        self.low, self.spikes = state_dict["low"], [int(step) for step in state_dict["spikes"]]
        self.norms = deque(map(float, state_dict["norms"]), self.window)
        self.warned = set(map(str, state_dict["warned"]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: SequenceBatch, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step or not self.max_ratio or "gradient" in self.warned:
            return
        self._step = trainer.global_step
        norm = trainer.callback_metrics["train/grad_norm"].item()  # the module has waited for it already
        if not math.isfinite(norm) or norm == 0:  # skipped by a loss scaler, or a batch without steps
            return
        usual = median(self.norms) if 2 * len(self.norms) >= self.window else math.inf
        self.norms.append(norm)
        self.spikes = [step for step in self.spikes if step > self._step - self.window]
        if norm <= self.max_ratio * usual:
            return
        self.spikes.append(self._step)
        if len(self.spikes) >= SPIKES:
            self._warn(trainer, "gradient", self._explosion(trainer, norm, usual))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(VRNNLightningModule, pl_module)
        if trainer.state.fn != "fit" or trainer.sanity_checking or not module.vrnn.latent_size:
            return
        settled = all(annealer.settled(trainer.global_step) for annealer in callbacks_of(trainer, KLAnnealing))
        kl = trainer.callback_metrics["val/kl"].item()
        self.low = self.low + 1 if settled and kl < self.min_kl else 0
        if self.low >= self.patience:
            self._warn(trainer, "latent", self._collapse(trainer, module, kl))

    def _warn(self, trainer: Trainer, cause: str, line: str) -> None:
        if cause not in self.warned and trainer.is_global_zero:
            log.warning(line)
        self.warned.add(cause)

    def _collapse(self, trainer: Trainer, module: VRNNLightningModule, kl: float) -> str:
        active = int(trainer.callback_metrics["val/active_units"].item())
        smaller = "a smaller weight of the KL, " if module.beta > 1 else ""
        return (
            f"warning: the latent collapses: val/kl is {kl:.2g} nats per step at beta {module.beta:.3g}, below "
            f"{self.min_kl:g} in {self.low} validations in a row, and {active} of {module.vrnn.latent_size} latent "
            f"dimensions are active; try {smaller}an annealing that starts at 0 (LinearKLAnnealing), free bits "
            "(--model.objective ELBO --model.objective.free_bits 0.05), the callback ControlVAE with a target, a "
            "weaker decoder (--model.decoder.width) or the objectives IWAE and FIVO"
        )

    def _explosion(self, trainer: Trainer, norm: float, usual: float) -> str:
        limit, value = float(f"{2 * usual:.2g}"), trainer.gradient_clip_val
        now = f" (now {value:g})" if value else ""
        clip = "" if value and value <= limit else f", --trainer.gradient_clip_val {limit:g}{now}"
        return (
            f"warning: the gradient explodes: train/grad_norm is {norm:.2g} at step {self._step}, and in "
            f"{len(self.spikes)} of the last {self.window} steps it was more than {self.max_ratio:g} times its running "
            f"median, {usual:.2g}; try a lower learning rate (--model.optimizer.lr){clip} or a larger min_std of the "
            "emission"
        )


class GradientNorms(Callback):
    r"""Logs ``train/grad_norm/NAME`` for each network that is trained: prior, encoder, decoder, phi_x, phi_z, cells.

    They are Euclidean norms of parts of the gradient, after accumulation and unscaling and before clipping, at the
    steps that the trainer logs (``--trainer.log_every_n_steps``):

    .. math:: \texttt{train/grad\_norm}^2 = \sum_\mathrm{networks} \texttt{train/grad\_norm/NAME}^2.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
        if every and (trainer.global_step + 1) % every == 0:
            norms = gradient_norms(cast(VRNNLightningModule, pl_module))
            pl_module.log_dict({f"train/grad_norm/{name}": norm for name, norm in norms.items()})


def gradient_norms(module: VRNNLightningModule) -> dict[str, Tensor]:
    """Return the norm of each network's gradient, by its name in ``module.vrnn``; every process takes part."""
    gradients: dict[str, list[Tensor]] = {}
    for path, parameter in module.named_parameters():
        name = path.removeprefix("vrnn.").partition(".")[0]
        gradients.setdefault(name, []).extend([] if parameter.grad is None else [parameter.grad])
    norms = torch.stack([torch.nn.utils.get_total_norm(of).to(module.device) for of in gradients.values()])
    model: Any = module.trainer.model
    if hasattr(model, "clip_grad_norm_"):  # FSDP's
        squares = norms.square()
        torch.distributed.all_reduce(squares, group=model.process_group)
        norms = squares.sqrt()
    return dict(zip(gradients, norms, strict=True))
