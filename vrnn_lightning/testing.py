"""What every datamodule promises, as checks to run over your own.

In a test file of yours, one test per promise::

    import pytest
    from vrnn_lightning.testing import CHECKS

    from mypackage.walks import Walks


    @pytest.mark.parametrize("check", CHECKS)
    def test_walks(check):
        check(lambda: Walks(size=20))

or all of them at once with ``check_datamodule(lambda: Walks(size=20))``. Give it little data: the checks read it many
times. Each needs a fresh datamodule, whose ``batch_size`` and ``num_workers`` they set. What a promise does not concern
is skipped: of a LightningDataModule that is not a SequenceDataModule, only its batches, shape and scaler are checked.
"""

from __future__ import annotations

import inspect
import io
import pickle
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, get_args
from unittest import SkipTest

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch, SequenceSample
from vrnn_lightning.data import ChangingSequences, Modality, Scaler, SequenceDataModule, SequenceLoader, Split, Window

__all__ = ["CHECKS", "check_datamodule"]

Make = Callable[[], LightningDataModule]
SPLITS: tuple[Split, ...] = get_args(Split)
NOBODY = "(none)"


def check_datamodule(make: Make) -> None:
    """Check every promise of a datamodule.

    Args:
        make: Returns a fresh datamodule.

    Raises:
        AssertionError: A promise is not kept; the message says which.
    """
    for check in CHECKS:
        with suppress(SkipTest):
            check(make)


def _ready(make: Make, **options: int) -> SequenceDataModule:
    """Return a datamodule after ``setup``, with these options of its loaders."""
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


def _sequences(datamodule: SequenceDataModule, split: Split) -> list[SequenceSample]:
    sequences = datamodule.split(split)
    return [sequences[i] for i in range(len(sequences))]


def _names(datamodule: SequenceDataModule, split: Split) -> list[str]:
    return [s.name for s in _sequences(datamodule, split)]


def _starts(batch: SequenceBatch) -> list[int]:
    return [0] * len(batch) if batch.start is None else batch.start.tolist()


def _equal(one: SequenceBatch, other: SequenceBatch) -> None:
    for field, value in vars(one).items():
        twin = getattr(other, field)
        same = torch.equal(value, twin) if isinstance(value, Tensor) else value == twin
        assert same, f"{field} differs between batches that must be equal"


def knows_its_shape_before_setup(make: Make) -> None:
    """``num_features`` and ``modality`` are there right after construction, for the model is built from them."""
    datamodule: Any = make()
    features = datamodule.num_features
    assert isinstance(features, int), f"num_features is {features!r}, expected a whole number"
    assert features >= 1, f"num_features is {features}"
    assert datamodule.modality in get_args(Modality), f"modality is {datamodule.modality!r}, expected one of {Modality}"
    inputs, missing = getattr(datamodule, "num_inputs", 0), getattr(datamodule, "missing", False)
    assert isinstance(inputs, int), f"num_inputs is {inputs!r}, expected a whole number"
    assert inputs >= 0, f"num_inputs is {inputs}"
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
    assert (scaler.std > 0).all(), f"the scaler's std is {scaler.std}"
    assert torch.isfinite(scaler.std).all(), f"the scaler's std is {scaler.std}"
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
            _well_formed(batch, datamodule)


