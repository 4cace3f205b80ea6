"""The ways in which a user replaces, subclasses, hooks or reparametrises a part of a model.

Each changes the part's output, its input or a gradient, and counts its calls where it has any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn.utils import parametrizations, prune

from vrnn_lightning import VRNN
from vrnn_lightning.heads import Factorised
from vrnn_lightning.vrnn.equations import gaussian, join

__all__ = ["SHARED", "WAYS", "Site", "called"]

called: Counter[str] = Counter()  # how often what a user put in was called

SHARED = {
    "phi_x.0": "phi_z.0", "phi_z.0": "phi_x.0", "prior.head.linear": "encoder.head.linear",
    "encoder.body.0": "decoder.body.0", "decoder.head.linear": "prior.head.linear", "cells.0": "cells.1",
    "cells.1": "cells.0",
}  # fmt: skip


def changed(found: Any) -> Any:
    """Return another output than a part's own."""
    called["here"] += 1
    if isinstance(found, Distribution):
        return gaussian(0.5 * found.mean, 1.5 * found.stddev)
    return 0.5 * found if isinstance(found, Tensor) else tuple(changed(part) for part in found)


class Other(nn.Module):
    """A user's network of the part's signature and of nothing else that the part has."""

    def __init__(self, name: str, reads: tuple[Any, ...], found: Any) -> None:
        super().__init__()
        width = reads[0].shape[-1] + (reads[1][0].shape[-1] if len(reads) > 1 else 0)
        out = found if isinstance(found, Tensor) else found.mean if isinstance(found, Distribution) else found[0]
        self.kind = type(found) if isinstance(found, (Tensor, Distribution)) else tuple
        self.is_rnn, self.is_lstm = name == "backward_rnn", self.kind is tuple and len(found) == 2
        self.dist = Factorised if name.startswith("decoder") else partial(Independent, reinterpreted_batch_ndims=1)
        self.map = nn.Linear(width, out.shape[-1] * (2 if issubclass(self.kind, Distribution) else 1)).double()

    def forward(self, x: Tensor, before: Any = None) -> Any:
        called["here"] += 1
        h, *c = before if isinstance(before, tuple) else (before,)
        found = self.map(join(x, h)).tanh()
        if issubclass(self.kind, Distribution):
            mean, spread = found.chunk(2, -1)
            return self.dist(Normal(mean, spread.exp()))
        return (found, None) if self.is_rnn else (found + 0.1 * c[0], 0.5 * c[0] + found) if c else found


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *reads: Any) -> Any:
        return changed(self.inner(*reads))


class ForwardingWrapper(Wrapper):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class LoRA(Wrapper):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__(inner)
        self.down, self.up = (
            nn.Linear(*size, bias=False).double() for size in ((inner.in_features, 2), (2, inner.out_features))
        )

    def forward(self, x: Tensor) -> Tensor:
        called["here"] += 1
        return self.inner(x) + self.up(self.down(x))


class Halving(Tensor):
    """A weight whose products are halved, as a quantised weight has products of its own."""

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), nn.Parameter(self.detach().clone()))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") not in ("linear", "gru_cell", "lstm_cell"):
            return super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return changed(func(*args, **kwargs or {}))


class Site(NamedTuple):
    """Where a user changes something."""

    model: VRNN
    name: str
    stack: ExitStack
    run: Callable[[VRNN], Any]  # a pass that calls every part

    @property
    def part(self) -> Any:
        return self.model.get_submodule(self.name)

    @property
    def weight(self) -> str:
        return next(name for name in ("weight", "weight_ih", "weight_ih_l0") if hasattr(self.part, name))

    def put(self, part: nn.Module) -> None:
        parent, _, last = self.name.rpartition(".")
        setattr(self.model.get_submodule(parent), last, part)


def other_class(site: Site) -> None:
    seen: list[Any] = []
    handle = site.part.register_forward_hook(lambda part, reads, found: seen.append((reads, found)))
    site.run(site.model)
    handle.remove()
    torch.manual_seed(3)
    site.put(Other(site.name, *seen[0]))


def subclass(site: Site) -> None:
    kind = type(site.part)
    site.part.__class__ = type(
        f"My{kind.__name__}", (kind,), {"forward": lambda self, *x: changed(kind.forward(self, *x))}
    )


def instance_forward(site: Site) -> None:
    own = site.part.forward
    site.part.forward = lambda *reads: changed(own(*reads))


