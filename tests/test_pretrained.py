"""A model's folder gives the model back, and runs nothing."""

from __future__ import annotations

import copy
import importlib
import json
import os
import resource
import struct
import sys
from functools import partial

import pytest
import safetensors.torch
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch.nn.utils import prune
from vrnn_lightning.datamodules.sines import Sines

from vrnn_lightning import VRNNLightningModule
from vrnn_lightning.errors import UserError
from vrnn_lightning.heads import Bernoulli, DiscretisedLogisticMixture, Gaussian, GaussianMixture, Pen, StudentT
from vrnn_lightning.nn import MLPConfig

SIZES = {
    "num_features": 2,
    "latent_size": 3,
    "hidden_size": 5,
    "phi_x": MLPConfig(width=6, depth=2),
    "emission": partial(GaussianMixture, components=4),
}


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = VRNNLightningModule(**SIZES, residual_posterior=True)
    module.scale_mean.copy_(torch.tensor([1.0, -2.0]))
    module.scale_std.copy_(torch.tensor([3.0, 0.5]))
    return module


def change(folder, **options):
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= options
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_says_what_the_saved_one_says(module, dtype, tmp_path):
    module.to(dtype).save_pretrained(tmp_path / "new" / "folder")
    loaded = VRNNLightningModule.from_pretrained(tmp_path / "new" / "folder")
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {"config.json", "model.safetensors"}
    assert loaded.training, "Lightning would train it without dropout"
    assert loaded.scaler.mean.tolist() == [1.0, -2.0]
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
        assert loaded.state_dict()[name].dtype == value.dtype, name
    x = torch.randn(7, 2, dtype=dtype)
    assert torch.equal(loaded.score([x], seed=1)[0], module.score([x], seed=1)[0])
    assert torch.equal(loaded.sample(2, 4, seed=3), module.sample(2, 4, seed=3))


def test_a_checkpoint_of_a_run_becomes_a_folder(lightning, tiny, tmp_path):
    assert lightning("fit", "-c", tiny, "--model.emission", "StudentT").code == 0
    (path,) = tmp_path.rglob("last.ckpt")
    module = VRNNLightningModule.load_from_checkpoint(path)
    module.save_pretrained(tmp_path / "model")
    loaded = VRNNLightningModule.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.sample(1, 5, seed=0), module.sample(1, 5, seed=0))


@pytest.mark.parametrize("option", ["emission", "phi_x", "optimizer", "lr_scheduler", "objective", "_instantiator"])
@pytest.mark.parametrize("named", ["text", "class_path", "deep"])
def test_nothing_that_the_folder_names_or_holds_is_run(module, option, named, tmp_path, monkeypatch):
    """Modules that say so when they run lie in the folder, which Python looks into first."""
    module.save_pretrained(tmp_path)
    for planted in ("evil_heads", "sitecustomize", "heads", "conftest", "__init__"):
        (tmp_path / f"{planted}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "evil_heads.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    evil = {"class_path": "evil_heads.Head", "init_args": {}}
    deep = {"class_path": "vrnn_lightning.heads.GaussianMixture", "init_args": {"components": evil}}
    change(tmp_path, **{option: {"text": "evil_heads.Head", "class_path": evil, "deep": deep}[named]})
    before = set(sys.modules)
    with pytest.raises(UserError) as caught:
        VRNNLightningModule.from_pretrained(tmp_path)
    if named == "class_path" and option in ("emission", "phi_x"):
        assert "names evil_heads.Head" in str(caught.value)
        assert "trust=['evil_heads']" in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert "evil_heads" not in sys.modules
    assert not {name for name in set(sys.modules) - before if not name.startswith(("safetensors", "torch"))}


def test_the_planted_module_would_say_so(tmp_path, monkeypatch):
    (tmp_path / "evil_heads_run.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("evil_heads_run")
    assert (tmp_path / "ran").exists()


def test_a_saved_model_saved_again_is_the_same_bytes(module, tmp_path):
    module.save_pretrained(tmp_path / "one")
    torch.manual_seed(7)
    VRNNLightningModule.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "a folder é")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "a folder é" / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"latent_size": 0, "emission": StudentT, "cell": "lstm", "layers": 2},
        {"prior": None, "emission": Pen, "num_features": 3},
        {"num_inputs": 2, "missing": True, "dropout": 0.5, "emission": partial(Bernoulli)},
        {"smoothing": True, "emission": partial(DiscretisedLogisticMixture, components=2, bits=4, lowest=-3)},
        {"emission": partial(Gaussian, covariance="scalar", min_std=1)},
    ],
    ids=str,
)
def test_every_kind_of_model_comes_back(options, tmp_path):
    module = VRNNLightningModule(**{"num_features": 2, "latent_size": 2, "hidden_size": 5} | options)
    module.save_pretrained(tmp_path)
    loaded = VRNNLightningModule.from_pretrained(tmp_path)
    inputs = torch.ones(2, 4, 2) if module.vrnn.num_inputs else None
    expected = module.sample(2, 4, inputs=inputs, seed=3)
    assert torch.equal(loaded.sample(2, 4, inputs=inputs, seed=3), expected)
    assert torch.equal(
        loaded.score(expected, inputs=inputs, seed=1)[0], module.score(expected, inputs=inputs, seed=1)[0]
    )
    given = {name: value for name, value in loaded.hparams.items() if name not in ("optimizer", "objective")}
    assert given == {name: value for name, value in module.hparams.items() if name in given}


