"""The figures of series: every window in its place, on readable scales, at any depth."""

import pandas as pd
import pytest

from support import made_up
from surgery.page import drawing
from surgery.series import draw


@pytest.mark.parametrize("n_layers", [2, 12, 48])
def test_figures_are_drawn_for_any_depth(n_layers):
    for figure in (
        draw.windows(made_up.series(n_layers)),
        draw.known_networks(made_up.networks(), made_up.series(n_layers)),
    ):
        assert drawing.png(figure).startswith(b"\x89PNG")


def test_the_triangle_shows_each_window_in_its_place_and_nothing_else():
    frame = pd.DataFrame({"start": [0, 1], "stop": [2, 4], "S": [0.25, 0.75], "preference": [0.5, 2.0]})
    axes = draw.windows(frame).axes[0]
    shown = axes.images[0].get_array()
    assert shown[1, 0] == 0.25
    assert shown[3, 1] == 0.75
    assert shown.count() == 2
    assert {text.get_text(): text.get_position() for text in axes.texts} == {".25": (0, 1), ".75": (1, 3)}


def test_numbers_are_printed_into_the_triangle_only_where_they_fit():
    assert len(draw.windows(made_up.series(16)).axes[0].texts) == 16 * 15 / 2
    assert not draw.windows(made_up.series(17)).axes[0].texts


def test_the_ratio_is_shown_around_one_on_a_logarithmic_scale():
    norm = draw.windows(made_up.series(preference=8.0)).axes[1].images[0].norm
    assert norm(1.0) == pytest.approx(0.5)
    assert norm(8.0) == pytest.approx(1.0)
    assert norm(1 / 8) == pytest.approx(0.0)


def test_the_same_figure_gives_the_same_bytes():
    once, again = (drawing.png(draw.windows(made_up.series())) for _ in range(2))
    assert once == again
