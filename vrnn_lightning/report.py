"""A run as one HTML page: figures, curves, pictures and sounds, all of it inside the file."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vrnn_lightning.callbacks.pictures import make_grid
from vrnn_lightning.data.archives import opened_archive
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained, read_cell, undamaged, write_files

__all__ = ["NAME", "write_report"]

NAME = "report.html"
"""Name of the page in the run's folder; its template lies beside this file."""
KINDS = {".png": "image/png", ".svg": "image/svg+xml", ".wav": "audio/wav", ".mid": "audio/midi"}
MOST_FILES, MOST_BYTES = 48, 16 * 2**20  # of a group of pictures or sounds, and of one of them
MOST_POINTS = 1000  # of a curve
EARLIER = 8  # pictures of earlier steps
MOST_ROWS, MOST_LETTERS = 40, 200  # of a table, and of a cell


class _File(NamedTuple):
    """A file and its content as a data URL, which is empty if the file is too large."""

    path: Path
    source: str


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` of what is in a run's folder, and return its path.

    It shows the best and last figures, the curves of the ELBO and its parts, the KL's weight and active units, the
    pictures and sounds in ``samples/`` and ``predictions/``, the evaluation of a test and the config. Pictures and
    sounds are inside the file: it needs no other, and no network.

    Args:
        folder: A run's folder, ``runs/<name>/<version>``.

    Raises:
        UserError: This is not a run's folder, a file in it is damaged, or it can't be written to.
    """
    import jinja2

    named = Path(folder)
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    template = jinja2.Template(
        text, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    with explained(named):
        folder = named.resolve()
        if not any((folder / name).exists() for name in ("metrics.csv", "config.yaml", "samples", "predictions")):
            raise UserError(
                f"{named}: is not a run's folder (no metrics.csv, no config.yaml). Fix: give runs/NAME/VERSION"
            )
        curves = _read_curves(folder / "metrics.csv")
        best, config = folder / "checkpoints" / "best.ckpt", folder / "config.yaml"
        test = [[name, f"{values[-1]:.6g}"] for name, (_, values) in curves.items() if name.startswith("test/")]
        page = template.render(
            title="/".join(folder.parts[-2:]),
            curves=curves,
            command=f"lightning test --ckpt_path {shlex.quote('/'.join(best.parts[-5:]))}" if best.is_file() else "",
            training=_draw_training(curves),
            samples=_samples(folder / "samples"),
            predictions=[_prediction(task) for task in sorted((folder / "predictions").glob("*")) if task.is_dir()],
            encodings=next(map(_embed, _newest(folder, "encodings", ".png")), None),
            test=test,
            evaluation=_draw_evaluation(_newest(folder, "evaluation", ".npz")) if test else None,
            config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        )
    write_files({folder / NAME: page.encode("utf-8", "backslashreplace")})
    return named / NAME


def _undamaged(path: Path) -> Any:
    return undamaged(f"{path}: is damaged", "remove it, or write it again")


def _read_curves(path: Path) -> dict[str, np.ndarray]:
    """Return steps and finite values of every metric, shape (2, values), in the order of the steps."""
    if not path.is_file():
        return {}
    with _undamaged(path), path.open(newline="", encoding="utf-8") as lines:
        reader = csv.reader(lines)
        names = next(reader, [])
        rows = [dict(zip(names, map(_number, row), strict=False)) for row in reader]  # one cut off by a kill is shorter
    rows = [row for row in rows if math.isfinite(row.get("step", math.nan))]
    rows.sort(key=lambda row: row["step"])  # the test of an earlier checkpoint stands at the file's end
    points = {
        name: [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))] for name in names
    }
    return {name: np.array(values).T for name, values in points.items() if values}


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _draw_training(curves: dict[str, np.ndarray]) -> _File | None:
    is_elbo = np.array_equal(curves.get("val/objective", ()), curves.get("val/elbo", ()))
    panels = {
        "ELBO, nats per step": ["train/elbo", "val/elbo", "val/exact_log_likelihood"],
        "reconstruction, nats per step": ["train/reconstruction", "val/reconstruction"],
        "KL, nats per step": ["train/kl", "val/kl"],
        "weight of the KL": ["train/beta"],
        "active units": ["val/active_units"],
        "gradient norm before clipping": ["train/grad_norm"],
        "objective, nats per step": [] if is_elbo else ["val/objective"],
        "learning rate": [name for name in curves if name.startswith("lr-")],
    }
    panels = {title: [name for name in names if name in curves] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = make_grid(rows, columns, 3.9 * columns, 2.5 * rows, "auto")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, names) in zip(grid.flat, panels.items(), strict=False):
        for name in names:
            _plot(axes, curves[name], name)
        axes.set_title(title, fontsize=9)
        axes.locator_params(axis="x", integer=True)
        if title.startswith("gradient") and curves[names[0]][1].min() > 0:
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend(fontsize=7)
    return _rendered("curves", figure)


def _plot(axes: Axes, curve: np.ndarray, name: str) -> None:
    is_exact, count = "exact" in name, curve.shape[1]
    colors = {"train": "tab:grey", "val": "tab:blue"}
    axes.plot(
        *curve[:, :: math.ceil(count / MOST_POINTS)],
        "--" if is_exact else "-",
        marker="." if count < 30 else "",
        linewidth=1,
        label=name,
        color="black" if is_exact else colors.get(name.partition("/")[0], "tab:green"),
    )


def _samples(folder: Path) -> dict[str, Any] | None:
    """Return the last step's pictures, sounds and tables, and the earlier steps' pictures."""
    steps: dict[int, dict[Path, str]] = {}
    for path in sorted(folder.glob("step_*")):
        match = re.fullmatch(r"step_(\d+)(?:_(.+))?", path.stem)
        if match:
            steps.setdefault(int(match[1]), {})[path] = match[2] or ""
    if not steps:
        return None
    *earlier, last = sorted(steps)
    pictures = {key: path for path, key in steps[last].items() if path.suffix == ".png"}
    pictured = [path for step in earlier for path in steps[step] if not steps[step][path] and path.suffix == ".png"]
    every = math.ceil(len(pictured) / EARLIER) or 1
    return {
        "step": last,
        "pictures": {key: _embed(path) for key, path in pictures.items() if not re.fullmatch(r".+_\d+", key)},
        "media": _media([path for path in steps[last] if path.suffix != ".png"], f"step_{last:07d}_"),
        "tables": [_read_table(path) for path in steps[last] if path.suffix == ".csv"],
        "earlier": [_embed(path) for path in pictured[::every]],
    }


def _prediction(folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = [path for path in files if path.suffix == ".png"]
    return {
        "name": folder.name,
        "tables": [_read_figures(path) for path in files if path.name.startswith("figures") and path.suffix == ".json"],
        "pictures": [_embed(path) for path in pictures[:MOST_FILES]],
        "media": _media([path for path in files if path.suffix != ".png"], r"test_(?:\d+_)?"),
        "archives": [path.relative_to(folder.parents[1]) for path in files if path.suffix in (".npz", ".csv")],
    }


def _newest(folder: Path, name: str, suffix: str) -> list[Path]:
    """Return the file of that name, or those of several processes, which have their numbers, if they are newer."""
    alone, several = folder / f"{name}{suffix}", sorted(folder.glob(f"{name}_*{suffix}"))
    if not alone.is_file():
        return several
    return several if several and several[0].stat().st_mtime > alone.stat().st_mtime else [alone]


def _read_figures(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the figures of a prediction as a table with a row for each predictor."""
    with _undamaged(path):
        figures: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
        columns = list(dict.fromkeys(name for row in figures.values() for name in row))
        rows = [
            [predictor, *(f"{row[name]:.4g}" if name in row else "" for name in columns)]
            for predictor, row in figures.items()
        ]
    return (["", *columns], rows)


def _read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the first rows of a csv file without its columns of file names."""
    with _undamaged(path), path.open(newline="", encoding="utf-8") as lines:
        longest = csv.field_size_limit(MOST_BYTES)
        try:
            head, *rows = list(csv.reader(lines)) or [[]]
        finally:
            csv.field_size_limit(longest)
    kept = [i for i, name in enumerate(head) if name not in ("picture", "sound")]
    head, *rows = [
        [read_cell(row[i])[:MOST_LETTERS] for i in kept if i < len(row)] for row in (head, *rows[:MOST_ROWS])
    ]
    return (head, rows)


def _draw_evaluation(paths: list[Path]) -> _File | None:
    parts, kl = [], np.zeros(0)
    for path in paths:
        with _undamaged(path), opened_archive(path) as archive:
            if "test_elbo" in archive.names:
                parts.append(archive.read("test_elbo") / np.maximum(archive.read("test_lengths"), 1))
                kl = np.sort(archive.read("test_kl_per_dim"))[::-1]  # of all processes
    if not parts:
        return None
    per_step = np.concatenate(parts)
    figure, ((left, right),) = make_grid(1, 2, 8.0, 2.4, "auto")
    left.hist(per_step[np.isfinite(per_step)], bins=30, color="tab:blue")
    left.set(xlabel="ELBO, nats per step", ylabel="sequences")
    right.bar(np.arange(len(kl)), kl, color="tab:blue")
    right.set(xlabel="latent dimension, sorted", ylabel="KL, nats per step")
    return _rendered("evaluation", figure)


def _media(paths: list[Path], prefix: str) -> dict[str, tuple[list[list[_File]], int]]:
    """Return the sounds and drawings ``<prefix><row>_<number>.<suffix>`` of each row, and how many sequences more."""
    rows: dict[str, dict[int, list[Path]]] = {}
    for path in sorted(paths, key=lambda path: path.suffix != ".wav"):  # a sequence's sound comes first
        match = re.fullmatch(rf"{prefix}(\D.*)_(\d+)", path.stem)
        if path.suffix in KINDS and match:
            rows.setdefault(match[1].replace("_", " "), {}).setdefault(int(match[2]), []).append(path)
    media = {}
    for name, sequences in sorted(rows.items(), key=lambda row: (row[0] != "real", row[0])):
        shown = [[_embed(path, MOST_BYTES) for path in sequences[i]] for i in sorted(sequences)[:MOST_FILES]]
        media[name] = shown, len(sequences) - len(shown)
    return media


def _embed(path: Path, limit: float = math.inf) -> _File:
    return _File(path, "" if path.stat().st_size > limit else _data_url(KINDS[path.suffix], path.read_bytes()))


def _rendered(name: str, figure: Figure) -> _File:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return _File(Path(name), _data_url("image/png", content.getvalue()))


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
