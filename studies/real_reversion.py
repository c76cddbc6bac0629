"""Does the stream of a pretrained model revert to a mean, and how much of a displacement arrives at the end?

    python studies/real_reversion.py --out runs/real_reversion     # both pretrained models: a quarter of an hour

Everything that ``surgery study reversion`` measures, without tokens of massive activations and, for kappa, with them;
and the share of a small random displacement that arrives at the end (``surgery.reversion.arrival``: the trace of the
Jacobian lens, and that of the token itself), beside the same architecture untrained and displaced runs. An outside
check: TransformerLens' own Jacobian lens, fitted behind the last layer but one (exact, a backward pass per number of
the stream), whose trace must agree, and the share of its squares that is along the identity.

    <model>/reversion_*.csv   as of surgery study
    real_kappa.csv            kappa of every layer, massive tokens in and out
    real_arrival.csv          a row per model and layer: what arrives of a displacement
    real_lens.csv             a row per model: the Jacobian lens beside what arrives
    real_reversion.png        both drawn
"""

import argparse

import pandas as pd
from matplotlib.figure import Figure
from transformer_lens.tools.analysis import JacobianLens

import surgery
from surgery import disk, models, reversion
from surgery.corpus import everyday
from surgery.page import drawing
from surgery.records import tables
from surgery.records.manifest import manifest
from surgery.reversion import arrival, files, kappa, say, study
from surgery.stats.sampling import Sampling

