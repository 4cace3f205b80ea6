"""Time sampling against the generation loop, and measure the memory of predictions over a corpus.

    python benchmarks/predicting.py
    python benchmarks/predicting.py sampling --repeats 5

Prints markdown tables. Sampling: medians over alternated repeats and the median of the ratios round by round, of
``module.vrnn.generate``, of ``module.sample``, and of ``trainer.predict`` with the callback that writes archive and
table, without and with its pictures. Memory: the peak of a process that predicts a corpus, read from nowhere but its
indices, and of one that predicts eight times as many sequences.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from contestants import Size, alternate, medians
from lightning.pytorch import Trainer

from vrnn_lightning import SequenceDataModule, SequenceSample, VRNNLightningModule
from vrnn_lightning.callbacks import Predictions
from vrnn_lightning.callbacks.predictions import Draws

SAMPLING = [Size(28, 100, 16, 64, 1000), Size(4, 64, 4, 64, 1000)]
FEATURES, STEPS = 8, 300
SEQUENCES = {"score": 250, "reconstruct": 250, "forecast": 10, "impute": 10}  # of the smaller corpus
TASKS = {
    "score": {},
    "reconstruct": {"shown": 4},
    "forecast": {"prefix": 200, "steps": 24, "stride": 24, "samples": 20, "shown": 4},
    "impute": {"hide": 0.1, "samples": 5, "shown": 4},
}


class Lazy(SequenceDataModule):
    """Sequences that are made when they are read.

    Args:
        count: How many.
    """

    scaling = "per_feature"

    def __init__(self, count: int) -> None:
        super().__init__(FEATURES, batch_size=32)
        self.count = count

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self.count

    def __getitem__(self, index: int, /) -> SequenceSample:
        """Make a sequence."""
        generator = torch.Generator().manual_seed(index)
        return SequenceSample(torch.randn(STEPS, FEATURES, generator=generator), name=f"sequence {index}")

    def sequences(self, split: str) -> Lazy:
        """Return them for the test, and some to fit the scaler on."""
        return self if split == "test" else Lazy(50)

    def lengths(self, split: str) -> list[int]:
        """Return the steps of each."""
        return [STEPS] * len(self.split(split))


def predicted(folder: str, callback: Predictions, module: VRNNLightningModule, data: Lazy | None) -> None:
    """Run a prediction; without data, of samples."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=folder, callbacks=[callback], accelerator="cpu", **quiet)
    loader = None if data else Draws(callback.task.count, module.vrnn.num_features, trainer)
    trainer.predict(module, dataloaders=loader, datamodule=data, return_predictions=False)


def sampling(options: argparse.Namespace) -> None:
    """Print what sampling costs beside generating."""
    print(
        "\n| sampling: x / h / z, batch x steps | generate, ms | sample / generate | predict / generate | with media |"
    )
    print("| --- | --- | --- | --- | --- |")
    for size in SAMPLING:
        module = VRNNLightningModule(size.x, latent_size=size.z, hidden_size=size.h).eval()
        module.is_initialized.fill_(True)
        with TemporaryDirectory() as folder:

            def run(shown: int, folder: str = folder, size: Size = size, module: VRNNLightningModule = module) -> None:
                callback = Predictions("sample", count=size.batch, steps=size.steps, shown=shown, overwrite=True)
                predicted(folder, callback, module, None)

            steps: list[Callable[[], object]] = [
                lambda size=size, module=module: module.vrnn.generate(size.steps, size.batch),
                lambda size=size, module=module: module.sample(size.batch, size.steps, seed=0),
                lambda: run(0),
                lambda: run(4),
            ]
            times, ratios = medians(alternate(steps, options.repeats))
        print(f"| {size} | {1e3 * times[0]:.0f} | {' | '.join(f'{r:.2f}' for r in ratios[1:])} |", flush=True)


def memory(options: argparse.Namespace) -> None:
    """Print the peak memory of predictions over a corpus and over one that is eight times as large."""
    print(f"\n| sequences of {STEPS} x {FEATURES} | their number | peak, MB | of 8 times as many, MB | written, MB |")
    print("| --- | --- | --- | --- | --- |")
    for task in TASKS:
        words = [sys.executable, __file__, "--peak", task]
        said = []
        for count in (SEQUENCES[task], 8 * SEQUENCES[task]):
            run = subprocess.run([*words, str(count)], check=True, capture_output=True, text=True)
            said.append(run.stdout.split()[-2:])
        cells = (SEQUENCES[task], *(f"{float(cell):.0f}" for cell in (said[0][0], *said[1])))
        print(f"| {task} | {' | '.join(map(str, cells))} |", flush=True)


def measure_peak(task: str, count: str) -> None:
    """Print the peak memory of this process after a prediction, and what it wrote, in MB."""
    import resource

    torch.set_num_threads(1)
    module = VRNNLightningModule(FEATURES, latent_size=4, hidden_size=16).eval()
    with TemporaryDirectory() as folder:
        predicted(folder, Predictions(task, **TASKS[task], overwrite=True), module, Lazy(int(count)))
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, written / 1e6)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    warnings.filterwarnings("ignore")  # of Lightning, about loaders without workers
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--peak"]:
        measure_peak(*words[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help="which of sampling, memory (default: all)")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds per row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    options = parser.parse_args(words)
    unknown = set(options.tables) - {"sampling", "memory"}
    if unknown:
        parser.error(f"no table {', '.join(sorted(unknown))}; choose from sampling, memory")
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, medians of {options.repeats} rounds")
    if not options.tables or "sampling" in options.tables:
        sampling(options)
    if not options.tables or "memory" in options.tables:
        memory(options)


if __name__ == "__main__":
    main()
