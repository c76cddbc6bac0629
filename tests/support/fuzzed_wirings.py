"""Hostile wirings in every form, and a process with little memory that reads them.

    python -m support.fuzzed_wirings FORM SEED COUNT

reads ``COUNT`` inputs of a form, or the first in ``support.wiring_bombs`` if it is "bombs", and prints what went wrong
as a JSON list, a sentence or null for each. Nothing goes wrong if each call takes at most ``SECONDS`` of processor time
and ``MEMORY`` more bytes, raises nothing but WiringError (TypeError where an object is no text, number or step) with a
short message of printable lines, and what was read is written and read again to the same wiring.
"""

import json
import random
import resource
import signal
import sys
import time
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from surgery.wiring.steps import LONGEST, size_of
from surgery.wiring.value import Layer, Parallel, Scaled, Wiring, WiringError

SECONDS = 2
MEMORY = 200 * 2**20
HANG = 20  # seconds after which a trial is stopped

SIZES = [1, 2, 3, 12, 12, 12, 32, 80, 80, 126]
ODD_SIZES = [0, -1, LONGEST + 1, 10**9, 10**30, 10**5000]
LARGE_SIZES = [1000, LONGEST]
NUMBERS = ["0", "1", "2", "3", "7", "11", "-1", "12", "79", "99999", "999999999", "9999999999", "1_000", "+3", "٣", "²"]
FACTORS = ["0.5", "-1", "2.", ".5", "1e3", "1e-400", "1e999999999", "0", "1", "nan", "inf", "-0.0", "1e200", "1_0.5"]
JUNK = [
    "\0", "\x1b[31m", "\ud800", "\u202e", "\t", "\n", "\u2028", "日", "é", "[/x]", "$\\frac$", "<b>",
    "'", '"', "\\", "\ufeff",
]  # fmt: skip
ALPHABET = [*"0123456789:-.*(){}| ,;[]&#%!?eE+", "mean", ".attn", ".mlp", "..", "- ", ": ", "*a", "&a", "<<: "]


# --- texts -----------------------------------------------------------------------------------------------------------


def size(chance: random.Random) -> int:
    kind = chance.random()
    return chance.choice(SIZES if kind < 0.98 else ODD_SIZES if kind < 0.9998 else LARGE_SIZES)


def bound(chance: random.Random, n_layers: int) -> str:
    if chance.random() < 0.05:
        return chance.choice(NUMBERS)
    return chance.choice(["", str(chance.randrange(-5, max(1, min(n_layers, 10**6)) + 1))])


def piece(chance: random.Random, n_layers: int) -> str:
    word = ":".join(bound(chance, n_layers) for _ in range(chance.choice([1, 2, 2, 2, 3])))
    return (word or "0") + chance.choice(["", "", "", ".attn", ".mlp"])


def notation(chance: random.Random, n_layers: int, nested: int = 3) -> str:
    def chain() -> str:
        return notation(chance, n_layers, nested - 1)

    words = []
    for _ in range(chance.choice([1, 1, 2, 3, 8])):
        kind = chance.randrange(9) if nested else 0
        if kind < 4:
            words.append(piece(chance, n_layers))
        elif kind == 4:
            times = chance.choice([1, 2, 3, 9, chance.randrange(10**6), chance.choice(NUMBERS)])
            words.append(f"({chain()})*{times}")
        elif kind == 5:
            words.append(f"{chance.choice(FACTORS)}*({chain()})")
        elif kind == 6:
            words.append(f"{chance.choice(FACTORS)}*{piece(chance, n_layers)}")
        else:
            branches = (
                chance.choice([chain, lambda: "*" + piece(chance, n_layers)])()
                for _ in range(chance.choice([1, 2, 3, 20]))
            )
            words.append(chance.choice(["", "mean"]) + "{" + "|".join(branches) + "}")
    return chance.choice([" ", "  ", "\n"]).join(words)


def rys(chance: random.Random, n_layers: int) -> str:
    return ";".join(
        f"{bound(chance, n_layers) or 0},{bound(chance, n_layers) or 0}" for _ in range(chance.choice([1, 2, 3, 40]))
    )


