"""What a command looks at before torch is imported: models, devices, prompts, budgets and folders that cannot be."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.console import is_first, say


def require(model: str, device: str | None) -> None:
    """Raise ModelError for a model or a device that cannot be, before torch is imported."""
    from surgery.models import names

    names.require(model)
    names.require_device(device)


def require_study(
    model: str, device: str | None, text: Path | None, prompts: int, budget: str | None, probes: str | None = None
) -> None:
    """Raise ValueError for what no study can be made of, before torch is imported."""
    from surgery.corpus.asked import require_prompts, require_questions

    require(model, device)
    require_prompts(model, text, prompts)
    if probes is not None:
        require_questions(model, probes, prompts)
    require_budget(budget)


def require_asked(model: str, text: Path | None, probes: str | None, prompts: int) -> None:
    """Raise ValueError where nobody said what a scan asks, or both ``--text`` and ``--probes`` do."""
    from surgery.corpus.asked import require_prompts, require_questions

    if text is None:
        require_questions(model, probes, prompts)
    elif probes is None:
        require_prompts(model, text, prompts)
    else:
        raise ValueError("a scan asks --probes, or scores --text: give one of them")


def require_budget(budget: str | None) -> None:
    """Raise ValueError for what is no budget of time, before torch is imported."""
    from surgery.planning.budget import seconds_of

    if budget is not None:
        seconds_of(budget)


def require_free(out: Path) -> None:
    """Raise OSError for a folder that cannot be written to, or that somebody else writes to, before it matters."""
    from surgery import disk

    with disk.held(out, main=is_first()):
        pass


@contextmanager
def page_when_interrupted(out: Path) -> Iterator[None]:
    """Context manager: after Ctrl-C, write the page of what was measured until then, if there is any."""
    try:
        yield
    except KeyboardInterrupt:
        from surgery.report import build

        with suppress(ValueError, OSError):
            say(f"the page of what there is so far is {build(out)}")
        raise
