"""From tables without intervals, of one prompt, of one seed, or with nothing defined, a chapter claims nothing."""

import re

import numpy as np
import pandas as pd
import pytest

from support import made_up
from support.made_up_walks import on_and_off, planted
from surgery.graft import chapter, middle_chapter, size_study, study, walk_study
from surgery.page.chapters import Chapter

USUAL = made_up.manifest() | {"settings": {"usual": [128, 2]}}


def sizes() -> pd.DataFrame:
    """Two widths, the wider with half the loss and more exact answers, over three seeds."""
    places = [
        (budget, seed, width, k)
        for budget in size_study.BUDGETS
        for seed in range(3)
        for width in (128, 256)
        for k in (np.nan, 4.0)
    ]
    return pd.DataFrame(
        [
            {
                "budget": budget,
                "seed": seed,
                "d_mlp": width,
                "depth": 2,
                "k": k,
                "cross_entropy": 0.1 * (1 + 0.001 * seed) * (0.5 if width == 256 else 1.0),
                "exact": 0.5 + 0.001 * seed + (0.25 if width == 256 else 0.0),
            }
            for budget, seed, width, k in places
        ]
    )


def graft() -> pd.DataFrame:
    return pd.DataFrame([{"method": name, "seed": 0.0} | made_up.graft_scores() for name in ("graft", "healed")])


CLAIMS = {  # a chapter, tables of which it claims much, and the words that it does so in
    "middle": (
        middle_chapter.CHAPTER,
        lambda: {
            size_study.SIZES: sizes(),
            walk_study.METHODS: planted(relabelled=0.1, unrelabelled=-0.1, more_real=0.05),
            walk_study.MANIFOLD: on_and_off(),
        },
        r"better|worse|helps|harms|o[nf]f? the manifold|matters|in any direction by (?!none)",
    ),
    "graft": (chapter.CHAPTER, lambda: {study.METHODS: graft()}, r"better|worse|as good|\[[+-]"),
}


def without_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """As a single prompt or seed leaves it."""
    ends = [name for name in table if name.endswith(("_low", "_high"))]
    table = table.assign(**dict.fromkeys(ends, np.nan))
    if "n_prompts" in table:
        table["n_prompts"] = 1
    return table[table["seed"].fillna(0) == 0] if "seed" in table else table


def undefined(table: pd.DataFrame) -> pd.DataFrame:
    """As a constant stream leaves it: every measure, and its ends, NaN."""
    kept = ("seed", "k", "depth", "d_mlp", "start", "stop", "n_prompts", "real_tokens", "harvested", "steps")
    return table.assign(**{n: np.nan for n in table.select_dtypes("float") if n not in kept})


def said(of: Chapter, tables: dict[str, pd.DataFrame]) -> str:
    manifests = dict.fromkeys(tables, USUAL)
    return "\n".join(map(str, of.say(tables, manifests)))


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("spoilt", [without_intervals, undefined])
def test_nothing_is_claimed_of_one_prompt_or_of_what_is_undefined(name, spoilt):
    of, tables, claims = CLAIMS[name]
    assert re.search(claims, said(of, tables())), "else this test finds nothing anywhere"
    text = said(of, {file: spoilt(table) for file, table in tables().items()})
    assert text, "it says why"
    assert not re.findall(claims, text)
    assert not re.search(r"\bnan\b|\binf\b", text)


def test_a_difference_too_small_to_matter_is_not_called_harm():
    """Seeds agree that the loss is worse by 7e-5 of the update's variance."""
    text = said(middle_chapter.CHAPTER, {walk_study.METHODS: planted(noise=1e-6, unrelabelled=-7e-5)})
    assert "-0.000 [-0.000, -0.000] of the update's variance more explained; no difference that matters" in text
    assert "harms" not in text
