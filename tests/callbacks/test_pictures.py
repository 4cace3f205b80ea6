"""Pictures of sequences."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib import image
from PIL import Image

from vrnn_lightning.callbacks.pictures import Fan, draw_fans, draw_heat, draw_rows, draw_scores, on_paper, save_strokes
from vrnn_lightning.errors import UserError


def lines(*rows: tuple[float, float, float]) -> list[list[list[float]]]:
    """Return the points of each line that a sequence of strokes is drawn as."""
    axes = draw_rows({"real": [torch.tensor(rows)]}, "strokes").axes[0]
    return [line.get_xydata().round(6).tolist() for line in axes.lines]


def test_the_pen_leaves_the_paper_after_a_lift():
    drawn = lines((1, 1, 0), (1, 0, 1), (0, 5, 0), (2, 0, 1))
    assert drawn == [[[1, 1], [2, 1]], [[2, 6], [4, 6]]]


def test_a_lift_that_is_a_probability_is_rounded():
    assert lines((1, 1, 0.2), (1, 0, 0.7), (0, 5, 0.4)) == lines((1, 1, 0), (1, 0, 1), (0, 5, 0))


@pytest.mark.parametrize("lift", [0.0, 1.0])
def test_a_single_point_is_a_dot(lift):
    figure = draw_rows({"real": [torch.tensor([[3.0, 4.0, lift]])]}, "strokes")
    (line,) = figure.axes[0].lines
    assert line.get_marker() == "."
    assert line.get_xydata().tolist() == [[3, 4]]


def test_y_grows_downward_and_all_ink_is_inside(tmp_path, caplog):
    """Each drawing has limits of its own, and x and y one scale."""
    torch.manual_seed(0)
    strokes = [torch.cat([scale * torch.randn(30, 2), torch.rand(30, 1).round()], 1) for scale in (1.0, 1000.0)]
    figure = draw_rows({"real": strokes[:1], "sampled": strokes[1:]}, "strokes")
    figure.savefig(tmp_path / "strokes.png")
    for axes, sequence in zip(figure.axes, strokes, strict=True):
        bottom, top = axes.get_ylim()
        left, right = axes.get_xlim()
        ink = sequence[:, :2].cumsum(0).numpy()
        assert bottom > ink[:, 1].max() > ink[:, 1].min() > top
        assert left < ink[:, 0].min() < ink[:, 0].max() < right
        box = axes.get_window_extent()
        assert (right - left) / box.width == pytest.approx((bottom - top) / box.height)
    assert not caplog.records


def test_a_heat_map_holds_the_values():
    values = [torch.rand(5, 3), torch.rand(4, 3)]
    figure = draw_heat(values, ["z2", "z0", "z1"], "KL", above=[torch.randn(5, 2), torch.randn(4, 2)])
    maps = [axes.images[0] for axes in figure.axes if axes.images][:2]
    for drawn, x in zip(maps, values, strict=True):
        np.testing.assert_allclose(drawn.get_array(), x.T)
        assert drawn.get_clim() == pytest.approx((0, torch.cat(values).max().item()))
    assert [label.get_text() for label in figure.axes[2].get_yticklabels()] == ["z2", "z0", "z1"]
    signed = draw_heat([torch.tensor([[-2.0], [1.0]])], ["z0"], "mean").axes[0].images[0]
    assert signed.get_clim() == (-2, 2)


def test_a_fan_is_made_of_the_draws_quantiles():
    draws = torch.arange(101.0)[:, None, None].expand(101, 2, 1)
    figure = draw_fans([Fan(torch.zeros(3, 1), draws, torch.tensor([[7.0], [float("nan")]]), 10, 13)], ["load"])
    (axes,) = figure.axes
    shades = [
        (area.get_paths()[0].vertices[:, 1].min(), area.get_paths()[0].vertices[:, 1].max())
        for area in axes.collections
    ]
    assert shades == [(5, 95), (25, 75)]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["median"] == [[13, 50], [14, 50]]
    assert lines["given"] == [[10, 0], [11, 0], [12, 0]]
    assert lines["truth"][0] == [13, 7]
    assert axes.get_ylabel() == "load"


def test_a_pen_draws_point_after_point(tmp_path):
    """What one frame of a gif shows stays in the next, and the last is the whole drawing."""
    t = torch.arange(30) / 4
    strokes = torch.stack([t.cos(), t.sin(), (t % 2 == 1).float()], 1)
    save_strokes(strokes, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 30
        assert gif.info["loop"] == 0
        ink = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            ink.append(np.asarray(gif.convert("L")) < 128)
    areas = [int(frame.sum()) for frame in ink]
    assert areas == sorted(areas)
    assert 0 < areas[0] < areas[10] < areas[-1]
    assert all((before & ~after).sum() <= 5 for before, after in pairwise(ink))


def test_series_share_the_limits_of_the_first_row():
    figure = draw_rows({"real": [torch.zeros(5, 1)], "sampled": [torch.full((5, 1), 9.0)]}, "series")
    np.testing.assert_array_equal(figure.axes[0].get_ylim(), figure.axes[1].get_ylim())


def test_limits_show_what_differs_and_are_not_squashed_by_what_explodes():
    t = torch.linspace(0, 1, 5)[:, None]
    figure = draw_rows({"real": [t], "a": [1.4 * t], "b": [1e6 * t]}, "series")
    low, high = figure.axes[0].get_ylim()
    assert low <= 0
    assert 1.4 < high < 2
    constant = draw_rows({"real": [0 * t], "a": [9 + t]}, "series").axes[0].get_ylim()
    assert constant[1] > 10, "else nothing would be seen of the second row"


@pytest.mark.parametrize("modality", ["audio", "series", "roll"])
def test_rows_of_one_column_have_one_axis_of_time(modality):
    long, short = torch.rand(30, 16), torch.rand(10, 16)
    figure = draw_rows({"real": [short], "path": [long]}, modality, 100)
    alone = draw_rows({"path": [long]}, modality, 100)
    for axes in figure.axes:
        assert axes.get_xlim() == pytest.approx(alone.axes[0].get_xlim())


def test_loudness_and_greys_compare():
    """A quiet sound has a darker spectrogram than a loud one, and a faint picture is faint."""
    noise = torch.randn(20, 50)
    loud, quiet = (axes.images[0] for axes in draw_rows({"a": [noise], "b": [noise / 100]}, "audio", 100).axes[1::2])
    assert loud.get_clim() == quiet.get_clim()
    black, faint = draw_rows({"a": [torch.eye(4)], "b": [torch.eye(4) / 10]}, "image").axes
    assert black.images[0].get_clim() == faint.images[0].get_clim() == (0, 1)
    one, other = draw_rows({"z": [noise, 9 * noise]}, "series", shared=True).axes
    assert one.images[0].get_clim() == other.images[0].get_clim()


def test_what_is_missing_is_neither_white_nor_a_reason_for_lines():
    x = torch.rand(40, 13)
    x[torch.arange(40), torch.arange(40) % 13] = float("nan")  # every step misses something
    x[:, 5] = float("nan")
    (axes,) = draw_rows({"real": [x]}, "series").axes
    drawn = axes.images[0].get_array()
    assert (x.isnan().numpy() == np.ma.getmaskarray(drawn).T).all()
    np.testing.assert_allclose(np.ma.compressed(drawn[0]).max(), 1)
    assert axes.get_facecolor() != (1, 1, 1, 1)


def test_88_features_are_no_piano():
    (axes,) = draw_rows({"real": [torch.randn(9, 88)]}, "series").axes
    assert axes.get_ylim() == (-0.5, 87.5)


ODD = "$\\frac{$ and\n$x_{$"


def test_names_are_written_as_they_are(tmp_path):
    """A dollar begins no formula, and a long name keeps its end."""
    series = draw_rows({"real": [torch.randn(9, 2)]}, "series", None, [ODD], features=[ODD, "load"])
    assert [text.get_text() for text in series.axes[0].get_legend().get_texts()] == [" ".join(ODD.split()), "load"]
    fan = Fan(torch.zeros(3, 1), torch.randn(5, 4, 1), torch.zeros(4, 1), 0, 3)
    heat = draw_heat([torch.rand(3, 1)], ["z0"], "KL", titles=["folder/" * 20 + "a.wav"])
    scores = draw_scores([torch.randn(9, 1)], [torch.randn(9)], titles=[ODD])
    for figure in (series, draw_fans([fan], [ODD], [ODD]), heat, scores):
        figure.savefig(tmp_path / "a.png")
    assert series.axes[0].get_title() == "$\\frac{$ and $x_{$"
    assert heat.axes[0].get_title().endswith("folder/a.wav")
    assert len(heat.axes[0].get_title()) < 50


def test_the_bands_of_a_fan_and_their_legend_have_their_own_colours():
    fan = Fan(torch.zeros(3, 1), torch.randn(50, 4, 1), torch.zeros(4, 1), 0, 3)
    handles, labels = draw_fans([fan]).axes[0].get_legend_handles_labels()
    colours = [tuple(handle.get_facecolor()[0]) for handle in handles[:2]]
    assert labels[:2] == ["90 %", "50 %"]
    assert colours[0] != colours[1]


DRAWING = torch.tensor([[1.0, 1, 0], [1, 0, 1], [0, 5, 1], [2, 0, 0], [0, -2.5, 1]])
"""A line, a dot and another line."""


@pytest.mark.parametrize("features", [2, 13])
def test_binary_or_wide_series_are_pixels(features):
    real = torch.eye(features).repeat(2, 1)
    scale = 1 if features == 2 else 7
    figure = draw_rows({"real": [scale * real], "sampled": [scale * real / 2]}, "series")
    images = [axes.images[0].get_array() for axes in figure.axes]
    torch.testing.assert_close(torch.tensor(images[0]), real.T.double())
    torch.testing.assert_close(torch.tensor(images[1]), real.T.double() / 2)
    assert not any(axes.lines for axes in figure.axes)


@pytest.mark.parametrize("strokes", [torch.zeros(0, 3), torch.zeros(1, 3), torch.full((3, 3), 1e-9), DRAWING * 1e6])
def test_any_drawing_has_a_size(strokes, tmp_path):
    for name in ("a.svg", "a.png", "a.gif"):
        save_strokes(strokes, tmp_path / name)
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert all(float(number) > 0 for number in root.get("viewBox").split()[2:])


def test_a_point_that_the_pen_stays_at_is_a_dot():
    figure = draw_rows({"real": [torch.tensor([[3.0, 4, 0], [0, 0, 1]])]}, "strokes")
    assert figure.axes[0].lines[0].get_marker() == "."


def test_a_pen_that_starts_on_the_paper_draws_its_first_row():
    assert lines(*on_paper(DRAWING).tolist())[0] == [[0, 0], [1, 1], [2, 1]]


def test_files_of_strokes(tmp_path):
    save_strokes(DRAWING, tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")
    save_strokes(DRAWING, str(tmp_path / "a.png"))
    picture = image.imread(tmp_path / "a.png")
    dark = picture[..., :3].max(2) < 0.5
    rows = np.flatnonzero(dark.any(1))
    top, bottom = dark[rows[0]], dark[rows[-1]]
    assert np.flatnonzero(top).mean() < np.flatnonzero(bottom).mean()  # the first line is at the upper left


@pytest.mark.parametrize(
    ("strokes", "name", "message"),
    [
        (DRAWING, "a.jpg", r"a\.jpg: strokes are drawn as \.svg, \.png or \.gif"),
        (DRAWING[:, :2], "a.svg", r"strokes of shape \(5, 2\) can't be drawn, expected \(steps, 3\)"),
        (DRAWING * float("nan"), "a.svg", "strokes with NaN or infinite values can't be drawn"),
        (DRAWING * float("inf"), "a.png", "strokes with NaN or infinite values can't be drawn"),
    ],
)
def test_what_is_no_drawing(strokes, name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        save_strokes(strokes, tmp_path / name)
    assert not (tmp_path / name).exists()
