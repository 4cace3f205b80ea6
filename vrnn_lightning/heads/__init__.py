"""Heads: modules whose forward maps features to a torch Distribution over a frame."""

from vrnn_lightning.heads.autoregressive import AutoregressiveBernoulli
from vrnn_lightning.heads.base import Factorised, Head, Mixture, Network, log_prob, tempered
from vrnn_lightning.heads.categorical import Categorical
from vrnn_lightning.heads.continuous import Gaussian, GaussianMixture, Laplace, StudentT
from vrnn_lightning.heads.counts import NegativeBinomial, Poisson
from vrnn_lightning.heads.discrete import Bernoulli, DiscretisedLogisticMixture, MuLaw
from vrnn_lightning.heads.flow import Flow
from vrnn_lightning.heads.flow_latent import FlowLatent, FlowPriorLatent
from vrnn_lightning.heads.joint import Group, Joint
from vrnn_lightning.heads.latent import (
    CategoricalLatent,
    GaussianLatent,
    LaplaceLatent,
    Latent,
    StandardPrior,
    gaussian,
)
from vrnn_lightning.heads.multivariate import MultivariateGaussian
from vrnn_lightning.heads.pen import Pen

__all__ = [
    "AutoregressiveBernoulli", "Bernoulli", "Categorical", "CategoricalLatent", "DiscretisedLogisticMixture",
    "Factorised", "Flow", "FlowLatent", "FlowPriorLatent", "Gaussian", "GaussianLatent", "GaussianMixture", "Group",
    "Head", "Joint", "Laplace", "LaplaceLatent", "Latent", "Mixture", "MuLaw", "MultivariateGaussian",
    "NegativeBinomial", "Network", "Pen", "Poisson", "StandardPrior", "StudentT", "gaussian", "log_prob",
    "tempered",
]  # fmt: skip
