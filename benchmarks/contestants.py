"""What is timed: the fast loop, the readable loop, and torch.nn's recurrence without a latent in its loop."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from vrnn_lightning import VRNN, MLPConfig, SequenceBatch, build_vrnn
from vrnn_lightning.filtering import Resampling
from vrnn_lightning.heads import Bernoulli, Gaussian
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import ELBO

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from readable import readable_filter, readable_generation, readable_loop  # the tests' reference

NETWORKS = ("phi_x", "phi_z", "prior", "encoder", "decoder")


class Size(NamedTuple):
    """Features, units of every network and of the recurrence, latent dimensions; sequences and steps of a batch."""

    x: int
    h: int
    z: int
    batch: int
    steps: int
    cell: str = "gru"

    def __str__(self) -> str:
        name = "" if self.cell == "gru" else f"{self.cell.upper()}, "
        return f"{name}{self.x} / {self.h} / {self.z}, {self.batch} x {self.steps}"


class Floor(nn.Module):
    """A VRNN's networks around ``torch.nn.GRU`` or ``LSTM``: z_t is inferred from x_t alone, so nothing waits for h.

    Where the encoder would read h it reads phi_x once more, so its products are as large.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()

        def network(width: int, out: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, size.h), nn.ReLU(), nn.Linear(size.h, 2 * out))

        self.phi_x = nn.Sequential(nn.Linear(size.x, size.h), nn.ReLU())
        self.phi_z = nn.Sequential(nn.Linear(size.z, size.h), nn.ReLU())
        self.encoder, self.prior = network(2 * size.h, size.z), network(size.h, size.z)
        self.decoder = network(2 * size.h, size.x)
        self.rnn = (nn.GRU if size.cell == "gru" else nn.LSTM)(2 * size.h, size.h)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x_t | ...) and the KL; x and noise are time first."""
        phi_x = self.phi_x(x)
        posterior = _normal(self.encoder(torch.cat([phi_x, phi_x], -1)))
        phi_z = self.phi_z(posterior.mean + posterior.stddev * noise)
        states = self.rnn(torch.cat([phi_x, phi_z], -1))[0]
        before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
        emission = _normal(self.decoder(torch.cat([phi_z, before], -1)))
        return emission.log_prob(x).sum(-1), kl_divergence(posterior, _normal(self.prior(before)))


def _normal(raw: Tensor) -> Normal:
    mean, spread = raw.chunk(2, -1)
    return Normal(mean, nn.functional.softplus(spread) + 1e-4, validate_args=False)


def make(size: Size, device: str, emission: Callable[..., nn.Module] = Gaussian) -> tuple[VRNN, SequenceBatch]:
    """Return a model and a batch."""
    torch.manual_seed(0)
    layers = dict.fromkeys(NETWORKS, MLPConfig(size.h))
    model = build_vrnn(size.x, size.z, size.h, cell=size.cell, emission=emission, **layers).to(device)
    x = torch.randn(size.batch, size.steps, size.x, device=device)
    x = (x > 1.5).float() if emission is Bernoulli else x
    return model, SequenceBatch(x, torch.full((size.batch,), size.steps, device=device))


def operations(model: nn.Module, size: Size) -> float:
    """Return the floating-point operations of a training step's products: one way there, twice as many back."""
    return 6.0 * size.batch * size.steps * sum(p.numel() for p in model.parameters() if p.ndim == 2)


