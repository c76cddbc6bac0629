r"""Where input translation, reasoning and output translation begin and end, and are the ends wired more in parallel?

``locate`` does all of it on one model; the parts are

    features        what every layer is like, under every resample of the prompts
    functional      where repeating layers helps or harms, from a scan of every repeated span
    detectors       the two boundaries, by every kind of evidence by itself, and whether it shows any
    agreement       how far apart the detectors are, and how far smooth drift would put them
    locate          all of that, ``surgery.anatomy.convergence`` and the test of ``surgery.anatomy.ends_against_middle``

The boundaries are found on one half of the prompts and the ends are compared with the middle on the other, and no
feature that finds the boundaries is tested:

=============  =======================================================================================================
family         features of layer l (x its entry, u its update, x + u what leaves it)
=============  =======================================================================================================
lens           KL(final || logit lens) as log(1 + KL), and entropy of the logit lens, both of x + u (nats)
growth         log n(u)/n(x), centred
size           log n(u), centred: a loud part swells the stream, and layers behind it look small beside that
kappa          -E<c(u), c(x)> / E|c(x)|^2, ``surgery.reversion``
influence      1 - E cos(x, x + u): block influence (Men et al. 2024, arXiv 2403.03853)
cka            linear CKA (Kornblith et al. 2019, arXiv 1905.00414) of x + u with what leaves every layer,
               from pairs of different tokens only: otherwise many dimensions and few tokens give 1
convergence    SC - SL of x + u (``surgery.anatomy.convergence``), if parallel sentences are given
=============  =======================================================================================================

Layer 0 gets the growth, kappa and influence of layer 1: beside a small embedding any update is huge. A brain scan is
one more family (``functional``). The boundaries are placed by the family that shows parts most clearly
(``surgery.stats.changepoints.drift_test``); where none does, by all with the same weight. None is R or S; but a layer
with a large update moves the stream more, and S grows with that, so D of R/R_rotated has to agree.

Compare with the same architecture untrained, and read ``p_drift`` of ``segments`` before any boundary: a stack that
drifts has none, however stable the place is under resampling. Its ``power`` says what a miss means.

>>> from surgery import Stack, load
>>> from surgery.corpus import bundled
>>> stack = Stack(load("babel"))
>>> anatomy = locate(stack, stack.tokens(bundled.prompts(20)), sampling=Sampling(resamples=10), drifts=9)
>>> anatomy.boundaries["boundary"].unique().tolist()
['in', 'out']
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from surgery.anatomy import convergence, ends_against_middle
from surgery.anatomy.convergence import Convergence, Utterance
from surgery.anatomy.ends_against_middle import Profile
from surgery.instruments import lens
from surgery.instruments.ensemble import Ensemble
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats import changepoints, comparisons
from surgery.stats.bootstrap import weights
from surgery.stats.drift import Step
from surgery.stats.sampling import Sampling
from surgery.wiring.value import Wiring

SAMPLING = Sampling(resamples=200)
DRIFTS = 200  # smooth paths simulated
SPLITS = 20  # random halves of the prompts on which the number of breaks is compared
CKA_TOKENS = 256
BOUNDARIES = ("in", "out")
SURE = 0.05  # p_adjusted below which evidence shows parts
DETECTORS_COLUMNS = {
    "detector": "what the boundaries are read from",
    "boundary": "in (input part | middle) or out (middle | output part)",
    "layer": "the first layer behind the boundary, on all prompts; empty if the detector finds none",
    "layer_low": "lower end of its 95 % interval over resamples",
    "layer_high": "upper end of its 95 % interval",
    "depth": "layer as a fraction of the model's layers",
    "gain": "share of the features' variance over layers that the two breaks explain",
    "p_drift": "share of smooth paths that two breaks explain as well, of this evidence by itself",
    "excess": "how much more breaks explain of it than of smooth paths, in SD of these (of the logit of gain)",
    "p_adjusted": "the same, corrected for all the kinds of evidence: below .05 it shows three parts",
}
AGREEMENT_COLUMNS = {
    "boundary": "in or out",
    "n_detectors": "kinds of evidence that place it, each by itself",
    "earliest": "the first layer that any puts it at",
    "latest": "the last",
    "sd": "standard deviation over detectors, layers",
    "sd_drift": "the same on smooth paths, which have no boundary to agree on",
    "p_drift": "share of smooth paths on which the detectors agree as closely",
}
KINDS_COLUMNS = {
    "kind": "prompts of which kind",
    "other": "compared with prompts of which kind",
    "D": "D on the one kind minus D on the other: does the contrast of ends and middle differ there?",
    "D_low": "lower end of its 95 % interval",
    "D_high": "upper end of its 95 % interval",
    "p": "two-sided p of the difference, over resamples of prompts and boundaries",
}


class UndefinedError(ValueError):
    """Layers cannot be told apart on these prompts: some feature of them is undefined."""


@dataclass(frozen=True)
class Features:
    """What every layer is like: raw ``values[resample, layer, feature]``, row 0 the estimate, and the family of every
    feature."""

    families: tuple[str, ...]
    values: Float[np.ndarray, "resample layer feature"]

    def of(self, family: str) -> "Features":
        """Return the features of one family alone; all of them if it is ``changepoints.ALL``."""
        chosen = np.array([family in (name, changepoints.ALL) for name in self.families])
        families = tuple(name for name in self.families if family in (name, changepoints.ALL))
        return Features(families, self.values[:, :, chosen])

    def rows(self, resamples: slice) -> "Features":
        """Return some of the resamples."""
        return Features(self.families, self.values[resamples])

    def __add__(self, other: "Features") -> "Features":
        return Features(self.families + other.families, np.concatenate([self.values, other.values], 2))

    @property
    def standardised(self) -> Float[np.ndarray, "resample layer feature"]:
        """The values with mean 0 over layers and the same total variance in every family."""
        return changepoints.standardise(self.values, self.families)


@dataclass(frozen=True)
class Anatomy:
    """The result of ``locate``: boundaries, how sure they are, and the ends against the middle."""

    boundaries: pd.DataFrame  # boundary, layer, probability
    segments: pd.DataFrame  # a row per number of breaks
    detectors: pd.DataFrame  # DETECTORS_COLUMNS
    agreement: pd.DataFrame  # AGREEMENT_COLUMNS
    ends: pd.DataFrame  # a row per kind of prompts: ends_against_middle.COLUMNS; the verdict in one word
    by_kind: pd.DataFrame  # D of every kind minus D of the first, KINDS_COLUMNS
    convergence: Convergence | None
    n_layers: int

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables by name; ``convergence`` only where there were parallel sentences."""
        tables = {name: getattr(self, name) for name in ("boundaries", "segments", "detectors", "agreement")}
        if self.convergence is not None:
            tables["convergence"] = self.convergence.frame
        return tables | {"ends": self.ends, "by_kind": self.by_kind}


