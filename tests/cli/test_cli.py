import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from vrnn_lightning import VRNNLightningModule

PLUGIN = """
from pathlib import Path

import torch
from vrnn_lightning import SequenceSample, SequenceDataModule, UserError

class Pairs(SequenceDataModule):
    def __init__(self, width: int = 2, wrong: str = "", num_workers: int = 0) -> None:
        found = Path("width.txt")
        super().__init__(int(found.read_text()) if found.exists() else width, batch_size=2, num_workers=num_workers)
        if wrong == "constructor":
            raise UserError("pairs.txt: no such file")
        self.wrong = wrong

    def sequences(self, split):
        if self.wrong == "setup":
            raise UserError("pairs.txt: is empty")
        value = float("nan") if self.wrong == "value" else 1.0
        return [SequenceSample(torch.full((3, self.num_features), value), name=f"pair {i}") for i in range(4)]
"""
SMALL = (
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--model.hidden_size=4",
    "--samples.every_n_validations=0",
)


@pytest.fixture
def plugin(folder):
    file = folder / "datamodules" / "pairs.py"
    file.parent.mkdir()
    file.write_text(PLUGIN)
    return file


@pytest.fixture
def trained(lightning, tiny):
    """The folder of a run of two epochs."""
    assert lightning("fit", "-c", tiny, "--trainer.max_epochs=2").code == 0
    return Path("runs/sines/version_0")


