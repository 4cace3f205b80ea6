"""Options of the time loop that change speed and memory and no value."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from vrnn_lightning.errors import UserError, require_at_least
from vrnn_lightning.module import VRNNLightningModule

__all__ = ["Loop"]


class Loop(Callback):
    """Options of the time loop, which neither a model nor a checkpoint holds.

    Args:
        checkpoint_every: Steps of a window: in training keep only the states between windows, and infer each window
            again in the backward pass, in about a third more time; memory is least near the square root of the
            sequences' steps (Chen et al. 2016, arXiv 1604.06174). ``None`` keeps everything.
        compile: Compile decoder, emission and KL with torch.compile, which needs a C++ compiler and takes a minute. It
            speeds up a mixture of many frames' width, and not a Gaussian on a CPU.

    Raises:
        UserError: A window has no step, or torch.compile does not work here.
    """

    def __init__(self, checkpoint_every: int | None = None, compile: bool = False) -> None:
        self.checkpoint_every, self.compile = checkpoint_every, compile
        require_at_least("loop", vars(self), {"checkpoint_every": 1})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, VRNNLightningModule):
            if self.compile:
                require_compiler(pl_module.device)
            pl_module.vrnn.checkpoint_every = self.checkpoint_every
            pl_module.vrnn.compiled = self.compile


def require_compiler(device: torch.device) -> None:
    """Raise before the run if torch.compile does not work here."""
    line = torch.compile(lambda x: x.exp() + 1, options={"fx_graph_cache": False})
    try:
        line(torch.zeros(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        raise UserError(
            f"loop.compile: torch.compile does not work here ({why}). Fix: install a C++ compiler such as g++, "
            "or leave the option out"
        ) from error
