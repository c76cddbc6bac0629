r"""Does the residual stream revert to a mean? Layer by layer, with its nulls and with the cause checked.

Layer ``l`` takes the stream ``x`` to ``x + u``. Over the ensemble of tokens, centred (``c(a) = a - E a``) and with
``n(a) = sqrt(E|c(a)|^2)``, its drift is three numbers:

    kappa  = -E<c(u), c(x)> / E|c(x)|^2      the part of a deviation that the layer takes back; 1 is all of it
    growth = n(u) / n(x)                     the size of the update beside the stream, often called r
    psi    = 2 kappa / growth^2              0 random walk, 1 stationary, above 1 contracting, below 0 explosive

(``surgery.stats.drift``), so that ``E|c(x + u)|^2 = E|c(x)|^2 (1 - 2 kappa + growth^2)``: a stream can revert and still
grow.

**A slope may be nothing.** Four nulls have updates of the same size in other directions. *rotated*: turned by random
rotations. *token_shuffled*: those of another token at the same place. *order_shuffled*: the layers run in random order.
*untrained*: the same architecture with fresh weights. The claim is the excess over the first two.

**A slope is not a force.** A layer that writes against x because it read something correlated with x pushes nothing
back. So the stream is displaced by ``d`` at one token, and what the layer then does differently there decides:

    kappa_causal = -E<d, f(x + d) - f(x)> / E|d|^2
    remaining    = sqrt(E|d + f(x + d) - f(x)|^2 / E|d|^2)

**Turning is not taking back.** A layer that rotates the stream has kappa > 0 in every direction, by slope and by
displacement, and psi = 1; but nothing gets shorter: remaining = 1. A restoring force shrinks the whole displacement,
whatever its direction, and by enough to speak of (``LEAST``).

``d`` points to another prompt's token at that place (*difference*), anywhere (*random*) or along a top principal
component (*principal*), see ``surgery.instruments.displacement``. For a layer that treats every token alone and
linearly, differences repeat the slope by algebra; random directions distinguish a force from a correlate that is kept
elsewhere in the same stream.

Compare with ``surgery.instruments.known_networks``: writing into fresh subspaces reads 0, in parallel as in series; a
random network shrinks some directions and stretches as many. All of it is measured on the weights as loaded (folding or
centring weights changes kappa). Layer 0 starts from the bare embedding, which is small in many models: there kappa and
growth say little. Several layers at once: ``surgery.reversion.trajectories``; single directions:
``surgery.reversion.directions``; a displacement followed through later layers: ``surgery.reversion.returns``.

Source: our definitions, see ``surgery.stats.drift``.

>>> from surgery import Stack, reversion
>>> from surgery.instruments import known_networks
>>> stack, tokens = Stack(known_networks.parallel_network()), known_networks.tokens()
>>> frame = reversion.layers(stack, tokens, nulls=False, causal=False)
>>> bool((frame.kappa.abs() < 1e-6).all())
True
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from surgery.instruments import massive
from surgery.instruments.coordinates import Map, coordinate_map, mechanical
from surgery.instruments.displacement import KINDS, responses
from surgery.instruments.ensemble import Ensemble, Totals, Visit, exchange, partners
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.reversion.rules import beyond, held, judged, weakest
from surgery.stats.bootstrap import columns, described, measure_columns, pool, ratio, rotations, weights
from surgery.stats.drift import LEAST, Drift, Resampled, Step, half_life, regime
from surgery.stats.sampling import Sampling

_NULLS = {
    "rotated": "updates turned by a random rotation",
    "token_shuffled": "updates of other tokens",
    "order_shuffled": "layers in random order, updates brought to the layer's own size",
    "untrained": "the same architecture with fresh weights, updates brought to the layer's own size",
}
WALKS = ("rotated", "token_shuffled")  # the nulls that keep the layer's size
_OTHER_SIZES = ("order_shuffled", "untrained")  # nulls whose updates have a size of their own
_DISPLACEMENTS = {
    "difference": "towards another prompt's token",
    "random": "in a random direction",
    "principal": "along a top principal component",
}
_OF_THE_LAYER = {
    "kappa": "the part of a deviation from the mean that the layer takes back: minus the slope of update on stream",
    "psi": "2 kappa / growth^2: 0 random walk, 1 stationary variance, above 1 contracting, below 0 explosive",
    "growth": "size of the layer's update relative to the stream, both centred",
    "variance_ratio_next": "variance of the stream leaving the layer over that entering it: 1 - 2 kappa + growth^2",
    "half_life": "layers like this one until half of a deviation is gone; empty unless kappa lies between 0 and 1",
    "kappa_excess": "kappa minus the larger of its rotated and token-shuffled nulls",
    "kappa_mechanical": "what an update of this size in any direction reads in normalised coordinates",
    "kappa_corrected": "in normalised coordinates: 1 - phi / phi_mechanical, what goes beyond that",
    "growth_order_shuffled": "growth with the layers in random order",
    "growth_untrained": "growth of the same layer with fresh weights",
}
_OF_NULLS = {
    name: meaning
    for null, difference in _NULLS.items()
    for name, meaning in (
        (f"kappa_{null}", f"null of kappa: {difference}"),
        (f"kappa_excess_{null}", f"kappa minus kappa_{null}, from the same resamples"),
    )
}
_CAUSAL = {
    name: meaning
    for kind, direction in _DISPLACEMENTS.items()
    for name, meaning in (
        (f"remaining_{kind}", f"length after the layer, beside before, of a displacement {direction}: a rotation is 1"),
        (f"kappa_causal_{kind}", f"kappa by intervention: the stream at one token displaced {direction}"),
        (f"kappa_causal_{kind}_frozen", f"kappa_causal_{kind} with the normalisation frozen at the clean run"),
    )
}
COLUMNS = {
    "layer": "layer, counted from 0",
    "regime": "the interval of kappa in a word: opposing, overshooting (above 1), carrying (below 0), undecided ...",
    "restoring": "whether slope and every kind of displacement agree on a force that shrinks it: yes, no, undecided",
    "n_prompts": "number of prompts, the unit of resampling",
    **massive.COLUMNS,
    **described(_OF_THE_LAYER | _OF_NULLS | _CAUSAL),
}
ROTATIONS = 4  # each serves for hundreds of resamples, see _rotated_kappa


@with_meanings(COLUMNS)
@in_smaller_batches
def layers(
    stack: Stack,
    tokens: Ensemble | Tokens | Int[Tensor, "prompt pos"],
    *,
    draws: int = 4,
    size: float = 0.1,
    nulls: bool = True,
    causal: bool = True,
    untrained: Stack | None = None,
    coordinates: str = "raw",
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure for every layer how far it reverts the stream to its mean, beside its nulls, and whether that is a force.

    ``coordinates`` are those of ``surgery.instruments.coordinates`` in which to read the stream; in others than ``raw``
    nothing is displaced. Tokens of massive activations are left out, unless ``sampling.skip_massive`` is False. One row
    per layer:

    ============================== =====================================================================================
    ``kappa psi growth``           as above
    ``variance_ratio_next``        variance of the stream that leaves over that which enters, ``1 - 2 kappa + growth^2``
    ``half_life``                  layers like this until half of a deviation is gone; NaN unless 0 < kappa < 1
    ``regime``                     in a word, see ``regime``
    ``kappa_<null>``               of the four nulls, at equal size: times ``growth / growth_<null>`` where they differ
    ``growth_<null>``              in ``order_shuffled`` and ``untrained``, where they do
    ``kappa_excess_<null>``        kappa - kappa_<null>
    ``kappa_excess``               the claim: the smaller excess of ``rotated`` and ``token_shuffled``, and the smaller
                                   of each end of their intervals, so that above 0 is above both
    ``kappa_causal_<kind>``        ``difference``, ``random``, ``principal``, with live normalisation
    ``kappa_causal_<kind>_frozen`` with the norms' denominators kept at the clean run's; absent if they cannot be
    ``remaining_<kind>``           how long the displacement is after the layer, beside before; 1 for a rotation
    ``restoring``                  ``yes``, ``no`` or ``undecided``, see ``restoring``
    ``kappa_mechanical``           in ``normalised`` coordinates: what an update of this size in any direction reads
    ``kappa_corrected``            there: ``1 - phi / phi_mechanical``, the rest
    ``n_prompts n_massive``        prompts, and tokens left out as massive
    ``token_share`` ...            what the largest token and dimension hold of the variance of stream or update
    ============================== =====================================================================================

    Every number has ``_low`` and ``_high``, the 95 % interval over resampled prompts, pooled over random draws if there
    are any: a null's interval is where one random draw may fall. One prompt has no interval (NaN).

    ``size`` is the length of a displacement as a fraction of n(x); a force shows at several sizes. ``draws`` is the
    number of layer orders, of displaced tokens per prompt and kind, and of principal components. Partners, for
    shuffling and for differences, come from the same batch.

    The nulls are drawn in the coordinates if these are linear, else in the stream; then the updates compared have the
    same length in the stream, and no kappa is brought to another size.

    Cost: 1 F, and 1 F to find massive activations; nulls 1 + ``draws`` F, and 1 F of ``untrained``; causal 5 F where
    many tokens of one prompt can be moved at once, else 3 + 6 ``draws`` F (``surgery.instruments.branches``; 2 of the 5
    are longer by 3 ``draws`` / pos). By default 12 F in all. In ``normalised`` or ``principal`` coordinates 1 F more,
    in ``logits`` 1 F more for each model. Memory: one batch's stream, and for each layer 10 vectors per unit of
    resampling (a prompt, ``UNITS`` at most) and a d_model x d_model matrix: the length of the corpus does not matter.

    Raises ValueError if no token is left to measure, if ``draws``, ``size`` or ``batch_size`` is not positive, if
    ``untrained`` has another shape, or if the stream is not finite.
    """
    ensemble = Ensemble.of(stack, tokens, sampling)
    _check(stack, draws, size, untrained)
    resampled = weights(ensemble.n_units, sampling.resamples, sampling.seed)
    rounding = torch.finfo(stack.dtype).eps
    view = coordinate_map(coordinates, stack, ensemble)
    steps = _steps(ensemble, stack, view, "reversion")
    drifts = [step.drift(resampled) for step in steps]
    rows = [
        _describe(layer, drift, rounding) | held(ensemble.concentration, [layer], [layer])
        for layer, drift in enumerate(drifts)
    ]
    if coordinates == "normalised":
        raw_steps = _steps(ensemble, stack, coordinate_map("raw", stack, ensemble), "sizes")
        for row, drift, raw in zip(rows, drifts, raw_steps, strict=True):
            expected = mechanical(raw.size(resampled))
            row |= columns("kappa_mechanical", expected)
            row |= columns("kappa_corrected", 1 - (1 - drift.kappa) / (1 - expected))
    if nulls:
        exchange_nulls = _exchange_nulls if view.linear else _mapped_exchange_nulls
        measured = exchange_nulls(ensemble, stack, view, steps, resampled)
        measured["order_shuffled"] = _order_null(ensemble, stack, view, draws, resampled)
        if untrained is not None:
            fresh = _steps(ensemble, untrained, coordinate_map(coordinates, untrained, ensemble), "untrained")
            measured["untrained"] = [[step.drift(resampled)] for step in fresh]
        for layer, drift in enumerate(drifts):
            at_layer = {null: by_layer[layer] for null, by_layer in measured.items()}
            rows[layer] |= _compare(drift, at_layer, match=view.linear)
    if causal and coordinates == "raw":
        lengths = [size * float(step.variance(resampled[:1]).sqrt()) for step in steps]
        by_kind = responses(stack, ensemble, lengths, draws)
        for layer, row in enumerate(rows):
            row |= measure_columns(
                {f"kappa_causal_{kind}": 0 - of_kind.slope(layer, resampled) for kind, of_kind in by_kind.items()}
                | {f"remaining_{kind}": by_kind[kind].remaining(layer, resampled) for kind in KINDS}
            )
    frame = pd.DataFrame(rows).assign(n_prompts=len(ensemble.tokens), n_massive=ensemble.n_massive)
    return frame.assign(restoring=restoring(frame)) if causal and coordinates == "raw" else frame


