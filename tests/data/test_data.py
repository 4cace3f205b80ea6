"""Padding, shards, resuming and scaling: what the base of all datamodules does."""

from __future__ import annotations

import gc
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from vrnn_lightning.batch import SequenceBatch, SequenceSample, pad
from vrnn_lightning.data import BatchSampler, Scaler, SequenceDataModule, SequenceLoader, Window, data_root
from vrnn_lightning.data.loading import ScaledSequences
from vrnn_lightning.errors import UserError


def ragged(lengths, width=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [SequenceSample(torch.randn(n, width, generator=generator), name=str(i)) for i, n in enumerate(lengths)]


def sampler_of(sequences, **options):
    defaults = {"batch_size": 2, "shuffle": True, "seed": 0, "num_replicas": 1, "rank": 0}
    return BatchSampler([len(s.x) for s in sequences], **defaults | options)


class Given(SequenceDataModule):
    """Serves the sequences it was given, the same in every split."""

    def __init__(self, given, scaling="none", **options):
        super().__init__(given[0].x.shape[-1], **options)
        self.given = given
        self.scaling = scaling

    def sequences(self, split):
        return self.given


class Changing(list):
    """Sequences whose values are the epoch's number."""

    def in_epoch(self, epoch):
        return [SequenceSample(torch.full_like(s.x, epoch), name=s.name) for s in self]

    def __getitem__(self, index):
        return self.in_epoch(0)[index]


class TestPad:
    def test_values_lengths_and_zeros(self):
        sequences = ragged([3, 0, 5])
        batch = pad(sequences)
        assert batch.x.shape == (3, 5, 2)
        assert batch.lengths.tolist() == [3, 0, 5]
        assert batch.lengths.dtype == torch.int64
        assert batch.names == ["0", "1", "2"]
        assert len(batch) == 3
        for row, s in zip(batch.x, sequences, strict=True):
            assert torch.equal(row[: len(s.x)], s.x)
            assert row[len(s.x) :].count_nonzero() == 0

    def test_mask_counts_real_steps(self):
        batch = pad(ragged([3, 0, 5]))
        assert batch.mask.sum(1).tolist() == [3, 0, 5]
        assert batch.mask[0].tolist() == [True] * 3 + [False] * 2
        assert batch.valid_mask.sum() == 8 * 2

    def test_observed_of_one_sequence_means_everywhere_in_the_others(self):
        seen = torch.tensor([[True, False]])
        batch = pad([SequenceSample(torch.ones(1, 2), observed=seen), SequenceSample(torch.ones(3, 2))])
        assert batch.valid_mask[0].tolist() == [[True, False], [False, False], [False, False]]
        assert batch.valid_mask[1].all()

    def test_inputs_are_padded_with_zeros(self):
        batch = pad([SequenceSample(torch.ones(1, 2), inputs=torch.ones(1, 4)), SequenceSample(torch.ones(3, 2))])
        assert batch.inputs.shape == (2, 3, 4)
        assert batch.inputs.sum() == 4

    def test_nothing_but_empty_sequences_is_one_step_of_padding(self):
        batch = pad(ragged([0, 0]))
        assert batch.x.shape == (2, 1, 2)
        assert not batch.mask.any()

    @pytest.mark.parametrize("shape", [(4,), (4, 3), (1, 4, 2)])
    def test_names_a_sequence_of_another_shape(self, shape):
        with pytest.raises(UserError, match=r"odd: shape .*, expected \(time, 2\)"):
            pad([SequenceSample(torch.zeros(4, 2)), SequenceSample(torch.zeros(shape), name="odd")])

    def test_precision_is_kept(self):
        assert pad([SequenceSample(torch.zeros(1, 1, dtype=torch.float64))]).x.dtype == torch.float64


class TestWindowOfABatch:
    def test_steps_lengths_and_starts(self):
        sequences = ragged([3, 0, 5])
        batch = pad(sequences).window(2, 4)
        assert batch.x.shape == (3, 2, 2)
        assert batch.lengths.tolist() == [1, 0, 2]
        assert batch.start.tolist() == [2, 2, 2]
        assert batch.lengths.dtype == batch.start.dtype == torch.int64
        assert batch.names == ["0", "1", "2"]
        assert torch.equal(batch.x[2], sequences[2].x[2:4])
        assert torch.equal(batch.x[0, 0], sequences[0].x[2])
        assert batch.reset is None

    def test_observed_and_inputs_go_along(self):
        seen, inputs = torch.rand(5, 2) > 0.5, torch.randn(5, 3)
        batch = pad([SequenceSample(torch.ones(5, 2), seen, inputs)]).window(1, 3)
        assert torch.equal(batch.observed[0], seen[1:3])
        assert torch.equal(batch.inputs[0], inputs[1:3])

    def test_windows_cover_the_batch(self):
        batch = pad(ragged([7, 1, 4]))
        parts = [batch.window(first, first + 3) for first in range(0, 7, 3)]
        assert torch.equal(sum(part.lengths for part in parts), batch.lengths)
        assert torch.equal(torch.cat([part.x for part in parts], 1), batch.x)

    @pytest.mark.parametrize(("first", "last"), [(5, 9), (9, 12), (4, 4)])
    def test_it_is_at_least_one_step_long(self, first, last):
        batch = pad(ragged([3, 5])).window(first, last)
        assert batch.x.shape == (2, 1, 2)
        assert batch.lengths.tolist() == [0, 0]

    def test_a_window_of_a_window_starts_where_it_stands(self):
        batch = pad(ragged([9])).window(2, 8).window(3, 5)
        assert batch.start.tolist() == [5]
        assert batch.lengths.tolist() == [2]

    def test_only_a_first_window_is_a_new_beginning(self):
        batch = pad(ragged([4, 4]))
        batch.reset = torch.tensor([True, False])
        assert batch.window(0, 2).reset.tolist() == [True, False]
        assert batch.window(2, 4).reset.tolist() == [False, False]

    def test_rows_keep_reset_and_start(self):
        batch = pad(ragged([4, 2, 3])).window(1, 4)
        batch.reset = torch.tensor([True, False, True])
        batch.start = torch.tensor([7, 8, 9])
        rows = batch.rows([2, 1])
        assert rows.x.shape[1] == 2
        assert rows.reset.tolist() == [True, False]
        assert rows.start.tolist() == [9, 8]
        assert rows.names == ["2", "1"]


class TestBatchSampler:
    @pytest.mark.parametrize("number", [1, 2, 7, 12, 83])
    @pytest.mark.parametrize("replicas", [1, 2, 3])
    @pytest.mark.parametrize("shuffle", [True, False])
    def test_processes_share_each_global_batch(self, number, replicas, shuffle):
        sequences = ragged([1 + i % 5 for i in range(number)], width=1)
        options = {"batch_size": 2, "shuffle": shuffle}
        shards = [list(sampler_of(sequences, num_replicas=replicas, rank=r, **options)) for r in range(replicas)]
        alone = list(sampler_of(sequences, batch_size=2 * replicas, shuffle=shuffle))
        assert {len(shard) for shard in shards} == {len(alone)} == {math.ceil(number / (2 * replicas))}
        for batch, parts in zip(alone, zip(*shards, strict=True), strict=True):
            assert sorted(batch) == sorted(i for part in parts for i in part if i >= 0)
            assert all(len(part) <= 2 and part for part in parts)
        assert sorted(i for batch in alone for i in batch) == list(range(number))

    def test_order_is_a_function_of_seed_and_epoch(self):
        def order(seed, epoch):
            sampler = sampler_of(ragged([1] * 50), seed=seed)
            sampler.set_epoch(epoch)
            return list(sampler)

        assert order(3, 1) == order(3, 1)
        assert order(3, 1) != order(3, 2)
        assert order(3, 1) != order(4, 1)

    def test_without_shuffle_like_lengths_share_a_batch_in_the_data_s_order(self):
        assert list(sampler_of(ragged([5, 1, 3]), shuffle=False)) == [[0, 2], [1]]
        assert list(sampler_of(ragged([4, 4, 4, 4, 4]), shuffle=False)) == [[0, 1], [2, 3], [4]]

    def test_like_lengths_share_a_batch(self):
        lengths = torch.randperm(400, generator=torch.Generator().manual_seed(0)) + 1
        sampler = BatchSampler(lengths.tolist(), 10, shuffle=True, seed=0, num_replicas=1, rank=0)
        padding = sum(len(b) * int(lengths[b].max()) - int(lengths[b].sum()) for b in sampler)
        assert padding < 0.1 * int(lengths.sum())


LENGTHS = {
    "ragged": [17, 3, 1, 9, 40, 8, 8, 2, 5, 11, 23],
    "one step": [1] * 13,
    "one long": [1000],
    "long and short": [300, 1, 1, 2, 150, 3],
    "few": [2, 1],
    "with empty ones": [0, 6, 0, 9, 4, 0],
}


def streams_of(lengths, window, batch_size=2, epoch=0, **options):
    defaults = {"shuffle": True, "seed": 0, "num_replicas": 1, "rank": 0}
    sampler = BatchSampler(lengths, batch_size, window=window, **defaults | options)
    sampler.set_epoch(epoch)
    return sampler


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [1, 4, 8, 2000])
class TestStreams:
    @pytest.mark.parametrize("size", [1, 2, 3, 16])
    @pytest.mark.parametrize("replicas", [1, 2, 3])
    def test_every_step_is_read_once_and_processes_share_the_rows(self, lengths, window, size, replicas):
        shards = [list(streams_of(lengths, window, size, num_replicas=replicas, rank=r)) for r in range(replicas)]
        alone = list(streams_of(lengths, window, size * replicas))
        assert {len(shard) for shard in shards} == {len(alone)} == {len(streams_of(lengths, window, size * replicas))}
        for batch, parts in zip(alone, zip(*shards, strict=True), strict=True):
            for rank, part in enumerate(parts):
                assert len(part) == size
                assert part == batch[rank::replicas]
        read = Counter((w.sequence, t) for batch in alone for w in batch for t in range(w.first, w.last))
        assert read == Counter((i, t) for i, length in enumerate(lengths) for t in range(length))

    @pytest.mark.parametrize("size", [1, 2, 5])
    def test_a_row_goes_on_or_starts_anew(self, lengths, window, size):
        previous = [None] * size
        for batch in streams_of(lengths, window, size):
            for i, row in enumerate(batch):
                assert row.last - row.first <= window
                if previous[i] is None or row.sequence < 0:
                    assert row.reset
                elif not row.reset:
                    assert (row.sequence, row.first) == (previous[i].sequence, previous[i].last)
                    assert previous[i].last - previous[i].first == window
                else:
                    assert row.first == 0
                    assert previous[i].last == lengths[previous[i].sequence], "a sequence ends before the next begins"
            previous = batch

    def test_rows_are_empty_in_the_last_batch_alone(self, lengths, window):
        for batch in list(streams_of(lengths, window, 3))[:-1]:
            assert all(row.sequence >= 0 for row in batch)

    def test_the_rows_are_the_shuffled_sequences_end_to_end(self, lengths, window):
        batches = list(streams_of(lengths, window, 3))
        laid = [w.sequence for rows in zip(*batches, strict=True) for w in rows if w.sequence >= 0]
        changes = [i for i, before in zip(laid, [None, *laid[:-1]], strict=True) if i != before]
        assert len(changes) == sum(length > 0 for length in lengths)

    @pytest.mark.parametrize("read", [0, 1, 2])
    def test_resumes_within_an_epoch(self, lengths, window, read):
        sampler = streams_of(lengths, window)
        whole = list(sampler)
        sampler.skipped = (sampler.epoch, read)
        assert list(sampler) == whole[read:]
        assert list(sampler) == whole, "only the first epoch is shortened"

    def test_whole_sequences_share_a_budget(self, lengths, window):
        size, replicas = 3, 2
        samplers = [
            streams_of(lengths, window, size, shuffle=False, num_replicas=replicas, rank=r) for r in range(replicas)
        ]
        shards = [list(sampler) for sampler in samplers]
        assert {len(sampler) for sampler in samplers} == {len(shard) for shard in shards}
        for shard in shards:
            for batch in shard:
                longest = max((lengths[i] for i in batch if i >= 0), default=0)
                assert len(batch) == 1 or (len(batch) <= size and len(batch) * longest <= size * window)
        read = sorted(i for shard in shards for batch in shard for i in batch if i >= 0)
        assert read == [i for i, length in enumerate(lengths) if length]


