"""Data for the model: sequences, flat archives, tables, batches, and the base class of datamodules."""

from vrnn_lightning.compatibility import old_names
from vrnn_lightning.data.archives import ArchiveSplit, archive_holds, read_archive
from vrnn_lightning.data.columns import TABLE_SUFFIXES, Columns, read_columns
from vrnn_lightning.data.datamodule import SequenceDataModule, require
from vrnn_lightning.data.downloads import fetch
from vrnn_lightning.data.files import FileDataModule, data_root
from vrnn_lightning.data.folders import InvalidFiles, files_below, tracked
from vrnn_lightning.data.ink import quickdraw_lines, read_iam, read_inkml, read_quickdraw, read_sketch_rnn
from vrnn_lightning.data.loading import BatchSampler, SequenceLoader, Window
from vrnn_lightning.data.random_splits import RandomSplitDataModule, RandomSplits
from vrnn_lightning.data.sequences import (
    AugmentedSequences,
    ChangingSequences,
    Modality,
    Scaler,
    Sequences,
    Split,
    WindowedSequences,
)
from vrnn_lightning.data.strokes import rows_to_strokes, smooth_rows, strokes_to_rows
from vrnn_lightning.data.unpickling import UnsafePickleError, unpickle
from vrnn_lightning.files import MAX_GB, explained, require_size

__all__ = [
    "MAX_GB", "TABLE_SUFFIXES", "ArchiveSplit", "AugmentedSequences", "BatchSampler", "ChangingSequences", "Columns",
    "FileDataModule", "InvalidFiles", "Modality", "RandomSplitDataModule", "RandomSplits", "Scaler",
    "SequenceDataModule", "SequenceLoader", "Sequences", "Split", "UnsafePickleError", "Window", "WindowedSequences",
    "archive_holds", "data_root", "explained", "fetch", "files_below", "quickdraw_lines", "read_archive",
    "read_columns", "read_iam", "read_inkml", "read_quickdraw", "read_sketch_rnn", "require", "require_size",
    "rows_to_strokes", "smooth_rows", "strokes_to_rows", "tracked", "unpickle",
]  # fmt: skip

__getattr__ = old_names(
    __name__, {"BadFiles": "InvalidFiles", "DrawnDataModule": "RandomSplitDataModule", "DrawnSplits": "RandomSplits"}
)
