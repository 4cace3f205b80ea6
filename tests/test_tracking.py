import csv
import io
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tracked
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from vrnn_lightning.datamodules.sines import Sines

from vrnn_lightning import UserError, VRNNLightningModule, tracking
from vrnn_lightning.callbacks import Samples
from vrnn_lightning.tracking import RunLogger, WandbLogger

ROOT = Path(__file__).parent.parent


def written(file):
    with Path(file).open(newline="") as lines:
        return list(csv.DictReader(lines))


def logger(folder, name="run", **options):
    made = RunLogger(**options)
    made.place(folder, name)
    return made


def test_runs_are_numbered_and_never_share_a_folder(folder):
    first, second = logger(folder), logger(folder)
    assert [first.version, second.version, first.version] == [0, 1, 0]
    assert Path(second.log_dir) == folder / "runs" / "run" / "version_1"


def test_what_the_user_says_of_the_folder_holds(folder):
    made = logger(folder, save_dir=str(folder / "all"), name="mine", version="first")
    assert Path(made.log_dir) == folder / "all" / "mine" / "first"


def test_rows_behind_the_checkpoint_give_way_to_new_ones(folder):
    first = logger(folder)
    for step in range(5):
        first.log_metrics({"loss": float(step)}, step)
    first.finalize("success")
    with (Path(first.log_dir) / "metrics.csv").open("a") as file:
        file.write("9")
    second = logger(folder)
    second.resume(Path(first.log_dir), step=3, epoch=0, training=True)
    second.log_metrics({"loss": 30.0, "new": 1.0}, 3)
    second.finalize("success")
    rows = written(Path(first.log_dir) / "metrics.csv")
    assert [(row["step"], row["loss"], row["new"]) for row in rows] == [
        ("0", "0.0", ""),
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "30.0", "1.0"),
    ]


def test_results_of_a_test_are_appended_at_the_checkpoint(folder):
    first = logger(folder)
    first.log_metrics({"loss": 1.0, "epoch": 4}, 7)
    first.finalize("success")
    second = logger(folder)
    second.resume(Path(first.log_dir), step=6, epoch=2, training=False)
    second.log_metrics({"test/elbo": 2.0, "epoch": 0}, 0)
    second.finalize("success")
    rows = written(Path(first.log_dir) / "metrics.csv")
    assert [(row["step"], row["epoch"]) for row in rows] == [("7", "4"), ("5", "2")]


def test_old_rows_are_never_overwritten_unasked(folder):
    first, second = logger(folder, version="same"), logger(folder, version="same")
    first.log_metrics({"loss": 1.0}, 0)
    first.finalize("success")
    with pytest.raises(UserError, match=r"metrics.csv: exists already"):
        second.log_metrics({"loss": 1.0}, 0)


def test_run_that_logged_nothing_leaves_no_folder(folder):
    made = logger(folder)
    claimed = Path(made.log_dir)
    assert claimed.is_dir()
    made.finalize("failed")
    assert not claimed.exists()


def test_rows_are_on_disk_as_soon_as_they_are_saved(folder):
    made = logger(folder)
    made.log_metrics({"loss": 1.0}, 0)
    made.save()
    assert len(written(Path(made.log_dir) / "metrics.csv")) == 1


@pytest.fixture
def again(monkeypatch, folder):
    """W&B with its files in the working directory; what it returns lets it read the environment again."""
    import wandb

    apart = dict.fromkeys(("DATA_DIR", "CACHE_DIR", "CONFIG_DIR"), str(folder / "of_wandb"))
    for name, value in {"SILENT": "true", "CONSOLE": "off", **apart}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)  # of another test's service, which has ended
    yield wandb.teardown
    wandb.teardown()


