"""What is done before a pass: weights are read once, and a changed model's fast step is compared with its methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.errors import UserError
from vrnn_lightning.nn import evaluating
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import Parts, compute_weights, infer, output, structure_of
from vrnn_lightning.vrnn.equations import Equations

__all__ = ["prepared", "random_state", "weights_read", "with_weights"]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
ROWS, STEPS = 2, 3  # of the batch that a model is checked on


def prepared(method: FunctionT) -> FunctionT:
    """Prepare the model for a method: read each parametrised weight once, and check a model whose modules changed."""

    @wraps(method)
    def call(self: Equations, *args: Any, **kwargs: Any) -> Any:
        with parametrize.cached():
            _prepare(self)
            return method(self, *args, **kwargs)

    return cast(FunctionT, call)


def weights_read() -> dict[Any, Any]:
    """Return the parametrised weights that the current pass has read."""
    return dict(parametrize._cache)


@contextmanager
def with_weights(weights: dict[Any, Any]) -> Iterator[None]:
    """Use the parametrised weights of an earlier pass, for what is computed again on the way back."""
    with parametrize.cached():
        parametrize._cache.update(weights)
        yield


def random_state(device: torch.device) -> Tensor:
    """Return the state of torch's generator of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it looks at modules, not at tensors
def _prepare(model: Equations) -> None:
    structure = structure_of(model)
    is_changed = model.checked is None or model.checked[0] != structure
    if is_changed:
        model.checked = None
    prior = model.prior if model.residual_posterior and model.training else None
    for module in prior.modules() if isinstance(prior, nn.Module) else ():
        if isinstance(module, nn.Dropout) and module.p:
            what = "drops other units for the mean of a residual posterior than for the KL"
            _refuse(model, module, what, "use MLPConfig's dropout, which its features decide")
    for module in model.modules():
        if module._forward_pre_hooks:
            compute_weights(module)
            if module.training and any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
                fix = "use torch.nn.utils.parametrizations.spectral_norm"
                _refuse(model, module, "torch.nn.utils.spectral_norm changes the weight at every call", fix)
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            _refuse(model, module, "statistics of a batch mix sequences and padding", "use LayerNorm")
        if "parametrizations" in module._modules:
            for name in cast("nn.ModuleDict", module.parametrizations):
                getattr(module, name)
    if is_changed:
        _check_step(model)
        model.checked = structure, Parts.of(model)
        model.apply(compute_weights)  # the check left weights without a gradient


def _refuse(model: nn.Module, module: nn.Module, what: str, fix: str) -> None:
    name = next(name for name, other in model.named_modules() if other is module)
    raise UserError(f"{name}: {what}. Fix: {fix}")


@torch.no_grad()
def _check_step(model: Equations) -> None:
    """Raise if a step of the fast loop differs from the model's four methods, or is not finite; name the part.

    Random numbers, buffers and the mode of modules are left as they were.
    """
    like = model.input_mean
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [like.device] if like.is_cuda else []
    try:
        with evaluating(model), torch.random.fork_rng(devices), torch.autocast(like.device.type, enabled=False):
            before, pairs = random_state(like.device), _both_ways(model)
            is_random = not torch.equal(before, random_state(like.device))
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
    tolerance = 1e-9 if like.dtype == torch.float64 else 1e-3
    for part, fast, expected in pairs:
        if not expected.isfinite().all():
            raise UserError(f"{part}: returned NaN or infinity for standard normal data. Fix: check its weights")
        if not is_random and not torch.allclose(fast.to(expected), expected, rtol=tolerance, atol=tolerance):
            raise UserError(
                f"{part}: the time loop computes other values than the model's method of it does. Fix: make the part "
                "a function of its inputs and its own parameters"
            )


def _both_ways(model: Equations) -> list[tuple[str, Tensor, Tensor]]:
    """Take the steps of a small random batch; return each part's values by the loop and by the model's methods."""
    like, generator = model.input_mean, torch.Generator(model.input_mean.device).manual_seed(0)
    widths = model.num_features, model.num_inputs, model.latent.noise_size
    x, inputs, noise = (like.new_empty(ROWS, STEPS, n).normal_(generator=generator) for n in widths)
    lengths = torch.full((ROWS,), STEPS, device=like.device)
    batch = SequenceBatch(x, lengths, None, inputs if model.num_inputs else None)
    future = model.backward_states(batch, None)
    data = model.network_inputs(batch, None, future)
    state = model.initial_state_of(batch, noise=Noise(batch, list(range(ROWS)))).state
    noise = noise.transpose(0, 1).contiguous()
    steps, last = infer(model, data, noise, state, lengths, resample=lambda t, step: None)
    pairs: list[tuple[str, Tensor, Tensor]] = []
    for t in range(STEPS):
        now, later = (None if part is None else part[t] for part in (data.inputs, future))
        h, x_features, z_features = output(state), data.x_features[t], None
        pairs.append(("cells", steps.h[t], h))
        if steps.posterior is not None and steps.z is not None and steps.z_features is not None:
            posterior = model.posterior_dist(x_features, h, None, now, later)
            same = model.latent.dist(*(part[t].to(like) for part in steps.posterior))  # a rounding may change a class
            z = model.latent.rsample(same, noise[t])
            z_features = model.extract_z(z)
            own = model.latent.posterior_parameters(posterior)
            pairs += [("encoder", fast[t], value) for fast, value in zip(steps.posterior, own, strict=True)]
            pairs += [("encoder", steps.z[t], z), ("phi_z", steps.z_features[t], z_features)]
        if steps.prior is not None:
            own = model.latent.parameters(model.prior_dist(h, now))
            pairs += [("prior", fast[t], value) for fast, value in zip(steps.prior, own, strict=True)]
        if steps.emission is not None:
            pairs.append(("decoder", steps.emission[t], model.emission_features(z_features, h, now)))
        _, state = model.next_state(x_features, z_features, state, now)
    return pairs + [("cells", fast, value) for fast, value in zip(last.layers(), state.layers(), strict=True)]
