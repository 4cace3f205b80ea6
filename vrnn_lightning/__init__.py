"""Variational recurrent neural networks on PyTorch Lightning."""

from vrnn_lightning.batch import Sequence, SequenceBatch
from vrnn_lightning.data import Scaler, SequenceDataModule
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.nn import Layers
from vrnn_lightning.vrnn import VRNN, build_vrnn

__all__ = [
    "VRNN",
    "Layers",
    "Scaler",
    "Sequence",
    "SequenceBatch",
    "SequenceDataModule",
    "UserError",
    "VRNNLightningModule",
    "build_vrnn",
]
__version__ = "0.1.0"