def restoring(frame: pd.DataFrame, least: float = LEAST) -> list[str]:
    """Return whether each layer of ``layers`` shows a restoring force: ``yes``, ``no`` or ``undecided``.

    ``yes`` if it takes back ``least`` of a deviation or more, by slope beyond both random walks (beyond 0, without
    nulls), and shortens displacements of every kind by as much; corrected for the number of layers. ``no`` if one of
    these surely falls short: kappa is smaller, or displacements of some kind stay as long, as under a rotation.
    ``undecided`` otherwise, and where something is undefined or one token holds too much of the variance.
    """
    slopes = [name for name in ("kappa", *(f"kappa_excess_{walk}" for walk in WALKS)) if name in frame]
    return judged(
        [
            weakest(
                [beyond(row, name, least=least) for name in slopes]
                + [beyond(row, f"remaining_{kind}", origin=1, sign=-1, least=least) for kind in KINDS]
            )
            for row in frame.to_dict("records")
        ]
    )


def _check(stack: Stack, draws: int, size: float, untrained: Stack | None) -> None:
    if draws < 1 or size <= 0:
        raise ValueError(f"draws and size must be positive, got draws={draws}, size={size}")
    if untrained is not None and (untrained.n_layers, untrained.d_vocab) != (stack.n_layers, stack.d_vocab):
        raise ValueError(
            f"untrained has {untrained.n_layers} layers and {untrained.d_vocab} tokens, the model {stack.n_layers} and "
            f"{stack.d_vocab}: give the same architecture with fresh weights"
        )


