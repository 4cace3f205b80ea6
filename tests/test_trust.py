"""No file runs code: what a checkpoint, the config beside it or a pretrained folder names passes one gate."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.optim import Adam, Optimizer

from vrnn_lightning import MLPConfig, SequenceDataModule, UserError, VRNNLightningModule
from vrnn_lightning.heads import Head, StudentT
from vrnn_lightning.trust import Gate
from vrnn_lightning.trust import gate as gate_module

GATE = Gate("a.ckpt")
LAMBDA = "torch.optim.lr_scheduler.LambdaLR"
OWN = """
import torch
from lightning.pytorch import Callback
from torch.optim import Adam
from vrnn_lightning import SequenceSample, SequenceDataModule
from vrnn_lightning.heads import Gaussian

print("own module imported")

class OwnHead(Gaussian): pass
class OwnAdam(Adam): pass
class OwnHook(Callback): pass
class OwnWalks(SequenceDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__(1, batch_size)
    def sequences(self, split):
        return [SequenceSample(torch.randn(4, 1)) for _ in range(4)]
"""


CALLBACKS = "lightning.pytorch.callbacks"


def spec(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": options}


@pytest.fixture
def own(folder: Path, request: pytest.FixtureRequest) -> str:
    """The name of a module of the user's, which nothing has imported yet."""
    name = "own_of_trust_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    (folder / f"{name}.py").write_text(OWN)
    sys.path.append(str(folder))
    return name


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("os.system", Callable[[int], float]),
        (["os.system"], Callable[[int], float] | list[Callable[[int], float]]),
        ({"a": [spec("os.system")]}, Any),
        ("{class_path: os.system}", Any),
        ('{"class\\x5fpath": os.system}', Any),
        (spec("torch.nn.Linear", in_features=spec("os.system")), torch.nn.Module),
        ("os.system", type[Optimizer]),
        ("os.system", "a type that is not known"),
        ("torch.optim.lr_scheduler.warnings.warn", Callable[..., Any]),
        ("torch.nn.functional.relu", Callable[..., Any]),
        ("vrnn_lightning.files.os.system", Callable[..., Any]),
        ("vrnn_lightning.files._flush", Callable[..., Any]),
        ("vrnn_lightning.cli.command.yaml.load", Callable[..., Any]),
        ("vrnn_lightning.cli.command.operator", Callable[..., Any]),
        ("vrnn_lightning.__main__.main", Callable[..., Any]),
        ("vrnn_lightning.heads.Gaussian.__init__", Callable[..., Any]),
        ("vrnn_lightning.data.files.Path", Callable[..., Any]),
        ("lightning.pytorch.cli.LightningCLI", Callable[..., Any]),
        ("torch.nn.Linear", Callable[..., Optimizer]),
        ("vrnn_lightning.heads.Head", Callable[[int, int], Head]),
        ("datamodules._synthetic.require", LightningDataModule),
        ("datamodules.no_such_file.Data", LightningDataModule),
        (spec("Unheard"), Head),
        ({"class_path": "vrnn_lightning.heads.Gaussian", "evil": 1}, Head),
        (spec("vrnn_lightning.heads.Gaussian", **{"a.b": 1}), Head),
        ({"width": spec("os.system"), "depth": 1}, MLPConfig),
        ({"breadth": 1}, MLPConfig),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_refused(value, annotation, folder):
    with pytest.raises(UserError, match=r"^a\.ckpt: '?option") as caught:
        GATE.check(value, annotation, "option")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (spec("torch.optim.Adam", lr=1e-3, betas=[0.9, 0.99]), Callable[[Iterable], Optimizer]),
        ("torch.optim.Adam", Callable[[Iterable], Optimizer]),
        ("Adam", Callable[[Iterable], Optimizer]),
        (
            spec("lightning.pytorch.cli.ReduceLROnPlateau", monitor="val/elbo"),
            Callable[..., torch.optim.lr_scheduler.ReduceLROnPlateau],
        ),
        (spec("vrnn_lightning.heads.StudentT"), Callable[[int, int], Head]),
        ("vrnn_lightning.schedules.linear", Callable[..., float]),
        (spec("datamodules.sines.Sines", steps=4), LightningDataModule),
        (spec("lightning.pytorch.callbacks.LearningRateMonitor"), list[Callback] | Callback | None),
        ({"width": 3, "depth": 1}, MLPConfig | None),
        ("os.system", str | None),
        ("os.system", Literal["os.system"]),
        ("data.csv", Path | None),
        ("os.system", dict[str, str]),
        ("ddp", str | Callback),
        ("Unheard", type[Head]),
        (None, Head),
    ],
    ids=str,
)
def test_what_is_allowed_passes(value, annotation, folder):
    GATE.check(value, annotation, "option")


