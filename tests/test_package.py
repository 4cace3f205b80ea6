import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(CHECKOUT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (file,) = out.glob("*.whl")
    return file


def test_wheel_holds_packages_configs_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for config in (CHECKOUT / "configs").glob("*.yaml"):
        assert f"vrnn_lightning/configs/{config.name}" in names
    assert {"vrnn_lightning/py.typed", "datamodules/sines.py", "datamodules/_template.py"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vrnn_lightning", "datamodules"}


def test_installed_wheel_trains_from_an_empty_directory(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "empty"
    here.mkdir()
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, timeout=120)
    script = site / "bin" / "lightning"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    words = ["fit", "-c", "configs/synthetic.yaml", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    words += ["--data.train_size=8", "--data.val_size=8"]
    where = "import vrnn_lightning, datamodules; print(vrnn_lightning.__file__, datamodules.__file__)"
    for command in ([str(script), *words], ["-c", where]):
        done = subprocess.run(
            [sys.executable, *command], cwd=here, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(str(site)) == 2
    assert list(here.iterdir()) == []
