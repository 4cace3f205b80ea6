"""Callbacks that set the weight of the KL, beta, at every optimiser step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vrnn_lightning import schedules
from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.errors import UserError, require
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.resuming import callbacks_of
from vrnn_lightning.trust import require_types

__all__ = [
    "ConstantKLWeight", "ControlVAE", "CosineKLAnnealing", "CyclicalKLAnnealing", "KLAnnealing", "LinearKLAnnealing",
    "SigmoidKLAnnealing",
]  # fmt: skip


class KLAnnealing(Callback, ABC):
    """Sets ``module.beta`` before each training step.

    Reported ELBOs and the choice of the best checkpoint do not depend on beta. A resumed run continues with the weight
    of its step.
    """

    @abstractmethod
    def beta(self, step: int) -> float:
        """Return the weight after ``step`` optimiser steps."""

    def settled(self, step: int) -> bool:
        """Return whether the weight stays from ``step`` on; while it moves, a small KL is not a collapse yet."""
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise if the trainer has two annealers, which would overwrite each other's weight."""
        annealers = [type(callback).__name__ for callback in callbacks_of(trainer, KLAnnealing)]
        if len(annealers) > 1:
            raise UserError(f"trainer.callbacks: {' and '.join(annealers)} would both set beta. Fix: keep one")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: SequenceBatch, batch_idx: int
    ) -> None:
        cast(VRNNLightningModule, pl_module).beta = self.beta(trainer.global_step)


def _check(**options: float) -> None:
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise UserError(f"KL annealing: {name} {value} must be finite and not negative")


class ConstantKLWeight(KLAnnealing):
    """A fixed weight, the beta of a beta-VAE (Higgins et al. 2017).

    Args:
        value: The weight.
    """

    def __init__(self, value: float = 1.0) -> None:
        _check(value=value)
        self.value = value

    def beta(self, step: int) -> float:
        return self.value


class _Ramp(KLAnnealing):
    """A weight that goes from ``start`` to ``end``.

    Args:
        steps: Optimiser steps until the weight is ``end``; all cycles together.
        start: Weight at the first step, and at the start of each cycle.
        end: Weight from ``steps`` on, and at the end of each cycle.
    """

    schedule: Callable[..., float]
    """The weight as a function of the step, ``steps``, ``start`` and ``end``."""

    def __init__(self, steps: int, start: float = 0.0, end: float = 1.0) -> None:
        _check(steps=steps, start=start, end=end)
        self.steps, self.start, self.end = steps, start, end

    def beta(self, step: int) -> float:
        return self.schedule(step, self.steps, self.start, self.end)

    def settled(self, step: int) -> bool:
        return step >= self.steps


class LinearKLAnnealing(_Ramp):
    """A straight line from ``start`` at the first step to ``end`` at step ``steps`` (Bowman et al. 2016)."""

    schedule = staticmethod(schedules.linear)


class CosineKLAnnealing(_Ramp):
    """Half a cosine wave from ``start`` at the first step to ``end`` at step ``steps``, flat at both ends."""

    schedule = staticmethod(schedules.cosine)


class SigmoidKLAnnealing(_Ramp):
    """A logistic curve from ``start`` at the first step to ``end`` at step ``steps`` (Bowman et al. 2016).

    Args:
        steepness: Slope of the logistic curve; a large one resembles a switch at half of ``steps``.
    """

    def __init__(self, steps: int, start: float = 0.0, end: float = 1.0, steepness: float = 10.0) -> None:
        super().__init__(steps, start, end)
        if not steepness > 0:
            raise UserError(f"KL annealing: steepness {steepness} must be positive")
        self.steepness = steepness
        self.schedule = partial(schedules.sigmoid, steepness=steepness)


