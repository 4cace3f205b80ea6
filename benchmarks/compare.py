"""Time the fast loop of this checkout against that of another one, in alternated rounds.

    git worktree add ../old v0.1.0
    python benchmarks/compare.py ../old

Each checkout runs in a process of its own; the two take turns, one step each. Prints a markdown table: for each row the
median of the ratios new / old round by round, with a 95 % interval of that median.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LOOPS = [
    (28, 100, 16, 128, 28),
    (28, 100, 16, 32, 100),
    (1, 64, 16, 32, 100),
    (3, 128, 16, 16, 200),
    (28, 512, 64, 128, 28),
    (28, 100, 16, 32, 100, "lstm"),
]
ROWS = {
    "training": LOOPS,
    "evaluation": LOOPS[:2],
    "generation": [(28, 100, 16, 64, 1000), (28, 100, 16, 1, 1000)],
    "filtering": [(88, 64, 32, 8, 60)],
    "streaming": [(28, 100, 16, 1, 200), (28, 100, 16, 8, 200)],
}


def steps_of(kind: str, size: tuple) -> Callable[[], object]:
    """Return one step of the imported checkout."""
    import contestants
    import torch

    of = contestants.Size(*size)
    if kind == "filtering":
        return contestants.filtering(of, 16)["fast"]
    if kind == "streaming":
        model, batch = contestants.make(of, "cpu")
        stream = model.stream(of.batch, 4)

        def follow() -> None:
            for x in batch.x.unbind(1):
                stream.step(x)

        return follow
    torch.manual_seed(0)
    return getattr(contestants, kind)(of)["fast"]


def work(threads: int) -> None:
    """Run steps as they are asked for; print the seconds of each."""
    sys.path[0] = str(Path.cwd() / "benchmarks")  # the contestants are the checkout's own
    import torch

    torch.set_num_threads(threads)
    rows = [(kind, size) for kind, sizes in ROWS.items() for size in sizes]
    step: Callable[[], object] | None = None
    for line in sys.stdin:
        command, number = line.split()
        if command == "row":
            step = steps_of(*rows[int(number)])
            for _ in range(3):
                step()
            print("ready", flush=True)
            continue
        assert step is not None
        began = time.perf_counter()
        for _ in range(int(number)):
            step()
        print((time.perf_counter() - began) / int(number), flush=True)


class Worker:
    """A process that runs the steps of a checkout.

    Args:
        checkout: Its folder.
        threads: Threads of torch.
    """

    def __init__(self, checkout: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{checkout}:{checkout / 'benchmarks'}"}
        words = [sys.executable, __file__, "--work", str(threads)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout
        )

    def ask(self, *words: object) -> str:
        """Send a line; return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(*words, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the median and its 95 % interval, from the order statistics (a sign test)."""
    ordered, count = sorted(ratios), len(ratios)
    reach = 1.96 * math.sqrt(count) / 2
    low, high = max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach))
    return statistics.median(ordered), ordered[low], ordered[high]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the other checkout")
    parser.add_argument("kinds", nargs="*", help=f"which of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=31, help="rounds per row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    workers = [Worker(path.resolve(), options.threads) for path in (Path(__file__).parents[1], options.old)]
    print("| x / h / z, batch x steps | old, ms | new, ms | new / old (95 %) |\n| --- | --- | --- | --- |")
    rows = [(kind, size) for kind, sizes in ROWS.items() for size in sizes]
    for number, (kind, size) in enumerate(rows):
        if options.kinds and kind not in options.kinds:
            continue
        for worker in workers:
            assert worker.ask("row", number) == "ready"
        times = []
        for turn in range(options.rounds):
            order = workers if turn % 2 else workers[::-1]
            taken = {worker: float(worker.ask("step", 1)) for worker in order}
            times.append([taken[worker] for worker in workers])
        median, low, high = interval([new / old for new, old in times])
        new, old = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        x, h, z, batch, steps, *cell = size
        name = f"{kind}{', LSTM' * bool(cell)}: {x} / {h} / {z}, {batch} x {steps}"
        print(f"| {name} | {old:.1f} | {new:.1f} | {median:.3f} ({low:.3f} to {high:.3f}) |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(int(sys.argv[2]))
    else:
        main()
