"""Handwriting and drawings: pen strokes as offsets from point to point."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from vrnn_lightning.batch import SequenceSample
from vrnn_lightning.data import (
    MAX_GB,
    ArchiveSplit,
    AugmentedSequences,
    InvalidFiles,
    Modality,
    RandomSplitDataModule,
    RandomSplits,
    Scaler,
    Sequences,
    Split,
    checked_limit,
    data_root,
    fetch,
    files_below,
    quickdraw_lines,
    read_archive,
    read_iam,
    read_inkml,
    read_quickdraw,
    read_sketch_rnn,
    smooth_rows,
    tracked,
)
from vrnn_lightning.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Handwriting"]

WORDS: dict[Split, str] = {"train": "train", "val": "valid", "test": "test"}
"""What an archive calls a split."""
LISTS: dict[Split, str] = {"train": "trainset.txt", "val": "testset_v.txt", "test": "testset_f.txt"}
"""The list of each split of IAM-OnDB's task t1."""
SECOND = "testset_t.txt"
"""The list of t1's second validation set."""
LOOKED_FOR = (
    "an .npz archive with train_values (flat) or train (sketch-rnn), .ndjson files (QuickDraw), .inkml files, "
    "or lineStrokes/**/*.xml (IAM-OnDB)"
)
SHOWN = 5
"""Missing forms that a message names."""


