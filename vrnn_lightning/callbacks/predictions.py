"""The callback of ``lightning predict``: it runs a task on the test sequences and writes the results as files."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
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
from vrnn_lightning.callbacks.media import Media, Shown, require_columns, save_picture
from vrnn_lightning.callbacks.tasks import TASKS, Prediction, Task
from vrnn_lightning.errors import UserError, require_at_least
from vrnn_lightning.files import csv_line, replacing
from vrnn_lightning.module import VRNNLightningModule

__all__ = ["Draws", "Predictions"]

TaskName = Literal["encode", "sample", "reconstruct", "forecast", "impute", "score"]
GROUP = 64  # sequences drawn at a time
LEAST = {"lag": 0, "shown": 0, "seed": 0} | dict.fromkeys(
    ("count", "steps", "samples", "particles", "gap", "season", "stride"), 1
)


class Draws:
    """Empty batches for a count of sequences to draw, in groups that depend on neither batch size nor processes."""

    def __init__(self, count: int, num_features: int, trainer: Trainer) -> None:
        self.count, self.num_features, self.trainer = count, num_features, trainer

    def __len__(self) -> int:
        return -(-self.count // (GROUP * self.trainer.world_size))

    def __iter__(self) -> Iterator[SequenceBatch]:
        for batch in range(len(self)):
            first = (batch * self.trainer.world_size + self.trainer.global_rank) * GROUP
            index = torch.arange(first, max(first, min(first + GROUP, self.count)))
            lengths, frames = torch.ones_like(index), torch.zeros(len(index), 1, self.num_features)
            yield SequenceBatch(frames, lengths, names=[f"sample {i}" for i in index.tolist()], index=index)


def _with_task_options(init: Callable[..., None]) -> Callable[..., None]:
    """Add the options of all tasks to a signature; ``None``, their default there, stands for the task's own default."""
    flags: dict[str, inspect.Parameter] = {}
    tasks: dict[str, dict[str, list[str]]] = {}  # those that describe an option with a text
    for name, task in TASKS.items():
        docs = "\n".join(inspect.cleandoc(base.__doc__ or "") for base in reversed(task.__mro__))
        texts = dict(re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", docs, re.MULTILINE))
        for option, parameter in inspect.signature(task, eval_str=True).parameters.items():
            flags[option] = parameter.replace(annotation=parameter.annotation | None, default=None)
            default = "" if parameter.default is None else f" Default {parameter.default}."
            tasks.setdefault(option, {}).setdefault(texts.get(option, "") + default, []).append(name)

    def build(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)

    signature = inspect.signature(init, eval_str=True)
    *own, _ = signature.parameters.values()
    vars(build)["__signature__"] = signature.replace(parameters=[*own, *flags.values()])
    build.__name__ = init.__name__
    build.__doc__ = "\nArgs:"
    for option, described in tasks.items():
        line = " ".join(f"{', '.join(names)}: {text}" for text, names in described.items())
        build.__doc__ += f"\n    {option}: {' '.join(line.split())}"
    return build


class Predictions(Callback):
    """Writes the results of a task for the test sequences, in data units, into the run's folder.

    Each task is a class of :mod:`vrnn_lightning.callbacks.tasks`; its options are options of this callback, too. The
    archive is ``predictions/TASK/test.npz``, and ``encodings.npz`` of the task ``encode``.

    Every archive is flat: ``test_values``, ``test_lengths`` and ``test_names``. In tables a name that a spreadsheet
    would run as a formula begins with an apostrophe, which ``Tables`` removes. Beside the archive lie ``test.csv`` (of
    series, and of scores: a line for each step, with mean and quantiles where there are draws), ``figures.json`` where
    the truth is known, and, of the first ``shown`` sequences, ``test.png`` (a fan chart of draws of a series, nats
    below the sequences, a heat map of encodings) and files as the modality asks: wav of audio, svg and gif of pen
    strokes, wav and MIDI of piano rolls (the latter where mido is installed). Each of several processes writes
    ``test_0.npz`` and so on. A process writes all of its archives and tables or none; they are joined from parts on
    the disk, so memory does not grow with the corpus.

    Args:
        task: Name of the task, or the class path of a subclass of :class:`~vrnn_lightning.callbacks.tasks.Task`.
        options: Options of a task of your own that no other task has, by name.
        overwrite: Replace the answer of an earlier prediction of the task, which is an error otherwise.

    Raises:
        UserError: An option is outside its range, or belongs to another task.
    """

    @_with_task_options
    def __init__(
        self,
        task: TaskName | type[Task] = "encode",
        *,
        options: dict[str, Any] | None = None,
        overwrite: bool = False,
        **flags: Any,
    ) -> None:
        self.task = _build_task(task, {k: value for k, value in flags.items() if value is not None} | (options or {}))
        self.overwrite = overwrite
        self.data: Any = None
        """The datamodule, where the trainer has none: it decides how a sequence is shown."""
        self.path: Path | None = None
        self.figures: dict[str, dict[str, float]] = {}
        """:class:`~vrnn_lightning.metrics.DrawScores` of draws and of a baseline, if the truth is known."""
        self.skipped = 0
        self._writer: ArchiveWriter | None = None
        self._new_folders: list[Path] = []
        self._shown: list[Prediction] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, task = cast(VRNNLightningModule, pl_module), self.task
        self.path = archive_path(trainer, "encodings" if task.name == "encode" else f"predictions/{task.name}/test")
        earlier = sorted(self.path.parent.glob(f"{_stem(task)}*.npz"))
        if earlier and not self.overwrite and not getattr(trainer, "fast_dev_run", False):
            raise UserError(f"{earlier[0]}: is an earlier answer. Fix: give --prediction.overwrite true to replace it")
        task.check(module)
        invalid = torch.tensor(sum(not weights.isfinite().all() for weights in module.parameters()))
        if trainer.strategy.reduce(invalid.to(module.device), reduce_op="sum"):
            raise UserError(
                f"prediction.task {task.name}: weights of this model are not numbers, its training diverged. Fix: give "
                "an earlier checkpoint as --ckpt_path"
            )
        module.is_tracing = task.needs_trace
        self.data = getattr(trainer, "datamodule", None) or self.data
        task.start(self.data)
        self._shown, self.skipped, self.figures = [], 0, {}
        task.scores = {name: metrics.DrawScores().to(module.device) for name in task.judges}
        missing = [folder for folder in self.path.parents if not folder.exists()]
        self._new_folders = trainer.strategy.broadcast(missing)  # before any process makes one
        self._writer = ArchiveWriter(self.path, "test")

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.task.prepare(cast(VRNNLightningModule, pl_module), partial(_gather, trainer))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: SequenceBatch, *_: Any, **__: Any
    ) -> None:
        module, writer = cast(VRNNLightningModule, pl_module), cast(ArchiveWriter, self._writer)
        real: list[int] = (batch.lengths > 0).nonzero().flatten().tolist()
        with module.summon_full_params():
            for piece in self.task.make(module, batch, real, outputs):
                writer.add(piece.place, **piece.arrays)
                if trainer.is_global_zero and len(self._shown) < self.task.shown:
                    self._shown.append(piece)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cast(VRNNLightningModule, pl_module).is_tracing = True
        writer, task = cast(ArchiveWriter, self._writer), self.task
        totals = torch.tensor([len(writer), task.skipped], device=pl_module.device)
        written, self.skipped = cast(Tensor, trainer.strategy.reduce(totals, reduce_op="sum")).tolist()
        if not written:
            raise UserError(task.why_nothing())
        lead_times = self._judge(partial(_gather, trainer))
        if getattr(trainer, "fast_dev_run", False):  # leaves nothing behind
            self._tidy()
            self.path = None
            return
        with ExitStack() as stack:  # all files or none

            def replacement(name: str) -> Path:
                return stack.enter_context(replacing(writer.path.with_name(name), FOLDER))

            if trainer.is_global_zero and lead_times:
                _write_lead_times(lead_times, replacement("lead_times.csv"))
            if trainer.is_global_zero and self.figures:
                figures_text = json.dumps(self.figures, indent=1) + "\n"
                replacement("figures.json").write_text(figures_text, encoding="utf-8")
            if len(writer):
                if task.has_table:
                    _write_table(task, writer, replacement(writer.path.with_suffix(".csv").name))
                writer.finish()
            self._remove_earlier(writer, trainer)
        self._tidy()
        if self._shown:
            self._show(writer.path.with_suffix(".png"))

    def _judge(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, dict[str, Tensor]]:
        """Compute the figures, and return those of each step ahead where two forecasts are compared."""
        task = self.task
        task.finish(gather)
        ahead = max(gather([judge.steps for judge in task.scores.values()]), default=0)
        for judge in task.scores.values():
            judge.grow(ahead)
        figures = {name: judge.compute() for name, judge in task.scores.items()}
        is_compared = len(task.judges) > 1 and figures[task.judges[0]]
        lead_times = {name: judge.by_step() for name, judge in task.scores.items()} if is_compared else {}
        self.figures = {name: {key: x.item() for key, x in each.items()} for name, each in figures.items() if each}
        self.figures |= task.figures(gather)
        return lead_times

    def _remove_earlier(self, writer: ArchiveWriter, trainer: Trainer) -> None:
        """Remove files of an earlier prediction of this task, which may have more files or processes."""
        folder, stem, suffixes = writer.path.parent, _stem(self.task), ("npz", "csv")
        if trainer.is_global_zero:
            of_others = {f"{stem}_{rank}.{suffix}" for rank in range(1, trainer.world_size) for suffix in suffixes}
            figures = "" if stem == "encodings" else r"|figures\.json|lead_times\.csv"
            ours = re.compile(rf"{stem}(_\w+)?\.(npz|csv|png|wav|mid|svg|gif){figures}")
            earlier = {path.name for path in folder.iterdir() if ours.fullmatch(path.name)} - of_others
        else:
            earlier = {f"{writer.path.stem}.{suffix}" for suffix in suffixes}
        for name in earlier - ({writer.path.name} if len(writer) else set()):  # the other new files come later
            (folder / name).unlink(missing_ok=True)

    def _tidy(self) -> None:
        if self._writer is not None:
            self._writer.discard()
            self._writer = None
        for folder in self._new_folders:
            try:
                folder.rmdir()
            except OSError:  # it holds something
                break

    def _show(self, path: Path) -> None:
        media = Media(self.data)
        rows: Shown = {}
        for piece in self._shown:
            for name, x in piece.rows.items():
                rows.setdefault(name, []).append(x)
        rows = media.to_display(rows)
        if self.task.writes_media:
            media.write(rows, path.parent, path.stem)
        save_picture(self.task.picture(self._shown, media, rows), path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, VRNNLightningModule):
            pl_module.is_tracing = True
        self._tidy()


