"""Wirings made by hand to cost more than they look: each takes no argument, and makes one or raises WiringError."""

import gc
from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np

from surgery.scan import schedule
from surgery.wiring import families
from surgery.wiring.value import Layer, Parallel, Scaled, Wiring

MERGEKIT = "slices:\n- sources:\n  - model: {}\n    layer_range: {}\nmerge_method: passthrough\n"
LAUGHS = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}' if i else '1'] * 9)}]\n" for i in range(9))


def text(spelled: str, n_layers: int = 12) -> Callable[[], Wiring]:
    return partial(Wiring.parse, spelled, n_layers)


def mergekit(model: str, span: str, before: str = "") -> Callable[[], Wiring]:
    return partial(Wiring.from_mergekit, before + MERGEKIT.format(model, span), 12)


def shared(group: Callable[[Any], Any], deep: int) -> Callable[[], Wiring]:
    """Groups in groups that hold the same object twice, so that each level doubles what runs."""

    def make() -> Wiring:
        chain: Any = (Layer(0),)
        for _ in range(deep):
            chain = (group(chain),)
        return Wiring(4, chain)

    return make


def within_itself() -> Wiring:
    body: list[Any] = [Layer(0)]
    body.append(Scaled(0.5, body))  # type: ignore[arg-type]
    gc.collect()
    return Wiring(4, (Scaled(2, body),))  # type: ignore[arg-type]


def planned(spelled: str, n_layers: int, order: schedule.Order) -> Callable[[], Wiring]:
    def make() -> Wiring:
        wiring = Wiring.parse(spelled, n_layers)
        assert schedule.simulate([wiring], order=order).executions == wiring.depth
        return Wiring.of(1)

    return make


# the cheapest first: a quick test takes the beginning of the list
BOMBS: list[Callable[[], Any]] = [
    text("(2*((0)*50000))*50000"),
    text("(" * 20 + "0" + ")*99" * 20),
    text("((0)*1000 (0)*1000)*51"),
    text("{" * 10 + "(0)*99999|0" + "}" * 10),
    text("(" * 100_000),
    text("mean{0|" * 40 + "0" + "}" * 40),
    text("(mean{(:0)*99999|0})*99999"),
    text("0*((:)*8000)" * 20),
    text("x" * 10**6),
    text("9" * 10**6),
    text("9" * 10**6 + "*(0)"),
    text("1e999999999*(0)"),
    text("(0)*" + "9" * 10**6),
    text("\x1b[31m\ud800\u202e\0" * 1000),
    text(":", 10**9),
    text("{*:}", 100_000),
    text(":", 10**5000),
    partial(Wiring.of, 10**9),
    partial(Wiring.of(12).repeat, 0, 12, 10**9),
    partial(Wiring.of(12).repeat, 0, 12, 10**5000),
    partial(Wiring.of(12).loop, 0, 12, 10**9),
    partial(Wiring.of(12).repeated_span, 10**12),
    partial(Wiring.of(12).skip, 10**5000),
    partial(Wiring.of(12).scale, 0, 12, 10**400),
    shared(lambda chain: Scaled(2.0, chain + chain), 200_000),
    within_itself,
    lambda: Wiring(4, repeat(Layer(0))),  # type: ignore[arg-type]
    lambda: Wiring(4, (Parallel(repeat(())),)),  # type: ignore[arg-type]
    lambda: Wiring(4, repeat(Scaled(0, ()))),  # type: ignore[arg-type]
    partial(Wiring.from_paths, "0..999999999,0..999999999", 12),
    partial(Wiring.from_paths, "0..99999,0..99999", 100_000),
    partial(Wiring.from_paths, " " * 10**6 + "x", 12),
    partial(Wiring.from_paths, "," * 10**6, 12),
    partial(Wiring.from_paths, "..", 10**9),
    partial(Wiring.from_rys, "," * 10**6, 12),
    partial(Wiring.from_rys, ";" * 10**6, 12),
    partial(Wiring.from_rys, "1,2;" * 10**6, 12),
    partial(Wiring.from_rys, "9" * 10**6 + ",3", 12),
    partial(Wiring.from_rys, "999999999,999999999", 10**9),
    partial(Wiring.from_rys, [(0, 12)] * 10**6, 12),
    partial(Wiring.from_rys, [(4, 4)] * 10**6, 12),
    partial(Wiring.from_rys, {0: 4, 1: 6}, 12),
    partial(Wiring.from_rys, {3: 6}, 12),
    partial(Wiring.from_rys, range(10**9), 12),
    partial(Wiring.from_rys, np.zeros((1000, 1000)), 12),
    mergekit("m", "[0, 5]", LAUGHS),
    mergekit("*a", "[0, 5]", "a: &a " + "x" * 90_000 + "\nb: [" + "*a, " * 9000 + "]\n"),
    mergekit("[" + "*a, " * 9000 + "]", "[0, 5]", "a: &a " + "x" * 90_000 + "\n"),
    mergekit("m", "[0, 999999999]"),
    mergekit("m", "[0, " + "1:" * 50_000 + "1]"),
    mergekit("m", "[0, " + "9" * 100_000 + "]"),
    mergekit("m", "[" * 100_000),
    mergekit("m", "- " * 90_000),
    mergekit("m" * 10**7, "[0, 5]"),
    mergekit("m", "[0, 5]", "{" + "a: [" * 40_000),
    partial(Wiring.of(12).to_mergekit, "m" * 10**7),
    partial(families.every_repeat, 10**9),
    lambda: next(families.every_repeat(100, 10**9)),
    shared(lambda chain: Scaled(2.0, chain + chain), 30),
    shared(lambda chain: Parallel((chain, chain, chain)), 30),
    text("0 1 " * 10**6),
    text(":0 " * 10**6),
    text(("(" * 32 + "0" + ")" * 32) * 10_000),
    text("(" * 32 + "0)*99999" + ")*1" * 31),
    text("mean{0|" * 31 + "(0)*90000" + "}" * 31),
    text("mean{0|2*(" * 15 + "(0)*90000" + ")}" * 15),
    text("mean{" + ":0|" * 60_000 + "0}"),
    text("{" + "0|" * 33_000 + "0}"),
    text("0 2.5*1.mlp 2.attn " * 20_000),
    text("{*:49000}", 100_000),
    text("(::-1)*10", 10_000),
    partial(Wiring.of, 100_000),
    lambda: next(families.every_swap(100_000)),
    lambda: Wiring.parse("(0)*50000 (1)*40000", 12).shuffle(seed=0),
    partial(Wiring.from_paths, "0," * 99_000 + "0", 12),
    partial(Wiring.from_rys, "1,1;" * 99_000 + "1,1", 12),
    mergekit("m", "[0, 5]", "k: {" + ", ".join(f"{(i + 1) * (2**61 - 1)}: 1" for i in range(4900)) + "}\n"),
    mergekit("m", "[0, 5]", "k: [" + "1, " * 9900 + "]\n"),
    mergekit("m", "[0, 5]", "k: [" + "1, " * 60_000 + "]\n"),
    lambda: Wiring.from_mergekit(Wiring.parse("(0)*800", 12).to_mergekit("\U0001f600" * 10), 12),
    planned("(::-1)*50", 1000, "up"),
    planned("(::-1)*50", 1000, "alternating"),
    planned("{*:25000}", 50_000, "deep"),
]
