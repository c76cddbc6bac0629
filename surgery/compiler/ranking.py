"""Does seriesness tell which layers can run side by side? S and R/R_rot of windows beside what fusing them costs.

    ranked = ranking.measure(stack, texts)
    ranked.correlations                                      # Spearman's, with intervals
    search.divisions(stack, texts, ranking=ranked.by_layer("S"))

A window of neighbours (a pair, unless ``longest`` is more) has S and R/R_rot, which ask whether its layers read one
another (``surgery.series.window``), and a price: the divergence and the loss that it adds when its layers run as one,
``{7.attn | 8.attn} {7.mlp | 8.mlp}``. S is relative to what the layers write, and says nothing about how much the rest
of the model needs that; the price is absolute. So a low S need not be cheap, and this is what is tested here.

It ranks pairs moderately: over SmolLM2's 28 pairs after layer 0, on 24 texts, S has .62 [.27, .82] with the divergence
and R/R_rot -.04 [-.41, .35]; over the bundled model's 10, on 48 problems, .41 [-.42, .87] and .59 [-.26, .92]. What S
misses is what the rest of the model needs: SmolLM2's last pair costs most and has a low S. The prices of all pairs take
about L/2 F, hardly more than S of all pairs (8 F), so they stay what a search is led by unless it is told otherwise.

The interval of Spearman's correlation allows for both that the texts are a sample and that there are few windows: by
Fisher's z, with the variance of Bonett and Wright (2000), ``(1 + rho^2 / 2) / (windows - 3)``, plus that over resampled
texts, the same ones for measure and price. Windows that share a layer are no independent pairs, for which it makes no
allowance. Control to compare with: ``kl`` in the place of ``loss``, two prices of one thing.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.compiler import search
from surgery.corpus.probes import Encoded
from surgery.instruments.windows import Reading, merged
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.scan import scanning
from surgery.series.recording import Recording
from surgery.series.window import WINDOW_MEASURES
from surgery.stats import comparisons
from surgery.stats.bootstrap import described, measure_columns, weights
from surgery.stats.sampling import Sampling

MEASURES = ("S", "S_live", "R", "R_over_rotated", "preference", "N")
PRICES = {
    "kl": "divergence from the unmodified model that running the window as one layer adds (nats per token)",
    "loss": "loss that running the window as one layer adds (nats per token)",
}
COLUMNS = {
    "start": "first layer of the window",
    "stop": "one past its last layer",
    "n_prompts": "number of texts, the unit of resampling",
    **described({name: WINDOW_MEASURES[name] for name in MEASURES} | PRICES, "texts"),
}
CORRELATIONS = {
    "length": "layers of the windows that are compared",
    "measure": "what ranks them",
    "price": "what they cost",
    "spearman": "rank correlation of the two: 1 where the measure puts windows in the order of their prices",
    "spearman_low": "lower end of its 95 % interval, over texts and windows",
    "spearman_high": "upper end of its 95 % interval",
    "n_windows": "of how many windows",
}


@dataclass(frozen=True)
class Ranking:
    """What windows read and cost (``COLUMNS``), and how well the one ranks the other (``CORRELATIONS``)."""

    windows: pd.DataFrame
    correlations: pd.DataFrame

    def by_layer(self, measure: str = "S") -> dict[int, float]:
        """The measure of every pair, by its second layer, where the two meet: the ``ranking`` of ``divisions``."""
        pairs = self.windows[self.windows["stop"] - self.windows["start"] == 2]
        return {int(stop) - 1: float(value) for stop, value in zip(pairs["stop"], pairs[measure], strict=True)}


@in_smaller_batches
def measure(
    stack: Stack,
    texts: Encoded,
    longest: int = 2,
    *,
    first_layer: int = 1,
    out: "str | Path | None" = None,
    sampling: Sampling = Sampling(),
) -> Ranking:
    """Measure every window of 2 to ``longest`` layers, and what it costs as one layer.

    Args:
        first_layer: windows before it take no part in the correlations: from layer 0 of a model with small embeddings
            S is near 1 whatever the layers do.
        out: a file for the scan of the prices.
        sampling: resamples and seed; the prices are of the scored tokens, S of all but the first and the massive.

    Cost of W windows in L layers: 4 + 4 W/L F, and about W/2 F for the prices.

    Raises ValueError for texts with choices, a ``longest`` of more than ``search.MOST``, and as ``series.windows``.

    >>> import surgery
    >>> from surgery.corpus import probes
    >>> stack = surgery.Stack(surgery.load("babel"))
    >>> ranked = measure(stack, probes.named("babel", 8).encode(stack), sampling=Sampling(resamples=20))
    >>> len(ranked.windows), ranked.correlations["n_windows"].unique().tolist()
    (11, [10])
    """
    if not 2 <= longest <= search.MOST:
        raise ValueError(f"windows have 2 to {search.MOST} layers, as many as run as one; not {longest}")
    if len(texts.probe) != len(texts.groups):
        raise ValueError("questions with choices are several texts each: give running text, or answers without choices")
    recording = Recording.of(stack, texts.tokens, longest, forms=(), sampling=sampling)
    draws = weights(len(texts.groups), sampling.resamples, sampling.seed)
    units = recording.units
    sums = merged([recording.sums(prompts) for prompts in recording.batches])
    reading = Reading(sums, recording.spans, draws, units.reads, stack.dtype)
    values: dict[tuple[int, int], dict[str, Tensor]] = {}
    for start in range(len(units) - 1):
        layers = range(start + 1, max(last for first, last in recording.spans.pairs if first == start) + 1)
        read = reading.measures(start, layers, damage=False)
        for place, layer in enumerate(layers):
            values[start, layer + 1] = {name: read[name][place] for name in MEASURES}
    for window, prices in _prices(stack, texts, list(values), out, draws).items():
        values[window] |= prices
    rows = [
        {"start": start, "stop": stop, "n_prompts": len(texts.groups)} | measure_columns(of)
        for (start, stop), of in values.items()
    ]
    return Ranking(pd.DataFrame(rows)[list(COLUMNS)], _correlations(values, first_layer))


def _prices(
    stack: Stack,
    texts: Encoded,
    windows: list[tuple[int, int]],
    out: "str | Path | None",
    draws: Float[Tensor, "resample text"],
) -> dict[tuple[int, int], dict[str, Float[Tensor, " resample"]]]:
    """What each window costs as one layer, in every resample."""
    named = {}
    for start, stop in windows:
        before, after = (tuple((layer,) for layer in layers) for layers in (range(start), range(stop, stack.n_layers)))
        named[start, stop] = str(stack.wiring(search.notation((*before, tuple(range(start, stop)), *after))))
    rows = scanning.run(stack, list(named.values()), texts, out, metrics=tuple(PRICES))
    prices: dict[tuple[int, int], dict[str, Tensor]] = {window: {} for window in windows}
    for price in PRICES:
        wide = comparisons.differences(rows, price).droplevel("group").sort_index()
        for window, name in named.items():
            prices[window][price] = -(draws @ torch.from_numpy(wide[name].to_numpy(copy=True))) / draws.sum(1)
    return prices


def _correlations(values: dict[tuple[int, int], dict[str, Tensor]], first_layer: int) -> pd.DataFrame:
    """``CORRELATIONS`` of every measure with every price, for windows of each length of which there are four."""
    rows = []
    for length in sorted({stop - start for start, stop in values}):
        of = [read for (start, stop), read in values.items() if stop - start == length and start >= first_layer]
        if len(of) < 4:
            continue
        table = {name: np.stack([read[name].numpy() for read in of], 1) for name in (*MEASURES, *PRICES)}
        for price in PRICES:
            for name in [*MEASURES, *(other for other in PRICES if other != price)]:
                rho, low, high = spearman(table[name], table[price])
                ends = {"spearman": rho, "spearman_low": low, "spearman_high": high, "n_windows": len(of)}
                rows.append({"length": length, "measure": name, "price": price} | ends)
    return pd.DataFrame(rows, columns=list(CORRELATIONS))


def spearman(
    a: Float[np.ndarray, "resample window"], b: Float[np.ndarray, "resample window"]
) -> tuple[float, float, float]:
    """Spearman's correlation of two rows of estimates (row 0), and its 95 % interval over resamples and windows.

    NaN where it is undefined: fewer than four windows, or values that are all equal or not finite.

    >>> a = np.arange(30.0)[None].repeat(3, 0)
    >>> [round(end, 2) for end in spearman(a, a[:, ::-1])]
    [-1.0, -1.0, -1.0]
    """
    count = a.shape[1]
    if count < 4:
        return float("nan"), float("nan"), float("nan")
    x, y = (scipy.stats.rankdata(values, axis=1, nan_policy="propagate") for values in (a, b))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    largest = 1 - 12 / (count * (count**2 - 1))  # of ranks that are not the same: two neighbours exchanged
    z = np.arctanh(rho.clip(-largest, largest))
    of_texts = np.nanvar(z[1:]) if len(z) > 1 and np.isfinite(z[1:]).any() else 0.0
    half = 1.96 * np.sqrt((1 + rho[0] ** 2 / 2) / (count - 3) + of_texts)
    return float(rho[0]), float(np.fmin(rho[0], np.tanh(z[0] - half))), float(np.fmax(rho[0], np.tanh(z[0] + half)))
