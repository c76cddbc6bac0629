r"""Maps of the residual stream in which its drift may be measured: whether a stream reverts depends on the ruler.

================  ====================================================================================================
``raw``           the stream as it is: massive dimensions decide, and growth with depth reads as growth
``normalised``    the stream over its own root mean square, ``sqrt(d_model)`` long; a model whose final norm is a
                  LayerNorm has its mean over d_model taken away first. No gain, no bias. **Reverts mechanically**
``principal``     its top principal components, one fixed basis for all layers: of the stream pooled over layers, each
                  layer's covariance divided by its trace, so that large late layers do not decide alone
``logits``        what it says of the next token: centred logits, the final norm's denominator frozen at the clean one
================  ====================================================================================================

All but ``normalised`` are linear (with one context), so the map of an update is the update of the map:
``map(x + u) - map(x) = map(u)``.

Normalised, a random walk seems to revert. An update that is orthogonal to the stream and ``r = |u| / |x|`` long
(uncentred, token by token) leaves ``1 / sqrt(1 + r^2)`` of any normalised stream in place: ``kappa_0`` in
``mechanical(r)`` is the control, and the claim is what goes beyond it.

Logits: with ``s`` the clean denominator of a token and ``W`` what the head makes of unit vectors once the norm is
frozen (gain included, LayerNorm's own mean too), the logits of a stream are ``x W / s`` and constants, which fall out
of every covariance. Centred over the vocabulary by ``C`` they have the inner products of

    z = R^T x / s,      R R^T = M = W C W^T,

so ``z``, at most d_model numbers, stands for them: an isometry, not an approximation.

Source: the definitions are ours; reading a stream through the head is the logit lens (nostalgebraist 2020).

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> from surgery.models.tokens import Tokens
>>> stack, ensemble = Stack(known_networks.random_network()), Ensemble(Tokens.of(known_networks.tokens(8)))
>>> context = stack.context(ensemble.tokens)
>>> principal = coordinate_map("principal", stack, ensemble, components=4)
>>> principal.linear, tuple(principal.map(context.x0, context).shape)
(True, (8, 16, 4))
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from surgery.instruments.covariance import covariances
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.readout import LOGITS_AT_ONCE, final_norm, frozen_head, logits, portions
from surgery.models.norms import FrozenNorm
from surgery.models.stack import Context, Stack

Stream = Float[Tensor, "*layer prompt pos d_model"]
Mapped = Float[Tensor, "*layer prompt pos k"]
Number = TypeVar("Number", float, Tensor, np.ndarray, pd.Series)

MEANINGS = {
    "raw": "the stream as it is",
    "normalised": "the stream divided by its own root mean square, without gain; random updates revert mechanically",
    "principal": "the stream in its top principal components, one basis for all layers",
    "logits": "the centred logits of the stream, the final norm frozen at each token's clean denominator",
}
COORDINATES = tuple(MEANINGS)
NEGLIGIBLE = 1e-12  # a variance below this share of the second moment is rounding
LOUD = 200.0  # logits at which every cap in use has long flattened


@dataclass(frozen=True)
class Map:
    """One coordinate system: a map of every token's stream by itself; padding stays in place."""

    name: str
    linear: bool
    function: Callable[[Tensor, Context], Tensor]

    @property
    def meaning(self) -> str:
        """What the coordinates are, in one line."""
        return MEANINGS[self.name]

    def map(self, x: Stream, context: Context) -> Mapped:
        """Return the coordinates of a stream (or, if ``linear``, an update) of the batch of ``context``, in float64."""
        return self.function(x.double(), context)


def coordinate_map(name: str, stack: Stack, ensemble: Ensemble, components: int = 16) -> Map:
    """Return the map ``name``, one of ``COORDINATES``, of a model on an ensemble.

    ``components`` is how many principal components to keep; fewer if the stream has fewer. Cost: ``principal`` 1 F;
    ``logits`` d_model readouts, a d_model x d_vocab matrix, and 1 F, in the first walk in which it is used.

    Raises ValueError for another name, for ``principal`` of a stream that does not vary, for ``logits`` of a head that
    caps them, and for a final norm whose denominator cannot be found (``normalised`` and ``logits``).
    """
    if name == "raw":
        return Map(name, True, lambda x, _: x)
    if name == "normalised":
        norm = final_norm(stack)
        centres = norm is not None and norm.centres
        return Map(name, False, lambda x, _: _normalised(x - x.mean(-1, keepdim=True) if centres else x))
    if name == "principal":
        basis = _principal(stack, ensemble, components)
        return Map(name, True, lambda x, _: x @ basis.to(x))
    if name == "logits":
        norm = final_norm(stack)
        root, scale = _root(stack, norm), _CleanScale(stack, norm)
        return Map(name, True, lambda x, context: x / scale(context) @ root.to(x))
    raise ValueError(f"there are no coordinates {name!r}: choose one of {', '.join(COORDINATES)}")


