"""Input translation, reasoning, output translation: does damage jump where a rewiring crosses a boundary?

    python studies/three_parts.py --out runs/three_parts      # ten minutes on 2 cores, with the training of a control

Swaps of two layers, skipped spans and spans run in parallel, by ``surgery.anatomy.crossing``: is damage larger where it
crosses one of two boundaries, or of one to four, than what the layers and their distance account for? The positive
control first: a model of 18 layers, trained on the bundled model's problems with one and the same layer as its layers
0 to 5, another as 6 to 11 and a third as 12 to 17, has three parts by construction, and must be found to. Beside it the
bundled model, its twin that only translates, and the untrained one; then every pretrained model of the atlas. For the
bundled ones ``answers`` is what is damaged.

    three_parts.csv       a row per model, kind of text and family: the best boundaries, how much larger, p, power
    three_parts.png       the damage of every swap, and the boundaries
    in_parts.safetensors  the weights of the control
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.functional import cross_entropy

import surgery
from surgery import atlas, disk, models
from surgery.anatomy import crossing
from surgery.corpus import probes, splits
from surgery.page import drawing
from surgery.rebuild import layout
from surgery.records import tables
from surgery.stats import claims
from surgery.training.loop import optimizers, rate

EACH = 6  # layers in a part of the control: with fewer the test has little power
COUNTS = (2,), (1, 2, 3, 4)  # boundaries: three parts, and any number of them
FAMILIES = ("swap", "skip", "parallel")
CONTROLS = ("built in three parts", "babel", "translation only", "untrained")
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
    parser.add_argument("--steps", type=int, default=600, help="of the control's training")
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
                if family == "swap" and counts == COUNTS[0]:
                    swaps[name, kind] = damage.mean(0), spans, found
        print("\n".join(map(sentence, rows[-len(FAMILIES) * len(COUNTS) :])), flush=True)
    frame = pd.DataFrame(rows)
    frame["p_adjusted"] = frame.groupby(["model", "looked_for"])["p"].transform(lambda p: claims.holm(p.to_numpy()))
    tables.write(frame, folder / "three_parts.csv", {"steps": args.steps, "draws": args.draws}, COLUMNS)
    disk.save({folder / "three_parts.png": drawing.png(draw(swaps))})
    shown = ["model", "kind", "family", "looked_for", "parts", "ratio", "p", "p_adjusted", "power"]
    print(f"\n{frame[shown].round(3).to_string(index=False)}")


def damaged(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Every model, kind of text, and what rewiring did there (rows of ``atlas.ITEMS``)."""
    bundled = surgery.load("babel")
    opened = (
        lambda: in_parts(bundled, folder / "in_parts.safetensors", args.steps),
        lambda: bundled,
        lambda: surgery.load("babel-translation"),
        lambda: models.untrained(bundled),
    )
    for name, of in zip(CONTROLS, opened, strict=True):
        stack = surgery.Stack(of())
        asked = probes.named("babel", args.prompts).encode(stack)
        if name == "translation only":
            asked = probes.babel(args.prompts, [0]).encode(stack)
        out = folder / f"{name.replace(' ', '_')}.csv"
        yield name, "answers", atlas.rewired(stack, asked, out, FAMILIES)[0]
    for name in atlas.models(args.atlas):
        if not name.startswith("babel"):
            yield from ((name, kind, rows) for kind, rows in atlas.read(name, "items", args.atlas).groupby("kind"))


def in_parts(model, file: Path, steps: int, seed: int = 0):
    """Three layers of ``model``, each run as a part of ``EACH`` layers, trained together; or from ``file``."""
    n_layers = model.cfg.n_layers
    like = [(2 * part + 1) * n_layers // 6 for part in range(3)]
    student = layout.build(model, [layout.Row(place) for place in np.repeat(like, EACH).tolist()])
    plain = models.plain(student)
    if file.exists():
        plain.load_state_dict(load_file(file))
        return student
    own = list(plain.model.layers)
    shared = own[::EACH]
    plain.model.layers = nn.ModuleList(layer for layer in shared for _ in range(EACH))
    matrices = [weight for layer in shared for weight in layer.parameters() if weight.ndim == 2]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in plain.parameters() if id(weight) not in known]
    data, together = splits.babel(20_000), optimizers(matrices, others, 0.1)
    weight = splits.weigh_answers(data.corpus)
    for step in range(steps):
        batch = torch.from_numpy(np.random.default_rng((seed, step)).choice(len(data.corpus), 64, replace=False))
        ids, share = data.corpus.ids[batch], weight[batch]
        logits = plain(ids, use_cache=False).logits
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * share[:, 1:]).sum() / share[:, 1:].sum()
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        for optimizer in together:
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, 2e-3, 50, 0.02)
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0:
            print(f"training the control: step {step} of {steps}, loss {loss:.3f}", flush=True)
    for place, layer in enumerate(own):
        layer.load_state_dict(shared[place // EACH].state_dict())
    plain.model.layers = nn.ModuleList(own)
    student.eval()
    disk.save({file: save({name: tensor.contiguous() for name, tensor in plain.state_dict().items()})})
    return student


def sentence(row: dict) -> str:
    """What one row says."""
    where = f"{row['model']}, {row['kind']}, {row['family']}"
    size = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] times"
    looked_for = f"of {row['looked_for']} parts, {row['parts']} explain most"
    shown = f"damage is {size} as large across their boundaries" if row["p"] < 0.05 else f"not shown ({size} as large)"
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
        sure = found["p"] < 0.05
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
