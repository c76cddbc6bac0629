r"""How close a model with a different middle is to the original: what the middle writes, and what the model predicts.

Layers ``[start, stop)`` are the middle: ``x_start`` enters them, ``x_stop`` leaves them, ``u = x_stop - x_start`` is
what they write. A different middle writes ``u_hat``, and the rest of the model reads that. With ``c(a) = a - E a``,

* ``unexplained = E |u_hat - u|^2 / E |c(u)|^2``: one minus R^2 of the update (of ``x_stop`` it would be near 0 for the
  identity already, as most of ``x_stop`` is ``x_start``). 0 is the original, 1 the mean update, and leaving the middle
  out reads ``E |u|^2 / E |c(u)|^2``, 1 or more;
* ``unexplained_whitened``: the same with every dimension divided by its standard deviation, or by ``FLOOR`` times the
  median one where that is larger, so that a few massive dimensions do not dominate it;
* ``cross_entropy``, ``damage``, ``kl``, ``agreement``: how much worse the next tokens are predicted, in nats a token;
* ``exact``, ``cross_entropy_answers``: the same where some tokens are the answer to a question.

The first two are over all real tokens but each prompt's first, which sees itself alone and whose activations may be
massive; predictions are at all tokens that a real one follows. A small ``unexplained`` does not imply a small
``damage``: what matters to the decoder may be a small part of the variance, so read both. Controls: a lower bound by
``surgery.graft.linear_maps`` (skip, mean update, best linear map), an upper one by the original layers, and a fresh
middle before training.

``_low`` and ``_high`` are 95 % percentile intervals over resampled prompts (neighbours together beyond
``ensemble.UNITS`` of them); one prompt has none (NaN). Formulas: blockwise distillation (A. Bercovich et al. 2024,
arXiv 2411.19146) and stitching (Y. Bansal et al. 2021, arXiv 2106.07682: penalty = stitched loss - original loss).

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.serial_network(n_layers=4))
>>> row = measure(stack, known_networks.tokens(8), lambda x, context: stack.execute("1:3", x, context), 1, 3).iloc[0]
>>> [float(row[name]) for name in ("unexplained", "damage", "agreement")]
[0.0, 0.0, 1.0]
"""

from collections.abc import Callable, Hashable, Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.instruments.ensemble import Ensemble, Totals
from surgery.instruments.readout import log_probabilities, portions, predicting_positions
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.engine import Stream
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import described, measure_columns, ratio, weights
from surgery.stats.drift import NEGLIGIBLE
from surgery.stats.sampling import Sampling

Middle = Callable[[Stream, Context], Stream]  # from x_start, at every position, to x_stop
Answers = Bool[Tensor, "prompt pos"] | Bool[np.ndarray, "prompt pos"]
Ending = tuple[Stack, Stream]  # a model, and the stream that leaves its last layer
Resampled = Float[Tensor, " resample"]

FLOOR = 0.1  # of the median standard deviation: dimensions that hardly vary are not blown up beyond ten times
ORIGINAL = "original"

PREDICTIONS = {
    "cross_entropy": "loss of the next token with the other middle (nats per predicted token)",
    "cross_entropy_original": "the same of the original",
    "damage": "cross_entropy - cross_entropy_original, paired",
    "kl": "KL(original || other) of the next-token distributions (nats per predicted token)",
    "agreement": "share of predictions whose first choice is the original's",
}
ANSWERS = {
    "exact": "share of prompts all of whose answer tokens are the first choice, given what stands before them",
    "exact_original": "the same of the original",
    "cross_entropy_answers": "loss of the answers' tokens (nats per answer token)",
    "cross_entropy_answers_original": "the same of the original",
}
UNEXPLAINED = {
    "unexplained": "1 - R^2 of the update: 0 the original, 1 the mean update",
    "unexplained_whitened": "the same, every dimension in units of its standard deviation (floored)",
}
COLUMNS = {
    "start": "first layer of the original's middle",
    "stop": "one past the last layer of the original's middle",
    "student_start": "first layer of the other model's middle",
    "student_stop": "one past the last layer of the other model's middle",
    "n_prompts": "number of prompts, the unit of resampling",
    "n_predictions": "number of predicted tokens",
} | described(UNEXPLAINED | PREDICTIONS | ANSWERS)


