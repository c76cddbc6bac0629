r"""Networks whose answer is known: what the measures must read was decided when their weights were written.

A *constructed* network has a stream of ``n_layers + 1`` subspaces of ``width`` dimensions. The embedding lives in
subspace 0, layer ``l`` writes subspace ``l + 1`` and nothing else, attention writes zero, and the layer reads a mixture
of the embedding and of what the layer before it wrote:

    z_l = (1 - share) x[subspace 0] + share x[subspace l],        x[subspace l + 1] += V_l act(W_l z_l).

====================  ================================================================================================
network               what it must read
====================  ================================================================================================
``parallel_network``  ``share = 0``, no layer is read by another: R = O = S = 0 in every window, running a window in
                      parallel (sum) changes nothing
``serial_network``    ``share = 1``, each layer reads the one before and only it: R = O = S = 1 in every window
``mixed_network``     strictly in between and rising with ``share``
``parted_network``    layers of a part read what the part before wrote, not one another: swapping two of one part
                      changes nothing, swapping across a boundary does
``linear_network``    each layer rotates and scales the whole stream and prefers nothing: R equals its null N
``random_network``    an untrained transformer with attention: no structure to find, the null for everything
====================  ================================================================================================

In the first four, as each layer writes where nothing was, ``kappa = 0``. With ``norm="RMS"`` a layer reads the stream
divided by its root mean square. Every layer moves that denominator and every later one reads it, so the constructed
networks keep their values only while the denominators are frozen; what ``parallel_network(norm="RMS")`` reads live is
the artefact of normalisation by itself. With ``norm="LN"`` embedding and writes have no mean, as the mean that
LayerNorm subtracts would be one more thing that every layer writes and reads: S would stay 0 where no layer reads
another, since means are frozen as well, but fall to .5 to .97 where each reads only the one before. Biases change
nothing: the measures are centred.

All are ordinary TransformerLens models (``TransformerBridge``), built in hundredths of a second, in float32 or float64.
The constructions are ours.

>>> from surgery import Sampling, Stack, series
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.serial_network())
>>> frame = series.windows(stack, known_networks.tokens(), sampling=Sampling(resamples=0))
>>> frame.S.round(6).unique().tolist()
[1.0]
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import TransformerBridge
from transformer_lens.config import TransformerBridgeConfig

from surgery.models import building
from surgery.stats.bootstrap import rotation

D_VOCAB = 256
CONTEXT = 64

# Rectifying a standard normal leaves a variance of (1 - 1/pi) / 2 (gelu: the same within 2 %). This gain restores it:
# what a layer writes neither grows nor dies along a serial chain.
GAIN = math.sqrt(2 / (1 - 1 / math.pi))


def tokens(n_prompts: int = 48, length: int = 16, seed: int = 0) -> Int[Tensor, "prompt pos"]:
    """Return random token ids for these networks; they have no structure, so only the network can cause a reading."""
    return torch.randint(D_VOCAB, (n_prompts, length), generator=torch.Generator().manual_seed(seed))


def parallel_network(**sizes: Any) -> TransformerBridge:
    """Build ``mixed_network(0)``: every layer reads the embedding alone. Must read S = 0 (denominators frozen)."""
    return mixed_network(0.0, **sizes)


def serial_network(**sizes: Any) -> TransformerBridge:
    """Build ``mixed_network(1)``: every layer reads only what the layer before it wrote. Must read S = 1."""
    return mixed_network(1.0, **sizes)


@torch.no_grad()
def mixed_network(
    share: float | Sequence[float],
    n_layers: int = 6,
    width: int = 8,
    *,
    activation: str = "relu",
    norm: str | None = None,
    biases: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TransformerBridge:
    """Build the network that reads ``share`` of its input from the layer before and the rest from the embedding.

    ``share`` is one number, or one for every layer: networks of parts that are wired differently. ``activation`` is
    ``"relu"`` or ``"gelu"``, ``norm`` is ``None``, ``"RMS"`` or ``"LN"``, and ``d_model = (n_layers + 1) * width``.
    With 6 layers the window of all of them reads S = .17, .38, .69 at shares .25, .5, .75 without normalisation and
    .24, .54, .82 with a frozen RMS, on average over seeds; one seed may lie .1 away.

    Raises ValueError for a share outside [0, 1], and unless there is one share or one per layer.
    """
    shares = [share] * n_layers if isinstance(share, int | float) else list(share)
    if len(shares) != n_layers or not all(0 <= one <= 1 for one in shares):
        raise ValueError(f"share goes from 0 (parallel) to 1 (serial), one or {n_layers} of them, got {share}")
    model = _boot(n_layers, (n_layers + 1) * width, 4 * width, activation, norm, dtype, seed)
    weights, draw = _weights(model), torch.Generator().manual_seed(seed)
    embedding = written = slice(0, width)
    weights["tok_embed.weight"][:] = 0
    weights["tok_embed.weight"][:, embedding] = _normal(draw, D_VOCAB, width)
    if norm == "LN":
        weights["tok_embed.weight"][:, embedding] -= weights["tok_embed.weight"][:, embedding].mean(1, keepdim=True)
    for layer in range(n_layers):
        read, written = written, slice((layer + 1) * width, (layer + 2) * width)
        into, out = weights[f"layers.{layer}.mlp.fc_in.weight"], weights[f"layers.{layer}.mlp.fc_out.weight"]
        weights[f"layers.{layer}.attn.o.weight"][:], into[:], out[:] = 0, 0, 0
        reader = _normal(draw, 4 * width, width) / math.sqrt(width)
        into[:, embedding] += (1 - shares[layer]) * reader
        into[:, read] += shares[layer] * reader
        out[written] = GAIN * _normal(draw, width, 4 * width) / math.sqrt(4 * width)
        if biases:
            weights[f"layers.{layer}.mlp.fc_in.bias"][:] = _normal(draw, 4 * width) / 2
            weights[f"layers.{layer}.mlp.fc_out.bias"][written] = _normal(draw, width)
        if norm == "LN":
            out[written] -= out[written].mean(0)
            weights[f"layers.{layer}.mlp.fc_out.bias"][written] -= weights[f"layers.{layer}.mlp.fc_out.bias"][
                written
            ].mean()
    return model


@torch.no_grad()
def parted_network(
    sizes: Sequence[int] = (4, 4, 4), width: int = 4, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> TransformerBridge:
    """Build a network of parts of so many layers: each reads all that the part before wrote, the first the embedding.

    Within a part layers are parallel, parts are in series: what an intervention must find if it finds parts.

    Raises ValueError for no part, or one without a layer.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes are numbers of layers, 1 or more, of one part or several, got {list(sizes)}")
    n_layers, d_mlp = sum(sizes), 4 * width * max(sizes)
    model = _boot(n_layers, (n_layers + 1) * width, d_mlp, "relu", None, dtype, seed)
    weights, draw = _weights(model), torch.Generator().manual_seed(seed)
    weights["tok_embed.weight"][:] = 0
    weights["tok_embed.weight"][:, :width] = _normal(draw, D_VOCAB, width)
    first, read = 0, slice(0, width)
    for size in sizes:
        for layer in range(first, first + size):
            into, out = weights[f"layers.{layer}.mlp.fc_in.weight"], weights[f"layers.{layer}.mlp.fc_out.weight"]
            weights[f"layers.{layer}.attn.o.weight"][:], into[:], out[:] = 0, 0, 0
            into[:, read] = (_normal(draw, d_mlp, read.stop - read.start) / math.sqrt(read.stop - read.start)).to(dtype)
            written = slice((layer + 1) * width, (layer + 2) * width)
            out[written] = (GAIN * _normal(draw, width, d_mlp) / math.sqrt(d_mlp)).to(dtype)
        read, first = slice((first + 1) * width, (first + size + 1) * width), first + size
    return model