class Handwriting(RandomSplitDataModule):
    r"""Pen strokes: rows (dx, dy, lift), as in Chung et al. (2015, arXiv 1506.02216).

    A row is the pen's offset from the last point, and lift is 1 where the pen leaves the paper after this point, else
    0; y grows downward, as it does in all the formats below. One mean and one standard deviation, taken over dx and dy
    of the training rows together, scale both, which keeps the shape of a letter; lift stays as it is, for its
    likelihood is a mass.

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

    Splits that are drawn travel in the checkpoint by name, so that nothing that was trained on is ever tested; of data
    that it does not know at all, everything is the test split.

    Args:
        root: The file or folder. It may lie elsewhere when a checkpoint is used again.
        max_steps: The longest sequence of the training split, where a few long ones would make batches large.
            Validation and test keep all of theirs, so that figures compare. ``None`` has no limit.
        too_long: What becomes of longer ones: "drop" leaves them out; "split" cuts them into as few pieces as it takes,
            of like length, each of which starts from a fresh state.
        layout: What ``root`` is; "auto" looks at it.
        val: Fraction of the drawings for validation, where the layout brings no splits; at least one unless it is 0.
        test: Fraction for the test split.
        testset_t: What the second validation set of task t1 (iam) is used for: nothing, or as a part of a split.
        skip_bad: Skip and count files (iam, inkml) or drawings (quickdraw, sketch-rnn) that can't be used, instead of
            stopping at the first. A flat archive is good or bad as a whole.
        clip: Bound dx and dy to this many data units in every split: jumps of a faulty pen, or between far lines.
            ``None`` leaves them.
        scale: "shared" scales dx and dy by one mean and standard deviation, "per_axis" each by its own, "none" not.
        smooth: Replace each point by the mean of this odd number of points around it, fewer near the ends of its
            stroke, which keep their places; 1 leaves all points.
        augment: In each epoch, stretch each training sequence by one random factor for dx and one for dy, uniform
            between 1 - ``augment`` and 1 + ``augment``. The scaler is that of the sequences as they are.
        batch_size: Sequences per batch and process.
        max_gb: Gigabytes that the content of one file may take: a damaged or hostile file declares more than it holds.
            A file that takes no more than 16 times its own size is always read.
        download: Fetch Omniglot's strokes as an archive, where there is no ``root`` yet.
        options: The other options of :class:`~vrnn_lightning.SequenceDataModule`.

    Raises:
        UserError: An option outside its range. From ``setup`` on: the data are not there, are none of these formats or
            several, are damaged, a lift is neither 0 nor 1, a list names only forms that are not there, or all training
            sequences are longer than ``max_steps``.

    >>> Handwriting("kanji.npz").num_features
    3
    """

    modality: ClassVar[Modality] = "strokes"
    run_options: ClassVar[frozenset[str]] = RandomSplitDataModule.run_options | {
        "layout",
        "skip_bad",
        "download",
        "max_gb",
    }

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
        max_gb: float = MAX_GB,
        download: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_features=3, batch_size=batch_size, **options)
        self.hparams["download"] = False  # a run's wish, which no checkpoint repeats
        self.download = download
        _among("too_long", too_long, ("drop", "split"))
        _among("layout", layout, ("auto", "archive", "sketch-rnn", "quickdraw", "inkml", "iam"))
        _among("testset_t", testset_t, ("none", "train", "val", "test"))
        _among("scale", scale, ("shared", "per_axis", "none"))
        if max_steps is not None and max_steps < 1:
            raise UserError(f"--data.max_steps {max_steps}: must be at least 1")
        if clip is not None and not 0 < clip < math.inf:
            raise UserError(f"--data.clip {clip}: must be positive, in data units")
        if not 1 <= smooth < 2**31 or smooth % 2 == 0:
            raise UserError(f"--data.smooth {smooth}: must be an odd number of points, at least 1 and below 2^31")
        if not 0 <= augment < 1:
            raise UserError(f"--data.augment {augment}: must be at least 0 and below 1")
        self.root = data_root(root)
        self.max_gb = checked_limit(max_gb)
        self.max_steps = max_steps
        self.too_long = too_long
        self.layout = layout
        self.testset_t = testset_t
        self.skip_bad = skip_bad
        self.clip = clip
        self.scale = scale
        self.smooth = smooth
        self.augment = augment
        self._draw = RandomSplits(val, test, self.seed)

    @property
    def pen_starts_down(self) -> bool:
        """True where the pen touches the paper at the origin, so that the first row draws a line."""
        return self._layout not in ("archive", "sketch-rnn")

    def prepare_data(self) -> None:
        """Fetch Omniglot, if that is asked for."""
        if self.download:
            fetch("omniglot", self.root)

    def sequences(self, split: Split) -> Sequences:
        """Return the strokes of a split, each of shape (steps, 3)."""
        found = self._clipped(self._smoothed(self._read(split)), split)
        if split != "train":
            return found
        short = self._short(found)
        return _Stretched(sequences=short, seed=self.seed, amount=self.augment) if self.augment else short

    def lengths(self, split: Split) -> list[int]:
        """Return the rows of each sequence of a split."""
        return self._strokes(split).lengths

    def fit_scaler(self) -> Scaler:
        """Fit mean and std of dx and dy, shared or not, on the training rows; lift is left alone."""
        if self.scale == "none":
            return Scaler()
        offsets = self._strokes("train").rows()[:, :2].astype(np.float64)
        offsets = offsets.reshape(-1, 1) if self.scale == "shared" else offsets
        if not offsets.size:
            return Scaler(torch.zeros(3).double(), torch.ones(3).double())
        mean, std = offsets.mean(0), offsets.std(0)
        std = np.where(std > 1e-12 * abs(mean), std, 1.0)
        mean, std = (np.append(np.broadcast_to(value, 2), lift) for value, lift in ((mean, 0.0), (std, 1.0)))
        return Scaler(torch.from_numpy(mean), torch.from_numpy(std))

    def _strokes(self, split: Split) -> ArchiveSplit:
        """Return the strokes of a split as they are in no epoch in particular."""
        found = self.split(split)
        found = found.sequences if isinstance(found, _Stretched) else found
        assert isinstance(found, ArchiveSplit)
        return found

    def _smoothed(self, found: ArchiveSplit) -> ArchiveSplit:
        if self.smooth == 1:
            return found
        values = found.values.astype(np.result_type(found.values.dtype, np.float32))
        for start, end in found.bounds:
            values[start:end] = smooth_rows(found.values[start:end], self.smooth, self.pen_starts_down)
        return replace(found, values=values)

    def _clipped(self, found: ArchiveSplit, split: Split) -> ArchiveSplit:
        if self.clip is None:
            return found
        far = np.abs(found.values[:, :2]) > self.clip
        if not far.any():
            return found
        rank_zero_info(
            f"{self.root}: {far.sum()} of {far.size} offsets of the {split} split are cut to {self.clip} (--data.clip)"
        )
        values = found.values.astype(np.result_type(found.values.dtype, np.float32))
        values[:, :2] = values[:, :2].clip(-self.clip, self.clip)
        return replace(found, values=values)

    def _short(self, found: ArchiveSplit) -> ArchiveSplit:
        """Return training sequences no longer than allowed."""
        if self.max_steps is None:
            return found
        kept = found.no_longer_than(self.max_steps)
        longer = len(found) - len(kept)
        what = f"{self.root}: {longer} of {len(found)} training sequences are longer than {self.max_steps} steps"
        if self.too_long == "split" and longer:
            pieces = found.in_pieces(self.max_steps)
            rank_zero_info(f"{what} and are cut into {len(pieces) - len(kept)} pieces (--data.too_long split)")
            return pieces
        if len(kept) == 0 < len(found):
            raise UserError(
                f"--data.max_steps {self.max_steps}: all training sequences of {self.root} are longer, "
                f"the shortest has {min(found.lengths)} steps; raise it or set --data.too_long split"
            )
        if longer:
            rank_zero_info(f"{what} and are left out (--data.too_long drop)")
        return kept

    @cached_property
    def _layout(self) -> str:
        """What the path is: what the option says, or what is found there."""
        return _layout_of(self.root) if self.layout == "auto" else self.layout

    @property
    def random_splits(self) -> RandomSplits | None:
        """How the splits of QuickDraw's files and InkML's are drawn; ``None`` of what has its own."""
        return self._draw if self._layout in ("quickdraw", "inkml") else None

    def _read(self, split: Split) -> ArchiveSplit:
        """Return the rows of a split as the files hold them."""
        if self._layout == "archive":
            found = read_archive(self.root, split, 3, max_gb=self.max_gb)
            wrong = (found.values != 0) & (found.values != 1)
            wrong[:, :2] = False
            found.raise_if(wrong, "expected rows (dx, dy, lift) whose lift is 0 or 1")
            return found
        if self._layout == "sketch-rnn":
            return self._sketches(split)
        if self._layout == "iam":
            return self._read_files(self._iam_files(split), read_iam, split)
        names = self._draw.names(split, self.sizes, self.root)  # of what can be used
        places = {name: place for place, name in enumerate(self._drawings.names or [])}
        return self._drawings.take(np.array([places[name] for name in names], dtype=np.int64))

    def _read_files(
        self, files: dict[str, Path], read: Callable[[Path], NDArray[np.float32]], split: Split
    ) -> ArchiveSplit:
        """Return the rows of files, a sequence each."""
        bad, rows = InvalidFiles(self.skip_bad), {}
        for name in tracked(list(files), f"reading {self.root.name}"):
            with bad.tolerated():
                rows[name] = read(files[name])
        bad.report(len(files), self.root)
        return self._joined(WORDS[split], list(rows.values()), np.arange(len(rows)), list(rows))

    def _sketches(self, split: Split) -> ArchiveSplit:
        """Return the drawings of an archive of sketch-rnn."""
        word = WORDS[split]
        drawings = read_sketch_rnn(self.root, word, self.max_gb)
        bad, rows = InvalidFiles(self.skip_bad), {}
        for number, drawing in enumerate(drawings):
            with bad.tolerated():
                rows[number] = _checked(f"{self.root}: {word} {number}", drawing)
        bad.report(len(drawings), self.root, f"drawings of {word}")
        return self._joined(word, list(rows.values()), np.array(list(rows), dtype=np.int64))

    @cached_property
    def _drawings(self) -> ArchiveSplit:
        """All drawings whose split is drawn, those of QuickDraw's files or an InkML file each."""
        bad, total = InvalidFiles(self.skip_bad), 0
        names: list[str] = []
        rows: list[NDArray[np.float32]] = []
        ink = self._layout == "inkml"
        for name in tracked(list(self._files), f"reading {self.root.name}") if ink else ():
            total += 1
            with bad.tolerated():
                rows.append(read_inkml(self._files[name]))
                names.append(name)
        for file, path in () if ink else self._files.items():
            for name, number, line in tracked(list(quickdraw_lines(path, file)), f"reading {file}"):
                total += 1
                with bad.tolerated():
                    rows.append(read_quickdraw(path, number, line))
                    names.append(name)
        bad.report(total, self.root, "files" if ink else "drawings")
        return self._joined("drawing", rows, np.arange(len(rows)), names)

    def _joined(
        self, word: str, rows: list[NDArray[Any]], numbers: NDArray[np.int64], names: list[str] | None = None
    ) -> ArchiveSplit:
        """Return sequences end to end, those without rows left out."""
        ends = np.cumsum([len(x) for x in rows], dtype=np.int64)
        starts = np.append(0, ends)[:-1] if len(rows) else ends
        values = np.concatenate(rows) if rows else np.zeros((0, 3), dtype=np.float32)
        found = ArchiveSplit(self.root, word, word, values, np.stack([starts, ends], axis=1), numbers, names)
        drawn = ends > starts
        if not drawn.all():
            rank_zero_info(f"{self.root}: {(~drawn).sum()} of {len(rows)} drawings ({word}) hold no line, left out")
            kept = None if names is None else [name for name, line in zip(names, drawn, strict=True) if line]
            found = found.take(drawn)
            found = found if kept is None else replace(found, numbers=np.arange(len(kept)), names=kept)
        return found

    @cached_property
    def _files(self) -> dict[str, Path]:
        """All files of the layout, by their paths below the root."""
        suffix = {"iam": ".xml", "inkml": ".inkml", "quickdraw": ".ndjson"}[self._layout]
        if not self.root.exists():
            raise UserError(f"--data.root {self.root}: no such file or folder")
        if self.root.is_file() and self._layout != "iam":
            return {self.root.name: self.root}
        if self.root.is_file():
            raise UserError(f"--data.root {self.root}: is a file; give the folder that holds lineStrokes and the lists")
        found = [path for path in files_below(self.root) if path.suffix.lower() == suffix]
        if self._layout == "iam":
            found = [path for path in found if _in_line_strokes(path)]
        if not found:
            wanted = "lineStrokes/**/*.xml" if self._layout == "iam" else f"*{suffix}"
            raise UserError(f"--data.root {self.root}: no {wanted} in it, which --data.layout {self._layout} reads")
        return {path.relative_to(self.root).as_posix(): path for path in found}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """All sequences whose split is drawn, with what tells one of the same name apart: its rows."""
        return dict(zip(self._drawings.names or [], self._drawings.lengths, strict=True))

    def _iam_files(self, split: Split) -> dict[str, Path]:
        """Return the files of the forms that a split's lists name."""
        of_form: dict[str, list[str]] = {}
        for name, path in self._files.items():
            of_form.setdefault(path.stem.rpartition("-")[0], []).append(name)
        lists = [LISTS[split]] + ([SECOND] if self.testset_t == split else [])
        names: list[str] = []
        for file in lists:
            forms = self._forms[file]
            missing = [form for form in forms if form not in of_form]
            listed = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
            if forms and len(missing) == len(forms):
                raise UserError(
                    f"{self._lists[file]}: names {len(forms)} forms, of none of which is a file below "
                    f"{self.root}: {listed}; expected lineStrokes/a01/a01-020/a01-020x-01.xml for the form a01-020x"
                )
            if missing:
                rank_zero_warn(
                    f"{self._lists[file]}: {len(missing)} of {len(forms)} forms have no file below {self.root} and are "
                    f"left out: {listed}"
                )
            names += [name for form in forms for name in of_form.get(form, [])]
        return {name: self._files[name] for name in sorted(names)}

    @cached_property
    def _lists(self) -> dict[str, Path]:
        """The lists of task t1, by name."""
        needed = [*LISTS.values()] + ([SECOND] if self.testset_t != "none" else [])
        there = [path for path in files_below(self.root) if path.name in needed]
        lists = {}
        for file in needed:
            found = [path for path in there if path.name == file]
            found = [path for path in found if path.parent.name in ("task1", "t1")] or found
            if not found:
                raise UserError(
                    f"--data.root {self.root}: no {file} in it; put the lists of IAM-OnDB's task t1 into a folder below"
                )
            if len(found) > 1:
                raise UserError(f"--data.root {self.root}: both {found[0]} and {found[1]}; keep the list of task t1")
            lists[file] = found[0]
        return lists

    @cached_property
    def _forms(self) -> dict[str, list[str]]:
        """The forms that each list names, in their order."""
        forms: dict[str, list[str]] = {}
        for file, path in self._lists.items():
            try:
                words = path.read_text(encoding="utf-8-sig").split()
            except UnicodeDecodeError:
                raise UserError(f"{path}: is not text; expected a form per line, a01-020x for example") from None
            except OSError as error:
                raise UserError(f"{path}: can't be read ({error.strerror})") from None
            if not words:
                raise UserError(f"{path}: names no form; expected a form per line, a01-020x for example")
            forms[file] = list(dict.fromkeys(words))
            for other in forms:
                both = sorted(set(forms[other]).intersection(words)) if other != file else []
                if both:
                    raise UserError(f"{path}: names {both[0]}, as {self._lists[other]} does; keep it in one of them")
        return forms


