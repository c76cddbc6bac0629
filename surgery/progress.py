"""How far a long run is, on standard error: ``with progress.task("windows", 40) as advance: ... advance()``.

A terminal shows a bar for every open task and how much time is left; anything else, such as a log file, gets a line of
text every ``EVERY`` seconds and one at the end of a task that lasted so long. All tasks of a process share the display,
so a study shows the whole above its part. Whoever runs a program says once whether anything is shown::

    with progress.shown(True):
        surgery.series.windows(stack, tokens)

Without it, as in a library, only tasks that were asked for (``progress=True``) are. Any thread may advance a task. A
standard error that is closed, or a log on a full disk, ends the display and never the run. Cost of a step: a lock and
an addition, about 0.3 us.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

EVERY = 30.0  # seconds between lines in a log
BLINK = 0.2  # seconds between drawings on a terminal
WIDTH = 30  # characters of a bar
_shown: ContextVar[bool | None] = ContextVar("shown", default=None)  # None: nobody has said


class Advance(Protocol):
    """Tell that so many ``steps`` are done, with a ``note`` to show beside them.

    Steps that cost nothing, because an earlier run did them, are ``free``: the time left is not judged by them.
    """

    def __call__(self, steps: int = 1, note: str = "", *, free: bool = False) -> None: ...


@contextmanager
def shown(on: bool) -> Iterator[None]:
    """Context manager: show all tasks of this thread, or none, whatever they were asked.

    >>> with shown(False), task("windows", 2, show=True) as advance:
    ...     advance()
    """
    before = _shown.set(on)
    try:
        yield
    finally:
        _shown.reset(before)


@contextmanager
def task(what: str, total: int | None = None, show: bool = False) -> Iterator[Advance]:
    """Context manager: a function to call as the ``total`` steps of a task are done; None if nobody knows how many.

    ``show`` shows it where nobody decided by ``shown``.

    >>> with task("windows", 2) as advance:
    ...     advance()
    """
    decided = _shown.get()
    if not (show if decided is None else decided):
        yield _nothing
        return
    ours = _Task(what, total)
    try:
        _STDERR.open(ours)
        yield ours.advance
    finally:
        _STDERR.close(ours)


def track(values: Iterable[Any], what: str, total: int, show: bool = False) -> Iterator[Any]:
    """Yield ``values``, each of them a step of a ``task``.

    >>> list(track("ab", "letters", 2))
    ['a', 'b']
    """
    with task(what, total, show) as advance:
        for value in values:
            yield value
            advance()


def duration(seconds: float) -> str:
    """A length of time in words.

    >>> duration(4.4), duration(80), duration(700), duration(9000)
    ('4 s', '80 s', '12 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _nothing(steps: int = 1, note: str = "", *, free: bool = False) -> None:
    """The steps of a task that is not shown."""


class _Task:
    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.note = what, total, ""
        self.done = self.free = 0
        self.began, self.told = time.monotonic(), False
        self._lock = threading.Lock()

    def advance(self, steps: int = 1, note: str = "", *, free: bool = False) -> None:
        with self._lock:
            self.done += steps
            self.free += steps if free else 0
            self.note = note

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def far(self) -> str:
        """How far it is: ``120 of 400 (30 %)``."""
        return "" if not self.total else f"{self.done:,} of {self.total:,} ({self.done / self.total:.0%})"

    @property
    def left(self) -> str:
        """How much time is left, if it goes on as it went."""
        paid = self.done - self.free
        if not self.total or paid <= 0:
            return f"{duration(self.seconds)} so far"
        return f"{duration(self.seconds / paid * max(self.total - self.done, 0))} left"

    def line(self) -> str:
        return f"{self.what}: {', '.join(part for part in (self.far, self.left, self.note) if part)}"

    def end(self) -> str:
        whole = not self.total or self.done >= self.total
        return f"{self.what}: {'done' if whole else 'ended at ' + self.far} after {duration(self.seconds)}"


class _Unbreakable:
    """A standard error that may be missing, closed, or on a full disk: what cannot be written is lost."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return bool(self._try("isatty"))

    def fileno(self) -> int:
        return int(self.file.fileno())

    @property
    def encoding(self) -> str:
        return getattr(self.file, "encoding", None) or "utf-8"

    def _try(self, name: str, *arguments: str) -> Any:
        try:
            return getattr(self.file, name)(*arguments)
        except (OSError, ValueError, AttributeError):  # full or gone, closed or of another encoding, missing
            return None


class _Display:
    """The display of a process: it begins with the first task and ends with the last."""

    def __init__(self) -> None:
        self.tasks: list[_Task] = []
        self._lock, self._ending = threading.RLock(), ExitStack()

    def open(self, task: _Task) -> None:
        with self._lock:
            self.tasks.append(task)
            if len(self.tasks) == 1:
                self._begin()

    def close(self, task: _Task) -> None:
        """Forget the task, and restore standard error after the last; nothing for a task that was never opened."""
        with self._lock:
            if task not in self.tasks:
                return
            self.tasks.remove(task)
            try:
                if not self.tasks:
                    self._ending.close()
            finally:
                if task.told:
                    self._say(task.end())

    def _begin(self) -> None:
        self._file = _Unbreakable(sys.stderr)
        console, over = Console(file=self._file, highlight=False), threading.Event()  # type: ignore[arg-type]
        with ExitStack() as ending:
            show, pause = self._lines, EVERY
            if console.is_terminal and not console.is_dumb_terminal:
                both = sys.stdout is not None and sys.stdout.isatty()  # what is printed must not go elsewhere
                live = Live(
                    get_renderable=self._table,
                    console=console,
                    auto_refresh=False,
                    transient=True,
                    redirect_stdout=both,
                )
                ending.callback(live.stop)
                live.start()
                show, pause = live.refresh, BLINK
            drawing = threading.Thread(target=_draw, args=(show, pause, over), name="progress", daemon=True)
            ending.callback(over.set)
            drawing.start()
            self._ending = ending.pop_all()

    def _lines(self) -> None:
        """What a log is told."""
        tasks = list(self.tasks)
        for task in tasks:
            task.told = True
        if tasks:
            self._say("; ".join(task.line() for task in tasks))

    def _say(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for task in list(self.tasks):
            bar = ProgressBar(task.total, min(task.done, task.total or 0), WIDTH, pulse=not task.total)
            table.add_row(Text(task.what), bar, *map(Text, (task.far, task.left, task.note)))
        return table


def _draw(show: Callable[[], None], pause: float, over: threading.Event) -> None:
    """Show the display again and again until it is over."""
    while not over.wait(pause):
        show()


_STDERR = _Display()
