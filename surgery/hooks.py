"""Live interventions and recorders as plain TransformerLens hooks: lists of ``(hook_name, function)``.

    with model.hooks(fwd_hooks=surgery.hooks.parallel(model, 4, 8)):
        logits, cache = model.run_with_cache(tokens)

They work wherever TransformerLens takes hooks (``run_with_hooks``, ``hooks()``, ``run_with_cache``, ``generate`` with
or without its key-value cache), add up (``skip(model, 2, 3) + damp(model, 5, 0.5)``) and leave nothing behind. Each
computes the same as the wiring in its docstring does when the Stack runs it. Every layer still executes, so nothing
gets faster; repeats and reorderings execute layers again, which only the Stack can do. What a run has to keep from one
hook to the next it keeps for its own thread, and a thread draws its own random numbers from the start.

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
import threading
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
    """Layers [start, stop) write nothing: the wiring ``":start stop:"``.

    Without ``stop`` it is one layer; with ``part`` only their attention or their MLP writes nothing. Raises ValueError
    for a span outside the model.

    >>> import surgery
    >>> [name for name, _ in skip(surgery.load("babel"), 3, 5)]
    ['blocks.3.hook_resid_pre', 'blocks.4.hook_resid_post']
    """
    start, stop = _span(model, start, stop)
    if part is not None:
        return [(_output(model, layer, part), _scaled(0.0)) for layer in range(start, stop)]
    entry = _Kept()
    return [(_pre(start), entry.save), (_post(stop - 1), lambda x, hook: entry.beside(x))]


def parallel(model: TransformerBridge, start: int, stop: int, mean: bool = False) -> list[Hook]:
    """Layers [start, stop) all read what enters the first one, and their updates are summed.

    It is the wiring ``":start {*start:stop} stop:"``. With ``mean`` their outputs are averaged instead (Sun et al.
    2024, arXiv 2407.09298), which also divides the step by the number of layers: report both. Raises ValueError for a
    span outside the model.
    """
    start, stop = _span(model, start, stop)
    entry = _Kept()

    def read_entry(x: Stream, hook: Any) -> Stream:
        return entry.beside(x)

    def save_update(x: Stream, hook: Any) -> None:
        entry.updates.append(x - entry.beside(x))

    def leave(x: Stream, hook: Any) -> Stream:
        first, *rest = (*(update.to(x.device) for update in entry.updates), x - entry.beside(x))
        total = sum(rest, first)
        return entry.beside(x) + (total / (stop - start) if mean else total)

    hooks: list[Hook] = [(_pre(start), entry.save)]
    hooks += [(_pre(layer), read_entry) for layer in range(start + 1, stop)]
    hooks += [(_post(layer), save_update) for layer in range(start, stop - 1)]
    return [*hooks, (_post(stop - 1), leave)]


def damp(model: TransformerBridge, layer: int, factor: float, part: Part | None = None) -> list[Hook]:
    """A layer's update is multiplied by ``factor``: the wiring ``":layer factor*layer layer+1:"``.

    With ``part`` it is the output of its attention or MLP. Raises ValueError for a layer outside the model.
    """
    layer, _ = _span(model, layer, None)
    if part is not None:
        return [(_output(model, layer, part), _scaled(factor))]
    return _edit_update(layer, lambda x, update: factor * update)


def freeze_norms(scales: Mapping[str, Float[Tensor, "batch pos 1"]]) -> list[Hook]:
    """Norms use the denominators ``scales``, by hook name (``blocks.3.ln1.hook_scale``): as in ``stack.frozen``.

    ``stack.frozen`` also keeps the means that LayerNorm subtracts, which no hook can replace.
    Take them from ``stack.norm_scales(tokens)``, or from a cache of these names. Raises ValueError if there are none,
    and when the hooks run on a batch of another shape.
    """

    def use(scale: Tensor) -> Callable[..., Tensor]:
        def fn(x: Tensor, hook: Any) -> Tensor:
            if x.shape != scale.shape:
                raise ValueError(
                    f"{hook.name}: frozen scales were taken on a batch of shape {list(scale.shape[:-1])}, "
                    f"this one has {list(x.shape[:-1])}"
                )
            return scale

        return fn

    if not scales:
        raise ValueError("no norm scales given; take them with stack.norm_scales(tokens)")
    return [(name, use(scale)) for name, scale in scales.items()]


def replace_update(
    layer: int,
    update: "Float[Tensor, '*batch_pos d_model'] | Callable[[Stream, Stream], Stream]",
    part: Part | None = None,
    model: TransformerBridge | None = None,
) -> list[Hook]:
    """What a layer, or its attention or MLP, adds to the stream is replaced by ``update``.

    ``update`` is a tensor that broadcasts to [batch, pos, d_model], or a function ``update(x, u)`` of the stream that
    enters the layer and the layer's own update; with ``part``, both arguments are the output of that part. Given the
    ``model``, a negative layer counts from the end. Raises ValueError for a layer outside the model, a negative one
    without the model, and, when the hooks run, for a tensor that does not fit.
    """
    layer = _layer(layer, model)

    def replacement(x: Stream, own: Stream) -> Stream:
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
        return [(f"blocks.{layer}.hook_{part}_out", lambda x, hook: replacement(x, x))]
    return _edit_update(layer, replacement)


def mean_ablate(
    means: "Mapping[int | str, Float[Tensor, '*pos d_model']]", model: TransformerBridge | None = None
) -> list[Hook]:
    """Each layer in ``means`` adds its mean update instead of its own; closer to the data's manifold than ``skip``.

    Keys are layers (``3``) or sublayers (``"3.attn"``), values the mean over the data, by position or over all of them.
    Given the ``model``, negative layers count from the end. Raises ValueError for any other key.
    """
    hooks: list[Hook] = []
    for key, mean in means.items():
        match = re.fullmatch(r"(-?\d+)(?:\.(attn|mlp))?", str(key))
        if match is None:
            raise ValueError(f"mean_ablate: {key!r} is neither a layer like 3 nor a sublayer like '3.attn'")
        part: Any = match[2]
        hooks += replace_update(int(match[1]), mean, part, model)
    return hooks


def add_noise(
    scale: float, seed: int, layers: Iterable[int] | None = None, model: TransformerBridge | None = None
) -> list[Hook]:
    """Gaussian noise is added to the stream that enters each of ``layers`` (all by default).

    Its standard deviation is ``scale`` times the stream's root mean square at that token. The same seed gives the same
    noise on the same batch in every run. Given the ``model``, negative layers count from the end. Raises ValueError for
    layers outside the model, and for negative ones without the model.
    """

    def fn(x: Stream, hook: Any) -> Stream:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + _layer_of(hook.name))
        noise = torch.randn(x.shape, generator=generator, device="cpu").to(x)
        return x + scale * x.pow(2).mean(-1, keepdim=True).sqrt() * noise

    if layers is None:
        return [(lambda name: bool(re.fullmatch(r"blocks\.\d+\.hook_in", name)), fn)]
    return [(f"blocks.{layer}.hook_in", fn) for layer in sorted({_layer(layer, model) for layer in layers})]


def dropout(
    model: TransformerBridge,
    names: "str | Iterable[str] | Callable[[str], bool]",
    p: float,
    seed: int = 0,
    *,
    shared: bool = False,
) -> list[Hook]:
    """Inverted dropout: each unit at the hook points ``names`` is zeroed with probability ``p``.

    The others are divided by ``1 - p``, so that the expectation stays the same. ``names`` is one hook point, several,
    or a predicate as TransformerLens takes. Every hook point draws from its own generator, on the CPU: made again with
    the same seed, the hooks draw the same masks in the same order, on every device and whatever else is dropped. The
    mask is fresh for every prompt, position and call, as in training; with ``shared`` it is one mask of units for all
    of them: a subnetwork that is the same in every call. What is dropped gets no gradient at that position; see
    ``surgery.dropout`` (Srivastava et al. 2014).

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
        alive = drawing(hook.name, x.shape[2:] if shared else x.shape, restart=shared)
        return torch.where(alive.to(x.device), x / (1 - p), 0.0)

    return [(names, fn)] if callable(names) else [(name, fn) for name in chosen]


