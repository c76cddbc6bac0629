"""Does dropout lower superposition within components, and raise redundancy across them? The prediction in two halves.

    made = dropout_models.shipped()
    frame = dropout_study.measure(made)                     # a row per rate, seed and way of matching
    for sentence in dropout_study.found(frame): print(sentence)

*Within* a component: its neurons, side by side. *Across*: layers, one behind the other; if a computation fails in one,
is it also done in another? (WCargo's prediction, and words: "in parallel" and "in series" there are about wiring, not
about what depends on what.) Each half has one measure that decides and others beside it (``MEASURES``). Models of the
same seed begin with the same weights and see the same batches, so rates are compared seed by seed: of every seed the
slope of a line over the rates, times the largest rate; intervals are of these changes over seeds (Student's t).

Compared twice, at equal steps and at equal held-out loss, as models that learned less differ in all of this. A half is
confirmed where both say so. Controls: the models without dropout, and the spread over seeds.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from surgery import hooks
from surgery.dropout import draw as stability_figures
from surgery.dropout import features, mask_ensemble, redundancy, stability, toy_model, trained
from surgery.dropout import say as superposition_findings
from surgery.dropout.trained import Trained
from surgery.models.loading import plain
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.page.drawing import COLOURS
from surgery.records import tables as frames
from surgery.stats import bootstrap as stats
from surgery.stats.sampling import Sampling

MODELS, PROBES, ENSEMBLE = "dropout_models.csv", "dropout_probes.csv", "dropout_ensemble.csv"
PERCEPTRONS, STREAM, TOY = "dropout_perceptrons.csv", "dropout_stream.csv", "dropout_toy.csv"
STEPS, LOSS = "steps", "loss"
WITHIN, ACROSS = "within", "across"
MEASURES = {  # half, predicted sign of its change, in words; of each half the first decides
    "psi": (WITHIN, -1, "effective features per neuron"),
    "participation": (WITHIN, 0, "directions that share the neurons' variance"),
    "kurtosis": (WITHIN, 0, "excess kurtosis of a neuron"),
    "sparsity": (WITHIN, 0, "share of activations that are almost silent"),
    "redundancy_mass": (ACROSS, 1, "redundancy mass of pairs of layers"),
    "mean_rho": (ACROSS, -1, "mean rho of pairs (1 series, -1 backup)"),
    "curvature": (ACROSS, 1, "curvature of the damage of random subsets of layers"),
    "self_repair": (ACROSS, 1, "share of a lost direct effect that is repaired"),
    "predictability": (ACROSS, 1, "predictability of a layer's work from another's"),
}


def _of(half: str) -> list[str]:
    return [name for name, (of, *_) in MEASURES.items() if of == half]


RUN = {
    "rate": "probability p that a unit was dropped in training",
    "seed": "of first weights, batches and masks",
    "matched": "what is equal between rates: steps, or (held-out) loss",
}
COLUMNS: dict[str, dict[str, str]] = {
    MODELS: RUN
    | trained.COLUMNS
    | {name: features.COLUMNS[name] for name in (*_of(WITHIN), "explained", "dead")}
    | {name: redundancy.COLUMNS[name] for name in _of(ACROSS)},
    PROBES: RUN
    | {
        "probe": "what is dropped at test time: layers (stochastic depth) or neurons",
        "p": "probability of that",
        "excess": "held-out loss of answers above that of the model with nothing dropped (nats per answer token)",
    },
    ENSEMBLE: RUN | {"p": "probability that a neuron is dropped at test time"} | mask_ensemble.COLUMNS,
    PERCEPTRONS: stability.COLUMNS,
    STREAM: stability.COLUMNS,
    TOY: toy_model.COLUMNS,
}
CAPTION = (
    "Each measure over the rate of dropout in training, at matched steps and at matched held-out loss: mean over "
    "seeds, every seed a dot. The first of each row decides its half; an arrow shows the direction that was predicted."
)


def measure(
    made: Iterable[Trained],
    *,
    layers: Sequence[int] | None = None,
    count: int = 240,
    coders: int = 1,
    coder_steps: int = 400,
    resamples: int = 100,
    say: Callable[[str], Any] = lambda _: None,
) -> pd.DataFrame:
    """A row per rate, seed and way of matching, on ``count`` held-out problems: ``COLUMNS[MODELS]``.

    ``layers`` are those whose neurons are measured (all but the first if not given), ``coders`` the autoencoders for
    each, trained for ``coder_steps``. Cost: three seconds and, for 200 steps, four a layer, on one core, for a model
    and way of matching.

    Raises ValueError where no loss was reached by all.
    """
    rows = []
    for one, matched, stack in opened(made):
        tokens = _heldout(count)
        heard = list(range(1, stack.n_layers)) if layers is None else list(layers)
        within = features.within(
            stack, tokens, heard, seeds=coders, steps=coder_steps, sampling=Sampling(resamples=0)
        ).mean(numeric_only=True)
        across = redundancy.across(stack, tokens, sampling=Sampling(resamples=resamples)).iloc[0]
        row = _run(one, matched) | trained.judged(_module(stack), trained.data())
        row |= {name: float(within[name]) for name in (*_of(WITHIN), "explained", "dead")}
        row |= {name: float(across[name]) for name in _of(ACROSS)}
        rows.append(row)
        say(
            f"dropout {one.recipe.rate:g}, seed {one.recipe.seed}, matched {matched}: features per neuron "
            f"{row['psi']:.3f}, redundancy mass {row['redundancy_mass']:.3f}"
        )
    return pd.DataFrame(rows)


def probe(
    made: Iterable[Trained], *, rates: Sequence[float] = (0.1, 0.2, 0.4), draws: int = 4, count: int = 120
) -> pd.DataFrame:
    """How much it hurts to drop whole layers or neurons at test time, whatever a model was trained with: a row per
    model, probe and p, ``COLUMNS[PROBES]``. Cost: ``2 draws len(rates) + 1`` F a model.
    """
    rows = []
    for one, matched, stack in opened(made):
        tokens, answers = _heldout(count), _answers(count)
        plain = _answer_loss(stack, tokens, answers, [])
        for name, dropped in (("layers", _layers_dropped), ("neurons", _neurons_dropped)):
            for p in rates:
                losses = [_answer_loss(stack, tokens, answers, dropped(stack, p, seed)) for seed in range(draws)]
                rows.append(_run(one, matched) | {"probe": name, "p": p, "excess": float(np.mean(losses)) - plain})
    return pd.DataFrame(rows)


def ensemble(
    made: Iterable[Trained], p: float = 0.2, *, counts: Sequence[int] = mask_ensemble.COUNTS, count: int = 120
) -> pd.DataFrame:
    """``mask_ensemble.curve`` over neurons of every model after all its steps: ``COLUMNS[ENSEMBLE]``.

    Cost: ``1 + max(counts)`` F a model.
    """
    found = []
    for one, matched, stack in opened(made):
        if matched == STEPS:
            curve = mask_ensemble.curve(stack, _heldout(count), _neurons, p, counts, answers=_answers(count))
            found.append(curve.assign(**_run(one, matched), p=p))
    frame = pd.concat(found, ignore_index=True)
    return frame[[name for name in COLUMNS[ENSEMBLE] if name in frame]]


def opened(made: Iterable[Trained]) -> Iterator[tuple[Trained, str, Stack]]:
    """Every model after all steps, and at the lowest loss that all reached."""
    made = list(made)
    loss = trained.matched(made)
    for one in made:
        yield one, STEPS, one.stack()
        yield one, LOSS, one.stack(loss)


def changes(frame: pd.DataFrame, name: str, matched: str) -> list[float]:
    """Of every seed: the change of a measure from no dropout to the largest rate, along a line through all rates.

    Raises ValueError for fewer than two rates.

    >>> rows = [{"rate": p, "seed": 0, "matched": "steps", "psi": 1 - p} for p in (0.0, 0.1, 0.4)]
    >>> [round(change, 6) for change in changes(pd.DataFrame(rows), "psi", "steps")]
    [-0.4]
    """
    part = frame[frame["matched"] == matched]
    if part["rate"].nunique() < 2:
        raise ValueError(f"models of {part['rate'].nunique()} rates of dropout: a change needs two or more")
    slopes = [np.polyfit(some["rate"], some[name], 1)[0] for _, some in part.dropna(subset=[name]).groupby("seed")]
    return [float(slope * part["rate"].max()) for slope in slopes]


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """Every measure and way of matching: predicted sign, change with its interval over seeds, and what that says."""
    rows = []
    for name, (half, sign, phrase) in MEASURES.items():
        for matched in (STEPS, LOSS):
            found = changes(frame, name, matched)
            mean, low, high = stats.t_interval(found) if found else (np.nan,) * 3
            words = {1: ("confirmed", "refuted"), -1: ("refuted", "confirmed"), 0: ("rises", "falls")}[sign]
            rows.append(
                {
                    "half": half,
                    "measure": name,
                    "phrase": phrase,
                    "predicted": sign,
                    "matched": matched,
                    "change": mean,
                    "low": low,
                    "high": high,
                    "seeds": len(found),
                    "verdict": stats.verdict(low, high, *words),
                }
            )
    return pd.DataFrame(rows)


def rows_of(frame: pd.DataFrame) -> list[Any]:
    """Rows with their columns as attributes."""
    return [SimpleNamespace(**{str(name): value for name, value in row.items()}) for row in frame.to_dict("records")]


def found(frame: pd.DataFrame) -> list[str]:
    """Both halves of the prediction, then a sentence for each measure and way of matching."""
    judged, largest = verdicts(frame), frame["rate"].max()
    said = []
    for half, claim in (
        (WITHIN, "lowers superposition within components"),
        (ACROSS, "raises redundancy across components"),
    ):
        main = judged[judged["half"] == half].head(2)
        words = set(main["verdict"])
        word = words.pop() if len(words) == 1 else "undecided"
        by = ", ".join(f"{one.change:+.3f}{_ends(one)} at matched {one.matched}" for one in rows_of(main))
        said.append(
            f"Dropout {claim}: {word}. {main['phrase'].iloc[0].capitalize()}, from p = 0 to {largest:g}: {by}."
            + _floor(frame, str(main["measure"].iloc[0]))
            + _others(judged, half)
        )
    for one in rows_of(judged):
        predicted = {1: ", predicted to rise", -1: ", predicted to fall", 0: ""}[one.predicted]
        said.append(
            f"{one.half.capitalize()}, matched {one.matched}: {one.phrase}{predicted}: {one.change:+.3f}"
            f"{_ends(one)}; {one.verdict}."
        )
    for matched in (STEPS, LOSS):
        part = frame[frame["matched"] == matched].groupby("rate")[["loss", f"exact_{_LAST}"]].mean()
        listed = "; ".join(
            f"p = {rate:g}: {row['loss']:.2f} nats, {row[f'exact_{_LAST}']:.0%}" for rate, row in part.iterrows()
        )
        said.append(f"Matched {matched}, held-out loss and exact answers at k = {_LAST}: {listed}.")
    return said


def found_probes(frame: pd.DataFrame) -> list[str]:
    """Does dropout in training make dropping at test time hurt less? Per probe and way of matching."""
    said = []
    for (name, matched), part in frame.groupby(["probe", "matched"], sort=False):
        summed = part.groupby(["rate", "seed", "matched"])["excess"].mean().reset_index()
        mean, low, high = stats.t_interval(changes(summed, "excess", str(matched)))
        plain = summed.loc[summed["rate"] == 0, "excess"].mean()
        word = stats.verdict(low, high, "hurts more", "hurts less")
        said.append(
            f"Dropping {name} at test time costs {plain:.2f} nats an answer token without dropout in training; "
            f"with it, matched {matched}, {mean:+.2f} [{low:+.2f}, {high:+.2f}]: {word}."
        )
    return said


def draw(frame: pd.DataFrame) -> Figure:
    """``CAPTION``."""
    columns = max(len(_of(WITHIN)), len(_of(ACROSS)))
    figure = Figure(figsize=(2.7 * columns, 5.4), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    for row, half in zip(grid, (WITHIN, ACROSS), strict=True):
        for axes in row[len(_of(half)) :]:
            axes.set_visible(False)
        for axes, name in zip(row, _of(half)):
            _, sign, phrase = MEASURES[name]
            for (matched, part), colour in zip(frame.groupby("matched", sort=False), COLOURS):
                axes.plot(part.groupby("rate")[name].mean(), color=colour, label=f"matched {matched}")
                axes.plot(part["rate"], part[name], ".", color=colour, markersize=4)
            title = phrase + {1: " \u2191", -1: " \u2193", 0: ""}[sign]
            axes.set_title("\n".join(textwrap.wrap(title, 26)), fontsize=8, loc="left")
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
        row[0].set_ylabel(half, fontweight="bold")
    for axes in grid[-1]:
        axes.set_xlabel("dropout in training", fontsize=8)
    grid[0][0].legend(fontsize=7)
    return figure


def draw_probes(frame: pd.DataFrame) -> Figure:
    """What dropping at test time costs, over the rate in training, a panel per probe and a line per p."""
    kinds = list(dict.fromkeys(frame["probe"]))
    figure = Figure(figsize=(4 * len(kinds), 3.4), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        part = frame[(frame["probe"] == name) & (frame["matched"] == LOSS)]
        for (p, some), colour in zip(part.groupby("p"), COLOURS):
            axes.plot(some.groupby("rate")["excess"].mean(), color=colour, label=f"{p:.0%} of the {name}")
            axes.plot(some["rate"], some["excess"], ".", color=colour, markersize=4)
        axes.set_title(f"{name} dropped at test time", loc="left", fontsize=10)
        axes.set_xlabel("dropout in training")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("loss above nothing dropped,\nnats per answer token")
    return figure


def found_ensemble(frame: pd.DataFrame) -> list[str]:
    """How far one mask, the average of many, and dropout switched off are from each other: a sentence a rate."""
    said, most = [], frame["count"].max()
    asked = {
        "nothing dropped": (mask_ensemble.SCALING, 0),
        "one mask": (mask_ensemble.ARITHMETIC, 1),
        f"{most} masks, mean probability": (mask_ensemble.ARITHMETIC, most),
        f"{most} masks, mean log-probability": (mask_ensemble.GEOMETRIC, most),
    }
    for rate, part in frame.groupby("rate"):
        listed = []
        for what, (way, count) in asked.items():
            rows = part[(part["way"] == way) & (part["count"] == count)]
            listed.append(f"{what} {rows['cross_entropy_answers'].mean():.2f} nats, {rows['exact'].mean():.0%}")
        said.append(
            f"Trained with dropout {rate:g}, {frame['p'].iloc[0]:g} of the neurons dropped (nats an answer "
            f"token, whole answers right): {'; '.join(listed)}."
        )
    return said


DRAWN: Mapping[str, Callable[[pd.DataFrame], Figure]] = {
    MODELS: draw,
    PROBES: draw_probes,
    ENSEMBLE: lambda frame: mask_ensemble.draw(_pooled(frame)),
    PERCEPTRONS: stability_figures.draw,
    STREAM: stability_figures.draw,
    TOY: superposition_findings.draw,
}
SAID: Mapping[str, Callable[[pd.DataFrame], list[str]]] = {
    MODELS: found,
    PROBES: found_probes,
    ENSEMBLE: found_ensemble,
    PERCEPTRONS: stability.found,
    STREAM: lambda frame: [f"In the small models: {sentence}" for sentence in stability.found(frame)],
    TOY: lambda frame: [superposition_findings.found(frame)],
}
CAPTIONS = {
    MODELS: CAPTION,
    PROBES: "Loss above nothing dropped when layers or neurons are dropped at test time, over the rate of dropout in "
    "training, at matched held-out loss: mean over seeds, every seed a dot.",
    ENSEMBLE: "Averages of 1 to 64 subnetworks of the models with the most dropout, beside the same model with nothing "
    "dropped (scaling); mean over seeds.",
    PERCEPTRONS: "Variance of activations and norm of gradients over training, with and without dropout, perceptrons "
    "of several widths and depths.",
    STREAM: "The same of the small models' residual stream, without dropout.",
    TOY: "The toy model of superposition: features per dimension and interference over sparsity and dropout.",
}


def write(folder: str | Path, tables: Mapping[str, pd.DataFrame], manifest: Mapping[str, Any]) -> list[Path]:
    """The tables by file name and the figure of each; returns their paths. Raises OSError."""
    folder, written = frames.folder(folder), []
    for name, frame in tables.items():
        frames.write(frame, folder / name, dict(manifest), COLUMNS[name])
        picture = (folder / name).with_suffix(".png")
        frames.save({picture: drawing.png(DRAWN[name](frame))})
        written += [folder / name, picture]
    return written


# --- inside ----------------------------------------------------------------------------------------------------------

_LAST = len(trained.SHARES) - 1


def _neurons(name: str) -> bool:
    return name.endswith(".mlp.out.hook_in")


def _floor(frame: pd.DataFrame, name: str) -> str:
    values = frame[name]
    same = f" It is {values.iloc[0]:.3f} in every model, so it tells nothing."
    return same if np.ptp(values) < 1e-6 else ""


def _others(judged: pd.DataFrame, half: str) -> str:
    """How many of the measures that do not decide agree."""
    others = judged[(judged["half"] == half) & (judged["predicted"] != 0)].iloc[2:]
    if others.empty:
        return ""
    counted = [
        f"{(part['verdict'] == 'confirmed').sum()} confirm and {(part['verdict'] == 'refuted').sum()} refute at "
        f"matched {matched}"
        for matched, part in others.groupby("matched", sort=False)
    ]
    return f" Of the other {len(others) // 2} measures, {', '.join(counted)}."


def _ends(one: Any) -> str:
    return "" if one.low != one.low else f" [{one.low:+.3f}, {one.high:+.3f}]"


def _run(one: Trained, matched: str) -> dict[str, Any]:
    return {"rate": one.recipe.rate, "seed": one.recipe.seed, "matched": matched}


def _chosen(count: int) -> slice:
    """So many held-out problems, of every length."""
    return slice(None, None, max(1, len(trained.data().heldout) // count))


def _heldout(count: int) -> Tokens:
    return trained.data().heldout[_chosen(count)]


def _answers(count: int) -> Bool[Tensor, "prompt pos"]:
    answers = trained.data().answers
    assert answers is not None
    return answers[_chosen(count)]


def _module(stack: Stack) -> torch.nn.Module:
    module = plain(stack.model)
    assert module is not None
    return module


def _answer_loss(stack: Stack, tokens: Tokens, answers: Bool[Tensor, "prompt pos"], dropped: list[hooks.Hook]) -> float:
    with stack.model.hooks(fwd_hooks=dropped), torch.no_grad():
        logits = stack.run(tokens)
    each = cross_entropy(logits[:, :-1].transpose(1, 2), tokens.ids[:, 1:], reduction="none")
    return float(each[answers[:, 1:]].mean())


def _layers_dropped(stack: Stack, p: float, seed: int) -> list[hooks.Hook]:
    return hooks.stochastic_depth(stack.model, p, seed)


def _neurons_dropped(stack: Stack, p: float, seed: int) -> list[hooks.Hook]:
    return hooks.dropout(stack.model, _neurons, p, seed)


def _pooled(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean over seeds of the models with the largest rate, as ``mask_ensemble.draw`` takes it."""
    most = frame[frame["rate"] == frame["rate"].max()]
    return most.groupby(["way", "count"], sort=False).mean(numeric_only=True).reset_index()
