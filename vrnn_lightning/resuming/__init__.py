"""Exact resumes: a fit loop whose checkpoints record their moment, and signals that save before they end a run.

Lightning lets callbacks save at six different moments of an epoch and derives the rest of the epoch from counters;
after some of them it repeats or skips a validation, a schedule's step or a row of metrics. Here each checkpoint
records its moment (:class:`Stage`), and a resume does what follows that moment and nothing else.
"""

from vrnn_lightning.resuming.checkpoint import RunCheckpoint
from vrnn_lightning.resuming.loops import make_resumable
from vrnn_lightning.resuming.record import Stage, callbacks_of, match_optimizer_states, resume_record
from vrnn_lightning.resuming.signals import Interruption, Stopped, interruption

__all__ = [
    "Interruption", "RunCheckpoint", "Stage", "Stopped", "callbacks_of", "interruption", "make_resumable",
    "match_optimizer_states", "resume_record",
]  # fmt: skip
