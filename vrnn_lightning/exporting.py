"""The streaming step as a program of its own, for machines without this package: torch.export or ONNX."""

from __future__ import annotations

import copy
import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vrnn_lightning.data import Scaler
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, write_files
from vrnn_lightning.heads import Head, Network, log_prob
from vrnn_lightning.inference import upcoming
from vrnn_lightning.pretrained import require_numbers
from vrnn_lightning.recurrence import State, log_ratio, output
from vrnn_lightning.vrnn import VRNN

__all__ = ["Exported"]

AGREEMENT = 1e-3
"""Most that onnxruntime may differ from torch in, in nats and in the state, relative to values above 1."""


class _Step(nn.Module):
    """One step of a model with one particle, in data units: tensors in, tensors out."""

    def __init__(self, model: VRNN, scaler: Scaler) -> None:
        super().__init__()
        model.apply_pruning()
        self.model = copy.deepcopy(model).cpu().eval()
        self.register_buffer("scale_mean", scaler.mean.detach().clone().cpu())
        self.register_buffer("scale_std", scaler.std.detach().clone().cpu())
        latent, inputs = bool(model.latent_size), bool(model.num_inputs)
        self.names = ["x", *["observed"] * model.missing, *["inputs"] * inputs, *["noise"] * latent]
        self.names += [*["next_inputs"] * inputs, *["next_noise"] * latent]
        self.names += ["h", *["c"] * isinstance(model.cells[0], nn.LSTMCell)]
        spreads = _has_variance(self.model.decoder)
        self.outputs = ["nats", "next_mean", *["next_std"] * spreads]
        self.outputs += [f"{name}_next" for name in self.names if name in ("h", "c")]

    def example(self, batch_size: int) -> tuple[Tensor, ...]:
        """Return tensors of the shapes that a step takes."""
        model, like = self.model, self.model.input_mean
        state = model.initial_state(batch_size)
        row = torch.arange(batch_size).to(like)[:, None] / batch_size
        all_of_them = {
            "x": like.new_ones(batch_size, model.num_features),
            "observed": torch.ones(batch_size, model.num_features, dtype=torch.bool),
            "inputs": 0.5 - row.expand(-1, model.num_inputs),
            "noise": row.expand(-1, model.latent_size) - 0.3,
            "next_inputs": row.expand(-1, model.num_inputs) - 0.7,
            "next_noise": 0.4 - row.expand(-1, model.latent_size),
            "h": state.h + 0.1 + row[:, None] / 2,
            "c": state.h + 0.2 - row[:, None] / 2,
        }
        return tuple(all_of_them[name].contiguous() for name in self.names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        mean, std = cast(Tensor, self.scale_mean), cast(Tensor, self.scale_std)
        x, observed = (given["x"] - mean) / std, given.get("observed")
        log_std = std.log().sum(-1)
        if observed is not None:
            x = torch.where(observed, x, 0.0)
            log_std = torch.where(observed, std.log(), 0.0).sum(-1)
        model, inputs, none = self.model, given.get("inputs"), x[:, :0]
        state = State(given["h"], given.get("c"))
        h, x_features = output(state), model.extract_x(x, observed)
        prior = model.prior_dist(h, inputs)
        posterior = model.posterior_dist(x_features, h, prior, inputs)
        z = posterior.mean + posterior.stddev * given.get("noise", none)
        z_features = model.extract_z(z)
        nats = log_prob(model.emission_dist(z_features, h, inputs), x, observed) - log_std
        nats = nats + log_ratio(prior, posterior, z)
        h, state = model.next_state(x_features, z_features, state, inputs)
        ahead = upcoming(model, h, given.get("next_inputs"), given.get("next_noise", none))
        emission = self.model.decoder.head(ahead)
        outputs = {"nats": nats, "next_mean": emission.mean * std + mean, "h_next": state.h, "c_next": state.c}
        if "next_std" in self.outputs:
            outputs["next_std"] = emission.variance.sqrt() * std
        return tuple(outputs[name] for name in self.outputs)


def _has_variance(decoder: Network[Head]) -> bool:
    try:
        _ = decoder.head(next(decoder.parameters()).new_zeros(1, decoder.head.in_features)).variance
    except NotImplementedError:
        return False
    return True


class Exported:
    """What :class:`~vrnn_lightning.module.VRNNLightningModule` writes for machines without this package."""

    vrnn: VRNN

    @property
    def scaler(self) -> Scaler:
        """Between data units and the model's."""
        raise NotImplementedError

    def export(self, path: str | Path) -> None:
        """Write the step of :meth:`session`, with one particle, as a program for any number of sequences.

        It takes, in this order, what the model reads of these:

        ========================= ======================= ==============================================================
        ``x``                     (batch, features)       the frame, in data units
        ``observed``              (batch, features)       bool, where it was measured; if the model is told
        ``inputs``                (batch, covariates)     its covariates
        ``noise``                 (batch, latent)         standard normal, for the posterior's draw
        ``next_inputs``           (batch, covariates)     covariates of the step to come
        ``next_noise``            (batch, latent)         standard normal, for the prior's draw of the step to come
        ``h``, and ``c`` of LSTMs (batch, layers, hidden) the state, zeros at first
        ========================= ======================= ==============================================================

        and returns, in this order:

        ========================= ======================= ==============================================================
        ``nats``                  (batch,)                log p(x_t, z_t | .) - log q(z_t | .), in data units
        ``next_mean``             (batch, features)       mean of the next frame, given the prior's draw, in data units
        ``next_std``              (batch, features)       its standard deviation, if the emission has one
        ``h_next``, ``c_next``    (batch, layers, hidden) the state to continue with
        ========================= ======================= ==============================================================

        A call with ``next_noise`` drawn is one part of the mixture that :meth:`~vrnn_lightning.inference.Step.next`
        returns; rows repeated with other noise are others. Weights are those of now; the module is left as it is.

        Args:
            path: ``.pt2`` for ``torch.export.load``, in the module's precision, or ``.onnx``, in float32, which is
                compared with torch before it is kept and needs ``pip install 'vrnn-lightning[export]'``.

        Raises:
            UserError: Another suffix, a model that smooths, weights that are not numbers, a library or the folder that
                is not there, no room, or an emission that ONNX can't say.
        """
        path = Path(path)
        if path.suffix not in (".pt2", ".onnx"):
            raise UserError(f"{path}: a step is exported as .pt2 or .onnx; choose one of these")
        if self.vrnn.backward_rnn is not None:
            raise UserError("a smoothing model reads each sequence from its end: it has no step to export")
        with explained(path):
            if path.is_dir():
                raise UserError(f"{path}: is a folder; give another name")
            if not path.parent.is_dir():
                raise UserError(f"{path}: there is no folder {path.parent}; make it first")
        require_numbers("the model", cast(nn.Module, self).state_dict())
        with _traceable():
            step = _Step(self.vrnn, self.scaler)
            content = _as_torch(step) if path.suffix == ".pt2" else _as_onnx(step.float())
        write_files({path: content})


@contextmanager
def _traceable() -> Iterator[None]:
    """Turn off the validation of distributions, which a trace can't do, and torch's warnings of its own export."""
    checks = Distribution._validate_args  # type: ignore[attr-defined]
    talk = logging.getLogger("torch.onnx")
    level = talk.level
    talk.setLevel(logging.ERROR)  # it warns of operations that are missing
    Distribution.set_default_validate_args(False)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Distribution.set_default_validate_args(checks)
        talk.setLevel(level)


def _program(step: _Step) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=2**31)  # torch 2.6 takes no open end
    shapes = (tuple({0: batch} for _ in step.names),)
    return torch.export.export(step, step.example(3), dynamic_shapes=shapes, strict=False)


