"""Every attack at its full size, and the table of what was tried, held and failed: ``make harden``.

    python tests/hardening/harden.py [--share 0.1] [--only threads bombs] [--write]

The attacks are those of the ``test_*.py`` beside this file (their list ``ATTACKS``), which run them at quick sizes.
``--write`` puts the table into docs/hardening.md as soon as each module is through. It ends with 1 if anything failed.
"""

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "hardening.md"
MODULES = tuple(sorted(path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")))
BEGIN, END = "<!-- {}: begin -->\n", "<!-- {}: end -->\n"
HEAD = "| attack | tried | held | failed | failed before | minutes |\n|---|---|---|---|---|---|\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the full sizes, where time is short")
    parser.add_argument("--only", nargs="+", choices=MODULES, default=MODULES, help="these modules only")
    parser.add_argument("--write", action="store_true", help="put the figures into docs/hardening.md")
    chosen = parser.parse_args(arguments)
    for place in (ROOT, ROOT / "tests"):
        if str(place) not in sys.path:
            sys.path.insert(0, str(place))
    failed = 0
    for name in chosen.only:
        lines = []
        for attack in importlib.import_module(f"hardening.test_{name}").ATTACKS:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                outcome = attack.run(max(1, attack.quick, round(chosen.share * attack.full)), Path(folder))
            minutes, count = (time.perf_counter() - began) / 60, len(outcome.failures)
            failed += count
            held = f"{outcome.tried - count:,}"
            cells = (attack.name, f"{outcome.tried:,}", held, str(count), attack.before or "–", f"{minutes:.1f}")
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
            for failure in outcome.failures[:5]:
                print(f"    {failure}", flush=True)
        if chosen.write:
            PAGE.write_text(written(PAGE.read_text(), name, HEAD + "\n".join(lines) + "\n"))
    if failed:
        sys.exit(f"{failed} trials failed")


def written(page: str, name: str, table: str) -> str:
    """The page with the table of one module put between its marks."""
    before, begin, rest = page.partition(BEGIN.format(name))
    if not begin:
        raise ValueError(f"{PAGE.name} has no place for {name}: add {BEGIN.format(name).strip()} and its end")
    _, end, after = rest.partition(END.format(name))
    return before + begin + table + end + after


if __name__ == "__main__":
    main()
