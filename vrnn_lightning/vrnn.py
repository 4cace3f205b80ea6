"""The variational recurrent neural network (Chung et al. 2015, arXiv 1506.02216)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, kl_divergence

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.errors import UserError
from vrnn_lightning.heads import Factorised, Gaussian, Head, Network, log_prob
from vrnn_lightning.nn import MLP, Layers
from vrnn_lightning.recurrence import Generated, State, free_run, unroll

__all__ = ["VRNN", "Trace"]


@dataclass
class Trace:
    """One pass of inference over a batch; every tensor is batch first.

    Args:
        log_px: log p(x_t | z_<=t, x_<t) in nats, zero at padding, shape (batch, time).
        kl: KL of each latent dimension in nats, zero at padding, shape (batch, time, latent).
        emission: p(x_t | z_<=t, x_<t), batch shape (batch, time).
        posterior: q(z_t | x_<=t, z_<t), or ``None`` without a latent.
        prior: p(z_t | x_<t, z_<t), or ``None`` without a latent.
        z: The latents drawn, shape (batch, time, latent).
        state: State after the last real step of each sequence.
    """

    log_px: Tensor
    kl: Tensor
    emission: Distribution
    posterior: Factorised | None
    prior: Factorised | None
    z: Tensor
    state: State


class VRNN(nn.Module):
    r"""A recurrent network with a latent Gaussian at every step.

    .. math::
        \text{prior} \quad & z_t \sim \mathcal N(\mu_{0,t}, \sigma_{0,t}^2), \quad
            [\mu_{0,t}, \sigma_{0,t}] = \varphi_\mathrm{prior}(h_{t-1}) \\
        \text{generation} \quad & x_t \sim p(\varphi_\mathrm{dec}(\varphi_z(z_t), h_{t-1})) \\
        \text{recurrence} \quad & h_t = f(\varphi_x(x_t), \varphi_z(z_t), h_{t-1}) \\
        \text{inference} \quad & z_t \sim \mathcal N(\mu_{z,t}, \sigma_{z,t}^2), \quad
            [\mu_{z,t}, \sigma_{z,t}] = \varphi_\mathrm{enc}(\varphi_x(x_t), h_{t-1})

    With ``latent_size=0`` it is the plain recurrent network of the same sizes, whose likelihood is exact.

    Args:
        num_features: Width of a frame, D.
        latent_size: Dimensions of z_t; 0 for a plain recurrent network.
        hidden_size: Units of the recurrence.
        cell: "gru" or "lstm"; in an LSTM the networks read the output h, not the cell.
        emission: Called with (in_features, num_features), returns the head of p(x_t | ...).
        phi_x: Size of the feature extractor of x_t.
        phi_z: Size of the feature extractor of z_t.
        prior: Size of the prior network.
        encoder: Size of the inference network.
        decoder: Size of the network before the emission.

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
        cell: Literal["gru", "lstm"] = "gru",
        emission: Callable[[int, int], Head] = Gaussian,
        phi_x: Layers = Layers(),
        phi_z: Layers = Layers(),
        prior: Layers = Layers(),
        encoder: Layers = Layers(),
        decoder: Layers = Layers(),
    ) -> None:
        super().__init__()
        for option, value, least in (
            ("num_features", num_features, 1),
            ("latent_size", latent_size, 0),
            ("hidden_size", hidden_size, 1),
        ):
            if value < least:
                raise UserError(f"{option} {value}: must be at least {least}")
        if cell not in ("gru", "lstm"):
            raise UserError(f"cell {cell!r}: choose 'gru' or 'lstm'")
        self.num_features = num_features
        self.latent_size = latent_size
        self.hidden_size = hidden_size
        self.phi_x = MLP(num_features, phi_x)
        self.phi_z = MLP(latent_size, phi_z) if latent_size else None
        self.prior = Network(hidden_size, prior, Gaussian, latent_size) if latent_size else None
        encoder_width = self.phi_x.out_features + hidden_size
        self.encoder = Network(encoder_width, encoder, Gaussian, latent_size) if latent_size else None
        latent_width = self.phi_z.out_features if self.phi_z is not None else 0
        self.decoder = Network(latent_width + hidden_size, decoder, emission, num_features)
        rnn: type[nn.GRUCell] | type[nn.LSTMCell] = nn.GRUCell if cell == "gru" else nn.LSTMCell
        self.cell: nn.GRUCell | nn.LSTMCell = rnn(self.phi_x.out_features + latent_width, hidden_size)
        self.register_buffer("input_mean", torch.zeros(num_features))
        self.register_buffer("input_std", torch.ones(num_features))

    @torch.no_grad()
    def start_from(self, mean: Tensor, std: Tensor) -> None:
        """Centre what phi_x reads, and start the emission's bias, from the data's moments, each (features,)."""
        self.input_mean.copy_(mean)
        self.input_std.copy_(torch.where(std > 0, std, 1.0))
        self.decoder.head.start_from(mean)

    def centre(self, x: Tensor) -> Tensor:
        """Return what phi_x reads of frames of shape (..., features)."""
        return (x - self.input_mean) / self.input_std

    def initial_state(self, batch_size: int) -> State:
        """Return the zero state for ``batch_size`` sequences."""
        zeros = self.input_mean.new_zeros(batch_size, self.hidden_size)
        return State(zeros, zeros if isinstance(self.cell, nn.LSTMCell) else None)

    def draw_noise(self, batch: SequenceBatch, generator: torch.Generator | None = None) -> Tensor:
        """Draw the standard normal noise of a pass over a batch, shape (batch, time, latent)."""
        shape = (*batch.x.shape[:2], self.latent_size)
        return torch.randn(shape, generator=generator, dtype=batch.x.dtype, device=batch.x.device)

    def forward(self, batch: SequenceBatch, noise: Tensor | None = None, state: State | None = None) -> Trace:
        """Infer the latents of a batch and score it.

        Args:
            batch: Padded sequences.
            noise: Standard normal noise, shape (batch, time, latent); drawn if not given.
            state: State before the first step; zero if not given.

        Returns:
            The terms of the bound, step by step. Padding changes nothing, whatever it holds.
        """
        if batch.x.shape[1] == 0:
            raise UserError("a batch of no time steps: pad it to one")
        counted, mask = batch.counted, batch.mask
        noise = self.draw_noise(batch) if noise is None else noise
        state = self.initial_state(len(batch)) if state is None else state
        inputs = self.centre(batch.x).masked_fill(~counted, 0.0)
        steps = unroll(self, self.phi_x(inputs.transpose(0, 1)), noise, state, batch.lengths)

        features = [steps.phi_z, steps.hidden] if self.latent_size else [steps.hidden]
        emission = self.decoder(torch.cat(features, -1))
        x = batch.x.masked_fill(~counted, 0.0)
        log_px = log_prob(emission, x, None if batch.observed is None else counted)
        log_px = torch.where(mask, log_px, 0.0)
        if self.prior is None:
            return Trace(log_px, steps.z, emission, None, None, steps.z, steps.state)
        prior = self.prior(steps.hidden)
        posterior = Factorised(Normal(steps.mean, steps.std, validate_args=False))
        kl = torch.where(mask[..., None], kl_divergence(posterior.base_dist, prior.base_dist), 0.0)
        return Trace(log_px, kl, emission, posterior, prior, steps.z, steps.state)

    def generate(self, steps: int, batch_size: int = 1, state: State | None = None) -> Generated:
        """Draw sequences from the model: each z_t from the prior, each x_t from its emission.

        Args:
            steps: Frames per sequence, T.
            batch_size: Number of sequences, B; ``state`` decides it where given.
            state: State to go on from; zero if not given.

        Returns:
            Frames in the model's (scaled) units, shape (B, T, features), with their means, latents and last state.
        """
        if steps < 1 or batch_size < 1:
            raise UserError(f"steps {steps}, batch_size {batch_size}: both must be at least 1")
        return free_run(self, steps, self.initial_state(batch_size) if state is None else state)
