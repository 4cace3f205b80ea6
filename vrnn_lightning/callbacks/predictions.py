"""What a prediction leaves behind: samples, reconstructions, forecasts, imputations, scores or encodings, as files."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vrnn_lightning import metrics
from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.archives import FOLDER, ArchiveWriter, archive_path
from vrnn_lightning.callbacks.media import Media, Shown, save_picture
from vrnn_lightning.callbacks.tasks import TASKS, Prediction, Task
from vrnn_lightning.callbacks.tasks.base import require_options
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import csv_line, replacing
from vrnn_lightning.module import VRNNLightningModule

__all__ = ["Draws", "Predictions"]

TaskName = Literal["encode", "sample", "reconstruct", "forecast", "impute", "score"]
GROUP = 64  # sequences drawn at a time
NO_OPTIONS = ("self", "task", "options", "overwrite", "__class__")


class Draws:
    """Batches that say how many sequences to draw, in groups that depend neither on the batch size nor on processes.

    Args:
        count: Of all processes together.
        num_features: Of a frame.
        trainer: Knows which process this is.
    """

    def __init__(self, count: int, num_features: int, trainer: Trainer) -> None:
        self.count, self.num_features, self.trainer = count, num_features, trainer

    def __len__(self) -> int:
        """Return the number of batches of each process."""
        return -(-self.count // (GROUP * self.trainer.world_size))

    def __iter__(self) -> Iterator[SequenceBatch]:
        """Yield empty frames, one for each sequence."""
        for batch in range(len(self)):
            first = (batch * self.trainer.world_size + self.trainer.global_rank) * GROUP
            index = torch.arange(first, max(first, min(first + GROUP, self.count)))
            lengths, frames = torch.ones_like(index), torch.zeros(len(index), 1, self.num_features)
            yield SequenceBatch(frames, lengths, names=[f"sample {i}" for i in index.tolist()], index=index)


class Predictions(Callback):
    """Writes what ``lightning predict`` makes of the test sequences, in data units, into the run's folder.

    Each task is a class of :mod:`vrnn_lightning.callbacks.tasks`, which says what its archive holds. It is written to
    ``predictions/TASK/test.npz``, codes to ``encodings.npz``.

    Every archive is a flat one: ``test_values``, ``test_lengths`` and ``test_names``. In tables a name that a
    spreadsheet would run as a formula begins with an apostrophe, which ``Tables`` removes. Beside the archive lie
    ``test.csv`` (of series, and of scores: a line for each step, with mean and quantiles where there are draws),
    ``figures.json`` where the truth is known, and, of the first ``shown`` sequences, ``test.png`` (a fan chart of draws
    of a series, nats below the sequences, a heat map of encodings) and files as the modality asks: wav of audio, svg
    and gif of pen strokes, wav and MIDI of piano rolls (the latter where mido is installed). Each of several processes
    writes ``test_0.npz`` and so on. Archives and tables of a process are written all and whole, or none, from parts on
    the disk: memory does not grow with the corpus. With ``overwrite`` they take the place of all that an earlier
    prediction of the task left; without it, the earlier answer is an error.

    Draws depend on ``seed`` and on a sequence's name alone: neither on the batch size nor on the number of
    processes. Those of ``sample`` depend on ``seed``, ``count`` and ``steps``.

    A task of your own is a subclass of :class:`~vrnn_lightning.callbacks.tasks.Task`, named by its class path.

    Args:
        task: What to make: a name from above, or the class path of a task of your own.
        count: Sequences that ``sample`` draws; default 16.
        steps: Length of a sample, default 100; how far a forecast goes, by default to the sequence's end.
        prefix: Steps that a forecast is given; -24 for all but the last 24; default: the whole sequence.
        stride: Steps from one origin to the next: forecasts of ``steps`` steps begin at ``prefix``, ``prefix + stride``
            and so on, as long as the sequence holds what comes of them; each knows all steps before it. By default
            there is one origin.
        samples: Paths of a forecast or draws of an imputation, default 100; particles that score, default 1.
        particles: That impute, default 4 times the samples.
        lag: Steps behind a gap from which it is imputed, default 32.
        hide: Share of the steps that ``impute`` hides, so that it can be judged; default 0.
        gap: Steps in a row that are hidden together; default 1.
        quantile: Of the validation steps' scores, 0.01 for example: steps of the test that score below it are flagged.
            A datamodule that knows faulty steps (``anomalies``) has precision, recall and AUROC reported.
        season: Steps of a season, for the seasonal naive forecast that a forecast is compared with; default 1.
        temperature: Of the emission in ``sample`` and ``forecast``, default 1.
        seed: Of the draws; default 0.
        shown: Sequences in the picture, and as files of their own; default 4, at most 64, 0 for none.
        options: Further options of a task of your own, by name.
        overwrite: Replace the answer of an earlier prediction of the task.

    Raises:
        UserError: An option outside its range, or of another task.
    """

    def __init__(
        self,
        task: TaskName | type[Task] = "encode",
        count: int | None = None,
        steps: int | None = None,
        prefix: int | None = None,
        stride: int | None = None,
        samples: int | None = None,
        particles: int | None = None,
        lag: int | None = None,
        hide: float | None = None,
        gap: int | None = None,
        quantile: float | None = None,
        season: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        shown: int | None = None,
        options: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in NO_OPTIONS}
        self.task = _made(task, {key: value for key, value in given.items() if value is not None} | (options or {}))
        self.overwrite = overwrite
        self.data: Any = None
        """The datamodule, where the trainer knows none: it says how to show a sequence."""
        self.path: Path | None = None
        self.figures: dict[str, dict[str, float]] = {}
        """What :class:`~vrnn_lightning.metrics.DrawScores` says, where the truth is known, of draws and a baseline."""
        self.skipped = 0
        self._writer: ArchiveWriter | None = None
        self._made: list[Path] = []  # folders that were not there before
        self._shown: list[Prediction] = []
        self._lead_times: dict[str, dict[str, Tensor]] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the archive's name; every process takes part.

        Raises:
            UserError: The folder can't be written to, or the model can't do the task.
        """
        module, task = cast(VRNNLightningModule, pl_module), self.task
        self.path = archive_path(trainer, "encodings" if task.name == "encode" else f"predictions/{task.name}/test")
        earlier = sorted(self.path.parent.glob("encodings*.npz" if task.name == "encode" else "test*.npz"))
        if earlier and not self.overwrite and not getattr(trainer, "fast_dev_run", False):
            raise UserError(f"{earlier[0]}: is an earlier answer. Fix: give --prediction.overwrite true to replace it")
        task.check(module)
        lost = torch.tensor(sum(not weights.isfinite().all() for weights in module.parameters()))
        if trainer.strategy.reduce(lost.to(module.device), reduce_op="sum"):
            raise UserError(
                f"prediction.task {task.name}: weights of this model are not numbers, its training diverged; give an "
                "earlier checkpoint as --ckpt_path"
            )
        module.is_tracing = task.needs_trace
        self.data = getattr(trainer, "datamodule", None) or self.data
        task.start(self.data)
        self._shown, self.skipped, self.figures, self._lead_times = [], 0, {}, {}
        task.scores = {name: metrics.DrawScores().to(module.device) for name in task.judges}
        missing = [folder for folder in self.path.parents if not folder.exists()]
        self._made = trainer.strategy.broadcast(missing)  # before any process makes one
        self._writer = ArchiveWriter(self.path, "test")

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what the task needs before the first batch; every process takes part."""
        self.task.prepare(cast(VRNNLightningModule, pl_module), partial(_gathered, trainer))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: SequenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Make what is asked for of a batch and put it on the disk."""
        module = cast(VRNNLightningModule, pl_module)
        assert self._writer is not None
        real: list[int] = (batch.lengths > 0).nonzero().flatten().tolist()
        with module.summon_full_params():
            for piece in self.task.make(module, batch, real, outputs):
                self._writer.add(piece.place, **piece.arrays)
                if trainer.is_global_zero and len(self._shown) < self.task.shown:
                    self._shown.append(piece)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write archive, table and media.

        Raises:
            UserError: There is nothing to write, or it can't be written.
        """
        cast(VRNNLightningModule, pl_module).is_tracing = True
        writer, task = self._writer, self.task
        assert writer is not None
        assert self.path is not None
        totals = torch.tensor([len(writer), task.skipped], device=pl_module.device)
        written, self.skipped = cast(Tensor, trainer.strategy.reduce(totals, reduce_op="sum")).tolist()
        if not written:
            raise UserError(task.why_nothing())
        self._judge(trainer)
        if getattr(trainer, "fast_dev_run", False):  # leaves nothing behind
            self._tidy()
            self.path = None
            return
        with ExitStack() as stack:  # all files or none
            if trainer.is_global_zero:
                if self._lead_times:
                    self._write_lead_times(self._replacing("lead_times.csv", stack))
                if self.figures:
                    figures_text = json.dumps(self.figures, indent=1) + "\n"
                    self._replacing("figures.json", stack).write_text(figures_text, encoding="utf-8")
            if len(writer):
                if task.has_table:
                    self._write_table(writer, self._replacing(self.path.with_suffix(".csv").name, stack))
                writer.finish()
            self._clear(trainer)
        self._tidy()
        if self._shown:
            self._show(self.path.with_suffix(".png"))

    def _judge(self, trainer: Trainer) -> None:
        """Compute the figures, of all processes."""
        task, gather = self.task, partial(_gathered, trainer)
        task.finish(gather)
        ahead = max(gather([judge.steps for judge in task.scores.values()]), default=0)
        for judge in task.scores.values():
            judge.grow(ahead)
        figures = {name: judge.compute() for name, judge in task.scores.items()}
        if len(task.judges) > 1 and figures[task.judges[0]]:  # one forecast beside another
            self._lead_times = {name: judge.by_step() for name, judge in task.scores.items()}
        self.figures = {name: {key: x.item() for key, x in found.items()} for name, found in figures.items() if found}
        self.figures |= task.figures(gather)

    def _replacing(self, name: str, stack: ExitStack) -> Path:
        """Return the temporary file of one beside the archive, which it replaces when the stack is unwound."""
        assert self.path is not None
        return stack.enter_context(replacing(self.path.with_name(name), FOLDER))

    def _clear(self, trainer: Trainer) -> None:
        """Remove what an earlier prediction of this task left, with more files or of another number of processes."""
        assert self.path is not None
        assert self._writer is not None
        stem, pair = "encodings" if self.task.name == "encode" else "test", ("npz", "csv")
        written = {self.path.name} if len(self._writer) else set()  # the others that are new are not there yet
        if trainer.is_global_zero:
            written |= {f"{stem}_{rank}.{suffix}" for rank in range(1, trainer.world_size) for suffix in pair}
            figures = "" if stem == "encodings" else r"|figures\.json|lead_times\.csv"
            ours = re.compile(rf"{stem}(_\w+)?\.(npz|csv|png|wav|mid|svg|gif){figures}")
            found = {path.name for path in self.path.parent.iterdir() if ours.fullmatch(path.name)}
        else:
            found = {f"{self.path.stem}.{suffix}" for suffix in pair}
        for name in found - written:
            self.path.with_name(name).unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Delete the parts, and folders that were made for nothing."""
        if self._writer is not None:
            self._writer.discard()
            self._writer = None
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # it holds something
                break

    def _write_lead_times(self, path: Path) -> None:
        """Write a line for each forecast and step ahead."""
        with path.open("w", newline="", encoding="utf-8") as file:
            file.write(csv_line(["forecast", "ahead", *next(iter(self._lead_times.values()))]))
            for name, figures in self._lead_times.items():
                for ahead, cells in enumerate(zip(*(x.tolist() for x in figures.values()), strict=True), 1):
                    known = ["" if np.isnan(cell) else f"{cell:.7g}" for cell in cells]
                    file.write(csv_line([name, ahead, *known]))

    def _write_table(self, writer: ArchiveWriter, path: Path) -> None:
        """Write a line for each step, sequence after sequence."""
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            for k, piece in enumerate(writer.sequences("values", "lengths", "names", *self.task.table_arrays)):
                header, cells = self.task.table(piece)
                if k == 0:
                    begin = ["origin"] if "start" in piece else []
                    file.write(csv_line(["sequence", "step", *begin, *header]))
                name = csv_line([str(piece["names"][0]), ""]).rpartition(",")[0]
                first, origin = 0, ""
                if "start" in piece:
                    first = int(piece["start"][0])
                    origin = f"{first},"
                form = ",".join(["%.7g"] * cells.shape[1])
                numbers = [form % tuple(line) for line in cells.tolist()]
                if np.isnan(cells).any():
                    numbers = [line.replace("nan", "") for line in numbers]
                file.writelines(f"{name},{t},{origin}{line}\n" for t, line in enumerate(numbers, first))

    def _show(self, path: Path) -> None:
        """Draw the first sequences, and write them as the modality asks."""
        media = Media(self.data)
        rows: Shown = {}
        for piece in self._shown:
            for name, x in piece.rows.items():
                rows.setdefault(name, []).append(x)
        rows = media.ready(rows)
        if self.task.writes_media:
            media.write(rows, path.parent, path.stem)
        save_picture(self.task.picture(self._shown, media, rows), path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        if isinstance(pl_module, VRNNLightningModule):
            pl_module.is_tracing = True
        self._tidy()


def _made(task: str | type[Task], given: dict[str, Any]) -> Task:
    """Return a task with its options.

    Raises:
        UserError: The task is unknown, or an option is outside its range or of another task.
    """
    if isinstance(task, str) and task not in TASKS:
        raise UserError(f"prediction.task {task}: choose {', '.join(TASKS)}")
    made = TASKS[task] if isinstance(task, str) else task
    for key, value in given.items():
        if key not in inspect.signature(made).parameters:
            owners = [name for name, other in TASKS.items() if key in inspect.signature(other).parameters]
            hint = f", but of {' or '.join(owners)}" if owners else ""
            raise UserError(f"prediction.{key} {value}: is not an option of the task {made.name}{hint}")
    require_options(given)
    return made(**given)


def _gathered(trainer: Trainer, mine: list[Any]) -> list[Any]:
    """Return what all processes have."""
    if trainer.world_size == 1:
        return mine
    shares: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(shares, mine)
    return [item for share in shares for item in share]
