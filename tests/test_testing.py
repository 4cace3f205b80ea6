"""The contract's checks find what breaks it."""

from unittest import SkipTest

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from vrnn_lightning import SequenceDataModule, SequenceSample, UserError, testing
from vrnn_lightning.batch import pad
from vrnn_lightning.data import Scaler


class Rambles(SequenceDataModule):
    scaling = "per_feature"

    def __init__(self, size: int = 7, batch_size: int = 2, seed: int = 0):
        super().__init__(num_features=2, batch_size=batch_size, seed=seed)
        self.size = size

    def sequences(self, split):
        generator = torch.Generator().manual_seed(self.seed * 3 + ["train", "val", "test"].index(split))
        return [
            SequenceSample(torch.randn(n + 3, 2, generator=generator).cumsum(0), name=f"{split} {n}")
            for n in range(self.size)
        ]


@pytest.mark.parametrize("check", testing.CHECKS)
def test_a_datamodule_of_twenty_lines_keeps_every_promise(check):
    check(Rambles)


class SharesSequences(Rambles):
    def sequences(self, split):
        return super().sequences("train" if split == "test" else split)


class SharesUnnamed(Rambles):
    def sequences(self, split):
        of_train = super().sequences("train")
        found = of_train if split == "train" else [*super().sequences(split)[:1], *of_train[1:]]
        return [SequenceSample(s.x) for s in found]


class IgnoresTheProcess(Rambles):
    def train_dataloader(self):
        self.trainer = None
        return super().train_dataloader()


class ForgetsAnOption(Rambles):
    def __init__(self, size: int = 7):
        super().__init__()
        self.hparams.pop("size")


class SaysOtherLengths(Rambles):
    def lengths(self, split):
        return [n + 4 for n in range(self.size)]


class NamesTwice(Rambles):
    def sequences(self, split):
        return [SequenceSample(s.x, name=split) for s in super().sequences(split)]


class NoModality(Rambles):
    modality = "smell"


class HidesMissing(Rambles):
    def sequences(self, split):
        found = super().sequences(split)
        return [SequenceSample(s.x, torch.arange(len(s.x))[:, None].expand(-1, 2) > 0, name=s.name) for s in found]


class PromisesInputs(Rambles):
    num_inputs = 2

    def sequences(self, split):
        return [SequenceSample(s.x, None, s.x[:, :1], s.name) for s in super().sequences(split)]


class Unsteady(Rambles):
    def sequences(self, split):
        sequences = super().sequences(split)

        class Reader:
            def __len__(self):
                return len(sequences)

            def __getitem__(self, i):
                s = sequences[i]
                return SequenceSample(s.x + torch.rand(()), name=s.name)

        return Reader()


class ReadsOtherWindows(Rambles):
    def sequences(self, split):
        class Reader(list):
            def window(self, index, first, last):
                s = self[index]
                return SequenceSample(s.x[max(0, first - 1) : max(0, first - 1) + last - first], name=s.name)

        return Reader(super().sequences(split))


class NoAffineScaler(Rambles):
    def fit_scaler(self):
        class Log(Scaler):
            def scale(self, x):
                return x.abs().log1p() * x.sign()

        return Log()


class Drawn(list):
    """Sequences of an epoch."""

    def __init__(self, sequences, other):
        super().__init__(sequences)
        self.other = other

    def in_epoch(self, epoch):
        return self.other(epoch)


class DrawsOtherLengths(Rambles):
    def sequences(self, split):
        found = super().sequences(split)
        if split != "train":
            return found
        return Drawn(found, lambda epoch: [SequenceSample(s.x[: len(s.x) - (epoch > 0)], name=s.name) for s in found])


class ChangesNothing(Rambles):
    def sequences(self, split):
        found = super().sequences(split)
        return Drawn(found, lambda epoch: found) if split == "train" else found


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (SharesSequences, "share sequences"),
        (SharesUnnamed, "6 sequences of val are in train as well"),
        (IgnoresTheProcess, "two processes see another batch|different numbers of steps"),
        (ForgetsAnOption, "size.*not in hparams"),
        (SaysOtherLengths, "lengths"),
        (NamesTwice, "several sequences of train"),
        (NoModality, "modality is 'smell'"),
        (HidesMissing, "missing is False"),
        (PromisesInputs, "inputs"),
        (Unsteady, "differ|Tensor-likes"),
        (ReadsOtherWindows, "Tensor-likes are not close"),
        (NoAffineScaler, "Tensor-likes are not close"),
        (DrawsOtherLengths, "changes lengths"),
        (ChangesNothing, "changes nothing"),
    ],
)
def test_broken_ones_are_caught(broken, message):
    with pytest.raises((AssertionError, UserError), match=message):
        testing.check_datamodule(broken)


class Plain(LightningDataModule):
    num_features = 2
    modality = "series"
    scaler = Scaler()

    def loader(self):
        return DataLoader([SequenceSample(torch.randn(n, 2)) for n in (3, 5, 4)], batch_size=2, collate_fn=pad)

    train_dataloader = val_dataloader = test_dataloader = loader


def test_of_another_lightning_datamodule_what_it_promises_is_checked():
    testing.check_datamodule(Plain)
    with pytest.raises(SkipTest, match="Plain is not a SequenceDataModule"):
        testing.pickles(Plain)


def test_another_lightning_datamodule_whose_batches_are_wrong():
    class Wide(Plain):
        num_features = 3

    with pytest.raises(AssertionError, match="2 features, num_features says 3"):
        testing.check_datamodule(Wide)
