"""The units of a layer, neurons and heads, the numbers of its stream, and which of them matter.

A unit matters by what it writes into the stream: the activation that enters its output weights, times these. The
importance of a neuron is ``sum_t |act_t| |w_out|``, that of a head ``sum_t |z_t W_O|``, over the real tokens, each
prompt's first left out. Muralidharan et al. (2024, arXiv 2407.14679) rank heads by the size of their output and neurons
by their activation alone; with the output weight a neuron that writes nothing counts nothing, whatever it computes.

Query heads that share a key and value are one unit, whose importance is the sum of its heads'. A neuron of an expert is
heard at the tokens routed there, times the router's weight.

Controls at equal size: ``magnitude``, the norm of the unit's output weights, and ``random``.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear
from transformer_lens import TransformerBridge

from surgery.models import layer_sizes
from surgery.models.errors import ModelError
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.rebuild import layout
from surgery.wiring.value import Layer

BY = ("activation", "magnitude", "random")
PARTS = ("mlp", "attn")


def importance(
    model: TransformerBridge,
    part: str,
    tokens: Tokens | Tensor | None = None,
    *,
    by: str = "activation",
    seed: int = 0,
    batch_size: int = 64,
) -> list[Float[Tensor, "*expert unit"]]:
    """For every layer the importance of its units: neurons (``part="mlp"``) or heads (``"attn"``), by group of them.

    Fused experts have a row of neurons each. Cost: 1 F for ``activation``, none for the others.

    Raises:
        ValueError: another ``part`` or ``by``; no tokens, or none beyond each prompt's first, for ``activation``.
        ModelError: layers without such a part; fused experts of an unusual form, for ``activation``.

    >>> import surgery
    >>> model = surgery.load("babel")
    >>> len(importance(model, "attn", by="magnitude"))
    12
    """
    if part not in PARTS or by not in BY:
        raise ValueError(f"part {part!r} by {by!r}: give a part of {', '.join(PARTS)} and by of {', '.join(BY)}")
    layers = writers(model, part)
    if by == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(writer.shape, generator=generator) for writer in layers]
    if by == "magnitude":
        return [writer.magnitude() for writer in layers]
    return _heard(model, layers, _usable(tokens), batch_size)


def _heard(model: TransformerBridge, layers: "list[Writer]", tokens: Tokens, batch_size: int) -> list[Tensor]:
    totals = [torch.zeros(writer.shape, dtype=torch.float64) for writer in layers]

    def hear(place: int, keep: Tensor, *given: Tensor) -> None:
        totals[place] += layers[place].written(keep, *given)

    listen(Stack(model), layers, tokens, hear, batch_size)
    return totals


def listen(
    stack: Stack, layers: "Sequence[Writer]", tokens: Tokens, hear: Callable[..., None], batch_size: int = 64
) -> None:
    """Call ``hear(place, keep, *given)`` with what the output weights of each of ``layers`` are given on every batch;
    ``keep`` are its real tokens but each prompt's first. The layers are of one call of ``writers``. Cost: 1 F."""
    keep = torch.empty(0)
    modules = [writer.hearable() for writer in layers]
    hooks = [
        module.register_forward_pre_hook(lambda _, given, place=place: hear(place, keep, *given))
        for place, module in enumerate(modules)
    ]
    try:
        for batch in tokens.to(stack.device).batches(batch_size):
            keep = batch.ensemble()
            with torch.no_grad():
                layers[0].source(**stack.inputs(batch))
    finally:
        for hook in hooks:
            hook.remove()


def channels(
    model: TransformerBridge,
    start: int,
    stop: int,
    tokens: Tokens | Tensor | None = None,
    *,
    by: str = "activation",
    seed: int = 0,
) -> Float[Tensor, " d_model"]:
    """Importance of the numbers of the stream inside layers [start, stop).

    By ``activation`` the sum of ``|x_i| / rms(x)`` over real tokens, each prompt's first left out, and the layers, as
    Muralidharan et al. (2024, arXiv 2407.14679) rank them behind the norm, here without its scale; by ``magnitude`` the
    norm of what the output weights write into a number; or ``random``. Cost: 1 F for ``activation``.

    Raises ValueError as ``importance`` does.

    >>> import surgery
    >>> channels(surgery.load("babel"), 4, 9, by="magnitude").shape
    torch.Size([128])
    """
    if by not in BY:
        raise ValueError(f"numbers of the stream by {by!r}: give by of {', '.join(BY)}, or pca")
    if by == "activation":
        return sum((x.abs().sum(0) for x in _normed(model, start, stop, tokens)), torch.zeros(()).double())
    parts = [part for part in PARTS if part in model.blocks[start].submodules]
    written = [writer.rows.double().flatten(0, -2) for part in parts for writer in writers(model, part, start, stop)]
    if by == "magnitude":
        return torch.cat(written).norm(dim=0).cpu()
    return torch.rand(written[0].shape[1], generator=torch.Generator().manual_seed(seed))


def components(
    model: TransformerBridge, start: int, stop: int, tokens: Tokens | Tensor | None
) -> Float[Tensor, "d_model d_model"]:
    """Principal directions, columns from the largest, of ``x / rms(x)`` inside layers [start, stop), not centred.

    They are one basis for all of these layers, where Ashkboos et al. (2024, arXiv 2401.15024) turn between layers. Each
    prompt's first token is left out. Cost: 1 F. Raises ValueError as ``importance`` does.
    """
    total = sum((x.T @ x for x in _normed(model, start, stop, tokens)), torch.zeros(()).double())
    return torch.linalg.eigh(total)[1].flip(1)