def trained(model: nn.Module, terms: Callable[[], Tensor], size: Size, precision: str) -> Callable[[], None]:
    """Return a training step: forward, backward, Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    device = next(model.parameters()).device.type

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = terms()
        (-value / size.batch).backward()
        optimizer.step()

    return step


def replaced(size: Size, device: str = "cpu") -> dict[str, Callable[[], None]]:
    """Return a training step with each part in turn of a class that the loop does not know but computes the same."""
    steps = {}
    for name in ("none", "phi_x", "prior", "decoder", "phi_z", "encoder", "cells.0"):
        model, batch = make(size, device)
        part = model if name == "none" else model.get_submodule(name)
        if name != "none":
            part.__class__ = type(f"My{type(part).__name__}", (type(part),), {})

        def value(model: VRNN = model, batch: SequenceBatch = batch) -> Tensor:
            return ELBO()(model, batch, Noise(batch), 1.0, lambda total: total).value

        steps[name] = trained(model, value, size, "32")
    return {"fast": steps.pop("none"), **steps, "readable": training(size, device)["readable"]}


def training(size: Size, device: str = "cpu", precision: str = "32") -> dict[str, Callable[[], None]]:
    """Return a training step of each contestant."""
    model, batch = make(size, device)
    floor = Floor(size).to(device)
    x = batch.x.transpose(0, 1).contiguous()

    def fast() -> Tensor:
        return ELBO()(model, batch, Noise(batch), 1.0, lambda total: total).value

    def slow() -> Tensor:
        found = readable_loop(model, batch, Noise(batch).over_time(size.z), model.initial_state(size.batch))
        return found.log_px.sum() - found.kl.sum()

    def without() -> Tensor:
        log_px, kl = floor(x, torch.randn(size.steps, size.batch, size.z, device=device))
        return log_px.sum() - kl.sum()

    contestants = {"fast": (model, fast), "readable": (model, slow), "floor": (floor, without)}
    return {name: trained(*of, size, precision) for name, of in contestants.items()}


def compiling(size: Size, emission: Callable[..., nn.Module], device: str = "cpu") -> dict[str, Callable[[], None]]:
    """Return a training step of the fast loop as it is, and with what is outside the loop compiled."""
    found = {}
    for name in ("plain", "compiled"):
        model, batch = make(size, device, emission)
        model.compiled = name == "compiled"

        def value(model: VRNN = model, batch: SequenceBatch = batch) -> Tensor:
            return ELBO()(model, batch, Noise(batch), 1.0, lambda total: total).value

        found[name] = trained(model, value, size, "32")
    return found


def filtering(size: Size, samples: int, device: str = "cpu") -> dict[str, Callable[[], None]]:
    """Return a training step on the particle filter's bound (FIVO) of each contestant."""
    model, batch = make(size, device, Bernoulli)
    rule = Resampling()

    def fast() -> Tensor:
        return model.filter(batch, samples, rule, Noise(batch)).log_likelihood.sum()

    def slow() -> Tensor:
        noise = Noise(batch)
        z, draws = noise.over_time(size.z, samples), noise.uniform_over_time(rule.draws(samples))
        state = model.initial_state(samples * size.batch)
        return readable_filter(model, batch, z, draws, state, rule).log_likelihood.sum()

    return {name: trained(model, of, size, "32") for name, of in (("fast", fast), ("readable", slow))}


def evaluation(size: Size, device: str = "cpu") -> dict[str, Callable[[], object]]:
    """Return a pass without gradient of each contestant."""
    model, batch = make(size, device)
    floor, x = Floor(size).to(device), batch.x.transpose(0, 1).contiguous()
    state = model.initial_state(size.batch)
    contestants = {
        "fast": lambda: model(batch),
        "readable": lambda: readable_loop(model, batch, Noise(batch).over_time(size.z), state),
        "floor": lambda: floor(x, torch.randn(size.steps, size.batch, size.z, device=device)),
    }
    return {name: torch.no_grad()(of) for name, of in contestants.items()}


def generation(size: Size, device: str = "cpu") -> dict[str, Callable[[], object]]:
    """Return free generation of each contestant."""
    model, _ = make(size._replace(steps=1), device)
    return {
        "fast": lambda: model.generate(size.steps, size.batch),
        "readable": lambda: readable_generation(model, size.steps, model.initial_state(size.batch)),
    }


def alternate(steps: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Time some steps in turn, after one warm-up of each; return the seconds of every round."""
    rounds = []
    for _ in range(repeats + 1):
        row = []
        for step in steps:
            _wait()
            start = time.perf_counter()
            step()
            _wait()
            row.append(time.perf_counter() - start)
        rounds.append(row)
    return rounds[1:]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(rounds: list[list[float]]) -> tuple[list[float], list[float]]:
    """Return the median seconds of each contestant, and of each ratio to the first of the same round."""
    columns = [statistics.median(column) for column in zip(*rounds, strict=True)]
    return columns, [statistics.median(row[i] / row[0] for row in rounds) for i in range(len(rounds[0]))]


def product_rate(device: str = "cpu", width: int = 2048) -> float:
    """Return the floating-point operations per second of a large matrix product."""
    a, b = torch.randn(2, width, width, device=device).unbind(0)
    return 2.0 * width**3 / medians(alternate([lambda: a @ b], 7))[0][0]
