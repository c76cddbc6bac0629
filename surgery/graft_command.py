"""``surgery graft``, as the command line sees it. Torch is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from surgery import progress
from surgery.console import Result, say
from surgery.graft.parts import PARTS
from surgery.options import EFFORT, INPUT, MACHINE, OUTPUT, Model, Seed, Within, choice, group
from surgery.preconditions import page_when_interrupted, require, require_budget, require_free
from surgery.training.precisions import MIXED, STORED, TRAINED

NEW, LOSS, TRAINING = "The new middle", "The loss", "Training"  # groups of options of graft


def graft(
    model: Model = "babel",
    middle: Annotated[
        str | None,
        typer.Option(
            help="The layers to replace, start:stop; by default from a third to three quarters of the depth, 4:9 of "
            "12 layers.",
            **group[INPUT],
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for everything; run again on the same one to resume.", **group[OUTPUT])
    ] = Path("results/graft"),
    text: Annotated[
        Path | None,
        typer.Option(help="Prompts to learn from, one a line or .jsonl. babel brings its own.", **group[INPUT]),
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(help="Prompts to be judged on; the last tenth of --text if not given.", **group[INPUT]),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="How many prompts to learn from.", **group[EFFORT])] = 20_000,
    heldout_prompts: Annotated[
        int, typer.Option(min=1, help="How many prompts to be judged on, at most.", **group[EFFORT])
    ] = 512,
    max_tokens: Annotated[int, typer.Option(min=2, help="Cut prompts to this many tokens.", **group[EFFORT])] = 128,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Layers of the new middle; as many as before.", rich_help_panel=NEW)
    ] = None,
    d_mlp: Annotated[int | None, typer.Option(min=1, help="Its MLP width; as before.", rich_help_panel=NEW)] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Its attention heads; as before.", rich_help_panel=NEW)
    ] = None,
    d_model: Annotated[
        int | None,
        typer.Option(min=1, help="Width of the stream between its layers; as before.", rich_help_panel=NEW),
    ] = None,
    old_weights: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="How much of the old weights it starts from: 0 random, 1 the old ones.",
            rich_help_panel=NEW,
        ),
    ] = 0.0,
    update_loss: Annotated[
        float,
        typer.Option(
            min=0, help="Weight of the share of the old middle's update that is missed.", rich_help_panel=LOSS
        ),
    ] = 1.0,
    kl: Annotated[
        float, typer.Option(min=0, help="Weight of the divergence from the original's logits.", rich_help_panel=LOSS)
    ] = 0.0,
    cross_entropy: Annotated[
        float, typer.Option(min=0, help="Weight of the cross entropy.", rich_help_panel=LOSS)
    ] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.", rich_help_panel=TRAINING)] = 1000,
    batch: Annotated[
        int,
        typer.Option(
            "--batch",
            "--batch-size",
            min=1,
            help="Prompts a step, of all processes together.",
            rich_help_panel=TRAINING,
        ),
    ] = 64,
    learning_rate: Annotated[
        float, typer.Option(min=1e-9, help="Largest learning rate.", rich_help_panel=TRAINING)
    ] = 2e-3,
    every: Annotated[
        int,
        typer.Option(min=1, help="Steps between evaluations, each with a checkpoint.", rich_help_panel=TRAINING),
    ] = 100,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many evaluations in vain.", rich_help_panel=TRAINING)
    ] = None,
    precision: Annotated[str, typer.Option(**choice(MIXED), help="Mixed precision.", rich_help_panel=TRAINING)] = "no",
    heal: Annotated[
        int, typer.Option(min=0, help="Steps of a last phase with more unfrozen.", rich_help_panel=TRAINING)
    ] = 0,
    unfrozen: Annotated[
        str,
        typer.Option(
            **choice(PARTS[1:]), help="In that phase: junction (one layer more) or all.", rich_help_panel=TRAINING
        ),
    ] = "junction",
    budget: Within = None,
    stored: Annotated[
        str, typer.Option(**choice(STORED), help="Number format of activations on disk.", **group[MACHINE])
    ] = "float16",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.", **group[MACHINE])] = None,
    dtype: Annotated[
        str, typer.Option(**choice(TRAINED), help="Number format of the weights.", **group[MACHINE])
    ] = "float32",
    seed: Seed = 0,
) -> Result:
    """Train a fresh middle on the activations between frozen ends, and compare it with what is simpler.

    On several GPUs: accelerate launch -m surgery graft ... In several CPU processes: torchrun.

    Example: surgery graft --model babel --middle 4:9 --steps 600 --out results/graft
    """
    from surgery.corpus.asked import require_prompts

    span = None if middle is None else _span(middle)
    require(model, device)
    require_budget(budget)
    require_prompts(model, text, prompts)
    if heldout is not None:
        require_prompts(model, heldout, heldout_prompts)
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
            judged=heldout_prompts,
            max_tokens=max_tokens,
            depth=depth,
            d_mlp=d_mlp,
            n_heads=heads,
            d_model=d_model,
            old=old_weights,
            objective=Objective(update_loss, kl, cross_entropy),
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


def _span(text: str) -> tuple[int, int]:
    start, _, stop = text.partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise typer.BadParameter(f"--middle is start:stop, such as 4:9, got {text!r}.")
    return int(start), int(stop)
