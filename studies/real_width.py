"""Can the middle of a pretrained model be made wider or narrower, and do walks through its input stay near real text?

    python studies/real_width.py --model smollm2 --out runs/real_width      # a quarter of an hour on 2 cores

The middle third is made wider (neurons, heads, the stream itself), which must leave the logits as they are, and
narrower by every criterion, which costs. Activations that enter it are walked (``surgery.graft.walk``): how far from
real ones does that lead, and what do the following layers make of it? Two more walks are as long as the stationary one
but confined to the directions that the following layers read least, or most (``surgery.graft.unread``); each has beside
it a walk as long in any direction.

    real_wider.csv      a row per part: largest difference of a logit, relative to the largest logit
    real_narrower.csv   a row per part, size and criterion: loss added on held-out texts
    real_walk.csv       a row per walk: distance, nearest real activation, loss added
    real_width.png      the last two drawn
"""

import argparse

import pandas as pd
import torch
from matplotlib.figure import Figure

import surgery
from surgery import disk
from surgery.corpus import everyday
from surgery.graft import manifold, unread, walk
from surgery.instruments import losses
from surgery.instruments.readout import predicting_positions
from surgery.models.errors import ModelError
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.rebuild import width
from surgery.rebuild.units import BY
from surgery.records import tables
from surgery.records.manifest import manifest
from surgery.stats.bootstrap import columns, described, weights
from surgery.stats.sampling import Sampling

