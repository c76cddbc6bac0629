"""The prediction in two halves, within components and across them, and what the measures of models say about it.

Each half has one measure that decides and others beside it (``MEASURES``). Models of the same seed begin with the same
weights and see the same batches, so rates are compared seed by seed: the change of a seed is the slope of a line over
the rates, times the largest rate. Intervals of these changes are over seeds (Student's t).

Prediction, written down before any of the fresh models was looked at. ``additivity`` (A, ``dropout.redundancy``) was
chosen after the shipped models, seeds 0 to 2, had been seen: there it is exploratory. It is to be confirmed on fresh
ones, seeds 3 to 7 of the rates 0 and .4, measured on all held-out problems, mean ablation, in margin units, norms
frozen, matched loss at the lowest rung that all fresh models reach.

* Primary: A of pairs of layers rises with dropout. Its change from 0 to .4, seed by seed, has a two-sided 95 %
  interval (t, over the seeds) above 0, at matched steps and at matched loss: both, so nothing is corrected.
* Secondary: A of pairs of MLPs, and of pairs of heads (100 of them, drawn), rises; each by the same rule.

All three were confirmed (``trained.confirmation``). On the shipped models A of layers had changed by +.174 [.103, .245]
at matched steps and +.103 [-.008, .212] at matched loss: that is exploratory.
"""

import numpy as np
import pandas as pd

from surgery.stats import bootstrap

STEPS, LOSS = "steps", "loss"
FRESH_RATES, FRESH_SEEDS = (0.0, 0.4), (3, 4, 5, 6, 7)  # of the confirmation
WITHIN, ACROSS = "within", "across"
MEASURES = {  # half, predicted sign of its change, in words; of each half the first decides
    "psi": (WITHIN, -1, "effective features per neuron"),
    "participation": (WITHIN, 0, "directions that share the neurons' variance"),
    "kurtosis": (WITHIN, 0, "excess kurtosis of a neuron"),
    "sparsity": (WITHIN, 0, "share of activations that are almost silent"),
    "additivity": (ACROSS, 1, "additivity of pairs of layers (0 chain, 1 independent, above 1 backup)"),
    "additivity_mlps": (ACROSS, 1, "additivity of pairs of MLPs"),
    "additivity_heads": (ACROSS, 1, "additivity of pairs of heads"),
    "mean_rho": (ACROSS, -1, "mean rho of pairs (1 needed together, -1 backup)"),
    "curvature": (ACROSS, 1, "curvature of the damage of random subsets of layers"),
    "self_repair": (ACROSS, 1, "share of a lost direct effect that is repaired"),
    "predictability": (ACROSS, 1, "predictability of a layer's work from another's"),
}
_WORDS = {1: ("confirmed", "refuted"), -1: ("refuted", "confirmed"), 0: ("rises", "falls")}  # by the predicted sign


CONFIRMED = [name for name in MEASURES if name.startswith("additivity")]  # primary first; what fresh models are asked


def confirmed(frame: pd.DataFrame, name: str) -> str:
    """``confirmed`` where the change of a measure lies above 0 at matched steps and at matched loss, else ``not ...``.

    ``exploratory`` where models are among those on which the measure was chosen, ``incomplete`` where a seed or a rate
    of the prediction is missing.

    >>> rows = [
    ...     {"rate": p, "seed": seed, "matched": matched, "additivity": p + seed * p / 100}
    ...     for p in FRESH_RATES
    ...     for seed in FRESH_SEEDS
    ...     for matched in (STEPS, LOSS)
    ... ]
    >>> confirmed(pd.DataFrame(rows), "additivity"), confirmed(pd.DataFrame(rows[:-2]), "additivity")
    ('confirmed', 'incomplete')
    """
    if not set(frame["seed"]) <= set(FRESH_SEEDS):
        return "exploratory"
    if any(len(changes(frame, name, matched)) < len(FRESH_SEEDS) for matched in (STEPS, LOSS)):
        return "incomplete"
    lows = [bootstrap.t_interval(changes(frame, name, matched))[1] for matched in (STEPS, LOSS)]
    return "confirmed" if min(lows) > 0 else "not confirmed"


def measures_of(half: str) -> list[str]:
    """The measures of a half of the prediction, the one that decides first.

    >>> measures_of(WITHIN)
    ['psi', 'participation', 'kurtosis', 'sparsity']
    """
    return [name for name, (of, *_) in MEASURES.items() if of == half]


def changes(frame: pd.DataFrame, name: str, matched: str) -> list[float]:
    """The change of a measure from no dropout to the largest rate, along a line through all rates, of every seed.

    A seed that lacks the measure at one of the rates is left out. Raises ValueError for fewer than two rates.

    >>> rows = [{"rate": p, "seed": 0, "matched": "steps", "psi": 1 - p} for p in (0.0, 0.1, 0.4)]
    >>> [round(change, 6) for change in changes(pd.DataFrame(rows), "psi", "steps")]
    [-0.4]
    """
    models = frame[frame["matched"] == matched]
    if models["rate"].nunique() < 2:
        raise ValueError(f"models of {models['rate'].nunique()} rates of dropout: a change needs two or more")
    rates = models["rate"].nunique()
    whole = [
        run for _, run in models.groupby("seed") if run["rate"].nunique() == rates and np.isfinite(run[name]).all()
    ]
    return [float(np.polyfit(run["rate"], run[name], 1)[0] * models["rate"].max()) for run in whole]


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """Judge every measure of ``MEASURES`` at matched steps and at matched loss; a row each.

    Columns: half, measure, phrase, predicted (its sign), matched, change with ``change_low`` and ``change_high``, seeds
    and verdict. Raises ValueError for fewer than two rates.
    """
    rows = []
    for name, (half, sign, phrase) in MEASURES.items():
        for matched in (STEPS, LOSS):
            by_seed = changes(frame, name, matched)
            mean, low, high = bootstrap.t_interval(by_seed) if by_seed else (np.nan,) * 3
            rows.append(
                {
                    "half": half,
                    "measure": name,
                    "phrase": phrase,
                    "predicted": sign,
                    "matched": matched,
                    "change": mean,
                    "change_low": low,
                    "change_high": high,
                    "seeds": len(by_seed),
                    "verdict": bootstrap.verdict(low, high, *_WORDS[sign]) if by_seed else "undefined",
                }
            )
    return pd.DataFrame(rows)
