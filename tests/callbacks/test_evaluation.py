"""What a test reports: tighter bounds, standard errors over sequences, figures of each sequence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from vrnn_lightning.datamodules.linear_gaussian import LinearGaussian

from vrnn_lightning import MLPConfig, UserError, VRNNLightningModule
from vrnn_lightning.callbacks import Evaluation
from vrnn_lightning.callbacks.evaluation import importance_weighted
from vrnn_lightning.metrics import Estimate
from vrnn_lightning.noise import Noise


def source(**options):
    sizes = {"train_size": 20, "val_size": 30, "test_size": 40, "steps": 8, "min_steps": 1, "batch_size": 7}
    return LinearGaussian(**{**sizes, **options})


def module(**options):
    seed_everything(1, verbose=False)
    layers = dict.fromkeys(("phi_x", "phi_z", "prior", "encoder", "decoder"), MLPConfig(8))
    return VRNNLightningModule(4, **{"latent_size": 2, "hidden_size": 8, **layers, **options})


def evaluate(folder, evaluation, model=None, stage="test", **options):
    """Return the figures and the archive of an evaluation."""
    runner = Trainer(
        default_root_dir=folder, logger=False, callbacks=[evaluation], accelerator="cpu", precision="64-true",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    run = runner.test if stage == "test" else runner.validate
    (figures,) = run(model or module(), source(**options), verbose=False)
    return figures, np.load(evaluation.path)


def test_figures_are_those_of_the_sequences(tmp_path):
    """Per step is total over total; standard errors are over sequences; the archive holds what they are made of."""
    figures, archive = evaluate(tmp_path, Evaluation(samples=5))
    lengths = archive["test_lengths"]
    assert len(lengths) == 40
    assert len(set(archive["test_names"])) == 40
    assert figures["test/samples"] == 5
    for name in ("elbo", "iwae", "fivo"):
        x = archive[f"test_{name}"]
        ratio = x.sum() / lengths.sum()
        assert figures[f"test/{name}"] == pytest.approx(ratio, rel=1e-5)
        assert figures[f"test/{name}_per_sequence"] == pytest.approx(x.mean(), rel=1e-5)
        assert figures[f"test/{name}_per_sequence_stderr"] == pytest.approx(x.std(ddof=1) / 40**0.5, rel=1e-5)
        residuals = x - ratio * lengths
        stderr = math.sqrt((residuals**2).sum() * 40 / 39) / lengths.sum()
        assert figures[f"test/{name}_stderr"] == pytest.approx(stderr, rel=1e-4)
        gap = archive["test_exact_log_likelihood"] - x
        label = "test/gap" if name == "elbo" else f"test/{name}_gap"
        assert figures[label] == pytest.approx(gap.sum() / lengths.sum(), rel=1e-4)
    assert archive["test_kl_per_dim"].sum() == pytest.approx(figures["test/kl"], rel=1e-5)
    assert 1 <= figures["test/iwae_effective_samples"] <= 5
    assert 1 <= figures["test/fivo_effective_samples"] <= 5


def test_a_ratios_standard_error_is_its_spread_over_data_sets():
    """Over many draws of 200 sequences, the ratio scatters by what one draw says."""
    generator = torch.Generator().manual_seed(0)
    ratios, errors = [], []
    for _ in range(400):
        lengths = torch.randint(1, 30, (200,), generator=generator)
        estimate = Estimate()
        estimate.update(-2.0 * lengths + lengths.sqrt() * torch.randn(200, generator=generator), lengths)
        figures = estimate.compute()
        ratios.append(figures[""].item())
        errors.append(figures["_stderr"].item())
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.12)


def test_a_single_sequence_has_no_standard_error(tmp_path):
    figures, _ = evaluate(tmp_path, Evaluation(samples=2), test_size=1)
    assert "test/elbo" in figures
    assert not [name for name in figures if "stderr" in name]
    assert all(math.isfinite(value) for value in figures.values())


def test_validate_reports_the_same_of_its_split(tmp_path):
    figures, archive = evaluate(tmp_path, Evaluation(samples=2), stage="val")
    assert {"val/iwae", "val/fivo", "val/iwae_gap", "val/elbo_stderr"} <= set(figures)
    assert len(archive["val_lengths"]) == 30


def test_bounds_lie_below_the_truth_and_rise(tmp_path):
    figures, archive = evaluate(tmp_path, Evaluation(samples=64), test_size=400)
    assert figures["test/iwae_gap"] > -3 * figures["test/iwae_gap_stderr"]
    assert figures["test/fivo_gap"] > -3 * figures["test/fivo_gap_stderr"]
    difference = archive["test_iwae"] - archive["test_elbo"]
    assert difference.mean() > 3 * difference.std() / 20


def test_neither_batches_nor_rows_change_what_is_reported(tmp_path):
    found = [
        evaluate(tmp_path, Evaluation(samples=4, rows=rows), batch_size=size)[1]
        for size, rows in ((7, 4096), (3, 4096), (40, 4), (40, 9))
    ]
    order = [np.argsort(archive["test_names"]) for archive in found]
    for name in ("test_elbo", "test_iwae", "test_fivo"):
        for archive, index in zip(found[1:], order[1:], strict=True):
            np.testing.assert_allclose(archive[name][index], found[0][name][order[0]], rtol=1e-9)


def test_samples_in_chunks_are_samples():
    """More samples than rows: bound and effective samples are those of all weights together."""
    model = module().vrnn.double()
    data = source()
    data.setup("test")
    batch = next(iter(data.test_dataloader())).rows([0])
    batch.x = batch.x.double()
    with torch.no_grad():
        bound, effective = importance_weighted(model, batch, 50, Noise(batch, [0]), rows=17)
        noise = Noise(batch, [0])
        trace = model(batch, noise.over_time(2, 50), samples=50)
    weights = (trace.log_px + trace.log_ratio).sum(1).exp()
    torch.testing.assert_close(bound[0], weights.mean().log())
    torch.testing.assert_close(effective[0], weights.sum() ** 2 / weights.square().sum())


def test_a_trial_run_leaves_nothing(lightning, tiny, folder):
    assert lightning("test", "-c", tiny, "--trainer.fast_dev_run", "true").code == 0
    assert not list(folder.rglob("*.npz"))


def test_without_a_latent_all_bounds_are_the_likelihood(tmp_path):
    figures, _ = evaluate(tmp_path, Evaluation(samples=3), module(latent_size=0))
    assert figures["test/iwae"] == pytest.approx(figures["test/elbo"], abs=1e-9)
    assert figures["test/fivo"] == pytest.approx(figures["test/elbo"], abs=1e-9)
    assert figures["test/kl"] == 0
    assert figures["test/samples"] == 1
    assert "test/active_units" not in figures


def test_training_validations_stay_cheap(tmp_path):
    evaluation = Evaluation()
    runner = Trainer(
        default_root_dir=tmp_path, logger=False, callbacks=[evaluation], accelerator="cpu", max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    runner.fit(module(), source())
    assert evaluation.path is None
    assert "val/iwae" not in runner.callback_metrics


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"samples": 0}, "evaluation.samples 0"),
        ({"rows": 0}, "evaluation.rows 0"),
        ({"resampling": "none"}, "resampling 'none'"),
        ({"threshold": 2.0}, "threshold 2.0"),
    ],
)
def test_absurd_options_are_refused(options, word):
    with pytest.raises(UserError, match=word):
        Evaluation(**options)


def test_the_command_prints_samples_kl_and_archive(lightning, tiny, folder):
    assert lightning("fit", "-c", tiny, "--model.objective", "FIVO", "--model.objective.particles", 2).code == 0
    said = lightning("test", "--ckpt_path", "best", "--data", "Sines", "--evaluation.samples", 3)
    assert said.code == 0, said.err
    assert "IWAE and FIVO with 3 samples" in said.out
    assert "KL per latent dimension" in said.out
    assert "test/fivo" in said.out
    assert (folder / "runs/sines/version_0/evaluation.npz").is_file()
    refused = lightning("test", "--ckpt_path", "best", "--data", "Sines", "--evaluation.samples", 0)
    assert refused.code == 1
    assert "evaluation.samples 0" in refused.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.objective", "IWAE", "--model.objective.kl", "analytic"], "for an analytic one use ELBO"),
        (["--model.objective", "IWAE", "--model.objective.samples", "0"], "objective.samples 0"),
        (["--model.objective", "FIVO", "--model.objective.particles", "0"], "objective.particles 0"),
        (["--model.objective", "IWEA"], "Did you mean 'IWAE'?"),
        (["--model.objective", "FIVO", "--model.objective.partikles", "3"], "Did you mean 'particles'?"),
        (["--model.dropout", "1"], "dropout 1.0"),
    ],
)
def test_a_wrong_objective_is_one_line(lightning, tiny, words, expected):
    said = lightning("fit", "-c", tiny, *words)
    assert said.code != 0
    assert expected in said.err
    assert len([line for line in said.err.splitlines() if line.startswith("error:")]) == 1
