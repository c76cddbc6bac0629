r"""Whether walked activations are still such as a model makes: distance, neighbours, and what is read from them.

Held-out prompts are cut in two at random (``halves``). The first half says what is usual; the second is walked
(``surgery.graft.walk``) and measured as it is and after every kind of step, so that all rows are of the same prompts:

* ``mahalanobis``: squared distance d^2 from the mean, over the number k of components: 1 for the activations that the
  walk was fitted to, whatever their law. ``beyond_real``: share of tokens farther out than 95 % of the usual ones of
  their class of positions; ``beyond_chi_squared``: than 95 % of a Gaussian's. Both 0.05 would be usual, and Gaussian.
* ``nearest``: distance to the nearest real activation of the walk's bank, over the same of the unwalked ones.
  d^2 alone does not see holes: noise of the right covariance may lie where no activation ever is.
* ``entropy`` of the next-token prediction that the frozen layers from ``start`` on and the head make of it (nats), and
  ``entropy_change`` from that of the unwalked prompt.

The control of each kind moves every activation as far, in any direction (``walk.Scattered``). A step is on the manifold
if it passes all of these, not d^2 alone: a stationary walk keeps that by construction. Position 0 is left out.
Intervals over prompts of the second half; the usual quantiles and the bank are taken as given.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import scipy.stats
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from surgery.graft.walk import Kind, Scattered, Walk
from surgery.instruments import fidelity
from surgery.instruments.ensemble import Ensemble, Totals
from surgery.instruments.readout import log_probabilities, portions
from surgery.instruments.windows import Stream
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.page.drawing import BLUE, GREY
from surgery.stats.bootstrap import columns, described, ratio, weights
from surgery.stats.sampling import Sampling

REAL, LEVEL = "real", 0.95
SUMMED = ("walked", "moved", "spread", "mahalanobis", "beyond_real", "beyond_chi_squared", "nearest")
PASSED = {
    "mahalanobis": "squared distance",
    "beyond_real": "share beyond 95 % of real ones",
    "nearest": "distance to the nearest real one",
    "entropy_change": "change of entropy",
}  # by all of which a step is judged
Mask = Bool[Tensor, "prompt pos"]
MEASURES = {
    "moved": "distance moved over the activations' spread (root mean squares)",
    "mahalanobis": "mean squared Mahalanobis distance over the number of components, 1 for what was fitted",
    "beyond_real": "share of tokens farther from the mean than 95 % of real held-out activations of their positions",
    "beyond_chi_squared": "share of tokens farther from the mean than 95 % of a Gaussian's",
    "nearest": "distance to the nearest real activation over that of unwalked activations",
    "entropy": "entropy of the next-token predictions (nats per token)",
    "entropy_change": "the same minus that of the unwalked activations (nats per token)",
}
COLUMNS = {
    "kind": "how the activations were walked; real: not at all",
    "control": "whether they were moved as far as the kind moves them, but in any direction",
    "n_prompts": "number of prompts that were walked, the unit of resampling",
    **described(MEASURES),
}


def report(
    stack: Stack, walk: Walk, kinds: Mapping[str, Kind], heldout: Tokens, start: int, *, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    """A row for the activations as they are, and for each of ``kinds`` by name one walked and one control: ``COLUMNS``.

    ``walk`` is of the streams that enter layer ``start``, of other prompts than ``heldout``. Cost, K kinds:
    ``start / L + (K + 1/2) (1 - start / L)`` F and K + 1/2 readouts. Memory: a batch's distances to the bank.

    Raises ValueError for fewer than four prompts, a ``start`` that is no layer, a walk of another width, and a stream
    that is not finite.

    >>> from surgery.instruments import known_networks
    >>> from surgery.graft import walk
    >>> stack = Stack(known_networks.random_network(n_layers=2, d_model=8))
    >>> some, others = (Tokens.of(known_networks.tokens(n, 6, seed=n)) for n in (64, 8))
    >>> found = walk.fit(stack.stream(some)[1], some.mask)
    >>> report(stack, found, {"far": walk.Free(3.0)}, others, 1)[["kind", "control"]].values.tolist()
    [['real', False], ['far', False], ['far', True]]
    """
    if len(heldout) < 4 or not 0 <= start < stack.n_layers or len(walk.regions[0].mean) != stack.d_model:
        raise ValueError(
            f"give four prompts or more, a layer of {stack.name} from 0 to {stack.n_layers - 1} and a walk of its "
            f"{stack.d_model} dimensions, got {len(heldout)}, {start} and {len(walk.regions[0].mean)}"
        )
    walk = walk.to(stack.device)
    first_half, second_half = (half.to(stack.device) for half in halves(heldout, sampling.seed))
    limits = _limits(stack, walk, Ensemble(first_half, sampling), start)
    ensemble = Ensemble(second_half, sampling)
    steps: dict[tuple[str, bool], Kind | None] = {(REAL, False): None}
    for name, one in kinds.items():
        steps |= {(name, False): one, (name, True): Scattered(one)}
    totals, first = Totals(ensemble.n_units), 0
    for unit, context, mask in ensemble.batches(stack):
        x = fidelity.run(stack, 0, start, context.x0, context)
        fidelity.finite(x, context.tokens, f"the stream of {stack.name}")
        draws = range(first, first + len(unit))
        for key, kind in steps.items():
            moved = x
            if kind is not None:
                moved = walk(x.float(), context.tokens.mask, kind, seed=sampling.seed, draws=draws).to(x)
            for name, values in _measured(walk, limits, x, moved, context, mask).items():
                totals.add((key, name), unit, values.double().sum(1))
            final = stack.execute(f"{start}:", moved, context)
            totals.add((key, "entropy"), unit, _entropies(stack, final, mask).sum(1))
        totals.add("tokens", unit, mask.double().sum(1))
        first += len(unit)
    drawn = weights(ensemble.n_units, sampling.resamples if ensemble.n_units > 1 else 0, sampling.seed)
    rows, count = [], drawn @ totals["tokens"]
    real = {name: drawn @ totals[(REAL, False), name] for name in (*SUMMED, "entropy")}
    for name, control in steps:
        sums = {measure: drawn @ totals[(name, control), measure] for measure in real}
        row: dict[str, str | bool | float] = {"kind": name, "control": control, "n_prompts": len(second_half)}
        measures = {
            "moved": ratio(sums["moved"], real["spread"]).sqrt(),
            "mahalanobis": ratio(sums["mahalanobis"], real["walked"]),
            "beyond_real": ratio(sums["beyond_real"], real["walked"]),
            "beyond_chi_squared": ratio(sums["beyond_chi_squared"], real["walked"]),
            "nearest": ratio(sums["nearest"], real["nearest"]),
            "entropy": sums["entropy"] / count,
            "entropy_change": (sums["entropy"] - real["entropy"]) / count,
        }
        for measure, resampled in measures.items():
            row |= columns(measure, resampled)
        rows.append(row)
    return pd.DataFrame(rows)


def halves(tokens: Tokens, seed: int = 0) -> tuple[Tokens, Tokens]:
    """The prompts that say what is usual, and those that are measured: prompts often come sorted."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(tokens))).to(tokens.ids.device)
    one, other = order.tensor_split([len(tokens) // 2])
    return Tokens(tokens.ids[one], tokens.mask[one]), Tokens(tokens.ids[other], tokens.mask[other])


CAPTION = (
    "Walked activations by kind of step, beside as long steps in any direction. Line: the same prompts, not walked. "
    "Squared distance and the share beyond 95 % of real ones look at the distance from the mean alone; holes between "
    "real activations show in the distance to the nearest one, and in the entropy of what the frozen layers predict."
)


def figure(frame: pd.DataFrame) -> Figure:
    """Every measure by kind, beside its control; the activations as they are as a line."""
    names = ("mahalanobis", "beyond_real", "nearest", "entropy")
    titles = ("Squared distance / k", "Beyond 95 % of real ones", "Nearest real one, ratio", "Entropy (nats)")
    found = Figure(figsize=(3.2 * len(names), 3.6), layout="constrained")
    real, walked = frame[frame.kind == REAL].iloc[0], frame[frame.kind != REAL]
    kinds = list(dict.fromkeys(walked.kind))
    for axes, name, title in zip(found.subplots(1, len(names)), names, titles, strict=True):
        axes.axhspan(real[f"{name}_low"], real[f"{name}_high"], color=GREY, alpha=0.25, linewidth=0)
        axes.axhline(real[name], color=drawing.INK, linewidth=1)
        for control, colour, label in ((False, drawing.ACCENT, "walked"), (True, BLUE, "as far, any direction")):
            some = walked[walked.control == control]
            x = np.array([kinds.index(kind) for kind in some.kind]) + (0.15 if control else -0.15)
            drawing.whiskers(axes, x, some, name, 5, fmt="s" if control else "o", color=colour, label=label)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    found.axes[0].legend(frameon=False, fontsize=8)
    found.supxlabel("line: the same prompts, not walked; 95 % intervals over prompts", fontsize=9, color=drawing.FAINT)
    return found


def found(frame: pd.DataFrame) -> list[str]:
    """A sentence per kind: on the manifold or off it, by which measures, and whether its control is farther off.

    Off by a measure: its interval and that of the same prompts unwalked do not meet, on either side. Nearer than the
    control by it: the value is nearer to the unwalked one, and the two intervals do not meet.
    """
    said, real = list[str](), frame[frame["kind"] == REAL].iloc[0]
    for kind, part in frame[frame["kind"] != REAL].groupby("kind", sort=False):
        walked, control = (part[part["control"] == flag].iloc[0] for flag in (False, True))
        off = [name for name in PASSED if _apart(walked, real, name)]
        nearer = [
            PASSED[name]
            for name in PASSED
            if _apart(walked, control, name) and abs(walked[name] - real[name]) < abs(control[name] - real[name])
        ]
        listed = ", ".join(
            f"{PASSED[name]} {walked[name]:.2f} [{walked[f'{name}_low']:.2f}, {walked[f'{name}_high']:.2f}] where real "
            f"ones have {real[name]:.2f} and the control {control[name]:.2f}"
            for name in off
        )
        verdict = f"off the manifold: {listed}" if off else "on the manifold as far as these measures tell"
        said.append(
            f"{kind}, {walked['moved']:.2f} of the spread moved: {verdict}. Nearer to real activations than as far in "
            f"any direction by {', '.join(nearer) or 'none of them'}."
        )
    return said


def _apart(one: pd.Series, other: pd.Series, name: str) -> bool:
    return bool(one[f"{name}_low"] > other[f"{name}_high"] or one[f"{name}_high"] < other[f"{name}_low"])


def _measured(
    walk: Walk, limits: list[tuple[float, float]], x: Stream, moved: Stream, context: Context, mask: Mask
) -> dict[str, Float[Tensor, "prompt pos"]]:
    """What is summed over the tokens of ``mask``; 0 elsewhere, and where no component varies."""
    found = {name: torch.zeros(mask.shape, device=mask.device) for name in SUMMED}
    for (region, there), (usual, gaussian) in zip(walk.places(context.tokens.mask), limits, strict=True):
        there = there & mask
        if not region.components or not there.any():
            continue
        before, after = x[there].float(), moved[there].float()
        squared = region.whitened(after).square().sum(1)
        values = {
            "walked": torch.ones_like(squared),
            "moved": (after - before).square().sum(1),
            "spread": (before - region.mean).square().sum(1),
            "mahalanobis": squared / region.components,
            "beyond_real": squared > usual,
            "beyond_chi_squared": squared > gaussian,
            "nearest": (after - region.nearest(after, 1)[:, 0]).norm(dim=1),
        }
        for name, value in values.items():
            found[name][there] = value.float()
    return found


def _limits(stack: Stack, walk: Walk, ensemble: Ensemble, start: int) -> list[tuple[float, float]]:
    """For every class of positions what 95 % of usual squared distances, and of a Gaussian's, are below."""
    found: list[list[Tensor]] = [[] for _ in walk.regions]
    for _, context, mask in ensemble.batches(stack):
        x = fidelity.run(stack, 0, start, context.x0, context).float()
        for some, (region, there) in zip(found, walk.places(context.tokens.mask), strict=True):
            some.append(region.whitened(x[there & mask]).square().sum(1).cpu())
    limits = []
    for region, parts in zip(walk.regions, found, strict=True):
        squared = torch.cat(parts).numpy()
        usual = float(np.quantile(squared, LEVEL)) if len(squared) else float("nan")
        limits.append((usual, float(scipy.stats.chi2.ppf(LEVEL, max(1, region.components)))))
    return limits


def _entropies(stack: Stack, x: Stream, mask: Mask) -> Float[Tensor, "prompt pos"]:
    rows, found = x[mask], torch.zeros(mask.shape, device=mask.device)
    parts = []
    for some in portions(stack, rows):
        log_p = log_probabilities(stack, rows[some])
        parts.append(-(log_p.exp() * log_p).sum(1))
    found[mask] = torch.cat(parts).float()
    return found
