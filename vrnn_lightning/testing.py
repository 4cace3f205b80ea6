"""The promises of every datamodule, as checks to run over your own.

One test per promise::

    import pytest
    from vrnn_lightning.testing import CHECKS

    from mypackage.walks import Walks


    @pytest.mark.parametrize("check", CHECKS)
    def test_walks(check):
        check(lambda: Walks(size=20))

or all of them at once with ``check_datamodule(lambda: Walks(size=20))``. Give it little data: the checks read it many
times. Each needs a fresh datamodule, whose ``batch_size`` and ``num_workers`` they set. A LightningDataModule that is
not a SequenceDataModule is checked for its batches, shape and scaler alone.
"""

from __future__ import annotations

import inspect
import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args
from unittest import SkipTest

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch, SequenceSample
from vrnn_lightning.data import ChangingSequences, Modality, Scaler, SequenceDataModule, SequenceLoader, Split, Window

__all__ = ["CHECKS", "check_datamodule"]

Make = Callable[[], LightningDataModule]
SPLITS: tuple[Split, ...] = get_args(Split)


def check_datamodule(make: Make) -> None:
    """Check every promise of a datamodule; raise an AssertionError that names the first broken one.

    Args:
        make: Returns a fresh datamodule.
    """
    for check in CHECKS:
        with suppress(SkipTest):
            check(make)


def _ready(make: Make, **options: int) -> SequenceDataModule:
    datamodule = make()
    if not isinstance(datamodule, SequenceDataModule):
        raise SkipTest(f"{type(datamodule).__name__} is not a SequenceDataModule")
    for option, value in options.items():
        setattr(datamodule, option, value)
    datamodule.setup("fit")
    datamodule.setup("test")
    return datamodule


def _loader(datamodule: SequenceDataModule, split: Split) -> SequenceLoader:
    loader: SequenceLoader = getattr(datamodule, f"{split}_dataloader")()
    return loader


def _read(sequences: Any) -> list[SequenceSample]:
    return [sequences[i] for i in range(len(sequences))]


def _names(datamodule: SequenceDataModule, split: Split) -> list[str]:
    return [s.name for s in _read(datamodule.split(split))]


class _Piece(NamedTuple):
    """The real steps of a row: the name of its sequence, the first step there, and the values."""

    name: str
    start: int
    x: Tensor


def _pieces(batch: SequenceBatch) -> list[_Piece]:
    assert batch.names is not None
    starts = [0] * len(batch) if batch.start is None else batch.start.tolist()
    rows = zip(batch.names, starts, batch.lengths.tolist(), batch.x, strict=True)
    return [_Piece(name, start, x[:length]) for name, start, length, x in rows]


def _require_equal(batches: Iterable[SequenceBatch], expected: Iterable[SequenceBatch], where: str) -> None:
    for batch, wanted in zip(batches, expected, strict=True):
        for field, value in vars(batch).items():
            other = getattr(wanted, field)
            are_tensors = isinstance(value, Tensor) and isinstance(other, Tensor)
            if are_tensors and field == "targets":  # NaN where one is unknown
                value, other = value.nan_to_num(), other.nan_to_num()
            assert torch.equal(value, other) if are_tensors else value == other, f"{where}: {field} differs"


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and value >= least


def knows_its_shape_before_setup(make: Make) -> None:
    """``num_features`` and ``modality`` are there right after construction, for the model is built from them."""
    datamodule: Any = make()
    features, modality = datamodule.num_features, datamodule.modality
    assert _is_whole(features, 1), f"num_features is {features!r}, expected a whole number from 1"
    assert modality in get_args(Modality), f"modality is {modality!r}, expected one of {Modality}"
    inputs, missing = getattr(datamodule, "num_inputs", 0), getattr(datamodule, "missing", False)
    assert _is_whole(inputs, 0), f"num_inputs is {inputs!r}, expected a whole number from 0"
    assert isinstance(missing, bool), f"missing is {missing!r}, expected True or False"


def saves_its_options(make: Make) -> None:
    """All arguments of ``__init__`` are in ``hparams``, from which a checkpoint rebuilds the datamodule."""
    datamodule = _ready(make)
    bases = [base for base in type(datamodule).__mro__ if issubclass(base, SequenceDataModule)]
    parameters = [p for base in bases for p in inspect.signature(base).parameters.values()]
    options = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    lost = options - set(datamodule.hparams)
    assert not lost, f"{sorted(lost)} are not in hparams; call super().__init__ from __init__ itself"
    unknown = datamodule.run_options - options - {"root"}
    assert not unknown, f"run_options holds {sorted(unknown)}, which __init__ does not take"


