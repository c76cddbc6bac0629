"""What the tables of dropout say, in sentences. Pure functions of the frames.

>>> from surgery.dropout import perceptrons, toy_model as toy
>>> frame = perceptrons.perceptrons((4, 8), (1,), (0.0, 0.5), (0, 1), steps=4, every=1, examples=16)
>>> len(stability(frame))
10
>>> frame = toy.sweep((0.0, 0.9), (0.0, 0.5), (0, 1), n_features=6, n_hidden=2, steps=20)
>>> toy_model(frame)[0].startswith("With importance falling by 0.7")
True
"""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float

from surgery.dropout import mask_ensemble, trained
from surgery.dropout.files import CONFIRMATION, ENSEMBLE, MODELS, PERCEPTRONS, PROBES, STREAM, TOY
from surgery.dropout.stability import (
    EFFECTS,
    HARDLY,
    NEGLIGIBLE,
    SPREADS,
    effects,
    effects_at_equal_loss,
    run_statistics,
    share_of_effect,
)
from surgery.dropout.toy_model import differences
from surgery.dropout.verdicts import (
    ACROSS,
    CONFIRMED,
    LOSS,
    MEASURES,
    STEPS,
    WITHIN,
    changes,
    confirmed,
    verdicts,
)
from surgery.page import parts
from surgery.page.phrases import interval, number
from surgery.stats import bootstrap

PerSeed = Float[np.ndarray, " seed"]

SMALL = 0.01  # smaller changes of the toy model's measures are not spoken of, however certain
_CLAIMS = {WITHIN: "lowers superposition within components", ACROSS: "raises redundancy across components"}
_LONGEST = len(trained.SHARES) - 1  # steps of the hardest problems
_TOY_MEASURES = {
    "effective_features": "effective features per dimension",
    "dimensionality": "a feature's share of a dimension",
    "features_per_dimension": "features per dimension, shrinking weights included,",
    "interference": "interference",
}


# --- the models ------------------------------------------------------------------------------------------------------


def models(frame: pd.DataFrame) -> list[str]:
    """Both halves of the prediction, then a sentence for each measure and way of matching, then what was learned."""
    judged, largest = verdicts(frame), frame["rate"].max()
    sentences = []
    for half, claim in _CLAIMS.items():
        main = judged[judged["half"] == half].head(2)
        words = set(main["verdict"])
        word = words.pop() if len(words) == 1 else "undecided"
        values = ", ".join(
            f"{number(row, 'change', 3, signed=True)} at matched {row['matched']}" for row in parts.rows(main)
        )
        sentences.append(
            f"Dropout {claim}: {word}. {main['phrase'].iloc[0].capitalize()}, from p = 0 to {largest:g}: {values}."
            + _constant(frame, str(main["measure"].iloc[0]))
            + _exploratory(frame, str(main["measure"].iloc[0]))
            + _other_measures(judged, half)
        )
    for row in parts.rows(judged):
        predicted = {1: ", predicted to rise", -1: ", predicted to fall", 0: ""}[row["predicted"]]
        sentences.append(
            f"{row['half'].capitalize()}, matched {row['matched']}: {row['phrase']}{predicted}: "
            f"{number(row, 'change', 3, signed=True)}; {row['verdict']}."
        )
    for matched in (STEPS, LOSS):
        scores = frame[frame["matched"] == matched].groupby("rate")[["loss", f"exact_{_LONGEST}"]].mean()
        values = "; ".join(
            f"p = {rate:g}: {row['loss']:.2f} nats, {row[f'exact_{_LONGEST}']:.0%}" for rate, row in scores.iterrows()
        )
        sentences.append(f"Matched {matched}, held-out loss and exact answers at k = {_LONGEST}: {values}.")
    return sentences


def _constant(frame: pd.DataFrame, name: str) -> str:
    values = frame[name]
    return f" It is {values.iloc[0]:.3f} in every model, so it says nothing." if np.ptp(values) < 1e-6 else ""


def _exploratory(frame: pd.DataFrame, name: str) -> str:
    seen = name in CONFIRMED and confirmed(frame, name) == "exploratory"
    return " Exploratory: this measure was chosen after models of these seeds had been seen." * seen