def _as_torch(step: _Step) -> bytes:
    content = io.BytesIO()
    torch.export.save(_program(step), content)
    return content.getvalue()


def _as_onnx(step: _Step) -> bytes:
    """Return an ONNX program that does what torch's does."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # what torch exports with
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'vrnn-lightning[export]'") from error
    names = {"input_names": step.names, "output_names": step.outputs}
    emission = type(step.model.decoder.head).__name__
    try:
        program = _program(step)
        if any(node.target is torch.ops.aten.lgamma.default for node in program.graph.nodes):  # counts, Student's t
            program = program.run_decompositions(UNKNOWN_TO_ONNX)
        made = torch.onnx.export(program, step.example(3), dynamo=True, verbose=False, **names)  # type: ignore[arg-type]
        assert made is not None
        content: bytes = made.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # the libraries' own, without a base in common, where they lack an operation
        line = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"emission {emission}: has no ONNX program; export it as .pt2 ({line})") from error
    for size in (1, 5):
        tensors = step.example(size)
        said = session.run(step.outputs, {name: t.numpy() for name, t in zip(step.names, tensors, strict=True)})
        for name, own, other in zip(step.outputs, step(*tensors), said, strict=True):
            if not torch.allclose(own, torch.from_numpy(other), rtol=AGREEMENT, atol=AGREEMENT):
                raise UserError(f"emission {emission}: onnxruntime's {name} is not torch's; export it as .pt2")
    return content


def _lgamma(x: Tensor) -> Tensor:
    """Return log Γ(x) for x > 0 by Stirling's series at x + 8."""
    below = torch.zeros_like(x)
    for i in range(8):
        below = below + (x + i).log()
    y = x + 8.0
    inverse = 1 / y
    square = inverse * inverse
    series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    return (y - 0.5) * y.log() - y + 0.5 * math.log(2 * math.pi) + series - below


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """Return log(1 + exp(x)) in float64, which onnxruntime's own does not take."""
    if x.dtype != torch.float64:
        return NotImplemented
    return x.clamp(min=0.0) + (-x.abs()).exp().log1p()


UNKNOWN_TO_ONNX = {torch.ops.aten.lgamma.default: _lgamma, torch.ops.aten.softplus.default: _softplus}
