"""A fresh middle from end to end: harvest, train, compare with what is simpler, save. ``surgery graft``.

    latents/              the activations, harvested once                               (surgery.training.activations)
    training/             curve.csv as it goes, checkpoint.safetensors, model           (surgery.graft)
    healing/              the same of a last phase with more unfrozen, if asked for
    graft_methods.csv     a row per method: how close it comes, and what it took
    graft_curves.csv      held-out loss against steps, tokens and operations
    graft_ledger.csv      operations, tokens and seconds by phase, the teacher's apart
    graft.png             the curves

Killed, the same command goes on where it was. ``accelerate launch -m surgery graft ...`` trains on several
GPUs, ``torchrun --nproc_per_node 2 -m surgery graft --device cpu ...`` on several CPU processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from transformer_lens import TransformerBridge

from surgery.corpus.babel import TRAINING_MIX
from surgery.corpus.splits import Split, babel, texts
from surgery.graft import grafting as graft
from surgery.graft import linear_maps
from surgery.graft.grafting import Graft, Objective, Schedule
from surgery.instruments import fidelity
from surgery.models import loading as models
from surgery.models.loading import load
from surgery.models.stack import Stack
from surgery.page import drawing
from surgery.page.drawing import COLOURS
from surgery.records import manifest as provenance
from surgery.records import tables as frames
from surgery.training import ledger
from surgery.training import loop as training
from surgery.training.activations import Latents

METHODS: str = "graft_methods.csv"
CURVES, LEDGER = "graft_curves.csv", "graft_ledger.csv"
RUN = {
    "method": "how the middle came about",
    "seed": "of its random weights and of the order of its batches; empty where nothing is drawn",
}
SPENT = {
    "parameters": "numbers that were fitted",
    "steps": "training steps made",
    "tokens": training.CURVE["tokens"],
    "operations": training.CURVE["operations"],
    "operations_with_teacher": training.CURVE["operations_with_teacher"],
    "seconds": training.CURVE["seconds"],
}
COLUMNS: dict[str, dict[str, str]] = {
    METHODS: RUN | fidelity.COLUMNS | SPENT,
    CURVES: RUN | fidelity.COLUMNS | training.CURVE,
    LEDGER: RUN | ledger.COLUMNS,
}
CAPTION = (
    "Held-out loss against operations, those of the teacher left out and included, and tokens. Dashed: no training."
)


@dataclass(frozen=True)
class Found:
    graft: Graft
    methods: pd.DataFrame
    sentences: list[str]


def run(
    model: str = "babel",
    span: tuple[int, int] = (4, 9),
    out: "str | Path" = "results/graft",
    *,
    text: Path | None = None,
    heldout: Path | None = None,
    count: int = 20_000,
    judged: int = 512,
    max_tokens: int = 128,
    depth: int | None = None,
    d_mlp: int | None = None,
    n_heads: int | None = None,
    d_model: int | None = None,
    old: float = 0.0,
    objective: Objective = Objective(),
    schedule: Schedule = Schedule(),
    heal: int = 0,
    parts: str = "junction",
    dtype: torch.dtype = torch.float16,
    device: str | None = None,
    say: Callable[[str], Any] = lambda _: None,
    progress: bool = False,
) -> Found:
    """All of it for one model and one seed; ``heal`` is the number of steps of a last phase that trains ``parts``.

    Raises as ``harvest.harvest``, ``graft.train`` and ``graft.heal`` do, and ValueError for a model without prompts.
    """
    if text is None and model not in models.BUNDLED:
        raise ValueError(f"{model} brings no prompts of its own: give a file with --text FILE, one prompt a line")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    accelerator = training.accelerator_for(where, schedule.precision)
    main, folder = accelerator.is_main_process, frames.folder(out)
    speak = say if main else lambda _: None
    speak(f"opening {model}")
    stack = Stack(load(model, device=accelerator.device))
    if text is None:
        data = babel(count, judged, schedule.seed, TRAINING_MIX if model == models.REFERENCE else (1.0,))
    else:
        data = texts(stack, text, heldout, count, judged, max_tokens)
    unseen = data.heldout.to(stack.device)
    with accelerator.main_process_first():  # the others find it made
        pairs = graft.latents(
            stack, data.corpus, *span, folder / "latents", dtype=dtype, say=speak, progress=progress and main
        )
    options: dict[str, Any] = {
        "answers": data.answers,
        "weigh": data.weigh,
        "accelerator": accelerator,
        "progress": progress,
    }
    shared = f" on {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    speak(f"training a middle of {depth or span[1] - span[0]} layers{shared}")
    grown = graft.train(
        stack,
        pairs,
        unseen,
        folder / "training",
        depth=depth,
        d_mlp=d_mlp,
        n_heads=n_heads,
        d_model=d_model,
        old=old,
        objective=objective,
        schedule=schedule,
        **options,
    )
    made = {"graft": grown}
    if heal:
        speak(f"healing with {parts} unfrozen")
        last = Schedule(**asdict(schedule) | {"steps": heal, "learning_rate": schedule.learning_rate / 4})
        made["healed"] = graft.heal(
            stack, grown, pairs, unseen, folder / "healing", parts=parts, schedule=last, **options
        )
    rows = maps(stack, pairs, data) if main else []
    for name, one in made.items():
        if main:
            rows.append(row(name, schedule.seed, one, judge(stack, one, pairs, data)))
    methods = pd.DataFrame(rows)
    sentences = found(methods, stack.n_layers) if main else []
    if main:
        manifest = provenance.manifest(
            stack,
            unseen,
            seed=schedule.seed,
            span=list(span),
            found=sentences,
            objective=asdict(objective),
            schedule=asdict(schedule),
            latents=dict(pairs.source),
        )
        write(folder, methods, {(name, schedule.seed): one for name, one in made.items()}, manifest)
    accelerator.wait_for_everyone()
    return Found(list(made.values())[-1], methods, sentences)


def write(folder: Path, methods: pd.DataFrame, made: Mapping[tuple[str, int], Graft], manifest: dict[str, Any]) -> None:
    """The three tables and the figure."""

    def stacked(of: Callable[[Graft], pd.DataFrame]) -> pd.DataFrame:
        return pd.concat([of(one).assign(method=name, seed=seed) for (name, seed), one in made.items()])

    tables = {
        METHODS: methods,
        CURVES: stacked(lambda one: one.curve),
        LEDGER: stacked(lambda one: one.ledger.frame()),
    }
    for name, table in tables.items():
        frames.write(table[sorted(table, key=lambda column: column not in RUN)], folder / name, manifest, COLUMNS[name])
    frames.save({folder / "graft.png": drawing.png(draw(tables[CURVES], methods))})


def maps(stack: Stack, pairs: Latents, data: Split) -> list[dict[str, Any]]:
    """What needs no training: the middle left out, its mean update, and the best linear map, as rows of ``METHODS``.

    The strength of the ridge is chosen on the last tenth of the corpus. Cost: two readings of the activations, and 3
    times ``2 - stop / L`` F.
    """
    n, tenth = pairs.n_prompts, max(1, pairs.n_prompts // 10)
    fitted, chosen = pairs.moments(range(n - tenth)), pairs.moments(range(n - tenth, n))
    every = pairs.moments(range(n - tenth), skip_first=False)  # later tokens attend to mapped first ones
    rows = []
    for name, affine in (
        ("skip", linear_maps.skip),
        ("mean update", linear_maps.mean_update(fitted)),
        ("linear map", linear_maps.linear(every, chosen)),
    ):
        read = fidelity.measure(
            stack, data.heldout.to(stack.device), affine, pairs.start, pairs.stop, answers=data.answers
        )
        rows.append({"method": name, "seed": float("nan"), "parameters": float(affine.n_parameters)} | _plain(read))
    return rows


def judge(teacher: Stack, grown: Graft, pairs: Latents, data: Split) -> pd.DataFrame:
    """``fidelity.of`` a trained model on the prompts that nothing was trained on."""
    stack, span = Stack(grown.model), (pairs.start, pairs.stop)
    return fidelity.of(teacher, stack, data.heldout.to(teacher.device), span, grown.span, answers=data.answers)


def step_operations(
    teacher: Stack,
    student: TransformerBridge,
    span: tuple[int, int],
    pairs: Latents,
    data: Split,
    *,
    objective: Objective,
    schedule: Schedule,
    parts: str = "middle",
) -> float:
    """Floating-point operations of a training step, the teacher's part of it included: counted on two.

    ``student`` is trained by them: give one that is not needed any more. Cost: two steps and three looks at a few
    prompts.
    """
    with TemporaryDirectory() as folder:
        two = graft.fit(
            teacher,
            student,
            span,
            pairs,
            data.heldout[:16],
            folder,
            schedule=replace(schedule, steps=2, every=2),
            objective=objective,
            parts=parts,
            weigh=data.weigh,
            spent=ledger.Ledger(),
        )
    return two.ledger.operations(teacher=True) / 2


def row(method: str, seed: int, grown: Graft, read: pd.DataFrame) -> dict[str, Any]:
    """A trained model as a row of ``METHODS``."""
    last = grown.curve.iloc[-1]
    spent = {
        "tokens": last["tokens"],
        "operations": last["operations"],
        "seconds": last["seconds"],
        "operations_with_teacher": last["operations_with_teacher"],
        "steps": last["step"],
    }
    return {"method": method, "seed": float(seed), "parameters": float(grown.parameters)} | _plain(read) | spent


def _plain(read: pd.DataFrame) -> dict[str, Any]:
    return {str(name): value for name, value in read.iloc[0].items()}


def found(methods: pd.DataFrame, n_layers: int) -> list[str]:
    """How close each method comes, in sentences."""
    first = methods.iloc[0]
    start, stop = int(first["start"]), int(first["stop"])
    said = [
        f"Layers {start} to {stop - 1} of {n_layers} replaced. The loss of the original is "
        f"{first['cross_entropy_original']:.3f} nats a token on {int(first['n_prompts'])} held-out prompts."
    ]
    for _, one in methods.iterrows():
        name = str(one["method"])
        text = f"{name[0].upper()}{name[1:]}: {_interval(one, 'damage', '+.3f')} nats a token"
        if one["unexplained"] == one["unexplained"]:  # NaN of a model whose ends are others
            text += f", unexplained {_interval(one, 'unexplained', '.3f')}"
        if "exact" in methods:
            text += f", exact answers {_interval(one, 'exact', '.3f')} (original {one['exact_original']:.3f})"
        if one.get("operations", 0) > 0:
            text += f"; {one['operations']:.2g} operations, {one['operations_with_teacher']:.2g} with the teacher's"
        said.append(text + ".")
    return said


def _interval(one: Any, name: str, style: str) -> str:
    low, high = one[f"{name}_low"], one[f"{name}_high"]
    number = f"{one[name]:{style}}"
    return number if np.isnan(low) else f"{number} [{low:{style}}, {high:{style}}]"


def draw(curves: pd.DataFrame, methods: pd.DataFrame) -> Figure:
    """Held-out loss of every method against its operations, with the teacher's and without, and its tokens."""
    loss = "cross_entropy_answers" if "cross_entropy_answers" in curves else "cross_entropy"
    said = "nats per answer token" if loss.endswith("answers") else "nats per token"
    figure = Figure(figsize=(13, 4.9), layout="constrained")
    panels = {
        "operations": "operations of training",
        "operations_with_teacher": "operations, teacher included",
        "tokens": "tokens trained on",
    }
    left = figure.subplots(1, len(panels), sharey=True)
    colours = dict(zip(curves["method"].unique(), COLOURS * 3))
    unseeded = methods[methods["seed"].isna()]
    trained = unseeded["operations"].notna()
    free, snapshots = unseeded[~trained], unseeded[trained]
    for axes, (x, label) in zip(left, panels.items(), strict=True):
        for (method, seed), run_ in curves.groupby(["method", "seed"], sort=False):
            shown = run_[run_[x] > 0]
            first = seed == curves.loc[curves["method"] == method, "seed"].iloc[0]
            axes.plot(shown[x], shown[loss], color=colours[method], linewidth=1.4, label=method if first else None)
        for place, (_, one) in enumerate(free.iterrows()):
            axes.axhline(one[loss], color=drawing.FAINT, linestyle="--", linewidth=0.8)
            axes.annotate(
                one["method"],
                (0.99 - 0.33 * place, one[loss]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
                color=drawing.FAINT,
            )
        if x in snapshots:
            axes.plot(snapshots[x], snapshots[loss], "x", color=drawing.INK, label="the whole model's own training")
        axes.axhline(methods[f"{loss}_original"].iloc[0], color=drawing.INK, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    left[0].set_ylabel(f"held-out loss, {said}")
    figure.legend(*left[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure
