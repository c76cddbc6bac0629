"""Live interventions and recorders as plain TransformerLens hooks: lists of ``(hook_name, function)``.

    with model.hooks(fwd_hooks=surgery.hooks.parallel(model, 4, 8)):
        logits, cache = model.run_with_cache(tokens)

They work wherever TransformerLens takes hooks (``run_with_hooks``, ``hooks()``, ``run_with_cache``, ``generate`` with
or without its key-value cache), add up (``skip(model, 2, 3) + damp(model, 5, 0.5)``) and leave nothing behind. Each
is the same function as the wiring named in its docstring run by the Stack. Every layer still executes, so nothing
gets faster; repeats and reorderings execute layers again and are the Stack's alone.

========================  ===============================================  ==================================
hook                      question                                         compare with
========================  ===============================================  ==================================
``skip``                  what is lost without these layers                ``damp`` 0.5, another span of equal length
``parallel``              do these layers need each other's output         ``mean=True``, ``skip``
``damp``                  how does the answer depend on a layer's size     factor 1
``freeze_norms``          is it only the norm that passes size on          live norms
``replace_update``        is this update the cause                         an update of another prompt
``mean_ablate``           what does a layer say beyond its average         ``skip``
``add_noise``             how sensitive is the rest of the stack           another seed
``dropout``               what do units lost at random cost                p = 0, another seed, ``shared``
``stochastic_depth``      what do updates lost at random cost              p = 0, ``skip``
``record_stream``         what does the stream look like                   (changes nothing)
========================  ===============================================  ==================================
"""

import difflib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import TransformerBridge

Part = Literal["attn", "mlp"]
Hook = tuple["str | Callable[[str], bool]", Callable[..., "Tensor | None"]]
Stream = Float[Tensor, "batch pos d_model"]


def skip(model: TransformerBridge, start: int, stop: int | None = None, part: Part | None = None) -> list[Hook]:
    """Layers [start, stop) write nothing (one layer if no ``stop``): the wiring ``":start stop:"``. With ``part``,
    only their attention or their MLP. Raises ValueError for a span outside the model.

    >>> import surgery
    >>> [name for name, _ in skip(surgery.load("babel"), 3, 5)]
    ['blocks.3.hook_resid_pre', 'blocks.4.hook_resid_post']
    """
    start, stop = _span(model, start, stop)
    if part is not None:
        return [(_output(model, layer, part), _scaled(0.0)) for layer in range(start, stop)]
    entry: list[Stream] = []
    return [(_pre(start), _remember(entry)), (_post(stop - 1), lambda x, hook: entry[-1])]


def parallel(model: TransformerBridge, start: int, stop: int, mean: bool = False) -> list[Hook]:
    """Layers [start, stop) all read what enters the first, and their updates are summed: ``":start {*start:stop}
    stop:"``.

    With ``mean`` their outputs are averaged instead (Sun et al. 2024, arXiv 2407.09298), which also divides the step
    by the number of layers: report both. Raises ValueError for a span outside the model.
    """
    start, stop = _span(model, start, stop)
    entry: list[Stream] = []
    updates: list[Stream] = []

    def enter(x: Stream, hook: Any) -> None:
        entry[:], updates[:] = [x.clone()], []

    def read_entry(x: Stream, hook: Any) -> Stream:
        return entry[0]

    def keep(x: Stream, hook: Any) -> None:
        updates.append(x - entry[0])

    def leave(x: Stream, hook: Any) -> Stream:
        total = sum([*updates, x - entry[0]][1:], [*updates, x - entry[0]][0])
        return entry[0] + (total / (stop - start) if mean else total)

    hooks: list[Hook] = [(_pre(start), enter)]
    hooks += [(_pre(layer), read_entry) for layer in range(start + 1, stop)]
    hooks += [(_post(layer), keep) for layer in range(start, stop - 1)]
    return [*hooks, (_post(stop - 1), leave)]


def damp(model: TransformerBridge, layer: int, factor: float, part: Part | None = None) -> list[Hook]:
    """A layer's update times ``factor``: ``":layer factor*layer layer+1:"``; with ``part``, its attention's or its
    MLP's."""
    layer, _ = _span(model, layer, None)
    if part is not None:
        return [(_output(model, layer, part), _scaled(factor))]
    return _edit_update(layer, lambda x, update: factor * update)


def freeze_norms(scales: Mapping[str, Float[Tensor, "batch pos 1"]]) -> list[Hook]:
    """Norms keep the denominators given by hook name (``blocks.3.ln1.hook_scale``), as ``stack.norm_scales(tokens)``
    or a cache of these names holds them: the same as ``with stack.frozen(context)``.

    Raises ValueError when it runs on a batch of another shape.
    """

    def use(given: Tensor) -> Callable[..., Tensor]:
        def fn(x: Tensor, hook: Any) -> Tensor:
            if x.shape != given.shape:
                raise ValueError(
                    f"{hook.name}: frozen scales were taken on a batch of shape {list(given.shape[:-1])}, "
                    f"this one has {list(x.shape[:-1])}"
                )
            return given

        return fn

    if not scales:
        raise ValueError("no norm scales given; take them with stack.norm_scales(tokens)")
    return [(name, use(given)) for name, given in scales.items()]


