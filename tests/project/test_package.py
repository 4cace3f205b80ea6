import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
DROPPED = """
import os
import sys

import torch

from vrnn_lightning import SequenceSample, SequenceDataModule


class Recorded(SequenceSample):
    pass  # pickled by its name


class Walks(SequenceDataModule):
    scaling = "per_feature"

    def __init__(self, size: int = 8, batch_size: int = 2, num_workers: int = 0):
        super().__init__(num_features=2, batch_size=batch_size, num_workers=num_workers)
        self.size = size

    def sequences(self, split):
        return Walk(self.size)


class Walk:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        import datamodules

        with open("seen.txt", "a") as file:
            file.write(f"{os.getpid()} {__name__} {datamodules.name}\\n")
        return Recorded(torch.randn(5, 2, generator=torch.Generator().manual_seed(i)), name=str(i))
"""
PROGRAM = """
import multiprocessing

import datamodules
import vrnn_lightning.datamodules as ours
from vrnn_lightning.discovery import load

if __name__ == "__main__":
    print(datamodules.__file__, ours.__file__)
    multiprocessing.set_start_method("spawn")
    data = load("Walks")(num_workers=1)
    data.setup("fit")
    print(len(list(data.train_dataloader())))
"""


def run(*words, site, here):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(CHECKOUT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)  # the wheel is built from the sdist
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder of packages: the wheel's, and another project's `datamodules`."""
    site = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, timeout=120)
    (site / "datamodules").mkdir()
    (site / "datamodules" / "__init__.py").write_text("name = 'foreign'\n")
    (site / "datamodules" / "sines.py").write_text("class Sines: pass\n")
    return site


def test_wheel_holds_packages_configs_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for config in (CHECKOUT / "configs").glob("*.yaml"):
        assert f"vrnn_lightning/configs/{config.name}" in names
    for file in (CHECKOUT / "datamodules").glob("*.py"):
        assert f"vrnn_lightning/datamodules/{file.name}" in names
    assert {
        "vrnn_lightning/py.typed",
        "vrnn_lightning/report.html",
        "vrnn_lightning/datamodules/local/__init__.py",
    } <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vrnn_lightning"}
    assert not [name for name in names if "__pycache__" in name]


def test_installed_wheel_trains_from_an_empty_directory(site, tmp_path):
    words = ["fit", "-c", "configs/synthetic.yaml", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    run(site / "bin" / "lightning", *words, "--data.train_size=8", "--data.val_size=8", site=site, here=tmp_path)
    where = "from vrnn_lightning.datamodules import sines; from datamodules.sines import Sines; print(sines.__file__)"
    assert run("-c", where, site=site, here=tmp_path).startswith(str(site / "vrnn_lightning"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dropped_file_beside_a_foreign_package_in_workers_and_ranks(site, tmp_path):
    (tmp_path / "datamodules").mkdir()
    (tmp_path / "datamodules" / "walks.py").write_text(DROPPED)
    (tmp_path / "program.py").write_text(PROGRAM)
    seen, name = tmp_path / "seen.txt", "vrnn_lightning.datamodules.local.walks"
    said = run("program.py", site=site, here=tmp_path)
    assert f"{site}/datamodules/__init__.py {site}/vrnn_lightning/datamodules/__init__.py" in said
    processes = {line.split()[0] for line in seen.read_text().splitlines()}
    assert len(processes) == 2  # this one and a spawned worker
    seen.unlink()
    words = ["fit", "--data=Walks", "--trainer.max_epochs=1", "--trainer.devices=2", "--trainer.strategy=ddp"]
    words += ["--trainer.accelerator=cpu", "--model.hidden_size=4", "--report=false"]
    run(site / "bin" / "lightning", *words, "--samples.every_n_validations=0", site=site, here=tmp_path)
    lines = [line.split() for line in seen.read_text().splitlines()]
    assert len({process for process, *_ in lines}) == 2
    assert {tuple(rest) for _, *rest in lines} == {(name, "foreign")}
