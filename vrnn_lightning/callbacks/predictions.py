"""What a prediction leaves behind: samples, reconstructions, forecasts, imputations, scores or encodings, as files."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor

from vrnn_lightning import metrics
from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks.archives import FOLDER, ArchiveWriter, archive_path
from vrnn_lightning.callbacks.media import Media, Shown, save_picture
from vrnn_lightning.callbacks.pictures import Fan, draw_fans, draw_heat, draw_scores, is_binary
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import csv_line, replacing
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.vrnn import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Draws", "Predictions"]

Task = Literal["encode", "sample", "reconstruct", "forecast", "impute", "score"]
COMMON: dict[str, Any] = {"seed": 0, "shown": 4}
OPTIONS: dict[str, dict[str, Any]] = {  # of each task, with their defaults
    "encode": {"shown": 4},
    "sample": {"count": 16, "steps": 100, "temperature": 1.0, **COMMON},
    "reconstruct": COMMON,
    "forecast": {
        **{"prefix": None, "steps": None, "stride": None},
        **{"samples": 100, "temperature": 1.0, "season": 1},
        **COMMON,
    },
    "impute": {"samples": 100, "particles": None, "lag": 32, "hide": 0.0, "gap": 1, **COMMON},
    "score": {"samples": 1, "quantile": None, **COMMON},
}
GROUP = 64  # sequences drawn at a time
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # the ends of the central 90 % and 50 % intervals, and the median
ROWS = 3  # paths of a forecast or an imputation that a picture shows
MOST_SHOWN = 64  # side by side they are 20,000 pixels wide
PAST = 4  # a picture shows so many times as many steps before an origin as after it


class _Found(NamedTuple):
    """What was made of one sequence.

    Args:
        place: Which sequence of the split it is.
        arrays: What the archive holds of it.
        rows: What a picture shows of it: sequences in data units, each of shape (time, features).
        fan: Of a forecast or an imputation, what a fan chart shows.
        faulty: True at steps that are known to be, shape (time,), if that is known.
    """

    place: int
    arrays: dict[str, NDArray[Any]]
    rows: dict[str, Tensor]
    fan: Fan | None = None
    faulty: Tensor | None = None


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

    ``encode``
        ``encodings.npz``: ``test_values``, means of the posteriors q(z_t | x_<=t, z_<t), shape (total steps, latent),
        sequence after sequence; ``test_elbo``, the single-sample ELBO of each in nats, in scaled units, with the
        noise that evaluation draws.
    ``sample``
        ``predictions/sample/test.npz``: sequences drawn from the model. Needs the checkpoint and no data.
    ``reconstruct``
        ``predictions/reconstruct/test.npz``: the emission's mean at each step, with the latents inferred.
    ``score``
        ``predictions/score/test.npz``: nats of each step in data units, shape (total steps, 1); with ``quantile`` also
        ``test_flagged``, True at steps below that quantile of the validation steps' scores and at those whose score
        is not a number, shape (total steps,).
    ``forecast``
        ``predictions/forecast/test.npz``: ``samples`` paths of each sequence, one after another; ``test_start``, the
        step that each path begins at; ``test_truth``, what came, NaN where that is not known, of shape (total steps of
        one path each, features). With ``stride`` a backtest over rolling origins: the forecasts of a sequence's
        origins follow one another, each as if it were a sequence of that name. Beside them lies ``lead_times.csv``:
        for each step ahead the figures of :class:`~vrnn_lightning.metrics.DrawScores`, and those of the seasonal
        naive forecast, of all processes.
    ``impute``
        ``predictions/impute/test.npz``: ``samples`` copies of each sequence, one after another, with what was missing
        drawn; ``test_drawn``, True where it was; ``test_truth``, the data, NaN where they miss a value.

    Every archive is a flat one: ``test_values``, ``test_lengths`` and ``test_names``. In tables a name that a
    spreadsheet would run as a formula begins with an apostrophe, which ``Tables`` removes. Beside the archive lie
    ``test.csv`` (of series, and of scores: a line for each step, with mean and quantiles where there are draws),
    ``figures.json`` where the truth is known, and, of the first ``shown`` sequences, ``test.png`` (a fan chart of draws
    of a series, nats below the sequences, a heat map of encodings) and files as the modality asks: wav of audio, svg
    and gif of pen strokes, wav and MIDI of piano rolls (the latter where mido is installed). Each of several processes
    writes ``test_0.npz`` and so on. Archives and tables of a process are written all and whole, or none, from parts on
    the disk: memory does not grow with the corpus. They take the place of all that an earlier prediction of the task
    left.

    Draws depend on ``seed`` and on a sequence's name alone: neither on the batch size nor on the number of
    processes. Those of ``sample`` depend on ``seed``, ``count`` and ``steps``.

    Args:
        task: What to make.
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

    Raises:
        UserError: An option outside its range, or of another task.
    """

    def __init__(
        self,
        task: Task = "encode",
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
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "task") and value is not None}
        given.pop("__class__", None)
        if task not in OPTIONS:
            raise UserError(f"prediction.task {task}: choose {', '.join(OPTIONS)}")
        for key, value in given.items():
            if key not in OPTIONS[task]:
                owners = " or ".join(name for name, options in OPTIONS.items() if key in options)
                raise UserError(f"prediction.{key} {value}: is not an option of the task {task}, but of {owners}")
        self.task = task
        self.options = OPTIONS[task] | given
        self._check()
        self.data: Any = None
        """The datamodule, where the trainer knows none: it says how to show a sequence."""
        self.path: Path | None = None
        self.figures: dict[str, dict[str, float]] = {}
        """What :class:`~vrnn_lightning.metrics.DrawScores` says, where the truth is known, of draws and a baseline."""
        self.skipped = 0
        self._writer: ArchiveWriter | None = None
        self._made: list[Path] = []  # folders that were not there before
        self._shown: list[_Found] = []
        self._longest = 0
        self._seasons = 0  # forecasts whose past is a season long
        self._hides = 0  # steps
        self._lead_times: dict[str, dict[str, Tensor]] = {}
        self.threshold: float | None = None
        """Nats below which steps are flagged."""
        self._judges: dict[str, metrics.DrawScores] = {}
        self._labelled: list[tuple[Tensor, Tensor]] = []  # nats of steps, and which are known to be faulty

    def _check(self) -> None:
        least = {
            "count": 1,
            "samples": 1,
            "particles": 1,
            "lag": 0,
            "gap": 1,
            "season": 1,
            "stride": 1,
            "shown": 0,
            "seed": 0,
            "steps": 1,
        }
        for key, low in least.items():
            value = self.options.get(key)
            if value is not None and value < low:
                raise UserError(f"prediction.{key} {value}: must be at least {low}")
        if self.options.get("shown", 0) > MOST_SHOWN:
            raise UserError(f"prediction.shown {self.options['shown']}: a picture has room for {MOST_SHOWN} sequences")
        if not 0 < self.options.get("temperature", 1.0) < math.inf:
            raise UserError(f"prediction.temperature {self.options['temperature']}: must be a number above 0")
        quantile = self.options.get("quantile")
        if quantile is not None and not 0 < quantile < 1:
            raise UserError(f"prediction.quantile {quantile}: must lie between 0 and 1")
        if not 0 <= self.options.get("hide", 0.0) < 1:
            raise UserError(f"prediction.hide {self.options['hide']}: must be at least 0 and below 1")
        particles, samples = self.options.get("particles"), self.options.get("samples")
        if particles is not None and particles < samples:
            raise UserError(f"prediction.particles {particles}: must be at least prediction.samples {samples}")
        if self.options.get("prefix") == 0:
            raise UserError("prediction.prefix 0: an empty prefix; the task sample starts from nothing")
        stride = self.options.get("stride")
        for key, meaning in (("steps", "how far each forecast goes"), ("prefix", "where the first begins")):
            if stride is not None and self.options[key] is None:
                raise UserError(f"prediction.stride {stride}: needs prediction.{key}, {meaning}")
        if self.task == "forecast" and self.options["steps"] is None and self.options["prefix"] is None:
            raise UserError(
                "prediction.steps: how far is the forecast to go? Or give prediction.prefix to forecast what follows it"
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the archive's name; every process takes part.

        Raises:
            UserError: The folder can't be written to, or the model can't do the task.
        """
        module = cast(VRNNLightningModule, pl_module)
        name = "encodings" if self.task == "encode" else f"predictions/{self.task}/test"
        self.path = archive_path(trainer, name)
        if self.task == "sample" and not module.is_initialized:
            raise UserError(
                "prediction.task sample: this model has no scaler, as it was never trained; give --ckpt_path"
            )
        lost = torch.tensor(sum(not weights.isfinite().all() for weights in module.parameters()))
        if trainer.strategy.reduce(lost.to(module.device), reduce_op="sum"):
            raise UserError(
                f"prediction.task {self.task}: weights of this model are not numbers, its training diverged; give an "
                "earlier checkpoint as --ckpt_path"
            )
        if self.task == "sample" and module.vrnn.num_inputs:
            raise UserError(
                f"prediction.task sample: the model reads {module.vrnn.num_inputs} covariates at each step, which are "
                "not known here; choose the task forecast, or call `module.sample(inputs=…)`"
            )
        module.is_tracing = self.task == "encode"
        self.data = getattr(trainer, "datamodule", None) or self.data
        self._shown, self._longest, self._seasons, self._hides, self.skipped = [], 0, 0, 0, 0
        self.figures, self._lead_times = {}, {}
        judged = {"forecast": ("forecast", "seasonal naive"), "impute": ("imputation",)}.get(self.task, ())
        self._judges = {name: metrics.DrawScores().to(module.device) for name in judged}
        missing = [folder for folder in self.path.parents if not folder.exists()]
        self._made = trainer.strategy.broadcast(missing)  # before any process makes one
        self._writer = ArchiveWriter(self.path, "test")

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the scores below which steps are flagged, where that is asked for; every process takes part."""
        self.threshold, self._labelled = None, []
        if self.options.get("quantile") is None:
            return
        module = cast(VRNNLightningModule, pl_module)
        self.data.setup("validate")
        with module.summon_full_params():
            batches = (
                (batch, (batch.lengths > 0).nonzero().flatten().tolist()) for batch in self.data.val_dataloader()
            )
            scores = [nats.cpu() for batch, real in batches for nats in self._scores(module, batch, real)]
        every = torch.cat(_gathered(trainer, scores)).double().numpy()
        every = every[np.isfinite(every)]
        if not len(every):
            raise UserError(f"prediction.quantile {self.options['quantile']}: no validation step has a finite score")
        self.threshold = float(np.quantile(every, self.options["quantile"]))

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
        real = _real(batch)
        with module.summon_full_params():
            found = getattr(self, f"_{self.task}")(module, batch, real, outputs)
            for piece in found:
                self._writer.add(piece.place, **piece.arrays)
                if trainer.is_global_zero and len(self._shown) < self.options.get("shown", 0):
                    self._shown.append(piece)

    def _encode(
        self, module: VRNNLightningModule, batch: SequenceBatch, real: list[int], trace: Trace
    ) -> Iterator[_Found]:
        means = trace.z if trace.posterior is None else trace.posterior.mean
        elbo = trace.log_px.sum(1) - trace.kl.sum((1, 2))
        for i in real:
            own, rows = means[i, : batch.lengths[i]], {"real": self._truth(module, batch, i)}
            yield self._one(batch, i, own, rows, elbo=elbo[i : i + 1].double().cpu().numpy())

    def _sample(self, module: VRNNLightningModule, batch: SequenceBatch, real: list[int], _: Any) -> Iterator[_Found]:
        if real:
            seed = self._seed(batch, 0)
            drawn = module.sample(len(real), self.options["steps"], self.options["temperature"], seed=seed)
            for i in real:
                yield self._one(batch, i, drawn[i], {"sampled": drawn[i]})

    def _reconstruct(
        self, module: VRNNLightningModule, batch: SequenceBatch, real: list[int], _: Any
    ) -> Iterator[_Found]:
        if real:
            seen = "reconstructed" if module.vrnn.latent_size else "predicted"
            for i, mean in zip(real, module.reconstruct(batch.rows(real), seed=self.options["seed"]), strict=True):
                yield self._one(batch, i, mean, {"real": self._truth(module, batch, i), seen: mean})

    def _scores(self, module: VRNNLightningModule, batch: SequenceBatch, real: list[int]) -> list[Tensor]:
        if self.options["samples"] == 1 and real:
            return module.score(batch.rows(real), seed=self.options["seed"])
        # particles draw together: one sequence at a time
        return [module.score(batch.rows([i]), self.options["samples"], seed=self._seed(batch, i))[0] for i in real]

    def _score(self, module: VRNNLightningModule, batch: SequenceBatch, real: list[int], _: Any) -> Iterator[_Found]:
        known = getattr(self.data, "anomalies", None)
        faulty = known(batch) if known is not None and self.threshold is not None else None
        for i, nats in zip(real, self._scores(module, batch, real), strict=True):
            more = {} if self.threshold is None else {"flagged": metrics.below(nats, self.threshold).cpu().numpy()}
            wrong = None if faulty is None else faulty[i, : len(nats)].cpu()
            if wrong is not None:
                self._labelled.append((nats.cpu(), wrong))
            rows = {"real": self._truth(module, batch, i)}
            yield self._one(batch, i, nats[:, None], rows, **more)._replace(faulty=wrong)

    def _origins(self, length: int) -> list[int]:
        """Return the steps of a sequence that its forecasts begin at."""
        prefix, steps, stride = (self.options[key] for key in ("prefix", "steps", "stride"))
        first = length if prefix is None else prefix if prefix > 0 else length + prefix
        if not 0 < first <= length or (steps is None and first == length):
            return []
        return [first] if stride is None else list(range(first, length - steps + 1, stride))

    def _forecast(self, module: VRNNLightningModule, batch: SequenceBatch, real: list[int], _: Any) -> Iterator[_Found]:
        samples, season = self.options["samples"], self.options["season"]
        for i in real:
            length = int(batch.lengths[i])
            self._longest = max(self._longest, length)
            row = batch.rows([i])
            origins = [origin for origin in self._origins(length) if row.window(0, origin).valid_mask.any()]
            if not origins:
                self.skipped += 1
                continue
            steps = self.options["steps"] or length - origins[0]
            if module.vrnn.num_inputs and origins[-1] + steps > length:
                raise UserError(
                    f"{self._name(batch, i)}: the model reads covariates, which the data hold for {length} steps; "
                    f"{steps} steps after {origins[-1]} need more; give a smaller prediction.steps or prediction.prefix"
                )
            known = self._truth(module, batch, i)
            options = (steps, samples, self.options["temperature"])
            drawn = module.backtest(row, origins, *options, seed=self._seed(batch, i))
            for start, each in zip(origins, drawn, strict=True):
                paths = each[:, 0]
                past, truth = known[:start].to(paths), torch.full_like(paths[0], torch.nan)
                truth[: length - start] = known[start : start + steps].to(truth)
                naive, scale = metrics.seasonal_naive(past, steps, season)
                self._seasons += start >= season
                self._judges["forecast"].update(paths, truth, scale)
                self._judges["seasonal naive"].update(naive[None], truth.masked_fill(naive.isnan(), torch.nan), scale)
                late = past[-PAST * steps :]
                shown = {f"path_{k + 1}": torch.cat([late, p]) for k, p in enumerate(paths[:ROWS])}
                rows = {"real": torch.cat([late, truth[: length - start]]), **shown}
                more = {"truth": _numbers(truth), "start": np.full(samples, start)}
                fan = Fan(late, paths, truth, start - len(late), start)
                yield self._one(batch, i, paths, rows, **more)._replace(fan=fan)

    def _impute(self, module: VRNNLightningModule, batch: SequenceBatch, real: list[int], _: Any) -> Iterator[_Found]:
        samples, particles, lag = (self.options[key] for key in ("samples", "particles", "lag"))
        for i in real:
            row = batch.rows([i])
            truth = self._truth(module, batch, i)
            hidden = self._hidden(self._seed(batch, i), row.x.shape[1])
            self._hides += int(hidden.sum())
            seen = row.valid_mask & ~hidden.to(row.x.device)[None, :, None]
            self._longest = max(self._longest, row.x.shape[1])
            if not seen.any():
                self.skipped += 1
                continue
            row.x, row.observed = row.x.masked_fill(~seen, 0.0), seen
            drawn = module.impute(row, samples, particles, lag, seed=self._seed(batch, i))[0]
            open_ = ~seen[0]
            self._judges["imputation"].update(drawn, truth.to(drawn).masked_fill(~open_, torch.nan))
            shown = {f"imputed_{k + 1}": path for k, path in enumerate(drawn[:ROWS])}
            given = truth.masked_fill(open_, torch.nan)
            more = {"truth": _numbers(truth), "drawn": open_.cpu().numpy()}
            rows = {"real": truth, "given": given, **shown}
            fan = Fan(given, drawn, truth.masked_fill(~open_, torch.nan), 0, 0)
            yield self._one(batch, i, drawn, rows, **more)._replace(fan=fan)

    def _hidden(self, seed: int, steps: int) -> Tensor:
        """Return which steps of a sequence are hidden, shape (steps,): the share that was asked for, in whole gaps."""
        gap = self.options["gap"]
        blocks = -(-steps // gap)
        count = round(self.options["hide"] * steps / gap)
        count = min(max(count, 1), blocks - 1) if self.options["hide"] else 0
        chosen = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)) < count
        return chosen.repeat_interleave(gap)[:steps]

    def _one(
        self, batch: SequenceBatch, i: int, values: Tensor, rows: dict[str, Tensor], **more: NDArray[Any]
    ) -> _Found:
        """Return what was made of a sequence: values of shape (time, features), or draws with one dimension before."""
        draws = values[None] if values.ndim == 2 else values
        index = 0 if batch.index is None else int(batch.index[i])
        arrays = {
            "values": _numbers(draws.flatten(0, 1)),
            "lengths": np.full(len(draws), draws.shape[1]),
            "names": np.array([self._name(batch, i)] * len(draws), str),
        }
        return _Found(index, arrays | more, rows)

    @staticmethod
    def _name(batch: SequenceBatch, i: int) -> str:
        return batch.names[i] if batch.names else ""

    def _seed(self, batch: SequenceBatch, i: int) -> int:
        """Return the seed of a sequence's draws."""
        words = f"{self.options['seed']} {self.task} {self._name(batch, i)}"
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest())

    @staticmethod
    def _truth(module: VRNNLightningModule, batch: SequenceBatch, i: int) -> Tensor:
        """Return a sequence in data units, NaN where a value is missing, shape (time, features)."""
        length = int(batch.lengths[i])
        return module.scaler.unscale(batch.x[i, :length]).masked_fill(~batch.valid_mask[i, :length], torch.nan)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write archive, table and media.

        Raises:
            UserError: There is nothing to write, or it can't be written.
        """
        cast(VRNNLightningModule, pl_module).is_tracing = True
        writer = self._writer
        assert writer is not None
        assert self.path is not None
        totals = torch.tensor([len(writer), self.skipped], device=pl_module.device)
        written, self.skipped = cast(Tensor, trainer.strategy.reduce(totals, reduce_op="sum")).tolist()
        if not written:
            raise UserError(self._nothing())
        if self.task == "forecast":
            self._refuse_season(trainer)
        if self.options.get("hide"):
            self._refuse_gap(trainer)
        ahead = max(_gathered(trainer, [judge.steps for judge in self._judges.values()]), default=0)
        for judge in self._judges.values():
            judge.grow(ahead)
        figures = {name: judge.compute() for name, judge in self._judges.items()}  # of all processes
        if self.task == "forecast" and figures["forecast"]:
            self._lead_times = {name: judge.by_step() for name, judge in self._judges.items()}
        self.figures = {name: {key: x.item() for key, x in found.items()} for name, found in figures.items() if found}
        labelled = [] if self.threshold is None else _gathered(trainer, self._labelled)
        if self.threshold is not None and labelled:
            detection = metrics.Detection(sync_on_compute=False)
            for nats, faulty in labelled:
                detection.update(nats, faulty, self.threshold)
            self.figures["detection"] = {key: x.item() for key, x in detection.compute().items()}
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
                if self.task == "score" or (self.task != "encode" and self._modality == "series"):
                    self._write_table(writer, self._replacing(self.path.with_suffix(".csv").name, stack))
                writer.finish()
            self._clear(trainer)
        self._tidy()
        if self._shown:
            self._show(self.path.with_suffix(".png"))

    def _replacing(self, name: str, stack: ExitStack) -> Path:
        """Return the temporary file of one beside the archive, which it replaces when the stack is unwound."""
        assert self.path is not None
        return stack.enter_context(replacing(self.path.with_name(name), FOLDER))

    def _clear(self, trainer: Trainer) -> None:
        """Remove what an earlier prediction of this task left, with more files or of another number of processes."""
        assert self.path is not None
        assert self._writer is not None
        stem, pair = "encodings" if self.task == "encode" else "test", ("npz", "csv")
        written = {self.path.name} if len(self._writer) else set()  # the others that are new are not there yet
        if trainer.is_global_zero:
            written |= {f"{stem}_{rank}.{suffix}" for rank in range(1, trainer.world_size) for suffix in pair}
            figures = "" if self.task == "encode" else r"|figures\.json|lead_times\.csv"
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

    def _refuse_season(self, trainer: Trainer) -> None:
        """Raise if no forecast's past is a season long: there is nothing to compare with."""
        long_enough, longest = zip(*_gathered(trainer, [(self._seasons, self._longest)]), strict=True)
        if not sum(long_enough):
            raise UserError(
                f"prediction.season {self.options['season']}: is longer than the past of every forecast, of sequences "
                f"of at most {max(longest)} steps; give a smaller one, or a larger prediction.prefix"
            )

    def _refuse_gap(self, trainer: Trainer) -> None:
        """Raise if no sequence has room for a gap: nothing would be hidden."""
        hides, longest = zip(*_gathered(trainer, [(self._hides, self._longest)]), strict=True)
        if not sum(hides):
            raise UserError(
                f"prediction.gap {self.options['gap']}: leaves nothing of the longest sequence, which has "
                f"{max(longest)} steps, to impute from; give a smaller one"
            )

    def _nothing(self) -> str:
        if self.task == "forecast" and self.options["prefix"] is not None:
            prefix = self.options["prefix"]
            return (
                f"prediction.prefix {prefix}: no test sequence has something to forecast from and to, the longest has "
                f"{self._longest} steps; give another prefix, or prediction.steps"
            )
        return f"prediction.task {self.task}: no test sequence has an observed value to start from"

    @property
    def _modality(self) -> str:
        return str(getattr(self.data, "modality", "series"))

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
            judged = self.task in ("forecast", "impute")
            more = {"forecast": ["truth", "start"], "impute": ["truth"]}.get(self.task, [])
            if self.threshold is not None:
                more = ["flagged"]
            for k, piece in enumerate(writer.sequences("values", "lengths", "names", *more)):
                draws = piece["values"].reshape(len(piece["lengths"]), -1, piece["values"].shape[1])
                columns = self._columns(draws.shape[2])
                if judged:
                    marks = [f"q{100 * q:02.0f}" for q in QUANTILES]
                    parts = [draws.mean(0), *np.quantile(draws, QUANTILES, axis=0), piece["truth"]]
                    header = [f"{column}_{mark}" for column in columns for mark in ("mean", *marks, "true")]
                    cells = np.stack(parts, -1).reshape(draws.shape[1], -1)
                else:
                    header, cells = columns, draws[0]
                if "flagged" in piece:
                    header, cells = [*header, "flagged"], np.column_stack([cells, piece["flagged"]])
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

    def _columns(self, width: int) -> list[str]:
        if self.task == "score":
            return ["nats"]
        names = [str(name) for name in getattr(self.data, "columns", None) or []]
        return names if len(names) == width else [f"x{i}" for i in range(width)]

    def _show(self, path: Path) -> None:
        """Draw the first sequences, and write them as the modality asks."""
        media = Media(self.data)
        rows: Shown = {}
        for piece in self._shown:
            for name, x in piece.rows.items():
                rows.setdefault(name, []).append(x)
        rows = media.ready(rows)
        if self.task in ("sample", "reconstruct", "forecast", "impute"):
            media.write(rows, path.parent, path.stem)
        save_picture(self._picture(media, rows), path)

    def _picture(self, media: Media, rows: Shown) -> Figure:
        """Draw what is to be shown."""
        values = [torch.from_numpy(piece.arrays["values"]) for piece in self._shown]
        titles = [str(piece.arrays["names"][0]) for piece in self._shown]
        if self.task == "score":
            faulty = [piece.faulty for piece in self._shown if piece.faulty is not None] or None
            nats = [x[:, 0] for x in values]
            return draw_scores(rows["real"], nats, self.threshold, faulty, media.modality, media.sample_rate, titles)
        if self.task == "encode" and values[0].shape[1]:
            names = [f"z{d}" for d in range(values[0].shape[1])]
            return draw_heat(values, names, "posterior mean", rows["real"], media.modality, media.sample_rate, titles)
        fans = [piece.fan for piece in self._shown if piece.fan is not None]
        if fans and media.modality == "series" and not is_binary(rows["real"]):
            return draw_fans(fans, self._columns(fans[0].draws.shape[2]), titles)
        return media.draw(rows, titles)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        if isinstance(pl_module, VRNNLightningModule):
            pl_module.is_tracing = True
        self._tidy()


def _real(batch: SequenceBatch) -> list[int]:
    """Return the rows of a batch that have a step."""
    rows: list[int] = (batch.lengths > 0).nonzero().flatten().tolist()
    return rows


def _gathered(trainer: Trainer, mine: list[Any]) -> list[Any]:
    """Return what all processes have."""
    if trainer.world_size == 1:
        return mine
    shares: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(shares, mine)
    return [item for share in shares for item in share]


def _numbers(x: Tensor) -> NDArray[Any]:
    return x.detach().float().cpu().numpy()