class TestStreamsAtLarge:
    def test_order_is_a_function_of_seed_and_epoch(self):
        def order(seed, epoch):
            return list(streams_of([5, 9, 3] * 10, 4, seed=seed, epoch=epoch))

        assert order(3, 1) == order(3, 1)
        assert order(3, 1) != order(3, 2)
        assert order(3, 1) != order(4, 1)

    def test_one_long_sequence_is_cut_into_equal_stretches(self):
        batches = list(streams_of([4000], 10, 4))
        assert [row.first for row in batches[0]] == [0, 1000, 2000, 3000]
        assert [row.reset for row in batches[0]] == [True] * 4
        assert len(batches) == 100
        assert not any(row.reset for batch in batches[1:] for row in batch)

    def test_validation_wastes_little(self):
        lengths = (torch.randperm(400, generator=torch.Generator().manual_seed(0)) + 1).tolist()
        batches = list(streams_of(lengths, 100, 10, shuffle=False))
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        assert padded < 1.05 * sum(lengths)

    def test_validation_begins_with_the_first_sequence(self):
        batches = list(streams_of([5, 1, 5, 1, 30], 10, 2, shuffle=False))
        assert batches == [[0, 2], [1, 3], [4]]


class Lazily:
    """Sequences that are read when asked for, and count how often."""

    def __init__(self, given):
        self.given = given
        self.reads = Counter()

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.given[index]


