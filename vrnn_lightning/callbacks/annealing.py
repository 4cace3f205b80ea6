"""Callbacks that set the weight of the KL, beta, at every optimiser step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer

from vrnn_lightning import schedules
from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule

__all__ = [
    "ConstantKLWeight",
    "CosineKLAnnealing",
    "CyclicalKLAnnealing",
    "KLAnnealing",
    "LinearKLAnnealing",
    "SigmoidKLAnnealing",
]


class KLAnnealing(Callback, ABC):
    """Sets ``module.beta`` before each training step to a function of the optimiser steps taken so far.

    Beta is in force in training alone: reported ELBOs and the choice of the best checkpoint never see it. As a function
    of the step count it needs no state of its own: a resumed run goes on with the weight the step asks for.
    """

    @abstractmethod
    def beta(self, step: int) -> float:
        """Return the weight after ``step`` optimiser steps."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second annealer: they would overwrite each other's weight.

        Raises:
            UserError: Two annealers are among the trainer's callbacks.
        """
        callbacks: list[Callback] = getattr(trainer, "callbacks", [])  # set by a connector, which types don't see
        annealers = [type(callback).__name__ for callback in callbacks if isinstance(callback, KLAnnealing)]
        if len(annealers) > 1:
            raise UserError(f"trainer.callbacks: {' and '.join(annealers)} would both set beta; keep one")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: SequenceBatch, batch_idx: int
    ) -> None:
        """Set the weight that the coming step uses."""
        cast(VRNNLightningModule, pl_module).beta = self.beta(trainer.global_step)


def _check(**options: float) -> None:
    for name, value in options.items():
        if value < 0:
            raise UserError(f"KL annealing: {name} {value} must not be negative")


class ConstantKLWeight(KLAnnealing):
    """A fixed weight, the beta of a beta-VAE (Higgins et al. 2017).

    Args:
        value: The weight.
    """

    def __init__(self, value: float = 1.0) -> None:
        _check(value=value)
        self.value = value

    def beta(self, step: int) -> float:
        """Return the weight after ``step`` optimiser steps."""
        return self.value


class _Ramp(KLAnnealing):
    """A weight that goes from ``start`` to ``end``.

    Args:
        steps: Optimiser steps until the weight is ``end``.
        start: Weight at the first step.
        end: Weight from ``steps`` on.
    """

    def __init__(self, steps: int, start: float = 0.0, end: float = 1.0) -> None:
        _check(steps=steps, start=start, end=end)
        self.steps, self.start, self.end = steps, start, end


class LinearKLAnnealing(_Ramp):
    """A straight line from ``start`` to ``end`` (Bowman et al. 2016).

    Args:
        steps: Optimiser steps until the weight is ``end``.
        start: Weight at the first step.
        end: Weight from ``steps`` on.
    """

    def beta(self, step: int) -> float:
        """Return the weight after ``step`` optimiser steps."""
        return schedules.linear(step, self.steps, self.start, self.end)


class CosineKLAnnealing(_Ramp):
    """Half a cosine wave from ``start`` to ``end``, flat at both ends.

    Args:
        steps: Optimiser steps until the weight is ``end``.
        start: Weight at the first step.
        end: Weight from ``steps`` on.
    """

    def beta(self, step: int) -> float:
        """Return the weight after ``step`` optimiser steps."""
        return schedules.cosine(step, self.steps, self.start, self.end)


class SigmoidKLAnnealing(_Ramp):
    """A logistic curve from ``start`` to ``end`` (Bowman et al. 2016).

    Args:
        steps: Optimiser steps until the weight is ``end``.
        start: Weight at the first step.
        end: Weight from ``steps`` on.
        steepness: Slope of the logistic curve; the larger, the more it resembles a switch at half of ``steps``.
    """

    def __init__(self, steps: int, start: float = 0.0, end: float = 1.0, steepness: float = 10.0) -> None:
        super().__init__(steps, start, end)
        if not steepness > 0:
            raise UserError(f"KL annealing: steepness {steepness} must be positive")
        self.steepness = steepness

    def beta(self, step: int) -> float:
        """Return the weight after ``step`` optimiser steps."""
        return schedules.sigmoid(step, self.steps, self.start, self.end, self.steepness)


class CyclicalKLAnnealing(_Ramp):
    """Several linear rises, each from ``start`` (Fu et al. 2019).

    Args:
        steps: Optimiser steps that all cycles take together; from then on the weight is ``end``.
        start: Weight at the start of each cycle.
        end: Weight at the end of each cycle.
        cycles: Number of cycles.
        ramp: Share of a cycle spent rising, in (0, 1]; the rest of it stays at ``end``.
    """

    def __init__(self, steps: int, start: float = 0.0, end: float = 1.0, cycles: int = 4, ramp: float = 0.5) -> None:
        super().__init__(steps, start, end)
        if cycles < 1:
            raise UserError(f"KL annealing: cycles {cycles} must be at least 1")
        if not 0 < ramp <= 1:
            raise UserError(f"KL annealing: ramp {ramp} must lie in (0, 1]")
        self.cycles, self.ramp = cycles, ramp

    def beta(self, step: int) -> float:
        """Return the weight after ``step`` optimiser steps."""
        return schedules.cyclical(step, self.steps, self.start, self.end, self.cycles, self.ramp)
