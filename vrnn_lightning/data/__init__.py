"""Data for the model: sequences, flat archives, batches, and the base class of datamodules."""

from vrnn_lightning.data.archives import ArchiveSplit, read_archive
from vrnn_lightning.data.datamodule import SequenceDataModule
from vrnn_lightning.data.loading import BatchSampler, SequenceLoader, Window
from vrnn_lightning.data.sequences import ChangingSequences, Modality, Scaler, Sequences, Split, WindowedSequences

__all__ = [
    "ArchiveSplit",
    "BatchSampler",
    "ChangingSequences",
    "Modality",
    "Scaler",
    "SequenceDataModule",
    "SequenceLoader",
    "Sequences",
    "Split",
    "Window",
    "WindowedSequences",
    "read_archive",
]
