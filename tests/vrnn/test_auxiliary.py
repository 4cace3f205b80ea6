"""Losses of targets: trained beside the bound, and never part of it."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import test_recurrence
import torch

from vrnn_lightning import SequenceBatch, UserError, VRNNLightningModule
from vrnn_lightning.noise import Noise
from vrnn_lightning.objectives import ELBO, FIVO, IWAE
from vrnn_lightning.vrnn.auxiliary import Classification, Regression

REWARD = partial(Regression, columns=[0], name="reward", weight=2.0)
LABEL = partial(Classification, column=1, classes=3, name="label")


def make_batch() -> SequenceBatch:
    batch = test_recurrence.make_batch([6, 4, 1])
    torch.manual_seed(6)
    targets = torch.stack([torch.randn(3, 6), torch.randint(3, (3, 6)).float()], -1).double()
    targets[0, 2] = targets[1, 0, 0] = float("nan")
    return replace(batch, targets=targets)


def make(*auxiliary, **options) -> VRNNLightningModule:
    torch.manual_seed(7)
    return VRNNLightningModule(3, latent_size=2, num_targets=2, auxiliary=list(auxiliary), **options).double()


def evaluate(module, batch, samples=1):
    noise = Noise(batch, [0, 1, 2])
    return module.vrnn(batch, noise.over_time(2, samples), samples=samples)


def test_losses_are_those_of_torch():
    module, batch = make(REWARD, LABEL, partial(Regression, columns=[0], loss="mse", name="error")), make_batch()
    trace = evaluate(module, batch)
    reads = torch.cat([trace.hidden, trace.z], -1)
    reward, label, error = module.auxiliary.parts
    known = ~batch.targets.isnan() & batch.mask[..., None]
    dist = reward.network(reads).base_dist
    expected = {
        reward: -dist.log_prob(batch.targets[..., :1])[..., 0],
        error: (error.network(reads).mean - batch.targets[..., :1]).square()[..., 0],
        label: -label.network(reads).log_softmax(-1).gather(-1, batch.targets[..., 1:].nan_to_num().long())[..., 0],
    }
    for part, losses in expected.items():
        found, counts = part(trace)
        is_known = known[..., int(part is label)]
        assert (counts == is_known).all()
        torch.testing.assert_close(found, torch.where(is_known, losses, 0.0))
    torch.testing.assert_close(label.predict(trace).sum(-1), torch.ones(3, 6).double())
    torch.testing.assert_close(reward.predict(trace), dist.mean)


def test_padding_and_unknown_targets_have_no_gradient():
    module, batch = make(REWARD, LABEL), make_batch()
    trace = evaluate(module, batch)
    loss = sum(part(trace)[0].sum() for part in module.auxiliary)
    loss.backward()
    grads = [p.grad for p in module.parameters()]
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    assert any(grad.any() for grad in (p.grad for p in module.vrnn.encoder.parameters()))


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("objective", [ELBO, partial(ELBO, balance=0.3), partial(IWAE, samples=3)])
def test_objectives_return_the_terms_and_keep_their_value(objective, every):
    """Losses and gradients are those of the trace, the mean of the trajectories, in recomputed windows too."""
    module, batch = make(REWARD, LABEL, objective=objective), make_batch()
    plain = objective()(module.vrnn, batch, Noise(batch, [0, 1, 2]), 1.0, lambda x: x)
    module.vrnn.checkpoint_every = every
    found = module.objective(module.vrnn, batch, Noise(batch, [0, 1, 2]), 1.0, lambda x: x)
    torch.testing.assert_close(found.value, plain.value)
    samples = len(found.log_px) // 3
    expected = module.auxiliary.terms(evaluate(module, batch, samples))
    for a, b in zip(found.auxiliary, expected, strict=True):
        torch.testing.assert_close(a, b)
    parameters = [p for p in module.parameters() if p.requires_grad]
    for a, b in zip(
        *(torch.autograd.grad(terms[0].sum() + terms[2].sum(), parameters, allow_unused=True)
          for terms in (found.auxiliary, expected)), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("FIVO has no trajectories", lambda: make(REWARD, objective=FIVO)),
        ("'reward' is in use", lambda: make(REWARD, REWARD)),
        ("'kl' is in use", lambda: make(partial(Regression, name="kl"))),
        ("'iwae_gap' is in use", lambda: make(partial(Regression, name="iwae_gap"))),
        ("'' is in use", lambda: make(partial(Regression, name=""))),
        ("columns is empty", lambda: make(partial(Regression, columns=[]))),
        ("no targets", lambda: VRNNLightningModule(3, auxiliary=[REWARD])),
        ("columns 2", lambda: make(partial(Regression, columns=[2]))),
        ("weight -1", lambda: make(partial(Regression, weight=-1.0))),
        ("a label is", lambda: make(partial(Classification, column=0)).auxiliary.parts[0].check(
            make_batch().targets, make_batch().mask)),
        ("has no targets", lambda: make(REWARD).auxiliary.parts[0].check(None, make_batch().mask)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(message, call):
    with pytest.raises(UserError, match=message):
        call()


def test_any_other_name_is_logged_under_itself():
    batch, names = make_batch(), ["a.b", "keys", "items"]
    module = make(*(partial(Regression, columns=[0], name=name) for name in names))
    module.auxiliary.update(module.auxiliary.terms(evaluate(module, batch)))
    assert list(module.auxiliary.compute()) == names


def write(path) -> str:
    """Write an archive whose target is the running sign of the first feature, unknown at every fifth step."""
    generator, arrays = np.random.default_rng(0), {}
    for split, size in (("train", 24), ("valid", 6), ("test", 6)):
        lengths = generator.integers(5, 12, size)
        values = generator.normal(size=(lengths.sum(), 2)).astype(np.float32)
        targets = np.stack([values[:, 0], values[:, 0] > 0], 1)
        targets[::5, 0] = np.nan
        first = generator.random(len(values)) < 0.1
        arrays |= {f"{split}_values": values, f"{split}_lengths": lengths, f"{split}_targets": targets}
        arrays[f"{split}_is_first"] = first
    np.savez(path, **arrays)
    return str(path)


PARTS = (
    "[{class_path: Regression, init_args: {columns: [0], name: reward, weight: 3.0}},"
    " {class_path: vrnn_lightning.vrnn.auxiliary.Classification, init_args: {column: 1, name: sign}}]"
)


def figures(folder, name):
    (run,) = (folder / "runs" / "archive").iterdir()
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_a_run_learns_targets_and_resumes_exactly(lightning, folder):
    words = ["--data", "Archive", "--data.root", write(folder / "a.npz"), "--data.features", "2", "--data.targets", "2"]
    words += ["--data.batch_size", "8", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    words += ["--samples.every_n_validations", "0", "--model.hidden_size", "8", "--model.latent_size", "2"]
    words += ["--model.optimizer", "Adam", "--model.optimizer.lr", "0.01", "--trainer.log_every_n_steps", "1"]
    words += ["--model.auxiliary", PARTS, "--trainer.precision", "64-true"]
    whole, broken = folder / "whole", folder / "broken"
    done = lightning("fit", *words, "--trainer.max_epochs", "6", "--trainer.default_root_dir", whole)
    assert done.code == 0, done.err
    assert figures(whole, "val/reward")[-1] < figures(whole, "val/reward")[0]
    assert figures(whole, "val/sign")[0] == pytest.approx(np.log(2), abs=0.1)
    losses = figures(whole, "train/loss")
    done = lightning("fit", *words, "--trainer.max_epochs", "3", "--trainer.default_root_dir", broken)
    assert done.code == 0, done.err
    last = next(broken.rglob("last.ckpt"))
    more = ["--trainer.max_epochs", "6", "--trainer.default_root_dir", broken, "--ckpt_path", last]
    done = lightning("fit", *words, *more)
    assert done.code == 0, done.err
    assert figures(broken, "train/loss") == losses
    done = lightning("test", "--ckpt_path", last, "--trainer.accelerator", "cpu")
    assert done.code == 0, done.err
    assert "test/reward" in done.out
    done = lightning("predict", "--ckpt_path", last, "--trainer.accelerator", "cpu", "--prediction.task", "encode")
    assert done.code == 0, done.err
    with np.load(next(broken.rglob("encodings.npz"))) as answers:
        steps = len(answers["test_values"])
        assert answers["test_reward"].shape == (steps, 1)
        np.testing.assert_allclose(answers["test_sign"].sum(1), 1, rtol=1e-5)
