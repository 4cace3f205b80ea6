"""The head for real numbers of any joint shape: a normalising flow."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from vrnn_lightning.errors import UserError, require
from vrnn_lightning.heads.base import FrameDistribution, Head, SampleShape, at_least_float32
from vrnn_lightning.nn import MLPConfig
from vrnn_lightning.noise import uniform_of

__all__ = ["Flow", "FlowDistribution"]

MEAN_DRAWS = 256


class Flow(Head):
    r"""A normalising flow of the frame given the features, by zuko (``pip install 'vrnn-lightning[flows]'``).

    .. math:: \log p(x) = \log \mathcal N(g_f(x); 0, I) + \log \left|\det \partial g_f(x) / \partial x\right|

    The variance of the base is the temperature. A draw takes as many passes of each network as there are features, or
    two with ``coupling``. A frame is observed or missing as a whole. The mean is estimated with 256 draws, the same in
    every call.

    Args:
        kind: "NSF" for rational-quadratic splines (Durkan et al. 2019, arXiv 1906.04032), the identity beyond 5
            standard deviations, or "MAF" for affine maps (Papamakarios et al. 2017, arXiv 1705.07057).
        transforms: Number of transformations; the order of the features is reversed in every other one.
        network: Size of the network of each transformation.
        coupling: Transform half of the features given the other half, in place of each given those before it.

    Raises:
        UserError: An option is outside its range, or zuko is not installed.
    """

    def __init__(
        self,
        in_features: int,
        num_features: int,
        kind: Literal["NSF", "MAF"] = "NSF",
        transforms: int = 3,
        network: MLPConfig = MLPConfig(depth=2),
        coupling: bool = False,
    ) -> None:
        super().__init__(in_features, num_features)
        require("transforms", transforms, 1)
        if kind not in ("NSF", "MAF"):
            raise UserError(f"kind {kind!r}: choose 'NSF' or 'MAF'")
        hidden, passes = network.widths, {"passes": 2} if coupling and num_features > 1 else {}
        make = getattr(_import_flows(), kind)
        self.flow = make(num_features, in_features, transforms=transforms, hidden_features=hidden, **passes)

    def forward(self, features: Tensor) -> FlowDistribution:
        wide = at_least_float32(features).clamp(-100, 100)  # far beyond, the transformations overflow
        return FlowDistribution(self.flow, wide, self.num_features)


def _import_flows() -> Any:
    """Import zuko without its side effect, which is to turn off the validation of all distributions."""
    validates = Distribution._validate_args  # type: ignore[attr-defined]
    try:
        import zuko.flows
    except ModuleNotFoundError as error:
        raise UserError("Flow: zuko is not installed. Fix: pip install 'vrnn-lightning[flows]'") from error
    Distribution.set_default_validate_args(validates)
    return zuko.flows


class FlowDistribution(FrameDistribution):
    """What a flow of zuko, ``source``, makes of a Gaussian whose variance is the temperature, given features."""

    def __init__(self, source: Any, context: Tensor, num_features: int, temperature: float = 1.0) -> None:
        super().__init__((*context.shape[:-1], num_features))
        self.source, self.context, self.temperature = source, context, temperature
        self.transform = source.transform(context)
        loc = context.new_zeros(()).expand(*context.shape[:-1], num_features)
        self.base = Normal(loc, math.sqrt(temperature), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self._draws().mean(0)

    @property
    def variance(self) -> Tensor:
        return self._draws().var(0, unbiased=False)

    @torch.no_grad()
    def _draws(self) -> Tensor:
        """Return draws, the same in every call, whose base values come in pairs of opposite sign."""
        loc = self.base.loc
        uniform = uniform_of(torch.arange(MEAN_DRAWS // 2, device=loc.device), loc.shape[-1], loc.dtype)
        normal = torch.special.ndtri(uniform.clamp(min=1e-7)) * math.sqrt(self.temperature)
        pairs = torch.cat([normal, -normal]).view(MEAN_DRAWS, *[1] * len(self.batch_shape), -1)
        return self.of_noise(pairs.expand(-1, *loc.shape))

    def log_prob(self, value: Tensor) -> Tensor:
        with torch.autocast(value.device.type, enabled=False):  # zuko's networks keep the parameters' precision
            z, log_det = self.transform.call_and_ladj(value.to(self.base.loc.dtype))
        nats: Tensor = self.base.log_prob(z).sum(-1) + log_det
        return nats

    def marginal_log_prob(self, value: Tensor, observed: Tensor) -> Tensor:
        """Return the log-likelihood of observed frames, and 0 for missing ones."""
        is_whole = observed.all(-1)
        if (observed.any(-1) & ~is_whole).any():
            fix = "let whole frames be missing, or choose MultivariateGaussian"
            raise UserError(f"Flow: can't score a part of a frame. Fix: {fix}")
        return torch.where(is_whole, self.log_prob(value.masked_fill(~observed, 0.0)), 0.0)

    @torch.no_grad()
    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        return self.of_noise(self.base.sample(torch.Size(sample_shape)))

    def of_noise(self, noise: Tensor) -> Tensor:
        """Return the draw that the base's values, shape (..., features), decide."""
        with torch.autocast(noise.device.type, enabled=False):
            frames: Tensor = self.transform.inv(noise.to(self.context))
        return frames

    def tempered(self, temperature: float) -> FlowDistribution:
        return FlowDistribution(self.source, self.context, self.event_shape[0], self.temperature * temperature)
