"""Handwriting and drawings: pen strokes as offsets from point to point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from vrnn_lightning.batch import SequenceSample
from vrnn_lightning.data import (
    ArchiveSplit,
    AugmentedSequences,
    FileDataModule,
    InvalidFiles,
    Modality,
    RandomSplitDataModule,
    RandomSplits,
    Scaler,
    Sequences,
    Split,
    files_below,
    quickdraw_lines,
    read_archive,
    read_iam,
    read_inkml,
    read_quickdraw,
    read_sketch_rnn,
    require,
    smooth_rows,
    tracked,
)
from vrnn_lightning.data.archives import opened_archive
from vrnn_lightning.data.folders import SPLIT_NAMES
from vrnn_lightning.data.ink import LISTS, SECOND, FormList, check_sketch, read_form_lists
from vrnn_lightning.errors import UserError

__all__ = ["Handwriting"]

SUFFIXES = {"iam": ".xml", "quickdraw": ".ndjson", "inkml": ".inkml"}
READABLE = (
    "an .npz archive with train_values (flat) or train (sketch-rnn), .ndjson files (QuickDraw), .inkml files, "
    "or lineStrokes/**/*.xml (IAM-OnDB)"
)
Reader = tuple[str, Callable[[], "NDArray[Any]"]]
"""A drawing's name, and the function that reads it."""


