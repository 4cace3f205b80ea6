"""Callbacks: KL annealing, pictures and encodings of what the model learned; they work with every logger."""

from vrnn_lightning.callbacks.annealing import (
    ConstantKLWeight,
    CosineKLAnnealing,
    CyclicalKLAnnealing,
    KLAnnealing,
    LinearKLAnnealing,
    SigmoidKLAnnealing,
)
from vrnn_lightning.callbacks.encodings import Encodings
from vrnn_lightning.callbacks.evaluation import Evaluation
from vrnn_lightning.callbacks.samples import Samples

__all__ = [
    "ConstantKLWeight",
    "CosineKLAnnealing",
    "CyclicalKLAnnealing",
    "Encodings",
    "Evaluation",
    "KLAnnealing",
    "LinearKLAnnealing",
    "Samples",
    "SigmoidKLAnnealing",
]
