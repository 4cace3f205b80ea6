"""Figures as totals over totals: exact for ragged batches and several processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["ActiveUnits", "Bound", "DrawScores", "Estimate", "below", "detection", "seasonal_naive"]


WIDE = torch.float32 if torch.backends.mps.is_available() else torch.float64  # Apple GPUs have no float64


class _Totals(Metric):
    """Sums over all sequences and processes, in float64 wherever the machine has it.

    Args:
        shape: Shape of each sum.
    """

    full_state_update = False
    names: ClassVar[tuple[str, ...]]

    def __init__(self, *shape: int) -> None:
        super().__init__()
        for name in self.names:
            self.add_state(name, torch.zeros(shape, dtype=WIDE), dist_reduce_fx="sum")
        self.set_dtype(WIDE)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...

    def add(self, **values: Tensor | int) -> None:
        """Add to the sums by name."""
        for name, value in values.items():
            setattr(self, name, getattr(self, name) + value)


class Bound(_Totals):
    """The ELBO and its split, in nats per time step and per sequence, and in bits per dimension.

    ``compute`` returns, with every total taken over all sequences and processes,

    ``elbo``, ``reconstruction``, ``kl``
        nats per time step: total / number of real steps; elbo = reconstruction - kl.
    ``elbo_per_sequence``, ``reconstruction_per_sequence``, ``kl_per_sequence``
        nats per sequence: total / number of sequences.
    ``bits_per_dim``
        minus the ELBO in data units / (number of measured values * ln 2).
    ``exact_log_likelihood``, ``gap``
        nats per time step, where the data know their own; gap = exact - elbo.
    """

    names = ("reconstruction", "kl", "steps", "sequences", "values", "log_scale", "exact", "exact_batches")

    def update(
        self,
        log_px: Tensor,
        kl: Tensor,
        lengths: Tensor,
        values: Tensor,
        log_scale: Tensor,
        exact: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            log_px: Nats, zero at padding, shape (batch, time).
            kl: Nats, zero at padding, shape (batch, time, latent).
            lengths: Real steps of each sequence, shape (batch,). A sequence of no steps does not count.
            values: Number of measured values, shape ().
            log_scale: Sum over the measured values of the log of the scaler's std, shape ().
            exact: True log-likelihood of each sequence in scaled units, shape (batch,), where it is known.
        """
        self.add(
            reconstruction=log_px.detach().to(WIDE).sum(),
            kl=kl.detach().to(WIDE).sum(),
            steps=lengths.sum(),
            sequences=(lengths > 0).sum(),
            values=values,
            log_scale=log_scale.detach().to(WIDE),
        )
        if exact is not None:
            self.add(exact=exact.to(self.exact).sum(), exact_batches=1)

    def compute(self) -> dict[str, Tensor]:
        """Return the figures by name."""
        totals = {"elbo": self.reconstruction - self.kl, "reconstruction": self.reconstruction, "kl": self.kl}
        figures = {name: total / self.steps for name, total in totals.items()}
        figures |= {f"{name}_per_sequence": total / self.sequences for name, total in totals.items()}
        figures["bits_per_dim"] = (self.log_scale - totals["elbo"]) / (self.values * math.log(2))
        if self.exact_batches:
            figures["exact_log_likelihood"] = self.exact / self.steps
            figures["gap"] = (self.exact - totals["elbo"]) / self.steps
        return figures


class ActiveUnits(_Totals):
    """Latent dimensions in use: those whose posterior mean varies over all real steps by more than a threshold.

    Follows Burda et al. 2016 (arXiv 1509.00519, sec. 5.2): the variance of E_q[z] over the data above 0.01.

    Args:
        latent_size: Number of latent dimensions.
        threshold: Variance above which a dimension counts as in use.
    """

    names = ("count", "sums", "squares")

    def __init__(self, latent_size: int, threshold: float = 0.01) -> None:
        super().__init__(latent_size)
        self.threshold = threshold

    def update(self, mean: Tensor, mask: Tensor) -> None:
        """Add posterior means, shape (batch, time, latent), at the real steps, mask of shape (batch, time)."""
        real = mean.detach().to(WIDE) * mask[..., None]
        self.add(count=mask.sum(), sums=real.sum((0, 1)), squares=real.square().sum((0, 1)))

    def compute(self) -> Tensor:
        """Return the number of active units."""
        variance = self.squares / self.count - (self.sums / self.count).square()
        return (variance > self.threshold).sum()


