"""What a command says on the two streams, and how it ends.

Standard output gets the result, or with ``--json`` one JSON object: ``page``, ``files``, ``verdicts`` (sentences),
``seconds``, ``memory`` (bytes, the most at once) and what the command adds; after an error ``error``. Everything else
goes to standard error, and nothing but errors with ``--quiet``.

Exit codes: 0 done, 1 an error in one sentence, 2 wrong usage, 130 interrupted, 143 terminated, 129 the terminal was
closed. Whatever ends a command, files are closed, nothing half-written stays, and a sentence says so.
"""

import functools
import inspect
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from surgery import memory, progress
from surgery.outside import shown

errors = Console(stderr=True, highlight=False, soft_wrap=True)
WHOLE = "nothing is half-written, files that were finished stay"
LONGEST = 10_000  # characters of a line that is shown
ENDING = ("SIGTERM", "SIGHUP")  # signals that end a command as Ctrl-C does
LACKING = (
    "there is not enough memory, even in the smallest batches; cut the prompts (--max-tokens), take a smaller model, "
    "weights of half the size (--dtype bfloat16), or a machine with more"
)
AGAIN = 1.0  # seconds: the same signal within so many is the same wish, from a process group and from its leader
TELLING = "What is printed"  # the group of these options in the help of every command
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=TELLING, show_default=False)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Say nothing but the result and errors.", rich_help_panel=TELLING)
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object: the page, files and verdicts.", rich_help_panel=TELLING),
]
OLD = {  # options of earlier versions, by command: what they are called now
    ("scan", "--count"): "--prompts",
    ("graft", "--old"): "--old-weights",
    ("graft", "--judged"): "--heldout-prompts",
    ("graft", "--latent"): "--update-loss",
}
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@dataclass(frozen=True)
class Result:
    """What a command found.

    Attributes:
        text: for a reader, after the ``verdicts``.
        verdicts: sentences, each a paragraph of its own.
        page: the page that was written.
        folder: where the files are, those that lie in it directly are listed.
        more: what else the JSON object holds.
        error: why the command fails in spite of a result.
    """

    text: str
    verdicts: Sequence[str] = ()
    page: Path | None = None
    folder: Path | None = None
    more: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def show(self) -> None:
        """Print it for a reader."""
        for sentence in self.verdicts:
            echo(f"\n{sentence}")
        if self.text:
            echo(f"\n{self.text}" if self.verdicts else self.text)

    def json(self) -> dict[str, Any]:
        """The JSON object, without what was spent."""
        files = sorted(path for path in (self.folder.iterdir() if self.folder else ()) if path.is_file())
        return {
            "page": None if self.page is None else str(self.page),
            "files": [str(path) for path in files if not path.name.startswith(".")],
            "verdicts": list(self.verdicts),
            **self.more,
            **({"error": self.error} if self.error else {}),
        }


class Terminated(SystemExit):
    """The process was asked to end by a signal; its exit code is what a shell expects, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Context manager: let ``ENDING`` raise Terminated in the main thread, unless somebody else listens to them."""
    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    last = -AGAIN

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now, before = time.monotonic(), last
        last = now
        if now - before >= AGAIN:
            raise Terminated(number)

    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in ours:
            signal.signal(number, end)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def one_line_errors(
    interrupted: str, debug: bool = False, tell: "Callable[[str], None] | None" = None
) -> Iterator[None]:
    """Turn an error that a user can do something about into one sentence and an exit code.

    ``tell`` gets the sentence, which by default goes to standard error.
    """
    tell = tell or complain
    with ended_by_signals():
        try:
            yield
        except KeyboardInterrupt:
            tell(f"interrupted: {interrupted}")
            raise SystemExit(130) from None
        except Terminated as end:
            tell(f"ended by {end.name}: {interrupted}")
            raise SystemExit(end.code) from None
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if debug or (isinstance(error, RuntimeError) and not memory.ran_out(error)):
                raise
            tell(f"error: {LACKING if memory.ran_out(error) else error}")
            raise SystemExit(1) from None


def complain(text: str) -> None:
    """Show lines of text on standard error, as they are: no markup, and nothing that a terminal would obey."""
    for line in text.split("\n"):
        errors.print(Text(shown(line, LONGEST)))


