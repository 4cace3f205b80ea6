"""Time the loop: training, evaluation, generation and particle filters, against the readable loop and against torch.nn.

    python benchmarks/loop.py
    python benchmarks/loop.py training memory --repeats 5

Prints markdown tables: medians over alternated repeats, and the median of the ratios round by round. Read the ratios:
the times are those of one machine on one day. "floor" is torch.nn's recurrence with the same networks and no latent in
the loop, "rate" the share of the rate of a large matrix product that the step's products alone come to.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from contestants import (
    Size,
    alternate,
    compiling,
    evaluation,
    filtering,
    generation,
    make,
    medians,
    operations,
    product_rate,
    replaced,
    training,
)

from vrnn_lightning.heads import Gaussian, GaussianMixture

TRAINING = [
    Size(28, 100, 16, 128, 28),
    Size(28, 100, 16, 32, 100),
    Size(1, 64, 16, 32, 100),
    Size(3, 128, 16, 16, 200),
    Size(28, 512, 64, 128, 28),
    Size(28, 100, 16, 32, 100, "lstm"),
]
EVALUATION = TRAINING[:2]
GENERATION = [Size(28, 100, 16, 64, 1000), Size(28, 100, 16, 1, 1000)]
COMPILED = [("Gaussian", Gaussian, TRAINING[0]), ("20 Gaussians", GaussianMixture, Size(200, 200, 32, 16, 40))]
FILTER, PARTICLES = [Size(88, 64, 32, 8, 60)], 16
MEMORY = [("one step", Size(28, 100, 16, 128, 28), None), ("checkpointing", Size(28, 100, 16, 4, 10000), 100)]
LENGTHS = [1000, 10000, 100000]
CUDA = [Size(200, 2000, 200, 128, 40, "lstm"), Size(28, 100, 16, 128, 28, "lstm")]


def table(title: str, sizes: list[Size], of: Callable[..., dict], options: argparse.Namespace) -> None:
    """Time the contestants at some sizes and print a row for each."""
    names = list(of(sizes[0]._replace(batch=1, steps=1)))
    heads = [f"{title}: x / h / z, batch x steps", *(f"{n}, ms" for n in names), *(f"{n} / fast" for n in names[1:])]
    print(f"\n| {' | '.join(heads)} |")
    print("| --- |" + " --- |" * (2 * len(names) - 1))
    for size in sizes:
        times, ratios = medians(alternate(list(of(size).values()), options.repeats))
        cells = [f"{1e3 * t:.1f}" for t in times] + [f"{r:.2f}" for r in ratios[1:]]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


def rates(options: argparse.Namespace) -> None:
    """Print which share of the machine's matrix rate a training step reaches."""
    print(
        "\n| training: x / h / z, batch x steps | products, 1e9 operations | at the full rate, ms | step, ms | rate |"
    )
    print("| --- | --- | --- | --- | --- |")
    for size in TRAINING:
        count = operations(make(size, options.device)[0], size)
        step = training(size, options.device)["fast"]
        rate = product_rate(options.device)
        (taken,), _ = medians(alternate([step], options.repeats))
        cells = (f"{count / 1e9:.1f}", f"{1e3 * count / rate:.1f}", f"{1e3 * taken:.1f}", f"{count / rate / taken:.0%}")
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


def compiled(options: argparse.Namespace) -> None:
    """Print what compiling costs and gains."""
    print("\n| compiled: emission, x / h / z, batch x steps | plain, ms | compiled, ms | gain | compiling, s |")
    print("| --- | --- | --- | --- | --- |")
    for name, emission, size in COMPILED:
        steps = compiling(size, emission, options.device)
        start = time.perf_counter()
        steps["compiled"]()
        taken = time.perf_counter() - start
        (plain, fast), ratios = medians(alternate(list(steps.values()), options.repeats))
        cells = f"{1e3 * plain:.1f} | {1e3 * fast:.1f} | {1 / ratios[1]:.2f} | {taken:.0f}"
        print(f"| {name}, {size} | {cells} |", flush=True)


