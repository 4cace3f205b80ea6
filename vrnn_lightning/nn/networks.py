"""The networks that a VRNN is made of: multilayer perceptrons, and what is known of any other network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vrnn_lightning.errors import UserError, require, suggestion
from vrnn_lightning.noise import hash_rows, uniform_of

__all__ = [
    "ACTIVATIONS", "MLP", "Conv", "HashedDropout", "MLPConfig", "MaskedLinear", "NetworkFactory", "Residual",
    "evaluating", "feature_width", "require_output",
]  # fmt: skip

NetworkFactory = Callable[[int], nn.Module]
"""Called with the width of the input; returns a network of features (..., in_features) to (..., width)."""
ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid,
        nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink,
    )
}  # fmt: skip
"""Functions of one number."""
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


@dataclass(frozen=True)
class MLPConfig:
    """A multilayer perceptron. Call it with the width of the input to make one.

    Args:
        width: Units per layer: a number, or a list with one for each layer, whose length is then the depth.
        depth: Number of layers, each a linear map, a norm and an activation; 0 for the input itself.
        activation: A class of ``torch.nn`` that maps each number alone, such as ReLU, Tanh, ELU, SiLU or GELU.
        norm: "layer" (Ba et al. 2016) or "rms" (Zhang & Sennrich 2019) before each activation.
        residual: Add the input of each layer to its output, where both have the same width.
        dropout: Probability of dropping a unit after each activation in training, at every step on its own.

    Raises:
        UserError: An option is outside its range.

    >>> MLPConfig([8, 8], activation="Tanh", norm="layer", residual=True)(3)(torch.zeros(2, 3)).shape
    torch.Size([2, 8])
    """

    width: int | list[int] = 64
    depth: int = 1
    activation: str = "ReLU"
    norm: Literal["layer", "rms"] | None = None
    residual: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise if an option is outside its range."""
        require("network.depth", self.depth, 0)
        require("network.dropout", self.dropout, 0, below=1)
        for width in self.width if isinstance(self.width, list) else [self.width]:
            require("network.width", width, 1)
        if self.activation not in ACTIVATIONS:
            near = suggestion(self.activation, ACTIVATIONS)
            raise UserError(f"activation {self.activation!r}: must be one of {', '.join(ACTIVATIONS)}.{near}")
        if self.norm is not None and self.norm not in NORMS:
            raise UserError(f"norm {self.norm!r}: must be 'layer', 'rms' or null")

    @property
    def widths(self) -> list[int]:
        """Width of each layer."""
        return self.width if isinstance(self.width, list) else [self.width] * self.depth

    def __call__(self, in_features: int) -> MLP:
        """Return the network for inputs of a width."""
        return MLP(in_features, self)


class HashedDropout(nn.Module):
    """Dropout of units, shape (..., width), that the features themselves decide.

    A pass that is computed again, a resumed run and a network that is called twice drop the same units.

    Args:
        p: Probability of dropping a unit.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, in training without the dropped ones and the others divided by 1 - p."""
        return x * self.factors(x, x.shape[-1]) if self.training else x

    def factors(self, features: Tensor, width: int) -> Tensor:
        """Return 0 or 1 / (1 - p) for some units, shape (..., width), that features decide, shape (..., any)."""
        kept: Tensor = uniform_of(hash_rows(features), width, torch.float32) >= self.p
        return kept / (1 - self.p)


class Residual(nn.Sequential):
    """Layers whose input is added to their output, of the same width."""

    def forward(self, x: Tensor) -> Tensor:
        """Map features of shape (..., width) to the same shape."""
        changed: Tensor = super().forward(x)
        return x + changed


class MLP(nn.Sequential):
    """A multilayer perceptron: features (..., in_features) to (..., out_features).

    Args:
        in_features: Width of the input.
        layers: Its layers.
    """

    def __init__(self, in_features: int, layers: MLPConfig) -> None:
        widths, steps = [in_features, *layers.widths], list[nn.Module]()
        for i, (before, after) in enumerate(pairwise(widths)):
            norm = [] if layers.norm is None else [NORMS[layers.norm](after)]
            dropout = [HashedDropout(layers.dropout)] if layers.dropout else []
            layer = [nn.Linear(before, after), *norm, ACTIVATIONS[layers.activation](), *dropout]
            steps += [Residual(*layer)] if layers.residual and i and before == after else layer
        super().__init__(*steps)
        self.out_features = widths[-1]


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


_widths: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@torch.no_grad()
def feature_width(network: nn.Module, in_features: int, part: str, like: Tensor | None = None) -> int:
    """Return the width of a network's output; any but an :class:`MLP` is called once, in evaluation.

    Raises:
        UserError: It returns no features.
    """
    if type(network) is MLP:
        return network.out_features
    if network not in _widths:
        zeros = torch.zeros(2, in_features) if like is None else like.new_zeros(2, in_features)
        with evaluating(network), torch.random.fork_rng([zeros.device] if zeros.is_cuda else []):
            features = network(zeros)
        width = features.shape[-1] if isinstance(features, Tensor) and features.ndim else 0
        require_output(part, features, 2, width)
        _widths[network] = width
    return _widths[network]


def require_output(part: str, output: object, *shape: int) -> None:
    """Raise if what a part returned has another shape or type than floating-point numbers."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        got: object = output.dtype if isinstance(output, Tensor) else type(output).__name__
    elif output.shape != shape:
        got = f"shape {tuple(output.shape)}"
    else:
        return
    raise UserError(f"{part}: returned {got}, expected floating-point numbers of shape {shape}")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set a module and what it contains to evaluation for a while."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, is_training in modes:
            part.training = is_training


class Conv(nn.Module):
    """Convolutions over frames that are images or windows; features (..., in_features) to (..., out_features).

    Args:
        in_features: Numbers of a frame, the product of ``shape``.
        shape: Of a frame: [channels, length], or [channels, height, width].
        channels: Channels of each layer.
        kernel: Width of the kernels, odd.
        stride: Stride of each layer.
        activation: A class of ``torch.nn`` that maps each number alone, such as ReLU.

    Raises:
        UserError: An option is outside its range, or the shape does not hold the frame.

    >>> Conv(256, [1, 16, 16])(torch.zeros(5, 3, 256)).shape
    torch.Size([5, 3, 512])
    """

    def __init__(
        self,
        in_features: int,
        shape: list[int],
        channels: list[int] = [16, 32],  # noqa: B006  # it is read only
        kernel: int = 3,
        stride: int = 2,
        activation: str = "ReLU",
    ) -> None:
        super().__init__()
        if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) != in_features:
            sizes = "[channels, length] or [channels, height, width]"
            raise UserError(f"shape {shape}: must be {sizes} of {in_features} numbers, the width of what is read")
        if kernel % 2 == 0 or not channels or min(kernel, stride, *channels) < 1:
            raise UserError(f"channels {channels}, kernel {kernel}, stride {stride}: must be positive, the kernel odd")
        MLPConfig(activation=activation)  # checks its name
        kind = nn.Conv1d if len(shape) == 2 else nn.Conv2d
        layers: list[nn.Module] = []
        for before, after in pairwise([shape[0], *channels]):
            layers += [kind(before, after, kernel, stride, kernel // 2), ACTIVATIONS[activation]()]
        self.shape, self.layers = list(shape), nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map frames of shape (..., in_features) to features (..., out_features)."""
        features: Tensor = self.layers(x.reshape(-1, *self.shape)).flatten(1)
        return features.reshape(*x.shape[:-1], features.shape[-1])
