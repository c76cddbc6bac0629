r"""How far the picture of ``2^n`` subnetworks holds: predictions averaged over masks, against dropout switched off.

Training with dropout is said to train ``2^n`` subnetworks that share weights, and switching it off with the weights
scaled to average them. ``count`` masks are drawn, the model predicts under each, and the predictions are averaged:

================  =====================================================================================================
way               what predicts
================  =====================================================================================================
``arithmetic``    the mean of the probabilities (MC dropout: Gal and Ghahramani 2016, arXiv 1506.02142)
``geometric``     the mean of the log-probabilities, normalised (Baldi and Sadowski 2013)
``scaling``       the model with nothing dropped, as every other measure sees it: the control, one row of count 0
================  =====================================================================================================

Where nothing but a softmax layer comes after the mask, ``geometric`` goes to ``scaling`` as ``1 / sqrt(count)`` (its KL
as ``1 / count``), and ``arithmetic`` to something else. Through more layers neither does: what ``kl`` and ``excess``
keep at large counts is how far the picture is off. A model trained without dropout is the other control: its
subnetworks were never trained, and their average may be far worse than the model. (Srivastava et al. 2014 needed about
50 masks to match scaling.)

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack, names = Stack(known_networks.random_network(n_layers=2)), ["unembed.hook_in"]
>>> frame = curve(stack, known_networks.tokens(8, 6), names, 0.2, (1, 4), sampling=Sampling(resamples=0))
>>> frame[["way", "count"]].values.tolist()
[['scaling', 0], ['arithmetic', 1], ['geometric', 1], ['arithmetic', 4], ['geometric', 4]]
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter
from torch import Tensor

from surgery import hooks
from surgery.dropout import identities as dropout
from surgery.instruments.ensemble import Ensemble, Totals
from surgery.instruments.fidelity import Answers, checked_answers
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.page.drawing import ACCENT, BLUE, FAINT, INK
from surgery.stats.bootstrap import columns, described, weights
from surgery.stats.sampling import Sampling

COUNTS = (1, 2, 4, 8, 16, 32, 64)
SCALING, ARITHMETIC, GEOMETRIC = "scaling", "arithmetic", "geometric"
MEASURES = {
    "cross_entropy": "loss of the next token (nats per predicted token)",
    "excess": "cross_entropy - that of scaling, paired",
    "accuracy": "share of predicted tokens that are the first choice",
    "kl": "KL(scaling || this) of the next-token distributions (nats per predicted token)",
    "variance": "over masks, of the probabilities, summed over the vocabulary (unbiased; none of one mask; 0: scaling)",
}
ANSWERS = {
    "exact": "share of prompts all of whose answer tokens are the first choice, given what stands before them",
    "cross_entropy_answers": "loss of the answers' tokens (nats per answer token)",
}
COLUMNS = {
    "way": "how predictions are put together: arithmetic, geometric, or scaling (dropout off)",
    "count": "masks averaged; 0 for scaling",
    "n_prompts": "number of prompts, the unit of resampling",
    "n_predictions": "number of predicted tokens",
} | described(MEASURES | ANSWERS)
COLOURS = {ARITHMETIC: ACCENT, GEOMETRIC: BLUE, SCALING: INK}
LogP = Float[Tensor, "token d_vocab"]


def curve(
    stack: Stack,
    tokens: Tokens | Tensor,
    names: "str | Iterable[str] | Callable[[str], bool]",
    p: float,
    counts: Sequence[int] = COUNTS,
    *,
    shared: bool = True,
    answers: Answers | None = None,
    sampling: Sampling = Sampling(batch_size=32),
) -> pd.DataFrame:
    """A row per way and count, ``COLUMNS``: hook points ``names`` dropped with probability ``p``.

    A mask is a subnetwork, the same for all prompts and positions (``shared``), or drawn per prompt, position and unit
    as in training. Larger counts go on where smaller ones stopped, so they share masks; intervals are over prompts, for
    these masks: other seeds tell what the masks' choice adds. ``answers`` marks the tokens that answer, as in
    ``fidelity.measure``, and adds the columns of ``ANSWERS``. Cost: ``1 + max(counts)`` F. Memory: the logits of a
    batch six times in float64.

    Raises ValueError for counts that are not positive, a model in training mode (``dropout.require_off``), logits that
    are not finite, and as ``hooks.dropout`` and ``fidelity.measure`` do.
    """
    if not counts or min(counts) < 1:
        raise ValueError(f"counts say how many masks to average, each 1 or more; got {tuple(counts)}")
    dropout.require_off(stack.model)
    ensemble = Ensemble.of(stack, tokens, sampling)
    asked, first = checked_answers(answers, ensemble.tokens), 0
    names = names if callable(names) or isinstance(names, str) else list(names)
    drawn = [
        hooks.dropout(stack.model, names, p, sampling.seed * 1_000_003 + mask, shared=shared)
        for mask in range(max(counts))
    ]
    totals = Totals(ensemble.n_units)
    for unit, context, _ in ensemble.batches(stack, "masks"):
        real = context.tokens.mask
        predicting = real & torch.roll(real, -1, 1)
        predicting[:, -1] = False
        rows, places = predicting.nonzero(as_tuple=True)
        targets = context.tokens.ids[rows, places + 1]
        answering = None if asked is None else asked[first : first + len(unit)][rows, places + 1]
        owner = unit[rows.cpu()]

        def book(key: Hashable, values: Tensor, owner: Tensor = owner) -> None:
            totals.add(key, owner, values.double())

        book("predictions", torch.ones_like(targets))
        if answering is not None:
            book("answers", answering)
            totals.add("prompts", unit, torch.ones(len(unit)))
        scaling = _log_p(stack, context, predicting, [])
        ways = _averages(stack, context, predicting, drawn, set(counts))
        for key, q, variance in itertools.chain([((SCALING, 0), scaling, torch.zeros_like(scaling[:, 0]))], ways):
            loss, right = -q.gather(1, targets[:, None]).squeeze(1), q.argmax(-1) == targets
            book((*key, "cross_entropy"), loss)
            book((*key, "accuracy"), right)
            book((*key, "kl"), (scaling.exp() * (scaling - q)).sum(-1))
            book((*key, "variance"), variance)
            if answering is not None:
                book((*key, "cross_entropy_answers"), answering * loss)
                wrong = torch.zeros(len(unit), device=rows.device).index_add(0, rows, (answering & ~right).float())
                totals.add((*key, "exact"), unit, (wrong == 0).double())
        first += len(unit)
    draws = weights(ensemble.n_units, sampling.resamples if ensemble.n_units > 1 else 0, sampling.seed)
    keys = [(SCALING, 0)] + [(way, count) for count in sorted(set(counts)) for way in (ARITHMETIC, GEOMETRIC)]
    return pd.DataFrame([_row(totals, key, draws, len(ensemble.tokens)) for key in keys])


def _averages(
    stack: Stack, context: Context, predicting: Bool[Tensor, "prompt pos"], drawn: list[list[hooks.Hook]], at: set[int]
) -> Iterator[tuple[tuple[str, int], LogP, Float[Tensor, " token"]]]:
    """Both means of the predictions under the first ``count`` masks, and their variance, for every count in ``at``."""
    total_p = total_log_p = total_square = torch.zeros(())
    for count, masks in enumerate(drawn, 1):
        log_p = _log_p(stack, context, predicting, masks)
        p = log_p.exp()
        total_p, total_log_p = total_p.to(p) + p, total_log_p.to(p) + log_p
        total_square = total_square.to(p) + p.square().sum(-1)
        if count in at:
            mean = total_p / count
            spread = (total_square - count * mean.square().sum(-1)) / (count - 1) if count > 1 else p[:, 0] * torch.nan
            yield (ARITHMETIC, count), mean.log(), spread
            yield (GEOMETRIC, count), (total_log_p / count).log_softmax(-1), spread


def _log_p(stack: Stack, context: Context, predicting: Bool[Tensor, "prompt pos"], masks: list[hooks.Hook]) -> LogP:
    with stack.model.hooks(fwd_hooks=masks):
        logits = stack.run(context.tokens, positions=predicting)
    if not logits.isfinite().all():
        raise ValueError(f"the logits of {stack.name} are not finite: load it in float32, or mend its weights")
    return logits.double().log_softmax(-1)


def _row(
    totals: Totals, key: tuple[str, int], draws: Float[Tensor, "resample unit"], n_prompts: int
) -> dict[str, str | int | float]:
    def mean(name: str, over: str = "predictions", of: tuple[str, int] = key) -> Float[Tensor, " resample"]:
        return draws @ totals[(*of, name)] / (draws @ totals[over])

    measures = {name: mean(name) for name in MEASURES if name != "excess"}
    measures["excess"] = measures["cross_entropy"] - mean("cross_entropy", of=(SCALING, 0))
    if "answers" in totals:
        measures["exact"] = mean("exact", "prompts")
        measures["cross_entropy_answers"] = mean("cross_entropy_answers", "answers")
    row: dict[str, str | int | float] = {"way": key[0], "count": key[1], "n_prompts": n_prompts}
    row["n_predictions"] = int(totals["predictions"].sum())
    for name in MEASURES | ANSWERS:
        row |= columns(name, measures[name]) if name in measures else {}
    return row


def found(frame: pd.DataFrame) -> list[str]:
    """What the most masks leave between each average and dropout switched off, in sentences.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.random_network(n_layers=2))
    >>> print(found(curve(stack, known_networks.tokens(8, 6), "unembed.hook_in", 0.0, (1, 2)))[0])
    Arithmetic mean of 2 masks: 0.0000 [0.0000, 0.0000] nats of KL from dropout off, loss +0.0000 [+0.0000, +0.0000].
    """
    last = frame[frame["count"] == frame["count"].max()]
    return [
        f"{str(row['way']).capitalize()} mean of {row['count']} mask{'s' * (row['count'] > 1)}: "
        f"{_interval(row, 'kl', '.4f')} nats of KL from dropout off, loss {_interval(row, 'excess', '+.4f')}."
        for _, row in last.iterrows()
    ]


def _interval(row: pd.Series, name: str, style: str) -> str:
    value, low, high = (float(row[name + end]) + 0.0 for end in ("", "_low", "_high"))
    return f"{value:{style}}" if np.isnan(low) else f"{value:{style}} [{low:{style}}, {high:{style}}]"


def draw(frame: pd.DataFrame) -> Figure:
    """Loss (of the answers, if there are), KL from scaling and variance by the number of masks, with intervals."""
    loss = "cross_entropy_answers" if "cross_entropy_answers" in frame else "cross_entropy"
    panels = {
        loss: "loss\n(nats per answer token)" if loss != "cross_entropy" else "loss\n(nats per token)",
        "kl": "KL from dropout off\n(nats per token)",
        "variance": "variance of the probabilities\nover masks",
    }
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for way in (ARITHMETIC, GEOMETRIC):
            shown = frame[(frame["way"] == way) & frame[name].notna()]
            if len(shown) and not (name == "variance" and way == GEOMETRIC):  # it is of the masks, not of their mean
                low, high = shown[f"{name}_low"], shown[f"{name}_high"]
                axes.fill_between(shown["count"], low, high, color=COLOURS[way], alpha=0.2, linewidth=0)
                axes.plot(shown["count"], shown[name], "o-", markersize=4, color=COLOURS[way], label=f"{way} mean")
        off = frame.loc[frame["way"] == SCALING].iloc[0]
        if name == loss:
            axes.axhspan(off[f"{name}_low"], off[f"{name}_high"], color=COLOURS[SCALING], alpha=0.12, linewidth=0)
            axes.axhline(off[name], color=COLOURS[SCALING], linestyle="--", label="scaling (dropout off)")
            axes.legend(frameon=False, fontsize=9)
        if name == "kl" and (frame.loc[frame["count"] > 0, "kl"] > 1e-12).all():
            axes.set_yscale("log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(frame["count"]) - {0}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="masks averaged", ylabel=label)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Averaging over dropout masks, against dropout switched off", x=0.01, ha="left")
    figure.supxlabel("bands: 95 % over prompts", fontsize=9, color=FAINT)
    return figure