SHARES = (0.75, 0.5, 0.25)
NARROWER = {
    "part": "what was made narrower: mlp, heads or stream",
    "size": "how many neurons, heads or numbers of the stream are left",
    "share": "the same as a share of what was there",
    "by": "which are left: those that write most (activation), of the largest weights (magnitude), the components that "
    "vary most (pca), or any (random)",
    "n_prompts": "number of prompts",
    **described({"loss": "loss added (nats per token)"}),
}
PARTS = {"wider": width.COLUMNS, "narrower": NARROWER, "walk": manifold.COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", default="runs/real_width")
    parser.add_argument("--middle", type=int, nargs=2, metavar=("START", "STOP"), help="by default the middle third")
    parser.add_argument("--prompts", type=int, default=64, help="texts to judge by; three times as many to fit to")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure")
    args = parser.parse_args()

    folder, model = disk.folder(args.out), surgery.load(args.model)
    stack = surgery.Stack(model)
    L = stack.n_layers
    start, stop = args.middle or (round(L / 3), round(2 * L / 3))
    texts = everyday.texts(args.model, 4 * args.prompts)
    seen, judged = (stack.tokens(part, args.max_tokens) for part in (texts[args.prompts :], texts[: args.prompts]))
    source = manifest(stack, judged, seed=0, middle=[start, stop])
    measured = {"wider": wider, "narrower": narrower, "walk": walked}
    for part in args.parts:
        frame = measured[part](stack, (start, stop), seen, judged)
        tables.write(frame, folder / f"real_{part}.csv", source, PARTS[part])
    files = [folder / f"real_{part}.csv" for part in ("narrower", "walk")]
    if all(file.exists() for file in files):
        disk.save({folder / "real_width.png": drawing.png(draw(*map(tables.read, files), stack.name))})


def wider(stack: surgery.Stack, span: tuple[int, int], seen: Tokens, judged: Tokens) -> pd.DataFrame:
    """What widening every part changes: nothing."""
    frame = width.exactness({stack.name: stack.model}, *span)
    print(frame.to_string(index=False), flush=True)
    return frame


def narrower(stack: surgery.Stack, span: tuple[int, int], seen: Tokens, judged: Tokens) -> pd.DataFrame:
    """The loss that every part costs at every size, by every criterion."""
    present = {"mlp": "d_mlp", "heads": "n_heads", "stream": "d_model"}
    rows = []
    for part, name in present.items():
        size = int(getattr(stack.model.cfg, name))
        for share in SHARES if part != "heads" else (2 / 3, 1 / 3):
            for by in BY + (("pca",) if part == "stream" else ()):
                left = max(1, round(share * size))
                try:
                    thin = width.narrow(stack.model, *span, seen[:48], **{name: left}, by=by)
                except (ModelError, ValueError) as error:
                    print(f"{part}, {left} by {by}: {error}", flush=True)
                    continue
                rows.append({"part": part, "size": left, "share": share, "by": by} | loss_added(stack, thin, judged))
                print(f"{part}, {left} of {size} by {by}: {rows[-1]['loss']:+.3f} nats", flush=True)
    return pd.DataFrame(rows)


def walked(stack: surgery.Stack, span: tuple[int, int], seen: Tokens, judged: Tokens) -> pd.DataFrame:
    """How far walks lead from real activations, and what the following layers make of it."""
    start, step = span[0], walk.Stationary(0.9)
    _, basis = unread.read_directions(stack, seen[:32], start)
    tenth = stack.d_model // 10
    kinds = {
        "stationary .9": step,
        "tangent .5": walk.Tangent(0.5),
        "along what is read least": unread.Confined(step, basis[:, :tenth]),
        "along what is read most": unread.Confined(step, basis[:, -tenth:]),
    }
    context = stack.context(seen)
    entering = stack.execute(f":{start}", context.x0, context)
    components = min(64, stack.d_model // 4, len(seen) // 5)
    fitted = walk.fit(entering, seen.mask, positions=2, components=components)
    frame = manifold.report(stack, fitted, kinds, judged, start, sampling=Sampling(batch_size=16))
    shown = ["kind", "control", "moved", "nearest", "loss_change", "loss_change_low", "loss_change_high"]
    print(frame[shown].round(3).to_string(index=False), flush=True)
    return frame


def loss_added(stack: surgery.Stack, other, tokens: Tokens) -> dict[str, float]:
    """The loss that another model adds, with its interval over prompts."""
    total, thin = [], surgery.Stack(other)
    for batch in tokens.batches(16):
        final = thin.execute(":", thin.context(batch).x0, thin.context(batch))
        clean = stack.execute(":", stack.context(batch).x0, stack.context(batch))
        predicted = losses.predicted(final, predicting_positions(batch))
        total += losses.by_prompt(stack, batch, clean, [predicted])[0, 0].tolist()
    drawn = weights(len(tokens), 1000, 0)
    count = predicting_positions(tokens).sum(1).double()
    values = (drawn @ torch.tensor(total, dtype=torch.float64)) / (drawn @ count)
    return {"n_prompts": len(tokens)} | columns("loss", values)


def draw(narrower: pd.DataFrame, walked: pd.DataFrame, name: str) -> Figure:
    """Left: the cost of a narrower middle by criterion. Right: the cost of walks, and how far they lead."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.5))
    for place, (part, rows) in zip(axes, narrower.groupby("part", sort=False)):
        for by, of in rows.groupby("by", sort=False):
            ends = [of["loss"] - of["loss_low"], of["loss_high"] - of["loss"]]
            place.errorbar(of["size"], of["loss"], yerr=ends, fmt="o-", label=by, markersize=4)
        place.set(title=f"{part} of the middle", xlabel="how many are left")
        place.set_ylabel("loss added (nats a token)" if place is axes[0] else "")
        place.set_yscale("symlog", linthresh=0.1)
        place.legend(frameon=False, fontsize=8)
    own = walked[~walked["control"] & (walked["kind"] != "real")]
    free = walked[walked["control"]].set_index("kind").loc[own["kind"]]
    for shift, (rows, label, colour) in enumerate(
        ((own, "the walk", drawing.ACCENT), (free, "as far in any direction", drawing.BLUE))
    ):
        ends = [rows["loss_change"] - rows["loss_change_low"], rows["loss_change_high"] - rows["loss_change"]]
        heights = [n + 0.2 * shift for n in range(len(rows))]
        axes[3].errorbar(rows["loss_change"], heights, xerr=ends, fmt="o", color=colour, label=label)
    axes[3].set_yticks(range(len(own)), list(own["kind"]))
    axes[3].axvline(0, color=drawing.INK, linewidth=0.8)
    axes[3].set_ylim(-0.5, len(own) + 0.6)
    axes[3].set(title=f"walks, {name}", xlabel="loss added (nats a token)")
    axes[3].legend(frameon=False, fontsize=8)
    for place in axes:
        place.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    surgery.cli.script(main, "the files that are there are whole")
