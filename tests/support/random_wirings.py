"""Random wirings, random spellings of them, and an independent interpreter of what they mean."""

import hashlib
import itertools
from fractions import Fraction

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from surgery.wiring.value import Chain, Layer, Parallel, Scaled, Step, Wiring

slow = [HealthCheck.too_slow]
settings.register_profile("unhurried", max_examples=50, deadline=None, database=None, suppress_health_check=slow)
settings.load_profile("unhurried")

PRIME = 2**127 - 1


def update(layer: Layer, x: int) -> int:
    """A random function on the integers modulo PRIME: it obeys no law but those that hold for every layer."""
    return int.from_bytes(hashlib.sha256(repr((layer.index, layer.part, x)).encode()).digest(), "big") % PRIME


def modular(number: float) -> int:
    numerator, denominator = Fraction(number).as_integer_ratio()
    return numerator * pow(denominator, -1, PRIME)


def run(chain: Chain, x: int) -> int:
    """The definition of a wiring, in exact arithmetic."""
    for step in chain:
        match step:
            case Layer():
                x += update(step, x)
            case Scaled(factor, body):
                x += modular(factor) * (run(body, x) - x)
            case Parallel(branches, mean=False):
                x += sum(run(branch, x) - x for branch in branches)
            case Parallel(branches, mean=True):
                x = sum(run(branch, x) for branch in branches) * pow(len(branches), -1, PRIME)
        x %= PRIME
    return x


def meaning(chain: Chain) -> tuple[int, int]:
    return run(chain, 1), run(chain, 2)


sizes = st.integers(1, 9)
factors = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 4.0])  # their products are exact


@st.composite
def layers(draw: st.DrawFn, n_layers: int) -> Layer:
    return Layer(draw(st.integers(0, n_layers - 1)), draw(st.sampled_from([None, None, "attn", "mlp"])))


def chains(n_layers: int, shortest: int = 0) -> st.SearchStrategy[Chain]:
    def larger(step: st.SearchStrategy[Step]) -> st.SearchStrategy[Step]:
        body = st.lists(step, max_size=3).map(tuple)
        parallel = st.builds(Parallel, st.lists(body, min_size=1, max_size=3).map(tuple), st.booleans())
        return parallel | st.builds(Scaled, factors, body)

    def row(bounds: tuple[int, int]) -> list[Step]:
        first, last = bounds
        return [Layer(i) for i in (range(first, last) if first < last else range(first, last, -1))]

    rows = st.tuples(*2 * [st.integers(0, n_layers - 1)]).map(row)
    parts = rows | st.lists(st.recursive(layers(n_layers), larger, max_leaves=6), min_size=shortest, max_size=4)
    return st.lists(parts, min_size=shortest, max_size=3).map(
        lambda chunks: tuple(itertools.chain.from_iterable(chunks))
    )


@st.composite
def terms(draw: st.DrawFn) -> tuple[int, Chain]:
    """Any chain, normal or not, that runs at least one layer."""
    n_layers = draw(sizes)
    chain = draw(chains(n_layers))
    return n_layers, (*chain, draw(layers(n_layers)))


wirings = terms().map(lambda term: Wiring(*term))
rows = sizes.flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), min_size=1, max_size=12)))
serial = rows.map(lambda row: Wiring(row[0], tuple(map(Layer, row[1]))))


@st.composite
def spellings(draw: st.DrawFn, n_layers: int, nested: int = 2) -> tuple[str, Chain]:
    """A text in any of the notation's ways, and what it says by construction."""
    words: list[str] = []
    chain: Chain = ()
    for _ in range(draw(st.integers(1, 3))):
        word, steps = draw(spelled_element(n_layers, nested))
        words.append(word)
        chain += steps
    return draw(st.sampled_from([" ", "  ", " \n"])).join(words), chain


@st.composite
def spelled_slice(draw: st.DrawFn, n_layers: int) -> tuple[str, Chain]:
    suffix = draw(st.sampled_from(["", "", ".attn", ".mlp"]))
    index = draw(st.integers(-n_layers, n_layers - 1))
    text, indices = str(index), [range(n_layers)[index]]
    if draw(st.booleans()):
        ends = st.none() | st.integers(-n_layers, n_layers - 1)
        start, stop, stride = draw(ends), draw(ends), draw(st.sampled_from([None, 1, 2, -1, -2]))
        if list(range(n_layers))[start:stop:stride] or start is None or stop is None:
            text = ":".join("" if end is None else str(end) for end in (start, stop))
            text += "" if stride is None else f":{stride}"
            indices = list(range(n_layers))[start:stop:stride]
    return text + suffix, tuple(Layer(i, suffix[1:] or None) for i in indices)


@st.composite
def spelled_element(draw: st.DrawFn, n_layers: int, nested: int) -> tuple[str, Chain]:
    kind = draw(st.sampled_from(["slice", "repeat", "scale", "sum", "mean", "star"] if nested else ["slice"]))
    if kind == "slice":
        return draw(spelled_slice(n_layers))
    if kind == "star":
        text, chain = draw(spelled_slice(n_layers))
        return f"{{*{text}|0}}", (Parallel((*((step,) for step in chain), (Layer(0),))),)
    inside = [draw(spellings(n_layers, nested - 1)) for _ in range(draw(st.integers(1, 3)))]
    text, chain = inside[0]
    if kind == "repeat":
        times = draw(st.integers(1, 3))
        return f"({text})*{times}", chain * times
    if kind == "scale":
        factor = draw(factors)
        return f"{factor}*( {text} )", (Scaled(factor, chain),)
    between = draw(st.sampled_from(["|", " | ", " |"]))
    text = "{" + between.join(words for words, _ in inside) + "}"
    return text if kind == "sum" else f"mean{text}", (Parallel(tuple(branch for _, branch in inside), kind == "mean"),)