def detection(nats: Tensor, faulty: Tensor, threshold: float) -> dict[str, Tensor]:
    """Return ``precision``, ``recall`` and ``AUROC`` of steps that are known to be faulty, those that are defined.

    The AUROC is the chance that a faulty step scores below another, where ties count half.

    Args:
        nats: Log-likelihood of each step, shape (steps,).
        faulty: True at faulty steps, shape (steps,).
        threshold: Steps below it are flagged, and those whose log-likelihood is not a number.

    >>> figures = detection(torch.tensor([-9.0, -1.0, -2.0]), torch.tensor([True, False, True]), threshold=-1.5)
    >>> {name: round(value.item(), 3) for name, value in figures.items()}
    {'precision': 1.0, 'recall': 1.0, 'AUROC': 1.0}
    """
    nats, flagged = torch.where(nats.isnan(), -math.inf, nats.to(WIDE)), below(nats, threshold)
    hits, bad, good = (faulty & flagged).sum(), faulty.sum(), (~faulty).sum()
    figures = {}
    if flagged.any():
        figures["precision"] = hits / flagged.sum()
    if bad:
        figures["recall"] = hits / bad
    if bad and good:
        _, place, ties = (-nats).unique(return_inverse=True, return_counts=True)
        ranks = (ties.cumsum(0) - (ties - 1) / 2)[place].to(WIDE)  # of ties, their mean
        figures["AUROC"] = (ranks[faulty].sum() - bad * (bad + 1) / 2) / (bad * good)
    return figures


def below(nats: Tensor, threshold: float) -> Tensor:
    """Return True where a log-likelihood is below a threshold or not a number, as it is for values too large."""
    return ~(nats >= threshold)


class DrawScores(_Totals):
    r"""Scores of draws, given the true values; in data units, totals over all values.

    ``RMSE``
        root mean square error of the draws' mean.
    ``CRPS``
        continuous ranked probability score :math:`E|X - y| - \tfrac12 E|X - X'|`, its unbiased estimate from the draws
        (Gneiting and Raftery 2007); the absolute error of a single draw.
    ``wQL``
        weighted quantile loss: twice the pinball losses of the quantiles 0.1, …, 0.9, averaged over them, over the sum
        of :math:`|y|`.
    ``coverage``, ``coverage_50``
        share of the values in the central 90 % and 50 % interval of several draws.
    ``MASE``
        absolute error of the median over that of a naive forecast within the past (Hyndman and Koehler 2006), mean
        over sequences and features; where a past is known.

    >>> draws = DrawScores()
    >>> draws.update(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[2.0]]))
    >>> {name: round(value.item(), 3) for name, value in draws.compute().items()}
    {'RMSE': 0.0, 'CRPS': 0.0, 'wQL': 0.089, 'coverage': 1.0, 'coverage_50': 1.0}
    """

    names = ("scaled", "series")
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(_SUMS), 0, dtype=WIDE), dist_reduce_fx="sum")

    def update(self, draws: Tensor, truth: Tensor, scale: Tensor | None = None) -> None:
        """Add a sequence.

        Args:
            draws: Shape (samples, time, features).
            truth: NaN where it is not known, shape (time, features).
            scale: Absolute error of a naive forecast within the past, NaN where it is not known, shape (features,).
        """
        known = truth.isfinite()
        if not known.any():
            return
        x, y = draws.detach().to(WIDE)[:, known], truth.to(WIDE)[known]
        count = len(x)
        ordered = x.sort(0).values
        levels = torch.arange(1, 10, device=x.device, dtype=WIDE) / 10
        excess = y - _quantiles(ordered, levels)
        ranks = 2 * torch.arange(1, count + 1, device=x.device, dtype=WIDE) - count - 1
        spread = (ranks[:, None] * ordered).sum(0) / max(1, count * (count - 1))
        parts = {
            "values": torch.ones_like(y),
            "squares": (x.mean(0) - y).square(),
            "crps": (x - y).abs().mean(0) - spread,
            "pinball": 2 * torch.maximum(levels[:, None] * excess, (levels[:, None] - 1) * excess).mean(0),
            "size": y.abs(),
        }
        if count > 1:
            q05, q25, q75, q95 = _quantiles(ordered, torch.tensor([0.05, 0.25, 0.75, 0.95]).to(x))
            parts["intervals"] = torch.ones_like(y)
            parts["inside"] = ((q05 <= y) & (y <= q95)).to(WIDE)
            parts["inside_50"] = ((q25 <= y) & (y <= q75)).to(WIDE)
        self.grow(len(truth))
        steps = known.nonzero()[:, 0]
        for row, name in enumerate(_SUMS):
            if name in parts:
                self.sums[row].index_add_(0, steps, parts[name])
        if scale is not None:
            median = torch.full_like(truth, torch.nan, dtype=WIDE)
            median[known] = _quantiles(ordered, torch.tensor([0.5]).to(x))[0]
            error = (median - truth).abs().nanmean(0) / scale
            self.add(scaled=error[error.isfinite()].sum(), series=error.isfinite().sum())

    def grow(self, steps: int) -> None:
        """Make room for so many steps; all processes need room for the same number before :meth:`compute`."""
        more = steps - self.steps
        self.sums = torch.nn.functional.pad(self.sums, (0, more)) if more > 0 else self.sums.clone()

    @property
    def steps(self) -> int:
        """Length of the longest sequence so far."""
        return self.sums.shape[1]

    def compute(self) -> dict[str, Tensor]:
        """Return the figures by name; none before the first value."""
        total = dict(zip(_SUMS, self.sums.sum(1), strict=True))
        if not total["values"]:
            return {}
        figures = _ratios(total)
        if not total["size"]:
            del figures["wQL"]
        if not total["intervals"]:
            del figures["coverage"], figures["coverage_50"]
        if self.series:
            figures["MASE"] = self.scaled / self.series
        return figures

    def by_step(self) -> dict[str, Tensor]:
        """Return ``values``, the number of known values, and all figures but the MASE at each step, shape (steps,).

        The steps of forecasts are lead times. A figure is NaN where no value is known.
        """
        with self.sync_context():
            total = dict(zip(_SUMS, self.sums, strict=True))
            return {"values": total["values"], **_ratios(total)}


