r"""Direct and indirect effect: does a layer act on the output by itself, or through later layers?

Layer ``i`` is ablated by its mean, ``x_{i+1}' = x_i + E u_i`` at the tokens of the ensemble, and the rest of the model
runs. With ``y`` the logits, each token's centred over the vocabulary,

    TE_i = y - y(ablated)                            total effect
    DE_i = y - head(x_L - (u_i - E u_i))             direct effect: only the head misses the update
    IE_i = TE_i - DE_i                               indirect effect: what later layers made of it
    M_i  = n(IE_i) / (n(IE_i) + n(DE_i)),            n(a) = sqrt(E|a|^2) over tokens, a vector over the vocabulary.

The final norm keeps the denominators of the clean run in all three, or it would pass for an indirect effect; with
``frozen``, so do the layers' norms. M is 0 if no later layer reads the layer, 1 if the head reads it only through
others, and cannot leave [0, 1]. No layer follows the last one: its M is 0 by definition.

The head decides what is direct. Parallel network: M = 0 for every layer. Serial network: its head reads every layer
too, and M rises from the last layer back without reaching 1; where the head reads the last subspace alone, M = 1 for
all layers but the last. A mean-ablated layer of the serial network passes on a constant, so IE counts all of what
follows. M may be high because a direct effect is undone later (self-repair: Rushing and Nanda 2024, arXiv 2402.15390).
The split is due to Pearl (2001), for transformers to McGrath et al. 2023 (arXiv 2307.15771).

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.parallel_network(n_layers=3))
>>> frame = effects(stack, known_networks.tokens(8, 6), sampling=Sampling(resamples=0))
>>> frame.M.round(4).tolist()
[0.0, 0.0, 0.0]
"""

from collections import defaultdict
from contextlib import nullcontext

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.instruments import linear_head, massive
from surgery.instruments.ablation import mean_updates
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.readout import frozen_head, logits, portions
from surgery.instruments.together import Together
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import described, measure_columns, ratio, weights
from surgery.stats.sampling import Sampling

COLUMNS = {
    "layer": "layer, counted from 0",
    "n_prompts": "number of prompts, the unit of resampling",
    **massive.COLUMNS,
}
_MEASURES = {
    "TE": "total effect of the layer's update on the logits: length of the change (nats), mean over tokens in squares",
    "DE": "direct effect: the same where only the head misses the update",
    "IE": "indirect effect, TE - DE token by token: what later layers made of the update",
    "M": "indirect share, IE / (IE + DE): 0 no later layer reads the layer, 1 all of its effect goes through them",
}
COLUMNS |= described(_MEASURES)


@with_meanings(COLUMNS)
@in_smaller_batches
def effects(
    stack: Stack, tokens: Ensemble | Tokens | Tensor, *, frozen: bool = True, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    """Measure total, direct and indirect effect of every layer on the logits, and the indirect share M.

    Columns: ``COLUMNS``. ``frozen=False`` leaves the layers' norms live (the final norm never is). A layer whose update
    is the same for every token has no effect and no M (NaN). The mean update is that of all prompts, also in resamples.

    Cost in a model of L layers: (L - 1) / 2 + 3 F (2 with live norms). With more words than dimensions and a linear
    head, d_model readouts in all (``surgery.instruments.linear_head``); else 2 L + 1 of every token. Memory: 4 L
    streams of one batch.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.serial_network(n_layers=3))
    >>> frame = effects(stack, known_networks.tokens(8, 6), sampling=Sampling(resamples=0))
    >>> bool(frame.M[0] > frame.M[1] > frame.M[2] == 0)
    True
    """
    ensemble = Ensemble.of(stack, tokens, sampling)
    means = mean_updates(stack, ensemble).to(stack.device, stack.dtype)
    gram = linear_head.head_gram(stack) if stack.d_vocab > stack.d_model else None
    sums: defaultdict[str, list[Tensor]] = defaultdict(list)  # of squares, [layer, prompt] for each batch
    for _, context, mask in ensemble.batches(stack, "effects"):
        stream = stack.stream(context)
        with stack.frozen(context) if frozen else nullcontext():
            lost = [
                torch.where(mask.unsqueeze(-1), stream[layer + 1] - stream[layer] - mean, 0)
                for layer, mean in enumerate(means)
            ]
            entering = {layer + 1: [stream[layer + 1] - gone] for layer, gone in enumerate(lost)}
            totals = Together(stack, context).ride(entering)
        clean, prompts = stream[-1][mask], mask.nonzero()[:, 0]
        finals = torch.stack([x[mask] for x in totals]), torch.stack([(stream[-1] - gone)[mask] for gone in lost])
        measured = _squares(stack, clean, *finals) if gram is None else _forms(stack, gram, clean, *finals)
        for name, squares in measured.items():
            empty = torch.zeros(stack.n_layers, len(mask), dtype=torch.float64)
            sums[name].append(empty.index_add(1, prompts.cpu(), squares))
    draws = weights(len(ensemble.tokens), sampling.resamples, sampling.seed)
    count = draws @ ensemble.mask.sum(1).double().cpu()
    rows = []
    for layer in range(stack.n_layers):
        measures = {name: (draws @ torch.cat(parts, 1)[layer] / count).sqrt() for name, parts in sums.items()}
        measures["M"] = ratio(measures["IE"], measures["IE"] + measures["DE"])
        rows.append({"layer": layer, "n_prompts": len(ensemble.tokens)} | measure_columns(measures))
    return ensemble.annotate(pd.DataFrame(rows), "layer")


def _squares(
    stack: Stack,
    clean: Float[Tensor, "row d_model"],
    totals: Float[Tensor, "layer row d_model"],
    directs: Float[Tensor, "layer row d_model"],
) -> dict[str, Float[Tensor, "layer row"]]:
    """Return the squared length of every token's total, direct and indirect effect on the logits."""
    squares: dict[str, list[Tensor]] = {"TE": [], "DE": [], "IE": []}
    for rows in portions(stack, clean):
        with frozen_head(stack, clean[rows]):
            before = _centred(logits(stack, clean[rows]))
            layers = []
            for total, direct in zip(totals, directs, strict=True):
                te, de = (before - _centred(logits(stack, final[rows])) for final in (total, direct))
                layers.append({"TE": te, "DE": de, "IE": te - de})
        for name, parts in squares.items():
            parts.append(torch.stack([effect[name].double().square().sum(-1).cpu() for effect in layers]))
    return {name: torch.cat(parts, 1) for name, parts in squares.items()}


def _forms(
    stack: Stack,
    gram: Float[Tensor, "d_model d_model"],
    clean: Float[Tensor, "row d_model"],
    totals: Float[Tensor, "layer row d_model"],
    directs: Float[Tensor, "layer row d_model"],
) -> dict[str, Float[Tensor, "layer row"]]:
    """Return the same as ``_squares`` where the head is linear, without a readout."""
    squares: dict[str, list[Tensor]] = {"TE": [], "DE": [], "IE": []}
    for total, direct in zip(totals, directs, strict=True):
        for name, change in (("TE", clean - total), ("DE", clean - direct), ("IE", direct - total)):
            squares[name].append(linear_head.squares(stack, gram, clean, change).cpu())
    return {name: torch.stack(layers) for name, layers in squares.items()}


def _centred(y: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "row d_vocab"]:
    return y - y.mean(-1, keepdim=True)