class InParts(Lazily):
    """The same, but each is read in parts."""

    def __getitem__(self, index):
        raise AssertionError("read whole")

    def window(self, index, first, last):
        self.reads[index, first, last] += 1
        s = self.given[index]
        observed, inputs = (None if v is None else v[first:last] for v in (s.observed, s.inputs))
        return SequenceSample(s.x[first:last], observed, inputs, s.name)


class TestReadingWindows:
    @staticmethod
    def loader(sequences, lengths, window=4, size=2, **options):
        return SequenceLoader(
            sequences,
            Scaler(torch.tensor([3.0, -1.0]), torch.tensor(2.0)),
            2,
            streams_of(lengths, window, size),
            **options,
        )

    @pytest.mark.parametrize("kind", [list, Lazily, InParts])
    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_batches_are_slices_of_the_sequences(self, kind, workers):
        lengths = [17, 3, 1, 9, 40, 8]
        given = ragged(lengths)
        loader = self.loader(kind(given), lengths, num_workers=workers)
        for batch, rows in zip(loader, streams_of(lengths, 4), strict=True):
            assert batch.x.dtype == torch.float32
            assert batch.reset.tolist() == [row.reset for row in rows]
            assert batch.start.tolist() == [row.first for row in rows]
            assert batch.lengths.tolist() == [row.last - row.first for row in rows]
            for x, name, row in zip(batch.x, batch.names, rows, strict=True):
                assert name == (str(row.sequence) if row.sequence >= 0 else "(none)")
                expected = given[row.sequence].x[row.first : row.last]
                scaled = (expected - torch.tensor([3.0, -1.0])) / 2
                torch.testing.assert_close(x[: len(expected)], scaled)
                assert x[len(expected) :].count_nonzero() == 0

    def test_a_sequence_is_read_once_for_all_its_windows(self):
        lengths = [400, 8, 300, 12, 50, 10]
        sequences = Lazily(ragged(lengths))
        loader = self.loader(sequences, lengths)
        list(loader)
        assert set(sequences.reads) == set(range(6))
        assert sequences.reads.total() <= len(lengths) + 1, "the sequence that two streams share is read for each"

    def test_no_more_is_kept_than_a_batch_needs(self):
        lengths = [9] * 40
        loader = self.loader(Lazily(ragged(lengths)), lengths)
        for batch in loader:
            assert set(loader.dataset._whole) <= {int(name) for name in batch.names if name != "(none)"}

    @pytest.mark.parametrize("kind", [list, InParts])
    def test_covariates_and_masks_are_cut_alike(self, kind):
        given = [SequenceSample(torch.randn(9, 2), torch.rand(9, 2) > 0.5, torch.randn(9, 3), "a")]
        loader = SequenceLoader(kind(given), Scaler(), 2, streams_of([9], 4, 1), 3)
        batches = list(loader)
        assert torch.equal(torch.cat([b.inputs[0, : b.lengths[0]] for b in batches]), given[0].inputs)
        assert torch.equal(torch.cat([b.observed[0, : b.lengths[0]] for b in batches]), given[0].observed)

    @pytest.mark.parametrize("kind", [list, InParts])
    def test_a_batch_of_nothing_has_its_covariates(self, kind):
        given = [SequenceSample(torch.randn(9, 2), None, torch.randn(9, 3), "a")]
        dataset = SequenceLoader(kind(given), Scaler(), 2, streams_of([9], 4, 1), 3).dataset
        batch = dataset[[Window(-1, 0, 0, True)] * 2]
        assert batch.inputs.shape == (2, 1, 3)
        assert batch.valid_mask.sum() == 0
        assert batch.reset.all()
        assert batch.start.tolist() == [0, 0]

    @pytest.mark.parametrize("kind", [list, InParts])
    def test_what_is_wrong_with_a_window_is_said(self, kind):
        given = ragged([9])
        given[0].x[7, 1] = math.nan
        with pytest.raises(UserError, match="0: holds NaN or infinite values"):
            list(self.loader(kind(given), [9]))

    @pytest.mark.parametrize("kind", [list, InParts])
    def test_a_sequence_shorter_than_promised_is_named(self, kind):
        with pytest.raises(
            UserError,
            match=r"0: read 1 steps from step 4 on, expected 4. Fix: return the true lengths from lengths\(\)",
        ):
            list(self.loader(kind(ragged([5])), [9], size=1))

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("read", [0, 1, 3])
    def test_resumes_within_an_epoch(self, read, workers):
        lengths = [17, 3, 1, 9, 40, 8]
        whole = [(b.names, b.start.tolist()) for b in self.loader(ragged(lengths), lengths)]
        resumed = self.loader(ragged(lengths), lengths, num_workers=workers)
        resumed.load_state_dict({"batches_read": read})
        assert [(b.names, b.start.tolist()) for b in resumed] == whole[read:]

    def test_a_number_called_window_is_not_taken_for_a_method(self):
        sequences = Lazily(ragged([9]))
        sequences.window = 4
        assert sum(int(batch.lengths.sum()) for batch in self.loader(sequences, [9])) == 9


