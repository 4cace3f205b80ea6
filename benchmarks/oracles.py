"""Compare imputing and streaming with the exact smoother and filter of a linear-Gaussian state-space model.

    python benchmarks/oracles.py
    python benchmarks/oracles.py runs/lineargaussian/version_0/checkpoints/best.ckpt

Prints a markdown table of a VRNN whose weights make it the state-space model, so that all that is left of its errors is
of its particles, and of a checkpoint that ``lightning fit -c configs/exact.yaml`` trained. "exact" are as many draws
from the exact distribution itself. What is imputed are two gaps of five steps, given what lies on both sides; what is
predicted is each step, given all before it.

"error" is the root mean square of (mean of the draws - exact mean) / exact std, "spread" the mean of (std of the draws
/ exact std), "50 %" and "90 %" the share of the true values within these central intervals of their draws, "PIT" the
largest distance between the true values' ranks among their draws, in order, and those of a uniform distribution.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor
from vrnn_lightning.datamodules.linear_gaussian import LinearGaussian

from vrnn_lightning import MLPConfig, VRNNLightningModule
from vrnn_lightning.batch import SequenceSample, pad

TINY = 1e-4
"""Size of the state's units within the GRU, whose tanh is a line there, to a millionth of a percent."""
GAPS = (slice(15, 20), slice(30, 35))


