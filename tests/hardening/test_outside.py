"""Text from outside: mutated files, labels of any characters, huge files, tiny models. Each ends in one sentence."""

import csv
import functools
import hashlib
import io
import json
import random
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import surgery
from graft.test_middle_chapter import USUAL, tables_of_both
from support import made_up, made_up_anatomy
from support.attacks import Attack
from surgery import report
from surgery.anatomy import files as anatomy_files
from surgery.chapters import MEASURED, every_chapter
from surgery.corpus import probes
from surgery.corpus.text_files import read_prompts
from surgery.instruments import known_networks
from surgery.page.drawing import plain, png
from surgery.records import tables
from surgery.scan import study as scan_study
from surgery.training.activations import open_latents
from surgery.training.harvest import harvest

SECONDS, MEGABYTES = 2.0, 200  # that one input may cost
ODD = ["", "\0", "\r", "\ufeff", "\u2028", "\u202e", "\x1b[31m", "\ud800", "$\\frac$", "[/x]", "é" * 500, "😀", "nan"]
NUMBERS = [None, True, -1, 0, 1e308, -1e308, float("nan"), float("inf"), 10**30, 2**63, "9" * 5000]
DEEP = "[" * 50_000
BYTES = [
    b"\0",
    b"\xff",
    b"\r",
    b"\n",
    b'"',
    b",",
    b"$",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b'"\\ud800"',
    b"1e999",
    b"NaN",
]


# --- one trial -------------------------------------------------------------------------------------------------------


def ended(attempt: Callable[[], Any]) -> str | None:
    """None if an attempt returned, or raised one sentence, in time; otherwise what was wrong."""
    began, said = time.process_time(), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers that overflow in a table that holds such
            attempt()
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, UnicodeError) or "\n" in message or not 10 < len(message) < 1500:
            said = f"{type(error).__name__}: {message[:200]!r}"
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:200]!r}"
    seconds = time.process_time() - began
    return said or (f"took {seconds:.1f} s" if seconds > SECONDS else None)


