"""What must be as it was after any call of the package: the user's model and its surroundings; and the calls."""

import gc
import hashlib
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from torch import nn

import surgery
from surgery import anatomy, dropout, hooks, instruments, rebuild, reversion, scan, series, tape
from surgery.corpus.probes import Probe, ProbeSet
from surgery.graft import reinitialise
from surgery.instruments import displacement, fidelity, lens, readout, similarity
from surgery.instruments.ensemble import Ensemble
from surgery.models import weights_hash
from surgery.models.tokens import Tokens
from surgery.scan import search
from surgery.stats.sampling import Sampling
from surgery.training import harvest

FEW = Sampling(resamples=20, batch_size=4)
Call = Callable[[surgery.Stack, Tokens, Path], Any]


def tokens(n_prompts: int = 8, length: int = 10) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    return Tokens.of(torch.randint(4, 96, (n_prompts, length), generator=generator))


def probes(count: int = 8) -> ProbeSet:
    """Questions of two groups in the words of the fixtures' tokenizer."""
    pairs = (Probe(f"w{4 + i} w{5 + i} w{6 + i}", f"w{20 + i}", f"group {i % 2}") for i in range(count))
    return ProbeSet("some", tuple(pairs))


# --- the calls -------------------------------------------------------------------------------------------------------


def _hooked(*named: Any) -> Call:
    def call(stack: surgery.Stack, batch: Tokens, folder: Path) -> None:
        with stack.model.hooks(fwd_hooks=[hook for make in named for hook in make(stack.model)]):
            stack.model(batch.ids.to(stack.device))

    return call


def _frozen(stack: surgery.Stack, batch: Tokens, folder: Path) -> None:
    context = stack.context(batch)
    with stack.frozen(context):
        stack.run(context, ":3 1:")


def _tapped(stack: surgery.Stack, batch: Tokens, folder: Path) -> None:
    def broken(layer: Any, before: Any, after: Any) -> None:
        raise KeyboardInterrupt

    try:
        stack.run(batch, ":2 1:", tap=broken)
    except KeyboardInterrupt:
        return
    raise AssertionError("a tap that is interrupted must interrupt the run")


def _with_gradients(stack: surgery.Stack, batch: Tokens, folder: Path) -> None:
    x = stack.context(batch).x0.detach().requires_grad_()
    torch.autograd.grad(stack.execute(":3 1:", x, stack.context(batch), grad=True).sum(), x)


def _taped(stack: surgery.Stack, batch: Tokens, folder: Path) -> None:
    taped = tape.together(stack.model, ":3 1:")
    taped(batch.ids.to(stack.device))
    tape.save(taped, folder / "taped")


def _saved(model: Any, folder: Path) -> None:
    rebuild.layout.save(model, folder / "saved")


def _scan(family: str) -> Call:
    def call(stack: surgery.Stack, batch: Tokens, folder: Path) -> None:
        scan.study.measure(stack, probes(), folder, family, top=2)

    return call


