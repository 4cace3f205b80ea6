"""A run as one HTML page: figures, curves, pictures and sounds, all of it inside the file."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vrnn_lightning.data.archives import opened_archive
from vrnn_lightning.data.audio import opened, read_header
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, read_cell, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NAME", "write_report"]

NAME = "report.html"
"""What the page is called in the run's folder."""
KINDS = {".png": "image/png", ".svg": "image/svg+xml", ".wav": "audio/wav", ".mid": "audio/midi"}
MOST_FILES, MOST_BYTES = 48, 16 * 2**20  # of a group of pictures or sounds, and of one of them
LONG_SOUND, MP3_RATES = 2**17, (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
MOST_POINTS = 1000  # of a curve
EARLIER = 8  # pictures of earlier steps
MOST_ROWS, MOST_LETTERS = 40, 200  # of a table, and of a cell
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1180px; margin: 2em auto;
  padding: 0 1.5em; }
h1 { font-size: 1.7em; margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
h3 { margin: 1.2em 0 .3em; } p.sub, figcaption, small { color: #666; margin-top: .2em; }
.tiles { display: flex; flex-wrap: wrap; gap: .8em; margin: 1.2em 0; }
.tile { border: 1px solid #ddd; border-radius: 8px; padding: .6em 1em; min-width: 8em; }
.tile b { display: block; font-size: 1.45em; font-variant-numeric: tabular-nums; } .tile span { color: #666; }
figure { margin: 1em 0; } figure img { max-width: 100%; height: auto; }
.media { display: flex; flex-wrap: wrap; gap: .8em; align-items: end; } .media figure { margin: 0; }
.media img { width: 150px; height: 150px; object-fit: contain; border: 1px solid #eee; }
audio { width: 250px; height: 36px; display: block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2em .9em .2em 0; text-align: left; border-bottom: 1px solid #eee; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: .85em; } details { margin: .8em 0; }
summary { cursor: pointer; } code { overflow-wrap: anywhere; } .wide { overflow-x: auto; }
@media (max-width: 760px) { .picture { overflow-x: auto; } .picture img { max-width: none; width: 760px; } }
"""
CAPTIONS = {
    "": "Sequences of the validation split, what the model makes of them, and sequences that it draws itself.",
    "latent": "KL of each latent dimension at each step, the largest on top: what the latent adds to what the past "
    "tells.",
    "traversal": "The first sequence, with one latent dimension moved at every step by so many of its standard "
    "deviations.",
    "interpolation": "What lies between the latents of two sequences, which are counted from 0.",
}
TASKS = {
    "sample": "Sequences drawn from the model.",
    "reconstruct": "Test sequences and the emission's mean, with the latents inferred.",
    "forecast": "What was given, and how it may continue; each path begins with the end of what was given.",
    "impute": "What was given, and what may fill its gaps.",
    "score": "Test sequences, and the nats of each of their steps.",
    "encode": "Means of the posteriors at each step.",
}


COVERAGE = (
    "Coverage is the share of the true values within the central 90 % of the draws, coverage_50 within the central "
    "50 %. RMSE and CRPS are in the data's units."
)


class _Curve(NamedTuple):
    step: list[float]
    value: list[float]


class _Step(NamedTuple):
    """What was shown at one step: pictures and tables by name, and files of single sequences."""

    pictures: dict[str, Path]
    tables: dict[str, Path]
    sequences: list[Path]


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` of what is in a run's folder, and return its path.

    It shows the best and last figures, the curves of the ELBO and its parts, the KL's weight and active units, the
    pictures and sounds in ``samples/`` and ``predictions/``, the evaluation of a test and the config. Pictures and
    sounds are inside the file: it needs no other, and no network.

    Args:
        folder: A run's folder, ``runs/<name>/<version>``.

    Raises:
        UserError: This is not a run's folder, or it can't be written to.
    """
    named = Path(folder)
    with explained(named):
        folder = named.resolve()
        title = "/".join(folder.parts[-2:])
        if not any((folder / name).exists() for name in ("metrics.csv", "config.yaml", "samples", "predictions")):
            raise UserError(
                f"{named}: no run's folder, it has neither metrics.csv nor config.yaml; give runs/NAME/VERSION"
            )
        curves = _curves(folder / "metrics.csv")
        parts = [*_head(folder, title, curves), *_training(curves), *_samples(folder), *_predictions(folder)]
        body = "\n".join([*parts, *_encodings(folder), *_evaluation(folder, curves), *_config(folder)])
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )
    with replacing(folder / NAME) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return named / NAME


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say in one line which file is damaged.

    Raises:
        UserError: Instead of what a parser says.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, EOFError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: is damaged ({str(error)[:200]}); remove it, or write it again") from error


def _curves(path: Path) -> dict[str, _Curve]:
    """Return the finite values of every metric in the order of the steps they were logged at."""
    curves: dict[str, _Curve] = {}
    if not path.is_file():
        return curves
    with _readable(path), path.open(newline="", encoding="utf-8") as lines:
        rows = csv.reader(lines)
        head = next(rows, [])
        for row in rows:
            cells = dict(zip(head, row, strict=False))  # a line cut off by a kill is shorter
            step = _number(cells.get("step", ""))
            for name, cell in cells.items():
                value = _number(cell)
                if math.isfinite(value) and math.isfinite(step):
                    curve = curves.setdefault(name, _Curve([], []))
                    curve.step.append(step)
                    curve.value.append(value)
    for curve in curves.values():  # a validation of an earlier checkpoint stands at the end of the file
        order = np.argsort(curve.step, kind="stable").tolist()
        curve.step[:], curve.value[:] = [curve.step[i] for i in order], [curve.value[i] for i in order]
    return curves


def _number(cell: str) -> float:
    """Return what a cell says, NaN where that is not a number."""
    if not cell:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _head(folder: Path, title: str, curves: dict[str, _Curve]) -> Iterator[str]:
    done = [f"optimiser steps: {max(curve.step[-1] for curve in curves.values()) + 1:.0f}"] if curves else []
    done += [f"epochs: {max(curves['epoch'].value) + 1:.0f}"] if "epoch" in curves else []
    yield f'<h1>{escape(title)}</h1>\n<p class="sub">{", ".join(done) or "no figures yet"}</p>'
    tiles = []
    if "val/elbo" in curves:
        tiles.append((f"{max(curves['val/elbo'].value):.4g}", "best val/elbo, nats per step"))
    for name, what in (
        ("val/reconstruction", "last val/reconstruction, nats per step"),
        ("val/kl", "last val/kl, nats per step"),
        ("val/active_units", "active latent units"),
        ("val/gap", "last gap to the exact log-likelihood"),
    ):
        if name in curves:
            tiles.append((f"{curves[name].value[-1]:.4g}", what))
    for name in ("test/elbo", "test/iwae", "test/fivo"):
        if name in curves:
            error = curves.get(f"{name}_stderr")
            spread = f" ± {error.value[-1]:.2g}" if error else ""
            tiles.append((f"{curves[name].value[-1]:.4g}{spread}", f"{name}, nats per step"))
    boxes = "".join(f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for value, what in tiles)
    yield f'<div class="tiles">{boxes}</div>'
    if (folder / "checkpoints" / "best.ckpt").is_file():
        place = shlex.quote("/".join([*folder.parts[-3:], "checkpoints/best.ckpt"]))
        yield f"<p><code>lightning test --ckpt_path {escape(place)}</code></p>"


def _training(curves: dict[str, _Curve]) -> Iterator[str]:
    """Draw what has curves."""
    panels: list[tuple[str, list[str]]] = [
        ("ELBO, nats per step", ["train/elbo", "val/elbo", "val/exact_log_likelihood"]),
        ("reconstruction, nats per step", ["train/reconstruction", "val/reconstruction"]),
        ("KL, nats per step", ["train/kl", "val/kl"]),
        ("weight of the KL", ["train/beta"]),
        ("active units", ["val/active_units"]),
        ("gradient norm before clipping", ["train/grad_norm"]),
        ("objective, nats per step", ["val/objective"] if _differ(curves, "val/objective", "val/elbo") else []),
    ]
    panels += [("learning rate", [name for name in curves if name.startswith("lr-")])]
    there = [(title, [name for name in names if name in curves]) for title, names in panels]
    there = [(title, names) for title, names in there if names]
    if not there:
        return
    from matplotlib.figure import Figure

    columns = min(3, len(there))
    rows = -(-len(there) // columns)
    figure = Figure(figsize=(3.9 * columns, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(there) :]:
        axes.set_axis_off()
    for axes, (title, names) in zip(grid.flat, there, strict=False):
        for name in names:
            _plot(axes, curves[name], name)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7, which="both")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if title.startswith("gradient") and min(curves[names[0]].value) > 0:
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend(fontsize=7)
    yield "<h2>Training</h2>"
    yield _figure(_png(figure), "Against optimiser steps.", "curves")


def _differ(curves: dict[str, _Curve], one: str, other: str) -> bool:
    return one in curves and other in curves and curves[one].value != curves[other].value


def _plot(axes: Axes, curve: _Curve, name: str) -> None:
    every = -(-len(curve.step) // MOST_POINTS)
    kind = "train" if name.startswith("train/") else "val" if name.startswith("val/") else ""
    colour = {"train": "tab:grey", "val": "tab:blue"}.get(kind, "tab:green")
    style = "--" if "exact" in name else "-"
    marker = "." if len(curve.step) < 30 else ""
    axes.plot(
        curve.step[::every],
        curve.value[::every],
        style,
        marker=marker,
        linewidth=1,
        label=name,
        color="black" if "exact" in name else colour,
    )


def _samples(folder: Path) -> Iterator[str]:
    """Show the last step's pictures and sounds, and the earlier steps' pictures folded away."""
    steps: dict[int, _Step] = {}
    for path in sorted((folder / "samples").glob("step_*")):
        found = re.fullmatch(r"step_(\d+)(?:_(.+))?", path.stem)
        if found is None:
            continue
        step = steps.setdefault(int(found[1]), _Step({}, {}, []))
        if path.suffix == ".csv":
            step.tables[found[2] or ""] = path
        elif path.suffix == ".png" and not re.fullmatch(r".+_\d+", found[2] or ""):
            step.pictures[found[2] or ""] = path
        elif path.suffix != ".png":
            step.sequences.append(path)
    if not steps:
        return
    *earlier, last = sorted(steps)
    yield f"<h2>What the model makes of it, at step {last}</h2>"
    shown = steps[last]
    for key in [*CAPTIONS, *sorted(shown.pictures.keys() - CAPTIONS.keys())]:
        if key in shown.pictures:
            yield _embedded(shown.pictures[key], CAPTIONS.get(key, escape(key)))
        if not key:
            yield from _media(shown.sequences, f"step_{last:07d}_")
    for table in shown.tables.values():
        yield _table(table)
    pictured = [step for step in earlier if "" in steps[step].pictures]
    for number in pictured[:: -(-len(pictured) // EARLIER) or 1]:
        yield f"<details><summary>At step {number}</summary>{_embedded(steps[number].pictures[''], '')}</details>"


def _predictions(folder: Path) -> Iterator[str]:
    """Show what ``lightning predict`` left."""
    for task in sorted(path for path in (folder / "predictions").glob("*") if path.is_dir()):
        files = sorted(path for path in task.iterdir() if not path.name.startswith("."))
        yield f"<h2>Prediction: {escape(task.name)}</h2>\n<p>{TASKS.get(task.name, '')}</p>"
        for path in files:
            if path.name.startswith("figures") and path.suffix == ".json":
                with _readable(path):
                    table = _judged(json.loads(path.read_text(encoding="utf-8")))
                yield table
        pictures = [path for path in files if path.suffix == ".png"]
        yield from (_embedded(path, "") for path in pictures[:MOST_FILES])
        yield from _media([path for path in files if path.suffix in KINDS and path.suffix != ".png"], r"test_(?:\d+_)?")
        archives = [path for path in files if path.suffix in (".npz", ".csv")]
        names = ", ".join(f"<code>{escape(str(path.relative_to(folder)))}</code>" for path in archives)
        yield f"<p><small>All of it: {names}</small></p>" if names else ""


def _encodings(folder: Path) -> Iterator[str]:
    """Show what ``lightning predict`` left beside ``encodings.npz``, or the first process beside its own."""
    for path in _newest(folder, "encodings", ".png")[:1]:
        yield f"<h2>Prediction: encode</h2>\n{_embedded(path, TASKS['encode'])}"


def _newest(folder: Path, name: str, suffix: str) -> list[Path]:
    """Return the file of that name, or those of several processes, which have their numbers, if they are newer."""
    alone, several = folder / f"{name}{suffix}", sorted(folder.glob(f"{name}_*{suffix}"))
    if not alone.is_file():
        return several
    return several if several and several[0].stat().st_mtime > alone.stat().st_mtime else [alone]


def _judged(figures: dict[str, dict[str, float]]) -> str:
    """Return figures as a table, a line each for what was judged."""
    columns = list(dict.fromkeys(name for line in figures.values() for name in line))
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *columns])
    lines = "".join(
        f"<tr><td>{escape(who)}</td>"
        + "".join(f"<td>{line[name]:.4g}</td>" if name in line else "<td></td>" for name in columns)
        + "</tr>"
        for who, line in figures.items()
    )
    about = f"<p><small>{COVERAGE}</small></p>" if "coverage" in columns else ""
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>{about}'


def _evaluation(folder: Path, curves: dict[str, _Curve]) -> Iterator[str]:
    """Show what a test says, and how sequences and latent dimensions differ."""
    figures = {name: curve.value[-1] for name, curve in curves.items() if name.startswith("test/")}
    if not figures:
        return
    yield "<h2>Test</h2>"
    lines = "".join(f"<tr><td>{escape(name)}</td><td>{value:.6g}</td></tr>" for name, value in figures.items())
    yield from _spread(_newest(folder, "evaluation", ".npz"))
    yield f'<details class="wide"><summary>All figures</summary><table>{lines}</table></details>'


def _spread(paths: list[Path]) -> Iterator[str]:
    parts, kl = [], np.zeros(0)
    for path in paths:
        with _readable(path), opened_archive(path) as archive:
            if "test_elbo" in archive.names:
                parts.append(archive.read("test_elbo") / np.maximum(archive.read("test_lengths"), 1))
                kl = np.sort(archive.read("test_kl_per_dim"))[::-1]  # of all processes
    if not parts:
        return
    from matplotlib.figure import Figure

    per_step = np.concatenate(parts)
    per_step = per_step[np.isfinite(per_step)]
    figure = Figure(figsize=(8.0, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(per_step, bins=30, color="tab:blue")
    left.set_xlabel("ELBO, nats per step", fontsize=8)
    left.set_ylabel("sequences", fontsize=8)
    right.bar(np.arange(len(kl)), kl, color="tab:blue")
    right.set_xlabel("latent dimension, sorted", fontsize=8)
    right.set_ylabel("KL, nats per step", fontsize=8)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
    yield _figure(_png(figure), "How the test sequences' ELBO and the latent dimensions' KL differ.", "evaluation")


def _config(folder: Path) -> Iterator[str]:
    path = folder / "config.yaml"
    if path.is_file():
        text = escape(path.read_text(encoding="utf-8", errors="replace"))
        yield f"<h2>Config</h2><details><summary>config.yaml</summary><pre>{text}</pre></details>"


def _media(paths: Iterable[Path], prefix: str) -> Iterator[str]:
    """Return players and drawings, a line for each row: ``<prefix><row>_<i>.<suffix>``."""
    rows: dict[str, list[Path]] = {}
    for path in paths:
        found = re.fullmatch(rf"{prefix}(\D.*)_\d+", path.stem)
        if path.suffix in KINDS and found:
            rows.setdefault(found[1].replace("_", " "), []).append(path)
    for row, files in sorted(rows.items(), key=lambda item: (item[0] != "real", item[0])):
        by_place: dict[int, list[Path]] = {}
        for path in files:
            by_place.setdefault(int(path.stem.rpartition("_")[2]), []).append(path)
        pieces = []
        for number in sorted(by_place)[:MOST_FILES]:
            inner = "".join(_player(path) for path in sorted(by_place[number], key=lambda path: path.suffix != ".wav"))
            pieces.append(f"<figure>{inner}</figure>")
        more = len(by_place) - MOST_FILES
        note = f"<small>and {more} more in the folder</small>" if more > 0 else ""
        yield f'<h3>{escape(row)}</h3><div class="media">{"".join(pieces)}{note}</div>'


def _player(path: Path) -> str:
    name = escape(path.name)
    if path.stat().st_size > MOST_BYTES:
        return f"<small>{name} is too large to be in here</small>"
    if path.suffix == ".wav":
        return f'<audio controls preload="metadata" title="{name}" src="{_sound(path)}"></audio>'
    if path.suffix == ".mid":
        return f'<a download="{name}" href="{_data(path)}">MIDI</a>'
    return f'<img alt="{name}" title="{name}" src="{_data(path)}">'


def _table(path: Path) -> str:
    with _readable(path), path.open(newline="", encoding="utf-8") as lines:
        longest = csv.field_size_limit(MOST_BYTES)
        try:
            head, *rows = list(csv.reader(lines)) or [[]]
        finally:
            csv.field_size_limit(longest)
    kept = [i for i, name in enumerate(head) if name not in ("picture", "sound")]

    def shown(cell: str) -> str:
        return escape(read_cell(cell)[:MOST_LETTERS])

    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{shown(cells[i])}</{tag}>" for i in kept if i < len(cells)) + "</tr>"

    body = "".join(line(row, "td") for row in rows[:MOST_ROWS])
    about = "The ELBO of what is shown of each sequence, in nats per step."
    return f'<p>{about}</p><div class="wide"><table>{line(head, "th")}{body}</table></div>'


def _embedded(path: Path, caption: str) -> str:
    return _figure(_data(path), caption, path.stem)


def _figure(source: str, caption: str, alt: str) -> str:
    picture = f'<div class="picture"><img alt="{escape(alt)}" src="{source}"></div>'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _png(figure: Figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return _as_data("image/png", content.getvalue())


def _data(path: Path) -> str:
    return _as_data(KINDS[path.suffix], path.read_bytes())


def _sound(path: Path) -> str:
    """Return a sound, as MP3 where it is long and this machine's libsndfile can write that at its rate."""
    if path.stat().st_size > LONG_SOUND:
        import soundfile

        rate = read_header(path).rate
        with opened(path) as sound:
            wave = sound.read(dtype="float32")
        if rate in MP3_RATES and "MP3" in soundfile.available_formats():
            content = io.BytesIO()
            soundfile.write(content, wave, rate, format="MP3")
            return _as_data("audio/mpeg", content.getvalue())
    return _data(path)


def _as_data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
