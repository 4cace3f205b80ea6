"""The floors of the house: a room imports only from rooms below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = [
    "errors", "files", "datamodules", "compatibility", "trust", "batch", "noise", "filtering",
    "nn", "heads", "recurrence", "vrnn", "auxiliary", "objectives", "schedules", "metrics", "data", "testing",
    "inference", "pretrained", "resuming", "module",
    "callbacks", "report", "tracking", "discovery", "cli",
]  # fmt: skip
FRAMEWORKS = {"lightning", "wandb", "jsonargparse", "pytorch_lightning"}
MAY_KNOW_LIGHTNING = {
    "data",
    "testing",
    "pretrained",
    "resuming",
    "module",
    "callbacks",
    "tracking",
    "discovery",
    "cli",
}
DATAMODULES_MAY_IMPORT = {"batch", "data", "errors"}


def imports(file: Path) -> set[str]:
    """Return the dotted names a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(name: str) -> str | None:
    package, _, rest = name.partition(".")
    return rest.split(".")[0] if package == "vrnn_lightning" else None


def files_of(room: str) -> list[Path]:
    package = ROOT / "vrnn_lightning"
    return [package / f"{room}.py"] if (package / f"{room}.py").is_file() else sorted((package / room).rglob("*.py"))


def test_every_file_is_a_room():
    package = ROOT / "vrnn_lightning"
    found = {p.stem for p in package.iterdir() if p.suffix == ".py" or (p.is_dir() and p.name != "__pycache__")}
    assert found - {"__init__", "__main__"} == set(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_from_below(room):
    below = set(FLOORS[: FLOORS.index(room)]) | {room}
    for file in files_of(room):
        rooms = {room_of(name) for name in imports(file)} - {None}
        assert (rooms & set(FLOORS)) <= below, file.name


@pytest.mark.parametrize("room", FLOORS)
def test_frameworks_stay_upstairs(room):
    for file in files_of(room):
        known = {name.split(".")[0] for name in imports(file)} & FRAMEWORKS
        assert not known or room in MAY_KNOW_LIGHTNING, file.name
        assert "wandb" not in known or room == "tracking", "W&B is reached through Lightning's logger"


def test_slow_tests_are_there():
    for line in (ROOT / "tests" / "slow.txt").read_text().split():
        file, _, name = line.partition("::")
        (found,) = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in found.read_text(), line


def test_nobody_imports_a_datamodule():
    for file in (ROOT / "vrnn_lightning").rglob("*.py"):
        below = {name for name in imports(file) if name.startswith(("datamodules.", "vrnn_lightning.datamodules."))}
        names = {"INSTALLED", "local", "local.use_working_directory"}
        assert {name.partition("datamodules.")[2] for name in below} <= names, file.name


def test_datamodules_know_only_the_contract():
    for file in (ROOT / "datamodules").glob("*.py"):
        assert {room_of(name) for name in imports(file)} - {None} <= DATAMODULES_MAY_IMPORT, file.name


@pytest.mark.parametrize("file", sorted((ROOT / "vrnn_lightning").rglob("*.py")), ids=lambda f: f.stem)
def test_exports_are_listed_in_order(file):
    module = ast.parse(file.read_text())
    lists = [n.value for n in module.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
    if file.name == "__main__.py":
        return
    assert lists, f"{file.name} has no __all__"
    names = ast.literal_eval(lists[0])
    assert sorted(names, key=lambda n: (not n.isupper(), n[0].islower(), n)) == names
