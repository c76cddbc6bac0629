r"""Effective depth: after how many layers is the answer there? Three criteria of the literature, and their fragility.

==========  ===========================================================================================================
criterion   depth, in layers that have run
==========  ===========================================================================================================
cosine      the last layer, counted from 1, at which ``E cos(u_l, x_l)`` rises from below the threshold to it or above:
            from there on layers strengthen what is there (Csordas et al. 2025, arXiv 2505.13898)
kl          the fewest after which KL(final || logit lens) is below the threshold times its largest
overlap     the fewest after which the logit lens has more than the threshold of the model's five likeliest tokens
==========  ===========================================================================================================

Hu et al. 2025 (arXiv 2512.14064) use 0, 0.5 and 0.3, and divide by the number of layers, as ``ratio`` does; their
cosine is averaged over attention, MLP and layer, ours is the layer's. A threshold is a choice: ``grid`` shows the depth
against it, and what moves with the threshold is not a property of the model. The crossing of a noisy curve jumps from
resample to resample, which the intervals show. A criterion that is never met has depth NaN.

Depth is about when the answer is written, not about which layer reads which (see ``surgery.series``): in the parallel
network of ``surgery.instruments.known_networks``, where every layer could run first, kl and overlap are met late, as in
the serial one. Compare with the architecture untrained.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from surgery.instruments import lens, massive, similarity
from surgery.instruments.ensemble import Ensemble
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import described, measure_columns, weights
from surgery.stats.sampling import Sampling

_MEASURES = {
    "depth": "layers that have run when the criterion is met; empty if it never is",
    "ratio": "depth as a part of all layers",
}
COLUMNS = {
    "criterion": "what is taken as the sign that the answer is there: cosine, kl or overlap",
    "threshold": "the value that the criterion's curve has to cross; of kl, as a part of its largest value",
    "n_prompts": "number of prompts, the unit of resampling",
}
COLUMNS |= described(_MEASURES) | massive.COLUMNS


@with_meanings(COLUMNS)
@in_smaller_batches
def effective(
    stack: Stack,
    tokens: Tokens | Tensor,
    *,
    cosine: float = 0.0,
    kl: float = 0.5,
    overlap: float = 0.3,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure the depth by each criterion at one threshold: a row each. Columns: ``COLUMNS``. Cost: as ``grid``.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.random_network(n_layers=3))
    >>> frame = effective(stack, known_networks.tokens(8, 6), sampling=Sampling(resamples=0))
    >>> frame.criterion.tolist(), bool(frame.ratio.dropna().between(0, 1).all())
    (['cosine', 'kl', 'overlap'], True)
    """
    return grid(stack, tokens, cosine=[cosine], kl=[kl], overlap=[overlap], sampling=sampling)


@with_meanings(COLUMNS)
@in_smaller_batches
def grid(
    stack: Stack,
    tokens: Tokens | Tensor,
    *,
    cosine: Sequence[float] = (-0.1, -0.05, 0.0, 0.05, 0.1),
    kl: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    overlap: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure the depth by each criterion against its threshold: a row for every threshold. Columns: ``COLUMNS``.

    Cost: 2 F and L + 2 readouts a prompt.

    Raises ValueError for a threshold outside [-1, 1] (cosine) or [0, 1], and prompts without a token to measure.
    """
    for name, least, thresholds in (("cosine", -1, cosine), ("kl", 0, kl), ("overlap", 0, overlap)):
        outside = [value for value in thresholds if not least <= value <= 1]
        if outside:
            raise ValueError(f"a threshold of {name} lies between {least} and 1, got {outside[0]}")
    ensemble = Ensemble.of(stack, tokens, sampling)
    draws = weights(len(ensemble.tokens), sampling.resamples, sampling.seed)
    count = draws @ ensemble.mask.sum(1).double().cpu()
    sums = lens.readings(stack, ensemble, lens.logit(stack))
    after_layers = range(1, stack.n_layers + 1)
    kls, overlaps = (
        torch.stack([draws @ sums["logit", after][list(lens.MEASURES).index(name)] / count for after in after_layers])
        for name in ("kl_final_lens", "top5_overlap")
    )
    cosines = torch.stack([draws @ values / count for values in similarity.readings(stack, ensemble)["cosine"]])
    rows = []
    for name, thresholds in (("cosine", cosine), ("kl", kl), ("overlap", overlap)):
        for threshold in thresholds:
            match name:
                case "cosine":
                    values, depth = cosines, _last((cosines[:-1] < threshold) & (cosines[1:] >= threshold)) + 1
                case "kl":
                    values, depth = kls, _first(kls < threshold * kls.amax(0))
                case _:
                    values, depth = overlaps, _first(overlaps > threshold)
            depth = torch.where(values.isnan().any(0), torch.nan, depth)
            row = {"criterion": name, "threshold": threshold, "n_prompts": len(ensemble.tokens)}
            rows.append(row | measure_columns({"depth": depth, "ratio": depth / stack.n_layers}))
    return ensemble.annotate(pd.DataFrame(rows))


def _first(met: Bool[Tensor, "layer resample"]) -> Float[Tensor, " resample"]:
    """Return the first layer, counted from 1, at which the criterion is met; NaN where it never is."""
    return torch.where(met.any(0), (~met).cumprod(0).sum(0) + 1.0, torch.nan).double()


def _last(met: Bool[Tensor, "layer resample"]) -> Float[Tensor, " resample"]:
    """Return the last layer, counted from 1, at which the criterion is met; NaN where it never is."""
    return len(met) + 1 - _first(met.flip(0))
