"""What pictures and sounds cost a training: seconds that they take, against the recipe's epochs.

    python benchmarks/media.py configs/synthetic.yaml
    python benchmarks/media.py configs/music.yaml --data.root jsb.npz

Trains three epochs of a recipe, shows samples after each, and sets their cost against the epochs as the recipe's own
`samples.every_n_validations` and `check_val_every_n_epoch` space them. What is shown at the training's end and the
report come once in a run, and are set against all of the recipe's epochs.
"""

import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import yaml

from vrnn_lightning import report
from vrnn_lightning.callbacks import Samples
from vrnn_lightning.cli import command, main

EPOCHS = 3


def measure(config: str, words: list[str]) -> None:
    recipe = yaml.safe_load(Path(config).read_text())
    trainer, samples = recipe.get("trainer", {}), recipe.get("samples", {})
    spacing = trainer.get("check_val_every_n_epoch", 1) * samples.get("every_n_validations", 1)
    epochs = trainer["max_epochs"]
    shown, starts, ends, pages = [], [], [], []
    show, write = Samples._show, report.write_report

    def timed_show(self, *args, **kwargs):
        begun = time.perf_counter()
        show(self, *args, **kwargs)
        (ends if kwargs["last"] else shown).append(time.perf_counter() - begun)

    def timed_report(folder):
        begun = time.perf_counter()
        path = write(folder)
        pages.append(time.perf_counter() - begun)
        return path

    Samples._show, command.write_report = timed_show, timed_report
    Samples.on_train_epoch_start = lambda self, *_: starts.append(time.perf_counter())
    quick = ["--trainer.max_epochs", str(EPOCHS), "--trainer.check_val_every_n_epoch", "1"]
    quick += ["--samples.every_n_validations", "1", "--trainer.enable_progress_bar", "false"]
    with tempfile.TemporaryDirectory() as folder:
        assert main(["fit", "-c", config, *words, *quick, "--trainer.default_root_dir", folder]) == 0
    between = [after - before for before, after in pairwise(starts)]
    epoch = median(span - cost for span, cost in zip(between, shown, strict=False))
    each = median(shown[1:])  # the first also imports what draws
    print(f"{config}: an epoch with validation {epoch:.2f} s, samples {each:.2f} s every {spacing} epochs,")
    print(f"  {each / spacing / epoch:.1%} of an epoch; at the end {ends[0]:.1f} s and the report {pages[0]:.1f} s,")
    print(f"  {(ends[0] + pages[0]) / epochs / epoch:.1%} of {epochs} epochs")


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2:])
