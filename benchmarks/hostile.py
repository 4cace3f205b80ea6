"""Checkpoints, configs and pretrained folders that try to run code, have wrong types or declare absurd sizes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from cases import MARKER, Case

from vrnn_lightning import SequenceDataModule, VRNNLightningModule
from vrnn_lightning.cli import main

__all__ = ["cases", "nothing"]

SHELL = f'echo ran >> "${MARKER}"'
EVIL = f"""
import os
open(os.environ["{MARKER}"], "a").write("imported")

import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import Adam
from torch.optim.lr_scheduler import ConstantLR
from vrnn_lightning import SequenceDataModule
from vrnn_lightning.heads import Gaussian
from vrnn_lightning.objectives import ELBO

def f(*args, **kwargs): return 1.0
class Head(Gaussian): pass
class Objective(ELBO): pass
class Optimizer(Adam): pass
class Scheduler(ConstantLR): pass
class Data(SequenceDataModule):
    def __init__(self): super().__init__(1)
class Hook(Callback): pass
class Log(CSVLogger): pass
class Plan(SingleDeviceStrategy): pass
class Precise(Precision): pass
class Profile(SimpleProfiler): pass
"""
TINY = {
    "trainer": {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "enable_model_summary": False},
    "model": {"latent_size": 2, "hidden_size": 4}
    | {part: {"width": 4, "depth": 1} for part in ("phi_x", "phi_z", "prior", "encoder", "decoder")},
    "data": {"class_path": "Sines", "init_args": {"train_size": 8, "val_size": 4, "steps": 5, "batch_size": 4}},
    "samples": {"every_n_validations": 0},
    "report": False,
}
FIT = ["fit", "--trainer.max_epochs=2"]


def spec(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": options}


EVIL_HEAD = spec("evil.Head")
COMMAND = spec("vrnn_lightning.cli.command.CLI", argv=["fit", "-c", "evil.yaml"])
LAMBDA = "torch.optim.lr_scheduler.LambdaLR"
MODEL: dict[str, dict[str, Any]] = {
    "optimizer": {"optimizer": spec("evil.Optimizer", lr=1e-3)},
    "optimizer of the system": {"optimizer": spec("os.system", command=SHELL)},
    "optimizer as text": {"optimizer": "evil.Optimizer"},
    "optimizer as a function": {"optimizer": "evil.f"},
    "optimizer from a module of torch": {"optimizer": "torch.optim.lr_scheduler.warnings.warn"},
    "optimizer of another kind": {"optimizer": "torch.nn.Linear"},
    "scheduler": {"lr_scheduler": spec("evil.Scheduler")},
    "scheduler as a function": {"lr_scheduler": "evil.f"},
    "lr_lambda": {"lr_scheduler": spec(LAMBDA, lr_lambda="evil.f")},
    "lr_lambda of the system": {"lr_scheduler": spec(LAMBDA, lr_lambda="os.system")},
    "list of lr_lambda": {"lr_scheduler": spec(LAMBDA, lr_lambda=["evil.f"])},
    "lr_lambda as a class": {"lr_scheduler": spec(LAMBDA, lr_lambda=spec("evil.Hook"))},
    "lr_lambda as YAML": {"lr_scheduler": spec(LAMBDA, lr_lambda="[evil.f]")},
    "lr_lambda through this package": {"lr_scheduler": spec(LAMBDA, lr_lambda="vrnn_lightning.files.os.system")},
    "lr_lambda of an import": {"lr_scheduler": spec(LAMBDA, lr_lambda="vrnn_lightning.discovery._import")},
    "lr_lambda in dict_kwargs": {"lr_scheduler": {"class_path": LAMBDA, "dict_kwargs": {"lr_lambda": "evil.f"}}},
    "objective": {"objective": spec("evil.Objective")},
    "objective as text": {"objective": "evil.Objective"},
    "objective of the system": {"objective": "os.system"},
    "objective through a package": {"objective": "vrnn_lightning.cli.command.sys.exit"},
    "emission": {"emission": EVIL_HEAD},
    "emission as text": {"emission": "evil.Head"},
    "emission as YAML": {"emission": json.dumps(EVIL_HEAD)},
    "emission as escaped YAML": {"emission": '{"class\\x5fpath": "evil.Head"}'},
    "emission as a file": {"emission": "evil.yaml"},
    "emission as a file with a class' name": {"emission": "torch.nn.Bilinear"},
    "emission of the system": {"emission": spec("subprocess.Popen", args=["sh", "-c", SHELL])},
    "option of an emission": {"emission": spec("vrnn_lightning.heads.Gaussian", min_std=EVIL_HEAD)},
    "emission with more keys": {"emission": EVIL_HEAD | {"more": 1}},
    "emission that is not a text": {"emission": {"class_path": ["evil.Head"]}},
    "dunder of this package": {"emission": "vrnn_lightning.__main__.main"},
    "size as a class": {"hidden_size": EVIL_HEAD},
    "cell as a class": {"cell": EVIL_HEAD},
    "cell as a command line": {"cell": COMMAND},
    "interval as a command line": {
        "lr_interval": spec("vrnn_lightning.cli.command.CLI", argv=["fit", "-c", "evil.yaml"])
    },
    "optimizer with a date that is none": {"optimizer": "{class_path: evil.Optimizer, init_args: {lr: 2020-13-45}}"},
    "optimizer in a letter": {"optimizer": "evil\u00b7.Optimizer"},
    "optimizer as a file of the user": {"optimizer": "~/evil.yaml"},
    "network as a class": {"phi_x": EVIL_HEAD},
    "network's width as a class": {"phi_x": {"width": EVIL_HEAD, "depth": 1}},
    "network as text": {"phi_x": "evil.Head"},
    "dotted option": {"emission.class_path": "evil.Head"},
    "option of another name": {"evil": EVIL_HEAD},
    "_class_path": {"_class_path": "evil.Head"},
    "_instantiator": {"_instantiator": "evil.f"},
    "__path__": {"__path__": "evil.yaml"},
}
DATA: dict[str, dict[str, Any]] = {
    "datamodule": {"_class_path": "evil.Data"},
    "datamodule dropped in": {"_class_path": "datamodules.walks_of_hostile.Walks"},
    "datamodule dropped in, by its new name": {
        "_class_path": "vrnn_lightning.datamodules.local.walks_of_hostile.Walks"
    },
    "datamodule by its short name": {"_class_path": "Walks"},
    "datamodule of the system": {"_class_path": "os.system"},
    "datamodule that is a network": {"_class_path": "torch.nn.Linear"},
    "datamodule that is a module": {"_class_path": "evil"},
    "datamodule that is not a text": {"_class_path": [1]},
    "option of a datamodule": {"steps": spec("evil.Data")},
    "option of a datamodule as YAML": {"evil": "{class_path: evil.Data}"},
}
CONFIG: dict[str, dict[str, Any]] = {
    "callback": {"trainer": {"callbacks": [spec("evil.Hook")]}},
    "callback as text": {"trainer": {"callbacks": "evil.Hook"}},
    "callback in a list": {"trainer": {"callbacks": ["evil.Hook"]}},
    "callback as YAML": {"trainer": {"callbacks": "[{class_path: evil.Hook}]"}},
    "callback as a file": {"trainer": {"callbacks": "evil.yaml"}},
    "callback as a file of the user": {"trainer": {"callbacks": "~/evil.yaml"}},
    "callback with a date that is none": {"trainer": {"callbacks": "[{class_path: evil.Hook}, 2020-13-45]"}},
    "callback in a letter": {"trainer": {"callbacks": "evil\u00b7.Hook"}},
    "dotted callback": {"trainer.callbacks": "evil.Hook"},
    "dotted callbacks": {"trainer.callbacks": ["evil.Hook"]},
    "dotted profiler": {"trainer.profiler": "evil.Profile"},
    "dotted class of a profiler": {"trainer.profiler.class_path": "evil.Profile"},
    "dotted optimizer": {"model.optimizer": "evil.Optimizer"},
    "dotted data": {"data.class_path": "evil.Data"},
    "command line of a callback": {
        "trainer": {
            "callbacks": [spec("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="vrnn_lightning.cli.main")]
        }
    },
    "appended callback": {"trainer": {"callbacks+": [spec("evil.Hook")]}},
    "function of a callback": {
        "trainer": {"callbacks": [spec("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="evil.f")]}
    },
    "command of a callback": {
        "trainer": {"callbacks": [spec("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="os.system")]}
    },
    "average of a callback": {
        "trainer": {
            "callbacks": [spec("lightning.pytorch.callbacks.StochasticWeightAveraging", swa_lrs=0.1, avg_fn="evil.f")]
        }
    },
    "logger": {"trainer": {"logger": [spec("evil.Log", save_dir="logs")]}},
    "logger as text": {"trainer": {"logger": "evil.Log"}},
    "strategy": {"trainer": {"strategy": spec("evil.Plan")}},
    "strategy as text": {"trainer": {"strategy": "evil.Plan"}},
    "strategy as a file": {"trainer": {"strategy": "evil"}},
    "function of a strategy": {
        "trainer": {"strategy": spec("lightning.pytorch.strategies.DDPStrategy", ddp_comm_hook="evil.f")}
    },
    "precision plugin": {"trainer": {"plugins": [spec("evil.Precise")]}},
    "plugin": {"trainer": {"plugins": spec("evil.Precise")}},
    "profiler": {"trainer": {"profiler": spec("evil.Profile")}},
    "accelerator": {"trainer": {"accelerator": spec("evil.Hook")}},
    "limit as a class": {"trainer": {"limit_train_batches": spec("evil.Hook")}},
    "dotted option": {"trainer": {"profiler.class_path": "evil.Profile"}},
    "dotted group": {"trainer.profiler": spec("evil.Profile")},
    "trainer as a file": {"trainer": "evil.yaml"},
    "model as a file": {"model": "evil.yaml"},
    "optimizer": {"model": {"optimizer": spec("evil.Optimizer")}},
    "emission": {"model": {"emission": EVIL_HEAD}},
    "datamodule": {"data": spec("evil.Data")},
    "datamodule as text": {"data": "evil.Data"},
    "datamodule dropped in": {"data": "datamodules.walks_of_hostile.Walks"},
    "option of the samples": {"samples": {"count": spec("evil.Hook")}},
    "option of the checkpoint": {"checkpoint": {"monitor": spec("evil.Hook")}},
    "another config": {"config": "evil.yaml"},
    "group of another name": {"evil": spec("evil.Hook")},
    "trust in itself": {"trust": ["evil"], "trainer": {"callbacks": [spec("evil.Hook")]}},
    "weights and code": {"weights_only": False},
}
YAMLS = {
    "tag": f'report: !!python/object/apply:os.system ["{SHELL}"]',
    "module tag": "report: !!python/module:evil",
    "deep": "trainer: " + "[" * 2000,
    "aliases": "a: &a [x]\n"
    + "\n".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]" for p, n in zip("abcdefghi", "bcdefghij", strict=True)),
    "list": "[1, 2]",
    "no YAML": "trainer: [",
    "bytes": "\x00\x01",
}


class Payload:
    """Runs a command when it is unpickled by what trusts pickles."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (SHELL,)


