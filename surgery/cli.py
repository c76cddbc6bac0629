"""The ``surgery`` command. Torch and the rest are imported when a command needs them, so that help is instant.

What all commands share, such as ``--json`` and the exit codes, is in ``surgery.console``.
"""

from pathlib import Path
from typing import Annotated

import typer

import surgery
from surgery import progress
from surgery.chapters import MEASURED
from surgery.compile_command import compile_
from surgery.console import WHOLE, Commands, Result, command, one_line_errors, say
from surgery.console import script as script
from surgery.graft_command import graft
from surgery.look_commands import list_, view
from surgery.models.precisions import PRECISIONS
from surgery.options import (
    EFFORT,
    INPUT,
    MACHINE,
    OUTPUT,
    BatchSize,
    Budget,
    Device,
    Dtype,
    Family,
    MaxLength,
    MaxTokens,
    Model,
    Names,
    Out,
    Probes,
    PromptCount,
    Prompts,
    Seed,
    StudyCluster,
    Within,
    Workers,
    choice,
    group,
)
from surgery.outside import shown
from surgery.preconditions import (
    require,
    require_asked,
    require_budget,
    require_free,
    require_study,
)
from surgery.scan.metrics import METRICS

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"surgery {surgery.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Measure how serial a language model's layers are, whether its stream reverts to a mean, what rewiring it does.

    Example: surgery study --model babel --out results
    """


ASK, CHANGE, LOOK = "Measure", "Change a model", "Look"  # groups of commands in the help


@app.command(rich_help_panel=ASK)
@command
def study(
    names: Names = None,
    model: Model = "babel",
    text: Prompts = None,
    probes: Probes = None,
    out: Out = Path("results"),
    prompts: PromptCount = 256,
    max_tokens: MaxTokens = 128,
    max_length: MaxLength = None,
    batch_size: BatchSize = 64,
    budget: Budget = None,
    cluster: StudyCluster = None,
    workers: Workers = None,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
) -> Result:
    """Measure a model within a budget of time: CSV files, figures, report.html.

    Run again on the same folder, it goes on where it was.

    Example: surgery study series --model ./my-model --text prompts.txt --out results
    Then: surgery view results
    """
    require_study(model, device, text, prompts, budget, probes)
    require_free(out)
    with progress.task("starting"):
        import torch

        from surgery import report
        from surgery import study as studies
        from surgery.scan.cluster import Cluster

    page = studies.run(
        names or MEASURED,
        model,
        text,
        out,
        prompts=prompts,
        max_tokens=max_tokens,
        max_length=max_length,
        probes=probes,
        batch_size=batch_size,
        budget=budget,
        cluster=Cluster(cluster or "local", workers) if cluster or workers else None,
        device=device,
        dtype=getattr(torch, dtype),
        seed=seed,
        say=say,
    )
    return Result(f"The page is {page}, the numbers and figures are beside it.", report.summary(out), page, out)


@app.command(rich_help_panel=ASK)
@command
def plan(
    names: Names = None,
    model: Model = "babel",
    text: Prompts = None,
    probes: Probes = None,
    prompts: PromptCount = 256,
    max_tokens: MaxTokens = 128,
    max_length: MaxLength = None,
    batch_size: BatchSize = 64,
    budget: Budget = None,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
) -> Result:
    """Print what a study would measure within a budget, how long it would take, and what it would leave out.

    Example: surgery plan --model ./my-model --text prompts.txt --budget 30m
    """
    require_study(model, device, text, prompts, budget, probes)
    with progress.task("starting"):
        import torch

        from surgery import study as studies

    made = studies.plan(
        names or MEASURED,
        model,
        text,
        prompts=prompts,
        max_tokens=max_tokens,
        max_length=max_length,
        probes=probes,
        batch_size=batch_size,
        budget=budget,
        device=device,
        dtype=getattr(torch, dtype),
        seed=seed,
        say=say,
    )
    return Result(str(made), more={"plan": made.json(), "cuts": made.cuts})


@app.command(rich_help_panel=LOOK)
@command
def check(model: Model = "babel", device: Device = None, dtype: Dtype = "float32") -> Result:
    """Prove that a model is opened exactly.

    Every way to run its layers is compared with its own logits.

    Example: surgery check --model babel
    """
    require(model, device)
    with progress.task(f"opening {shown(model)}"):
        import torch

        from surgery.models.loading import load
        from surgery.models.stack import Stack

        checks = Stack(load(model, device=device, dtype=getattr(torch, dtype))).checks()
    formats = {"largest_difference": "{:.1e}".format, "tolerance": "{:.0e}".format}
    failed = int((~checks["passed"]).sum())
    return Result(
        checks.to_string(index=False, formatters=formats),
        more={"checks": checks.to_dict("records")},
        error=f"{failed} of {len(checks)} checks failed: {model} is not opened exactly, do not measure it"
        * (failed > 0),
    )


@app.command(rich_help_panel=LOOK)
@command
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that surgery study or scan wrote.")],
) -> Result:
    """Write the figures and report.html again.

    They are made from the CSV files of a study or scan alone.

    Example: surgery report results
    """
    from surgery.report import build, summary

    page = build(folder)
    return Result(f"The page is {page}.", page=page, folder=folder, more={"verdicts": summary(folder)})


@app.command(rich_help_panel=ASK)
@command
def scan(
    model: Model = "babel",
    family: Family = "repeat",
    text: Prompts = None,
    probes: Probes = None,
    out: Out = Path("results/scan"),
    metric: Annotated[
        str | None,
        typer.Option(**choice(METRICS), help="What to measure on each probe: loglik, or loss of text.", **group[INPUT]),
    ] = None,
    prompts: Annotated[
        int,
        typer.Option(
            min=4,
            help="How many probes of a set, or prompts of a text, at most: half to search, half for the winners.",
            **group[EFFORT],
        ),
    ] = 256,
    share: Annotated[
        float | None,
        typer.Option(
            max=1,
            help="Part of a full scan to run, such as 0.15: the best are searched in rounds. All if not given.",
            **group[EFFORT],
        ),
    ] = None,
    budget: Within = None,
    top: Annotated[int, typer.Option(min=1, help="How many winners to measure again.", **group[EFFORT])] = 10,
    memory: Annotated[
        int | None, typer.Option(min=1, help="MiB to stay within; half of what is free.", **group[MACHINE])
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Scan on Ray workers: local, auto (what ray start began here), or an address.", **group[MACHINE]
        ),
    ] = None,
    workers: Workers = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Probes run at once, at most.", **group[MACHINE])
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            **choice(PRECISIONS),
            help="Of the search: bf16 is twice as fast; winners are always in float32. By default float32, or with a "
            "budget the faster one.",
            **group[MACHINE],
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    offload: Annotated[
        bool,
        typer.Option("--offload", help="Bring layers to the device only when they run.", **group[MACHINE]),
    ] = False,
    seed: Seed = 0,
) -> Result:
    """Scan every wiring of a family, and measure the winners again on fresh probes.

    Example: surgery scan --model babel --family repeat --probes babel --out results/scan
    """
    require(model, device)
    require_asked(model, text, probes, prompts)
    require_budget(budget)
    require_free(out)
    with progress.task("starting"):
        import torch

        from surgery.report import build
        from surgery.scan import study as scan_study
        from surgery.scan.cluster import Cluster

    outcome = scan_study.run(
        model,
        family,
        probes,
        out,
        text=text,
        metric=metric,
        count=prompts,
        share=share,
        budget=budget,
        top=top,
        seed=seed,
        memory=None if memory is None else memory * 2**20,
        batch_size=batch_size,
        precision=precision,
        device=device,
        dtype=getattr(torch, dtype),
        offload=offload,
        cluster=Cluster(cluster or "local", workers) if cluster or workers else None,
        say=say,
    )
    page = build(out)
    return Result(f"The page is {page}, the tables and figures are beside it.", outcome.sentences, page, out)


@app.command(rich_help_panel=CHANGE)
@command
def tape(
    wiring: Annotated[str, typer.Argument(help='The order in which the layers run, such as ":8 4:".')],
    out: Annotated[
        Path, typer.Option(help="Folder for the checkpoint; it must not exist or be empty.", **group[OUTPUT])
    ],
    model: Model = "babel",
    device: Device = None,
    dtype: Dtype = "float32",
) -> Result:
    """Make a wiring permanent: a checkpoint that Hugging Face opens by itself.

    Example: surgery tape ":8 4:" --model babel --out taped
    """
    from surgery.disk import require_empty

    require(model, device)
    require_empty(out)
    with progress.task(f"opening {shown(model)}"):
        import torch

        from surgery.models.loading import load
        from surgery.rebuild.tape import save, together

        folder = save(together(load(model, device=device, dtype=getattr(torch, dtype)), wiring), out)
    text = f"{folder} holds the taped model; its README.md says what was done."
    return Result(text, folder=folder, more={"model": str(folder)})


for name, function, panel in (
    ("graft", graft, CHANGE),
    ("compile", compile_, CHANGE),
    ("list", list_, LOOK),
    ("view", view, LOOK),
):
    app.command(name, rich_help_panel=panel)(command(function))


def main() -> None:
    with one_line_errors(WHOLE, debug=True):  # a command turns its own errors into sentences
        app(prog_name="surgery")
