"""Runs of earlier releases load, test to the same figures and resume; newer formats and renamed parts are read too."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from vrnn_lightning import UserError, VRNNLightningModule, compatibility
from vrnn_lightning.data import RandomSplitDataModule, RandomSplits
from vrnn_lightning.datamodules import local
from vrnn_lightning.heads import Poisson
from vrnn_lightning.objectives import ELBO
from vrnn_lightning.pretrained import NAME

RELEASES = sorted(Path(__file__).with_name("golden").iterdir())
CLOSE = {"rel": 1e-5, "abs": 1e-6}  # releases of torch differ by rounding


@pytest.fixture(params=RELEASES, ids=lambda folder: folder.name)
def run(request, folder):
    """The folder of a run that a release wrote, beside what is expected of it."""
    return Path(shutil.copytree(request.param, folder / "runs" / "sines" / "version_0"))


def rows(file):
    with Path(file).open(newline="") as lines:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(lines)]


def test_a_checkpoint_tests_to_the_same_figures(run, lightning):
    before = rows(run / "metrics.csv")
    assert lightning("test", "--ckpt_path", run / "checkpoints" / "last.ckpt").code == 0
    assert len(rows(run / "metrics.csv")) == len(before) + 1
    expected = json.loads((run / "test.json").read_text())
    assert {key: rows(run / "metrics.csv")[-1][key] for key in expected} == pytest.approx(expected, **CLOSE)


def test_a_run_resumes(run, lightning):
    assert lightning("fit", "--ckpt_path", "last", "--trainer.max_epochs=4").code == 0
    expected = rows(run / "metrics_resumed.csv")
    found = rows(run / "metrics.csv")
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert {key: row[key] for key in other} == pytest.approx(other, **CLOSE)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint[compatibility.KEY] == compatibility.FORMAT
    data = checkpoint["datamodule_hyper_parameters"]["_class_path"]
    assert data == yaml.safe_load((run / "config.yaml").read_text())["data"]["class_path"]
    assert data == "vrnn_lightning.datamodules.sines.Sines"


def test_models_load(run):
    module = VRNNLightningModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    other = VRNNLightningModule.from_pretrained(run / "pretrained")
    for (name, value), there in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, there), name


def test_old_names_of_weights(run, monkeypatch):
    monkeypatch.setitem(compatibility.WEIGHTS, "vrnn.old_cell", "vrnn.cells")
    path = run / "checkpoints" / "last.ckpt"
    module = VRNNLightningModule.load_from_checkpoint(path)
    content = torch.load(path, weights_only=True)
    weights = content["state_dict"]
    content["state_dict"] = {name.replace("vrnn.cells", "vrnn.old_cell"): value for name, value in weights.items()}
    assert content["state_dict"].keys() != weights.keys()
    torch.save(content, path)
    for found in (VRNNLightningModule.load_from_checkpoint(path), module.from_pretrained(run / "pretrained")):
        assert torch.equal(next(found.parameters()), next(module.parameters()))
    optimized = {compatibility.OPTIMIZED: [["vrnn.old_cell.0.weight_ih", "vrnn.old_cells"]]}
    compatibility.upgrade(optimized, "last.ckpt")
    assert optimized == {compatibility.OPTIMIZED: [["vrnn.cells.0.weight_ih", "vrnn.old_cells"]]}


def test_an_old_class_path_on_the_command_line(lightning):
    said = lightning("fit", "--data", "datamodules.sines.Sines", "--print_config")
    assert said.code == 0, said.err
    assert yaml.safe_load(said.out)["data"]["class_path"] == "vrnn_lightning.datamodules.sines.Sines"
    Path("old.yaml").write_text("fit: {data: {class_path: datamodules.sines.Sines}}")
    written = yaml.safe_load(lightning("-c", "old.yaml", "fit", "--print_config").out)
    assert written["data"]["class_path"] == "vrnn_lightning.datamodules.sines.Sines"


def test_a_dropped_file_of_an_old_checkpoint_and_a_foreign_package(folder):
    (folder / "datamodules").mkdir()
    (folder / "datamodules" / "walks.py").write_text("raise RuntimeError('imported')")
    local.use_working_directory()
    assert compatibility.current_class("datamodules.walks.Walks") == "vrnn_lightning.datamodules.local.walks.Walks"
    assert compatibility.current_class("datamodules.strolls.Strolls") == "datamodules.strolls.Strolls"
    assert compatibility.current_class("datamodules.walks.deep.Walks") == "datamodules.walks.deep.Walks"


def test_a_newer_format_is_one_line(run, lightning):
    path, newer = run / "checkpoints" / "last.ckpt", compatibility.FORMAT + 1
    torch.save(torch.load(path, weights_only=True) | {compatibility.KEY: newer}, path)
    config = json.loads((run / "pretrained" / "config.json").read_text())
    (run / "pretrained" / "config.json").write_text(json.dumps(config | {"format": f"{NAME} {newer}"}))
    said = lightning("test", "--ckpt_path", path)
    assert said.code == 1
    fix = "but this version of vrnn-lightning reads formats up to 2. Fix: pip install --upgrade vrnn-lightning"
    assert said.err == f"error: --ckpt_path {path}: has format {newer}, {fix}\n"
    with pytest.raises(UserError, match=f"has format {newer}"):
        VRNNLightningModule.load_from_checkpoint(path)
    with pytest.raises(UserError, match=f"has format {newer}"):
        VRNNLightningModule.from_pretrained(run / "pretrained")


@pytest.mark.parametrize("number", [0, -1, True, "2", 1.0, [[2]]])
def test_a_format_is_a_positive_number(number):
    what = "of type list" if isinstance(number, list) else repr(number)
    with pytest.raises(UserError, match=rf"a\.ckpt: its format {what} is (not a number|below 1). Fix:"):
        compatibility.require_known_format(number, "a.ckpt")


def test_names_of_the_last_release_are_found_with_a_warning():
    import vrnn_lightning
    from vrnn_lightning import batch, data, filtering, nn, objectives

    for module, old, new in (
        (vrnn_lightning, "Sequence", "SequenceSample"),
        (vrnn_lightning, "Layers", "MLPConfig"),
        (batch, "Sequence", "SequenceSample"),
        (nn, "Layers", "MLPConfig"),
        (data, "BadFiles", "InvalidFiles"),
        (data, "DrawnDataModule", "RandomSplitDataModule"),
        (data, "DrawnSplits", "RandomSplits"),
        (filtering, "Weights", "ParticleWeights"),
        (objectives, "Found", "ObjectiveOutput"),
    ):
        with pytest.warns(FutureWarning, match=rf"{old} is now called {new}"):
            assert getattr(module, old) is getattr(module, new)
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            getattr(module, "Nothing")  # noqa: B009  # as Python asks for it
    sample = batch.pad([batch.SequenceSample(torch.zeros(2, 1))])
    with pytest.warns(FutureWarning, match="counted is now called valid_mask"):
        assert torch.equal(sample.counted, sample.valid_mask)


def test_hooks_of_the_last_release_still_override():
    """A head, an objective and a datamodule that a user wrote for it; and what inherits from them under either name."""
    calls = []
    with pytest.warns(FutureWarning) as said:

        class Old(Poisson):
            cure = "count again"

            def start_from(self, mean):
                calls.append("old")
                super().start_from(mean)

    warned = [str(warning.message) for warning in said]
    assert [line.rpartition("Old.")[2] for line in warned] == [
        "start_from is now called init_from_statistics. Fix: rename it", "cure is now called fix. Fix: rename it"
    ]  # fmt: skip

    class New(Old):
        def init_from_statistics(self, mean):
            calls.append("new")
            super().init_from_statistics(mean)

    class Older(New):
        __test__ = False

    for head, expected in ((Old(4, 2), ["old"]), (New(4, 2), ["new", "old"]), (Older(4, 2), ["new", "old"])):
        calls.clear()
        before = head.linear.bias.clone()
        head.init_from_statistics(torch.tensor([3.0, 5.0]))
        assert calls == expected
        assert not torch.equal(head.linear.bias, before)
        with pytest.raises(UserError, match="count again or choose"):
            head.check(-torch.ones(1, 1, 2), torch.ones(1, 1, 2, dtype=torch.bool))
    own = Poisson(4, 2)
    own.cure = "count them by hand"
    with pytest.raises(UserError, match="count them by hand or choose"):
        own.check(-torch.ones(1, 1, 2), torch.ones(1, 1, 2, dtype=torch.bool))

    with pytest.warns(FutureWarning, match=r"Bound\.absent is now called unsupported_options"):

        class Bound(ELBO):
            absent = {"kl": "it has none"}

    assert Bound.unsupported_options == {"kl": "it has none"}
    with pytest.warns(FutureWarning, match=r"Halves\.drawn is now called random_splits"):

        class Halves(RandomSplitDataModule):
            @property
            def drawn(self):
                return RandomSplits(0.5, 0.0, 1)

    assert Halves(1).random_splits.val == 0.5


def test_old_hooks_of_a_mixin_and_of_an_instance_still_override():
    class Mixin:
        def start_from(self, mean):
            self.given = mean

    class Kept(RandomSplits):
        pass

    with pytest.warns(FutureWarning, match="start_from is now called init_from_statistics"):

        class Mixed(Mixin, Poisson):
            pass

    head = Mixed(4, 1)
    head.init_from_statistics(torch.ones(1))
    assert head.given == 1
    with pytest.warns(FutureWarning, match="drawn is now called random_splits"):

        class Assigned(RandomSplitDataModule):
            drawn = None

            def __init__(self):
                super().__init__(1)
                self.drawn = Kept(0.5, 0.0, 1)

    assert type(Assigned().random_splits) is Kept


def test_weights_and_attributes_of_a_module_of_the_last_release():
    module = VRNNLightningModule(num_features=1, latent_size=1)
    weights = {{"is_initialized": "prepared"}.get(name, name): value for name, value in module.state_dict().items()}
    assert module.load_state_dict(weights)
    inside = torch.nn.ModuleList([module])  # as callbacks that average weights keep it
    assert inside.load_state_dict({f"0.{name}": value for name, value in weights.items()})
    with pytest.warns(FutureWarning, match="traced is now called is_tracing"):
        module.traced = False
    assert not module.is_tracing
    with pytest.warns(FutureWarning, match="prepared is now called is_initialized"):
        assert module.prepared is module.is_initialized