@cache
def trained() -> tuple[bytes, str]:
    """Return a checkpoint of a run and its config."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
            assert main(["fit", "-c", "tiny.yaml"]) == 0
            run = Path("runs/sines/version_0")
            return (run / "checkpoints/last.ckpt").read_bytes(), (run / "config.yaml").read_text()
        finally:
            os.chdir(here)


def content() -> dict[str, Any]:
    """Return what the checkpoint of a run holds."""
    found: dict[str, Any] = torch.load(io.BytesIO(trained()[0]), weights_only=True)
    return found


def plant() -> None:
    """Put files into the working directory that mark that they ran."""
    Path("evil.py").write_text(EVIL)
    Path("datamodules").mkdir()
    Path("datamodules/walks_of_hostile.py").write_text(EVIL.replace("class Data", "class Walks"))
    for name in ("evil.yaml", "evil", "torch.nn.Bilinear"):
        Path(name).write_text(yaml.safe_dump(spec("evil.Hook")))


def placed(found: Any, config: str | None = None, folder: str = "run") -> Path:
    """Write a checkpoint as a run has it, and a config beside it."""
    path = Path(folder) / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**5)  # for what is nested deeply
    path.write_bytes(found) if isinstance(found, bytes) else torch.save(found, path)
    sys.setrecursionlimit(limit)
    if config is not None:
        (path.parents[1] / "config.yaml").write_text(config)
    return path


def on_line(found: Callable[[], Any], words: list[str], config: Callable[[], str | None] = lambda: None) -> Callable:
    """Return a case's command line on a checkpoint."""

    def run(_: Path) -> int:
        plant()
        path = placed(found(), config())
        return main([*words, str(path)])

    return run


