"""A hidden Markov chain, whose exact log-likelihood the forward algorithm tells."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from vrnn_lightning.batch import pad
from vrnn_lightning.errors import UserError

from ._synthetic import ExactDataModule, Lengths, require, valid_values

__all__ = ["HiddenMarkov"]


class HiddenMarkov(ExactDataModule):
    r"""A hidden state that stays or jumps, seen by several channels, drawn from a seed; no files.

    .. math::
        p(k_1) = \tfrac1K, \quad
        p(k_t \mid k_{t-1}) = \begin{cases} \kappa & k_t = k_{t-1} \\ (1 - \kappa) / (K - 1) & \text{else} \end{cases},
        \quad u_{k,d} = c \cos 2 \pi \big(\tfrac kK - \tfrac dD\big)

    and each channel, given the state, is Bernoulli with logit :math:`u_{k_t,d}` or Gaussian with that mean and variance
    1. States lie on a circle, and a channel answers most to those that are near to it. Nothing of this depends on the
    seed.

    Given the state, channels are independent; given the past, they are not. So a model with a latent in place of the
    state can come close to :meth:`exact_log_likelihood` with independent outputs, and a network without a latent loses
    at least :attr:`diagonal_loss` nats a step.

    Args:
        emission: "bernoulli" for channels of 0 and 1, "gaussian" for real ones with unit noise.
        states: States, K, at least 2.
        channels: Features per step, D.
        stay: Probability that the state stays, kappa, in (0, 1).
        contrast: How far the state moves a channel's logit or mean, c.
        missing_rate: Probability of each value to be missing, independent of all else, in [0, 1).
        options: The other options of ``SyntheticDataModule``.

    Raises:
        UserError: An option outside its range.
    """

    noun = "chain"

    def __init__(
        self,
        emission: Literal["bernoulli", "gaussian"] = "bernoulli",
        states: int = 4,
        channels: int = 8,
        *,
        stay: float = 0.6,
        contrast: float = 2.0,
        missing_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(channels, **options)
        require("states", states, 2)
        require("channels", channels, 1)
        require("contrast", contrast, 0, 30)
        self.missing_rate = require("missing_rate", missing_rate, 0, below=1)
        if emission not in ("bernoulli", "gaussian"):
            raise UserError(f"--data.emission {emission}: must be bernoulli or gaussian")
        if not 0 < stay < 1:
            raise UserError(f"--data.stay {stay}: must lie in (0, 1)")
        self.emission = emission
        self.likelihood = "mass" if emission == "bernoulli" else "density"
        self.missing = missing_rate > 0
        same = torch.eye(states, dtype=torch.float64)
        self.initial = torch.full((states,), 1 / states, dtype=torch.float64)
        """Probability of each state at the first step, and on average at every other, shape (states,)."""
        self.transition = stay * same + (1 - stay) / (states - 1) * (1 - same)
        """Probability of the next state, shape (states, states): a row for each state that is left."""
        places = torch.arange(states, dtype=torch.float64)[:, None] / states
        turns = places - torch.arange(channels, dtype=torch.float64) / channels
        self.responses = contrast * (2 * math.pi * turns).cos()
        """Logits, or means, of the channels in each state, shape (states, channels)."""

    def draw(self, lengths: Lengths, random: torch.Generator) -> Tensor:
        state = self.initial.multinomial(len(lengths), replacement=True, generator=random)
        path = [state]
        for _ in range(self.steps - 1):
            state = self.transition[state].multinomial(1, generator=random)[:, 0]
            path.append(state)
        response = self.responses[torch.stack(path, 1)]
        if self.emission == "bernoulli":
            return torch.bernoulli(response.sigmoid(), generator=random)
        return response + torch.randn(response.shape, generator=random, dtype=response.dtype)

    def log_density(self, x: Tensor, valid: Tensor) -> Tensor:
        r"""Return log p(x) of the measured values of each sequence in nats, shape (batch,).

        The forward algorithm's: with :math:`\pi_t(k) = p(k_t = k \mid x_{<t})`, which it carries along in logarithms,

        .. math:: \log p(x) = \sum_t \log \sum_k \pi_t(k) \prod_d p(x_{t,d} \mid k)
        """
        return self._forward(x, valid)[0].sum(1)

    @property
    def diagonal_loss(self) -> float:
        r"""What the best predictor with independent outputs and no latent loses, in nats per step.

        It is the mean over all training steps of :math:`\log p(x_t \mid x_{<t}) - \log q_t(x_t)`, where :math:`q_t` has
        independent channels, Bernoulli or Gaussian, with the means (and variances) of :math:`p(x_t \mid x_{<t})`: an
        estimate from the draws, for what is measured of them.
        """
        train = self.split("train")
        batch = pad([train[i] for i in range(len(train))])
        x, valid = valid_values(batch)
        evidence, predicted = self._forward(x, valid)
        weights = predicted.exp()
        factors: Bernoulli | Normal
        if self.emission == "bernoulli":
            factors = Bernoulli(probs=weights @ self.responses.sigmoid())
        else:
            mean = weights @ self.responses
            variance = 1 + weights @ self.responses.square() - mean.square()
            factors = Normal(mean, variance.sqrt())
        alone = factors.log_prob(x).where(valid, 0.0).sum(-1)
        return float((evidence - alone).sum() / batch.lengths.sum())

    def _forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x_t | x_<t), 0 at padding, shape (batch, time), and log p(k_t | x_<t), (batch, time, states)."""
        given = Bernoulli(logits=self.responses) if self.emission == "bernoulli" else Normal(self.responses, 1.0)
        fits = given.log_prob(x[:, :, None]).where(valid[:, :, None], 0.0).sum(-1)
        log_transition = self.transition.log()
        state = self.initial.log().expand(len(x), -1)
        evidence, predicted = [], []
        for fit in fits.unbind(1):
            predicted.append(state)
            joint = state + fit
            evidence.append(joint.logsumexp(-1))
            filtered = joint - evidence[-1][:, None]
            state = (filtered[..., None] + log_transition).logsumexp(1)
        return torch.stack(evidence, 1), torch.stack(predicted, 1)
