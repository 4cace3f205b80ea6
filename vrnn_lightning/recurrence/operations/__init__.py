"""The operations that a step is made of, one file for each family."""

from vrnn_lightning.recurrence.operations.base import Calls, Operation, Pass
from vrnn_lightning.recurrence.operations.calls import Call, Given
from vrnn_lightning.recurrence.operations.cells import GRU, LSTM, RNN, LayerNormLSTM
from vrnn_lightning.recurrence.operations.elementwise import Add, Cast, Elementwise, Relu, Restart
from vrnn_lightning.recurrence.operations.linear import Affine, MatMul
from vrnn_lightning.recurrence.operations.normalization import Normalize
from vrnn_lightning.recurrence.operations.sampling import Apply, GaussianSample, StandardNormal

__all__ = [
    "GRU", "LSTM", "RNN", "Add", "Affine", "Apply", "Call", "Calls", "Cast", "Elementwise", "GaussianSample", "Given",
    "LayerNormLSTM", "MatMul", "Normalize", "Operation", "Pass", "Relu", "Restart", "StandardNormal",
]  # fmt: skip
