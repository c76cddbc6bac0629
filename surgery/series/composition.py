r"""Weight composition: do the matrices of a later layer read the directions that those of an earlier one write?

What a head writes is in the image of ``W_OV = W_V W_O``; a later head takes it in through its queries, keys or values:

    Q   |W_OV^i W_Q W_K^T| / (|W_OV^i| |W_Q W_K^T|)        K   |W_OV^i W_K W_Q^T| / (...)
    V   |W_OV^i W_V W_O|   / (|W_OV^i| |W_V W_O|)          MLP |W_OV^i W_in| / (|W_OV^i| |W_in|)

with Frobenius norms and row vectors (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). For what
an MLP writes, ``W_out`` takes the place of ``W_OV``: kinds ``MLP-Q``, ``MLP-K``, ``MLP-V`` and ``MLP-MLP``. All lie in
[0, 1]. The norm before the reading matrices, its scale and its centring, is multiplied into them here; so is one after
the writing sublayer (Gemma 2, OLMo 2). The model is not touched. With grouped queries, every query head is paired with
the keys and values of its group. A gated MLP reads through both its matrices.

Matrices of random directions read ``1/sqrt(d_model)``, and the largest of many heads more. So the same number is also
taken with the writing matrix turned by a random rotation of the stream (same shapes, same singular values): the
``baseline``. ``excess = mean - baseline``. This is a statement about weights alone: it ignores how large updates are,
whether attention looks there, that rotary positions turn queries and keys (taken here at distance 0), and norms within
attention.

Parallel network: ``MLP-MLP`` is 0 for every pair. Serial network: above its baseline for neighbours, 0 for all others.
Untrained: excess 0 up to its noise.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> frame = compositions(Stack(known_networks.parallel_network(n_layers=3)), ["MLP-MLP"])
>>> frame["mean"].round(6).tolist()
[0.0, 0.0, 0.0]
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from surgery.meanings import with_meanings
from surgery.models.errors import ModelError
from surgery.models.linear import require_plain
from surgery.models.norms import FrozenNorm
from surgery.models.stack import Stack
from surgery.stats.bootstrap import ratio, rotation

HEADS = ("Q", "K", "V")
KINDS = (*HEADS, "MLP", "MLP-Q", "MLP-K", "MLP-V", "MLP-MLP")

COLUMNS = {
    "earlier": "the layer that writes",
    "later": "the layer that reads",
    "kind": "through what: queries, keys, values or MLP of the later layer; MLP- where the earlier layer's MLP writes",
    "mean": "composition, mean over pairs of heads: 0 nothing that is written is read",
    "max": "composition of the pair of heads that has most",
    "baseline": "mean with what is written turned by a random rotation: about 1 / sqrt(d_model)",
    "baseline_max": "max with what is written turned by a random rotation",
    "excess": "mean - baseline",
    "excess_max": "max - baseline_max",
}

Matrices = Float[Tensor, "_ _ _"]  # one matrix per head, or a single one for an MLP


@with_meanings(COLUMNS)
def compositions(stack: Stack, kinds: Sequence[str] = HEADS, *, draws: int = 1, seed: int = 0) -> pd.DataFrame:
    """Measure the composition of every two layers ``earlier < later``, by kind. Columns: ``COLUMNS``.

    The baseline is the mean over ``draws`` rotations. A matrix of zeros composes with nothing and is left out; if there
    is no other, the row is NaN. Cost: 0 F. ``(L^2/2) (1 + draws)`` products of d_model x d_head x heads^2 a kind.

    Raises ModelError where the model has no such weights or a layer computes something else than they say, ValueError
    for an unknown kind or ``draws`` below 1.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> frame = compositions(Stack(known_networks.random_network(n_layers=3)), draws=4)
    >>> bool(frame.excess.abs().max() < 0.02)
    True
    """
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds of composition are {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got draws={draws}")
    with torch.no_grad():
        read = [
            {kind.removeprefix("MLP-"): _reads(stack, i, kind.removeprefix("MLP-")) for kind in kinds}
            for i in range(stack.n_layers)
        ]
        written = [
            {kind.startswith("MLP-"): _writes(stack, i, kind.startswith("MLP-")) for kind in kinds}
            for i in range(stack.n_layers)
        ]
        generator = np.random.default_rng(seed)
        rows = []
        for earlier, later in itertools.combinations(range(stack.n_layers), 2):
            noise = torch.from_numpy(generator.standard_normal((draws, stack.d_model, stack.d_model)))
            turns = [rotation(matrix) for matrix in noise]
            for kind in kinds:
                out, into = written[earlier][kind.startswith("MLP-")], read[later][kind.removeprefix("MLP-")]
                mean, most = _summary(_composition(out, into))
                nulls = torch.tensor([_summary(_composition(out @ turn, into)) for turn in turns])
                baseline, baseline_max = nulls.mean(0).tolist()
                row: dict[str, Any] = {"earlier": earlier, "later": later, "kind": kind, "mean": mean, "max": most}
                row |= {"baseline": baseline, "baseline_max": baseline_max}
                rows.append(row | {"excess": mean - baseline, "excess_max": most - baseline_max})
    return pd.DataFrame(rows)


def _composition(
    out: Float[Tensor, "writer row d_model"], into: Float[Tensor, "reader d_model column"]
) -> Float[Tensor, " pair"]:
    """Return ``|A B| / (|A| |B|)`` for every writing matrix A and every reading matrix B; NaN where one is 0."""
    products = einsum(out, into, "writer row d_model, reader d_model column -> writer reader row column")
    sizes = torch.outer(out.norm(dim=(-2, -1)), into.norm(dim=(-2, -1)))
    norms, sizes = (rearrange(x, "writer reader -> (writer reader)") for x in (products.norm(dim=(-2, -1)), sizes))
    return ratio(norms, sizes)


def _summary(values: Float[Tensor, " pair"]) -> tuple[float, float]:
    """Return mean and maximum of the defined values; NaN if there are none."""
    values = values[values.isfinite()]
    return (float(values.mean()), float(values.max())) if len(values) else (float("nan"), float("nan"))


def _writes(stack: Stack, layer: int, mlp: bool) -> Matrices:
    """Return matrices into the stream with the singular values and images of W_OV or W_out, with the fewest rows."""
    if mlp:
        return _weight(stack, layer, "mlp", "W_out")[None] @ _norm(stack, layer, "ln2_post")
    value, out = (_weight(stack, layer, "attn", key) for key in ("W_V", "W_O"))
    entered = _norm(stack, layer, "ln1") @ _per_query_head(value, len(out))
    return torch.linalg.qr(entered)[1] @ out @ _norm(stack, layer, "ln1_post")


def _reads(stack: Stack, layer: int, kind: str) -> Matrices:
    """Return matrices out of the stream that compose with norms as W_Q W_K^T, its transpose, W_OV or W_in do."""
    block = stack.model.blocks[layer]
    if kind == "MLP":
        into = _weight(stack, layer, "mlp", "W_in")
        if getattr(block.mlp, "W_gate", None) is not None:
            into = torch.cat([into, _weight(stack, layer, "mlp", "W_gate")], -1)
        return (_norm(stack, layer, "ln2" if "ln2" in block.submodules else "ln1") @ into)[None]
    query, key, value, out = (_weight(stack, layer, "attn", name) for name in ("W_Q", "W_K", "W_V", "W_O"))
    key, value = (_per_query_head(weight, len(query)) for weight in (key, value))
    norm, leaving = _norm(stack, layer, "ln1"), _norm(stack, layer, "ln1_post")
    left, right = {"Q": (query, norm @ key), "K": (key, norm @ query), "V": (value, (out @ leaving).mT)}[kind]
    return norm @ left @ torch.linalg.qr(right)[1].mT


def _per_query_head(weight: Float[Tensor, "group d_model d_head"], n_heads: int) -> Matrices:
    return weight.repeat_interleave(n_heads // len(weight), 0)


def _weight(stack: Stack, layer: int, part: str, name: str) -> Float[Tensor, "..."]:
    weight = getattr(getattr(stack.model.blocks[layer], part, None), name, None)
    if not isinstance(weight, Tensor):
        hint = "ask for heads, kinds=('Q', 'K', 'V')" if part == "mlp" else "ask for kinds=('MLP-MLP',)"
        raise ModelError(f"layer {layer} of {stack.name} has no single matrix {part}.{name} to compose with: {hint}")
    key = name.removeprefix("W_").lower()
    module = getattr(stack.model.blocks[layer], part).submodules.get(key)
    if module is not None:
        require_plain(
            getattr(getattr(stack.model.blocks[layer], part), key), f"layer {layer} of {stack.name}: {part}.{key}"
        )
    return weight.detach().double().cpu()


def _norm(stack: Stack, layer: int, name: str) -> Float[Tensor, "d_model d_model"]:
    """Return the linear part A of a norm, ``x -> x A``: its scale and its centring, if any. No norm: identity."""
    module = getattr(stack.model.blocks[layer], name, None)
    identity = torch.eye(stack.d_model, dtype=torch.float64)
    if module is None or isinstance(getattr(module, "original_component", module), nn.Identity):
        return identity
    basis = identity.to(stack.device, stack.dtype)
    norm = FrozenNorm(module, torch.randn(4, stack.d_model, generator=torch.Generator().manual_seed(0)).to(basis))
    basis = basis.to(norm.device)
    bias = norm.with_state(basis[:1] * 0, norm.scale(basis[:1]))
    return (norm.with_state(basis, torch.ones_like(norm.scale(basis))) - bias).double().cpu()
