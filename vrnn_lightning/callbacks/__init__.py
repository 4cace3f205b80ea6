"""Callbacks: KL annealing, diagnostics, evaluation, pictures and predictions; they work with every logger."""

from vrnn_lightning.callbacks.annealing import (
    ConstantKLWeight,
    ControlVAE,
    CosineKLAnnealing,
    CyclicalKLAnnealing,
    KLAnnealing,
    LinearKLAnnealing,
    SigmoidKLAnnealing,
)
from vrnn_lightning.callbacks.diagnostics import Diagnostics, GradientNorms
from vrnn_lightning.callbacks.evaluation import Evaluation
from vrnn_lightning.callbacks.loop import Loop
from vrnn_lightning.callbacks.predictions import Predictions
from vrnn_lightning.callbacks.samples import Samples

__all__ = [
    "ConstantKLWeight", "ControlVAE", "CosineKLAnnealing", "CyclicalKLAnnealing", "Diagnostics", "Evaluation",
    "GradientNorms", "KLAnnealing", "LinearKLAnnealing", "Loop", "Predictions", "Samples", "SigmoidKLAnnealing",
]  # fmt: skip
