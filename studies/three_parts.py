"""Input translation, reasoning, output translation: does damage jump where a rewiring crosses a boundary?

    python studies/three_parts.py --out runs/three_parts      # half an hour on 2 cores

Swaps of two layers, skipped spans and spans run in parallel, by ``surgery.anatomy.crossing``: is damage larger where it
crosses one of two boundaries, or of one to four, than what the layers and their distance account for? First a network
wired in three parts, where the layers of each part read all that the part before wrote and not one another, which must
be found, and one wired as a chain, which must not. Then the bundled model, its twin that only translates, and the
untrained one; then every pretrained model of the atlas. For the bundled ones ``answers`` is what is damaged, for the
networks the next-token distribution (KL).

    three_parts.csv       a row per model, kind of text, family and number of parts: boundaries, ratio, p, power
    three_parts.png       the damage of every swap, and the boundaries
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from transformer_lens import TransformerBridge

import surgery
from surgery import atlas, disk, models, scan
from surgery.anatomy import crossing
from surgery.corpus import probes
from surgery.corpus.probes import Encoded
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.records import tables
from surgery.stats import claims
from surgery.wiring import families

WIRED = (6, 6, 6)  # layers in each part of the control: with fewer the test has little power
COUNTS = (2,), (1, 2, 3, 4)  # boundaries: three parts, and any number of them
FAMILIES = ("swap", "skip", "parallel")
BUNDLED = ("babel", "translation only", "untrained")
COLUMNS = {
    "model": "which model",
    "kind": "kind of text",
    **crossing.COLUMNS,
    "p_adjusted": "p, corrected (Holm) for the families and kinds of text of the model",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/three_parts")
    parser.add_argument("--atlas", help="folder of an atlas (studies/atlas.py); by default the bundled one")
    parser.add_argument("--prompts", type=int, default=120, help="Babel problems to damage")
    parser.add_argument("--draws", type=int, default=crossing.DRAWS)
    args = parser.parse_args()

    folder, rows, swaps = disk.folder(args.out), [], {}
    for name, kind, items in damaged(folder, args):
        for family in FAMILIES:
            damage, spans = atlas.damages(items, family)
            n_layers = max(map(max, spans)) + (family == "swap")
            usable = [n for n, (a, b) in enumerate(spans) if family == "swap" or b - a <= n_layers // 2]
            inside = damage[:, usable], [spans[n] for n in usable], family, n_layers
            for counts in COUNTS:
                found = crossing.parts(*inside, counts=counts, min_size=3, draws=args.draws)
                rows.append({"model": name, "kind": kind, **found})
                if family == "swap" and counts == COUNTS[-1]:
                    swaps[name, kind] = damage.mean(0), spans, found
        print("\n".join(map(sentence, rows[-len(FAMILIES) * len(COUNTS) :])), flush=True)
    frame = pd.DataFrame(rows)
    frame["p_adjusted"] = frame.groupby(["model", "looked_for"])["p"].transform(lambda p: claims.holm(p.to_numpy()))
    tables.write(frame, folder / "three_parts.csv", {"draws": args.draws}, COLUMNS)
    disk.save({folder / "three_parts.png": drawing.png(draw(swaps))})
    shown = ["model", "kind", "family", "looked_for", "parts", "ratio", "p", "p_adjusted", "power"]
    print(f"\n{frame[shown].round(3).to_string(index=False)}")


def damaged(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Every model, kind of text, and what rewiring did there (rows of ``atlas.ITEMS``)."""
    for name, network in (
        ("wired in three parts", known_networks.parted_network(WIRED)),
        ("wired as a chain", known_networks.serial_network(n_layers=sum(WIRED))),
    ):
        yield name, "random tokens", of_network(network, args.prompts // 4)
    bundled = surgery.load("babel")
    opened = (lambda: bundled, lambda: surgery.load("babel-translation"), lambda: models.untrained(bundled))
    for name, of in zip(BUNDLED, opened, strict=True):
        stack = surgery.Stack(of())
        asked = probes.named("babel", args.prompts).encode(stack)
        if name == "translation only":
            asked = probes.babel(args.prompts, [0]).encode(stack)
        out = folder / f"{name.replace(' ', '_')}.csv"
        yield name, "answers", atlas.rewired(stack, asked, out, FAMILIES)[0]
    for name in atlas.models(args.atlas):
        if not name.startswith("babel"):
            yield from ((name, kind, rows) for kind, rows in atlas.read(name, "items", args.atlas).groupby("kind"))


def of_network(network: TransformerBridge, prompts: int) -> pd.DataFrame:
    """What rewiring does to the next-token distribution of a network, on random tokens: rows of ``atlas.ITEMS``."""
    stack, tokens = surgery.Stack(network), Tokens.of(known_networks.tokens(prompts, 12))
    scored = tokens.mask.clone()
    scored[:, 0] = False
    rows = tuple(range(prompts))
    asked = Encoded(tokens, scored, rows, (0,) * prompts, ("",) * prompts, "random tokens")
    listed = pd.DataFrame(
        [
            {"family": family, "start": start, "stop": stop, "wiring": str(wiring)}
            for family in FAMILIES
            for (start, stop), wiring in families.spans(family, stack.n_layers)
        ]
    )
    scanned = scan.run(stack, listed["wiring"].unique(), asked, metrics=("kl",))
    values = scanned.rename(columns={"prompt": "item", "value": "loss"})[["wiring", "item", "loss"]]
    return listed.merge(values.assign(baseline=0.0), on="wiring")


def sentence(row: dict) -> str:
    """What one row says."""
    where = f"{row['model']}, {row['kind']}, {row['family']}"
    size = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] times"
    looked_for = f"of {row['looked_for']} parts, {row['parts']} explain most"
    shown = f"damage is {size} as large across their boundaries" if row["shown"] else f"not shown ({size} as large)"
    return f"{where}: {looked_for}: {shown}, p = {row['p']:.3f}, power {row['power']:.2f}"


def draw(swaps: dict) -> Figure:
    """The damage of every swap as a map, a panel for each model, with the two best boundaries."""
    count = len(swaps)
    figure = Figure(figsize=(3.4 * min(4, count), 3.7 * -(-count // 4)), layout="constrained")
    for place, ((name, kind), (damage, spans, found)) in enumerate(swaps.items(), start=1):
        axes = figure.add_subplot(-(-count // 4), min(4, count), place)
        n_layers = max(map(max, spans)) + 1
        grid = np.full((n_layers, n_layers), np.nan)
        for (i, j), value in zip(spans, damage, strict=True):
            grid[i, j] = grid[j, i] = value
        low, high = np.nanpercentile(grid, [2, 95])
        axes.imshow(grid, cmap="magma_r", vmin=low, vmax=max(high, low + 1e-6))
        sure = found["shown"]
        for boundary in crossing.boundaries(found["parts"]):
            style = {"color": drawing.BLUE, "linewidth": 1.6 if sure else 0.8, "linestyle": "-" if sure else ":"}
            axes.axhline(boundary - 0.5, **style)
            axes.axvline(boundary - 0.5, **style)
        verdict = f"{found['ratio']:.1f} times across, p {found['p']:.3f}"
        axes.set_title(f"{name} ({kind})\n{verdict}", loc="left", fontsize=9)
    figure.supxlabel("layers swapped; dark: more loss; lines: best boundaries, solid where shown", fontsize=9)
    return figure


if __name__ == "__main__":
    surgery.cli.script(main, "the files that are there are whole")
