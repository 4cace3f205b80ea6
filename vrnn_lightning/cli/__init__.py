"""The command line: ``lightning fit -c configs/synthetic.yaml``."""

from vrnn_lightning.cli.command import CLI
from vrnn_lightning.cli.console import main

__all__ = ["CLI", "main"]
