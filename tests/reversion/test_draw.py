"""The figure of reversion by depth."""

import pytest

from support import made_up
from surgery.page import drawing
from surgery.reversion import draw


@pytest.mark.parametrize("n_layers", [2, 12, 48])
def test_the_figure_is_drawn_for_any_depth(n_layers):
    assert drawing.png(draw.by_layer(made_up.reversion(n_layers))).startswith(b"\x89PNG")


def test_layer_0_is_left_out_of_the_depth_figure():
    above, below = draw.by_layer(made_up.reversion(6)).axes
    assert list(above.lines[-2].get_xdata()) == [1, 2, 3, 4, 5]
    assert "layer 0 is left out" in below.get_xlabel()


def test_the_nulls_are_in_the_legend():
    words = [entry.get_text() for entry in draw.by_layer(made_up.reversion()).axes[0].get_legend().get_texts()]
    assert sum(word.startswith("null: ") for word in words) == 4
    assert sum(word.startswith("by intervention: ") for word in words) == 3