def test_a_loaded_model_trains_on_with_its_dropout(tmp_path):
    VRNNLightningModule(3, latent_size=2, hidden_size=4, dropout=0.5).save_pretrained(tmp_path)
    loaded = VRNNLightningModule.from_pretrained(tmp_path)
    before, trained = {k: v.clone() for k, v in loaded.state_dict().items()}, []
    trainer = Trainer(
        max_epochs=1, limit_train_batches=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        callbacks=[LambdaCallback(on_train_batch_start=lambda _, module, *rest: trained.append(module.vrnn.training))],
    )  # fmt: skip
    trainer.fit(loaded, Sines(steps=4, train_size=8, val_size=4, test_size=4, batch_size=4))
    assert trained == [True]
    assert any(not torch.equal(before[k], v) for k, v in loaded.state_dict().items() if k.startswith("vrnn"))
    loaded.save_pretrained(tmp_path)
    again = VRNNLightningModule.from_pretrained(tmp_path)
    assert torch.equal(again.sample(1, 3, seed=0), loaded.sample(1, 3, seed=0))


def test_a_model_loads_where_onnx_is_not(module, tmp_path, monkeypatch):
    module.save_pretrained(tmp_path)
    for name in ("onnx", "onnxscript", "onnxruntime", "jsonargparse"):
        monkeypatch.setitem(sys.modules, name, None)
    assert VRNNLightningModule.from_pretrained(tmp_path).vrnn.latent_size == 3


