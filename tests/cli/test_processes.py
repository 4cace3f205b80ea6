"""Several processes train as one does."""

from __future__ import annotations

import csv
import multiprocessing
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sharded
import torch
import tracked

OPTIONS = {
    "data": "Sines", "data.train_size": 13, "data.val_size": 5, "data.steps": 6, "data.min_steps": 1,
    "model.latent_size": 3, "model.objective": "ELBO", "model.objective.free_bits": 0.05, "model.hidden_size": 5,
    "trainer.precision": "64-true", "trainer.max_epochs": 2,
    "trainer.log_every_n_steps": 1, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false",
    "trainer.num_sanity_val_steps": 0, "samples.every_n_validations": 0, "report": "false", "seed_everything": 3,
}  # fmt: skip


PROGRAM = (sys.executable, "-m", "vrnn_lightning")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["lightning.pytorch", "torch.distributed.fsdp", "vrnn_lightning.cli"]
)  # their imports take longest


def words(folder: Path, options: dict[str, object]) -> list[str]:
    return [f"--{k}={v}" for k, v in {**OPTIONS, **options, "trainer.default_root_dir": folder}.items()]


def fit(folder: Path, **options: object) -> Path:
    """Run a fit in processes of its own; return the run's folder."""
    run(folder, ["fit", *words(folder, options)], int(str(options.get("trainer.devices", 1))))
    return the_run(folder)


def run(folder: Path, command: list[str], count: int = 1) -> str:
    """Run a command in as many processes, which find each other as torchrun's do; return what the first one said."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    files = [folder / f"said{rank}.txt" for rank in range(count)]
    started = []
    for rank, file in enumerate(files):
        place = {
            "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0",
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        }  # fmt: skip
        environment = {"WANDB_MODE": "offline", **(place if count > 1 else {})}
        process = SERVER.Process(target=sharded.run, args=(command, environment, file))
        process.start()
        started.append(process)
    for process in started:
        process.join(120)
    for process in started:
        process.kill()
    assert [process.exitcode for process in started] == [0] * count, "\n".join(file.read_text() for file in files)
    return files[0].read_text()


def the_run(folder: Path) -> Path:
    """Return the folder of the one run below a folder."""
    (run,) = folder.glob("runs/*/*")
    return run


def states(*runs: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in runs]


def assert_same(runs: tuple[Path, Path], tolerance: float) -> None:
    one, two = states(*runs)
    assert list(one) == list(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=tolerance, atol=tolerance, msg=name)


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


STREAMS = {"data": "Jumps", "data.fresh": "true", "data.window": 3}


INFERRED = {"model.initial_state": "inferred", "model.encoder.dropout": 0.2}


@pytest.mark.parametrize(
    "more",
    [{}, STREAMS, INFERRED],
    ids=["whole sequences", "streams of what is drawn in each epoch", "an inferred state, and dropout"],
)
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path, more):
    """Parameters, losses and figures, with a latent, free bits, ragged lengths and a last batch of one sequence."""
    one = fit(tmp_path / "one", **more, **{"data.batch_size": 4})
    options = {**more, "data.batch_size": 2, "trainer.devices": 2, "trainer.strategy": "ddp"}
    if more:
        two = fit(tmp_path / "two", **options)
    else:  # as a user starts it
        program = tmp_path / "lightning"
        program.write_text("import sys\nfrom vrnn_lightning.cli import main\nsys.exit(main())\n")  # as pip writes it
        command = [sys.executable, program, "fit", *words(tmp_path / "two", options)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        two = the_run(tmp_path / "two")
        assert done.stdout.count("best val/elbo") == 1
    assert_same((one, two), 1e-10)
    for name in ("train/loss", "train/elbo", "val/elbo", "val/gap", "val/bits_per_dim"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-5), name


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_two_nodes_started_with_torchrun_equal_one_process(tmp_path):
    """Each node has its own folder here: the parameters are one process's, and only rank zero writes."""
    nodes = {"trainer.num_nodes": 2, "trainer.devices": 1, "trainer.strategy": "ddp", "data.batch_size": 2}
    place = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    started = []
    for rank in (0, 1):
        command = [
            *TORCHRUN,
            *place,
            f"--node_rank={rank}",
            *PROGRAM[1:],
            "fit",
            *words(tmp_path / f"node{rank}", nodes),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, **pipes))
    try:
        said = [node.communicate(timeout=120)[0] for node in started]
    finally:
        for node in started:
            node.kill()
    assert [node.returncode for node in started] == [0, 0], "".join(said)
    one = fit(tmp_path / "one", **{"data.batch_size": 4})
    assert_same((one, the_run(tmp_path / "node0")), 1e-10)
    assert not [file for file in (tmp_path / "node1").rglob("*") if file.is_file()]
    assert "run folder" in said[0]
    assert "run folder" not in said[1]


SHARED = {"data.batch_size": 2, "trainer.devices": 2, "trainer.strategy": "sharded"}


