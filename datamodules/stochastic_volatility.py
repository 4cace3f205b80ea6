"""Stochastic volatility: returns whose spread is a hidden process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._synthetic import Floats, Lengths, SyntheticDataModule, require

__all__ = ["StochasticVolatility"]


class StochasticVolatility(SyntheticDataModule):
    r"""Returns of several assets that share a hidden volatility, drawn from a seed; no files.

    .. math::
        h_t = \varphi h_{t-1} + \eta_t, \quad x_{t,d} = e^{h_t / 2} \varepsilon_{t,d}, \quad
        \eta_t \sim \mathcal N(0, \sigma^2), \quad \varepsilon_{t,d} \sim \mathcal N(0, 1), \quad
        h_1 \sim \mathcal N\big(0, \tfrac{\sigma^2}{1 - \varphi^2}\big)

    (Taylor 1982). The density of the returns has no closed form. The past tells nothing of their sign, and a part of
    their size: with a latent in the place of :math:`h_t`, a Gaussian output is right.

    Args:
        channels: Assets, D.
        steps: Longest sequence.
        persistence: How much of the log-volatility stays, phi, from 0 to 0.999.
        volatility: Standard deviation of what drives it, sigma, at most 2.
        options: The other options of ``SyntheticDataModule``.

    >>> StochasticVolatility(channels=5).num_features
    5
    """

    def __init__(
        self, channels: int = 3, steps: int = 100, *, persistence: float = 0.95, volatility: float = 0.4, **options: Any
    ) -> None:
        super().__init__(num_features=channels, steps=steps, **options)
        require("channels", channels, 1)
        self.persistence = require("persistence", persistence, 0, 0.999)
        self.volatility = require("volatility", volatility, 0, 2)

    def draw(self, lengths: Lengths, random: np.random.Generator) -> Floats:
        drive = self.volatility * random.standard_normal((lengths.max(), len(lengths)))
        drive[0] /= math.sqrt(1 - self.persistence**2)
        level = np.zeros(len(lengths))
        levels = np.stack([level := self.persistence * level + pushed for pushed in drive], 1)
        spread: Floats = np.exp(levels[..., None] / 2)
        return spread * random.standard_normal((*levels.shape, self.num_features))
