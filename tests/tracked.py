"""What a W&B run kept on disk holds, by the definitions of records that wandb itself reads and writes with."""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK, FRAME = 7, 32768, 7
WHOLE, LAST = 1, 4


@dataclass
class Tracked:
    """A W&B run: its rows, summary, config, artifacts, and what was said of it and of its figures."""

    id: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    about: Any = None
    exit_code: int | None = None
    media: list[str] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        """The names of all figures."""
        return set().union(*self.rows)

    def column(self, name: str) -> list[Any]:
        """Return the values of a figure in the order in which they were logged."""
        return [row[name] for row in self.rows if name in row]


def read(folder: Path, patience: float = 20) -> Tracked:
    """Read the one offline run below a folder, once it is whole: wandb's own process writes on after ``finish``."""
    (file,) = Path(folder).rglob("run-*.wandb")
    end = time.monotonic() + patience
    while (found := _read(file)).exit_code is None and time.monotonic() < end:
        time.sleep(0.05)
    return found


def _read(file: Path) -> Tracked:
    found = Tracked()
    for data in frames(file.read_bytes()):
        try:
            record = Record.FromString(data)
        except DecodeError:  # it is being written
            return found
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.id, found.about = record.run.run_id, record.run
            _update(found.config, record.run.config.update)
        elif kind == "history":
            found.rows.append({})
            _update(found.rows[-1], record.history.item)
        elif kind in ("summary", "config"):
            _update(getattr(found, kind), getattr(record, kind).update)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    media = file.parent / "files" / "media"
    found.media = sorted(str(path.relative_to(media)) for path in media.rglob("*") if path.is_file())
    return found


def frames(data: bytes) -> list[bytes]:
    """Return the records of LevelDB's log format: framed pieces that do not cross blocks, behind a header."""
    assert data[:4] in (b":W&B", b"")  # nothing yet
    found, whole, at = [], b"", HEADER
    while at + FRAME <= len(data):
        left = BLOCK - at % BLOCK
        if left < FRAME:  # padding
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + FRAME : at + FRAME + length]
        at += FRAME + length
        if kind in (WHOLE, LAST):
            found.append(whole)
            whole = b""
    return found


def _key(item: Any) -> list[str]:
    return list(item.nested_key) or [item.key]


def _update(target: dict[str, Any], items: Any) -> None:
    for item in items:
        *path, name = _key(item)
        place = target
        for part in path:
            place = place.setdefault(part, {})
        place[name] = json.loads(item.value_json)
