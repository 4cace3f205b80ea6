"""What every datamodule promises, as checks to run over any of them.

Either ``check_datamodule(make)`` at once, or one test per promise with ``@pytest.mark.parametrize("check", CHECKS)``.
``make(**options)`` returns a fresh datamodule whose ``batch_size`` and ``num_workers`` are those given.
"""

from __future__ import annotations

import inspect
import io
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import torch

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.data import BatchSampler, ChangingSequences, Modality, SequenceDataModule, Split, Window

__all__ = ["CHECKS", "check_datamodule"]

Make = Callable[..., SequenceDataModule]
SPLITS: tuple[Split, ...] = get_args(Split)
NOBODY = "(none)"


def ready(make: Make, **options: Any) -> SequenceDataModule:
    datamodule = make(**options)
    datamodule.setup("fit")
    datamodule.setup("test")
    return datamodule


def loader_of(datamodule: SequenceDataModule, split: Split):
    return getattr(datamodule, f"{split}_dataloader")()


def names_of(datamodule: SequenceDataModule, split: Split) -> list[str]:
    sequences = datamodule.split(split)
    return [sequences[i].name for i in range(len(sequences))]


def assert_equal_batches(one: SequenceBatch, other: SequenceBatch) -> None:
    for field, value in vars(one).items():
        twin = getattr(other, field)
        same = torch.equal(value, twin) if isinstance(value, torch.Tensor) else value == twin
        assert same, f"{field} differs"


def knows_its_shape_before_setup(make: Make) -> None:
    datamodule = make()
    assert isinstance(datamodule.num_features, int)
    assert datamodule.num_features >= 1
    assert datamodule.modality in get_args(Modality)
    assert datamodule.num_inputs >= 0
    assert isinstance(datamodule.missing, bool)


def saves_its_options(make: Make) -> None:
    datamodule = make(batch_size=3)
    options = set(inspect.signature(type(datamodule)).parameters)
    assert options <= set(datamodule.hparams)
    assert datamodule.hparams["batch_size"] == 3
    assert datamodule.run_options <= options | {"root", "window"}


def scaler_is_affine(make: Make) -> None:
    scaler = ready(make).scaler
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 5, make().num_features, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(scaler.unscale(scaler.scale(a)), a)
    torch.testing.assert_close(scaler.scale((a + b) / 2), (scaler.scale(a) + scaler.scale(b)) / 2)
    assert (scaler.std > 0).all()
    assert torch.isfinite(scaler.std).all()
    assert torch.isfinite(scaler.mean).all()


def yields_padded_batches(make: Make) -> None:
    datamodule = ready(make, batch_size=3)
    for split in SPLITS:
        for batch in loader_of(datamodule, split):
            size, steps, width = batch.x.shape
            assert isinstance(batch, SequenceBatch)
            assert width == datamodule.num_features
            assert batch.x.dtype == torch.float32
            assert batch.lengths.dtype == torch.int64
            assert batch.lengths.shape == (size,)
            assert 1 <= batch.lengths.max() <= steps
            assert batch.x[~batch.mask].count_nonzero() == 0
            assert torch.isfinite(batch.x).all()
            assert batch.names is None or len(batch.names) == size
            if batch.observed is not None:
                assert batch.observed.dtype == torch.bool
                assert batch.observed.shape == batch.x.shape
                assert datamodule.missing or batch.observed[batch.mask].all(), "missing is False, but values are"
            if datamodule.num_inputs:
                assert batch.inputs is not None
                assert batch.inputs.shape[2] == datamodule.num_inputs
                assert torch.isfinite(batch.inputs).all()
            if batch.inputs is not None:
                assert batch.inputs.dtype == torch.float32
                assert batch.inputs.shape[:2] == (size, steps)
                assert batch.inputs[~batch.mask].count_nonzero() == 0


def returns_to_data_units(make: Make) -> None:
    datamodule = ready(make, batch_size=1)
    batch = next(iter(datamodule.test_dataloader()))
    original = datamodule.split("test")[0].x.float()
    counted = batch.counted[0]
    torch.testing.assert_close(datamodule.scaler.unscale(batch.x)[0][counted], original[counted])


