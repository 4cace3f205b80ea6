"""A hidden Markov chain, whose exact log-likelihood the forward algorithm tells."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from vrnn_lightning.batch import SequenceBatch, SequenceSample, pad
from vrnn_lightning.data import Modality, SequenceDataModule, Split
from vrnn_lightning.errors import UserError

from ._synthetic import Redrawn, measured, opening, require, require_sizes

__all__ = ["HiddenMarkov"]


class HiddenMarkov(SequenceDataModule):
    r"""A hidden state that stays or jumps, seen by several channels, drawn from a seed; no files.

    .. math::
        p(k_1) = \tfrac1K, \quad
        p(k_t \mid k_{t-1}) = \begin{cases} \kappa & k_t = k_{t-1} \\ (1 - \kappa) / (K - 1) & \text{else} \end{cases},
        \quad u_{k,d} = c \cos 2 \pi \big(\tfrac kK - \tfrac dD\big)

    and each channel, given the state, is Bernoulli with logit :math:`u_{k_t,d}` or Gaussian with that mean and variance
    1. States lie on a circle, and a channel answers most to those that are near to it. Nothing of this depends on the
    seed.

    Given the state, channels are independent; given the past, they are not, for nobody knows whether the state jumped.
    So a model whose latent takes the place of the state can come close to :meth:`exact_log_likelihood` with independent
    outputs, and a network without a latent loses :attr:`diagonal_loss` nats a step, however well it filters.

    Data units are the model's units: the scaler is the identity.

    Args:
        emission: "bernoulli" for channels of 0 and 1, "gaussian" for real ones with unit noise.
        states: States, K, at least 2.
        channels: Features per step, D.
        steps: Longest sequence, T.
        min_steps: Shortest sequence; lengths are uniform in between. ``None`` makes all of them ``steps`` long.
        stay: Probability that the state stays, kappa, in (0, 1).
        contrast: How far the state moves a channel's logit or mean, c.
        missing_rate: Probability of each value to be missing, independent of all else, in [0, 1).
        fresh: Redraw the training sequences every epoch, in the same lengths.
        train_size: Training sequences.
        val_size: Validation sequences.
        test_size: Test sequences.
        batch_size: Sequences per batch and process.
        options: The other options of :class:`~vrnn_lightning.SequenceDataModule`.

    Raises:
        UserError: An option outside its range.
    """

    modality: ClassVar[Modality] = "series"

    def __init__(
        self,
        emission: Literal["bernoulli", "gaussian"] = "bernoulli",
        states: int = 4,
        channels: int = 8,
        steps: int = 50,
        min_steps: int | None = None,
        stay: float = 0.6,
        contrast: float = 2.0,
        missing_rate: float = 0.0,
        fresh: bool = False,
        train_size: int = 4096,
        val_size: int = 512,
        test_size: int = 512,
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(num_features=channels, batch_size=batch_size, **options)
        require("states", states, 2)
        require("channels", channels, 1)
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        require_sizes(self.sizes, steps, min_steps, channels)
        if emission not in ("bernoulli", "gaussian"):
            raise UserError(f"--data.emission {emission}: must be bernoulli or gaussian")
        if not 0 < stay < 1:
            raise UserError(f"--data.stay {stay}: must lie in (0, 1)")
        if not 0 <= contrast <= 30:
            raise UserError(f"--data.contrast {contrast}: must lie between 0 and 30")
        if not 0 <= missing_rate < 1:
            raise UserError(f"--data.missing_rate {missing_rate}: must lie in [0, 1)")
        self.emission = emission
        self.steps = steps
        self.min_steps = steps if min_steps is None else min_steps
        self.fresh = fresh
        self.missing_rate = missing_rate
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

    def sequences(self, split: Split) -> list[SequenceSample]:
        """Draw a split's sequences, each split from a stream of its own."""
        lengths = (self.min_steps, self.steps)
        chain = (self.initial, self.transition, self.responses)
        draw = partial(
            _chains,
            split,
            self.sizes[split],
            lengths,
            self.seed,
            chain,
            self.emission == "bernoulli",
            self.missing_rate,
        )
        return Redrawn(draw) if self.fresh and split == "train" else draw(0)

    def exact_log_likelihood(self, batch: SequenceBatch) -> Tensor:
        r"""Return log p(x) of the measured values of each sequence in nats, shape (batch,), on the CPU in float64.

        The forward algorithm's: with :math:`\pi_t(k) = p(k_t = k \mid x_{<t})`, which it carries along in logarithms,

        .. math:: \log p(x) = \sum_t \log \sum_k \pi_t(k) \prod_d p(x_{t,d} \mid k)
        """
        return self._forward(batch)[0].sum(1)

    @property
    def diagonal_loss(self) -> float:
        r"""What the best predictor with independent outputs and no latent loses, in nats per step.

        It is the mean over all training steps of :math:`\log p(x_t \mid x_{<t}) - \log q_t(x_t)`, where :math:`q_t` has
        independent channels, Bernoulli or Gaussian, with the means (and variances) of :math:`p(x_t \mid x_{<t})`: an
        estimate from the draws, for what is measured of them.
        """
        train = self.split("train")
        batch = pad([train[i] for i in range(len(train))])
        evidence, predicted = self._forward(batch)
        weights = predicted.exp()
        factors: Bernoulli | Normal
        if self.emission == "bernoulli":
            factors = Bernoulli(probs=weights @ self.responses.sigmoid())
        else:
            mean = weights @ self.responses
            variance = 1 + weights @ self.responses.square() - mean.square()
            factors = Normal(mean, variance.sqrt())
        alone = factors.log_prob(batch.x.double().where(batch.valid_mask, 0.0)).where(batch.valid_mask, 0.0).sum(-1)
        return float((evidence - alone).sum() / batch.lengths.sum())

    def _forward(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Return log p(x_t | x_<t), 0 at padding, shape (batch, time), and log p(k_t | x_<t), (batch, time, states)."""
        valid = batch.valid_mask.cpu()
        x = batch.x.detach().cpu().double().where(valid, 0.0)
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


def _chains(
    split: Split,
    size: int,
    between: tuple[int, int],
    seed: int,
    chain: tuple[Tensor, Tensor, Tensor],
    binary: bool,
    missing_rate: float,
    epoch: int,
) -> list[SequenceSample]:
    """Draw an epoch's sequences.

    Args:
        split: Of which split.
        size: How many.
        between: The shortest and the longest length.
        seed: The data's.
        chain: Probabilities of the first state and of the next, and the channels' responses.
        binary: Channels of 0 and 1.
        missing_rate: Probability of each value to be missing.
        epoch: When.
    """
    initial, transition, responses = chain
    lengths, generator = opening(split, size, *between, seed, epoch)
    state = initial.multinomial(size, replacement=True, generator=generator)
    path = [state]
    for _ in range(between[1] - 1):
        state = transition[state].multinomial(1, generator=generator)[:, 0]
        path.append(state)
    response = responses[torch.stack(path, 1)]
    if binary:
        x = torch.bernoulli(response.sigmoid(), generator=generator)
    else:
        x = response + torch.randn(response.shape, generator=generator, dtype=response.dtype)
    return measured(f"{split} chain", x, lengths, missing_rate, generator)