@in_smaller_batches
def locate(
    stack: Stack,
    tokens: Tokens | Tensor,
    kinds: Sequence[str] | None = None,
    *,
    utterances: Sequence[Utterance] | None = None,
    scan: pd.DataFrame | None = None,
    metric: str = "loglik",
    length: int = 2,
    min_size: int | None = None,
    drifts: int = DRIFTS,
    sampling: Sampling = SAMPLING,
) -> Anatomy:
    """Place the boundaries on a random half of the prompts, and test the ends against the middle on the other half.

    Args:
        kinds: the kind of each prompt; the test is made on all prompts and on every kind by itself.
        utterances: parallel sentences (``convergence.parallel()``, ``convergence.babel()``); None leaves them out.
        scan: rows of ``scan.run`` of ``wiring.every_repeat``, for the functional boundary; None leaves it out.
        metric: the metric of ``scan`` to read.
        length: layers in a window of the test.
        min_size: fewest layers in a part; by default ``length + 1`` where that fits, so that the input part holds a
            window from layer 1 on.
        drifts: smooth paths simulated for ``p_drift``.

    Cost: 2 F of one half and one lens readout per layer; 1 + length F of the other, twice if there are kinds; 1 F of
    ``utterances``.

    Raises ValueError for fewer than 8 prompts, too few layers, or unless there is one kind per prompt.
    """
    tokens = Tokens.of(tokens).to(stack.device)
    kinds = ["all"] * len(tokens) if kinds is None else list(kinds)
    if len(kinds) != len(tokens) or len(tokens) < 8:
        raise ValueError(f"give 8 prompts or more and the kind of each, got {len(tokens)} and {len(kinds)} kinds")
    min_size = min(length + 1, stack.n_layers // 3) if min_size is None else min_size
    if not 1 <= min_size <= stack.n_layers // 3:
        raise ValueError(
            f"three parts of {max(1, min_size)} layers or more do not fit into the {stack.n_layers} of {stack.name}; "
            f"take a model of at least 3 layers, and a min_size of 1 to a third of them"
        )
    placing, testing = _halves(kinds, sampling.seed)
    every = features(stack, _subset(tokens, placing), splits=SPLITS, sampling=sampling)
    whole, halves = every.rows(slice(sampling.resamples + 1)), every.rows(slice(sampling.resamples + 1, None)).values
    pairs = list(zip(halves[::2], halves[1::2], strict=True))
    heldout = changepoints.heldout(pairs, every.families, min_size=min_size)
    curve = None
    if utterances is not None:
        curve = convergence.curve(stack, utterances, sampling=sampling)
        whole = whole + Features(("convergence",), curve.difference[:, 1:, None].numpy())
    if scan is not None:
        whole = whole + functional(scan, stack.n_layers, metric, sampling.resamples, sampling.seed)
    by_detector = detectors(whole, curve, min_size, drifts, sampling.seed)
    shown = by_detector[by_detector["p_adjusted"] < SURE].sort_values("excess", kind="stable")
    telling = changepoints.ALL if shown.empty else str(shown["detector"].iloc[-1])
    placements = changepoints.places(whole.of(telling).standardised, 2, min_size)
    names = sorted(set(kinds)) if len(set(kinds)) > 1 else []
    groups = {"all": testing} | {kind: testing[[kinds[i] == kind for i in testing]] for kind in names}
    profiles = {
        kind: ends_against_middle.measure(stack, _subset(tokens, prompts), length, sampling=sampling)
        for kind, prompts in groups.items()
    }
    return Anatomy(
        boundaries=changepoints.posterior(placements),
        segments=_segments(heldout, whole, telling, min_size, drifts, sampling.seed),
        detectors=by_detector,
        agreement=agreement(whole, min_size, drifts, sampling.seed),
        ends=_ends(profiles, placements, sampling.seed),
        by_kind=_by_kind(profiles, placements),
        convergence=curve,
        n_layers=stack.n_layers,
    )


def _ends(profiles: dict[str, Profile], placements: np.ndarray, seed: int) -> pd.DataFrame:
    """Test the ends against the middle on every kind of prompts."""
    rows = []
    for kind, profile in profiles.items():
        contrast = ends_against_middle.ends(profile, placements, seed=seed)
        rows.append({"kind": kind, **contrast, "verdict": ends_against_middle.verdict(contrast)})
    return pd.DataFrame(rows)


def _by_kind(profiles: dict[str, Profile], placements: np.ndarray) -> pd.DataFrame:
    """Compare D on every kind of prompts with D on the first; no row unless there are two kinds."""
    names = [kind for kind in profiles if kind != "all"]
    rows = []
    for kind in names[1:]:
        change = ends_against_middle.difference(profiles[kind], profiles[names[0]], placements)
        rows.append({"kind": kind, "other": names[0], **change})
    return pd.DataFrame(rows, columns=list(KINDS_COLUMNS))


@in_smaller_batches
def features(stack: Stack, tokens: Tokens | Tensor, *, splits: int = 0, sampling: Sampling = SAMPLING) -> Features:
    """Measure every family of the module's table but ``convergence``, under ``resamples`` draws of the prompts.

    After these come ``2 * splits`` rows: random halves of the prompts, each followed by its other half. Cost: 2 F and
    one lens readout per layer. Memory: 5 vectors per prompt and layer, and 256 tokens' products.

    Raises ValueError for a feature that is not finite.
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
        distance = 1 - torch.cosine_similarity(visit.x.double(), (visit.x + visit.u).double(), dim=-1)
        influence[visit.layer].append(distance.masked_fill(~visit.mask, 0).sum(1).cpu())
        leaving[visit.layer].append((visit.x + visit.u)[visit.mask].double().cpu())
    summed = [Step.concatenate(parts) for parts in steps]
    drifts = [step.drift(draws) for step in summed]
    spread = [step.variance(draws).sqrt() for step in summed]
    read = lens.readings(
        stack, ensemble, {key: translator for key, translator in lens.logit(stack).items() if key[1] > 0}
    )
    kl, entropy = (list(lens.MEASURES).index(name) for name in ("kl_final_lens", "entropy"))
    columns = {
        "lens": [
            [(draws @ read["logit", layer + 1][kl] / count).log1p() for layer in range(stack.n_layers)],
            [draws @ read["logit", layer + 1][entropy] / count for layer in range(stack.n_layers)],
        ],
        "growth": [[drift.growth.log() for drift in drifts]],
        "size": [[(drift.growth * size).log() for drift, size in zip(drifts, spread, strict=True)]],
        "kappa": [[drift.kappa for drift in drifts]],
        "influence": [[draws @ torch.cat(parts) / count for parts in influence]],
    }
    for family in ("growth", "kappa", "influence"):
        columns[family][0][0] = columns[family][0][1]
    similar = _cka([torch.cat(parts)[::every] for parts in leaving], draws, ensemble.mask.cpu().nonzero()[::every, 0])
    columns["cka"] = [list(similar[:, :, other].T) for other in range(stack.n_layers)]
    families = tuple(family for family, members in columns.items() for _ in members)
    values = torch.stack([torch.stack(feature, 1) for members in columns.values() for feature in members], 2)
    if not values.isfinite().all():
        raise UndefinedError(
            f"a feature of {stack.name} is not finite: a layer writes nothing, or the prompts are too few"
        )
    return Features(families, values.numpy())


def functional(
    scan: pd.DataFrame, n_layers: int, metric: str = "loglik", resamples: int = SAMPLING.resamples, seed: int = 0
) -> Features:
    """Return the skyline of a brain scan: mean gain of the repeated spans that start, and that end, with each layer.

    The mean over all spans of the same length is subtracted first, or long spans, which only middle layers can be part
    of, would look like boundaries. Prompts on which the unmodified model is not finite are left out. No forward pass.

    Raises ValueError unless a span starts at every layer; UndefinedError where a span is not finite on some prompt.
    """
    wide = comparisons.differences(scan, metric)
    spans = {
        name: span for name in wide.columns if (span := Wiring.parse(str(name), n_layers).repeated_span()) is not None
    }
    if {start for start, _ in spans.values()} != set(range(n_layers)):
        raise ValueError(f"the scan does not repeat a span from every one of {n_layers} layers; scan every_repeat")
    undefined = [name for name in spans if not np.isfinite(wide[name]).all()]
    if undefined:
        raise UndefinedError(
            f"the mean gain by layer is not defined: {len(undefined)} spans give no finite {metric} on some prompt, "
            f"such as {undefined[0]}"
        )
    draws = weights(len(wide), resamples, seed).numpy()
    gains = draws @ wide[list(spans)].to_numpy() / len(wide)
    starts, stops = np.array(list(spans.values())).T
    for size in np.unique(stops - starts):
        same = stops - starts == size
        gains[:, same] -= gains[:, same].mean(1, keepdims=True)
    skyline = [[gains[:, ends == place].mean(1) for place in range(n_layers)] for ends in (starts, stops - 1)]
    return Features(("brain scan",) * 2, rearrange(np.array(skyline), "end layer resample -> resample layer end"))


@with_meanings(DETECTORS_COLUMNS)
def detectors(
    whole: Features, curve: Convergence | None = None, min_size: int = 2, drifts: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Return two rows per detector, ``DETECTORS_COLUMNS``: all features, every family by itself, SC > SL.

    ``whole`` are the ``features``, with that of ``functional`` added if there is a scan. No forward pass.
    """
    tests = changepoints.drift_test(whole.standardised[0], whole.families, 2, min_size, drifts, seed)
    rows, n_layers = [], whole.values.shape[1]
    for name, test in tests.iloc[::-1].iterrows():
        placed = changepoints.places(whole.of(str(name)).standardised, 2, min_size).astype(float)
        placed[:] = placed if np.isfinite(test["gain"]) else np.nan
        rows += _rows(str(name), placed, n_layers, **test[["gain", "p_drift", "excess", "p_adjusted"]])
    if curve is not None:
        rows += _rows("SC > SL", curve.reach(), n_layers)
    return pd.DataFrame(rows, columns=list(DETECTORS_COLUMNS))


@with_meanings(AGREEMENT_COLUMNS)
def agreement(whole: Features, min_size: int = 2, drifts: int = 200, seed: int = 0) -> pd.DataFrame:
    """Return how far apart the families put each boundary, ``AGREEMENT_COLUMNS``, every one by itself.

    Features of one model drift together, and two breaks cut similar drifts at similar places: so the null is how far
    apart the families are on smooth paths (``changepoints.drift_paths``; of its two kinds the larger p). Families that
    do not vary place nothing. No forward pass.
    """
    path = whole.standardised[0]
    names = [name for name in dict.fromkeys(whole.families) if whole.of(name).standardised[0].any()]
    own = np.array([changepoints.breaks(whole.of(name).standardised[0], 2, min_size) for name in names])
    smooth = rearrange(
        changepoints.drift_paths(path, drifts, seed), "kind draw layer feature -> (kind draw) layer feature"
    )
    simulated = Features(whole.families, smooth)
    placed = [changepoints.places(simulated.of(name).standardised, 2, min_size) for name in names]
    spread = rearrange(np.std(placed, axis=0), "(kind draw) boundary -> kind draw boundary", kind=2)
    rows = []
    for place, boundary in enumerate(BOUNDARIES):
        layers, sd, drift = own[:, place], float(own[:, place].std()), spread[..., place]
        p = (1 + (drift <= sd + 1e-9).sum(1)) / (drifts + 1)
        rows.append(
            {
                "boundary": boundary,
                "n_detectors": len(names),
                "earliest": layers.min(),
                "latest": layers.max(),
                "sd": sd,
                "sd_drift": float(drift[p.argmax()].mean()),
                "p_drift": float(p.max()),
            }
        )
    return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS))


