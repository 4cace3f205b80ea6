"""Which parts of a model the time loop compiles: the exact modules that it knows. It calls all others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch._C import _disabled_torch_function_impl
from torch.nn.modules import module as global_hooks
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from vrnn_lightning.errors import UserError
from vrnn_lightning.heads import Gaussian, GaussianLatent, Head, Network, tempered
from vrnn_lightning.nn import MLP, LayerNormGRUCell, LayerNormLSTMCell, Residual
from vrnn_lightning.nn.networks import ACTIVATIONS, HashedDropout
from vrnn_lightning.recurrence.state import Networks

__all__ = [
    "Parts", "compute_weights", "draw_frames", "is_plain", "known_layers", "require_plain_weights",
    "structure_of", "trained_tensors",
]  # fmt: skip

WEIGHT_HOOKS = (BasePruningMethod, WeightNorm)  # they do nothing but compute a weight
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = [f"_global{name}" for name in HOOKS]
PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer) if hasattr(nn, "Buffer") else (Tensor, nn.Parameter)


def is_plain(module: object, *classes: type[nn.Module]) -> bool:
    """Return whether a call of a module does what its class says: an exact class, no hooks, plain tensors.

    Of a parametrised module the class under the parametrisation counts. Hooks that only compute a weight are
    allowed, as the model calls them before each pass.
    """
    if not isinstance(module, nn.Module) or type_before_parametrizations(module) not in classes:
        return False
    attributes = vars(module)
    if "forward" in attributes or any(getattr(global_hooks, name) for name in GLOBAL_HOOKS):
        return False
    hooks = [hook for name in HOOKS for hook in attributes[name].values()]
    return all(isinstance(hook, WEIGHT_HOOKS) for hook in hooks) and all(
        tensor is None or type(tensor) in PLAIN_TENSORS for tensor in _tensors(module)
    )


def _tensors(module: nn.Module) -> Iterator[Tensor | None]:
    """Yield the tensors that a module without children reads."""
    yield from module._parameters.values()
    if is_parametrized(module):
        yield from (getattr(module, name) for name in cast("nn.ModuleDict", module.parametrizations))


def structure_of(model: nn.Module) -> list[Any]:
    """Return what decides which parts are known; it changes when a module or a hook is replaced."""
    structure: list[Any] = [len(getattr(global_hooks, name)) for name in GLOBAL_HOOKS]
    for module in model.modules():
        has = vars(module)
        structure += (id(module), type(module), "forward" in has, *map(type, has["_parameters"].values()))
        for name in HOOKS:
            if has[name]:
                structure += map(id, has[name].values())
    return structure


def require_plain_weights(model: nn.Module, task: str) -> None:
    """Raise if a weight changes what functions of torch do with it, which some of torch's own tools pass over."""
    for name, tensor in model.named_parameters():
        if type(tensor) not in PLAIN_TENSORS and type(tensor).__torch_function__ is not _disabled_torch_function_impl:
            kind = type(tensor).__name__
            raise UserError(f"{name}: {task} computes with a {kind} as with a plain tensor. Fix: make it a plain one")


def compute_weights(module: nn.Module) -> None:
    """Compute the weight of a pruned or weight-normed module, as a call of it would: the loop only reads it."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WEIGHT_HOOKS):
            hook(module, ())


def known_layers(network: object) -> list[nn.Module] | None:
    """Return the layers of a network that the loop compiles, a linear map first; ``None`` for any other network."""
    if not is_plain(network, MLP, nn.Sequential):
        return None
    layers: list[nn.Module] = list(cast("Any", network))
    return layers if layers and is_plain(layers[0], nn.Linear) and all(map(_is_known_layer, layers)) else None


def _is_known_layer(layer: Any) -> bool:
    if is_plain(layer, nn.LayerNorm):
        return len(layer.normalized_shape) == 1 and layer.weight is not None and layer.bias is not None
    if is_plain(layer, Residual):
        return len(layer) > 0 and is_plain(layer[0], nn.Linear) and all(map(_is_known_layer, layer))
    is_function = is_plain(layer, *ACTIVATIONS.values()) and not getattr(layer, "inplace", False)
    return is_function or is_plain(layer, nn.ReLU, nn.Linear, HashedDropout)


class Parts(NamedTuple):
    """What the loop compiles of a model: the layers of each network, ``None`` for a network that it calls.

    Args:
        phi_x: Layers of the feature extractor of x_t.
        phi_z: Layers of the feature extractor of z_t.
        prior: Layers before the prior's head.
        posterior: Layers before the encoder's head.
        emission: Layers before the emission's head.
        draws_gaussian: Whether z_t is drawn from the Gaussian that ``posterior`` returns.
        cells: Whether all cells are known.
        feature_widths: Widths of the features of x_t and of z_t.
    """

    phi_x: list[nn.Module] | None
    phi_z: list[nn.Module] | None
    prior: list[nn.Module] | None
    posterior: list[nn.Module] | None
    emission: list[nn.Module] | None
    draws_gaussian: bool
    cells: bool
    feature_widths: tuple[int, int]

    @classmethod
    def of(cls, model: Networks) -> Parts:
        """Look at a model as it is now."""
        own = model.runs_own_method
        is_gaussian = type(model.latent) is GaussianLatent
        prior = _gaussian_layers(model.prior) if is_gaussian and own("prior_dist") else None
        posterior = _gaussian_layers(model.encoder) if is_gaussian and own("posterior_dist") else None
        if posterior is not None and model.residual_posterior and prior is None:
            posterior = None
        return cls(
            known_layers(model.phi_x) if own("extract_x") and own("standardize_input") else None,
            known_layers(model.phi_z) if own("extract_z") else None,
            prior,
            posterior,
            known_layers(model.decoder.body) if own("emission_dist") and is_plain(model.decoder, Network) else None,
            posterior is not None,
            own("next_state") and all(_is_known_cell(cell) for cell in model.cells),
            model.feature_widths,
        )


def _gaussian_layers(network: object) -> list[nn.Module] | None:
    """Return the layers before the head of a network with a Gaussian head, if the loop compiles both."""
    if not is_plain(network, Network):
        return None
    head = network.head  # type: ignore[attr-defined]  # a Network
    is_known = is_plain(head, Gaussian) and head.covariance == "diagonal" and is_plain(head.linear, nn.Linear)
    return known_layers(network.body) if is_known else None  # type: ignore[attr-defined]  # a Network


def _is_known_cell(cell: Any) -> bool:
    if is_plain(cell, nn.GRUCell, nn.LSTMCell, nn.RNNCell):
        return bool(cell.bias)
    return is_plain(cell, LayerNormGRUCell, LayerNormLSTMCell)


def draw_frames(head: Any, features: Tensor, temperature: float = 1.0) -> Tensor:
    """Draw frames from the emission that a head, or a decoder, makes of features."""
    if isinstance(head, Head) and is_plain(head, type(head)):
        return head.draw(features, temperature)
    return tempered(head(features), temperature).sample()


def trained_tensors(*modules: nn.Module) -> list[Tensor]:
    """Return the tensors with a gradient that calls of modules read: parameters and parametrised weights."""
    found: dict[int, Tensor] = {}
    for part in (part for module in modules for part in module.modules()):
        found |= {id(x): x for x in _tensors(part) if x is not None and x.requires_grad}
    return list(found.values())