def paths(chance: random.Random, n_layers: int) -> str:
    def path() -> str:
        return chance.choice([f"{bound(chance, n_layers)}..{bound(chance, n_layers)}", bound(chance, n_layers) or "0"])

    return ",".join(path() for _ in range(chance.choice([1, 2, 3, 40])))


SCALARS = [
    "0x10", "1_0", "010", "true", "no", "~", ".nan", ".inf", "2020-01-01", "1:30", "1e3", "0.0", "'3'", "!!int '3'",
    "!!float 3", "!!python/object:os.system x", "!!binary aaaa", "&a 3", "*a", "[1, 2]", "{1: 2}", "9" * 5000,
    "0x" + "f" * 90, "1:" * 60 + "1", "2001-99-99",
    "!!set {1, 2}", "!!omap [1: 2]", "? 1", "|", ">", "@", "%", "a" * 10_000,
]  # fmt: skip


def mergekit(chance: random.Random, n_layers: int) -> str:
    def number(value: int) -> str:
        return chance.choice(SCALARS) if chance.random() < 0.03 else str(value)

    lines = ["slices:"]
    model = chance.choice(["gpt2", "a/b", *SCALARS[:20]]) if chance.random() < 0.1 else "m"
    for _ in range(chance.choice([1, 1, 2, 2, 3])):
        most = max(1, min(n_layers, 10**6))
        start = chance.randrange(most)
        stop = min(most, start + chance.choice([1, 2, 5, most]))
        lines += ["- sources:", f"  - model: {model}", f"    layer_range: [{number(start)}, {number(stop)}]"]
    lines.append(f"merge_method: {'passthrough' if chance.random() < 0.95 else chance.choice(SCALARS)}")
    return "\n".join(lines) + "\n"