def test_a_trusted_class_is_imported(module, tmp_path, monkeypatch):
    (tmp_path / "own_heads_of_test.py").write_text(
        "import torch\nfrom vrnn_lightning.heads import GaussianMixture\n"
        "class Mine(GaussianMixture):\n"
        "    def __init__(self, in_features, num_features, components=20):\n"
        "        super().__init__(in_features, num_features, components)\n"
        "        self.looked_at = torch.ones(1).item()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module.save_pretrained(tmp_path)
    change(tmp_path, emission={"class_path": "own_heads_of_test.Mine", "init_args": {"components": 4}})
    loaded = VRNNLightningModule.from_pretrained(tmp_path, trust="own_heads_of_test")
    assert "Mine" in {type(part).__name__ for part in loaded.modules()}
    loaded.save_pretrained(tmp_path / "again")
    again = VRNNLightningModule.from_pretrained(tmp_path / "again", trust=["own_heads_of_test"])
    assert torch.equal(again.sample(1, 3, seed=0), module.sample(1, 3, seed=0))
    change(tmp_path, hidden_size=10**12)
    with pytest.raises(UserError, match="VRNNLightningModule can't be made of its options"):
        VRNNLightningModule.from_pretrained(tmp_path, trust=["own_heads_of_test"])


def reweigh(folder, **tensors):
    """Put other weights into a folder; ``None`` takes one out."""
    path = folder / "model.safetensors"
    weights = safetensors.torch.load(path.read_bytes()) | {k.replace("__", "."): v for k, v in tensors.items()}
    path.write_bytes(safetensors.torch.save({k: v for k, v in weights.items() if v is not None}))


def link(path, target):
    path.unlink()
    path.symlink_to(target)


def narrow(folder, dtype):
    weights = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    reweigh(folder, **{name: value.to(dtype) for name, value in weights.items() if value.is_floating_point()})


def emission(folder, path="vrnn_lightning.heads.GaussianMixture", **options):
    change(folder, emission={"class_path": path, "init_args": options})


WEIGHTS = "model.safetensors"
NAN = float("nan")
HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 0]}}).encode()
HUGE = struct.pack("<Q", len(HEADER)) + HEADER


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: No such file.*save_pretrained wrote"),
        (lambda f: (f / WEIGHTS).unlink(), "model.safetensors: No such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json: is not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: is not what save_pretrained"),
        (
            lambda f: (f / "config.json").write_text('{"format": "vrnn-lightning 999", "model": {}}'),
            "has format 999, but this version",
        ),
        (lambda f: link(f / "config.json", f), "config.json: is not a file"),
        (lambda f: link(f / "config.json", "/dev/zero"), "config.json: is not a file"),
        (lambda f: link(f / "config.json", f / "config.json"), "config.json: Too many levels of symbolic links"),
        (lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "model.safetensors: is not a file"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\x08" * 9), "model.safetensors: is not a safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "model.safetensors: is not a safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "is not a safetensors file"),
        (lambda f: torch.save({"a": 1}, f / WEIGHTS), "model.safetensors: is not a safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes(HUGE), "model.safetensors: is not a safetensors file"),
        (lambda f: change(f, hidden_size=7), "Fix: give the options it was"),
        (lambda f: change(f, hidden_size=10**6), r"has shape \(64, 5\) .*1000000.*Fix: give the options it was"),
        (lambda f: change(f, hidden_size=10**12), "VRNNLightningModule can't be made of its options"),
        (lambda f: change(f, phi_x={"width": 10**9, "depth": 2}), "Fix: give the options it was"),
        (lambda f: change(f, phi_x={"width": 1, "depth": 10**9}), "phi_x is deeper than its 29 weights"),
        (lambda f: change(f, layers=10**9), "layers is deeper than its 29 weights"),
        (lambda f: change(f, hidden_size=-1), "VRNNLightningModule can't be made of its options"),
        (lambda f: change(f, hidden_size="x"), "hidden_size 'x' must be of type int"),
        (lambda f: change(f, hidden_size=True), "hidden_size 'True' must be of type int"),
        (lambda f: change(f, dropout=NAN), r"dropout nan: must lie in \[0, 1\)"),
        (lambda f: change(f, phi_x="width"), "VRNNLightningModule can't be made of its options"),
        (lambda f: change(f, phi_x={"breadth": 3}), "breadth is not an option of MLPConfig"),
        (
            lambda f: change(f, no_such_option=1),
            "no_such_option is not an option of VRNNLightningModule. Fix: remove it",
        ),
        (lambda f: emission(f, components="4"), "components '4' must be of type int"),
        (lambda f: emission(f, in_features=4), "VRNNLightningModule can't be made of its options"),
        (lambda f: emission(f, "vrnn_lightning.heads.Nothing"), "Nothing can't be imported"),
        (
            lambda f: emission(f, "vrnn_lightning.heads.Head"),
            "vrnn_lightning.heads.Head is not a Head that can be called",
        ),
        (
            lambda f: emission(f, "vrnn_lightning.heads.tempered"),
            "vrnn_lightning.heads.tempered is not a Head that can be called",
        ),
        (lambda f: emission(f, 3), "emission must hold a class_path and init_args"),
        (lambda f: reweigh(f, scale_std=None), r"scale_std has no values, but the options make shape \(2,\) of floats"),
        (lambda f: reweigh(f, extra=torch.ones(1)), r"extra has .* of floats, but the options make no values"),
        (lambda f: reweigh(f, scale_std=torch.ones(2).long()), "int64, but the options make .*floats"),
        (lambda f: reweigh(f, scale_std=torch.ones(2, dtype=torch.complex64)), "complex64, but the options make"),
        (lambda f: reweigh(f, scale_std=torch.zeros(2)), "scale_std is not positive"),
        (lambda f: reweigh(f, vrnn__input_std=-torch.ones(2)), "input_std is not positive"),
        (lambda f: reweigh(f, scale_mean=torch.full((2,), NAN)), "scale_mean holds values that are not numbers"),
        (lambda f: narrow(f, torch.float16), "float16. Fix: convert it to float32 or float64"),
        (lambda f: narrow(f, torch.float8_e4m3fn), "convert it to float32 or float64"),
    ],
)
def test_a_spoiled_folder_is_one_line(module, spoil, message, tmp_path):
    module.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        VRNNLightningModule.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_trusted_module_gives_emissions_alone(module, tmp_path):
    module.save_pretrained(tmp_path)
    emission(tmp_path, "os.system")
    with pytest.raises(UserError, match=r"os\.system is not a Head that can be called"):
        VRNNLightningModule.from_pretrained(tmp_path, trust=["os"])
    emission(tmp_path, "no_such_module_of_test.Head")
    with pytest.raises(UserError, match=r"no_such_module_of_test\.Head can't be imported"):
        VRNNLightningModule.from_pretrained(tmp_path, trust=["no_such_module_of_test"])


