"""The notation: what is read, what is written, and what an error shows."""

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.random_wirings import meaning, sizes, spellings, wirings
from surgery.wiring import steps
from surgery.wiring.value import Chain, Wiring, WiringError


@given(wirings)
def test_parse_reads_what_str_writes_and_str_is_canonical(w: Wiring) -> None:
    again = Wiring.parse(str(w), w.n_layers)
    assert again == w
    assert hash(again) == hash(w)
    assert str(again) == str(w)
    assert eval(repr(w)) == w


@given(sizes.flatmap(lambda n: st.tuples(st.just(n), spellings(n))))
def test_every_spelling_is_read_as_it_was_meant(case: tuple[int, tuple[str, Chain]]) -> None:
    n_layers, (text, chain) = case
    if not list(steps.normal_form(chain, n_layers)):
        with pytest.raises(WiringError, match="empty"):
            Wiring.parse(text, n_layers)
    else:
        w = Wiring.parse(text, n_layers)
        assert w == Wiring(n_layers, chain)
        assert meaning(w.steps) == meaning(chain)
        assert str(Wiring.parse(str(w), n_layers)) == str(w)


LONG = 60
EXAMPLES = [
    (":", ":", [*range(60)]),
    (":52 45:", ":52 45:", [*range(52), *range(45, 60)]),
    (":10 (10:14)*3 14:", ":14 10:14 10:", [*range(14), *range(10, 14), *range(10, 60)]),
    (":10 14:", ":10 14:", [*range(10), *range(14, 60)]),
    (":10 14:9:-1 15:", ":10 14:9:-1 15:", [*range(10), 14, 13, 12, 11, 10, *range(15, 60)]),
    (":10 {10|11|12|13} 14:", ":10 {*10:14} 14:", [*range(60)]),
    (":10 {*10:14} 14:", ":10 {*10:14} 14:", [*range(60)]),
    (":10 mean{*10:14} 14:", ":10 mean{*10:14} 14:", [*range(60)]),
    (":10 {10:12 | 12:14} 14:", ":10 {10:12 | 12:14} 14:", [*range(60)]),
    (":7 7.attn 8.attn 7.mlp 8.mlp 9:", ":7 7:9.attn 7:9.mlp 9:", [*range(7), 7, 8, 7, 8, *range(9, 60)]),
    (":20 0.5*(12:20) 20:", ":20 0.5*(12:20) 20:", [*range(20), *range(12, 20), *range(20, 60)]),
    (":10 10:", ":", [*range(60)]),
    (":0 :60 60:", ":", [*range(60)]),
    ("::-1", "::-1", [*reversed(range(60))]),
    ("4::-1 :55:-1", "4::-1 :55:-1", [4, 3, 2, 1, 0, 59, 58, 57, 56]),
    ("13:9:-1 4 3", "13:9:-1 4 3", [13, 12, 11, 10, 4, 3]),
    ("3:-50 -1 -60", "3:10 59 0", [*range(3, 10), 59, 0]),
    ("10:20:3 ::30", "10 13 16 19 0 30", [10, 13, 16, 19, 0, 30]),
    (":3.attn 4.mlp 57:.mlp", ":3.attn 4.mlp 57:.mlp", [0, 1, 2, 4, 57, 58, 59]),
    ("5 4 5 6", "5 4:7", [5, 4, 5, 6]),
    ("(((3)) ({4|5})*2)", "3 {*4:6} {*4:6}", [3, 4, 5, 4, 5]),
    ("{9|*3:6|4|3 4}", "{3 | 3:5 | 4 | *4:6 | 9}", [3, 3, 4, 4, 4, 5, 9]),
    ("{3.mlp|*3:5.attn|7}", "{7 | *3:5.attn | 3.mlp}", [7, 3, 4, 3]),
    ("{{3|4}|{{5}|:0}}", "{*3:6}", [3, 4, 5]),
    ("{mean{3|4}|5}", "{5 | mean{*3:5}}", [5, 3, 4]),
    ("mean{mean{3|4}|5|{6}}", "mean{*5:7 | mean{*3:5}}", [5, 6, 3, 4]),
    ("mean{3|:0}", "mean{:0 | 3}", [3]),
    ("0.50*7 -0.5*7.attn 2*(7) -1*{7|8}", "0.5*7 -0.5*7.attn 2*(7) -1*{*7:9}", [7, 7, 7, 7, 8]),
    ("0.5*(0.5*(7) ) 3 * ( 7 8)", "0.25*7 3*(7:9)", [7, 7, 8]),
    ("0.5*(2*(7 8)) 0*(9) 1*(9)", "7:10", [7, 8, 9]),
    ("1e-05*7 2.5E3*(:0 8) .5*8:10", "1e-05*7 2500*(8) 0.5*(8:10)", [7, 8, 8, 9]),
    ("1e17*mean{3|4}", "1e+17*mean{*3:5}", [3, 4]),
]


