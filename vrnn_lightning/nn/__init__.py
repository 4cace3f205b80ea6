"""The networks and the recurrent cells that a VRNN is made of."""

from vrnn_lightning.compatibility import old_names
from vrnn_lightning.nn.cells import LayerNormGRUCell, LayerNormLSTMCell, cell_outputs, cell_state
from vrnn_lightning.nn.networks import (
    MLP,
    Conv,
    MaskedLinear,
    MLPConfig,
    NetworkFactory,
    Residual,
    evaluating,
    feature_width,
    require_output,
)

__all__ = [
    "MLP", "Conv", "LayerNormGRUCell", "LayerNormLSTMCell", "MLPConfig", "MaskedLinear", "NetworkFactory", "Residual",
    "cell_outputs", "cell_state", "evaluating", "feature_width", "require_output",
]  # fmt: skip
__getattr__ = old_names(__name__, {"Layers": "MLPConfig"})