_SUMS = ("values", "squares", "crps", "pinball", "size", "intervals", "inside", "inside_50")


def _ratios(total: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "RMSE": (total["squares"] / total["values"]).sqrt(),
        "CRPS": total["crps"] / total["values"],
        "wQL": total["pinball"] / total["size"],
        "coverage": total["inside"] / total["intervals"],
        "coverage_50": total["inside_50"] / total["intervals"],
    }


def _quantiles(ordered: Tensor, levels: Tensor) -> Tensor:
    """Return quantiles, shape (levels, ...), of sorted draws, shape (samples, ...), interpolated linearly."""
    places = levels * (len(ordered) - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], (places - below).view(-1, *[1] * (ordered.ndim - 1)))


def seasonal_naive(past: Tensor, steps: int, season: int = 1) -> tuple[Tensor, Tensor]:
    """Return the forecast that repeats the last season, and its mean absolute error within the past.

    A value that is missing in the last season is taken from the last one that has it.

    Args:
        past: NaN where a value is missing, shape (time, features).
        steps: Length of the forecast.
        season: Steps of a season.

    Returns:
        The forecast, shape (steps, features), and the error, shape (features,), which scales a MASE; NaN where the past
        is too short.

    >>> forecast, error = seasonal_naive(torch.tensor([[1.0], [5.0], [2.0], [7.0]]), steps=3, season=2)
    >>> forecast.ravel().tolist(), error.tolist()
    ([2.0, 7.0, 2.0], [1.5])
    """
    length, width = past.shape
    if length < season:
        return past.new_full((steps, width), torch.nan), past.new_full((width,), torch.nan)
    padding = past.new_full((-length % season, width), torch.nan)
    seasons = torch.cat([padding, past]).view(-1, season, width)
    order = torch.arange(len(seasons), device=past.device)[:, None, None]
    latest = torch.where(seasons.isnan(), 0, order).amax(0, keepdim=True)
    last = seasons.gather(0, latest)[0]
    return last[torch.arange(steps, device=past.device) % season], (past[season:] - past[:-season]).abs().nanmean(0)


class Estimate(_Totals):
    r"""The mean of a quantity of each sequence, per time step and per sequence, with standard errors.

    Per step it is the ratio of totals :math:`r = \sum_i x_i / \sum_i n_i`, whose standard error over sequences is
    :math:`\sqrt{\tfrac{N}{N-1} \sum_i (x_i - r n_i)^2} \,/ \sum_i n_i` (the ratio estimator of sampling theory).

    >>> estimate = Estimate()
    >>> estimate.update(torch.tensor([-2.0, -8.0]), torch.tensor([1, 2]))
    >>> {name: round(value.item(), 3) for name, value in estimate.compute().items()}
    {'': -3.333, '_stderr': 0.889, '_per_sequence': -5.0, '_per_sequence_stderr': 3.0}
    """

    names = ("sequences", "steps", "total", "squares", "products", "steps_squared")

    def update(self, values: Tensor, lengths: Tensor) -> None:
        """Add sequences.

        Args:
            values: The quantity of each sequence, shape (batch,).
            lengths: Real steps of each sequence, shape (batch,). A sequence of no steps does not count.
        """
        real = lengths > 0
        x, n = values.detach().to(WIDE)[real], lengths.to(WIDE)[real]
        self.add(sequences=len(x), steps=n.sum(), total=x.sum(), squares=x.square().sum())
        self.add(products=(x * n).sum(), steps_squared=n.square().sum())

    def compute(self) -> dict[str, Tensor]:
        """Return the figures by the ending of their names; a single sequence has no standard error."""
        count, steps, total = self.sequences, self.steps, self.total
        ratio, mean = total / steps, total / count
        about_ratio = self.squares - 2 * ratio * self.products + ratio.square() * self.steps_squared
        about_mean = self.squares - count * mean.square()
        figures = {
            "": ratio,
            "_stderr": (about_ratio.clamp(min=0) * count / (count - 1)).sqrt() / steps,
            "_per_sequence": mean,
            "_per_sequence_stderr": (about_mean.clamp(min=0) / (count - 1) / count).sqrt(),
        }
        return figures if count > 1 else {name: v for name, v in figures.items() if not name.endswith("stderr")}