def replace_update(
    layer: int,
    update: "Float[Tensor, '*batch_pos d_model'] | Callable[[Stream, Stream], Stream]",
    part: Part | None = None,
) -> list[Hook]:
    """What a layer (or its attention or MLP) adds is replaced: by a tensor that broadcasts to [batch, pos, d_model],
    or by ``update(x, u)`` of the stream that enters the layer and its own update (for a part: of its output alone,
    twice)."""

    def choose(x: Stream, own: Stream) -> Stream:
        if callable(update):
            return update(x, own)
        try:
            return update.to(own).expand_as(own)
        except RuntimeError as error:
            raise ValueError(
                f"an update of shape {list(update.shape)} cannot replace one of shape {list(own.shape)} "
                f"at layer {layer}"
            ) from error

    if part is not None:
        return [(f"blocks.{layer}.hook_{part}_out", lambda x, hook: choose(x, x))]
    return _edit_update(layer, choose)


def mean_ablate(means: "Mapping[int | str, Float[Tensor, '*pos d_model']]") -> list[Hook]:
    """Each layer in ``means`` adds its mean update instead of its own. Keys are layers (``3``) or sublayers
    (``"3.attn"``), values the mean over the data, per position or over all. Off the data's manifold less than
    ``skip`` is."""
    hooks: list[Hook] = []
    for key, mean in means.items():
        match = re.fullmatch(r"(\d+)(?:\.(attn|mlp))?", str(key))
        if match is None:
            raise ValueError(f"mean_ablate: {key!r} is neither a layer like 3 nor a sublayer like '3.attn'")
        part: Any = match[2]
        hooks += replace_update(int(match[1]), mean, part)
    return hooks


def add_noise(scale: float, seed: int, layers: Iterable[int] | None = None) -> list[Hook]:
    """Gaussian noise on the stream that enters each of ``layers`` (all if not given), of ``scale`` times the stream's
    root mean square at that token. The same seed gives the same noise on the same batch, every run."""
    wanted = None if layers is None else set(layers)

    def fn(x: Stream, hook: Any) -> Stream:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + _layer_of(hook.name))
        noise = torch.randn(x.shape, generator=generator).to(x)
        return x + scale * x.pow(2).mean(-1, keepdim=True).sqrt() * noise

    def chosen(name: str) -> bool:
        return bool(re.fullmatch(r"blocks\.\d+\.hook_in", name)) and (wanted is None or _layer_of(name) in wanted)

    return [(chosen, fn)]


def dropout(
    model: TransformerBridge,
    names: "str | Iterable[str] | Callable[[str], bool]",
    p: float,
    seed: int = 0,
    *,
    shared: bool = False,
) -> list[Hook]:
    """Inverted dropout: each unit at the hook points ``names`` (one, several, or a predicate as TransformerLens takes)
    is zeroed with probability ``p``, the others are divided by ``1 - p``, so that the expectation stays.

    Every hook point draws from a generator of its own, on the CPU: made again with the same seed, the hooks draw the
    same masks in the same order, on every device and whatever else is dropped. A fresh mask for every prompt, position
    and call, as in training; with ``shared`` one mask of units for all of them, a subnetwork that is the same in every
    call. What is dropped gets no gradient at that position; see ``surgery.dropout`` (Srivastava et al. 2014).

    Raises ValueError for p outside [0, 1), a hook point that the model does not have, attention scores (a masked one
    set to 0 would be seen: drop ``hook_pattern``), and a subnetwork of attention patterns, which have no units.

    >>> import surgery
    >>> model = surgery.load("babel")
    >>> [name for name, _ in dropout(model, ["blocks.3.hook_mlp_out", "blocks.3.mlp.hook_out"], 0.1)]  # the same point
    ['blocks.3.mlp.hook_out']
    """
    chosen, drawing = _points(model, names), _drawing(p, seed)
    for name in chosen:
        if name.endswith("hook_attn_scores"):
            raise ValueError(f"a score of 0 is seen even where it was masked: drop hook_pattern instead of {name}")
        if shared and name.endswith("hook_pattern"):
            raise ValueError(f"a subnetwork has units, {name} has positions: drop it without shared, or drop hook_z")

    def fn(x: Tensor, hook: Any) -> Tensor:
        if not x.is_floating_point() or (shared and x.ndim < 3):
            raise ValueError(f"{hook.name} holds {x.dtype} {list(x.shape)}, not activations [batch, pos, ...] to drop")
        keep = drawing(hook.name, x.shape[2:] if shared else x.shape, again=shared)
        return torch.where(keep.to(x.device), x / (1 - p), 0.0)

    return [(names, fn)] if callable(names) else [(name, fn) for name in chosen]