def scaler_is_affine(make: Make) -> None:
    """``scaler`` is affine, finite and can be undone."""
    datamodule: Any = make()
    datamodule.setup("fit")
    scaler: Scaler = datamodule.scaler
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 5, datamodule.num_features, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(scaler.unscale(scaler.scale(a)), a)
    torch.testing.assert_close(scaler.scale((a + b) / 2), (scaler.scale(a) + scaler.scale(b)) / 2)
    assert ((scaler.std > 0) & scaler.std.isfinite()).all(), f"the scaler's std is {scaler.std}"
    assert torch.isfinite(scaler.mean).all(), f"the scaler's mean is {scaler.mean}"


def yields_padded_batches(make: Make) -> None:
    """Loaders yield SequenceBatches of the promised widths and types, zeros behind the ends of sequences."""
    datamodule: Any = make()
    if isinstance(datamodule, SequenceDataModule):
        datamodule.batch_size = 3
    datamodule.setup("fit")
    datamodule.setup("test")
    for split in SPLITS:
        for batch in getattr(datamodule, f"{split}_dataloader")():
            assert isinstance(batch, SequenceBatch), f"a loader yields {type(batch).__name__}, expected SequenceBatch"
            _require_well_formed(batch, datamodule)


def _require_well_formed(batch: SequenceBatch, datamodule: Any) -> None:
    size, steps, width = batch.x.shape
    kinds = {"x": torch.float32, "lengths": torch.int64, "observed": torch.bool, "inputs": torch.float32}
    kinds |= {"targets": torch.float32, "is_first": torch.bool}
    for field, kind in kinds.items():
        values = getattr(batch, field)
        assert values is None or values.dtype == kind, f"{field} is {values.dtype}, expected {kind}"
    assert width == datamodule.num_features, f"x has {width} features, num_features says {datamodule.num_features}"
    assert batch.lengths.shape == (size,), f"lengths has shape {tuple(batch.lengths.shape)}, expected ({size},)"
    assert 1 <= batch.lengths.max() <= steps, f"the longest length is {batch.lengths.max()} of {steps} steps"
    assert batch.x[~batch.mask].count_nonzero() == 0, "padding is not zero"
    assert batch.x.isfinite().all(), "x holds NaN or infinite values"
    assert batch.names is None or len(batch.names) == size, f"{len(batch.names or [])} names for {size} sequences"
    if batch.observed is not None:
        assert batch.observed.shape == batch.x.shape, "observed and x differ in shape"
        is_declared = getattr(datamodule, "missing", False) or batch.observed[batch.mask].all()
        assert is_declared, "missing is False, but values are; set self.missing = True"
    known = getattr(datamodule, "num_targets", 0)
    expected = (size, steps, known)
    found = None if batch.targets is None else tuple(batch.targets.shape)
    assert not known or found == expected, f"targets has shape {found}, expected {expected} by num_targets"
    assert batch.is_first is None or batch.is_first.shape == (size, steps), "is_first and x differ in shape"
    promised = getattr(datamodule, "num_inputs", 0)
    assert batch.inputs is not None or not promised, f"num_inputs is {promised}, but a batch has no inputs"
    if batch.inputs is not None:
        width = batch.inputs.shape[2]
        assert promised in (0, width), f"{width} inputs, num_inputs says {promised}"
        assert batch.inputs.isfinite().all() or not promised, "inputs holds NaN or infinite values"
        assert batch.inputs.shape[:2] == (size, steps), "inputs and x differ in shape"
        assert batch.inputs[~batch.mask].count_nonzero() == 0, "inputs are not zero in the padding"


def returns_to_data_units(make: Make) -> None:
    """The scaler maps a batch back to data units."""
    datamodule = _ready(make, batch_size=1)
    batch = next(iter(datamodule.test_dataloader()))
    original = datamodule.split("test")[0].x.float()
    valid = batch.valid_mask[0]
    torch.testing.assert_close(datamodule.scaler.unscale(batch.x)[0][valid], original[valid])


def reads_every_sequence_once(make: Make) -> None:
    """``lengths`` tells the truth, names are unique, and an epoch reads every step exactly once."""
    datamodule = _ready(make, batch_size=2)
    for split in SPLITS:
        sequences, lengths = _read(datamodule.split(split)), list(datamodule.lengths(split))
        actual = [len(s.x) for s in sequences]
        assert lengths == actual, f"lengths({split!r}) says {lengths[:8]}, ..., but there are {actual[:8]}, ..."
        names = [s.name or f"sequence {i}" for i, s in enumerate(sequences)]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        assert not repeated, f"several sequences of {split} are called {repeated[0]!r}; noise is drawn by name"
        pieces = [piece for batch in _loader(datamodule, split) for piece in _pieces(batch)]
        read = Counter((name, start + t) for name, start, x in pieces for t in range(len(x)))
        every = Counter((name, t) for name, length in zip(names, lengths, strict=True) for t in range(length))
        assert read == every, f"an epoch of {split} does not read every step exactly once"


