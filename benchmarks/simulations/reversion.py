"""What is said of mean reversion in networks whose answer is known: rotations, random networks, constructed reversion.

A rotation turns every deviation and takes none of it back; a random network reverts in some directions and grows in as
many; a layer ``-kappa (x - mu)`` reverts. ``rows`` counts the answers of ``surgery.reversion.say``.

    python -m benchmarks.simulations.reversion
"""

import itertools
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import TransformerBridge

from surgery.instruments import known_networks
from surgery.instruments.ensemble import Ensemble
from surgery.models.stack import Stack
from surgery.reversion import directions, files, kappa, returns, say, trajectories
from surgery.stats.sampling import Sampling

D_MODEL, N_LAYERS = 32, 6
BEFORE = {  # what was said of the same networks while kappa alone decided
    "rotation by up to 0.1 radians": "no",
    "rotation by up to 1.0 radians": "yes",
    "rotation by up to 3.1 radians": "yes",
    "kappa .3 in all directions": "yes",
    "kappa .001 in all directions": "yes",
    "kappa .3 in 1 direction of 32": "yes",
    "kappa .3 in 4 directions of 32": "yes",
    "kappa .3 in layers 2 to 3": "in part",
}
RANDOM = list(
    itertools.product(("gelu", "relu"), ("RMS", "LN", None), (True, False), (0.1, 0.3, 1.0, 3.0))
)  # activation, norm, attention, update scale


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(model: TransformerBridge) -> dict[str, Tensor]:
    return {name.replace("._original_component", ""): weight for name, weight in model.named_parameters()}


@torch.no_grad()
def linear(maps: Sequence[Float[Tensor, "d d"]], spread: Tensor | float = 1.0, mean: float = 2.0) -> TransformerBridge:
    """Build layers ``maps[l] (x - mean)`` and embeddings scattered around the mean, ``spread`` wide."""
    d_model = len(maps[0])
    model = known_networks.random_network(len(maps), d_model, activation="relu", norm=None)
    weight = weights(model)
    weight["tok_embed.weight"][:] = mean + normal(known_networks.D_VOCAB, d_model, seed=0) * spread
    for layer, of_layer in enumerate(maps):
        into, out = (weight[f"layers.{layer}.mlp.fc_{name}.weight"] for name in ("in", "out"))
        weight[f"layers.{layer}.attn.o.weight"][:], into[:], out[:] = 0, 0, 0
        into[: 2 * d_model] = torch.cat([of_layer, -of_layer])  # relu(a) - relu(-a) = a
        out[:, : 2 * d_model] = torch.cat([torch.eye(d_model), -torch.eye(d_model)], 1)
        weight[f"layers.{layer}.mlp.fc_out.bias"][:] = -mean * of_layer.sum(1)
    return model


def turning(angle: float, n_layers: int = N_LAYERS) -> TransformerBridge:
    """Build layers ``(Q - 1)(x - mean)``, every Q a rotation by up to ``angle`` radians, in planes of its own."""
    maps = []
    for layer in range(n_layers):
        skew = normal(D_MODEL, D_MODEL, seed=1 + layer)
        skew = skew - skew.T
        skew *= angle / torch.linalg.matrix_norm(skew, 2)
        maps.append(torch.linalg.matrix_exp(skew) - torch.eye(D_MODEL))
    return linear(maps)


def reverting(
    kappa: float,
    directions: int = D_MODEL,
    which: Sequence[int] | None = None,
    spread: float = 1.0,
    n_layers: int = N_LAYERS,
) -> TransformerBridge:
    """Build layers that take ``kappa`` of a deviation back along some directions, the widest, in ``which`` layers
    or all of them.

    ``spread`` is the size of the embeddings along these directions, beside 1 along the others.
    """
    back = -kappa * torch.diag((torch.arange(D_MODEL) < directions).float())
    wide = torch.where(torch.arange(D_MODEL) < directions, spread, 1.0)
    which = range(n_layers) if which is None else which
    return linear([back if layer in which else torch.zeros_like(back) for layer in range(n_layers)], wide)


