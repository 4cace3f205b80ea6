"""A run's folder and the files in it: metrics, config, checkpoints, and the same in Weights & Biases."""

from vrnn_lightning.resuming import RunCheckpoint
from vrnn_lightning.tracking.run import ElboBar, RunLogger, SaveConfig, run_logger
from vrnn_lightning.tracking.wandb import WandbLogger

__all__ = ["ElboBar", "RunCheckpoint", "RunLogger", "SaveConfig", "WandbLogger", "run_logger"]
