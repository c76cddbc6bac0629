r"""Every measure of series and parallel side by side: what each reads on networks whose answer is known, and its cost.

``readings`` gives one number for each measure, ``calibrate`` those of several networks (the constructed ones, random
initialisations, a model and the same untrained), and ``costs`` what each takes, counted and timed, next to what its
docstring says. The measures:

==================  ==========================================================================  ========  =======
measure             read as                                                                     parallel  serial
==================  ==========================================================================  ========  =======
S, R, O             of the longest window (``surgery.series``)                                  0         1
T                   total effect, mean over pairs of layers (``surgery.series.effects``)        0         1
local, next         direct effect on the next layer                                             0         1
local, beyond       direct effect on all layers further on                                      0         0
rho                 interaction of ablations, mean (``surgery.instruments.interactions``)       0         below 1
jacobian, next      direct composition of Jacobians less its baseline, neighbours               < 0       > 0
jacobian, total     the same through the layers between, all pairs                              < 0       > 0
gate exponent       (kappa_g - 1)/(m - 1) of the longest window (``surgery.series.gates``)      0         1
gate hessian        mean over pairs                                                             0         > 0
path length         mean number of branches in the gradient, a share of the layers              <= 1/L    higher
indirect share      M, mean over layers but the last (``surgery.series.attribution``)           0         > 0
==================  ==========================================================================  ========  =======

and, for comparison, what is *not* series: block influence, cosine and linearity (``surgery.instruments.similarity``).
Where the serial column is not 1, the module of the measure says why: the head of the constructed serial network reads
every layer, and its readers mix directions at random.

>>> from surgery.instruments import known_networks
>>> stacks = {"parallel": Stack(known_networks.parallel_network(n_layers=3))}
>>> frame = calibrate(stacks, known_networks.tokens(12, 8))
>>> frame.set_index("measure").loc[["S", "T", "gate exponent"], "value"].abs().round(4).tolist()
[0.0, 0.0, 0.0]
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from surgery.instruments import interactions, known_networks, similarity
from surgery.instruments.ablation import damage
from surgery.instruments.ensemble import Ensemble
from surgery.meanings import with_meanings
from surgery.models.engine import Engine
from surgery.models.scopes import scope
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.series import attribution, effects, gates, jacobians, window
from surgery.stats.sampling import Sampling

COLUMNS = {
    "measure": "name of the measure",
    "about": "series, or what is offered beside it and is not",
    "network": "whose layers were measured",
    "value": "the measure's reading, an estimate without its interval",
}
COST_COLUMNS = {
    "function": "what was called",
    "formula": "its cost as its docstring says, in forward passes F of the model, at this depth, gradients included",
    "counted": "layers run forwards, in F",
    "timed": "time it took, in forward passes of the same batch: gradients, readouts and statistics included",
}

Frames = Mapping[str, pd.DataFrame]
_EMPTY = pd.DataFrame()


@dataclass(frozen=True)
class Measure:
    """A number computed from the frame of one function; ``about`` is ``series`` or ``not series``."""

    name: str
    function: str
    of: Callable[[pd.DataFrame], float]
    about: str = "series"


@dataclass(frozen=True)
class Function:
    """How a frame is made, and its cost by its docstring, in F, as a function of the number of layers.

    ``gradients`` are what it costs beside the layers that run ``forwards``. ``read`` makes no more of the frame than
    the measures need, without what comes before its argument ``start``.
    """

    run: Callable[..., pd.DataFrame]
    forwards: Callable[[int], float]
    gradients: Callable[[int], float] = lambda n: 0.0
    read: Callable[..., pd.DataFrame] | None = None

    def formula(self, n_layers: int) -> float:
        """Return the whole cost."""
        return self.forwards(n_layers) + self.gradients(n_layers)


def _next(frame: pd.DataFrame, earlier: str, later: str) -> pd.DataFrame:
    return frame[frame[later] - frame[earlier] == 1]


def _beyond(frame: pd.DataFrame, earlier: str, later: str) -> pd.DataFrame:
    return frame[frame[later] - frame[earlier] > 1]


def _linearity(stack: Stack, ensemble: Ensemble, *, sampling: Sampling) -> pd.DataFrame:
    return similarity.linearity(stack, ensemble.tokens, sampling=sampling)  # it makes its own, of half of the prompts


def _rhos(stack: Stack, ensemble: Ensemble, start: int, *, sampling: Sampling) -> pd.DataFrame:
    damages = damage(stack, ensemble, interactions.sets(stack.n_layers), frozen=True, sampling=sampling)
    return interactions.rhos(damages, seed=sampling.seed, tolerance=stack.tolerance)


def _exponents(stack: Stack, ensemble: Ensemble, start: int, *, sampling: Sampling) -> pd.DataFrame:
    return gates.exponents(stack, ensemble, start=start, sampling=sampling)


FUNCTIONS: dict[str, Function] = {
    "series.windows": Function(partial(window.windows, damage=False), lambda n: 2 * n + 2, read=window.longest),
    "effects.matrix": Function(effects.matrix, lambda n: (n - 1) + 3),
    "interactions.pairs": Function(
        interactions.pairs, lambda n: 2 * ((n - 1) / 2 + (n - 1) * (n - 2) / 6 + 3) + (n - 1) / 2 + 2, read=_rhos
    ),
    "jacobians.pairs": Function(
        jacobians.pairs, lambda n: 3, lambda n: 2 + 1.2 * jacobians.NULLS * (n - 1) / n + (n - 1)
    ),
    "gates.exponents": Function(gates.exponents, lambda n: 3, lambda n: 2 + (n - 1) / 2, _exponents),
    "gates.hessian": Function(
        gates.hessian, lambda n: 2 + 2 * (n - 1) / n, lambda n: 3 * (n - 1) / n + 3 * (n - 1) / 2
    ),
    "gates.path_lengths": Function(gates.path_lengths, lambda n: 3, lambda n: 0.5 + 1.2 * (n + 1) / 2),
    "attribution.effects": Function(attribution.effects, lambda n: (n - 1) / 2 + 3),
    "similarity.layers": Function(similarity.layers, lambda n: 1),
    "similarity.linearity": Function(_linearity, lambda n: 1),
}

MEASURES = (
    Measure("S", "series.windows", lambda frame: _longest(frame)["S"]),
    Measure("R", "series.windows", lambda frame: _longest(frame)["R"]),
    Measure("O", "series.windows", lambda frame: _longest(frame)["O"]),
    Measure("T", "effects.matrix", lambda frame: frame["T"].mean()),
    Measure("local, next", "effects.matrix", lambda frame: _next(frame, "layer", "later")["local"].mean()),
    Measure("local, beyond", "effects.matrix", lambda frame: _beyond(frame, "layer", "later")["local"].mean()),
    Measure("rho", "interactions.pairs", lambda frame: frame["rho"].mean()),
    Measure("jacobian, next", "jacobians.pairs", lambda f: _next(f, "earlier", "later")["direct_excess"].mean()),
    Measure("jacobian, total", "jacobians.pairs", lambda frame: frame["total_excess"].mean()),
    Measure("gate exponent", "gates.exponents", lambda frame: _longest(frame)["gate_series"]),
    Measure("gate hessian", "gates.hessian", lambda frame: frame["hessian"].mean()),
    Measure("path length", "gates.path_lengths", lambda f: f["mean_branches"].iloc[0] / max(1, f["branches"].max())),
    Measure("indirect share", "attribution.effects", lambda frame: frame["M"].iloc[:-1].mean()),
    Measure("block influence", "similarity.layers", lambda frame: frame["block_influence"].mean(), "not series"),
    Measure("cosine", "similarity.layers", lambda frame: frame["cosine"].mean(), "not series"),
    Measure("linearity", "similarity.linearity", lambda frame: frame["linearity"].mean(), "not series"),
)


def _longest(frame: pd.DataFrame) -> pd.Series:
    return frame.iloc[int((frame["stop"] - frame["start"]).argmax())]


def readings(
    stack: Stack,
    tokens: Tokens | Tensor,
    first_layer: int = 0,
    *,
    seed: int = 0,
    costs: list[dict[str, Any]] | None = None,
    whole: bool = True,
) -> tuple[dict[str, float], Frames]:
    """Return every measure of one model, and the frames they are taken from, without layers before ``first_layer``.

    Where embeddings are small, everything from layer 0 reads 1: leave it out. A function that refuses these tokens (too
    short or too few) gives no frame, and its measures are NaN. ``costs`` gets a row of ``COST_COLUMNS`` for each
    function that ran. Unless ``whole``, frames have no more than the measures need, and nothing is timed. Cost: the sum
    of the formulas of ``FUNCTIONS``, or about half of it if not ``whole``; massive tokens are looked for once.
    """
    sampling, frames = Sampling(resamples=0, seed=seed), {}
    ensemble = Ensemble.of(stack, tokens, sampling)
    if not whole:
        for name, function in FUNCTIONS.items():
            run = function.run if function.read is None else partial(function.read, start=first_layer)
            with suppress(ValueError):
                frames[name] = _from(run(stack, ensemble, sampling=sampling), first_layer)
    else:
        for name, frame, cost in _measured(stack, ensemble, sampling, tuple(FUNCTIONS)):
            frames[name] = _from(frame, first_layer)
            if costs is not None:
                costs.append(cost)
    frame_of = {measure: frames.get(measure.function, _EMPTY) for measure in MEASURES}
    values = {measure.name: float(measure.of(f)) if len(f) else math.nan for measure, f in frame_of.items()}
    return values, frames


def _measured(
    stack: Stack, ensemble: Ensemble, sampling: Sampling, names: Sequence[str]
) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Yield name, frame and cost of every function that does not refuse these tokens."""
    tokens = ensemble.tokens
    size = tokens.ids.numel() * stack.n_layers
    forward = min(_seconds(lambda: stack.stream(tokens)) for _ in range(3))
    for name in names:
        function = FUNCTIONS[name]
        start = time.process_time()
        with suppress(ValueError), counted_layers() as executed:
            frame = function.run(stack, ensemble, sampling=sampling)
            cost = {"function": name, "formula": function.formula(stack.n_layers), "counted": executed[0] / size}
            yield name, frame, cost | {"timed": (time.process_time() - start) / forward}