def test_processes_that_share_the_parameters_train_as_one_does(tmp_path):
    """FSDP: a bias that starts from the data, dropout, clipping, pictures, checkpoints and a resume."""
    options = {
        "data": "HiddenMarkov", "model.emission": "Bernoulli", "model.smoothing": "true", "model.dropout": 0.2,
        "trainer.precision": "32-true", "trainer.gradient_clip_val": 5, "trainer.callbacks+": "GradientNorms",
        "samples.every_n_validations": 1, "samples.count": 2,
    }  # fmt: skip
    one = fit(tmp_path / "one", **options, **{"data.batch_size": 4, "trainer.max_epochs": 3})
    last = fit(tmp_path / "two", **options, **SHARED) / "checkpoints" / "last.ckpt"
    two = fit(tmp_path / "two", **options, **SHARED, **{"trainer.max_epochs": 3, "ckpt_path": last})
    assert_same((one, two), 1e-5)
    parts = ("prior", "encoder", "decoder", "phi_x", "phi_z", "cells", "backward_rnn")
    norms = [f"train/grad_norm/{part}" for part in parts]
    for name in ("train/loss", "train/grad_norm", "val/elbo", *norms):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-5), name
    assert max(column(two, "train/grad_norm")) > 5
    shown = {path.name for path in (two / "samples").iterdir()}
    assert {path.name for path in (one / "samples").iterdir()} <= shown
    assert len([name for name in shown if name.count("_") == 1]) == 3


def test_mixed_precision_is_the_same_where_processes_share_the_parameters(tmp_path):
    """FSDP: the parameters stay wide, and only products are narrow."""
    mixed = {"trainer.precision": "bf16-mixed"}
    one = fit(tmp_path / "one", **mixed, **{"data.batch_size": 4})
    two = fit(tmp_path / "two", **mixed, **SHARED)
    for name in ("train/loss", "train/grad_norm", "val/elbo"):
        assert column(two, name) == pytest.approx(column(one, name), rel=2e-3), name


def test_two_processes_steer_the_kl_alike_and_are_one_run_to_weights_and_biases(tmp_path):
    """The controller's weight, and with it every gradient and each network's norm, is that of one process."""
    steered = {"trainer.callbacks+": "ControlVAE", "trainer.callbacks.target": 0.02, "trainer.callbacks.ki": 0.1}
    steered["config"] = "configs/wandb.yaml"
    one = fit(tmp_path / "one", **steered, **{"data.batch_size": 4})
    two = fit(tmp_path / "two", **steered, **{"data.batch_size": 2, "trainer.devices": 2, "trainer.strategy": "ddp"})
    assert len(set(column(one, "train/beta"))) > 5
    norms = [f"train/grad_norm/{name}" for name in ("prior", "encoder", "decoder", "phi_x", "phi_z", "cells")]
    for name in ("train/beta", "train/loss", "val/elbo", *norms):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-5), name
    assert len(list(tmp_path.glob("two/**/*.wandb"))) == 1
    assert tracked.read(two).column("train/loss") == pytest.approx(column(two, "train/loss"), rel=1e-6)


def test_two_processes_report_what_one_reports(tmp_path):
    """Bounds, errors and effective samples of a test; the last batch leaves one process without a sequence."""
    run_folder = fit(tmp_path / "trained", **{"trainer.max_epochs": 1, "data.batch_size": 4})
    found = []
    for devices, strategy in ((1, "auto"), (2, "ddp"), (2, "sharded")):
        command = [
            "test", f"--ckpt_path={run_folder}/checkpoints/last.ckpt", "--data=Sines",
            f"--data.batch_size={4 // devices}", "--evaluation.samples=3", "--trainer.precision=32-true",
            "--trainer.accelerator=cpu", f"--trainer.devices={devices}", f"--trainer.strategy={strategy}",
            f"--trainer.default_root_dir={tmp_path}",
        ]  # fmt: skip
        said = run(tmp_path / strategy, command, devices)
        rows = [line.split("│")[1:3] for line in said.splitlines() if line.count("│") == 3]
        found.append({name.strip(): float(value) for name, value in rows})
    assert {"test/iwae", "test/fivo_stderr", "test/fivo_effective_samples"} <= set(found[0])
    assert found[1:] == [pytest.approx(found[0], rel=1e-5)] * 2


def test_two_processes_forecast_what_one_forecasts(tmp_path):
    """Figures of all sequences, whichever process had them, also where each knows other lead times."""
    found = []
    for devices, strategy in ((1, "auto"), (2, "ddp")):
        folder = tmp_path / strategy
        options = {
            "data.test_size": 7, "data.min_steps": 3, "data.steps": 9, "data.batch_size": 4 // devices,
            "prediction.task": "forecast", "prediction.prefix": 2, "prediction.samples": 5,
            "trainer.devices": devices, "trainer.strategy": strategy, "prediction.shown": 0,
        }  # fmt: skip
        said = run(folder, ["predict", *words(folder, options)], devices)
        lines = [line.split(": ", 1) for line in said.splitlines() if "RMSE" in line]
        figures = {(name, word.split()[0]): float(word.split()[1]) for name, of in lines for word in of.split(", ")}
        with next(folder.rglob("lead_times.csv")).open() as file:
            found.append((figures, [list(map(float, list(row.values())[1:6])) for row in csv.DictReader(file)]))
    assert len(found[0][0]) == 6 + 4
    assert [row[0] for row in found[0][1]] == [*range(1, len(found[0][1]) // 2 + 1)] * 2
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert found[1][1] == [pytest.approx(row, rel=1e-5) for row in found[0][1]]