@with_meanings(COLUMNS)
@in_smaller_batches
def measure(
    stack: Stack,
    tokens: Tokens | Tensor,
    middle: Middle,
    start: int,
    stop: int,
    *,
    answers: Answers | None = None,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure the model with layers ``[start, stop)`` replaced by ``middle(x_start, context) -> x_stop``.

    One row, ``COLUMNS``. ``middle`` gets the streams of a batch [prompt pos d_model], and the batch's context with its
    tokens; it is run without gradients, in whatever mode (train, eval) it is in. ``answers`` marks the tokens of the
    answers (as ``Babel.encode`` gives them) and adds the columns of ``ANSWERS``. Cost: ``2 - stop / L`` F, the middle,
    and two readouts. Memory: the streams of one batch, and ``3 d_model`` numbers a prompt.

    Raises ValueError for an empty span or one that leaves the model, a middle that gives another shape or values that
    are not finite, prompts without a token to measure or to predict, and answers that are not real, predicted tokens.

    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.parallel_network(n_layers=4))
    >>> row = measure(stack, known_networks.tokens(8), lambda x, context: x, 1, 3).iloc[0]  # the middle left out
    >>> bool(row.unexplained >= 1 and row.kl > 0)
    True
    """
    span = _checked(stack, start, stop)

    def student(context: Context, x_start: Stream) -> tuple[Stream, Stream]:
        with torch.no_grad():
            x_stop = middle(x_start, context)
        if x_stop.shape != x_start.shape:
            raise ValueError(
                f"the middle was given streams of shape {list(x_start.shape)} and gave {list(x_stop.shape)} back: it "
                "must return what leaves the layers at every position"
            )
        x_stop = x_stop.to(x_start)
        return x_stop, run(stack, stop, stack.n_layers, x_stop, context)

    row = _row(stack, stack, span, student, tokens, answers, sampling=sampling)
    return pd.DataFrame([{"start": start, "stop": stop} | row])


@with_meanings(COLUMNS)
@in_smaller_batches
def compare(
    teacher: Stack,
    student: Stack,
    tokens: Tokens | Tensor,
    span: tuple[int, int],
    student_span: tuple[int, int],
    *,
    answers: Answers | None = None,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Make the row of ``measure`` for a whole model, whose middle may have another depth and its ends be healed.

    ``student_span`` are its middle layers (empty, as in (4, 4), if it has none). It predicts with its own layers and
    head; ``unexplained`` compares the streams that leave both middles. Cost: 1 F and a readout of each model.

    Raises ValueError as ``measure`` does, and for models of different vocabulary or stream.

    >>> from surgery.instruments import known_networks
    >>> teacher, other = (Stack(known_networks.random_network(n_layers=n)) for n in (4, 3))
    >>> bool(compare(teacher, other, known_networks.tokens(8), (1, 3), (1, 2)).unexplained[0] > 0)
    True
    """
    span, (first, last) = _checked(teacher, *span), _checked(student, *student_span, least=0)
    if (teacher.d_vocab, teacher.d_model) != (student.d_vocab, student.d_model):
        raise ValueError(
            f"{teacher.name} has {teacher.d_vocab} tokens and {teacher.d_model} dimensions, {student.name} has "
            f"{student.d_vocab} and {student.d_model}: streams and predictions can be compared only where both agree"
        )

    def run_student(context: Context, x_start: Stream) -> tuple[Stream, Stream]:
        own = student.context(context.tokens.to(student.device))
        x_stop = run(student, 0, last, own.x0, own)
        return x_stop.to(x_start), run(student, last, student.n_layers, x_stop, own)

    row = _row(teacher, student, span, run_student, tokens, answers, sampling=sampling)
    spans = {"start": span[0], "stop": span[1], "student_start": first, "student_stop": last}
    return pd.DataFrame([spans | row])


def run(stack: Stack, start: int, stop: int, x: Stream, context: Context) -> Stream:
    """Return the stream that leaves layers ``[start, stop)``; ``x`` itself if there are none."""
    return stack.execute(f"{start}:{stop}", x, context) if start < stop else x


