r"""Whether walked activations are still such as a model makes: distance, neighbours, and what is read from them.

Held-out prompts are cut in two at random (``halves``). The first half says what is usual; the second is walked
(``surgery.graft.walk``) and measured as it is and after every kind of step, so that all rows are of the same prompts:

* ``mahalanobis``: squared distance d^2 from the mean, over the number k of components: 1 for the activations that the
  walk was fitted to, whatever their law. ``beyond_real``: share of tokens farther out than 95 % of the usual ones of
  their class of positions; ``beyond_chi_squared``: than 95 % of a Gaussian's. Both 0.05 would be usual, and Gaussian.
* ``nearest``: distance to the nearest real activation of the walk's bank, over the same of the unwalked ones.
  d^2 alone does not see holes: noise of the right covariance may lie where no activation ever is.
* ``entropy`` of the next-token prediction that the frozen layers from ``start`` on and the head make of it (nats), and
  ``loss`` on the token that really follows; ``entropy_change`` and ``loss_change`` from those of the unwalked prompt.

The control of each kind moves every activation as far, in any direction (``walk.Scattered``). A step is on the manifold
if it passes all of these, not d^2 alone: a stationary walk keeps that by construction. Position 0 is left out, and so
are massive activations, which would decide every mean (``Sampling.skip_massive``). Intervals over prompts of the second
half; the usual quantiles and the bank are taken as given.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import scipy.stats
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from surgery.graft.walk import REAL, Kind, Scattered, Walk
from surgery.instruments import fidelity
from surgery.instruments.ensemble import Ensemble, Totals
from surgery.instruments.readout import log_probabilities, portions
from surgery.instruments.windows import Stream
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import columns, described, ratio, weights
from surgery.stats.sampling import Sampling

LEVEL = 0.95  # the share of real activations that count as usual
SUMMED = ("walked", "moved", "spread", "mahalanobis", "beyond_real", "beyond_chi_squared", "nearest")
Mask = Bool[Tensor, "prompt pos"]
MEASURES = {
    "moved": "distance moved over the activations' spread (root mean squares)",
    "mahalanobis": "mean squared Mahalanobis distance over the number of components, 1 for what was fitted",
    "beyond_real": "share of tokens farther from the mean than 95 % of real held-out activations of their positions",
    "beyond_chi_squared": "share of tokens farther from the mean than 95 % of a Gaussian's",
    "nearest": "distance to the nearest real activation over that of unwalked activations",
    "entropy": "entropy of the next-token predictions (nats per token)",
    "entropy_change": "the same minus that of the unwalked activations (nats per token)",
    "loss": "loss of the next-token predictions (nats per predicted token)",
    "loss_change": "the same minus that of the unwalked activations (nats per predicted token)",
}
CHANGED = ("mahalanobis", "beyond_real", "nearest")
CHANGES = {f"{name}_change": f"{name} minus that of the unwalked activations, paired" for name in CHANGED}
COLUMNS = {
    "kind": "how the activations were walked; real: not at all",
    "control": "whether they were moved as far as the kind moves them, but in any direction",
    "n_prompts": "number of prompts that were walked, the unit of resampling",
    **described(MEASURES | CHANGES),
}


@with_meanings(COLUMNS)
@in_smaller_batches
def report(
    stack: Stack, walk: Walk, kinds: Mapping[str, Kind], heldout: Tokens, start: int, *, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    """Compare walked activations with real ones: a row for these, and two for each of ``kinds``, walked and control.

    The columns are ``COLUMNS``. ``walk`` was fitted to streams that enter layer ``start``, on other prompts than
    ``heldout``. Cost for K kinds: ``start / L + (K + 1/2) (1 - start / L)`` F and K + 1/2 readouts, and
    1 F to find massive activations. Memory: the
    distances of a batch to the bank.

    Raises ValueError for fewer than four prompts, a ``start`` that is no layer, a walk of another width, and a stream
    that is not finite.

    >>> from surgery.instruments import known_networks
    >>> from surgery.graft import walk
    >>> stack = Stack(known_networks.random_network(n_layers=2, d_model=8))
    >>> corpus, heldout = (Tokens.of(known_networks.tokens(n, 6, seed=n)) for n in (64, 8))
    >>> fitted = walk.fit(stack.stream(corpus)[1], corpus.mask)
    >>> report(stack, fitted, {"far": walk.Free(3.0)}, heldout, 1)[["kind", "control"]].values.tolist()
    [['real', False], ['far', False], ['far', True]]
    """
    if len(heldout) < 4 or not 0 <= start < stack.n_layers or len(walk.regions[0].mean) != stack.d_model:
        raise ValueError(
            f"give four prompts or more, a layer of {stack.name} from 0 to {stack.n_layers - 1} and a walk of its "
            f"{stack.d_model} dimensions, got {len(heldout)}, {start} and {len(walk.regions[0].mean)}"
        )
    walk = walk.to(stack.device)
    first_half, second_half = (half.to(stack.device) for half in halves(heldout, sampling.seed))
    limits = _limits(stack, walk, Ensemble.of(stack, first_half, sampling), start)
    ensemble = Ensemble.of(stack, second_half, sampling)
    steps: dict[tuple[str, bool], Kind | None] = {(REAL, False): None}
    for name, kind in kinds.items():
        steps |= {(name, False): kind, (name, True): Scattered(kind)}
    totals, first = Totals(ensemble.n_units), 0
    for unit, context, mask in ensemble.batches(stack):
        x = fidelity.run(stack, 0, start, context.x0, context)
        fidelity.check_finite(x, context.tokens, f"the stream of {stack.name}")
        draws = range(first, first + len(unit))
        for key, step in steps.items():
            moved = x
            if step is not None:
                moved = walk(x.float(), context.tokens.mask, step, seed=sampling.seed, draws=draws).to(x)
            for name, values in _measured(walk, limits, x, moved, context, mask).items():
                totals.add((key, name), unit, values.double().sum(1))
            final = stack.execute(f"{start}:", moved, context)
            entropy, loss = _predictions(stack, final, mask, context.tokens)
            totals.add((key, "entropy"), unit, entropy.sum(1))
            totals.add((key, "loss"), unit, loss.sum(1))
        totals.add("tokens", unit, mask.double().sum(1))
        totals.add("predicted", unit, (mask[:, :-1] & context.tokens.mask[:, 1:]).double().sum(1))
        first += len(unit)
    drawn = weights(ensemble.n_units, sampling.resamples if ensemble.n_units > 1 else 0, sampling.seed)
    rows, count, predicted = [], drawn @ totals["tokens"], drawn @ totals["predicted"]
    unwalked: dict[str, Tensor] = {}
    real = {name: drawn @ totals[(REAL, False), name] for name in (*SUMMED, "entropy", "loss")}
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
            "loss": ratio(sums["loss"], predicted),
            "loss_change": ratio(sums["loss"] - real["loss"], predicted),
        }
        unwalked = unwalked or measures
        measures |= {f"{name}_change": measures[name] - unwalked[name] for name in CHANGED}
        for measure, resampled in measures.items():
            row |= columns(measure, resampled)
        rows.append(row)
    return pd.DataFrame(rows)


def halves(tokens: Tokens, seed: int = 0) -> tuple[Tokens, Tokens]:
    """Draw two halves of the prompts, which often come sorted: one says what is usual, the other is measured."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(tokens))).to(tokens.ids.device)
    first, second = (Tokens(tokens.ids[part], tokens.mask[part]) for part in order.tensor_split([len(tokens) // 2]))
    return first, second


def _measured(
    walk: Walk, limits: list[tuple[float, float]], x: Stream, moved: Stream, context: Context, mask: Mask
) -> dict[str, Float[Tensor, "prompt pos"]]:
    """Values to sum over the tokens of ``mask``; 0 elsewhere, and where no component varies."""
    measured = {name: torch.zeros(mask.shape, device=mask.device) for name in SUMMED}
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
            measured[name][there] = value.float()
    return measured


def _limits(stack: Stack, walk: Walk, ensemble: Ensemble, start: int) -> list[tuple[float, float]]:
    """For every class of positions the 95 % quantile of usual squared distances, and of a Gaussian's."""
    distances: list[list[Tensor]] = [[] for _ in walk.regions]
    for _, context, mask in ensemble.batches(stack):
        x = fidelity.run(stack, 0, start, context.x0, context).float()
        for parts, (region, there) in zip(distances, walk.places(context.tokens.mask), strict=True):
            parts.append(region.whitened(x[there & mask]).square().sum(1).cpu())
    limits = []
    for region, parts in zip(walk.regions, distances, strict=True):
        squared = torch.cat(parts).numpy()
        usual = float(np.quantile(squared, LEVEL)) if len(squared) else float("nan")
        limits.append((usual, float(scipy.stats.chi2.ppf(LEVEL, max(1, region.components)))))
    return limits


def _predictions(
    stack: Stack, x: Stream, mask: Mask, tokens: Tokens
) -> tuple[Float[Tensor, "prompt pos"], Float[Tensor, "prompt pos"]]:
    """Entropy of the predictions at the tokens of ``mask`` and, where one follows, their loss, in nats; 0 elsewhere."""
    rows, following, real = x[mask], tokens.ids.roll(-1, 1)[mask], tokens.mask.roll(-1, 1)
    entropies, losses = torch.zeros(2, *mask.shape, device=mask.device)
    parts = []
    for chunk in portions(stack, rows):
        log_p = log_probabilities(stack, rows[chunk])
        wanted = log_p.gather(1, following[chunk, None]).squeeze(1)
        parts.append(torch.stack([-(log_p.exp() * log_p).sum(1), -wanted]))
    entropies[mask], losses[mask] = torch.cat(parts, 1).float()
    follows = mask & real
    follows[:, -1] = False
    return entropies, losses * follows