def stochastic_depth(
    model: TransformerBridge, p: float, seed: int = 0, start: int = 0, stop: int | None = None, part: Part | None = None
) -> list[Hook]:
    """Each layer of [start, stop) writes nothing with probability ``p``, else ``1 / (1 - p)`` times its update.

    It is drawn prompt by prompt. Without ``stop`` the span goes to the end; with ``part`` only attention or MLP is
    dropped. Huang et al. 2016 (arXiv 1603.09382) instead scale by ``1 - p`` when all layers run, and let p rise with
    depth: add up the hooks of several spans. Seeds are as in ``dropout``. Raises ValueError for p outside [0, 1) or a
    span outside the model.
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
        entry = _Kept()

        def leave(x: Stream, hook: Any, entry: _Kept = entry) -> Stream:
            before = entry.beside(x)
            scaled = x + p / (1 - p) * (x - before)  # exactly x where p is 0
            return torch.where(alive(x, hook), scaled, before)

        hooks += [(_pre(layer), entry.save), (_post(layer), leave)]
    return hooks


def record_stream(store: MutableMapping[int, Stream]) -> list[Hook]:
    """Fill ``store`` with the stream: ``store[l]`` enters layer l, ``store[n_layers]`` leaves the last one.

    The streams are detached copies, and every run overwrites them.
    """

    def fn(x: Stream, hook: Any) -> None:
        store[_layer_of(hook.name) + hook.name.endswith("hook_out")] = x.detach().clone()

    return [(lambda name: bool(re.fullmatch(r"blocks\.\d+\.hook_(in|out)", name)), fn)]


def _edit_update(layer: int, edit: Callable[[Stream, Stream], Stream]) -> list[Hook]:
    entry = _Kept()

    def leave(x: Stream, hook: Any) -> Stream:
        before = entry.beside(x)
        return before + edit(before, x - before)

    return [(_pre(layer), entry.save), (_post(layer), leave)]


class _Kept(threading.local):
    """The stream that entered, and the updates since: of the run in each thread, where several use the same hooks."""

    x: Stream
    updates: list[Stream]

    def save(self, x: Stream, hook: Any) -> None:
        """A hook that keeps a copy of the stream."""
        self.x, self.updates = x.clone(), []

    def beside(self, x: Stream) -> Stream:
        """The stream that entered, on the device of ``x``: layers may lie on several."""
        return self.x.to(x.device)


def _drawing(p: float, seed: int) -> Callable[..., Tensor]:
    """A function that draws the mask of what stays, for each hook point (in each thread) from its own generator.

    With ``restart`` it draws from the beginning.
    """
    share, drawn = 1 - probability(p), threading.local()

    def draw(name: str, shape: tuple[int, ...], restart: bool = False) -> Tensor:
        generators: dict[str, torch.Generator] = vars(drawn)
        if restart or name not in generators:
            generators[name] = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return torch.rand(shape, generator=generators[name], device="cpu") < share

    return draw


def _points(model: TransformerBridge, names: "str | Iterable[str] | Callable[[str], bool]") -> list[str]:
    """The hook points of these names, each once and under its own name; raises ValueError if there are none."""
    known = model.hook_dict
    if callable(names):
        requested = [name for name in known if names(name)]
    else:
        requested = [names] if isinstance(names, str) else list(names)
    for name in requested:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5)
            hint = f"near it are {', '.join(near)}" if near else "model.hook_dict lists all"
            raise ValueError(f"this model has no hook point {name!r}: {hint}")
    if not requested:
        raise ValueError(
            "no hook point is chosen: give names from model.hook_dict, or a predicate that is true of some of them"
        )
    return list(dict.fromkeys(str(known[name].name) for name in requested))


def _scaled(factor: float) -> Callable[..., Tensor]:
    return lambda x, hook: factor * x


def _span(model: TransformerBridge, start: int, stop: int | None) -> tuple[int, int]:
    """The span with negative ends counted from the end; raises ValueError if it is outside the model."""
    n_layers = model.cfg.n_layers
    first = start + n_layers if start < 0 else start
    last = first + 1 if stop is None else stop + n_layers if stop < 0 else stop
    if not 0 <= first < last <= n_layers:
        span = f"layer {start}" if stop is None else f"layers [{start}, {stop})"
        raise ValueError(f"{span}: the model has layers 0 to {n_layers - 1}, and a span [start, stop) ends before stop")
    return first, last


def _layer(layer: int, model: TransformerBridge | None) -> int:
    """A layer's index from the beginning; raises ValueError if it is outside the model, as far as that is known."""
    if model is not None:
        return _span(model, layer, None)[0]
    if layer < 0:
        raise ValueError(f"layer {layer} counts from the end of a model: give the model too (model=...)")
    return layer


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
    """``p``, if it is a probability of being dropped; raises ValueError outside [0, 1)."""
    if not 0 <= p < 1:
        raise ValueError(f"p is the probability of being dropped, from 0 to below 1; got p={p}")
    return p
