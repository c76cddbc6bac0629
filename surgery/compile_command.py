"""``surgery compile``, as the command line sees it. Torch is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from surgery import progress
from surgery.compiler.ways import WAYS
from surgery.console import Result, say
from surgery.models.precisions import PRECISIONS
from surgery.options import Device, Dtype, MaxTokens, Model, choice
from surgery.preconditions import require, require_free
from surgery.scan.metrics import METRICS


def compile_(
    model: Model = "babel",
    allow: Annotated[
        float, typer.Option(min=0, help="Loss that may be added: nats per token of text, or what the metric counts.")
    ] = 0.01,
    out: Annotated[Path, typer.Option(help="Folder for everything; run again on the same one to resume.")] = Path(
        "results/compile"
    ),
    probes: Annotated[
        str | None,
        typer.Option(
            help="What to judge by: a .txt file of running text, a .jsonl file of questions, or a built-in set. By "
            "default Python's manual; babel brings its own."
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(**choice(METRICS), help="What may be lost: loss of text, or loglik of answers.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=12, help="How many texts or questions, in all.")] = 192,
    max_tokens: MaxTokens = 48,
    shallowest: Annotated[
        int | None, typer.Option(min=1, help="Stop at so few layers in a row; half of them by default.")
    ] = None,
    limit: Annotated[float, typer.Option(min=0, help="Stop where the best diverges by more than this.")] = 0.5,
    beam: Annotated[int, typer.Option(min=1, help="Wirings that go on from each depth.")] = 2,
    screen: Annotated[int, typer.Option(min=1, help="Moves that each of them tries.")] = 6,
    precision: Annotated[
        str, typer.Option(**choice(PRECISIONS), help="Of the search; what it finds is measured in float32.")
    ] = "float32",
    branches: Annotated[
        bool, typer.Option(help="Search whole layers, chains and halves of layers side by side too; 4 times as long.")
    ] = False,
    heal: Annotated[
        list[str] | None,
        typer.Option(
            **choice([way.replace(" ", "-") for way in WAYS]),
            help="Heal what is compiled, on texts of its own; can be given twice.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="How often every model is timed; 0 times none.")] = 9,
    torch_compile: Annotated[bool, typer.Option(help="Time every model through torch.compile too.")] = False,
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