@pytest.mark.parametrize(("text", "canonical", "indices"), EXAMPLES)
def test_the_notation_by_example(text: str, canonical: str, indices: list[int]) -> None:
    w = Wiring.parse(text, LONG)
    assert str(w) == canonical
    assert list(w.layers) == indices
    assert Wiring.parse(canonical, LONG) == w


def test_a_model_of_one_layer() -> None:
    assert str(Wiring.of(1)) == ":"
    assert Wiring.parse("0", 1) == Wiring.of(1)
    assert str(Wiring.of(1).repeat(0, 1)) == ": :"
    assert Wiring.parse(":1 0:", 1).layers == (0, 0)


def test_a_jump_can_be_written_for_all_i_and_j() -> None:
    for j in range(7):
        for i in range(7):
            if i < 6 or j > 0:
                assert list(Wiring.parse(f":{j} {i}:", 6).layers) == [*range(j), *range(i, 6)]


MODEL = "a model of 12 layers, they are 0 to 11"
ERRORS = [
    ("", 0, "this wiring is empty, no layer runs"),
    (" :0 12: ", 0, "this wiring is empty, no layer runs"),
    ("0*(:)", 0, "this wiring is empty, no layer runs"),
    ("3 12", 2, f"there is no layer 12 in {MODEL}"),
    ("3 -13.mlp", 2, f"there is no layer -13 in {MODEL}"),
    ("(3 5:13)*2", 5, f"there is no layer 13 in {MODEL}, and a slice stops at 12 at most"),
    (":5 -13:", 3, f"there is no layer -13 in {MODEL}, and a slice stops at 12 at most"),
    ("12::-1", 0, f"there is no layer 12 in {MODEL}"),
    (":3 3:8:0", 7, "a slice cannot have the step 0"),
    (
        ":3 5:5",
        3,
        "5:5 has no layer in it, a span runs from its first number up to, but without, its second,"
        " add :-1 to count down",
    ),
    ("{*7:3:1}", 2, "7:3:1 has no layer in it, a span runs from its first number up to, but without, its second"),
    (":3 foo 4:", 3, "'foo' is no layer or slice such as 7, 7.attn or 3:6"),
    (":3 7.attention", 3, "'7.attention' is no layer or slice such as 7, 7.attn or 3:6"),
    (".attn", 0, "'.attn' is no layer or slice such as 7, 7.attn or 3:6"),
    ("1:2:3:4", 0, "'1:2:3:4' is no layer or slice such as 7, 7.attn or 3:6"),
    ("12345678901", 0, "'12345678901' is no layer or slice such as 7, 7.attn or 3:6"),
    (
        "0..3,2..11",
        0,
        "'0..3,2..11' is no layer or slice such as 7, 7.attn or 3:6; Wiring.from_paths reads inclusive paths",
    ),
    (":3 (3:5 (6)*2", 3, "this '(' is never closed"),
    ("mean{3 | 4", 4, "this '{' is never closed"),
    (":3 3)", 4, "')' has no opening bracket before it"),
    ("3 | 4", 2, "'|' has no opening bracket before it"),
    ("(3 | 4)", 3, "')' is missing here"),
    ("{3 4)", 4, "'}' is missing here"),
    ("{*3:5 6}", 6, "'}' is missing here"),
    ("3 ()", 3, "a layer or a slice of layers is missing here"),
    ("{3|}", 3, "a layer or a slice of layers is missing here"),
    ("{*(3)}", 2, "a layer or a slice of layers is missing here"),
    ("(", 1, "a layer or a slice of layers is missing here"),
    ("0.5* ", 4, "a layer or a slice of layers is missing here"),
    ("*3", 0, "a layer or a slice of layers is missing here"),
    ("(3)*2*2", 5, "a layer or a slice of layers is missing here"),
    ("3 mean(4|5)", 2, "mean stands before branches in braces, mean{3|4}"),
    ("3:5*3", 3, "only a group can be repeated, write (3:5)*3"),
    ("3 7*3", 2, "this has two readings, write (7)*3 to repeat or 7*(3) to scale"),
    ("-2*3:5.mlp", 0, "this has two readings, write (-2)*3:5.mlp to repeat or -2*(3:5.mlp) to scale"),
    ("0.5*(3)*2", 7, "this has two readings, write (0.5*(...))*3 or 0.5*((...)*3)"),
    ("0.5*0.5*3", 4, "'0.5' is no layer or slice such as 7, 7.attn or 3:6"),
    ("nan*(3)", 0, "'nan' is no layer or slice such as 7, 7.attn or 3:6"),
    ("3 1e999*(3)", 2, "a factor must be a finite number, not 1e999"),
    ("1e200*(1e200*(3))", 0, "a factor must be a finite number, not inf"),
    ("(3)*0.5", 4, "a group is followed by how many times it runs, a factor stands before it"),
    ("(3)*", 4, "a group is followed by how many times it runs, a factor stands before it"),
    ("(3)*0", 4, "a group runs at least once, not 0 times"),
    ("(3)*-2", 4, "a group runs at least once, not -2 times"),
    ("(:)*9999", 4, "9999 times 12 steps are more than the 100000 that a wiring may have"),
    ("(" * 34, 33, "groups can be nested 32 deep at most"),
    ("(2*((0)*50000))*50000", 16, "50000 times 50001 steps are more than the 100000 that a wiring may have"),
    ("(0)*60000 (1)*60000", 14, "a wiring has at most 100000 steps, those inside groups and the groups counted"),
    ("2*((0)*99999) 3", 14, "a wiring has at most 100000 steps, those inside groups and the groups counted"),
    ("(0)*1_0", 4, "a group is followed by how many times it runs, a factor stands before it"),
    ("+3", 0, "'+3' is no layer or slice such as 7, 7.attn or 3:6"),
    ("٣", 0, "'٣' is no layer or slice such as 7, 7.attn or 3:6"),
]


