"""Nothing that a file holds is trusted: the gate for the names in it, and the one reader of checkpoints."""

from vrnn_lightning.trust.checkpoints import Stored, read_checkpoint, read_stored, require_types
from vrnn_lightning.trust.gate import Gate, is_name, path_of, strings_of, subclasses_of
from vrnn_lightning.trust.parameters import parameters_of

__all__ = [
    "Gate", "Stored", "is_name", "parameters_of", "path_of", "read_checkpoint", "read_stored", "require_types",
    "strings_of", "subclasses_of",
]  # fmt: skip