def in_python(found: Callable[[], Any], cls: type) -> Callable:
    """Return a case's ``load_from_checkpoint``."""

    def run(folder: Path) -> int:
        sys.path.append(str(folder))
        plant()
        cls.load_from_checkpoint(placed(found()))  # type: ignore[attr-defined]  # of either class
        return 0

    return run


def with_model(options: dict[str, Any]) -> Callable[[], Any]:
    return lambda: (found := content()) | {"hyper_parameters": found["hyper_parameters"] | options}


def with_data(options: dict[str, Any]) -> Callable[[], Any]:
    return lambda: (
        (found := content()) | {"datamodule_hyper_parameters": found["datamodule_hyper_parameters"] | options}
    )


def with_config(options: dict[str, Any]) -> Callable[[], str]:
    def text() -> str:
        config = yaml.safe_load(trained()[1])
        for group, value in options.items():
            nested = isinstance(value, dict) and isinstance(config.get(group), dict) and "class_path" not in value
            config[group] = config[group] | value if nested else value
        return yaml.safe_dump(config)

    return text


def in_folder(options: dict[str, Any]) -> Callable:
    """Return a case's ``from_pretrained``."""

    def run(folder: Path) -> int:
        sys.path.append(str(folder))
        plant()
        model = VRNNLightningModule(num_features=1, latent_size=2, hidden_size=4)
        model.save_pretrained("model")
        path = Path("model/config.json")
        config = json.loads(path.read_text())
        config["model"] |= options
        path.write_text(json.dumps(config))
        VRNNLightningModule.from_pretrained("model")
        return 0

    return run