@dataclass(frozen=True)
class Exact:
    r"""All of :math:`x_1, \dots, x_T` as one Gaussian with mean 0, for conditioning without a filter's recursions.

    .. math:: s_t = A s_{t-1} + w_t, \quad x_t = C s_t + v_t

    Args:
        root: Cholesky factor of the covariance of all values, step after step, shape (T * D, T * D).
        width: D.
    """

    root: Tensor
    width: int

    @classmethod
    def of(cls, data: LinearGaussian, steps: int, first: Tensor) -> Exact:
        """Lay out a system whose first state has the covariance ``first``."""
        a, c = data.transition, data.observation
        spread, rows = first, []
        spreads = [spread := (first if t == 0 else a @ spread @ a.T + data.state_covariance) for t in range(steps)]
        for t in range(steps):
            powers = [torch.linalg.matrix_power(a, abs(t - s)) for s in range(steps)]
            crossed = [p @ spreads[s] if s <= t else spreads[t] @ p.T for s, p in enumerate(powers)]
            rows.append(torch.cat([c @ part @ c.T for part in crossed], 1))
        noise = torch.block_diag(*[data.observation_covariance] * steps)
        return cls(torch.linalg.cholesky(torch.cat(rows) + noise), len(c))

    def sample(self, count: int) -> Tensor:
        """Draw sequences, shape (count, T, D)."""
        return (torch.randn(count, len(self.root)).double() @ self.root.T).unflatten(1, (-1, self.width))

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Return log p(x) of sequences of shape (count, T, D) in nats, shape (count,)."""
        size = x.shape[1] * self.width
        return torch.distributions.MultivariateNormal(
            torch.zeros(size).double(), scale_tril=self.root[:size, :size], validate_args=False
        ).log_prob(x.flatten(1))

    def smoothed(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Condition on all but hidden steps.

        Args:
            x: Shape (count, T, D).
            hidden: True at hidden steps, shape (T,).

        Returns:
            Means, shape (count, hidden steps, D), and their covariance, shape (hidden steps * D, the same).
        """
        open_ = hidden.repeat_interleave(self.width)
        covariance = self.root @ self.root.T
        gain = torch.linalg.solve(covariance[~open_][:, ~open_], covariance[~open_][:, open_]).T
        mean = x.flatten(1)[:, ~open_] @ gain.T
        return mean.unflatten(1, (-1, self.width)), covariance[open_][:, open_] - gain @ covariance[~open_][:, open_]

    def predicted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Condition each step on those before it: means (count, T, D) and covariances (T, D, D).

        The Cholesky factor says both: its diagonal blocks are roots of the covariances of what is new at each step.
        """
        flat = x.flatten(1)
        new = torch.linalg.solve_triangular(self.root, flat.T, upper=False).T.unflatten(1, (-1, self.width))
        blocks = torch.stack(self._blocks())
        return x - torch.einsum("tij,ntj->nti", blocks, new), blocks @ blocks.mT

    def _blocks(self) -> list[Tensor]:
        size = self.width
        return [self.root[t : t + size, t : t + size] for t in range(0, len(self.root), size)]


def built(data: LinearGaussian) -> VRNNLightningModule:
    r"""Return a VRNN that is a linear-Gaussian system which starts from :math:`s_0 = 0`.

    :math:`z_t` is the state's noise in units of its standard deviation and :math:`h_t` the state, in tiny units. Each
    linear map is the difference of two halves of a ReLU layer. The encoder is the exact posterior of
    :math:`z_t` given :math:`x_t` and the state before it; what comes later it can't know, so that weights are uneven.

    Args:
        data: Its state's noise must be uncorrelated given a frame, as it is with two states.
    """
    a, c = data.transition, data.observation
    q, r = data.state_covariance[0, 0].sqrt(), data.observation_covariance[0, 0].sqrt()
    channels, states = c.shape
    precision = torch.eye(states).double() + q**2 / r**2 * c.T @ c
    gain, std = torch.linalg.solve(precision, q / r**2 * c.T), precision.diagonal().rsqrt()
    torch.testing.assert_close(precision, precision.diagonal().diag())
    layers = {"phi_x": MLPConfig(2 * channels), "phi_z": MLPConfig(2 * states), "decoder": MLPConfig(2 * channels)}
    options = {"latent_size": states, "hidden_size": states, "prior": None, "encoder": MLPConfig(2 * states), **layers}
    module = VRNNLightningModule(channels, **options).double().eval()
    vrnn = module.vrnn

    def halves(network: torch.nn.Module, weight: Tensor) -> None:
        linear = network[0]
        linear.weight.copy_(torch.cat([weight, -weight]))
        linear.bias.zero_()

    def joined(linear: torch.nn.Linear, spread: Tensor, floor: float) -> None:
        one = torch.eye(len(spread)).double()
        linear.weight.copy_(torch.cat([torch.cat([one, -one], 1), torch.zeros(len(spread), 2 * len(spread))]))
        linear.bias.copy_(torch.cat([torch.zeros(len(spread)), (spread - floor).expm1().log()]))

    def whole(weight: Tensor) -> Tensor:
        return torch.cat([weight, -weight], 1)

    with torch.no_grad():
        halves(vrnn.phi_x, torch.eye(channels).double())
        halves(vrnn.phi_z, torch.eye(states).double())
        halves(vrnn.decoder.body, torch.cat([whole(q * c), c @ a / TINY], 1))
        joined(vrnn.decoder.head.linear, r.expand(channels), vrnn.decoder.head.min_std)
        halves(vrnn.encoder.body, torch.cat([whole(gain), -gain @ c @ a / TINY], 1))
        joined(vrnn.encoder.head.linear, std, vrnn.encoder.head.min_std)
        cell = vrnn.cells[0]
        for parameter in cell.parameters():
            parameter.zero_()
        cell.bias_ih[:states] = 50.0  # the reset gate lets all of the old state in
        cell.bias_ih[states : 2 * states] = -50.0  # and the update gate keeps none of it beside
        cell.weight_ih[2 * states :, 2 * channels :] = whole(TINY * q * torch.eye(states).double())
        cell.weight_hh[2 * states :] = a
    return module


@torch.no_grad()
def figures(draws: Tensor, mean: Tensor, std: Tensor, truth: Tensor) -> dict[str, float]:
    """Compare draws with what they should be drawn from, and with the truth.

    Args:
        draws: Shape (draws, ...).
        mean: Exact means, shape (...).
        std: Exact standard deviations, shape (...).
        truth: Shape (...).
    """
    ranks = ((draws < truth).double().sum(0) + 0.5) / (len(draws) + 1)
    ordered = ranks.flatten().sort().values
    even = (torch.arange(len(ordered)).double() + 0.5) / len(ordered)
    low, *ends = (draws.quantile(level, 0) for level in (0.05, 0.25, 0.75, 0.95))
    return {
        "error": float((((draws.mean(0) - mean) / std).square().mean()).sqrt()),
        "spread": float((draws.std(0) / std).mean()),
        "50 %": float(((ends[0] <= truth) & (truth <= ends[1])).double().mean()),
        "90 %": float(((low <= truth) & (truth <= ends[2])).double().mean()),
        "PIT": float((ordered - even).abs().max()),
    }


def imputation(
    module: VRNNLightningModule, exact: Exact, x: Tensor, draws: int, particles: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the figures of imputed steps, and of as many draws from the exact smoother."""
    hidden = torch.zeros(x.shape[1], dtype=torch.bool)
    for gap in GAPS:
        hidden[gap] = True
    mean, covariance = exact.smoothed(x, hidden)
    std, truth = covariance.diagonal().sqrt().unflatten(0, mean.shape[1:]).expand_as(mean), x[:, hidden]
    holes = x.masked_fill(hidden[:, None], torch.nan)
    imputed = [module.impute(part, draws, particles, seed=i) for i, part in enumerate(holes.split(8))]
    found = torch.stack([row[:, hidden].double() for part in imputed for row in part], 1)
    ideal = torch.distributions.MultivariateNormal(mean.flatten(1), covariance, validate_args=False).sample((draws,))
    return figures(found, mean, std, truth), figures(ideal.unflatten(2, mean.shape[1:]), mean, std, truth)


