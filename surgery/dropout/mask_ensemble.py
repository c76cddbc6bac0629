r"""How far the picture of ``2^n`` subnetworks holds: predictions averaged over masks, against dropout switched off.

Training with dropout is said to train ``2^n`` subnetworks that share weights, and switching it off with the weights
scaled to average them. ``count`` masks are drawn, the model predicts under each, and the predictions are averaged:

================  =====================================================================================================
way               prediction
================  =====================================================================================================
``arithmetic``    the mean of the probabilities (MC dropout: Gal and Ghahramani 2016, arXiv 1506.02142)
``geometric``     the mean of the log-probabilities, normalised (Baldi and Sadowski 2013)
``scaling``       the model with nothing dropped, as in every other measure: the control, one row of count 0
================  =====================================================================================================

Where nothing but a softmax layer comes after the mask, ``geometric`` goes to ``scaling`` as ``1 / sqrt(count)`` (its KL
as ``1 / count``), and ``arithmetic`` to something else. Through more layers neither does: the ``kl`` and ``excess``
that remain at large counts say how far the picture is off. A model trained without dropout is the other control: its
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

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from surgery import hooks
from surgery.dropout.identities import require_off
from surgery.instruments.ensemble import Ensemble, Totals
from surgery.instruments.fidelity import Answers, checked_answers
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
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
    "exact": "share of prompts all of whose answer tokens are the first choice, given all tokens before",
    "cross_entropy_answers": "loss of the answers' tokens (nats per answer token)",
}
COLUMNS: dict[str, str] = {
    "way": "how predictions are put together: arithmetic, geometric, or scaling (dropout off)",
    "count": "masks averaged; 0 for scaling",
    "n_prompts": "number of prompts, the unit of resampling",
    "n_predictions": "number of predicted tokens",
} | described(MEASURES | ANSWERS)
LogP = Float[Tensor, "token d_vocab"]


@with_meanings(COLUMNS)
@in_smaller_batches
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
    """Average predictions over masks of the units at hook points ``names``, each dropped with probability ``p``.

    Returns a row per way and count, ``COLUMNS``. A mask is a subnetwork, the same for all prompts and positions
    (``shared``), or is drawn per prompt, position and unit as in training. Larger counts continue smaller ones, so they
    share masks. Intervals are over prompts, for these masks: other seeds show what the choice of masks adds.
    ``answers`` marks the tokens of answers, as in ``fidelity.measure``, and adds the columns of ``ANSWERS``.

    Cost: ``1 + max(counts)`` F. Memory: the logits of a batch six times in float64.

    Raises ValueError for counts that are not positive, a model with live dropout (``dropout.require_off``), logits that
    are not finite, and as ``hooks.dropout`` and ``fidelity.measure`` do.
    """
    if not counts or min(counts) < 1:
        raise ValueError(f"counts say how many masks to average, each 1 or more; got {tuple(counts)}")
    require_off(stack.model)
    ensemble = Ensemble.of(stack, tokens, sampling)
    marked, first = checked_answers(answers, ensemble.tokens), 0
    names = names if callable(names) or isinstance(names, str) else list(names)
    masks = [
        hooks.dropout(stack.model, names, p, sampling.seed * 1_000_003 + mask, shared=shared)
        for mask in range(max(counts))
    ]
    totals = Totals(ensemble.n_units)
    for unit, context, _ in ensemble.batches(stack, "masks"):
        present = context.tokens.mask
        predicting = present & torch.roll(present, -1, 1)
        predicting[:, -1] = False
        rows, places = predicting.nonzero(as_tuple=True)
        targets = context.tokens.ids[rows, places + 1]
        in_answer = None if marked is None else marked[first : first + len(unit)][rows, places + 1]
        owner = unit[rows.cpu()]

        def book(key: Hashable, values: Tensor, owner: Tensor = owner) -> None:
            totals.add(key, owner, values.double())

        book("predictions", torch.ones_like(targets))
        if in_answer is not None:
            book("answers", in_answer)
            totals.add("prompts", unit, torch.ones(len(unit)))
        scaling = _log_p(stack, context, predicting, [])
        ways = _averages(stack, context, predicting, masks, set(counts))
        for key, q, variance in itertools.chain([((SCALING, 0), scaling, torch.zeros_like(scaling[:, 0]))], ways):
            loss, right = -q.gather(1, targets[:, None]).squeeze(1), q.argmax(-1) == targets
            book((*key, "cross_entropy"), loss)
            book((*key, "accuracy"), right)
            book((*key, "kl"), (scaling.exp() * (scaling - q)).sum(-1))
            book((*key, "variance"), variance)
            if in_answer is not None:
                book((*key, "cross_entropy_answers"), in_answer * loss)
                wrong = torch.zeros(len(unit), device=rows.device).index_add(0, rows, (in_answer & ~right).float())
                totals.add((*key, "exact"), unit, (wrong == 0).double())
        first += len(unit)
    draws = weights(ensemble.n_units, sampling.resamples if ensemble.n_units > 1 else 0, sampling.seed)
    keys = [(SCALING, 0)] + [(way, count) for count in sorted(set(counts)) for way in (ARITHMETIC, GEOMETRIC)]
    return pd.DataFrame([_row(totals, key, draws, len(ensemble.tokens)) for key in keys])


def _averages(
    stack: Stack, context: Context, predicting: Bool[Tensor, "prompt pos"], masks: list[list[hooks.Hook]], at: set[int]
) -> Iterator[tuple[tuple[str, int], LogP, Float[Tensor, " token"]]]:
    """Yield both means of the predictions under the first ``count`` masks, and their variance, for counts in ``at``."""
    total_p = total_log_p = total_square = torch.zeros(())
    for count, mask in enumerate(masks, 1):
        log_p = _log_p(stack, context, predicting, mask)
        p = log_p.exp()
        total_p, total_log_p = total_p.to(p) + p, total_log_p.to(p) + log_p
        total_square = total_square.to(p) + p.square().sum(-1)
        if count in at:
            mean = total_p / count
            spread = (total_square - count * mean.square().sum(-1)) / (count - 1) if count > 1 else p[:, 0] * torch.nan
            yield (ARITHMETIC, count), mean.log(), spread
            yield (GEOMETRIC, count), (total_log_p / count).log_softmax(-1), spread


def _log_p(stack: Stack, context: Context, predicting: Bool[Tensor, "prompt pos"], mask: list[hooks.Hook]) -> LogP:
    with stack.model.hooks(fwd_hooks=mask):
        logits = stack.run(context.tokens, positions=predicting)
    if not logits.isfinite().all():
        raise ValueError(f"the logits of {stack.name} are not finite: load it in float32, or fix its weights")
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
