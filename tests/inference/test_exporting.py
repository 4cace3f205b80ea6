"""The exported step says what the streaming session says."""

from __future__ import annotations

import resource
import sys

import pytest
import torch
from torch.distributions import Distribution
from torch.nn.utils import prune

from vrnn_lightning import VRNNLightningModule
from vrnn_lightning.errors import UserError
from vrnn_lightning.heads import Bernoulli, GaussianMixture, MuLaw, Pen, Poisson, StudentT
from vrnn_lightning.inference import exporting
from vrnn_lightning.inference.exporting import _lgamma, _softplus

TORCH = {
    "no latent": {"latent_size": 0, "emission": StudentT, "num_inputs": 1, "cell": "lstm"},
    "standard prior, pen": {"prior": None, "emission": Pen, "layers": 2},
    "bins": {"emission": MuLaw, "missing": True, "residual_posterior": True},
}
ONNX = {
    "mixture, two layers of lstm, dropout": {"emission": GaussianMixture, "cell": "lstm", "layers": 2, "dropout": 0.5},
    "counts, residual, covariates, missing": {
        "emission": Poisson, "residual_posterior": True, "num_inputs": 2, "missing": True,
    },
}  # fmt: skip


def make(**options):
    torch.manual_seed(0)
    module = VRNNLightningModule(**{"num_features": 3, "latent_size": 2, "hidden_size": 6} | options)
    if module.vrnn.decoder.head.likelihood == "density":
        module.scale_mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
        module.scale_std.copy_(torch.tensor([3.0, 0.5, 1.0]))
    module.vrnn.input_mean.fill_(0.3)
    module.vrnn.input_std.fill_(1.5)
    return module


def frames(module, size, generator):
    """Frames that have a probability, in the module's precision."""
    head, like = module.vrnn.decoder.head, module.vrnn.input_mean
    x = torch.randn(size, 3, generator=generator)
    if isinstance(head, Poisson):
        x = (5 * x.abs()).floor()
    if isinstance(head, MuLaw):
        x = x.tanh()
    if isinstance(head, (Bernoulli, Pen)):
        x[:, 2] = (x[:, 2] > 0).float()
    return x.to(like)


