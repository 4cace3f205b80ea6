"""The operations that a step is made of, one file for each family."""

from vrnn_lightning.recurrence.operations.base import Calls, Operation, Pass
from vrnn_lightning.recurrence.operations.calls import Call, Given
from vrnn_lightning.recurrence.operations.cells import GRU, LSTM
from vrnn_lightning.recurrence.operations.elementwise import Cast, Relu, Restart
from vrnn_lightning.recurrence.operations.linear import Affine, MatMul
from vrnn_lightning.recurrence.operations.sampling import Apply, GaussianSample, StandardNormal

__all__ = [
    "GRU",
    "LSTM",
    "Affine",
    "Apply",
    "Call",
    "Calls",
    "Cast",
    "GaussianSample",
    "Given",
    "MatMul",
    "Operation",
    "Pass",
    "Relu",
    "Restart",
    "StandardNormal",
]
