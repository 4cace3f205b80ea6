"""Lists of the forms of each split of IAM-OnDB, the IAM On-Line Handwriting Database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from vrnn_lightning.data.folders import SHOWN, files_below
from vrnn_lightning.data.sequences import Split
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, undamaged

__all__ = ["LISTS", "SECOND", "FormList", "read_form_lists"]

LISTS: dict[Split, str] = {"train": "trainset.txt", "val": "testset_v.txt", "test": "testset_f.txt"}
"""The list of each split of the official task t1."""
SECOND = "testset_t.txt"
"""The list of t1's second validation set."""


class FormList(NamedTuple):
    """A list of the task: its file, and the forms that it names, in their order."""

    path: Path
    forms: list[str]

    def find(self, files: Mapping[str, Path], root: Path) -> list[str]:
        """Return the names of the forms' files; warn of forms without one, and raise a UserError if all are.

        Args:
            files: All files by name, as ``lineStrokes/a01/a01-020/a01-020x-01.xml`` for the form a01-020x.
            root: The folder, for messages.
        """
        names: dict[str, list[str]] = {}
        for name, path in files.items():
            names.setdefault(path.stem.rpartition("-")[0], []).append(name)
        missing = [form for form in self.forms if form not in names]
        listed = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        if len(missing) == len(self.forms):
            raise UserError(
                f"{self.path}: none of its {len(missing)} forms has a file below {root}: {listed}. Fix: add them, as "
                "lineStrokes/a01/a01-020/a01-020x-01.xml for the form a01-020x"
            )
        if missing:
            rank_zero_warn(
                f"{self.path}: {len(missing)} of {len(self.forms)} forms have no file below {root} and are left out: "
                f"{listed}"
            )
        return [name for form in self.forms for name in names.get(form, [])]


def read_form_lists(root: Path, names: Sequence[str]) -> dict[str, FormList]:
    """Read lists of task t1, a form per line, by their names.

    Args:
        root: The folder, in which they lie anywhere; with lists of several tasks, those in "task1" or "t1" count.
        names: Names of the lists.

    Raises:
        UserError: A list is missing, ambiguous, empty or not text.
    """
    files = files_below(root)
    lists: dict[str, FormList] = {}
    for name in names:
        paths = [path for path in files if path.name == name]
        paths = [path for path in paths if path.parent.name in ("task1", "t1")] or paths
        if not paths:
            raise UserError(
                f"--data.root {root}: no {name} in it. Fix: put the lists of IAM-OnDB's task t1 into a folder below"
            )
        if len(paths) > 1:
            raise UserError(f"--data.root {root}: both {paths[0]} and {paths[1]}. Fix: keep the list of task t1")
        fix = "write a form per line, a01-020x for example"
        with explained(paths[0]), undamaged(f"{paths[0]}: is not text", fix):
            forms = list(dict.fromkeys(paths[0].read_text(encoding="utf-8-sig").split()))
        if not forms:
            raise UserError(f"{paths[0]}: names no form. Fix: {fix}")
        lists[name] = FormList(paths[0], forms)
    return lists
