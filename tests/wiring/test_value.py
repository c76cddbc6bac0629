"""The laws of wirings, checked against an independent interpreter, and tables of all that is promised."""

import doctest
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.random_wirings import chains, meaning, run, serial, terms, wirings
from surgery import wiring
from surgery.wiring import formats, notation, steps
from surgery.wiring.families import every_parallel, every_repeat, every_reverse, every_skip, every_swap
from surgery.wiring.value import Chain, Layer, Parallel, Scaled, Step, Wiring, WiringError


@given(terms())
def test_the_normal_form_runs_like_the_term_it_comes_from(term: tuple[int, Chain]) -> None:
    n_layers, chain = term
    assert meaning(Wiring(n_layers, chain).steps) == meaning(chain)


@given(wirings)
def test_the_normal_form_is_its_own_normal_form(w: Wiring) -> None:
    assert Wiring(w.n_layers, w.steps).steps == w.steps


@given(chains(1), chains(1))
def test_equal_wirings_run_alike(a: Chain, b: Chain) -> None:
    if steps.normal_form(a, 1) == steps.normal_form(b, 1):
        assert meaning(a) == meaning(b)


@given(serial, serial)
def test_serial_wirings_are_equal_if_and_only_if_they_run_alike(v: Wiring, w: Wiring) -> None:
    assert (v.steps == w.steps) == (meaning(v.steps) == meaning(w.steps)) == (v.layers == w.layers)


@given(wirings, st.randoms(use_true_random=False))
def test_the_order_and_grouping_of_summed_branches_do_not_matter(w: Wiring, random) -> None:
    def disturb(chain: Chain) -> Chain:
        disturbed: list[Step] = []
        for step in chain:
            match step:
                case Parallel(branches, mean):
                    mixed = [disturb(branch) for branch in branches]
                    random.shuffle(mixed)
                    mixed = mixed if mean else [*mixed[:1], (Parallel((*mixed[1:], ())),)]
                    disturbed.append(Parallel(tuple(mixed), mean))
                case Scaled(factor, body):
                    disturbed.append(Scaled(2.0, (Scaled(factor / 2, disturb(body)),)))
                case Layer():
                    disturbed.append(Parallel(((step,),), mean=random.random() < 0.5))
        return tuple(disturbed)

    assert Wiring(w.n_layers, disturb(w.steps)) == w


@given(wirings)
def test_depth_and_layers_count_what_runs(w: Wiring) -> None:
    def count(chain: Chain) -> Fraction:
        total = Fraction(0)
        for step in chain:
            match step:
                case Layer(_, part):
                    total += Fraction(1, 1 if part is None else 2)
                case Scaled(_, body):
                    total += count(body)
                case Parallel(branches):
                    total += sum(map(count, branches))
        return total

    assert w.depth == count(w.steps)
    assert isinstance(w.depth, int) == (count(w.steps).denominator == 1)
    assert w.is_identity == (w == Wiring.of(w.n_layers)) == (str(w) == ":")


@given(wirings, wirings)
def test_addition_runs_one_after_the_other(v: Wiring, w: Wiring) -> None:
    if v.n_layers == w.n_layers:
        assert run((v + w).steps, 1) == run(w.steps, run(v.steps, 1))
        assert v + w == Wiring.parse(f"{v} {w}", v.n_layers)
    else:
        with pytest.raises(WiringError, match=f"{v.n_layers} and of {w.n_layers} layers"):
            v + w


DIFFERENT = [
    ("7", "7.attn 7.mlp"),
    ("{7|7}", "7"),
    ("{7|7}", "2*(7)"),
    ("{7|8}", "mean{7|8}"),
    ("{7|8}", "7 8"),
    ("mean{7|{8|9}}", "mean{7|8|9}"),
    ("mean{7|mean{8|9}}", "mean{7|8|9}"),
    ("mean{7|7|8}", "mean{7|8}"),
    ("mean{7|:0}", "7"),
    ("{7|8} 9", "{7 9|8 9}"),
    ("0.5*7 0.5*7", "0.25*7"),
    ("0.5*(7 8)", "0.5*7 0.5*8"),
]


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_what_is_not_the_same_is_not_equal(a: str, b: str) -> None:
    v, w = Wiring.parse(a, 12), Wiring.parse(b, 12)
    assert v != w


def test_a_wiring_is_a_value() -> None:
    w = Wiring.parse(":6 3:", 12)
    assert len({w, Wiring.of(12).repeat(3, 6), Wiring.of(12)}) == 2
    assert w != Wiring.parse(":6 3:", 13)
    assert repr(w) == 'Wiring.parse(":6 3:", 12)'
    assert pickle.loads(pickle.dumps(w)) == w
    with pytest.raises(AttributeError):
        w.n_layers = 13  # type: ignore[misc]
    with pytest.raises(TypeError):
        w + ":"  # type: ignore[operator]
    assert Wiring(2, (Layer(0), Scaled(1, (Layer(1),)))) == Wiring.of(2)