def _row(
    teacher: Stack,
    student: Stack,
    span: tuple[int, int],
    run_student: Callable[[Context, Stream], tuple[Stream, Stream]],
    tokens: Tokens | Tensor,
    answers: Answers | None,
    sampling: Sampling,
) -> dict[str, int | float]:
    """Run both, batch by batch; ``run_student`` gives the streams that leave its middle and its last layer."""
    start, stop = span
    ensemble = Ensemble.of(teacher, tokens, sampling)
    answers = checked_answers(answers, ensemble.tokens)
    totals, first = Totals(ensemble.n_units), 0
    for unit, context, mask in ensemble.batches(teacher):
        x_start = run(teacher, 0, start, context.x0, context)
        x_stop = run(teacher, start, stop, x_start, context)
        student_stop, final = run_student(context, x_start)
        check_finite(x_stop, context.tokens, f"the stream of {teacher.name}")
        check_finite(student_stop, context.tokens, "what leaves the other middle")
        u, missed = (x_stop.double() - x_start.double())[mask], (student_stop.double() - x_stop.double())[mask]
        prompts = mask.nonzero()[:, 0]
        _add(totals, "tokens", unit, prompts, torch.ones_like(u[:, 0]))
        for name, values in (("u", u), ("uu", u.square()), ("missed", missed.square())):
            _add(totals, name, unit, prompts, values)
        original = (teacher, run(teacher, stop, teacher.n_layers, x_stop, context))
        batch_answers = None if answers is None else answers[first : first + len(unit)]
        add_predictions(totals, unit, context.tokens, batch_answers, original, {"other": (student, final)})
        first += len(unit)
    draws = weights(ensemble.n_units, sampling.resamples, sampling.seed)
    measures = _unexplained(totals, draws) | predictions(totals, "other", draws)
    counts = {"n_prompts": len(ensemble.tokens), "n_predictions": int(totals["predictions"].sum())}
    return counts | measure_columns(measures)


def _unexplained(totals: Totals, draws: Float[Tensor, "resample unit"]) -> dict[str, Resampled]:
    """Compute ``UNEXPLAINED`` from sums of the update, its square and the squared error, by dimension."""
    count = (draws @ totals["tokens"]).unsqueeze(-1)
    mean, second, missed = (draws @ totals[name] / count for name in ("u", "uu", "missed"))
    variance = second - mean.square()
    variance = variance.where(variance > NEGLIGIBLE * second, 0)
    typical = variance.where(variance > 0, torch.nan).nanmedian(-1, keepdim=True).values
    scale = variance.clamp(min=FLOOR**2 * typical)  # NaN where nothing varies at all
    return {
        "unexplained": ratio(missed.sum(-1), variance.sum(-1)),
        "unexplained_whitened": ratio((missed / scale).sum(-1), (variance / scale).sum(-1)),
    }


def add_predictions(
    totals: Totals,
    unit: Int[Tensor, " prompt"],
    tokens: Tokens,
    answers: Bool[Tensor, "prompt pos"] | None,
    original: Ending,
    others: Mapping[Hashable, Ending],
) -> None:
    """Add to ``totals``, for the original and each of the others, all that ``predictions`` needs of a batch.

    Cost: a readout of each. Raises ValueError if a stream is not finite.
    """
    predicting = predicting_positions(tokens)
    prompts, targets = predicting.nonzero()[:, 0], tokens.ids[:, 1:][predicting]
    ends = {}
    for key, (stack, x) in {ORIGINAL: original, **others}.items():
        check_finite(x, tokens, f"what leaves the last layer of {stack.name}")
        ends[key] = stack, x[:, :-1][predicting.to(x.device)]
    scores: dict[Hashable, list[Tensor]] = {key: [] for key in ends}
    for rows in portions(original[0], targets):
        p = log_probabilities(original[0], ends[ORIGINAL][1][rows])
        for key, (stack, x) in ends.items():
            q = p if key == ORIGINAL else log_probabilities(stack, x[rows.to(x.device)]).to(p.device)
            loss = -q.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
            kl, choice = (p.exp() * (p - q)).sum(1), q.argmax(1)
            right, agrees = choice == targets[rows], choice == p.argmax(1)
            scores[key].append(torch.stack([loss.double(), kl.double(), agrees.double(), right.double()]))
    _add(totals, "predictions", unit, prompts, torch.ones_like(targets))
    if answers is not None:
        answering = answers[:, 1:][predicting]
        totals.add("prompts", unit, torch.ones(len(unit)))
        _add(totals, "answers", unit, prompts, answering)
    for key, parts in scores.items():
        loss, kl, agrees, right = torch.cat(parts, 1)
        for name, values in (("cross_entropy", loss), ("kl", kl), ("agreement", agrees)):
            _add(totals, (key, name), unit, prompts, values)
        if answers is not None:
            wrong = torch.zeros(len(unit), device=loss.device).index_add(0, prompts, (answering * (1 - right)).float())
            totals.add((key, "exact"), unit, (wrong == 0).double())
            _add(totals, (key, "cross_entropy_answers"), unit, prompts, answering * loss)