def test_the_places_of_the_trainer_are_known():
    allowed = {
        "callbacks": [spec("lightning.pytorch.callbacks.StochasticWeightAveraging", swa_lrs=0.1)],
        "logger": [
            spec("vrnn_lightning.tracking.RunLogger"),
            spec("lightning.pytorch.loggers.CSVLogger", save_dir="a.b"),
        ],
        "strategy": spec("lightning.pytorch.strategies.DDPStrategy", find_unused_parameters=True),
        "profiler": "simple",
        "plugins": spec("lightning.pytorch.plugins.environments.LightningEnvironment"),
        "accelerator": "cpu",
        "default_root_dir": "a.b",
    }
    GATE.check_options(Trainer, allowed, "trainer")
    for name in ("callbacks", "logger", "strategy", "profiler", "plugins", "accelerator"):
        with pytest.raises(UserError, match=rf"trainer\.{name} names os\.system"):
            GATE.check_options(Trainer, {name: spec("os.system")}, "trainer")
        with pytest.raises(UserError, match=rf"trainer\.{name} names evil\.Thing"):
            GATE.check_options(Trainer, {name: "evil.Thing"}, "trainer")


def test_a_file_is_not_included(folder):
    (folder / "torch.nn.Linear").write_text("class_path: os.system")
    (folder / "beside").mkdir()
    (folder / "beside" / "ddp").write_text("class_path: os.system")
    with pytest.raises(UserError, match=r"is the file torch\.nn\.Linear"):
        GATE.check("torch.nn.Linear", torch.nn.Module, "option")
    with pytest.raises(UserError, match="is the file ddp"):
        Gate("a", folder=folder / "beside").check("ddp", str | Callback, "option")


def test_containers_that_multiply_are_refused():
    cycle: list[Any] = []
    cycle.append(cycle)
    laughs: Any = ["x"]
    for _ in range(25):
        laughs = [laughs] * 3
    deep: Any = 0
    for _ in range(500):
        deep = [deep]
    text = "&a [&b [&c [*a]]]"
    for value in (cycle, laughs, deep, "[" * 3000, "x" * 20_000, text):
        words = "nested more than|holds more than|neither a name nor YAML"
        with pytest.raises(UserError, match=f"option.*({words})"):
            GATE.check(value, Any, "option")


def test_what_is_trusted_or_named_passes(own):
    name = f"{own}.OwnHead"
    with pytest.raises(UserError, match=rf"option names {name}, .*; it is not called\. Fix: .*trust=\['{own}'\]"):
        GATE.check(name, Head, "option")
    assert own not in sys.modules
    for gate in (Gate("a", (own,)), Gate("a", (name,)), Gate("a", named=frozenset({name}))):
        gate.check(spec(name), Head, "option")
        with pytest.raises(UserError, match=rf"option {name} is not a Callback"):
            gate.check(spec(name), Callback, "option")
    for gate in (Gate("a", (f"{own}.OwnAdam",)), Gate("a", (own[:-1],))):
        with pytest.raises(UserError, match=f"names {name}"):
            gate.check(name, Head, "option")


