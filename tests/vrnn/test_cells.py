"""Cells of users and initial states, through every pass."""

from __future__ import annotations

from functools import partial

import passes
import pytest
import torch
from passes import CONFIGS, PURPOSES, make_data, make_model
from readable import readable_loop
from test_recurrence import gradients
from test_windows import STREAMS, losses
from torch import Tensor, nn

from vrnn_lightning import SequenceBatch, UserError, VRNNLightningModule, build_vrnn
from vrnn_lightning.filtering import Particles, Resampling, map_tensors
from vrnn_lightning.nn import LayerNormGRUCell
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import ELBO, FIVO, IWAE
from vrnn_lightning.recurrence import State


class Leaky(nn.Module):
    """Called like a GRU."""

    def __init__(self, input_size: int, hidden_size: int, rate: float = 0.5) -> None:
        super().__init__()
        self.linear, self.rate = nn.Linear(input_size + hidden_size, hidden_size), rate

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.lerp(h, self.linear(torch.cat([x, h], -1)).tanh(), self.rate)


class Peephole(nn.Module):
    """Called like an LSTM."""

    has_cell_state = True

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_size + 2 * hidden_size, 2 * hidden_size)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        gate, new = self.linear(torch.cat([x, *state], -1)).chunk(2, -1)
        c = torch.lerp(state[1], new.tanh(), gate.sigmoid())
        return c.tanh() * gate.sigmoid(), c


class Tree(nn.Module):
    """A cell whose state is a matrix of associations beside a slow average, in a dictionary."""

    def __init__(self, input_size: int, hidden_size: int, decay: float = 0.8) -> None:
        super().__init__()
        self.hidden_size, self.decay = hidden_size, decay
        self.keys, self.read = nn.Linear(input_size, 5), nn.Linear(input_size + 3, hidden_size)
        self.first = nn.Parameter(torch.linspace(-1, 1, 3))

    def initial_state(self, batch_size: int) -> dict[str, object]:
        first = self.first.expand(batch_size, 3)
        return {"slow": first, "matrix": (first.new_zeros(batch_size, 2, 3),)}

    def forward(self, x: Tensor, state: dict) -> tuple[Tensor, dict[str, object]]:
        slow, (matrix,) = state["slow"], state["matrix"]
        key, value = self.keys(x).tanh().split([2, 3], -1)
        matrix = self.decay * matrix + key[:, :, None] * value[:, None]
        slow = 0.5 * slow + torch.einsum("bk,bkv->bv", key, matrix)
        return self.read(torch.cat([x, slow], -1)).tanh(), {"slow": slow, "matrix": (matrix,)}


CELLS = {"leaky": Leaky, "peephole": Peephole, "tree": partial(Tree, decay=0.6), "layer_norm_lstm": "layer_norm_lstm"}
STARTS = ("learned", "inputs")
for name, cell in CELLS.items():
    CONFIGS[name] = {"cell": cell}
    CONFIGS[f"{name} with all"] = {"cell": cell, "num_inputs": 2, "dropout": 0.4, "initial_state": "inputs"}


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("purpose", list(PURPOSES)[:-1])
@pytest.mark.parametrize("config", [config for name in CELLS for config in (name, f"{name} with all")])
def test_every_pass_equals_the_readable_one(config, purpose):
    run, readable = PURPOSES[purpose]
    model, data = make_model(**CONFIGS[config]).eval(), make_data(config)
    if purpose == "filter":  # the readable one is given the state
        data = data._replace(zero=model.initial_state_of(data.batch, passes.SAMPLES).state)
    found = run(model, data)
    model, data = make_model(**CONFIGS[config]).eval(), make_data(config)
    if purpose == "filter":
        data = data._replace(zero=model.initial_state_of(data.batch, passes.SAMPLES).state)
    close(found, readable(model, data))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["tree", "layer_norm_lstm"])
def test_an_exported_program_has_the_state(config):
    run, readable = PURPOSES["program"]
    model, data = make_model(**CONFIGS[config]).eval(), make_data(config)
    close(run(model, data), readable(model, data))


