"""Does dropout lower superposition within components, and raise redundancy across them?

    python studies/dropout.py --out results/dropout      # the shipped models: ten minutes on 2 cores
    python studies/dropout.py --full                     # retrains them first (--seeds), larger sweeps: an hour
    python studies/dropout.py --budget 5m                # as many tables, the cheapest first, and problems as fit

Small Babel models (6 layers, d 48) that differ in their dropout alone, p = 0, .1, .2 and .4, three seeds each, at
matched steps and at matched held-out loss; then the effect of dropping at test time, how far the picture of 2^n
subnetworks holds, variance and gradients over training (perceptrons of several widths and depths, these models), and
the toy model of superposition over sparsity and dropout.

    dropout_models.csv      superposition and redundancy of every model: both halves of the prediction; .png
    dropout_confirmation.csv  redundancy of fresh seeds, predicted before they were measured; .png
    dropout_probes.csv      layers and neurons dropped at test time; .png
    dropout_ensemble.csv    averages of 1 to 64 masks beside scaling; .png
    dropout_perceptrons.csv variance of activations and norm of gradients over training; .png
    dropout_stream.csv      the same of the models' residual stream; .png
    dropout_toy.csv         the toy model: sparsity x dropout x seed; .png

Training resumes where it was interrupted (--work), and existing tables are not made again. Intervals are over seeds.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

import surgery
from surgery import disk
from surgery.dropout import mask_ensemble, perceptrons, study, toy_model, trained
from surgery.dropout.files import CONFIRMATION, ENSEMBLE, MODELS, PERCEPTRONS, PROBES, STREAM, TOY
from surgery.dropout.say import SENTENCES
from surgery.dropout.trained import Recipe, TrainedModel
from surgery.dropout.verdicts import FRESH_RATES, FRESH_SEEDS
from surgery.planning import sizes
from surgery.planning.machine import Work
from surgery.planning.sizes import ShapeOf
from surgery.records import manifest, tables

CHEAPEST = (CONFIRMATION, STREAM, PROBES, ENSEMBLE, TOY, PERCEPTRONS, MODELS)  # in the order in which a budget has them
STAGES = (
    {"tables": 2, "problems": 60, "full": 0},  # fewer problems are too few tokens to fit a stream of 48 on
    {"tables": len(CHEAPEST), "problems": 60},
    {"problems": 240},
    {"full": 1},
)
AFTER = 10.0  # seconds to draw the figures and write the page
HELDOUT = 360
ADDITIVE, HOOKED = 400, 4  # passes over the problems for a row of redundancy; times a pass, of one with masks
# In tokens through a layer of these models, as many as run in the time of
ROW, CODER = Work(forward=2e6), Work(forward=1.2e4)  # ... a row of the models, and a step of an autoencoder
TOY_STEP, NETWORKS = Work(forward=2e3), Work(forward=5e6)  # ... a step of a toy sweep, and the smaller perceptrons
TRAINING = Work(forward=5e7)  # ... the training of a model


def work(size: dict[str, int], shape_of: ShapeOf, asked: Sequence[str], models: int, steps: int) -> Work:
    """The tables, and with ``full`` the training of all models before them."""
    full = bool(size["full"])
    rows, fresh = 2 * models, 2 * len(FRESH_RATES) * len(FRESH_SEEDS)
    layers, coder_steps = (5, 400) if full else (3, 200)
    every = max(1, HELDOUT // size["problems"])  # of the held-out problems
    one, probed = shape_of(-(-HELDOUT // every)), shape_of(120)
    trained, per_pass = steps / Recipe.steps * TRAINING, HOOKED * (probed.forward + probed.readout)
    costs = {
        CONFIRMATION: full * (fresh // 2 * trained + fresh * (ADDITIVE * shape_of(360).forward + ROW)),
        STREAM: Work(),
        PROBES: rows * (6 * (8 if full else 4) + 1) * per_pass,
        ENSEMBLE: (models if full else models // 4) * 65 * per_pass,
        TOY: 2 * (5000 if full else 2000) * TOY_STEP,
        PERCEPTRONS: (9 if full else 1) * NETWORKS,
        MODELS: rows * (ADDITIVE * one.forward + ROW + layers * coder_steps * CODER),
    }
    return sum((costs[name] for name in tables_of(asked, size["tables"])), full * models * trained)


def tables_of(asked: Sequence[str], count: int) -> list[str]:
    """The ``count`` cheapest of the tables that were asked for."""
    return [name for name in CHEAPEST if name in asked][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/dropout")
    parser.add_argument("--work", default="runs/dropout", help="folder of the training, with --full")
    parser.add_argument("--models", type=Path, help="a file that --ship wrote (default: the bundled one)")
    parser.add_argument("--ship", type=Path, help="write all models into this file")
    parser.add_argument("--seeds", type=int, default=len(trained.SEEDS), help="number of seeds to train, with --full")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps, with --full")
    parser.add_argument("--problems", type=int, default=240, help="number of held-out problems to measure on")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="tables to make")
    parser.add_argument("--full", action="store_true")
    sizes.add_option(parser)
    args = parser.parse_args()
    if min(args.seeds, args.steps) < 1 or args.problems < 30:
        parser.error("--seeds and --steps are 1 or more, --problems 30 or more: ten of each k")

    folder = disk.folder(args.out)
    plan = None if args.budget is None else fit(args, folder)
    models = train_models(args) if args.full else trained.load_shipped(args.models)
    if args.ship:
        trained.ship(models, args.ship)
    stack, tokens = models[0].stack(), trained.data().heldout
    weights = {model.recipe.name: model.sha256 for model in models}
    run = manifest.manifest(stack, tokens, seed=0, models=weights, full=args.full, problems=args.problems)
    sentences: list[str] = []
    for name in args.only:
        if (folder / name).exists() and same(tables.read_manifest(folder / name), run):
            frame = tables.read(folder / name)
        else:
            print(f"making {name}", flush=True)
            frame = TABLES[name](models, args)
            study.write(folder, {name: frame}, run)
        sentences += SENTENCES[name](frame)
    surgery.report.build(folder)
    for sentence in sentences:
        print(f"\n{sentence}")
    sizes.tell(plan, print)


def fit(args: argparse.Namespace, folder: Path) -> sizes.Choice | None:
    """Choose tables, problems and whether to retrain for the budget, and put them into ``args``."""
    models, alike = trained.load_shipped(args.models), trained.data().heldout
    args.tables = len(args.only)
    cost = partial(work, asked=args.only, models=len(models), steps=args.steps)
    spread = alike[:: max(1, len(alike) // sizes.TIMED_ON)]
    plan = sizes.settle(args, STAGES, cost, models[0].stack(), folder, spread, say=print, after=AFTER)
    args.full, args.only = bool(args.full), tables_of(args.only, args.tables)
    return plan


def same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a table was made from the same models and problems, with the same settings and versions."""
    return all(before.get(key) == now[key] for key in ("model", "tokens", "settings", "versions"))