@pytest.mark.parametrize(("text", "place", "sentence"), ERRORS)
def test_an_error_is_a_sentence_a_caret_and_an_example(text: str, place: int, sentence: str) -> None:
    with pytest.raises(WiringError) as caught:
        Wiring.parse(text, 12)
    example = 'for example, ":6 4:" runs layers 4:6 of 12 twice'
    assert str(caught.value).split("\n") == [sentence, f"    {text}", "    " + " " * place + "^", example]
    assert caught.value.sentence == sentence
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_caret_stands_under_the_place_also_after_tabs_and_newlines() -> None:
    with pytest.raises(WiringError) as caught:
        Wiring.parse(":3\n\t(4", 12)
    assert str(caught.value).split("\n")[1:3] == ["    :3  (4", "        ^"]


def test_an_error_shows_the_text_around_its_place_and_no_more() -> None:
    for text, place in (("3 " * 10**5 + "x " + "4 " * 10**5, 2 * 10**5), ("y" * 10**6, 0), (" " * 10**6 + "z", 10**6)):
        with pytest.raises(WiringError) as caught:
            Wiring.parse(text, 12)
        sentence, line, caret, _ = str(caught.value).split("\n")
        assert max(len(sentence), len(line), len(caret)) < 130
        assert line[caret.index("^")] == text[place]
        assert line.startswith("    ...") == (place > 0)


@pytest.mark.parametrize(
    ("text", "shown", "column"),
    [
        ("3 \x1b[31m 4", "3 \\x1b[31m 4", 2),
        ("\0 x", "\\x00 x", 0),
        ("3\u3000日本", "3 日本", 2),
        ("{日本|", "{日本|", 1),
    ],
)
def test_what_a_terminal_obeys_is_shown_as_its_escape(text: str, shown: str, column: int) -> None:
    with pytest.raises(WiringError) as caught:
        Wiring.parse(text, 12)
    assert str(caught.value).split("\n")[1:3] == [f"    {shown}", "    " + " " * column + "^"]


def test_the_caret_stands_under_its_place_after_escapes_wide_letters_and_accents() -> None:
    for before, columns in (("\x1b", 4), ("日本", 4), ("e\u0301", 1), ("\ud800", 6)):
        message = str(WiringError("no", None, f"{before}x", len(before)))
        assert message.split("\n")[2] == "    " + " " * columns + "^"


def test_the_longest_wirings_are_read_as_they_are_written() -> None:
    for text in ("(0)*100000", "(0.5*7 {0|1})*20000", "mean{" + ":0|" * 49_999 + "(0)*50000}"):
        w = Wiring.parse(text, 12)
        assert steps.size_of(w.steps) == steps.LONGEST
        assert Wiring.parse(str(w), 12) == w
    for text in ("(0)*100001", "(0)*100000 1", ":0 " * 100_001, "mean{" + ":0|" * 49_999 + "(0)*50001}"):
        with pytest.raises(WiringError, match="100000"):
            Wiring.parse(text, 12)


@pytest.mark.parametrize("n_layers", range(1, 40))
def test_the_example_of_an_error_works_for_the_model(n_layers: int) -> None:
    for parse in (Wiring.parse, Wiring.from_paths):
        with pytest.raises(WiringError) as caught:
            parse("foo", n_layers)
        example = re.search(r'\nfor example, "(.*)" runs layers (\d+):(\d+) of \d+ twice$', str(caught.value))
        assert example
        assert parse(example[1], n_layers) == Wiring.of(n_layers).repeat(int(example[2]), int(example[3]))


@given(st.text(st.sampled_from("0123456789:-.*(){}| amenttnlp"), max_size=20), sizes)
def test_any_text_is_a_wiring_or_a_wiring_error(text: str, n_layers: int) -> None:
    try:
        w = Wiring.parse(text, n_layers)
    except WiringError:
        return
    assert Wiring.parse(str(w), n_layers) == w


def test_deep_nesting_within_the_limit_can_be_written_and_read() -> None:
    w = Wiring.of(4)
    for _ in range(32):
        w = (w + Wiring.of(4)).parallel(0, len(w.steps) + 4, mean=True)
    assert Wiring.parse(str(w), 4) == w
    with pytest.raises(WiringError, match="groups can be nested 32 deep at most"):
        (w + w).parallel(0, 2, mean=True)