def rows(run):
    with (Path(run) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def one_line(said, *parts):
    lines = said.err.strip().splitlines()
    assert said.code != 0
    assert "Traceback" not in said.err
    assert lines[-1].startswith("error: ")
    for part in parts:
        assert part in lines[-1]
    return True


def test_fit_makes_a_run_folder_and_sums_up(lightning, tiny):
    said = lightning("fit", "-c", tiny, "--samples.every_n_validations=1", "--report", "true")
    run = Path("runs/sines/version_0")
    assert said.code == 0
    names = ["checkpoints", "config.yaml", "metrics.csv", "report.html", "samples"]
    assert sorted(path.name for path in run.iterdir()) == names
    assert f"report: {run}/report.html" in said.out
    page = (run / "report.html").read_text()
    assert page.count("<img") == 5, "curves, samples, latent, traversal, interpolation"
    assert lightning("test", "--ckpt_path", "best", "--data", "Sines", "--evaluation.samples=2").code == 0
    tested = (run / "report.html").read_text()
    assert "test/elbo" in tested
    assert "test/elbo" not in page
    (run / "report.html").unlink()
    assert lightning("report", run).out == f"report: {run}/report.html\n"
    assert (run / "report.html").read_text() == tested
    assert lightning("report", "elsewhere").err.startswith("error: elsewhere: is not a run's folder")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert "best val/elbo" in said.out
    assert "gap" in said.out
    assert f"lightning test --ckpt_path {run}/checkpoints/best.ckpt" in said.out
    assert "epoch 0  step 2" in said.out


def test_a_config_may_change_while_a_fit_runs(lightning, tiny, monkeypatch):
    monkeypatch.setattr(VRNNLightningModule, "on_fit_end", lambda module: tiny.write_text("data: ["), raising=False)
    said = lightning("fit", "-c", tiny)
    assert said.code == 0, said.err
    assert "test it: lightning test --ckpt_path" in said.out


def test_saved_config_runs_again_into_a_new_folder(lightning, trained):
    assert lightning("fit", "-c", trained / "config.yaml", "--trainer.max_epochs=1").code == 0
    first, second = (
        yaml.safe_load((trained.parent / v / "config.yaml").read_text()) for v in ("version_0", "version_1")
    )
    second["trainer"]["max_epochs"] = 2
    assert first == second


def test_config_on_the_command_line_may_name_the_data_in_every_way(lightning, folder, plugin):
    Path("short.yaml").write_text("data: Pairs\n")
    Path("long.yaml").write_text("data: {class_path: Pairs, init_args: {width: 3}}\n")
    Path("other.yaml").write_text("seed_everything: 1\n")
    for words in (
        ["--data", "Pairs"],
        ["--data=Pairs"],
        ["--data.class_path", "Pairs"],
        ["-c", "short.yaml"],
        ["--config=long.yaml", "-c", "other.yaml"],
        ["-c", "other.yaml", "-c", "long.yaml", "--data.width=4"],
        ["--data", "datamodules.pairs.Pairs"],
    ):
        assert lightning("fit", *SMALL, "--trainer.fast_dev_run=true", *words).code == 0


def test_datamodule_elsewhere_by_dotted_path(lightning, folder):
    Path("my_elsewhere.py").write_text(PLUGIN.replace("Pairs", "Elsewhere"))
    assert lightning("fit", *SMALL, "--data", "my_elsewhere.Elsewhere").code == 0
    assert Path("runs/elsewhere/version_0/checkpoints/last.ckpt").is_file()


def test_help(lightning, plugin):
    listed = "DoublePendulum, Handwriting, HiddenMarkov, Jumps, LinearGaussian, Lorenz, MNISTRows, Pairs, Pendulum,"
    assert listed in " ".join(lightning("fit", "--help").out.split())
    assert "--data.wrong" in lightning("fit", "--data.help", "Pairs").out
    assert "--model.emission.min_std" in lightning("fit", "--model.emission.help", "Gaussian").out


def test_emission_and_callbacks_by_short_name(lightning, tiny):
    Path("kl.yaml").write_text("trainer: {callbacks+: [{class_path: LinearKLAnnealing, init_args: {steps: 2}}]}\n")
    Path("more.yaml").write_text("trainer: {callbacks+: [{class_path: LearningRateMonitor}]}\n")
    said = lightning(
        "fit", "-c", tiny, "-c", "kl.yaml", "-c", "more.yaml", "--model.emission", "Bernoulli", "--print_config"
    )
    config = yaml.safe_load(said.out)
    assert config["model"]["emission"]["class_path"] == "vrnn_lightning.heads.Bernoulli"
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names == ["LinearKLAnnealing", "LearningRateMonitor"]
    assert lightning("fit", "-c", tiny, "-c", "kl.yaml", "-c", "more.yaml").code == 0


def test_logger_overlays_keep_the_run_logger(lightning, tiny):
    Path("two.yaml").write_text("trainer: {logger+: [{class_path: CSVLogger, init_args: {save_dir: other}}]}\n")
    config = yaml.safe_load(lightning("fit", "-c", tiny, "-c", "two.yaml", "--print_config").out)
    names = [logger["class_path"].rpartition(".")[2] for logger in config["trainer"]["logger"]]
    assert names == ["RunLogger", "CSVLogger"]


@pytest.mark.parametrize(
    "words", [["--trainer.logger=false"], ["-c", "off.yaml"], ["--trainer.enable_checkpointing=false"]]
)
def test_without_logger_or_checkpoints(lightning, tiny, words):
    Path("off.yaml").write_text("trainer: {logger: false, enable_progress_bar: false}\n")
    assert lightning("fit", "-c", tiny, *words).code == 0
    assert Path("runs").exists() == ("checkpointing" in words[0])


def test_run_folder_follows_root_and_name(lightning, tiny):
    words = ["--trainer.default_root_dir=out", "--trainer.logger.name=first"]
    assert lightning("fit", "-c", tiny, *words).code == 0
    assert Path("out/runs/first/version_0/config.yaml").is_file()
    assert lightning("fit", "-c", tiny, *words, "--ckpt_path=last", "--trainer.max_epochs=2").code == 0
    assert rows("out/runs/first/version_0")[-1]["epoch"] == "1"


def test_shipped_config_serves_where_there_is_none(lightning, folder):
    assert "LinearKLAnnealing" in lightning("fit", "-c", "configs/synthetic.yaml", "--print_config").out
    Path("configs").mkdir()
    Path("configs/synthetic.yaml").write_text("data: Sines\nseed_everything: 17\n")
    assert "seed_everything: 17" in lightning("fit", "-c", "configs/synthetic.yaml", "--print_config").out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["-c", "nope.yaml"], ["nope.yaml: no such config file"]),
        (["--data", "Sine"], ["--data Sine:", "Did you mean 'Sines'?", "Speech"]),
        (["--data", "no.such.Data"], ["no.such"]),
        (["--data", "torch.nn.Linear"], ["torch.nn.Linear", "not a LightningDataModule"]),
        ([], ["--data", "Sines"]),
        (["--data=Sines", "--model.hiden_size=3"], ["--model.hiden_size", "Did you mean '--model.hidden_size'?"]),
        (["--data=Sines", "--trainer.max_epoch=3"], ["Did you mean '--trainer.max_epochs'?"]),
        (["--data=Sines", "--data.bach_size=3"], ["bach_size", "Sines", "Did you mean 'batch_size'?"]),
        (["--data=Sines", "--model.emission=Bernouli"], ["Bernouli", "Did you mean 'Bernoulli'?"]),
        (["--data=Sines", "--model.hidden_size=x"], ["--model.hidden_size", "x", "int"]),
        (["--data=Sines", "-c", "typo.yaml"], ["hiden_size", "Did you mean '--model.hidden_size'?"]),
        (["--data=Sines", "-c", "callback.yaml"], ["LinearKLAnealing", "Did you mean 'LinearKLAnnealing'?"]),
        (["-c", "data.yaml"], ["bach_size", "Did you mean 'batch_size'?"]),
        (["-c", "broken.yaml"], ["broken.yaml", "YAML"]),
        (["--data=Sines", "--ckpt_path=last"], ["last.ckpt", "runs/sines"]),
        (["--data=Sines", "--ckpt_path=no.ckpt"], ["no.ckpt: no such file"]),
        (["--data=Sines", "--ckpt_path=typo.yaml"], ["typo.yaml: is damaged or not a checkpoint"]),
    ],
)
def test_mistake_is_one_line(lightning, folder, words, parts):
    Path("typo.yaml").write_text("model: {hiden_size: 3}\n")
    Path("callback.yaml").write_text("trainer: {callbacks: [{class_path: LinearKLAnealing}]}\n")
    Path("data.yaml").write_text("data: {class_path: Sines, init_args: {bach_size: 3}}\n")
    Path("broken.yaml").write_text("data: [\n")
    said = lightning("fit", *words)
    assert one_line(said, *parts)
    assert len(said.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--data.wrong=constructor"], "error: pairs.txt: no such file"),
        (["--data.wrong=setup"], "error: pairs.txt: is empty"),
        (
            ["--data.wrong=value", "--data.num_workers=1"],
            "error: pair 0: holds NaN or infinite values. Fix: correct or remove it",
        ),
    ],
)
def test_user_errors_of_every_depth_are_one_line(lightning, plugin, words, line):
    said = lightning("fit", *SMALL, "--data=Pairs", *words)
    assert said.code == 1
    assert "Traceback" not in said.err
    assert said.err.strip().splitlines()[-1] == line