def _normed(
    model: TransformerBridge, start: int, stop: int, tokens: Tokens | Tensor | None, batch_size: int = 64
) -> Iterator[Float[Tensor, "token d_model"]]:
    """What enters each of these layers, in the stream's own width, over its root mean square; a batch at a time."""
    tokens, stack = _usable(tokens), Stack(model)
    rows = [
        layout.source_of(model).get_submodule(f"{layout.layers_path(model)}.{layer}") for layer in range(start, stop)
    ]
    heard: dict[int, Tensor] = {}

    def hear(layer: Layer, before: Tensor, after: Tensor) -> None:
        if start <= layer.index < stop:
            enter = getattr(rows[layer.index - start], "enter", None)
            heard[layer.index] = before if enter is None else enter(before)

    for batch in tokens.to(stack.device).batches(batch_size):
        stack.run(batch, ":", hear)
        for x in heard.values():
            x = x[batch.ensemble()].double().cpu()
            yield x / x.square().mean(1, keepdim=True).sqrt()


def _usable(tokens: Tokens | Tensor | None) -> Tokens:
    if tokens is None:
        raise ValueError("importance by activation needs tokens: give stack.tokens(texts), or by='magnitude'")
    tokens = Tokens.of(tokens)
    if not tokens.ensemble().any():
        raise ValueError("there is no token beyond each prompt's first: give prompts of 2 tokens or more")
    return tokens


def writers(model: TransformerBridge, part: str, start: int = 0, stop: int | None = None) -> "list[Writer]":
    """What the layers [start, stop) write with in that part."""
    source = layout.source_of(model)
    return [Writer(model, source, layer, part) for layer in range(len(model.blocks))[start:stop]]


class Writer:
    """What the units of one part of one layer write through: the output weights, found through the bridge."""

    def __init__(self, model: TransformerBridge, source: Any, layer: int, part: str) -> None:
        module, self.source = source.get_submodule(f"{layout.layers_path(model)}.{layer}"), source
        self.what = f"layer {layer} of {model.cfg.model_name}"
        component = model.blocks[layer].submodules.get(part)
        if component is None:
            raise ModelError(f"{self.what} has no {part}: leave its size out")
        out = component.submodules.get("o" if part == "attn" else "out")
        if out is not None:
            self.path = ".".join(filter(None, (component.name, out.name)))
            self.module = module.get_submodule(self.path)
            weight = self.module.weight
            rows = weight.T if isinstance(self.module, nn.Linear) else weight  # GPT-2 keeps it transposed
        else:  # fused experts: one matrix reads, gate beside up, the smaller one writes
            fused = [
                (weight.numel(), name)
                for name, weight in module.named_parameters()
                if weight.ndim == 3 and name.startswith(f"{component.name}.")
            ]
            if not fused:
                raise ModelError(f"{self.what} has a {part} whose output weights cannot be found: leave its size out")
            self.path, self.reads = min(fused)[1], module.get_parameter(max(fused)[1])
            self.module = module.get_submodule(self.path.rpartition(".")[0])
            rows = module.get_parameter(self.path).transpose(1, 2)
        self.group = 1
        self.count: int = rows.shape[-2]
        if part == "attn":
            heads, keys = _heads(model)
            self.count, self.group = layout.own_sizes(model, source)[layer].n_heads or heads, heads // keys
        self.rows: Tensor = rows.detach().unflatten(-2, (self.count, -1))
        self.shape = (*rows.shape[:-2], self.count // self.group)

    def magnitude(self) -> Tensor:
        return self._grouped(self.rows.double().square().sum((-2, -1)).sqrt().cpu())

    def hearable(self) -> Any:
        """The module that is given what the units write, or what the experts are to make of it."""
        experts = self.module
        if self.rows.ndim == 4 and (experts.has_bias or experts.is_transposed or not experts.has_gate):
            raise ModelError(
                f"{self.what} has fused experts that are turned, have biases or no gate, which cannot be "
                "heard: say by='magnitude'"
            )
        return experts

    def written(
        self, keep: Bool[Tensor, "prompt pos"], x: Tensor, *routes: Int[Tensor, "token choice"] | Tensor
    ) -> Float[Tensor, "*expert unit"]:
        """How much the units write at the tokens to keep, of what their module is given."""
        if routes:
            return self._routed(keep.flatten(), x, *routes)
        rows, inputs = self.rows.double(), x.reshape(*keep.shape, -1)[keep].double().unflatten(-1, (self.count, -1))
        gram = rows @ rows.transpose(-2, -1)
        size = torch.einsum("tui,uij,tuj->tu", inputs, gram, inputs).clamp(min=0).sqrt()
        return self._grouped(size.sum(0)).cpu()

    def _routed(
        self,
        keep: Bool[Tensor, " token"],
        x: Float[Tensor, "token d_model"],
        chosen: Int[Tensor, "token choice"],
        weights: Float[Tensor, "token choice"],
    ) -> Float[Tensor, "expert unit"]:
        """Experts compute as one, so each is asked again, for the tokens that chose it."""
        total = torch.zeros(self.shape, dtype=torch.float64, device=x.device)
        for expert, reads in enumerate(self.reads):
            token, place = torch.where((chosen == expert) & keep.unsqueeze(1))
            act = self.module._apply_gate(linear(x[token], reads)).double().abs()  # noqa: SLF001
            total[expert] = weights[token, place].double() @ act
        return total.cpu() * self.magnitude()

    def _grouped(self, heads: Tensor) -> Tensor:
        return heads.unflatten(-1, (-1, self.group)).sum(-1)


def _heads(model: TransformerBridge) -> tuple[int, int]:
    """Query heads and key-value heads, as the configuration has them."""
    config = layer_sizes.text(layout.config_of(model))
    heads = getattr(config, "n_heads", None) or config.num_attention_heads
    return heads, getattr(config, "n_key_value_heads", None) or getattr(config, "num_key_value_heads", None) or heads
