"""Every study script says how to run it, and within what budget; its sizes and what they cost rise together."""

import itertools
import math
import runpy

import pytest

import surgery
from support.studies import STUDIES
from surgery.corpus import bundled
from surgery.planning import sizes
from surgery.planning.machine import Machine

BUDGETED = sorted(script.name for script in STUDIES.glob("*.py") if "sizes.add_option(" in script.read_text())
GIVEN = {  # what a script tells its ``work`` besides sizes
    "anatomy.py": {"models": 3, "kinds": 2, "lengths": 5},
    "dropout.py": {"asked": ("dropout_toy.csv", "dropout_models.csv"), "models": 12, "steps": 1500},
    "latent_walk.py": {"amounts": (1000, 10_000, 100_000), "kinds": ("stationary",), "batch": 32},
    "mean_reversion.py": {"models": 5},
    "width_of_thought.py": {"cells": [(128, 5), (384, 5), (384, 8)], "batch": 32},
}
MACHINE = Machine(forward=1.5e-5, backward=3e-5, readouts=7e-6, products=6e-11)


def test_every_study_says_how_to_run_it():
    for script in STUDIES.glob("*.py"):
        assert f"python studies/{script.name}" in script.read_text().split('"""')[1]


@pytest.fixture(scope="module")
def stack():
    return surgery.Stack(surgery.load("babel"))


@pytest.mark.parametrize("script", BUDGETED)
def test_more_of_a_budget_buys_more(script, stack):
    named = runpy.run_path(str(STUDIES / script))
    assert f"python studies/{script} --budget " in named["__doc__"]
    alike = stack.tokens(bundled.prompts(32))

    def work(size):
        return named["work"](size, lambda count: sizes.shape(stack, alike, count), **GIVEN.get(script, {}))

    rungs = sizes.levels(named["STAGES"], work)
    seconds = [MACHINE.seconds(level.work) for level in rungs]
    assert all(after > 0.95 * before for before, after in itertools.pairwise(seconds)), (
        "but for a rounded number of steps"
    )
    assert seconds[-1] > 2 * seconds[0] > 0
    least, most = sizes.choose(rungs, MACHINE, 2 * seconds[0]), sizes.choose(rungs, MACHINE, math.inf)
    assert all(least.sizes[name] <= most.sizes[name] for name in most.sizes)
    assert most.cuts == []
    assert least.cuts
