"""The variational recurrent neural network (Chung et al. 2015, arXiv 1506.02216)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, kl_divergence
from torch.nn.utils.prune import BasePruningMethod
from torch.utils.checkpoint import checkpoint

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.errors import UserError
from vrnn_lightning.filtering import Filtered, Resampling, Weights, effective_samples, evidence
from vrnn_lightning.heads import Factorised, Gaussian, Head, Network, log_prob
from vrnn_lightning.nn import MLP, Layers
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import (
    Generated,
    InferenceSteps,
    Masks,
    NetworkInputs,
    Prior,
    Purpose,
    Resample,
    State,
    StepView,
    Stream,
    generate,
    infer,
    log_ratio,
    output,
    partition,
    repeat_rows,
)

__all__ = ["VRNN", "Particles", "StandardNormal", "Trace"]


@dataclass
class Trace:
    """One pass of inference over a batch; every tensor is batch first, with samples * batch rows.

    Args:
        log_px: log p(x_t | z_<=t, x_<t) in nats, zero at padding, shape (batch, time).
        kl: KL of each latent dimension in nats, zero at padding, shape (batch, time, latent).
        mask: True at real steps, shape (batch, time).
        features: What the emission's head reads, shape (batch, time, width); ``None`` if a long pass did not keep it.
        head: The emission's head.
        posterior: q(z_t | x_<=t, z_<t), or ``None`` without a latent.
        prior: p(z_t | x_<t, z_<t), or ``None`` without a latent.
        z: The latents drawn, shape (batch, time, latent).
        state: State after the last real step of each sequence.
        hidden: h_{t-1} of the top layer before each step, shape (batch, time, hidden); ``None`` if a long pass did not
            keep it.
    """

    log_px: Tensor
    kl: Tensor
    mask: Tensor
    features: Tensor | None
    head: Head
    posterior: Factorised | None
    prior: Factorised | None
    z: Tensor
    state: State
    hidden: Tensor | None = None

    @property
    def emission(self) -> Distribution:
        """p(x_t | z_<=t, x_<t), batch shape (batch, time)."""
        assert self.features is not None, "a pass in windows does not keep its emission"
        return cast(Distribution, self.head(self.features))

    @property
    def log_ratio(self) -> Tensor:
        """Log p(z_t | .) - log q(z_t | .) of the latents drawn in nats, zero at padding, shape (batch, time)."""
        if self.prior is None or self.posterior is None:
            return torch.zeros_like(self.log_px)
        return torch.where(self.mask, log_ratio(self.prior, self.posterior, self.z), 0.0)


HELD, FILTERED = 1024, 64  # steps that a pass, or a filter with its many particles, holds without gradient


class _Inferred(NamedTuple):
    """A pass of inference, time first; prior and posterior ``None`` without a latent."""

    steps: InferenceSteps
    mask: Tensor
    features: Tensor
    log_px: Tensor
    kl: Tensor | None
    posterior: Normal | None
    prior: Normal | None


def _score(
    model: VRNN, steps: InferenceSteps, x: Tensor, mask: Tensor, observed: Tensor | None, inputs: Tensor | None
) -> tuple[Tensor, ...]:
    """Score what the loop computed, for all steps at once.

    Args:
        model: The model.
        steps: The latents and states.
        x: Frames, shape (time, rows, features).
        mask: True at real steps, shape (time, rows).
        observed: True at measured values, shape (time, rows, features).
        inputs: Covariates, shape (time, rows, covariates), if the model reads any.

    Returns:
        What the emission's head reads, and log p(x_t | .); with a latent also the KL of each of its dimensions and the
        prior's mean and standard deviation.
    """
    features = steps.emission
    if features is None:
        features = model.emission_features(steps.z_features, steps.h, inputs)
    log_px = torch.where(mask, log_prob(model.decoder.head(features), x, observed), 0.0)
    if steps.posterior is None:
        return features, log_px
    posterior = Normal(*steps.posterior, validate_args=False)
    if steps.prior is None:
        prior = model.prior_dist(steps.h, inputs).base_dist
    else:
        prior = Normal(*steps.prior, validate_args=False)
    kl = torch.where(mask[..., None], kl_divergence(posterior, prior), 0.0)
    return features, log_px, kl, prior.loc, prior.scale


@cache
def _compiled_score() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_score)


def _join(*values: Tensor | None) -> Tensor:
    """Return values side by side, without those that are absent."""
    there = [value for value in values if value is not None]
    return there[0] if len(there) == 1 else torch.cat(there, -1)


def _batch_first(normal: Normal) -> Normal:
    return Normal(normal.loc.transpose(0, 1), normal.scale.transpose(0, 1), validate_args=False)


class Particles(NamedTuple):
    """Weighted trajectories to go on from.

    Args:
        state: Of samples * batch rows; row ``k * batch + i`` is particle k of sequence i.
        log_weights: Normalised, shape (samples, batch).
    """

    state: State
    log_weights: Tensor


class StandardNormal(nn.Module):
    """The prior N(0, I), whatever came before (VRNN-I in Chung et al. 2015).

    Args:
        latent_size: Dimensions of z_t.
    """

    def __init__(self, latent_size: int) -> None:
        super().__init__()
        self.latent_size = latent_size

    def forward(self, features: Tensor) -> Factorised:
        """Return it with the batch shape of the features, shape (..., width)."""
        zeros = features.new_zeros(*features.shape[:-1], self.latent_size)
        return Factorised(Normal(zeros, torch.ones_like(zeros), validate_args=False))


class VRNN(nn.Module):
    r"""A recurrent network with a latent Gaussian at every step.

    .. math::
        \text{prior} \quad & z_t \sim \mathcal N(\mu_{0,t}, \sigma_{0,t}^2), \quad
            [\mu_{0,t}, \sigma_{0,t}] = \varphi_\mathrm{prior}(h_{t-1}) \\
        \text{generation} \quad & x_t \sim p(\varphi_\mathrm{dec}(\varphi_z(z_t), h_{t-1})) \\
        \text{recurrence} \quad & h_t = f(\varphi_x(x_t), \varphi_z(z_t), h_{t-1}) \\
        \text{inference} \quad & z_t \sim \mathcal N(\mu_{z,t}, \sigma_{z,t}^2), \quad
            [\mu_{z,t}, \sigma_{z,t}] = \varphi_\mathrm{enc}(\varphi_x(x_t), h_{t-1})

    The models of the paper: RNN-Gauss and RNN-GMM with ``latent_size=0``, whose likelihood is exact; VRNN-I with
    ``prior=None``; VRNN-Gauss and VRNN-GMM by their emission.

    Args:
        num_features: Width of a frame, D.
        latent_size: Dimensions of z_t; 0 for a plain recurrent network, to which options of the latent do not apply.
        hidden_size: Units of the recurrence.
        layers: Layers of the recurrence; the networks read the top one.
        cell: "gru" or "lstm"; in an LSTM the networks read the output h, not the cell.
        emission: Called with (in_features, num_features), returns the head of p(x_t | ...).
        phi_x: Size of the feature extractor of x_t.
        phi_z: Size of the feature extractor of z_t.
        prior: Size of the prior network; ``None`` for N(0, I) at every step.
        encoder: Size of the inference network.
        decoder: Size of the network before the emission.
        residual_posterior: The encoder's mean is added to the prior's (Res_q in Fraccaro et al. 2016).
        smoothing: The encoder also reads a recurrence that comes back from the sequence's end (Fraccaro et al. 2016,
            arXiv 1605.07571). Generation is the same; of a sequence cut into chunks it sees the chunk.
        dropout: Probability of dropping a unit of phi_x, phi_z or h where networks, or the layer above, read it; the
            same units at every step of a sequence (Gal & Ghahramani 2016, arXiv 1512.05287).
        num_inputs: Covariates per step; every network and the recurrence read them.
        missing: phi_x also reads which values were measured.

    Raises:
        UserError: A size that no network can have.

    >>> model = VRNN(num_features=3, latent_size=2)
    >>> trace = model(SequenceBatch(torch.zeros(4, 7, 3), torch.tensor([7, 7, 5, 1])))
    >>> trace.log_px.shape, trace.kl.shape
    (torch.Size([4, 7]), torch.Size([4, 7, 2]))
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self,
        num_features: int,
        latent_size: int = 16,
        hidden_size: int = 64,
        layers: int = 1,
        cell: Literal["gru", "lstm"] = "gru",
        emission: Callable[[int, int], Head] = Gaussian,
        phi_x: Layers = Layers(),
        phi_z: Layers = Layers(),
        prior: Layers | None = Layers(),
        encoder: Layers = Layers(),
        decoder: Layers = Layers(),
        residual_posterior: bool = False,
        smoothing: bool = False,
        dropout: float = 0.0,
        num_inputs: int = 0,
        missing: bool = False,
    ) -> None:
        super().__init__()
        for option, value, least in (
            ("num_features", num_features, 1),
            ("latent_size", latent_size, 0),
            ("hidden_size", hidden_size, 1),
            ("layers", layers, 1),
            ("num_inputs", num_inputs, 0),
        ):
            if value < least:
                raise UserError(f"{option} {value}: must be at least {least}")
        if cell not in ("gru", "lstm"):
            raise UserError(f"cell {cell!r}: choose 'gru' or 'lstm'")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout {dropout}: must lie in [0, 1)")
        self.num_features = num_features
        self.latent_size = latent_size
        self.hidden_size = hidden_size
        self.residual_posterior = residual_posterior
        self.dropout = dropout
        self.num_inputs = num_inputs
        self.missing = missing
        self.phi_x = MLP(num_features * (2 if missing else 1), phi_x)
        seen = self.phi_x.out_features + num_inputs
        read = hidden_size + num_inputs
        self.phi_z = MLP(latent_size, phi_z) if latent_size else None
        self.prior: Prior | None = None
        if latent_size:
            self.prior = StandardNormal(latent_size) if prior is None else Network(read, prior, Gaussian, latent_size)
        rnn, kind = (nn.GRU, nn.GRUCell) if cell == "gru" else (nn.LSTM, nn.LSTMCell)
        self.backward_rnn = rnn(seen, hidden_size) if smoothing and latent_size else None
        known = seen + (hidden_size if smoothing else 0) + hidden_size
        self.encoder = Network(known, encoder, Gaussian, latent_size) if latent_size else None
        width_z = self.phi_z.out_features if self.phi_z is not None else 0
        self.decoder = Network(width_z + read, decoder, emission, num_features)
        self.cells = nn.ModuleList(kind(hidden_size if i else seen + width_z, hidden_size) for i in range(layers))
        self.checkpoint_every: int | None = None
        """In training keep only the states between windows of so many steps, and infer each window again on the way
        back (Chen et al. 2016, arXiv 1604.06174); ``None`` keeps all. It changes no value: an option of the run."""
        self.compiled = False
        """Score with :func:`torch.compile`: all that is outside the time loop. It, too, is an option of the run."""
        self.register_buffer("input_mean", torch.zeros(num_features))
        self.register_buffer("input_std", torch.ones(num_features))

    @torch.no_grad()
    def start_from(self, mean: Tensor, std: Tensor) -> None:
        """Centre what phi_x reads, and start the emission's bias, from the data's moments, each (features,)."""
        self.input_mean.copy_(mean)
        self.input_std.copy_(torch.where((std > 0) & self.decoder.head.scales_inputs, std, 1.0))
        self.decoder.head.start_from(mean)

    def standardize_input(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return what phi_x reads of frames: standardised values and, if it reads that, which were measured.

        Args:
            x: Frames, shape (..., features).
            counted: True at real, measured values, shape (..., features); others read as the mean. ``None`` for all.
        """
        centred = (x - self.input_mean) / self.input_std
        if counted is not None:
            centred = centred.masked_fill(~counted, 0.0)
        if not self.missing:
            return centred
        return torch.cat([centred, torch.ones_like(centred) if counted is None else counted.to(centred)], -1)

    def extract_x(self, x: Tensor, counted: Tensor | None = None, masks: Masks | None = None) -> Tensor:
        """Return the features of frames, shape (..., width), with their dropout applied.

        Args:
            x: Frames, shape (..., features).
            counted: True at real, measured values, shape (..., features); ``None`` for all.
            masks: Dropout.
        """
        features = self.phi_x(self.standardize_input(x, counted))
        return features if masks is None else features * masks.phi_x

    def extract_z(self, z: Tensor, masks: Masks | None = None) -> Tensor:
        """Return the features of latents, shape (..., width), with their dropout applied.

        Args:
            z: Latents, shape (..., latent).
            masks: Dropout.
        """
        features = z if self.phi_z is None else self.phi_z(z)
        return features if masks is None else features * masks.phi_z

    def prior_dist(self, h: Tensor, inputs: Tensor | None = None) -> Factorised:
        r"""Return the prior :math:`p(z_t \mid x_{<t}, z_{<t})` (Chung et al. 2015, eq. 5).

        Args:
            h: h_{t-1} of the top layer, shape (..., hidden), with its dropout applied.
            inputs: Covariates of step t, shape (..., covariates), if the model reads any.
        """
        if self.prior is None:
            return Factorised(Normal(h[..., :0], h[..., :0], validate_args=False))
        return self.prior(_join(h, inputs))

    def emission_dist(self, z_features: Tensor, h: Tensor, inputs: Tensor | None = None) -> Distribution:
        r"""Return the emission :math:`p(x_t \mid z_{\le t}, x_{<t})` (Chung et al. 2015, eq. 6).

        Args:
            z_features: Features of z_t, shape (..., width), with their dropout applied; of width 0 without a latent.
            h: h_{t-1} of the top layer, shape (..., hidden), with its dropout applied.
            inputs: Covariates of step t, shape (..., covariates), if the model reads any.
        """
        return cast(Distribution, self.decoder.head(self.emission_features(z_features, h, inputs)))

    def emission_features(self, z_features: Tensor | None, h: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return what the head of the emission reads, shape (..., width); arguments as of :meth:`emission_dist`."""
        return cast(Tensor, self.decoder.body(_join(z_features, h, inputs)))

    def next_state(
        self,
        x_features: Tensor,
        z_features: Tensor,
        state: State,
        inputs: Tensor | None = None,
        masks: Masks | None = None,
    ) -> tuple[Tensor, State]:
        r"""Return the recurrence :math:`h_t = f(\varphi_x(x_t), \varphi_z(z_t), h_{t-1})` (Chung et al. 2015, eq. 7).

        Args:
            x_features: Features of x_t, shape (batch, width), with their dropout applied.
            z_features: Features of z_t, shape (batch, width), with their dropout applied; of width 0 without a latent.
            state: State before the step.
            inputs: Covariates of step t, shape (batch, covariates), if the model reads any.
            masks: Dropout of what networks and upper layers read of h.

        Returns:
            h_t of the top layer as the networks read it, shape (batch, hidden), and the state after the step.
        """
        below, hs, cs = _join(x_features, inputs, z_features), [], []
        for layer, cell in enumerate(self.cells):
            if state.c is None:
                h = cell(below, state.h[:, layer])
            else:
                h, c = cell(below, (state.h[:, layer], state.c[:, layer]))
                cs.append(c)
            hs.append(h)
            below = h if masks is None else h * masks.h[:, layer]
        return below, State(torch.stack(hs, 1), torch.stack(cs, 1) if cs else None)

    def posterior_dist(
        self,
        x_features: Tensor,
        h: Tensor,
        prior: Factorised | None = None,
        inputs: Tensor | None = None,
        future: Tensor | None = None,
    ) -> Factorised:
        r"""Return the posterior :math:`q(z_t \mid x_{\le t}, z_{<t})` (Chung et al. 2015, eq. 9).

        Args:
            x_features: Features of x_t, shape (..., width), with their dropout applied.
            h: h_{t-1} of the top layer, shape (..., hidden), with its dropout applied.
            prior: The prior, if it is known, for a residual posterior.
            inputs: Covariates of step t, shape (..., covariates), if the model reads any.
            future: State of the recurrence that reads backwards, shape (..., hidden), for smoothing.
        """
        if self.encoder is None:
            return self.prior_dist(h, inputs)
        posterior = cast(Factorised, self.encoder(_join(x_features, inputs, future, h)))
        if not self.residual_posterior:
            return posterior
        prior = self.prior_dist(h, inputs) if prior is None else prior
        base = posterior.base_dist
        return Factorised(Normal(base.loc + prior.base_dist.loc, base.scale, validate_args=False))

    def describe_step(self, purpose: Purpose) -> str:
        """Return which lines of a step are computed before, inside and after the time loop.

        Args:
            purpose: "infer" for training and evaluation, "filter", "stream" or "generate".
        """
        return str(partition(self, purpose))

    def initial_state(self, batch_size: int) -> State:
        """Return the zero state for ``batch_size`` sequences."""
        zeros = self.input_mean.new_zeros(batch_size, len(self.cells), self.hidden_size)
        return State(zeros, zeros if isinstance(self.cells[0], nn.LSTMCell) else None)

    def _require_state(self, state: State) -> None:
        """Refuse a state that is not of this model."""
        like = self.initial_state(len(state.h))
        for name, given, own in zip("hc", state, like, strict=True):
            if (given is None) != (own is None):
                raise UserError(f"state: {name} is {'missing' if given is None else 'for an LSTM, and the cell a GRU'}")
            if given is not None and own is not None and (given.shape != own.shape or given.dtype != own.dtype):
                found, needed = (f"{tuple(part.shape)} in {part.dtype}" for part in (given, own))
                raise UserError(f"state: {name} of shape {found}, the model's is {needed}")

    def _prune(self) -> None:
        """Make pruned weights of what is trained, as a module's call would: the loops read weights and call nothing."""
        for module in self.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, BasePruningMethod):
                    hook(module, ())

    def draw_masks(self, noise: Noise) -> Masks | None:
        """Draw the dropout of a pass; ``None`` in evaluation, or where the probability is 0."""
        if not self.training or not self.dropout:
            return None
        widths = [self.phi_x.out_features, self.phi_z.out_features if self.phi_z is not None else 0]
        hidden = (len(self.cells), self.hidden_size)
        kept = noise.uniform(sum(widths) + hidden[0] * hidden[1]) >= self.dropout
        scaled = kept.to(self.input_mean) / (1 - self.dropout)
        phi_x, phi_z, h = scaled.split([*widths, hidden[0] * hidden[1]], -1)
        return Masks(phi_x, phi_z, h.unflatten(-1, hidden))

    def _clean(self, batch: SequenceBatch) -> SequenceBatch:
        """Return the batch with zeros wherever it does not count, whatever stood there."""
        if 0 in batch.x.shape[:2]:
            raise UserError("a batch of no sequences or no time steps: pad it to one")
        inputs = None
        if self.num_inputs:
            width = 0 if batch.inputs is None else batch.inputs.shape[-1]
            if batch.inputs is None or width != self.num_inputs:
                raise UserError(
                    f"the batch has {width} covariates (inputs) per step, the model reads {self.num_inputs}"
                )
            inputs = batch.inputs.to(batch.x).masked_fill(~batch.mask[..., None], 0.0)
        return replace(batch, x=batch.x.masked_fill(~batch.counted, 0.0), inputs=inputs)

    def _network_inputs(self, batch: SequenceBatch, masks: Masks | None, future: Tensor | None) -> NetworkInputs:
        """Return what the networks read of a clean batch, time first."""
        x_features = self.extract_x(batch.x.transpose(0, 1), batch.counted.transpose(0, 1), masks)
        return NetworkInputs(x_features, None if batch.inputs is None else batch.inputs.transpose(0, 1), future)

    def _future(self, batch: SequenceBatch, masks: Masks | None) -> Tensor | None:
        """Return what the smoothing posterior knows beforehand, or ``None``.

        It is the states of the recurrence that comes back from each sequence's end, shape (time, batch, hidden).
        """
        if self.backward_rnn is None:
            return None
        x_features, inputs, _ = self._network_inputs(batch, masks, None)
        reads, lengths = _join(x_features, inputs), batch.lengths
        time = torch.arange(len(reads), device=lengths.device)[:, None]
        mirrored = torch.where(time < lengths, lengths - 1 - time, time)
        rows = torch.arange(len(lengths), device=lengths.device)
        kind = reads.device.type
        narrow = kind != "cpu" and torch.is_autocast_enabled(kind)  # few CPUs have a narrow LSTM
        with torch.autocast(kind, enabled=narrow):
            states: Tensor = self.backward_rnn(reads[mirrored, rows].to(self.input_mean))[0]
        return states[mirrored, rows]

    def forward(
        self,
        batch: SequenceBatch,
        noise: Tensor | None = None,
        state: State | None = None,
        masks: Masks | None = None,
        samples: int = 1,
    ) -> Trace:
        """Infer the latents of a batch and score it.

        Args:
            batch: Padded sequences.
            noise: Standard normal noise, shape (samples * batch, time, latent); drawn if not given.
            state: State before the first step, of samples * batch rows; zero if not given.
            masks: Dropout; drawn if not given, in training.
            samples: Latent trajectories per sequence, K. Row ``k * batch + i`` of what is returned is trajectory k of
                sequence i.

        Returns:
            The terms of the bound, step by step. Padding changes nothing, whatever it holds.

        Raises:
            UserError: The batch has no steps, or not the covariates that the model reads.
        """
        batch = self._clean(batch)
        fresh = Noise(batch) if noise is None or (masks is None and self.training and self.dropout) else None
        noise = fresh.over_time(self.latent_size, samples) if noise is None and fresh is not None else noise
        masks = self.draw_masks(fresh) if masks is None and fresh is not None else masks
        state = self.initial_state(samples * len(batch)) if state is None else state
        assert noise is not None
        return self._trace(batch, noise, state, masks, samples, self._future(batch, masks))

    def _infer(
        self,
        batch: SequenceBatch,
        noise: Tensor,
        state: State,
        masks: Masks | None,
        samples: int,
        future: Tensor | None,
        resample: Resample | None = None,
    ) -> _Inferred:
        """Infer the latents of a clean batch."""
        if len(state.h) != samples * len(batch):
            raise UserError(f"a state of {len(state.h)} rows, but {samples} x {len(batch)} trajectories are inferred")
        self._require_state(state)
        self._prune()
        data = self._network_inputs(batch, masks, future)
        lengths = repeat_rows(batch.lengths, samples)
        steps = infer(self, data, noise.transpose(0, 1).contiguous(), state, lengths, masks, samples, resample)
        x, mask = repeat_rows(batch.x, samples).transpose(0, 1), repeat_rows(batch.mask, samples).t()
        observed = None if batch.observed is None else repeat_rows(batch.counted, samples).transpose(0, 1)
        inputs = None if batch.inputs is None else repeat_rows(batch.inputs, samples).transpose(0, 1)
        scored = _compiled_score() if self.compiled else _score
        features, log_px, *of_latent = scored(self, steps, x, mask, observed, inputs)
        if steps.posterior is None:
            return _Inferred(steps, mask, features, log_px, None, None, None)
        kl, mean, std = of_latent
        posterior, prior = (Normal(*moments, validate_args=False) for moments in (steps.posterior, (mean, std)))
        return _Inferred(steps, mask, features, log_px, kl, posterior, prior)

    def _trace(
        self,
        batch: SequenceBatch,
        noise: Tensor,
        state: State,
        masks: Masks | None,
        samples: int,
        future: Tensor | None,
    ) -> Trace:
        steps, mask, features, log_px, kl, posterior, prior = self._infer(batch, noise, state, masks, samples, future)
        features, hidden = features.transpose(0, 1), steps.h.transpose(0, 1)
        z = hidden[..., :0] if steps.z is None else steps.z.transpose(0, 1)
        if kl is None or posterior is None or prior is None:
            return Trace(log_px.t(), z, mask.t(), features, self.decoder.head, None, None, z, steps.state, hidden)
        q, p = (Factorised(_batch_first(normal)) for normal in (posterior, prior))
        return Trace(
            log_px.t(), kl.transpose(0, 1), mask.t(), features, self.decoder.head, q, p, z, steps.state, hidden
        )

    def terms(
        self,
        batch: SequenceBatch,
        noise: Noise,
        of: Callable[[Trace], tuple[Tensor, ...]],
        state: State | None = None,
        masks: Masks | None = None,
        samples: int = 1,
    ) -> tuple[list[Tensor], State]:
        """Return terms of a pass over windows, whose memory :attr:`checkpoint_every` bounds in training.

        Args:
            batch: Padded sequences.
            noise: What to draw from.
            of: Returns what is needed of the trace of a window, each of shape (samples * batch, time, ...).
            state: State before the first step; zero if not given.
            masks: Dropout; ``None`` for none.
            samples: Latent trajectories per sequence.

        Returns:
            The terms of all windows, joined along time, and the state after each sequence's last real step.

        Raises:
            UserError: The batch has no steps, or not the covariates that the model reads.
        """
        batch = self._clean(batch)
        state = self.initial_state(samples * len(batch)) if state is None else state
        future = self._future(batch, masks)
        found: list[tuple[Tensor, ...]] = []
        for first, last, window in self._split(batch, HELD):

            def take(*states: Tensor, first: int = first, last: int = last, window: SequenceBatch = window) -> Any:
                drawn = noise.window(first, last).over_time(self.latent_size, samples)
                ahead = None if future is None else future[first:last]
                trace = self._trace(window, drawn, State(*states), masks, samples, ahead)
                return (*of(trace), *(part for part in trace.state if part is not None))

            parts = self._recomputed(take, *(part for part in state if part is not None))
            count = len(parts) - (1 if state.c is None else 2)
            found.append(parts[:count])
            state = State(*parts[count:])
        return [torch.cat(part, 1) if len(found) > 1 else part[0] for part in zip(*found, strict=True)], state

    def trace(self, batch: SequenceBatch, noise: Noise) -> Trace:
        """Infer the latents of a batch and score it, a window at a time where no gradient asks for more.

        Of sequences longer than a window the trace has no features, and so no emission.

        Args:
            batch: Padded sequences.
            noise: What to draw from.

        Raises:
            UserError: The batch has no steps, or not the covariates that the model reads.
        """
        if torch.is_grad_enabled() or batch.x.shape[1] <= HELD:
            return cast(Trace, self(batch, noise.over_time(self.latent_size)))

        def of(trace: Trace) -> tuple[Tensor, ...]:
            if trace.posterior is None or trace.prior is None:
                return trace.log_px, trace.z
            q, p = trace.posterior.base_dist, trace.prior.base_dist
            return trace.log_px, trace.z, trace.kl, q.loc, q.scale, p.loc, p.scale

        (log_px, z, *latent), state = self.terms(batch, noise, of, masks=self.draw_masks(noise))
        kl, q, p = z, None, None
        if latent:
            kl = latent[0]
            q, p = (Factorised(Normal(latent[i], latent[i + 1], validate_args=False)) for i in (1, 3))
        return Trace(log_px, kl, batch.mask, None, self.decoder.head, q, p, z, state)

    def _split(self, batch: SequenceBatch, held: int) -> Iterator[tuple[int, int, SequenceBatch]]:
        """Yield the windows of a clean batch, with their first step and the one after their last."""
        steps = batch.x.shape[1]
        size = (self.checkpoint_every or steps) if torch.is_grad_enabled() else held
        for first in range(0, steps, size):
            last = min(first + size, steps)
            yield first, last, batch if size >= steps else batch.window(first, last)

    def _recomputed(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """Call a function, and in training perhaps keep nothing of it but its arguments, to call it again."""
        if self.checkpoint_every is None or not torch.is_grad_enabled():
            return function(*tensors)
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)

    def filter(
        self,
        batch: SequenceBatch,
        samples: int,
        resampling: Resampling | None = None,
        noise: Noise | None = None,
        masks: Masks | None = None,
        beta: float = 1.0,
        carried: Particles | None = None,
    ) -> Filtered:
        r"""Bound each sequence's log-likelihood with weighted particles.

        The proposal is the posterior: a particle's weight is multiplied by :math:`p(x_t \mid z_{\le t}, x_{<t})\,
        [p(z_t \mid \cdot) / q(z_t \mid \cdot)]^\beta` at each step. Without gradient no more than a window of steps is
        held.

        Args:
            batch: Padded sequences.
            samples: Particles per sequence, K.
            resampling: When particles are drawn anew; ``None`` never, which is the importance-weighted bound.
            noise: What to draw from; torch's global generator decides if not given.
            masks: Dropout.
            beta: Weight of the latent's part of the increments; 1 for a likelihood.
            carried: Particles to go on from.

        Returns:
            What was found; its states are h, and c of an LSTM, as a :class:`State` has them.

        Raises:
            UserError: The batch has no steps, or not the covariates that the model reads; or the gradient is to account
                for the choice of particles in a pass that is not kept.
        """
        batch = self._clean(batch)
        noise = Noise(batch) if noise is None else noise
        particles = self.new_particles(len(batch), samples) if carried is None else carried
        if resampling is not None and resampling.gradient and self.checkpoint_every and torch.is_grad_enabled():
            raise UserError(
                "objective.resampling_gradient: weighs each choice by all that follows, which loop.checkpoint_every "
                "does not keep; give one of the two"
            )
        future = self._future(batch, masks)
        lengths = batch.lengths
        total = effective_sum = particles.log_weights.new_zeros(len(batch))
        effective = torch.full_like(total, samples)
        for first, last, window in self._split(batch, FILTERED):

            def take(
                log_weights: Tensor,
                *states: Tensor,
                first: int = first,
                last: int = last,
                window: SequenceBatch = window,
            ) -> Any:
                ahead = None if future is None else future[first:last]
                weights = Weights(lengths - first, log_weights.detach(), resampling)
                drawn = noise.window(first, last)
                return self._weigh(window, drawn, State(*states), masks, samples, ahead, weights, log_weights, beta)

            gained, log_weights, sums, effective_now, *states = self._recomputed(
                take, particles.log_weights, *(part for part in particles.state if part is not None)
            )
            total, effective_sum = total + gained, effective_sum + sums
            effective = torch.where(first < lengths, effective_now, effective)
            particles = Particles(State(*states), log_weights)
        states = tuple(part for part in particles.state if part is not None)
        return Filtered(total, effective_sum / lengths.clamp(min=1), effective, particles.log_weights, states)

    def _weigh(
        self,
        batch: SequenceBatch,
        noise: Noise,
        state: State,
        masks: Masks | None,
        samples: int,
        future: Tensor | None,
        weights: Weights,
        log_weights: Tensor,
        beta: float,
    ) -> tuple[Tensor, ...]:
        """Weigh particles through a window.

        Returns:
            Log-likelihood gained, shape (batch,); the last weights, (samples, batch); effective samples, summed over
            the real steps and of the last of them, each (batch,); and the states.
        """
        resampling = weights.resampling
        draws = None
        if resampling is not None and samples > 1 and resampling.threshold > 0:
            draws = noise.uniform_over_time(resampling.draws(samples)).unbind(1)
        observed = None if batch.observed is None else repeat_rows(batch.counted, samples)
        x = repeat_rows(batch.x, samples)
        inputs = None if batch.inputs is None else repeat_rows(batch.inputs, samples)

        def resample(t: int, step: StepView) -> Tensor | None:
            now = None if observed is None else observed[:, t]
            increments = log_prob(self.decoder.head(step.emission), x[:, t], now)
            if step.posterior is not None and self.encoder is not None:
                posterior = Factorised(Normal(*self.encoder.head.moments(step.posterior), validate_args=False))
                if step.prior is None:
                    prior = self.prior_dist(step.h, None if inputs is None else inputs[:, t])
                else:
                    network = cast("Network[Gaussian]", self.prior)
                    prior = Factorised(Normal(*network.head.moments(step.prior), validate_args=False))
                increments = increments + beta * log_ratio(prior, posterior, cast(Tensor, step.z))
            assert draws is not None
            return weights.advance(t, increments.unflatten(0, (samples, -1)), draws[t].t())

        drawn = noise.over_time(self.latent_size, samples)
        found = self._infer(batch, drawn, state, masks, samples, future, None if draws is None else resample)
        increments = found.log_px
        if found.prior is not None and found.posterior is not None:
            ratio = log_ratio(Factorised(found.prior), Factorised(found.posterior), cast(Tensor, found.steps.z))
            increments = increments + beta * torch.where(found.mask, ratio, 0.0)
        increments = increments.unflatten(1, (samples, -1))
        gradient = resampling is not None and resampling.gradient
        gained, last = evidence(increments, log_weights, weights.moves, gradient)
        if draws is None:
            with torch.no_grad():
                path = log_weights + increments.to(log_weights.dtype).cumsum(0)
                each = effective_samples((path - path.logsumexp(1, keepdim=True)).transpose(0, 1))
                sums = torch.where(batch.mask.t(), each, 0.0).sum(0)
                now = each[-1]
        else:
            sums, now = weights.effective_sum, weights.effective
        return gained, last, sums, now, *(part for part in found.steps.state if part is not None)

    def new_particles(self, batch_size: int, samples: int) -> Particles:
        """Return ``samples`` even particles in the zero state for each of ``batch_size`` sequences."""
        state = self.initial_state(samples * batch_size)
        return Particles(state, state.h.new_full((samples, batch_size), -math.log(samples)))

    def generate(
        self,
        steps: int,
        batch_size: int = 1,
        state: State | None = None,
        inputs: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Generated:
        """Draw sequences from the model: each z_t from the prior, each x_t from its emission.

        Args:
            steps: Frames per sequence, T.
            batch_size: Number of sequences, B; ``state`` decides it where given.
            state: State to go on from; zero if not given.
            inputs: Covariates, shape (B, T, num_inputs), for a model that reads them.
            temperature: Of the emission; below 1 for the more likely frames.

        Returns:
            Frames in the model's (scaled) units, shape (B, T, features), with their means, latents and last state.

        Raises:
            UserError: No steps or sequences, or not the covariates that the model reads.
        """
        if steps < 1 or batch_size < 1:
            raise UserError(f"steps {steps}, batch_size {batch_size}: both must be at least 1")
        state = self.initial_state(batch_size) if state is None else state
        self._require_state(state)
        if len(state.h) == 0:
            raise UserError("state: has no rows; give at least one")
        self._prune()
        if self.num_inputs:
            needed = (len(state.h), steps, self.num_inputs)
            if inputs is None or tuple(inputs.shape) != needed:
                given = "none" if inputs is None else f"shape {tuple(inputs.shape)}"
                raise UserError(f"inputs: the model reads covariates of shape {needed}, but got {given}")
        return generate(self, steps, state, inputs if self.num_inputs else None, temperature)

    def stream(
        self,
        batch_size: int = 1,
        samples: int = 1,
        state: State | None = None,
        resampling: Resampling | None = None,
    ) -> Stream:
        """Follow sequences frame by frame: ``stream.step(x)`` returns an estimate of each log p(x_t | x_<t) in nats.

        Args:
            batch_size: Number of sequences, B.
            samples: Particles per sequence, K.
            state: State before the first step, of K * B rows; zero if not given.
            resampling: When particles are drawn anew; ``None`` never.

        Raises:
            UserError: The model smooths, or the state has other rows.

        >>> stream = VRNN(num_features=3).stream(batch_size=2, samples=4)
        >>> stream.step(torch.zeros(2, 3)).shape
        torch.Size([2])
        """
        if batch_size < 1 or samples < 1:
            raise UserError(f"batch_size {batch_size}, samples {samples}: both must be at least 1")
        state = self.initial_state(samples * batch_size) if state is None else state
        if len(state.h) != samples * batch_size:
            raise UserError(f"state: {len(state.h)} rows, not {samples * batch_size} (samples * batch_size)")
        self._require_state(state)
        self._prune()
        return Stream(self, state, samples, self.num_inputs, resampling)