NAME = {"model": "which model", "massive": "whether tokens of massive activations are measured: in or out"}
LENS = {
    "model": "which model",
    "layer": "the layer behind which the lens is fitted: the last but one",
    "trace": "tr J / d of TransformerLens' Jacobian lens",
    "identity": "share of its squares along the identity: (tr J)^2 / (d |J|^2)",
    "whole": "tr J / d as surgery.reversion.arrival estimates it on the same texts",
    "n_prompts": "texts",
}
SMALL = 4  # shares up to here are drawn on a linear scale
KINDS = ("raw", "normalised", "principal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="by default smollm2, gemma3-270m, babel")
    parser.add_argument("--out", default="runs/real_reversion")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--lens", type=int, default=8, help="texts to fit the Jacobian lens on; 0 fits none")
    args = parser.parse_args()

    folder, kappas, shares, lenses, about = disk.folder(args.out), [], [], [], {}
    for name in args.model or ["smollm2", "gemma3-270m", "babel"]:
        stack = surgery.Stack(surgery.load(name))
        fresh = surgery.Stack(models.untrained(stack.model))
        texts = everyday.texts(name, args.prompts)
        tokens = stack.tokens(texts, args.max_tokens)
        about[name] = manifest(stack, tokens, seed=0)
        place = disk.folder(folder / name.replace("/", "_"))
        measured = study.measure(
            stack, tokens, place, fresh, coordinates=KINDS, followed=4, draws=args.draws, batch_size=16, progress=True
        )
        kappas.append(measured[files.LAYERS].assign(model=name, massive="out"))
        with_massive = Sampling(batch_size=16, skip_massive=False)
        both = reversion.layers(stack, tokens, draws=args.draws, sampling=with_massive)
        kappas.append(both.assign(model=name, massive="in"))
        for label, own in ((name, stack), (f"{name}, untrained", fresh)):
            shares.append(arrival.shares(own, tokens[:16]).assign(model=label, massive="out"))
        if args.lens:
            lenses.append(lens(stack, name, texts[: args.lens], args.max_tokens))
            print(f"\n{name}, Jacobian lens: {lenses[-1]}", flush=True)
        print(f"\n{name}", *say.sentences(measured), *arrives(shares[-2], shares[-1]), sep="\n", flush=True)
        print(*massive(kappas[-2], kappas[-1]), sep="\n", flush=True)
    of_kappa, of_arrival = (pd.concat(part, ignore_index=True) for part in (kappas, shares))
    tables.write(of_kappa, folder / "real_kappa.csv", {"of": about}, NAME | kappa.COLUMNS)
    tables.write(of_arrival, folder / "real_arrival.csv", {"of": about}, NAME | arrival.COLUMNS)
    tables.write(pd.DataFrame(lenses, columns=list(LENS)), folder / "real_lens.csv", {"of": about}, LENS)
    disk.save({folder / "real_reversion.png": drawing.png(draw(of_kappa, of_arrival))})


def lens(stack: surgery.Stack, name: str, texts: list[str], longest: int) -> dict:
    """A row of ``LENS``: TransformerLens' fit and ours, on the same texts."""
    layer, skipped = stack.n_layers - 2, 1 if name in models.BUNDLED else 16  # as for the published lenses
    fitted = JacobianLens.fit(
        stack.model,
        texts,
        corpus="everyday",
        source_layers=[layer],
        dim_batch=16,
        max_seq_len=longest,
        skip_first_positions=skipped,
        show_progress=False,
    )
    jacobian = fitted.jacobians[layer].double()
    trace, squares = jacobian.trace() / len(jacobian), jacobian.square().sum() / len(jacobian)
    own = arrival.shares(stack, stack.tokens(texts, longest))
    return {
        "model": name,
        "layer": layer,
        "trace": trace.item(),
        "identity": (trace**2 / squares).item(),
        "whole": own["whole"].iloc[-1],
        "n_prompts": fitted.n_prompts,
    }


def arrives(own: pd.DataFrame, fresh: pd.DataFrame) -> list[str]:
    """What arrives at the end of a displacement, in sentences."""
    lines = []
    for name, of in (("own", "at its own token"), ("whole", "at its and all later tokens (tr J/d)")):
        first, last = own.iloc[len(own) // 3], own.iloc[-1]
        ends = [f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]" for row in (first, last)]
        lines.append(
            f"of a small random displacement behind layer {first['layer']:.0f} there arrives {ends[0]} {of}, behind "
            f"layer {last['layer']:.0f} {ends[1]}; untrained {fresh[name].iloc[len(own) // 3]:.3f} and "
            f"{fresh[name].iloc[-1]:.3f}"
        )
    return lines


def massive(without: pd.DataFrame, both: pd.DataFrame) -> list[str]:
    """What massive tokens change."""
    change = (both["kappa"] - without["kappa"]).abs()
    restoring = [int((frame["restoring"] == "yes").sum()) for frame in (without, both)]
    return [
        f"with {int(without['n_massive'].max())} massive tokens measured too, kappa differs by "
        f"{change.median():.3f} in the median layer and {change.max():.2f} in layer {int(change.idxmax())}; "
        f"layers that restore: {restoring[0]} without, {restoring[1]} with"
    ]


def draw(kappas: pd.DataFrame, shares: pd.DataFrame) -> Figure:
    """A column a model: kappa with massive tokens in and out; and what arrives of a displacement."""
    names = list(dict.fromkeys(kappas["model"]))
    figure = Figure(figsize=(4.4 * len(names), 6.6), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        above, below = grid[:, column]
        for which, colour, style in (("out", drawing.ACCENT, "o-"), ("in", drawing.BLUE, "s:")):
            rows = kappas[(kappas["model"] == name) & (kappas["massive"] == which)].iloc[1:]
            ends = [rows["kappa"] - rows["kappa_low"], rows["kappa_high"] - rows["kappa"]]
            label = f"massive tokens {which}"
            above.errorbar(rows["layer"], rows["kappa"], yerr=ends, fmt=style, color=colour, markersize=3, label=label)
        null = kappas[(kappas["model"] == name) & (kappas["massive"] == "out")].iloc[1:]
        above.plot(null["layer"], null["kappa"] - null["kappa_excess"], "--", color=drawing.INK, label="its nulls")
        above.axhline(0, color=drawing.INK, linewidth=0.8)
        above.set(title=name, ylabel="kappa" if column == 0 else "")
        for label, style in ((name, "-"), (f"{name}, untrained", ":")):
            rows = shares[shares["model"] == label]
            for measure, colour in (("own", drawing.ACCENT), ("whole", drawing.BLUE)):
                ends = [rows[measure] - rows[f"{measure}_low"], rows[f"{measure}_high"] - rows[measure]]
                of = "own token" if measure == "own" else "own and later tokens"
                shown = f"{of}{', untrained' * (style == ':')}"
                below.errorbar(rows["layer"], rows[measure], yerr=ends, fmt=style, color=colour, label=shown)
        below.axhline(1, color=drawing.INK, linewidth=0.8)
        below.set(xlabel="layer", ylabel="share that arrives" if column == 0 else "")
        if shares.loc[shares["model"] == name, "whole"].max() > SMALL:
            below.set_yscale("symlog", linthresh=1)
        below.set_ylim(bottom=0)
        for axes in (above, below):
            axes.legend(frameon=False, fontsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    surgery.cli.script(main, "the files that are there are whole")