@pytest.fixture
def offline(again, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_wandb_overlay_keeps_the_run_logger_and_goes_on_after_a_resume(lightning, tiny, offline):
    words = ["fit", "-c", tiny, "-c", "configs/wandb.yaml"]
    assert lightning(*words).code == 0
    run = Path("runs/sines/version_0")
    rows = written(run / "metrics.csv")
    first = (run / "wandb_id.txt").read_text()
    (offline_run,) = (run / "wandb").glob("offline-run-*")
    assert offline_run.name.endswith(first.strip())
    assert lightning(*words).code == 0
    assert Path("runs/sines/version_1/wandb_id.txt").read_text() != first
    moved = run.rename("moved")
    better = rows[-1]["val/elbo"]
    (moved / "metrics.csv").write_text((moved / "metrics.csv").read_text().replace(better, "9.5"))
    assert lightning(*words, "--ckpt_path", moved / "checkpoints/last.ckpt", "--trainer.max_epochs=2").code == 0
    assert (moved / "wandb_id.txt").read_text() == first
    (second,) = set((moved / "wandb").glob("offline-run-*")) - {moved / "wandb" / offline_run.name}
    went_on = tracked.read(second)
    assert went_on.id == first.strip()
    assert went_on.column("epoch") == [1, 1, 1]
    assert len(went_on.column("val/elbo")) == 1
    assert went_on.summary["val/elbo"] == {"max": 9.5}
    assert not Path("wandb").exists()


def test_wandb_run_is_named_after_the_folder_and_gets_the_nested_config(lightning, tiny, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")
    started, runs, codes = [], [], []
    init = wandb.init

    def spy(**options):
        run = init(**options)
        finish = run.finish
        monkeypatch.setattr(run, "finish", lambda exit_code: (codes.append(exit_code), finish(exit_code=exit_code)))
        started.append(options)
        runs.append(run)
        return run

    monkeypatch.setattr(wandb, "init", spy)
    assert lightning("fit", "-c", tiny, "-c", "configs/wandb.yaml").code == 0
    folder = Path.cwd() / "runs/sines/version_0"
    assert [(options["name"], options["dir"]) for options in started] == [("sines/version_0", str(folder))]
    assert dict(runs[0].config) == yaml.safe_load((folder / "config.yaml").read_text())
    assert codes == [0]
    assert wandb.run is None


def test_an_offline_run_holds_figures_config_and_the_best_checkpoint(lightning, tiny, offline):
    asked = {"group": "paper", "job_type": "train", "tags+": "sines", "notes": "a try", "log_model": "best"}
    flags = [f"--trainer.logger.{option}={value}" for option, value in asked.items()]
    unsteady = ["--trainer.max_epochs=3", "--model.optimizer=SGD", "--model.optimizer.lr=0.1"]
    assert lightning("fit", "-c", tiny, "-c", "configs/wandb.yaml", *unsteady, *flags).code == 0
    folder = Path("runs/sines/version_0")
    rows, run = written(folder / "metrics.csv"), tracked.read(folder)

    for name in rows[0]:
        logged = [float(row[name]) for row in rows if row[name]]
        assert run.column("trainer/global_step" if name == "step" else name) == pytest.approx(logged, rel=1e-6), name
    assert {"train/grad_norm", "train/grad_norm/prior", "val/elbo", "val/objective"} <= run.keys
    assert run.metrics["*"].step_metric == run.metrics["val/elbo"].step_metric == "trainer/global_step"
    elbo, gap = run.column("val/elbo"), run.column("val/gap")
    assert max(elbo) != elbo[-1]
    assert run.summary["val/elbo"] == run.summary["val/objective"] == {"max": max(elbo)}
    assert run.summary["val/gap"] == {"min": min(gap)}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: run.config[key] for key in config} == config
    assert (run.about.display_name, run.about.project) == ("sines/version_0", "vrnn-lightning")
    assert (run.about.run_group, run.about.job_type, run.about.notes) == ("paper", "train", "a try")
    assert list(run.about.tags) == ["sines"]
    assert run.exit_code == 0

    (artifact,) = run.artifacts
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert (artifact.type, artifact.name) == ("model", f"model-{run.id}")
    assert sorted(artifact.aliases) == ["best", "latest", f"step-{best['global_step']}"]
    stored = json.loads(artifact.metadata)
    assert stored.pop("score") == pytest.approx(max(elbo))
    where = {"step": best["global_step"], "epoch": elbo.index(max(elbo))}
    assert stored == {"monitor": "val/elbo", "mode": "max", **where}
    (file,) = artifact.manifest.contents
    assert file.path == "model.ckpt"
    assert Path(file.local_path).read_bytes() == (folder / "checkpoints" / "best.ckpt").read_bytes()


def test_the_page_loads_a_model_back_from_its_artifact(lightning, tiny, monkeypatch):
    assert lightning("fit", "-c", tiny).code == 0
    kept, asked = Path("runs/sines/version_0/checkpoints/best.ckpt"), []

    def artifact(name):
        def download():
            copy = Path("artifacts") / name.rpartition("/")[2]
            copy.mkdir(parents=True)
            shutil.copy(kept, copy / "model.ckpt")
            return str(copy)

        asked.append(name)
        return SimpleNamespace(download=download)

    monkeypatch.setattr("wandb.Api", lambda: SimpleNamespace(artifact=artifact))
    page = (ROOT / "docs" / "training.md").read_text()
    (snippet,) = re.findall(r"^```python\n(import wandb.*?)^```", page, re.DOTALL | re.MULTILINE)
    found = {}
    exec(snippet, found)
    assert asked[0].endswith(":best")
    weights = torch.load(kept, weights_only=True)["state_dict"]
    assert {name: x.tolist() for name, x in found["module"].state_dict().items()} == {
        name: x.tolist() for name, x in weights.items()
    }


class Stop(Callback):
    """Ends a fit in the middle, after so many epochs."""

    def on_train_epoch_start(self, trainer, *_):
        if trainer.current_epoch == 2:
            raise RuntimeError("stopped")


def test_the_best_checkpoint_of_a_run_that_breaks_off_is_logged_from_python_too(folder, offline):
    last, best = ModelCheckpoint(filename="last"), ModelCheckpoint(monitor="val/elbo", mode="max", filename="best")
    usual = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    logger = WandbLogger(log_model="best")
    trainer = Trainer(logger=logger, callbacks=[last, best, Stop()], max_epochs=3, **usual)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.fit(VRNNLightningModule(3, latent_size=2), Sines(train_size=8, val_size=4, steps=5))
    run = tracked.read(folder)
    (artifact,) = run.artifacts
    assert Path(artifact.manifest.contents[0].local_path).read_bytes() == Path(best.best_model_path).read_bytes()
    assert json.loads(artifact.metadata)["step"] == 2
    assert run.exit_code == 1


def test_pictures_sounds_and_tables_of_both(folder, offline):
    class Heard(Sines):
        modality = "audio"
        sample_rate = 1000

    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=1,
        logger=WandbLogger(),
        callbacks=[Samples(count=2)],
        **options,
    )
    data = Heard(train_size=4, val_size=2, steps=5, batch_size=2)
    trainer.fit(VRNNLightningModule(num_features=3, latent_size=2, hidden_size=4), data)
    run = tracked.read(folder)
    shown = {"latent", "traversal", "interpolation", "table", "real", "reconstructed", "sampled"}
    assert {"samples", *(f"samples/{key}" for key in shown)} <= run.keys
    (artifact,) = run.artifacts  # wandb keeps what a table's cells show in one
    held = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    content = json.loads(held["samples/table.table.json"].read_text())
    assert content["columns"] == ["kind", "name", "elbo", "picture", "sound"]
    assert [line[0] for line in content["data"]] == ["real", "real", "sampled", "sampled"]
    for column, kind in ((3, "image-file"), (4, "audio-file")):
        assert {line[column]["_type"] for line in content["data"]} == {kind}
        assert {line[column]["path"] for line in content["data"]} <= held.keys()
    assert len([name for name in run.media if name.endswith(".png")]) == 4
    assert len([name for name in run.media if name.endswith(".wav")]) == 6


