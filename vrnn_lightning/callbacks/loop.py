"""Options of a run that change how the time loop is run, and no value."""

from __future__ import annotations

import torch
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
        compile: Compile what is outside the loop (decoder, emission, KL) with torch.compile, which needs a C++ compiler
            and takes a minute. Worth it for a mixture of many frames' width; a Gaussian gains nothing on a CPU.

    Raises:
        UserError: Fewer than one step, or nothing here that compiles.
    """

    def __init__(self, checkpoint_every: int | None = None, compile: bool = False) -> None:
        if checkpoint_every is not None and checkpoint_every < 1:
            raise UserError(f"loop.checkpoint_every {checkpoint_every}: must be at least 1")
        self.checkpoint_every = checkpoint_every
        self.compile = compile

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the options on the model."""
        if isinstance(pl_module, VRNNLightningModule):
            if self.compile:
                require_compiler(pl_module.device)
            pl_module.vrnn.checkpoint_every = self.checkpoint_every
            pl_module.vrnn.compiled = self.compile


def require_compiler(device: torch.device) -> None:
    """Compile a line, so that a machine without a compiler fails before the run.

    Raises:
        UserError: It does not compile.
    """
    line = torch.compile(lambda x: x.exp() + 1, options={"fx_graph_cache": False})
    try:
        line(torch.zeros(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        raise UserError(
            f"loop.compile: torch.compile does not work here ({why}); install a C++ compiler such as g++, "
            "or leave the option away"
        ) from error
