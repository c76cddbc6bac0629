"""Does a model's residual stream revert to a mean: as it is, taped together with a second pass, and over its training?

    python studies/mean_reversion.py --out results/mean_reversion                   # two minutes on 2 cores
    python studies/mean_reversion.py --full                                         # four times the prompts
    python studies/mean_reversion.py --budget 90s                                   # as many prompts as fit
    python studies/mean_reversion.py --checkpoints runs/reference                   # 15 seconds a checkpoint more
    python studies/mean_reversion.py --model FOLDER --text prompts.txt

Writes the files and figures of ``surgery.reversion.study``, and

    reversion_by_size.csv         kappa and causal kappa of every layer, displaced by two sizes: a force shows at both
    mean_reversion_wirings.csv    taped together with layers repeated, the second pass as layers of its own
    mean_reversion_training.csv   from fresh weights over the checkpoints to the model given, and a figure over steps

``--checkpoints`` is a folder of ``step_*.safetensors``, as ``studies/train_reference.py --snapshots`` leaves in its
``--work``. To be the way to the model given they must be of the very run that made it, and the same recipe run again
(on other threads or another machine, say) may end in quite other weights: so ``distance`` is printed, and a foreign run
is called one. Intervals are over prompts; of models, wirings and training runs there is one each.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor

import surgery
from surgery import disk, models, reversion
from surgery.corpus import bundled
from surgery.corpus.text_files import read_prompts
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.page.phrases import interval, number
from surgery.planning import sizes
from surgery.planning.machine import Work
from surgery.planning.sizes import ShapeOf
from surgery.rebuild import tape
from surgery.records import manifest, tables
from surgery.reversion import cloud, files, say, study, trajectories
from surgery.reversion.part import REVERSION_PART
from surgery.stats import panels
from surgery.stats.bootstrap import columns, described, pool, ratio
from surgery.wiring.value import Wiring

STAGES = ({"prompts": 16}, {"prompts": 512})
PASSES, AFTER = 40, 10.0  # of a taped model or a checkpoint over the prompts; seconds that are the same for any number
ANATOMY = {"babel": (4, 9)}  # first layer of the middle and first one behind it, as studies/anatomy.py finds them
WALKS = ("rotated", "token_shuffled")
CAUSAL = [f"kappa_causal_{kind}" for kind in ("difference", "random", "principal")]
OF_A_LAYER = ["kappa", "kappa_excess", "psi", "growth", *CAUSAL]
OF_A_SPAN = ["pooled", "weighted", "within", "within_walk", "within_excess", "nickell", "half_panel", "kappa_ou"]
MEASURES = {  # over training: what it is, and where a random walk stands
    "kappa": ("mean kappa of layers 1 on: the part of a deviation that one layer takes back", 0),
    "kappa_excess": ("the same in excess of both random walks, the smaller of the two", 0),
    "psi": ("mean psi of layers 1 on: 0 random walk, 1 stationary, below 0 explosive", 0),
    "variance_ratio": ("variance ratio of layers 1 on but the last: below 1 later layers undo earlier ones", 1),
    "pooled": ("phi of layers 1 on as one autoregression, no token with a mean of its own", 1),
    "within_excess": ("phi with a mean for every token, minus a random walk's: below 0 shocks are taken back", 0),
    "norm_growth_fitted": ("factor by which a layer lengthens the stream, of the exponential fitted to its norm", 1),
}
TITLES = {
    "kappa": "kappa, mean of layers 1 on",
    "kappa_excess": "kappa beyond random walks",
    "psi": "psi, mean of layers 1 on",
    "variance_ratio": "variance ratio, all but the last",
    "pooled": "phi, pooled",
    "within_excess": "phi within, minus a walk's",
    "norm_growth_fitted": "norm, factor per layer",
}
TRAINING = described({name: meaning for name, (meaning, _) in MEASURES.items()}) | {
    "checkpoint": "untrained, a snapshot, or final: the model given",
    "step": "training steps made; empty for the final model, whose number of steps its weights do not say",
    "distance": "of the weights from the final model's, over the size of these",
    "n_restoring": "layers from 1 on in which slope and every displacement agree on a restoring force",
    "n_looked_at": "layers from 1 on",
}
WIRINGS = (
    reversion.COLUMNS
    | trajectories.PANEL_COLUMNS
    | {
        "wiring": "how the model was taped together; : as it is",
        "part": "layer, or the stretch of passes that the panel is about: all from 1 on, input, middle, output",
        "start": "first pass of the part, counted from 0 in the taped model",
        "stop": "first pass behind it",
        "layer": "the layer of the model that runs in this pass; empty for a stretch",
        "time": "which time the layer runs, from 1",
    }
)
SIZES = reversion.COLUMNS | {"size": "length of a displacement as a fraction of the stream's spread"}


def work(size: dict[str, int], shape_of: ShapeOf, models: int) -> Work:
    """The reversion part of a study, and displacements in ``models`` more: taped, another size, along the training."""
    shape = shape_of(size["prompts"])
    return REVERSION_PART.levels(shape)[-1].work + models * PASSES * shape.forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.REFERENCE, help="a folder or name for surgery.load")
    parser.add_argument("--text", help="prompts, one a line; the bundled model's own problems if not given")
    parser.add_argument("--prompts", type=int, help="how many; 128, and 512 with --full")
    parser.add_argument("--out", default="results/mean_reversion")
    parser.add_argument(
        "--boundaries",
        type=int,
        nargs=2,
        metavar=("IN", "OUT"),
        help="first layer of the middle and first behind it; babel 4 9, else thirds",
    )
    parser.add_argument("--wiring", action="append", help="how to tape layers together; babel ':9 6:', else the middle")
    parser.add_argument("--checkpoints", type=Path, help="folder of step_*.safetensors")
    parser.add_argument("--full", action="store_true")
    sizes.add_option(parser)
    args = parser.parse_args()
    if not args.text and args.model not in models.BUNDLED:
        parser.error(f"{args.model} brings no prompts of its own: give a file with --text FILE, one prompt a line")
    snapshots = sorted(args.checkpoints.glob("step_*.safetensors")) if args.checkpoints else []
    if args.checkpoints and not snapshots:
        parser.error(
            f"{args.checkpoints} has no step_*.safetensors: make some with studies/train_reference.py --snapshots"
        )
    if args.prompts is not None and args.prompts < 1:
        parser.error(f"--prompts {args.prompts}: give at least 1, and 2 for intervals")

    folder = disk.folder(args.out)
    model = surgery.load(args.model)
    stack, untrained = surgery.Stack(model), surgery.Stack(models.untrained(model))
    if stack.n_layers < 4:
        parser.error(
            f"{stack.name} has {stack.n_layers} layers; to have a beginning, a middle and an end give 4 or more"
        )
    alike = (
        [text for _, text in read_prompts(args.text, sizes.TIMED_ON)] if args.text else bundled.prompts(sizes.TIMED_ON)
    )
    cost = partial(work, models=4 + len(args.wiring or [""]) + len(snapshots))
    alike_tokens = stack.tokens(alike, stack.n_ctx)
    plan = sizes.settle(args, STAGES, cost, stack, folder, alike_tokens, say=print, after=AFTER)
    count = (512 if args.full else 128) if args.prompts is None else args.prompts
    texts = [text for _, text in read_prompts(args.text, count)] if args.text else bundled.prompts(count)
    tokens = stack.tokens(texts, stack.n_ctx)
    middle = ANATOMY.get(args.model, (round(stack.n_layers / 3), round(2 * stack.n_layers / 3)))
    boundaries = (args.boundaries[0], args.boundaries[1]) if args.boundaries else middle
    if not 0 <= boundaries[0] < boundaries[1] <= stack.n_layers:
        parser.error(
            f"--boundaries {boundaries[0]} {boundaries[1]}: the middle of {stack.n_layers} layers is from IN, "
            "0 or more, to below OUT"
        )
    wirings = args.wiring or [":9 6:" if args.model == models.REFERENCE else f":{boundaries[1]} {boundaries[0]}:"]
    about = manifest.manifest(stack, tokens, seed=0, boundaries=boundaries, text=args.text)

    measured = study.measure(stack, tokens, folder, untrained, boundaries=boundaries)
    clean = measured[files.LAYERS]
    sized = by_size(stack, tokens, clean)
    tables.write(sized, folder / "reversion_by_size.csv", about, SIZES)
    taped, passes = zip(*(wired(model, tokens, wiring, boundaries) for wiring in (":", *wirings)), strict=True)
    wired_rows = pd.concat(taped, ignore_index=True)
    tables.write(wired_rows, folder / "mean_reversion_wirings.csv", about, WIRINGS)
    trained, kappas = training(stack, untrained, snapshots, tokens)
    about["settings"]["checkpoints"] = [str(file) for file in snapshots]
    tables.write(trained, folder / "mean_reversion_training.csv", about, TRAINING)
    disk.save({folder / "mean_reversion_training.png": drawing.png(draw(trained))})

    print_sizes(sized)
    for wiring, kappa in zip(wirings, passes[1:], strict=True):
        print_wiring(wiring, wired_rows, kappa)
    print_training(trained, kappas)
    *sentences, ends, answer = say.sentences(measured)
    print("\nThe model as it is\n", *sentences, sep="\n")
    print(f"\nIs reversion stronger in the ends than in the middle? {ends}\n\n{answer}")
    sizes.tell(plan, print)


def by_size(stack: surgery.Stack, tokens: Tokens, small: pd.DataFrame) -> pd.DataFrame:
    """The rows at a tenth of the spread, and the same with displacements as large as the spread."""
    large = reversion.layers(stack, tokens, size=1.0)
    return pd.concat([small[large.columns].assign(size=0.1), large.assign(size=1.0)], ignore_index=True)


def wired(
    model, tokens: Tokens, wiring: str, boundaries: tuple[int, int]
) -> tuple[pd.DataFrame, Float[Tensor, "resample pass"]]:
    """Measure single layers and the panel of a taped model, whose passes are layers of their own; and kappa of each."""
    stack = surgery.Stack(tape.together(model, wiring) if wiring != ":" else model)
    order = Wiring.parse(wiring, model.cfg.n_layers).layers
    single = reversion.layers(stack, tokens)
    ends = described(dict.fromkeys(OF_A_LAYER, ""))
    rows = single[[*ends, "restoring", "half_life", "n_prompts", "n_massive"]].assign(
        part="layer",
        start=single["layer"],
        stop=single["layer"] + 1,
        layer=order,
        time=[order[: place + 1].count(layer) for place, layer in enumerate(order)],
    )
    middle = [place for place, layer in enumerate(order) if boundaries[0] <= layer < boundaries[1]]
    inside = (middle[0], middle[-1] + 1) if middle else boundaries
    moments = trajectories.measure(stack, tokens, nulls=False)
    spans = trajectories.panel(moments, inside)
    spans = spans[
        ["start", "stop", *described(dict.fromkeys(OF_A_SPAN, "")), "half_life", "z", "p", "n_prompts", "n_massive"]
    ].assign(part=spans["span"])
    frame = pd.concat([rows, spans], ignore_index=True).assign(wiring=wiring)
    first = ["wiring", "part", "start", "stop", "layer", "time"]
    kappa = layer_drifts(moments.matrices["model"][0])["kappa"]
    return frame[first + [name for name in frame if name not in first]], kappa


def layer_drifts(matrix: Float[Tensor, "resample time time"]) -> dict[str, Float[Tensor, "resample layer"]]:
    """kappa and psi of every layer, out of the moments of trajectories."""
    variance, across = matrix.diagonal(dim1=1, dim2=2), matrix.diagonal(1, dim1=1, dim2=2)
    before, after = variance[:, :-1], variance[:, 1:]
    return {"kappa": 1 - ratio(across, before), "psi": ratio(2 * (before - across), before + after - 2 * across)}


def checkpoint_row(stack: surgery.Stack, tokens: Tokens) -> tuple[dict, dict[str, Float[Tensor, " resample"]]]:
    """Measure a row of the table over training, and mean kappas under every resample: the model's, beyond each walk."""
    moments = trajectories.measure(stack, tokens)
    matrix, kappas = moments.matrices["model"][0], {}
    own = {name: values[:, 1:].mean(1) for name, values in layer_drifts(matrix).items()}
    kappas["model"] = own["kappa"]
    for walk in WALKS:
        drawn = [layer_drifts(draw)["kappa"][:, 1:].mean(1) for draw in moments.matrices[walk]]
        kappas[walk] = pool([own["kappa"] - of_walk for of_walk in drawn])
    row = columns("kappa", own["kappa"]) | columns("psi", own["psi"])
    over = pd.DataFrame([columns("kappa_excess", kappas[walk]) for walk in WALKS]).min()
    whole = trajectories.panel(moments).query("series == 'model' and span == 'all'").iloc[0]
    lengths = cloud.growth(stack, tokens).iloc[0]
    for source, names in (
        (over, ["kappa_excess"]),
        (whole, ["pooled", "within_excess"]),
        (lengths, ["norm_growth_fitted"]),
    ):
        row |= source[list(described(dict.fromkeys(names, "")))].to_dict()
    row |= columns("variance_ratio", panels.variance_ratio(matrix, 1, stack.n_layers - 2))
    later = reversion.layers(stack, tokens)[1:]
    return row | {"n_restoring": int((later["restoring"] == "yes").sum()), "n_looked_at": len(later)}, kappas