def confirmation(frame: pd.DataFrame) -> list[str]:
    """What was predicted of fresh models, and whether it is so: a sentence per unit, the primary one first.

    A frame with models on which the measure was chosen, or without all that was predicted about, confirms nothing.
    """
    sentences, most = [], frame["rate"].max()
    for name in CONFIRMED:
        word, kind = confirmed(frame, name), "Primary" if name == CONFIRMED[0] else "Secondary"
        values = []
        for matched in (STEPS, LOSS):
            part = frame[frame["matched"] == matched]
            levels = part.groupby("rate")[name].mean()
            change = interval(*bootstrap.t_interval(changes(frame, name, matched)), 3, signed=True)
            values.append(f"{change} at matched {matched} (from {levels.loc[0]:.2f} to {levels.loc[most]:.2f})")
        sentences.append(
            f"{kind} prediction, written down before these {frame['seed'].nunique()} fresh seeds were measured: "
            f"dropout raises {MEASURES[name][2]}, from p = 0 to {most:g}: {word}; {', '.join(values)}."
        )
    return sentences


def _other_measures(judged: pd.DataFrame, half: str) -> str:
    """How many of the measures that do not decide agree."""
    others = judged[(judged["half"] == half) & (judged["predicted"] != 0)].iloc[2:]
    if others.empty:
        return ""
    counts = [
        f"{(part['verdict'] == 'confirmed').sum()} confirm and {(part['verdict'] == 'refuted').sum()} refute at "
        f"matched {matched}"
        for matched, part in others.groupby("matched", sort=False)
    ]
    return f" Of the other {len(others) // 2} measures, {', '.join(counts)}."


def probes(frame: pd.DataFrame) -> list[str]:
    """Does dropout in training make dropping at test time hurt less? A sentence per probe and way of matching."""
    sentences = []
    for (name, matched), part in frame.groupby(["probe", "matched"], sort=False):
        means = part.groupby(["rate", "seed", "matched"])["excess"].mean().reset_index()
        mean, low, high = bootstrap.t_interval(changes(means, "excess", str(matched)))
        without = means.loc[means["rate"] == 0, "excess"].mean()
        word = bootstrap.verdict(low, high, "hurts more", "hurts less")
        sentences.append(
            f"Dropping {name} at test time costs {without:.2f} nats per answer token without dropout in training; "
            f"with it, matched {matched}, {interval(mean, low, high, signed=True)}: {word}."
        )
    return sentences


# --- averages over masks ---------------------------------------------------------------------------------------------


def ensembles(frame: pd.DataFrame) -> list[str]:
    """How far apart are one mask, the average of many, and dropout switched off? A sentence per rate in training."""
    sentences, most = [], frame["count"].max()
    predictors = {
        "nothing dropped": (mask_ensemble.SCALING, 0),
        "one mask": (mask_ensemble.ARITHMETIC, 1),
        f"{most} masks, mean probability": (mask_ensemble.ARITHMETIC, most),
        f"{most} masks, mean log-probability": (mask_ensemble.GEOMETRIC, most),
    }
    for rate, part in frame.groupby("rate"):
        values = []
        for name, (way, count) in predictors.items():
            rows = part[(part["way"] == way) & (part["count"] == count)]
            values.append(f"{name} {rows['cross_entropy_answers'].mean():.2f} nats, {rows['exact'].mean():.0%}")
        sentences.append(
            f"Trained with dropout {rate:g}, {frame['p'].iloc[0]:g} of the neurons dropped (nats per answer token, "
            f"exact answers): {'; '.join(values)}."
        )
    return sentences


def mask_averages(frame: pd.DataFrame) -> list[str]:
    """What the largest number of masks of ``mask_ensemble.curve`` leaves between each average and dropout off.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack, tokens = Stack(known_networks.random_network(n_layers=2)), known_networks.tokens(8, 6)
    >>> print(mask_averages(mask_ensemble.curve(stack, tokens, "unembed.hook_in", 0.0, (1, 2)))[0])
    Arithmetic mean of 2 masks: 0.0000 [0.0000, 0.0000] nats of KL from dropout off, loss +0.0000 [+0.0000, +0.0000].
    """
    last = frame[frame["count"] == frame["count"].max()]
    last = last.assign(**{name: last[name] + 0.0 for name in last.select_dtypes(float)})  # no negative zeros
    return [
        f"{row['way'].capitalize()} mean of {row['count']} mask{'s' * (row['count'] > 1)}: {number(row, 'kl', 4)} nats "
        f"of KL from dropout off, loss {number(row, 'excess', 4, signed=True)}."
        for row in parts.rows(last)
    ]


# --- stability of training -------------------------------------------------------------------------------------------


