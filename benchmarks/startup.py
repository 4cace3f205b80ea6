"""Time the start of a command against importing torch and lightning alone, alternated in one run.

    python benchmarks/startup.py

Each command is a process of its own. Prints a markdown table: medians over the repeats. The last column is what the
medians leave below 1.3 times the imports plus 2 s, which no command should take longer than.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

IMPORTS = ["-c", "import torch, lightning.pytorch"]
STEP = [
    "-m", "vrnn_lightning", "fit", "-c", "configs/synthetic.yaml", "--trainer.accelerator", "cpu",
    "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0",
]  # fmt: skip
COMMANDS = {
    "`lightning fit --help`": ["-m", "vrnn_lightning", "fit", "--help"],
    "`lightning fit -c configs/synthetic.yaml`, one step": STEP,
}


def seconds(words: list[str], folder: str) -> float:
    """Return how long a Python process takes."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr}")
    return taken


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before, not counted (default: 1)")
    options = parser.parse_args(arguments)
    rows = {"`import torch, lightning.pytorch`": IMPORTS, **COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        times = [[seconds(words, folder) for words in rows.values()] for _ in range(options.repeats + options.warm_up)]
        times = times[options.warm_up :]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    print(f"Python {sys.version.split()[0]}, {options.repeats} rounds\n")
    print("| | s | / imports | below 1.3 x imports + 2 s |")
    print("| --- | --- | --- | --- |")
    for name, taken in zip(rows, medians, strict=True):
        print(f"| {name} | {taken:.1f} | {taken / medians[0]:.2f} | {1.3 * medians[0] + 2 - taken:.1f} |")


if __name__ == "__main__":
    main()
