"""Data for the model: sequences, flat archives, tables, batches, and the base class of datamodules."""

from vrnn_lightning.data.archives import ArchiveSplit, read_archive
from vrnn_lightning.data.bad import BadFiles
from vrnn_lightning.data.columns import TABLE_SUFFIXES, Columns, read_columns
from vrnn_lightning.data.datamodule import SequenceDataModule
from vrnn_lightning.data.downloads import fetch
from vrnn_lightning.data.loading import BatchSampler, SequenceLoader, Window
from vrnn_lightning.data.sequences import ChangingSequences, Modality, Scaler, Sequences, Split, WindowedSequences
from vrnn_lightning.data.unpickling import UnsafePickleError, unpickle

__all__ = [
    "TABLE_SUFFIXES",
    "ArchiveSplit",
    "BadFiles",
    "BatchSampler",
    "ChangingSequences",
    "Columns",
    "Modality",
    "Scaler",
    "SequenceDataModule",
    "SequenceLoader",
    "Sequences",
    "Split",
    "UnsafePickleError",
    "Window",
    "WindowedSequences",
    "fetch",
    "read_archive",
    "read_columns",
    "unpickle",
]