def _from(frame: pd.DataFrame, first_layer: int) -> pd.DataFrame:
    """Leave out the rows whose first layer is before ``first_layer``; a frame without layers stays as it is."""
    column = next((name for name in ("start", "earlier", "layer") if name in frame), None)
    return frame if column is None else frame[frame[column] >= first_layer]


def networks(n_layers: int = 6, seed: int = 0) -> dict[str, Stack]:
    """Build the networks that ``calibrate`` is for: from parallel to serial, and a random initialisation."""
    sizes: dict[str, Any] = {"n_layers": n_layers, "dtype": torch.float64, "seed": seed}
    models = {
        "parallel": known_networks.parallel_network(**sizes),
        **{f"mixed {share}": known_networks.mixed_network(share, **sizes) for share in (0.25, 0.5, 0.75)},
        "serial": known_networks.serial_network(**sizes),
        "random": known_networks.random_network(n_layers, seed=seed),
    }
    return {name: Stack(model) for name, model in models.items()}


@with_meanings(COLUMNS)
def calibrate(
    stacks: Mapping[str, Stack],
    tokens: Tokens | Tensor,
    first_layer: int = 0,
    *,
    seed: int = 0,
    costs: list[dict[str, Any]] | None = None,
) -> pd.DataFrame:
    """Measure several networks on the same tokens: a row per measure and network.

    ``costs`` gets what every function took on the first of them, as rows of ``COST_COLUMNS``. Cost: ``readings`` of
    each, of all but the first not ``whole``.
    """
    rows = []
    for number, (name, stack) in enumerate(stacks.items()):
        timed = costs is not None and not number
        own = costs if timed else None
        values, _ = readings(stack, tokens, first_layer, seed=seed, costs=own, whole=timed)
        rows += [
            {"measure": measure.name, "about": measure.about, "network": name, "value": values[measure.name]}
            for measure in MEASURES
        ]
    return pd.DataFrame(rows)


