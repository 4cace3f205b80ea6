"""Bugs seen in published VRNN code: each, patched into ours, must make an oracle fail.

A trap replaces a method of the model, an operation, a head or an objective by one with the bug.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import readable
import test_archives
import test_equations
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
from torch.distributions import kl_divergence
from torch.nn import functional as F

from vrnn_lightning import UserError, VRNNLightningModule, filtering
from vrnn_lightning.data import Scaler
from vrnn_lightning.data.loading import BatchSampler, ScaledSequences
from vrnn_lightning.filtering import ParticleWeights
from vrnn_lightning.heads import Bernoulli, Gaussian, Mixture, counts, discrete, latent, pen
from vrnn_lightning.heads.base import Factorised, Head, at_least_float32
from vrnn_lightning.metrics import Bound
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import ELBO
from vrnn_lightning.recurrence import tape
from vrnn_lightning.recurrence.operations import GRU, LSTM, Apply, GaussianSample, MatMul
from vrnn_lightning.recurrence.step import FastStep
from vrnn_lightning.vrnn import VRNN, Equations, Trace, checks, model, trace

Patch = Callable[[pytest.MonkeyPatch], None]


class Trap(NamedTuple):
    """A bug and the oracle that must notice it."""

    put_in: Patch
    oracle: Callable[..., None]
    noticed_as: type[BaseException] = AssertionError


def swap(owner: Any, name: str, wrong: Any) -> Patch:
    """Replace an attribute."""
    return lambda patch: patch.setattr(owner, name, wrong)


def around(owner: Any, name: str, wrong: Callable[..., Any]) -> Patch:
    """Replace a function by one that is called with the right one first."""
    right = getattr(owner, name)
    return swap(owner, name, lambda *args, **options: wrong(right, *args, **options))


def both(*patches: Patch) -> Patch:
    """Replace several attributes."""

    def put_in(patch: pytest.MonkeyPatch) -> None:
        for each in patches:
            each(patch)

    return put_in


def equals_readable(cell: str = "gru") -> None:
    test_recurrence.test_fast_path_equals_readable(cell, 4, 2, [6, 4, 1])


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
    test_recurrence.test_fast_path_equals_readable("lstm", 4, 2, [5])


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


def filters_as_readable() -> None:
    test_objectives.test_the_fast_filter_equals_the_readable({}, test_objectives.RULES[0])


def never(*_: object, **__: object) -> None:
    """Do nothing."""


def divergence(wrong: Callable[..., Any]) -> Patch:
    return swap(latent, "kl_divergence", wrong)


def closed(q: Any, p: Any) -> torch.Tensor:
    return (p.stddev / q.stddev).log() + (q.stddev**2 + (q.mean - p.mean) ** 2) / (2 * p.stddev**2)


def unmasked(of_likelihood: bool) -> Patch:
    """Let padding count in one of the two terms."""

    def score(right, *args):
        *rest, frames = args
        masked, counted = right(*args), right(*rest, frames._replace(mask=torch.ones_like(frames.mask)))
        return tuple((counted if (i == 1) == of_likelihood and i in (1, 2) else masked)[i] for i in range(len(masked)))

    return around(trace, "_score", score)


def shifted(values: int) -> Patch:
    """Let those that read so many values beforehand read the ones of the step before."""

    def given(right, self, names):
        known = right(self, names)
        return torch.cat([known[:1] * 0, known[:-1]]) if len(names) == values else known

    return around(FastStep, "_given", given)


def reads_next_h(right, *args, **options):
    steps, state = right(*args, **options)
    return steps._replace(h=torch.cat([steps.h[1:], state.h[None, :, -1]])), state


def squeezed(right, *args, **options):
    steps, state = right(*args, **options)
    return steps._replace(posterior=tuple(moment.squeeze() for moment in steps.posterior)), state


def generates_from_next_h(right, self):
    self._lay_state()
    weight = self.tape.parameter(self._weights["emission"]["h"].t())
    self.tape.add(MatMul(self.states[-1].next_step(), weight, self._sums["emission"]))
    right(self)


def generates_from_posterior(right, self):
    if self.purpose != "generate":
        right(self)
        return

    def draw(h):
        return self.model.posterior_dist(h.new_zeros(len(h), 5), h).sample()

    self.z = self.tape.buffer(4, self.tape.wide)
    self.tape.add(Apply(draw, [self.h], self.z))


def variance_for_deviation(self, t):
    std = (F.softplus(self.spreads[t]) + self.least) ** 2
    torch.addcmul(self.means[t], std, self.noises[t], out=self.draws[t])


def prior_added_late(right, self, t):
    right(self, t)
    if self.prior_means is not None:
        self.draws[t].sub_(self.prior_means[t])


def reads_the_cell_state(right, self, t):
    right(self, t)
    self.states[t + 1].copy_(self.cells[t + 1])


def no_reset_gradient(right, self, start, end):
    right(self, start, end)
    self.grads[1][start:end].zero_()


def no_update_gate(self, t):
    self.factors[t - self.start].mul_(self.h_grad_columns[t - self.start])
    self.h_grad_steps[t].add_(self.h_grad_steps[t + 1])


def no_gradient_of_c(self, t):
    i = t - self.start
    self.c_factors[i].mul_(self.c_grad_columns[i])
    self.h_factors[i].mul_(self.h_grad_steps[t + 1])
    self.c_grad_steps[t].addcmul_(self.c_grad_steps[t + 1], self.forgets[t])


def uniform_noise(right, self, width, samples=1):
    normal = right(self, width, samples)
    return (0.5 + 0.5 * torch.erf(normal / 2**0.5) - 0.5) * 12**0.5


def floorless(right, self, raw):
    mean, std = right(self, raw)
    return mean, std - self.min_std


def scored_centred(right, model, *args):
    *rest, frames = args
    return right(model, *rest, frames._replace(x=model.standardize_input(frames.x)))


def means_of_means(right, self, log_px, kl, lengths, *rest):
    before, steps = self.kl, self.steps
    right(self, log_px, kl, lengths, *rest)
    self.kl = before + kl.sum() / lengths.sum() * steps


def without_scale(right, self):
    figures = right(self)
    figures["bits_per_dim"] -= self.log_scale / (self.values * math.log(2))
    return figures


def scaled_twice(right, self, items):
    batch = right(self, items)
    batch.x = self.scaler.scale(batch.x)
    return batch


def mixture(join: Callable[..., Any]) -> Patch:
    """Replace how the components of a mixture are joined."""

    def marginal_log_prob(self, value, observed):
        each = self.component_distribution.marginal_log_prob(value[..., None, :], observed[..., None, :])
        return join(each, self.mixture_distribution)

    return swap(Mixture, "marginal_log_prob", marginal_log_prob)


def logistic_bins(below=None, ends=True, join=None) -> Patch:
    """Replace a piece of the mass of a logistic between two bounds."""

    def log_prob(self, value):
        value = value[..., None]
        centred = value - self.loc
        upper = (below or F.logsigmoid)((centred + 0.5) / self.scale)
        lower = F.logsigmoid((0.5 - centred) / self.scale)
        inside = torch.log(-torch.expm1(-1 / self.scale))
        first, last = value <= self.lowest, value >= self.highest
        if not ends:
            first = last = torch.zeros_like(first)
        each = torch.where(last, 0.0, upper) + torch.where(first, 0.0, lower)
        each = each + torch.where(first | last, 0.0, inside)
        if join is not None:
            return join(each, self.weights)
        return torch.logsumexp(each + self.weights.logits.log_softmax(-1), -1)

    return swap(discrete._LogisticBins, "log_prob", log_prob)


def stroke(lift=True, marginal=True, join=None) -> Patch:
    """Replace a piece of the density of a pen's stroke."""

    def marginal_log_prob(self, value, observed):
        value = value.masked_fill(~observed, 0.0)
        zx, zy = ((value[..., None, :2] - self.loc) / self.scale).unbind(-1)
        x_known, y_known, lift_known = observed[..., None].unbind(-2)
        rho, rest = self.correlation, 1 - self.correlation**2
        log_x, log_y = (-self.scale.log() - 0.5 * math.log(2 * math.pi)).unbind(-1)
        log_x = log_x - 0.5 * zx**2
        given_x = log_y - 0.5 * (zy - rho * zx) ** 2 / rest - 0.5 * rest.log()
        log_y = torch.where(x_known, given_x, log_y - 0.5 * zy**2) if marginal else given_x
        each = torch.where(x_known, log_x, 0.0) + torch.where(y_known, log_y, 0.0)
        offsets = torch.logsumexp(each + self.weights.logits.log_softmax(-1), -1)
        offsets = offsets if join is None else join(each, self.weights)
        return offsets + lift * torch.where(lift_known[..., 0], self.lift.log_prob(value[..., 2]), 0.0)

    return swap(pen._PenStroke, "marginal_log_prob", marginal_log_prob)