def profile(options: argparse.Namespace) -> None:
    """Print what a training step's time goes to, at the sizes whose products are the least and the largest share."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    found = []
    for size in TRAINING:
        step = training(size)["fast"]
        for _ in range(3):
            step()
        with record(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(options.repeats):
                step()
        times = {event.key: event.self_cpu_time_total for event in recorded.key_averages()}
        total = sum(times.values())
        shares = {name.removeprefix("aten::"): value / total for name, value in times.items()}
        products = sum(shares.pop(name, 0.0) for name in ("mm", "addmm", "addmm_"))
        rest = sorted(shares.items(), key=lambda item: -item[1])[:6]
        found.append((products, size, ", ".join(f"{name} {share:.0%}" for name, share in rest)))
    print("\n| profile: x / h / z, batch x steps | products | then |")
    print("| --- | --- | --- |")
    for products, size, rest in (min(found), max(found)):
        print(f"| {size} | {products:.0%} | {rest} |", flush=True)


def memory(options: argparse.Namespace) -> None:
    """Print the peak memory of a training step, each in a process of its own."""
    print("\n| peak memory of a training step | fast, MB | readable, MB | fast / readable |")
    print("| --- | --- | --- | --- |")
    for name, size, every in MEMORY:
        fast, slow = (peak(size, contestant, every) for contestant in ("fast", "readable"))
        print(f"| {name}, {size} | {fast:.0f} | {slow:.0f} | {fast / slow:.2f} |", flush=True)
    print("\n| steps of a sequence | all kept, MB | checkpointing, MB | windows of 100, the state carried, MB |")
    print("| --- | --- | --- | --- |")
    for steps in LENGTHS:
        size = Size(28, 100, 16, 1, steps)
        found = [peak(size, "fast", every) for every in (None, round(steps**0.5))]
        print(f"| {steps} | {found[0]:.0f} | {found[1]:.0f} | {peak(size, 'windows', None):.0f} |", flush=True)


def peak(size: Size, contestant: str, every: int | None) -> float:
    """Return the megabytes that a training step adds to a fresh process at its peak."""
    words = [sys.executable, __file__, "--peak", contestant, str(every or 0), *map(str, size)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_peak(contestant: str, every: str, *size: str) -> None:
    """Print the peak of one training step, less what was there before it."""
    of = Size(*map(int, size[:5]), size[5])
    if contestant == "windows":
        step = streamed(of)
    else:
        import contestants

        kept, contestants.make = contestants.make, lambda *a: _recomputing(kept(*a), int(every))
        step = training(of)[contestant]
    training(of._replace(batch=1, steps=1))["readable"]()  # imports and first calls
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is a new peak
    step()
    print((_status("VmHWM") - before) / 1024)


def _recomputing(made: tuple, every: int) -> tuple:
    made[0].checkpoint_every = every or None
    return made


def streamed(size: Size) -> Callable[[], None]:
    """Return a pass over a sequence in windows of 100 steps, with an update after each and the state carried."""
    from vrnn_lightning.noise import Noise
    from vrnn_lightning.objectives import ELBO

    model, batch = make(size._replace(steps=100), "cpu")
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def run() -> None:
        carried = None
        for _ in range(0, size.steps, 100):
            found = ELBO()(model, batch, Noise(batch), 1.0, lambda x: x, carried)
            carried = found.carried.reset_rows(torch.zeros(size.batch, dtype=torch.bool))
            optimizer.zero_grad()
            (-found.value).backward()
            optimizer.step()

    return run


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--peak"]:
        measure_peak(*words[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ("training", "replaced", "rates", "evaluation", "generation", "filter", "compiled", "profile", "memory")
    parser.add_argument("tables", nargs="*", default=[], help=f"which of {', '.join(tables)} (default: all)")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds per row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help='"cuda" for a GPU, in bf16-mixed, at larger sizes')
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    wanted = options.tables or list(tables)
    unknown = set(wanted) - set(tables)
    if unknown:
        parser.error(f"no table {', '.join(sorted(unknown))}; choose from {', '.join(tables)}")
    device = options.device
    print(f"torch {torch.__version__}, {device}, {options.threads} threads, medians of {options.repeats} rounds; "
          f"a large matrix product runs at {product_rate(device) / 1e9:.0f} GFLOP/s")  # fmt: skip
    if "training" in wanted:
        precision, sizes = ("bf16", CUDA) if device == "cuda" else ("32", TRAINING)
        table("training", sizes, lambda size: training(size, device, precision), options)
    if "replaced" in wanted:
        table("training, of another class", TRAINING[:3], lambda size: replaced(size, device), options)
    if "rates" in wanted and device == "cpu":
        rates(options)
    if "evaluation" in wanted:
        table("evaluation", EVALUATION, lambda size: evaluation(size, device), options)
    if "generation" in wanted:
        table("generation", GENERATION, lambda size: generation(size, device), options)
    if "filter" in wanted:
        table(f"FIVO, K = {PARTICLES}", FILTER, lambda size: filtering(size, PARTICLES, device), options)
    if "compiled" in wanted:
        compiled(options)
    if "profile" in wanted and device == "cpu":
        profile(options)
    if "memory" in wanted and device == "cpu":
        memory(options)


if __name__ == "__main__":
    main()
