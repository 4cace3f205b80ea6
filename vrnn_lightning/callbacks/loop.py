"""Options of a run that change how the time loop is run, and no value."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from vrnn_lightning.errors import UserError
from vrnn_lightning.module import VRNNLightningModule

__all__ = ["Loop"]


class Loop(Callback):
    """How the time loop is run. None of it belongs to the model, and a checkpoint never decides it.

    Args:
        checkpoint_every: In training keep only the states between windows of so many steps, and infer each window again
            on the way back: about a third more time, and for sequences of T steps memory is least near the square root
            of T (Chen et al. 2016, arXiv 1604.06174). ``None`` keeps everything.

    Raises:
        UserError: Fewer than one step.
    """

    def __init__(self, checkpoint_every: int | None = None) -> None:
        if checkpoint_every is not None and checkpoint_every < 1:
            raise UserError(f"loop.checkpoint_every {checkpoint_every}: must be at least 1")
        self.checkpoint_every = checkpoint_every

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the model."""
        if isinstance(pl_module, VRNNLightningModule):
            pl_module.vrnn.checkpoint_every = self.checkpoint_every