class CyclicalKLAnnealing(_Ramp):
    """Several linear rises from ``start`` to ``end``, which take ``steps`` steps together (Fu et al. 2019).

    Args:
        cycles: Number of cycles.
        ramp: Share of a cycle spent rising, in (0, 1]; the rest of it stays at ``end``.
    """

    def __init__(self, steps: int, start: float = 0.0, end: float = 1.0, cycles: int = 4, ramp: float = 0.5) -> None:
        super().__init__(steps, start, end)
        require("KL annealing: cycles", cycles, 1)
        if not 0 < ramp <= 1:
            raise UserError(f"KL annealing: ramp {ramp} must lie in (0, 1]")
        self.cycles, self.ramp = cycles, ramp
        self.schedule = partial(schedules.cyclical, cycles=cycles, ramp=ramp)


class ControlVAE(KLAnnealing):
    r"""Steers the weight so that the KL comes to a target (Shao et al. 2020, arXiv 2004.05988, eq. 8 and algorithm 1).

    A non-linear PI controller computes the next optimiser step's weight from the KL of each step,

    .. math:: \beta_{t+1} = \frac{K_p}{1 + e^{e_t}} - K_i \sum_{j \le t} e_j + \beta_{\min}, \qquad
        e_t = \mathrm{target} - \mathrm{KL}_t,

    clamped to [beta_min, beta_max]: a KL below the target lowers it, a KL above raises it. The sum leaves out errors
    that would press the weight beyond a bound (anti-windup). The first step's weight is ``beta_min``.

    Args:
        target: KL in nats per time step, as in ``train/kl``.
        kp: Proportional gain, the most that one step's error adds.
        ki: Integral gain, the change of the weight in one step for an error of one nat. A large one oscillates.
        beta_min: Least weight.
        beta_max: Largest weight. A target below the KL of a training without this callback needs one above 1.

    Raises:
        UserError: The target or a bound is out of range, or, in a fit, the model has no latent.
    """

    def __init__(
        self, target: float, kp: float = 0.01, ki: float = 0.001, beta_min: float = 0.0, beta_max: float = 10.0
    ) -> None:
        if not 0 < target < math.inf:
            raise UserError(f"ControlVAE: target {target} must be positive, in nats per time step")
        _check(kp=kp, ki=ki, beta_min=beta_min)
        if not beta_min < beta_max < math.inf:
            raise UserError(f"ControlVAE: beta_max {beta_max} must lie above beta_min {beta_min}")
        self.target, self.kp, self.ki = target, kp, ki
        self.beta_min, self.beta_max = beta_min, beta_max
        self.integral = 0.0
        self.weight = beta_min
        self._step = 0
        self._kls: list[Tensor] = []

    def beta(self, step: int) -> float:
        """Return the weight, which depends on the KLs so far and not on the step."""
        return self.weight

    def settled(self, step: int) -> bool:
        """Return whether the weight is at its lower bound."""
        return self.integral <= 0

    def observe(self, kl: float) -> None:
        """Update the weight with the KL of an optimiser step, in nats per time step."""
        error = self.target - kl
        proportional = self.kp * (1 - math.tanh(error / 2)) / 2  # kp / (1 + exp(error)), which would overflow
        total = self.integral - self.ki * error
        if error > 0:
            self.integral = min(self.integral, max(total, -proportional))
        else:
            self.integral = max(self.integral, min(total, self.beta_max - self.beta_min - proportional))
        self.weight = min(max(proportional + self.integral + self.beta_min, self.beta_min), self.beta_max)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise if the trainer has a second annealer, or the model has no KL."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not cast(VRNNLightningModule, pl_module).vrnn.has_latent:
            raise UserError("ControlVAE: a model of latent_size 0 has no KL. Fix: leave the callback out")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._kls = trainer.global_step, []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: SequenceBatch, batch_idx: int
    ) -> None:
        """Update the weight once per optimiser step, with the mean over its accumulated batches."""
        kl = cast(VRNNLightningModule, pl_module).batch_kl
        if kl is not None:
            self._kls.append(kl)
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            if self._kls:
                self.observe(sum(kl.item() for kl in self._kls) / len(self._kls))
            self._kls = []

    def state_dict(self) -> dict[str, float]:
        """Return the sum of the errors, times ki, and the weight."""
        return {"integral": self.integral, "weight": self.weight}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        require_types(state_dict, self, integral=(int, float), weight=(int, float))
        self.integral, self.weight = state_dict["integral"], state_dict["weight"]