def test_a_module_that_is_trusted_does_not_lend_what_others_define(own):
    with pytest.raises(UserError, match=rf"names {own}.Adam, which is torch|is not a Callback"):
        Gate("a", (own,)).check(f"{own}.Adam", Callback, "option")
    (Path(f"{own}_functions.py")).write_text("from shutil import rmtree\ndef mine(x): return 1.0\n")
    gate = Gate("a", (f"{own}_functions",))
    gate.check(f"{own}_functions.mine", Callable[[int], float], "lr_lambda")
    with pytest.raises(UserError, match=r"_functions\.rmtree"):
        gate.check(f"{own}_functions.rmtree", Callable[..., Any], "lr_lambda")


@pytest.mark.parametrize("name", ["*", "", "a b", "a.", "-x"])
def test_there_is_no_trust_in_everything(name):
    with pytest.raises(UserError, match="is neither a class path nor a module"):
        Gate("a", (name,))


def test_entry_points_are_allowed(own, monkeypatch):
    point = EntryPoint("OwnWalks", f"{own}:OwnWalks", gate_module.ENTRY_POINTS)
    monkeypatch.setattr(gate_module, "entry_points", lambda group: EntryPoints([point]))
    gate_module._entry_points.cache_clear()
    try:
        GATE.check(spec(f"{own}.OwnWalks"), LightningDataModule, "data")
        with pytest.raises(UserError, match="OwnHead"):
            GATE.check(spec(f"{own}.OwnHead"), Head, "emission")
    finally:
        gate_module._entry_points.cache_clear()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that all tests of this module copy."""
    from conftest import TINY

    from vrnn_lightning.cli import main

    here = Path.cwd()
    folder = tmp_path_factory.mktemp("run")
    os.chdir(folder)
    try:
        Path("tiny.yaml").write_text(TINY)
        assert main(["fit", "-c", "tiny.yaml"]) == 0
    finally:
        os.chdir(here)
    return folder / "runs/sines/version_0"


def altered(run, model=None, data=None, **content):
    """Return a copy of the run's checkpoint with other options."""
    shutil.copytree(run, "copy", dirs_exist_ok=True)
    path = Path("copy/checkpoints/last.ckpt")
    found = torch.load(path, weights_only=True) | content
    found["hyper_parameters"] |= model or {}
    found["datamodule_hyper_parameters"] |= data or {}
    torch.save(found, path)
    return path


def line(said):
    """Return the one line of an error."""
    assert said.code == 1
    assert "Traceback" not in said.err
    assert "own module imported" not in said.out
    return said.err.strip().splitlines()[-1]


def test_a_foreign_optimizer_needs_trust(lightning, own, run):
    path = altered(run, {"optimizer": spec(f"{own}.OwnAdam", lr=0.1)})
    said = line(lightning("test", "--ckpt_path", path))
    assert said.startswith(f"error: --ckpt_path {path}: model.optimizer names {own}.OwnAdam, which is not of ")
    assert said.endswith(f"Fix: if you trust it, add --trust {own}")
    assert line(lightning("test", "--ckpt_path", path, "--trust", "other.module"))
    with pytest.raises(UserError, match="optimizer names"):
        VRNNLightningModule.load_from_checkpoint(path)
    assert own not in sys.modules
    loaded = VRNNLightningModule.load_from_checkpoint(path, trust=own)
    assert type(loaded.configure_optimizers()).__name__ == "OwnAdam"
    loaded = VRNNLightningModule.load_from_checkpoint(path, optimizer=Adam)
    assert type(loaded.configure_optimizers()) is Adam
    quick = ["--samples.every_n_validations=0", "--report=false", "--trainer.accelerator=cpu"]
    assert lightning("test", "--ckpt_path", path, "--trust=other", "--trust", f"{own}.OwnAdam", *quick).code == 0
    assert (
        lightning("test", "--ckpt_path", path, f"--model.optimizer={own}.OwnAdam", "--model.optimizer.lr=0.1").code == 0
    )


