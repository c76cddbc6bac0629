r"""What the model would predict if it stopped at a layer: every layer's stream, read out by the model's own head.

A lens takes the stream ``x_l`` that enters layer ``l`` (``x_L`` leaves the last) to next-token probabilities ``q_l``,
which are compared with the model's own, ``p = softmax(readout(x_L))``, at every token of the ensemble:

=========================  ============================================================================================
lens                       what is read out
=========================  ============================================================================================
``logit``                  ``x_l`` itself, by final norm and unembedding (nostalgebraist 2020, the logit lens)
``tuned``                  ``x_l + x_l B_l + b_l``, an affine translator a layer fitted to predict ``x_L``, in the
                           manner of Belrose et al. 2023 (arXiv 2303.08112). Theirs is trained on KL(p || q); ours is
                           the least-squares form: ridge regression of ``x_L - x_l`` on ``x_l``, in closed form, which
                           shrinks towards the logit lens. It minimises the error of the stream, not of the
                           probabilities: a trained one can only read more
``constant``               the mean of ``x_L``: the control, a lens that sees nothing of the token (one row, layer 0)
=========================  ============================================================================================

``KL(q || p)`` is large where the lens is sure of something the model is not sure of, ``KL(p || q)`` where it rules out
what the model predicts. A KL that falls from layer to layer says when the answer can be read, not which layers read
each other: see ``surgery.series`` for that. On the serial and the parallel network of
``surgery.instruments.known_networks`` alike the KL falls from layer to layer: each writes something into the answer.

Given a ``wiring``, the same is read along its steps, against what the wiring itself says at its end.
``logit_difference`` follows one question through depth: how much the logit of the right word is above that of others.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.random_network(n_layers=2))
>>> frame = layers(stack, known_networks.tokens(8, 6), tuned=False, sampling=Sampling(resamples=0))
>>> frame[["lens", "layer"]].values.tolist(), bool(frame.kl_lens_final.iloc[-1] < 1e-9)
([['logit', 0], ['logit', 1], ['logit', 2]], True)
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from surgery import progress
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.readout import log_probabilities, logits, portions
from surgery.instruments.regression import LeastSquares, halves
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.targets import Prompt, Targets
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import described, measure_columns, weights
from surgery.stats.sampling import Sampling
from surgery.wiring import notation
from surgery.wiring.steps import Chain, Parallel, Scaled
from surgery.wiring.value import Wiring

MEASURES = {
    "kl_lens_final": "KL(lens || final): nats by which the layer's reading is sure of what the model does not say",
    "kl_final_lens": "KL(final || lens): nats lost by predicting the model's own choice with the layer's reading",
    "entropy": "entropy of the layer's reading, nats",
    "top5_overlap": "share of the model's five likeliest tokens that are among the lens's five",
    "top1_agreement": "how often the lens's likeliest token is the model's",
}
COLUMNS = {
    "lens": "how the stream was read out: logit, tuned (least-squares translator) or constant (the control)",
    "layer": "the layer that the stream enters; the number of layers for the stream that leaves the last",
    "n_prompts": "number of prompts measured, the unit of resampling (the tuned lens was fitted on others)",
}
COLUMNS |= described(MEASURES)
STEPS = {
    "step": "which stream of the wiring: 0 enters it, n leaves its n-th pass or group",
    "after": "what the stream leaves: embed, a layer, a sublayer, or a group in the notation of wirings",
    "pass": "which time that runs, from 1; 0 for embed",
}
WIRING_COLUMNS = {"lens": COLUMNS["lens"], **STEPS, "n_prompts": COLUMNS["n_prompts"], **described(MEASURES)}
DIFFERENCES = {
    "logit_difference": "logit of the first target minus the mean of the others, at the prompt's last token",
    "first": "share of prompts whose first target has the largest logit of their targets",
}
DIFFERENCE_COLUMNS = {
    "wiring": "the order in which the layers ran",
    **STEPS,
    "n_prompts": "number of prompts, the unit of resampling",
    **described(DIFFERENCES),
}

Translator = Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "token d_model"]]
Readings = dict[tuple[str, int], Float[Tensor, "measure prompt"]]


@with_meanings({**COLUMNS, **WIRING_COLUMNS})
@in_smaller_batches
def layers(
    stack: Stack,
    tokens: Tokens | Tensor,
    wiring: "Wiring | str | None" = None,
    *,
    tuned: bool = True,
    ridge: float = 0.01,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Compare every lens at every layer with the model's own probabilities. Columns: ``COLUMNS``.

    With a ``wiring``, every lens at every step of it with the probabilities that the wiring gives: a row per stream of
    ``stack.record``, inside groups too, in the order in which they run. Columns: ``WIRING_COLUMNS``. The translators
    are then fitted to this wiring's steps. Of ``":"`` the values are those without a wiring, step by layer.

    ``tuned`` fits the translators on a random half of the prompts and measures all lenses on the other; otherwise there
    is only the logit lens, on all prompts. ``ridge`` is the penalty in units of each dimension's variance. A translator
    needs many more tokens than ``d_model`` to be worth anything: compare with ``logit`` and ``constant``.

    Cost: 1 F without the head, and per measured prompt L + 2 readouts, with ``tuned`` 2 L + 4; of a wiring, its depth
    in place of that of the model. Memory: the streams of one batch and, with ``tuned``, two float64 d_model x d_model
    matrices a layer.

    Raises ValueError for a wiring that the model cannot run, fewer than two prompts with ``tuned``, a negative ridge,
    prompts without a token to measure, and a stream that is not finite.
    """
    tokens = Tokens.of(tokens).to(stack.device)
    measured, fitted = halves(tokens, sampling.seed) if tuned else (tokens, tokens)
    ensemble = Ensemble.of(stack, measured, sampling)
    order = ":" if wiring is None else wiring
    lenses = logit(stack, order)
    if tuned:
        lenses |= translators(stack, Ensemble.of(stack, fitted, sampling), ridge, order)
    sums = readings(stack, ensemble, lenses, order)
    named = [{"layer": layer} for layer in range(stack.n_layers + 1)] if wiring is None else steps(stack, wiring)
    draws = weights(len(measured), sampling.resamples, sampling.seed)
    count = draws @ ensemble.mask.sum(1).double().cpu()
    return pd.DataFrame(
        {"lens": lens, **named[place], "n_prompts": len(measured)}
        | measure_columns(dict(zip(MEASURES, values @ draws.T / count, strict=True)))
        for (lens, place), values in sums.items()
    )


