"""Pictures of sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vrnn_lightning.callbacks.pictures import draw_rows


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


def test_series_share_the_limits_of_the_first_row():
    figure = draw_rows({"real": [torch.zeros(5, 1)], "sampled": [torch.full((5, 1), 9.0)]}, "series")
    np.testing.assert_array_equal(figure.axes[0].get_ylim(), figure.axes[1].get_ylim())
