"""The user's model and process stay as they were, nothing is left behind, asked of the network, run or believed."""

import ast
import gc
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from unittest import mock

import psutil
import pytest
import torch

import surgery
from support import fixtures, untouched
from support.attacks import Attack
from support.pages import Page
from support.places import REPOSITORY
from surgery import report, scan, tape
from surgery.corpus.probes import Probe, ProbeSet

MODELS = ("gpt2", "llama", "gemma2", "gpt_neox", "qwen3", "native-ln")


def opened(name: str, folder: Path) -> surgery.Stack:
    """A model of the fixtures in a state that a user may have put it into: some gradients, some frozen weights."""
    native = name in fixtures.NATIVE
    model = fixtures.native(name) if native else surgery.load(fixtures.save(name, folder / name))
    for index, parameter in enumerate(model.parameters()):
        if index % 3 == 0:
            parameter.requires_grad_(False)
        elif index % 3 == 1:
            parameter.grad = torch.ones_like(parameter)
    return surgery.Stack(model)


def every_call(count: int, folder: Path) -> Iterator[str | None]:
    """Each call on each model; ``count`` of them, drawn from as few models as there can be."""
    checks = [(name, call) for name in MODELS for call in Random(0).sample([*untouched.CALLS], len(untouched.CALLS))]
    stack, stack_name = None, ""
    for number, (name, call) in enumerate(checks[:count]):
        if stack is None or stack_name != name:
            stack, stack_name = opened(name, folder), name
        place = folder / str(number)
        place.mkdir()
        before = untouched.of_model(stack.model, stack.tokenizer), untouched.surroundings()
        try:
            untouched.CALLS[call](stack, untouched.tokens(), place)
        except ValueError as error:  # a model without what the call measures, which is refused
            if stack_name == MODELS[0]:
                yield f"{call}: {error}"
                continue
        after = untouched.of_model(stack.model, stack.tokenizer), untouched.surroundings()
        changed = [part for pair in zip(before, after, strict=True) for part in untouched.changed(*pair)]
        yield f"{call} on {name} changed {', '.join(changed[:5])}" if changed else None


REPEATED = (
    "run", "an interrupted run", "frozen", "record", "norm_state", "hooks.skip, damp and parallel", 
    "attribution.effects", "scan.run", "lens.layers", "width.deepen",
)  # fmt: skip


def repeated(count: int, folder: Path) -> Iterator[str | None]:
    """The same call ``count`` times: objects, tensors, files, threads and memory as after a fifth of them.

    A few times are spent on several calls in turn, because counting takes longer than they do.
    """
    stack, batch = opened("gpt2", folder), untouched.tokens()
    for names in [(name,) for name in REPEATED] if count >= 50 else [REPEATED[:6]]:
        before: Counter[str] = Counter()
        for turn in range(count):
            for name in names:
                place = folder / f"{name} {turn}"
                place.mkdir()
                untouched.CALLS[name](stack, batch, place)
            if turn == count // 5:
                before = held()
        after = held()
        grown = {kind: after[kind] - before[kind] for kind in after if after[kind] - before[kind] > ALLOWED[kind]}
        yield f"{', '.join(names)}, {count} times, left {grown}" if grown else None


ALLOWED = {"objects": 200, "tensors": 0, "files": 0, "threads": 0, "megabytes": 30}


def held() -> Counter[str]:
    gc.collect()
    objects = gc.get_objects()
    return Counter(
        objects=len(objects),
        tensors=sum(issubclass(type(thing), torch.Tensor) for thing in objects),
        files=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        megabytes=psutil.Process().memory_info().rss // 2**20,
    )


# --- the network -----------------------------------------------------------------------------------------------------

COMMANDS = (
    "check", "study --prompts 8 --out {}/study", "scan --count 8 --family skip --top 2 --out {}/scan",
    "tape :8_4: --out {}/tape", "graft --middle 4:8 --prompts 64 --steps 4 --every 2 --out {}/graft",
    "report {}/study", "check --model nobody/has-such-a-model",
)  # fmt: skip
WITHOUT_NETWORK = """
import socket, sys
def refuse(*asked):
    sys.stderr.write(f"CONNECTED {asked}\\n")
    raise OSError("no network")
connect = socket.socket.connect
socket.socket.connect = lambda self, to: connect(self, to) if self.family == socket.AF_UNIX else refuse(to)
socket.getaddrinfo = socket.create_connection = socket.gethostbyname = refuse
from surgery.cli import main
main()
"""