class Tagged(VRNNLightningModule):
    """A subclass with an option of its own."""

    def __init__(self, tag: str = "", **options):
        super().__init__(**options)
        self.tag = tag


def test_a_subclass_keeps_its_own_options(tmp_path):
    Tagged(tag="evil_heads.Head", num_features=2, hidden_size=3).save_pretrained(tmp_path)
    loaded = Tagged.from_pretrained(tmp_path)
    assert (type(loaded), loaded.tag, loaded.vrnn.hidden_size) == (Tagged, "evil_heads.Head", 3)
    with pytest.raises(UserError, match="tag is not an option of VRNNLightningModule"):
        VRNNLightningModule.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nothing", "a" * 300, "a\0b", ""])
def test_a_folder_that_is_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fix = "choose another path" if "\0" in name else "give a folder that save_pretrained wrote"
    with pytest.raises(UserError, match=rf"config\.json.*: .*Fix: {fix}"):
        VRNNLightningModule.from_pretrained(name)


def test_links_to_files_are_followed(module, tmp_path):
    module.save_pretrained(tmp_path / "blobs")
    (tmp_path / "model").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    assert VRNNLightningModule.from_pretrained(tmp_path / "model").vrnn.latent_size == 3


def test_what_can_t_be_loaded_is_not_saved(module, tmp_path):
    def refused(module, message):
        with pytest.raises(UserError, match=message):
            module.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()

    refused(copy.deepcopy(module).half(), "float16. Fix: convert it to float32 or float64")
    spoiled = copy.deepcopy(module)
    spoiled.scale_std.fill_(NAN)
    refused(spoiled, "the model: scale_std holds values that are not numbers")
    prune.random_unstructured(module.vrnn.phi_x[0], "weight", 0.5)
    refused(module, "phi_x.0.weight_orig: is of a pruned or parametrised layer")
    strange = VRNNLightningModule(**SIZES | {"emission": partial(GaussianMixture, min_std=torch.tensor(0.1))})
    refused(strange, "emission: has options that JSON can't hold")


def test_where_nothing_can_be_written_nothing_is(module, tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "file\0", tmp_path / ("file" * 99)):
        with pytest.raises(UserError, match=r"file.*Fix: (remove the file|choose)"):
            module.save_pretrained(path)
    assert (tmp_path / "file").read_text() == "kept"


def test_without_room_the_folder_is_as_it_was(module, tmp_path):
    module.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = VRNNLightningModule(**SIZES | {"hidden_size": 7})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (len(before["model.safetensors"]) // 2, 10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(UserError, match=r"File too large"):
                other.save_pretrained(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    other.save_pretrained(tmp_path)
    assert VRNNLightningModule.from_pretrained(tmp_path).vrnn.hidden_size == 7


def test_without_safetensors_the_cure_is_said(module, tmp_path, monkeypatch):
    module.save_pretrained(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"pip install 'vrnn-lightning\[export\]'"):
        module.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match=r"pip install 'vrnn-lightning\[export\]'"):
        VRNNLightningModule.from_pretrained(tmp_path / "saved")
