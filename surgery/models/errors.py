"""Errors of opening a model, and of what libraries raise on the files of one."""

from collections.abc import Iterator
from contextlib import contextmanager

from surgery.outside import shown

LONGEST = 400  # characters of a library's message


class ModelError(ValueError):
    """A model that cannot be loaded or opened; the message says why and what to do instead."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, printable and without a full stop; the name of its class if it has none."""
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0], LONGEST).rstrip(".")


def is_failure(error: BaseException) -> bool:
    """Whether a library failed, rather than somebody ending the program.

    A panic in a library written in Rust (tokenizers, safetensors) is no ``Exception``; its class has no public name.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def as_model_error(what: str) -> Iterator[None]:
    """Context manager: whatever a library raises on files from outside is a ModelError, ``what: its first line``."""
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ModelError(f"{what}: {first_line(error)}") from error