TOO_LONG = "a wiring has at most 100000 steps, those inside groups and the groups counted"


def doubled(deep: int) -> Chain:
    """Groups within groups, each holding the same chain twice: little memory that stands for 2 to the power of it."""
    chain: Chain = (Layer(0),)
    for _ in range(deep):
        chain = (Scaled(0.5, chain + chain),)
    return chain


IMPOSSIBLE: list[tuple[Callable[[], Wiring], str]] = [
    (lambda: Wiring.of(0), "a model has at least one layer, not 0"),
    (lambda: Wiring.parse(":", -1), "a model has at least one layer, not -1"),
    (lambda: Wiring.from_paths("0", 0), "a model has at least one layer, not 0"),
    (lambda: Wiring(4, ()), "this wiring is empty, no layer runs"),
    (lambda: Wiring(4, (Layer(4),)), "there is no layer 4 in a model of 4 layers, they are 0 to 3"),
    (lambda: Wiring(4, (Layer(-1),)), "there is no layer -1 in a model of 4 layers, they are 0 to 3"),
    (lambda: Wiring.of(4).scale(1, 2, float("nan")), "a factor must be a finite number, not nan"),
    (lambda: Wiring.of(4).skip(0, 4), "this wiring is empty, no layer runs"),
    (lambda: Wiring.of(4).skip(4), "there is no position 4 in this wiring of 4 steps"),
    (lambda: Wiring.of(4).swap(0, -5), "there is no position -5 in this wiring of 4 steps"),
    (lambda: Wiring.of(4).repeat(2, 5), "the span 2:5 leaves this wiring of 4 steps"),
    (lambda: Wiring.of(4).reverse(-5, 2), "the span -5:2 leaves this wiring of 4 steps"),
    (
        lambda: Wiring.of(4).parallel(2, 2),
        "the span 2:2 is empty, a span runs from its first number up to, but without, its second",
    ),
    (lambda: Wiring.of(4).repeat(1, 3, times=0), "a group runs at least once, not 0 times"),
    (lambda: Wiring.of(4).loop(1, 3, times=-1), "a group runs at least once, not -1 times"),
    (lambda: Wiring.of(4).repeat(0, 4, 10**6), "1000000 times 4 steps are more than the 100000 that a wiring may have"),
    (
        lambda: Wiring.of(4).repeat(0, 4, 10**5000),
        "a value of type int times 4 steps are more than the 100000 that a wiring may have",
    ),
    (
        lambda: Wiring.parse("2*(0 1)", 4).repeat(0, 1, 40_000),
        "40000 times 3 steps are more than the 100000 that a wiring may have",
    ),
    (lambda: Wiring.of(4).loop(0, 4, 20_001), "20001 times 5 steps are more than the 100000 that a wiring may have"),
    (lambda: Wiring.of(4).skip(10**5000), "there is no position a value of type int in this wiring of 4 steps"),
    (lambda: Wiring.of(4).repeat(1, 10**5000), "the span 1:a value of type int leaves this wiring of 4 steps"),
    (lambda: Wiring.of(10**9), "a model has at most 100000 layers, not 1000000000"),
    (lambda: Wiring(4, (Parallel(itertools.repeat(())),)), TOO_LONG),  # type: ignore[arg-type]
    (lambda: Wiring(4, doubled(30)), TOO_LONG),
    (lambda: Wiring(4, doubled(10_000)), "groups can be nested 32 deep at most"),
    (lambda: Wiring(4, (Scaled(10**400, (Layer(0),)),)), "a factor must be a finite number, not inf"),
    (
        lambda: Wiring(4, (Layer(10**5000),)),
        "there is no layer a value of type int in a model of 4 layers, they are 0 to 3",
    ),
    (lambda: Wiring.of(4).shuffle(2, 3, seed=0), "there is no other order of 2"),
    (lambda: Wiring.parse("2 2", 4).shuffle(seed=0), "there is no other order of 2 2"),
]


@pytest.mark.parametrize(("attempt", "sentence"), IMPOSSIBLE)
def test_what_cannot_be_is_refused_in_a_sentence(attempt: Callable[[], Wiring], sentence: str) -> None:
    with pytest.raises(WiringError) as caught:
        attempt()
    assert caught.value.sentence == sentence