def mean_of_logs(each, weights):
    return (each * weights.probs).sum(-1)


def unbounded_correlation(right, self, features):
    found = right(self, features)
    found.correlation = found.correlation / 0.999
    return found


def shifted_bins(self, value):
    companded = value.sign() * torch.log1p(self.mu * value.abs()) / math.log1p(self.mu)
    return ((companded + 1) / 2 * self.mu).floor().long().clamp(0, self.mu)


def log_of_underflow(self, value):
    raw, count = self.raw.double(), value.double()
    return (count * F.softplus(raw).log() - F.softplus(raw) - torch.lgamma(count + 1)).to(self.raw.dtype)


def clipped_logits(self, features):
    theta = at_least_float32(self.linear(features)).sigmoid()
    logits = theta.log() - (1 - theta - 1e-12).log()
    return Factorised(torch.distributions.Bernoulli(logits=logits, validate_args=False))


def mean_at_every_step(log_px, log_ratio, samples, beta=1.0):
    each = (log_px + beta * log_ratio).unflatten(0, (samples, -1))
    return (each.logsumexp(0) - math.log(samples)).sum(-1)


def kept_weights(right, self, t, increments, draws):
    before = self.log_weights + torch.where(t < self.lengths, increments.to(self.log_weights.dtype), 0.0)
    rows = right(self, t, increments, draws)
    if rows is not None:
        self.log_weights = before - before.logsumexp(0)
    return rows


