"""A fresh middle from end to end: harvest, train, compare with what is simpler, save. ``surgery graft``.

    latents/              the activations, harvested once                               (surgery.training.activations)
    training/             curve.csv as it goes, checkpoint.safetensors, model           (surgery.graft)
    healing/              the same for a last phase with more unfrozen, if there is one
    graft_methods.csv     a row per method: how close it comes, and what it took
    graft_curves.csv      loss against steps, tokens and operations, on the prompts that may stop the training
    graft_ledger.csv      operations, tokens and seconds by phase, the teacher's apart
    graft.png             the curves

With a ``budget`` of time fewer prompts are harvested and fewer steps made (``surgery.graft.levels``), and
``graft_plan.json`` holds how many. If it is killed, the same command goes on where it was. ``accelerate launch -m
surgery graft ...`` trains on several GPUs, ``torchrun --nproc_per_node 2 -m surgery graft --device cpu ...`` on
several CPU processes.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from transformer_lens import TransformerBridge

from surgery import disk
from surgery.corpus.asked import require_prompts
from surgery.corpus.babel import TRAINING_MIX
from surgery.corpus.splits import Split, Weigh, babel, texts
from surgery.corpus.text_files import read_prompts
from surgery.graft import draw, grafting, levels, linear_maps
from surgery.graft import say as words
from surgery.graft.grafting import Graft, Objective, Schedule
from surgery.instruments import fidelity
from surgery.models import loading
from surgery.models.stack import Stack
from surgery.page import drawing
from surgery.planning.budget import seconds_of
from surgery.planning.sizes import Choice
from surgery.records import manifest, tables
from surgery.training import ledger
from surgery.training.activations import Latents
from surgery.training.loop import CURVE, accelerator_for

METHODS: str = "graft_methods.csv"
CURVES, LEDGER = "graft_curves.csv", "graft_ledger.csv"
RUN = {
    "method": "how the middle came about",
    "seed": "of its random weights and of the order of its batches; empty where nothing is drawn",
}
SPENT = {
    "parameters": "numbers that were fitted",
    "steps": "training steps made",
    "tokens": CURVE["tokens"],
    "operations": CURVE["operations"],
    "operations_with_teacher": CURVE["operations_with_teacher"],
    "seconds": CURVE["seconds"],
}
COLUMNS: dict[str, dict[str, str]] = {
    METHODS: RUN | fidelity.COLUMNS | SPENT,
    CURVES: RUN | fidelity.COLUMNS | CURVE,
    LEDGER: RUN | ledger.COLUMNS,
}


@dataclass(frozen=True)
class GraftResult:
    """The last graft that was trained, a row per method, and what these say; these two are empty but in the main
    process. ``plan`` is what was chosen to fit into a budget."""

    graft: Graft
    methods: pd.DataFrame
    sentences: list[str]
    plan: Choice | None = None


def run(
    model: str = "babel",
    span: tuple[int, int] | None = (4, 9),
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
    budget: str | None = None,
    dtype: torch.dtype = torch.float16,
    device: str | None = None,
    weights: torch.dtype = torch.float32,
    say: Callable[[str], Any] = lambda _: None,
    progress: bool = False,
) -> GraftResult:
    """Harvest, train, heal, compare and write everything for one model and one seed.

    ``span`` is the middle, (4, 9) of 12 layers; None takes the same part of a model of any depth (``middle_of``).
    ``heal`` is the number of steps of a last phase that trains ``parts``; ``count`` and ``judged`` are the numbers of
    prompts to learn from and to be judged on, with at most as many others to stop by (``corpus.splits``). ``budget``,
    such as ``30m``, is a time to stay within: these numbers are then the most of each, and a run that was begun in the
    folder goes on with what was chosen for it; ``none`` and None cut nothing. ``dtype`` is
    that of the latents on disk, ``weights`` that of the model (single or double precision: half would lose updates, and
    ``schedule.precision`` mixes). The other settings are those of ``graft.train``. The model is proved once, and so is
    every graft. Raises as ``harvest.harvest``, ``graft.train`` and ``graft.heal`` do, and ValueError for a model
    without prompts and for a device that is not here.
    """
    began, limit = time.monotonic(), None if budget is None else seconds_of(budget)
    if text is None:
        require_prompts(model, None)
    where = loading.available(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    accelerator = accelerator_for(where, schedule.precision)
    main = accelerator.is_main_process
    with disk.held(out, main=main) as folder:
        speak = say if main else lambda _: None
        speak(f"opening {model}")
        stack = Stack(loading.load(model, device=accelerator.device, dtype=weights))
        span = span or middle_of(stack.n_layers)
        data, plan = _prompts(stack, model, text, heldout, count, judged, max_tokens, schedule.seed), None
        if limit is not None:
            given = count if text is None else len(read_prompts(text, count))
            with accelerator.main_process_first():  # the other processes find the plan there
                plan, again = levels.plan(
                    stack,
                    data.corpus,
                    len(data.heldout),
                    {"prompts": given, "judged": judged, "steps": schedule.steps, "heal": heal},
                    folder,
                    budget=limit,
                    spent=time.monotonic() - began,
                    depth=depth or span[1] - span[0],
                    span=span,
                    d_mlp=d_mlp,
                    d_model=d_model,
                    objective=objective,
                    schedule=schedule,
                    parts=parts,
                    processes=accelerator.num_processes,
                    settings={
                        "tokens": manifest.tokens_hash(data.corpus),
                        "heldout": manifest.tokens_hash(data.heldout),
                        "span": list(span),
                        "middle": [depth, d_mlp, n_heads, d_model, old, parts],
                        "objective": asdict(objective),
                        "schedule": asdict(schedule),
                        "stored": str(dtype),
                    },
                )
            speak(f"going on with the plan in {folder / levels.FILE}: {plan}" if again else str(plan))
            heal, schedule = plan.sizes["heal"], replace(schedule, steps=plan.sizes["steps"])
            count, judged = plan.sizes["prompts"], plan.sizes["judged"]
            data = _prompts(stack, model, text, heldout, count, judged, max_tokens, schedule.seed)
        watched, unseen = data.stop.to(stack.device), data.heldout.to(stack.device)
        with accelerator.main_process_first():  # the other processes find the latents there
            pairs = grafting.latents(
                stack, data.corpus, *span, folder / "latents", dtype=dtype, say=speak, progress=progress and main
            )
        options: dict[str, Any] = {
            "answers": data.stop_answers,
            "weigh": data.weigh,
            "accelerator": accelerator,
            "progress": progress,
        }
        shared = f" on {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
        speak(f"training a middle of {depth or span[1] - span[0]} layers{shared}")
        grown = grafting.train(
            stack,
            pairs,
            watched,
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
        grafts = {"graft": grown}
        told: dict[str, Any] = {} if plan is None else {"plan": plan.json() | {"cuts": plan.cuts}}
        mapped, judged_rows = maps(stack, pairs, data) if main else [], dict[str, dict[str, Any]]()

        def tell() -> tuple[pd.DataFrame, list[str]]:
            """Write the tables of what is trained so far."""
            if not main:
                return pd.DataFrame(), []
            for name, graft in grafts.items():
                if name not in judged_rows:
                    judged_rows[name] = row(name, schedule.seed, graft, judge(stack, graft, pairs, data))
            methods = pd.DataFrame(mapped + list(judged_rows.values()))
            sentences = words.methods(methods, stack.n_layers)
            source = manifest.manifest(
                stack,
                unseen,
                seed=schedule.seed,
                span=list(span),
                found=sentences,
                objective=asdict(objective),
                schedule=asdict(schedule),
                latents=dict(pairs.source),
                **told,
            )
            write(folder, methods, {(name, schedule.seed): graft for name, graft in grafts.items()}, source)
            return methods, sentences

        methods, sentences = tell()
        if heal:
            speak(f"healing with {parts} unfrozen")
            last = Schedule(**asdict(schedule) | {"steps": heal, "learning_rate": schedule.learning_rate / 4})
            grafts["healed"] = grafting.heal(
                stack, grown, pairs, watched, folder / "healing", parts=parts, schedule=last, **options
            )
            methods, sentences = tell()
        accelerator.wait_for_everyone()
        return GraftResult(list(grafts.values())[-1], methods, sentences, plan)


def _prompts(
    stack: Stack, model: str, text: Path | None, heldout: Path | None, count: int, judged: int, longest: int, seed: int
) -> Split:
    """The prompts of a run: a bundled model's own problems, or texts."""
    if text is None:
        return babel(count, judged, seed, TRAINING_MIX if model == loading.REFERENCE else (1.0,))
    return texts(stack, text, heldout, count, judged, longest)


