"""The multilayer perceptron that a VRNN's networks are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from vrnn_lightning.compatibility import old_names
from vrnn_lightning.errors import require

__all__ = ["MLP", "MLPConfig", "MaskedLinear"]
__getattr__ = old_names(__name__, {"Layers": "MLPConfig"})


@dataclass(frozen=True)
class MLPConfig:
    """Size of a multilayer perceptron.

    Args:
        width: Units per layer.
        depth: Number of layers, each a linear map and a ReLU.
    """

    width: int = 64
    depth: int = 1

    def __post_init__(self) -> None:
        """Raise if a size is below 1."""
        for option in ("width", "depth"):
            require(option, getattr(self, option), 1)


class MLP(nn.Sequential):
    """``depth`` times a linear map and a ReLU: features (..., in_features) to (..., width).

    Args:
        in_features: Width of the input.
        layers: Width and depth.
    """

    def __init__(self, in_features: int, layers: MLPConfig) -> None:
        widths = [in_features] + [layers.width] * layers.depth
        steps: list[nn.Module] = []
        for i, o in pairwise(widths):
            steps += [nn.Linear(i, o), nn.ReLU()]
        super().__init__(*steps)
        self.out_features = layers.width

    def linears(self) -> Iterator[nn.Linear]:
        """Yield the linear maps in order; a ReLU follows each."""
        return (m for m in self if isinstance(m, nn.Linear))

    def forward(self, x: Tensor) -> Tensor:
        """Map features of shape (..., in_features) to (..., width)."""
        for module in self:
            x = module(x)
        return x


class MaskedLinear(nn.Linear):
    """A linear map some of whose outputs do not read some of its inputs.

    Args:
        reads: True where an output reads an input, shape (out_features, in_features).
        bias: Whether a bias is added.
    """

    reads: Tensor

    def __init__(self, reads: Tensor, *, bias: bool) -> None:
        super().__init__(reads.shape[1], reads.shape[0], bias=bias)
        self.register_buffer("reads", reads, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map features of shape (..., in_features) to (..., out_features)."""
        return F.linear(x, self.weight * self.reads, self.bias)