def other_ancestors(right, self, t, increments, draws):
    rows = right(self, t, increments, draws)
    if rows is None:
        return None
    batch = len(self.rows)
    return rows // batch + self.particles * (rows % batch)


def uneven(right, self, lengths, log_weights, *more):
    right(self, lengths, torch.zeros_like(log_weights), *more)


def from_the_padding(right, self, batch, masks):
    return right(self, replace(batch, lengths=torch.full_like(batch.lengths, batch.x.shape[1])), masks)


def without_its_scale(right, self, noise):
    masks = right(self, noise)
    return None if masks is None else type(masks)(*(mask * (1 - self.dropout) for mask in masks))


def in_evaluation(right, self, noise):
    training = self.training
    self.training = True
    try:
        return right(self, noise)
    finally:
        self.training = training


def no_covariates(right, self, names):
    return right(self, names) * (0 if list(names) == ["inputs"] else 1)


def across_borders(right, *args, **options):
    found = right(*args, **options)
    found.bounds[:] = found.bounds + 1
    return found


def weighted_report(right, self, model, batch, noise, beta, *rest):
    found = right(self, model, batch, noise, beta, *rest)
    return found._replace(kl=beta * found.kl)


def empty_rows_counted(right, self, name, value, *rest, **options):
    right(self, name, value / 2 if name.endswith("_per_sequence") else value, *rest, **options)


