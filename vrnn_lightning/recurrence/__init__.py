"""The time loops, the only rooms that step a VRNN.

:func:`unroll` is what training runs: it holds only what depends on z_t, and no autograd graph. :func:`textbook` is the
readable reference with everything inside the loop. They share no step code, take the same noise and are tested equal.
:func:`free_run` generates, and :func:`textbook_generation` is its reference; :class:`Stream` follows frame by frame.
"""

from vrnn_lightning.recurrence.generation import Generated, free_run
from vrnn_lightning.recurrence.loop import Choose, Now, unroll
from vrnn_lightning.recurrence.parts import Masks, Networks, Prior, Reads, State, Steps, log_ratio, repeat_rows
from vrnn_lightning.recurrence.streaming import Stream
from vrnn_lightning.recurrence.textbook import Reference, textbook, textbook_filter, textbook_generation

__all__ = [
    "Choose",
    "Generated",
    "Masks",
    "Networks",
    "Now",
    "Prior",
    "Reads",
    "Reference",
    "State",
    "Steps",
    "Stream",
    "free_run",
    "log_ratio",
    "repeat_rows",
    "textbook",
    "textbook_filter",
    "textbook_generation",
    "unroll",
]
