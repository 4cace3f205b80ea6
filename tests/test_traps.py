"""Bugs seen in published VRNN code: each, written into a copy of ours, must make an oracle fail.

A trap names a function, a piece of its source and the bug to put there. Should the source change so that the piece is gone,
the test says so: the trap then needs a new place.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType

import pytest
import test_archives
import test_filtering
import test_heads
import test_module
import test_objectives
import test_oracles
import test_recurrence
import test_sines
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from vrnn_lightning import UserError, VRNNLightningModule
from vrnn_lightning.data import Scaler
from vrnn_lightning.recurrence import readable_loop


@dataclass
class Trap:
    """A bug and the oracle that must notice it."""

    target: str
    right: str
    wrong: str
    oracle: Callable[[], None]
    noticed_as: type[BaseException] = AssertionError


def equals_textbook(cell: str = "gru") -> None:
    test_recurrence.test_fast_path_equals_textbook(cell, 4, 2, [6, 4, 1])


def carries_state() -> None:
    test_recurrence.test_carried_state_joins_the_halves_of_a_sequence("gru", 1)


def generates_as_trained() -> None:
    test_recurrence.test_generation_uses_the_equations_of_training("gru", 4)


def ignores_padding() -> None:
    test_recurrence.test_padding_changes_nothing("gru", 1e6)


def noise_is_standard_normal() -> None:
    """Draws have the four moments of a standard normal."""
    model, batch = test_recurrence.make_model(), test_recurrence.make_batch([50] * 100)
    torch.manual_seed(0)
    noise = test_recurrence.draw_noise(model, batch).flatten()
    moments = torch.stack([noise, noise**2, noise**3, noise**4]).mean(1)
    torch.testing.assert_close(moments, torch.tensor([0.0, 1.0, 0.0, 3.0]).double(), rtol=0, atol=0.2)


def std_has_a_floor() -> None:
    test_heads.test_gaussian_has_finite_gradients_at_extreme_parameters()


def reports_totals(folder_of: pytest.TempPathFactory) -> None:
    test_module.test_reported_figures_are_totals_over_totals(folder_of.mktemp("run"), 2)


def beta_stays_out(folder_of: pytest.TempPathFactory) -> None:
    test_module.test_the_weight_enters_the_loss_and_no_reported_bound(folder_of.mktemp("run"))


def loss_is_per_sequence(folder_of: pytest.TempPathFactory) -> None:
    test_module.test_training_loss_is_per_sequence_and_gradient_is_its_own(folder_of.mktemp("run"))


def bits_count_the_scaler(folder_of: pytest.TempPathFactory) -> None:
    test_module.test_bits_per_dim_count_the_scaler()


def batch_of_one_keeps_its_shape() -> None:
    test_recurrence.test_fast_path_equals_textbook("lstm", 4, 2, [5])


def loader_scales_once() -> None:
    """A batch, unscaled, is the data."""
    data = test_sines.small(batch_size=3)
    data._scaler = Scaler(torch.tensor(0.3), torch.tensor(2.0))
    batch = next(iter(data.val_dataloader()))
    first = data.split("val")[0].x
    torch.testing.assert_close(data.scaler.unscale(batch.x)[0, : len(first)], first)


def grey_values_are_refused(folder_of: pytest.TempPathFactory) -> None:
    test_module.test_grey_values_are_no_bernoulli(folder_of.mktemp("run"))


def survives_extremes(case: str, size: float) -> Callable[[], None]:
    return lambda: test_heads.test_extreme_parameters_leave_values_and_gradients_finite(test_heads.CASES[case], size)


def logistics_sum_to_one() -> None:
    test_heads.test_discretised_logistics_sum_to_one(8, 0)


def estimates_are_unbiased() -> None:
    test_filtering.test_the_estimate_of_a_likelihood_is_unbiased(test_filtering.SCHEMES[3])


def likelihood_of_a_known_vrnn() -> None:
    test_oracles.test_importance_weights_estimate_the_models_own_likelihood()


def filters_as_the_textbook() -> None:
    test_objectives.test_the_fast_filter_equals_the_textbook({}, test_objectives.RULES[0])


FILTER = "filtering:particle_filter"
WEIGHTS = "filtering:Weights.advance"
FORWARD, CLEAN = (f"vrnn:VRNN.{name}" for name in ("forward", "_clean"))
SCORE = "vrnn:_score"
LOOP, SAMPLE, FREE = "recurrence.loop:unroll", "recurrence.tape:Sample", "recurrence.generation:free_run"
KL = "kl_divergence(posterior, prior)"
CLOSED = (
    "((prior.stddev / posterior.stddev).log() + (posterior.stddev**2 + (posterior.mean - prior.mean) ** 2)"
    " / (2 * prior.stddev**2))"
)

TRAPS = {
    "KL of prior from posterior": Trap(SCORE, KL, "kl_divergence(prior, posterior)", equals_textbook),
    "KL averaged over dimensions": Trap(SCORE, KL, f"{KL} / model.latent_size", equals_textbook),
    "KL half a nat too high": Trap(SCORE, KL, CLOSED, equals_textbook),
    "networks read h_t": Trap(LOOP, "hidden = hs[-1]\n", "hidden = hs[-1].later()\n", equals_textbook),
    "cell reads x_{t-1}": Trap(
        LOOP, "tape.weight(reads.cell)", "tape.weight(torch.cat([reads.cell[:1] * 0, reads.cell[:-1]]))", equals_textbook
    ),
    "posterior reads x_{t-1}": Trap(
        LOOP, "known = reads.encoder if", "known = torch.cat([reads.encoder[:1] * 0, reads.encoder[:-1]]) if", equals_textbook
    ),
    "encoder cut from the gradient": Trap(f"{SAMPLE}.backward", "self.halves[i].addcmul_(self.of_z[i], self.factor[i])", "pass", equals_textbook),
    "variance for deviation": Trap(f"{SAMPLE}.forward", "self.std.add_(self.least)", "self.std.add_(self.least).square_()", equals_textbook),
    "uniform noise": Trap("noise:Noise.over_time", "_normal(bits, self._dtype)", "torch.stack([_uniform(bits, self._dtype)] * 2, -1)", noise_is_standard_normal),
    "h_{T-1} returned as the state": Trap(
        "recurrence.tape:Tape.run", "lengths.clamp(max=self.steps)", "(lengths - 1).clamp(min=0)", carries_state
    ),
    "state ignored": Trap(FORWARD, "if state is None else state", "", carries_state),
    "padding enters the likelihood": Trap(SCORE, "torch.where(mask, log_prob(model.decoder.head(features), x, observed), 0.0)", "log_prob(model.decoder.head(features), x, observed)", ignores_padding),
    "padding enters the KL": Trap(SCORE, "torch.where(mask[..., None], ", "torch.where(mask[..., None] | True, ", ignores_padding),
    "padding enters the network": Trap(
        CLEAN, "x=batch.x.masked_fill(~batch.counted, 0.0)", "x=batch.x",
        lambda: test_recurrence.test_padding_changes_nothing("gru", float("nan")),
    ),
    "generates from h_t": Trap(
        FREE, "read = perceptron(",
        'pace.advance(); pace.read(pace.hidden.later(), "h", "decoder"); read = perceptron(', generates_as_trained,
    ),
    "generates from the posterior of its last frame": Trap(
        FREE, "Sample(raw, noise, z, prior.head.min_std)",
        "_Latent(lambda h: model.encoder(torch.cat([h.new_zeros(len(h), 5), h], -1)), pace.hidden, None, z)",
        test_recurrence.test_generated_latents_come_from_the_prior,
    ),
    "centring forgotten in sampling": Trap("recurrence.generation:_Look.forward", "self.look(self.x.at[t], None)", "self.x.at[t]", generates_as_trained),
    "loss on data, network on centred data": Trap(
        SCORE, "(features), x, observed)", "(features), model.standardize_input(x, torch.ones_like(x).bool()), observed)", equals_textbook
    ),
    "no floor under the std": Trap("heads.continuous:Gaussian.moments", " + self.min_std", "", std_has_a_floor),
    "batch of one squeezed": Trap(
        LOOP, "mean, std = model.encoder.head.moments(found[2])",
        "mean, std = (m.squeeze() for m in model.encoder.head.moments(found[2]))", batch_of_one_keeps_its_shape, RuntimeError,
    ),
    "LSTM networks read the cell": Trap("recurrence.tape:LSTM.forward", "torch.mul(output, squashed, out=self.h.at[t + 1])", "self.h.at[t + 1].copy_(c)", lambda: equals_textbook("lstm")),
    "mean of per-batch means": Trap(
        "metrics:Bound.update", "self.kl + kl.detach().to(WIDE).sum()", "self.kl + kl.sum() / lengths.sum() * self.steps",
        reports_totals,
    ),
    "validation weighted by beta": Trap(
        "module:VRNNLightningModule._evaluate", "trace.log_px, trace.kl,", "trace.log_px, 0.5 * trace.kl,", reports_totals
    ),
    "beta in the reported bound": Trap(
        "module:VRNNLightningModule.training_step", '("elbo", reconstruction - all_kl)', '("elbo", reconstruction - self.beta * all_kl)',
        beta_stays_out,
    ),
    "divided by the batch twice": Trap(
        "module:VRNNLightningModule.training_step", "part / all_sequences)\n        return loss",
        "part / all_sequences)\n        return loss / len(batch)", loss_is_per_sequence,
    ),
    "bits forget the scaler": Trap(
        "metrics:Bound.compute", "(self.log_scale - elbo)", "(-elbo)", bits_count_the_scaler
    ),
    "last batch dropped": Trap(
        "data.loading:BatchSampler._global_batches", "return self._groups",
        "return self._groups[:-1]", test_sines.test_contract,
    ),
    "data scaled twice": Trap(
        "data.loading:ScaledSequences._scaled", "self.scaler.scale(batch.x)", "self.scaler.scale(self.scaler.scale(batch.x))",
        loader_scales_once,
    ),
    "grey values scored with a Bernoulli": Trap(
        "heads.base:Head.check", "if not wrong.any():", "if True:", grey_values_are_refused, pytest.fail.Exception
    ),
    "mixture of logs": Trap(
        "heads.base:Mixture.marginal_log_prob", "torch.logsumexp(each + self.mixture_distribution.logits.log_softmax(-1), -1)",
        "(each * self.mixture_distribution.probs).sum(-1)", test_heads.test_mixture_density_is_the_log_of_a_sum,
    ),
    "softmax over the wrong axis": Trap(
        "heads.base:Mixture.marginal_log_prob", "log_softmax(-1)", "log_softmax(0)",
        test_heads.test_mixture_density_is_the_log_of_a_sum,
    ),
    "log of a softmax": Trap(
        "heads.discrete:_LogisticBins.log_prob", "log_softmax(-1)", "softmax(-1).log()", survives_extremes("logistics, 8 bit", 1e6)
    ),
    "log of a sigmoid": Trap(
        "heads.discrete:_LogisticBins.log_prob", "below = F.logsigmoid((centred + 0.5) / self.scale)",
        "below = ((centred + 0.5) / self.scale).sigmoid().log()", survives_extremes("logistics, 8 bit", 1e4),
    ),
    "range's ends without their tails": Trap(
        "heads.discrete:_LogisticBins.log_prob", "first, last = value <= self.lowest, value >= self.highest",
        "first = last = value < self.lowest", logistics_sum_to_one,
    ),
    "mixture of logs of logistics": Trap(
        "heads.discrete:_LogisticBins.log_prob", "torch.logsumexp(each + self.weights.logits.log_softmax(-1), -1)",
        "(each * self.weights.probs).sum(-1)", logistics_sum_to_one,
    ),
    "bins of companded sound shifted": Trap(
        "heads.discrete:_Companded.encode", "+ 0.5).floor()", ").floor()", test_heads.test_mulaw_is_the_formula
    ),
    "mixture of logs of pen strokes": Trap(
        "heads.pen:_PenStroke.marginal_log_prob", "torch.logsumexp(each + self.weights.logits.log_softmax(-1), -1)",
        "(each * self.weights.probs).sum(-1)", test_heads.test_pen_density_is_the_log_of_a_sum,
    ),
    "unbounded correlation": Trap("heads.pen:Pen.forward", "0.999 * bend.tanh()", "bend.tanh()", survives_extremes("pen", 1e4)),
    "lift forgotten": Trap(
        "heads.pen:_PenStroke.marginal_log_prob", "torch.where(lift_known[..., 0]", "0 * torch.where(lift_known[..., 0]",
        test_heads.test_pen_density_is_the_log_of_a_sum,
    ),
    "missing dx taken for the mean": Trap(
        "heads.pen:_PenStroke.marginal_log_prob", "torch.where(x_known, log_y_given_x, log_y - 0.5 * zy**2)", "log_y_given_x",
        lambda: test_heads.test_missing_pen_offset_is_integrated_out(0),
    ),
    "log of a rate that underflowed": Trap(
        "heads.counts:_Poisson.log_prob", "log_softplus(raw)", "F.softplus(raw).log()", survives_extremes("poisson", -1e4)
    ),
    "mean over samples at every step": Trap(
        "objectives:iwae", "(log_px + beta * log_ratio).sum(1).unflatten(0, (samples, -1))",
        "((log_px + beta * log_ratio).unflatten(0, (samples, -1)).logsumexp(0) - math.log(samples)).sum(-1).expand(samples, -1)",
        test_objectives.test_iwae_sums_over_time_before_the_mean_over_samples,
    ),
    "analytic KL in importance weights": Trap(
        "objectives:IWAE.__call__", "trace.log_ratio", "-trace.kl.sum(-1)",
        test_objectives.test_one_sample_of_every_objective_is_the_sampled_elbo,
    ),
    "sum over samples for their mean": Trap(FILTER, "-math.log(particles)", "0.0", estimates_are_unbiased),
    "weights kept after resampling": Trap(WEIGHTS, "self.log_weights = torch.where(due, -math.log(self.particles), self.log_weights)", "pass", estimates_are_unbiased),
    "ancestors of other sequences": Trap(
        WEIGHTS, "(ancestors * len(self.rows) + self.rows)", "(ancestors + self.particles * self.rows)",
        test_filtering.test_padding_and_other_sequences_change_no_sequence,
    ),
    "ancestors in proportion to log-weights": Trap(
        "filtering:resample", ".softmax(0)", ".sub(log_weights.min()).softmax(0).sqrt()",
        lambda: test_filtering.test_ancestors_are_drawn_in_proportion("multinomial"),
    ),
    "latent's density forgotten in the weights": Trap(
        "recurrence:log_ratio", " - posterior.log_prob(z)", "", likelihood_of_a_known_vrnn
    ),
    "smoothing from the padding's end": Trap(
        "vrnn:VRNN._future", "torch.where(time < lengths, lengths - 1 - time, time)", "(len(reads) - 1 - time).expand(-1, len(lengths))",
        lambda: test_recurrence.test_every_option_equals_textbook("gru", {"smoothing": True}, [6, 4, 1]),
    ),
    "prior's mean added after the draw": Trap(
        f"{SAMPLE}.forward", "mean.add_(self.prior_mean.at[t])", "mean, _ = mean.clone(), mean.add_(self.prior_mean.at[t])",
        lambda: test_recurrence.test_every_option_equals_textbook("gru", {"residual_posterior": True}, [6, 4, 1]),
    ),
    "dropout without its scale": Trap(
        "vrnn:VRNN.draw_masks", " / (1 - self.dropout)", "", test_recurrence.test_dropout_is_one_mask_per_sequence_in_training_alone
    ),
    "prior does not read the covariates": Trap(
        LOOP, "else reads.inputs", "else 0 * reads.inputs",
        lambda: test_recurrence.test_every_option_equals_textbook("gru", test_recurrence.OPTIONS["all"], [6, 4, 1]),
    ),
    "reset gate cut from the gradient": Trap("recurrence.tape:GRU.prepare", "of_reset.mul_(of_new)", "of_reset.zero_()", equals_textbook),
    "update gate's gradient of the old state": Trap("recurrence.tape:GRU.backward", "addcmul_(self.h.grad_at[t + 1], self.update.at[t])", "add_(self.h.grad_at[t + 1])", equals_textbook),
    "cell's gradient cut from the output": Trap(
        "recurrence.tape:LSTM.backward", ".addcmul_(grad, self.through[i])", "", lambda: equals_textbook("lstm")
    ),
    "gradients left with the chosen particles": Trap(
        "recurrence.tape:Tape._walked_back", "self._scatter(t + 1, self._sources[t])", "pass", filters_as_the_textbook
    ),
    "resampled within a stretch": Trap(
        "filtering:evidence", "due[move.t + 1] = move.due", "due[move.t] = move.due", filters_as_the_textbook
    ),
    "windows across the borders of sequences": Trap(
        "data.archives:read_archive", "ends = steps.cumsum()", "ends = steps.cumsum() + 1",
        lambda folder_of: test_archives.test_sequences_are_cut_at_the_lengths_and_named(folder_of.mktemp("run")),
    ),
    "empty rows averaged in": Trap(
        "module:VRNNLightningModule.training_step", "(batch.lengths > 0).sum()", "torch.tensor(len(batch))",
        lambda folder_of: test_module.test_sequences_of_no_steps_do_not_count(folder_of.mktemp("run")),
    ),
    "a fixed batch size in the state": Trap(
        FORWARD, "self.initial_state(samples * len(batch))", "self.initial_state(2)",
        test_recurrence.test_order_of_the_batch_changes_nothing, UserError,
    ),
    "log(1 - theta - eps)": Trap(
        "heads.discrete:Bernoulli.forward", "logits = at_least_float32(self.linear(features))",
        "logits = at_least_float32(self.linear(features)).sigmoid(); logits = logits.log() - (1 - logits - 1e-12).log()",
        survives_extremes("bernoulli", 1e4),
    ),
    "dropout in evaluation": Trap(
        "vrnn:VRNN.draw_masks", "not self.training or ", "", test_recurrence.test_dropout_is_one_mask_per_sequence_in_training_alone
    ),
    "reference left alone": Trap("recurrence.textbook:textbook_step", "torch.cat([phi_z, h, *u], -1)", "torch.cat([phi_z, 1.1 * h, *u], -1)", equals_textbook),
}  # fmt: skip


def never(*_: object, **__: object) -> None:
    """Do nothing."""


OMISSIONS = {
    "no clipping before the step": (VRNNLightningModule, "configure_gradient_clipping", never,
                                    test_module.test_updates_are_clipped_before_they_are_made),
    "validation in training mode": (LightningModule, "on_validation_model_eval", never,
                                    test_module.test_validation_drops_nothing),
    "best is last": (ModelCheckpoint, "check_monitor_top_k", lambda *_: True,
                     test_module.test_the_best_checkpoint_is_the_best),
}  # fmt: skip


@pytest.mark.parametrize("name", OMISSIONS)
def test_what_the_framework_must_not_leave_out(name, monkeypatch, tmp_path):
    """Bugs of training loops: ours is Lightning's, so they are put in there, or in the hook that stands for it."""
    owner, method, wrong, oracle = OMISSIONS[name]
    oracle(tmp_path / "right")
    monkeypatch.setattr(owner, method, wrong)
    with pytest.raises(AssertionError):
        oracle(tmp_path / "wrong")


