"""The units of a layer (neurons and heads) and the numbers of its stream, and how important each of them is.

The importance of a unit is how much it writes into the stream: the activation that enters its output weights, times
those weights. For a neuron it is ``sum_t |act_t| |w_out|``, for a head ``sum_t |z_t W_O|``, over the real tokens except
each prompt's first. Muralidharan et al. (2024, arXiv 2407.14679) rank heads by the size of their output and neurons by
their activation alone; with the output weights, a neuron that writes nothing counts nothing, whatever it computes.

Query heads that share a key and value are one unit, whose importance is the sum of its heads'. A neuron of an expert is
measured at the tokens routed to the expert, times the router's weight.

Controls at equal size: ``magnitude``, the norm of the unit's output weights, and ``random``.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear
from transformer_lens import TransformerBridge

from surgery.models import layer_sizes
from surgery.models.errors import ModelError
from surgery.models.linear import require_plain
from surgery.models.scopes import FORWARD, scope
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
    """The importance of the units of every layer: neurons (``part="mlp"``) or groups of heads (``part="attn"``).

    Fused experts have a row of neurons each. Cost: 1 F for ``activation``, nothing for ``magnitude`` and ``random``.

    Raises:
        ValueError: ``part`` or ``by`` is unknown; for ``activation``, there are no tokens beyond each prompt's first.
        ModelError: a layer has no such part; for ``activation``, fused experts are of an unusual form.

    >>> import surgery
    >>> model = surgery.load("babel")
    >>> len(importance(model, "attn", by="magnitude"))
    12
    """
    if part not in PARTS or by not in BY:
        raise ValueError(f"part {part!r} by {by!r}: give a part of {', '.join(PARTS)} and by of {', '.join(BY)}")
    by_layer = writers(model, part)
    if by == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(writer.shape, generator=generator) for writer in by_layer]
    if by == "magnitude":
        return [writer.magnitude() for writer in by_layer]
    tokens = _usable(tokens)
    for writer in by_layer:
        writer.input_module()  # refuses experts of an unusual form before the model runs
    totals = [torch.zeros(writer.shape, dtype=torch.float64) for writer in by_layer]

    def add(place: int, counted: Tensor, *inputs: Tensor) -> None:
        totals[place] += by_layer[place].written(counted, *inputs)

    listen(Stack(model), by_layer, tokens, add, batch_size)
    return totals


def listen(
    stack: Stack, by_layer: "Sequence[Writer]", tokens: Tokens, receive: Callable[..., None], batch_size: int = 64
) -> None:
    """Run the model and hand on what enters the output weights of every layer. Cost: 1 F.

    On every batch, ``receive(place, counted, *inputs)`` gets the ``inputs`` of the output weights of
    ``by_layer[place]``, and a mask ``counted`` [batch, pos] of its real tokens except each prompt's first. The writers
    must come from one call of ``writers``.
    """
    counted = torch.empty(0)
    modules = [writer.input_module() for writer in by_layer]

    def heard(place: int, inner: Callable[..., Any], *inputs: Tensor) -> Any:
        receive(place, counted, *inputs)
        return inner(*inputs)

    with scope() as opened:
        for place, module in enumerate(modules):
            opened.around(module, FORWARD, partial(heard, place))
        for batch in tokens.to(stack.device).batches(batch_size):
            counted = batch.ensemble()
            with torch.no_grad():
                by_layer[0].source(**stack.inputs(batch))


def channels(
    model: TransformerBridge,
    start: int,
    stop: int,
    tokens: Tokens | Tensor | None = None,
    *,
    by: str = "activation",
    seed: int = 0,
) -> Float[Tensor, " d_model"]:
    """The importance of each number of the stream inside layers [start, stop).

    By ``activation``, it is the sum of ``|x_i| / rms(x)`` over these layers and the real tokens except each prompt's
    first: Muralidharan et al. (2024, arXiv 2407.14679) rank them after the norm, here without its scale. By
    ``magnitude``, it is the norm of the output weights that write into the number. Cost: 1 F for ``activation``.

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
    rows = [writer.rows.double() for part in parts for writer in writers(model, part, start, stop)]
    written = [rearrange(matrix, "... d_model -> (...) d_model") for matrix in rows]
    if by == "magnitude":
        return torch.cat(written).norm(dim=0).cpu()
    return torch.rand(written[0].shape[1], generator=torch.Generator().manual_seed(seed))