def reads_every_sequence_once(make: Make) -> None:
    datamodule = ready(make, batch_size=2)
    for split in SPLITS:
        lengths = list(datamodule.lengths(split))
        assert lengths == [len(datamodule.split(split)[i].x) for i in range(len(datamodule.split(split)))]
        names = [name or f"sequence {i}" for i, name in enumerate(names_of(datamodule, split))]
        assert len(set(names)) == len(names), "noise is drawn by name"
        read: Counter[tuple[str, int]] = Counter()
        for batch in loader_of(datamodule, split):
            starts = [0] * len(batch) if batch.start is None else batch.start.tolist()
            for name, start, length in zip(batch.names, starts, batch.lengths.tolist(), strict=True):
                read.update((name, start + t) for t in range(length))
        assert read == Counter((name, t) for name, length in zip(names, lengths, strict=True) for t in range(length))


def reads_windows_as_parts_of_the_whole(make: Make) -> None:
    datamodule = ready(make)
    for split in SPLITS:
        dataset = loader_of(datamodule, split).dataset
        length = datamodule.lengths(split)[0]
        whole = dataset[[0]]
        for first, last in {(0, length), (0, 1), (length // 2, length), (length - 1, length)}:
            batch, expected = dataset[[Window(0, first, last, False)]], whole.window(first, last)
            assert batch.names == expected.names
            assert torch.equal(batch.lengths, expected.lengths)
            assert torch.equal(batch.start, expected.start)
            assert batch.reset.tolist() == [False]
            assert torch.equal(batch.counted, expected.counted)
            torch.testing.assert_close(batch.x, expected.x, rtol=1e-5, atol=1e-5)
            assert (batch.inputs is None) == (expected.inputs is None)
            assert batch.inputs is None or torch.equal(batch.inputs, expected.inputs)


def streams_carry_on(make: Make) -> None:
    """Where a row's state is carried, its window begins where the row's last one ended, in the same sequence."""
    datamodule = ready(make, batch_size=3)
    previous = None
    for batch in datamodule.train_dataloader():
        if datamodule.window is None:
            assert batch.reset is None, "whole sequences are no stream"
            continue
        assert batch.reset.dtype == torch.bool
        assert batch.reset.shape == batch.start.shape == batch.lengths.shape == (3,)
        assert batch.start.dtype == torch.int64
        assert batch.lengths.max() <= datamodule.window
        if previous is None:
            assert batch.reset.all()
        else:
            carried = (~batch.reset).nonzero().flatten().tolist()
            assert all(batch.names[i] == previous.names[i] for i in carried)
            assert torch.equal(batch.start[carried], (previous.start + previous.lengths)[carried])
            assert ((batch.start == 0) | ~batch.reset | (batch.lengths == 0)).all()
        previous = batch


def shards_over_processes(make: Make) -> None:
    datamodule = ready(make)
    for split in SPLITS:
        lengths = list(datamodule.lengths(split))
        size = next(size for size in range(1, len(lengths) + 1) if len(lengths) % (2 * size))  # an uneven last batch

        def batches(replicas: int, rank: int, size: int, lengths=lengths, split=split) -> list[list[int]]:
            shuffle = split == "train"
            return list(BatchSampler(lengths, size, shuffle=shuffle, seed=0, num_replicas=replicas, rank=rank))

        alone = batches(1, 0, 2 * size)
        first, second = batches(2, 0, size), batches(2, 1, size)
        assert len(first) == len(second) == len(alone)
        for together, a, b in zip(alone, first, second, strict=True):
            assert sorted(together) == sorted(i for i in a + b if i >= 0)
        assert sorted(i for batch in alone for i in batch) == list(range(len(lengths)))


def orders_by_seed_and_epoch(make: Make) -> None:
    def orders(split: Split) -> list[list[str]]:
        loader = loader_of(ready(make, batch_size=1), split)
        found = []
        for epoch in range(6):
            loader.sampler.set_epoch(epoch)
            found.append([name for indices in loader.sampler for name in indices])
        return found

    train = orders("train")
    assert train == orders("train")
    assert len(train[0]) == 1 or len({tuple(order) for order in train}) > 1
    for split in ("val", "test"):
        assert len({tuple(order) for order in orders(split)}) == 1


def changes_with_the_epoch_alone(make: Make) -> None:
    """Sequences of training that are drawn anew in each epoch keep names and lengths; others never change."""
    workers = ready(make, batch_size=3, num_workers=1)
    here, there = ready(make, batch_size=3).train_dataloader(), workers.train_dataloader()
    changes = isinstance(workers.split("train"), ChangingSequences)
    found = []
    for epoch in (0, 2, 0):  # processes that read outlive an epoch
        read = {}
        for loader in (here, there):
            loader.sampler.set_epoch(epoch)
        for batch, other in zip(here, there, strict=True):
            assert_equal_batches(batch, other)
            starts = [0] * len(batch) if batch.start is None else batch.start.tolist()
            places = zip(batch.names, starts, batch.lengths.tolist(), batch.x, strict=True)
            read |= {(name, start, n): x[:n] for name, start, n, x in places if n}
        found.append(read)
    first, second, again = found
    assert all(torch.equal(first[place], again[place]) for place in first)
    if not changes:
        assert all(torch.equal(first[place], second[place]) for place in first.keys() & second.keys())
        return
    assert any(not torch.equal(first[place], second[place]) for place in first.keys() & second.keys())
    for split in ("val", "test"):
        assert not isinstance(workers.split(split), ChangingSequences), "what is measured on must not change"
    sequences = workers.split("train").in_epoch(1)
    assert [sequences[i].name for i in range(len(sequences))] == names_of(workers, "train")
    assert [len(sequences[i].x) for i in range(len(sequences))] == list(workers.lengths("train"))


def survives_a_checkpoint(make: Make) -> None:
    trained = ready(make)
    file = io.BytesIO()
    torch.save({"state": trained.state_dict(), "options": dict(trained.hparams)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    loaded = ready(make)
    loaded.load_state_dict(saved["state"])
    assert torch.equal(loaded.scaler.mean, trained.scaler.mean)
    assert torch.equal(loaded.scaler.std, trained.scaler.std)
    assert saved["options"] == dict(trained.hparams)
    for split in SPLITS:
        assert names_of(loaded, split) == names_of(trained, split)


def keeps_the_splits_apart(make: Make) -> None:
    datamodule = ready(make)
    names = {split: {name for name in names_of(datamodule, split) if name} for split in SPLITS}
    firsts = [datamodule.split(split)[0].x for split in SPLITS]
    for i, split in enumerate(SPLITS):
        for j, other in enumerate(SPLITS[:i]):
            assert not names[split] & names[other], f"{split} and {other} share sequences"
            assert not torch.equal(firsts[i], firsts[j]), f"{split} and {other} begin alike"


def reads_alike_in_processes(make: Make) -> None:
    alone, helped = ready(make, batch_size=2), ready(make, batch_size=2, num_workers=2)
    assert helped.train_dataloader()._loader.num_workers == 2
    for one, other in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert_equal_batches(one, other)


def pickles(make: Make) -> None:
    dataset = ready(make).train_dataloader().dataset
    travelled = pickle.loads(pickle.dumps(dataset))  # its own dump, as a reading process gets it
    assert_equal_batches(travelled[[0]], dataset[[0]])


def pads_a_process_without_data(make: Make) -> None:
    dataset = ready(make).train_dataloader().dataset
    nothing, something = dataset[[-1]], dataset[[0]]
    assert nothing.names == [NOBODY]
    assert nothing.counted.sum() == 0
    assert (nothing.inputs is None) == (something.inputs is None)


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
    changes_with_the_epoch_alone,
    survives_a_checkpoint,
    keeps_the_splits_apart,
    reads_alike_in_processes,
    pickles,
    pads_a_process_without_data,
)


def check_datamodule(make: Make) -> None:
    """Check every promise of a datamodule."""
    for check in CHECKS:
        check(make)