def of_equations() -> None:
    for options in ({}, test_recurrence.OPTIONS["all"]):
        test_equations.test_each_method_is_its_equation("gru", options, 4)


MIXTURE = test_heads.test_mixture_density_is_the_log_of_a_sum
PEN = test_heads.test_pen_density_is_the_log_of_a_sum
LOGISTIC = "logistics, 8 bit"


def with_option(name: str) -> Callable[[], None]:
    options = test_recurrence.OPTIONS[name]
    return lambda: test_recurrence.test_every_option_equals_readable("gru", options, [6, 4, 1])


TRAPS = {
    "KL of prior from posterior": Trap(divergence(lambda q, p: kl_divergence(p, q)), equals_readable),
    "KL averaged over dimensions": Trap(divergence(lambda q, p: kl_divergence(q, p) / 4), equals_readable),
    "KL half a nat too high": Trap(divergence(closed), equals_readable),
    "networks read h_t": Trap(around(model, "infer", reads_next_h), equals_readable),
    "cell reads x_{t-1}": Trap(shifted(2), equals_readable),
    "posterior reads x_{t-1}": Trap(shifted(3), equals_readable),
    "encoder cut from the gradient": Trap(swap(GaussianSample, "backward", never), equals_readable),
    "variance for deviation": Trap(swap(GaussianSample, "forward", variance_for_deviation), equals_readable),
    "uniform noise": Trap(around(Noise, "over_time", uniform_noise), noise_is_standard_normal),
    "h_{T-1} returned as the state": Trap(
        around(tape.Tape, "run", lambda right, self, outputs, lengths, resample=None: right(
            self, outputs, (lengths - 1).clamp(min=0), resample)), carries_state,
    ),
    "state ignored": Trap(
        around(VRNN, "forward", lambda right, self, batch, noise=None, state=None, *rest: right(self, batch, noise)),
        carries_state,
    ),
    "padding enters the likelihood": Trap(unmasked(True), ignores_padding),
    "padding enters the KL": Trap(unmasked(False), ignores_padding),
    "padding enters the network": Trap(
        swap(Equations, "mask_invalid", lambda self, batch: batch),
        lambda: test_recurrence.test_padding_changes_nothing("gru", float("nan")),
    ),
    "generates from h_t": Trap(around(FastStep, "_lay_emission", generates_from_next_h), generates_as_trained),
    "generates from the posterior of its last frame": Trap(
        around(FastStep, "_lay_z", generates_from_posterior),
        test_recurrence.test_generated_latents_come_from_the_prior,
    ),
    "centring forgotten in sampling": Trap(
        around(Equations, "standardize_input", lambda right, self, x, counted=None: x if counted is None
               else right(self, x, counted)), generates_as_trained,
    ),
    "loss on data, network on centred data": Trap(around(trace, "_score", scored_centred), equals_readable),
    "no floor under the std": Trap(around(Gaussian, "moments", floorless), std_has_a_floor),
    "batch of one squeezed": Trap(around(model, "infer", squeezed), batch_of_one_keeps_its_shape, Exception),
    "LSTM networks read the cell": Trap(around(LSTM, "forward", reads_the_cell_state), lambda: equals_readable("lstm")),
    "prior without its equation": Trap(
        around(Equations, "prior_dist", lambda right, self, h, inputs=None: right(self, 1.1 * h, inputs)), of_equations
    ),
    "posterior without the features of x": Trap(
        around(Equations, "posterior_dist", lambda right, self, x_features, *rest: right(self, 0 * x_features, *rest)),
        of_equations,
    ),
    "emission of h_t alone": Trap(
        around(Equations, "emission_dist", lambda right, self, z_features, *rest: right(self, 0 * z_features, *rest)),
        of_equations,
    ),
    "recurrence without z": Trap(
        around(Equations, "next_state", lambda right, self, x_features, z_features, *rest: right(
            self, x_features, 0 * z_features, *rest)), of_equations,
    ),
    "mean of per-batch means": Trap(around(Bound, "update", means_of_means), reports_totals),
    "validation weighted by beta": Trap(
        around(Bound, "update", lambda right, self, log_px, kl, *rest: right(self, log_px, 0.5 * kl, *rest)), reports_totals
    ),
    "beta in the reported bound": Trap(around(ELBO, "__call__", weighted_report), beta_stays_out),
    "divided by the batch twice": Trap(
        around(VRNNLightningModule, "training_step", lambda right, self, batch, i: right(self, batch, i) / len(batch)),
        loss_is_per_sequence,
    ),
    "bits forget the scaler": Trap(around(Bound, "compute", without_scale), bits_count_the_scaler),
    "last batch dropped": Trap(
        around(BatchSampler, "_global_batches", lambda right, self: right(self)[:-1]), test_sines.test_contract
    ),
    "data scaled twice": Trap(around(ScaledSequences, "_scaled", scaled_twice), loader_scales_once),
    "grey values scored with a Bernoulli": Trap(swap(Head, "check", never), grey_values_are_refused, pytest.fail.Exception),
    "mixture of logs": Trap(mixture(mean_of_logs), MIXTURE),
    "softmax over the wrong axis": Trap(
        mixture(lambda each, weights: torch.logsumexp(each + weights.logits.log_softmax(0), -1)), MIXTURE
    ),
    "log of a softmax": Trap(
        logistic_bins(join=lambda each, weights: torch.logsumexp(each + weights.logits.softmax(-1).log(), -1)),
        survives_extremes(LOGISTIC, 1e6),
    ),
    "log of a sigmoid": Trap(logistic_bins(below=lambda x: x.sigmoid().log()), survives_extremes(LOGISTIC, 1e4)),
    "range's ends without their tails": Trap(logistic_bins(ends=False), logistics_sum_to_one),
    "mixture of logs of logistics": Trap(logistic_bins(join=mean_of_logs), logistics_sum_to_one),
    "bins of companded sound shifted": Trap(
        swap(discrete._Companded, "encode", shifted_bins), test_heads.test_mulaw_is_the_formula
    ),
    "mixture of logs of pen strokes": Trap(stroke(join=mean_of_logs), PEN),
    "unbounded correlation": Trap(around(pen.Pen, "forward", unbounded_correlation), survives_extremes("pen", 1e4)),
    "lift forgotten": Trap(stroke(lift=False), PEN),
    "missing dx taken for the mean": Trap(
        stroke(marginal=False), lambda: test_heads.test_missing_pen_offset_is_integrated_out(0)
    ),
    "log of a rate that underflowed": Trap(
        swap(counts._Poisson, "log_prob", log_of_underflow), survives_extremes("poisson", -1e4)
    ),
    "mean over samples at every step": Trap(
        swap(test_objectives, "iwae", mean_at_every_step),
        test_objectives.test_iwae_sums_over_time_before_the_mean_over_samples,
    ),
    "analytic KL in importance weights": Trap(
        swap(Trace, "log_ratio", property(lambda self: -self.kl.sum(-1))),
        test_objectives.test_one_sample_of_every_objective_is_the_sampled_elbo,
    ),
    "sum over samples for their mean": Trap(around(ParticleWeights, "__init__", uneven), estimates_are_unbiased),
    "weights kept after resampling": Trap(around(ParticleWeights, "advance", kept_weights), estimates_are_unbiased),
    "ancestors of other sequences": Trap(
        around(ParticleWeights, "advance", other_ancestors),
        test_filtering.test_padding_and_other_sequences_change_no_sequence, (AssertionError, IndexError),
    ),
    "ancestors in proportion to log-weights": Trap(
        around(test_filtering, "resample", lambda right, log_weights, uniforms: right(log_weights / 2, uniforms)),
        lambda: test_filtering.test_ancestors_are_drawn_in_proportion("multinomial"),
    ),
    "latent's density forgotten in the weights": Trap(
        both(*(swap(room, "log_ratio", lambda prior, posterior, z: prior.log_prob(z)) for room in (model, trace))),
        likelihood_of_a_known_vrnn,
    ),
    "smoothing from the padding's end": Trap(
        around(Equations, "backward_states", from_the_padding), with_option("smoothing")
    ),
    "prior's mean added after the draw": Trap(
        around(GaussianSample, "forward", prior_added_late), with_option("residual posterior")
    ),
    "dropout without its scale": Trap(
        around(Equations, "draw_masks", without_its_scale),
        test_recurrence.test_dropout_is_one_mask_per_sequence_in_training_alone,
    ),
    "prior does not read the covariates": Trap(around(FastStep, "_given", no_covariates), with_option("all")),
    "reset gate cut from the gradient": Trap(around(GRU, "prepare", no_reset_gradient), equals_readable),
    "update gate's gradient of the old state": Trap(swap(GRU, "backward", no_update_gate), equals_readable),
    "cell's gradient cut from the output": Trap(swap(LSTM, "backward", no_gradient_of_c), lambda: equals_readable("lstm")),
    "gradients left with the chosen particles": Trap(swap(tape._Loop, "_scatter", never), filters_as_readable),
    "resampled within a stretch": Trap(
        around(filtering, "log_evidence", lambda right, increments, weights, events, *more: right(
            increments, weights, [event._replace(t=event.t - 1) for event in events], *more)), filters_as_readable,
    ),
    "windows across the borders of sequences": Trap(
        around(test_archives, "read_archive", across_borders),
        lambda folder_of: test_archives.test_sequences_are_cut_at_the_lengths_and_named(folder_of.mktemp("run")),
    ),
    "empty rows averaged in": Trap(
        around(VRNNLightningModule, "log", empty_rows_counted),
        lambda folder_of: test_module.test_sequences_of_no_steps_do_not_count(folder_of.mktemp("run")),
    ),
    "a fixed batch size in the state": Trap(
        around(Equations, "initial_state", lambda right, self, size, *rest: right(self, 2, *rest)),
        test_recurrence.test_order_of_the_batch_changes_nothing, UserError,
    ),
    "log(1 - theta - eps)": Trap(swap(Bernoulli, "forward", clipped_logits), survives_extremes("bernoulli", 1e4)),
    "dropout in evaluation": Trap(
        around(Equations, "draw_masks", in_evaluation),
        test_recurrence.test_dropout_is_one_mask_per_sequence_in_training_alone,
    ),
    "reference left alone": Trap(
        around(readable, "output", lambda right, state, masks=None: 1.1 * right(state, masks)), equals_readable
    ),
}  # fmt: skip


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


@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_is_noticed(name, monkeypatch, tmp_path_factory):
    trap = TRAPS[name]
    takes_folder = trap.oracle.__code__.co_argcount and "folder_of" in trap.oracle.__code__.co_varnames
    run = (lambda: trap.oracle(tmp_path_factory)) if takes_folder else trap.oracle
    run()  # the oracle is content with the code as it is
    monkeypatch.setattr(checks, "_check_step", never)  # it would notice first
    trap.put_in(monkeypatch)
    try:
        run()
    except trap.noticed_as:
        return
    pytest.fail(f"the bug {name!r} was put in and its oracle noticed nothing: does the patched method still run there?")


def test_the_reference_is_a_reference():
    """The readable loop itself is held against the definition, written without any of its code, at one step."""
    model, batch = test_recurrence.make_model(), test_recurrence.make_batch([1, 1])
    noise = test_recurrence.draw_noise(model, batch)
    h = torch.zeros(2, 10, dtype=torch.float64)
    found = readable.readable_loop(model, batch, noise, model.initial_state(2))
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