def test_a_wandb_without_the_class_that_lightning_imports(folder, offline, monkeypatch):
    monkeypatch.delattr("wandb.sdk.lib.RunDisabled", raising=False)
    logger = tracking.WandbLogger()
    assert logger.experiment.id
    logger.experiment.finish()


def test_a_best_checkpoint_needs_a_monitor(lightning, tiny, offline):
    words = ["--checkpoint.monitor=null", "--trainer.logger.log_model=best"]
    said = lightning("fit", "-c", tiny, "-c", "configs/wandb.yaml", *words)
    assert said.code == 1
    assert said.err.splitlines()[-1].startswith("error: --trainer.logger.log_model best: no checkpoint has a monitor")
    said = lightning("fit", "-c", tiny, "-c", "configs/wandb.yaml", "--trainer.logger.log_model=bset")
    assert said.err == "error: --trainer.logger.log_model bset: expected one of ['best', 'all'], bool\n"


@pytest.mark.parametrize(("log_model", "times"), [("true", 1), ("all", 2)])
def test_lightnings_ways_of_logging_checkpoints_stay(lightning, tiny, offline, log_model, times):
    words = ["--trainer.max_epochs=2", f"--trainer.logger.log_model={log_model}"]
    assert lightning("fit", "-c", tiny, "-c", "configs/wandb.yaml", *words).code == 0
    run = tracked.read(Path("runs"))
    found = [(artifact.name, json.loads(artifact.metadata)["original_filename"]) for artifact in run.artifacts]
    assert sorted(found) == sorted([(f"model-{run.id}", "best.ckpt"), (f"last-{run.id}", "last.ckpt")] * times)


