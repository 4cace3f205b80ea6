"""Variational recurrent neural networks on PyTorch Lightning."""

from vrnn_lightning.batch import SequenceBatch, SequenceSample
from vrnn_lightning.compatibility import old_names
from vrnn_lightning.data import Scaler, SequenceDataModule
from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule
from vrnn_lightning.nn import MLPConfig
from vrnn_lightning.vrnn import VRNN, build_vrnn

__all__ = [
    "VRNN", "MLPConfig", "Scaler", "SequenceBatch", "SequenceDataModule", "SequenceSample", "UserError",
    "VRNNLightningModule", "build_vrnn",
]  # fmt: skip
__version__ = "0.1.0"
__getattr__ = old_names(__name__, {"Layers": "MLPConfig", "Sequence": "SequenceSample"})
