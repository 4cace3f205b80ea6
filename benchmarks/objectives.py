"""Time a training step on IWAE and FIVO against the single-sample ELBO, alternated in one run.

    python benchmarks/objectives.py

The sizes are those of the JSB chorales recipe. Prints a markdown table of ratios: medians of alternated repeats.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from step import alternate

from vrnn_lightning import VRNN, Layers, SequenceBatch
from vrnn_lightning.heads import Bernoulli
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import ELBO, FIVO, IWAE, Objective


def step_of(objective: Objective, batch_size: int, steps: int, hidden: int, latent: int):
    """Return a training step: forward, backward, Adam."""
    torch.manual_seed(0)
    layers = dict.fromkeys(("phi_x", "phi_z", "prior", "encoder", "decoder"), Layers(hidden))
    model = VRNN(88, latent, hidden, emission=Bernoulli, residual_posterior=True, dropout=0.3, **layers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    x = (torch.rand(batch_size, steps, 88) < 0.05).float()
    batch = SequenceBatch(x, torch.full((batch_size,), steps))

    def step() -> None:
        optimizer.zero_grad()
        value, _ = objective(model, batch, Noise(batch), 1.0, lambda total: total)
        (-value / batch_size).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--latent", type=int, default=32)
    options = parser.parse_args()
    sizes = (options.batch, options.steps, options.hidden, options.latent)
    print(f"batch {sizes[0]} x {sizes[1]} steps, {torch.get_num_threads()} threads, K = {options.samples}\n")
    print("| objective | ELBO, one sample | K samples | ratio | ratio / K |")
    print("| --- | --- | --- | --- | --- |")
    for objective in (IWAE(options.samples), FIVO(options.samples)):
        pairs = alternate(step_of(ELBO(), *sizes), step_of(objective, *sizes), options.repeats)
        single, several = (1e3 * statistics.median(part) for part in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        name = type(objective).__name__
        print(f"| {name} | {single:.0f} ms | {several:.0f} ms | {ratio:.2f} | {ratio / options.samples:.2f} |")


if __name__ == "__main__":
    main()
