"""Noisy sines whose exact log-likelihood is known: the embedded data set."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from vrnn_lightning.batch import SequenceBatch, SequenceSample
from vrnn_lightning.data import Modality, SequenceDataModule, Split
from vrnn_lightning.errors import UserError

from ._synthetic import Redrawn, opening, require, require_sizes

__all__ = ["Sines"]


class Sines(SequenceDataModule):
    r"""Sines of one frequency in several channels under correlated noise, drawn from a seed; no files.

    .. math::
        x_{t,d} = a_d \cos \omega t + b_d \sin \omega t + \varepsilon_{t,d}, \quad
        a_d, b_d \sim \mathcal N(0, \alpha^2), \quad
        \varepsilon_t \sim \mathcal N\big(0, \sigma^2 [(1 - \rho) I + \rho \mathbf 1 \mathbf 1^\top]\big)

    with :math:`\omega` uniform on a grid of ``frequencies`` values in (0, pi / 2). A sequence's density is therefore a
    finite mixture of Gaussians with low-rank-plus-noise covariances, and :meth:`exact_log_likelihood` is what the best
    of all models reaches on average. A network with a diagonal Gaussian output and no latent can't express the
    correlation of the noise: even where it knows frequency and coefficients it loses :attr:`diagonal_loss` nats a step.

    Data units are the model's units: the scaler is the identity.

    Args:
        channels: Features per step, D, at least 3.
        steps: Longest sequence, T.
        min_steps: Shortest sequence; lengths are uniform in between. ``None`` makes all of them ``steps`` long.
        frequencies: Number of frequencies on the grid.
        amplitude: Standard deviation of the coefficients, alpha.
        noise: Standard deviation of the noise, sigma.
        correlation: Correlation of the noise between channels, rho, in [0, 1).
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
        channels: int = 3,
        steps: int = 50,
        min_steps: int | None = None,
        frequencies: int = 8,
        amplitude: float = 1.0,
        noise: float = 0.5,
        correlation: float = 0.9,
        fresh: bool = False,
        train_size: int = 4096,
        val_size: int = 512,
        test_size: int = 512,
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(num_features=channels, batch_size=batch_size, **options)
        require("channels", channels, 3)
        require("frequencies", frequencies, 1)
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        require_sizes(self.sizes, steps, min_steps, channels)
        if frequencies > 1000:
            raise UserError(f"--data.frequencies {frequencies}: must be at most 1000")
        if not 0 <= correlation < 1:
            raise UserError(f"--data.correlation {correlation}: must lie in [0, 1)")
        for option, scale in (("amplitude", amplitude), ("noise", noise)):
            if not 1e-6 <= scale <= 1e6:
                raise UserError(f"--data.{option} {scale}: must lie between 1e-6 and 1e6")
        self.steps = steps
        self.min_steps = steps if min_steps is None else min_steps
        self.amplitude = amplitude
        self.fresh = fresh
        self.omegas = torch.arange(1, frequencies + 1, dtype=torch.float64) * (math.pi / 2 / (frequencies + 1))
        identity = torch.eye(channels, dtype=torch.float64)
        self.noise_covariance = noise**2 * ((1 - correlation) * identity + correlation)
        if torch.linalg.cholesky_ex(self.noise_covariance).info:
            raise UserError(f"--data.correlation {correlation}: too close to 1 to compute with")
        self.diagonal_loss = -0.5 * torch.logdet(self.noise_covariance / noise**2).item()
        """What a diagonal Gaussian loses to the noise's correlation where the rest is known, in nats per step."""

    def sequences(self, split: Split) -> list[SequenceSample]:
        """Draw a split's sequences, each split from a stream of its own."""
        lengths = (self.min_steps, self.steps)
        draw = partial(
            _sines, split, self.sizes[split], lengths, self.seed, self.omegas, self.amplitude, self.noise_covariance
        )
        return Redrawn(draw) if self.fresh and split == "train" else draw(0)

    def exact_log_likelihood(self, batch: SequenceBatch) -> Tensor:
        r"""Return log p(x) of each sequence in nats, shape (batch,).

        Given the frequency, the coefficients c are Gaussian and the sequence is linear in them. With
        :math:`S = I / \alpha^2 + R^{-1} \otimes \Phi \Phi^\top` and :math:`b = R^{-1} X^\top \Phi^\top`, both small
        whatever the length,

        .. math:: \log p(x \mid \omega) = -\tfrac12 \big[T D \log 2\pi + T \log|R| + 2 D \log \alpha^2 + \log|S|
            + \mathrm{tr}(X R^{-1} X^\top) - b^\top S^{-1} b\big]
        """
        batch = batch if batch.x.device.type == "cpu" else SequenceBatch(batch.x.cpu(), batch.lengths.cpu())
        x = batch.x.double() * batch.mask[..., None]
        size, steps, channels = x.shape
        precision = torch.linalg.inv(self.noise_covariance)
        basis = _basis(self.omegas, steps) * batch.mask[:, None, None]  # (batch, frequencies, 2, time)
        gram = basis @ basis.mT
        whitened = x @ precision
        b = (basis @ whitened[:, None]).mT.flatten(2)  # ordered by channel, then cosine and sine
        coupling = torch.einsum("de,bkij->bkdiej", precision, gram).reshape(size, -1, 2 * channels, 2 * channels)
        s = coupling + torch.eye(2 * channels, dtype=x.dtype) / self.amplitude**2
        root = torch.linalg.cholesky(s)
        explained = torch.linalg.solve_triangular(root, b[..., None], upper=False).square().sum((-2, -1))
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 4 * channels * math.log(self.amplitude)
        constant = channels * math.log(2 * math.pi) + torch.logdet(self.noise_covariance).item()
        quadratic = (x * whitened).sum((1, 2))[:, None] - explained
        given_frequency = -0.5 * (batch.lengths[:, None].to(x) * constant + log_det + quadratic)
        density: Tensor = given_frequency.logsumexp(1) - math.log(len(self.omegas))
        return density


def _basis(omega: Tensor, steps: int) -> Tensor:
    """Return cosine and sine, shape (frequencies, 2, steps)."""
    phase = omega[:, None] * torch.arange(steps, dtype=omega.dtype)
    return torch.stack([phase.cos(), phase.sin()], 1)


def _sines(
    split: Split,
    size: int,
    between: tuple[int, int],
    seed: int,
    omegas: Tensor,
    amplitude: float,
    covariance: Tensor,
    epoch: int,
) -> list[SequenceSample]:
    """Draw an epoch's sequences; ``between`` are the shortest and the longest length."""
    lengths, generator = opening(split, size, *between, seed, epoch)
    omega = omegas[torch.randint(len(omegas), (size,), generator=generator)]
    draw = torch.randn(size, len(covariance), 2 + between[1], generator=generator, dtype=torch.float64)
    waves = amplitude * draw[..., :2] @ _basis(omega, between[1])
    noise = torch.linalg.cholesky(covariance) @ draw[..., 2:]
    x = (waves + noise).transpose(1, 2).float()
    return [SequenceSample(x[i, :length], name=f"{split} sine {i}") for i, length in enumerate(lengths)]