class TestMomentsInPieces:
    @pytest.mark.parametrize("scaling", ["scalar", "per_feature"])
    @pytest.mark.parametrize("kind", [list, Lazily, InParts])
    def test_they_are_those_of_the_whole(self, scaling, kind, monkeypatch):
        lengths = [17, 0, 3, 40]
        given = ragged(lengths)
        for s in given:
            s.observed = torch.rand(s.x.shape, generator=torch.Generator().manual_seed(1)) > 0.3
        whole = Given(given, scaling).scaler
        monkeypatch.setattr("vrnn_lightning.data.datamodule.PIECE", 5)
        datamodule = Given(given, scaling)
        datamodule.given = kind(given)
        monkeypatch.setattr(datamodule, "lengths", lambda split: lengths)
        torch.testing.assert_close(datamodule.scaler.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(datamodule.scaler.std, whole.std, rtol=1e-12, atol=1e-12)
        if kind is Lazily:
            assert datamodule.given.reads == Counter([0, 2, 3])
        if kind is InParts:
            assert max(last - first for _, first, last in datamodule.given.reads) == 5

    def test_lengths_are_found_once(self):
        datamodule = Given(ragged([3, 4]), "scalar")
        datamodule.given = Lazily(datamodule.given)
        datamodule.train_dataloader()
        datamodule.train_dataloader()
        assert set(datamodule.given.reads.values()) == {2}, "once for the lengths, once for the scaler"


class TestSequenceLoader:
    @staticmethod
    def loader(sequences, **options):
        return SequenceLoader(sequences, Scaler(), 2, sampler_of(sequences), **options)

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("read", [0, 1, 3, 5])
    def test_resumes_within_an_epoch(self, read, workers):
        sequences = ragged([1, 2, 3, 4, 5, 6, 7, 8, 9])  # five batches
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        first = self.loader(sequences, **options)
        whole = [batch.names for batch in first]
        stopped = self.loader(sequences, **options)
        batches = iter(stopped)
        for _ in range(read):
            next(batches)
        resumed = self.loader(sequences, **options)
        resumed.load_state_dict(stopped.state_dict())
        assert [batch.names for batch in resumed] == whole[read % 5 :]
        assert [batch.names for batch in resumed] == whole, "only the first epoch is shortened"

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("window", [None, 2])
    def test_what_changes_with_the_epoch_is_read_as_in_the_order_s_epoch(self, workers, window):
        """In processes that outlive epochs, after an epoch that was left early, and where a resume begins."""
        made = ragged([1, 2, 3, 4, 5])

        def loader():
            options = {"num_workers": workers, "persistent_workers": workers > 0}
            return SequenceLoader(Changing(made), Scaler(), 2, sampler_of(made, window=window), **options)

        def read(loader, epoch):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                yield batch.names, {round(value) for value in batch.x[batch.mask].flatten().tolist()}

        kept = loader()
        whole = {epoch: list(read(kept, epoch)) for epoch in (0, 3, 4)}
        assert all(values == {epoch} for epoch in whole for _, values in whole[epoch])
        next(read(kept, 5))
        assert list(read(kept, 3)) == whole[3]
        resumed = loader()
        resumed.load_state_dict({"batches_read": 2})
        assert list(read(resumed, 3)) == whole[3][2:]
        assert list(read(resumed, 4)) == whole[4]

    def test_counts_from_the_resumed_batch_on(self):
        sequences = ragged([1] * 9)
        loader = self.loader(sequences)
        loader.load_state_dict({"batches_read": 2})
        next(iter(loader))
        assert loader.state_dict()["batches_read"] == 3

    def test_an_epoch_read_to_its_end_leaves_nothing_to_skip(self):
        loader = self.loader(ragged([1] * 9))
        list(loader)
        assert loader.state_dict()["batches_read"] == 0

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_user_s_mistake_is_one_line_from_any_process(self, workers, monkeypatch):
        monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # else a failed worker ends in 5 s
        sequences = [SequenceSample(torch.tensor([[0.0, math.nan]]), name="bad.wav")]
        with pytest.raises(UserError) as raised:
            list(self.loader(sequences, num_workers=workers))
        assert str(raised.value) == "bad.wav: holds NaN or infinite values. Fix: correct or remove it"
        del raised
        gc.collect()  # ends the worker

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_was_not_observed_may_be_anything(self, value):
        observed = torch.tensor([[True, False]])
        batch = next(iter(self.loader([SequenceSample(torch.tensor([[1.0, value]]), observed)])))
        assert batch.x.tolist() == [[[1.0, 0.0]]]

    def test_a_wrong_width_is_named(self):
        with pytest.raises(UserError, match=r"sequence 0: shape \(1, 3\), expected \(time, num_features=2\)"):
            list(self.loader([SequenceSample(torch.zeros(1, 3))]))

    def test_a_process_without_data_still_has_covariates(self):
        sequences = [SequenceSample(torch.ones(4, 2), torch.ones(4, 2) > 0, torch.ones(4, 3), "a")]
        idle = SequenceLoader(sequences, Scaler(), 2, sampler_of(sequences, num_replicas=2, rank=1))
        (batch,) = idle
        assert batch.names == ["(none)"]
        assert batch.lengths.tolist() == [0]
        assert batch.inputs.shape == (1, 1, 3)
        assert batch.valid_mask.sum() == 0


class TestScaler:
    def test_round_trip(self):
        scaler = Scaler(torch.tensor([1.0, -3.0]), torch.tensor([2.0, 0.5]))
        x = torch.randn(4, 5, 2, dtype=torch.float64)
        torch.testing.assert_close(scaler.unscale(scaler.scale(x)), x, rtol=1e-12, atol=1e-12)
        assert scaler.scale(x).dtype == torch.float64

    def test_default_is_the_identity(self):
        x = torch.randn(3, 2)
        assert torch.equal(Scaler().scale(x), x)

    def test_per_feature_is_the_population_s(self):
        sequences = ragged([3, 8, 1])
        values = torch.cat([s.x for s in sequences]).double()
        scaler = Given(sequences, "per_feature").scaler
        torch.testing.assert_close(scaler.mean.double(), values.mean(0))
        torch.testing.assert_close(scaler.std.double(), values.std(0, correction=0))

    def test_scalar_is_over_all_values(self):
        sequences = ragged([3, 8, 1])
        values = torch.cat([s.x for s in sequences]).double()
        scaler = Given(sequences, "scalar").scaler
        assert scaler.mean.shape == scaler.std.shape == ()
        torch.testing.assert_close(scaler.mean.double(), values.mean())
        torch.testing.assert_close(scaler.std.double(), values.std(correction=0))

    def test_unobserved_values_do_not_count(self):
        observed = torch.tensor([[True], [True], [False]])
        scaler = Given([SequenceSample(torch.tensor([[1.0], [3.0], [99.0]]), observed)], "per_feature").scaler
        assert (scaler.mean.tolist(), scaler.std.tolist()) == ([2.0], [1.0])

    @pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6])
    def test_a_constant_feature_is_only_centred(self, value):
        sequences = [SequenceSample(torch.full((n, 1), value)) for n in (3, 1000, 77)]
        scaler = Given(sequences, "per_feature").scaler
        assert scaler.std.tolist() == [1.0]
        assert abs(float(scaler.scale(torch.tensor([value])))) <= 1e-6 * abs(value)

    def test_a_small_feature_is_not_taken_for_constant(self):
        scaler = Given([SequenceSample(torch.tensor([[1e-9], [-1e-9]]))], "per_feature").scaler
        assert float(scaler.std) == pytest.approx(1e-9)

    def test_scaled_training_data_are_standard(self):
        mean, std = Given([SequenceSample(3 + 5 * s.x) for s in ragged([30, 80])], "per_feature").input_statistics()
        torch.testing.assert_close(mean, torch.zeros(2), atol=1e-6, rtol=0)
        torch.testing.assert_close(std, torch.ones(2))