def names() -> Iterator[Case]:
    """Yield every place that names something, in every reader."""
    harmless = {"_instantiator"}  # it is read by nobody
    for name, options in MODEL.items():
        found, refused = with_model(options), name not in harmless
        private = name.startswith("_")  # no option of the command line
        for words in (["test"], FIT):
            yield Case(f"{words[0]}: {name}", on_line(found, [*words, "--ckpt_path"]), refused and not private)
        yield Case(f"python: {name}", in_python(found, VRNNLightningModule), refused and name != "__path__")
        trains = set(options) <= {"optimizer", "lr_scheduler", "objective"}
        words = ["fit", "--data=Sines", "--trainer.accelerator=cpu", "--trainer.fast_dev_run=true", "--init_from"]
        if not trains or name == "optimizer":  # what trained the weights is not read
            yield Case(f"init_from: {name}", on_line(found, words), refused and not private and not trains)
        yield Case(f"pretrained: {name}", in_folder(options))
    for words in (["validate"], ["predict", "--prediction.task=sample"]):
        yield Case(f"{words[0]}: emission", on_line(with_model(MODEL["emission"]), [*words, "--ckpt_path"]))
    for name, options in DATA.items():
        for words in (["test"], FIT):
            yield Case(f"{words[0]}: {name}", on_line(with_data(options), [*words, "--ckpt_path"]))
        yield Case(f"python: {name}", in_python(with_data(options), SequenceDataModule))
    for name, options in CONFIG.items():
        run = on_line(lambda: trained()[0], [*FIT, "--ckpt_path"], with_config(options))
        yield Case(f"config beside: {name}", run)
    for name, text in YAMLS.items():
        yield Case(f"config beside: {name}", on_line(lambda: trained()[0], [*FIT, "--ckpt_path"], lambda t=text: t))