def test_a_run_without_login_or_network_goes_on_offline(lightning, tiny, monkeypatch, again):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal
    words = ["fit", "-c", tiny, "-c", "configs/wandb.yaml"]
    for number, (cause, environment) in enumerate(
        {
            "(?i)api.key.* configured": {"WANDB_API_KEY": None},
            "127.0.0.1:9": {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"},
        }.items()
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(tracking.wandb, "INIT_TIMEOUT", 1.0)
        began = time.monotonic()
        said = lightning(*words)
        assert time.monotonic() - began < 30
        assert said.code == 0
        (line,) = [line for line in said.err.splitlines() if line.startswith("W&B: ")]
        assert re.search(cause, line)
        (kept,) = Path(f"runs/sines/version_{number}/wandb").resolve().glob("offline-run-*")
        assert f"`wandb sync {kept}`" in line
        run = tracked.read(kept)
        assert run.exit_code == 0
        assert len(run.column("val/elbo")) == 1
        assert kept.name.endswith(Path(f"runs/sines/version_{number}/wandb_id.txt").read_text().strip())
        again()


def test_what_wandb_takes_nowhere_is_one_line_and_leaves_no_folder(lightning, tiny, offline, monkeypatch):
    words = ["fit", "-c", tiny, "-c", "configs/wandb.yaml"]
    refused = [lightning(*words, "--trainer.logger.project=a/b")]
    monkeypatch.setenv("WANDB_MODE", "on-line")
    refused.append(lightning(*words))
    for said, word in zip(refused, ("a/b", "on-line"), strict=True):
        assert said.code == 1
        line = said.err.splitlines()[-1]
        assert line.startswith("error: --trainer.logger WandbLogger: ")
        assert word in line
        assert "Traceback" not in said.err
    assert not list(Path("runs").rglob("*.*"))


def test_wandbs_own_variables_hold(folder, offline, monkeypatch):
    for name, value in {"PROJECT": "mine", "NAME": "first", "RUN_GROUP": "paper", "INIT_TIMEOUT": "7"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logger = WandbLogger()
    assert logger.experiment.settings.init_timeout == 7
    logger.finalize("success")
    about = tracked.read(folder).about
    assert (about.project, about.display_name, about.run_group) == ("mine", "first", "paper")


def test_a_sweeps_agent_starts_runs(lightning, offline, monkeypatch):
    """The command is the one that wandb's own agent makes of the file."""
    from wandb import wandb_agent

    started = []
    monkeypatch.setattr(wandb_agent, "AgentProcess", lambda **given: started.append(given) or SimpleNamespace())
    monkeypatch.setenv("WANDB_DIR", str(Path.cwd() / "agent"))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "the agent's")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "the agent's")
    sweep = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())
    drawn = {name: space.get("values", [space.get("min")])[-1] for name, space in sweep["parameters"].items()}
    agent = wandb_agent.Agent(None, None, sweep_id="sweep")
    agent._sweep_command = sweep["command"]
    arguments = {name: {"value": value} for name, value in drawn.items()}
    agent._command_run({"type": "run", "run_id": "proposed", "program": sweep["program"], "args": arguments})
    command = started[0]["command"]
    assert command[:4] == ["/usr/bin/env", "python", "-m", "vrnn_lightning"]

    (space,) = Path("agent").rglob("config-proposed.yaml")
    assert set(drawn) <= set(yaml.safe_load(space.read_text()))
    monkeypatch.delenv("WANDB_SWEEP_PARAM_PATH")  # wandb reads it and leaves the file open, which pytest warns of
    small = ["--trainer.max_epochs=2", "--data.train_size=8", "--data.val_size=4", "--data.steps=5"]
    said = lightning(*command[4:], *small, "--trainer.log_every_n_steps=1", "--samples.every_n_validations=0")
    assert said.code == 0
    assert "Ignoring" not in said.err
    run = tracked.read(Path("runs"))
    assert run.id == "proposed"
    options = run.config["model"]
    for name, value in drawn.items():
        place = options
        *path, last = name.split(".")[1:]
        for part in path:
            place = place[part].get("init_args", place[part])
        assert place[last] == value, name
    assert set(run.summary[sweep["metric"]["name"]]) == {sweep["metric"]["goal"][:3]}
    assert run.column(sweep["metric"]["name"])


def test_progress_in_a_log_file_is_a_line_per_epoch(lightning, tiny):
    said = lightning("fit", "-c", tiny, "--trainer.max_epochs=3")
    lines = [line for line in said.out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 3
    for word in ("elbo", "reconstruction", "kl", "beta", "val_elbo"):
        assert f"  {word} " in lines[-1]
    assert "v_num" not in said.out
    assert "\r" not in said.out