def test_a_smoothing_model_reads_backwards_with_a_gru():
    model = build_vrnn(3, 2, 5, cell=Tree, smoothing=True)
    assert isinstance(model.backward_rnn, nn.GRU)
    assert model(SequenceBatch(torch.randn(2, 4, 3), torch.tensor([4, 2]))).log_px.isfinite().all()


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda self, x, state: (x[:, :5], state["slow"]), r"returned \(\(2, 5\), \(2, 3\)\), expected \(\(2, 5\), {"),
        (lambda self, x, state: (x[:, :4], state), r"returned \(\(2, 4\), .*, expected \(\(2, 5\), "),
        (lambda self, x, state: (x[:, :5], {**state, "slow": x[:, :4]}), r"returned \(\(2, 5\), {'slow': \(2, 4\)"),
        (lambda self, x, state: x[:, :5], r"returned \(2, 5\), expected \(\(2, 5\), {"),
        (lambda self, x, state: (x[:, :5], {**state, "slow": 0.0}), r"returned .*float"),
    ],
    ids=["structure", "output", "shape", "no state", "number"],
)
def test_a_wrong_state_is_one_line(forward, words):
    made = type("Wrong", (Tree,), {"forward": forward})
    with pytest.raises(UserError, match=f"cells.0: Wrong {words}") as caught:
        build_vrnn(3, 2, 5, cell=made).generate(3, 2)
    assert "\n" not in str(caught.value)


def test_a_wrong_initial_state_is_one_line():
    made = type("Wrong", (Tree,), {"initial_state": lambda self, batch_size: torch.zeros(3)})
    with pytest.raises(UserError, match=r"cells.0: Wrong.initial_state\(2\) returned shape \(3,\), expected"):
        build_vrnn(3, 2, 5, cell=made).generate(3, 2)


@pytest.mark.parametrize("cell", ["gru", "layer_norm_lstm", Tree])
@pytest.mark.parametrize("start", STARTS)
def test_a_learned_start_has_its_gradient(start, cell):
    """In the loop, without a state given, as in the readable loop from the model's state."""
    config = {"cell": cell, "initial_state": start, "num_inputs": 2}
    model = make_model(**config)
    data = make_data("options")
    with torch.no_grad():
        for value in model.initial.parameters():
            value.add_(torch.rand_like(value))
    noise = data.noise.over_time(3)
    trace = model(data.batch, noise)
    slow = readable_loop(model, data.batch, noise, model.initial_state_of(data.batch).state)
    found, expected = ([t.log_px, t.kl, *t.state.tensors().values()] for t in (trace, slow))
    close(found, expected)
    grads = torch.autograd.grad(trace.log_px.sum(), list(model.initial.parameters()), retain_graph=True)
    assert all((grad != 0).any() for grad in grads)
    close(gradients(model, *found), gradients(model, *expected))


@pytest.mark.parametrize("objective", [ELBO(), IWAE(2), FIVO(2)], ids=["ELBO", "IWAE", "FIVO"])
@pytest.mark.parametrize("start", ["zero", *STARTS])
def test_a_reset_row_starts_from_the_initial_state(start, objective):
    """A window whose rows all begin anew has the value and the gradient of a first window."""
    model, batch = make_model(initial_state=start, num_inputs=2), make_data("options").batch
    if start != "zero":
        for value in model.initial.parameters():
            value.data.add_(0.3)
    first = objective(model, batch, Noise(batch, [5, 6]), 0.7, lambda x: x)
    reset = torch.tensor([True, False])
    carried = first.carried.reset_rows(reset, model.initial_state_of(batch).state)
    fresh, kept = model.initial_state_of(batch).state, first.carried.trajectories.state
    torch.testing.assert_close(carried.trajectories.state.h[0], fresh.h[0])
    torch.testing.assert_close(carried.trajectories.state.h[1], kept.h[1])
    again = first.carried.reset_rows(torch.ones(2, dtype=torch.bool), model.initial_state_of(batch).state)
    second = objective(model, batch, Noise(batch, [5, 6]), 0.7, lambda x: x, again)
    torch.testing.assert_close(second.value, first.value)
    close(gradients(model, second.value[None]), gradients(model, first.value[None]))


