"""Two models with the same first layers, in three parts with one cache: those layers once, then the others of each.

A compiled model keeps the original's embedding and its layers up to the first group. So a token goes through them once,
for both: what leaves them is kept, and the draft's other layers, and later the original's, go on from there. An early
exit is a draft without other layers.

    shared layers ──┬── the original's other layers ── norm and readout
                    └── the draft's other layers ───── norm and readout

Each part is the model's own class with its list of layers cut: it makes positions, masks and rotary tables itself, for
what its layers have read so far, and the kept stream takes the place of its embedding. Nothing is copied: parts run on
the weights of the models, and where a tensor of the draft equals one of the original, on the original's. So once a
fused model is let go, only its fused layers take memory beside the original.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from surgery.models import configs
from surgery.models.exactness import TOLERANCES, relative_difference

Stream = Float[Tensor, "1 pos d_model"]
Ids = Int[Tensor, "1 pos"]
Logits = Float[Tensor, "1 count d_vocab"]


class PartCache(DynamicCache):
    """The keys and values of layers that keep the numbers that they have in the whole model, from ``start`` on.

    ``read`` is how many tokens they have read.
    """

    def __init__(self, config: Any, start: int) -> None:
        super().__init__(config=config)
        self.start, self.read = start, 0
        self.activate_past_recording()  # a layer with a window keeps what has left it until ``forget``

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to a layer's keys and values, and return what it may attend to."""
        return super().update(keys, values, layer_idx - self.start, *args, **kwargs)

    def and_then(self, other: "PartCache", config: Any) -> "PartCache":
        """The cache of these layers and those of ``other`` behind them, on the same keys and values."""
        both = PartCache(config, self.start)
        both.layers = [*self.layers, *other.layers]
        return both

    def forget(self, length: int) -> None:
        """Keep the first ``length`` tokens at most."""
        self.crop(min(0, length - self.read))  # how many to remove, below 0
        self.read = min(self.read, length)


