"""Read damaged, swollen and hostile files, and count what goes wrong.

    python benchmarks/robustness_files.py                     # 1200 damaged files, bombs and hostile texts
    python benchmarks/robustness_files.py damaged --count 200 --seed 1

Each file is read in a child process of its own, with a limit on its time. A reader may raise one line (a
``UserError``) or load; everything else is counted as a traceback. Of formats with checksums, what loads from a damaged
file must be what the whole file holds.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import tempfile
import traceback
import warnings
import wave
import zipfile
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
    child = os.fork()
    if not child:
        os.close(ours)
        room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        os.write(theirs, f"{_resident()}\n".encode())
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said = "loaded", _digest(read(path))
        except UserError as error:
            said = "refused" if "\n" not in str(error) else "traceback", str(error)
        except BaseException:
            said = "traceback", traceback.format_exc()
        with os.fdopen(theirs, "w") as pipe:
            json.dump(said, pipe)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        before, text = int(pipe.readline()), pipe.read()
    _, status, used = os.wait4(child, 0)
    peak = max(0, used.ru_maxrss * 1024 - before)
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
        parts[split][:] = [
            np.c_[random.integers(-9, 9, (12, 2)), np.arange(12) == 11].astype("i2") for _ in parts[split]
        ]
    np.savez_compressed(path, **parts)


def _handwriting(layout: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        from vrnn_lightning.datamodules.handwriting import Handwriting

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
    from vrnn_lightning.datamodules.speech import Speech

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
    from vrnn_lightning.datamodules.piano_rolls import PianoRolls

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
    from vrnn_lightning.datamodules.mnist_rows import MNISTRows

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
    from vrnn_lightning.datamodules.tables import Tables

    data = Tables(str(path), ["y"], id="id", time="time")
    data.setup("fit")
    return [data.scaler.mean, *(_items(data.sequences(split)) for split in ("train", "val"))]


CONFIG = (
    "trainer: {max_epochs: 1}\nmodel:\n  latent_size: 2\ndata:\n  class_path: Sines\n  init_args: &a {train_size: 8}\n"
)


def _config(path: Path) -> object:
    from vrnn_lightning.cli.argv import mentions, with_configs

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
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "global_step": 3,
        "epoch": 1,
    }
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
    "report evaluation": Kind("evaluation.npz", lambda path: _run(path.parent), _report, True),
    "report figures": Kind(
        "predictions/forecast/figures.json", _member("predictions/forecast/figures.json")(_run), _report
    ),
    "report table": Kind("samples/step_0000019_table.csv", _member("samples/step_0000019_table.csv")(_run), _report),
    "report sound": Kind("samples/step_0000019_real_0.wav", _member("samples/step_0000019_real_0.wav")(_run), _report),
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
    totals |= {
        "refused": 0,
        "loaded": 0,
        "peak bytes per byte": 0.0,
        "examples": [],
        "loads that differ, no checksum": {},
    }
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
    if whole is not None and outcome.what == "loaded" and outcome.said != whole.said:
        if strict:
            totals["loads that differ"] += 1
            totals["examples"].append(f"{what}: loads, and differs")
        else:
            other = totals["loads that differ, no checksum"]
            other[name] = other.get(name, 0) + 1
    taken = outcome.peak - (whole.peak if whole else 0)
    totals["peak bytes per byte"] = max(totals["peak bytes per byte"], taken / max(size, 2**16))


SMALL = 0.05
"""Gigabytes that bombs may take: a limit that is lower than the default, so that bombs are made quickly."""


def _bombs(folder: Path) -> list[tuple[str, Path, Callable[[Path], object]]]:
    """Write files that declare or unpack to much more than they hold; return what each is, and its reader."""
    from vrnn_lightning.datamodules.archive import Archive
    from vrnn_lightning.datamodules.handwriting import Handwriting
    from vrnn_lightning.datamodules.mnist_rows import MNISTRows
    from vrnn_lightning.datamodules.piano_rolls import PianoRolls
    from vrnn_lightning.datamodules.speech import Speech
    from vrnn_lightning.datamodules.tables import Tables

    made: list[tuple[str, Path, Callable[[Path], object]]] = []

    def add(what: str, name: str, content: bytes, read: Callable[[Path], object]) -> Path:
        path = folder / what.replace(" ", "_") / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        made.append((what, path, read))
        return path

    def setup(make: Callable[..., Any], **options: Any) -> Callable[[Path], object]:
        def read(path: Path) -> object:
            os.environ["XDG_CACHE_HOME"] = str(path.parent / "cache")
            data = make(str(path), max_gb=SMALL, **options)
            data.setup("fit")
            return next(iter(data.train_dataloader())).x

        return read

    def zipped(members: dict[str, bytes], deflate: bool = False) -> bytes:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
            for name, member in members.items():
                archive.writestr(f"{name}.npy", member)
        return content.getvalue()

    def npy(shape: tuple[int, ...], kind: str, content: bytes) -> bytes:
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
        return file.getvalue() + content

    one = npy((1,), "<i8", struct.pack("<q", 1))
    archive = setup(Archive, features=1)
    lie = zipped({"train_values": npy((2 * 10**10, 1), "<f4", bytes(64)), "train_lengths": one})
    add("npy header", "a.npz", lie, archive)
    two = bytearray(lie)
    for place in (i for i in range(len(two)) if two[i : i + 4] == struct.pack("<I", 192)):
        two[place : place + 4] = struct.pack("<I", 2**32 - 2)
    add("npy and zip headers", "a.npz", bytes(two), archive)
    zeros = npy((5 * 10**7, 1), "<f4", bytes(2 * 10**8))
    add("zip bomb", "a.npz", zipped({"train_values": zeros, "train_lengths": one}, deflate=True), archive)
    deep: object = [0, 0, 0]
    for _ in range(40):
        deep = [deep, deep, deep]
    nested = zipped({"train": npy((1,), "|O", pickle.dumps([deep]))})
    add("pickle of nested lists", "a.npz", nested, setup(Handwriting, layout="sketch-rnn"))
    rolls = setup(PianoRolls)
    step: list[list[int]] = [[60]] * 20000
    add("pickle of one roll many times", "a.pickle", pickle.dumps(dict.fromkeys(NOTES, [step] * 20000)), rolls)
    add("pickle of nested notes", "a.pickle", pickle.dumps({"train": [[[deep]]]}), rolls)
    add("deep pickle", "a.pickle", b"\x80\x04" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".", rolls)
    add("deep json", "a.json", b"[" * 10**6, rolls)
    far = b"MThd\0\0\0\x06\0\0\0\x01\0\x60MTrk\0\0\0\x13\0\x90<P`\x80<\0\xff\xff\xff\x7f\x90<P`\x80<\0"
    add("far note", "a.mid", far, lambda path: setup(PianoRolls)(path.parent))
    images = np.array([2051, 2**32 - 1, 28, 28], ">u4").tobytes() + bytes(784)
    digits = setup(MNISTRows, val_size=1)
    add("idx header", "train-images-idx3-ubyte", images, lambda path: digits(path.parent))
    inflating = gzip.compress(np.array([2051, 10**6, 28, 28], ">u4").tobytes() + bytes(784 * 10**6 // 4))
    add("gzip bomb", "train-images-idx3-ubyte.gz", inflating, lambda path: digits(path.parent))
    table = setup(Tables, columns=["y"])
    add("csv.gz of one line", "a.csv.gz", gzip.compress(b"y\n" + b"1" * 2 * 10**8), table)
    add("csv of one field", "a.csv", b"y\n" + b"1" * 5 * 10**7, table)
    add("csv of NUL", "a.csv", b"y\n" + bytes(10**6), table)
    _parquet_bomb(add, table)
    speech = setup(Speech, sample_rate=16000, resample=True)
    for what, content in _sound_bombs():
        add(what, f"a.{what.split()[0]}", content, lambda path: speech(path.parent))
    ink = setup(Handwriting, layout="inkml", val=0.3, test=0.3)
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha"}">' for i in range(10))
    add("inkml entities", "a.inkml", f"<!DOCTYPE ink [{laughs}]><ink>&l9;</ink>".encode(), lambda p: ink(p.parent))
    add("deep inkml", "a.inkml", b"<ink>" + b"<a>" * 10**6, lambda path: ink(path.parent))
    drawn = setup(Handwriting, layout="quickdraw")
    add("deep ndjson", "a.ndjson", b'{"drawing": ' + b"[" * 10**6, drawn)
    aliases = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    aliases += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    add("yaml aliases", "a.yaml", aliases.encode(), _config)
    add("deep yaml", "a.yaml", b"[" * 10**5 + b"]" * 10**5, _config)
    add("long yaml", "a.yaml", b"- " * 10**5, _config)
    for what, name, content in (
        ("report of a long field", "metrics.csv", b"step,val/elbo\n" + b"1" * 5 * 10**7),
        ("report of a deep file", "predictions/forecast/figures.json", b"[" * 10**6),
        ("report of a header", "evaluation.npz", zipped({"test_elbo": npy((2 * 10**10,), "<f4", bytes(64))})),
        ("report of a flac bomb", "samples/step_0000019_real_0.wav", dict(_sound_bombs())["flac bomb"]),
    ):
        path = folder / what.replace(" ", "_")
        path.mkdir()
        _run(path)
        (path / name).write_bytes(content)
        made.append((what, path / name, _report))
    return made


def _parquet_bomb(add: Callable[..., Path], table: Callable[[Path], object]) -> None:
    import pyarrow
    from pyarrow import parquet

    ones = pyarrow.table({"y": pyarrow.array(np.ones(3 * 10**7))})
    parquet.write_table(ones, add("parquet of one value", "a.parquet", b"", table))


def _sound_bombs() -> list[tuple[str, bytes]]:
    import soundfile

    quiet = io.BytesIO()
    with soundfile.SoundFile(quiet, "w", 8000, 8, subtype="PCM_16", format="FLAC") as file:
        for _ in range(16):
            file.write(np.zeros((2**18, 8), "int16"))
    riff = b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    slow = b"RIFF" + struct.pack("<I", 10036) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 1, 2, 2, 16)
    sphere = (
        "NIST_1A\n   1024\nsample_count -i {}\nsample_n_bytes -i 2\nchannel_count -i 1\nsample_rate -i 8000\nend_head\n"
    )
    return [
        ("flac bomb", quiet.getvalue()),
        ("wav of unknown length", riff + b"data" + struct.pack("<I", 2**32 - 1) + bytes(1000)),
        ("wav of a false length", riff + b"data" + struct.pack("<I", 2**31 - 2) + bytes(1000)),
        ("wav of one Hz", slow + b"data" + struct.pack("<I", 10000) + bytes(range(100)) * 100),
        ("sph of a false length", sphere.format(10**12).encode().ljust(1024) + bytes(1000)),
        ("sph of many digits", sphere.format("9" * 5000).encode()[:1024].ljust(1024) + bytes(1000)),
    ]


def bombs(seed: int = 0) -> dict[str, Any]:
    """Read files that declare or unpack to far more than they hold.

    Args:
        seed: Not used: nothing here is random.

    Returns:
        Counts as of :func:`damaged`, and the most memory that one of them took, "peak MB".
    """
    totals: dict[str, Any] = dict.fromkeys(("files", "tracebacks", "slow", "died", "refused", "loaded"), 0)
    totals |= {"peak bytes per byte": 0.0, "peak MB": 0.0, "examples": []}
    with tempfile.TemporaryDirectory() as folder:
        for what, path, read in _bombs(Path(folder)):
            outcome = read_apart(read, path)
            _count(totals, what, what, outcome, None, path.stat().st_size, strict=False)
            if outcome.what == "loaded" or outcome.peak > 4e8:
                totals["examples"].append(f"{what}: {outcome.what}, {outcome.peak / 1e6:.0f} MB: {outcome.said[:200]}")
            totals["peak MB"] = max(totals["peak MB"], outcome.peak / 1e6)
    return totals


TEXTS = (
    *(
        "=1+1",
        "+cmd|' /C calc'!A0",
        "-2+3",
        "@sum(1)",
        "\t=1",
        "\r=1",
        "'=1",
        "''=1",
        "'quoted",
        "-1.5",
        "+3",
        "-1e5",
        "-inf",
    ),
    *("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</td></table>", "&lt;", "{{7*7}}", "${7*7}"),
    *("\x00", "a\x00b", "\x1b[31mred", "\u202etxt.exe", "\u200b", "a\nb", "a\r\nb", "a,b", 'a"b', "a;b", " a ", ""),
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "CON",
        "..",
        "%s%n",
        "$\\frac{1}{2}$",
        "\udcff",
        "é",
        "x" * 10**6,
    ),
)
"""Names of sequences that somebody may have thought of."""


def hostile_text(seed: int = 0, count: int = 200) -> dict[str, Any]:
    """Give sequences hostile names, and see what becomes of them in tables, pages and pictures.

    Args:
        seed: Of random names, which join the others.
        count: Of them.

    Returns:
        Counts: "texts", "tracebacks", "not restored" (cells that are read back as another text), "run by a spreadsheet"
        (cells that begin like a formula), "markup" (texts that a page holds unescaped); and "examples".
    """
    from vrnn_lightning.errors import UserError

    totals: dict[str, Any] = dict.fromkeys(("texts", "tracebacks", "not restored", "run by a spreadsheet", "markup"), 0)
    totals["examples"] = []
    random = np.random.default_rng(seed)
    letters = "='+-@\t\r\n\",;<>&/\\ \x00ab1."
    more = ["".join(random.choice(list(letters), random.integers(1, 9))) for _ in range(count)]
    for text in [*TEXTS, *more]:
        totals["texts"] += 1
        drawn = (_on_a_page, _as_title) if text not in more else ()  # what takes long
        for check in (_as_cell, _in_a_table, *drawn):
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    problem = check(Path(folder), text)
                except UserError as error:
                    problem = "tracebacks" if "\n" in str(error) else None
                except Exception:
                    problem = "tracebacks"
                    totals["examples"].append(traceback.format_exc()[-500:])
            if problem:
                totals[problem] += 1
                totals["examples"].append(f"{check.__name__} {text[:40]!r}: {problem}")
    return totals


def _as_cell(folder: Path, text: str) -> str | None:
    from vrnn_lightning.files import csv_line, read_cell

    line = csv_line([text, 1, "end"])
    csv.field_size_limit(10**7)
    cells = next(csv.reader(io.StringIO(line, newline=""), strict=True))
    csv.field_size_limit(2**17)
    if [read_cell(cells[0]), *cells[1:]] != [text, "1", "end"]:
        return "not restored"
    is_number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", cells[0])
    return "run by a spreadsheet" if cells[0][:1] in tuple("=+-@\t\r") and not is_number else None


def _in_a_table(folder: Path, text: str) -> str | None:
    """Read a table whose ids are hostile, and write the names of its series."""
    from vrnn_lightning.datamodules.tables import Tables

    from vrnn_lightning.files import csv_line

    lines = [csv_line(["id", "y"]), *(csv_line([text, i * i]) for i in range(40))]
    (folder / "a.csv").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    data = Tables(str(folder / "a.csv"), ["y"], id="id")
    data.setup("fit")
    name = data.sequences("train")[0].name.rpartition(" from ")[0]
    expected = text.encode("utf-8", "backslashreplace").decode()
    return None if name == expected.strip() else "not restored"


def _on_a_page(folder: Path, text: str) -> str | None:
    """Write a report of a run whose names are hostile."""
    from vrnn_lightning.files import csv_line
    from vrnn_lightning.report import write_report

    _run(folder)
    lines = [csv_line(["kind", "name", "elbo"]), csv_line(["real", text, -1.5])]
    table = folder / "samples" / "step_0000019_table.csv"
    table.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    (folder / "predictions" / "forecast" / "figures.json").write_text(json.dumps({text: {text: 0.5}}))
    (folder / "config.yaml").write_text(text, encoding="utf-8", errors="backslashreplace")
    if 0 < len(os.fsencode(text)) < 200 and not set(text) & set("/\x00") and text not in ("..", "."):
        (folder / "predictions" / text).mkdir(exist_ok=True)
        (folder / "predictions" / text / f"{text}.csv").write_text("a")
    page = write_report(folder).read_text("utf-8")
    bare = text.encode("utf-8", "backslashreplace").decode()
    return "markup" if set(text) & set("<>") and len(bare) > 4 and bare in page else None


def _as_title(folder: Path, text: str) -> str | None:
    """Draw a sequence whose name and whose features' names are hostile."""
    from types import SimpleNamespace

    from vrnn_lightning.callbacks.media import Media, save_picture

    media = Media(SimpleNamespace(modality="series", columns=[text, f"{text}2"]))
    save_picture(media.draw({"real": [torch.randn(9, 2)]}, [text]), folder / "a.png")
    return None


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"damaged": damaged, "bombs": bombs, "hostile_text": hostile_text}
