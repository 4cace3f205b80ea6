"""Heads: modules whose forward maps features to a torch Distribution over a frame."""

from vrnn_lightning.heads.base import Factorised, Head, Mixture, Network, log_prob, tempered
from vrnn_lightning.heads.continuous import Gaussian, GaussianMixture, Laplace, StudentT
from vrnn_lightning.heads.counts import NegativeBinomial, Poisson
from vrnn_lightning.heads.discrete import Bernoulli, DiscretisedLogisticMixture, MuLaw
from vrnn_lightning.heads.latent import GaussianLatent, Latent, gaussian
from vrnn_lightning.heads.pen import Pen

__all__ = [
    "Bernoulli",
    "DiscretisedLogisticMixture",
    "Factorised",
    "Gaussian",
    "GaussianLatent",
    "GaussianMixture",
    "Head",
    "Laplace",
    "Latent",
    "Mixture",
    "MuLaw",
    "NegativeBinomial",
    "Network",
    "Pen",
    "Poisson",
    "StudentT",
    "gaussian",
    "log_prob",
    "tempered",
]