def global_hook(site: Site) -> None:
    site.part.is_hooked = True  # a copy is, too
    hook = nn.modules.module.register_module_forward_hook(
        lambda part, reads, found: changed(found) if getattr(part, "is_hooked", False) else None
    )
    site.stack.callback(hook.remove)


def weight_norm(site: Site) -> None:
    parametrizations.weight_norm(site.part, site.weight)
    site.part.parametrizations[site.weight].original0.data.mul_(0.5)


def spectral_norm(site: Site, training: bool) -> None:
    """To the end of the power iteration, whose every call would change the weight."""
    getattr(site.part, site.weight).data.add_(0.3)  # one singular value is much larger than the others: it ends soon
    torch.manual_seed(3)
    site.model.train()
    parametrizations.spectral_norm(site.part, site.weight, n_power_iterations=100)
    getattr(site.part, site.weight)
    site.part.parametrizations[site.weight][0].n_power_iterations = 1
    site.model.train(training)


def old_weight_norm(site: Site) -> None:
    nn.utils.weight_norm(site.part, name := site.weight)
    getattr(site.part, f"{name}_g").data.mul_(0.5)


def old_spectral_norm(site: Site, training: bool) -> None:
    getattr(site.part, site.weight).data.add_(0.3)
    torch.manual_seed(3)
    site.model.train()
    nn.utils.spectral_norm(site.part, name := site.weight, n_power_iterations=100)
    hook = next(iter(site.part._forward_pre_hooks.values()))
    hook(site.part, ())
    hook.n_power_iterations = 1
    setattr(site.part, name, getattr(site.part, f"{name}_orig").data)  # as a checkpoint leaves it
    site.model.train(training)


def pruning(site: Site) -> None:
    torch.manual_seed(3)
    prune.random_unstructured(site.part, name := site.weight, 0.5)
    getattr(site.part, f"{name}_orig").data.mul_(0.5)


def tensor_subclass(site: Site) -> None:
    weight = getattr(site.part, site.weight).detach().as_subclass(Halving)
    setattr(site.part, site.weight, nn.Parameter(weight))


def shared(site: Site) -> None:
    other, name = site.model.get_submodule(SHARED[site.name]), site.weight.replace("ih", "hh")
    setattr(site.part, name, getattr(other, name))


def functional(site: Site) -> dict[str, Tensor]:
    name = f"{site.name}.{site.weight}"
    return {f"model.{name}": (0.5 * site.model.get_parameter(name)).detach().requires_grad_()}


def halved(part: nn.Module, grads: tuple[Tensor | None, ...], *_: Any) -> tuple[Tensor | None, ...]:
    called["here"] += 1
    return tuple(None if grad is None else 0.5 * grad for grad in grads)


WAYS: dict[str, Callable[[Site], dict[str, Tensor] | None]] = {
    "other class": other_class,
    "subclass": subclass,
    "wrapper": lambda site: site.put(Wrapper(site.part)),
    "forwarding wrapper": lambda site: site.put(ForwardingWrapper(site.part)),
    "instance forward": instance_forward,
    "forward hook": lambda site: void(site.part.register_forward_hook(lambda part, reads, found: changed(found))),
    "forward pre-hook": lambda site: void(site.part.register_forward_pre_hook(lambda part, reads: changed(reads))),
    "global hook": global_hook,
    "backward hook": lambda site: void(site.part.register_full_backward_hook(halved)),
    "backward pre-hook": lambda site: void(site.part.register_full_backward_pre_hook(halved)),
    "weight norm": weight_norm,
    "spectral norm": partial(spectral_norm, training=False),
    "spectral norm in training": partial(spectral_norm, training=True),
    "old weight norm": old_weight_norm,
    "old spectral norm": partial(old_spectral_norm, training=False),
    "old spectral norm in training": partial(old_spectral_norm, training=True),
    "pruning": pruning,
    "LoRA": lambda site: site.put(LoRA(site.part)),
    "tensor subclass": tensor_subclass,
    "functional call": functional,
    "tensor hook": lambda site: void(getattr(site.part, site.weight).register_hook(lambda grad: 0.5 * grad)),
    "frozen": lambda site: void(getattr(site.part, site.weight).requires_grad_(False)),
    "shared weight": shared,
}


def void(_: object) -> None:
    """Return nothing."""
