import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from vrnn_lightning import UserError, discovery
from vrnn_lightning.datamodules import is_installed

HEAD = "from vrnn_lightning import SequenceDataModule\n"


@pytest.fixture
def drop(folder):
    """Write a file into the working directory's datamodules."""
    (folder / "datamodules").mkdir()

    def write(name, text):
        file = folder / "datamodules" / name
        file.write_text(text)
        return file

    return write


def test_files_are_found_without_being_imported(drop):
    drop("found_one.py", HEAD + "raise RuntimeError\nclass FoundOne(SequenceDataModule): pass\n")
    drop("found_two.py", "class Base(x.LightningDataModule[int]): pass\nclass FoundTwo(Base): pass\nclass Not: pass\n")
    drop("found_three.py", "class _Hidden(SequenceDataModule): pass\nclass FoundThree(_Hidden): pass\n")
    drop("_template.py", HEAD + "class Hidden(SequenceDataModule): pass\n")
    names = set(discovery.known())
    assert {"Base", "FoundOne", "FoundTwo", "FoundThree", "Sines", "Speech"} <= names
    assert not {"Not", "Hidden", "_Hidden"} & names
    assert not any(name.startswith("vrnn_lightning.datamodules.local.found") for name in sys.modules)


def test_dropped_file_is_loaded_from_this_working_directory(drop, tmp_path_factory, monkeypatch):
    drop("dropped.py", HEAD + "class Dropped(SequenceDataModule): pass\n")
    drop("leans.py", "from .dropped import Dropped\nclass LeansDataModule(Dropped): pass\n")
    drop("leans_too.py", "from .leans import LeansDataModule\nclass LeansToo(LeansDataModule): pass\n")
    assert discovery.load("Dropped").__module__ == "vrnn_lightning.datamodules.local.dropped"
    assert discovery.load("LeansToo").__mro__[2].__name__ == "Dropped"
    other = tmp_path_factory.mktemp("other") / "datamodules"
    other.mkdir()
    (other / "dropped.py").write_text(HEAD + "class Dropped(SequenceDataModule):\n    number = 2\n")
    monkeypatch.chdir(other.parent)
    assert discovery.load("Dropped").number == 2


def test_installed_are_those_that_come_with_the_package(drop):
    drop("dropped_too.py", HEAD + "class DroppedToo(SequenceDataModule): pass\n")
    for name, places in discovery.known().items():
        path = f"vrnn_lightning.datamodules.{places[0].stem}.{name}"
        assert is_installed(path) == (name != "DroppedToo")
    for name in ("Sines", "absent.Sines", "local.sines.Sines"):
        assert not is_installed(f"vrnn_lightning.datamodules.{name}")
    assert not is_installed("datamodules.sines.Sines")


def test_import_by_an_old_name_says_the_new_one(drop, monkeypatch):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not Path(place, "datamodules").is_dir()])
    drop("old_import.py", "from datamodules.sines import Sines\nclass OldImport(Sines, SequenceDataModule): pass\n")
    with pytest.raises(UserError, match=r"old_import.py, line 1: ModuleNotFoundError: .*datamodules.*Fix: import from"):
        discovery.load("OldImport")


def test_broken_file_breaks_only_its_own_command(drop):
    file = drop("broken_syntax.py", HEAD + "class BrokenSyntax(SequenceDataModule):\n    def f(:\n")
    other = drop("broken_import.py", HEAD + "\n1 / 0\nclass BrokenImport(SequenceDataModule): pass\n")
    (other.parent / "broken_link.py").symlink_to("nowhere")
    (other.parent / "broken_folder.py").mkdir()
    leaves = drop("leaves_early.py", HEAD + "raise SystemExit(3)\nclass LeavesEarly(SequenceDataModule): pass\n")
    missing = drop("needs_more.py", HEAD + "import no_such_library\nclass NeedsMore(SequenceDataModule): pass\n")
    assert discovery.load("Sines").__name__ == "Sines"
    with pytest.raises(UserError, match=rf"{file}, line 3: SyntaxError") as caught:
        discovery.load("BrokenSyntax")
    assert isinstance(caught.value.__cause__, SyntaxError)
    with pytest.raises(UserError, match=rf"{other}, line 3: ZeroDivisionError"):
        discovery.load("BrokenImport")
    with pytest.raises(UserError, match=rf"{leaves}, line 2: SystemExit: 3"):
        discovery.load("LeavesEarly")
    with pytest.raises(UserError, match=rf"{missing}, line 2: ModuleNotFoundError.*no_such_library"):
        discovery.load("NeedsMore")


def test_two_classes_of_one_name_are_refused_when_asked_for(drop):
    first = drop("twice_a.py", HEAD + "class Twice(SequenceDataModule): pass\n")
    second = drop("twice_b.py", HEAD + "class Twice(SequenceDataModule): pass\nclass Once(SequenceDataModule): pass\n")
    assert discovery.load("Once").__name__ == "Once"
    with pytest.raises(UserError, match=rf"{first} and in {second}"):
        discovery.load("Twice")


def test_file_of_an_installed_name_hides_nothing(drop):
    drop("sines.py", HEAD + "class OwnSines(SequenceDataModule): pass\n")
    assert discovery.load("Sines").__module__ == "vrnn_lightning.datamodules.sines"
    assert discovery.load("OwnSines").__module__ == "vrnn_lightning.datamodules.local.sines"


def test_folder_that_is_both_is_read_once(folder, monkeypatch):
    monkeypatch.chdir(Path(discovery.__file__).parents[1])
    assert len(discovery.known()["Sines"]) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Sine", "no such datamodule. Did you mean 'Sines'?"),
        ("vrnn_lightning.datamodules.sines.Sine", "has no Sine. Did you mean 'Sines'?"),
        ("no_package.Data", "cannot import no_package"),
        ("vrnn_lightning.datamodules.nothing.Data", "cannot import vrnn_lightning.datamodules.nothing"),
        ("torch.nn.Linear", "is not a LightningDataModule"),
    ],
)
def test_what_cannot_be_found_is_said(folder, name, message):
    with pytest.raises(UserError) as caught:
        discovery.load(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_entry_points_are_known_by_name_and_loaded_when_asked_for(folder, monkeypatch):
    point = EntryPoint("Elsewhere", "vrnn_lightning.datamodules.sines:Sines", discovery.ENTRY_POINTS)
    monkeypatch.setattr(discovery, "entry_points", lambda group: EntryPoints([point]))
    assert "Elsewhere" in discovery.known()
    assert discovery.load("Elsewhere").__name__ == "Sines"


def test_importing_the_command_line_prints_nothing_and_imports_no_data_and_no_wandb():
    never = "{'wandb', 'vrnn_lightning.datamodules.sines'}"
    code = f"import sys, vrnn_lightning.cli; sys.exit(bool({never} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
