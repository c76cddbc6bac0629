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

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.random_network(n_layers=2))
>>> frame = layers(stack, known_networks.tokens(8, 6), tuned=False, sampling=Sampling(resamples=0))
>>> frame[["lens", "layer"]].values.tolist(), bool(frame.kl_lens_final.iloc[-1] < 1e-9)
([['logit', 0], ['logit', 1], ['logit', 2]], True)
"""

from collections.abc import Callable, Iterator, Mapping

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.instruments.ensemble import Ensemble
from surgery.instruments.readout import log_probabilities, portions
from surgery.instruments.regression import LeastSquares, halves
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import described, measure_columns, weights
from surgery.stats.sampling import Sampling

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

Translator = Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "token d_model"]]
Readings = dict[tuple[str, int], Float[Tensor, "measure prompt"]]


@in_smaller_batches
def layers(
    stack: Stack, tokens: Tokens | Tensor, *, tuned: bool = True, ridge: float = 0.01, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    """Compare every lens at every layer with the model's own probabilities. Columns: ``COLUMNS``.

    ``tuned`` fits the translators on a random half of the prompts and measures all lenses on the other; otherwise there
    is only the logit lens, on all prompts. ``ridge`` is the penalty in units of each dimension's variance. A translator
    needs many more tokens than ``d_model`` to be worth anything: compare with ``logit`` and ``constant``.

    Cost: 1 F without the head, and per measured prompt L + 2 readouts, with ``tuned`` 2 L + 4. Memory: the streams of
    one batch and, with ``tuned``, two float64 d_model x d_model matrices a layer.

    Raises ValueError for fewer than two prompts with ``tuned``, a negative ridge, prompts without a token to measure,
    and a stream that is not finite.
    """
    tokens = Tokens.of(tokens).to(stack.device)
    measured, fitted = halves(tokens, sampling.seed) if tuned else (tokens, tokens)
    ensemble = Ensemble.of(stack, measured, sampling)
    lenses = logit(stack)
    if tuned:
        lenses |= translators(stack, Ensemble.of(stack, fitted, sampling), ridge)
    sums = readings(stack, ensemble, lenses)
    draws = weights(len(measured), sampling.resamples, sampling.seed)
    count = draws @ ensemble.mask.sum(1).double().cpu()
    return pd.DataFrame(
        {"lens": lens, "layer": layer, "n_prompts": len(measured)}
        | measure_columns(dict(zip(MEASURES, values @ draws.T / count, strict=True)))
        for (lens, layer), values in sums.items()
    )


def logit(stack: Stack) -> dict[tuple[str, int], Translator]:
    """Return the logit lens of every layer: the stream as it is."""
    return {("logit", layer): lambda x: x for layer in range(stack.n_layers + 1)}


def translators(stack: Stack, ensemble: Ensemble, ridge: float = 0.01) -> dict[tuple[str, int], Translator]:
    """Fit the tuned lens of every layer on this ensemble, and the constant lens. Cost: 1 F without the head."""
    fits = [LeastSquares(stack.d_model) for _ in range(stack.n_layers + 1)]
    for stream in _streams(stack, ensemble, "fitting the lens"):
        for x, fit in zip(stream, fits, strict=True):
            fit.add(x, stream[-1].double() - x.double())
    maps = [fit.solve(ridge) for fit in fits]
    mean = fits[-1].mean_x

    def translated(matrix: Tensor, bias: Tensor) -> Translator:
        return lambda x: (x.double() + x.double() @ matrix + bias).to(x.dtype)

    lenses: dict[tuple[str, int], Translator] = {("tuned", layer): translated(*fit) for layer, fit in enumerate(maps)}
    return lenses | {("constant", 0): lambda x: mean.to(x).expand_as(x)}


def readings(stack: Stack, ensemble: Ensemble, lenses: Mapping[tuple[str, int], Translator]) -> Readings:
    """Sum each of ``MEASURES`` over the ensemble's tokens of every prompt, for each lens (name, layer).

    Cost: 1 F and, per prompt, a readout for each lens and one for the final stream; tokens are read out by portions.
    """
    sums = {key: torch.zeros(len(MEASURES), len(ensemble.tokens), dtype=torch.float64) for key in lenses}
    prompts = ensemble.mask.cpu().nonzero()[:, 0]
    first = 0
    for stream in _streams(stack, ensemble, "lens"):
        for tokens in portions(stack, stream[-1]):
            owners, final = prompts[first + tokens.cpu()], log_probabilities(stack, stream[-1, tokens])
            for (name, layer), translate in lenses.items():
                reading = log_probabilities(stack, translate(stream[layer, tokens]))
                sums[name, layer].index_add_(1, owners, _compare(reading, final).double().cpu())
        first += stream.shape[1]
    return sums


def _streams(stack: Stack, ensemble: Ensemble, label: str) -> Iterator[Float[Tensor, "layer_plus_1 token d_model"]]:
    """Yield ``x_0 .. x_L`` at the ensemble's tokens, batch by batch."""
    for _, context, mask in ensemble.batches(stack, label):
        stream = stack.stream(context)[:, mask]
        if not stream.isfinite().all():
            raise ValueError(
                f"the stream of {stack.name} is not finite on these prompts: its numbers overflow {stack.dtype}"
            )
        yield stream


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