def test_a_layer_has_two_parts() -> None:
    layer = Layer(1)
    object.__setattr__(layer, "part", "mlps")
    with pytest.raises(WiringError, match="a layer has the parts attn and mlp, not 'mlps'"):
        Wiring(4, (layer,))


def test_slips_of_type_are_type_errors() -> None:
    for attempt in (
        lambda: Wiring(4, (3,)),  # type: ignore[arg-type]
        lambda: Wiring(4, (Layer(1.5),)),  # type: ignore[arg-type]
        lambda: Wiring.of(4).repeat(1, 2, times=1.5),  # type: ignore[arg-type]
        lambda: Wiring.of(2.5),  # type: ignore[arg-type]
        lambda: Wiring.of(4).scale(0, 2, "0.5"),  # type: ignore[arg-type]
        lambda: Wiring.of(4).repeat(0.0, 2),  # type: ignore[arg-type]
        lambda: Wiring.of(4).repeated_span(np.array([1, 2])),
        lambda: Wiring(4, (Parallel(((Layer(0),), (Layer(1),)), np.array([1, 2])),)),
        lambda: Wiring(4, ("x" * 10**6,)),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError) as error:
            attempt()
        assert len(str(error.value)) < 200


def test_whole_numbers_of_any_type_become_plain_ones() -> None:
    w = Wiring(np.uint8(200), (Layer(np.int8(3)), Layer(True)))
    assert repr(w) == 'Wiring.parse("3 1", 200)'
    assert type(w.n_layers) is int
    assert str(Wiring.parse("-1 -200", np.uint8(200))) == "199 0"
    assert Wiring.of(200).skip(np.uint8(3)) == Wiring.of(200).skip(3)


def test_chains_may_be_lists_and_generators() -> None:
    chain = (Scaled(0.5, [Layer(0), Layer(1)]), Parallel(([Layer(2)], iter([Layer(3)]))))  # type: ignore[arg-type]
    assert Wiring(4, iter(chain)) == Wiring.parse("0.5*(0 1) {2|3}", 4)  # type: ignore[arg-type]


def test_the_size_counts_groups_what_is_inside_and_empty_branches() -> None:
    for text, size in ((":", 12), ("2*(0 1)", 3), ("mean{:0|0}", 3), ("{0 1|2*(3)}", 5)):
        assert steps.size_of(Wiring.parse(text, 12).steps) == size


def test_no_model_has_so_many_layers() -> None:
    for family in (every_repeat, every_skip, every_parallel, every_swap, every_reverse):
        with pytest.raises(WiringError, match="a model has at most 100000 layers"):
            family(10**9)


METHODS: list[tuple[Callable[[Wiring], Wiring], str]] = [
    (lambda w: w.repeat(10, 14), ":14 10:"),
    (lambda w: w.repeat(10, 14, times=3), ":14 10:14 10:"),
    (lambda w: w.repeat(10, 14, times=1), ":"),
    (lambda w: w.repeat(-3, -1), ":31 29:"),
    (lambda w: w.repeat(30, 32), ": 30:"),
    (lambda w: w.skip(3), ":3 4:"),
    (lambda w: w.skip(-1), ":31"),
    (lambda w: w.skip(10, 14), ":10 14:"),
    (lambda w: w.skip(-4, 32), ":28"),
    (lambda w: w.swap(3, 8), ":3 8 4:8 3 9:"),
    (lambda w: w.swap(-1, 0), "31 1:31 0"),
    (lambda w: w.swap(5, 5), ":"),
    (lambda w: w.reverse(10, 14), ":10 13:9:-1 14:"),
    (lambda w: w.reverse(0, 32), "::-1"),
    (lambda w: w.parallel(10, 14), ":10 {*10:14} 14:"),
    (lambda w: w.parallel(10, 14, mean=True), ":10 mean{*10:14} 14:"),
    (lambda w: w.parallel(10, 11), ":"),
    (lambda w: w.loop(10, 14, 3, mean=True), ":10 mean{*10:14} mean{*10:14} mean{*10:14} 14:"),
    (lambda w: w.loop(10, 12, 2), ":10 {*10:12} {*10:12} 12:"),
    (lambda w: w.scale(10, 14, 0.5), ":10 0.5*(10:14) 14:"),
    (lambda w: w.scale(10, 11, -1), ":10 -1*(10) 11:"),
    (lambda w: w.scale(10, 14, 0), ":10 14:"),
    (lambda w: w.repeat(10, 14).skip(3), ":3 4:14 10:"),
    (lambda w: w.repeat(10, 14).skip(14, 16), ":14 12:"),
    (lambda w: w.repeat(10, 14).scale(14, 18, 0.5), ":14 0.5*(10:14) 14:"),
    (lambda w: w.parallel(10, 14).repeat(9, 12), ":10 {*10:14} 14 9 {*10:14} 14:"),
    (lambda w: w.parallel(10, 12).parallel(10, 12), ":10 {*10:13} 13:"),
    (lambda w: w.skip(0, 30) + w.skip(2, 32), "30: :2"),
]