def say(text: str) -> None:
    """Show them unless the command is to be quiet."""
    if not _quiet.get():
        complain(text)


def echo(text: str) -> None:
    """Show lines of text on standard output, in the same way."""
    typer.echo("\n".join(shown(line, LONGEST) for line in text.split("\n")))


@contextmanager
def talking(quiet: bool) -> Iterator[None]:
    """Context manager: what is said and how far it is are shown, or neither; of several processes the first one talks.

    >>> with talking(quiet=True):
    ...     say("not to be seen")
    """
    before = _quiet.set(quiet)
    try:
        with progress.shown(not quiet and is_first()), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(f"note: {message}")
            yield
    finally:
        _quiet.reset(before)


def command(function: Callable[..., Result]) -> Callable[..., None]:
    """A command that shows what ``function`` gives, with the options ``--quiet``, ``--json`` and ``--debug``."""

    @functools.wraps(function)
    def wrapped(*, debug: bool, quiet: bool, as_json: bool, **options: Any) -> None:
        began = time.monotonic()
        tell = (lambda text: _write({"error": text.removeprefix("error: ")})) if as_json else complain
        with ExitStack() as meanwhile:
            meanwhile.enter_context(one_line_errors(WHOLE, debug, tell))
            meanwhile.enter_context(talking(quiet))
            with redirect_stdout(sys.stderr) if as_json else ExitStack():
                result = function(**options)
            seconds, most = time.monotonic() - began, memory.peak()
            if not as_json:
                result.show()
            elif is_first():
                _write(result.json() | {"seconds": round(seconds, 1), "memory": most})
            if is_first():
                say(f"{progress.duration(seconds)}, at most {memory.size(most)} of memory")
            if result.error:
                if not as_json:
                    complain(f"error: {result.error}")
                raise SystemExit(1)

    ours = {"debug": Debug, "quiet": Quiet, "as_json": Json}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=a) for name, a in ours.items()
    ]
    signature = inspect.signature(function)
    wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added], return_annotation=None
    )
    wrapped.__annotations__ = {**function.__annotations__, **ours, "return": None}
    return wrapped


class Commands(TyperGroup):
    """Commands whose wrong usage is told in lines without a frame, or as a JSON object where one is asked for.

    Options of earlier versions (``OLD``) go on working, with a note.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        given = [*args, options.pop("args", None)][0]
        words, notes = renamed(sys.argv[1:] if given is None else list(given))
        if not options.pop("standalone_mode", True):
            return super().main(words, standalone_mode=False, **options)
        in_json = "--json" in words
        if not in_json and not {"--quiet", "-q"} & set(words):
            for note in notes:
                complain(f"note: {note}")
        try:
            code = super().main(words, standalone_mode=False, **options)
        except typer.Abort:
            raise SystemExit(1) from None
        except Exception as error:
            if not hasattr(error, "format_message"):  # click's own errors, whatever package they come in
                raise
            if in_json:
                _write({"error": error.format_message()})
            else:
                error.show()  # type: ignore[attr-defined]
            code = error.exit_code  # type: ignore[attr-defined]
        raise SystemExit(code if isinstance(code, int) else 0)


def renamed(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command with today's names of its options, and a note for each that was called otherwise.

    >>> renamed(["scan", "--count=8", "--model", "babel"])
    (['scan', '--prompts=8', '--model', 'babel'], ['--count is called --prompts now'])
    """
    command, notes, now = words[0] if words else "", list[str](), list[str]()
    for word in words:
        option, equals, value = word.partition("=")
        name = OLD.get((command, option))
        if name is not None:
            notes.append(f"{option} is called {name} now")
        now.append(word if name is None else f"{name}{equals}{value}")
    return now, notes


def script(main: Callable[[], None], interrupted: str = "the same command goes on where it was") -> None:
    """Run the ``main`` of a study script with ``one_line_errors``, and show how far it is."""
    with one_line_errors(interrupted), talking(quiet=False):
        main()


def is_first() -> bool:
    """Whether this is the only process of the command, or the first of several (torchrun)."""
    return os.environ.get("RANK", "0") == "0"


def _write(entries: dict[str, Any]) -> None:
    typer.echo(json.dumps(entries))
