"""The files of the working directory's ``datamodules/``, in every process of a run."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["use_working_directory"]

FOLDER = "VRNN_LIGHTNING_DATAMODULES"
"""The environment variable that tells processes which a run starts where its files are."""

__path__ = [os.environ.get(FOLDER) or str(Path("datamodules").absolute())]


def use_working_directory() -> Path:
    """Find the modules of this package in ``datamodules/`` of the working directory from now on, and return it."""
    folder = Path("datamodules").absolute()
    os.environ[FOLDER] = __path__[0] = str(folder)
    return folder