def test_a_function_needs_to_be_ours(lightning, own, run):
    path = altered(run, {"lr_scheduler": spec(LAMBDA, lr_lambda=f"{own}.OwnHead")})
    assert f"lr_lambda names {own}.OwnHead" in line(lightning("fit", "--ckpt_path", path))


@pytest.mark.parametrize("place", ["callbacks", "logger", "strategy", "profiler"])
def test_the_config_beside_a_checkpoint_passes_the_gate(lightning, own, run, place):
    path = altered(run)
    config = yaml.safe_load(Path("copy/config.yaml").read_text())
    config["trainer"][place] = [spec(f"{own}.OwnHook")] if place != "profiler" else f"{own}.OwnHook"
    config["trust"] = own
    Path("copy/config.yaml").write_text(yaml.safe_dump(config))
    said = line(lightning("fit", "--ckpt_path", path, "--trainer.max_epochs=2"))
    assert f"copy/config.yaml: trainer.{place} names {own}.OwnHook" in said
    assert own not in sys.modules
    if place == "callbacks":
        for words in (["--trust", own], ["-c", "copy/config.yaml"]):
            assert lightning("fit", "--ckpt_path", path, "--trainer.max_epochs=2", *words).code == 0
        assert yaml.safe_load(Path("copy/config.yaml").read_text())["trust"] is None


def test_a_task_that_the_config_beside_a_checkpoint_names_passes_the_gate(lightning, own, run):
    """Any command that reads that config parses the options of predictions too."""
    path = altered(run)
    config = yaml.safe_load(Path("copy/config.yaml").read_text()) | {"prediction": {"task": f"{own}.OwnHook"}}
    Path("copy/config.yaml").write_text(yaml.safe_dump(config))
    said = line(lightning("fit", "--ckpt_path", path, "--trainer.max_epochs=2"))
    assert f"copy/config.yaml: prediction.task names {own}.OwnHook" in said
    assert own not in sys.modules


