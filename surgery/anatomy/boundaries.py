r"""Where input translation, reasoning and output translation begin and end, and are the ends wired more in parallel?

``locate`` does all of it on one model; the parts are

    features        what every layer is like, under every resample of the prompts
    functional      where repeating layers helps or harms, from a scan of every repeated span
    detectors       the two boundaries, by every kind of evidence by itself
    agreement       how far the detectors are apart, and how far chance would put them
    locate          all that, ``surgery.anatomy.convergence`` and the test of ``surgery.anatomy.ends_against_middle``

The boundaries are found on one half of the prompts and the ends compared with the middle on the other, and no feature
that finds them is tested:

=============  =======================================================================================================
family         features of layer l (x its entry, u its update, x + u what leaves it)
=============  =======================================================================================================
lens           KL(final || logit lens) as log(1 + KL), and entropy of the logit lens, of what leaves it (nats)
growth         log n(u)/n(x), centred
kappa          -E<c(u), c(x)> / E|c(x)|^2, ``surgery.reversion``
influence      1 - E cos(x, x + u): block influence (Men et al. 2024, arXiv 2403.03853)
cka            linear CKA (Kornblith et al. 2019, arXiv 1905.00414) of what leaves it with what leaves every layer,
               from pairs of different tokens only, without which many dimensions and few tokens give 1
convergence    SC - SL of what leaves it (``surgery.anatomy.convergence``), if parallel sentences are given
=============  =======================================================================================================

Layer 0 gets the growth, kappa and influence of layer 1: beside a small embedding any update is huge. All families count
alike. None is R or S; but a layer with a large update moves the stream more, and S grows with that, so read D of R/N.

Compare with the same architecture untrained, and read ``p_drift`` (``surgery.stats.changepoints``) before any boundary: a
stack that drifts has none. A dozen layers resolve little.

>>> from surgery import Stack, load
>>> found = locate(Stack(load("babel")), Stack(load("babel")).tokens(bundled.prompts(20)), sampling=Sampling(resamples=10), drifts=9)
>>> found.boundaries["boundary"].unique().tolist()
['in', 'out']
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.anatomy import convergence, ends_against_middle
from surgery.anatomy.convergence import Convergence, Sentence
from surgery.instruments import lens
from surgery.instruments.ensemble import Ensemble
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats import changepoints, comparisons
from surgery.stats.bootstrap import weights
from surgery.stats.drift import Step
from surgery.stats.sampling import Sampling
from surgery.wiring.value import Wiring

SAMPLING = Sampling(resamples=200)
SPLITS = 20  # random halves of the prompts on which the number of breaks is compared
CKA_TOKENS = 256
BOUNDARIES = ("in", "out")
DETECTORS_COLUMNS = {
    "detector": "what the boundaries are read from",
    "boundary": "in (input part | middle) or out (middle | output part)",
    "layer": "the first layer behind the boundary, on all prompts; empty if the detector finds none",
    "layer_low": "lower end of its 95 % interval over resamples",
    "layer_high": "upper end of its 95 % interval",
    "depth": "layer as a fraction of the model's layers",
    "gain": "share of the features' variance over layers that the two breaks explain",
    "p_drift": "share of smooth paths that two breaks explain as well: below .05 there is something to be found",
}
AGREEMENT_COLUMNS = {
    "boundary": "in or out",
    "n_detectors": "detectors that find it",
    "earliest": "the first layer that any puts it at",
    "latest": "the last",
    "sd": "standard deviation over detectors, layers",
    "sd_random": "the same of as many detectors that place both boundaries at random",
    "p_random": "share of random placements that agree as closely",
}
KINDS_COLUMNS = {
    "kind": "prompts of which kind",
    "other": "compared with prompts of which kind",
    "D": "D on the one minus D on the other: is the contrast of ends and middle another one there?",
    "D_low": "lower end of its 95 % interval",
    "D_high": "upper end of its 95 % interval",
}


@dataclass(frozen=True)
class Features:
    """What every layer is like: ``values[resample, layer, feature]``, raw; row 0 the estimate, families by column."""

    families: tuple[str, ...]
    values: Float[np.ndarray, "resample layer feature"]

    def of(self, family: str) -> "Features":
        """One family alone."""
        return Features(
            tuple(name for name in self.families if name == family),
            self.values[:, :, np.array(self.families) == family],
        )

    def rows(self, chosen: slice) -> "Features":
        """Some of the resamples."""
        return Features(self.families, self.values[chosen])

    def __add__(self, other: "Features") -> "Features":
        return Features(self.families + other.families, np.concatenate([self.values, other.values], 2))

    @property
    def standardised(self) -> Float[np.ndarray, "resample layer feature"]:
        return changepoints.standardise(self.values, self.families)


@dataclass(frozen=True)
class Anatomy:
    """All that ``locate`` found."""

    boundaries: pd.DataFrame  # boundary, layer, probability
    segments: pd.DataFrame  # a row per number of breaks
    detectors: pd.DataFrame  # DETECTORS_COLUMNS
    agreement: pd.DataFrame  # AGREEMENT_COLUMNS
    ends: pd.DataFrame  # a row per kind of prompts: contrast.COLUMNS
    by_kind: pd.DataFrame  # D of every kind minus D of the first, KINDS_COLUMNS
    convergence: Convergence | None
    n_layers: int

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables by name; ``convergence`` only where there were parallel sentences."""
        found = {name: getattr(self, name) for name in ("boundaries", "segments", "detectors", "agreement")}
        if self.convergence is not None:
            found["convergence"] = self.convergence.frame
        return found | {"ends": self.ends, "by_kind": self.by_kind}