class TestSequenceDataModule:
    @pytest.mark.parametrize(
        ("option", "value"), [("batch_size", 0), ("num_workers", -1), ("window", 0), ("window", -3)]
    )
    def test_refuses(self, option, value):
        with pytest.raises(UserError, match=f"--data.{option} {value}: must be at least"):
            Given(ragged([1]), **{option: value})

    def test_an_empty_split_is_named(self):
        datamodule = Given(ragged([1]))
        datamodule.given = []
        with pytest.raises(UserError, match="Given: the val split is empty"):
            datamodule.split("val")

    def test_the_checkpoint_s_scaler_is_not_fitted_again(self):
        trained, other = Given(ragged([5], seed=0), "per_feature"), Given(ragged([5], seed=1), "per_feature")
        other.load_state_dict(trained.state_dict())
        assert torch.equal(other.scaler.mean, trained.scaler.mean)

    def test_batches_are_scaled(self):
        datamodule = Given(ragged([4, 4]), "per_feature")
        batch = next(iter(datamodule.test_dataloader()))
        torch.testing.assert_close(datamodule.scaler.unscale(batch.x), torch.stack([s.x for s in datamodule.given]))


class WithInputs(Given):
    """Serves sequences with four covariates."""

    def __init__(self, given, **options):
        super().__init__(given, **options)
        self.num_inputs = 4