@pytest.mark.parametrize(
    "more",
    [
        {"trainer.callbacks": "OWN.OwnHook"},
        {"model.optimizer.class_path": "OWN.OwnAdam"},
        {"trainer": {"callbacks": "[{class_path: OWN.OwnHook}, 2020-13-45]"}},
        {"trainer": {"callbacks": "~/hook.yaml"}},
        {"trainer": {"callbacks": "OWN\u00b7.OwnHook"}},
        {
            "trainer": {
                "callbacks": [
                    spec("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="vrnn_lightning.cli.main")
                ]
            }
        },
        {
            "data": {
                "class_path": "Sines",
                "init_args": {"window": spec("vrnn_lightning.cli.command.CLI", argv=["fit"])},
            }
        },
    ],
    ids=str,
)
def test_a_config_is_read_as_the_parser_reads_it(lightning, own, run, more, monkeypatch):
    path = altered(run)
    monkeypatch.setenv("HOME", str(Path().absolute()))
    Path("hook.yaml").write_text(f"class_path: {own}.OwnHook")
    shutil.copy(f"{own}.py", f"{own}\u00b7.py")
    text = yaml.safe_dump(yaml.safe_load(Path("copy/config.yaml").read_text()) | more, allow_unicode=True)
    Path("copy/config.yaml").write_text(text.replace("OWN", own), encoding="utf-8")
    assert "copy/config.yaml: " in line(lightning("fit", "--ckpt_path", path, "--trainer.max_epochs=2"))
    assert not [name for name in sys.modules if name.startswith(own)]


def test_a_class_stands_only_where_one_is_expected(run, folder):
    for option in ("emission", "cell"):
        path = altered(run, {option: spec("torch.optim.Adam", lr=1.0)})
        with pytest.raises(UserError, match=rf"{option} torch\.optim\.Adam is not"):
            VRNNLightningModule.load_from_checkpoint(path)
    path = altered(run, {"cell": spec("torch.nn.Bilinear", out_features=10**12)})
    with pytest.raises(UserError, match="the options make"):  # before it takes memory
        VRNNLightningModule.load_from_checkpoint(path)


def test_a_checkpoint_names_no_file_to_remove(lightning, run, folder):
    """The best checkpoint before, which a better one replaces, is one of this folder."""
    Path("precious").mkdir()
    found = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    for key, state in found.items():
        if "RunCheckpoint" in key or "ModelCheckpoint" in key:
            away = f"{Path('copy/checkpoints').absolute()}/../../precious"
            state |= {"dirpath": str(Path("copy/checkpoints").absolute()), "best_k_models": {away: torch.tensor(-1e9)}}
            state |= {"kth_best_model_path": away, "last_model_path": away, "best_model_path": away}
    path = altered(run, callbacks=found)
    assert lightning("fit", "--ckpt_path", path, "--trainer.max_epochs=2").code == 0
    assert Path("precious").is_dir()


def test_a_dropped_datamodule_counts_where_the_call_names_it(lightning, own, run):
    Path("datamodules").mkdir()
    Path(f"datamodules/{own}.py").write_text(OWN.replace("OwnWalks", "DroppedWalks"))
    quick = ["--samples.every_n_validations=0", "--report=false", "--trainer.accelerator=cpu", "--model.hidden_size=4"]
    assert lightning("fit", "--data=DroppedWalks", "--trainer.max_epochs=1", *quick).code == 0
    (path,) = Path("runs").rglob("last.ckpt")
    for module in [name for name in sys.modules if own in name]:
        del sys.modules[module]
    for words in (["test"], ["predict"], ["fit", "--trainer.max_epochs=2"]):
        assert f"{own}.DroppedWalks" in line(lightning(*words, "--ckpt_path", path))
    with pytest.raises(UserError, match="DroppedWalks"):
        SequenceDataModule.load_from_checkpoint(path)
    assert not [name for name in sys.modules if own in name]
    assert lightning("test", "--ckpt_path", path, "--data=DroppedWalks").code == 0
    Path("data.yaml").write_text("data: DroppedWalks\n")
    assert lightning("test", "--ckpt_path", path, "-c", "data.yaml").code == 0
    (module,) = {name for name in sys.modules if own in name}
    data = importlib.import_module(module).DroppedWalks.load_from_checkpoint(path, batch_size=2)
    assert (type(data).__name__, data.batch_size) == ("DroppedWalks", 2)
    assert type(SequenceDataModule.load_from_checkpoint(path, trust=[f"{module}.DroppedWalks"])) is type(data)


def test_weights_are_taken_without_what_trained_them(lightning, own, run):
    quick = ["fit", "--data=Sines", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--init_from"]
    assert lightning(*quick, altered(run, {"optimizer": spec(f"{own}.OwnAdam")})).code == 0
    assert f"emission names {own}.OwnHead" in line(
        lightning(*quick, altered(run, {"emission": spec(f"{own}.OwnHead")}))
    )


def test_a_model_of_own_classes_comes_back(own, folder):
    head = importlib.import_module(own).OwnHead
    model = VRNNLightningModule(num_features=1, hidden_size=4, emission=head)
    torch.save({"hyper_parameters": dict(model.hparams), "state_dict": model.state_dict()}, "a.ckpt")
    with pytest.raises(UserError, match="emission names"):
        VRNNLightningModule.load_from_checkpoint("a.ckpt")
    assert type(VRNNLightningModule.load_from_checkpoint("a.ckpt", emission=head).vrnn.decoder.head) is head
    assert type(VRNNLightningModule.load_from_checkpoint("a.ckpt", trust=[own]).vrnn.decoder.head) is head
    with pytest.raises(UserError, match="but the options make"):
        VRNNLightningModule.load_from_checkpoint("a.ckpt", emission=StudentT)
    for options in ({"hparams_file": "a.yaml"}, {"weights_only": False}):
        with pytest.raises(UserError, match="not supported"):
            VRNNLightningModule.load_from_checkpoint("a.ckpt", emission=head, **options)


LAUGHS: list[Any] = ["x"]
for _ in range(14):
    LAUGHS = [LAUGHS] * 3  # five million texts in a file of a kilobyte


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"global_step": "3"}, "global_step is of type str"),
        ({"epoch": -1}, "epoch is -1"),
        ({"state_dict": []}, "state_dict is of type list"),
        ({"state_dict": {"scale_mean": "x"}}, "scale_mean is not a tensor"),
        ({"state_dict": {"scale_mean": torch.ones(1).expand(10**9)}}, "has shape (1000000000,) of floats"),
        ({"state_dict": {"scale_mean": torch.ones(3, device="meta")}}, "scale_mean is not a tensor"),
        ({"state_dict": {}}, "holds no scaler"),
        ({"hyper_parameters": {1: 2}}, "names that are not text"),
        ({"hyper_parameters": 3}, "hyper_parameters is of type int"),
        ({"loops": {"a": [[[[[[0]]]]]]} | {str(i): [0] * 999 for i in range(300)}}, "loops: holds more than"),
        ({"pytorch-lightning_version": "no version"}, "its state does not fit this run"),
        ({"optimizer_states": [1]}, "its state does not fit this run"),
        ({"optimizer_states": [{"state": {0: {"exp_avg": LAUGHS}}}]}, "optimizer_states: holds more than"),
        ({"loops": {"fit_loop": {"epoch_progress": 3}}}, "its state does not fit this run"),
        ({"loops": {"fit_loop": {"epoch_progress": {"total": {"ready": "3"}}}}}, "its state does not fit this run"),
    ],
)
def test_wrong_types_are_one_line(lightning, run, content, message):
    shutil.copytree(run, "copy")
    path = Path("copy/checkpoints/last.ckpt")
    torch.save(torch.load(path, weights_only=True) | content, path)
    assert message in line(lightning("fit", "--ckpt_path", path, "--trainer.max_epochs=2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 10**6}, "has shape"),
        ({"hidden_size": 10**9}, "VRNNLightningModule can't be made of its options"),
        ({"hidden_size": "4"}, "hidden_size '4' must be of type int"),
        ({"layers": 10**9}, "layers is deeper than"),
        ({"phi_x": {"width": 4, "depth": 10**9}}, "phi_x is deeper than"),
        ({"smoothing": True}, "numbers, but it holds|has shape"),
        ({"no_such_option": 1}, "no_such_option is not an option"),
    ],
)
def test_sizes_are_compared_with_the_weights(lightning, run, options, message):
    path = altered(run, options)
    assert re.search(message, line(lightning("test", "--ckpt_path", path)))
    with pytest.raises(UserError, match=message):
        VRNNLightningModule.load_from_checkpoint(path)


def test_a_checkpoint_that_holds_code_is_refused(lightning, run):
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    path = Path("a.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": Payload()}, path)
    assert "holds more than weights and options" in line(lightning("test", "--ckpt_path", path))
    for cls in (VRNNLightningModule, SequenceDataModule):
        with pytest.raises(UserError, match="holds more than weights"):
            cls.load_from_checkpoint(path)
    assert "--weights_only false" in line(lightning("test", "--data=Sines", "--weights_only=false"))
    assert not Path("ran").exists()


def test_a_damaged_byte_is_found(run, folder):
    path = altered(run)
    data = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["state_dict"]["vrnn.cells.0.weight_hh"].numpy().tobytes()
    data[data.index(weights) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        VRNNLightningModule.load_from_checkpoint(path)
