"""Freeze the translation blocks and train a fresh middle: does it get there, and for what part of the compute?

    python studies/fresh_middle.py --out results/fresh_middle       # one seed, 300 steps: eight minutes on 2 cores
    python studies/fresh_middle.py --full                           # three seeds, 1,000 steps: an hour
    python studies/fresh_middle.py --budget 20m                     # as many prompts, steps and seeds as fit
    python studies/fresh_middle.py --checkpoints runs/reference     # beside the whole model during its own training

On the bundled model, layers 4 to 8 of 12. First every single layer is put back to random weights: which can be replaced
at all? Then, at equal operations, the teacher's harvest included: the fresh middle trained on activations (``graft``),
the same with the divergence of the logits as well (``graft + kl``), a fresh middle trained on cross entropy alone, the
whole model distilled from scratch, and the whole model trained from scratch; beside what needs no training (no middle,
its mean update, the best linear map), and the graft healed with one layer more unfrozen.

    graft_layers.csv     damage of every layer put back to random weights, and left out
    graft_methods.csv    a row per method and seed: held-out loss, exact answers, operations
    graft_curves.csv     loss against operations and tokens, on prompts to stop by; drawn in graft.png
    graft_ledger.csv     operations, tokens and seconds by phase, the teacher's apart
    graft_by_k.csv       exact answers by the number k of steps that a problem asks for; drawn in graft_by_k.png
    graft_wiring.csv     is the fresh middle wired like the old one: series and reversion of layers 4 to 8

``--checkpoints`` is a folder of ``step_*.safetensors``, as ``studies/train_reference.py --snapshots`` leaves it. If it
is killed, the same command goes on where it was. Intervals of single models are over prompts, those of methods over
seeds.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from safetensors.torch import load_file

import surgery
from surgery import disk, graft, models, report, reversion, series
from surgery.corpus import splits
from surgery.corpus.splits import Split
from surgery.graft import levels, reinitialise, say, study
from surgery.graft.grafting import Graft, Objective, Schedule
from surgery.instruments import fidelity
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.page import drawing, phrases
from surgery.planning import sizes
from surgery.planning.machine import Work
from surgery.planning.sizes import ShapeOf
from surgery.rebuild import layout
from surgery.records import manifest, tables
from surgery.stats.bootstrap import t_interval
from surgery.stats.claims import Effect, largest
from surgery.stats.sampling import Sampling
from surgery.training.activations import Latents
from surgery.training.ledger import Ledger

SPAN = (4, 9)
FRESH, WHOLE = "middle", "all"
METHODS = {  # name: what is trained, on what
    "graft": (FRESH, Objective()),
    "graft + kl": (FRESH, Objective(kl=0.3)),
    "cross entropy only": (FRESH, Objective(latent=0, cross_entropy=1)),
    "distilled from scratch": (WHOLE, Objective(latent=0, kl=1)),
    "whole from scratch": (WHOLE, Objective(latent=0, cross_entropy=1)),
}
STAGES = (
    {"prompts": 2000, "judged": 50, "steps": 20, "seeds": 1},
    {"prompts": 20_000, "judged": 400, "steps": 300},
    {"judged": 1000, "steps": 1000},
    {"seeds": 3},
)
AFTER = 10.0  # seconds to draw the figures and write the page
CHOSEN_BY = "chosen_by"
BY_K = study.RUN | fidelity.COLUMNS | {"k": "steps that a problem asks for"}
WIRING = study.RUN | {
    "S": "serialness of layers 4 to 8 as one window: 0 parallel, 1 serial",
    "preference": "how much larger the effect of what they wrote is than that of the same turned at random",
    "kappa": "mean over them of the part of a deviation that one layer takes back",
    "kappa_excess": "the same beyond random walks with updates of the same size",
}


def work(size: dict[str, int], shape_of: ShapeOf) -> Work:
    """Single layers, the harvest, every method at equal operations, the graft healed, and how all of them are wired."""
    prompt, steps = shape_of(1), size["steps"]
    schedule, judged = Schedule(every=max(1, steps // 10)), 2 * size["judged"]
    tried = (len(METHODS) - 1) * levels.training(prompt, 2, 16, SPAN, schedule=schedule)
    trained = len(METHODS) * levels.training(prompt, steps, judged, SPAN, schedule=schedule)
    healed = levels.training(prompt, max(1, steps // 10), judged, SPAN, objective=levels.HEALING, parts="junction")
    harvest = levels.harvest(prompt, size["prompts"], SPAN)  # and as many operations more from scratch
    few, wired = shape_of(200), shape_of(128)
    layers = 4 * (few.n_layers + 3) / 2 * few.forward + 4 * few.n_layers * few.readout
    wiring = (2 + size["seeds"] * (len(METHODS) + 1)) * 20 * wired.forward
    return layers + harvest + size["seeds"] * (tried + trained + healed + harvest) + wiring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/fresh_middle")
    parser.add_argument("--seeds", type=int, help="1, and 3 with --full")
    parser.add_argument("--steps", type=int, help="of the graft; 300, and 1000 with --full")
    parser.add_argument("--prompts", type=int, default=20_000, help="of the corpus")
    parser.add_argument("--judged", type=int, help="held-out problems; 400, and 1000 with --full")
    parser.add_argument("--checkpoints", type=Path, help="folder of step_*.safetensors")
    parser.add_argument("--full", action="store_true")
    sizes.add_option(parser)
    args = parser.parse_args()
    snapshots = sorted(args.checkpoints.glob("step_*.safetensors")) if args.checkpoints else []
    if args.checkpoints and not snapshots:
        parser.error(
            f"{args.checkpoints} has no step_*.safetensors: make some with studies/train_reference.py --snapshots"
        )
    least = ((args.seeds, 1), (args.steps, 1), (args.judged, 10))
    if any(number is not None and number < smallest for number, smallest in least):
        parser.error("--seeds and --steps are 1 or more, --judged 10 or more: two problems of each k")

    folder = disk.folder(args.out)
    stack = Stack(surgery.load("babel"))
    plan = sizes.settle(args, STAGES, work, stack, folder, say=print, after=AFTER)
    seeds, steps, judged = (
        option if option is not None else (full if args.full else quick)
        for option, full, quick in ((args.seeds, 3, 1), (args.steps, 1000, 300), (args.judged, 1000, 400))
    )
    prompts = args.prompts
    data = splits.babel(prompts, heldout=judged)
    source = manifest.manifest(stack, data.heldout, seed=0, span=SPAN, seeds=seeds, steps=steps, prompts=prompts)

    layers = reinitialise.layers(stack, spread(data.heldout, 200), seeds=3)
    tables.write(layers, folder / "graft_layers.csv", source, reinitialise.COLUMNS)
    print(replaceable_layers(layers))

    pairs = graft.latents(stack, data.corpus, *SPAN, folder / "latents", say=print)
    schedule = Schedule(steps=steps, every=max(1, steps // 10))
    grafts: dict[tuple[str, int], Graft] = {}
    for seed in range(seeds):
        for name, grown in every_method(stack, pairs, data, folder, replace(schedule, seed=seed)):
            grafts[name, seed] = grown
            score = study.judge(stack, grown, pairs, data).iloc[0]
            print(f"seed {seed}, {name}: exact answers {score['exact']:.3f}, {score['damage']:+.4f} nats a token")
    rows = study.maps(stack, pairs, data)
    rows += [
        study.row(name, seed, grown, study.judge(stack, grown, pairs, data)) | {CHOSEN_BY: to_choose_by(grown)}
        for (name, seed), grown in grafts.items()
    ]
    whole = grafts["whole from scratch", 0]
    per_step = whole.ledger.operations(teacher=False) / whole.curve["step"].iloc[-1]
    rows += [snapshot(stack, file, per_step, pairs, data) for file in snapshots]
    methods = pd.DataFrame(rows)
    other_ends = methods["method"].str.contains("scratch|whole")  # their streams are not the original's
    methods.loc[other_ends, [name for name in methods if name.startswith("unexplained")]] = np.nan
    ks = by_k(stack, grafts, pairs, data)
    untrained = Stack(models.untrained(stack.model))
    wiring = pd.DataFrame(
        [
            {"method": "the old middle", "seed": np.nan} | wiring_of(stack, SPAN, data.heldout),
            {"method": "untrained", "seed": np.nan} | wiring_of(untrained, SPAN, data.heldout),
            *(
                {"method": name, "seed": float(seed)} | wiring_of(grown.stack, grown.span, data.heldout)
                for (name, seed), grown in grafts.items()
            ),
        ]
    )
    sentences = answers(methods, ks, wiring, per_step)
    source["settings"]["found"] = sentences
    study.write(folder, methods.drop(columns=CHOSEN_BY), grafts, source)
    tables.write(ks, folder / "graft_by_k.csv", source, BY_K)
    disk.save({folder / "graft_by_k.png": drawing.png(draw(ks))})
    tables.write(wiring, folder / "graft_wiring.csv", source, WIRING)
    page = report.build(folder)

    print()
    for sentence in (*say.methods(methods[methods["seed"].fillna(0) == 0], stack.n_layers), *sentences):
        print(f"\n{sentence}")
    print(f"\nThe page is {page}, the numbers and figures are beside it.")
    sizes.tell(plan, print)


def every_method(stack: Stack, pairs: Latents, data: Split, folder: Path, schedule: Schedule):
    """Train by every method at the operations that the graft took, the teacher's included, one after the other."""
    budget = None
    for name, (parts, objective) in METHODS.items():
        options = {"parts": parts, "objective": objective, "answers": data.stop_answers, "weigh": data.weigh}
        place = folder / f"{name.replace(' ', '_')}_{schedule.seed}"
        spent = pairs.ledger(stack) if name != "whole from scratch" else Ledger()
        steps = schedule.steps
        if budget is not None:
            trial, span = untrained_student(stack, parts, schedule.seed)
            step = study.step_operations(
                stack, trial, span, pairs, objective=objective, schedule=schedule, parts=parts, weigh=data.weigh
            )
            steps = max(1, round((budget - spent.operations(teacher=True)) / step))
        planned = replace(schedule, steps=steps, every=max(1, steps // 10))
        student, span = untrained_student(stack, parts, schedule.seed)
        trained = graft.fit(stack, student, span, pairs, data.stop, place, schedule=planned, spent=spent, **options)
        budget = budget or trained.ledger.operations(teacher=True)
        yield name, trained
        if name == "graft":
            steps = max(1, schedule.steps // 10)
            last = replace(schedule, steps=steps, every=steps, learning_rate=5e-4)
            options = {"answers": data.stop_answers, "weigh": data.weigh}
            place = folder / f"healed_{schedule.seed}"
            yield "graft, healed", graft.heal(stack, trained, pairs, data.stop, place, schedule=last, **options)


def untrained_student(stack: Stack, parts: str, seed: int) -> tuple[Stack, tuple[int, int]]:
    """The student before training, with fresh weights in the middle or everywhere, and its middle."""
    if parts == WHOLE:
        return Stack(models.untrained(stack.model, seed)), SPAN
    return layout.build_stack(stack, layout.middle(stack.n_layers, *SPAN), seed), SPAN


def snapshot(stack: Stack, file: Path, per_step: float, pairs: Latents, data: Split) -> dict:
    """A snapshot of the whole model's own training as a row of the table."""
    model, step = models.untrained(stack.model), int(file.stem.removeprefix("step_"))
    models.plain(model).load_state_dict(load_file(file))
    grown = Graft(Stack(model), SPAN, pd.DataFrame(), Ledger())
    measured, to_choose = (
        study.judge(stack, grown, pairs, part).iloc[0].to_dict()
        for part in (data, replace(data, stop=data.heldout, heldout=data.stop, answers=data.stop_answers))
    )
    spent = {"steps": step, "operations": step * per_step, "operations_with_teacher": step * per_step}
    chosen = {CHOSEN_BY: to_choose["cross_entropy_answers"]}
    return {"method": f"whole, step {step}", "seed": np.nan} | measured | spent | chosen


def to_choose_by(grown: Graft) -> float:
    """The loss of the answers at the end of training, on the prompts to stop by."""
    return float(grown.curve["cross_entropy_answers"].iloc[-1])


def by_k(stack: Stack, grafts: dict[tuple[str, int], Graft], pairs: Latents, data: Split) -> pd.DataFrame:
    """Exact answers and damage of every model on the problems of every length."""
    rows = []
    for k, part in splits.by_k(data).items():
        for (name, seed), grown in grafts.items():
            scores = study.judge(stack, grown, pairs, part).iloc[0].to_dict()
            rows.append({"method": name, "seed": float(seed), "k": k} | scores)
    return pd.DataFrame(rows)


def spread(tokens: Tokens, count: int) -> Tokens:
    """About ``count`` prompts spread evenly over all, which are sorted by k."""
    return tokens[:: max(1, len(tokens) // count)]


def wiring_of(stack: Stack, span: tuple[int, int], tokens: Tokens) -> dict[str, float]:
    """How the layers of a middle work together."""
    tokens = spread(tokens, 128)
    windows = series.windows(stack, tokens, span[1] - span[0], damage=False, sampling=Sampling(resamples=0))
    window = windows.query(f"start == {span[0]} and stop == {span[1]}").iloc[0]
    drift = (
        reversion.layers(stack, tokens, causal=False, sampling=Sampling(resamples=0))
        .iloc[span[0] : span[1]]
        .mean(numeric_only=True)
    )
    return {
        name: float(source[name])
        for source, name in ((window, "S"), (window, "preference"), (drift, "kappa"), (drift, "kappa_excess"))
    }


def over_seeds(values: pd.Series, digits: int = 3) -> str:
    """Mean over seeds with its 95 % t interval; one seed has none."""
    return phrases.interval(*t_interval(values.to_numpy()), digits)


def replaceable_layers(layers: pd.DataFrame) -> str:
    """What it costs to put each layer back to random weights, and which is worst, if one is told from all others."""
    damages = ", ".join(f"{int(row['layer'])}: {phrases.value(row['damage'])}" for _, row in layers.iterrows())
    worst = largest({int(row["layer"]): Effect.of_row(row, "damage") for _, row in layers.iterrows()})
    if len(worst) == 1:
        ranked = f"Worst is layer {worst[0]}"
    elif worst:
        ranked = f"The worst are not told apart: {phrases.layers(worst)}"
    else:
        ranked = "Which is worst is undecided: not all have an interval"
    return (
        f"Which layers are replaceable? Put back to random weights, one at a time, they cost (nats a token): "
        f"{damages}. {ranked}."
    )


def answers(methods: pd.DataFrame, ks: pd.DataFrame, wiring: pd.DataFrame, per_step: float) -> list[str]:
    """The questions, answered over seeds."""
    seeded = methods.dropna(subset=["seed"])
    named = seeded.groupby("method", sort=False)
    grown, n = named.get_group("graft"), seeded["seed"].nunique()
    by_length = ks[ks["method"] == "graft"].groupby("k")
    sentences = [
        f"Over {n} seed{'s' if n > 1 else ''}, exact answers of the graft by k: "
        + ", ".join(f"k = {k} {over_seeds(part['exact'])}" for k, part in by_length)
        + f" (the original {grown['exact_original'].iloc[0]:.3f} in all)."
    ]
    for name, part in named:
        spent = part["operations_with_teacher"].mean()
        sentences.append(
            f"{name}: exact {over_seeds(part['exact'])}, {over_seeds(part['cross_entropy_answers'], 5)} nats an "
            f"answer token (the original {part['cross_entropy_answers_original'].iloc[0]:.5f}), {spent:.3g} operations "
            "with the teacher's."
        )
    sentences.append(fraction(grown, methods, per_step))
    old, fresh = (wiring[wiring["method"] == name].iloc[0] for name in ("the old middle", "untrained"))
    new = wiring[wiring["method"] == "graft"]
    sentences.append(
        "Is the fresh middle wired like the old one? "
        + "; ".join(
            f"{name} {over_seeds(new[name])}, the old one {phrases.value(old[name], 3)}, untrained "
            f"{phrases.value(fresh[name], 3)}"
            for name in ("S", "preference", "kappa", "kappa_excess")
        )
        + "."
    )
    return sentences


def fraction(grown: pd.DataFrame, methods: pd.DataFrame, per_step: float) -> str:
    """The graft's part of the compute of training the whole, by the recorded training of the bundled model.

    Which step of the whole is as good as the graft is chosen seed by seed, so that the spread of the choice is in the
    numbers. Among the snapshots it is chosen on the prompts to stop by (``chosen_by``), as the graft's own end is.
    """
    recorded = pd.read_csv(models.reference_folder() / "training.csv").sort_values("step")
    reached = recorded[[f"exact_{k}" for k in range(5)]].mean(axis=1)
    if not np.isfinite(grown["exact"]).all():
        return "The graft's part of the compute of training the whole is undefined: so are its exact answers."
    first = [recorded.loc[reached >= exact, "step"].min() for exact in grown["exact"]]
    if np.isnan(first).any():
        best = grown["exact"].max()
        return f"No recorded step of the whole model's training answers as well as the graft ({best:.3f})."
    whole = np.array(first) * per_step
    spent = {name: over_seeds(100 * grown[name] / whole, 1) for name in ("operations_with_teacher", "operations")}
    text = (
        f"The bundled model's own training answered {grown['exact'].mean():.1%} of held-out problems first at step "
        f"{' to '.join(f'{step:.0f}' for step in sorted({min(first), max(first)}))}: in % of its operations the graft "
        f"took {spent['operations_with_teacher']}, the harvest included, {spent['operations']} without"
    )
    snapshots = methods[methods["method"].str.startswith("whole, step")].sort_values("steps")
    if len(snapshots):
        good = [snapshots[snapshots[CHOSEN_BY] <= loss] for loss in grown[CHOSEN_BY]]
        if all(map(len, good)):
            chosen = pd.DataFrame([of_seed.iloc[0] for of_seed in good])
            named = " and ".join(dict.fromkeys(chosen["method"].str.removeprefix("whole, ")))
            losses = [over_seeds(of["cross_entropy_answers"], 4) for of in (chosen, grown)]
            part = 100 * grown["operations_with_teacher"].to_numpy() / chosen["operations"].to_numpy()
            text += (
                f"; of the snapshots it is {named} that is first with as small a loss on the prompts to stop by (on "
                f"the others {losses[0]} nats an answer token against {losses[1]}): {over_seeds(pd.Series(part), 1)} % "
                "of its operations"
            )
        else:
            text += "; no snapshot has as small a loss as every graft"
    return text + "."


def draw(ks: pd.DataFrame) -> Figure:
    """Exact answers by k, a line per method, its mean over seeds and every seed as a dot."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, part), colour in zip(ks.groupby("method", sort=False), drawing.COLOURS * 2):
        axes.plot(part.groupby("k")["exact"].mean(), color=colour, label=name)
        axes.plot(part["k"], part["exact"], ".", color=colour)
    axes.axhline(0.1, color=drawing.FAINT, linestyle="--", linewidth=0.8)
    axes.annotate("chance", (0, 0.1), va="bottom", fontsize=8, color=drawing.FAINT)
    axes.set_xticks(range(5))
    axes.set_xlabel("k, steps that a problem takes")
    axes.set_ylabel("exact answers on held-out problems")
    axes.legend(fontsize=8)
    axes.grid(axis="y", alpha=0.25)
    return figure


if __name__ == "__main__":
    surgery.cli.script(main)