def training(
    stack: surgery.Stack, untrained: surgery.Stack, snapshots: list[Path], tokens: Tokens
) -> tuple[pd.DataFrame, list[dict[str, Tensor]]]:
    """A row for the untrained model, every snapshot and the final model, and their kappas (``checkpoint_row``)."""
    target = models.plain(stack.model).state_dict()

    def checkpoints() -> Iterator[tuple[str, float, surgery.Stack]]:
        yield "untrained", 0.0, untrained
        for file in snapshots:
            model = models.untrained(stack.model)
            try:
                models.plain(model).load_state_dict(load_file(file))
            except RuntimeError as error:
                raise SystemExit(
                    f"{file} does not hold the weights of {stack.name}: {str(error).splitlines()[0]}"
                ) from None
            yield file.stem, float(file.stem.removeprefix("step_")), surgery.Stack(model)
        yield "final", float("nan"), stack

    rows, kappas = [], []
    for name, step, checkpoint in checkpoints():
        row, of_checkpoint = checkpoint_row(checkpoint, tokens)
        weights = models.plain(checkpoint.model).state_dict()
        apart = sum(float((weights[key] - target[key]).double().square().sum()) for key in target)
        size = sum(float(weight.double().square().sum()) for weight in target.values())
        rows.append({"checkpoint": name, "step": step, "distance": (apart / size) ** 0.5} | row)
        kappas.append(of_checkpoint)
    return pd.DataFrame(rows), kappas


