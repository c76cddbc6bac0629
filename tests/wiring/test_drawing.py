"""Drawings of wirings: every step has its box, every box its words, and a huge wiring can still be read."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given

from support.random_wirings import wirings
from surgery.wiring import Wiring, drawing, notation
from surgery.wiring.steps import DEEPEST, LONGEST, executions

SVG = "{http://www.w3.org/2000/svg}"


def texts(wiring: Wiring, kind: str) -> list[str]:
    """The words of all marks of a kind, in the order in which they are drawn."""
    root = ElementTree.fromstring(str(wiring.draw()))
    return [mark.find(f"{SVG}text").text for mark in root.iter(f"{SVG}g") if mark.get("class") == kind]


def boxes(text: str, n_layers: int) -> list[str]:
    return texts(Wiring.parse(text, n_layers), "layer")


@given(wirings)
def test_every_step_has_a_box_with_its_name_and_the_xml_is_well_formed(wiring: Wiring) -> None:
    steps = list(executions(wiring.steps))
    whole = len(steps) <= drawing.FEW and re.search(r"\{[^}]*(\|[^}]*){12}", str(wiring)) is None
    shown = texts(wiring, "layer")
    assert len(shown) == wiring.draw().n_boxes
    if whole and not texts(wiring, "more"):
        assert shown == [f"{step.index}.{step.part}" if step.part else f"{step.index}" for step in steps]


def test_layers_that_never_run_are_dashed_where_they_would_stand() -> None:
    wiring = Wiring.parse(":3 6:9", 12)
    root = ElementTree.fromstring(str(wiring.draw()))
    kinds = [(mark.get("class"), mark.find(f"{SVG}text").text) for mark in root.iter(f"{SVG}g")]
    layers = [("layer", str(layer)) for layer in range(9)]
    assert kinds == [*layers[:3], ("absent", "3–5"), *layers[6:], ("absent", "9–11")]


def test_the_second_pass_is_darker_than_the_first() -> None:
    root = ElementTree.fromstring(str(Wiring.parse(":2 (0:2)*2 2", 3).draw()))
    shades = [float(mark.find(f"{SVG}rect").get("fill-opacity")) for mark in root.iter(f"{SVG}g")]
    assert shades[0] == shades[1] == shades[-1] < shades[2] == shades[3] < shades[4] == shades[5]
    assert [mark.find(f"{SVG}title").text for mark in root.iter(f"{SVG}g")][2] == "layer 0, run 2"


def test_branches_stand_above_each_other_and_say_how_they_are_joined() -> None:
    root = ElementTree.fromstring(str(Wiring.parse("0 {1|2} mean{3|4}", 5).draw()))
    places = [(float(r.get("x")), float(r.get("y"))) for g in root.iter(f"{SVG}g") for r in g.iter(f"{SVG}rect")]
    assert places[1][0] == places[2][0]
    assert places[1][1] < places[0][1] < places[2][1]
    assert len([circle for circle in root.iter(f"{SVG}circle") if circle.get("class") == "joint"]) == 1
    assert texts(Wiring.parse("0 {1|2} mean{3|4}", 5), "joint") == ["mean"]


def test_a_factor_is_written_on_its_frame() -> None:
    assert texts(Wiring.parse(":6 0.5*(4:6) 6:", 8), "factor") == ["× 0.5"]


def test_halves_are_low_boxes() -> None:
    root = ElementTree.fromstring(str(Wiring.parse("0 1.attn 1.mlp", 2).draw()))
    heights = [float(mark.find(f"{SVG}rect").get("height")) for mark in root.iter(f"{SVG}g")]
    assert heights[1] == heights[2] < heights[0]


def test_beyond_sixty_boxes_runs_of_layers_become_one_box() -> None:
    assert len(boxes(":52 45:", 53)) == 60
    assert boxes(":52 45:", 80) == ["0–51", "45–51", "52–79"]
    assert boxes(":40 1:3 10 40:", 80) == ["0–39", "1–2", "10", "40–79"]


@pytest.mark.parametrize(
    "wiring",
    [
        Wiring.of(LONGEST),
        Wiring.of(2_000).shuffle(seed=0),
        Wiring.of(5_000).parallel(0, 5_000),
        Wiring(2, notation.read("0.5*(0 " * DEEPEST + "1" + ")" * DEEPEST, 2)),
        Wiring(4, notation.read("{0|1 " * (DEEPEST - 1) + "{2|3}" + "}" * (DEEPEST - 1), 4)),
        Wiring.parse(" ".join(map(str, range(0, 5_000, 2))), 5_000),
    ],
    ids=["long", "shuffled", "many branches", "nested frames", "nested groups", "every other layer"],
)
def test_a_huge_wiring_is_short_and_says_what_is_not_drawn(wiring: Wiring) -> None:
    drawn = wiring.draw()
    ElementTree.fromstring(str(drawn))
    assert drawn.n_boxes <= drawing.MOST
    assert len(str(drawn)) < 250_000
    if wiring.depth > drawing.MOST and not wiring.is_identity:
        assert texts(wiring, "more")


def test_a_notebook_shows_it() -> None:
    drawn = Wiring.of(2).draw()
    assert drawn._repr_svg_() == str(drawn)
    assert 'aria-label="wiring :"' in str(drawn)
    assert "currentColor" in str(drawn)
    assert "#" not in str(drawn)  # no colour that only a light page can show
