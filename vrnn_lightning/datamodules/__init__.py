"""Datamodules, one per file and named after what they load; ``docs/mydata.py`` is one to copy.

The repository keeps their files in its folder ``datamodules/``, at the top; a wheel installs them here.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["INSTALLED", "is_installed"]

_here = Path(__file__).parent
INSTALLED = _here if (_here / "_synthetic.py").is_file() else _here.parents[1] / "datamodules"
"""The folder of the datamodules that come with the package."""
__path__ = [str(_here), str(INSTALLED)]


def is_installed(class_path: str) -> bool:
    """Return whether a class path is in a file of a datamodule that comes with this package, without importing it.

    >>> is_installed("vrnn_lightning.datamodules.sines.Sines")
    True
    >>> is_installed("vrnn_lightning.datamodules.local.walks.Walks")
    False
    """
    package, _, stem = class_path.rpartition(".")[0].rpartition(".")
    return package == "vrnn_lightning.datamodules" and (INSTALLED / f"{stem}.py").is_file()