def draw(frame: pd.DataFrame) -> Figure:
    """Every measure over training steps, with its interval; the final model stands right of the last snapshot."""
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    steps = frame["step"].dropna()
    last, first = max(1.0, float(steps.max())), float(steps[steps > 0].min()) if len(steps) > 1 else 1.0
    x = frame["step"].fillna(2 * last).to_numpy()
    grid = figure.subplots(2, 4, sharex=True).flat
    for axes, (name, (_, walk)) in zip(grid, MEASURES.items(), strict=False):
        axes.axhline(walk, color=drawing.INK, linewidth=0.8)
        ends = frame[name] - frame[f"{name}_low"], frame[f"{name}_high"] - frame[name]
        for rows, style in ((slice(-1), "o-"), (slice(-1, None), "D")):
            bars = [end[rows].clip(lower=0) for end in ends]
            axes.errorbar(x[rows], frame[name][rows], yerr=bars, fmt=style, color=drawing.ACCENT, markersize=5)
        axes.set_title(TITLES[name], loc="left", fontsize=10)
    axes = grid[-1]
    axes.plot(x, frame["n_restoring"], "s", color=drawing.INK)
    axes.set_ylim(-0.5, frame["n_looked_at"].max() + 0.5)
    axes.set_title("layers with a restoring force", loc="left", fontsize=10)
    for axes in figure.axes:
        axes.set_xscale("symlog", linthresh=first)
        axes.set_xlim(-first / 4, 2.6 * last)
        axes.set_xticks(x, [f"{step:g}" for step in x[:-1]] + ["final"], rotation=45, fontsize=8)
        axes.set_xticks([], minor=True)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "training steps; bars: 95 % interval over prompts; line: a random walk (norm: no growth)",
        fontsize=9,
        color=drawing.FAINT,
    )
    return figure


