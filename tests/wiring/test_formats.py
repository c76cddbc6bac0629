"""The forms of other tools: by example, there and back, and what they cannot say."""

import pytest
import yaml
from hypothesis import given

from support.random_wirings import serial
from surgery.wiring.families import every_repeat
from surgery.wiring.value import Wiring, WiringError

MODEL = "a model of 12 layers, they are 0 to 11"
RYS = [
    ((2, 7), 9, [*range(7), *range(2, 7), 7, 8], [(2, 7)]),
    ([2, 7], 9, [*range(7), *range(2, 7), 7, 8], [(2, 7)]),
    ("2,7", 9, [*range(7), *range(2, 7), 7, 8], [(2, 7)]),
    ("3,6;4,6", 8, [0, 1, 2, 3, 4, 5, 3, 4, 5, 4, 5, 6, 7], [(3, 6), (4, 6)]),
    ([(3, 6), [4, 6]], 8, [0, 1, 2, 3, 4, 5, 3, 4, 5, 4, 5, 6, 7], [(3, 6), (4, 6)]),
    (" 1,2 ; 4, 6", 8, [0, 1, 1, 2, 3, 4, 5, 4, 5, 6, 7], [(1, 2), (4, 6)]),
    ((0, 0), 4, [0, 1, 2, 3], [(0, 0)]),
    ([], 4, [0, 1, 2, 3], [(0, 0)]),
    ((3, 1), 4, [0, 3], [(3, 1)]),
    ([(2, 0), (4, 3)], 4, [2], [(2, 0), (4, 3)]),
]


@pytest.mark.parametrize(("spec", "n_layers", "indices", "blocks"), RYS)
def test_rys_by_example(spec, n_layers: int, indices: list[int], blocks: list[tuple[int, int]]) -> None:
    w = Wiring.from_rys(spec, n_layers)
    assert list(w.layers) == indices
    assert w.to_rys() == blocks


@pytest.mark.parametrize(("n_layers", "count"), [(80, 3241), (36, 667), (12, 79)])
def test_rys_configurations_are_the_family_of_repeats_and_the_model(n_layers: int, count: int) -> None:
    pairs = [(0, 0), *((i, j) for j in range(1, n_layers + 1) for i in range(j))]
    assert len(pairs) == count
    if n_layers == 12:
        assert {Wiring.from_rys(pair, 12) for pair in pairs} == {Wiring.of(12), *every_repeat(12)}


PATHS = [
    ("0..14,12,13,14,15..39", 40, [*range(15), *range(12, 40)], "0..14,12..39"),
    ("..15,11..", 20, [*range(16), *range(11, 20)], "0..15,11..19"),
    ("..", 4, [0, 1, 2, 3], "0..3"),
    (" 3..1 , 2,2 ", 4, [3, 2, 1, 2, 2], "3..1,2,2"),
    ("5..2,7", 8, [5, 4, 3, 2, 7], "5..2,7"),
    ("0..0", 4, [0], "0"),
]


@pytest.mark.parametrize(("text", "n_layers", "indices", "written"), PATHS)
def test_paths_by_example(text: str, n_layers: int, indices: list[int], written: str) -> None:
    w = Wiring.from_paths(text, n_layers)
    assert list(w.layers) == indices
    assert w.to_paths() == written


PATH_ERRORS = [
    ("0..3,2:5", 5, "'2:5' is no layer or inclusive span such as 7, 0..3 or 5.."),
    ("0..3,,5", 5, "'' is no layer or inclusive span such as 7, 0..3 or 5.."),
    ("", 0, "'' is no layer or inclusive span such as 7, 0..3 or 5.."),
    ("0..3, -1", 5, "'-1' is no layer or inclusive span such as 7, 0..3 or 5.."),
    ("0..3, 2..12", 9, f"there is no layer 12 in {MODEL}"),
    ("0..3,99", 5, f"there is no layer 99 in {MODEL}"),
]


@pytest.mark.parametrize(("text", "place", "sentence"), PATH_ERRORS)
def test_a_bad_path_is_shown(text: str, place: int, sentence: str) -> None:
    with pytest.raises(WiringError) as caught:
        Wiring.from_paths(text, 12)
    example = 'for example, "..5,4.." runs layers 4:6 of 12 twice'
    assert str(caught.value).split("\n") == [sentence, f"    {text}", "    " + " " * place + "^", example]


