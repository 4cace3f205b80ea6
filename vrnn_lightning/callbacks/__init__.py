"""Callbacks: KL annealing and pictures of what the model learned; they work with every logger."""

from vrnn_lightning.callbacks.annealing import (
    ConstantKLWeight,
    CosineKLAnnealing,
    CyclicalKLAnnealing,
    KLAnnealing,
    LinearKLAnnealing,
    SigmoidKLAnnealing,
)
from vrnn_lightning.callbacks.samples import Samples

__all__ = [
    "ConstantKLWeight",
    "CosineKLAnnealing",
    "CyclicalKLAnnealing",
    "KLAnnealing",
    "LinearKLAnnealing",
    "Samples",
    "SigmoidKLAnnealing",
]
