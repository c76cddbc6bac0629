"""The options that several commands of ``surgery`` share, in groups, and choices among words. No torch in here."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery import plugins
from surgery.chapters import MEASURED
from surgery.corpus.probe_sets import NAMES
from surgery.models.names import BUNDLED, WHEELS
from surgery.training.precisions import WEIGHTS
from surgery.wiring import families


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


INPUT, EFFORT, MACHINE, OUTPUT = "What is measured", "How much", "Machine", "Output"  # groups of options in the help
group: dict[str, dict[str, Any]] = {name: {"rich_help_panel": name} for name in (INPUT, EFFORT, MACHINE, OUTPUT)}


def choice(choices: Sequence[str], more: Callable[[Sequence[str]], Sequence[str]] | None = None) -> dict[str, Any]:
    """The settings that make an option or argument a choice: checked, listed in the help, completed by the shell.

    ``more`` gives all choices where there are others than the help lists, those of installed packages: they are looked
    up when the option is used.
    """

    def every() -> Sequence[str]:
        return choices if more is None else more(choices)

    def completions(incomplete: str) -> list[str]:
        return [name for name in every() if name.startswith(incomplete)]

    def parse(text: str) -> str:
        return text if text in choices else require_choice(every(), text)

    return {"parser": parse, "metavar": f"[{'|'.join(choices)}]", "autocompletion": completions}


def of_packages(kind: str) -> Callable[[Sequence[str]], Sequence[str]]:
    """``more`` of a choice: what installed packages add to a kind (``surgery.plugins``)."""
    return lambda built_in: plugins.names(kind, built_in)


def complete_probes(incomplete: str) -> list[str]:
    """Names of probe sets; files are completed by their own names."""
    return [name for name in plugins.names("probes", NAMES) if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="babel (bundled), smollm2 (a wheel), a folder, a .gguf file, or a name on the hub.",
        autocompletion=lambda incomplete: [name for name in (*BUNDLED, *WHEELS) if name.startswith(incomplete)],
        **group[INPUT],
    ),
]
Probes = Annotated[
    str | None,
    typer.Option(
        help="What a scan asks: a probe set (surgery list probes), a .jsonl file of questions, or a .txt file of "
        "running text.",
        autocompletion=complete_probes,
        **group[INPUT],
    ),
]
Family = Annotated[
    str,
    typer.Option(
        **choice(families.NAMES, of_packages("families")),
        help="Which wirings: every span repeated, skipped and so on, or painters (surgery list families).",
        **group[INPUT],
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; by default the CPU.", **group[MACHINE])]
Dtype = Annotated[str, typer.Option(**choice(WEIGHTS), help="Number format of the weights.", **group[MACHINE])]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts run at once; fewer need less memory.", **group[MACHINE])]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Time to stay within: 90s, 10m, 2h, or none for everything. By default 10m; babel: none.", **group[EFFORT]
    ),
]
Within = Annotated[
    str | None,
    typer.Option(
        "--budget", help="Time to stay within: 90s, 10m, 2h, or none. By default nothing is cut.", **group[EFFORT]
    ),
]
StudyCluster = Annotated[
    str | None,
    typer.Option("--cluster", help="Run the scan on Ray workers: local, auto, or an address.", **group[MACHINE]),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="How many workers; on this machine if no --cluster is given.", **group[MACHINE]),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything drawn.", **group[EFFORT])]
Names = Annotated[
    list[str] | None,
    typer.Argument(
        **{
            **choice(MEASURED, of_packages("measures")),
            "metavar": " ".join(f"[{name}]" for name in MEASURED),
        },
        help="What to measure; these four if none is given (surgery list measures).",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help='Prompts: a text file, one a line, or .jsonl with a "text" a line. babel brings its own.',
        **group[INPUT],
    ),
]
PromptCount = Annotated[
    int,
    typer.Option("--prompts", min=1, help="How many prompts, the first of the file, at most.", **group[EFFORT]),
]
MaxTokens = Annotated[int, typer.Option(min=2, help="Cut prompts to this many tokens, or fewer.", **group[EFFORT])]
MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Longest window or span of layers; all if not given.", **group[EFFORT])
]
Out = Annotated[
    Path, typer.Option(help="Folder for the results; run again on the same one to resume.", **group[OUTPUT])
]