def compare(module, run, tolerance, size=2):
    """Follow sequences of three steps by the session and by the exported program."""
    vrnn, generator = module.vrnn, torch.Generator().manual_seed(1)
    session, like = module.session(batch_size=size), module.vrnn.input_mean
    state = {name: part for name, part in zip("hc", vrnn.initial_state(size), strict=True) if part is not None}

    def draw(width):
        return torch.randn(size, width, generator=generator).to(like)

    for _ in range(3):
        x = frames(module, size, generator)
        given = {"x": x}
        observed = inputs = next_inputs = None
        if vrnn.missing:
            given["observed"] = observed = torch.rand(size, 3, generator=generator) > 0.3
            x[~observed] = float("nan")
        if vrnn.num_inputs:
            given["inputs"] = inputs = draw(vrnn.num_inputs)
        noise, next_noise = draw(vrnn.latent_size), draw(vrnn.latent_size)
        if vrnn.latent_size:
            given["noise"] = noise
        if vrnn.num_inputs:
            given["next_inputs"] = next_inputs = draw(vrnn.num_inputs)
        if vrnn.latent_size:
            given["next_noise"] = next_noise
        nats, mean, *rest = run(given | state)
        step = session.step(x, observed, inputs, noise)
        ahead = step.next(inputs=next_inputs, noise=next_noise)
        torch.testing.assert_close(nats, step.nats.to(nats), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(mean, ahead.mean.to(mean), rtol=tolerance, atol=tolerance)
        if not isinstance(vrnn.decoder.head, MuLaw):
            std, *rest = rest
            torch.testing.assert_close(std, ahead.stddev.to(std), rtol=tolerance, atol=tolerance)
        state = dict(zip(state, rest, strict=True))
    for name, part in state.items():
        torch.testing.assert_close(part, getattr(session.state, name).to(part), rtol=tolerance, atol=tolerance)


def load(path):
    program = torch.export.load(path).module()
    return lambda given: program(*given.values())


@pytest.mark.parametrize("kind", TORCH)
def test_a_torch_program(kind, tmp_path):
    module = make(**TORCH[kind])
    module.export(tmp_path / "step.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["step.pt2"]
    run = load(tmp_path / "step.pt2")
    for size in (1, 2, 1000):
        compare(module, run, 1e-5, size)


@pytest.mark.parametrize("kind", ONNX)
def test_an_onnx_program(kind, tmp_path, capfd):
    onnxruntime = pytest.importorskip("onnxruntime")
    module, path = make(**ONNX[kind]), tmp_path / "a step é.onnx"
    if kind.startswith("mixture"):
        module.double()  # the program is in float32 all the same
    path.write_bytes(b"what was there before")
    module.export(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    session = onnxruntime.InferenceSession(path.read_bytes())

    def run(given):
        given = {k: v.float().numpy() if v.is_floating_point() else v.numpy() for k, v in given.items()}
        return [torch.from_numpy(out) for out in session.run(None, given)]

    for size in (1, 2, 1000):
        compare(module, run, 1e-4, size)
    assert module.vrnn.input_mean.dtype == (torch.float64 if kind.startswith("mixture") else torch.float32)
    assert capfd.readouterr() == ("", "")


def test_an_export_leaves_all_as_it_was(tmp_path):
    """Of a plain one; weights that are pruned count as they are now; modes, precision and torch's own checks stay."""
    module = make().double()
    before = module.state_dict()
    prune.random_unstructured(module.vrnn.phi_x[0], "weight", 0.5)
    module.vrnn.prior.eval()
    modes = {name: part.training for name, part in module.named_modules()}
    checks, random = Distribution._validate_args, torch.get_rng_state()
    with torch.inference_mode():
        module.export(tmp_path / "step.pt2")
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert Distribution._validate_args == checks
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vrnn_lightning"]:
            patch.setitem(sys.modules, name, None)  # the program needs nothing of ours
        run = load(tmp_path / "step.pt2")
    compare(module, run, 1e-12)
    prune.remove(module.vrnn.phi_x[0], "weight")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items() if "phi_x" not in name)


def test_functions_that_onnx_lacks():
    x = torch.logspace(-4, 6, 2001, dtype=torch.float64)
    torch.testing.assert_close(_lgamma(x), torch.lgamma(x), rtol=1e-9, atol=1e-9)
    assert ((_lgamma(x.float()) - torch.lgamma(x)).abs() < 1e-6 * (10 + torch.lgamma(x).abs())).all()
    x = torch.linspace(-800, 800, 1601, dtype=torch.float64)
    torch.testing.assert_close(_softplus(x), torch.logaddexp(x, torch.zeros_like(x)), rtol=1e-12, atol=0)
    assert _softplus(x.float()) is NotImplemented


def test_what_an_export_cannot_do(tmp_path, monkeypatch):
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "file").write_text("kept")
    for name, message in (
        ("step.pt", "as .pt2 or .onnx"),
        ("no/step.pt2", "there is no folder"),
        ("file/step.pt2", "there is no folder"),
        ("a" * 300 + ".pt2", "File name too long"),
        ("folder.pt2", "is a folder. Fix: give another name"),
    ):
        with pytest.raises(UserError, match=message):
            make().export(tmp_path / name)
    with pytest.raises(UserError, match="no step to export"):
        make(smoothing=True).export(tmp_path / "step.pt2")
    spoiled = make()
    spoiled.vrnn.phi_x[0].bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"the model: vrnn\.phi_x\.0\.bias holds values that are not numbers"):
        spoiled.export(tmp_path / "step.onnx")
    with pytest.raises(UserError, match="convert it to float32"):
        make().bfloat16().export(tmp_path / "step.pt2")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed. Fix: pip install 'vrnn-lightning\[export\]'"):
        make().export(tmp_path / "step.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.pt2"]


def test_without_room_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_as_torch", lambda step: bytes(5000))
    path = tmp_path / "step.pt2"
    path.write_text("kept")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"step\.pt2: File too large"):
            make().export(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step.pt2"]
    assert path.read_text() == "kept"