def train_models(
    args: argparse.Namespace, rates: Sequence[float] = trained.RATES, seeds: Sequence[int] | None = None
) -> list[TrainedModel]:
    """Train a model of every rate and seed, or load those that are finished."""
    models = []
    for seed in range(args.seeds) if seeds is None else seeds:
        for rate in rates:
            recipe = Recipe(rate=rate, seed=seed, steps=args.steps)
            models.append(trained.train(recipe, Path(args.work) / recipe.name))
            print(f"{recipe.name}: held-out loss {models[-1].curve['loss'].iloc[-1]:.3f}", flush=True)
    return models


SMALLER: dict[str, Any] = {"widths": (32, 128), "depths": (1, 4), "seeds": range(3), "steps": 400}
TABLES = {
    MODELS: lambda models, args: study.measure(
        models,
        count=args.problems,
        layers=None if args.full else (1, 3, 5),
        coder_steps=400 if args.full else 200,
        say=print,
    ),
    CONFIRMATION: lambda models, args: (
        study.confirm(train_models(args, FRESH_RATES, FRESH_SEEDS), say=print) if args.full else trained.confirmation()
    ),
    PROBES: lambda models, args: study.probe(models, draws=8 if args.full else 4),
    ENSEMBLE: lambda models, args: study.ensemble(
        [model for model in models if args.full or model.recipe.seed == 0],
        counts=mask_ensemble.COUNTS if args.full else (1, 4, 16, 64),
    ),
    PERCEPTRONS: lambda models, args: perceptrons.perceptrons(**({} if args.full else SMALLER)),
    STREAM: lambda models, args: trained.curves(models),
    TOY: lambda models, args: pd.concat(
        [toy_model.sweep(steps=5000 if args.full else 2000, decay=decay) for decay in (0.7, 1.0)], ignore_index=True
    ),
}


if __name__ == "__main__":
    surgery.cli.script(main)