def _well_formed(batch: SequenceBatch, datamodule: Any) -> None:
    assert isinstance(batch, SequenceBatch), f"a loader yields {type(batch).__name__}, expected SequenceBatch"
    size, steps, width = batch.x.shape
    assert width == datamodule.num_features, f"x has {width} features, num_features says {datamodule.num_features}"
    assert batch.x.dtype == torch.float32, f"x is {batch.x.dtype}, expected float32"
    assert batch.lengths.dtype == torch.int64, f"lengths is {batch.lengths.dtype}, expected int64"
    assert batch.lengths.shape == (size,), f"lengths has shape {tuple(batch.lengths.shape)}, expected ({size},)"
    assert 1 <= batch.lengths.max() <= steps, f"the longest length is {batch.lengths.max()} of {steps} steps"
    assert batch.x[~batch.mask].count_nonzero() == 0, "padding is not zero"
    assert torch.isfinite(batch.x).all(), "x holds NaN or infinite values"
    assert batch.names is None or len(batch.names) == size, f"{len(batch.names or [])} names for {size} sequences"
    if batch.observed is not None:
        assert batch.observed.dtype == torch.bool, f"observed is {batch.observed.dtype}, expected bool"
        assert batch.observed.shape == batch.x.shape, "observed and x differ in shape"
        told = getattr(datamodule, "missing", False)
        assert told or batch.observed[batch.mask].all(), "missing is False, but values are; set self.missing = True"
    covariates = getattr(datamodule, "num_inputs", 0)
    if covariates:
        assert batch.inputs is not None, f"num_inputs is {covariates}, but a batch has no inputs"
        assert batch.inputs.shape[2] == covariates, f"{batch.inputs.shape[2]} inputs, num_inputs says {covariates}"
        assert torch.isfinite(batch.inputs).all(), "inputs holds NaN or infinite values"
    if batch.inputs is not None:
        assert batch.inputs.dtype == torch.float32, f"inputs is {batch.inputs.dtype}, expected float32"
        assert batch.inputs.shape[:2] == (size, steps), "inputs and x differ in shape"
        assert batch.inputs[~batch.mask].count_nonzero() == 0, "inputs are not zero in the padding"


def returns_to_data_units(make: Make) -> None:
    """The scaler brings a batch back to what was read."""
    datamodule = _ready(make, batch_size=1)
    batch = next(iter(datamodule.test_dataloader()))
    original = datamodule.split("test")[0].x.float()
    valid = batch.valid_mask[0]
    torch.testing.assert_close(datamodule.scaler.unscale(batch.x)[0][valid], original[valid])


def reads_every_sequence_once(make: Make) -> None:
    """``lengths`` tells the truth, names are unique, and an epoch reads every step exactly once."""
    datamodule = _ready(make, batch_size=2)
    for split in SPLITS:
        sequences, lengths = _sequences(datamodule, split), list(datamodule.lengths(split))
        found = [len(s.x) for s in sequences]
        assert lengths == found, f"lengths({split!r}) says {lengths[:8]}, ..., but there are {found[:8]}, ..."
        names = [s.name or f"sequence {i}" for i, s in enumerate(sequences)]
        twice = [name for name, count in Counter(names).items() if count > 1]
        assert not twice, f"several sequences of {split} are called {twice[0]!r}; noise is drawn by name"
        read: Counter[tuple[str, int]] = Counter()
        for batch in _loader(datamodule, split):
            assert batch.names is not None
            for name, start, length in zip(batch.names, _starts(batch), batch.lengths.tolist(), strict=True):
                read.update((name, start + t) for t in range(length))
        wanted = Counter((name, t) for name, length in zip(names, lengths, strict=True) for t in range(length))
        assert read == wanted, f"an epoch of {split} does not read every step exactly once"


