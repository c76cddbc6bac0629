r"""Does dropout lower superposition within components, and raise redundancy across them? Measuring and writing.

    models = trained.load_shipped()
    frame = study.measure(models)                           # a row per rate, seed and way of matching
    print(*say.models(frame), sep="\n")

*Within* a component: its neurons, side by side. *Across*: layers, one behind the other; if a computation fails in one,
is it also done in another? (The prediction and its words are WCargo's: "in parallel" and "in series" there are about
wiring, not about what depends on what.) ``surgery.dropout.verdicts`` judges both halves.

Models are compared twice, at equal steps and at equal held-out loss, because models that learned less differ in all of
these measures. A half is confirmed where both comparisons say so. Controls: the models without dropout, and the spread
over seeds.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from surgery import disk, hooks
from surgery.dropout import features, mask_ensemble, redundancy, trained
from surgery.dropout.draw import FIGURES
from surgery.dropout.files import COLUMNS, ENSEMBLE
from surgery.dropout.trained import TrainedModel
from surgery.dropout.verdicts import ACROSS, CONFIRMED, LOSS, STEPS, WITHIN, measures_of
from surgery.models.loading import plain
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.page.drawing import png
from surgery.records import tables
from surgery.stats.sampling import Sampling


def measure(
    models: Iterable[TrainedModel],
    *,
    layers: Sequence[int] | None = None,
    count: int = 240,
    coders: int = 1,
    coder_steps: int = 400,
    level: float = 0.8,
    resamples: int = 100,
    say: Callable[[str], Any] = lambda _: None,
) -> pd.DataFrame:
    """Measure superposition and redundancy on ``count`` held-out problems: a row per rate, seed and way of matching.

    The columns are those of ``files.COLUMNS[MODELS]``. ``layers`` are those whose neurons are measured (all but the
    first if not given), ``coders`` the number of autoencoders for each k, trained for ``coder_steps``, and F is read
    where they explain ``level`` of the variance: these models' are too dense for more. Cost: half a
    minute and, for 200 steps, fifteen seconds a layer, on one core, for a model and way of matching.

    Raises ValueError where no loss was reached by all models.
    """
    rows = []
    for model, matched, stack in stacks(models):
        tokens = _heldout(count)
        places = list(range(1, stack.n_layers)) if layers is None else list(layers)
        by_layer = features.within(
            stack, tokens, places, level=level, seeds=coders, steps=coder_steps, sampling=Sampling(resamples=0)
        )
        within = by_layer.mean(numeric_only=True, skipna=False)  # over all layers or none
        across = redundancy.across(stack, tokens, sampling=Sampling(resamples=resamples)).iloc[0]
        row = _run(model, matched) | trained.scores(_module(stack), trained.data())
        row |= {name: float(within[name]) for name in (*measures_of(WITHIN), "explained", "dead")}
        row |= {name: float(across[name]) for name in measures_of(ACROSS)}
        rows.append(row)
        say(
            f"dropout {model.recipe.rate:g}, seed {model.recipe.seed}, matched {matched}: features per neuron "
            f"{row['psi']:.3f}, additivity {row['additivity']:.3f}"
        )
    return pd.DataFrame(rows)


def confirm(
    models: Iterable[TrainedModel], *, count: int = 360, say: Callable[[str], Any] = lambda _: None
) -> pd.DataFrame:
    """Measure additivity of layers, MLPs and heads on fresh models: a row per model and way of matching.

    The columns are those of ``files.COLUMNS[CONFIRMATION]``; the prediction is that of ``surgery.dropout.verdicts``,
    which is about ``FRESH_RATES`` and ``FRESH_SEEDS``. Cost: half a minute on a core for each row.
    """
    rows = []
    for model, matched, stack in stacks(models):
        tokens, row = _heldout(count), _run(model, matched)
        row["loss"] = trained.scores(_module(stack), trained.data())["loss"]
        for name in CONFIRMED:
            units = name.removeprefix("additivity").removeprefix("_") or "layers"
            measured = redundancy.additivity(stack, tokens, units, sampling=Sampling(resamples=0))
            row[name] = float(measured["additivity"].iloc[0])
        rows.append(row)
        say(", ".join(f"{name} {value if isinstance(value, str) else round(value, 3)}" for name, value in row.items()))
    return pd.DataFrame(rows)


def probe(
    models: Iterable[TrainedModel], *, rates: Sequence[float] = (0.1, 0.2, 0.4), draws: int = 4, count: int = 120
) -> pd.DataFrame:
    """How much it costs to drop whole layers or neurons at test time: a row per model, probe and p.

    The columns are those of ``files.COLUMNS[PROBES]``; ``rates`` are those at test time, whatever rate a model was
    trained with. Cost: ``2 draws len(rates) + 1`` F a model.
    """
    rows = []
    for model, matched, stack in stacks(models):
        tokens, answers = _heldout(count), _answers(count)
        baseline = _answer_loss(stack, tokens, answers, [])
        for name, drop in (("layers", _drop_layers), ("neurons", _drop_neurons)):
            for p in rates:
                losses = [_answer_loss(stack, tokens, answers, drop(stack, p, seed)) for seed in range(draws)]
                excess = float(np.mean(losses)) - baseline
                rows.append(_run(model, matched) | {"probe": name, "p": p, "excess": excess})
    return pd.DataFrame(rows)


def ensemble(
    models: Iterable[TrainedModel], p: float = 0.2, *, counts: Sequence[int] = mask_ensemble.COUNTS, count: int = 120
) -> pd.DataFrame:
    """``mask_ensemble.curve`` over the neurons of every model after all its steps: ``files.COLUMNS[ENSEMBLE]``.

    Cost: ``1 + max(counts)`` F a model.
    """
    curves = []
    for model, matched, stack in stacks(models):
        if matched == STEPS:
            curve = mask_ensemble.curve(stack, _heldout(count), _is_neurons, p, counts, answers=_answers(count))
            curves.append(curve.assign(**_run(model, matched), p=p))
    frame = pd.concat(curves, ignore_index=True)
    return frame[[name for name in COLUMNS[ENSEMBLE] if name in frame]]


def stacks(models: Iterable[TrainedModel]) -> Iterator[tuple[TrainedModel, str, Stack]]:
    """Yield every model after all its steps, and at the lowest loss that all reached, with the way of matching."""
    models = list(models)
    loss = trained.matched_loss(models)
    for model in models:
        yield model, STEPS, model.stack()
        yield model, LOSS, model.stack(loss)


def write(folder: str | Path, frames: Mapping[str, pd.DataFrame], manifest: Mapping[str, Any]) -> list[Path]:
    """Write tables, by file name, each with its figure; return their paths. Raises OSError."""
    folder, paths = disk.folder(folder), []
    for name, frame in frames.items():
        tables.write(frame, folder / name, dict(manifest), COLUMNS[name])
        picture = (folder / name).with_suffix(".png")
        disk.save({picture: png(FIGURES[name](frame))})
        paths += [folder / name, picture]
    return paths


# --- inside ----------------------------------------------------------------------------------------------------------


def _is_neurons(name: str) -> bool:
    return name.endswith(".mlp.out.hook_in")


def _run(model: TrainedModel, matched: str) -> dict[str, Any]:
    return {"rate": model.recipe.rate, "seed": model.recipe.seed, "matched": matched}


def _sample(count: int) -> slice:
    """About ``count`` held-out problems, of every length."""
    return slice(None, None, max(1, len(trained.data().heldout) // count))


def _heldout(count: int) -> Tokens:
    return trained.data().heldout[_sample(count)]


def _answers(count: int) -> Bool[Tensor, "prompt pos"]:
    answers = trained.data().answers
    assert answers is not None
    return answers[_sample(count)]


def _module(stack: Stack) -> torch.nn.Module:
    module = plain(stack.model)
    assert module is not None
    return module


def _answer_loss(stack: Stack, tokens: Tokens, answers: Bool[Tensor, "prompt pos"], masks: list[hooks.Hook]) -> float:
    with stack.model.hooks(fwd_hooks=masks), torch.no_grad():
        losses = trained.token_losses(stack.run(tokens), tokens.ids)
    return float(losses[answers[:, 1:]].mean())


def _drop_layers(stack: Stack, p: float, seed: int) -> list[hooks.Hook]:
    return hooks.stochastic_depth(stack.model, p, seed)


def _drop_neurons(stack: Stack, p: float, seed: int) -> list[hooks.Hook]:
    return hooks.dropout(stack.model, _is_neurons, p, seed)
