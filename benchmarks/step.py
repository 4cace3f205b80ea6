"""Time a training step against the textbook loop with everything inside it, alternated in one run.

    python benchmarks/step.py

Prints a markdown table: medians over the repeats, and the median of the ratios pair by pair. Read the ratios; the times
are those of one machine on one day.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from vrnn_lightning import VRNN, Layers, SequenceBatch
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import elbo
from vrnn_lightning.recurrence import textbook

SIZES = [(28, 100, 16, batch, steps) for batch in (128, 32) for steps in (28, 100)]


def steps_of(x: int, h: int, z: int, batch_size: int, steps: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a training step (forward, backward, Adam) on the fast path and one on the textbook loop, same model."""
    torch.manual_seed(0)
    layers = dict.fromkeys(("phi_x", "phi_z", "prior", "encoder", "decoder"), Layers(h))
    model = VRNN(x, z, h, **layers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    batch = SequenceBatch(torch.randn(batch_size, steps, x), torch.full((batch_size,), steps))

    def train(terms: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
        log_px, kl = terms()
        optimizer.zero_grad()
        (-elbo(log_px, kl, batch.lengths.sum()) / batch_size).backward()
        optimizer.step()

    def fast() -> tuple[torch.Tensor, torch.Tensor]:
        trace = model(batch)
        return trace.log_px, trace.kl

    def slow() -> tuple[torch.Tensor, torch.Tensor]:
        found = textbook(model, batch, Noise(batch).over_time(z), model.initial_state(batch_size))
        return found.log_px, found.kl

    return lambda: train(fast), lambda: train(slow)


def alternate(first: Callable[[], None], second: Callable[[], None], repeats: int) -> list[tuple[float, float]]:
    """Time two steps in turn, after one warm-up of each; seconds."""
    times = []
    for _ in range(repeats + 1):
        pair = []
        for step in (first, second):
            start = time.perf_counter()
            step()
            pair.append(time.perf_counter() - start)
        times.append((pair[0], pair[1]))
    return times[1:]


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="timed pairs per row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.repeats} pairs per row\n")
    print("| x / h / z, batch x steps | fast path, ms | textbook, ms | textbook / fast |")
    print("| --- | --- | --- | --- |")
    for size in SIZES:
        times = alternate(*steps_of(*size), options.repeats)
        fast, slow = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        x, h, z, batch, steps = size
        print(f"| {x} / {h} / {z}, {batch} x {steps} | {fast:.0f} | {slow:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