@torch.no_grad()
def linear_network(
    n_layers: int = 6, d_model: int = 32, *, gain: float = 0.5, dtype: torch.dtype = torch.float32, seed: int = 0
) -> TransformerBridge:
    """Build a network whose layers add ``gain`` times a random rotation of the stream: they read all directions alike.

    Must read R/N = 1 in every window: a layer that responds because the stream moved is not yet in series. The
    embeddings share a large mean that no layer moves, next to which a null that was not centred would be too small.
    """
    model = _boot(n_layers, d_model, 2 * d_model, "relu", None, dtype, seed)
    weights, draw = _weights(model), torch.Generator().manual_seed(seed)
    common = 3 * _normal(draw, d_model)
    weights["tok_embed.weight"][:] = _normal(draw, D_VOCAB, d_model) + common
    identity = torch.eye(d_model)  # with relu(a) - relu(-a) = a the layer is linear
    for layer in range(n_layers):
        turn = rotation(_normal(draw, d_model, d_model))
        weights[f"layers.{layer}.attn.o.weight"][:] = 0
        weights[f"layers.{layer}.mlp.fc_in.weight"][:] = torch.cat([turn, -turn])
        weights[f"layers.{layer}.mlp.fc_out.weight"][:] = gain * torch.cat([identity, -identity], dim=1)
        weights[f"layers.{layer}.mlp.fc_out.bias"][:] = -gain * turn @ common
    return model


def random_network(
    n_layers: int = 6,
    d_model: int = 48,
    *,
    activation: str = "gelu",
    norm: str | None = "RMS",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TransformerBridge:
    """Build an untrained transformer with 4 heads, as TransformerLens initialises it: the null of every measure."""
    return _boot(n_layers, d_model, 4 * d_model, activation, norm, dtype, seed, n_heads=4)


def _boot(
    n_layers: int,
    d_model: int,
    d_mlp: int,
    activation: str,
    norm: str | None,
    dtype: torch.dtype,
    seed: int,
    n_heads: int = 1,
) -> TransformerBridge:
    config = TransformerBridgeConfig(
        n_layers=n_layers,
        d_model=d_model,
        d_mlp=d_mlp,
        n_heads=n_heads,
        d_head=8,
        n_ctx=CONTEXT,
        d_vocab=D_VOCAB,
        act_fn=activation,
        normalization_type=norm,
        positional_embedding_type="rotary",
        dtype=dtype,
        seed=seed,
        device="cpu",
    )
    with building.quickly():
        return TransformerBridge.boot_native(config, dtype=dtype).eval()


def _weights(model: TransformerBridge) -> dict[str, Tensor]:
    return {name.replace("._original_component", ""): weight for name, weight in model.named_parameters()}


def _normal(generator: torch.Generator, *shape: int) -> Float[Tensor, "..."]:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
