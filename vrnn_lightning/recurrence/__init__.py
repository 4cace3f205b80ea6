"""The fast time loops of a VRNN, on one layout of the step, :class:`~vrnn_lightning.recurrence.step.FastStep`.

:func:`infer` serves training, evaluation and the particle filter, :func:`generate` draws sequences, and :class:`Stream`
follows them frame by frame. Imputation, decoding, sessions and exports call the model's four equations instead.
"""

from vrnn_lightning.recurrence.generation import Generated, generate
from vrnn_lightning.recurrence.inference import InferenceSteps, NetworkInputs, Resample, infer, run_backward
from vrnn_lightning.recurrence.parts import (
    Parts,
    compute_weights,
    draw_frames,
    is_plain,
    require_plain_weights,
    structure_of,
)
from vrnn_lightning.recurrence.placement import Partition, Purpose, partition
from vrnn_lightning.recurrence.state import Masks, Networks, Prior, State, log_ratio, output, repeat_rows
from vrnn_lightning.recurrence.streaming import Stream

__all__ = [
    "Generated", "InferenceSteps", "Masks", "NetworkInputs", "Networks", "Partition", "Parts", "Prior", "Purpose",
    "Resample", "State", "Stream", "compute_weights", "draw_frames", "generate", "infer", "is_plain", "log_ratio",
    "output", "partition", "repeat_rows", "require_plain_weights", "run_backward",
    "structure_of",
]  # fmt: skip