@with_meanings(COST_COLUMNS)
def costs(stack: Stack, tokens: Tokens | Tensor, names: Sequence[str] = tuple(FUNCTIONS)) -> pd.DataFrame:
    """Measure what every function costs on these tokens, in forward passes F: a row each, ``COST_COLUMNS``.

    ``counted`` are layers run forwards; gradients and readouts show in ``timed`` alone, which is process time and
    depends on the machine. Massive tokens are not looked for. A function that refuses these tokens has no row.
    Whoever wants the measures too takes both from ``calibrate``.
    """
    sampling = Sampling(skip_massive=False)
    ensemble = Ensemble.of(stack, tokens, sampling)
    rows = [cost for _, _, cost in _measured(stack, ensemble, sampling, names)]
    return pd.DataFrame(rows, columns=list(COST_COLUMNS))


def _seconds(run: Callable[[], Any]) -> float:
    """Process time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


@contextmanager
def counted_layers() -> Iterator[list[int]]:
    """Context manager: count the tokens that layers run on."""
    layer, count = Engine.layer, [0]
    with scope() as opened:

        def counting(self: Engine, index: int, x: Tensor, call: Any) -> Tensor:
            count[0] += x.shape[0] * x.shape[1] * opened.acts()  # what other threads run is not counted
            return layer(self, index, x, call)

        opened.undoing(partial(setattr, Engine, "layer", layer))
        Engine.layer = counting  # type: ignore[method-assign]
        yield count