@dataclass(frozen=True, kw_only=True)
class _Stretched(AugmentedSequences):
    """Sequences of one epoch, stretched along x and y by factors of their own; another epoch has others.

    Args:
        amount: How far from 1 a factor may be.
    """

    amount: float

    @cached_property
    def factors(self) -> torch.Tensor:
        """What to multiply each sequence's features by, shape (sequences, 3)."""
        generator = np.random.default_rng((self.seed, self.epoch))
        factors = generator.uniform(1 - self.amount, 1 + self.amount, (len(self), 2))
        return torch.from_numpy(np.insert(factors, 2, 1.0, axis=1)).float()

    def augmented(self, index: int, sequence: SequenceSample) -> SequenceSample:
        return SequenceSample(sequence.x * self.factors[index], name=sequence.name)


def _checked(place: str, drawing: Any) -> NDArray[Any]:
    """Return a drawing of sketch-rnn, if it is one."""
    listed = drawing.tolist() if isinstance(drawing, np.ndarray) and drawing.dtype.hasobject else drawing
    if isinstance(listed, np.ndarray):
        rows = listed
    else:  # its rows first: a few bytes of a pickle may name lists of lists without end
        numbers = isinstance(listed, (list, tuple)) and all(map(_is_row, listed))
        rows = np.array(listed) if numbers else np.empty(0, dtype=object)
    if rows.dtype.kind not in "iuf" or rows.dtype.itemsize > 8 or rows.ndim != 2 or rows.shape[1] != 3:
        raise UserError(
            f"{place}: is of type {rows.dtype} and shape {rows.shape}, expected numbers of shape (steps, 3)"
        )
    if not np.isfinite(rows).all():
        raise UserError(f"{place}: holds values that are not finite; remove it or fix it")
    wrong = (rows[:, 2] != 0) & (rows[:, 2] != 1)
    if wrong.any():
        step = int(wrong.argmax())
        raise UserError(f"{place}: lift is {rows[step, 2]} at step {step}; expected rows (dx, dy, lift), lift 0 or 1")
    return rows