def in_memory(outcomes: Iterator[str | None]) -> Iterator[str | None]:
    """The outcomes, and a last one: what all of them took at most, beyond what there was before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield from outcomes
    took = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    yield f"took {took:.0f} MB" if took > MEGABYTES else None


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The bytes after one to four accidents."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        a, b = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
        b = min(b, a + rng.choice((1, 3, 40, 1000)))
        lines = content.split(b"\n")
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[i], lines[j] = lines[j], lines[i]
        content = rng.choice(
            (
                content[:a] + bytes([rng.randrange(256)]) + content[a + 1 :],  # a byte is another
                content[:a] + content[b:],  # lost
                content[:b] + content[a:b] * rng.choice((1, 2, 100)) + content[b:],  # doubled
                content[:a] + rng.choice(BYTES) + content[a:],  # put in
                content[:a] + (DEEP.encode() if rng.random() < 0.1 else b"[[") + content[a:],
                content[:a],
                b"\n".join(lines),
                content.replace(b"\n", b"\r\n"),
            )
        )
    return content


def mutated_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part of it exchanged, dropped, wrapped or put in twice."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, copy = rng.choice(keys), value.copy()
        what = rng.random()
        if what < 0.15:
            del copy[key]
        elif what < 0.2:
            copy[rng.choice(keys)] = copy[key]
        else:
            copy[key] = mutated_value(copy[key], rng)
        return copy
    return rng.choice([*ODD, *NUMBERS, [], {}, [value], {"a": value}, [[]] * 1000, str(value)])


# --- files of prompts and probes -------------------------------------------------------------------------------------

TEXTS = ["the cat sat", "one\u2028two", "ü 日本 😀", " spaces ", "$x$ [/b] _a"]
PROBES = [
    {"prompt": f"{a} + {a} =", "answer": str(2 * a), "group": "sums", "choices": [str(2 * a), "x"], "cluster": str(a)}
    for a in range(5)
]
FORMS: dict[str, tuple[Callable[[list[Any]], str], list[Any], Callable[[Path], Any]]] = {
    ".txt": (lambda texts: "\n".join(map(str, texts)), TEXTS, read_prompts),
    ".jsonl": (lambda texts: "\n".join(map(json.dumps, texts)), [{"text": text} for text in TEXTS], read_prompts),
    ".json": (json.dumps, [*TEXTS, *({"text": text} for text in TEXTS)], read_prompts),
    "probes.jsonl": (lambda entries: "\n".join(map(json.dumps, entries)), PROBES, probes.load),
}


def mutated_prompts(name: str, count: int, folder: Path) -> Iterator[str | None]:
    write, entries, read = FORMS[name]
    path, rng = folder / f"a{name}", random.Random(name)
    for _ in range(count):
        changed = mutated_value(entries, rng) if rng.random() < 0.5 else entries
        content = write(changed if isinstance(changed, list) else entries).encode("utf-8", "surrogatepass")
        path.write_bytes(mutated(content, rng) if changed is entries or rng.random() < 0.3 else content)
        yield ended(lambda: checked(read(path)))


def checked(read: Any) -> None:
    """What was read is text."""
    texts = [text for _, text in read] if isinstance(read, list) else [text for p in read.probes for text in p.answers]
    assert all(isinstance(text, str) and text.encode() is not None for text in texts)


def huge_files(count: int, folder: Path) -> Iterator[str | None]:
    """Four prompts of ``count`` MB, one line or entry of as many, as many brackets."""
    line = "the cat sat on the mat " * 4
    lines = count * 2**20 // len(line)
    contents = {
        "a.txt": [f"{line}\n"] * lines,
        "a.jsonl": [json.dumps({"text": line}) + "\n"] * lines,
        "a.json": ["[", *[json.dumps({"text": line}) + ","] * lines, '"end"]'],
        "long.txt": [line] * lines,
        "long.json": ['["', *[line] * lines, '"]'],
        "deep.json": ["[" * 2**20] * count,
        "lists.json": ["[", *["[]," * 2**10] * (count * 2**20 // 3072), "0]"],
        "lists.jsonl": ["[", *["[]," * 2**10] * (count * 2**20 // 3072), "0]"],
        "blank.json": [" " * 2**20] * count,
        "nothing.txt": ["\0" * 2**20] * count,
    }
    for name, pieces in contents.items():
        path = folder / name
        with open(path, "w") as file:
            file.writelines(pieces)
        del pieces
        yield from in_memory(iter([ended(partial(read_prompts, path, 4))]))
        path.unlink()


# --- folders of results ----------------------------------------------------------------------------------------------


GOOD = {"int": ["0", "-1", "7", "1000000"], "float": ["", "0", "-1", "1e308", "inf", "1e-300"], "flag": ["True"]}


@functools.cache
def results() -> dict[str, bytes]:
    """The tables of every question and their manifests, by file name."""
    anatomy = {file: made_up_anatomy.tables().get(name) for file, name in anatomy_files.NAMES.items()}
    measures, costs = made_up.measures()
    by_file = {
        made_up.SERIES: made_up.series(),
        made_up.CALIBRATION: made_up.networks(),
        made_up.MEASURES: measures,
        made_up.COSTS: costs,
        made_up.REVERSION: made_up.reversion(),
        **tables_of_both(seeds=2),
        **{file: frame for file, frame in anatomy.items() if frame is not None},
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, frame in by_file.items():
            tables.write(frame, folder / name, made_up.manifest() | USUAL, dict.fromkeys(frame, "a column"))
        made_up.write_graft(folder)
        scan_study.measure(surgery.Stack(surgery.load("babel")), probes.named("babel", 8), folder, "skip", top=2)
        return {path.name: path.read_bytes() for path in folder.iterdir() if "search" not in path.name}


def mutated_cells(content: bytes, manifest: dict[str, Any], rng: random.Random) -> tuple[bytes, dict[str, Any]]:
    """A table with odd cells, rows or columns, and the manifest that says so."""
    rows, what = [*csv.reader(io.StringIO(content.decode()))], rng.random()
    types = manifest["types"]
    if what < 0.2:  # a column less
        place = rng.randrange(len(rows[0]))
        rows = [row[:place] + row[place + 1 :] for row in rows]
        manifest = manifest | {key: {n: manifest[key][n] for n in rows[0]} for key in ("types", "columns")}
    elif what < 0.3:
        rows = rows[: rng.randrange(1, len(rows) + 1)]
    elif what < 0.35:
        rows += rows[1:] * rng.choice((1, 20))
    elif len(rows) > 1:
        for _ in range(rng.choice((1, 3, 30))):
            row, place = rng.randrange(1, len(rows)), rng.randrange(len(rows[0]))
            kind = types[rows[0][place]]
            good = {"int": ["0", "-1", "7", "1000000"], "float": ["", "0", "-1", "1e308", "inf", "1e-300"]}.get(
                kind, ODD
            )
            rows[row][place] = str(rng.choice(good if rng.random() < 0.8 else [*ODD, *NUMBERS]))
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    text = file.getvalue().encode("utf-8", "surrogatepass")
    text = mutated(text, rng) if what > 0.95 else text
    return text, manifest | {"rows": len(rows) - 1, "sha256": hashlib.sha256(text).hexdigest()}


def damaged(name: str, rng: random.Random) -> dict[str, bytes]:
    """A table, its manifest or both, changed."""
    about = name.replace(".csv", ".manifest.json")
    manifest, what = json.loads(results()[about]), rng.random()
    if what < 0.1:
        return {name: mutated(results()[name], rng)}
    if what < 0.2:
        return {about: mutated(results()[about], rng)}
    if what < 0.5:
        return {about: json.dumps(mutated_value(manifest, rng)).encode()}
    text, manifest = mutated_cells(results()[name], manifest, rng)
    return {name: text, about: json.dumps(manifest).encode()}


def damaged_results(count: int, folder: Path, whole: bool = False) -> Iterator[str | None]:
    """Of a question at a time, with a model's beside those that are of none."""
    rng = random.Random(3)
    of_chapter = {c.name: [n for n in c.files if n in results()] for c in every_chapter()}
    for trial in range(count):
        chapter, names = rng.choice([(name, names) for name, names in of_chapter.items() if names])
        shown = {*names} if chapter in MEASURED else {*names, made_up.SERIES}
        for file in folder.iterdir():
            file.unlink()
        for file, content in (results() | damaged(rng.choice(names), rng)).items():
            if file.partition(".")[0] in {name.partition(".")[0] for name in shown}:
                (folder / file).write_bytes(content)
        wrong = ended(partial(*([report.build, folder] if whole else [said, folder, trial % 20 == 0])))
        yield wrong and f"{chapter}: {wrong}"


