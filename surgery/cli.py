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
from surgery.graft.parts import PARTS
from surgery.models.precisions import PRECISIONS
from surgery.options import (
    BatchSize,
    Budget,
    Device,
    Dtype,
    MaxLength,
    MaxTokens,
    Model,
    Names,
    PromptCount,
    Prompts,
    StudyCluster,
    Within,
    Workers,
    choice,
)
from surgery.outside import shown
from surgery.preconditions import page_when_interrupted, require, require_budget, require_free, require_study
from surgery.scan.metrics import METRICS
from surgery.training.precisions import MIXED, STORED, TRAINED
from surgery.wiring import families

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
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


@app.command()
@command
def study(
    names: Names = None,
    model: Model = "babel",
    text: Prompts = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; run again on the same one to resume.")] = Path(
        "results"
    ),
    prompts: PromptCount = 256,
    max_tokens: MaxTokens = 128,
    max_length: MaxLength = None,
    batch_size: BatchSize = 64,
    budget: Budget = None,
    cluster: StudyCluster = None,
    workers: Workers = None,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything drawn.")] = 0,
) -> Result:
    """Measure a model within a budget of time: CSV files, figures, report.html.

    Run again on the same folder, it goes on where it was.

    Example: surgery study series --model ./my-model --text prompts.txt --out results
    """
    require_study(model, device, text, prompts, budget)
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
        batch_size=batch_size,
        budget=budget,
        cluster=Cluster(cluster or "local", workers) if cluster or workers else None,
        device=device,
        dtype=getattr(torch, dtype),
        seed=seed,
        say=say,
    )
    return Result(f"The page is {page}, the numbers and figures are beside it.", report.summary(out), page, out)


@app.command()
@command
def plan(
    names: Names = None,
    model: Model = "babel",
    text: Prompts = None,
    prompts: PromptCount = 256,
    max_tokens: MaxTokens = 128,
    max_length: MaxLength = None,
    batch_size: BatchSize = 64,
    budget: Budget = None,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything drawn.")] = 0,
) -> Result:
    """Print what a study would measure within a budget, how long it would take, and what it would leave out.

    Example: surgery plan --model ./my-model --text prompts.txt --budget 30m
    """
    require_study(model, device, text, prompts, budget)
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
        batch_size=batch_size,
        budget=budget,
        device=device,
        dtype=getattr(torch, dtype),
        seed=seed,
        say=say,
    )
    return Result(str(made), more={"plan": made.json(), "cuts": made.cuts})


@app.command()
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


@app.command()
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


