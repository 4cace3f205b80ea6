"""The variational recurrent neural network (Chung et al. 2015, arXiv 1506.02216).

:class:`~vrnn_lightning.vrnn.equations.Equations` has its networks and its four equations, :class:`VRNN` the passes over
batches, and :func:`build_vrnn` makes one from sizes.
"""

from vrnn_lightning.heads import StandardPrior
from vrnn_lightning.vrnn.builder import build_vrnn
from vrnn_lightning.vrnn.equations import Equations
from vrnn_lightning.vrnn.model import VRNN
from vrnn_lightning.vrnn.trace import Trace

__all__ = ["VRNN", "Equations", "StandardPrior", "Trace", "build_vrnn"]
