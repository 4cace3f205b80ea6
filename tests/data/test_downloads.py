"""Downloads, against a server on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import re
import socket
import threading
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from vrnn_lightning.datamodules.handwriting import Handwriting
from vrnn_lightning.datamodules.mnist_rows import MNISTRows
from vrnn_lightning.datamodules.piano_rolls import PianoRolls
from vrnn_lightning.datamodules.speech import Speech

from vrnn_lightning.data import downloads
from vrnn_lightning.data.downloads import SOURCES, content_sum, fetch
from vrnn_lightning.errors import UserError

CHORALES = {"train": [[[60, 64, 67], [60, 64, 67], []], [[21], [108]]], "valid": [[[50]]], "test": [[[55, 59], [57]]]}
JSON = json.dumps(CHORALES).encode()


class Server(http.server.ThreadingHTTPServer):
    """Serves bytes from memory, as oddly as a test asks."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.ranges = True
        self.lengths = True
        self.break_after: int | None = None
        self.wait: threading.Event | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append((self.path, asked))
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404, "Not Found")
            return
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if asked and server.ranges and first >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if server.lengths:
            self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if server.break_after is not None:
            self.wfile.write(content[first : first + server.break_after])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if server.wait is not None:
            self.wfile.write(content[first : first + 5])
            self.wfile.flush()
            server.wait.wait(20)
            first += 5
        with contextlib.suppress(OSError):  # it hung up
            self.wfile.write(content[first:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def md5(content: bytes) -> str:
    return f"md5:{hashlib.md5(content).hexdigest()}"


def publish(server: Server, monkeypatch: pytest.MonkeyPatch, name: str, *contents: bytes, sums: bool = True, **changes):
    """Serve the files of a data set in the place of where it is published."""
    files = {}
    for (file, (_, known)), content in zip(SOURCES[name].files.items(), contents, strict=True):
        server.files[f"/{file}"] = content
        files[file] = f"{server.address}/{file}", (md5(content) if sums else known) if known else None
    monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], files=files, **changes))


def flat(path: Path, **splits: list[np.ndarray]) -> Path:
    arrays = {f"{split}_values": np.concatenate(rows) for split, rows in splits.items()}
    np.savez(
        path, **arrays, **{f"{split}_lengths": np.array([len(row) for row in rows]) for split, rows in splits.items()}
    )
    return path


def chorales_sum(folder: Path) -> str:
    def roll(sequence):
        x = np.zeros((len(sequence), 88), np.uint8)
        for t, notes in enumerate(sequence):
            x[t, [note - 21 for note in notes]] = 1
        return x

    return content_sum(flat(folder / "sum.npz", **{k: [roll(s) for s in v] for k, v in CHORALES.items()}))


@pytest.fixture
def chorales(server, monkeypatch, tmp_path_factory) -> Server:
    publish(server, monkeypatch, "jsb", JSON, content=chorales_sum(tmp_path_factory.mktemp("sum")))
    monkeypatch.setattr(downloads, "CHUNK", 5)
    return server


