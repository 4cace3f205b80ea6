import csv
from pathlib import Path

import pytest
import yaml

from vrnn_lightning import UserError
from vrnn_lightning.tracking import RunLogger


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
    with pytest.raises(UserError, match=r"metrics.csv: is there already"):
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
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")


def test_wandb_overlay_keeps_the_run_logger_and_goes_on_after_a_resume(lightning, tiny, offline):
    words = ["fit", "-c", tiny, "-c", "configs/wandb.yaml"]
    assert lightning(*words).code == 0
    run = Path("runs/sines/version_0")
    assert written(run / "metrics.csv")
    first = (run / "wandb_id.txt").read_text()
    (offline_run,) = (run / "wandb").glob("offline-run-*")
    assert offline_run.name.endswith(first.strip())
    assert lightning(*words).code == 0
    assert Path("runs/sines/version_1/wandb_id.txt").read_text() != first
    assert lightning(*words, "--ckpt_path", run / "checkpoints/last.ckpt", "--trainer.max_epochs=2").code == 0
    assert (run / "wandb_id.txt").read_text() == first
    assert all(path.name.endswith(first.strip()) for path in (run / "wandb").glob("offline-run-*"))
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


def test_progress_in_a_log_file_is_a_line_per_epoch(lightning, tiny):
    said = lightning("fit", "-c", tiny, "--trainer.max_epochs=3")
    lines = [line for line in said.out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 3
    for word in ("elbo", "reconstruction", "kl", "beta", "val_elbo"):
        assert f"  {word} " in lines[-1]
    assert "v_num" not in said.out
    assert "\r" not in said.out