def print_sizes(frame: pd.DataFrame) -> None:
    shown = ["kappa", "kappa_excess_low", "kappa_excess", "kappa_excess_high", *CAUSAL, "restoring"]
    for size, part in frame.groupby("size"):
        print(f"\ndisplaced by {size} of the spread\n{part.set_index('layer')[shown].round(3).to_string()}")
    agree = frame.groupby("layer")["restoring"].agg(lambda words: (words == "yes").all())
    print(f"\nLayers that push back at both sizes, above their nulls: {agree[agree].index.tolist() or 'none'}")


def print_wiring(wiring: str, frame: pd.DataFrame, kappa: Float[Tensor, "resample pass"]) -> None:
    """Does a layer revert more when the stream comes to it a second time? Both times on the same prompts."""
    rows = frame[(frame["wiring"] == wiring) & (frame["part"] == "layer") & (frame["start"] > 0)]
    repeated = rows[rows["layer"].isin(rows.loc[rows["time"] > 1, "layer"])]
    shown = ["start", "layer", "time", "kappa", "kappa_low", "kappa_high", "kappa_excess", "kappa_excess_low", *CAUSAL]
    print(f"\nTaped together as {wiring}\n{repeated[[*shown, 'restoring']].round(3).to_string(index=False)}")
    whole = frame[(frame["part"] == "all") & frame["wiring"].isin([":", wiring])]
    for _, row in whole.iterrows():
        pooled, excess = (number(row, name, 3) for name in ("pooled", "within_excess"))
        print(f"{row['wiring']:>12}  phi pooled {pooled}; with a mean for every token, beyond a random walk's {excess}")
    once, again = (repeated.loc[which, "start"].tolist() for which in (repeated["time"] == 1, repeated["time"] > 1))
    if again:
        change = kappa[:, again].mean(1) - kappa[:, once].mean(1)
        print(
            f"The second time, mean kappa of the repeated layers is {verdict(change, 'higher', 'lower')}, by "
            f"{signed(change)}. {(repeated['restoring'] == 'yes').sum()} of these {len(repeated)} passes restore."
        )