def _rows(name: str, places: np.ndarray, n_layers: int, **more: float) -> list[dict]:
    """Return the two rows of a detector that puts the boundaries at ``places[resample, boundary]``."""
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


def _segments(
    heldout: pd.DataFrame, whole: Features, telling: str, min_size: int, drifts: int, seed: int
) -> pd.DataFrame:
    """Return ``heldout`` with where the ``telling`` evidence has its breaks, what they explain, and the p of all."""
    path, rows = whole.standardised[0], list[dict[str, str | float]]()
    chosen = whole.of(telling).standardised[0]
    for count in heldout["breaks"]:
        row: dict[str, str | float] = {
            "evidence": telling,
            "boundaries": " ".join(map(str, changepoints.breaks(chosen, count, min_size))),
            "gain": changepoints.gain(chosen, count, min_size),
        }
        if count:
            tests = changepoints.drift_test(path, whole.families, count, min_size, drifts, seed)
            row["p_drift"] = float(tests["p_adjusted"].min())
            row["gain_drift"] = float(tests["gain_drift"][telling])
        if count == 2:
            row["power"] = changepoints.power(path, whole.families, count, min_size, seed=seed)
        rows.append(row)
    columns = ["evidence", "boundaries", "gain", "p_drift", "gain_drift", "power"]
    return pd.concat([heldout, pd.DataFrame(rows, columns=columns)], axis=1)