def test_run_that_fails_before_it_starts_leaves_no_folder(lightning, plugin):
    lightning("fit", *SMALL, "--data=Pairs", "--data.wrong=setup")
    assert not Path("runs/pairs/version_0").exists()


def test_debug_shows_the_traceback(lightning, plugin):
    from vrnn_lightning import UserError

    with pytest.raises(UserError, match="is empty"):
        lightning("--debug", "fit", *SMALL, "--data=Pairs", "--data.wrong=setup")


def test_other_exceptions_keep_their_traceback(lightning, folder):
    Path("my_sums.py").write_text(PLUGIN.replace("raise UserError", "raise ArithmeticError").replace("Pairs", "Sums"))
    with pytest.raises(ArithmeticError):
        lightning("fit", *SMALL, "--data=my_sums.Sums", "--data.wrong=setup")


def test_resume_goes_on_as_if_it_had_never_stopped(lightning, tiny, trained):
    assert lightning("fit", "-c", tiny, "--ckpt_path=last", "--trainer.max_epochs=4").code == 0
    assert lightning("fit", "-c", tiny, "--trainer.max_epochs=4").code == 0
    assert [path.name for path in sorted(trained.parent.iterdir())] == ["version_0", "version_1"]
    assert rows(trained) == rows("runs/sines/version_1")


def test_resume_after_a_kill_leaves_no_row_twice(lightning, tiny, trained):
    older = shutil.copy(trained / "checkpoints/last.ckpt", trained / "checkpoints/older.ckpt")
    lightning("fit", "-c", tiny, "--ckpt_path=last", "--trainer.max_epochs=3")
    with (trained / "metrics.csv").open("a") as file:
        file.write("2,5")  # cut off
    lightning("fit", "-c", tiny, "--ckpt_path", older, "--trainer.max_epochs=3")
    lightning("fit", "-c", tiny, "--trainer.max_epochs=3")
    assert rows(trained) == rows("runs/sines/version_1")