def said(folder: Path, draw: bool) -> None:
    """Everything on the page but, mostly, the figures."""
    measured = report.Measured.read(folder)
    for chapter in measured.chapters:
        words = (chapter.say, chapter.untold, chapter.section, chapter.answers, chapter.charts)
        for part in (*words, *([chapter.draw] if draw else [])):
            measured.of(chapter, part)


# --- latents ---------------------------------------------------------------------------------------------------------


def damaged_latents(count: int, folder: Path) -> Iterator[str | None]:
    stack = surgery.Stack(known_networks.random_network(n_layers=3, d_model=8))
    harvest(stack, known_networks.tokens(6, 5), 1, 2, folder, shard_tokens=12)
    path, rng = folder / "latents.json", random.Random(5)
    whole = path.read_bytes()
    for _ in range(count):
        by_bytes = rng.random() < 0.3
        path.write_bytes(
            mutated(whole, rng) if by_bytes else json.dumps(mutated_value(json.loads(whole), rng)).encode()
        )
        yield ended(lambda: open_latents(folder).batch([0]))


# --- labels ----------------------------------------------------------------------------------------------------------


def labels(count: int, folder: Path) -> Iterator[str | None]:
    """Any characters as ticks, title, legend and annotation; a warning is a failure."""
    rng = random.Random(7)
    parts = [*ODD, "_", "\\", "{", "}", "^", "$", "a", " ", "\n", "中", "א", "\u200f", "\\frac{1}", "%", "<b>", "'"]
    for _ in range(count):
        texts = ["".join(rng.choices(parts, k=rng.choice((1, 3, 30)))) for _ in range(4)]
        figure = Figure(figsize=(2, 2))
        axes = figure.subplots()
        axes.plot([0, 1], label=plain(texts[0]))
        axes.set_title(plain(texts[1]))
        axes.set_xticks([0, 1], [plain(texts[2]), plain(texts[3])])
        axes.annotate(plain(texts[0]), (0, 0))
        axes.legend()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                png(figure)
            yield None if len(axes.get_legend().get_texts()) == 1 else f"no legend for {texts[0]!r}"
        except Exception as error:
            yield f"{texts!r}: {error}"


def results_with_odd_names(count: int, folder: Path) -> Iterator[str | None]:
    """Every text of every table and the model's name exchanged for an odd one, each for its own; the page is built."""
    rng = random.Random(11)
    for _ in range(count):
        odd = rng.choice([text for text in ODD if text.encode("utf-8", "ignore") == text.encode("utf-8", "replace")])
        for name in (name for name in results() if name.endswith(".csv")):
            about = name.replace(".csv", ".manifest.json")
            for file in (name, about):
                (folder / file).write_bytes(results()[file])
            frame, manifest = tables.read(folder / name), json.loads(results()[about])
            for column in {"group", "network", "method", "kind", "detector", "about", "variant"} & {*frame}:
                frame[column] = [odd if rng.random() < 0.3 else f"{text}{odd}" for text in frame[column]]
            manifest["model"]["name"] = f"./a/{odd}"
            tables.write(frame, folder / name, manifest, dict.fromkeys(frame, odd))
        yield ended(lambda: report.build(folder))


ATTACKS = [
    *(
        Attack(f"Files of prompts or probes (`{name}`), mutated", partial(mutated_prompts, name), 80, 1000, before)
        for name, before in zip(FORMS, ("", "13 of 1,000", "17 of 1,000", "11 of 1,000"), strict=True)
    ),
    Attack("Four prompts of a huge file: of many lines, of one, of brackets, of blanks", huge_files, 3, 262),
    Attack("Results, a table or manifest mutated: all sentences and sections", damaged_results, 8, 100),
    Attack("The same, the whole page built", partial(damaged_results, whole=True), 1, 6),
    Attack("Manifests of latents, mutated", damaged_latents, 60, 1000, "168 of 1,000"),
    Attack("Labels of any characters in a figure", labels, 3, 40, "39 of 40"),
    Attack(
        "Odd names of groups, methods, models, columns: the whole page built",
        results_with_odd_names,
        1,
        3,
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_nothing_fails(attack, tmp_path):
    attack.hold(tmp_path)