class TestInputs:
    def test_they_are_read_in_single_precision(self):
        given = [SequenceSample(torch.zeros(2, 1), inputs=torch.ones(2, 4, dtype=torch.int64))]
        inputs = next(iter(WithInputs(given).val_dataloader())).inputs
        assert inputs.dtype == torch.float32
        assert inputs.tolist() == [[[1.0] * 4] * 2]

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            (None, r"odd: inputs of shape None, expected \(3, 4\)"),
            (torch.ones(3, 2), r"odd: inputs of shape \(3, 2\), expected \(3, 4\)"),
            (torch.ones(2, 4), r"odd: inputs of shape \(2, 4\), expected \(3, 4\)"),
            (torch.ones(4), r"odd: inputs of shape \(4,\), expected \(3, 4\)"),
            (torch.full((3, 4), math.nan), "odd: holds NaN or infinite inputs. Fix: correct or remove it"),
        ],
    )
    def test_a_sequence_without_them_is_named(self, inputs, message):
        given = [
            SequenceSample(torch.zeros(2, 1), inputs=torch.ones(2, 4)),
            SequenceSample(torch.zeros(3, 1), None, inputs, "odd"),
        ]
        with pytest.raises(UserError, match=message):
            list(WithInputs(given).val_dataloader())

    def test_a_process_without_data_has_their_width(self):
        given = [SequenceSample(torch.zeros(2, 1), inputs=torch.ones(2, 4))]
        assert WithInputs(given).val_dataloader().dataset[[-1]].inputs.shape == (1, 1, 4)

    def test_none_are_expected_by_default(self):
        datamodule = Given(ragged([2]))
        assert datamodule.num_inputs == 0
        assert datamodule.missing is False
        assert next(iter(datamodule.val_dataloader())).inputs is None


