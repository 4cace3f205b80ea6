"""Builds a VRNN from sizes. The order of its parts decides the weights that a seed gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from vrnn_lightning.errors import UserError, require
from vrnn_lightning.heads import Gaussian, GaussianLatent, Head, Latent, Network, StandardPrior
from vrnn_lightning.nn import LayerNormGRUCell, LayerNormLSTMCell, MLPConfig, NetworkFactory, feature_width
from vrnn_lightning.vrnn.initial import InferredState, InitialState
from vrnn_lightning.vrnn.model import VRNN

__all__ = ["CELLS", "build_vrnn"]

Cell = Literal["gru", "lstm", "layer_norm_gru", "layer_norm_lstm", "tanh"]
CELLS: dict[Cell, Callable[[int, int], nn.Module]] = {
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
    "layer_norm_gru": LayerNormGRUCell,
    "layer_norm_lstm": LayerNormLSTMCell,
    "tanh": nn.RNNCell,
}


def build_vrnn(
    num_features: int,
    latent_size: int = 16,
    hidden_size: int = 64,
    layers: int = 1,
    cell: Cell | Callable[[int, int], nn.Module] = "gru",
    emission: Callable[[int, int], Head] = Gaussian,
    latent: Callable[[int], Latent] = GaussianLatent,
    phi_x: MLPConfig | NetworkFactory = MLPConfig(),
    phi_z: MLPConfig | NetworkFactory = MLPConfig(),
    prior: MLPConfig | NetworkFactory | None = MLPConfig(),
    encoder: MLPConfig | NetworkFactory = MLPConfig(),
    decoder: MLPConfig | NetworkFactory = MLPConfig(),
    residual_posterior: bool = False,
    smoothing: bool = False,
    dropout: float = 0.0,
    num_inputs: int = 0,
    missing: bool = False,
    initial_state: Literal["zero", "learned", "inputs", "inferred"] = "zero",
) -> VRNN:
    """Return a VRNN made of parts that fit each other.

    Args:
        num_features: Width of a frame, D; a size that is too small is a UserError.
        latent_size: Dimensions of z_t; 0 for a plain recurrent network, which ignores the options of the latent.
        hidden_size: Units of the recurrence.
        layers: Layers of the recurrence; the networks read the top one.
        cell: "gru", "lstm", both with layer normalisation (Ba et al. 2016), "tanh", or a factory that is called with
            (input_size, hidden_size) for each layer, see :class:`Equations`; the networks read the output, not the
            cell state.
        emission: Called with (in_features, num_features), returns the head of p(x_t | ...).
        latent: Called with latent_size, returns the kind of latent, such as ``CategoricalLatent``.
        phi_x: Feature extractor of x_t: a factory, called with the width of what it reads, such as ``MLPConfig``.
        phi_z: Feature extractor of z_t.
        prior: Network of the prior; ``None`` for N(0, I) at every step.
        encoder: Network of the posterior.
        decoder: Network before the emission.
        residual_posterior: The encoder's mean is added to the prior's (Res_q in Fraccaro et al. 2016).
        smoothing: The encoder also reads future frames of the sequence or window (Fraccaro et al. 2016), through a
            backward recurrence: an LSTM with cell "lstm", otherwise a GRU.
        dropout: Probability of dropping a unit, the same ones at every step (Gal & Ghahramani 2016, arXiv 1512.05287).
        num_inputs: Covariates per step; every network and the recurrence read them.
        missing: phi_x also reads which values were measured.
        initial_state: State before the first step: "zero" (of a cell with ``initial_state``, what it returns),
            "learned", the same parameters for all sequences, "inputs", those plus a network of the covariates of the
            first step, for what is known of a sequence as a whole, or "inferred", those plus a linear map of a Gaussian
            latent that a recurrence infers from the whole sequence, whose KL is part of the bound (LFADS, Pandarinath
            et al. 2018).

    >>> build_vrnn(num_features=3, latent_size=2).generate(steps=5, batch_size=4).x.shape
    torch.Size([4, 5, 3])
    """
    _require_at_least(1, num_features=num_features, hidden_size=hidden_size, layers=layers)
    _require_at_least(0, latent_size=latent_size, num_inputs=num_inputs)
    require("dropout", dropout, 0, below=1)
    rnn = nn.LSTM if cell == "lstm" else nn.GRU
    x_in, h_width, z_width = num_features * (2 if missing else 1), hidden_size + num_inputs, 0
    x_network, future_width = phi_x(x_in), hidden_size if smoothing else 0
    x_width = feature_width(x_network, x_in, "phi_x") + num_inputs
    z_network = backward_rnn = encoder_network = z_kind = None
    prior_network: nn.Module | None = None
    if latent_size:
        z_network = phi_z(latent_size)
        z_width = feature_width(z_network, latent_size, "phi_z")
        z_kind = latent(latent_size)
        if residual_posterior and not z_kind.can_be_residual:
            raise UserError(f"residual_posterior: a {type(z_kind).__name__} has no mean to add. Fix: set it to false")
        prior_network = StandardPrior(z_kind)
        if prior is not None:
            prior_network = Network(h_width, prior, z_kind.prior_head, latent_size, part="prior")
        backward_rnn = rnn(x_width, hidden_size) if smoothing else None
        read = x_width + future_width + hidden_size
        encoder_network = Network(read, encoder, z_kind.head, latent_size, part="encoder")
    decoder_network = Network(z_width + h_width, decoder, emission, num_features, part="decoder")
    cells = _make_cells(cell, x_width + z_width, hidden_size, layers)
    parts = (x_network, z_network, prior_network, encoder_network, decoder_network, cells, backward_rnn)
    options: dict[str, Any] = {"dropout": dropout, "num_inputs": num_inputs, "missing": missing, "latent": z_kind}
    model = VRNN(*parts, residual_posterior=residual_posterior, **options)
    model.initial = _make_initial(initial_state, model, x_width)
    return model


def _make_cells(
    cell: Cell | Callable[[int, int], nn.Module], in_features: int, hidden_size: int, layers: int
) -> nn.ModuleList:
    kind = cell if callable(cell) else CELLS.get(cell)
    if kind is None:
        raise UserError(f"cell {cell!r}: must be one of {', '.join(CELLS)}, or a factory of cells")
    cells = [kind(hidden_size if i else in_features, hidden_size) for i in range(layers)]
    for made in cells:
        if not hasattr(made, "hidden_size"):
            vars(made)["hidden_size"] = hidden_size
    return nn.ModuleList(cells)


def _make_initial(initial_state: str, model: VRNN, x_width: int) -> InitialState | None:
    if initial_state == "zero":
        return None
    if initial_state == "inferred":
        return InferredState(model.zero_state(1), x_width)
    if initial_state not in ("learned", "inputs"):
        raise UserError(f"initial_state {initial_state!r}: must be 'zero', 'learned', 'inputs' or 'inferred'")
    if initial_state == "inputs" and not model.num_inputs:
        raise UserError("initial_state 'inputs': the data have no covariates (num_inputs). Fix: choose 'learned'")
    return InitialState(model.zero_state(1), model.num_inputs if initial_state == "inputs" else 0)


def _require_at_least(least: int, **sizes: int) -> None:
    for option, size in sizes.items():
        require(option, size, least)
