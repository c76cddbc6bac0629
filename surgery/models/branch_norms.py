"""Layers side by side whose norms stay apart: of queries and keys by head, of what is written by branch.

Where a model norms each head's queries and keys (Qwen 3, Gemma 3), or what a sublayer writes before it is added to the
stream (Gemma 2 and 3), layers with gains of their own are no wider layer of the same class: the norm of a sum is no sum
of norms. But the projections around can do it: ``NormedHeads`` norms its own output head by head, ``NormedSum`` norms
what each branch writes and adds that up, and the places of the norms themselves stay empty. It is still one product of
matrices for all branches, and everything else of the layer's own code runs as it is.
"""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from surgery.models.errors import ModelError

HEADS = {"q_norm": "q_proj", "k_norm": "k_proj"}  # norms of heads, and the projections before them
BEHIND = "post_feedforward_layernorm"  # where a layer has this, both its sublayers' outputs are normed
WRITTEN = {"post_attention_layernorm": ("self_attn", "o_proj"), BEHIND: ("mlp", "down_proj")}


class NormedHeads(nn.Linear):
    """A projection onto heads, each divided by its root mean square and multiplied by a gain of its own."""

    def __init__(self, like: nn.Linear, d_head: int, eps: float) -> None:
        super().__init__(
            like.in_features, like.out_features, like.bias is not None, like.weight.device, like.weight.dtype
        )
        self.gain, self.eps = nn.Parameter(self.weight.new_ones(like.out_features // d_head, d_head)), eps

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        heads = rearrange(linear(x, self.weight, self.bias), "... (head d) -> ... head d", d=self.gain.shape[1])
        return rearrange(_normed(heads, self.gain, self.eps), "... head d -> ... (head d)")


class NormedSum(nn.Linear):
    """The sum of what several branches write, each normed with a gain of its own; its input is theirs in a row."""

    def __init__(self, like: nn.Linear, branches: int, eps: float) -> None:
        super().__init__(like.in_features, like.out_features, False, like.weight.device, like.weight.dtype)
        self.gain, self.eps = nn.Parameter(self.weight.new_ones(branches, like.out_features)), eps

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        branches = len(self.gain)
        inputs = rearrange(x, "... (branch d) -> ... branch d", branch=branches)
        weight = rearrange(self.weight, "out (branch d) -> branch out d", branch=branches)
        written = einsum(inputs, weight, "... branch d, branch out d -> ... branch out")
        return _normed(written, self.gain, self.eps).sum(-2)


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain.to(wide)).to(x.dtype)


def renamed(layer: nn.Module) -> dict[str, str]:
    """Which norms of a layer must stay apart if it is put beside another: their weights, and where the gains go then.

    Raises ModelError for norms over all heads at once, which no layer beside another can keep.
    """
    names = {}
    for path, module in layer.named_modules():
        for norm, projection in HEADS.items():
            if isinstance(getattr(module, norm, None), nn.Module) and hasattr(module, projection):
                weight = getattr(getattr(module, norm), "weight", None)
                if weight is not None and weight.numel() != getattr(module, "head_dim", None):
                    raise ModelError(f"{type(module).__name__} norms all heads at once: layers side by side cannot")
                if weight is not None:
                    names[f"{path}.{norm}.weight"] = f"{path}.{projection}.gain"
    if isinstance(getattr(layer, BEHIND, None), nn.Module):
        for norm, (part, projection) in WRITTEN.items():
            if getattr(getattr(layer, norm, None), "weight", None) is not None:
                names[f"{norm}.weight"] = f"{part}.{projection}.gain"
    return names


def divide(layer: nn.Module, branches: int) -> None:
    """Prepare a layer of the size of ``branches`` layers for their norms, all with gain 1.

    Raises ModelError for norms that are no root mean square, and output weights with a bias.
    """
    for old, new in renamed(layer).items():
        norm, path = layer.get_submodule(old.rpartition(".")[0]), new.rpartition(".")[0]
        projection = layer.get_submodule(path)
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        heads = path.rpartition(".")[2] in HEADS.values()
        if "RMSNorm" not in type(norm).__name__ or eps is None or type(projection) is not nn.Linear:
            raise ModelError(f"{type(layer).__name__} has a norm at {old} that layers side by side cannot keep apart")
        if not heads and projection.bias is not None:
            raise ModelError(f"{type(layer).__name__} adds a bias before the norm at {old}: it cannot be kept apart")
        made = (
            NormedHeads(projection, norm.get_parameter("weight").numel(), eps)
            if heads
            else NormedSum(projection, branches, eps)
        )
        _put(layer, path, made)
        _put(layer, old.rpartition(".")[0], nn.Identity())


def add_biases(layer: nn.Module, names: Sequence[str]) -> None:
    """Give the projections of these names in ``layer`` a bias, of zeros, that can take over the shift of a norm.

    Raises ModelError for names of anything else.
    """
    modules = dict(layer.named_modules())
    for name in names:
        projection = modules.get(name)
        if not isinstance(projection, nn.Linear) or projection.bias is not None:
            raise ModelError(f"{type(layer).__name__} has no projection without bias at {name}")
        projection.bias = nn.Parameter(projection.weight.new_zeros(projection.out_features))


def _put(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, module)