def put_in(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the module with the bug in it, and give the original function that code."""
    module_name, path = trap.target.split(":")
    original = importlib.import_module(f"vrnn_lightning.{module_name}")
    right = original
    for name in path.split("."):
        right = getattr(right, name)
    right = inspect.unwrap(right)
    lines, first = inspect.getsourcelines(right)
    body = "".join(lines)
    assert trap.right in body, "the trap needs a new place"
    module_lines = inspect.getsource(original).splitlines(keepends=True)
    module_lines[first - 1 : first - 1 + len(lines)] = [body.replace(trap.right, trap.wrong, 1)]
    trapped = compile("".join(module_lines), f"trapped {original.__file__}", "exec", dont_inherit=True)
    wrong = next(code for code in codes_in(trapped) if code.co_qualname == path)
    monkeypatch.setattr(right, "__code__", wrong)  # wherever it was imported to


def codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from codes_in(inner)


@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_is_noticed(name, monkeypatch, tmp_path_factory):
    trap = TRAPS[name]
    takes_folder = trap.oracle.__code__.co_argcount and "folder_of" in trap.oracle.__code__.co_varnames
    run = (lambda: trap.oracle(tmp_path_factory)) if takes_folder else trap.oracle
    run()  # the oracle is content with the code as it is
    put_in(trap, monkeypatch)
    with pytest.raises(trap.noticed_as) as noticed:
        run()
    assert "trap needs a new place" not in str(noticed.value)


def test_the_reference_is_a_reference():
    """The textbook loop itself is held against the definition, written without any of its code, at one step."""
    model, batch = test_recurrence.make_model(), test_recurrence.make_batch([1, 1])
    noise = test_recurrence.draw_noise(model, batch)
    h = torch.zeros(2, 10, dtype=torch.float64)
    found = readable_loop(model, batch, noise, model.initial_state(2))
    phi_x = model.phi_x((batch.x[:, 0] - model.input_mean) / model.input_std)
    q, p = model.encoder(torch.cat([phi_x, h], 1)), model.prior(h)
    z = q.mean + q.stddev * noise[:, 0]
    kl = (p.stddev / q.stddev).log() + (q.variance + (q.mean - p.mean) ** 2) / (2 * p.variance) - 0.5
    emission = model.decoder(torch.cat([model.phi_z(z), h], 1))
    x = batch.x[:, 0]
    log_px = (
        -0.5 * ((x - emission.mean) / emission.stddev) ** 2
        - emission.stddev.log()
        - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    ).sum(1)
    torch.testing.assert_close(found.kl[:, 0], kl)
    torch.testing.assert_close(found.log_px[:, 0], log_px, rtol=1e-6, atol=1e-6)
