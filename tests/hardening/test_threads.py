"""Several threads on one model, and interruptions at every place where a call changes it."""

import ctypes
import gc
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from support import fixtures
from support.attacks import Attack
from surgery import Stack, hooks
from surgery.instruments import ablation
from surgery.models import scopes, turns
from surgery.models.loading import plain
from surgery.models.scopes import CALL, FORWARD
from surgery.rebuild import tape

MODELS = Path(surgery.__file__).parent / "models"
SWAPS = ("scopes.py", "turns.py", "conditions.py", "twin.py", "freezing.py", "engine.py")  # that change modules
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
IDS = torch.randint(4, 40, (2, 7), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(4, 40, (3, 5), generator=torch.Generator().manual_seed(1))


@cache
def opened(name: str) -> Stack:
    return Stack(surgery.load("babel") if name == "babel" else new(name))


def new(name: str) -> Any:
    return fixtures.native(name) if name in fixtures.NATIVE else surgery.load(fixtures.hugging_face(name))


def direct(stack: Stack, ids: Tensor = IDS) -> Tensor:
    """The model's own logits, not through the Stack."""
    twin = plain(stack.model)
    with torch.no_grad():
        return stack.model(ids) if twin is None else twin(ids).logits


# --- threads ---------------------------------------------------------------------------------------------------------


def beside(times: int, *calls: Callable[[], Any]) -> Iterator[str | None]:
    """Make all calls at once, each in a thread of its own, ``times`` over; compare with what each gives alone."""
    alone = [call() for call in calls]
    interval, failures = sys.getswitchinterval(), []
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(times):
            start, failures = threading.Barrier(len(calls)), []

            def once(call: Callable[[], Any], expected: Any, start: Any = start, failures: Any = failures) -> None:
                start.wait()
                try:
                    got = call()
                except Exception as error:
                    failures.append(f"{type(error).__name__}: {error}")
                else:
                    if not torch.equal(got, expected):
                        failures.append("other numbers than alone")

            threads = [threading.Thread(target=once, args=pair) for pair in zip(calls, alone)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            yield "; ".join(failures) or None
    finally:
        sys.setswitchinterval(interval)


def in_turns(count: int, *pairs: Iterable[Callable[[], Any]]) -> Iterator[str | None]:
    """``count`` trials, spread over the groups of calls that are made beside each other."""
    for pair in pairs:
        yield from beside(-(-count // len(pairs)), *pair)


def frozen(stack: Stack, ids: Tensor = IDS) -> Tensor:
    context = stack.context(ids)
    with stack.frozen(context):
        return stack.execute(":2 1:", 2 * context.x0, context)


def two_runs(count: int, folder: Path) -> Iterator[str | None]:
    gpt2, llama = opened("gpt2"), opened("llama")
    yield from in_turns(
        count,
        [lambda: llama.run(IDS), lambda: llama.run(OTHER, ":2 1:")],
        [lambda: llama.run(IDS, "0 {1|2.attn} 3"), lambda: llama.stream(OTHER)],
        [lambda: gpt2.run(IDS, positions=[-1]), lambda: gpt2.readout(gpt2.context(OTHER).x0)],
    )


def beside_frozen(count: int, folder: Path) -> Iterator[str | None]:
    llama, gpt2 = opened("llama"), opened("gpt2")
    yield from in_turns(
        count,
        [lambda: frozen(llama), lambda: llama.run(IDS)],
        [lambda: frozen(gpt2), lambda: frozen(gpt2, OTHER), lambda: gpt2.stream(IDS)],
    )


def sharing(count: int, folder: Path) -> Iterator[str | None]:
    """Two Stacks on one bridge; two bridges around one Hugging Face model; a taped model beside its base."""
    model = fixtures.hugging_face("llama")
    one, two = Stack(surgery.load(model)), Stack(surgery.load(model))
    again, taped = Stack(one.model), Stack(tape.together(one.model, ":2 {1|2} 3:"))
    yield from in_turns(
        count,
        [lambda: one.run(IDS), lambda: again.run(OTHER)],
        [lambda: one.run(IDS), lambda: two.run(OTHER), lambda: frozen(again)],
        [lambda: taped.run(IDS), lambda: taped.run(OTHER), lambda: one.run(IDS)],
        [lambda: direct(taped), lambda: direct(taped, OTHER)],
    )


def direct_calls(count: int, folder: Path) -> Iterator[str | None]:
    """Whoever calls the model itself gets its own answer, whatever a Stack does with it just then."""
    stacks = [opened(name) for name in ("llama", "gpt2")]
    for stack in stacks:
        model = plain(stack.model)

        def generated(model: Any = model) -> Tensor:
            return model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)

        yield from in_turns(
            count // len(stacks),
            [lambda s=stack: direct(s), lambda s=stack: s.run(OTHER, ":2 1:")],
            [generated, lambda s=stack: frozen(s)],
            [lambda s=stack: direct(s), lambda s=stack: s.run(OTHER, "0.attn 1:")],
        )


def openings(count: int, folder: Path) -> Iterator[str | None]:
    """Opening and proving a model, which keep the user's hooks silent, beside runs and calls that hear them."""
    model = surgery.load(fixtures.hugging_face("llama"))
    plain(model).model.layers[1].mlp.register_forward_hook(lambda _, args, output: 2 * output)
    stack = Stack(model)

    def proved() -> Tensor:
        return torch.tensor(Stack(model).checks(4)["passed"].tolist())

    told = pytest.warns(UserWarning, match="hooks on the plain twin")
    with told, model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", lambda x, hook: 2 * x)]):
        yield from in_turns(
            count,
            [proved, lambda: stack.run(IDS)],
            [proved, lambda: direct(stack)],
        )


def instruments(count: int, folder: Path) -> Iterator[str | None]:
    stack = opened("llama")

    def damage(units: str, seed: int) -> Tensor:
        sampling = surgery.Sampling(skip_massive=False, progress=False, seed=seed)
        return ablation.damage(stack, IDS, [[1], [2, 3]], units=units, frozen=True, sampling=sampling).margin

    yield from in_turns(
        count,
        [lambda: damage("mlps", 0), lambda: damage("heads", 1), lambda: stack.run(OTHER)],
    )


def intervening(count: int, folder: Path) -> Iterator[str | None]:
    """One list of hooks, used by Stacks on two models in two threads."""
    stacks = [opened("llama"), opened("native-ln")]
    shared = hooks.skip(stacks[0].model, 1) + hooks.parallel(stacks[0].model, 2, 4) + hooks.add_noise(0.1, 0)

    def hooked(stack: Stack) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with stack.model.hooks(fwd_hooks=shared):
                return stack.run(IDS)

        return run

    yield from in_turns(count, [hooked(stacks[0]), hooked(stacks[1])])


# --- interruptions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """Everything that a call of a Stack could leave behind."""

    stand_ins: tuple[Any, ...]
    modes: tuple[Any, ...]
    hooks: tuple[Any, ...]
    torch: tuple[Any, ...]

    @classmethod
    def of(cls, stack: Stack) -> "State":
        models = [stack.model, stack.model.original_model, plain(stack.model)]
        modules = list(dict.fromkeys(part for model in models if model is not None for part in model.modules()))
        weights = [weight for model in models if model is not None for weight in model.parameters()]
        return cls(
            tuple((i, name) for i, one in enumerate(modules) for name in (FORWARD, CALL) if name in vars(one)),
            (tuple(one.training for one in modules), tuple(weight.requires_grad for weight in weights)),
            tuple((i, kind, *getattr(one, kind).items()) for i, one in enumerate(modules) for kind in HOOKS),
            (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")),
        )

    def changed(self, before: "State") -> str:
        names = [name for name in vars(self) if getattr(self, name) != getattr(before, name)]
        return " and ".join(names)


def operations(stack: Stack) -> dict[str, Callable[[], Any]]:
    """What is interrupted."""
    context = stack.context(IDS)

    def heard() -> Tensor:
        with stack.model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", lambda x, hook: 2 * x)]):
            return stack.run(IDS)

    return {
        "run": lambda: stack.run(IDS, ":2 1:"),
        "run with hooks": heard,
        "a run in parts": lambda: stack.run(context, "0.attn 1:", positions=[-1]),
        "frozen norms": lambda: frozen(stack),
        "readout": lambda: stack.readout(context.x0, grad=True),
        "opening": lambda: Stack(stack.model),
        "checks": lambda: stack.checks(4),
        "ablation": lambda: ablation.damage(
            stack, IDS, [[1]], units="mlps", sampling=surgery.Sampling(skip_massive=False, progress=False)
        ),
    }


SETTINGS = [value for value in gc.get_objects() if type(value) is scopes.ForAll]


class Tracer:
    """Counts the lines or instructions that run in some files, and interrupts at one of them."""

    def __init__(self, files: Callable[[str], bool], instructions: bool, at: int | None = None) -> None:
        self.files, self.event, self.at, self.count = files, "opcode" if instructions else "line", at, 0

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        if not self.files(frame.f_code.co_filename):
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        return self.inside

    def inside(self, frame: Any, event: str, _: Any) -> Any:
        if event == self.event:
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self.inside

    def run(self, call: Callable[[], Any]) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
            give_back_locks()


def give_back_locks() -> None:
    """Release what this thread still holds: a trace can raise between taking a lock and its block, Python cannot."""
    settings = [setting._changing for setting in SETTINGS]
    for lock in (*settings, scopes._changing, turns._finding, *(turn.lock for turn in [*turns._turns.values()])):
        while lock._is_owned():
            lock.release()


def changes(file: str) -> bool:
    path = Path(file)
    return path.parent == MODELS and path.name in SWAPS


def of_the_package(file: str) -> bool:
    return file.startswith(str(MODELS)) or file.endswith(("contextlib.py", "instruments/components.py"))


def after(stack: Stack, before: State, expected: tuple[Tensor, Tensor], what: str) -> str | None:
    """What an interruption of ``what`` has left behind, if anything."""
    if left := State.of(stack).changed(before):
        return f"{what}: {left} not as before"
    if not torch.equal(direct(stack), expected[0]):
        return f"{what}: the model gives other logits"
    if not torch.equal(stack.run(IDS, ":2 1:"), expected[1]):
        return f"{what}: the Stack gives other logits"
    return None


def interrupted(names: tuple[str, ...], files: Callable[[str], bool], instructions: bool) -> Any:
    """An attack that interrupts at lines or instructions, as many as ``count`` evenly spread over all there are."""

    def attack(count: int, folder: Path) -> Iterator[str | None]:
        for name in names if count > 60 else names[:1]:
            stack = opened(name)
            # a mode and a number format that a call has to change
            before_modes = [(part, part.training) for part in (plain(stack.model) or stack.model).modules()]
            calls = operations(stack)
            for part, _ in before_modes:
                vars(part)["training"] = "Norm" in type(part).__name__  # in which nothing is random
            before, expected = State.of(stack), (direct(stack), stack.run(IDS, ":2 1:"))
            try:
                for what, call in calls.items():
                    call()
                    counter = Tracer(files, instructions)
                    counter.run(call)
                    share = max(1, count // len(calls) // (len(names) if count > 60 else 1))
                    step = max(1.0, counter.count / share)
                    for place in range(min(share, counter.count)):
                        at = 1 + int(place * step)
                        Tracer(files, instructions, at).run(call)
                        yield after(stack, before, expected, f"{what}, place {at} of {counter.count} ({name})")
            finally:
                for part, mode in before_modes:
                    vars(part)["training"] = mode

    return attack


def by_timer(count: int, folder: Path) -> Iterator[str | None]:
    """Real signals, at random moments of a call."""
    stack, draw = opened("llama"), random.Random(0)
    before, expected = State.of(stack), (direct(stack), stack.run(IDS, ":2 1:"))
    calls = operations(stack)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for what, call in islice(cycle(calls.items()), count):
            began = time.perf_counter()
            call()
            took = time.perf_counter() - began
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, draw.random() * took))
                call()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            yield after(stack, before, expected, what)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def into_a_thread(count: int, folder: Path) -> Iterator[str | None]:
    """Exceptions that Python raises in a thread at random moments, while another thread goes on with the model."""
    stack, draw = opened("gpt2"), random.Random(0)
    before, expected = State.of(stack), (direct(stack), stack.run(IDS, ":2 1:"))
    calls = [lambda: frozen(stack), lambda: stack.run(IDS), lambda: stack.checks(4)]

    def again(call: Callable[[], Any]) -> None:
        try:
            while True:
                call()
        except KeyboardInterrupt:
            pass

    for call in islice(cycle(calls), count):
        worker = threading.Thread(target=again, args=(call,))
        worker.start()
        time.sleep(draw.random() * 0.03)
        beside = stack.run(IDS, ":2 1:")
        for _ in range(60):  # one that comes into a finaliser is lost
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(worker.ident), ctypes.py_object(KeyboardInterrupt)
            )
            worker.join(1)
            if not worker.is_alive():
                break
        wrong = None if torch.equal(beside, expected[1]) else "the other thread got other logits"
        yield "the thread never ended" if worker.is_alive() else wrong or after(stack, before, expected, "a thread")


ALL = ("llama", "gpt2", "native-ln", "babel")
ATTACKS = [
    Attack("Two threads run one model", two_runs, quick=15, full=300, before="102 of 300"),
    Attack("A run beside frozen norms", beside_frozen, quick=10, full=200, before="151 of 200"),
    Attack(
        "Stacks, bridges and taped models of one model, in two or three threads",
        sharing,
        quick=8,
        full=160,
        before="5 of 24",
    ),
    Attack("Direct calls and generation beside a Stack", direct_calls, quick=12, full=200),
    Attack("A model is opened and proved beside runs and calls that hear the user's hooks", openings, quick=2, full=16),
    Attack("Ablations in three threads", instruments, quick=1, full=20),
    Attack("One list of hooks in two threads", intervening, quick=6, full=100, before="9 of 10"),
    Attack("Interrupted at any line", interrupted(ALL, of_the_package, False), 24, 160, "17 of 3,766"),
    Attack("Interrupted at any instruction of what changes a model", interrupted(ALL[:2], changes, True), 8, 160),
    Attack("Interrupted by a timer", by_timer, quick=14, full=150),
    Attack("An exception raised in a thread, beside another", into_a_thread, quick=3, full=45),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_nothing_fails(attack, tmp_path):
    attack.hold(tmp_path)
