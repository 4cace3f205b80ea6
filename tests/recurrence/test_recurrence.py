"""The fast loop equals the readable loop, and padding changes nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from readable import readable_loop

from vrnn_lightning import VRNN, MLPConfig, SequenceBatch, UserError, build_vrnn
from vrnn_lightning.heads import Bernoulli, Gaussian, GaussianMixture
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import State

CELLS = ("gru", "lstm", "layer_norm_gru", "layer_norm_lstm", "tanh")
NETWORKS = ("phi_x", "phi_z", "prior", "encoder", "decoder")
SIZES = [
    ([6, 4, 1], "ragged"),
    ([1], "one step, one sequence"),
    ([5], "one sequence"),
    ([1, 1, 1], "one step"),
    ([4, 0, 4], "empty"),
]


def make_model(
    cell: str = "gru", latent: int = 4, depth: int = 2, emission=Gaussian, features: int = 3, **options
) -> VRNN:
    torch.manual_seed(1)
    networks = {name: MLPConfig(width, depth) for name, width in zip(NETWORKS, (5, 6, 7, 8, 9), strict=True)}
    model = build_vrnn(features, latent, 10, cell=cell, emission=emission, **{**networks, **options}).double()
    model.init_from_statistics(torch.rand(features).double() * 0.5 + 0.2, torch.rand(features).double() + 0.5)
    randomize_norms(model)
    return model


@torch.no_grad()
def randomize_norms(model: VRNN) -> None:
    """Give gains and biases of layer norms values of their own, as training would."""
    for name, value in model.cells.named_parameters():
        if "gain" in name or (hasattr(model.cells[0], "gain_hh") and "bias" in name):
            value.copy_(torch.rand_like(value) + 0.5)


def make_batch(lengths: list[int], features: int = 3, binary: bool = False) -> SequenceBatch:
    torch.manual_seed(2)
    x = torch.randn(len(lengths), max(lengths), features, dtype=torch.float64)
    return SequenceBatch((x > 0).double() if binary else x, torch.tensor(lengths))


def draw_noise(model: VRNN, batch: SequenceBatch, samples: int = 1) -> torch.Tensor:
    return Noise(batch, list(range(len(batch)))).over_time(model.latent_size, samples)


def random_state(model: VRNN, size: int) -> State:
    torch.manual_seed(3)
    zero = model.initial_state(size)
    return State(torch.randn_like(zero.h), None if zero.c is None else torch.randn_like(zero.c))


def gradients(model: VRNN, *outputs: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(4)
    loss = sum((out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in outputs)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def assert_equal_terms(model: VRNN, batch: SequenceBatch) -> None:
    """Values, final states and every parameter's gradient agree to 1e-9 in float64."""
    noise, state = draw_noise(model, batch), random_state(model, len(batch))
    masks = model.draw_masks(Noise(batch, [7] * len(batch)))
    fast = model(batch, noise, state, masks)
    slow = readable_loop(model, batch, noise, state, masks)
    names = ("log_px", "kl", "log_ratio")
    pairs = [(getattr(fast, name), getattr(slow, name)) for name in names]
    pairs += [(a, b) for a, b in zip(fast.state, slow.state, strict=True) if a is not None]
    real = batch.mask[..., None]
    pairs.append((fast.z * real, slow.z * real))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(model, *[p[0] for p in pairs]), gradients(model, *[p[1] for p in pairs]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lengths", [s for s, _ in SIZES], ids=[n for _, n in SIZES])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("latent", [4, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_fast_path_equals_readable(cell, latent, depth, lengths):
    assert_equal_terms(make_model(cell, latent, depth), make_batch(lengths))


OPTIONS = {
    "standard prior": {"prior": None},
    "two layers": {"layers": 2},
    "residual posterior": {"residual_posterior": True},
    "smoothing": {"smoothing": True},
    "dropout": {"dropout": 0.4},
    "covariates": {"num_inputs": 2},
    "missing": {"missing": True},
    "all": {
        "layers": 3, "residual_posterior": True, "smoothing": True, "dropout": 0.4, "num_inputs": 2, "missing": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("lengths", [[6, 4, 1], [1], [4, 0, 4]], ids=["ragged", "one step", "empty"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_every_option_equals_readable(cell, options, lengths):
    model, batch = make_model(cell, **options), make_batch(lengths)
    add_extras(model, batch)
    assert_equal_terms(model, batch)


def add_extras(model: VRNN, batch: SequenceBatch) -> None:
    """Give a batch the covariates and the missing values that a model was made for."""
    torch.manual_seed(5)
    if model.num_inputs:
        batch.inputs = torch.randn(*batch.x.shape[:2], model.num_inputs, dtype=torch.float64)
    if model.missing:
        batch.observed = torch.rand_like(batch.x) > 0.3
        batch.x = batch.x * batch.observed


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_samples_are_folded_into_the_batch(options):
    """Row k * batch + i is trajectory k of sequence i, as if each were run alone."""
    model, batch = make_model(**options), make_batch([5, 3])
    add_extras(model, batch)
    model.eval()
    noise = draw_noise(model, batch, samples=3)
    together = model(batch, noise, samples=3)
    for k in range(3):
        alone = model(batch, noise[2 * k : 2 * k + 2])
        for name in ("log_px", "kl", "log_ratio", "z"):
            torch.testing.assert_close(getattr(together, name)[2 * k : 2 * k + 2], getattr(alone, name))


@pytest.mark.parametrize("options", [OPTIONS["smoothing"], OPTIONS["all"]], ids=["smoothing", "all"])
def test_padding_changes_nothing_of_the_options(options):
    model, batch = make_model(**options), make_batch([4, 2])
    add_extras(model, batch)
    longer = SequenceBatch(torch.full((2, 7, 3), float("nan"), dtype=torch.float64), batch.lengths)
    longer.x[:, :4] = batch.x
    if batch.inputs is not None:
        longer.inputs = torch.full((2, 7, 2), float("nan"), dtype=torch.float64)
        longer.inputs[:, :4] = batch.inputs
        longer.observed = torch.ones(2, 7, 3, dtype=torch.bool)
        longer.observed[:, :4] = batch.observed
    masks = model.draw_masks(Noise(batch, [0, 1]))
    a = model(batch, draw_noise(model, batch), masks=masks)
    b = model(longer, draw_noise(model, longer), masks=masks)
    torch.testing.assert_close(b.log_px[:, :4], a.log_px, rtol=0, atol=1e-12)
    torch.testing.assert_close(b.log_ratio[:, :4], a.log_ratio, rtol=0, atol=1e-12)
    torch.testing.assert_close(b.state.h, a.state.h, rtol=0, atol=1e-12)
    found = [gradients(model, (t.log_px.sum() + t.log_ratio.sum())[None]) for t in (a, b)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_smoothing_sees_what_is_to_come_and_only_the_posterior_does():
    model, batch = make_model(smoothing=True), make_batch([6])
    noise = torch.zeros(1, 6, 4, dtype=torch.float64)
    later = batch.x.clone()
    later[:, 5] += 1
    a, b = model(batch, noise), model(SequenceBatch(later, batch.lengths), noise)
    assert (a.posterior.mean[:, 0] != b.posterior.mean[:, 0]).all()
    torch.testing.assert_close(a.prior.mean[:, 0], b.prior.mean[:, 0], rtol=0, atol=0)


def test_every_network_reads_the_covariates():
    model, batch = make_model(num_inputs=2), make_batch([3])
    add_extras(model, batch)
    noise = draw_noise(model, batch)
    batch.inputs.requires_grad_()
    trace = model(batch, noise)
    for read in (trace.prior.mean, trace.posterior.mean, trace.emission.mean, trace.state.h):
        (seen,) = torch.autograd.grad(read.sum(), batch.inputs, retain_graph=True)
        assert (seen[:, 0] != 0).any()
    with pytest.raises(UserError, match="0 covariates"):
        model(make_batch([3]), noise)
    with pytest.raises(UserError, match="covariates of shape"):
        model.generate(3, 2)
    assert model.generate(3, 2, inputs=torch.zeros(2, 3, 2, dtype=torch.float64)).x.shape == (2, 3, 3)


def test_phi_x_is_told_what_is_missing():
    """A measured value at the mean and a missing one read differently."""
    model, batch = make_model(missing=True), make_batch([2])
    batch.x[:] = model.input_mean
    observed = torch.ones_like(batch.x, dtype=torch.bool)
    observed[0, 0, 1] = False
    noise = draw_noise(model, batch)
    a = model(batch, noise)
    b = model(SequenceBatch(batch.x, batch.lengths, observed), noise)
    assert (a.posterior.mean[0, 0] != b.posterior.mean[0, 0]).all()


def test_dropout_is_one_mask_per_sequence_in_training_alone():
    model, batch = make_model(dropout=0.5, layers=2), make_batch([6, 6])
    masks = model.draw_masks(Noise(batch, [0, 1]))
    assert masks.h.shape == (2, 2, 10)
    assert set(torch.cat([m.flatten() for m in masks]).tolist()) == {0.0, 2.0}
    assert not torch.equal(masks.phi_x[0], masks.phi_x[1])
    noise = draw_noise(model, batch)
    torch.testing.assert_close(model(batch, noise, masks=masks).log_px, model(batch, noise, masks=masks).log_px)
    assert not torch.equal(model(batch, noise).log_px, model(batch, noise).log_px)
    model.eval()
    assert model.draw_masks(Noise(batch)) is None
    torch.testing.assert_close(model(batch, noise).log_px, model(batch, noise).log_px, rtol=0, atol=0)


def test_fast_path_equals_readable_in_float32_and_for_bernoulli():
    model, batch = make_model(emission=Bernoulli).float(), make_batch([6, 2], binary=True)
    batch.x = batch.x.float()
    noise, state = draw_noise(model, batch), model.initial_state(2)
    fast, slow = model(batch, noise), readable_loop(model, batch, noise, state)
    torch.testing.assert_close(fast.log_px, slow.log_px, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast.kl, slow.kl, rtol=1e-4, atol=1e-5)


def test_fast_path_equals_readable_for_a_mixture():
    model, batch = make_model(emission=partial(GaussianMixture, components=3)), make_batch([6, 2])
    noise = draw_noise(model, batch)
    fast, slow = model(batch, noise), readable_loop(model, batch, noise, model.initial_state(2))
    torch.testing.assert_close(fast.log_px, slow.log_px, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(model, fast.log_px), gradients(model, slow.log_px), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_narrows_products_and_nothing_else(cell, options):
    """Near the wide figures, with gradients in their direction; densities, states and draws stay in float32."""
    model, batch = make_model(cell, **options).float(), make_batch([6, 4, 1])
    add_extras(model, batch)
    batch.x = batch.x.float()
    batch.inputs = None if batch.inputs is None else batch.inputs.float()
    noise, masks = draw_noise(model, batch), model.draw_masks(Noise(batch, [7] * 3))
    wide = model(batch, noise, masks=masks)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(batch, noise, masks=masks)
    found = []
    for trace in (wide, mixed):
        assert {trace.log_px.dtype, trace.kl.dtype, trace.z.dtype, trace.state.h.dtype} == {torch.float32}
        found.append(torch.cat([g.flatten() for g in gradients(model, trace.log_px, trace.kl)]))
    torch.testing.assert_close(mixed.log_px, wide.log_px, rtol=0.1, atol=0.2)
    torch.testing.assert_close(mixed.kl, wide.kl, rtol=0.1, atol=0.1)
    assert torch.cosine_similarity(*found, dim=0) > 0.99


def test_a_second_derivative_is_refused():
    model, batch = make_model(), make_batch([3])
    loss = model(batch, draw_noise(model, batch)).log_px.sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, list(model.phi_z.parameters()), create_graph=True)


def test_what_was_changed_in_place_has_no_gradient():
    """Weights between the way there and the way back, and latents that the loop returned."""
    model, batch = make_model(), make_batch([3])
    noise = draw_noise(model, batch)
    loss = model(batch, noise).log_px.sum()
    with torch.no_grad():
        model.phi_z[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    trace = model(batch, noise)
    with torch.no_grad():
        trace.z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trace.log_px.sum().backward()


def test_frozen_networks_get_no_gradient_and_the_others_theirs():
    model, batch = make_model(), make_batch([5, 2])
    noise = draw_noise(model, batch)
    whole = {
        name: g
        for (name, _), g in zip(model.named_parameters(), gradients(model, model(batch, noise).log_px), strict=True)
    }
    for frozen in (model.phi_x, model.encoder, model.cells):
        frozen.requires_grad_(False)
    torch.manual_seed(4)
    log_px = model(batch, noise).log_px
    (log_px * torch.randn(log_px.shape, dtype=log_px.dtype)).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad and not name.startswith("prior"):
            torch.testing.assert_close(p.grad, whole[name], rtol=1e-12, atol=1e-12)
        else:
            assert p.grad is None or (p.grad == 0).all()


@pytest.mark.parametrize("rubbish", [1e6, float("nan"), float("inf")])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_changes_nothing(cell, rubbish):
    """Longer padding, whatever it holds, changes no term, no state and no gradient."""
    model, batch = make_model(cell), make_batch([4, 2])
    noise = draw_noise(model, batch)
    padded = SequenceBatch(torch.full((2, 7, 3), rubbish, dtype=torch.float64), batch.lengths)
    longer = torch.randn(2, 7, 4, dtype=torch.float64)
    for row, length in enumerate(batch.lengths):
        padded.x[row, :length] = batch.x[row, :length]
        longer[row, :length] = noise[row, :length]
    short, long = model(batch, noise), model(padded, longer)
    torch.testing.assert_close(long.log_px[:, :4], short.log_px, rtol=0, atol=1e-12)
    torch.testing.assert_close(long.kl[:, :4], short.kl, rtol=0, atol=1e-12)
    assert (long.log_px[:, 4:] == 0).all()
    assert (long.kl[:, 4:] == 0).all()
    torch.testing.assert_close(long.state.h, short.state.h, rtol=0, atol=1e-12)
    bound = [(t.log_px.sum() - t.kl.sum())[None] for t in (short, long)]
    for a, b in zip(gradients(model, bound[0]), gradients(model, bound[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_order_of_the_batch_changes_nothing():
    model, batch = make_model(), make_batch([6, 3, 5])
    noise, order = draw_noise(model, batch), torch.tensor([2, 0, 1])
    there = model(batch, noise)
    back = model(SequenceBatch(batch.x[order], batch.lengths[order]), noise[order])
    torch.testing.assert_close(back.log_px, there.log_px[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(back.state.h, there.state.h[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_carried_state_joins_the_halves_of_a_sequence(cell, layers):
    """The state after the first half is the state before the second."""
    model, batch = make_model(cell, layers=layers), make_batch([8, 8])
    noise = draw_noise(model, batch)
    whole = model(batch, noise)
    half = torch.full((2,), 4)
    first = model(SequenceBatch(batch.x[:, :4], half), noise[:, :4])
    second = model(SequenceBatch(batch.x[:, 4:], half), noise[:, 4:], first.state)
    torch.testing.assert_close(torch.cat([first.log_px, second.log_px], 1), whole.log_px, rtol=0, atol=1e-12)
    torch.testing.assert_close(second.state.h, whole.state.h, rtol=0, atol=1e-12)


def test_missing_values_count_nothing():
    """What stands at unobserved values reaches neither the likelihood nor the network; the rest still counts."""
    model, batch = make_model(), make_batch([4, 3])
    observed = torch.ones_like(batch.x, dtype=torch.bool)
    observed[0, 2, 1] = False
    noise = draw_noise(model, batch)
    other = batch.x.clone()
    other[0, 2, 1] = float("nan")
    a = model(SequenceBatch(batch.x, batch.lengths, observed), noise)
    b = model(SequenceBatch(other, batch.lengths, observed), noise)
    torch.testing.assert_close(a.log_px, b.log_px, rtol=0, atol=0)
    marginal = a.emission.base_dist.log_prob(batch.x)[0, 2, [0, 2]].sum()
    torch.testing.assert_close(a.log_px[0, 2], marginal, rtol=0, atol=1e-12)
    full = model(SequenceBatch(batch.x, batch.lengths, torch.ones_like(observed)), noise)
    torch.testing.assert_close(full.log_px, model(batch, noise).log_px, rtol=0, atol=1e-12)


def test_an_early_frame_does_not_see_later_ones():
    model, batch = make_model(), make_batch([6])
    noise = draw_noise(model, batch)
    later = batch.x.clone()
    later[:, 3:] += 1
    a, b = model(batch, noise), model(SequenceBatch(later, batch.lengths), noise)
    torch.testing.assert_close(a.log_px[:, :3], b.log_px[:, :3], rtol=0, atol=0)
    assert (a.log_px[:, 3:] != b.log_px[:, 3:]).all()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("latent", [4, 0])
def test_generation_uses_the_equations_of_training(cell, latent):
    """Fed with the frames and latents that were drawn, the equations give the means they were drawn from."""
    model = make_model(cell, latent)
    torch.manual_seed(5)
    drawn = model.generate(6, 3)
    state, x, z = model.initial_state(3), drawn.x, drawn.z
    h, c = state.h[:, 0], None if state.c is None else state.c[:, 0]
    means = []
    for t in range(6):
        features = [model.phi_z(z[:, t]), h] if latent else [h]
        means.append(model.decoder(torch.cat(features, -1)).mean)
        inputs = torch.cat(
            [model.phi_x(model.standardize_input(x[:, t], torch.ones_like(x[:, t]).bool())), *features[:-1]], -1
        )
        if c is None:
            h = model.cells[0](inputs, h)
        else:
            h, c = model.cells[0](inputs, (h, c))
    torch.testing.assert_close(torch.stack(means, 1), drawn.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(h, drawn.state.h[:, 0], rtol=0, atol=1e-12)


def test_generated_latents_come_from_the_prior():
    """At the first step the prior is known: the draws' moments agree with it within 5 standard errors."""
    model = make_model()
    torch.manual_seed(6)
    drawn = model.generate(1, 20000)
    prior = model.prior(torch.zeros(1, model.hidden_size, dtype=torch.float64))
    z = (drawn.z[:, 0] - prior.mean) / prior.stddev
    assert (z.mean(0).abs() < 5 / 20000**0.5).all()
    assert ((z.var(0) - 1).abs() < 5 * (2 / 20000) ** 0.5).all()


def test_generation_goes_on_from_a_state():
    model = make_model()
    torch.manual_seed(7)
    first = model.generate(3, 2)
    second = model.generate(3, state=first.state)
    torch.manual_seed(7)
    whole = model.generate(6, 2)
    torch.testing.assert_close(torch.cat([first.x, second.x], 1), whole.x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"latent_size": -1}, "latent_size -1"),
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"num_features": 0}, "num_features 0"),
        ({"cell": "rnn"}, "cell 'rnn'"),
        ({"emission": partial(Gaussian, min_std=0.0)}, "min_std"),
        ({"layers": 0}, "layers 0"),
        ({"num_inputs": -1}, "num_inputs -1"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_absurd_sizes_are_refused(options, word):
    with pytest.raises(UserError, match=word):
        build_vrnn(**{"num_features": 3, **options})


def test_layers_need_a_width_and_a_depth():
    with pytest.raises(UserError, match="width 0"):
        MLPConfig(0)
    with pytest.raises(UserError, match="depth -1"):
        MLPConfig(4, -1)
    with pytest.raises(UserError, match="steps 0"):
        make_model().generate(0)


NARROW = [
    {"latent": 0, "dropout": 0.2},
    {"latent": 0, "dropout": 0.2, "cell": "lstm"},
    {"dropout": 0.3, "layers": 2, "cell": "lstm", "residual_posterior": True},
    {"prior": None, "dropout": 0.2, "layers": 2},
    {"smoothing": True},
    {},
]


@pytest.mark.parametrize("options", NARROW, ids=lambda options: "-".join(options) or "plain")
def test_gradients_of_a_narrow_pass_are_those_of_a_wide_one(options):
    """To what bfloat16 can tell; what lay in memory before does not matter."""
    model, batch = make_model(**options).float(), make_batch([30, 12, 30])
    batch.x = batch.x.float()
    noise, masks = draw_noise(model, batch), model.draw_masks(Noise(batch, [1, 2, 3]))
    for value in (float("nan"), 1e6):
        rubbish = [torch.full((n,), value) for n in (200, 5000, 40000) for _ in range(8)]
        del rubbish
        found = []
        for narrow in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                trace = model(batch, noise, masks=masks)
                loss = trace.log_px.sum() - trace.kl.sum()
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            found.append(torch.cat([g.flatten() for g in grads if g is not None]))
        assert torch.cosine_similarity(*found, dim=0) > 0.999


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_whoever_compiles_the_model_trains_the_same():
    model, batch = make_model(), make_batch([6, 4, 1])
    noise = draw_noise(model, batch)
    found = []
    for pass_over in (model, torch.compile(model, backend="aot_eager")):
        trace = pass_over(batch, noise)
        found.append((trace.log_px, trace.kl, gradients(model, trace.log_px, trace.kl)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_pruned_weights_are_those_that_count():
    from torch.nn.utils import prune

    model, batch = make_model(), make_batch([4, 3])
    for module in (model.encoder.head.linear, model.phi_x[0]):
        prune.random_unstructured(module, "weight", 0.5)
    noise = draw_noise(model, batch)
    for _ in range(2):
        fast, slow = model(batch, noise), readable_loop(model, batch, noise, model.initial_state(2))
        torch.testing.assert_close(fast.log_px, slow.log_px)
        (fast.log_px.sum() - fast.kl.sum()).backward()
        with torch.no_grad():
            model.encoder.head.linear.weight_orig.add_(0.1)


def test_a_way_back_that_was_interrupted_can_be_gone_again():
    model, batch = make_model(), make_batch([6, 4])
    trace = model(batch, draw_noise(model, batch))
    loss = trace.log_px.sum() - trace.kl.sum()
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)

    class Stop(Exception):  # noqa: N818
        pass

    (loop,) = {node for node in nodes(loss.grad_fn) if type(node).__name__ == "_LoopFunctionBackward"}
    operation, calls = loop.loop.tape.operations[-1], []
    backward = type(operation).backward

    def once(self, t):
        calls.append(t)
        if len(calls) == 3:
            raise Stop
        backward(self, t)

    type(operation).backward = once
    try:
        with pytest.raises(Stop):
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    finally:
        type(operation).backward = backward
    again = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(expected, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def nodes(root):
    found, left = set(), [root]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [child for child, _ in node.next_functions]
    return found


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda m: State(torch.zeros(2, 2, 10).double()), "state: h has shape (2, 2, 10) in torch.float64, expected"),
        (lambda m: State(torch.zeros(2, 1, 10)), "in torch.float32, expected (2, 1, 10) in torch.float64"),
        (lambda m: State(torch.zeros(2, 1, 10).double(), torch.zeros(2, 1, 10).double()), "c is of an LSTM"),
        (lambda m: m.initial_state(0), "has no rows"),
    ],
)
def test_a_state_of_another_model_is_refused(state, message):
    model = make_model()
    with pytest.raises(UserError) as said:
        model.generate(3, state=state(model))
    assert message in str(said.value)
    with pytest.raises(UserError, match="c is missing"):
        make_model("lstm").generate(3, state=State(torch.zeros(2, 1, 10).double()))


def test_a_batch_of_no_sequences_is_refused():
    with pytest.raises(UserError, match="no sequences"):
        make_model()(SequenceBatch(torch.zeros(0, 3, 3).double(), torch.zeros(0, dtype=torch.int64)))
