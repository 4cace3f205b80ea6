"""A linear-Gaussian state-space model, whose exact log-likelihood the Kalman filter tells."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vrnn_lightning.errors import UserError

from ._synthetic import ExactDataModule, Lengths, require

__all__ = ["LinearGaussian"]


class LinearGaussian(ExactDataModule):
    r"""Noisy views of damped rotations that are driven by noise, drawn from a seed; no files.

    .. math::
        s_t = A s_{t-1} + w_t, \quad x_t = C s_t + v_t, \quad
        w_t \sim \mathcal N(0, q^2 I), \quad v_t \sim \mathcal N(0, r^2 I), \quad
        s_1 \sim \mathcal N\big(0, \tfrac{q^2}{1 - \rho^2} I\big)

    :math:`A` is :math:`\rho` times a rotation: each pair of states turns by an angle of its own between 0 and pi / 2,
    and an odd last state only decays. So :math:`A A^\top = \rho^2 I`, and the state's distribution is stationary from
    the first step on. Each channel, a row of :math:`C`, sees every pair from a direction of its own. Nothing of this
    depends on the seed.

    Given the state, channels are independent; given the past, they are not, as the new :math:`w_t` moves them together.
    So a model with a latent in place of the state can reach :meth:`exact_log_likelihood` with a diagonal Gaussian
    output, and a network without a latent loses at least :attr:`diagonal_loss` nats a step.

    Args:
        state_size: States, S.
        channels: Features per step, D, at least 2.
        memory: Spectral radius of A, rho, in [0, 1).
        state_noise: Standard deviation of the state's noise, q.
        observation_noise: Standard deviation of the channels' noise, r.
        loading: Norm of each row of C.
        missing_rate: Probability of each value to be missing, independent of all else, in [0, 1).
        options: The other options of ``SyntheticDataModule``.

    Raises:
        UserError: An option outside its range.
    """

    noun = "path"

    def __init__(
        self,
        state_size: int = 2,
        channels: int = 4,
        *,
        memory: float = 0.9,
        state_noise: float = 0.5,
        observation_noise: float = 0.3,
        loading: float = 1.0,
        missing_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(channels, **options)
        require("state_size", state_size, 1)
        require("channels", channels, 2)
        require("memory", memory, 0, below=1)
        self.missing_rate = require("missing_rate", missing_rate, 0, below=1)
        require("state_noise", state_noise, 1e-3, 1e3)
        require("observation_noise", observation_noise, 1e-3, 1e3)
        require("loading", loading, 1e-3, 1e3)
        spread = loading**2 * state_noise**2 / (1 - memory**2)
        if channels * spread > 1e10 * observation_noise**2:
            raise UserError(
                f"--data.observation_noise {observation_noise}: too small beside the state, which spreads a "
                f"channel by {spread**0.5:.3g}. Fix: raise it or lower --data.state_noise"
            )
        self.missing = missing_rate > 0
        state = torch.eye(state_size, dtype=torch.float64)
        self.transition = memory * _rotations(state_size)
        """A, shape (states, states)."""
        self.observation = loading * _directions(channels, state_size)
        """C, shape (channels, states)."""
        self.state_covariance = state_noise**2 * state
        """Q, covariance of the state's noise, shape (states, states)."""
        self.observation_covariance = observation_noise**2 * torch.eye(channels, dtype=torch.float64)
        """R, covariance of the channels' noise, shape (channels, channels), diagonal."""
        self.initial_covariance = self.state_covariance / (1 - memory**2)
        """Covariance of the first state and of every later one, shape (states, states)."""

    def draw(self, lengths: Lengths, random: torch.Generator) -> Tensor:
        first_root, state_root = (torch.linalg.cholesky(c) for c in (self.initial_covariance, self.state_covariance))
        channels, states = self.observation.shape
        noise = torch.randn(len(lengths), self.steps, states + channels, generator=random, dtype=torch.float64)
        driving, measuring = noise.split([states, channels], -1)
        state = driving[:, 0] @ first_root.mT
        path = [state]
        for w in (driving @ state_root.mT).unbind(1)[1:]:
            state = state @ self.transition.mT + w
            path.append(state)
        x: Tensor = torch.stack(path, 1) @ self.observation.mT + measuring @ self.observation_covariance.sqrt()
        return x

    def log_density(self, x: Tensor, valid: Tensor) -> Tensor:
        r"""Return log p(x) of the measured values of each sequence in nats, shape (batch,).

        The Kalman filter's: with :math:`m_t, P_t` the mean and covariance of :math:`s_t` given :math:`x_{<t}`,

        .. math:: \log p(x) = \sum_t \log \mathcal N(x_t; C m_t, C P_t C^\top + R)

        A row of :math:`C` whose value is missing counts as 0: the value is then noise, independent of all others.
        """
        size, states = len(x), len(self.transition)
        mean = x.new_zeros(size, states, 1)
        covariance = self.initial_covariance.expand(size, -1, -1)
        identity = torch.eye(states, dtype=x.dtype)
        log_p = x.new_zeros(size)
        for value, seen in zip(x.unbind(1), valid.unbind(1), strict=True):
            c = self.observation * seen[..., None]
            root = torch.linalg.cholesky(c @ covariance @ c.mT + self.observation_covariance)
            surprise = (value[..., None] - c @ mean) * seen[..., None]
            whitened = torch.linalg.solve_triangular(root, surprise, upper=False)[..., 0]
            spread = root.diagonal(dim1=-2, dim2=-1).log()
            densities = -0.5 * whitened.square() - spread - 0.5 * math.log(2 * math.pi)
            log_p = log_p + densities.where(seen, 0.0).sum(-1)
            gain = torch.cholesky_solve(c @ covariance, root).mT
            kept = identity - gain @ c
            mean = self.transition @ (mean + gain @ surprise)
            covariance = kept @ covariance @ kept.mT + gain @ self.observation_covariance @ gain.mT
            covariance = self.transition @ covariance @ self.transition.mT + self.state_covariance
        return log_p

    def predictive_covariances(self) -> Tensor:
        """Return the covariance of x_t given the complete past, for each step, shape (steps, channels, channels)."""
        c, covariance, predictive = self.observation, self.initial_covariance, []
        for _ in range(self.steps):
            predictive.append(c @ covariance @ c.mT + self.observation_covariance)
            seen = covariance - covariance @ c.mT @ torch.linalg.solve(predictive[-1], c @ covariance)
            covariance = self.transition @ seen @ self.transition.mT + self.state_covariance
        return torch.stack(predictive)

    @property
    def diagonal_loss(self) -> float | None:
        r"""What the best predictor with a diagonal Gaussian output and no latent loses, in nats per step.

        With :math:`S_t` the :meth:`predictive_covariances`, it is the mean of
        :math:`\tfrac12 \big(\sum_i \log S_{t,ii} - \log|S_t|\big)`, exact over the steps of sequences of all lengths
        that may occur. ``None`` where values are missing, for which there is no closed form.
        """
        if self.missing:
            return None
        s = self.predictive_covariances()
        loss = 0.5 * (s.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(s))
        lengths = torch.arange(self.min_steps, self.steps + 1)
        reached = (lengths[:, None] > torch.arange(self.steps)).sum(0).to(loss)
        return float((loss * reached).sum() / reached.sum())


def _rotations(size: int) -> Tensor:
    """Return an orthogonal matrix of shape (size, size): rotations of pairs, and 1 for an odd last one."""
    pairs = size // 2
    angles = torch.arange(1, pairs + 1, dtype=torch.float64) * (math.pi / 2 / (pairs + 1))
    cos, sin = angles.cos(), angles.sin()
    blocks = torch.stack([cos, -sin, sin, cos], -1).view(pairs, 2, 2)
    matrix: Tensor = torch.block_diag(*blocks, *torch.ones(size % 2, 1, 1, dtype=torch.float64))
    return matrix


def _directions(channels: int, states: int) -> Tensor:
    """Return rows of norm 1, shape (channels, states): over all of them the k-th pair turns k half circles."""
    turn = torch.arange(channels, dtype=torch.float64)[:, None] * (math.pi / channels)
    pair = torch.arange(1, states // 2 + 1)
    alone = torch.ones(channels, states % 2, dtype=torch.float64)
    pairs = torch.stack([(turn * pair).cos(), (turn * pair).sin()], -1).flatten(1)
    rows = torch.cat([pairs, alone], 1)
    return rows / math.sqrt(len(pair) + states % 2)
