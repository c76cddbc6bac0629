"""How well is a known phi recovered? Every estimator of ``stats.panels`` and ``stats.ou`` on simulated panels.

    python benchmarks/recovery.py --out recovery.csv

Writes ``surgery.stats.ou.recovery`` and prints it: first where theory promises 95 % (and every coverage that is not
within 92 to 98 %), then the estimators that it warns of. Panels of 100 units (``andrews``: one series), T = 12, 24 and
48. Then what the usual unit-root tests say of single series of these lengths. The process time of the table is printed
last.
"""

import argparse
import time
from pathlib import Path

import pandas as pd

from surgery.stats import ou
from surgery.stats.panels import simulate


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """One row per estimator, kind of effects and T; bias and coverage by phi."""
    table = table.assign(cell=table.bias.map("{:+.3f}".format) + table.coverage.map(" {:.1%}".format))
    return table.pivot(index=["estimator", "effects", "T"], columns="phi", values="cell").fillna("")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recovery.csv"))
    parser.add_argument("--simulations", type=int, default=1000)
    arguments = parser.parse_args()
    pd.set_option("display.width", 160, "display.max_rows", None, "display.max_columns", None)

    start = time.process_time()
    table = ou.recovery(n_simulations=arguments.simulations)
    seconds = time.process_time() - start
    table.to_csv(arguments.out, index=False)
    for name, rows in (("valid", table[table.valid]), ("not valid", table[~table.valid])):
        print(f"\n{name}: bias, coverage of the 95 % interval, by phi\n{wide(rows)}")
    outside = table[table.valid & ~table.coverage.between(0.92, 0.98)]
    print(f"\nvalid, with coverage outside 92 to 98 %: {len(outside)} of {table.valid.sum()}\n{outside.to_string()}")
    for T in (12, 24, 48):
        print(f"\n{ou.comparison(simulate(0.9, 200, T, seed=1), 200).round(3).to_string(index=False)}")
    print(f"\n{len(table)} rows, {seconds:.0f} s")


if __name__ == "__main__":
    main()
