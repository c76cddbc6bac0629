"""How numbers and layers are written."""

from surgery.page import phrases


def test_runs_of_layers():
    assert phrases.layers([3, 1, 2, 7, 9, 10]) == "layers 1 to 3, 7, 9 to 10"
    assert phrases.layers([4]) == "layer 4"
