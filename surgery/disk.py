r"""Files that appear whole or not at all, what killed processes leave behind, and folders that one process has alone.

Whatever is half-written has a name of its own, ``.NAME.PID-RANDOM.surgery.partial``, and is locked by the process that
writes it. The system undoes a lock when its process ends, however it ends and on whatever machine, so ``sweep`` can
tell what is left over from what somebody writes at this moment. ``held`` marks a folder in the same way.

Where the file system knows no locks, nothing is swept and nobody is refused. No name that is written to is followed if
it is a link: files under their final names replace a link, everything else refuses it.

>>> import tempfile
>>> out = folder(tempfile.mkdtemp())
>>> save({out / "a.txt": b"all of it"})
>>> [path.name for path in out.iterdir()]
['a.txt']
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import filelock
import psutil

_REASONS = {
    errno.ENOSPC: "there is no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "there is no permission",
    errno.EPERM: "there is no permission",
    errno.EROFS: "the disk is read-only",
    errno.ENOENT: "it does not exist",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "it is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ELOOP: "it is a link",
}
_ENDING = ".surgery.partial"
_WRITER = f".writer{_ENDING}"  # in a folder that somebody writes to
_OURS = re.compile(r"\.(?:.+\.)?(?:[0-9]+-[0-9a-f]{8}|writer)\.surgery\.partial", re.DOTALL)
_INSIDE = "lock"  # what is locked of a half-written folder
_LONGEST = 40  # characters of a name that are kept in the name of its partial
_PATIENCE = 0.25  # seconds: a sweep locks what it looks at for a moment
_DAY = 86_400
# What earlier versions left, which locked nothing: its process must be gone, and what names none must be old
_EARLIER = re.compile(
    r"\.(?:.+\.(?:csv|manifest\.json|png|html|safetensors)|latents\.json|trial|model)\.(?P<process>[0-9]{1,7})\.partial"
    r"|\.converting-\w{8}"
)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_guard = threading.RLock()
_holders: dict[tuple[int, int, int, str], int] = {}  # process and mark -> the thread that has it


class HeldError(OSError):
    """Another process, or another thread of this one, is writing there; the message names it."""


def reason(error: OSError) -> str:
    """Why the operating system refused, in words for a message.

    >>> reason(OSError(errno.ENOSPC, "No space left on device"))
    'there is no space left on the disk'
    """
    return _REASONS.get(error.errno or 0) or (error.strerror or str(error) or type(error).__name__).lower()


def save(files: Mapping[Path, bytes]) -> None:
    """Write all files completely or, if anything fails or interrupts, leave what was there before.

    Raises ``OSError`` with one sentence that names the file and the reason: a full disk, no permission, a folder in the
    way.
    """
    with ExitStack() as partials:
        written = {}
        for path, content in files.items():
            with _named(path):
                written[path], file = partials.enter_context(_partial(path))
                file.write(content)
                _flush(file)
        for path, partial in written.items():
            with _named(path):
                os.replace(partial, path)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Context manager: a file, open for writing and reading, that gets its name when all of it is on the disk.

    Raises ``OSError`` as ``save`` does. Whatever is raised, nothing half-written is left.
    """
    with _named(path), _partial(path) as (partial, file):
        yield file
        _flush(file)
        os.replace(partial, path)


@contextmanager
def workshop(target: Path) -> Iterator[Path]:
    """Context manager: an empty folder beside ``target``, to build it in and to rename.

    Afterwards all of it that was not renamed is removed; if this process is killed, the next workshop beside it does.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    while True:
        place = _partial_name(target)
        place.mkdir()
        descriptor = _open(place / _INSIDE, os.O_RDWR | os.O_CREAT)
        if _lock(descriptor) is not False and _is_there(place / _INSIDE, descriptor):
            break
        os.close(descriptor)  # somebody swept it before it was locked
    try:
        whole = place / "whole"
        whole.mkdir()
        yield whole
    finally:
        shutil.rmtree(place, ignore_errors=True)
        _unlock(descriptor)


def folder(path: str | Path) -> Path:
    """Make the folder if it is missing, sweep it, and check that it can be written to, before anything long is started.

    Raises ``OSError`` with one sentence if it cannot.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        sweep(path)
        with _partial(path / "trial") as (_, file):
            file.write(b"surgery")
            file.flush()
    except OSError as error:
        raise OSError(f"cannot write to the folder {path}: {reason(error)}; choose another one") from error
    return path


