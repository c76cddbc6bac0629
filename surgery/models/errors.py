"""What is told when a model cannot be opened."""


class ModelError(ValueError):
    """A model that cannot be loaded or opened; the message says why and what to do instead."""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
