"""Sphinx' settings, and the parts of the reference that are written at build time."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ROOT / "docs" / "reference" / "generated"
sys.path.insert(0, str(ROOT))

import vrnn_lightning  # noqa: E402  # after the path is set
from vrnn_lightning.cli import main  # noqa: E402  # as above

project = "vrnn-lightning"
copyright = "the vrnn-lightning authors"
author = "The vrnn-lightning authors"
release = vrnn_lightning.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "reference/generated"]
html_theme = "furo"
html_title = "vrnn-lightning"
html_copy_source = False

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
viewcode_line_numbers = True


def help_of(*words: str) -> str:
    """Return what a command prints for ``--help``."""
    text = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["lightning"]),
        mock.patch.dict(os.environ, {"COLUMNS": "100"}),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(text),
        contextlib.suppress(SystemExit),
    ):
        warnings.simplefilter("ignore")
        main([*words, "--help"])
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def header_of(config: Path) -> str:
    """Return the comment that a config begins with, without its comment marks."""
    lines = []
    for line in config.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def write_generated() -> None:
    """Write the help of each command and the list of configs."""
    GENERATED.mkdir(exist_ok=True)
    for words in (["fit"], ["validate"], ["test"], ["predict"], ["report"]):
        (GENERATED / f"{words[0]}.txt").write_text(help_of(*words))
    configs = ROOT / "configs"
    pages = []
    for config in sorted(configs.rglob("*.yaml"), key=lambda path: (len(path.parts), path.name)):
        pages.append(f"## `{config.relative_to(ROOT)}`\n\n````text\n{header_of(config)}\n````\n")
    (GENERATED / "configs.txt").write_text("\n".join(pages))


write_generated()
