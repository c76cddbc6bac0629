"""Does a walk through the activations that enter a span help to train a fresh one when real data are scarce?

    harvested = walk_study.harvester(stack, data.corpus, (4, 9), folder)
    report = manifold.report(stack, walk.fit(harvested(20_000)), walk_study.SHOWN, data.heldout, 4)
    frame = walk_study.run(stack, harvested, data, folder, amounts=(1000, 10_000), most=120_000)
    walk_study.write(folder, {MANIFOLD: report, METHODS: frame}, manifest)

For every amount of real tokens a fresh middle is trained (``surgery.graft``) by each of ``methods``:

    real                  the real pairs alone
    KIND, relabelled      a share of each batch walked (``surgery.graft.walk``), what follows said by the original
    KIND, unrelabelled    the same, what follows left as it was: noise injection
    longer                the real pairs alone, for as many steps more as the relabelling cost
    more real             as many real pairs more as could have been harvested for what the relabelling cost

The last two are the controls: a walk has to beat what its operations buy otherwise. Methods are compared seed by seed.
Every run has a folder of its own (``place``): killed, the same call goes on where it was.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from surgery.corpus.splits import Split
from surgery.graft import grafting as graft
from surgery.graft import manifold, study, walk
from surgery.graft.grafting import Objective, Schedule
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.rebuild import layout
from surgery.records import tables as frames
from surgery.stats import bootstrap as stats
from surgery.training.activations import Latents

METHODS: str = "walk_methods.csv"
MANIFOLD: str = "walk_manifold.csv"
REAL, LONGER, MORE = "real", "longer", "more real"
KINDS: dict[str, walk.Kind] = {"stationary": walk.Stationary(0.9), "tangent": walk.Tangent(0.5)}
SHOWN: dict[str, walk.Kind] = {
    "stationary .99": walk.Stationary(0.99),
    "stationary .9": KINDS["stationary"],
    "stationary .5": walk.Stationary(0.5),
    "free .3": walk.Free(0.3),
    "tangent .5": KINDS["tangent"],
    "interpolated": walk.Interpolated(1.0),
}
COLUMNS: dict[str, dict[str, str]] = {
    MANIFOLD: manifold.COLUMNS,
    METHODS: study.COLUMNS[study.METHODS]
    | {
        "real_tokens": "real tokens that the activations were taken from",
        "harvested": "the same, and of more real with what was harvested for the price of the relabelling",
    },
}
CAPTION = (
    "Held-out unexplained share of the update and loss over the amount of real tokens, a line per method: mean over "
    "seeds, every seed a dot, set apart sideways. More real stands at the amount that it is compared at. Dashed at 1: "
    "the mean update; line: the original."
)

Harvested = Callable[[int], Latents]


def harvester(teacher: Stack, corpus: Tokens, span: tuple[int, int], folder: str | Path) -> Harvested:
    """Activations of so many real tokens at most: the first whole prompts of ``corpus``, harvested when asked for.

    Raises ValueError, when asked, for less than the first prompt and for more than the corpus has.
    """
    lengths = corpus.mask.sum(1).cumsum(0)

    def harvested(tokens: int) -> Latents:
        count = int((lengths <= tokens).sum())
        if not count or tokens > lengths[-1]:
            raise ValueError(
                f"{tokens} real tokens were asked for, the corpus has {int(lengths[-1])} and its first prompt "
                f"{int(lengths[0])}: give an amount from the one to the other"
            )
        return graft.latents(teacher, corpus[:count], *span, Path(folder) / f"latents_{count}", dtype=torch.float32)

    return harvested


def methods(
    teacher: Stack,
    harvested: Harvested,
    amount: int,
    schedule: Schedule,
    *,
    most: int,
    kinds: Mapping[str, walk.Kind] = KINDS,
    noise: Collection[str] = ("stationary",),
    share: float = 0.5,
    objective: Objective = Objective(),
) -> Iterator[tuple[str, Latents, Schedule]]:
    """Name, pairs and schedule of every method for so many real tokens; ``share`` of the prompts is walked, by every
    kind relabelled, by those named in ``noise`` unrelabelled too.

    ``more real`` is ``most`` tokens at most: where that is too few for the price, ``harvested`` in the table says so.
    Cost: a reading of the activations, two training steps, and the span on 64 prompts.

    Raises ValueError for no kind, and as ``walk.fit`` and ``walk.relabelled`` do.
    """
    if not kinds:
        raise ValueError('give at least one kind of walk, such as {"stationary": walk.Stationary(0.9)}')
    real = harvested(amount)
    found, copies = walk.fit(real), max(1, -(-schedule.steps * schedule.batch // real.n_prompts))
    options: dict[str, Any] = {"share": share, "copies": copies, "seed": schedule.seed}
    relabelled = {name: walk.relabelled(real, teacher, found, kind, **options) for name, kind in kinds.items()}
    harvest = real.ledger(teacher).operations(teacher=True)
    *_, one = relabelled.values()  # the price is the same for every kind
    paid = one.ledger(teacher, schedule).operations(teacher=True) - harvest
    more = min(most, real.n_tokens + round(paid * real.n_tokens / harvest))
    trial = layout.build(teacher.model, layout.middle(teacher.n_layers, real.start, real.stop), schedule.seed)
    few = real.batch(range(min(16, real.n_prompts))).tokens
    each = study.step_operations(
        teacher, trial, (real.start, real.stop), real, Split(few, few), objective=objective, schedule=schedule
    )
    yield REAL, real, schedule
    for name, kind in kinds.items():
        yield f"{name}, relabelled", relabelled[name], schedule
        if name in noise:
            yield f"{name}, unrelabelled", walk.unrelabelled(real, found, kind, **options), schedule
    yield LONGER, real, replace(schedule, steps=schedule.steps + round(paid / each))
    yield MORE, harvested(more), schedule


def place(method: str, amount: int, seed: int) -> str:
    """The folder of a run.

    >>> place("tangent, relabelled", 1000, 0)
    'tangent_relabelled_1000_0'
    """
    return f"{method.replace(',', '').replace(' ', '_')}_{amount}_{seed}"


def run(
    teacher: Stack,
    harvested: Harvested,
    data: Split,
    folder: str | Path,
    *,
    amounts: Sequence[int],
    most: int,
    seeds: Sequence[int] = (0, 1, 2),
    schedule: Schedule = Schedule(),
    kinds: Mapping[str, walk.Kind] = KINDS,
    share: float = 0.5,
    objective: Objective = Objective(),
    say: Callable[[str], Any] = lambda _: None,
) -> pd.DataFrame:
    """A row per amount of real tokens, method and seed: ``COLUMNS[METHODS]``. Held-out prompts are those of ``data``.

    Cost: training ``2 len(kinds) + 3`` middles for each amount and seed, and the original's span for what is
    relabelled. Raises as ``methods`` and ``graft.fit`` do, and ValueError for no amount or no seed.
    """
    if not (len(amounts) and len(seeds)):
        raise ValueError("give at least one amount of real tokens and one seed, such as amounts=(1000,), seeds=(0,)")
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"most": most, "kinds": kinds, "share": share, "objective": objective}
    for seed in seeds:
        for amount in amounts:
            for name, pairs, planned in methods(teacher, harvested, amount, replace(schedule, seed=seed), **options):
                span = pairs.start, pairs.stop
                student = layout.build(teacher.model, layout.middle(teacher.n_layers, *span), seed)
                done = graft.fit(
                    teacher,
                    student,
                    span,
                    pairs,
                    data.heldout,
                    Path(folder) / place(name, amount, seed),
                    schedule=planned,
                    objective=objective,
                    answers=data.answers,
                    weigh=data.weigh,
                )
                one = study.row(name, seed, done, study.judge(teacher, done, pairs, data))
                rows.append(one | {"real_tokens": float(amount), "harvested": float(pairs.n_tokens)})
                say(
                    f"{amount} tokens, seed {seed}, {name}: {one['damage']:+.3f} nats a token, unexplained "
                    f"{one['unexplained']:.3f}"
                )
    return pd.DataFrame(rows)


def found(frame: pd.DataFrame) -> list[str]:
    """Every method against the real pairs alone, then every walk against what it cost (``worth``)."""
    said = []
    for amount, missed in _missed(frame):
        for name in (name for name in missed.columns if name != REAL):
            text, word = _gain(missed[REAL] - missed[name])
            said.append(f"{amount:,.0f} real tokens, {name}: {text} of the update's variance more explained; {word}.")
    return said + worth(frame)


def worth(frame: pd.DataFrame) -> list[str]:
    """Does a relabelled walk help more than as much more real data, and more than as many more steps?"""
    said = []
    for amount, missed in _missed(frame):
        for name in (name for name in missed.columns if name.endswith(", relabelled")):
            words = ("helps more", "helps less")
            data, steps = (_gain(missed[other] - missed[name], *words) for other in (MORE, LONGER))
            said.append(
                f"{amount:,.0f} real tokens, {name}, against as much more real data for the same price: {data[0]} of "
                f"the update's variance more explained; {data[1]}. Against as many more steps: {steps[0]}; {steps[1]}."
            )
    return said


def short(frame: pd.DataFrame) -> list[str]:
    """Where more real got clearly less than the price of the relabelling, because there were no more real data."""
    said = []
    for amount, part in frame.groupby("real_tokens"):
        spent = part.groupby("method")["operations_with_teacher"].mean()
        paid = spent.filter(like=", relabelled").max() - spent[REAL]
        if (got := spent[MORE] - spent[REAL]) < 0.9 * paid:
            harvested = part.loc[part["method"] == MORE, "harvested"].mean()
            said.append(
                f"At {amount:,.0f} real tokens more real had {harvested:,.0f}, for {got / paid:.0%} of what the "
                f"relabelling cost: there were no more, and beside it the walk looks better than it is."
            )
    return said


def draw(frame: pd.DataFrame) -> Figure:
    """Unexplained share and held-out loss over real tokens, a line per method: means, every seed as a dot."""
    loss = "cross_entropy_answers" if "cross_entropy_answers" in frame else "cross_entropy"
    of = "answer token" if loss.endswith("answers") else "token"
    panels = {"unexplained": "held-out unexplained share of the update", loss: f"held-out loss, nats per {of}"}
    names, amounts = list(dict.fromkeys(frame["method"])), sorted(frame["real_tokens"].unique())
    styles = {LONGER: ":", MORE: "-."} | {name: "--" for name in names if name.endswith("unrelabelled")}
    figure = Figure(figsize=(11, 4.9), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for number, (name, colour) in enumerate(zip(names, drawing.COLOURS * 3)):
            part, aside = frame[frame["method"] == name], 1.03 ** (number - (len(names) - 1) / 2)
            mean = part.groupby("real_tokens")[column].mean()
            axes.plot(
                mean.index * aside,
                mean,
                styles.get(name, "-"),
                marker="_",
                markersize=9,
                color=colour,
                linewidth=1.4,
                label=name,
            )
            axes.plot(part["real_tokens"] * aside, part[column], ".", color=colour)
        axes.set_xscale("log")
        axes.set_xticks(amounts, [f"{amount:,.0f}" for amount in amounts])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("real tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left, right = figure.axes
    left.axhline(1, color=drawing.FAINT, linestyle="--", linewidth=0.8)
    right.axhline(frame[f"{loss}_original"].iloc[0], color=drawing.INK, linewidth=0.8)
    right.set_yscale("log")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def write(folder: Path, tables: Mapping[str, pd.DataFrame], manifest: Mapping[str, Any]) -> None:
    """These of ``METHODS`` and ``MANIFOLD``, each with its figure. Raises OSError where they cannot be written."""
    for name, table in tables.items():
        figure = draw(table) if name == METHODS else manifold.figure(table)
        frames.write(table, folder / name, manifest, COLUMNS[name])
        frames.save({(folder / name).with_suffix(".png"): drawing.png(figure)})


def _missed(frame: pd.DataFrame) -> Iterator[tuple[Any, pd.DataFrame]]:
    """For each amount of real tokens the unexplained share, a row per seed and a column per method in their order."""
    for amount, part in frame.groupby("real_tokens"):
        missed = part.pivot(index="seed", columns="method", values="unexplained")
        yield amount, missed[list(dict.fromkeys(part["method"]))]


def _gain(differences: pd.Series, above: str = "helps", below: str = "harms") -> tuple[str, str]:
    mean, low, high = stats.t_interval(differences.dropna().to_numpy())
    text = f"{mean:+.3f}" if low != low else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    return text, stats.verdict(low, high, above, below)