@with_meanings(DIFFERENCE_COLUMNS)
@in_smaller_batches
def logit_difference(
    stack: Stack,
    prompts: "Sequence[Prompt] | Targets",
    wirings: "Wiring | str | Sequence[Wiring | str]" = ":",
    *,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Follow how much the model prefers the right word, through depth and wirings. Columns: ``DIFFERENCE_COLUMNS``.

    Of every prompt the stream at its last token is read out after every step, as by the logit lens; the difference is
    the logit of the first target minus the mean of the others', in nats of odds. The last row of a wiring is what the
    wiring itself answers, of ``":"`` the model's own logits. ``sampling`` gives the resamples and the batch size.

    Words differ by themselves, whatever was asked: what is there at step 0, and what the same targets give after other
    prompts. Where every target is the right one as often as each other, that cancels.

    Cost: per wiring its depth / L F without the head, and a readout of one token a step and prompt.

    Raises ValueError as ``Targets.of``, for a wiring that the model cannot run, and a stream that is not finite.

    >>> import surgery
    >>> from surgery.models import Prompt
    >>> asked = [Prompt("p3 pf1 >other", ("o4", "o9")), Prompt("p8 pf1 >other", ("o9", "o4"))]
    >>> frame = logit_difference(surgery.Stack("babel"), asked, [":", ":8 4:"], sampling=Sampling(resamples=0))
    >>> frame.groupby("wiring", sort=False)["step"].max().to_dict()
    {':': 12, ':8 4:': 16}
    """
    targets = prompts if isinstance(prompts, Targets) else Targets.of(stack, prompts)
    orders = [stack.wiring(w) for w in ([wirings] if isinstance(wirings, str | Wiring) else wirings)]
    parts: list[list[Tensor]] = [[] for _ in orders]
    batches, first = list(targets.tokens.batches(sampling.batch_size)), 0
    for batch in progress.track(batches, "logit differences", len(batches), sampling.progress):
        context, rows = stack.context(batch), torch.arange(len(batch), device=stack.device)
        for order, part in zip(orders, parts, strict=True):
            last = _finite(stack, stack.stream(context, order)[:, rows, batch.last])
            part.append(torch.stack([_differ(stack, x, targets, first + rows) for x in last]).cpu())
        first += len(batch)
    draws = weights(len(targets), sampling.resamples, sampling.seed)
    return pd.DataFrame(
        {"wiring": str(order), **step, "n_prompts": len(targets)}
        | measure_columns(dict(zip(DIFFERENCES, values @ draws.T / len(targets), strict=True)))
        for order, part in zip(orders, parts, strict=True)
        for step, values in zip(steps(stack, order), torch.cat(part, 2), strict=True)
    )


def _differ(
    stack: Stack, x: Float[Tensor, "prompt d_model"], targets: Targets, prompts: Int[Tensor, " prompt"]
) -> Float[Tensor, "measure prompt"]:
    """``DIFFERENCES`` of streams at the last tokens of ``prompts``."""
    read = [logits(stack, x[some]).gather(1, targets.ids[prompts[some]]) for some in portions(stack, x)]
    difference, first = targets.compare(torch.cat(read), prompts)
    return torch.stack([difference.double(), first.double()])


def steps(stack: Stack, wiring: "Wiring | str") -> list[dict[str, Any]]:
    """Name every stream of a wiring (columns ``STEPS``), in the order in which ``stack.record`` gives them.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> [(row["after"], row["pass"]) for row in steps(Stack(known_networks.random_network(n_layers=3)), "0 {0|1}")]
    [('embed', 0), ('0', 1), ('0', 2), ('1', 1), ('{*:2}', 1)]
    """
    times: Counter[str] = Counter()
    rows = [{"step": 0, "after": "embed", "pass": 0}]
    for step, name in enumerate(_after(stack.wiring(wiring).steps, stack.n_layers), start=1):
        times[name] += 1
        rows.append({"step": step, "after": name, "pass": times[name]})
    return rows


def _after(chain: Chain, n_layers: int) -> Iterator[str]:
    """The notation of every step, after that of what runs inside it."""
    for step in chain:
        match step:
            case Parallel(branches):
                for branch in branches:
                    yield from _after(branch, n_layers)
            case Scaled(_, body):
                yield from _after(body, n_layers)
        yield notation.write((step,), n_layers)


def logit(stack: Stack, wiring: "Wiring | str" = ":") -> dict[tuple[str, int], Translator]:
    """Return the logit lens of every step of a wiring: the stream as it is."""
    return {("logit", step): lambda x: x for step in range(len(steps(stack, wiring)))}


def translators(
    stack: Stack, ensemble: Ensemble, ridge: float = 0.01, wiring: "Wiring | str" = ":"
) -> dict[tuple[str, int], Translator]:
    """Fit the tuned lens of every step on this ensemble, and the constant lens. Cost: 1 F without the head."""
    fits = [LeastSquares(stack.d_model) for _ in steps(stack, wiring)]
    for stream in _streams(stack, ensemble, "fitting the lens", wiring):
        for x, fit in zip(stream, fits, strict=True):
            fit.add(x, stream[-1].double() - x.double())
    maps = [fit.solve(ridge) for fit in fits]
    mean = fits[-1].mean_x

    def translated(matrix: Tensor, bias: Tensor) -> Translator:
        return lambda x: (x.double() + x.double() @ matrix + bias).to(x.dtype)

    lenses: dict[tuple[str, int], Translator] = {("tuned", layer): translated(*fit) for layer, fit in enumerate(maps)}
    return lenses | {("constant", 0): lambda x: mean.to(x).expand_as(x)}


def readings(
    stack: Stack, ensemble: Ensemble, lenses: Mapping[tuple[str, int], Translator], wiring: "Wiring | str" = ":"
) -> Readings:
    """Sum each of ``MEASURES`` over the ensemble's tokens of every prompt, for each lens (name, layer or step).

    Cost: 1 F and, per prompt, a readout for each lens and one for the final stream; tokens are read out by portions.
    """
    sums = {key: torch.zeros(len(MEASURES), len(ensemble.tokens), dtype=torch.float64) for key in lenses}
    prompts = ensemble.mask.cpu().nonzero()[:, 0]
    first = 0
    for stream in _streams(stack, ensemble, "lens", wiring):
        for tokens in portions(stack, stream[-1]):
            owners, final = prompts[first + tokens.cpu()], log_probabilities(stack, stream[-1, tokens])
            for (name, layer), translate in lenses.items():
                reading = log_probabilities(stack, translate(stream[layer, tokens]))
                sums[name, layer].index_add_(1, owners, _compare(reading, final).double().cpu())
        first += stream.shape[1]
    return sums


def _streams(
    stack: Stack, ensemble: Ensemble, label: str, wiring: "Wiring | str"
) -> Iterator[Float[Tensor, "step_plus_1 token d_model"]]:
    """Yield ``x_0 .. x_L`` at the ensemble's tokens, batch by batch."""
    for _, context, mask in ensemble.batches(stack, label):
        yield _finite(stack, stack.stream(context, wiring)[:, mask])


def _finite(stack: Stack, stream: Float[Tensor, "step row d_model"]) -> Float[Tensor, "step row d_model"]:
    if not stream.isfinite().all():
        raise ValueError(
            f"the stream of {stack.name} is not finite on these prompts: its numbers overflow {stack.dtype}"
        )
    return stream


def _compare(
    reading: Float[Tensor, "token d_vocab"], final: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, "measure token"]:
    """Compute ``MEASURES`` of every token from the log-probabilities of a lens and of the model."""
    q, p = reading.exp(), final.exp()
    few = min(5, reading.shape[1])
    top, own = reading.topk(few).indices, final.topk(few).indices
    return torch.stack(
        [
            (q * (reading - final)).sum(1),
            (p * (final - reading)).sum(1),
            -(q * reading).sum(1),
            (top.unsqueeze(2) == own.unsqueeze(1)).any(2).to(q).mean(1),
            (top[:, 0] == own[:, 0]).to(q),
        ]
    )