CALLS: Mapping[str, Call] = {
    "load": lambda s, t, f: surgery.load("babel"),
    "run": lambda s, t, f: s.run(t, ":3 1:"),
    "run with groups": lambda s, t, f: s.run(t, ":1 {1|2} 0.5*(1:3) mean{2|3} 3"),
    "run with gradients": _with_gradients,
    "an interrupted run": _tapped,
    "execute": lambda s, t, f: s.execute("1:3", s.context(t).x0, s.context(t)),
    "update": lambda s, t, f: s.update(1, s.context(t).x0),
    "stream": lambda s, t, f: s.stream(t, ":2 1:"),
    "record": lambda s, t, f: s.record(t, ":2 {2|3} 3"),
    "readout": lambda s, t, f: s.readout(s.context(t).x0),
    "frozen": _frozen,
    "norm_state": lambda s, t, f: s.norm_state(t),
    "checks": lambda s, t, f: s.checks().drop(columns="largest_difference"),  # which is rounding itself
    "parallel_sublayers": lambda s, t, f: s.parallel_sublayers,
    "weights_sha256": lambda s, t, f: weights_hash.weights_sha256(s.model),
    "hooks.skip, damp and parallel": _hooked(
        lambda m: hooks.skip(m, 1, 2), lambda m: hooks.damp(m, 2, 0.5), lambda m: hooks.parallel(m, 2, 4)
    ),
    "hooks.add_noise": _hooked(lambda m: hooks.add_noise(0.1, 0, model=m)),
    "hooks.stochastic_depth": _hooked(lambda m: hooks.stochastic_depth(m, 0.5, 0)),
    "attribution.effects": lambda s, t, f: series.attribution.effects(s, t, sampling=FEW),
    "attribution.effects, frozen": lambda s, t, f: series.attribution.effects(s, t, frozen=True, sampling=FEW),
    "composition.compositions": lambda s, t, f: series.composition.compositions(s),
    "effective_depth.effective": lambda s, t, f: series.effective_depth.effective(s, t, sampling=FEW),
    "effects.matrix": lambda s, t, f: series.effects.matrix(s, t, sampling=FEW),
    "effects.future": lambda s, t, f: series.effects.future(s, t, sampling=FEW),
    "effects.depth_score": lambda s, t, f: series.effects.depth_score(s, t, sampling=FEW),
    "gates.exponents": lambda s, t, f: series.gates.exponents(s, t, sampling=FEW),
    "gates.path_lengths": lambda s, t, f: series.gates.path_lengths(s, t, sampling=FEW),
    "jacobians.pairs": lambda s, t, f: series.jacobians.pairs(s, t, sampling=FEW),
    "series.windows": lambda s, t, f: series.windows(s, t, sampling=FEW),
    "series.profile": lambda s, t, f: series.profile(s, t, sampling=FEW),
    "anatomy.features": lambda s, t, f: anatomy.features(s, t, sampling=FEW),
    "anatomy.ends_against_middle": lambda s, t, f: anatomy.ends_against_middle.measure(s, t, sampling=FEW),
    "reversion.layers": lambda s, t, f: reversion.layers(s, t, sampling=FEW),
    "cloud.fit": lambda s, t, f: reversion.cloud.fit(s, t, sampling=FEW),
    "directions.layers": lambda s, t, f: reversion.directions.layers(s, t, components=2, draws=2, sampling=FEW),
    "returns.curves": lambda s, t, f: reversion.returns.curves(s, t, draws=2, sampling=FEW),
    "trajectories.measure": lambda s, t, f: reversion.trajectories.measure(s, t, draws=2, sampling=FEW),
    "ablation.damage": lambda s, t, f: instruments.ablation.damage(s, t, [[0], [1, 2]], sampling=FEW),
    "ablation.mean_updates": lambda s, t, f: instruments.ablation.mean_updates(s, Ensemble.of(s, t, FEW)),
    "interactions.pairs": lambda s, t, f: instruments.interactions.pairs(s, t, sampling=FEW),
    "lens.layers": lambda s, t, f: lens.layers(s, t, sampling=FEW),
    "similarity.layers": lambda s, t, f: similarity.layers(s, t, sampling=FEW),
    "similarity.cka": lambda s, t, f: similarity.cka(s, t, sampling=FEW),
    "displacement.principal_components": lambda s, t, f: displacement.principal_components(
        s, Ensemble.of(s, t, FEW), 2
    ),
    "fidelity.compare": lambda s, t, f: fidelity.compare(s, s, t, (1, 3), (1, 3), sampling=FEW),
    "readout.log_probabilities": lambda s, t, f: readout.log_probabilities(s, s.context(t).x0[0]),
    "mask_ensemble.curve": lambda s, t, f: dropout.mask_ensemble.curve(
        s, t, ["blocks.1.hook_mlp_out"], 0.1, (2,), sampling=FEW
    ),
    "redundancy.across": lambda s, t, f: dropout.redundancy.across(s, tokens(40), sizes=(1, 2), draws=2, sampling=FEW),
    "redundancy.self_repair": lambda s, t, f: dropout.redundancy.self_repair(s, t, sampling=FEW),
    "features.activations": lambda s, t, f: dropout.features.activations(s, t),
    "reinitialise.layers": lambda s, t, f: reinitialise.layers(s, t, seeds=1, sampling=FEW),
    "scan.run": lambda s, t, f: scan.run(s, [":", ":3 1:", "{*:4}"], probes(), f / "rows.csv"),
    "scan.plan": lambda s, t, f: scan.plan(s, [":", ":3 1:"], t),
    "scan.study, repeat": _scan("repeat"),
    "scan.study, painters": _scan("painters"),
    "search.first_order": lambda s, t, f: search.first_order(s, probes()),
    "search.beam": lambda s, t, f: search.beam(s, probes(), width=2, depth=1),
    "harvest": lambda s, t, f: harvest.harvest(s, t, 1, 3, f / "harvest"),
    "tape": _taped,
    "width.widen": lambda s, t, f: rebuild.width.widen(s.model, 1, 3, d_mlp=160),
    "width.narrow": lambda s, t, f: _saved(rebuild.width.narrow(s.model, 1, 3, tokens=t, d_mlp=32), f),
    "width.deepen": lambda s, t, f: rebuild.width.deepen(s.model, 1, 3, 4),
    "width.drop": lambda s, t, f: _saved(rebuild.width.drop(s.model, [1]), f),
    "units.importance": lambda s, t, f: rebuild.units.importance(s.model, "mlp", t),
}


