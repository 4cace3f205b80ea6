"""The variational recurrent neural network (Chung et al. 2015, arXiv 1506.02216)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, kl_divergence

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.errors import UserError
from vrnn_lightning.filtering import Filtered, Resampling, particle_filter
from vrnn_lightning.heads import Factorised, Gaussian, Head, Network, log_prob
from vrnn_lightning.nn import MLP, Layers
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import (
    Generated,
    Masks,
    Prior,
    Reads,
    State,
    Stream,
    free_run,
    log_ratio,
    repeat_rows,
    unroll,
)

__all__ = ["VRNN", "StandardNormal", "Trace"]


@dataclass
class Trace:
    """One pass of inference over a batch; every tensor is batch first, with samples * batch rows.

    Args:
        log_px: log p(x_t | z_<=t, x_<t) in nats, zero at padding, shape (batch, time).
        kl: KL of each latent dimension in nats, zero at padding, shape (batch, time, latent).
        mask: True at real steps, shape (batch, time).
        emission: p(x_t | z_<=t, x_<t), batch shape (batch, time).
        posterior: q(z_t | x_<=t, z_<t), or ``None`` without a latent.
        prior: p(z_t | x_<t, z_<t), or ``None`` without a latent.
        z: The latents drawn, shape (batch, time, latent).
        state: State after the last real step of each sequence.
    """

    log_px: Tensor
    kl: Tensor
    mask: Tensor
    emission: Distribution
    posterior: Factorised | None
    prior: Factorised | None
    z: Tensor
    state: State

    @property
    def log_ratio(self) -> Tensor:
        """Log p(z_t | .) - log q(z_t | .) of the latents drawn in nats, zero at padding, shape (batch, time)."""
        if self.prior is None or self.posterior is None:
            return torch.zeros_like(self.log_px)
        return torch.where(self.mask, log_ratio(self.prior, self.posterior, self.z), 0.0)


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
        self.register_buffer("input_mean", torch.zeros(num_features))
        self.register_buffer("input_std", torch.ones(num_features))

    @torch.no_grad()
    def start_from(self, mean: Tensor, std: Tensor) -> None:
        """Centre what phi_x reads, and start the emission's bias, from the data's moments, each (features,)."""
        self.input_mean.copy_(mean)
        self.input_std.copy_(torch.where((std > 0) & self.decoder.head.scales_inputs, std, 1.0))
        self.decoder.head.start_from(mean)

    def look(self, x: Tensor, counted: Tensor) -> Tensor:
        """Return what phi_x reads of frames: centred values, and where it is told, which were measured.

        Args:
            x: Frames, shape (..., features).
            counted: True at real, measured values, shape (..., features); others read as the mean.
        """
        centred = ((x - self.input_mean) / self.input_std).masked_fill(~counted, 0.0)
        return torch.cat([centred, counted.to(centred)], -1) if self.missing else centred

    def initial_state(self, batch_size: int) -> State:
        """Return the zero state for ``batch_size`` sequences."""
        zeros = self.input_mean.new_zeros(batch_size, len(self.cells), self.hidden_size)
        return State(zeros, zeros if isinstance(self.cells[0], nn.LSTMCell) else None)

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
        if batch.x.shape[1] == 0:
            raise UserError("a batch of no time steps: pad it to one")
        inputs = None
        if self.num_inputs:
            width = 0 if batch.inputs is None else batch.inputs.shape[-1]
            if batch.inputs is None or width != self.num_inputs:
                raise UserError(
                    f"the batch has {width} covariates (inputs) per step, the model reads {self.num_inputs}"
                )
            inputs = batch.inputs.to(batch.x).masked_fill(~batch.mask[..., None], 0.0)
        return replace(batch, x=batch.x.masked_fill(~batch.counted, 0.0), inputs=inputs)

    def _reads(self, batch: SequenceBatch, masks: Masks | None) -> Reads:
        """Return what the networks read of a clean batch, time first."""
        phi_x = self.phi_x(self.look(batch.x, batch.counted).transpose(0, 1))
        if masks is not None:
            phi_x = phi_x * masks.phi_x
        inputs = phi_x[..., :0] if batch.inputs is None else batch.inputs.transpose(0, 1)
        cell = phi_x if batch.inputs is None else torch.cat([phi_x, inputs], -1)
        encoder = cell if self.backward_rnn is None else torch.cat([cell, self._future(cell, batch.lengths)], -1)
        return Reads(cell, encoder, inputs)

    def _future(self, reads: Tensor, lengths: Tensor) -> Tensor:
        """Return the states of the recurrence that comes back from each sequence's end, shape (time, batch, hidden)."""
        assert self.backward_rnn is not None
        time = torch.arange(len(reads), device=lengths.device)[:, None]
        mirrored = torch.where(time < lengths, lengths - 1 - time, time)
        rows = torch.arange(len(lengths), device=lengths.device)
        states: Tensor = self.backward_rnn(reads[mirrored, rows])[0]
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

        def spread(x: Tensor) -> Tensor:
            return repeat_rows(x, samples)

        reads = self._reads(batch, masks)
        steps = unroll(
            self, reads, noise.transpose(0, 1).contiguous(), state, spread(batch.lengths), masks, samples
        )
        known = [steps.hidden] if batch.inputs is None else [steps.hidden, spread(batch.inputs).transpose(0, 1)]
        emission = self.decoder(torch.cat([steps.phi_z, *known], -1).transpose(0, 1))
        mask = spread(batch.mask)
        log_px = log_prob(emission, spread(batch.x), None if batch.observed is None else spread(batch.counted))
        log_px = torch.where(mask, log_px, 0.0)
        z = steps.z.transpose(0, 1)
        if self.prior is None:
            return Trace(log_px, z, mask, emission, None, None, z, steps.state)
        mean, std = (part.transpose(0, 1) for part in (steps.mean, steps.std))
        posterior = Factorised(Normal(mean, std, validate_args=False))
        if steps.prior is None:
            prior = self.prior(torch.cat(known, -1).transpose(0, 1))
        else:
            prior = Factorised(Normal(*(part.transpose(0, 1) for part in steps.prior), validate_args=False))
        kl = torch.where(mask[..., None], kl_divergence(posterior.base_dist, prior.base_dist), 0.0)
        return Trace(log_px, kl, mask, emission, posterior, prior, z, steps.state)

    def filter(
        self,
        batch: SequenceBatch,
        samples: int,
        resampling: Resampling | None = None,
        noise: Noise | None = None,
        masks: Masks | None = None,
        beta: float = 1.0,
    ) -> Filtered:
        """Bound each sequence's log-likelihood with weighted particles, without keeping any step's.

        Args:
            batch: Padded sequences.
            samples: Particles per sequence, K.
            resampling: When particles are drawn anew; ``None`` never, which is the importance-weighted bound.
            noise: What to draw from; torch's global generator decides if not given.
            masks: Dropout.
            beta: Weight of the latent's part of the increments; 1 for a likelihood.

        Raises:
            UserError: The batch has no steps, or not the covariates that the model reads.
        """
        batch = self._clean(batch)
        noise = Noise(batch) if noise is None else noise
        states = self.initial_state(samples * len(batch)).layers()
        step = filter_step(self, self._reads(batch, masks), batch, noise, samples, masks, beta)
        return particle_filter(step, states, batch.lengths, samples, batch.x.shape[1], resampling, noise.uniform)

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
        if self.num_inputs:
            needed = (len(state.h), steps, self.num_inputs)
            if inputs is None or tuple(inputs.shape) != needed:
                given = "none" if inputs is None else f"shape {tuple(inputs.shape)}"
                raise UserError(f"inputs: the model reads covariates of shape {needed}, but got {given}")
        return free_run(self, steps, state, inputs if self.num_inputs else None, temperature)

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
        return Stream(self, state, samples, self.num_inputs, resampling)