def print_training(frame: pd.DataFrame, kappas: list[dict[str, Tensor]]) -> None:
    shown = ["checkpoint", "distance", *MEASURES, "n_restoring"]
    print(f"\nOver training\n{frame[shown].round(3).to_string(index=False)}")
    beyond = {walk: kappas[-1][walk] - kappas[0][walk] for walk in WALKS}
    change = kappas[-1]["model"] - kappas[0]["model"]
    print(
        f"From the untrained model to the final one, the mean kappa of layers 1 on "
        f"{verdict(change, 'rose', 'fell')}, by {signed(change)}; beyond random walks by {signed(beyond['rotated'])} "
        f"(rotated) and {signed(beyond['token_shuffled'])} (updates of other tokens)."
    )
    if len(frame) < 3:
        return
    last = kappas[-2]["model"] - kappas[0]["model"]
    print(f"To the last snapshot it {verdict(last, 'rose', 'fell')}, by {signed(last)}.")
    if frame["distance"].iloc[-2] > frame["distance"].iloc[0]:
        print(
            "The last snapshot is further from the final model's weights than fresh weights are: these checkpoints are "
            "of another training run, and do not lead to this model."
        )


def signed(values: Float[Tensor, " resample"]) -> str:
    return interval(*columns("", values).values(), digits=3, signed=True)


def verdict(values: Float[Tensor, " resample"], more: str, less: str) -> str:
    _, low, high = columns("", values).values()
    return more if low > 0 else less if high < 0 else f"neither {more} nor {less} clearly"


if __name__ == "__main__":
    surgery.cli.script(main, "the files that are there are whole")