def test_last_is_the_last_also_where_it_is_not_the_best(lightning, tiny):
    assert lightning("fit", "-c", tiny, "--trainer.max_epochs=3", "--checkpoint.mode=min").code == 0
    files = (Path("runs/sines/version_0/checkpoints") / f"{name}.ckpt" for name in ("best", "last"))
    assert [torch.load(file, weights_only=True)["epoch"] for file in files] == [0, 2]
    lightning("fit", "-c", tiny, "--trainer.max_epochs=4", "--checkpoint.mode=min", "--ckpt_path=last")
    lightning("fit", "-c", tiny, "--trainer.max_epochs=4", "--checkpoint.mode=min")
    assert rows("runs/sines/version_0") == rows("runs/sines/version_1")


def test_resume_beyond_the_last_epoch_is_refused(lightning, tiny, trained):
    assert one_line(lightning("fit", "-c", tiny, "--ckpt_path=last"), "--trainer.max_epochs 1", "2 epochs behind it")


def test_resume_says_nothing_of_the_folder_being_there(lightning, tiny, trained, recwarn):
    said = lightning("fit", "-c", tiny, "--ckpt_path=last", "--trainer.max_epochs=3")
    assert "not empty" not in said.err
    assert "deleted" not in said.err


def test_moved_run_keeps_its_best(lightning, tiny, trained):
    shutil.move(trained.parent.parent, "elsewhere")
    last = "elsewhere/sines/version_0/checkpoints/last.ckpt"
    score = torch.load(last, weights_only=True)["callbacks"]
    said = lightning("fit", "--ckpt_path", last, "--trainer.accelerator=cpu", "--trainer.max_epochs=2")
    assert said.code == 0
    (best,) = (state["best_model_score"] for state in score.values() if state.get("monitor"))
    assert f"best val/elbo: {best:.4f}" in said.out


def test_evaluation_from_the_checkpoint_alone(lightning, tiny, trained):
    config = (trained / "config.yaml").read_text()
    best = trained / "checkpoints/best.ckpt"
    for command in ("test", "validate"):
        assert lightning(command, "--ckpt_path", best, "--trainer.accelerator=cpu").code == 0
    assert (
        lightning("test", "--ckpt_path=best", "--data=Sines", "--data.batch_size=2", "--trainer.accelerator=cpu").code
        == 0
    )
    written = rows(trained)
    assert [row["step"] for row in written if row["test/elbo"]] == ["3", "3"]
    assert [row["epoch"] for row in written if row["test/elbo"]] == ["1", "1"]
    assert len({row["step"] for row in written if row["train/loss"]}) == 4
    assert (trained / "config.yaml").read_text() == config
    assert [path.name for path in trained.parent.iterdir()] == ["version_0"]


def test_prediction_from_the_checkpoint_alone(lightning, trained):
    said = lightning("predict", "--ckpt_path=best", "--trainer.accelerator=cpu")
    assert said.code == 0
    assert "encodings.npz" in said.out
    assert (trained / "encodings.npz").is_file()
    again = ("predict", "--ckpt_path=best", "--trainer.accelerator=cpu")
    assert one_line(lightning(*again), "encodings.npz: is an earlier answer")
    assert lightning(*again, "--overwrite").code == 0


def test_a_test_without_a_checkpoint_says_so(lightning, tiny):
    assert "has not been trained" in lightning("test", "-c", tiny).err


@pytest.mark.parametrize(
    ("command", "words", "parts"),
    [
        ("test", ["--model.hidden_size=5"], ["--model.hidden_size 5", "4"]),
        ("test", ["--model.emission=Bernoulli"], ["--model.emission", "Bernoulli", "Gaussian"]),
        ("test", ["--data=Sines", "--data.seed=5"], ["--data.seed 5", "0"]),
        ("test", ["--data=Speech", "--data.root=."], ["Speech", "Sines"]),
        ("fit", ["--model.optimizer.lr=1"], ["--model.optimizer.lr 1", "0.001"]),
        ("fit", ["-c", "tiny.yaml", "--data.steps=6"], ["--data.steps 6", "5"]),
    ],
)
def test_option_that_contradicts_the_checkpoint_is_refused(lightning, trained, command, words, parts):
    said = lightning(command, "--ckpt_path", trained / "checkpoints/best.ckpt", "--trainer.accelerator=cpu", *words)
    assert one_line(said, "best.ckpt", *parts)