def pickles() -> Iterator[Case]:
    """Yield checkpoints that hold pickled code."""

    def saved(found: Any, **options: Any) -> Callable[[], bytes]:
        def make() -> bytes:
            buffer = io.BytesIO()
            torch.save(found(), buffer, **options)
            return buffer.getvalue()

        return make

    makers = {
        "in place of it": saved(Payload),
        "in the options": saved(lambda: content() | {"hyper_parameters": Payload()}),
        "in the weights": saved(lambda: content() | {"state_dict": {"scale_mean": Payload()}}),
        "in the callbacks": saved(lambda: content() | {"callbacks": {"a": Payload()}}),
        "of the old format": saved(Payload, _use_new_zipfile_serialization=False),
    }
    for name, make in makers.items():
        for words in (["test"], FIT, ["fit", "--data=Sines", "--init_from"]):
            words = words if words[-1] == "--init_from" else [*words, "--ckpt_path"]
            yield Case(f"{words[0]} {words[-1]}: pickle {name}", on_line(make, words))
        yield Case(f"python: pickle {name}", in_python(make, VRNNLightningModule))
        yield Case(f"python, data: pickle {name}", in_python(make, SequenceDataModule))

    def weights(folder: Path) -> int:
        VRNNLightningModule(num_features=1).save_pretrained("model")
        torch.save(Payload(), "model/model.safetensors")
        VRNNLightningModule.from_pretrained("model")
        return 0

    yield Case("pretrained: pickle", weights)


def nested(depth: int) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = {"a": [found]}
    return found


def laughs() -> list[Any]:
    found: list[Any] = ["x"]
    for _ in range(20):
        found = [found, found, found]
    return found


def cyclic() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["a"] = [found]
    return found


def wrong(seed: int) -> Iterator[Case]:
    """Yield checkpoints with wrong types, drawn at random, at every place."""
    draw = random.Random(seed)
    values = {
        "a text": "evil.f",
        "nothing": None,
        "a list": [1, "evil.f"],
        "a number": -3,
        "a large number": 10**30,
        "NaN": float("nan"),
        "odd keys": {1: 2, None: "a", ("b",): torch.ones(2)},
        "a tensor": torch.ones(3),
        "deep": nested(400),
        "laughs": laughs(),
        "cycle": cyclic(),
        "a dict": {"class_path": "evil.Head"},
        "bytes": b"\x00",
    }
    lines = [["test", "--ckpt_path"], [*FIT, "--ckpt_path"], ["predict", "--prediction.task=sample", "--ckpt_path"]]
    for key in sorted(content()):
        for name in draw.sample(sorted(values), 2):
            words = draw.choice(lines)
            yield Case(f"{words[0]}: {key} is {name}", on_line(with_value((key,), values[name]), words), refused=False)
        name = draw.choice(sorted(values))
        found = with_value((key,), values[name])
        yield Case(f"python: {key} is {name}", in_python(found, VRNNLightningModule), refused=False)
        yield Case(f"python, data: {key} is {name}", in_python(found, SequenceDataModule), refused=False)
        yield Case(f"fit: without {key}", on_line(without(key), lines[1]), refused=False)
        yield Case(f"fit: {key} is laughs", on_line(with_value((key,), laughs()), lines[1]), refused=False)
    paths = sorted(inside(content()), key=str)
    for path in [path for path in paths if len(path) == 3 and path[0] == "optimizer_states"]:
        yield Case(f"fit: {path} is laughs", on_line(with_value(path, laughs()), lines[1]), refused=False)
    for path in draw.sample(paths, min(60, len(paths))):
        name, words = draw.choice(sorted(values)), draw.choice([lines[0], lines[1], lines[1]])
        place = ".".join(str(key).partition("{")[0] for key in path)
        yield Case(f"{words[0]}: {place} is {name}", on_line(with_value(path, values[name]), words), refused=False)


