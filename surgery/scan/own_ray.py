"""A Ray of one process alone: only this machine can reach it, and nothing of it stays, however the process ends.

Ray by itself listens on every address of the machine; its signal handler turns SIGTERM into a stack trace and an abort;
and where whoever began it is killed, two of its agents live on. So here it gets the loopback address, a folder of its
own, and a watcher: this module, run as a program, waits until its standard input ends, which it does with the process
that holds the other end, kills what is left of that Ray, and removes the folder.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

PREFIX = "surgery-ray-"
TERMINATED = 128 + signal.SIGTERM
_PATIENCE = 10  # seconds


@contextmanager
def begun(ray: Any, **options: Any) -> Iterator[None]:
    """A Ray on the loopback address, with ``options`` of ``ray.init``; shut down at the end.

    Warns if this version of Ray listens elsewhere all the same. Cost: some 5 seconds, and a second to end.
    """
    place = os.environ.get("RAY_TMPDIR") or ("/tmp" if os.name == "posix" else None)  # sockets need a short path
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=place)
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    watcher = subprocess.Popen(
        [sys.executable, "-m", "surgery.scan.own_ray", folder, str(os.getpid()), str(Path(ray.__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
        start_new_session=True,  # a signal to the group of this process is not for it
    )
    try:
        with _loopback():
            ray.init("local", _temp_dir=folder, include_dashboard=False, **options)
        address = ray.nodes()[0]["NodeManagerAddress"]
        if address not in ("127.0.0.1", "::1"):
            warnings.warn(f"this Ray listens on {address}: whoever reaches that can run code here", stacklevel=4)
        yield
    finally:
        try:
            ray.shutdown()
        finally:
            assert watcher.stdin is not None
            watcher.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                watcher.wait(_PATIENCE)


@contextmanager
def terminable() -> Iterator[Callable[[], None]]:
    """Keep the handler of SIGTERM, which ``ray.init`` replaces: call what this yields after it.

    Where there was none, SystemExit(143) is raised in the main thread, so that what was begun is ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGTERM)
    ours = before if callable(before) else _end
    try:
        yield lambda: _set(ours)
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        ours(signal.SIGTERM, None)  # that was Ray's handler, while it began
        raise
    finally:
        _set(signal.SIG_DFL if before is None else before)


def processors() -> int:
    """How many processors this process may use: those of the machine, of its affinity and of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no container, or one without a limit, which reads "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, max(1, quota // period))
    return count


def _set(handler: Any) -> None:
    signal.signal(signal.SIGTERM, handler)


def _end(number: int, frame: Any) -> None:
    raise SystemExit(TERMINATED)


@contextmanager
def _loopback() -> Iterator[None]:
    """Ray's switch for machines whose firewall would ask: it takes the loopback address then, and listens on that."""
    constants: Any = importlib.import_module("ray._private.ray_constants")
    before = getattr(constants, "ENABLE_RAY_CLUSTER", True)
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def _watch(folder: str, parent: int, package: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    quiet = 0
    while quiet < 2:  # what is just being started opens its files a moment later
        left = [
            process for process in psutil.process_iter() if _is_of(process, folder, package) and process.pid != parent
        ]
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        quiet = 0 if psutil.wait_procs(left, timeout=1)[0] else quiet + 1
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def _is_of(process: psutil.Process, folder: str, package: str) -> bool:
    """Whether it is a part of the Ray of this folder: Ray's by its command line, and with a file of the folder open."""
    try:
        command = " ".join(process.cmdline())
        ours = command.startswith("ray::") or package in command
        return ours and any(file.path.startswith(folder) for file in process.open_files())
    except (psutil.Error, OSError):
        return False


if __name__ == "__main__":
    _watch(sys.argv[1], int(sys.argv[2]), sys.argv[3])