@pytest.mark.parametrize("start", ["zero", *STARTS])
def test_every_pass_begins_in_the_initial_state(start):
    """Filter, stream, session, generation, decoding and imputation, with and without the state given."""
    module = VRNNLightningModule(
        3, latent_size=2, hidden_size=5, cell=Tree, initial_state=start, num_inputs=2 if start == "inputs" else 0
    ).double()
    model, batch = module.vrnn.eval(), make_data("options").batch
    if start != "zero":
        for value in model.initial.parameters():
            value.data.add_(0.3)
    if start != "inputs":
        batch = SequenceBatch(batch.x, batch.lengths)
    inputs = batch.inputs
    now = None if inputs is None else inputs[:, 0]
    state, many = model.initial_state_of(batch).state, model.initial_state_of(batch, 3).state
    assert (many.h[2:4] == state.h).all()
    torch.manual_seed(0)
    x = model.generate(4, 2, inputs=inputs).x
    torch.manual_seed(0)
    torch.testing.assert_close(model.generate(4, state=state, inputs=inputs).x, x)
    (one, other) = (model.stream(2, 3, given, inputs=now) for given in (None, many))
    torch.testing.assert_close(one.state.h, other.state.h)
    session = module.session(2, 3, inputs=now)
    torch.testing.assert_close(session.state.c, many.c)
    even = torch.full((3, 2), 1 / 3).log().double()
    scores = [
        model.filter(batch, 3, Resampling(), Noise(batch, [1, 2]), particles=given).log_likelihood
        for given in (None, Particles(many, even))
    ]
    torch.testing.assert_close(*scores)
    assert module.decode(torch.zeros(2, 4, 2).double(), inputs).shape == (2, 4, 3)
    gaps = batch.x.clone()
    gaps[0, 1] = float("nan")
    assert len(module.impute(list(gaps), samples=2, inputs=None if inputs is None else list(inputs), seed=1)) == 2
    many = module.score(list(batch.x), samples=4, inputs=None if inputs is None else list(inputs), seed=1)
    assert all(part.isfinite().all() for part in many)
    if start == "inputs":
        with pytest.raises(UserError, match="inputs: the initial state reads those of the first step"):
            module.session(2, 3)


def test_options_that_do_not_fit_are_refused():
    for options, words in (
        ({"initial_state": "posterior"}, "initial_state 'posterior'"),
        ({"initial_state": "inputs"}, "num_inputs"),
        ({"cell": partial(LayerNormGRUCell, eps=0.0)}, "eps 0.0"),
    ):
        with pytest.raises(UserError, match=words):
            build_vrnn(3, **options)


@pytest.mark.parametrize("relu", ["tanh", "relu"])
def test_plain_networks_of_torch_are_compiled(relu):
    model = make_model(cell=partial(nn.RNNCell, nonlinearity=relu)).eval()
    data = make_data("gru")
    close(passes.infer(model, data), passes.readable_infer(model, data))
    assert model.parts.cells


def test_checkpoints_hold_cells(tmp_path):
    """Built-in ones by their names, others by class path."""
    for cell in ("tanh", partial(LayerNormGRUCell, eps=1e-4), Tree):
        module = VRNNLightningModule(3, latent_size=2, hidden_size=5, cell=cell, initial_state="learned")
        trust = ["test_cells"] if cell is Tree else []
        module.save_pretrained(tmp_path / "there")
        again = VRNNLightningModule.from_pretrained(tmp_path / "there", trust=trust)
        assert type(again.vrnn.cells[0]) is type(module.vrnn.cells[0])
        state = map_tensors(lambda x: x + 1, module.vrnn.initial_state(2))
        torch.manual_seed(0)
        x = module.vrnn.generate(3, state=state).x
        torch.manual_seed(0)
        torch.testing.assert_close(again.vrnn.generate(3, state=state).x, x)
    assert isinstance(state, State)


def test_streams_with_a_cell_of_ones_own_resume(lightning, folder):
    """In mid-epoch: its state and a learned start are in the checkpoint."""
    words = [*STREAMS, "--model.cell", "test_cells.Tree", "--model.cell.decay", "0.7", "--trainer.max_epochs", "2"]
    words += ["--model.initial_state", "learned"]
    whole, broken = folder / "whole", folder / "broken"
    done = lightning("fit", *words, "--trainer.default_root_dir", whole)
    assert done.code == 0, done.err
    stopped = [*words, "--trainer.default_root_dir", broken]
    done = lightning("fit", *stopped, "--trainer.max_steps", 5)
    assert done.code == 0, done.err
    last = next(broken.rglob("last.ckpt"))
    assert len(torch.load(last, weights_only=True)["carried"][0]) == 4
    done = lightning("fit", *stopped, "--trainer.max_steps", -1, "--ckpt_path", last)
    assert done.code == 0, done.err
    assert losses(broken) == losses(whole)


def test_the_command_line_lists_cells(lightning):
    assert "--model.cell.decay" in lightning("fit", "--model.cell.help", "test_cells.Tree").out
    assert "--model.cell.eps" in lightning("fit", "--model.cell.help", "vrnn_lightning.nn.LayerNormGRUCell").out
    err = lightning("fit", "--data", "Sines", "--model.cell", "layernorm_gru").err
    assert "choose gru, lstm, layer_norm_gru" in err
    assert "Did you mean 'layer_norm_gru'?" in err
