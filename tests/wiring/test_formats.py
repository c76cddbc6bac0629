"""The forms of other tools: by example, there and back, and what they cannot say."""

import time

import numpy as np
import pytest
import yaml
from hypothesis import given

from support.random_wirings import serial
from surgery.wiring import formats
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


BAD_RYS = [
    *("3;4", "3,4,5", "a,b", "", "3,6;", [(1, 2, 3)], [1], [()], None, 3, 3.5, (3.0, 6.0), ["36", "47"], "x" * 10**6),
    *(
        "1_0,11",
        "+3,6",
        "٣,٦",
        "9" * 5000 + ",3",
        "," * 10**6,
        ";" * 10**6,
        b"\x03\x06",
        (True, 6),
        [[[]]],
        [b"\x03\x06"],
    ),
    *({3: 6}, {0: 4, 1: 6}, {(3, 6): 1}, {3, 6}, {(3, 6)}, [{3: 1, 6: 1}], [{3, 6}], iter([3, 6]), range(10**9)),
    *(np.zeros((3, 3)), np.array([0.0, 3.0]), np.array(3), [(4, 4)] * 200_000),
]


@pytest.mark.parametrize("spec", BAD_RYS, ids=[f"spec{i}" for i in range(len(BAD_RYS))])
def test_a_bad_rys_spec_is_refused(spec) -> None:
    with pytest.raises(WiringError, match="RYS blocks are written") as error:
        Wiring.from_rys(spec, 8)
    assert len(str(error.value)) < 200


def test_rys_blocks_may_be_arrays() -> None:
    blocks = Wiring.from_rys([(3, 6), (4, 6)], 8)
    for spec in (
        np.array([[3, 6], [4, 6]]),
        [np.array([3, 6]), np.array([4, 6])],
        ((np.int64(3), 6), (4, np.uint8(6))),
    ):
        assert Wiring.from_rys(spec, 8) == blocks
    assert Wiring.from_rys(np.array([3, 6]), 8) == Wiring.from_rys((3, 6), 8)


def test_no_form_is_longer_than_a_wiring_may_be() -> None:
    for read, text, n_layers in (
        (Wiring.from_paths, "0..99999,0", 100_000),
        (Wiring.from_paths, "," * 100_000, 12),
        (Wiring.from_rys, [(0, 12)] * 9000, 12),
        (Wiring.from_mergekit, MERGEKIT.replace("6]", "60000]").replace("12]", "60000]"), 60_000),
    ):
        with pytest.raises(WiringError, match="a wiring has at most 100000 steps"):
            read(text, n_layers)
    for form in (Wiring.parse, Wiring.from_paths, Wiring.from_rys, Wiring.from_mergekit):
        with pytest.raises(WiringError, match="a model has at most 100000 layers, not 1000000000"):
            form("0..,", 10**9)
    for form in (Wiring.parse, Wiring.from_paths, Wiring.from_mergekit):
        with pytest.raises(TypeError, match="is a text, not b'0'"):
            form(b"0", 12)


def test_a_path_may_stand_between_spaces_and_the_caret_finds_it() -> None:
    assert Wiring.from_paths(" 0..2 ,  5", 12).layers == (0, 1, 2, 5)
    with pytest.raises(WiringError) as caught:
        Wiring.from_paths("0,  12", 12)
    assert str(caught.value).split("\n")[2] == "        ^"
    began = time.process_time()
    with pytest.raises(WiringError):
        Wiring.from_paths(" " * 10**5 + "x", 12)
    assert time.process_time() - began < 2


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
    (("[4, 12]", "[0x4, 1_3]"), r"slice 2 has no layers \[4, 13\]"),
    (("[4, 12]", "[true, 12]"), r"slice 2 should have one source with a layer_range .*, not \[True, 12\]"),
    (("[4, 12]", "[.nan, 12]"), r"a layer_range such as \[0, 6\], not \[nan, 12\]"),
    (("[4, 12]", "[4, 2020-01-01]"), "slice 2 should have one source with a layer_range"),
    (("[4, 12]", "[4.0, 12]"), "slice 2 should have one source with a layer_range"),
    (("[4, 12]", "{4: 1, 12: 1}"), "slice 2 should have one source with a layer_range"),
    (("[4, 12]", "'4'"), "slice 2 should have one source with a layer_range"),
    (("[4, 12]", "[4, 1:30]"), r"slice 2 has no layers \[4, 90\]"),
    (("[4, 12]", "[4, " + "9" * 9000 + "]"), "this has a number of 9,000 characters"),
    (("[4, 12]", "[" * 50_000), "this is nested too deeply to be YAML"),
    (
        ("model: some/model\n    layer_range: [4", "model: 7\n    layer_range: [4"),
        "slice 2 should name its model, not 7",
    ),
    (("model: some/model\n    layer_range: [4", "model: [a]\n    layer_range: [4"), "name its model, not .'a'.: put"),
    (("model: some/model\n    layer_range: [4", "model: ~\n    layer_range: [4"), "name its model, not None"),
    (("model: some/model\n    layer_range: [4", f"model: {'m' * 10**5}\n    layer_range: [4"), "another model, mmm"),
    (("some/model\n    layer_range: [4", "other\n    layer_range: [4"), "slice 2 is from another model, other"),
]


@pytest.mark.parametrize(("change", "sentence"), MERGEKIT_ERRORS)
def test_a_mergekit_configuration_that_is_no_wiring_is_refused(change: tuple[str, str], sentence: str) -> None:
    assert change[0] in MERGEKIT
    with pytest.raises(WiringError, match=sentence) as error:
        Wiring.from_mergekit(MERGEKIT.replace(*change), 12)
    assert len(str(error.value)) < 300


def test_numbers_of_layers_are_what_yaml_makes_of_them() -> None:
    assert Wiring.from_mergekit(MERGEKIT.replace("[4, 12]", "[0x4, 1_2]"), 12) == Wiring.from_mergekit(MERGEKIT, 12)


@pytest.mark.parametrize("name", ["yes", "7", "~", "a: b", "#", "a\n b ", "日本", "\x85\u2028", "'", "m" * 9000])
def test_a_models_name_is_text_whatever_yaml_might_make_of_it(name: str) -> None:
    w = Wiring.parse(":6 4:", 12)
    assert yaml.safe_load(w.to_mergekit(name))["slices"][0]["sources"][0]["model"] == name
    assert Wiring.from_mergekit(w.to_mergekit(name), 12) == w


@pytest.mark.parametrize("name", [None, 7, ["m"], b"m", "m" * 10**7])
def test_other_names_of_a_model_are_refused(name) -> None:
    with pytest.raises(WiringError, match="a model is named by a text of reasonable length, not by"):
        Wiring.parse(":6 4:", 12).to_mergekit(name)


def test_a_mergekit_configuration_is_written_only_as_long_as_it_can_be_read() -> None:
    long = Wiring.parse(f"(0)*{formats.MOST_SLICES}", 12)
    assert Wiring.from_mergekit(long.to_mergekit("some/model"), 12) == long
    with pytest.raises(WiringError, match="takes 801 slices, a mergekit configuration has at most 800"):
        (long + Wiring.parse("0", 12)).to_mergekit("m")
    with pytest.raises(WiringError, match="are longer than a mergekit configuration is"):
        long.to_mergekit("\U0001f600" * 50)


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
