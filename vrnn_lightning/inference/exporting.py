"""The streaming step as a program of its own, for machines without this package: torch.export or ONNX."""

from __future__ import annotations

import copy
import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vrnn_lightning.data import Scaler
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, write_files
from vrnn_lightning.heads import log_prob
from vrnn_lightning.inference.session import upcoming
from vrnn_lightning.recurrence import State, compute_weights, log_ratio, output, require_plain_weights
from vrnn_lightning.vrnn import VRNN

__all__ = ["export_step"]

TOLERANCE = 1e-3
"""Largest difference between onnxruntime and torch, in nats and in the state, relative to values above 1."""


class _Step(nn.Module):
    """One step of a model with one particle, in data units: tensors in, tensors out."""

    def __init__(self, model: VRNN, scaler: Scaler) -> None:
        super().__init__()
        require_plain_weights(model, "an export")
        model.apply(compute_weights)  # without a gradient, as a copy needs
        self.model = copy.deepcopy(model).cpu().eval()
        self.register_buffer("scale_mean", scaler.mean.detach().clone().cpu())
        self.register_buffer("scale_std", scaler.std.detach().clone().cpu())
        example = self.example(1)
        self.inputs, self.outputs = list(example), list(self.take(example))

    def example(self, batch_size: int) -> dict[str, Tensor]:
        """Return tensors of the shapes that a step takes, by name, in the order of its arguments."""
        model, like = self.model, self.model.input_mean
        state = model.zero_state(batch_size).tensors()
        row = torch.arange(batch_size).to(like)[:, None] / batch_size
        tensors = {
            "x": like.new_ones(batch_size, model.num_features),
            "observed": torch.ones(batch_size, model.num_features * model.missing, dtype=torch.bool),
            "inputs": 0.5 - row.expand(-1, model.num_inputs),
            "noise": row.expand(-1, model.latent.noise_size) - 0.3,
            "next_inputs": row.expand(-1, model.num_inputs) - 0.7,
            "next_noise": 0.4 - row.expand(-1, model.latent.noise_size),
            **{name: x + 0.1 + row.view(-1, *[1] * (x.ndim - 1)) / 2 for name, x in state.items()},
        }
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor.numel()}

    def take(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of a step by name."""
        mean, std = cast(Tensor, self.scale_mean), cast(Tensor, self.scale_std)
        x, observed = (given["x"] - mean) / std, given.get("observed")
        log_std = std.log().sum(-1)
        if observed is not None:
            x = torch.where(observed, x, 0.0)
            log_std = torch.where(observed, std.log(), 0.0).sum(-1)
        model, inputs, none = self.model, given.get("inputs"), x[:, :0]
        state = State.of_tensors({name: x for name, x in given.items() if name == "h" or name.startswith("c")})
        h, x_features = output(state), model.extract_x(x, observed)
        prior = model.prior_dist(h, inputs)
        posterior = model.posterior_dist(x_features, h, prior, inputs)
        z = model.latent.rsample(posterior, given.get("noise", none)) if model.latent_size else none
        z_features = model.extract_z(z)
        nats = log_prob(model.emission_dist(z_features, h, inputs), x, observed) - log_std
        nats = nats + log_ratio(prior, posterior, z)
        h, state = model.next_state(x_features, z_features, state, inputs)
        features = upcoming(model, h, given.get("next_inputs"), given.get("next_noise", none))
        emission = model.emission_head(features)
        outputs = {"nats": nats, "next_mean": emission.mean * std + mean}
        with suppress(NotImplementedError):  # not every emission has a variance
            outputs["next_std"] = emission.variance.sqrt() * std
        return outputs | {f"{name}_next": part for name, part in state.tensors().items()}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.take(dict(zip(self.inputs, tensors, strict=True))).values())


def export_step(model: VRNN, scaler: Scaler, path: Path) -> None:
    """Write one step of a model as a program; see :meth:`~vrnn_lightning.inference.Inference.export`."""
    if path.suffix not in (".pt2", ".onnx"):
        raise UserError(f"{path}: a step is exported as .pt2 or .onnx. Fix: choose one of these")
    if model.backward_rnn is not None:
        raise UserError("a smoothing model has no step to export. Fix: train one with model.smoothing false")
    with explained(path):
        if path.is_dir():
            raise UserError(f"{path}: is a folder. Fix: give another name")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}. Fix: make it first")
    with _traceable():
        step = _Step(model, scaler)
        content = _as_torch(step) if path.suffix == ".pt2" else _as_onnx(step.float())
    write_files({path: content})


@contextmanager
def _traceable() -> Iterator[None]:
    """Turn off the validation of distributions, which a trace can't do, and the warnings of torch's export."""
    validates = Distribution._validate_args  # type: ignore[attr-defined]
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of operations that are missing
    Distribution.set_default_validate_args(False)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Distribution.set_default_validate_args(validates)
        logger.setLevel(level)


def _program(step: _Step) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=2**31)  # torch 2.6 takes no open end
    shapes = (tuple({0: batch} for _ in step.inputs),)
    return torch.export.export(step, tuple(step.example(3).values()), dynamic_shapes=shapes, strict=False)


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
        raise UserError(f"{error.name} is not installed. Fix: pip install 'vrnn-lightning[export]'") from error
    emission = type(step.model.head).__name__
    try:
        program = _program(step)
        if any(node.target is torch.ops.aten.lgamma.default for node in program.graph.nodes):  # counts, Student's t
            program = program.run_decompositions(UNKNOWN_TO_ONNX)
        args, names = tuple(step.example(3).values()), {"input_names": step.inputs, "output_names": step.outputs}
        converted = torch.onnx.export(program, args, dynamo=True, verbose=False, **names)  # type: ignore[arg-type]
        assert converted is not None
        content: bytes = converted.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # the libraries' own, without a base in common, where they lack an operation
        line = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"emission {emission}: has no ONNX program ({line}). Fix: export it as .pt2") from error
    for size in (1, 5):
        tensors = step.example(size)
        others = session.run(step.outputs, {name: tensor.numpy() for name, tensor in tensors.items()})
        for (name, own), other in zip(step.take(tensors).items(), others, strict=True):
            if not torch.allclose(own, torch.from_numpy(other), rtol=TOLERANCE, atol=TOLERANCE):
                raise UserError(f"emission {emission}: onnxruntime's {name} is not torch's. Fix: export it as .pt2")
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