def _build_task(task: str | type[Task], options: Mapping[str, Any]) -> Task:
    """Build a task; raise if it is unknown, or an option is outside its range or belongs to another task."""
    if isinstance(task, str) and task not in TASKS:
        raise UserError(f"prediction.task {task}: must be one of {', '.join(TASKS)}")
    cls = TASKS[task] if isinstance(task, str) else task
    for key, value in options.items():
        if key not in inspect.signature(cls).parameters:
            owners = [name for name, other in TASKS.items() if key in inspect.signature(other).parameters]
            fix = f"leave it out or choose {' or '.join(owners)}" if owners else "leave it out"
            raise UserError(f"prediction.{key} {value}: is not an option of the task {cls.name}. Fix: {fix}")
    require_at_least("prediction", options, LEAST)
    require_columns("prediction.shown", options.get("shown", 0))
    if not 0 < options.get("temperature", 1.0) < float("inf"):
        raise UserError(f"prediction.temperature {options['temperature']}: must be a number above 0")
    return cls(**options)


def _stem(task: Task) -> str:
    return "encodings" if task.name == "encode" else "test"


def _gather(trainer: Trainer, mine: list[Any]) -> list[Any]:
    """Return the items of all processes."""
    if trainer.world_size == 1:
        return mine
    shares: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(shares, mine)
    return [item for share in shares for item in share]


