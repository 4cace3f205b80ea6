"""Latents whose prior, or posterior too, is a normalising flow."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import Tensor
from torch.distributions import Distribution

from vrnn_lightning.heads.flow import Flow, FlowDistribution
from vrnn_lightning.heads.latent import GaussianLatent

__all__ = ["FlowLatent", "FlowPriorLatent"]


class FlowPriorLatent(GaussianLatent):
    r"""A Gaussian posterior, and a prior that is a coupling flow given h_{t-1} (Rezende & Mohamed 2015).

    The KL has no closed form: it is estimated as log q(z) - log p(z) at the draw. Needs ``vrnn-lightning[flows]``.

    Args:
        size: Numbers of z_t.
        transforms: Number of coupling layers.
        kind: "MAF" for affine maps or "NSF" for splines, see :class:`~vrnn_lightning.heads.Flow`.
        min_std: Floor under the posterior's standard deviation; 0 for none.

    Raises:
        UserError: An option is outside its range, or zuko is not installed.
    """

    has_closed_kl = can_be_residual = False

    def __init__(
        self, size: int, transforms: int = 3, kind: Literal["NSF", "MAF"] = "NSF", min_std: float = 1e-4
    ) -> None:
        super().__init__(size, min_std)
        self.flow: dict[str, Any] = {"transforms": transforms, "kind": kind, "coupling": True}

    def prior_head(self, in_features: int, size: int) -> Any:
        return Flow(in_features, size, **self.flow)

    def draw(self, prior: Distribution, noise: Tensor) -> Tensor:
        return prior.of_noise(noise) if isinstance(prior, FlowDistribution) else super().draw(prior, noise)


class FlowLatent(FlowPriorLatent):
    r"""A posterior and a prior that are coupling flows, given the encoder's features and h_{t-1}.

    The KL has no closed form: it is estimated as log q(z) - log p(z) at the draw. Needs ``vrnn-lightning[flows]``.

    Args:
        size: Numbers of z_t.
        transforms: Number of coupling layers.
        kind: "MAF" for affine maps or "NSF" for splines, see :class:`~vrnn_lightning.heads.Flow`.

    Raises:
        UserError: An option is outside its range, or zuko is not installed.
    """

    family = "the distribution of its own Flow"

    def __init__(self, size: int, transforms: int = 3, kind: Literal["NSF", "MAF"] = "NSF") -> None:
        super().__init__(size, transforms, kind)

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.posterior.in_features,)

    def head(self, in_features: int, size: int) -> Any:
        self.posterior = Flow(in_features, size, **self.flow)
        return self.posterior

    def is_own(self, dist: Distribution) -> bool:
        return isinstance(dist, FlowDistribution) and dist.source is self.posterior.flow

    def parameters(self, dist: Distribution) -> tuple[Tensor, ...]:
        return (cast(FlowDistribution, dist).context,)

    def dist(self, *parameters: Tensor) -> Any:
        return self.posterior(*parameters)

    def rsample(self, posterior: Distribution, noise: Tensor) -> Tensor:
        return cast(FlowDistribution, posterior).of_noise(noise)
