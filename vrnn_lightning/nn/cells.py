"""Recurrent cells with layer normalisation, beside those of ``torch.nn``, and checks of any cell."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map

from vrnn_lightning.errors import UserError, require

__all__ = ["LayerNormGRUCell", "LayerNormLSTMCell", "cell_outputs", "cell_state"]


class _LayerNormCell(nn.Module):
    """Weights, gains and biases of a cell whose two products are normalised, each over all of its gates."""

    gates: ClassVar[int]
    weight_ih: Tensor
    weight_hh: Tensor
    gain_ih: Tensor
    gain_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor

    def __init__(self, input_size: int, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.eps = input_size, hidden_size, require("eps", eps, 1e-12, 1)
        size, bound = self.gates * hidden_size, hidden_size**-0.5
        for name, width in (("ih", input_size), ("hh", hidden_size)):
            setattr(self, f"weight_{name}", nn.Parameter(torch.empty(size, width).uniform_(-bound, bound)))
            setattr(self, f"gain_{name}", nn.Parameter(torch.ones(size)))
            setattr(self, f"bias_{name}", nn.Parameter(torch.zeros(size)))

    def normalized_products(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the input and the state before add to the gates, each of shape (batch, gates * hidden)."""
        size, wide = self.gain_ih.shape, self.gain_ih.dtype  # autocast narrows the products alone
        of_x, of_h = F.linear(x, self.weight_ih).to(wide), F.linear(h, self.weight_hh).to(wide)
        return (
            F.layer_norm(of_x, size, self.gain_ih, self.bias_ih, self.eps),
            F.layer_norm(of_h, size, self.gain_hh, self.bias_hh, self.eps),
        )


class LayerNormGRUCell(_LayerNormCell):
    r"""A gated recurrent unit with layer normalisation (Ba et al. 2016, arXiv 1607.06450).

    .. math::
        r, u, n_x = \mathrm{LN}(W x_t), \; n_h = \mathrm{LN}(U h_{t-1}), \quad n = \tanh(n_x + \sigma(r) \odot n_h),
        \quad h_t = (1 - \sigma(u)) \odot n + \sigma(u) \odot h_{t-1}

    where r and u are sums of both products, as in ``torch.nn.GRUCell``. Each product is normalised once, over its three
    gates; the paper normalises n's part on its own.

    Args:
        input_size: Width of the input.
        hidden_size: Units.
        eps: Added to each variance.
    """

    gates = 3

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Return h_t, shape (batch, hidden)."""
        of_x, of_h = (products.chunk(3, -1) for products in self.normalized_products(x, h))
        reset, update = ((of_x[i] + of_h[i]).sigmoid() for i in (0, 1))
        return torch.lerp((of_x[2] + reset * of_h[2]).tanh().to(h), h, update.to(h))


class LayerNormLSTMCell(_LayerNormCell):
    r"""A long short-term memory with layer normalisation (Ba et al. 2016, arXiv 1607.06450, eq. 20 to 22).

    .. math::
        i, f, g, o = \mathrm{LN}(W x_t) + \mathrm{LN}(U h_{t-1}) + b, \quad
        c_t = \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh g, \quad h_t = \sigma(o) \odot \tanh \mathrm{LN}(c_t)

    Args:
        input_size: Width of the input.
        hidden_size: Units.
        eps: Added to each variance.
    """

    gates = 4
    has_cell_state = True

    def __init__(self, input_size: int, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(input_size, hidden_size, eps)
        self.gain_c, self.bias_c = nn.Parameter(torch.ones(hidden_size)), nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return h_t and c_t, each of shape (batch, hidden)."""
        h, c = state
        of_x, of_h = self.normalized_products(x, h)
        write, forget, new, output = (of_x + of_h).chunk(4, -1)
        c = forget.sigmoid() * c + write.sigmoid() * new.tanh()
        return output.sigmoid() * F.layer_norm(c, self.gain_c.shape, self.gain_c, self.bias_c, self.eps).tanh(), c


def cell_outputs(name: str, cell: nn.Module, found: object, like: object) -> list[Tensor]:
    """Return the tensors that a cell returned; raise if they have another structure or shape than its state."""
    (values, spec), (expected, own) = tree_flatten(found), tree_flatten(like)
    kind = type(cell).__name__
    for x in values:
        if isinstance(x, Tensor) and not x.is_floating_point():
            raise UserError(f"{name}: {kind} returned {x.dtype}, expected floating-point numbers")
    if spec != own or any(getattr(x, "shape", None) != y.shape for x, y in zip(values, expected, strict=True)):
        got, needed = (tree_map(lambda x: tuple(getattr(x, "shape", (type(x),))), tree) for tree in (found, like))
        raise UserError(
            f"{name}: {kind} returned {got}, expected {needed}. Fix: return the "
            "output, beside a state of the shapes of initial_state or, with has_cell_state, the cell state"
        )
    return values


def cell_state(name: str, cell: Any, batch_size: int) -> list[Tensor]:
    """Return the tensors of the state that a cell starts from; raise if they are not one row for each sequence."""
    leaves: list[Any] = tree_flatten(cell.initial_state(batch_size))[0]
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.ndim < 2 or len(leaf) != batch_size:
            got = f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
            name = f"{name}: {type(cell).__name__}.initial_state({batch_size})"
            raise UserError(f"{name} returned {got}, expected tensors of shape ({batch_size}, ...)")
    return leaves
