"""Every config, and every overlay on every config, through the real command line at tiny size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from vrnn_lightning.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
OVERLAYS = {"wandb": ["GradientNorms"]}  # and the callbacks that they append
SWEEP = "sweep"  # for `wandb sweep`; tests/test_tracking.py runs it
BASES = sorted(p.stem for p in CONFIGS.glob("*.yaml") if p.stem not in (*OVERLAYS, SWEEP))
PAPER = sorted(p.stem for p in (CONFIGS / "paper").glob("*.yaml"))
TINY = {
    "archive": ["--data.root", "series.npz", "--data.features", "2"],
    "exact": ["--data.train_size", "8", "--data.val_size", "4", "--data.steps", "5"],
    "handwriting": ["--data.root", "strokes.npz"],
    "hidden_markov": ["--data.train_size", "8", "--data.val_size", "4", "--data.steps", "5"],
    "mnist": ["--data.root", "digits.npz"],
    "music": ["--data.root", "rolls.npz"],
    "rssm": ["--data.train_size", "8", "--data.val_size", "4", "--data.steps", "5"],
    "synthetic": ["--data.train_size", "8", "--data.val_size", "4", "--data.steps", "5"],
    "speech": ["--data.root", "recordings", "--data.frame_size", "20"],
    "tables": ["--data.root", "sensors.csv", "--data.length", "12"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a few recordings, archives and a table; W&B stays offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "recordings").mkdir()
    generator = np.random.default_rng(0)
    for i in range(12):
        soundfile.write(f"recordings/{i}.wav", 0.1 * generator.standard_normal(300 + 10 * i), 8000)
    splits = ("train", "valid", "test")
    lengths = {f"{split}_lengths": np.array([7, 4, 5]) for split in splits}
    rolls = {f"{split}_values": (generator.random((16, 88)) < 0.1).astype(np.uint8) for split in splits}
    np.savez("rolls.npz", **rolls, **lengths)
    strokes = {f"{split}_values": generator.integers(-9, 9, (16, 3)).astype(np.int16) for split in splits}
    for values in strokes.values():
        values[:, 2] = values[:, 2] > 5
    np.savez("strokes.npz", **strokes, **lengths)
    series = {f"{split}_values": generator.standard_normal((16, 2)) for split in splits}
    np.savez("series.npz", **series, **lengths)
    np.savez("digits.npz", **{f"{split}_images": generator.integers(0, 256, (5, 28, 28)) for split in splits})
    hours = [f"2024-01-0{1 + hour // 24} {hour % 24:02}:00" for hour in range(96)]
    measured = [",".join(f"{value:.3f}" for value in row) for row in generator.standard_normal((96, 7))]
    rows = ["date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT", *map(",".join, zip(hours, measured, strict=True))]
    (tmp_path / "sensors.csv").write_text("\n".join(rows))
    return tmp_path


def run(base: str, *more: str, validations: int = 0) -> dict:
    """Fit one epoch; return the run's config."""
    quick = [
        "--trainer.max_epochs",
        "2",
        "--trainer.check_val_every_n_epoch",
        "1",
        "--trainer.limit_train_batches",
        "2",
    ]
    small = [
        "--model.hidden_size",
        "8",
        "--samples.every_n_validations",
        str(validations),
        "--trainer.log_every_n_steps",
        "1",
    ]
    small += ["--samples.count", "1", "--report", "false"]
    words = ["fit", "-c", f"configs/{base}.yaml", *more, *TINY[base], *quick, *small]
    assert main([*words, "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]) == 0
    (config,) = Path("runs").glob("*/version_0/config.yaml")
    return yaml.safe_load(config.read_text())


def classes(entries: list[dict] | None) -> list[str]:
    return [entry["class_path"].rpartition(".")[2] for entry in entries or []]


def test_every_config_is_covered():
    assert set(TINY) == set(BASES)


@pytest.mark.parametrize("base", BASES)
def test_a_config_trains(base, folder):
    config = run(base, validations=2)
    (made,) = (folder / "runs").glob("*/version_0")
    assert {p.name for p in (made / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    header = (made / "metrics.csv").read_text().splitlines()[0]
    assert {"train/loss", "train/beta", "train/grad_norm", "val/elbo", "val/kl"} <= set(header.split(","))
    assert list((made / "samples").glob("*.png"))
    assert bool(list((made / "samples").glob("*.wav"))) == (base in ("speech", "music"))
    assert bool(list((made / "samples").glob("*.svg"))) == (base == "handwriting")
    assert classes(config["trainer"]["logger"]) == ["RunLogger"]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_appends(base, overlay, folder, capsys):
    words = ["fit", "-c", f"configs/{base}.yaml", "-c", f"configs/{overlay}.yaml", *TINY[base], "--print_config"]
    with pytest.raises(SystemExit):
        main(words)
    config = yaml.safe_load(capsys.readouterr().out)
    plain = yaml.safe_load((CONFIGS / f"{base}.yaml").read_text())
    assert classes(config["trainer"]["logger"]) == ["RunLogger", "WandbLogger"]
    assert classes(config["trainer"]["callbacks"]) == classes(plain["trainer"].get("callbacks")) + OVERLAYS[overlay]


@pytest.mark.parametrize("model", PAPER)
def test_the_models_of_the_paper_train(model, folder):
    """On data whose config says another model; the overlay replaces all of that."""
    config = run("exact", "-c", f"configs/paper/{model}.yaml")["model"]
    assert (config["latent_size"] == 0) == model.startswith("rnn")
    assert (config["prior"] is None) == (model == "vrnn-i-gauss")
    kind = "GaussianMixture" if model.endswith("gmm") else "Gaussian"
    assert config["emission"]["class_path"] == f"vrnn_lightning.heads.{kind}"


def test_the_papers_models_are_all_there():
    assert PAPER == ["rnn-gauss", "rnn-gmm", "vrnn-gauss", "vrnn-gmm", "vrnn-i-gauss"]


@pytest.mark.parametrize("config", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_a_header_tells_command_and_number(config):
    header = [line for line in config.read_text().splitlines() if line.startswith("#")]
    command = "wandb sweep" if config.stem == SWEEP else "lightning fit"
    assert any(command in line and config.name in line for line in header)
    assert any("Expect" in line for line in header)