class Part:
    """Layers [start, stop) of a Hugging Face model, with its norm and readout behind them, on its weights.

    ``equal`` has the tensors to take in place of the model's, by the id of these. The stream is kept where it leaves
    layer ``kept_behind``, by default the last.
    """

    def __init__(
        self,
        model: Any,
        start: int,
        stop: int,
        equal: "dict[int, Tensor] | None" = None,
        kept_behind: "int | None" = None,
    ) -> None:
        layers = layers_of(model)
        memo: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(model)} | (equal or {})
        own = [copy.deepcopy(layer, memo) for layer in layers[start:stop]]
        memo[id(layers)] = type(layers)(own)
        self.start, self.model = start, copy.deepcopy(model, memo).eval()
        configs.rewrite(self.model.config.get_text_config(), range(start, stop), len(layers))
        self._enters: Stream | None = None
        self._leaves: Stream | None = None
        own[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        own[-1 if kept_behind is None else kept_behind - start].register_forward_hook(self._leave)

    def cache(self) -> PartCache:
        """An empty cache of these layers."""
        return PartCache(self.model.config, self.start)

    def __call__(self, ids: Ids, cache: PartCache, x: Stream | None = None, count: int = 0) -> tuple[Stream, Logits]:
        """Read tokens; return the stream that is kept, and the logits after each of the last ``count``.

        ``x`` is the stream that enters; None for the embedding of ``ids``.
        """
        self._enters = x
        if count:
            logits = self.model(ids, past_key_values=cache, use_cache=True).logits[:, -count:]
        else:
            self.model.base_model(ids, past_key_values=cache, use_cache=True)
            logits = torch.empty(1, 0, 0)
        x, self._enters, self._leaves = self._leaves, None, None
        assert x is not None, "the layer has run"
        cache.read += ids.shape[1]
        return x, logits

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._enters is None:
            return None
        return ((self._enters, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self._enters})

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        self._leaves = output[0] if isinstance(output, tuple | list) else output


class Pair:
    """An original and its draft, the first layers that they have in common once.

    First layers are shared if all their weights and settings are equal, and everything outside the layers is. The parts
    then prove themselves on a short prompt, read in two steps: where their logits are not those of the whole models,
    nothing is shared. Cost: 2 F of each model on 12 tokens, and a comparison of all weights.

    Attributes: ``n_shared``, how many layers are shared; ``shared``, ``original`` and ``draft``, the parts (None: it
    has no layers); ``both``, shared layers and the draft's as one, which saves the second part's start where both have
    read the same; ``depths``, how many layers each model has.

    Raises ValueError for models of different vocabularies.
    """

    def __init__(self, original: Any, draft: Any) -> None:
        sizes = [model.config.get_text_config().vocab_size for model in (original, draft)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the models have vocabularies of {sizes[0]} and {sizes[1]} words: a draft needs the same one"
            )
        self.depths = len(layers_of(original)), len(layers_of(draft))
        equal = _equal_tensors(original, draft)
        self._cut(original, draft, min(_equal_layers(original, draft), self.depths[0] - 1), equal)
        if self.n_shared and not self._exact(original, draft):
            self._cut(original, draft, 0, equal)

    def _cut(self, original: Any, draft: Any, n_shared: int, equal: dict[int, Tensor]) -> None:
        self.n_shared = n_shared
        self.shared = Part(draft, 0, n_shared, equal) if n_shared else None
        self.original = Part(original, n_shared, self.depths[0])
        self.draft = Part(draft, n_shared, self.depths[1], equal) if n_shared < self.depths[1] else None
        self.both = Part(draft, 0, self.depths[1], equal, n_shared - 1) if n_shared and self.draft else None

    @torch.no_grad()
    def _exact(self, original: Any, draft: Any) -> bool:
        vocabulary = original.config.get_text_config().vocab_size
        ids = (7 * torch.arange(1, 13)[None] % vocabulary).to(original.device)
        cache = SharedCache(self)
        order = [(draft, self.draft), (original, self.original)]
        for length in (7, 12):
            for model, part in order:
                whole = model(ids[:, :length], use_cache=False).logits[:, -1:]
                if not relative_difference(cache.logits(part, ids[:, :length], 1), whole) <= TOLERANCES[whole.dtype]:
                    return False
            if self.draft:
                order.reverse()  # now the shared layers run ahead of the draft's
        return True


class SharedCache:
    """The keys and values of one text: of the shared layers once, of the original's others, and of the draft's."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.of = {part: part.cache() for part in (pair.shared, pair.original, pair.draft) if part is not None}
        if pair.shared and pair.draft and pair.both:
            self._both = self.of[pair.shared].and_then(self.of[pair.draft], pair.both.model.config)
        self._stream: Stream | None = None  # what left the shared layers, of tokens that a part may still have to read
        self._first = 0  # the first of these tokens

    def logits(self, part: Part | None, ids: Ids, count: int) -> Logits:
        """Let the original or the draft (a part of the pair) read what is new of a text; the logits after each of its
        last ``count`` tokens. None is the draft without other layers, an early exit.

        There is a token, at least, that it has not read.
        """
        shared, both = self.pair.shared, self.pair.both
        if shared is None:
            assert part is not None, "a model has layers"
            return part(ids[:, self.of[part].read :], self.of[part], count=count)[1]
        first, new = self.of[shared], ids[:, self.of[shared].read :]
        if part is None:
            return self._keep(*shared(new, first, count=count))
        own = self.of[part]
        if both is not None and part is self.pair.draft and own.read == first.read:
            logits = self._keep(*both(new, self._both, count=count))
            own.read = first.read = ids.shape[1]
            return logits
        if new.shape[1]:
            self._keep(*shared(new, first))
        assert self._stream is not None, "the shared layers have run"
        return part(ids[:, own.read :], own, self._stream[:, own.read - self._first :], count)[1]

    def _keep(self, left: Stream, logits: Logits) -> Logits:
        """Keep what left the shared layers; the logits are passed on."""
        self._stream = left if self._stream is None else torch.cat([self._stream, left], 1)
        return logits

    def forget(self, length: int) -> None:
        """Keep the first ``length`` tokens at most, in every part."""
        for cache in self.of.values():
            cache.forget(length)
        if self._stream is not None:
            first = min(cache.read for part, cache in self.of.items() if part is not self.pair.shared)
            self._stream = self._stream[:, first - self._first : length - self._first]
            self._first = first


# --- what two models have in common ----------------------------------------------------------------------------------


def layers_of(model: Any) -> nn.ModuleList:
    """The list of layers of a Hugging Face model. Raises ValueError for a model with none."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {depth} layers: it cannot draft or be drafted for")


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _equal_tensors(original: Any, draft: Any) -> dict[int, Tensor]:
    """A tensor of the original for every tensor of the draft that equals one, by the id of the draft's."""
    alike: dict[Any, list[Tensor]] = defaultdict(list)

    def key(tensor: Tensor) -> Any:
        return type(tensor), tensor.shape, tensor.dtype, tensor.device, tuple(tensor.flatten()[:4].tolist())

    for tensor in _tensors(original):
        alike[key(tensor)].append(tensor)
    return {
        id(tensor): same
        for tensor in _tensors(draft)
        for same in alike.get(key(tensor), ())
        if same is tensor or torch.equal(same, tensor)
    }


def _equal_layers(original: Any, draft: Any) -> int:
    """How many first layers of two models are equal; none if embedding, norm or readout differ."""
    first, second = layers_of(original), layers_of(draft)
    inside = {id(tensor) for layers in (first, second) for tensor in _tensors(layers)}
    outside = [[tensor for tensor in _tensors(model) if id(tensor) not in inside] for model in (original, draft)]
    if not _all_same(*outside):
        return 0
    equal = (_alike(one, other) for one, other in zip(first, second))
    return next((place for place, same in enumerate(chain(equal, [False])) if not same))


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers have the same structure, settings, place and weights, and neither is part of a taped group."""
    pairs = list(zip(one.modules(), other.modules()))
    return (
        [name for name, _ in one.named_modules()] == [name for name, _ in other.named_modules()]
        and all(type(mine) is type(theirs) and _settings(mine) == _settings(theirs) for mine, theirs in pairs)
        and not any("forward" in vars(module) for pair in pairs for module in pair)
        and _all_same(list(_tensors(one)), list(_tensors(other)))
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    kinds = int | float | str | bool | None
    return {name: value for name, value in vars(module).items() if isinstance(value, kinds) and name[0] != "_"}


def _all_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(
        one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))
        for one, other in zip(first, second)
    )