def _is_row(row: Any) -> bool:
    """Return True for three numbers."""
    held = isinstance(row, (list, tuple)) or (isinstance(row, np.ndarray) and row.ndim == 1)
    return held and len(row) == 3 and all(isinstance(value, (int, float, np.number)) for value in row)


def _layout_of(root: Path) -> str:
    """Return which layout a path has, by its suffix, its arrays or the files below it."""
    if not root.exists():
        raise UserError(f"--data.root {root}: no such file or folder")
    if root.is_file():
        layouts = {".ndjson": "quickdraw", ".inkml": "inkml", ".npz": "archive"}
        layout = layouts.get(root.suffix.lower())
        if layout is None:
            raise UserError(f"--data.root {root}: is not a handwriting dataset; looked for {LOOKED_FOR}")
        return "sketch-rnn" if layout == "archive" and _holds_objects(root) else layout
    found = files_below(root)
    holds = {
        "iam": any(path.suffix.lower() == ".xml" and _in_line_strokes(path) for path in found),
        "quickdraw": any(path.suffix.lower() == ".ndjson" for path in found),
        "inkml": any(path.suffix.lower() == ".inkml" for path in found),
    }
    present = [layout for layout, there in holds.items() if there]
    if not present:
        raise UserError(f"--data.root {root}: no handwriting in it; looked for {LOOKED_FOR}")
    if len(present) > 1:
        raise UserError(f"--data.root {root}: holds {' and '.join(present)}; choose one with --data.layout")
    return present[0]


def _holds_objects(path: Path) -> bool:
    """Return True for an archive that names its arrays as sketch-rnn does."""
    try:
        with zipfile.ZipFile(path) as archive:
            names: Iterable[str] = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False  # who reads it as a flat archive says what is wrong
    return "train.npy" in names and "train_values.npy" not in names


def _in_line_strokes(path: Path) -> bool:
    return "lineStrokes" in path.parts


def _among(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"--data.{option} {value}: must be one of {', '.join(known)}")