def require_empty(folder: Path) -> None:
    """Raise FileExistsError for what is there and not an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not an empty folder: nothing was overwritten; choose another one"
        )


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder, and nothing that anybody else put there."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            earlier = _EARLIER.fullmatch(name)
            if earlier or _OURS.fullmatch(name):
                with contextlib.suppress(OSError):
                    _discard(Path(folder, name), earlier)


@contextmanager
def held(path: str | Path, *, main: bool = True) -> Iterator[Path]:
    """Context manager: a folder, as ``folder`` makes it, that nobody else may hold until the end.

    The thread that holds a folder may hold it again. A process that is killed holds nothing any more. Of several
    processes that share one run (torchrun), the ``main`` one holds the folder, and the others only make it.

    Raises ``HeldError`` at once if another process or thread holds it, ``OSError`` as ``folder`` does.
    """
    path = folder(path)
    with _alone(path, path / _WRITER) if main else contextlib.nullcontext():
        yield path


@contextmanager
def held_file(path: Path) -> Iterator[None]:
    """Context manager: a file, there or not, that nobody else may hold until the end; raises as ``held`` does."""
    with _alone(path, path.with_name(f".{_short(path.name)}{_WRITER}")):
        yield


def append(path: Path, content: bytes, *, keep: int | None = None) -> None:
    """Write ``content`` behind what a file holds, or behind its first ``keep`` bytes, and flush it to the disk.

    Raises ``OSError`` for a file that is a link, has several names, or, without ``keep``, is not there.
    """
    descriptor = _open(path, os.O_RDWR | (os.O_CREAT if keep == 0 else 0))
    with open(descriptor, "r+b") as file:
        if keep is not None:
            file.truncate(keep)
        file.seek(0, os.SEEK_END)
        file.write(content)
        _flush(file)


def content_of(path: Path) -> bytes:
    """All bytes of a file that this package appends to. Raises ``OSError`` as ``append`` does."""
    with open(_open(path, os.O_RDONLY), "rb") as file:
        return file.read()


# --- inside ----------------------------------------------------------------------------------------------------------


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say of every refusal which file could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {reason(error)}") from error


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{_short(path.name)}.{os.getpid()}-{secrets.token_hex(4)}{_ENDING}")


def _short(name: str) -> str:
    """A name that stays short enough with more put before and behind it, and other than those of other names."""
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}-{digest}"


@contextmanager
def _partial(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside ``path``, locked, and its name; it is removed afterwards unless it was renamed."""
    while True:
        partial = _partial_name(path)
        descriptor = _open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        if _lock(descriptor) is not False and _is_there(partial, descriptor):
            break
        os.close(descriptor)  # somebody swept it before it was locked
    file = open(descriptor, "w+b")  # noqa: SIM115
    try:
        yield partial, file
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
        with contextlib.suppress(OSError):  # what could not be written cannot be written on closing either
            file.close()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _open(path: Path, flags: int) -> int:
    """Open a plain file without following a link. Raises ``OSError``, ``ELOOP`` for a link or a second name."""
    descriptor = os.open(path, flags | _NO_LINK, 0o666)
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return descriptor


def _lock(descriptor: int) -> bool | None:
    """Lock an open file for as long as it is open: whether that worked, None where there are no locks."""
    try:
        return filelock.lock_descriptor(descriptor, blocking=False)
    except OSError:
        return None


def _unlock(descriptor: int) -> None:
    """Close a locked file. It is unlocked first, since forked processes may still have it open."""
    with contextlib.suppress(OSError):
        filelock.unlock_descriptor(descriptor)
    os.close(descriptor)


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _discard(path: Path, earlier: "re.Match[str] | None") -> None:
    """Remove a half-written file or folder if nobody is writing it. Raises ``OSError`` where that cannot be known."""
    about = os.lstat(path)
    is_folder = stat.S_ISDIR(about.st_mode)
    if earlier:
        process = earlier["process"]
        if psutil.pid_exists(int(process)) if process else time.time() - about.st_mtime < _DAY:
            return
    descriptor = _open(path / _INSIDE, os.O_RDWR | os.O_CREAT) if is_folder else _open(path, os.O_RDWR)
    try:
        if _lock(descriptor) and _is_there(path / _INSIDE if is_folder else path, descriptor):
            shutil.rmtree(path, ignore_errors=True) if is_folder else path.unlink()
    finally:
        os.close(descriptor)


@contextmanager
def _alone(what: Path, mark: Path) -> Iterator[None]:
    """Hold a file or folder by the locked file ``mark``, which says who does."""
    about = os.stat(mark.parent)
    key, me = (os.getpid(), about.st_dev, about.st_ino, mark.name), threading.get_ident()
    with _guard:
        nested = _holders.get(key) == me
        if not nested:
            if key in _holders:
                raise HeldError(f"another thread of this process is writing to {what}: wait, or choose another place")
            descriptor = _claim(what, mark)
            _holders[key] = me
    if nested:
        yield
        return
    try:
        yield
    finally:
        with _guard:
            del _holders[key]
            with contextlib.suppress(OSError):
                mark.unlink()
            _unlock(descriptor)


def _claim(what: Path, mark: Path) -> int:
    """The open and locked file ``mark``. Raises HeldError if it stays locked."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            descriptor = _open(mark, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise OSError(f"cannot write {mark}: {reason(error)}; remove it, or choose another place") from error
        locked = _lock(descriptor)
        if locked is not False and _is_there(mark, descriptor):
            break
        with open(descriptor, "rb") as file:
            holder = file.read(200).decode(errors="replace").strip() or "another process"
        if locked is False and time.monotonic() > until:
            raise HeldError(f"{holder} is writing to {what}: wait until it is done, or choose another place")
        time.sleep(0.01)
    with contextlib.suppress(OSError):  # a full disk: then nobody is named
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