def reads_windows_as_parts_of_the_whole(make: Make) -> None:
    """``window(index, first, last)`` reads what the whole sequence holds there."""
    datamodule = _ready(make)
    for split in SPLITS:
        dataset = _loader(datamodule, split).dataset
        length = datamodule.lengths(split)[0]
        whole = dataset[[0]]
        for first, last in {(0, length), (0, 1), (length // 2, length), (length - 1, length)}:
            where = f"steps {first} to {last} of {split} 0"
            batch, expected = dataset[[Window(0, first, last, False)]], whole.window(first, last)
            assert batch.names == expected.names, f"{where}: names differ from the whole sequence's"
            assert torch.equal(batch.lengths, expected.lengths), f"{where}: {batch.lengths.item()} steps"
            assert batch.start is not None
            assert expected.start is not None
            assert torch.equal(batch.start, expected.start), where
            assert batch.reset is not None
            assert batch.reset.tolist() == [False], where
            assert torch.equal(batch.valid_mask, expected.valid_mask), f"{where}: observed differs"
            torch.testing.assert_close(batch.x, expected.x, rtol=1e-5, atol=1e-5)
            inputs, wanted = batch.inputs, expected.inputs
            assert (inputs is None) == (wanted is None), f"{where}: inputs are there and not there"
            assert inputs is None or wanted is None or torch.equal(inputs, wanted), f"{where}: inputs differ"


def streams_carry_on(make: Make) -> None:
    """Where a row's state is carried, its window begins where the row's last one ended, in the same sequence."""
    datamodule = _ready(make, batch_size=3)
    previous: SequenceBatch | None = None
    for batch in datamodule.train_dataloader():
        if datamodule.window is None:
            assert batch.reset is None, "whole sequences are not stream"
            continue
        assert batch.reset is not None
        assert batch.start is not None
        assert batch.reset.dtype == torch.bool
        assert batch.reset.shape == batch.start.shape == batch.lengths.shape == (3,)
        assert batch.lengths.max() <= datamodule.window, "a window is too long"
        if previous is None:
            assert batch.reset.all(), "an epoch's first windows carry a state"
        else:
            assert batch.names is not None
            assert previous.names is not None
            assert previous.start is not None
            carried = (~batch.reset).nonzero().flatten().tolist()
            assert all(batch.names[i] == previous.names[i] for i in carried), "a state continues in another sequence"
            ends = previous.start + previous.lengths
            assert torch.equal(batch.start[carried], ends[carried]), "a state continues elsewhere in its sequence"
            assert ((batch.start == 0) | ~batch.reset | (batch.lengths == 0)).all(), "a state is lost"
        previous = batch


def shards_over_processes(make: Make) -> None:
    """Two processes see together what one does, and no sequence twice."""
    for split in SPLITS:
        datamodule = _ready(make)
        lengths = list(datamodule.lengths(split))
        size = next(size for size in range(1, len(lengths) + 1) if len(lengths) % (2 * size))  # an uneven last batch
        alone, first, second = (
            _batches_of(make, split, *place) for place in ((2 * size, 1, 0), (size, 2, 0), (size, 2, 1))
        )
        assert len(first) == len(second) == len(alone), "processes take different numbers of steps"
        for together, a, b in zip(alone, first, second, strict=True):
            assert sorted(together) == sorted(i for i in a + b if i >= 0), "two processes see another batch than one"
        kept = [i for i, length in enumerate(lengths) if length]
        assert sorted(i for batch in alone for i in batch) == kept, "a sequence is left out or read twice"


def _batches_of(make: Make, split: Split, size: int, processes: int, rank: int) -> list[list[int]]:
    """Return which sequences one of several processes sees in each step, as its own loader has them."""
    datamodule = _ready(make, batch_size=size)
    datamodule.window = None  # whole sequences, a number each
    root_device = torch.device("cpu")
    trainer: Any = SimpleNamespace(
        world_size=processes, global_rank=rank, strategy=SimpleNamespace(root_device=root_device)
    )
    datamodule.trainer = trainer
    items: Any = _loader(datamodule, split).sampler
    return [list(numbers) for numbers in items]


def orders_by_seed_and_epoch(make: Make) -> None:
    """Each epoch of training has an order of its own, the same whenever it is asked for; others have one order."""

    def orders(split: Split) -> list[list[Any]]:
        loader = _loader(_ready(make, batch_size=1), split)
        found = []
        for epoch in range(6):
            loader.sampler.set_epoch(epoch)
            found.append([item for items in loader.sampler for item in items])
        return found

    train = orders("train")
    assert train == orders("train"), "two datamodules of one seed differ in the order of training"
    assert len(train[0]) == 1 or len({tuple(order) for order in train}) > 1, "training is not shuffled"
    for split in ("val", "test"):
        assert len({tuple(order) for order in orders(split)}) == 1, f"{split} is shuffled"


def goes_on_in_the_middle_of_an_epoch(make: Make) -> None:
    """A loader that is given another one's state yields what was left of its epoch."""
    whole = list(_ready(make, batch_size=2).train_dataloader())
    stopped = _ready(make, batch_size=2).train_dataloader()
    batches = iter(stopped)
    for _ in range(len(whole) // 2):
        next(batches)
    resumed = _ready(make, batch_size=2).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    rest = list(resumed)
    assert len(rest) == len(whole) - len(whole) // 2, "a resumed epoch is too long or too short"
    for one, other in zip(whole[len(whole) // 2 :], rest, strict=True):
        _equal(one, other)


def changes_with_the_epoch_alone(make: Make) -> None:
    """Sequences of training that are redrawn every epoch keep names and lengths; others never change."""
    datamodule = _ready(make, batch_size=3)
    loader = datamodule.train_dataloader()
    changes = isinstance(datamodule.split("train"), ChangingSequences)
    found: list[dict[Any, Tensor]] = []
    for epoch in (0, 2, 0):
        read: dict[Any, Tensor] = {}
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            assert batch.names is not None
            places = zip(batch.names, _starts(batch), batch.lengths.tolist(), batch.x, strict=True)
            read |= {(name, start, n): x[:n] for name, start, n, x in places if n}
        found.append(read)
    first, second, again = found
    both = first.keys() & second.keys()
    assert all(torch.equal(first[place], again[place]) for place in first), "an epoch read again differs"
    if not changes:
        assert all(torch.equal(first[place], second[place]) for place in both), (
            "sequences change between epochs; define in_epoch(epoch) so that a resume reads the same"
        )
        return
    for split in SPLITS[1:]:
        assert not isinstance(datamodule.split(split), ChangingSequences), "what is measured on must not change"
    changing: Any = datamodule.split("train")
    sequences = changing.in_epoch(1)
    drawn = [sequences[i] for i in range(len(sequences))]
    assert [s.name for s in drawn] == _names(datamodule, "train"), "in_epoch changes names or their order"
    assert [len(s.x) for s in drawn] == list(datamodule.lengths("train")), "in_epoch changes lengths"
    assert any(not torch.equal(first[place], second[place]) for place in both), "in_epoch changes nothing"


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
    values = {split: [s.x.numpy().tobytes() for s in _sequences(datamodule, split)] for split in SPLITS}
    for i, split in enumerate(SPLITS):
        for other in SPLITS[:i]:
            assert not names[split] & names[other], f"{split} and {other} share sequences"
            held = set(values[other])
            alike = sum(x in held for x in values[split])
            assert 2 * alike < len(values[split]), f"{alike} sequences of {split} are in {other} as well"


def reads_alike_in_processes(make: Make) -> None:
    """Processes that read ahead change nothing."""
    alone, helped = _ready(make, batch_size=2), _ready(make, batch_size=2, num_workers=2)
    here, there = alone.train_dataloader(), helped.train_dataloader()
    for epoch in (0, 2):  # the processes outlive an epoch
        for loader in (here, there):
            loader.sampler.set_epoch(epoch)
        for one, other in zip(here, there, strict=True):
            _equal(one, other)
    there.close()


def pickles(make: Make) -> None:
    """What is read from can travel to a process."""
    dataset = _ready(make).train_dataloader().dataset
    travelled = pickle.loads(pickle.dumps(dataset))  # its own dump, as a reading process gets it
    _equal(travelled[[0]], dataset[[0]])


def pads_a_process_without_data(make: Make) -> None:
    """A process for which nothing is left gets a sequence of no steps."""
    dataset = _ready(make).train_dataloader().dataset
    nothing, something = dataset[[-1]], dataset[[0]]
    assert nothing.names == [NOBODY]
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
    streams_carry_on,
    shards_over_processes,
    orders_by_seed_and_epoch,
    goes_on_in_the_middle_of_an_epoch,
    changes_with_the_epoch_alone,
    survives_a_checkpoint,
    keeps_the_splits_apart,
    reads_alike_in_processes,
    pickles,
    pads_a_process_without_data,
)
"""Every promise; each takes a function that returns a fresh datamodule."""
