"""Datamodules, one per file and named after what they load; ``_template.py`` is the one to copy.

A folder ``datamodules/`` in the working directory is part of this package: a file dropped there is found like those
here, and imported as ``datamodules.<file>`` in every process of a run.
"""

from __future__ import annotations

from pathlib import Path

_local = Path("datamodules")
if _local.is_dir() and _local.resolve() != Path(__file__).resolve().parent:
    __path__.append(str(_local.resolve()))
