"""How far back layers read: the loss of a model in which every layer hears only the last k layers.

Layer l runs on ``x_0 + the writes of layers l-k to l-1``; every older write is replaced by its mean over the tokens
measured, so that only what it says of this token is gone. Its MLP hears its own attention as ever, so that each
sublayer hears the same k layers. The readout hears everything, and each write is that of the model so cut short. With
k = L - 1 it is the model itself; with k = 0 all layers read the embedding, as in one wide layer.

Layers that only hear their neighbours could be run in a pipeline; a loss that falls late says that old writes are read
by much later layers. Control: as many earlier writes, but the ``first`` ones, or ``random`` ones. If those cost no more
than the last, it is the number of writes that matters and not how old they are.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> serial = known_networks.serial_network(n_layers=6)  # each layer reads the one before, and no other
>>> frame = losses(Stack(serial), known_networks.tokens(8, 6), [0, 1, 5], sampling=Sampling(resamples=0))
>>> bool(frame.query("heard == 'last' and k >= 1").kl.abs().max() < 1e-5), bool(frame.kl.max() > 1e-3)
(True, True)
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from surgery import progress
from surgery.instruments import losses as change
from surgery.instruments import massive
from surgery.instruments.ablation import CleanRun, clean_runs
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.readout import predicting_positions
from surgery.instruments.together import Together
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.engine import Stream
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import columns, described, weights
from surgery.stats.sampling import Sampling

HEARD = ("last", "first", "random")
KS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
COLUMNS: dict[str, str] = {
    "k": "how many earlier layers each layer hears",
    "heard": "which: the last k before it, the first k of the model, or k drawn at random for every layer",
    "seed": "of the random draw; 0 elsewhere",
    "n_prompts": "number of prompts, the unit of resampling",
    **described(
        {
            "loss": "loss added (nats per token)",
            "kl": "KL(clean || cut short) of the next-token distributions (nats per token)",
        }
    ),
    **massive.COLUMNS,
}


@with_meanings(COLUMNS)
@in_smaller_batches
def losses(
    stack: Stack,
    tokens: Ensemble | Tokens | Tensor,
    ks: Sequence[int] | None = None,
    *,
    heard: Sequence[str] = HEARD,
    draws: int = 3,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure the loss for every k and every way to choose which layers are heard: ``COLUMNS``.

    Args:
        ks: by default those of ``KS`` below L - 1, and L - 1.
        heard: of ``HEARD``; ``random`` is drawn ``draws`` times.

    Cost: 2 F; then 1 F and a readout for each row. Memory: the updates of all layers for each row of one batch.

    Raises ValueError for a k below 0 or above L - 1, and what ``Ensemble.of`` and ``clean_runs`` refuse.
    """
    L = stack.n_layers
    wanted = sorted({k for k in KS if k < L - 1} | {L - 1}) if ks is None else list(ks)
    if not wanted or not all(0 <= k < L for k in wanted):
        raise ValueError(f"k is how many earlier layers are heard, 0 to {L - 1}, got {list(wanted)}")
    if unknown := [name for name in heard if name not in HEARD]:
        raise ValueError(f"layers hear {', '.join(HEARD)} ones, not {unknown[0]!r}")
    ensemble = Ensemble.of(stack, tokens, sampling)
    rows = [(k, name, seed) for k in wanted for name in heard for seed in range(draws if name == "random" else 1)]
    sets = [chosen_layers(L, k, name, sampling.seed + seed) for k, name, seed in rows]
    total = torch.zeros(2, len(rows), len(ensemble.tokens), dtype=torch.float64)
    with progress.task("horizon", L * len(ensemble.tokens), sampling.progress) as advance:
        for run in clean_runs(stack, ensemble, "mean"):
            batch = run.context.tokens
            predicting = predicting_positions(batch)
            finals = [change.predicted(final, predicting) for final in _finals(stack, run, sets)]
            part = slice(run.first, run.first + len(run.mask))
            total[:, :, part] = change.by_prompt(stack, batch, run.stream[-1], finals).cpu()
            advance(L * len(run.mask))
    drawn = weights(len(ensemble.tokens), sampling.resamples, sampling.seed)
    count = drawn @ predicting_positions(ensemble.tokens).sum(1).double().cpu()
    frame = pd.DataFrame(
        {"k": k, "heard": name, "seed": seed, "n_prompts": len(ensemble.tokens)}
        | columns("loss", drawn @ total[0, place] / count)
        | columns("kl", drawn @ total[1, place] / count)
        for place, (k, name, seed) in enumerate(rows)
    )
    return ensemble.annotate(frame)


def chosen_layers(n_layers: int, k: int, heard: str, seed: int = 0) -> list[frozenset[int]]:
    """The earlier layers that each layer hears; at most k, and fewer where there are no more.

    >>> [sorted(layers) for layers in chosen_layers(4, 2, "last")]
    [[], [0], [0, 1], [1, 2]]
    """
    generator = np.random.default_rng((seed, k))

    def of(layer: int) -> Iterable[int]:
        if heard == "last":
            return range(max(0, layer - k), layer)
        if heard == "first":
            return range(min(k, layer))
        return generator.permutation(layer)[:k].tolist()

    return [frozenset(of(layer)) for layer in range(n_layers)]


def _finals(stack: Stack, run: CleanRun, sets: Sequence[Sequence[frozenset[int]]]) -> list[Stream]:
    """The final streams of one batch, for every choice of what layers hear."""
    together, x0 = Together(stack, run.context), run.context.x0
    written: list[list[Float[Tensor, "prompt pos d_model"]]] = [[] for _ in sets]
    for layer in range(stack.n_layers):
        entering = []
        for updates, chosen in zip(written, sets):
            x = x0
            for earlier, u in enumerate(updates):
                x = x + (u if earlier in chosen[layer] else run.ablate(earlier, u))
            entering.append(x)
        for updates, u in zip(written, together.updates(layer, entering)):
            updates.append(u)
    return [torch.stack([x0, *updates]).sum(0) for updates in written]