def network(count: int, folder: Path) -> Iterator[str | None]:
    """Load and tape in this process; then every command in a process that has not been told to stay offline.

    The last, which names a model of the hub, must be seen to ask: else this attack would see nothing.
    """
    asked: list[object] = []

    def refuse(*arguments: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    with mock.patch.multiple(socket, getaddrinfo=refuse, create_connection=refuse, gethostbyname=refuse):
        tape.together(surgery.load("babel"), ":8 4:")
    yield f"asked for {asked[0]}" if asked else None
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    for command in COMMANDS[: count - 1]:
        process = subprocess.run(
            [
                sys.executable,
                "-c",
                WITHOUT_NETWORK,
                *(word.replace("_", " ") for word in command.format(folder).split(" ")),
            ],
            env={**environment, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )
        connected = [line for line in process.stderr.splitlines() if "CONNECTED" in line]
        if command == COMMANDS[-1]:
            yield None if connected else f"{command} asked nothing: {process.stderr[-300:]}"
        elif connected or process.returncode:
            yield f"{command} ended with {process.returncode}: {[*connected, process.stderr[-300:]][0]}"
        else:
            yield None


# --- the page --------------------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>mark()</script>", "<img src=mark onerror=mark()>", "\"><svg onload=mark()>", "' onmouseover='mark()",
    "</title><script>mark()</script>", "</td></table><iframe src=mark>", "--><b>mark</b>", "<style>mark{}</style>",
    "&lt;script&gt;mark()", "javascript:mark()", "{{mark}}", "]]><mark>", "<a href=javascript:mark()>mark</a>",
    "<base href=//mark>", "\u202emark<b>",
)  # fmt: skip
NAMED = ("alt", "title", "content", "aria-label")  # attributes whose value is text


def page(count: int, folder: Path) -> Iterator[str | None]:
    """A scan whose model, probes, groups and folder have hostile names, and the page that is made of it."""
    stack = opened("gpt2", folder)
    for number, hostile in enumerate(HOSTILE[:count]):
        stack.name = f"{hostile} model"
        pairs = (Probe(f"w{4 + i} w{5 + i} w6", f"w{20 + i}", f"{hostile} {i % 2}") for i in range(8))
        out = folder / str(number) / hostile.replace("/", "|")
        out.mkdir(parents=True)
        scan.study.measure(stack, ProbeSet(f"{hostile} probes", tuple(pairs)), out, "skip", top=2)
        source = report.build(out).read_text()
        shown = Page(source)
        yield strange(shown) or (None if "mark" in "".join(shown.words) else f"{hostile} is not on the page")


def strange(shown: Page) -> str | None:
    """A tag or attribute that came out of a name."""
    ours = {"script": [{}, {"type": "application/json"}]}
    for tag, attributes in shown.tags:
        if attributes in ours.get(tag, []) or (tag == "svg" and attributes.get("role") == "img"):
            continue
        if tag in ("script", "iframe", "base", "svg", "mark", "b", "object", "form") or "mark" in tag:
            return f"<{tag}> with {attributes}"
        for name, value in attributes.items():
            if name.startswith("on") or "mark" in name or ("mark" in (value or "") and name not in NAMED):
                return f"<{tag} {name}={value!r}>"
    return None


# --- files of strangers ----------------------------------------------------------------------------------------------

RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unpickled(count: int, folder: Path) -> Iterator[str | None]:
    """No file of the package unpickles, evaluates or executes what it reads."""
    for path in sorted((*REPOSITORY.glob("surgery/**/*.py"), *REPOSITORY.glob("studies/*.py")))[:count]:
        yield next(runs_code(ast.parse(path.read_text()), path.relative_to(REPOSITORY)), None)


def runs_code(tree: ast.AST, path: Path) -> Iterator[str]:
    """Where a file could run what it reads; the cluster's workers unpack only what the user's own process packed."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names) if {name.name.split(".")[0] for name in names} & RUNS_CODE:
                yield f"{path}:{node.lineno} imports {names[0].name}"
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in RUNS_CODE:
                yield f"{path}:{node.lineno} imports from {module}"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")) if path.name != "cluster.py":
                yield f"{path}:{node.lineno} calls torch.load"
            case ast.Call(func=ast.Name(id="eval" | "exec" | "compile" as name)):
                yield f"{path}:{node.lineno} calls {name}"
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                yield f"{path}:{node.value.lineno} allows pickle"


ATTACKS = [
    Attack(
        "The user's model and process after every public call",
        every_call,
        quick=5,
        full=len(MODELS) * len(untouched.CALLS),
        before="4 of 62",
    ),
    Attack("The same call many times over", repeated, quick=5, full=200),
    Attack("Commands without a network, not told to be offline", network, quick=1, full=1 + len(COMMANDS)),
    Attack("Hostile names in a page", page, quick=1, full=len(HOSTILE)),
    Attack("Files that would unpickle or evaluate what they read", unpickled, quick=60, full=1000),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_nothing_fails(attack, tmp_path):
    attack.hold(tmp_path)