@torch.no_grad()
def random(
    activation: str, norm: str | None, attention: bool, scale: float, seed: int, n_layers: int = N_LAYERS
) -> TransformerBridge:
    """Build an untrained transformer with weights of variance 1 / inputs and updates ``scale`` times as large."""
    model = known_networks.random_network(n_layers, D_MODEL, activation=activation, norm=norm, seed=seed)
    weight = weights(model)
    for place, (name, values) in enumerate(sorted(weight.items())):
        if name.endswith("weight") and values.ndim == 2 and name.startswith("layers"):
            out = name.endswith(("attn.o.weight", "fc_out.weight"))
            values[:] = normal(*values.shape, seed=1000 * seed + place) / values.shape[1] ** 0.5 * (scale if out else 1)
            if "attn.o" in name and not attention:
                values[:] = 0
    weight["tok_embed.weight"][:] = normal(*weight["tok_embed.weight"].shape, seed=seed)
    return model


def told(model: TransformerBridge, prompts: int = 32, length: int = 12) -> tuple[list[str], dict[str, pd.DataFrame]]:
    """Return what the page says of a network, its answer last, and the tables that it says it of."""
    stack, sampling = Stack(model), Sampling(resamples=200)
    ensemble = Ensemble.of(stack, known_networks.tokens(prompts, length), sampling)
    moments = trajectories.measure(stack, ensemble, draws=1, sampling=sampling)
    tables = {
        files.LAYERS: kappa.layers(stack, ensemble, draws=2, sampling=sampling),
        files.WINDOWS: trajectories.windows(moments),
        files.PANEL: trajectories.panel(moments),
        files.ENDS: trajectories.ends(moments),
        files.DIRECTIONS: directions.layers(stack, ensemble, draws=2, sampling=sampling),
        files.RETURNS: returns.curves(
            stack, ensemble, [1, stack.n_layers // 2], sizes=[0.1], draws=1, sampling=sampling
        ),
    }
    return [str(sentence) for sentence in say.sentences(tables)], tables


def answer(sentences: Sequence[str]) -> str:
    """Sort the answer: yes, in part, no, or undecided."""
    last = sentences[-1]
    if "in every layer" in last:
        return "yes"
    if "only in part" in last:
        return "in part"
    return "no" if "does not revert" in last else "undecided"


def cases() -> Iterator[tuple[str, str, TransformerBridge]]:
    """Yield name, right answer, network."""
    for angle in (0.1, 1.0, 3.1):
        yield f"rotation by up to {angle} radians", "no", turning(angle)
    yield "kappa .3 in all directions", "yes", reverting(0.3)
    yield "kappa .001 in all directions", "no", reverting(0.001)
    yield "kappa .3 in 1 direction of 32", "in part", reverting(0.3, 1, spread=2.0)
    yield "kappa .3 in 4 directions of 32", "in part", reverting(0.3, 4, spread=2.0)
    yield "kappa .3 in layers 2 to 3", "in part", reverting(0.3, which=(2, 3))


def rows(quick: bool = False) -> list[dict]:
    """The table: what should be said, what was said while kappa alone decided, what is said."""
    table = [
        {
            "point": "mean reversion",
            "case": name,
            "nominal": nominal,
            "before": BEFORE[name],
            "after": answer(told(model)[0]),
        }
        for name, nominal, model in cases()
    ]
    count = 4 if quick else 30
    answers = [answer(told(random(*RANDOM[37 * seed % len(RANDOM)], seed=seed))[0]) for seed in range(count)]
    revert = sum(word in ("yes", "in part") for word in answers)
    case = f"random networks that revert, wholly or in part, of {count}"
    return [
        *table,
        {"point": "mean reversion", "case": case, "nominal": "at most 2 of 30", "before": "30 of 30", "after": revert},
    ]


if __name__ == "__main__":
    print(pd.DataFrame(rows()).to_string(index=False))