def mechanical(growth: Number) -> Number:
    """Return ``kappa_0``: how much random updates of size ``growth = |u| / |x|`` (uncentred) revert when normalised.

    >>> round(mechanical(0.6), 3)
    0.143
    """
    return 1 - (1 + growth**2) ** -0.5


def _normalised(x: Stream) -> Stream:
    """Scale every token's stream to length ``sqrt(d_model)``; a stream of zeros stays so."""
    return math.sqrt(x.shape[-1]) * functional.normalize(x, dim=-1)


def _principal(stack: Stack, ensemble: Ensemble, count: int) -> Float[Tensor, "d_model component"]:
    if count < 1:
        raise ValueError(f"components must be positive, got {count}")
    covariance, second = covariances(stack, ensemble)
    variance, square = (matrix.diagonal(dim1=-2, dim2=-1).sum(-1) for matrix in (covariance, second))
    varies = variance > NEGLIGIBLE * square
    if not varies.any():
        raise ValueError(
            f"the stream of {stack.name} is the same at all {int(ensemble.mask.sum())} tokens, it has no principal "
            "components: give prompts that differ"
        )
    values, vectors = torch.linalg.eigh((covariance[varies] / variance[varies, None, None]).sum(0))
    return vectors[:, values > 1e-9 * values[-1]].flip(-1)[:, :count]


class _CleanScale:
    """Denominators of the final norm in the clean run, a number a token, kept for every batch; 1 without a norm."""

    def __init__(self, stack: Stack, norm: FrozenNorm | None) -> None:
        self._stack, self._norm = stack, norm
        self._context: Context | None = None
        self._kept: dict[tuple[bytes, bytes], Tensor] = {}

    def __call__(self, context: Context) -> Float[Tensor, "prompt pos 1"] | float:
        if self._norm is None:
            return 1.0
        if self._context is not context:  # every walk embeds the same prompts anew
            self._context, tokens = context, context.tokens
            prompts = (tokens.ids.cpu().numpy().tobytes(), tokens.mask.cpu().numpy().tobytes())
            if prompts not in self._kept:
                self._kept[prompts] = self._norm.scale(self._stack.execute(":", context.x0, context).double())
            self._scale = self._kept[prompts]
        return self._scale


@torch.no_grad()
def _root(stack: Stack, norm: FrozenNorm | None) -> Float[Tensor, "d_model k"]:
    """Return ``R`` with ``R R^T = W C W^T``, for denominators of 1."""
    units = torch.eye(stack.d_model, device=stack.device, dtype=stack.dtype) * math.sqrt(stack.d_model)
    scale = 1.0 if norm is None else float(norm.scale(units[:1].double()))

    def read(x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        with frozen_head(stack, units[:1].expand(len(x), -1)):
            return logits(stack, x)

    constant = read(0 * units[:1])
    noise = torch.randn(4, stack.d_model, generator=torch.Generator().manual_seed(0)).to(units)
    noise = noise * (LOUD / (read(noise) - constant).abs().max().clamp(min=1e-3)).to(noise)
    once, twice = read(noise) - constant, read(2 * noise) - constant
    if not (twice - 2 * once).abs().max() <= 0.1 * once.abs().max():  # nor NaN
        raise ValueError(
            f"the head of {stack.name} is not linear (it caps its logits), so no map of streams keeps their inner "
            f"products: use {', '.join(COORDINATES[:-1])}"
        )
    matrix = torch.cat([read(units[rows]) - constant for rows in portions(stack, units)])
    matrix = (matrix - matrix.mean(1, keepdim=True)) * (scale / math.sqrt(stack.d_model))
    product = torch.zeros(stack.d_model, stack.d_model, dtype=torch.float64, device=matrix.device)
    for columns in matrix.split(max(1, LOGITS_AT_ONCE // stack.d_model), dim=1):
        product += columns.double() @ columns.double().T
    values, vectors = torch.linalg.eigh(product)
    varies = values > NEGLIGIBLE * values[-1]
    return vectors[:, varies] * values[varies].sqrt()