def predictions(totals: Totals, key: Hashable, draws: Float[Tensor, "resample unit"]) -> dict[str, Resampled]:
    """Return ``PREDICTIONS`` of one of the others and, if there are answers, ``ANSWERS``, for every row of weights."""
    count = draws @ totals["predictions"]
    loss, original = (draws @ totals[which, "cross_entropy"] / count for which in (key, ORIGINAL))
    measures = {"cross_entropy": loss, "cross_entropy_original": original, "damage": loss - original}
    measures |= {name: draws @ totals[key, name] / count for name in ("kl", "agreement")}
    if "answers" in totals:
        for name, unit in (("exact", "prompts"), ("cross_entropy_answers", "answers")):
            for which, end in ((key, ""), (ORIGINAL, "_original")):
                measures[name + end] = draws @ totals[which, name] / (draws @ totals[unit])
    return measures


def checked_answers(answers: Answers | None, tokens: Tokens) -> Bool[Tensor, "prompt pos"] | None:
    """Return which tokens answer, on the tokens' device. ValueError unless every prompt has some, all of them real."""
    predicting = predicting_positions(tokens)
    if not predicting.any():
        raise ValueError("no token is predicted in these prompts: give prompts of two tokens or more")
    if answers is None:
        return None
    marks = torch.as_tensor(answers, device=tokens.ids.device)
    if marks.shape != tokens.ids.shape:
        raise ValueError(f"answers mark tokens: their shape is {list(tokens.ids.shape)}, not {list(marks.shape)}")
    predicted = torch.zeros_like(tokens.mask)
    predicted[:, 1:] = predicting
    wrong = (marks & ~predicted).any(1) | ~marks.any(1)
    if wrong.any():
        raise ValueError(
            f"the answer of prompt {int(wrong.nonzero()[0]) + 1} is not made of tokens that follow others: mark at "
            "least one real token in every prompt, and neither padding nor its first token"
        )
    return marks


def check_finite(x: Stream, tokens: Tokens, what: str) -> None:
    """Raise ValueError unless ``x`` is finite at every real token."""
    if not x[tokens.mask.to(x.device)].isfinite().all():
        raise ValueError(f"{what} is not finite: load the model in float32, or fix its weights")


def _add(
    totals: Totals,
    key: Hashable,
    unit: Int[Tensor, " prompt"],
    prompts: Int[Tensor, " row"],
    values: Float[Tensor, "row ..."] | Int[Tensor, "row ..."] | Bool[Tensor, "row ..."],
) -> None:
    """Add to every unit the sum of its prompts' rows, summed by prompt first on the device of ``values``."""
    zero = torch.zeros(len(unit), *values.shape[1:], dtype=torch.float64, device=values.device)
    totals.add(key, unit, zero.index_add(0, prompts, values.double()))


def _checked(stack: Stack, start: int, stop: int, least: int = 1) -> tuple[int, int]:
    """Return the span, or raise ValueError if it leaves the model or has fewer than ``least`` layers."""
    if not 0 <= start <= start + least <= stop <= stack.n_layers:
        raise ValueError(
            f"layers {start} to {stop} (not included) are no middle of {stack.name}: it has layers 0 to "
            f"{stack.n_layers - 1}, so 0 <= start {'<' if least else '<='} stop <= {stack.n_layers}"
        )
    return start, stop
