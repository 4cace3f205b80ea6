"""The streaming step as a program of its own, for machines without this package: torch.export or ONNX."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.data import Scaler
from vrnn_lightning.errors import UserError
from vrnn_lightning.recurrence import State
from vrnn_lightning.recurrence.parts import as_state
from vrnn_lightning.recurrence.textbook import textbook_step
from vrnn_lightning.vrnn import VRNN

__all__ = ["Exported"]

AGREEMENT = 1e-3
"""Most that onnxruntime may differ from torch in, in nats and in the state, relative to values above 1."""


class _Step(nn.Module):
    """One step of a model with one particle, in data units: tensors in, tensors out."""

    def __init__(self, model: VRNN, scaler: Scaler) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale_mean", scaler.mean.clone())
        self.register_buffer("scale_std", scaler.std.clone())
        self.names = ["x", *["observed"] * model.missing, *["inputs"] * bool(model.num_inputs)]
        self.names += [*["noise"] * bool(model.latent_size), "h", *["c"] * isinstance(model.cells[0], nn.LSTMCell)]
        self.outputs = ["nats", *(f"{name}_next" for name in self.names if name in ("h", "c"))]

    def example(self, batch_size: int) -> tuple[Tensor, ...]:
        """Return tensors of the shapes that a step takes."""
        model, like = self.model, self.model.input_mean
        state = model.initial_state(batch_size)
        all_of_them = {
            "x": like.new_ones(batch_size, model.num_features),
            "observed": torch.ones(batch_size, model.num_features, dtype=torch.bool),
            "inputs": like.new_full((batch_size, model.num_inputs), 0.5),
            "noise": like.new_full((batch_size, model.latent_size), 0.5),
            "h": state.h + 0.1,
            "c": state.h + 0.2,
        }
        return tuple(all_of_them[name] for name in self.names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        mean, std = cast(Tensor, self.scale_mean), cast(Tensor, self.scale_std)
        x, observed = (given["x"] - mean) / std, given.get("observed")
        log_std = std.log().sum(-1)
        if observed is not None:
            x = torch.where(observed, x, 0.0)
            log_std = torch.where(observed, std.log(), 0.0).sum(-1)
        ones = torch.ones_like(x[:, 0], dtype=torch.long)
        observed, inputs = (None if part is None else part[:, None] for part in (observed, given.get("inputs")))
        states = State(given["h"], given.get("c")).layers()
        noise = given.get("noise", x[:, :0])
        found, after = textbook_step(
            self.model, SequenceBatch(x[:, None], ones, observed, inputs), 0, states, noise, None
        )
        state = as_state(after, len(self.model.cells))
        nats = found.log_px + found.log_ratio - log_std
        return (nats, state.h) if state.c is None else (nats, state.h, state.c)


class Exported:
    """What :class:`~vrnn_lightning.module.VRNNLightningModule` writes for machines without this package."""

    vrnn: VRNN

    @property
    def scaler(self) -> Scaler:
        """Between data units and the model's."""
        raise NotImplementedError

    def export(self, path: str | Path) -> None:
        """Write the step of :meth:`session`, with one particle, as a program for any number of sequences.

        It takes ``x`` in data units, shape (batch, features); ``observed``, bool of that shape, if the model is told of
        missing values; ``inputs``, (batch, covariates), if it reads any; ``noise``, standard normal, (batch, latent),
        if it has a latent; and the state ``h``, and ``c`` of an LSTM, (batch, layers, hidden), zeros at first. It
        returns ``nats``, shape (batch,): log p(x_t, z_t | .) - log q(z_t | .) in data units; then ``h_next``, and
        ``c_next``.

        Args:
            path: ``.pt2`` for ``torch.export.load``, or ``.onnx``, which is compared with torch before it is kept and
                needs ``pip install 'vrnn-lightning[export]'``.

        Raises:
            UserError: Another suffix, a model that smooths, a library or the folder that is not there, or an ONNX
                program that says something else.
        """
        path, module = Path(path), cast(Any, self)
        if path.suffix not in (".pt2", ".onnx"):
            raise UserError(f"{path}: a step is exported as .pt2 or .onnx; choose one of these")
        if self.vrnn.backward_rnn is not None:
            raise UserError("a smoothing model reads each sequence from its end: it has no step to export")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}; make it first")
        training = module.training
        step = _Step(self.vrnn, self.scaler).eval()
        try:
            with _traceable(), tempfile.TemporaryDirectory(dir=path.parent, prefix=".export") as folder:
                part = Path(folder) / path.name
                program = _program(step)
                if path.suffix == ".pt2":
                    torch.export.save(program, part)
                else:
                    _write_onnx(program, step, part)
                part.replace(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}; nothing is written") from error
        finally:
            module.train(training)


@contextmanager
def _traceable() -> Iterator[None]:
    """Let no distribution look at its values, which a trace has not, and torch warn of none of its own doing."""
    checks = Distribution._validate_args  # type: ignore[attr-defined]
    Distribution.set_default_validate_args(False)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Distribution.set_default_validate_args(checks)


def _program(step: _Step) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    shapes = (tuple({0: batch} for _ in step.names),)
    return torch.export.export(step, step.example(3), dynamic_shapes=shapes, strict=False)


def _write_onnx(program: torch.export.ExportedProgram, step: _Step, path: Path) -> None:
    """Write an ONNX program that does what torch's does."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # what torch exports with
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'vrnn-lightning[export]'") from error
    made = torch.onnx.export(
        program, step.example(3), dynamo=True, verbose=False, input_names=step.names, output_names=step.outputs
    )
    assert made is not None
    made.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tensors = step.example(5)
    said = session.run(step.outputs, {name: t.numpy() for name, t in zip(step.names, tensors, strict=True)})
    for name, own, other in zip(step.outputs, step(*tensors), said, strict=True):
        if not torch.allclose(own, torch.from_numpy(other), rtol=AGREEMENT, atol=AGREEMENT):
            raise UserError(f"{path.name}: onnxruntime's {name} is not torch's; export it as .pt2")
