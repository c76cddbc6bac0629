"""``surgery compile``, as the command line sees it. Torch is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from surgery import progress
from surgery.compiler.ways import WAYS
from surgery.console import Result, say
from surgery.models.precisions import PRECISIONS
from surgery.options import EFFORT, INPUT, MACHINE, Device, Dtype, MaxTokens, Model, Out, choice, complete_probes, group
from surgery.preconditions import require, require_free
from surgery.scan.metrics import METRICS

SEARCH, HEALING, TIMING = "The search", "Healing", "Timing"  # groups of its own options in the help


def compile_(
    model: Model = "babel",
    allow: Annotated[
        float,
        typer.Option(
            min=0, help="Loss that may be added: nats per token of text, or what the metric counts.", **group[EFFORT]
        ),
    ] = 0.01,
    out: Out = Path("results/compile"),
    probes: Annotated[
        str | None,
        typer.Option(
            help="What to judge by: a .txt file of running text, a .jsonl file of questions, or a built-in set. By "
            "default Python's manual; babel brings its own.",
            autocompletion=complete_probes,
            **group[INPUT],
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(**choice(METRICS), help="What may be lost: loss of text, or loglik of answers.", **group[INPUT]),
    ] = None,
    prompts: Annotated[int, typer.Option(min=12, help="How many texts or questions, in all.", **group[EFFORT])] = 192,
    max_tokens: MaxTokens = 48,
    shallowest: Annotated[
        int | None,
        typer.Option(min=1, help="Stop at so few layers in a row; half of them by default.", rich_help_panel=SEARCH),
    ] = None,
    limit: Annotated[
        float, typer.Option(min=0, help="Stop where the best diverges by more than this.", rich_help_panel=SEARCH)
    ] = 0.5,
    beam: Annotated[int, typer.Option(min=1, help="Wirings that go on from each depth.", rich_help_panel=SEARCH)] = 2,
    screen: Annotated[int, typer.Option(min=1, help="Moves that each of them tries.", rich_help_panel=SEARCH)] = 6,
    precision: Annotated[
        str,
        typer.Option(
            **choice(PRECISIONS), help="Of the search; what it finds is measured in float32.", **group[MACHINE]
        ),
    ] = "float32",
    branches: Annotated[
        bool,
        typer.Option(
            help="Search whole layers, chains and halves of layers side by side too; 4 times as long.",
            rich_help_panel=SEARCH,
        ),
    ] = False,
    heal: Annotated[
        list[str] | None,
        typer.Option(
            **choice([way.replace(" ", "-") for way in WAYS]),
            help="Heal what is compiled, on texts of its own; can be given twice.",
            rich_help_panel=HEALING,
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=0, help="How often every model is timed; 0 times none.", rich_help_panel=TIMING)
    ] = 9,
    torch_compile: Annotated[
        bool, typer.Option(help="Time every model through torch.compile too.", rich_help_panel=TIMING)
    ] = False,
    device: Device = None,
    dtype: Dtype = "float32",
) -> Result:
    """Run layers side by side where that costs little: search, confirm on fresh texts, fuse, save, time.

    Example: surgery compile --model babel --allow 0.01 --out results/compile
    """
    from surgery.corpus.asked import require_questions

    require(model, device)
    if probes is not None:
        require_questions(model, probes, prompts)
    require_free(out)
    with progress.task("starting"):
        import torch

        from surgery.compiler import search
        from surgery.compiler import study as compiler_study
        from surgery.report import build

    compiled = compiler_study.run(
        model,
        out,
        asked=probes,
        allow=allow,
        metric=metric,
        prompts=prompts,
        max_tokens=max_tokens,
        shallowest=shallowest,
        limit=limit,
        beam=beam,
        screen=screen,
        precision=precision,
        families=tuple(search.FAMILIES) if branches else search.FUSED,
        ways=tuple(way.replace("-", " ") for way in heal or ()),
        rounds=rounds,
        torch_compile=torch_compile,
        speak=say,
        device=device,
        dtype=getattr(torch, dtype),
    )
    page = build(out)
    where = f"{compiled.folder} holds the compiled model. " if compiled.folder else ""
    said = f"{where}The page is {page}, the tables and the figure are beside it."
    more = {"model": str(compiled.folder)} if compiled.folder else {}
    return Result(said, compiled.sentences, page, out, more)