def _write_lead_times(lead_times: dict[str, dict[str, Tensor]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(csv_line(["forecast", "ahead", *next(iter(lead_times.values()))]))
        for name, figures in lead_times.items():
            for ahead, cells in enumerate(zip(*(x.tolist() for x in figures.values()), strict=True), 1):
                file.write(csv_line([name, ahead, *("" if np.isnan(cell) else f"{cell:.7g}" for cell in cells)]))


def _write_table(task: Task, writer: ArchiveWriter, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        for k, piece in enumerate(writer.sequences("values", "lengths", "names", *task.table_arrays)):
            header, cells = task.table(piece)
            has_origin = "start" in piece
            if k == 0:
                file.write(csv_line(["sequence", "step", *["origin"] * has_origin, *header]))
            name = csv_line([str(piece["names"][0]), ""]).rpartition(",")[0]
            first = int(piece["start"][0]) if has_origin else 0
            origin = f"{first}," if has_origin else ""
            form = ",".join(["%.7g"] * cells.shape[1])
            numbers = [form % tuple(line) for line in cells.tolist()]
            if np.isnan(cells).any():
                numbers = [line.replace("nan", "") for line in numbers]
            file.writelines(f"{name},{t},{origin}{line}\n" for t, line in enumerate(numbers, first))
