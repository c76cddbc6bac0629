"""Text from outside costs little and ends in a sentence, whatever it is."""

import pytest

from surgery.outside import MOST_NODES, OutsideError, read_json, read_yaml, require_text, shown

LAUGHS = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}' if i else '1'] * 9)}]\n" for i in range(9))


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "[" * 150_000,
        "- " * 90_000,
        "[1," * 60_000,
        "-\n" * 60_000,
        "1" + ":1" * 90_000,
        "0x" + "f" * 900,
        "&a [*a]",
        "? [a]\n: b",
        "x: 2020-13-45",
        "x: " + "9" * 6000,
        "x: !!float a",
        "a: b: c",
    ],
)
def test_yaml_that_cannot_be_read_ends_in_one_short_sentence(text):
    with pytest.raises(OutsideError) as error:
        read_yaml(text)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_brackets_inside_quotes_are_text():
    assert read_yaml("a: '" + "[" * 1000 + "'") == {"a": "[" * 1000}


def test_what_is_shown_costs_no_more_than_it_shows():
    long = "x" * 10**6
    assert len(shown([long] * 10**6)) < 100
    assert len(shown({long: long})) < 100
    assert shown(10**5000) == "a value of type int"


def test_aliases_of_little_are_read_and_count_as_what_they_stand_for():
    assert read_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}
    few = MOST_NODES // 50
    values = ", ".join(["1"] * 40)
    assert len(read_yaml(f"a: &a [{values}]\nb: [{', '.join(['*a'] * (few - 10))}]")["b"]) == few - 10
    with pytest.raises(OutsideError, match="aliases written out"):
        read_yaml(f"a: &a [{values}]\nb: [{', '.join(['*a'] * 2 * few)}]")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 6000, b"\xff\xfe\x00", "{'a': 1}", ""])
def test_json_that_cannot_be_read_ends_in_one_short_sentence(text):
    with pytest.raises(OutsideError) as error:
        read_json(text)
    assert len(str(error.value)) < 300


def test_half_of_a_surrogate_pair_is_no_text():
    assert require_text("whole \U0001f600") == "whole \U0001f600"
    with pytest.raises(OutsideError, match=r"\\ud83d.*character 7"):
        require_text("whole \ud83d")


def test_what_is_shown_is_one_printable_line():
    assert shown("a\nb\x1b\u2028\ud800\u202e") == r"a\nb\x1b\u2028\ud800\u202e"
    assert shown("ü 日本 [/x]") == "ü 日本 [/x]"
    assert shown("x" * 100) == "x" * 60 + "..."
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "[[[[[[[...]]]]]]]"
