"""Time the loader against the training that it feeds, and show what of its batches is padding.

    python benchmarks/loading.py                          # every recipe whose data is there
    python benchmarks/loading.py -c configs/speech.yaml --data.root recordings

Without words it runs the shipped recipes, those that need files on the data below the folder that VRNN_DATA names. Each
row is one run of ``lightning fit``: batches are read without training, then as many are trained on, all in this
process; `training / loading` is how many batches the loader reads, by itself and with no process to help it, while
training takes one step. Medians over the batches of an epoch, at most ``--batches`` of them after three that warm up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = {
    "synthetic": None,
    "exact": None,
    "mnist": "mnist_small/mnist_small.npz",
    "music": "music_jsb/jsb.npz",
    "handwriting": "handwriting_kanji/short_kanji.npz",
    "speech": "speech_fsdd/recordings",
    "tables": "timeseries_ett/ETTh1.csv",
}
"""What each shipped recipe needs below the folder of real data."""
WARM_UP = 3
row: list[str] = []
"""What the callback found, for the table."""


class Timing(Callback):
    """Times the loader by itself before training, and training's steps.

    Args:
        batches: How many of each, at most.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.steps: list[float] = []
        self.start = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Read batches, and do nothing with them."""
        loader = trainer.datamodule.train_dataloader()
        taken, real, cells, shape = [], 0, 0, ()
        start = time.perf_counter()
        for batch in islice(loader, self.batches + WARM_UP):
            taken.append(time.perf_counter() - start)
            shape = shape or tuple(batch.x.shape)
            start = time.perf_counter()
        for items in loader.sampler:  # all of them, by their lengths alone
            if not isinstance(items[0], int):
                break  # windows of streams: of one length but for a sequence's last
            lengths = loader.sampler.lengths[items]
            real, cells = real + int(lengths.sum()), cells + len(items) * int(lengths.max())
        self.found = [" x ".join(map(str, shape)), f"{100 * (1 - real / cells):.1f} %" if cells else "-"]
        self.loading = statistics.median(taken[WARM_UP:] or taken)

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it."""
        self.steps.append(time.perf_counter() - self.start)

    def on_train_end(self, *_: Any) -> None:
        """Keep the row."""
        training = statistics.median(self.steps[WARM_UP:] or self.steps)
        row[:] = [*self.found, f"{1e3 * self.loading:.1f}", f"{1e3 * training:.1f}", f"{training / self.loading:.1f}"]


def measure(words: list[str], batches: int) -> None:
    """Run ``lightning fit`` on these words; the row is what it found."""
    from vrnn_lightning.cli import main as lightning

    with tempfile.TemporaryDirectory() as folder:
        more = {
            "callbacks+": f"{{class_path: loading.Timing, init_args: {{batches: {batches}}}}}", "max_epochs": "1",
            "limit_train_batches": str(batches + WARM_UP), "limit_val_batches": "0", "num_sanity_val_steps": "0",
            "enable_progress_bar": "false", "enable_model_summary": "false", "accelerator": "cpu",
            "check_val_every_n_epoch": "1", "default_root_dir": folder, "enable_checkpointing": "false",
        }  # fmt: skip
        flags = [f"--trainer.{key}={value}" for key, value in more.items()]
        stdout, sys.stdout = sys.stdout, sys.stderr  # the page holds the table alone
        try:
            if lightning(["fit", *words, *flags]):
                raise SystemExit(1)
        finally:
            sys.stdout = stdout


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40, help="batches of each row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    options, words = parser.parse_known_args(arguments)
    torch.set_num_threads(options.threads)
    sys.modules.setdefault("loading", sys.modules[__name__])
    rows = {" ".join(words): words} if words else {}
    folder = os.environ.get("VRNN_DATA")
    for name, data in {} if words else RECIPES.items():
        if data is None or (folder and (Path(folder) / data).exists()):
            root = [] if data is None else [f"--data.root={Path(str(folder)) / data}"]
            rows[f"`{name}.yaml`"] = ["-c", str(CONFIGS / f"{name}.yaml"), *root]
        else:
            print(f"{name}: VRNN_DATA names no folder that holds {data}; left out", file=sys.stderr)
    print(f"torch {torch.__version__}, {options.threads} threads\n")
    print("| | first batch | padding | loading, ms | training, ms | training / loading |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, given in rows.items():
        measure(given, options.batches)
        print("|", " | ".join([name, *row]), "|", flush=True)


if __name__ == "__main__":
    main()
