"""How many layers in a row can be saved, at what loss, and how much faster is that?

    python studies/compile.py --out runs/compile          # the bundled model; 3 minutes on 2 cores
    python studies/compile.py --model smollm2 --model gemma3-270m --prompts 128 --max-tokens 32 --shallowest 26
        # an hour each and more; bf16 (--precision) where the CPU has it

``surgery compile`` of every model: the frontier of layers saved against loss on fresh texts, beside its rivals, the
compiled model and its speed. Go on after a kill with the same command.

    <model>/              a folder for each, as of ``surgery compile``
    compile.csv           a row per model, allowance and family: layers saved, and what that costs
"""

import argparse

import pandas as pd

import surgery
from surgery import disk, report
from surgery.compiler import frontier, search, study
from surgery.compiler.ways import WAYS
from surgery.records import tables

COLUMNS = {"model": "which model", "allowance": "loss that may be added, with its whole interval"} | frontier.COLUMNS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="by default the bundled one")
    parser.add_argument("--out", default="runs/compile")
    parser.add_argument("--allow", type=float, default=0.01)
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--shallowest", type=int, help="stop at so few layers in a row; half of them by default")
    ways = {way.replace(" ", "-"): way for way in WAYS}
    parser.add_argument("--heal", action="append", choices=ways, help="heal what is compiled; can be given twice")
    parser.add_argument("--branches", action="store_true", help="search whole layers and chains side by side too")
    parser.add_argument("--torch-compile", action="store_true", help="time every model through torch.compile too")
    parser.add_argument("--rounds", type=int, default=9, help="how often every model is timed")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="of the search")
    args = parser.parse_args()

    folder, rows = disk.folder(args.out), []
    for name in args.model or ["babel"]:
        place = folder / name.replace("/", "_")
        compiled = study.run(
            name,
            place,
            allow=args.allow,
            prompts=args.prompts,
            max_tokens=args.max_tokens,
            shallowest=args.shallowest,
            families=tuple(search.FAMILIES) if args.branches else search.FUSED,
            ways=tuple(ways[way] for way in args.heal or ()),
            rounds=args.rounds,
            torch_compile=args.torch_compile,
            precision=args.precision,
        )
        print("\n".join([f"\n{name}", *compiled.sentences, f"The page is {report.build(place)}."]), flush=True)
        for allowance in frontier.ALLOWANCES:
            for family in compiled.frontier["family"].unique():
                best = frontier.within(compiled.frontier, allowance, family)
                rows.append(dict(best) | {"model": name, "allowance": allowance, "family": family})
        settings = {"allow": args.allow, "prompts": args.prompts, "max_tokens": args.max_tokens}
        tables.write(pd.DataFrame(rows), folder / "compile.csv", {"settings": settings}, COLUMNS)
    print(pd.DataFrame(rows)[["model", "allowance", "family", "saved", "cost", "cost_high"]].round(3).to_string())


if __name__ == "__main__":
    surgery.cli.script(main, "the same command goes on where it was")
