r"""Which layers can be put back to fresh weights, one at a time, the others as trained? (Zhang, Bengio, Singer 2019)

Layer ``l`` computes what the same layer of an untrained model computes, and the trained layers behind it run on that.
No weight is written. ``damage`` is the loss added, in nats per predicted token: a layer with little of it is *robust*,
the others are *critical* in the authors' words. Read it beside

* ``damage_skip``, the layer left out. Initial weights are often so small that a fresh layer writes next to nothing;
  then both are equal, and the table says which layers can be spared. Where the damage is far above, the noise that
  fresh weights write does the harm, not what is missing;
* ``damage_least`` and ``damage_most`` over the seeds, which show how much one draw of weights can say.

``robust`` is ``yes`` if the whole interval of the damage lies below ``ROBUST`` nats, ``no`` if it lies above, else
``undecided``. In the paper a robust layer costs little or no accuracy and a critical one all of it; 0.1 nats are a
perplexity a tenth higher, about what a language model of half the parameters loses at 2 nats by the scaling law of
Kaplan et al. (2020, arXiv 2001.08361: 2^0.076 = 1.054). The mean is over all tokens: where only answers matter, give
``answers`` and read ``exact`` too.

Source: C. Zhang, S. Bengio and Y. Singer (2019), Are all layers created equal?, arXiv 1902.01996. Their
*re-initialisation* puts back the very weights that training began with, drawing new ones is their *re-randomisation*,
and many more layers survive the first. Give the model before training as ``initial`` where it is published (step 0 of
Pythia) for the first; without it new weights are drawn and this is the second. A robust layer says that its trained
weights are not needed, not that nothing is to be learnt there.
"""

from collections.abc import Hashable
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import TransformerBridge

from surgery.instruments.ensemble import Ensemble, Totals
from surgery.instruments.fidelity import ANSWERS, Answers, Ending, add_predictions, checked_answers, predictions, run
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.loading import untrained
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import columns, described, weights
from surgery.stats.sampling import Sampling

ROBUST = 0.1  # nats per token

MEASURES = {
    "damage": "loss added by fresh weights in the layer, mean over the seeds (nats per predicted token)",
    "damage_skip": "loss added by leaving the layer out (nats per predicted token)",
    "exact": f"{ANSWERS['exact']}; mean over the seeds",
    "exact_original": ANSWERS["exact_original"],
}
COLUMNS = {
    "layer": "layer, counted from 0",
    "n_prompts": "number of prompts, the unit of resampling",
    "n_seeds": "how many fresh models the layer was taken from",
    "damage_least": "the smallest damage of a seed",
    "damage_most": "the largest damage of a seed",
    "robust": f"whether the interval of damage lies below {ROBUST} nats per token: yes, no or undecided",
} | described(MEASURES)


@with_meanings(COLUMNS)
@in_smaller_batches
def layers(
    stack: Stack,
    tokens: Tokens | Tensor,
    seeds: int = 3,
    *,
    initial: TransformerBridge | None = None,
    answers: Answers | None = None,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure what it costs to put each layer back to fresh weights: a row per layer, ``COLUMNS``.

    The fresh models are ``models.untrained`` with seeds ``seed, seed + 1, ...``, or ``initial`` alone. Intervals are
    over prompts with these seeds fixed, and do not cover other seeds. With ``answers`` (as in
    ``fidelity.measure``) also ``exact`` and ``exact_original``. Cost: ``(L + 1)/2 + 1`` F a seed, the same once for
    leaving layers out, and of each ``L + 1`` readouts. Memory: two models; the streams of one batch, twice.

    Raises ValueError for no seed, an ``initial`` of another shape, a stream that is not finite, and what
    ``fidelity.measure`` refuses of prompts and answers.

    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.random_network(n_layers=2, seed=4))
    >>> same_weights = Sampling(seed=4)
    >>> layers(stack, known_networks.tokens(4, 6), seeds=1, sampling=same_weights).damage.tolist()
    [0.0, 0.0]
    """
    if seeds < 1:
        raise ValueError(f"seeds is how many fresh models to take layers from, at least 1, got {seeds}")
    ensemble = Ensemble.of(stack, tokens, sampling)
    answers = checked_answers(answers, ensemble.tokens)
    draws = weights(ensemble.n_units, sampling.resamples if ensemble.n_units > 1 else 0, sampling.seed)
    skipped = _by_layer(stack, None, ensemble, answers, draws, "layers left out")
    by_seed = []
    for seed in range(sampling.seed, sampling.seed + (seeds if initial is None else 1)):
        fresh = Stack(untrained(stack.model, seed) if initial is None else initial)
        if (fresh.n_layers, fresh.d_model) != (stack.n_layers, stack.d_model):
            raise ValueError(
                f"{fresh.name} has {fresh.n_layers} layers of {fresh.d_model} dimensions, {stack.name} has "
                f"{stack.n_layers} of {stack.d_model}: give the same model before its training as initial, or none"
            )
        by_seed.append(_by_layer(stack, fresh, ensemble, answers, draws, f"fresh layers, seed {seed}"))
        del fresh
    rows = []
    for layer in range(stack.n_layers):
        damages = torch.stack([measured[layer]["damage"] for measured in by_seed])
        row: dict[str, Any] = {"layer": layer, "n_prompts": len(ensemble.tokens), "n_seeds": len(by_seed)}
        row |= columns("damage", damages.mean(0))
        row |= {"damage_least": float(damages[:, 0].min()), "damage_most": float(damages[:, 0].max())}
        row |= columns("damage_skip", skipped[layer]["damage"])
        if answers is not None:
            row |= columns("exact", torch.stack([measured[layer]["exact"] for measured in by_seed]).mean(0))
            row |= columns("exact_original", skipped[layer]["exact_original"])
        row["robust"] = "yes" if row["damage_high"] < ROBUST else "no" if row["damage_low"] > ROBUST else "undecided"
        rows.append(row)
    return pd.DataFrame(rows)


def _by_layer(
    stack: Stack,
    fresh: Stack | None,
    ensemble: Ensemble,
    answers: Tensor | None,
    draws: Float[Tensor, "resample unit"],
    label: str,
) -> list[dict[str, Tensor]]:
    """Predictions of the model with each layer in turn taken from ``fresh``, or left out if that is None."""
    totals, first = Totals(ensemble.n_units), 0
    for unit, context, _ in ensemble.batches(stack, label):
        clean = stack.stream(context)
        ends: dict[Hashable, Ending] = {}
        fresh_context = None if fresh is None else fresh.context(context.tokens.to(fresh.device))
        for layer, x in enumerate(clean[:-1]):
            if fresh is not None and fresh_context is not None:
                x = fresh.execute(str(layer), x.to(fresh.device, fresh.dtype), fresh_context).to(x)
            ends[layer] = stack, run(stack, layer + 1, stack.n_layers, x, context)
        of_batch = None if answers is None else answers[first : first + len(unit)]
        add_predictions(totals, unit, context.tokens, of_batch, (stack, clean[-1]), ends)
        first += len(unit)
    return [predictions(totals, layer, draws) for layer in range(stack.n_layers)]