@pytest.mark.parametrize(("method", "text"), METHODS)
def test_methods_say_what_the_notation_says(method: Callable[[Wiring], Wiring], text: str) -> None:
    w = Wiring.of(32)
    assert str(method(w)) == text
    assert w == Wiring.of(32)


def test_a_shuffle_permutes_really_and_by_its_seed() -> None:
    w = Wiring.of(12)
    for seed in range(50):
        shuffled = w.shuffle(3, 6, seed=seed)
        assert shuffled != w
        assert sorted(shuffled.layers[3:6]) == [3, 4, 5]
        assert shuffled.layers[:3] + shuffled.layers[6:] == w.layers[:3] + w.layers[6:]
        assert shuffled == w.shuffle(3, 6, seed=seed)
    assert len({w.shuffle(3, 6, seed=seed) for seed in range(50)}) == 5
    assert w.shuffle(10, 12, seed=0) == w.swap(10, 11)
    assert sorted(w.shuffle(seed=1).layers) == list(range(12))
    assert w.shuffle(seed=1).layers != w.shuffle(seed=2).layers


def test_properties() -> None:
    assert Wiring.of(4).layers == (0, 1, 2, 3)
    assert Wiring.parse(":2 1.attn {2|3}", 4).depth == 4.5
    assert Wiring.parse("1.attn 1.mlp", 4).depth == 1
    assert isinstance(Wiring.parse("1.attn 1.mlp", 4).depth, int)
    assert Wiring.parse("3::-1", 4).is_serial
    assert not Wiring.parse(": 1.attn", 4).is_serial
    assert not Wiring.parse(": 0.5*1", 4).is_serial
    assert not Wiring.parse("{:2|2:}", 4).is_serial
    assert Wiring.parse(":2 2:", 4).is_identity
    assert not Wiring.parse(":.attn :.mlp", 1).is_identity


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_families_are_complete_and_without_repetition(n: int) -> None:
    counts = {
        every_repeat: n * (n + 1) // 2,
        every_skip: n * (n + 1) // 2 - 1,
        every_parallel: n * (n - 1) // 2,
        every_swap: n * (n - 1) // 2,
        every_reverse: n * (n - 1) // 2,
    }
    for family, count in counts.items():
        members = list(family(n))
        assert len(members) == len(set(members)) == len({meaning(w.steps) for w in members}) == count
        assert Wiring.of(n) not in members


def test_families_by_example() -> None:
    assert [str(w) for w in every_repeat(3)] == ["0 :", ":2 :", ": :", ":2 1:", ": 1:", ": 2"]
    assert [str(w) for w in every_repeat(2, times=3)] == ["0 0 :", ": : :", ": 1 1"]
    assert [str(w) for w in every_skip(3)] == ["1:", "2", "0 2", "0", ":2"]
    assert [str(w) for w in every_parallel(3)] == ["{*:2} 2", "{*:}", "0 {*1:}"]
    assert [str(w) for w in every_parallel(2, mean=True)] == ["mean{*:}"]
    assert [str(w) for w in every_swap(3)] == ["1 0 2", "::-1", "0 2 1"]
    assert [str(w) for w in every_reverse(3)] == ["1 0 2", "::-1", "0 2 1"]
    assert sum(w.depth for w in every_repeat(32)) == 22880


@pytest.mark.parametrize("module", [wiring, steps, notation, formats])
def test_the_examples_in_the_documentation_run(module) -> None:
    assert doctest.testmod(module).failed == 0


def test_importing_wirings_imports_no_arrays() -> None:
    code = "import sys, surgery.wiring; print({'torch', 'numpy', 'yaml'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize("times", [2, 3, 5])
def test_every_repeated_span_is_read_from_its_wiring(times):
    spans = [(start, stop) for start in range(7) for stop in range(start + 1, 8)]
    for repeating, expected in zip(every_repeat(7, times), spans):
        assert repeating.repeated_span(times) == expected
        assert repeating.repeated_span(times + 1) is None


@pytest.mark.parametrize(
    "text", [":", ":6 8:", ":6 4:6 3:", "5:3:-1 6:", ":4 {*4:6} 6:", ":6 0.5*(4:6) 6:", ":6 5.attn 6:"]
)
def test_other_wirings_are_no_repeated_span(text):
    assert Wiring.parse(text, 12).repeated_span() is None
    assert Wiring.parse(text, 12).repeated_span(10**12) is None