def stochastic_depth(
    model: TransformerBridge, p: float, seed: int = 0, start: int = 0, stop: int | None = None, part: Part | None = None
) -> list[Hook]:
    """Each layer of [start, stop) (to the end if no ``stop``) writes nothing with probability ``p``, prompt by prompt,
    and ``1 / (1 - p)`` times its update otherwise; with ``part``, its attention or its MLP does.

    Huang et al. 2016 (arXiv 1603.09382) scale by ``1 - p`` when all layers run instead, and let p rise with depth: add
    up hooks of several spans. Seeds as in ``dropout``. Raises ValueError for p outside [0, 1) or a span outside the
    model.
    """
    start, stop = _span(model, start, model.cfg.n_layers if stop is None else stop)
    drawing = _drawing(p, seed)

    def alive(x: Tensor, hook: Any) -> Tensor:
        return drawing(hook.name, (len(x), 1, 1)).to(x.device)

    if part is not None:
        outputs = [_output(model, layer, part) for layer in range(start, stop)]
        return [(name, lambda x, hook: torch.where(alive(x, hook), x / (1 - p), 0.0)) for name in outputs]
    hooks: list[Hook] = []
    for layer in range(start, stop):
        entry: list[Stream] = []

        def leave(x: Stream, hook: Any, entry: list[Stream] = entry) -> Stream:
            grown = x + p / (1 - p) * (x - entry[-1])  # exactly x where p is 0
            return torch.where(alive(x, hook), grown, entry[-1])

        hooks += [(_pre(layer), _remember(entry)), (_post(layer), leave)]
    return hooks


def record_stream(store: MutableMapping[int, Stream]) -> list[Hook]:
    """Fill ``store`` with the stream: ``store[l]`` enters layer l, ``store[n_layers]`` leaves the last. Copies,
    detached."""

    def fn(x: Stream, hook: Any) -> None:
        store[_layer_of(hook.name) + hook.name.endswith("hook_out")] = x.detach().clone()

    return [(lambda name: bool(re.fullmatch(r"blocks\.\d+\.hook_(in|out)", name)), fn)]


def _edit_update(layer: int, edit: Callable[[Stream, Stream], Stream]) -> list[Hook]:
    entry: list[Stream] = []

    def leave(x: Stream, hook: Any) -> Stream:
        return entry[-1] + edit(entry[-1], x - entry[-1])

    return [(_pre(layer), _remember(entry)), (_post(layer), leave)]


def _remember(entry: list[Stream]) -> Callable[..., None]:
    def fn(x: Stream, hook: Any) -> None:
        entry[:] = [x.clone()]

    return fn


def _drawing(p: float, seed: int) -> Callable[..., Tensor]:
    """Masks of what is kept, for each hook point from a generator of its own; ``again`` starts it anew."""
    kept = 1 - probability(p)
    generators: dict[str, torch.Generator] = {}

    def draw(name: str, shape: tuple[int, ...], again: bool = False) -> Tensor:
        if again or name not in generators:
            generators[name] = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return torch.rand(shape, generator=generators[name]) < kept

    return draw


def _points(model: TransformerBridge, names: "str | Iterable[str] | Callable[[str], bool]") -> list[str]:
    """The hook points of these names, each once and by its own name."""
    known = model.hook_dict
    if callable(names):
        asked = [name for name in known if names(name)]
    else:
        asked = [names] if isinstance(names, str) else list(names)
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5)
            hint = f"near it are {', '.join(near)}" if near else "model.hook_dict lists all"
            raise ValueError(f"this model has no hook point {name!r}: {hint}")
    if not asked:
        raise ValueError(
            "no hook point is chosen: give names out of model.hook_dict, or a predicate that is true of some"
        )
    return list(dict.fromkeys(str(known[name].name) for name in asked))


def _scaled(factor: float) -> Callable[..., Tensor]:
    return lambda x, hook: factor * x


def _span(model: TransformerBridge, start: int, stop: int | None) -> tuple[int, int]:
    n_layers = model.cfg.n_layers
    first = start + n_layers if start < 0 else start
    last = first + 1 if stop is None else stop + n_layers if stop < 0 else stop
    if not 0 <= first < last <= n_layers:
        asked = f"layer {start}" if stop is None else f"layers [{start}, {stop})"
        raise ValueError(
            f"{asked}: the model has layers 0 to {n_layers - 1}, and a span [start, stop) ends before stop"
        )
    return first, last


def _pre(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_pre"


def _post(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def _output(model: TransformerBridge, layer: int, part: Part) -> str:
    if not hasattr(model.blocks[layer], part):
        raise ValueError(f"layer {layer} of this model has no {part}")
    return f"blocks.{layer}.hook_{part}_out"


def _layer_of(hook_name: str) -> int:
    return int(hook_name.split(".")[1])


def probability(p: float) -> float:
    """``p`` as it is; raises ValueError outside [0, 1)."""
    if not 0 <= p < 1:
        raise ValueError(f"p is the probability of being dropped, from 0 to below 1; got p={p}")
    return p