def write(
    folder: Path, methods: pd.DataFrame, grafts: Mapping[tuple[str, int], Graft], manifest: dict[str, Any]
) -> None:
    """Write the three tables and the figure; ``grafts`` go by method and seed."""

    def stacked(table_of: Callable[[Graft], pd.DataFrame]) -> pd.DataFrame:
        return pd.concat([table_of(graft).assign(method=name, seed=seed) for (name, seed), graft in grafts.items()])

    frames = {
        METHODS: methods,
        CURVES: stacked(lambda graft: graft.curve),
        LEDGER: stacked(lambda graft: graft.ledger.frame()),
    }
    for name, frame in frames.items():
        tables.write(frame[sorted(frame, key=lambda column: column not in RUN)], folder / name, manifest, COLUMNS[name])
    disk.save({folder / "graft.png": drawing.png(draw.curves(frames[CURVES], methods))})


def maps(stack: Stack, pairs: Latents, data: Split) -> list[dict[str, Any]]:
    """Measure what needs no training: no middle, its mean update, and the best linear map, as rows of ``METHODS``.

    The strength of the ridge is chosen on the last tenth of the corpus. Cost: two readings of the activations, and 3
    times ``2 - stop / L`` F.
    """
    n, tenth = pairs.n_prompts, max(1, pairs.n_prompts // 10)
    fitted, validation = pairs.moments(range(n - tenth)), pairs.moments(range(n - tenth, n))
    with_first = pairs.moments(range(n - tenth), skip_first=False)  # later tokens attend to mapped first ones
    rows = []
    for name, affine in (
        ("skip", linear_maps.skip),
        ("mean update", linear_maps.mean_update(fitted)),
        ("linear map", linear_maps.linear(with_first, validation)),
    ):
        measured = fidelity.measure(
            stack, data.heldout.to(stack.device), affine, pairs.start, pairs.stop, answers=data.answers
        )
        rows.append({"method": name, "seed": float("nan"), "parameters": float(affine.n_parameters)} | _first(measured))
    return rows


def middle_of(n_layers: int) -> tuple[int, int]:
    """The layers from a third to three quarters of the depth, at least one.

    >>> middle_of(12), middle_of(30), middle_of(2)
    ((4, 9), (10, 22), (0, 1))
    """
    start = n_layers // 3
    return start, max(start + 1, 3 * n_layers // 4)


def judge(teacher: Stack, grown: Graft, pairs: Latents, data: Split) -> pd.DataFrame:
    """Compare a trained model with the teacher on the held-out prompts, by ``fidelity.compare``. Cost: 1 F and a
    readout of each."""
    span = (pairs.start, pairs.stop)
    return fidelity.compare(
        teacher, grown.stack, data.heldout.to(teacher.device), span, grown.span, answers=data.answers
    )


def step_operations(
    teacher: Stack,
    student: TransformerBridge | Stack,
    span: tuple[int, int],
    pairs: Latents,
    *,
    objective: Objective,
    schedule: Schedule,
    parts: str = "middle",
    weigh: Weigh | None = None,
) -> float:
    """Count the floating-point operations of a training step, the teacher's part of it included, on two steps.

    ``student`` is trained by them: give one that is not needed any more. Cost: two steps, and two evaluations on 16
    prompts.
    """
    few = pairs.batch(range(min(16, pairs.n_prompts))).tokens
    with TemporaryDirectory() as folder:
        two_steps = grafting.fit(
            teacher,
            student,
            span,
            pairs,
            few,
            folder,
            schedule=replace(schedule, steps=2, every=2),
            objective=objective,
            parts=parts,
            weigh=weigh,
            spent=ledger.Ledger(),
        )
    return two_steps.ledger.operations(teacher=True) / 2


def row(method: str, seed: int, grown: Graft, measured: pd.DataFrame) -> dict[str, Any]:
    """A trained model, and what ``judge`` says of it, as a row of ``METHODS``."""
    last = grown.curve.iloc[-1]
    spent = {
        "tokens": last["tokens"],
        "operations": last["operations"],
        "seconds": last["seconds"],
        "operations_with_teacher": last["operations_with_teacher"],
        "steps": last["step"],
    }
    return {"method": method, "seed": float(seed), "parameters": float(grown.parameters)} | _first(measured) | spent


def _first(frame: pd.DataFrame) -> dict[str, Any]:
    """The first row of a table, by column."""
    return {str(name): value for name, value in frame.iloc[0].items()}