def locate(
    stack: Stack,
    tokens: Tokens | Tensor,
    kinds: Sequence[str] | None = None,
    *,
    said: Sequence[Sentence] | None = None,
    scanned: pd.DataFrame | None = None,
    metric: str = "loglik",
    length: int = 2,
    min_size: int | None = None,
    drifts: int = 200,
    sampling: Sampling = SAMPLING,
) -> Anatomy:
    """The boundaries on a random half of the prompts, the ends against the middle on the other half.

    Args:
        kinds: of each prompt, what kind it is; the test is made on all and on every kind by itself.
        said: parallel sentences (``convergence.parallel()``, ``convergence.babel()``); None leaves them out.
        scanned: rows of ``scan.run`` of ``wiring.every_repeat``, for the functional boundary; None leaves it out.
        length: layers in a window of the test; min_size: fewest layers in a part, unless given ``length + 1`` where
            that fits, so that the input part holds a window from layer 1 on.

    Cost: 2 F of one half and a lens readout a layer; 1 + length F of the other, twice if there are kinds; 1 F of
    ``said``.

    Raises ValueError for too few layers or prompts, or not one kind a prompt.
    """
    tokens = Tokens.of(tokens).to(stack.device)
    kinds = ["all"] * len(tokens) if kinds is None else list(kinds)
    if len(kinds) != len(tokens) or len(tokens) < 8:
        raise ValueError(f"give 8 prompts or more and the kind of each, got {len(tokens)} and {len(kinds)} kinds")
    min_size = min(length + 1, stack.n_layers // 3) if min_size is None else min_size
    placing, testing = _halves(kinds, sampling.seed)
    found = features(stack, _chosen(tokens, placing), splits=SPLITS, sampling=sampling)
    whole, halves = found.rows(slice(sampling.resamples + 1)), found.rows(slice(sampling.resamples + 1, None)).values
    compared = changepoints.heldout(
        list(zip(halves[::2], halves[1::2], strict=True)), found.families, min_size=min_size
    )
    curve = None
    if said is not None:
        curve = convergence.curve(stack, said, sampling=sampling)
        whole = whole + Features(("convergence",), curve.difference[:, 1:, None].numpy())
    scan = None if scanned is None else functional(scanned, stack.n_layers, metric, sampling.resamples, sampling.seed)
    placed = changepoints.places(whole.standardised, 2, min_size)
    apart = detectors(whole, scan, curve, min_size, drifts, sampling.seed)
    profiles = {"all": ends_against_middle.measure(stack, _chosen(tokens, testing), length, sampling=sampling)}
    names = sorted(set(kinds)) if len(set(kinds)) > 1 else []
    for kind in names:
        own = testing[[kinds[i] == kind for i in testing]]
        profiles[kind] = ends_against_middle.measure(stack, _chosen(tokens, own), length, sampling=sampling)
    rows = []
    for kind, profile in profiles.items():
        row = ends_against_middle.ends(profile, placed, seed=sampling.seed)
        rows.append({"kind": kind, **row, "verdict": ends_against_middle.verdict(row)})
    return Anatomy(
        changepoints.posterior(placed),
        _segments(compared, whole, min_size, drifts, sampling.seed),
        apart,
        agreement(apart, stack.n_layers, min_size, seed=sampling.seed),
        pd.DataFrame(rows),
        pd.DataFrame(
            [
                {
                    "kind": kind,
                    "other": first,
                    **ends_against_middle.difference(profiles[kind], profiles[first], placed),
                }
                for first, kind in itertools.product(names[:1], names[1:])
            ],
            columns=list(KINDS_COLUMNS),
        ),
        curve,
        stack.n_layers,
    )


def features(stack: Stack, tokens: Tokens | Tensor, *, splits: int = 0, sampling: Sampling = SAMPLING) -> Features:
    """Every family of the module's table but ``convergence``, under ``resamples`` draws of the prompts.

    Behind them come ``2 * splits`` rows: random halves of the prompts, each followed by its other half. Cost: 2 F and a
    lens readout a layer. Memory: 5 vectors a prompt and layer, and 256 tokens' products.
    """
    ensemble = Ensemble.of(stack, tokens, sampling)
    n_prompts = len(ensemble.tokens)
    draws = torch.cat([weights(n_prompts, sampling.resamples, sampling.seed), _split(n_prompts, splits, sampling.seed)])
    count = draws @ ensemble.mask.sum(1).double().cpu()
    steps: list[list[Step]] = [[] for _ in range(stack.n_layers)]
    influence: list[list[Tensor]] = [[] for _ in range(stack.n_layers)]
    leaving: list[list[Tensor]] = [[] for _ in range(stack.n_layers)]
    every = max(1, int(ensemble.mask.sum()) // CKA_TOKENS)
    for visit in ensemble.visits(stack):
        steps[visit.layer].append(Step.of(visit.x, visit.u, visit.mask))
        turned = 1 - torch.cosine_similarity(visit.x.double(), (visit.x + visit.u).double(), dim=-1)
        influence[visit.layer].append(turned.masked_fill(~visit.mask, 0).sum(1).cpu())
        leaving[visit.layer].append((visit.x + visit.u)[visit.mask].double().cpu())
    drifts = [Step.concatenate(parts).drift(draws) for parts in steps]
    read = lens.readings(stack, ensemble, {key: one for key, one in lens.logit(stack).items() if key[1] > 0})
    kl, entropy = (list(lens.MEASURES).index(name) for name in ("kl_final_lens", "entropy"))
    columns = {
        "lens": [
            [(draws @ read["logit", layer + 1][kl] / count).log1p() for layer in range(stack.n_layers)],
            [draws @ read["logit", layer + 1][entropy] / count for layer in range(stack.n_layers)],
        ],
        "growth": [[drift.growth.log() for drift in drifts]],
        "kappa": [[drift.kappa for drift in drifts]],
        "influence": [[draws @ torch.cat(parts) / count for parts in influence]],
    }
    for family in ("growth", "kappa", "influence"):
        columns[family][0][0] = columns[family][0][1]
    similar = _cka(
        [torch.cat(parts)[::every] for parts in leaving], draws[:, ensemble.mask.cpu().nonzero()[::every, 0]]
    )
    columns["cka"] = [list(similar[:, :, other].T) for other in range(stack.n_layers)]
    families = tuple(family for family, found in columns.items() for _ in found)
    values = torch.stack([torch.stack(feature, 1) for found in columns.values() for feature in found], 2)
    if not values.isfinite().all():
        raise ValueError(f"a feature of {stack.name} is not finite: a layer writes nothing, or the prompts are too few")
    return Features(families, values.numpy())


def functional(
    scanned: pd.DataFrame, n_layers: int, metric: str = "loglik", resamples: int = SAMPLING.resamples, seed: int = 0
) -> Features:
    """The skyline of a brain scan: mean gain of the repeated spans that start with a layer, and that end with it.

    From each gain the mean of the spans of that length is taken off first, or long spans, which only middle layers can
    be inside of, would look like boundaries. No forward pass. Raises ValueError if a layer starts or ends no span.
    """
    wide = comparisons.differences(scanned, metric)
    spans = {
        name: found for name in wide.columns if (found := Wiring.parse(str(name), n_layers).repeated_span()) is not None
    }
    if {start for start, _ in spans.values()} != set(range(n_layers)):
        raise ValueError(f"the scan does not repeat a span from every one of {n_layers} layers; scan every_repeat")
    draws = weights(len(wide), resamples, seed).numpy()
    gains = draws @ wide[list(spans)].to_numpy() / len(wide)
    starts, stops = np.array(list(spans.values())).T
    for size in np.unique(stops - starts):
        same = stops - starts == size
        gains[:, same] -= gains[:, same].mean(1, keepdims=True)
    skyline = [[gains[:, ends == place].mean(1) for place in range(n_layers)] for ends in (starts, stops - 1)]
    return Features(("functional",) * 2, np.transpose(skyline, (2, 1, 0)))


def detectors(
    found: Features,
    scan: Features | None = None,
    curve: Convergence | None = None,
    min_size: int = 2,
    drifts: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Two rows per detector, ``DETECTORS_COLUMNS``: all features, every family by itself, the scan, and SC > SL."""
    evidence = {"all features": found} | {name: found.of(name) for name in dict.fromkeys(found.families)}
    if scan is not None:
        evidence["brain scan"] = scan
    rows = []
    for name, one in evidence.items():
        path = one.standardised
        p, _ = changepoints.drift_null(path[0], one.families, 2, min_size, drifts, seed)
        rows += _rows(
            name,
            changepoints.places(path, 2, min_size),
            path.shape[1],
            gain=changepoints.gain(path[0], 2, min_size),
            p_drift=p,
        )
    if curve is not None:
        rows += _rows("SC > SL", curve.reach(), found.values.shape[1])
    return pd.DataFrame(rows, columns=list(DETECTORS_COLUMNS))


def agreement(apart: pd.DataFrame, n_layers: int, min_size: int = 2, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """How far the detectors' boundaries are apart, ``AGREEMENT_COLUMNS``; ``all features`` is left out: it is no other.

    ``p_random`` compares with detectors that place both boundaries anywhere, every part of ``min_size`` layers.
    """
    generator, rows = np.random.default_rng((seed, 7)), []
    allowed = np.array(
        [(a, b) for a in range(min_size, n_layers) for b in range(a + min_size, n_layers - min_size + 1)]
    )
    for place, name in enumerate(BOUNDARIES):
        layers = apart[(apart["boundary"] == name) & (apart["detector"] != "all features")]["layer"].dropna()
        chance = allowed[generator.integers(len(allowed), size=(draws, len(layers))), place].std(1)
        sd = float(layers.std(ddof=0))
        rows.append(
            {
                "boundary": name,
                "n_detectors": len(layers),
                "earliest": layers.min(),
                "latest": layers.max(),
                "sd": sd,
                "sd_random": float(chance.mean()),
                "p_random": float((1 + (chance <= sd + 1e-9).sum()) / (draws + 1)),
            }
        )
    return pd.DataFrame(rows)


def _rows(name: str, places: np.ndarray, n_layers: int, **more: float) -> list[dict]:
    rows = []
    for boundary, column in zip(BOUNDARIES, places.T, strict=True):
        rest = column[1:][np.isfinite(column[1:])]
        low, high = np.quantile(rest, [0.025, 0.975]) if len(rest) else (np.nan, np.nan)
        layer = float(column[0])
        rows.append(
            {
                "detector": name,
                "boundary": boundary,
                "layer": layer,
                "layer_low": float(low),
                "layer_high": float(high),
                "depth": layer / n_layers,
                **more,
            }
        )
    return rows


def _segments(compared: pd.DataFrame, found: Features, min_size: int, drifts: int, seed: int) -> pd.DataFrame:
    path, rows = found.standardised[0], []
    for count in compared["breaks"]:
        p, gain = (np.nan, np.nan)
        if count:
            p, gain = changepoints.drift_null(path, found.families, count, min_size, drifts, seed)
        cut = changepoints.breaks(path, count, min_size)
        rows.append(
            {
                "boundaries": " ".join(map(str, cut)),
                "gain": changepoints.gain(path, count, min_size),
                "p_drift": p,
                "gain_drift": gain,
            }
        )
    return pd.concat([compared, pd.DataFrame(rows)], axis=1)


def _cka(
    streams: Sequence[Float[Tensor, "token d_model"]], drawn: Float[Tensor, "resample token"]
) -> Float[Tensor, "resample layer layer"]:
    """Linear CKA of every pair, from pairs of different tokens, under every resample."""
    products = torch.stack([x @ x.T for x in streams])
    found = []
    for times in drawn:
        share = times / times.sum()
        towards = products @ share
        centred = products - towards[:, :, None] - towards[:, None, :] + (towards @ share)[:, None, None]
        pairs = (share[:, None] * share[None, :]).fill_diagonal_(0)
        flat = (centred * pairs.sqrt()).flatten(1)
        common = flat @ flat.T
        sizes = common.diagonal().sqrt()
        found.append(common / (sizes[:, None] * sizes[None, :]))
    return torch.stack(found)


def _split(n_prompts: int, splits: int, seed: int) -> Float[Tensor, "half prompt"]:
    """Random halves of the prompts as weights, each followed by its other half."""
    generator = np.random.default_rng((seed, 8))
    order = generator.permuted(np.tile(np.arange(n_prompts), (splits, 1)), axis=1)
    first = order < n_prompts // 2
    return torch.from_numpy(np.stack([first, ~first], 1).reshape(-1, n_prompts)).double()


def _halves(kinds: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint halves of the prompts, every kind in equal parts."""
    generator, first = np.random.default_rng((seed, 9)), np.zeros(len(kinds), dtype=bool)
    for kind in sorted(set(kinds)):
        own = np.flatnonzero([one == kind for one in kinds])
        first[generator.permutation(own)[: (len(own) + 1) // 2]] = True
    return np.flatnonzero(first), np.flatnonzero(~first)


def _chosen(tokens: Tokens, prompts: np.ndarray) -> Tokens:
    rows = torch.from_numpy(prompts).to(tokens.ids.device)
    return Tokens(tokens.ids[rows], tokens.mask[rows])