def _steps(ensemble: Ensemble, stack: Stack, view: Map, label: str, order: Sequence[int] | None = None) -> list[Step]:
    """Return each layer's step, wherever in the order it ran. Cost: 1 F."""
    steps: dict[int, Step] = {}
    for visit in ensemble.visits(stack, label, order):
        x, u = _step(visit, view)
        step = steps.setdefault(visit.layer, Step.empty(ensemble.n_units, x.shape[-1]))
        step.add(visit.unit, x, u, visit.mask)
    return [steps[layer] for layer in range(stack.n_layers)]


def _step(visit: Visit, view: Map, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the stream and its update, or ``u`` in place of the update, in the coordinates."""
    x = view.map(visit.x, visit.context)
    return x, view.map(visit.x + (visit.u if u is None else u), visit.context) - x


def _exchange_nulls(
    ensemble: Ensemble, stack: Stack, view: Map, steps: list[Step], resampled: Tensor
) -> dict[str, list[list[Drift]]]:
    """Measure the nulls that keep every layer's stream and updates but not which goes with which. Cost: 1 F."""
    generator = np.random.default_rng((ensemble.sampling.seed, 1))
    width = steps[0].sum_x.shape[1]
    turns = rotations(ROTATIONS, width, generator)
    shuffled = [Step.empty(ensemble.n_units, width) for _ in steps]
    products = Totals(ensemble.n_units)
    for visit in ensemble.visits(stack, "rotated and shuffled updates"):
        x, u = _step(visit, view)
        other = exchange(u, visit.mask, partners(visit.mask, ensemble.generator(visit)))
        shuffled[visit.layer].add(visit.unit, x, other, visit.mask)
        unit = visit.unit[visit.mask.nonzero()[:, 0].cpu()]
        x, u = x[visit.mask].double(), u[visit.mask].double()
        for i, turn in enumerate(turns):
            products.add((visit.layer, i), unit, u @ turn.to(x).T * x)
    signs = torch.from_numpy(generator.choice([-1.0, 1.0], (len(resampled), width)))
    rotated = []
    for layer, step in enumerate(steps):
        of_layer = torch.stack([products[layer, i] for i in range(ROTATIONS)])
        kappa = _rotated_kappa(step, turns, of_layer, resampled, signs)
        rotated.append([replace(step.drift(resampled), kappa=kappa)])
    return {"rotated": rotated, "token_shuffled": [[step.drift(resampled)] for step in shuffled]}


def _mapped_exchange_nulls(
    ensemble: Ensemble, stack: Stack, view: Map, steps: list[Step], resampled: Tensor
) -> dict[str, list[list[Drift]]]:
    """Measure the same nulls if the coordinates bend: updates are exchanged in the stream, then mapped. Cost: 1 F."""
    turns = rotations(ROTATIONS, stack.d_model, np.random.default_rng((ensemble.sampling.seed, 1)))
    width = steps[0].sum_x.shape[1]
    exchanged = [[Step.empty(ensemble.n_units, width) for _ in range(ROTATIONS + 1)] for _ in steps]
    for visit in ensemble.visits(stack, "rotated and shuffled updates"):
        other = exchange(visit.u, visit.mask, partners(visit.mask, ensemble.generator(visit)))
        turned = (visit.u @ turn.to(visit.u).T for turn in turns)
        for step, u in zip(exchanged[visit.layer], (other, *turned), strict=True):
            step.add(visit.unit, *_step(visit, view, u), visit.mask)
    drifts = [[step.drift(resampled) for step in layer] for layer in exchanged]
    return {"rotated": [layer[1:] for layer in drifts], "token_shuffled": [layer[:1] for layer in drifts]}


def _rotated_kappa(
    step: Step,
    turns: list[Float[Tensor, "d_model d_model"]],
    products: Float[Tensor, "rotation unit d_model"],
    resampled: Float[Tensor, "resample unit"],
    signs: Float[Tensor, "resample d_model"],
) -> Resampled:
    """Return kappa of rotated updates, every resample with a rotation of its own; row 0 is the mean over all of them.

    Random signs in front of a uniformly random rotation make another one, and signs can be drawn after the sums over
    tokens: ``<s R u, x> = sum_k s_k (R u)_k x_k``. So a few rotations serve for hundreds of resamples. ``products`` are
    the sums of ``(R u)_k x_k`` over each unit's tokens.
    """
    count = (resampled @ step.count).unsqueeze(-1)
    mean_x = resampled @ step.sum_x / count
    covariance = torch.stack(
        [
            resampled @ of_turn / count - (resampled @ (step.sum_u @ turn.T) / count) * mean_x
            for turn, of_turn in zip(turns, products, strict=True)
        ]
    )
    rows = torch.arange(len(resampled))
    values = (covariance[rows % len(turns), rows] * signs).sum(-1)
    values[0] = (covariance[:, 0] @ signs.T).mean()
    return ratio(0 - values, step.variance(resampled))


def _order_null(ensemble: Ensemble, stack: Stack, view: Map, draws: int, resampled: Tensor) -> list[list[Drift]]:
    """Measure each layer's drift where it ran in ``draws`` random orders of all layers. Cost: ``draws`` F."""
    generator = np.random.default_rng((ensemble.sampling.seed, 2))
    by_order = []
    for _ in range(draws):
        order = generator.permutation(stack.n_layers).tolist()
        steps = _steps(ensemble, stack, view, "layers in random order", order)
        by_order.append([step.drift(resampled) for step in steps])
    return [list(drifts) for drifts in zip(*by_order, strict=True)]


def _describe(layer: int, drift: Drift, rounding: float) -> dict[str, Any]:
    """Return the columns of a layer's own drift."""
    row: dict[str, Any] = {"layer": layer}
    row |= measure_columns({field.name: getattr(drift, field.name) for field in fields(drift)})
    kappa, low, high = row["kappa"], row["kappa_low"], row["kappa_high"]
    row["half_life"] = half_life(kappa)
    defined = 0 < kappa < 1
    row["half_life_low"] = (0.0 if high >= 1 else half_life(high)) if defined else math.nan
    row["half_life_high"] = (math.inf if low <= 0 else half_life(low)) if defined else math.nan
    row["regime"] = regime(kappa, low, high, row["growth"], rounding)
    return row


def _compare(drift: Drift, nulls: dict[str, list[Drift]], match: bool) -> dict[str, float]:
    """Return the columns of the nulls; a null's interval, and that of the excess over it, pools draws and resamples.

    ``match`` brings every null to the growth of the layer, which is the same already where only directions changed.
    """
    measures: dict[str, Float[Tensor, " pooled"]] = {}
    for name, draws in nulls.items():
        kappas = [null.kappa * ratio(drift.growth, null.growth) if match else null.kappa for null in draws]
        measures[f"kappa_{name}"] = pool(kappas)
        measures[f"kappa_excess_{name}"] = pool([drift.kappa - kappa for kappa in kappas])
        if name in _OTHER_SIZES:
            measures[f"growth_{name}"] = pool([null.growth for null in draws])
    row = measure_columns(measures)
    return row | smaller_excess(row)


def smaller_excess(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the columns ``kappa_excess``: the smaller excess over the two random walks, and of either end."""
    return {
        f"kappa_excess{end}": float(np.min([row[f"kappa_excess_{walk}{end}"] for walk in WALKS]))
        for end in ("", "_low", "_high")
    }
