"""Errors of opening a model."""


class ModelError(ValueError):
    """A model that cannot be loaded or opened; the message says why and what to do instead."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop; the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
