"""Does dropout lower superposition within components, and raise redundancy across them?

    python studies/dropout.py --out results/dropout      # the shipped models: ten minutes on 2 cores
    python studies/dropout.py --full                     # retrains them first (--seeds), larger sweeps: an hour

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
from surgery.records import manifest, tables


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
    args = parser.parse_args()
    if min(args.seeds, args.steps) < 1 or args.problems < 30:
        parser.error("--seeds and --steps are 1 or more, --problems 30 or more: ten of each k")

    folder = disk.folder(args.out)
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
