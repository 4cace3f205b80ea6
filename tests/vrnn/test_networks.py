"""Networks by configuration: every kind of layer, compiled or called, in every pass; and what they compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from passes import CONFIGS, PURPOSES, make_data, make_model
from test_recurrence import assert_equal_terms, make_batch
from test_recurrence import make_model as make_other
from torch import Tensor, nn
from torch.nn import functional as F

from vrnn_lightning import UserError, build_vrnn
from vrnn_lightning.nn import MLP, MLPConfig, Residual
from vrnn_lightning.nn.networks import ACTIVATIONS, HashedDropout
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import ELBO, FIVO

NAMES = ("phi_x", "phi_z", "prior", "encoder", "decoder")
KINDS = ("Tanh", "GELU", "ReLU", "ELU", "SiLU")


class Gated(nn.Module):
    """A network that the loop does not know."""

    def __init__(self, in_features: int, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.linear(x), -1)


class Pair(Gated):
    """A network that returns no tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


NETWORKS = {
    "layer norm, residual": {
        name: MLPConfig([6, 6, 7, 7], activation=kind, norm="layer", residual=True)
        for name, kind in zip(NAMES, KINDS, strict=True)
    },
    "residual": {name: MLPConfig(6, 3, activation="Softplus", residual=True) for name in NAMES},
    "rms norm": {name: MLPConfig(6, 2, norm="rms") for name in NAMES},
    "dropout": {name: MLPConfig(6, 2, dropout=0.4) for name in NAMES},
    "without biases": dict.fromkeys(NAMES, lambda width: nn.Sequential(nn.Linear(width, 6, bias=False), nn.Tanh())),
    "the input itself": {name: MLPConfig(depth=0) for name in NAMES},
    "own": dict.fromkeys(NAMES, Gated),
    "sequential": dict.fromkeys(
        NAMES, lambda width: nn.Sequential(nn.Linear(width, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.Mish())
    ),
}


@pytest.mark.parametrize("purpose", list(PURPOSES)[:-1])
@pytest.mark.parametrize("config", ["gru", "options"])
@pytest.mark.parametrize("networks", NETWORKS.values(), ids=NETWORKS)
def test_every_pass_equals_the_readable_one(networks, config, purpose):
    model, data = make_model(**{**CONFIGS[config], **networks}), make_data(config)
    masks = None if data.masks is None else model.draw_masks(data.noise)
    fast, readable = (run(model.eval(), data._replace(masks=masks)) for run in PURPOSES[purpose])
    assert len(fast) == len(readable)
    for one, other in zip(fast, readable, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_compiled_as_it_is(name):
    model = make_other(**{part: MLPConfig(6, 2, activation=name, norm="layer") for part in NAMES})
    assert_equal_terms(model, make_batch([5, 3]))
    assert not model.called_parts


@pytest.mark.parametrize("config", [{}, {"residual_posterior": True, "layers": 2}])
def test_dropout_of_a_network_is_a_function_of_its_features(config):
    """The fast loop drops what the readable one does, whole, recomputed and in a filter; in evaluation nothing."""
    model = make_other(**{part: MLPConfig(40, 2, dropout=0.4) for part in NAMES}, **config).train()
    batch = make_batch([5, 3])
    assert_equal_terms(model, batch)
    assert not model.called_parts
    noise = Noise(batch, [1, 2])

    def bounds() -> list[Tensor]:
        values = [objective(model, batch, noise, 1.0, lambda x: x).value for objective in (ELBO(), FIVO(4))]
        return [*values, *torch.autograd.grad(sum(values), list(model.parameters()), allow_unused=True)]

    whole = bounds()
    model.checkpoint_every = 2
    for one, other in zip(bounds(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    fast = model.eval()(batch, noise)
    for network in model.modules():
        if isinstance(network, HashedDropout):
            network.p = 0.0
    torch.testing.assert_close(fast.log_px, model.train()(batch, noise).log_px)
    layer = HashedDropout(0.25)
    dropped = layer(torch.rand(4000, 8) + 1)
    assert abs((dropped == 0).double().mean() - 0.25) < 0.01
    assert abs(dropped.mean() - 1.5) < 0.02
    together = (dropped == 0).double()  # units, and rows, are independent
    assert abs((together[:, 0] * together[:, 1]).mean() - 0.0625) < 0.02
    assert abs((together[1:, 0] * together[:-1, 0]).mean() - 0.0625) < 0.02
    assert torch.equal(layer(torch.ones(2, 8))[0], layer(torch.ones(2, 8))[1])


def test_what_is_compiled_and_what_is_called():
    def called(networks) -> set[str]:
        model = make_other(**networks)
        model(make_batch([2]))
        return set(model.called_parts)

    assert not called(NETWORKS["layer norm, residual"]) | called(NETWORKS["residual"]) | called(NETWORKS["sequential"])
    assert called(NETWORKS["own"]) == called(NETWORKS["rms norm"]) == {"encoder", "phi_z"}


def test_a_layer_is_a_linear_map_a_norm_an_activation_and_its_input():
    torch.manual_seed(0)
    network, x = MLPConfig([4, 4, 3], activation="Tanh", norm="layer", residual=True)(2), torch.randn(5, 2)
    first, second, third = network[0], network[3], network[4]
    h = F.layer_norm(first(x), (4,)).tanh()
    h = h + F.layer_norm(second[0](h), (4,)).tanh()
    torch.testing.assert_close(network(x), F.layer_norm(third(h), (3,)).tanh())
    assert isinstance(second, Residual)
    assert network.out_features == 3


def test_the_default_keeps_its_names_and_weights():
    torch.manual_seed(0)
    expected = nn.Linear(3, 4), nn.Linear(4, 4)
    torch.manual_seed(0)
    network = MLP(3, MLPConfig(4, 2))
    assert list(network.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(network[2].weight, expected[1].weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPConfig(dropout=1.0), r"dropout 1.0"),
        (lambda: MLPConfig(activation="Relu"), r"activation 'Relu': must be one of .* Did you mean 'ReLU'"),
        (lambda: MLPConfig(activation="Softmax"), "activation 'Softmax': must be one of"),
        (lambda: MLPConfig([3, 0]), "width 0: must be at least 1"),
        (lambda: MLPConfig(norm="batch"), "norm 'batch': must be 'layer', 'rms' or null"),
        (lambda: build_vrnn(3, phi_x=lambda width: nn.LSTM(width, 4)), "phi_x: returned tuple, expected"),
        (lambda: build_vrnn(3, encoder=lambda width: nn.Flatten(0)), r"encoder: returned shape \(.*\), expected"),
    ],
)
def test_bad_networks_are_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_from_the_command_line(lightning, tiny):
    options = ("--model.encoder.activation", "Tanh", "--model.encoder.norm", "layer", "--model.phi_z.width", "[5,4]")
    run = lightning("fit", "-c", tiny, *options)
    assert run.code == 0, run.err
    own = lightning("fit", "-c", tiny, "--model.phi_x", "test_networks.Gated", "--model.phi_x.width", "7")
    assert own.code == 0, own.err
    assert "--model.phi_x.width" in lightning("fit", "--model.phi_x.help", "test_networks.Gated").out


def test_a_class_of_ones_own_is_the_one_that_is_trained(lightning, tiny):
    """On the command line, in a YAML and after a resume; not a perceptron of the same width."""
    spec = "{class_path: test_networks.Gated, init_args: {width: 7}}"
    assert lightning("fit", "-c", tiny, "--model.encoder", spec, "--model.phi_z", "test_networks.Gated").code == 0
    (path,) = Path().rglob("last.ckpt")
    names = torch.load(path, weights_only=True)["state_dict"].keys()
    assert {"vrnn.encoder.body.linear.weight", "vrnn.phi_z.linear.weight", "vrnn.phi_x.0.weight"} <= names
    assert "--trust test_networks" in lightning("test", "--ckpt_path", path).err
    trusted = ("test", "--ckpt_path", path, "--trust", "test_networks")
    assert lightning(*trusted).code == 0
    assert "--model.encoder.width 6 (checkpoint: 7)" in lightning(*trusted, "--model.encoder.width", "6").err
    other = lightning(*trusted, "--model.phi_x", "test_networks.Gated").err
    assert "--model.phi_x test_networks.Gated (checkpoint: vrnn_lightning.MLPConfig)" in other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.encoder.activation", "Relu"), "Did you mean 'ReLU'?"),
        (("--model.phi_z.width", "0"), "width 0: must be at least 1"),
        (("--model.encoder.dropout", "1"), "network.dropout 1.0: must lie in [0, 1)"),
        (("--model.phi_x", "test_networks.Nope"), "--model.phi_x test_networks.Nope: no such class. Fix: "),
        (("--model.emission", "nowhere.Nope"), "--model.emission nowhere.Nope: no such class. Fix: "),
        (("--model.prior", "test_networks.Pair"), "prior: returned tuple, expected floating-point numbers"),
    ],
)
def test_bad_options_are_one_line(lightning, tiny, options, message):
    said = lightning("fit", "-c", tiny, *options)
    assert said.code in (1, 2)
    assert said.err.count("error: ") == 1
    assert message in said.err