def mutated(chance: random.Random, text: str) -> str:
    """Text with a few mistakes, repetitions, and things that nobody wrote."""
    for _ in range(chance.choice([1, 1, 2, 5])):
        i, j = sorted(chance.randrange(len(text) + 1) for _ in range(2))
        part = text[i:j]
        match chance.randrange(8):
            case 0:
                text = text[:i] + text[j:]
            case 1:
                text = text[:i] + chance.choice(ALPHABET) + text[i:]
            case 2:
                text = text[:i] + chance.choice(ALPHABET) + text[i + 1 :]
            case 3:
                text = text[:i] + chance.choice(JUNK + NUMBERS + FACTORS + SCALARS) + text[i:]
            case 4:
                text = text[:i] + part * chance.choice([2, 3, 50]) + text[j:]
            case 5:
                times = chance.choice([2, 10, 40, 500])
                opening, closing = chance.choice(
                    ["()", "{}", "[]", ("(", ")*2"), ("2*(", ")"), ("mean{0|", "}"), ("- ", "")]
                )
                text = text[:i] + opening * times + part + closing * times + text[j:]
            case 6:
                text = "".join(chance.sample(text, len(text))) if len(text) < 200 else text[::-1]
            case 7 if chance.random() < 0.01:
                text = text[:i] + (part or "0 ") * (100_000 // max(1, len(part)) + 1) + text[j:]
        text = text[:300_000]
    return text


# --- objects ---------------------------------------------------------------------------------------------------------

ODD = [
    None, True, False, 1.5, float("nan"), float("inf"), "0.5", "3", b"3", 10**400, 10**5000, -(10**5000), 1j,
    Fraction(1, 3), Decimal("sNaN"), Decimal("0.1"), np.int8(3), np.uint8(200), np.float32(0.1), np.array([1, 2]),
    np.array([[0, 3], [1, 2]]),
    [], (), {}, {0: 1, 1: 2}, {3: 6}, {3, 6}, range(3), iter([3, 6]), "x" * 10**6, object(),
]  # fmt: skip


def number(chance: random.Random, n_layers: int) -> Any:
    return chance.choice(ODD) if chance.random() < 0.02 else chance.randrange(-2, max(3, min(n_layers, 200)) + 1)


def steps(chance: random.Random, n_layers: int, nested: int, known: list[Any]) -> Any:
    """A chain of steps that may share its parts with others, many times over, contain itself, or be no chain."""
    chain: list[Any] = []
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        kind = chance.randrange(20) if nested else 0
        if kind < 8:
            layer = number(chance, n_layers) if chance.random() < 0.1 else chance.randrange(min(n_layers, 100))
            chain.append(
                Layer(
                    layer,
                    chance.choice([None, None, None, "attn", "mlp", *(["x", 3] if chance.random() < 0.02 else [])]),
                )
            )
        elif kind < 12:
            factor = chance.choice(ODD) if chance.random() < 0.03 else chance.choice([0, 1, 0.5, -2, 1e200, 1e-200])
            chain.append(Scaled(factor, steps(chance, n_layers, nested - 1, known)))
        elif kind < 16:
            branches = [steps(chance, n_layers, nested - 1, known) for _ in range(chance.choice([0, 1, 2, 3]))]
            chain.append(Parallel(tuple(branches), chance.random() < 0.5))
        elif known:
            chain += list(known) if kind == 16 else chance.choices(known, k=chance.choice([1, 2, 20]))
        if chain:
            known.append(chain[-1])
    if chance.random() < 0.01:
        return chance.choice([[*chain, chain], repeat(Layer(0)), repeat(Scaled(0, ())), *ODD])
    if chance.random() < 0.01:
        chain.append(Scaled(2, chain))
    return chance.choice([tuple, tuple, tuple, list, iter])(chain)


METHODS: list[tuple[str, int]] = [
    ("repeat", 3), ("skip", 2), ("swap", 2), ("reverse", 2), ("parallel", 3), ("loop", 3), ("scale", 3),
    ("repeated_span", 1),
]  # fmt: skip


def objects(chance: random.Random, n_layers: int) -> Wiring:
    n_layers = chance.choice(ODD) if chance.random() < 0.005 else n_layers
    if not isinstance(n_layers, int) or chance.random() < 0.3:
        wiring = Wiring.of(n_layers)
    else:
        known: list[Any] = []
        for _ in range(chance.choice([1, 1, 30])):
            chain = steps(chance, max(1, n_layers), 3, known)
        wiring = Wiring(n_layers, chain)
    for _ in range(chance.choice([0, 1, 2, 5])):
        name, arity = chance.choice(METHODS)
        last = chance.choice([2, 3, 0.5, 1000, 10**6, 10**12, number(chance, n_layers)])
        span = [number(chance, 5), number(chance, 5)] if chance.random() < 0.3 else [0, chance.randrange(4)]
        arguments = span[:arity] if chance.random() < 0.9 else [0, len(wiring.steps)][:arity]
        result = getattr(wiring, name)(*arguments, *([last] if arity == 3 else []))
        wiring = result if isinstance(result, Wiring) else wiring
        if chance.random() < 0.2:
            wiring = wiring + wiring
        if chance.random() < 0.1:
            wiring = wiring.shuffle(seed=chance.randrange(10))
    return wiring


def rys_objects(chance: random.Random, n_layers: int) -> Wiring:
    block = [number(chance, n_layers) for _ in range(chance.choice([1, 2, 2, 2, 2, 3]))]
    shape = chance.choice(
        [tuple, list, lambda row: np.array(row, dtype=object), lambda row: iter(row), set, dict.fromkeys]
    )
    if chance.random() < 0.1:
        return Wiring.from_rys(chance.choice(ODD), n_layers)
    if chance.random() < 0.5:
        return Wiring.from_rys(shape(block), n_layers)
    return Wiring.from_rys(shape([tuple(block)] * chance.choice([1, 1, 2, 1000])), n_layers)


# --- judging ---------------------------------------------------------------------------------------------------------


def text_of(write: Callable[[random.Random, int], str], read: Callable[[str, int], Wiring]) -> Callable:
    """A trial of a text: as the grammar writes it, or with mistakes."""

    def trial(chance: random.Random, n_layers: int) -> Wiring:
        text = write(chance, n_layers)
        return read(text if chance.random() < 0.3 else mutated(chance, text), n_layers)

    return trial


FORMS: dict[str, Callable[[random.Random, int], Wiring]] = {
    "notation": text_of(notation, Wiring.parse),
    "rys": text_of(rys, Wiring.from_rys),
    "paths": text_of(paths, Wiring.from_paths),
    "mergekit": text_of(mergekit, Wiring.from_mergekit),
    "objects": objects,
    "rys_objects": rys_objects,
}


def judged(make: Callable[[], Wiring], type_errors: bool = False) -> str | None:
    """What goes wrong when a wiring is made, written and read again, or None."""
    try:
        wiring = timed(make)
        if not isinstance(wiring, Wiring):
            return None
        return again(wiring)
    except WiringError as error:
        return of_message(str(error))
    except TypeError as error:
        return of_message(str(error)) if type_errors else f"TypeError: {str(error)[:200]}"
    except _Slow as slow:
        return str(slow)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


class _Slow(BaseException):
    """A call took too long."""


def timed(call: Callable[[], Any]) -> Any:
    began = time.process_time()
    result = call()
    if (seconds := time.process_time() - began) > SECONDS:
        raise _Slow(f"took {seconds:.1f} s: {getattr(call, '__name__', call)}")
    return result


def again(wiring: Wiring) -> str | None:
    """What goes wrong when a wiring is written in every form and read again."""
    n_layers, text = wiring.n_layers, timed(wiring.__str__)
    if size_of(wiring.steps) > LONGEST or len(wiring.layers) > LONGEST or wiring.depth > LONGEST:
        return f"{size_of(wiring.steps)} steps"
    twin = timed(lambda: Wiring.parse(text, n_layers))
    if twin != wiring or timed(twin.__hash__) != timed(wiring.__hash__) or timed(twin.__repr__) != repr(wiring):
        return f"read again as another: {text[:200]}"
    if wiring.is_serial:
        blocks, text = timed(wiring.to_rys), timed(wiring.to_paths)
        if timed(lambda: Wiring.from_rys(blocks, n_layers)) != wiring:
            return f"another after RYS: {blocks[:20]}"
        if timed(lambda: Wiring.from_paths(text, n_layers)) != wiring:
            return f"another after paths: {text[:200]}"
        try:
            text = timed(lambda: wiring.to_mergekit("a model"))
        except WiringError as error:
            return None if "slices" in str(error) else str(error)
        if timed(lambda: Wiring.from_mergekit(text, n_layers)) != wiring:
            return f"another after mergekit: {text[:200]}"
    return None


def of_message(message: str) -> str | None:
    if len(message) > 1000:
        return f"a message of {len(message)} characters: {message[:100]}"
    if strange := [
        letter
        for letter in message
        if letter != "\n" and unicodedata.category(letter) in ("Cc", "Cs", "Cf", "Zl", "Zp")
    ]:
        return f"{strange[0]!r} in a message: {message[:100]!r}"
    return None


def limited() -> None:
    """Take no more than ``MEMORY`` from now on, and no more than ``HANG`` seconds for a trial."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)

    def stop(*_: object) -> None:
        raise _Slow(f"ran for {HANG} s and was stopped")

    signal.signal(signal.SIGVTALRM, stop)


def main(form: str, seed: int, trials: int) -> list[str | None]:
    from support.wiring_bombs import BOMBS

    limited()
    outcomes = []
    for trial in range(min(trials, len(BOMBS)) if form == "bombs" else trials):
        signal.setitimer(signal.ITIMER_VIRTUAL, HANG)
        if form == "bombs":
            outcome = judged(BOMBS[trial], type_errors=True)
        else:
            chance = random.Random(f"{form} {seed} {trial}")
            outcome = judged(partial(FORMS[form], chance, size(chance)), type_errors="objects" in form)
        outcomes.append(outcome and f"{form} {seed} {trial}: {outcome}")
    return outcomes


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