def test_pinning_keeps_every_field():
    batch = SequenceBatch(torch.zeros(1, 1, 1), torch.tensor([1]), names=["a"])
    if not torch.cuda.is_available():
        pytest.skip("page-locked memory needs a GPU")
    assert batch.pin_memory().names == ["a"]


def test_a_large_offset_costs_no_precision():
    """Unit noise on a mean of a hundred million is standardised as if the mean were zero."""

    class Far(SequenceDataModule):
        scaling = "per_feature"

        def sequences(self, split):
            generator = torch.Generator().manual_seed(0)
            return [
                SequenceSample(torch.randn(200, 1, generator=generator, dtype=torch.float64) + 1e8) for _ in range(3)
            ]

    data = Far(num_features=1, batch_size=3)
    x = next(iter(data.val_dataloader())).x
    assert x.dtype == torch.float32
    assert x.mean().abs().item() < 1e-6
    assert x.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert len(x.unique()) > 500


def test_a_class_without_sequences_says_so():
    with pytest.raises(NotImplementedError, match="must define sequences"):
        SequenceDataModule(num_features=1).split("train")


def test_a_list_of_lengths_spares_the_reading():
    class Measured(Lazily):
        def __init__(self, given):
            super().__init__(given)
            self.lengths = [2, 3]

    class Unmeasured(list):
        def lengths(self):
            return [0, 0]

    of_two = ragged([2, 3])
    measured = Given([*of_two])
    measured.given = Measured(of_two)
    assert measured.lengths("train") == [2, 3]
    assert not measured.given.reads
    assert Given(Unmeasured(of_two)).lengths("train") == [2, 3]