def left(folder: Path) -> list[str]:
    """Return all that is below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def refused(name: str, root: Path, *parts: str) -> str:
    with pytest.raises(UserError) as caught:
        fetch(name, root)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_the_chorales(chorales, tmp_path):
    data = PianoRolls(tmp_path / "new" / "jsb.npz", download=True)
    data.prepare_data()
    data.setup("fit")
    x = data.split("train")[0].x
    assert x.shape == (3, 88)
    assert (x.nonzero() == x.new_tensor([[0, 39], [0, 43], [0, 46], [1, 39], [1, 43], [1, 46]])).all()
    assert data.lengths("train") == [3, 2]
    assert left(tmp_path) == ["new", "new/jsb.npz"]
    data.prepare_data()
    assert len(chorales.asked) == 1, "what is there is not fetched again"
    assert "download" in data.hparams
    assert not data.hparams["download"], "a checkpoint does not ask for downloads"


def test_the_command(chorales, lightning, tiny, folder):
    """A run may ask for a download; what is made of its checkpoint does not."""
    words = ("--data", "PianoRolls", "--data.root", "data/jsb.npz", "--data.download", "true")
    said = lightning("fit", "-c", tiny, "--model.emission", "Bernoulli", *words)
    assert said.code == 0, said.err
    assert len(chorales.asked) == 1
    (folder / "data" / "jsb.npz").unlink()
    said = lightning("test", "--ckpt_path", "last", "--data", "PianoRolls", "--data.root", "data/jsb.npz")
    assert said.code != 0
    assert "data/jsb.npz: no such file or folder. Fix: check the path, or set --data.download true" in said.err
    assert len(chorales.asked) == 1
    chorales.files.clear()
    said = lightning("test", "--ckpt_path", "last", *words)
    assert said.code != 0
    assert len(said.err.strip().splitlines()) == 1
    assert "404 Not Found). Fix: by hand, fetch http" in said.err
    assert len(chorales.asked) == 2


def test_nothing_is_fetched_unasked(chorales, tmp_path):
    PianoRolls(tmp_path / "jsb.npz").prepare_data()
    assert not chorales.asked
    with pytest.raises(UserError, match=r"jsb.npz: no such file or folder. Fix: .* --data.download true to put"):
        PianoRolls(tmp_path / "jsb.npz").setup("fit")


def idx(magic: int, *shape: int) -> bytes:
    import gzip

    return gzip.compress(np.array([magic, *shape], ">u4").tobytes() + bytes(int(np.prod(shape))), mtime=0)


MNIST_FILES = idx(2051, 5, 28, 28), idx(2049, 5), idx(2051, 3, 28, 28), idx(2049, 3)


def test_mnist(server, monkeypatch, tmp_path):
    publish(server, monkeypatch, "mnist", *MNIST_FILES)
    root = tmp_path / "mnist"
    root.mkdir()  # empty
    data = MNISTRows(str(root), val_size=2, download=True)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [3, 2, 3]
    assert left(tmp_path) == ["mnist", *(f"mnist/{name}" for name in sorted(SOURCES["mnist"].files))]
    data.prepare_data()
    assert len(server.asked) == 4


def sound(samples: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(8000)
        written.writeframes(samples)
    return file.getvalue()


def packed(**more: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fsdd-1/README.md", "digits")
        archive.writestr("fsdd-1/recordings/1_a_0.wav", sound(b"\1\2\3\4"))
        archive.writestr("fsdd-1/recordings/0_a_0.wav", sound(b"\5\6"))
        for name, content in more.items():
            archive.writestr(name, content)
    return file.getvalue()


def digits_sum(folder: Path) -> str:
    (folder / "0_a_0.wav").write_bytes(sound(b"\5\6"))
    (folder / "1_a_0.wav").write_bytes(sound(b"\1\2\3\4"))
    return content_sum(folder)


def test_spoken_digits_are_unpacked_and_nothing_else(server, monkeypatch, tmp_path, tmp_path_factory):
    evil = {
        "fsdd-1/recordings/../../evil.wav": sound(b""),
        "../recordings/../evil.wav": sound(b""),
        "/recordings/evil.wav": sound(b""),
        "fsdd-1/recordings/deep/evil.wav": sound(b""),
        "fsdd-1/recordings/x\\..\\evil.wav": sound(b""),
        "fsdd-1/evil.wav": sound(b""),
    }
    publish(server, monkeypatch, "fsdd", packed(**evil), content=digits_sum(tmp_path_factory.mktemp("sum")))
    data = Speech(str(tmp_path / "digits"), frame_size=1, layout="fsdd", download=True)
    data.prepare_data()
    assert left(tmp_path) == ["digits", "digits/0_a_0.wav", "digits/1_a_0.wav"]
    assert not data.hparams["download"]
    Speech(str(tmp_path / "digits"), download=True).prepare_data()
    assert len(server.asked) == 1
    assert (tmp_path / "digits" / "0_a_0.wav").read_bytes() == sound(b"\5\6")


DRAWINGS = {
    "train": [np.array([[1, 2, 0], [-3, 4, 1]], np.int16), np.array([[5, 6, 1]], np.int16)],
    "valid": [np.array([[0, 1, 1]], np.int16)],
    "test": [np.array([[9, 9, 1]], np.int16)],
}


def objects(drawings: dict) -> bytes:
    file = io.BytesIO()
    arrays = {}
    for split, rows in drawings.items():
        arrays[split] = np.empty(len(rows), dtype=object)
        arrays[split][:] = rows
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def test_omniglot(server, monkeypatch, tmp_path, tmp_path_factory):
    known = content_sum(flat(tmp_path_factory.mktemp("sum") / "x.npz", **DRAWINGS))
    publish(server, monkeypatch, "omniglot", objects(DRAWINGS), content=known)
    data = Handwriting(str(tmp_path / "omniglot.npz"), download=True)
    data.prepare_data()
    data.setup("fit")
    assert data.lengths("train") == [2, 1]
    assert not data.hparams["download"]
    with np.load(tmp_path / "omniglot.npz") as archive:  # plain arrays
        assert archive["train_values"].dtype == np.int16
        assert archive["train_values"].tolist() == [[1, 2, 0], [-3, 4, 1], [5, 6, 1]]
        assert archive["train_lengths"].tolist() == [2, 1]
    assert left(tmp_path) == ["omniglot.npz"]


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("jsb", b""),
        ("jsb", b"<html>sign in</html>"),
        ("jsb", JSON[:-3]),
        ("jsb", json.dumps(CHORALES | {"train": [[[3]]]}).encode()),
        ("jsb", json.dumps(CHORALES | {"train": [[[60]]]}).encode()),
        ("fsdd", b""),
        ("fsdd", b"<html>sign in</html>"),
        ("fsdd", packed()[:-30]),
        ("fsdd", packed()[:40] + b"spoilt" + packed()[46:]),
        ("fsdd", packed(**{"x/recordings/z.wav": b"no sound"})),
        ("fsdd", packed(**{"x/recordings/z.wav": sound(b"\0\0")})),
        ("omniglot", b""),
        ("omniglot", b"PK\3\4"),
        ("omniglot", objects(DRAWINGS)[:-40]),
        ("omniglot", objects(DRAWINGS)[:150] + b"spoilt" + objects(DRAWINGS)[156:]),
        ("omniglot", objects({"train": DRAWINGS["train"]})),
        ("omniglot", objects(DRAWINGS | {"test": [[[Harm()]]]})),
        ("omniglot", objects(DRAWINGS | {"test": ["words"]})),
        ("omniglot", objects(DRAWINGS | {"test": [np.zeros((2, 4), np.int16)]})),
        ("omniglot", objects(DRAWINGS | {"test": []})),
        ("omniglot", objects(DRAWINGS | {"test": [[[1, 2, 40000]]]})),
    ],
)
def test_content_that_is_not_what_it_was(name, content, server, monkeypatch, tmp_path):
    """It is removed, and one line says so; what a pickle names is never run."""
    monkeypatch.chdir(tmp_path)
    publish(server, monkeypatch, name, content)
    root = tmp_path / ("x" if name == "fsdd" else "x.npz")
    refused(name, root, f"{server.address}/", "was downloaded and removed", "by hand, fetch", str(root))
    assert left(tmp_path) == []


def test_a_wrong_checksum(server, monkeypatch, tmp_path):
    publish(server, monkeypatch, "mnist", *MNIST_FILES)
    server.files["/t10k-images-idx3-ubyte.gz"] += b"?"
    refused("mnist", tmp_path / "mnist", "t10k-images-idx3-ubyte.gz", "another checksum", "put them into")
    assert left(tmp_path) == []
    server.files["/t10k-images-idx3-ubyte.gz"] = MNIST_FILES[2]
    fetch("mnist", tmp_path / "mnist")
    assert len(left(tmp_path)) == 5


def test_a_download_that_broke_off(chorales, tmp_path):
    chorales.break_after = 40
    refused("jsb", tmp_path / "jsb.npz", "no connection, or it broke off", chorales.address)
    assert left(tmp_path) == []


def test_the_progress_is_shown(chorales, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fetch("jsb", tmp_path / "jsb.npz")
    shown = capfd.readouterr().err
    assert "chorales.json: 100%" in shown
    assert re.search(rf"{len(JSON)}/{len(JSON)} .*B/s", shown)


def test_a_server_that_tells_no_length(chorales, tmp_path):
    chorales.lengths = False
    fetch("jsb", tmp_path / "jsb.npz")
    assert left(tmp_path) == ["jsb.npz"]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_file_that_is_gone(name, server, monkeypatch, tmp_path):
    publish(server, monkeypatch, name, *[b""] * len(SOURCES[name].files))
    server.files.clear()
    root = tmp_path / ("x.npz" if SOURCES[name].holds is None else "x")
    refused(
        name, root, "the server answers 404 Not Found", server.address, f"by hand, fetch {server.address}", str(root)
    )
    assert left(tmp_path) == []


def test_no_server(server, monkeypatch, tmp_path):
    publish(server, monkeypatch, "mnist", *MNIST_FILES)
    server.server_close()
    root = tmp_path / "mnist"
    refused("mnist", root, "can't be downloaded (no connection", "t10k-labels", f"put them into the folder {root}")
    assert left(tmp_path) == []


def test_a_server_that_falls_silent(chorales, monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    chorales.wait = threading.Event()
    refused("jsb", tmp_path / "jsb.npz", "chorales.json: can't be downloaded")
    chorales.wait.set()
    assert left(tmp_path) == []


@pytest.mark.parametrize("place", ["content_sum", "flush"])
def test_interrupted(place, chorales, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(downloads, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("jsb", tmp_path / "jsb.npz")
    assert left(tmp_path) == []


def _fetch(root: Path, begin, done) -> None:
    begin.wait(10)
    try:
        fetch("jsb", root)
    except BaseException as error:
        done.put(f"{error!r}")
    else:
        done.put(PianoRolls(root).sequences("train").values.sum().item())


def test_two_processes_at_once(chorales, tmp_path):
    chorales.wait = threading.Event()
    context = multiprocessing.get_context("fork")  # which keeps the replaced address
    begin, done = context.Event(), context.Queue()
    processes = [context.Process(target=_fetch, args=(tmp_path / "jsb.npz", begin, done)) for _ in range(3)]
    for process in processes:
        process.start()
    begin.set()
    threading.Timer(0.6, chorales.wait.set).start()
    assert [done.get(timeout=20) for _ in processes] == [8, 8, 8]
    for process in processes:
        process.join()
    assert left(tmp_path) == ["jsb.npz"]


@pytest.mark.parametrize(
    ("name", "root", "word"),
    [
        ("jsb", "jsb", "let the name end in .npz"),
        ("omniglot", "strokes.json", "let the name end in .npz"),
        ("mnist", "mnist.npz", "give a name without .npz"),
        ("fsdd", "there", "holds other things than the spoken digits"),
        ("mnist", "there", "holds other things than MNIST"),
    ],
)
def test_a_root_that_cannot_hold_it(name, root, word, server, monkeypatch, tmp_path):
    publish(server, monkeypatch, name, *[b""] * len(SOURCES[name].files))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    if root == "there":
        (work / "there").mkdir()
        (work / "there" / "mine.txt").write_text("mine")
    before = left(tmp_path)
    refused(name, Path(root), f"--data.root {root}:", word)
    assert left(tmp_path) == before
    assert not server.asked


def test_data_that_are_there_are_left_alone(server, monkeypatch, tmp_path):
    for name in SOURCES:
        publish(server, monkeypatch, name, *[b""] * len(SOURCES[name].files))
    (tmp_path / "mine.npz").write_bytes(b"mine")
    (tmp_path / "digits" / "deep").mkdir(parents=True)
    (tmp_path / "digits" / "deep" / "a.wav").write_bytes(b"mine")
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"mine")
    before = left(tmp_path)
    for name, root in {"jsb": "mine.npz", "omniglot": "mine.npz", "fsdd": "digits", "mnist": "MNIST"}.items():
        fetch(name, tmp_path / root)
    assert left(tmp_path) == before
    assert (tmp_path / "mine.npz").read_bytes() == b"mine"
    assert not server.asked


def test_a_folder_that_may_not_be_written(chorales, monkeypatch, tmp_path):
    def locked(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", locked)
    refused("jsb", tmp_path / "jsb.npz", f"{tmp_path}: Permission denied")


def test_a_folder_that_is_a_file(chorales, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused("jsb", tmp_path / "file" / "jsb.npz", "File exists")
    assert left(tmp_path) == ["file"]


def test_a_full_disk(chorales, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "_write_archive", full)
    refused("jsb", tmp_path / "jsb.npz", "No space left on device")
    assert not (tmp_path / "jsb.npz").exists()


def test_addresses_are_pinned():
    """Every file has a published checksum, or comes from one commit and has its content checked."""
    for source in SOURCES.values():
        for address, known in source.files.values():
            assert address.startswith("https://")
            assert known or (re.search(r"/[0-9a-f]{40}[/.]", address) and len(source.content) == 64)


@pytest.mark.skipif("VRNN_DATA" not in os.environ, reason="VRNN_DATA names no folder with copies of the data")
@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("fsdd", "speech_fsdd/recordings"),
        ("jsb", "music_jsb/jsb.npz"),
        ("omniglot", "handwriting_omniglot/omniglot_rdp.npz"),
    ],
)
def test_the_sums_are_those_of_the_data(name, copy):
    assert content_sum(Path(os.environ["VRNN_DATA"]) / copy) == SOURCES[name].content


@pytest.mark.skipif("VRNN_DATA" not in os.environ, reason="VRNN_DATA names no folder with copies of the data")
def test_real_chorales_come_through(server, monkeypatch, tmp_path):
    with np.load(Path(os.environ["VRNN_DATA"]) / "music_jsb" / "jsb.npz") as real:
        notes = {}
        for split in ("train", "valid", "test"):
            rolls = np.split(real[f"{split}_values"], real[f"{split}_lengths"].cumsum()[:-1])
            notes[split] = [[(np.flatnonzero(step) + 21).tolist() for step in roll] for roll in rolls]
    publish(server, monkeypatch, "jsb", json.dumps(notes).encode())
    fetch("jsb", tmp_path / "jsb.npz")
    assert left(tmp_path) == ["jsb.npz"]