@app.command()
@command
def scan(
    model: Model = "babel",
    family: Annotated[
        str,
        typer.Option(
            **choice(families.NAMES), help="Which wirings: every span repeated, skipped and so on, or painters."
        ),
    ] = "repeat",
    probes: Annotated[
        str | None,
        typer.Option(
            help="What to ask: a built-in set (arithmetic, recall, ...), a .jsonl file of questions, or .txt for "
            "running text. babel brings its own."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; run again on the same one to resume.")] = Path(
        "results/scan"
    ),
    metric: Annotated[
        str | None, typer.Option(**choice(METRICS), help="What to measure on each probe: loglik, or loss of text.")
    ] = None,
    count: Annotated[int, typer.Option(min=4, help="How many probes of a built-in set, both halves together.")] = 256,
    share: Annotated[
        float | None,
        typer.Option(
            max=1, help="Part of a full scan to run, such as 0.15: the best are searched in rounds. All if not given."
        ),
    ] = None,
    budget: Within = None,
    top: Annotated[int, typer.Option(min=1, help="How many winners to measure again.")] = 10,
    memory: Annotated[int | None, typer.Option(min=1, help="MiB to stay within; half of what is free.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Scan on Ray workers: local, auto (what ray start began here), or an address.")
    ] = None,
    workers: Workers = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Probes run at once, at most.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            **choice(PRECISIONS),
            help="Of the search: bf16 is twice as fast; winners are always in float32. By default float32, or with a "
            "budget the faster one.",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    offload: Annotated[bool, typer.Option("--offload", help="Bring layers to the device only when they run.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything drawn.")] = 0,
) -> Result:
    """Scan every wiring of a family, and measure the winners again on fresh probes.

    Example: surgery scan --model babel --family repeat --probes babel --out results/scan
    """
    from surgery.corpus.asked import require_questions

    require(model, device)
    require_questions(model, probes, count)
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
        metric=metric,
        count=count,
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


@app.command()
@command
def tape(
    wiring: Annotated[str, typer.Argument(help='The order in which the layers run, such as ":8 4:".')],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; it must not exist or be empty.")],
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


@app.command()
@command
def graft(
    model: Model = "babel",
    middle: Annotated[str, typer.Option(help="The layers to replace, start:stop.")] = "4:9",
    out: Annotated[Path, typer.Option(help="Folder for everything; run again on the same one to resume.")] = Path(
        "results/graft"
    ),
    text: Annotated[
        Path | None, typer.Option(help="Prompts to learn from, one a line or .jsonl. babel brings its own.")
    ] = None,
    heldout: Annotated[
        Path | None, typer.Option(help="Prompts to be judged on; the last tenth of --text if not given.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="How many prompts to learn from.")] = 20_000,
    judged: Annotated[int, typer.Option(min=1, help="How many held-out prompts, at most.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=2, help="Cut prompts to this many tokens.")] = 128,
    depth: Annotated[int | None, typer.Option(min=1, help="Layers of the new middle; as many as before.")] = None,
    d_mlp: Annotated[int | None, typer.Option(min=1, help="Its MLP width; as before.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Its attention heads; as before.")] = None,
    d_model: Annotated[
        int | None, typer.Option(min=1, help="Width of the stream between its layers; as before.")
    ] = None,
    old: Annotated[float, typer.Option(min=0, max=1, help="Share of the old weights it starts from.")] = 0.0,
    latent: Annotated[float, typer.Option(min=0, help="Factor of the unexplained share of the update.")] = 1.0,
    kl: Annotated[float, typer.Option(min=0, help="Factor of the divergence from the original's logits.")] = 0.0,
    cross_entropy: Annotated[float, typer.Option(min=0, help="Factor of the cross entropy.")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1000,
    batch: Annotated[
        int, typer.Option("--batch", "--batch-size", min=1, help="Prompts a step, of all processes together.")
    ] = 64,
    learning_rate: Annotated[float, typer.Option(min=1e-9, help="Largest learning rate.")] = 2e-3,
    every: Annotated[int, typer.Option(min=1, help="Steps between evaluations, each with a checkpoint.")] = 100,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many evaluations in vain.")] = None,
    precision: Annotated[str, typer.Option(**choice(MIXED), help="Mixed precision.")] = "no",
    heal: Annotated[int, typer.Option(min=0, help="Steps of a last phase with more unfrozen.")] = 0,
    unfrozen: Annotated[
        str, typer.Option(**choice(PARTS[1:]), help="In that phase: junction (one layer more) or all.")
    ] = "junction",
    budget: Within = None,
    stored: Annotated[str, typer.Option(**choice(STORED), help="Activations on disk.")] = "float16",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(**choice(TRAINED), help="Number format of the weights.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything drawn.")] = 0,
) -> Result:
    """Train a fresh middle on the activations between frozen ends, and compare it with what is simpler.

    On several GPUs: accelerate launch -m surgery graft ... In several CPU processes: torchrun.

    Example: surgery graft --model babel --middle 4:9 --steps 600 --out results/graft
    """
    from surgery.corpus.asked import require_prompts

    span = _span(middle)
    require(model, device)
    require_budget(budget)
    require_prompts(model, text, prompts)
    if heldout is not None:
        require_prompts(model, heldout, judged)
    require_free(out)
    with progress.task("starting"):
        import torch

        from surgery.graft import study as graft_study
        from surgery.graft.grafting import Objective, Schedule
        from surgery.report import build

    with page_when_interrupted(out):
        outcome = graft_study.run(
            model,
            span,
            out,
            text=text,
            heldout=heldout,
            count=prompts,
            judged=judged,
            max_tokens=max_tokens,
            depth=depth,
            d_mlp=d_mlp,
            n_heads=heads,
            d_model=d_model,
            old=old,
            objective=Objective(latent, kl, cross_entropy),
            schedule=Schedule(
                steps=steps,
                batch=batch,
                learning_rate=learning_rate,
                every=every,
                patience=patience,
                precision=precision,
                seed=seed,
            ),
            heal=heal,
            parts=unfrozen,
            budget=budget,
            dtype=getattr(torch, stored),
            weights=getattr(torch, dtype),
            device=device,
            say=say,
        )
    if not outcome.sentences:  # the first of several processes tells them
        return Result("")
    page, place = build(out), out / "training" / "model"
    said = f"{place} holds the grafted model.\nThe page is {page}, the tables and the figure are beside it."
    told = [outcome.plan.told] if outcome.plan and outcome.plan.cuts else []
    return Result(said, outcome.sentences + told, page, out, {"model": str(place)})


app.command("compile")(command(compile_))


def _span(text: str) -> tuple[int, int]:
    start, _, stop = text.partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise typer.BadParameter(f"--middle is start:stop, such as 4:9, got {text!r}.")
    return int(start), int(stop)


def main() -> None:
    with one_line_errors(WHOLE, debug=True):  # a command turns its own errors into sentences
        app(prog_name="surgery")