def stability(frame: pd.DataFrame) -> list[str]:
    """Claims about the stability of training, a sentence each, by 95 % intervals over seeds of paired differences.

    A claim is confirmed or refuted where the interval (Student's t) lies on one side; that dropout changes nothing is
    claimed only where the whole interval is below 5 %. Claims about width and depth are judged where there are several.
    Nothing corrects for the number of sentences: where there is no effect, one in twenty claims one.

    Raises ValueError where no run has ``rate`` 0 or all have, and as ``stability.run_statistics`` does.
    """
    runs = run_statistics(frame)
    rates, widths, depths = (sorted(runs[name].unique().tolist()) for name in ("rate", "width", "depth"))
    if rates[0] != 0 or len(rates) < 2:
        raise ValueError(
            f"dropout is compared with training without it, the rates are {', '.join(f'{p:g}' for p in rates)}: give 0 "
            "and at least one more"
        )
    sentences = [sentence for rate in rates[1:] for sentence in _variance_and_steadiness(frame, runs, rate)]
    if len(widths) > 1:
        sentences += [_wider(runs, rate, name) for rate in rates for name in SPREADS if runs[name].notna().any()]
    if len(depths) > 1:
        sentences.append(_shallower(runs, depths[0], depths[-1]))
        sentences += [_hardly_shows(runs, rate, name, depths[0], depths[-1]) for rate in rates[1:] for name in EFFECTS]
    return sentences


def stream(frame: pd.DataFrame) -> list[str]:
    """The sentences of ``stability`` about the residual stream of the small models."""
    return [f"In the small models: {sentence}" for sentence in stability(frame)]


def _variance_and_steadiness(frame: pd.DataFrame, runs: pd.DataFrame, rate: float) -> list[str]:
    """Does dropout change the variance, at equal steps and at equal loss, and is it steadier?"""
    sentences = []
    for values, where in (
        (effects(runs, rate, "log_variance"), "at equal steps"),
        (effects_at_equal_loss(frame, rate), "at equal held-out loss"),
    ):
        ratio = interval(*np.exp(bootstrap.t_interval(_by_seed(values))))
        sentences.append(
            f"Dropout {rate:g} changes the variance of activations, {where}: {_change(_by_seed(values))}; {ratio} "
            f"times that without (geometric mean){_by_depth(values, _change)}."
        )
    for name, measure in (
        ("variation", "coefficient of variation"),
        ("variance_jitter", f"standard deviation of {SPREADS['variance_jitter']}"),
    ):
        values = effects(runs, rate, name)
        sentences.append(
            f"With dropout {rate:g} the variance is steadier over training: {_falls(_by_seed(values))}; {measure} over "
            f"the last half of the steps, with minus without: {_mean(_by_seed(values))}{_by_depth(values, _falls)}."
        )
    return sentences


def _wider(runs: pd.DataFrame, rate: float, name: str) -> str:
    wide = runs[runs["rate"] == rate].pivot_table(index="seed", columns="width", values=name).dropna()
    octaves = np.log2(wide.columns.to_numpy(float))
    octaves -= octaves.mean()
    slopes = wide.to_numpy() @ octaves / (octaves @ octaves)
    return (
        f"A wider network trains more stably, {dropout_rate(rate)}: {_falls(slopes)}; standard deviation of "
        f"{SPREADS[name]} over the last half of the steps, per doubling of the width: {_mean(slopes)}."
    )


def _shallower(runs: pd.DataFrame, shallow: int, deep: int) -> str:
    steps = runs[runs["rate"] == 0].pivot_table(index="seed", columns="depth", values="converged")
    steps = steps[[shallow, deep]].dropna()
    difference = (steps[deep] - steps[shallow]).to_numpy()
    return (
        f"A shallower network converges sooner, without dropout: {_falls(-difference)}; the held-out loss is within "
        f"5 % of its best after {steps[shallow].mean():.0f} steps with {layer_count(shallow)} and "
        f"{steps[deep].mean():.0f} with {layer_count(deep)}, difference {_mean(difference, 0)}."
    )


def _hardly_shows(runs: pd.DataFrame, rate: float, name: str, shallow: int, deep: int) -> str:
    words, values = list[str](), list[str]()
    for width, part in effects(runs, rate, name).groupby("width"):
        by_depth = part.unstack("depth").reindex(columns=[shallow, deep]).dropna()
        if by_depth.empty:
            continue
        near, far = by_depth[shallow].to_numpy(), by_depth[deep].to_numpy()
        words.append(share_of_effect(near, far))
        values.append(f"{_mean(near)} and {_mean(far)} at width {width}")
    word = words[0] if len(set(words)) == 1 else f"undecided, from width to width {', '.join(words) or 'not trained'}"
    return (
        f"With {layer_count(shallow)} dropout {rate:g} hardly shows (less than {HARDLY:g} of its effect with "
        f"{layer_count(deep)}): {word}; with minus without, {EFFECTS[name]}: {', '.join(values)}."
    )


