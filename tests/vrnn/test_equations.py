"""The model's four methods equal its equations, written out on plain tensors without any of its code."""

from __future__ import annotations

import pytest
import torch
from test_recurrence import OPTIONS, make_batch, make_model
from torch import Tensor

from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import State

Weights = dict[str, Tensor]


def perceptron(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Apply the linear maps of a network, each with a ReLU after it."""
    layer = 0
    while f"{name}.{layer}.weight" in weights:
        x = (x @ weights[f"{name}.{layer}.weight"].T + weights[f"{name}.{layer}.bias"]).clamp(min=0)
        layer += 2
    return x


def gaussian(weights: Weights, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a network with a Gaussian head."""
    raw = perceptron(weights, f"{name}.body", x) @ weights[f"{name}.head.linear.weight"].T
    mean, spread = (raw + weights[f"{name}.head.linear.bias"]).chunk(2, -1)
    return mean, (1 + spread.exp()).log() + 1e-4


def gru(weights: Weights, name: str, x: Tensor, h: Tensor) -> Tensor:
    """Cho et al. 2014, with torch's reset gate after the product."""
    of_x = (x @ weights[f"{name}.weight_ih"].T + weights[f"{name}.bias_ih"]).chunk(3, -1)
    of_h = (h @ weights[f"{name}.weight_hh"].T + weights[f"{name}.bias_hh"]).chunk(3, -1)
    reset, update = (1 / (1 + (-(of_x[i] + of_h[i])).exp()) for i in (0, 1))
    new = (of_x[2] + reset * of_h[2]).tanh()
    return (1 - update) * new + update * h


def lstm(weights: Weights, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Hochreiter & Schmidhuber 1997, with a forget gate."""
    sums = x @ weights[f"{name}.weight_ih"].T + weights[f"{name}.bias_ih"]
    sums = sums + h @ weights[f"{name}.weight_hh"].T + weights[f"{name}.bias_hh"]
    write, forget, new, output = sums.chunk(4, -1)
    write, forget, output = (1 / (1 + (-gate).exp()) for gate in (write, forget, output))
    c = forget * c + write * new.tanh()
    return output * c.tanh(), c


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Ba et al. 2016, eq. 3."""
    centred = x - x.mean(-1, keepdim=True)
    return gain * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + bias


def normalized(weights: Weights, name: str, x: Tensor, h: Tensor) -> list[Tensor]:
    """Return what the input and the state before add to the gates."""
    return [
        layer_norm(read @ weights[f"{name}.weight_{i}"].T, weights[f"{name}.gain_{i}"], weights[f"{name}.bias_{i}"])
        for i, read in (("ih", x), ("hh", h))
    ]


def layer_norm_gru(weights: Weights, name: str, x: Tensor, h: Tensor) -> Tensor:
    of_x, of_h = (part.chunk(3, -1) for part in normalized(weights, name, x, h))
    reset, update = (1 / (1 + (-(of_x[i] + of_h[i])).exp()) for i in (0, 1))
    return (1 - update) * (of_x[2] + reset * of_h[2]).tanh() + update * h


def layer_norm_lstm(weights: Weights, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    write, forget, new, output = sum(normalized(weights, name, x, h)).chunk(4, -1)
    write, forget, output = (1 / (1 + (-gate).exp()) for gate in (write, forget, output))
    c = forget * c + write * new.tanh()
    return output * layer_norm(c, weights[f"{name}.gain_c"], weights[f"{name}.bias_c"]).tanh(), c


def tanh(weights: Weights, name: str, x: Tensor, h: Tensor) -> Tensor:
    sums = x @ weights[f"{name}.weight_ih"].T + weights[f"{name}.bias_ih"]
    return (sums + h @ weights[f"{name}.weight_hh"].T + weights[f"{name}.bias_hh"]).tanh()


CELL_EQUATIONS = {
    "gru": gru, "lstm": lstm, "layer_norm_gru": layer_norm_gru, "layer_norm_lstm": layer_norm_lstm, "tanh": tanh,
}  # fmt: skip


@pytest.mark.parametrize("latent", [4, 0])
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
@pytest.mark.parametrize("cell", CELL_EQUATIONS)
def test_each_method_is_its_equation(cell, options, latent):
    model = make_model(cell, latent, **options)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    rows, hidden = 5, model.hidden_size
    masks = model.draw_masks(Noise(make_batch([1] * rows), list(range(rows))))
    torch.manual_seed(9)
    x, z, future = (torch.randn(rows, width).double() for width in (3, latent, hidden))
    observed = torch.rand(rows, 3) > 0.3
    inputs = torch.randn(rows, 2).double() if model.num_inputs else None
    layers = len(model.cells)
    state = State(torch.randn(rows, layers, hidden).double(), None)
    if "lstm" in cell:
        state = state._replace(c=torch.randn(rows, layers, hidden).double())
    h = state.h[:, -1] if masks is None else state.h[:, -1] * masks.h[:, -1]
    future = future if model.backward_rnn is not None else None
    u = [] if inputs is None else [inputs]

    seen = (x - model.input_mean) / model.input_std * observed
    seen = torch.cat([seen, observed.double()], 1) if model.missing else seen
    x_features, z_features = perceptron(weights, "phi_x", seen), perceptron(weights, "phi_z", z)
    if masks is not None:
        x_features, z_features = x_features * masks.phi_x, z_features * masks.phi_z
    close(model.extract_x(x, observed, masks), x_features)
    close(model.extract_z(z, masks), z_features)

    prior, own = None, model.prior_dist(h, inputs)
    if latent:
        prior = (torch.zeros(rows, latent).double(), torch.ones(rows, latent).double())
        if "prior.head.linear.weight" in weights:
            prior = gaussian(weights, "prior", torch.cat([h, *u], 1))
        close(own.mean, prior[0])
        close(own.stddev, prior[1])

        later = [] if future is None else [future]
        mean, std = gaussian(weights, "encoder", torch.cat([x_features, *u, *later, h], 1))
        mean = mean + prior[0] if model.residual_posterior else mean
        for known in (own, None):  # a residual posterior computes the prior that it is not given
            posterior = model.posterior_dist(x_features, h, known, inputs, future)
            close(posterior.mean, mean)
            close(posterior.stddev, std)

    mean, std = gaussian(weights, "decoder", torch.cat([z_features, h, *u], 1))
    emission = model.emission_dist(z_features, h, inputs)
    close(emission.mean, mean)
    close(emission.stddev, std)

    below, hs, cs = torch.cat([x_features, *u, z_features], 1), [], []
    for layer in range(layers):
        if state.c is None:
            new = CELL_EQUATIONS[cell](weights, f"cells.{layer}", below, state.h[:, layer])
        else:
            new, c = CELL_EQUATIONS[cell](weights, f"cells.{layer}", below, state.h[:, layer], state.c[:, layer])
            cs.append(c)
        hs.append(new)
        below = new if masks is None else new * masks.h[:, layer]
    output, after = model.next_state(x_features, z_features, state, inputs, masks)
    close(output, below)
    close(after.h, torch.stack(hs, 1))
    assert (after.c is None) == (state.c is None)
    if cs:
        close(after.c, torch.stack(cs, 1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_missing_values_read_as_the_mean():
    model = make_model()
    x = torch.randn(2, 3).double()
    seen = torch.tensor([[True, False, True], [False, False, False]])
    filled = torch.where(seen, x, model.input_mean)
    close(model.extract_x(x, seen), model.extract_x(filled))


def test_a_step_is_described_by_what_depends_on_what():
    """Training computes prior, emission and phi_x outside the loop; generation computes all but nothing inside."""
    model = make_model()
    described = {purpose: model.describe_step(purpose) for purpose in ("infer", "filter", "stream", "generate")}
    before, inside, after = sections(described["infer"])
    assert before == ["x_features"]
    assert inside == ["posterior", "z", "z_features", "state"]
    assert after == ["prior", "emission"]
    for purpose in ("filter", "stream"):
        assert sections(described[purpose]) == [
            ["x_features"],
            ["prior", "posterior", "z", "z_features", "emission", "state"],
            [],
        ]
    inside = ["prior", "z", "z_features", "emission", "x", "x_features", "state"]
    assert sections(described["generate"]) == [[], inside, []]
    residual = sections(make_model(residual_posterior=True).describe_step("infer"))
    assert residual[1:] == [["prior", "posterior", "z", "z_features", "state"], ["emission"]]
    no_latent = sections(make_model(latent=0).describe_step("infer"))
    assert no_latent == [["x_features"], ["state"], ["emission"]]
    assert "encoder(x_features, inputs, future, h)" in make_model(smoothing=True).describe_step("infer")


def sections(text: str) -> list[list[str]]:
    """Return the values computed before, inside and after the loop."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.endswith("the loop:"):
            found.append([])
        elif line.strip() != "nothing":
            found[-1].append(line.split()[0])
    return found