def reads_windows_as_parts_of_the_whole(make: Make) -> None:
    """``window(index, first, last)`` reads what the whole sequence holds there."""
    datamodule = _ready(make)
    for split in SPLITS:
        dataset: Any = _loader(datamodule, split).dataset
        length = datamodule.lengths(split)[0]
        whole = dataset[[0]]
        for first, last in {(0, length), (0, 1), (length // 2, length), (length - 1, length)}:
            batch, expected = dataset[[Window(0, first, last, False)]], whole.window(first, last)
            assert batch.reset.tolist() == [False]
            torch.testing.assert_close(batch.x, expected.x, rtol=1e-5, atol=1e-5)
            batch = replace(batch, x=expected.x, observed=batch.valid_mask, reset=expected.reset)
            expected = replace(expected, observed=expected.valid_mask)
            _require_equal([batch], [expected], f"steps {first} to {last} of {split} 0")


def streams_continue(make: Make) -> None:
    """Where a row's state is carried, its window begins where the row's last one ended, in the same sequence."""
    datamodule = _ready(make, batch_size=3)
    previous: list[_Piece] = []  # none before the first batch
    for batch in datamodule.train_dataloader():
        if datamodule.window is None:
            assert batch.reset is None, "batches of whole sequences must not have reset"
            continue
        assert batch.reset is not None
        assert batch.reset.dtype == torch.bool
        assert batch.reset.shape == batch.lengths.shape == (3,)
        assert batch.lengths.max() <= datamodule.window, "a window is too long"
        assert previous or batch.reset.all(), "an epoch's first windows carry a state"
        pieces = _pieces(batch)
        for (name, start, x), before, is_reset in zip(pieces, previous, batch.reset.tolist(), strict=False):
            assert is_reset or name == before.name, "a state continues in another sequence"
            assert is_reset or start == before.start + len(before.x), "a state continues elsewhere in its sequence"
            assert not is_reset or start == 0 or not len(x), "a state is lost"
        previous = pieces


def shards_over_processes(make: Make) -> None:
    """Two processes see together what one does, and no sequence twice."""
    for split in SPLITS:
        datamodule = _ready(make)
        lengths = list(datamodule.lengths(split))
        size = next(size for size in range(1, len(lengths) + 1) if len(lengths) % (2 * size))  # an uneven last batch
        alone = _batches_of(make, split, 2 * size)
        first, second = (_batches_of(make, split, size, processes=2, rank=rank) for rank in (0, 1))
        assert len(first) == len(second) == len(alone), "processes take different numbers of steps"
        for together, a, b in zip(alone, first, second, strict=True):
            assert sorted(together) == sorted(i for i in a + b if i >= 0), "two processes see another batch than one"
        kept = [i for i, length in enumerate(lengths) if length]
        assert sorted(i for batch in alone for i in batch) == kept, "a sequence is left out or read twice"


def _batches_of(make: Make, split: Split, size: int, processes: int = 1, rank: int = 0) -> list[list[int]]:
    """Return the indices of the sequences that a process reads in each step."""
    datamodule: Any = _ready(make, batch_size=size)
    datamodule.window = None  # whole sequences, an index each
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    datamodule.trainer = SimpleNamespace(world_size=processes, global_rank=rank, strategy=strategy)
    return [list(indices) for indices in getattr(datamodule, f"{split}_dataloader")().sampler]


def orders_by_seed_and_epoch(make: Make) -> None:
    """Each epoch of training has an order of its own, the same whenever it is asked for; others have one order."""

    def orders(split: Split) -> list[tuple[Any, ...]]:
        loader, epochs = _loader(_ready(make, batch_size=1), split), []
        for epoch in range(6):
            loader.sampler.set_epoch(epoch)
            epochs.append(tuple(item for items in loader.sampler for item in items))
        return epochs

    train = orders("train")
    assert train == orders("train"), "two datamodules of one seed differ in the order of training"
    assert len(train[0]) == 1 or len(set(train)) > 1, "training is not shuffled"
    for split in SPLITS[1:]:
        assert len(set(orders(split))) == 1, f"{split} is shuffled"


def resumes_in_the_middle_of_an_epoch(make: Make) -> None:
    """A loader that is given another one's state yields what was left of its epoch."""
    uninterrupted, stopped, resumed = (_ready(make, batch_size=2).train_dataloader() for _ in range(3))
    whole, batches = list(uninterrupted), iter(stopped)
    for _ in range(len(whole) // 2):
        next(batches)
    resumed.load_state_dict(stopped.state_dict())
    expected, rest = whole[len(whole) // 2 :], list(resumed)
    assert len(rest) == len(expected), "a resumed epoch is too long or too short"
    _require_equal(rest, expected, "a resumed epoch")


def changes_with_the_epoch_alone(make: Make) -> None:
    """Sequences of training that are redrawn every epoch keep names and lengths; others never change."""
    datamodule = _ready(make, batch_size=3)
    loader = datamodule.train_dataloader()
    epochs = []
    for epoch in (0, 2, 0):
        loader.sampler.set_epoch(epoch)
        pieces = [piece for batch in loader for piece in _pieces(batch)]
        epochs.append({(name, start, len(x)): x for name, start, x in pieces if len(x)})
    first, second, again = epochs
    assert all(torch.equal(first[place], again[place]) for place in first), "an epoch read again differs"
    is_same = all(torch.equal(first[place], second[place]) for place in first.keys() & second.keys())
    changing = datamodule.split("train")
    if not isinstance(changing, ChangingSequences):
        assert is_same, "sequences change between epochs; define in_epoch(epoch) so that a resume reads the same"
        return
    for split in SPLITS[1:]:
        assert not isinstance(datamodule.split(split), ChangingSequences), f"sequences of {split} must not change"
    sequences = _read(changing.in_epoch(1))
    assert [s.name for s in sequences] == _names(datamodule, "train"), "in_epoch changes names or their order"
    assert [len(s.x) for s in sequences] == list(datamodule.lengths("train")), "in_epoch changes lengths"
    assert not is_same, "in_epoch changes nothing"


def survives_a_checkpoint(make: Make) -> None:
    """Options, scaler and splits come back from a checkpoint, which holds nothing but tensors and plain values."""
    trained = _ready(make)
    file = io.BytesIO()
    torch.save({"state": trained.state_dict(), "options": dict(trained.hparams)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    loaded = _ready(make)
    loaded.load_state_dict(saved["state"])
    assert torch.equal(loaded.scaler.mean, trained.scaler.mean), "the scaler's mean is lost"
    assert torch.equal(loaded.scaler.std, trained.scaler.std), "the scaler's std is lost"
    assert saved["options"] == dict(trained.hparams), "options change in a checkpoint"
    for split in SPLITS:
        assert _names(loaded, split) == _names(trained, split), f"{split} is another one after a checkpoint"


def keeps_the_splits_apart(make: Make) -> None:
    """No sequence is in two splits by its name, nor most of a split in another one by its values.

    Some are alike in data as they are: two songs on one melody, an empty hour.
    """
    datamodule = _ready(make)
    names = {split: {name for name in _names(datamodule, split) if name} for split in SPLITS}
    values = {split: [s.x.numpy().tobytes() for s in _read(datamodule.split(split))] for split in SPLITS}
    for other, split in combinations(SPLITS, 2):
        assert not names[split] & names[other], f"{split} and {other} share sequences"
        others = set(values[other])
        alike = sum(x in others for x in values[split])
        assert 2 * alike < len(values[split]), f"{alike} sequences of {split} are in {other} as well"


def reads_alike_in_processes(make: Make) -> None:
    """Processes that read ahead change nothing."""
    alone, helped = (_ready(make, batch_size=2, num_workers=n).train_dataloader() for n in (0, 2))
    for epoch in (0, 2):  # the processes outlive an epoch
        for loader in (alone, helped):
            loader.sampler.set_epoch(epoch)
        _require_equal(helped, alone, "batches from processes")
    helped.close()


def pickles(make: Make) -> None:
    """Sequences can travel to a process."""
    dataset = _ready(make).train_dataloader().dataset
    copied = pickle.loads(pickle.dumps(dataset))  # its own dump, as a reading process gets it
    _require_equal([copied[[0]]], [dataset[[0]]], "a pickled dataset")


def pads_a_process_without_data(make: Make) -> None:
    """A process for which nothing is left gets a sequence of no steps."""
    dataset = _ready(make).train_dataloader().dataset
    nothing, something = dataset[[-1]], dataset[[0]]
    assert nothing.names == ["(none)"]
    assert nothing.valid_mask.sum() == 0
    assert (nothing.inputs is None) == (something.inputs is None), "an empty sequence lacks inputs"


CHECKS = (
    knows_its_shape_before_setup,
    saves_its_options,
    scaler_is_affine,
    yields_padded_batches,
    returns_to_data_units,
    reads_every_sequence_once,
    reads_windows_as_parts_of_the_whole,
    streams_continue,
    shards_over_processes,
    orders_by_seed_and_epoch,
    resumes_in_the_middle_of_an_epoch,
    changes_with_the_epoch_alone,
    survives_a_checkpoint,
    keeps_the_splits_apart,
    reads_alike_in_processes,
    pickles,
    pads_a_process_without_data,
)
"""Every promise; each takes a function that returns a fresh datamodule."""