def _by_seed(values: pd.Series) -> PerSeed:
    return values.groupby("seed").mean().to_numpy()


def _by_depth(values: pd.Series, judge: Callable[[PerSeed], str]) -> str:
    """The verdict of ``judge`` at every depth, where there are several: an average over them can hide much."""
    words = [f"{judge(_by_seed(part))} with {layer_count(int(str(depth)))}" for depth, part in values.groupby("depth")]
    return f"; by depth: {', '.join(words)}" if len(words) > 1 else ""


def _change(values: PerSeed) -> str:
    _, low, high = bootstrap.t_interval(values)
    if low > -NEGLIGIBLE and high < NEGLIGIBLE:
        return f"refuted (less than {NEGLIGIBLE:.0%})"
    return bootstrap.verdict(low, high, "confirmed (higher)", "confirmed (lower)")


def _falls(values: PerSeed) -> str:
    return bootstrap.verdict(*bootstrap.t_interval(values)[1:], "refuted", "confirmed")


def _mean(values: PerSeed, digits: int = 3) -> str:
    return interval(*bootstrap.t_interval(values), digits, signed=True)


def dropout_rate(rate: float) -> str:
    """The rate in words.

    >>> dropout_rate(0.5), dropout_rate(0.0)
    ('with dropout 0.5', 'without dropout')
    """
    return f"with dropout {rate:g}" if rate else "without dropout"


def layer_count(count: int) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} layer" if count == 1 else f"{count} layers"


# --- the toy model ---------------------------------------------------------------------------------------------------


def toy_model(frame: pd.DataFrame) -> list[str]:
    """Does dropout lower superposition at equal sparsity? One sentence for every ``decay`` in a sweep of the toy model.

    Less superposition is what both measures that do not depend on the scale of W say: fewer effective features, and a
    larger share of a dimension for each, by at least ``SMALL``; more, the reverse of both.
    """
    return [_sentence(decay, frame[frame["decay"] == decay]) for decay in sorted(frame["decay"].unique())]


def _sentence(decay: float, frame: pd.DataFrame) -> str:
    table = differences(frame)
    overall, single = table["sparsity"].isna(), table["sparsity"].notna()
    steps, matched = table["control"] == "steps", table["control"] == "loss"
    last = table[overall & steps & (table["rate"] == table["rate"].max())].set_index("measure")
    values = ", ".join(f"{words} {number(last.loc[name], 'difference')}" for name, words in _TOY_MEASURES.items())
    kind = "With all features equally important" if decay == 1 else f"With importance falling by {decay:g} a feature"
    return (
        f"{kind}, in the mean over {frame['sparsity'].nunique()} sparsities dropout "
        f"{_superposition(table[overall & steps], 'rate')} (at rate {table['rate'].max():g}, "
        f"{frame['seed'].nunique()} seeds paired: {values}); sparsity by sparsity it "
        f"{_superposition(table[single & steps], 'sparsity')}; compared with models without it that were stopped early "
        f"at equal loss, it {_superposition(table[overall & matched], 'rate')}."
    )


def _superposition(table: pd.DataFrame, axis: str) -> str:
    """``lowers superposition at rate 0.2, 0.5 and raises it at rate 0.1``: where that is clear and not ``SMALL``."""
    table = table[table["difference"].abs() >= SMALL].fillna({"sparsity": -1})
    judged = table.pivot(index=["rate", "sparsity"], columns="measure", values="verdict")
    judged = judged.reindex(columns=list(_TOY_MEASURES))
    clauses: list[str] = []
    for verb, features, share in (("lowers", "lower", "higher"), ("raises", "higher", "lower")):
        clear = judged[(judged["effective_features"] == features) & (judged["dimensionality"] == share)]
        places = ", ".join(f"{place:g}" for place in sorted(set(clear.index.get_level_values(axis))))
        if places:
            clauses.append(f"{verb} {'it' if clauses else 'superposition'} at {axis} {places}")
    return " and ".join(clauses) or "does not clearly change superposition anywhere"


SENTENCES: Mapping[str, Callable[[pd.DataFrame], list[str]]] = {
    MODELS: models,
    CONFIRMATION: confirmation,
    PROBES: probes,
    ENSEMBLE: ensembles,
    PERCEPTRONS: stability,
    STREAM: stream,
    TOY: lambda frame: [" ".join(toy_model(frame))],
}