def _cka(
    streams: Sequence[Float[Tensor, "token d_model"]], drawn: Float[Tensor, "resample prompt"], prompt: Tensor
) -> Float[Tensor, "resample layer layer"]:
    """Return the linear CKA of every pair of layers, from pairs of different tokens, under every resample.

    ``drawn`` weighs the prompts, ``prompt`` is that of every token. With ``c(K) = (I - 1 w') K (I - w 1')`` the
    inner product ``sum_{i /= j} w_i w_j c(K)_ij c(M)_ij`` is taken apart, so that nothing of tokens by tokens is
    computed again in a resample:

        w'(K * M)w - 2 w'(Kw * Mw) + (w'Kw)(w'Mw) - sum_i w_i^2 c(K)_ii c(M)_ii
    """
    # about the mean of all, or numbers much larger than the spread would cancel
    products = torch.stack([(x - x.mean(0)) @ (x - x.mean(0)).T for x in streams])
    of_token = drawn[:, prompt]
    share = of_token / of_token.sum(1, keepdim=True)
    of_prompt = drawn / of_token.sum(1, keepdim=True)
    member = torch.eye(drawn.shape[1], dtype=drawn.dtype)[prompt]
    towards = einsum(products, share, "layer token other, resample other -> resample layer token")
    whole = einsum(towards, share, "resample layer token, resample token -> resample layer")
    own = products.diagonal(dim1=1, dim2=2) - 2 * towards + whole.unsqueeze(-1)
    common = whole.unsqueeze(2) * whole.unsqueeze(1) - own * share.square().unsqueeze(1) @ own.mT
    common -= 2 * (towards * share.unsqueeze(1)) @ towards.mT
    for layer, product in enumerate(products):
        pairs = member.T @ (product * products[layer:]) @ member  # summed over the tokens of prompts
        both = einsum(of_prompt, pairs, of_prompt, "resample p, other p q, resample q -> resample other")
        common[:, layer, layer:] += both
        common[:, layer + 1 :, layer] += both[:, 1:]
    sizes = common.diagonal(dim1=1, dim2=2).sqrt()
    return common / (sizes.unsqueeze(2) * sizes.unsqueeze(1))


def _split(n_prompts: int, splits: int, seed: int) -> Float[Tensor, "half prompt"]:
    """Return random halves of the prompts as weights, each followed by its other half."""
    generator = np.random.default_rng((seed, 8))
    order = generator.permuted(np.tile(np.arange(n_prompts), (splits, 1)), axis=1)
    first = order < n_prompts // 2
    halves = rearrange(np.stack([first, ~first]), "side split prompt -> (split side) prompt")
    return torch.from_numpy(halves).double()


def _halves(kinds: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two disjoint halves of the prompts, with equal parts of every kind."""
    generator, first = np.random.default_rng((seed, 9)), np.zeros(len(kinds), dtype=bool)
    for kind in sorted(set(kinds)):
        own = np.flatnonzero([name == kind for name in kinds])
        first[generator.permutation(own)[: (len(own) + 1) // 2]] = True
    return np.flatnonzero(first), np.flatnonzero(~first)


def _subset(tokens: Tokens, prompts: np.ndarray) -> Tokens:
    rows = torch.from_numpy(prompts).to(tokens.ids.device)
    return Tokens(tokens.ids[rows], tokens.mask[rows])