def prediction(
    module: VRNNLightningModule, exact: Exact, x: Tensor, draws: int, particles: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Return the figures of each next step in a stream, those of exact draws, and what its score lacks, nats a step."""
    mean, covariance = exact.predicted(x)
    std = covariance.diagonal(dim1=1, dim2=2).sqrt().expand_as(mean)
    session, frames, nats = module.session(len(x), particles), [], torch.zeros(len(x)).double()
    for frame in x.unbind(1):
        frames.append(session.now.forecast(1, draws)[:, :, 0].double())
        nats += session.step(frame.to(module.scale_mean)).nats
    ideal = torch.distributions.MultivariateNormal(mean, covariance, validate_args=False).sample((draws,))
    lacking = float((exact.log_likelihood(x) - nats).mean()) / x.shape[1]
    return figures(torch.stack(frames, 2), mean, std, x), figures(ideal, mean, std, x), lacking


def rows(name: str, module: VRNNLightningModule, exact: Exact, x: Tensor, counts: list[int], draws: int) -> None:
    """Print the rows of a model, for several numbers of particles, and of exact draws."""
    for particles in counts:
        torch.manual_seed(0)
        imputed, smoother = imputation(module, exact, x, min(draws, particles), particles)
        streamed, kalman, lacking = prediction(module, exact, x, draws, particles)
        cells = [*imputed.values(), *streamed.values()]
        print(f"| {name}, {particles} | {' | '.join(f'{v:.3f}' for v in cells)} | {lacking:.4f} |", flush=True)
    cells = [*smoother.values(), *kalman.values()]
    print(f"| exact | {' | '.join(f'{v:.3f}' for v in cells)} | 0 |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="of configs/exact.yaml, to be compared too")
    parser.add_argument("--count", type=int, default=128, help="sequences (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--particles", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    options = parser.parse_args(arguments)
    data = LinearGaussian(test_size=options.count)
    names = ("error", "spread", "50 %", "90 %", "PIT")
    heads = [*(f"imputed: {name}" for name in names), *(f"next step: {name}" for name in names)]
    print(f"| model, particles | {' | '.join(heads)} | nats a step lacking |")
    print("| --- |" + " --- |" * 11)
    torch.manual_seed(1)
    starts_at_zero = Exact.of(data, data.steps, data.state_covariance)
    rows("built", built(data), starts_at_zero, starts_at_zero.sample(options.count), options.particles, options.draws)
    if options.checkpoint:
        module = VRNNLightningModule.load_from_checkpoint(options.checkpoint, map_location="cpu").eval()
        stationary = Exact.of(data, data.steps, data.initial_covariance)
        batch = pad([SequenceSample(s.x.double()) for s in data.sequences("test")])
        torch.testing.assert_close(stationary.log_likelihood(batch.x), data.exact_log_likelihood(batch))
        rows("trained", module, stationary, batch.x, options.particles, options.draws)


if __name__ == "__main__":
    main()
