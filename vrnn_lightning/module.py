"""The LightningModule: training and evaluation steps, logging and optimisers of a VRNN."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Adam, Optimizer

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.compatibility import FORMAT, KEY, OPTIMIZED, upgrade
from vrnn_lightning.data import Scaler
from vrnn_lightning.errors import UserError
from vrnn_lightning.inference import Inference
from vrnn_lightning.metrics import ActiveUnits, Bound, Estimate
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import ELBO, ImportanceBound, Objective, StreamState
from vrnn_lightning.pretrained import Pretrained
from vrnn_lightning.resuming import make_resumable, match_optimizer_states
from vrnn_lightning.trust.checkpoints import make_storable
from vrnn_lightning.vrnn import Trace, build_vrnn
from vrnn_lightning.vrnn.auxiliary import Auxiliary, AuxiliaryLosses

__all__ = ["VRNNLightningModule"]

if not hasattr(ArgumentParser, "instantiate_classes"):  # jsonargparse 5; Lightning 2.6 loads checkpoints with it
    ArgumentParser.instantiate_classes = ArgumentParser.instantiate  # type: ignore[method-assign]  # absent there


class VRNNLightningModule(Inference, Pretrained, LightningModule):  # type: ignore[misc]  # trust= is ours
    """Trains a VRNN on the ELBO and reports it, split into reconstruction and KL.

    Every argument is a hyperparameter: it travels in the checkpoint, and ``load_from_checkpoint`` needs nothing else.

    Args:
        num_features: Width of a frame; given by the data on the command line.
        objective: The bound to train on: a class of ``vrnn_lightning.objectives``, or a partial of one.
        optimizer: Called with the parameters: an optimiser class or a partial of one.
        lr_scheduler: Called with the optimiser: a scheduler class or a partial of one.
        lr_interval: Whether the scheduler steps after every "epoch" or every "step".
        auxiliary: Losses of targets beside the bound: classes or partials, see ``vrnn_lightning.vrnn.auxiliary``.
        num_targets: Targets per step; given by the data on the command line.
        network: The other options of :func:`~vrnn_lightning.vrnn.build_vrnn`.

    Raises:
        UserError: An option is outside its range, or a checkpoint can't hold a factory.

    >>> VRNNLightningModule(num_features=3, latent_size=2).vrnn.generate(steps=5, batch_size=4).x.shape
    torch.Size([4, 5, 3])
    """

    forwards_options_to = staticmethod(build_vrnn)
    """What makes the model of the options that ``__init__`` does not name."""
    scale_mean: Tensor
    scale_std: Tensor
    is_initialized: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        objective: Callable[[], Objective] = ELBO,
        optimizer: OptimizerCallable = lambda params: Adam(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        auxiliary: list[Callable[[int, int, int], Auxiliary]] | None = None,
        num_targets: int = 0,
        **network: Any,
    ) -> None:
        super().__init__()
        defaults = inspect.signature(build_vrnn).parameters.values()
        network = {option.name: option.default for option in defaults if option.name != "num_features"} | network
        self.vrnn = build_vrnn(num_features, **network)
        self.save_hyperparameters(logger=False)
        make_storable(self.hparams)
        self.objective = objective()
        sizes = self.vrnn.hidden_size, self.vrnn.latent_size, num_targets
        self.auxiliary = AuxiliaryLosses(make(*sizes) for make in auxiliary or ())
        if self.auxiliary:
            self.objective.require_auxiliary()
            self.objective.auxiliary = self.auxiliary.terms
        self.optimizer, self.lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval
        self.beta = 1.0
        """Weight of the KL in training; a callback may set it."""
        self.is_tracing = True
        """Whether ``predict_step`` infers latents; a callback may set it."""
        self._first_epoch = 0
        self._carried: StreamState | None = None
        self._resumed: list[list[Tensor]] | None = None
        self._loaded: dict[str, Any] | None = None
        self.batch_kl: Tensor | None = None
        """KL per step of the last training batch in nats, over all processes; ``None`` if it had no steps."""
        self.noise_seed = torch.initial_seed()
        self.register_buffer("scale_mean", torch.zeros(num_features))
        self.register_buffer("scale_std", torch.ones(num_features))
        self.register_buffer("is_initialized", torch.tensor(False))
        self.bound = Bound()
        self.val_objective_metric = Estimate()
        self.active = ActiveUnits(self.vrnn.latent_size)

    @property
    def scaler(self) -> Scaler:
        """The affine map between data units and the model's, as it was when training began."""
        return Scaler(self.scale_mean, self.scale_std)

    def init_from(self, state_dict: dict[str, Tensor]) -> None:
        """Start from the weights of another run: its VRNN, with the centring of its inputs.

        The scaler remains that of the new data. It brings them to the units that the weights know.

        Args:
            state_dict: A checkpoint's ``state_dict``.

        Raises:
            UserError: It is of another architecture.
        """
        own = self.vrnn.state_dict()
        given = {key.removeprefix("vrnn."): x for key, x in state_dict.items() if key.startswith("vrnn.")}
        for key in [*own, *given]:
            here, there = (f"shape {tuple(part[key].shape)}" if key in part else "none" for part in (own, given))
            if here != there:
                raise UserError(
                    f"vrnn.{key}: {there} there, {here} here. Fix: give the architecture it was trained with"
                )
        self.vrnn.load_state_dict(given)
        self.is_initialized.fill_(True)

    def setup(self, stage: str) -> None:
        """Raise if the data's width is not the model's, or if the precision is too narrow for densities."""
        make_resumable(self.trainer)
        precision, strategy = self.trainer.precision, self.trainer.strategy
        if precision in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
            raise UserError(f"--trainer.precision {precision}: too narrow for densities. Fix: use bf16-mixed")
        if isinstance(strategy, FSDPStrategy) and strategy.mixed_precision is None and str(precision).endswith("mixed"):
            from torch.distributed.fsdp import MixedPrecision  # not in every build of torch

            strategy.mixed_precision = MixedPrecision()  # parameters and reductions stay wide; only autocast narrows
        if precision == "64-true":
            self.double()  # Lightning does so after it has restored a checkpoint, whose weights would be rounded
        own = self.vrnn.num_features
        width = getattr(self._data, "num_features", own)
        if width != own:
            raise UserError(
                f"{type(self._data).__name__} has {width} features per step, but the model was made for {own}. "
                "Fix: use the data it was trained on or train a new model"
            )

    @property
    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def on_fit_start(self) -> None:
        """Store the data's scaler and, before the first run, what phi_x and the emission start from."""
        if self._loaded is not None:
            match_optimizer_states(self._loaded, [_parameter_names(self, o) for o in self.trainer.optimizers])
            self._loaded = None
        self._take_scaler(replace=True)
        if not self.is_initialized and hasattr(self._data, "input_statistics"):
            moments = self._data.input_statistics()
            with self.summon_full_params():
                self.vrnn.init_from_statistics(*moments)
        self.is_initialized.fill_(True)

    def on_validation_start(self) -> None:
        """Raise if the data are scaled otherwise than in training."""
        self._take_scaler(replace=not self.is_initialized)

    on_test_start = on_predict_start = on_validation_start

    def _take_scaler(self, *, replace: bool) -> None:
        if not hasattr(self._data, "scaler"):
            return
        scaler: Scaler = self._data.scaler
        for own, other in ((self.scale_mean, scaler.mean), (self.scale_std, scaler.std)):
            if not replace and not torch.allclose(own, other.to(own).expand_as(own), rtol=1e-4, atol=1e-6):
                raise UserError(
                    "the data were scaled otherwise than in training. Fix: give the checkpoint as ckpt_path, too"
                )
            own.copy_(other)

    def summon_full_params(self) -> AbstractContextManager[None]:
        """Return a context that every process enters to read or write parameters outside a step, for FSDP's shares."""
        sharded: Any = self.trainer.model
        if sharded is self or not hasattr(sharded, "summon_full_params"):
            return nullcontext()
        return cast(AbstractContextManager[None], sharded.summon_full_params(sharded))

    def on_train_start(self) -> None:
        """Remember the epoch in which every batch is checked, and restore the state of streams."""
        self._first_epoch, self._carried = self.current_epoch, None
        resumed, self._resumed = self._resumed, None
        if resumed is not None and all(len(x) == self.trainer.world_size for part in resumed for x in part):
            own = [[x[self.global_rank].to(self.device) for x in part] for part in resumed]
            self._carried = StreamState.of_tensors(own, self.vrnn.zero_state(1))

    def on_train_epoch_end(self) -> None:
        """Drop the state of streams: the next epoch starts from the initial state."""
        self._carried = None

    def forward(self, batch: SequenceBatch) -> Trace:
        """Infer the latents of a batch and score it, with fresh noise."""
        return cast(Trace, self.vrnn(batch))

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Return minus the objective summed over the global batch, divided by its number of sequences."""
        if self.current_epoch == self._first_epoch:
            self._check(batch)
        noise = self._noise(batch, batch_idx, self.current_epoch)
        carried = self._carried_into(batch)
        value, log_px, kl, ahead, *terms = self.objective(self.vrnn, batch, noise, self.beta, self._total, carried)
        self._carried = None if batch.reset is None else ahead.reset_rows(torch.zeros_like(batch.reset))
        steps, sequences = batch.lengths.sum(), (batch.lengths > 0).sum()
        samples = len(log_px) // len(batch)
        beside, counts = self.auxiliary.sums(terms[0] if terms else (), samples, value)
        value = value - sum(part.weight * loss for part, loss in zip(self.auxiliary, beside, strict=True))
        parts = (value, log_px.sum() / samples, kl.sum() / samples, steps, sequences, *beside, *counts)
        stacked = torch.stack([part.detach().to(self.bound.kl.dtype) for part in parts])
        total, reconstruction, all_kl, all_steps, all_sequences, *rest = self._total(stacked)
        loss: Tensor = -value * self.trainer.world_size / all_sequences.clamp(min=1).to(value)
        self._stop_unless_finite(total, "the loss", batch)
        for line in self.vrnn.newly_called():
            rank_zero_info(line)
        self.log("train/beta", self.beta, prog_bar=True)
        self.log("train/padding", 1 - steps / batch.x[..., 0].numel())
        self.batch_kl = all_kl / all_steps if all_steps else None
        if not all_steps:
            return loss
        self.log("train/loss", -total / all_sequences)
        for name, part in (("elbo", reconstruction - all_kl), ("reconstruction", reconstruction), ("kl", all_kl)):
            self.log(f"train/{name}", part / all_steps, prog_bar=True)
            self.log(f"train/{name}_per_sequence", part / all_sequences)
        for name, mean in self.auxiliary.named_means(rest[: len(beside)], rest[len(beside) :]).items():
            self.log(f"train/{name}", mean)
        return loss

    def _carried_into(self, batch: SequenceBatch) -> StreamState | None:
        """Return the state of streams before a window, reset where a sequence begins; ``None`` for whole sequences."""
        if batch.reset is None or batch.reset.all() or self._carried is None:
            return None
        if len(self._carried.trajectories.log_weights[0]) != len(batch):
            raise UserError(f"{type(self._data).__name__}: every batch of streams must have the same number of rows")
        return self._carried.reset_rows(batch.reset, self.vrnn.initial_state_of(batch).state)

    def _check(self, batch: SequenceBatch) -> None:
        """Raise if the emission can't score a value, and warn of what the model does not read."""
        self.vrnn.head.check(batch.x, batch.valid_mask)
        self.auxiliary.check(batch)
        data, kind = type(self._data).__name__, self.vrnn.head.likelihood
        own = getattr(self._data, "likelihood", kind)
        if own != kind:
            rank_zero_warn(f"{data}: its likelihood is a {own}, but the emission has a {kind}, so there is no val/gap")
        if not self.vrnn.missing and batch.observed is not None and not batch.observed[batch.mask].all():
            rank_zero_warn(f"{data}: missing values read as the mean; set `missing = True` in that class to mark them")
        if not self.vrnn.num_inputs and batch.inputs is not None:
            rank_zero_warn(f"{data}: covariates are not read; say in that class how many there are, `num_inputs`")

    def _total(self, x: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(x)
        return x

    def _noise(self, batch: SequenceBatch, batch_idx: int, epoch: int = -1) -> Noise:
        """Return the noise of a pass over a batch, which the run's seed, the epoch and each sequence's name decide.

        No resume, batch size, order or number of processes changes it. Evaluation (epoch -1) always draws the same.
        """
        return Noise.named(batch, self.noise_seed, epoch, unnamed=(batch_idx, self.global_rank))

    def _stop_unless_finite(self, value: Tensor, what: str, batch: SequenceBatch | None = None) -> None:
        if torch.isfinite(value):
            return
        written = {getattr(callback, "best_model_path", "") for callback in self.trainer.checkpoint_callbacks} - {""}
        kept = max(written, key=lambda path: Path(path).stat().st_mtime, default=None)
        names = [name for name in getattr(batch, "names", None) or [] if name]
        shown = f" on {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else ""
        last = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
        raise UserError(
            f"{what} is {value.item()} at step {self.global_step}{shown}; {last}. Fix: try a lower learning rate, "
            "--trainer.gradient_clip_val or a larger min_std"
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient's norm before clipping, and stop where it is not finite."""
        if self._clip_shards is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        else:
            norm = self._clip_shards(math.inf)
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # a loss scaler skips such steps itself
            self._stop_unless_finite(norm, "the gradient's norm")
        self.log("train/grad_norm", norm)

    @property
    def _clip_shards(self) -> Callable[[float], Tensor] | None:
        """FSDP's clipping, which returns the norm: no process holds the whole gradient."""
        return getattr(self.trainer.model, "clip_grad_norm_", None)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer's options say; by norm under FSDP too, which Lightning refuses."""
        if self._clip_shards is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            self._clip_shards(gradient_clip_val)

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> Any:
        """Add a batch to the validation totals, and return its trace."""
        if isinstance(self.objective, ImportanceBound):
            values = self.objective.of_sequences(self.vrnn, batch, self._noise(batch, batch_idx))
            self.val_objective_metric.update(values, batch.lengths)
        return self._evaluate(batch, batch_idx)

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> Any:
        """Add a batch to the test totals, and return its trace."""
        return self._evaluate(batch, batch_idx)

    def trace(self, batch: SequenceBatch, batch_idx: int) -> Trace:
        """Infer the latents of a batch and score it, with the noise that evaluation always draws."""
        return self.vrnn.trace(batch, self._noise(batch, batch_idx))

    def _evaluate(self, batch: SequenceBatch, batch_idx: int) -> Trace:
        self.vrnn.head.check(batch.x, batch.valid_mask)
        trace = self.trace(batch, batch_idx)
        valid = batch.valid_mask
        log_scale = (valid * self.scale_std.log()).sum()
        exact = self.exact_log_likelihood(batch)
        self.bound.update(trace.log_px, trace.kl, batch.lengths, valid.sum(), log_scale, exact)
        if self.auxiliary:
            self._evaluate_auxiliary(batch, batch_idx, trace)
        if trace.posterior is not None:
            self.active.update(trace.posterior.mean, batch.mask)
        return trace

    def exact_log_likelihood(self, batch: SequenceBatch) -> Tensor | None:
        """Return log p(x) of each sequence in nats, if the data know it and it is of the emission's kind."""
        kind = self.vrnn.head.likelihood
        is_comparable = getattr(self._data, "likelihood", kind) == kind
        return getattr(self._data, "exact_log_likelihood", lambda batch: None)(batch) if is_comparable else None

    def _evaluate_auxiliary(self, batch: SequenceBatch, batch_idx: int, trace: Trace) -> None:
        self.auxiliary.check(batch)
        if trace.hidden is None:  # of a long pass, which keeps no states
            terms = tuple(self.vrnn.collect(batch, self._noise(batch, batch_idx), self.auxiliary.terms)[0])
        else:
            terms = self.auxiliary.terms(trace)
        self.auxiliary.update(terms)

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures, and the bound that is trained on."""
        value = self._report("val")
        if isinstance(self.objective, ImportanceBound):
            value = self.val_objective_metric.compute()[""].float()
            self.val_objective_metric.reset()
        self.log("val/objective", value, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the test figures."""
        self._report("test")

    def _report(self, stage: str) -> Tensor:
        figures = {f"{stage}/{name}": value.float() for name, value in self.bound.compute().items()}
        elbo = figures[f"{stage}/elbo"]
        if self.vrnn.head.likelihood == "mixed":
            del figures[f"{stage}/bits_per_dim"]  # a density and a mass have no common bit
        if self.vrnn.latent_size:
            figures[f"{stage}/active_units"] = self.active.compute().float()
        if self.auxiliary:
            figures |= {f"{stage}/{name}": mean for name, mean in self.auxiliary.compute().items()}
        self.bound.reset()
        self.active.reset()
        self.log_dict(figures, sync_dist=True)  # the totals are reduced already; this only tells Lightning so
        if not math.isfinite(elbo) and not self.trainer.sanity_checking:
            raise UserError(f"{stage}/elbo is {elbo.item()}. Fix: correct the data or give an earlier checkpoint")
        return elbo

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> Trace | tuple[()]:
        """Return the trace of a batch, or nothing where a callback makes something else of it."""
        return self.trace(batch, batch_idx) if self.is_tracing else ()

    def configure_optimizers(self) -> Any:
        """Return the optimiser, and the schedule of its learning rate where there is one."""
        try:
            optimizer = self.optimizer(self.parameters())
        except ValueError as error:  # torch checks the options' ranges
            raise UserError(f"--model.optimizer: {error}") from error
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        plan = {"scheduler": scheduler, "interval": self.lr_interval, "monitor": getattr(scheduler, "monitor", None)}
        return {"optimizer": optimizer, "lr_scheduler": plan}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the seed of the noise, from which every process derives its own, and what streams carry."""
        checkpoint[KEY] = FORMAT
        callbacks = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
        for schedule in [*checkpoint.get("lr_schedulers", ()), *(state.get("scheduler_state") for state in callbacks)]:
            if isinstance(schedule, dict):
                schedule.pop("anneal_func", None)  # a function, which torch before 2.10 keeps in SWALR's state
        checkpoint["noise_seed"] = self.noise_seed
        if "optimizer_states" in checkpoint and self._trainer is not None:
            checkpoint[OPTIMIZED] = [_parameter_names(self, optimizer) for optimizer in self.trainer.optimizers]
        if self._carried is not None:  # as lists of tensors, which load without running pickled code
            is_alone = self._trainer is None or self.trainer.world_size == 1
            gather = (lambda x: x[None]) if is_alone else self.all_gather  # to shape (processes, ...)
            checkpoint["carried"] = [[gather(x) for x in part] for part in self._carried.tensors()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the seed of the noise and what streams carry."""
        upgrade(checkpoint, "the checkpoint")
        self.noise_seed = checkpoint.get("noise_seed", self.noise_seed)
        self._resumed = checkpoint.get("carried")
        self._loaded = checkpoint if OPTIMIZED in checkpoint else None


def _parameter_names(module: LightningModule, optimizer: Optimizer) -> list[str]:
    names = {id(p): name for name, p in module.named_parameters()}
    return [names.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]
