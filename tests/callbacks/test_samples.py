"""What a fit shows, as files and in loggers."""

from __future__ import annotations

import csv
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from vrnn_lightning.datamodules.sines import Sines

from vrnn_lightning import UserError, VRNNLightningModule
from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.callbacks import Samples
from vrnn_lightning.callbacks.media import Media


class Shelf(DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.pictures, self.tables, self.sounds = [], {}, {}

    def log_image(self, key, images):
        self.pictures.append((key, images))

    def log_audio(self, key, audios):
        self.sounds[key] = audios

    def log_media_table(self, key, columns, lines):
        self.tables[key] = columns, lines


def fit(folder, logger, data, shows=None, **options):
    torch.manual_seed(0)
    module = VRNNLightningModule(num_features=3, **{"latent_size": 4, "hidden_size": 5} | options)
    runner = Trainer(
        default_root_dir=folder,
        max_epochs=2,
        logger=logger,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[shows or Samples(count=3)],
    )
    runner.fit(module, data)
    return module


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    class Heard(Sines):
        modality = "audio"
        sample_rate = 1000

    folder, logger = tmp_path_factory.mktemp("shown"), Shelf()
    data = Heard(train_size=8, val_size=5, steps=12, batch_size=4)
    return folder, logger, fit(folder, logger, data), data


def test_loggers_get_pictures_once_and_the_table_with_pictures_and_sounds(shown):
    folder, logger, _, _ = shown
    kinds = ["samples", "samples", "samples/latent", "samples/traversal", "samples/interpolation"]
    assert [key for key, _ in logger.pictures] == kinds, "the last validation's picture is not drawn again"
    assert all(Path(images[0]).parent == folder / "samples" for _, images in logger.pictures)
    columns, lines = logger.tables["samples/table"]
    assert columns == ["kind", "name", "elbo", "picture", "sound"]
    assert [line[0] for line in lines] == ["real"] * 3 + ["sampled"] * 3
    assert all(line[3].is_file() and line[4].is_file() for line in lines)
    assert set(logger.sounds) == {"samples/real", "samples/reconstructed", "samples/sampled"}
    with (folder / "samples/step_0000004_table.csv").open() as file:
        written = list(csv.reader(file))
    assert written == [columns, *([line[0], line[1], str(line[2]), line[3].name, line[4].name] for line in lines)]


def test_the_tables_elbo_is_the_models(shown):
    """Of real sequences, up to the draws of the latent, the figures of a validation."""
    _, logger, module, data = shown
    batch = next(iter(data.val_dataloader())).rows([0, 1, 2])
    estimates = []
    with torch.no_grad():
        for _ in range(300):
            trace = module.eval().vrnn(SequenceBatch(batch.x, batch.lengths))
            estimates.append((trace.log_px.sum(1) - trace.kl.sum((1, 2))) / batch.lengths)
    mean, std = torch.stack(estimates).mean(0), torch.stack(estimates).std(0)
    found = torch.tensor([line[2] for line in logger.tables["samples/table"][1][:3]])
    assert ((found - mean).abs() < 5 * std + 1e-4).all()
    assert [line[1] for line in logger.tables["samples/table"][1]] == [
        *batch.names,
        "sampled 0",
        "sampled 1",
        "sampled 2",
    ]


@pytest.mark.parametrize(
    ("options", "data", "missing"),
    [
        ({"latent_size": 0}, {}, {"_latent.png", "_traversal.png", "_interpolation.png"}),
        ({}, {"val_size": 1}, {"_interpolation.png"}),
        ({"prior": None}, {"steps": 1}, set()),
        ({"smoothing": True}, {}, set()),
    ],
    ids=["no latent", "one sequence", "fixed prior, one step", "smoothing"],
)
def test_what_a_model_or_data_have_not_is_left_out(tmp_path, options, data, missing):
    sizes = {"train_size": 4, "val_size": 5, "steps": 6, "batch_size": 4} | data
    fit(tmp_path, False, Sines(**sizes), **options)
    everything = {".png", "_latent.png", "_traversal.png", "_interpolation.png", "_table.csv"}
    written = {path.name.removeprefix("step_0000002") for path in (tmp_path / "samples").glob("step_0000002*")}
    assert written == everything - missing


@pytest.mark.parametrize(("modality", "features", "suffix"), [("audio", 2, "wav"), ("strokes", 3, "svg")])
def test_a_sequence_of_nan_is_drawn_and_not_heard(tmp_path, modality, features, suffix):
    """What a model makes of NaN is not a silence; where data miss a value, it is."""
    media = Media(SimpleNamespace(modality=modality, sample_rate=100))
    lost = torch.full((3, features), torch.nan)
    rows = media.to_display({"real": [lost], "sampled": [lost, torch.zeros(3, features)]})
    media.draw(rows).savefig(tmp_path / "x.png")
    found = media.write(rows, tmp_path, "x")
    assert [path.name for path in found[suffix]["sampled"]] == [f"x_sampled_1.{suffix}"]
    assert [path.name for path in found[suffix]["real"]] == [f"x_real_0.{suffix}"]


def test_what_is_missing_of_a_roll_is_shown_and_silent(tmp_path):
    roll = torch.zeros(4, 88)
    roll[1:3] = torch.nan
    rows = Media(SimpleNamespace(modality="roll")).to_display({"given": [roll]})
    assert rows["given"][0].isnan().sum() == 2 * 88
    found = Media(SimpleNamespace(modality="roll")).write(rows, tmp_path, "x")
    assert [path.name for path in found["wav"]["given"]] == ["x_given_0.wav"]


def test_a_callback_shows_a_second_fit_too(tmp_path):
    """Though that has come to the same step."""
    shows = Samples(every_n_validations=2, count=2)
    for name in ("one", "two"):
        data = Sines(train_size=4, val_size=2, steps=6, batch_size=4)
        fit(tmp_path / name, False, data, shows=shows, latent_size=0)
        assert (tmp_path / name / "samples/step_0000002.png").is_file()


def test_a_full_disk_is_said_of_sound_too(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    media = Media(SimpleNamespace(modality="audio", sample_rate=8000))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(UserError, match=r"x_sampled_0\.wav: File too large"):
            media.write({"sampled": [torch.zeros(40, 200)]}, tmp_path, "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


def test_more_than_a_picture_holds_is_refused():
    with pytest.raises(UserError, match=r"samples\.count 65: must be at most 64"):
        Samples(count=65)