class Handwriting(RandomSplitDataModule, FileDataModule):
    r"""Pen strokes: rows (dx, dy, lift), as in Chung et al. (2015, arXiv 1506.02216).

    A row is the pen's offset from the last point, and lift is 1 where the pen leaves the paper after this point, else
    0; y grows downward, as in all the formats below. One mean and one standard deviation, taken over dx and dy of the
    training rows together, scale both, which keeps the shape of a letter; lift stays as it is, for its likelihood is a
    mass.

    ===========  ==========================================================  =========================================
    ``layout``   ``root``                                                    splits
    ===========  ==========================================================  =========================================
    archive      an ``.npz`` file of ``{split}_values`` (total steps, 3) and  its own: train, valid, test
                 ``{split}_lengths`` (sequences,)
    sketch-rnn   an ``.npz`` file of object arrays, a drawing (steps, 3)      its own: train, valid, test
                 each; nothing that their pickles name is run
    quickdraw    an ``.ndjson`` file, or a folder of them                     drawn, by ``val``, ``test`` and ``seed``
    inkml        a folder of ``.inkml`` files, a sequence each                drawn, in the same way
    iam          a folder with ``lineStrokes/**/*.xml``, a line each, and     the forms of ``trainset.txt``,
                 the lists of the official task t1 anywhere in it             ``testset_v.txt``, ``testset_f.txt``
    ===========  ==========================================================  =========================================

    In the last three a drawing is given as points; rows begin with its second point, the first being their origin.
    Drawings without a line are left out, and so are dots before the first line.

    Splits that are drawn travel in the checkpoint by name, so a drawing that was trained on is never tested; of data
    that the checkpoint does not know, everything is the test split.

    Args:
        root: The file or folder. It may lie elsewhere when a checkpoint is used again.
        max_steps: The longest sequence of the training split, where a few long ones would make batches large.
            Validation and test keep all of theirs, so that figures compare. ``None`` has no limit.
        too_long: "drop" leaves longer ones out; "split" cuts them into as few pieces as it takes, of like length, each
            of which starts from a fresh state.
        layout: The format of ``root``; "auto" finds it.
        val: Fraction of the drawings for validation, where the layout brings no splits; at least one unless it is 0.
        test: Fraction for the test split.
        testset_t: The use of the second validation set of task t1 (iam): none, or as a part of a split.
        skip_bad: Skip and count invalid files (iam, inkml) or drawings (quickdraw, sketch-rnn) instead of stopping at
            the first. A flat archive is good or bad as a whole.
        clip: Bound dx and dy to this many data units in every split: jumps of a faulty pen, or between far lines.
            ``None`` leaves them.
        scale: "shared" scales dx and dy by one mean and standard deviation, "per_axis" each by its own, "none" not.
        smooth: Replace each point by the mean of this odd number of points around it, fewer near the ends of its
            stroke, which keep their places; 1 leaves all points.
        augment: In each epoch, stretch each training sequence by one random factor for dx and one for dy, uniform
            between 1 - ``augment`` and 1 + ``augment``. The scaler is that of the sequences as they are.
        batch_size: Sequences per batch and process.
        download: Fetch Omniglot's strokes as an archive, where ``root`` does not exist yet.
        options: The other options of ``FileDataModule``.

    Raises:
        UserError: An option outside its range. From ``setup`` on: the data are missing, damaged, in none of these
            formats or in several, a lift is neither 0 nor 1, a list names only forms that are missing, or all training
            sequences are longer than ``max_steps``.

    >>> Handwriting("kanji.npz").num_features
    3
    """

    modality: ClassVar[Modality] = "strokes"
    run_options: ClassVar[frozenset[str]] = FileDataModule.run_options | {"layout", "skip_bad", "download"}
    dataset: ClassVar[str] = "omniglot"

    def __init__(
        self,
        root: str,
        max_steps: int | None = None,
        too_long: Literal["drop", "split"] = "drop",
        layout: Literal["auto", "archive", "sketch-rnn", "quickdraw", "inkml", "iam"] = "auto",
        val: float = 0.1,
        test: float = 0.1,
        testset_t: Literal["none", "train", "val", "test"] = "none",
        skip_bad: bool = False,
        clip: float | None = None,
        scale: Literal["shared", "per_axis", "none"] = "shared",
        smooth: int = 1,
        augment: float = 0.0,
        batch_size: int = 64,
        *,
        download: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(root, num_features=3, batch_size=batch_size, **options)
        self.max_steps = require("max_steps", max_steps, 1)
        if clip is not None and not 0 < clip < math.inf:
            raise UserError(f"--data.clip {clip}: must be positive, in data units")
        if not 1 <= smooth < 2**31 or smooth % 2 == 0:
            raise UserError(f"--data.smooth {smooth}: must be an odd number of points, at least 1 and below 2^31")
        self.too_long, self.layout, self.testset_t, self.skip_bad = too_long, layout, testset_t, skip_bad
        self.clip, self.scale, self.smooth, self.augment = clip, scale, smooth, require("augment", augment, 0, below=1)
        self._random_splits = RandomSplits(val, test, self.seed)

    @property
    def pen_starts_down(self) -> bool:
        """True where the pen touches the paper at the origin, so that the first row draws a line."""
        return self._layout not in ("archive", "sketch-rnn")

    def sequences(self, split: Split) -> Sequences:
        """Return the strokes of a split, each of shape (steps, 3)."""
        strokes = self._edit(self._read(split), split)
        if split != "train":
            return strokes
        short = self._shorten(strokes)
        return _Stretched(sequences=short, seed=self.seed, amount=self.augment) if self.augment else short

    def fit_scaler(self) -> Scaler:
        """Fit mean and std of dx and dy, shared or not, on the training rows; lift is left alone."""
        if self.scale == "none":
            return Scaler()
        train = self.split("train")
        train = train.sequences if isinstance(train, _Stretched) else train
        assert isinstance(train, ArchiveSplit)
        offsets = train.rows()[:, :2].astype(np.float64)
        offsets = offsets.reshape(-1, 1) if self.scale == "shared" else offsets
        if not offsets.size:
            return Scaler(torch.zeros(3).double(), torch.ones(3).double())
        mean, std = (torch.from_numpy(moment).expand(2) for moment in (offsets.mean(0), offsets.std(0)))
        return Scaler.from_moments(mean, std, unscaled=1)

    def _edit(self, strokes: ArchiveSplit, split: Split) -> ArchiveSplit:
        exact = np.result_type(strokes.values.dtype, np.float32)
        if self.smooth > 1:
            values = strokes.values.astype(exact)
            for start, end in strokes.bounds:
                values[start:end] = smooth_rows(strokes.values[start:end], self.smooth, self.pen_starts_down)
            strokes = replace(strokes, values=values)
        if self.clip is None or not (far := np.abs(strokes.values[:, :2]) > self.clip).any():
            return strokes
        rank_zero_info(
            f"{self.root}: {far.sum()} of {far.size} offsets of the {split} split are cut to {self.clip} (--data.clip)"
        )
        values = strokes.values.astype(exact)
        values[:, :2] = values[:, :2].clip(-self.clip, self.clip)
        return replace(strokes, values=values)

    def _shorten(self, strokes: ArchiveSplit) -> ArchiveSplit:
        if self.max_steps is None:
            return strokes
        kept = strokes.no_longer_than(self.max_steps)
        longer = len(strokes) - len(kept)
        problem = f"{self.root}: {longer} of {len(strokes)} training sequences are longer than {self.max_steps} steps"
        if self.too_long == "split" and longer:
            pieces = strokes.in_pieces(self.max_steps)
            rank_zero_info(f"{problem} and are cut into {len(pieces) - len(kept)} pieces (--data.too_long split)")
            return pieces
        if len(kept) == 0 < len(strokes):
            raise UserError(
                f"--data.max_steps {self.max_steps}: all training sequences of {self.root} are longer, "
                f"the shortest has {min(strokes.lengths)} steps. Fix: raise it or set --data.too_long split"
            )
        if longer:
            rank_zero_info(f"{problem} and are left out (--data.too_long drop)")
        return kept

    @cached_property
    def _layout(self) -> str:
        return _find_layout(self.root) if self.layout == "auto" else self.layout

    @property
    def random_splits(self) -> RandomSplits | None:
        """The random splits of QuickDraw's files and InkML's; ``None`` for formats with splits of their own."""
        return self._random_splits if self._layout in ("quickdraw", "inkml") else None

    def _read(self, split: Split) -> ArchiveSplit:
        name = SPLIT_NAMES[split][0]
        if self._layout == "archive":
            flat = read_archive(self.root, split, 3, max_gb=self.max_gb)
            wrong = (flat.values != 0) & (flat.values != 1)
            wrong[:, :2] = False
            flat.raise_if(wrong, "write rows (dx, dy, lift) whose lift is 0 or 1")
            return flat
        if self._layout == "sketch-rnn":
            drawings = enumerate(read_sketch_rnn(self.root, name, self.max_gb))
            readers = ((f"{name} {i}", partial(check_sketch, f"{self.root}: {name} {i}", rows)) for i, rows in drawings)
            return self._collect(readers, name, f"drawings of {name}")
        if self._layout == "iam":
            return self._collect(self._readers(self._iam_files(split)), name, "files")
        names = self._random_splits.names(split, self.sizes, self.root)  # of valid drawings
        places = {name: place for place, name in enumerate(self._drawings.names or [])}
        return self._drawings.take(np.array([places[name] for name in names], dtype=np.int64))

    @cached_property
    def _drawings(self) -> ArchiveSplit:
        """All drawings whose split is drawn, those of QuickDraw's files or an InkML file each."""
        noun = "files" if self._layout == "inkml" else "drawings"
        return self._collect(self._readers(self._files), "drawing", noun)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The rows of all sequences whose split is drawn, by name."""
        return dict(zip(self._drawings.names or [], self._drawings.lengths, strict=True))

    def _readers(self, files: dict[str, Path]) -> Iterator[Reader]:
        if self._layout == "quickdraw":
            for file, path in files.items():
                for name, number, line in tracked(list(quickdraw_lines(path, file)), f"reading {file}"):
                    yield name, partial(read_quickdraw, path, number, line)
            return
        read = read_inkml if self._layout == "inkml" else read_iam
        for name in tracked(list(files), f"reading {self.root.name}"):
            yield name, partial(read, files[name])

    def _collect(self, readers: Iterable[Reader], word: str, noun: str) -> ArchiveSplit:
        rows = InvalidFiles(self.skip_bad).read_all(readers, self.root, noun)
        kept = {name: x for name, x in rows.items() if len(x)}
        if len(kept) < len(rows):
            empty = len(rows) - len(kept)
            rank_zero_info(f"{self.root}: {empty} of {len(rows)} drawings ({word}) hold no line, left out")
        values = np.concatenate(list(kept.values())) if kept else np.zeros((0, 3), dtype=np.float32)
        lengths = np.array([len(x) for x in kept.values()], dtype=np.int64)
        return ArchiveSplit.join(self.root, word, word, values, lengths, list(kept))

    @cached_property
    def _files(self) -> dict[str, Path]:
        if not self.root.exists():
            raise UserError(f"--data.root {self.root}: no such file or folder. Fix: check the path")
        if self.root.is_file() and self._layout == "iam":
            raise UserError(
                f"--data.root {self.root}: is a file. Fix: give the folder that holds lineStrokes and the lists"
            )
        if self.root.is_file():
            return {self.root.name: self.root}
        files = _of_layout(files_below(self.root), self._layout)
        if not files:
            wanted = "lineStrokes/**/*.xml" if self._layout == "iam" else f"*{SUFFIXES[self._layout]}"
            raise UserError(
                f"--data.root {self.root}: holds no {wanted}. Fix: check the path and --data.layout {self._layout}"
            )
        return {path.relative_to(self.root).as_posix(): path for path in files}

    def _iam_files(self, split: Split) -> dict[str, Path]:
        """Return the files of the forms that a split's lists name."""
        files = self._files  # their absence is reported first
        lists = [self._lists[LISTS[split]], *([self._lists[SECOND]] if self.testset_t == split else [])]
        return {name: files[name] for name in sorted(name for forms in lists for name in forms.find(files, self.root))}

    @cached_property
    def _lists(self) -> dict[str, FormList]:
        return read_form_lists(self.root, [*LISTS.values(), *([SECOND] if self.testset_t != "none" else [])])


@dataclass(frozen=True, kw_only=True)
class _Stretched(AugmentedSequences):
    """Sequences, stretched along x and y by other factors in each epoch, at most ``amount`` away from 1."""

    amount: float

    @cached_property
    def factors(self) -> torch.Tensor:
        """The factor of each feature of each sequence, shape (sequences, 3)."""
        generator = np.random.default_rng((self.seed, self.epoch))
        factors = generator.uniform(1 - self.amount, 1 + self.amount, (len(self), 2))
        return torch.from_numpy(np.insert(factors, 2, 1.0, axis=1)).float()

    def augmented(self, index: int, sequence: SequenceSample) -> SequenceSample:
        return SequenceSample(sequence.x * self.factors[index], name=sequence.name)


def _find_layout(root: Path) -> str:
    """Return the layout of a path by its suffix, its arrays or the files below it."""
    if not root.exists():
        raise UserError(f"--data.root {root}: no such file or folder. Fix: check the path")
    if root.is_file():
        layouts = {".ndjson": "quickdraw", ".inkml": "inkml", ".npz": "archive"}
        layout = layouts.get(root.suffix.lower())
        if layout is None:
            raise UserError(f"--data.root {root}: is not a handwriting dataset. Fix: give {READABLE}")
        return "sketch-rnn" if layout == "archive" and _holds_objects(root) else layout
    files = files_below(root)
    present = [layout for layout in SUFFIXES if _of_layout(files, layout)]
    if not present:
        raise UserError(f"--data.root {root}: holds no handwriting. Fix: give {READABLE}")
    if len(present) > 1:
        raise UserError(f"--data.root {root}: holds {' and '.join(present)}. Fix: choose one with --data.layout")
    return present[0]


def _of_layout(files: list[Path], layout: str) -> list[Path]:
    """Return the files of a layout; IAM's XML files lie in a folder lineStrokes."""
    files = [path for path in files if path.suffix.lower() == SUFFIXES[layout]]
    return [path for path in files if "lineStrokes" in path.parts] if layout == "iam" else files


def _holds_objects(path: Path) -> bool:
    """Return True for an archive that names its arrays as sketch-rnn does."""
    with suppress(UserError), opened_archive(path) as archive:  # the reader of flat archives reports the error
        return "train" in archive.names and "train_values" not in archive.names
    return False