def without(key: str) -> Callable[[], Any]:
    return lambda: {name: value for name, value in content().items() if name != key}


def inside(found: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of what lies below the top of a checkpoint; of many similar weights only the first."""
    parts = list(found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ())
    if path[:1] in (("state_dict",), ("optimizer_states",)):
        parts = parts[:2]
    for key, value in parts:
        if path:
            yield (*path, key)
        if len(path) < 4:
            yield from inside(value, (*path, key))


def with_value(path: tuple[Any, ...], value: Any) -> Callable[[], Any]:
    """Return a maker of checkpoints that have a value at a path."""

    def found() -> Any:
        whole = at = content()
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return whole

    return found


def with_scale(make: Callable[[], Any]) -> Callable[[], Any]:
    """Return a maker of checkpoints that have something else in place of a weight."""
    return lambda: (found := content()) | {"state_dict": found["state_dict"] | {"scale_mean": make()}}


def absurd() -> Iterator[Case]:
    """Yield checkpoints and folders that declare sizes which nothing of their bytes backs."""
    layers = {"width": 10**9, "depth": 1}
    options: dict[str, dict[str, Any]] = {
        "hidden_size": {"hidden_size": 10**9},
        "hidden_size that fits memory": {"hidden_size": 20_000},
        "hidden_size that fits no number": {"hidden_size": 10**30},
        "negative hidden_size": {"hidden_size": -1},
        "latent_size": {"latent_size": 10**8},
        "layers": {"layers": 10**9},
        "num_features": {"num_features": 10**9},
        "num_inputs": {"num_inputs": 10**9},
        "width": {"phi_x": layers},
        "depth": {"phi_x": {"width": 4, "depth": 10**9}},
        "components": {"emission": spec("vrnn_lightning.heads.GaussianMixture", components=10**9)},
        "bits": {"emission": spec("vrnn_lightning.heads.DiscretisedLogisticMixture", bits=10**9)},
    }
    for name, option in options.items():
        for words in (["test", "--ckpt_path"], ["fit", "--data=Sines", "--init_from"]):
            yield Case(f"{words[0]}: {name}", on_line(with_model(option), words))
        yield Case(f"python: {name}", in_python(with_model(option), VRNNLightningModule))
        yield Case(f"pretrained: {name}", in_folder(option))
    weights: dict[str, Callable[[], Any]] = {
        "stretched": lambda: torch.ones(1).expand(10**10),
        "sparse": lambda: torch.sparse_coo_tensor([[0]], [1.0], (10**10,)),
        "without memory": lambda: torch.ones(10**10, device="meta"),
        "half": lambda: torch.ones(1, dtype=torch.float16),
        "text": lambda: "evil.f",
    }
    for name, make in weights.items():
        found = with_scale(make)
        yield Case(f"test: weights are {name}", on_line(found, ["test", "--ckpt_path"]), name != "half")
        yield Case(f"python: weights are {name}", in_python(found, VRNNLightningModule), name != "half")


def nothing() -> Case:
    """Return the case that loads a good checkpoint."""
    return Case("nothing", in_python(content, VRNNLightningModule), refused=False)


def cases(seed: int) -> list[Case]:
    """Return all cases."""
    return [*names(), *pickles(), *wrong(seed), *absurd()]
