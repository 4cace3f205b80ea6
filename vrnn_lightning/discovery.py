"""Finding datamodules by reading the names in their files, so that one broken file never breaks another's command."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import traceback
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from itertools import chain
from pathlib import Path
from types import ModuleType

from lightning.pytorch import LightningDataModule

from vrnn_lightning.datamodules import INSTALLED, local
from vrnn_lightning.errors import UserError, suggestion

__all__ = ["known", "load", "suggestion"]

ENTRY_POINTS = PACKAGE = "vrnn_lightning.datamodules"


def known() -> dict[str, tuple[Path | EntryPoint, ...]]:
    """Return the files and entry points that define each datamodule, by its name, without importing any of them."""
    places: dict[str, tuple[Path | EntryPoint, ...]] = {}
    points = ((point.name, point) for point in entry_points(group=ENTRY_POINTS))
    for name, place in chain[tuple[str, Path | EntryPoint]](_classes(_files()), points):
        places[name] = (*places.get(name, ()), place)
    return dict(sorted(places.items()))


def load(name: str) -> type[LightningDataModule]:
    """Import a datamodule.

    Args:
        name: A known name (:func:`known`), or the dotted path of a class that lives elsewhere.

    Raises:
        UserError: The name is unknown, defined twice, cannot be imported or is not a LightningDataModule.
    """
    if "." in name:
        module, _, attribute = name.rpartition(".")
        package, _, stem = module.rpartition(".")
        file = local.use_working_directory() / f"{stem}.py"
        return _datamodule(_import(module, file if package == local.__name__ else None), attribute, name)
    names = known()
    if name not in names:
        fix = f"choose one of {', '.join(names)}" if names else "put its file into ./datamodules"
        raise UserError(f"--data {name}: no such datamodule.{suggestion(name, names)} Fix: {fix}")
    place, *others = names[name]
    if others:
        places = [f"{p.value} (entry point)" if isinstance(p, EntryPoint) else str(p) for p in (place, *others)]
        raise UserError(f"--data {name}: defined in {' and in '.join(places)}. Fix: rename one")
    if isinstance(place, EntryPoint):
        return _datamodule(_import(place.module, None), place.attr, name)
    package = PACKAGE if place.parent == INSTALLED else local.__name__
    return _datamodule(_import(f"{package}.{place.stem}", place), name, name)


def _files() -> list[Path]:
    """Return the files of the package's folder, then those of the working directory's."""
    folders = [INSTALLED, local.use_working_directory()]
    if folders[0].resolve() == folders[1].resolve():
        folders.pop()
    return [file for folder in folders for file in sorted(folder.glob("[!_]*.py")) if file.is_file()]


def _classes(files: list[Path]) -> Iterator[tuple[str, Path]]:
    """Yield the public datamodules of files; a file that does not parse yields all its classes."""
    nodes = []
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        try:
            nodes += [(node, file) for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        except (SyntaxError, ValueError):  # its error is printed when it is asked for
            yield from ((name, file) for name in re.findall(r"^class ([A-Za-z]\w*)", text, re.MULTILINE))
    modules: set[str] = set()
    while more := {n.name for n, _ in nodes if n.name not in modules and _is_datamodule(n, modules)}:
        modules |= more
    yield from ((n.name, file) for n, file in nodes if n.name in modules and not n.name.startswith("_"))


def _is_datamodule(node: ast.ClassDef, known_names: set[str]) -> bool:
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    names = [b.attr if isinstance(b, ast.Attribute) else getattr(b, "id", "") for b in bases]
    return any(name.endswith("DataModule") or name in known_names for name in names)


def _import(module: str, file: Path | None) -> ModuleType:
    if file and str(file) != getattr(sys.modules.get(module), "__file__", str(file)):
        del sys.modules[module]  # the file of that name in an earlier working directory
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            if error.name and error.name.partition(".")[0] == "datamodules":
                error.add_note("Fix: import from vrnn_lightning.datamodules, or `from .name import ...` your own file")
            raise _broken(module, file, error) from error
        raise UserError(
            f"cannot import {module}: no module {error.name}. Fix: install it or correct its name"
        ) from error
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's file may raise anything while it is imported
        raise _broken(module, file, error) from error


def _broken(module: str, file: Path | None, error: BaseException) -> UserError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    own = [f for f in frames if file is None or Path(f.filename).resolve() == file.resolve()]
    where, line = (own[-1].filename, own[-1].lineno) if own else (str(file or module), None)
    message: object = error
    if isinstance(error, SyntaxError) and error.filename:
        where, line, message = error.filename, error.lineno, error.msg
    notes = "".join(f". {note}" for note in getattr(error, "__notes__", ()))
    return UserError(f"{where}{f', line {line}' if line else ''}: {type(error).__name__}: {message}{notes}")


def _datamodule(module: ModuleType, attribute: str, path: str) -> type[LightningDataModule]:
    cls = getattr(module, attribute, None)
    if cls is None:
        hint = suggestion(attribute, vars(module))
        raise UserError(f"--data {path}: {module.__name__} has no {attribute}.{hint} Fix: correct the name")
    if not (isinstance(cls, type) and issubclass(cls, LightningDataModule)):
        fix = "derive it from lightning.pytorch.LightningDataModule"
        raise UserError(f"--data {path}: is not a LightningDataModule. Fix: {fix}")
    return cls
