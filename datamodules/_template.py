r"""A datamodule to copy: ``cp datamodules/_template.py datamodules/mydata.py``, then make it yours.

A file whose name has no leading underscore is found by itself: ``lightning fit --data MyData ...`` works at once, and
``lightning fit --data.help MyData`` lists the arguments of ``__init__`` with their docstring. Give your class its own
name. The base class scales, pads, batches, shuffles, shards over processes and resumes.

Needed:

- ``__init__`` passes ``num_features`` (values per time step) and the base class's own options to the base class. It
  opens no file: a checkpoint's model is built from it even without the data.
- ``sequences(split)`` returns the "train", "val" or "test" sequences in data units: a list of ``SequenceSample``, or
  any object with ``__len__`` and ``__getitem__`` that reads one when asked. Import heavy libraries inside it. For a
  folder with one csv file per sequence and a sub-folder per split its body would be

      files = sorted(Path(self.root, split).glob("*.csv"))
      table = functools.partial(np.loadtxt, delimiter=",", dtype="float32", ndmin=2)
      return [SequenceSample(torch.from_numpy(table(file)), name=f"{split}/{file.name}") for file in files]

  ``SequenceSample`` also takes ``observed`` (True where a value was measured) and ``inputs`` (covariates that are known
  beforehand), ``targets`` (what auxiliary losses predict) and ``is_first`` (True where an episode begins). The model is
  built for the first two where ``__init__`` sets ``self.missing = True`` and ``self.num_inputs = 4``
  (covariates per step, which every sequence must then have). Covariates are not scaled. For a user's mistake raise a
  ``UserError`` of one line that names the file or option and the fix.

Optional:

- :class:`~vrnn_lightning.data.RandomSplitDataModule` as the base, where files are split at random: the checkpoint then
  remembers the files of each split, and no file that was trained on is tested after the folder has grown.
- ``modality``, how samples are shown: "audio", "strokes", "series", "roll" or "image".
- ``scaling``, fitted on the training split: "per_feature", "scalar" (one mean and std for all features) or "none"
  (discrete data).
- ``lengths(split)``, the steps of each sequence, where reading every sequence for its length would be slow.
- a method ``window(index, first, last)`` of the object that ``sequences`` returns: steps ``first`` to ``last - 1`` of a
  sequence, for training with ``window``; without it a sequence is read whole and kept meanwhile.
- a method ``in_epoch(epoch)`` of the object that ``sequences("train")`` returns: that epoch's sequences, where they
  are drawn or augmented in each, under the same names and in the same lengths. Let it depend on the epoch alone.
- ``exact_log_likelihood(batch)``, where the true density is known: ``val/gap`` then shows what the model still lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import Normal

from vrnn_lightning.batch import SequenceBatch, SequenceSample
from vrnn_lightning.data import Modality, SequenceDataModule, Sequences, Split

__all__ = ["MyData"]


class MyData(SequenceDataModule):
    """A first-order autoregression: each value is ``memory`` times the last one plus unit Gaussian noise.

    Args:
        num_sequences: Training sequences; validation and test get a tenth of that each, at least one.
        num_steps: Time steps of each sequence.
        memory: How much of a value the next one keeps, between -1 and 1.
        options: The options of :class:`~vrnn_lightning.SequenceDataModule`.
    """

    modality: ClassVar[Modality] = "series"
    scaling: ClassVar[Literal["none", "scalar", "per_feature"]] = "per_feature"

    def __init__(self, num_sequences: int = 500, num_steps: int = 50, memory: float = 0.9, **options: Any) -> None:
        super().__init__(num_features=1, **options)
        self.num_sequences = num_sequences
        self.num_steps = num_steps
        self.memory = memory

    def sequences(self, split: Split) -> Sequences:
        """Return the sequences of a split, each of shape (num_steps, 1)."""
        count = self.num_sequences if split == "train" else max(1, self.num_sequences // 10)
        generator = torch.Generator().manual_seed(3 * self.seed + ("train", "val", "test").index(split))
        x = torch.randn(count, self.num_steps, 1, generator=generator)
        x[:, 0] /= (1 - self.memory**2) ** 0.5  # the spread that the recursion keeps
        for t in range(1, self.num_steps):
            x[:, t] += self.memory * x[:, t - 1]
        return [SequenceSample(row, name=f"{split} {i}") for i, row in enumerate(x)]

    def lengths(self, split: Split) -> Sequence[int]:
        """Return the steps of each sequence of a split."""
        return [self.num_steps] * len(self.split(split))

    def exact_log_likelihood(self, batch: SequenceBatch) -> Tensor:
        """Return the true log p(x) of each sequence in nats, in scaled units, shape (batch,)."""
        x = self.scaler.unscale(batch.x)
        mean = torch.cat([torch.zeros_like(x[:, :1]), self.memory * x[:, :-1]], dim=1)
        std = torch.ones_like(x)
        std[:, 0] = (1 - self.memory**2) ** -0.5
        density: Tensor = Normal(mean, std).log_prob(x) + self.scaler.std.to(x).log()  # the scaler's Jacobian
        return (density * batch.valid_mask).sum((1, 2))