def components(
    model: TransformerBridge, start: int, stop: int, tokens: Tokens | Tensor | None
) -> Float[Tensor, "d_model d_model"]:
    """Principal directions of ``x / rms(x)`` inside layers [start, stop), not centred: columns, the largest first.

    They are one basis for all of these layers, where Ashkboos et al. (2024, arXiv 2401.15024) rotate between layers.
    Each prompt's first token is left out. Cost: 1 F. Raises ValueError as ``importance`` does.
    """
    total = sum((x.T @ x for x in _normed(model, start, stop, tokens)), torch.zeros(()).double())
    return torch.linalg.eigh(total)[1].flip(1)


def _normed(
    model: TransformerBridge, start: int, stop: int, tokens: Tokens | Tensor | None, batch_size: int = 64
) -> Iterator[Float[Tensor, "token d_model"]]:
    """Yield, batch by batch, what enters each of these layers, in its own width, over its root mean square."""
    tokens, stack = _usable(tokens), Stack(model)
    source, path = layout.source_of(model), layout.layers_path(model)
    modules = [source.get_submodule(f"{path}.{layer}") for layer in range(start, stop)]
    streams: dict[int, Tensor] = {}

    def record(layer: Layer, before: Tensor, after: Tensor) -> None:
        if start <= layer.index < stop:
            enter = getattr(modules[layer.index - start], "enter", None)
            streams[layer.index] = before if enter is None else enter(before)

    for batch in tokens.to(stack.device).batches(batch_size):
        stack.run(batch, ":", record)
        for x in streams.values():
            x = x[batch.ensemble()].double().cpu()
            yield x / x.square().mean(1, keepdim=True).sqrt()


def _usable(tokens: Tokens | Tensor | None) -> Tokens:
    """``tokens``, if there is one beyond each prompt's first; otherwise raises ValueError."""
    if tokens is None:
        raise ValueError("importance by activation needs tokens: give stack.tokens(texts), or by='magnitude'")
    tokens = Tokens.of(tokens)
    if not tokens.ensemble().any():
        raise ValueError("there is no token beyond each prompt's first: give prompts of 2 tokens or more")
    return tokens


def writers(model: TransformerBridge, part: str, start: int = 0, stop: int | None = None) -> "list[Writer]":
    """The ``Writer`` of ``part`` of each of the layers [start, stop). Raises ModelError as ``Writer`` does."""
    source = layout.source_of(model)
    return [Writer(model, source, layer, part) for layer in range(len(model.blocks))[start:stop]]