def test_training_options_do_not_matter_to_a_test(lightning, tiny, trained):
    words = ["-c", tiny, "--ckpt_path=best", "--model.optimizer.lr=1"]
    assert lightning("test", *words).code == 0


def test_damaged_and_foreign_checkpoints_are_one_line(lightning, trained):
    whole = (trained / "checkpoints/best.ckpt").read_bytes()
    Path("cut.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {}}, "foreign.ckpt")
    torch.save(torch.nn.Linear(1, 1), "pickle.ckpt")
    for name in ("cut", "foreign", "pickle"):
        assert one_line(lightning("test", "--ckpt_path", f"{name}.ckpt"), f"{name}.ckpt")


def test_other_width_names_both(lightning, plugin):
    assert lightning("fit", *SMALL, "--data=Pairs").code == 0
    Path("width.txt").write_text("5")
    said = lightning("test", "--ckpt_path=best", "--data=Pairs", "--trainer.accelerator=cpu")
    assert one_line(said, "5 features", "2")


def test_checkpoint_that_lies_in_no_run_gets_a_new_folder(lightning, tiny, trained):
    shutil.copy(trained / "checkpoints/last.ckpt", "weights.ckpt")
    assert lightning("fit", "-c", tiny, "--ckpt_path=weights.ckpt", "--trainer.max_epochs=3").code == 0
    assert {row["epoch"] for row in rows("runs/sines/version_1")} == {"2"}


def test_metrics_are_complete_when_a_run_is_stopped(lightning, plugin):
    Path("my_stop.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Stop(Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        if trainer.global_step == 3:\n"
        "            raise KeyboardInterrupt\n"
    )
    Path("stop.yaml").write_text("trainer: {log_every_n_steps: 1, callbacks: [{class_path: my_stop.Stop}]}\n")
    said = lightning("fit", *SMALL[:1], *SMALL[2:], "--trainer.max_epochs=2", "-c", "stop.yaml", "--data=Pairs")
    assert said.code != 0
    assert [row["step"] for row in rows("runs/pairs/version_0") if row["train/loss"]] == ["0", "1"]


def metrics(run, name):
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_no_words_is_one_line(lightning):
    said = lightning()
    assert said.code == 2
    assert "Traceback" not in said.err


def test_a_resume_without_a_config_goes_on_with_the_run_s(lightning, tiny, folder):
    """Annealing, clipping and everything else are the run's own, and its config.yaml keeps them."""
    overlay = folder / "kl.yaml"
    overlay.write_text("trainer: {callbacks+: [{class_path: LinearKLAnnealing, init_args: {steps: 100}}]}")
    assert lightning("fit", "-c", tiny, "-c", overlay).code == 0
    assert lightning("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3).code == 0
    run = folder / "runs" / "sines" / "version_0"
    assert metrics(run, "train/beta") == pytest.approx([step / 100 for step in range(6)])
    assert "LinearKLAnnealing" in (run / "config.yaml").read_text()


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_run_stopped_by_max_steps_resumes_exactly(lightning, tiny, folder, stop):
    common = ("fit", "-c", tiny, "--data.train_size", 16, "--trainer.max_epochs", 10)
    assert lightning(*common, "--trainer.max_steps", 6, "--trainer.default_root_dir", "straight").code == 0
    assert lightning(*common, "--trainer.max_steps", stop).code == 0
    assert lightning(*common, "--trainer.max_steps", 6, "--ckpt_path", "last").code == 0
    losses = [metrics(root / "runs" / "sines" / "version_0", "train/loss") for root in (folder / "straight", folder)]
    assert losses[0] == losses[1]


def test_the_last_epoch_is_kept_whether_it_was_validated_or_not(lightning, tiny, folder):
    for more in (("--trainer.check_val_every_n_epoch", 2), ("--trainer.limit_val_batches", 0)):
        assert lightning("fit", "-c", tiny, "--trainer.max_epochs", 3, *more).code == 0
    for run in (folder / "runs" / "sines").iterdir():
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6


def test_a_schedule_that_comes_or_goes_on_resume_is_refused(lightning, tiny, folder):
    schedule = ("--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", 1)
    assert lightning("fit", "-c", tiny).code == 0
    said = lightning("fit", "-c", tiny, "--trainer.max_epochs", 2, "--ckpt_path", "last", *schedule)
    assert said.code == 1
    assert "--model.lr_scheduler" in said.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--model.optimizer.lr=-1"], "learning rate"),
        (["--model.optimizer.lr=abc"], "lr"),
        (["--data.seed=99999999999999999999999"], "seed"),
        (["--data.correlation=0.9999999999999999999"], "correlation"),
        (["--data.noise=1e-300"], "noise"),
        (["--data.noise=1e200"], "noise"),
        (["--data.frequencies=100000000000"], "frequencies"),
        (["--seed_everything=-5"], "-5 is not in bounds"),
        (["--trainer.max_epochs=-7"], "max_epochs"),
        (["--trainer.accelerator=gpu"], "gpu"),
        (["--trainer.devices=0"], "devices"),
        (["--trainer.strategy=xyz"], "xyz"),
        (["--checkpoint.monitor=foo"], "foo"),
        (["--trainer.precision=bf16-true"], "bf16-mixed"),
        (["--model.emission=Bernoulli"], "feature 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_absurd_values_are_one_line(lightning, tiny, words, part):
    said = lightning("fit", "-c", tiny, *words)
    assert said.code not in (0, None)
    assert "Traceback" not in said.err
    assert part.lower() in said.err.lower()
    assert len([line for line in said.err.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.parametrize("text", ["", "- 1", "just words"])
def test_a_config_without_options_is_named(lightning, folder, text):
    (folder / "odd.yaml").write_text(text)
    said = lightning("fit", "-c", "odd.yaml")
    assert said.code == 1
    assert "odd.yaml" in said.err


@pytest.mark.parametrize(
    ("trained", "asked", "line"),
    [
        ([], ["--model.prior", "null"], "--model.prior null (checkpoint: vrnn_lightning.MLPConfig)"),
        (["--model.prior", "null"], ["--model.prior.width", "8"], "(checkpoint: null)"),
    ],
)
def test_a_prior_that_the_checkpoint_has_not_is_named(lightning, tiny, trained, asked, line):
    assert lightning("fit", "-c", tiny, *trained).code == 0
    said = lightning("test", "--ckpt_path", "best", "--data", "Sines", *asked)
    assert said.code == 1
    assert line in said.err
    assert "Traceback" not in said.err


def test_too_much_memory_is_one_line(lightning, tiny):
    said = lightning("fit", "-c", tiny, "--model.objective", "IWAE", "--model.objective.samples", 10**13)
    assert said.code == 1
    assert "not enough memory" in said.err


COVARIATES = """
import torch

from vrnn_lightning import SequenceSample, SequenceDataModule


class Driven(SequenceDataModule):
    '''Responses to a known input, some of them not measured.'''

    num_inputs = 2
    missing = True

    def __init__(self, batch_size: int = 4, num_workers: int = 0, seed: int = 0):
        super().__init__(1, batch_size, num_workers, seed)

    def sequences(self, split):
        generator = torch.Generator().manual_seed(len(split))
        drive = torch.randn(6, 5, 2, generator=generator)
        seen = torch.rand(6, 5, 1, generator=generator) > 0.2
        rows = enumerate(zip(drive, seen))
        return [SequenceSample(u.sum(1, keepdim=True), s, u, f"{split} {i}") for i, (u, s) in rows]
"""


def test_covariates_and_missing_values_need_no_option(lightning, tiny, folder):
    """The data say them: the model reads them in training, for its pictures, and from a checkpoint."""
    (folder / "datamodules").mkdir()
    (folder / "datamodules" / "driven.py").write_text(COVARIATES)
    words = ["--data", "Driven", "--trainer.max_epochs", 1, "--trainer.accelerator", "cpu"]
    said = lightning("fit", *words, "--model.hidden_size", 8)
    assert said.code == 0, said.err
    assert "not read" not in said.err
    (run,) = (folder / "runs" / "driven").iterdir()
    assert list((run / "samples").glob("*.png"))
    options = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["hyper_parameters"]
    assert (options["num_inputs"], options["missing"]) == (2, True)
    said = lightning("test", "--ckpt_path", "best", "--data", "Driven", "--evaluation.samples", 2)
    assert said.code == 0, said.err


def test_half_precision_without_a_gpu_says_what_runs_instead(lightning, tiny):
    said = lightning("fit", "-c", tiny, "--trainer.precision", "16-mixed")
    assert said.code == 0
    lines = [line for line in said.err.splitlines() if "16" in line]
    assert lines == ["--trainer.precision 16-mixed: needs a GPU; bf16-mixed runs instead"]
    assert "16-mixed" not in lightning("fit", "-c", tiny, "--trainer.precision", "bf16-mixed").err


@pytest.mark.parametrize("precision", ["17-mixed", "double", "transformer-engine"])
def test_a_precision_that_there_is_not_is_refused_in_one_line(lightning, tiny, precision):
    said = lightning("fit", "-c", tiny, f"--trainer.precision={precision}")
    assert said.code
    (line,) = [line for line in said.err.splitlines() if not line.startswith("Seed set")]
    assert line.startswith("error: --trainer")
    assert precision.replace("-", "_") in line.replace("-", "_")


def test_a_logger_whose_package_is_missing_is_one_line(lightning, tiny, monkeypatch):
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{name}", False)
    said = lightning("fit", "-c", tiny, "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=here")
    assert said.code == 1
    assert re.match(r"error: (TensorBoardLogger: )?Neither `tensorboard` nor", said.err.splitlines()[-1])
    assert "Traceback" not in said.err


def write_trainer(folder, callbacks):
    path = folder / "callbacks.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return path


def test_a_single_callback_needs_no_list(lightning, tiny):
    monitor = write_trainer(tiny.parent, "lightning.pytorch.callbacks.LearningRateMonitor")
    assert lightning("fit", "-c", tiny, "-c", monitor).code == 0
    assert "lr-Adam" in rows("runs/sines/version_0")[0]


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("ModelCheckpoint", {"dict_kwargs": {"foo": 1}}, ("ModelCheckpoint.__init__()", "'foo'")),
        ("RichProgressBar", {"init_args": {"console_kwargs": {"foo": 1}}}, ("RichProgressBar: ", "'foo'")),
    ],
)
def test_an_argument_that_is_passed_on_to_a_class_without_it(lightning, tiny, name, options, parts):
    wrong = write_trainer(tiny.parent, [{"class_path": f"lightning.pytorch.callbacks.{name}", **options}])
    assert one_line(lightning("fit", "-c", tiny, "-c", wrong), *parts, "Fix: leave it out of dict_kwargs")


def test_an_option_that_is_an_enumeration_is_saved_as_its_value(lightning, tiny):
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:01:00:00"}}
    assert lightning("fit", "-c", tiny, "-c", write_trainer(tiny.parent, [timer])).code == 0
    saved = yaml.safe_load(Path("runs/sines/version_0/config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"
    last = "runs/sines/version_0/checkpoints/last.ckpt"
    assert lightning("fit", "--ckpt_path", last, "--trainer.max_epochs=2").code == 0
    assert "val/elbo" in rows("runs/sines/version_0")[-1]


@pytest.mark.parametrize("given", ["[a,b", "a\0b", "1", "{a: b}", "[a, [b]]", "a b", "mine.*"])
def test_trust_names_classes_and_modules(lightning, tiny, given):
    assert one_line(lightning("fit", "-c", tiny, "--trust", given), f"--trust {given!r}: is not a class path or module")


def test_a_null_byte_in_a_path(lightning, tiny):
    assert one_line(lightning("report", "a\0b"), "holds a null byte")
    assert one_line(lightning("fit", "-c", tiny, "--trainer.default_root_dir=a\0b"), "holds a null byte")


def test_a_very_long_text_is_not_repeated_whole(lightning, tiny):
    said = lightning("fit", "-c", tiny, f"--data.window=Namespace(class_path={'x' * 50_000}")
    assert one_line(said, "--data.window Namespace")
    assert len(said.err.splitlines()[-1]) < 1100
