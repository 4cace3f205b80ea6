"""A model's folder gives the model back, and runs nothing."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import torch

from vrnn_lightning import VRNNLightningModule
from vrnn_lightning.errors import UserError
from vrnn_lightning.heads import GaussianMixture
from vrnn_lightning.nn import Layers

SIZES = {
    "num_features": 2,
    "latent_size": 3,
    "hidden_size": 5,
    "phi_x": Layers(width=6, depth=2),
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
    assert not loaded.training
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


@pytest.mark.parametrize("option", ["emission", "phi_x"])
def test_a_class_that_is_not_ours_is_not_imported(module, option, tmp_path, monkeypatch):
    (tmp_path / "evil_heads.py").write_text("raise RuntimeError('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    module.save_pretrained(tmp_path)
    change(tmp_path, **{option: {"class_path": "evil_heads.Head", "init_args": {}}})
    with pytest.raises(UserError, match=r"names the class evil_heads.Head.*trust=\['evil_heads'\]"):
        VRNNLightningModule.from_pretrained(tmp_path)
    assert "evil_heads" not in sys.modules


def test_a_trusted_class_is_imported(module, tmp_path, monkeypatch):
    (tmp_path / "own_heads_of_test.py").write_text(
        "from vrnn_lightning.heads import GaussianMixture\nclass Mine(GaussianMixture): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module.save_pretrained(tmp_path)
    change(tmp_path, emission={"class_path": "own_heads_of_test.Mine", "init_args": {"components": 4}})
    loaded = VRNNLightningModule.from_pretrained(tmp_path, trust=["own_heads_of_test"])
    assert "Mine" in {type(part).__name__ for part in loaded.modules()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: No such file.*save_pretrained wrote"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: No such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: is not what save_pretrained"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08" * 9), "model.safetensors: is no safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: is no safetensors file"),
        (lambda f: change(f, hidden_size=7), "are of different models"),
        (lambda f: change(f, hidden_size=-1), "no model can be made of its options"),
        (lambda f: change(f, hidden_size="x"), "no model can be made of its options"),
        (lambda f: change(f, no_such_option=1), "no model can be made of its options"),
    ],
)
def test_a_spoiled_folder_is_one_line(module, spoil, message, tmp_path):
    module.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        VRNNLightningModule.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_where_nothing_can_be_written_nothing_is(module, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=r"file: .*not saved"):
        module.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_without_safetensors_the_cure_is_said(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"pip install 'vrnn-lightning\[export\]'"):
        module.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
