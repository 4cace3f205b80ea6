"""The exported step says what the streaming session says."""

from __future__ import annotations

import sys

import pytest
import torch

from vrnn_lightning import VRNNLightningModule
from vrnn_lightning.errors import UserError
from vrnn_lightning.heads import Bernoulli, GaussianMixture, Pen, StudentT

MODELS = {
    "gru": {},
    "mixture, two layers of lstm": {"emission": GaussianMixture, "cell": "lstm", "layers": 2},
    "residual, covariates, missing": {"residual_posterior": True, "num_inputs": 2, "missing": True},
    "no latent": {"latent_size": 0, "emission": StudentT},
    "standard prior, pen": {"prior": None, "emission": Pen},
}


def make(**options):
    torch.manual_seed(0)
    module = VRNNLightningModule(**{"num_features": 3, "latent_size": 2, "hidden_size": 6} | options)
    if options.get("emission") is not Pen:
        module.scale_mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
        module.scale_std.copy_(torch.tensor([3.0, 0.5, 1.0]))
    return module


def compare(module, run, tolerance):
    """Follow two sequences of four steps by the session and by the exported program."""
    vrnn, generator = module.vrnn, torch.Generator().manual_seed(1)
    session = module.session(batch_size=2)
    state = {name: part for name, part in zip("hc", vrnn.initial_state(2), strict=True) if part is not None}
    for _ in range(4):
        x = torch.randn(2, 3, generator=generator)
        if isinstance(vrnn.decoder.head, (Bernoulli, Pen)):
            x[:, 2] = (x[:, 2] > 0).float()
        given = {"x": x}
        observed = inputs = noise = None
        if vrnn.missing:
            given["observed"] = observed = torch.rand(2, 3, generator=generator) > 0.3
        if vrnn.num_inputs:
            given["inputs"] = inputs = torch.randn(2, vrnn.num_inputs, generator=generator)
        if vrnn.latent_size:
            given["noise"] = noise = torch.randn(2, vrnn.latent_size, generator=generator)
        nats, *state_next = run(given | state)
        torch.testing.assert_close(nats, session.step(x, observed, inputs, noise).nats, rtol=tolerance, atol=tolerance)
        state = dict(zip(state, state_next, strict=True))
    torch.testing.assert_close(state["h"], session.state.h, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", MODELS)
def test_a_torch_program(kind, tmp_path):
    module = make(**MODELS[kind])
    module.export(tmp_path / "step.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["step.pt2"]
    assert module.training
    program = torch.export.load(tmp_path / "step.pt2").module()
    compare(module, lambda given: program(*given.values()), 1e-5)


@pytest.mark.parametrize("kind", ["mixture, two layers of lstm", "residual, covariates, missing"])
def test_an_onnx_program(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    module = make(**MODELS[kind])
    module.export(tmp_path / "step.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["step.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"))

    def run(given):
        return [torch.from_numpy(out) for out in session.run(None, {k: v.numpy() for k, v in given.items()})]

    compare(module, run, 1e-4)


def test_what_an_export_cannot_do(tmp_path, monkeypatch):
    for name, message in (("step.pt", "as .pt2 or .onnx"), ("no/step.pt2", "there is no folder")):
        with pytest.raises(UserError, match=message):
            make().export(tmp_path / name)
    with pytest.raises(UserError, match="no step to export"):
        make(smoothing=True).export(tmp_path / "step.pt2")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed; pip install 'vrnn-lightning\[export\]'"):
        make().export(tmp_path / "step.onnx")
    assert not list(tmp_path.iterdir())
