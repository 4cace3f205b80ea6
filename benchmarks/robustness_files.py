"""Read damaged, swollen and hostile files, and count what goes wrong.

    python benchmarks/robustness_files.py                     # 1200 damaged files, bombs and hostile texts
    python benchmarks/robustness_files.py damaged --count 200 --seed 1

Each file is read in a child process of its own, with a limit on its time. A reader may raise one line (a
``UserError``) or load; everything else is counted as a traceback. Of formats with checksums, what loads from a damaged
file must be what the whole file holds.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import wave
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

SECONDS = 30
"""How long a reader may take."""
MEMORY = 12 * 2**30
"""Bytes of address space that a child may take beyond its parent's, so that a bomb harms nobody."""


class Kind(NamedTuple):
    """A format.

    Args:
        name: The file's name, which may lie in a folder.
        make: Writes a whole file, and what lies beside it, into a folder.
        read: Returns what a file holds, as anything with a ``repr``.
        has_checksum: Whether damage can always be told.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    has_checksum: bool = False


class Outcome(NamedTuple):
    """What became of a file: "refused", "loaded", "traceback", "slow" or "died"; with its line, content or traceback.

    Args:
        what: Which of these.
        said: A line, a digest of the content, or a traceback.
        peak: Bytes of memory that reading took.
    """

    what: str
    said: str
    peak: int


def read_apart(read: Callable[[Path], object], path: Path) -> Outcome:
    """Read a file in a child process."""
    from vrnn_lightning.errors import UserError

    ours, theirs = os.pipe()
    before = _resident()
    child = os.fork()
    if not child:
        os.close(ours)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said = "loaded", _digest(read(path))
        except UserError as error:
            said = "refused" if "\n" not in str(error) else "traceback", str(error)
        except BaseException:
            said = "traceback", traceback.format_exc()
        with os.fdopen(theirs, "w", errors="backslashreplace") as pipe:
            json.dump(said, pipe)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, errors="replace") as pipe:
        text = pipe.read()
    _, status, used_by_child = os.wait4(child, 0)
    peak = max(0, used_by_child.ru_maxrss * 1024 - before)
    if os.WIFSIGNALED(status):
        stopped = os.WTERMSIG(status)
        return Outcome("slow" if stopped == signal.SIGALRM else "died", f"signal {stopped}", peak)
    return Outcome(*json.loads(text), peak)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _digest(content: object) -> str:
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        if isinstance(value, np.ndarray):
            total.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, dict):
            for key in value:
                total.update(repr(key).encode("utf-8", "backslashreplace"))
                add(value[key])
        elif isinstance(value, (list, tuple)):
            total.update(f"{type(value).__name__}{len(value)}".encode())
            for item in value:
                add(item)
        else:
            total.update(repr(value).encode("utf-8", "backslashreplace"))

    add(content)
    return total.hexdigest()


def _archived(path: Path) -> object:
    from vrnn_lightning.data import archive_holds, read_archive

    found = [archive_holds(path, "val"), archive_holds(path, "test")]
    for split in ("train", "val"):
        part = read_archive(path, split, 3)
        found += [part.values, part.bounds]
    return found


def _archive(path: Path, save: Callable[..., Any] = np.savez) -> None:
    random = np.random.default_rng(0)
    values = {"train_values": random.normal(size=(90, 3)), "valid_values": random.normal(size=(30, 3)).round(1)}
    save(path, **values, train_lengths=np.array([40, 50]), valid_lengths=np.array([30]), other=np.arange(9))


def _drawings(path: Path) -> None:
    random = np.random.default_rng(0)
    parts = {}
    for split, count in (("train", 5), ("valid", 2), ("test", 2)):
        parts[split] = np.empty(count, dtype=object)
        parts[split][:] = [np.c_[random.integers(-9, 9, (12, 2)), np.arange(12) == 11].astype("i2") for _ in parts[split]]
    np.savez_compressed(path, **parts)


def _handwriting(layout: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        from datamodules.handwriting import Handwriting

        root = path if layout in ("sketch-rnn", "quickdraw") else path.parent
        data = Handwriting(str(root), layout=layout, val=0.3, test=0.3)  # type: ignore[arg-type]  # one of the words
        data.setup("fit")
        return [_items(data.sequences(split)) for split in ("train", "val")]

    return read


def _items(sequences: Any) -> list[object]:
    return [(s.name, s.x, s.observed, s.inputs) for s in (sequences[i] for i in range(len(sequences)))]


def _ink(folder: Path) -> None:
    for i in range(4):
        traces = "".join(f"<trace>{10 + i} 20, {30 + j} 40, 55 {j}</trace>" for j in range(6))
        name = "a.inkml" if not i else f"whole_{i}.inkml"
        (folder / name).write_text(f'<ink xmlns="http://www.w3.org/2003/InkML">{traces}</ink>')


def _quickdraw(path: Path) -> None:
    drawing = [[[1, 2, 4], [1, 1, 0]], [[3, 3], [4, 6]]]
    path.write_text("".join(json.dumps({"key_id": str(i), "drawing": drawing}) + "\n" for i in range(8)))


def _sound(form: str, subtype: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        import soundfile

        random = np.random.default_rng(0)
        for name in (path, path.with_name(f"b{path.suffix}"), path.with_name(f"c{path.suffix}")):
            samples = 0.2 * np.sin(np.arange(6000) / 9) + 0.01 * random.normal(size=6000)
            soundfile.write(name, samples, 8000, subtype, format=form)

    return make


def _speech(path: Path) -> object:
    from datamodules.speech import Speech

    os.environ["XDG_CACHE_HOME"] = str(path.parent / "cache")
    data = Speech(str(path.parent), test=0.3, val=0.3)
    data.setup("fit")
    return [_items(data.sequences(split)) for split in ("train", "val", "test")]


def _music(path: Path) -> None:
    from vrnn_lightning.data.rolls import write_midi

    roll = np.random.default_rng(0).random((64, 88)) > 0.95
    for i, name in enumerate((path, path.with_name("b.mid"), path.with_name("c.mid"))):
        write_midi(name, np.roll(roll, i, 0), 4)


def _rolls(path: Path) -> object:
    from datamodules.piano_rolls import PianoRolls

    data = PianoRolls(str(path.parent if path.suffix == ".mid" else path))
    data.setup("fit")
    return [_items(data.sequences(split)) for split in ("train", "val")]


NOTES = {split: [[[60, 64], [67], [], [60]] * 5, [[50]] * 7] for split in ("train", "valid", "test")}


def _idx(path: Path, pack: Callable[[bytes], bytes] = bytes) -> None:
    images = np.random.default_rng(0).integers(0, 255, (12, 28, 28), dtype=np.uint8)
    content = np.array([2051, 12, 28, 28], ">u4").tobytes() + images.tobytes()
    for name in (path.name, path.name.replace("train", "t10k")):
        path.with_name(name).write_bytes(pack(content))


def _digits(path: Path) -> object:
    from datamodules.mnist_rows import MNISTRows

    data = MNISTRows(str(path.parent), val_size=3)
    data.setup("fit")
    return [_items(data.sequences(split)) for split in ("train", "val")]


def _rows() -> list[tuple[str, int, float]]:
    return [(f"sensor {i % 3}", i // 3, round(float(np.sin(i)), 4)) for i in range(150)]


def _csv(path: Path) -> None:
    text = "id,time,y\n" + "".join(f"{name},{time},{y}\n" for name, time, y in _rows())
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def _parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    names, times, values = zip(*_rows(), strict=True)
    table = pyarrow.table({"id": list(names), "time": list(times), "y": list(values)})
    parquet.write_table(table, path, write_page_checksum=True)


def _table(path: Path) -> object:
    from datamodules.tables import Tables

    data = Tables(str(path), ["y"], id="id", time="time")
    data.setup("fit")
    return [data.scaler.mean, *(_items(data.sequences(split)) for split in ("train", "val"))]


CONFIG = (
    "trainer: {max_epochs: 1}\nmodel:\n  latent_size: 2\ndata:\n  class_path: Sines\n  init_args: &a {train_size: 8}\n"
)


def _config(path: Path) -> object:
    from vrnn_lightning.cli.words import mentions, with_configs

    return mentions(with_configs(["fit", "-c", str(path)]), "data")


def _module() -> Any:
    from vrnn_lightning import VRNNLightningModule

    torch.manual_seed(0)
    return VRNNLightningModule(3, latent_size=2, hidden_size=4)


def _pretrained(folder: Path) -> None:
    _module().save_pretrained(folder)


def _loaded_pretrained(path: Path) -> object:
    from vrnn_lightning import VRNNLightningModule

    module = VRNNLightningModule.from_pretrained(path.parent)
    return dict(module.hparams), module.state_dict()


def _checkpoint(path: Path) -> None:
    module = _module()
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "global_step": 3, "epoch": 1}
    content["hyper_parameters"] = {"num_features": 3, "latent_size": 2, "hidden_size": 4}
    torch.save(content, path)


def _loaded_checkpoint(path: Path) -> object:
    from vrnn_lightning.cli.checkpoint import Checkpoint

    found = Checkpoint.read(path)
    return found.model, found.step, found.weights


def _run(folder: Path) -> None:
    (folder / "metrics.csv").write_text("epoch,step,val/elbo,test/elbo\n0,9,-1.5,\n1,19,-1.25,\n1,19,,-1.3\n")
    values = {"test_elbo": np.arange(5.0), "test_lengths": np.arange(1, 6), "test_kl_per_dim": np.array([0.5, 0.1])}
    np.savez(folder / "evaluation.npz", **values)
    task = folder / "predictions" / "forecast"
    task.mkdir(parents=True)
    (task / "figures.json").write_text(json.dumps({"forecast": {"crps": 0.25, "coverage": 0.9}}))
    (folder / "samples").mkdir()
    (folder / "samples" / "step_0000019_table.csv").write_text("kind,name,elbo\nreal,a,-1.5\nsampled,b,-2\n")
    with wave.open(str(folder / "samples" / "step_0000019_real_0.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(np.random.default_rng(0).integers(-999, 999, 80000, dtype="<i2").tobytes())
    (folder / "samples" / "step_0000019.png").write_bytes(b"\x89PNG")


def _report(path: Path) -> object:
    from vrnn_lightning.report import write_report

    folder = next(parent for parent in path.parents if (parent / "samples").is_dir())
    with torch.random.fork_rng():
        return len(write_report(folder).read_text("utf-8"))


def _member(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    return lambda make: lambda path: make(path.parents[len(Path(name).parts) - 1])


KINDS = {
    "archive": Kind("a.npz", _archive, _archived, True),
    "compressed archive": Kind("a.npz", lambda path: _archive(path, np.savez_compressed), _archived, True),
    "sketch-rnn": Kind("a.npz", _drawings, _handwriting("sketch-rnn"), True),
    "inkml": Kind("a.inkml", lambda path: _ink(path.parent), _handwriting("inkml")),
    "ndjson": Kind("a.ndjson", _quickdraw, _handwriting("quickdraw")),
    "wav": Kind("a.wav", _sound("WAV", "PCM_16"), _speech),
    "flac": Kind("a.flac", _sound("FLAC", "PCM_16"), _speech, True),
    "ogg": Kind("a.ogg", _sound("OGG", "VORBIS"), _speech, True),
    "sph": Kind("a.sph", _sound("NIST", "PCM_16"), _speech),
    "midi": Kind("a.mid", _music, _rolls),
    "pickle": Kind("a.pickle", lambda path: path.write_bytes(pickle.dumps(NOTES)) and None, _rolls),
    "json": Kind("a.json", lambda path: path.write_text(json.dumps(NOTES)) and None, _rolls),
    "idx": Kind("train-images-idx3-ubyte", _idx, _digits),
    "idx.gz": Kind("train-images-idx3-ubyte.gz", lambda path: _idx(path, gzip.compress), _digits, True),
    "csv": Kind("a.csv", _csv, _table),
    "csv.gz": Kind("a.csv.gz", _csv, _table, True),
    "parquet": Kind("a.parquet", _parquet, _table),
    "yaml": Kind("a.yaml", lambda path: path.write_text(CONFIG) and None, _config),
    "pretrained weights": Kind("model.safetensors", lambda path: _pretrained(path.parent), _loaded_pretrained),
    "pretrained config": Kind("config.json", lambda path: _pretrained(path.parent), _loaded_pretrained),
    "checkpoint": Kind("a.ckpt", _checkpoint, _loaded_checkpoint, True),
    "report metrics": Kind("metrics.csv", lambda path: _run(path.parent), _report),
    "report evaluation": Kind("evaluation.npz", lambda path: _run(path.parent), _report),
    "report figures": Kind(
        "predictions/forecast/figures.json", _member("predictions/forecast/figures.json")(_run), _report
    ),
    "report table": Kind(
        "samples/step_0000019_table.csv", _member("samples/step_0000019_table.csv")(_run), _report
    ),
    "report sound": Kind(
        "samples/step_0000019_real_0.wav", _member("samples/step_0000019_real_0.wav")(_run), _report
    ),
}
"""The formats that are damaged."""


def damage(content: bytes, random: np.random.Generator) -> bytes:
    """Return bytes with a bit flipped, a stretch zeroed or filled, two stretches swapped, or the end cut off."""
    changed = bytearray(content)
    size, way = len(changed), random.integers(5)
    place = int(random.integers(size))
    length = int(random.integers(1, max(2, size // 8)))
    if way == 0:
        changed[place] ^= 1 << int(random.integers(8))
    elif way == 1:
        del changed[place:]
    elif way == 2:
        part = changed[place : place + length]
        changed[place : place + length] = bytes(len(part)) if random.integers(2) else random.bytes(len(part))
    elif way == 3 and size > 2 * length:
        other = int(random.integers(size - length))
        changed[other : other + length], changed[place : place + length] = (
            changed[place : place + length],
            changed[other : other + length],
        )
    else:
        for _ in range(int(random.integers(1, 9))):
            changed[int(random.integers(size))] = int(random.integers(256))
    return bytes(changed)


def damaged(seed: int = 0, count: int = 1200, kinds: tuple[str, ...] = tuple(KINDS)) -> dict[str, Any]:
    """Damage files of every format, read them, and count.

    Args:
        seed: Of the damage.
        count: Files, shared by the formats.
        kinds: The formats.

    Returns:
        Counts: "files", "tracebacks", "slow", "died", "loads that differ" (of formats with checksums), "refused",
        "loaded"; "peak bytes" beyond the whole file's per byte of a file; and "examples" of what went wrong.
    """
    totals: dict[str, Any] = dict.fromkeys(("files", "tracebacks", "slow", "died", "loads that differ"), 0)
    totals |= {"refused": 0, "loaded": 0, "peak bytes per byte": 0.0, "examples": [], "loads that differ, no checksum": {}}
    random = np.random.default_rng(seed)
    for name in kinds:
        kind = KINDS[name]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "in", kind.name)
            Path(folder, "in").mkdir()
            kind.make(path)
            content = path.read_bytes()
            whole = read_apart(kind.read, path)
            assert whole.what == "loaded", f"{name}: {whole.said}"
            for trial in range(-(-count // len(kinds))):
                bad = damage(content, random)
                if bad == content:
                    continue
                path.write_bytes(bad)
                outcome = read_apart(kind.read, path)
                _count(totals, name, f"{name} {trial}", outcome, whole, len(bad), kind.has_checksum)
    return totals


def _count(
    totals: dict[str, Any], name: str, what: str, outcome: Outcome, whole: Outcome | None, size: int, strict: bool
) -> None:
    totals["files"] += 1
    totals[{"traceback": "tracebacks"}.get(outcome.what, outcome.what)] += 1
    if outcome.what not in ("refused", "loaded"):
        totals["examples"].append(f"{what}: {outcome.said[-600:]}")
    if whole is not None:
        if outcome.what == "loaded" and outcome.said != whole.said:
            if strict:
                totals["loads that differ"] += 1
                totals["examples"].append(f"{what}: loads, and differs")
            else:
                other = totals["loads that differ, no checksum"]
                other[name] = other.get(name, 0) + 1
    taken = outcome.peak - (whole.peak if whole else 0)
    totals["peak bytes per byte"] = max(totals["peak bytes per byte"], taken / max(size, 2**16))


def main() -> None:
    """Run the parts that are asked for, and print their counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1200, help="damaged files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in PARTS if options.part == "all" else [options.part]:
        more = {"count": options.count} if name == "damaged" else {}
        found = PARTS[name](seed=options.seed, **more)
        for example in found.pop("examples")[:20]:
            print(f"  {example}", file=sys.stderr)
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in found.items())}", flush=True)


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"damaged": damaged}

if __name__ == "__main__":
    main()