class Writer:
    """The output weights of one part of one layer, through which its units write.

    Attributes:
        count: how many units the output weights have (neurons or query heads; of each expert).
        group: how many of them make one unit of importance: query heads that share a key and value.
        rows: the output weights [..., unit, width, d_model]; fused experts come first.
        shape: of the importance: [unit] or [expert, unit].
        path: the name of the weights' module, or of the fused weights themselves, in the layer.

    Raises ModelError if the layer has no such part, or its output weights cannot be found.
    """

    def __init__(self, model: TransformerBridge, source: Any, layer: int, part: str) -> None:
        module, self.source = source.get_submodule(f"{layout.layers_path(model)}.{layer}"), source
        self.name = f"layer {layer} of {model.cfg.model_name}"
        component = model.blocks[layer].submodules.get(part)
        if component is None:
            raise ModelError(f"{self.name} has no {part}: leave its size out")
        out = component.submodules.get("o" if part == "attn" else "out")
        if out is not None:
            self.path = ".".join(filter(None, (component.name, out.name)))
            self.module = module.get_submodule(self.path)
            require_plain(self.module, f"{self.name}: {self.path}")
            weight = self.module.weight
            rows = weight.T if isinstance(self.module, nn.Linear) else weight  # GPT-2 keeps it transposed
        else:  # fused experts: one matrix reads, gate beside up; the smaller one writes
            fused = [
                (weight.numel(), name)
                for name, weight in module.named_parameters()
                if weight.ndim == 3 and name.startswith(f"{component.name}.")
            ]
            if not fused:
                raise ModelError(f"{self.name} has a {part} whose output weights cannot be found: leave its size out")
            self.path, self.reads = min(fused)[1], module.get_parameter(max(fused)[1])
            self.module = module.get_submodule(self.path.rpartition(".")[0])
            rows = rearrange(module.get_parameter(self.path), "expert d_model unit -> expert unit d_model")
        self.group = 1
        self.count: int = rows.shape[-2]
        if part == "attn":
            heads, keys = _heads(model)
            self.count, self.group = layout.own_sizes(model, source)[layer].n_heads or heads, heads // keys
        self.rows: Tensor = rearrange(
            rows.detach(), "... (unit width) d_model -> ... unit width d_model", unit=self.count
        )
        self.shape = (*rows.shape[:-2], self.count // self.group)

    def magnitude(self) -> Float[Tensor, "*expert unit"]:
        """The norm of each unit's output weights."""
        squares = reduce(self.rows.double().square(), "... unit width d_model -> ... unit", "sum")
        return self._grouped(squares.sqrt().cpu())

    def input_module(self) -> Any:
        """The module whose input ``written`` takes: the output weights, or all experts where they are fused.

        Raises ModelError for fused experts that are transposed, or have biases or no gate.
        """
        experts = self.module
        if self.rows.ndim == 4 and (experts.has_bias or experts.is_transposed or not experts.has_gate):
            raise ModelError(
                f"{self.name} has fused experts that are transposed, have biases or no gate, whose activations "
                "cannot be recorded: use by='magnitude'"
            )
        return experts

    def written(
        self, counted: Bool[Tensor, "prompt pos"], x: Tensor, *routes: Int[Tensor, "token choice"] | Tensor
    ) -> Float[Tensor, "*expert unit"]:
        """How much the units write at the tokens that count, summed over them, given the input of their module.

        ``x`` is [prompt, pos, unit * width] or with the first two axes in one; where experts are fused, it is the
        stream that enters them, and ``routes`` are the chosen experts and their weights.
        """
        if routes:
            return self._routed(rearrange(counted, "prompt pos -> (prompt pos)"), x, *routes)
        rows, inputs = self.rows.double(), x.reshape(*counted.shape, -1)[counted].double()
        inputs = rearrange(inputs, "token (unit width) -> token unit width", unit=self.count)
        gram = einsum(rows, rows, "unit i d_model, unit j d_model -> unit i j")
        squares = einsum(inputs, gram, inputs, "token unit i, unit i j, token unit j -> token unit")
        return self._grouped(squares.clamp(min=0).sqrt().sum(0)).cpu()

    def _routed(
        self,
        counted: Bool[Tensor, " token"],
        x: Float[Tensor, "token d_model"],
        chosen: Int[Tensor, "token choice"],
        weights: Float[Tensor, "token choice"],
    ) -> Float[Tensor, "expert unit"]:
        """``written`` of fused experts: they compute as one, so each runs again on the tokens that chose it."""
        total = torch.zeros(self.shape, dtype=torch.float64, device=x.device)
        for expert, reads in enumerate(self.reads):
            token, place = torch.where((chosen == expert) & counted.unsqueeze(1))
            act = self.module._apply_gate(linear(x[token], reads)).double().abs()  # noqa: SLF001
            total[expert] = weights[token, place].double() @ act
        return total.cpu() * self.magnitude()

    def _grouped(self, units: Tensor) -> Tensor:
        return reduce(units, "... (unit group) -> ... unit", "sum", group=self.group)


def _heads(model: TransformerBridge) -> tuple[int, int]:
    """The numbers of query heads and of key-value heads in the configuration."""
    config = layer_sizes.text_config(layout.config_of(model))
    heads = getattr(config, "n_heads", None) or config.num_attention_heads
    return heads, getattr(config, "n_key_value_heads", None) or getattr(config, "num_key_value_heads", None) or heads