# --- what must be as it was ------------------------------------------------------------------------------------------


def of_model(model: nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """Everything about a model that a user could notice, by name."""
    state: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[f"values of {name}"] = _bytes(tensor)
        state[f"identity of {name}"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.dtype, tensor.shape)
        state[f"gradient of {name}"] = None if tensor.grad is None else (id(tensor.grad), _bytes(tensor.grad))
        state[f"hooks of {name}"] = len(tensor._backward_hooks or ())
    for name, module in model.named_modules():
        own = {key: id(value) for key, value in vars(module).items() if key not in _CONTAINERS + _RENEWED}
        state[f"attributes of {name}"] = own
        state[f"flags of {name}"] = module.training
        for kind in _CONTAINERS:
            inside = vars(module).get(kind)
            state[f"{kind} of {name}"] = {key: id(value) for key, value in (inside or {}).items()}
    for name in ("config", "generation_config", "cfg"):
        for owner, part in model.named_modules():
            if (config := vars(part).get(name)) is not None:
                state[f"{name} of {owner}"] = repr(sorted(vars(config).items(), key=str))
    if tokenizer is not None:
        hidden = {key: repr(value) for key, value in vars(tokenizer).items() if not key.startswith("_tokenizer")}
        state["tokenizer"] = (repr(tokenizer), hidden, len(tokenizer), tokenizer.padding_side)
    return state


_CONTAINERS = ("_parameters", "_buffers", "_modules", *(name for name in vars(nn.Module()) if name.endswith("hooks")))

_RENEWED = ("_pattern", "_block_alias_cache")  # by TransformerLens, whenever the user's own model runs


def _bytes(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy()).hexdigest()


def surroundings() -> dict[str, Any]:
    """Everything that belongs to the user's process, by name."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    loggers = {name: getattr(logger, "level", None) for name, logger in logging.root.manager.loggerDict.items()}
    return {
        "torch's random numbers": _bytes(torch.get_rng_state()),
        "numpy's random numbers": repr(np.random.get_state()),
        "Python's random numbers": "beartype" in sys.modules or random.getstate(),  # which draws what it looks at
        "default dtype": torch.get_default_dtype(),
        "threads of torch": torch.get_num_threads(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.is_available()),
        "numpy's errors": np.geterr(),
        "warnings": [str(entry) for entry in warnings.filters],
        "logging": (logging.root.level, logging.root.manager.disable, loggers),
        "handlers of logging": [id(handler) for handler in logging.root.handlers],
        "matplotlib": (dict(mpl.rcParams), mpl.get_backend()),
        "pandas": {name: pd.get_option(name) for name in ("display.max_rows", "mode.chained_assignment")},
        "working directory": os.getcwd(),
        "environment": dict(os.environ),
        "signals": handlers,
        "umask": _umask(),
        "path": list(sys.path),
        "streams and hooks": tuple(map(id, (sys.stdin, sys.stdout, sys.stderr, sys.excepthook, sys.displayhook))),
        "garbage collector": (gc.isenabled(), gc.get_threshold()),
        "recursion limit": sys.getrecursionlimit(),
        "threads": sorted(thread.name for thread in threading.enumerate() if not thread.daemon),
    }


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield the name of everything that differs, new loggers and lazily imported settings apart."""
    for name in dict.fromkeys([*before, *after]):
        a, b = before.get(name), after.get(name)
        if name == "logging" and a and b:
            a, b = (*a[:2], a[2]), (*b[:2], {key: level for key, level in b[2].items() if key in a[2]})
        if repr(a) != repr(b):
            yield name