@pytest.mark.parametrize("spec", ["3;4", "3,4,5", "a,b", "", "3,6;", [(1, 2, 3)], [1], [()]])
def test_a_bad_rys_spec_is_refused(spec) -> None:
    with pytest.raises(WiringError, match="RYS blocks are written"):
        Wiring.from_rys(spec, 8)


def test_rys_blocks_outside_the_model_or_out_of_reach_are_refused() -> None:
    for pair in [(3, 9), (9, 3), (-1, 3), (1, -3)]:
        with pytest.raises(WiringError, match="leaves a model of 8 layers"):
            Wiring.from_rys(pair, 8)
    with pytest.raises(WiringError, match=r"\(1, 2\) is never reached, the walk is already at layer 4"):
        Wiring.from_rys("4,6;1,2", 8)


MERGEKIT = """\
slices:
- sources:
  - model: some/model
    layer_range: [0, 6]
- sources:
  - model: some/model
    layer_range: [4, 12]
merge_method: passthrough
"""


def test_mergekit_by_example() -> None:
    w = Wiring.from_mergekit(MERGEKIT + "dtype: bfloat16\n", 12)
    assert str(w) == ":6 4:"
    assert w.to_mergekit("some/model") == MERGEKIT
    backwards = yaml.safe_load(Wiring.parse("3:0:-1", 4).to_mergekit("m"))
    assert [piece["sources"][0]["layer_range"] for piece in backwards["slices"]] == [[3, 4], [2, 3], [1, 2]]


MERGEKIT_ERRORS = [
    (("passthrough", "linear"), "only a mergekit configuration with merge_method: passthrough"),
    (("merge_method: passthrough", ""), "only a mergekit configuration with merge_method: passthrough"),
    (("merge_method", "parameters: {scale: 2}\nmerge_method"), "only a mergekit configuration"),
    ((MERGEKIT, "3"), "only a mergekit configuration"),
    ((MERGEKIT, ""), "only a mergekit configuration"),
    ((MERGEKIT, "slices: []\nmerge_method: passthrough"), "only a mergekit configuration"),
    ((MERGEKIT, "slices: ["), "this is not YAML: while parsing"),
    (("[4, 12]", "[4, 13]"), r"slice 2 has no layers \[4, 13\] in a model of 12"),
    (("[4, 12]", "[4, 4]"), r"slice 2 has no layers \[4, 4\] in a model of 12: half-open, upwards"),
    (("[4, 12]", "[4]"), "slice 2 should have one source"),
    (("[4, 12]", "[4, 12]\n    parameters: {scale: 0.5}"), "slice 2 should have one source"),
    (("[4, 12]", "[4, 12]\n  parameters: {scale: 0.5}"), "slice 2 should have one source"),
    (("[4, 12]", "[4, 12]\n  - {model: some/model, layer_range: [4, 12]}"), "slice 2 should have one source"),
    (("some/model\n    layer_range: [4", "other\n    layer_range: [4"), "slice 2 is from another model, other"),
]


@pytest.mark.parametrize(("change", "sentence"), MERGEKIT_ERRORS)
def test_a_mergekit_configuration_that_is_no_wiring_is_refused(change: tuple[str, str], sentence: str) -> None:
    assert change[0] in MERGEKIT
    with pytest.raises(WiringError, match=sentence):
        Wiring.from_mergekit(MERGEKIT.replace(*change), 12)


@given(serial)
def test_foreign_forms_round_trip(w: Wiring) -> None:
    assert Wiring.from_rys(w.to_rys(), w.n_layers) == w
    assert Wiring.from_rys(";".join(f"{i},{j}" for i, j in w.to_rys()), w.n_layers) == w
    assert Wiring.from_paths(w.to_paths(), w.n_layers) == w
    assert Wiring.from_mergekit(w.to_mergekit("some/model"), w.n_layers) == w


@pytest.mark.parametrize("text", ["{3|4}", ": 3.attn", "0.5*3", "mean{3:5|6}"])
def test_only_serial_wirings_have_foreign_forms(text: str) -> None:
    w = Wiring.parse(text, 12)
    for write in (w.to_rys, w.to_paths, lambda: w.to_mergekit("m")):
        with pytest.raises(WiringError, match="can only say whole layers one after another"):
            write()