def test_a_path_among_the_options_is_stored_as_words():
    class Rooted(SequenceDataModule):
        def __init__(self, root):
            super().__init__(num_features=1)

    assert Rooted(Path("here")).hparams["root"] == "here"


def test_covariates_keep_their_values_whatever_the_first_one_s_type():
    first = SequenceSample(torch.zeros(2, 3), inputs=torch.tensor([[1], [2]]), name="a")
    for value, refused in ((0.5, False), (float("nan"), True), (1e300, True)):
        later = SequenceSample(torch.zeros(2, 3), inputs=torch.full((2, 1), value, dtype=torch.float64), name="b")
        dataset = ScaledSequences([first, later], Scaler(), 3, 1)
        if refused:
            with pytest.raises(UserError, match=r"b: holds .*inputs"):
                dataset[[0, 1]]
        else:
            assert dataset[[0, 1]].inputs[1].flatten().tolist() == [value] * 2


def test_values_beyond_float32_are_refused():
    dataset = ScaledSequences([SequenceSample(torch.full((2, 3), 1e300, dtype=torch.float64), name="a")], Scaler(), 3)
    with pytest.raises(UserError, match="a: holds values too large for float32"):
        dataset[[0]]


def test_covariates_of_other_shapes_are_refused():
    xs = [SequenceSample(torch.zeros(2, 3), inputs=torch.zeros(2, width)) for width in (1, 2)]
    with pytest.raises(UserError, match=r"inputs of shape \(2, 2\), expected \(2, 1\)"):
        pad(xs)


def test_what_was_read_of_an_epoch_is_skipped_in_that_epoch_alone():
    """A run with limit_train_batches ends its epochs in the middle of a loader's."""

    def loader():
        data = Given(ragged([3] * 9), batch_size=2)
        data.setup("fit")
        return data.train_dataloader()

    stopped = loader()
    batches = iter(stopped)
    read = [next(batches).names for _ in range(2)]
    state = stopped.state_dict()
    for epoch, skipped in ((0, 2), (1, 0)):
        whole, resumed = loader(), loader()
        for each in (whole, resumed):
            each.sampler.set_epoch(epoch)
        resumed.load_state_dict(state)
        assert [b.names for b in resumed] == [b.names for b in whole][skipped:]
    assert len(read) == 2
    other = Given(ragged([3] * 9), batch_size=4).train_dataloader()
    with pytest.warns(UserWarning, match="the epoch starts again"):
        other.load_state_dict(state)
    assert len(list(other)) == 3


class TestRoot:
    def test_no_such_user(self):
        with pytest.raises(UserError, match=r"--data.root ~nobody-of-this-name/x: Could not determine home"):
            data_root("~nobody-of-this-name/x")

    def test_it_need_not_be_there(self, tmp_path):
        (tmp_path / "file").touch()
        for name in ("no", "no/deeper", "file/deeper", "file"):
            assert data_root(str(tmp_path / name)) == tmp_path / name
        assert data_root("~/x") == Path.home() / "x"
