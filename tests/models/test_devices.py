"""The measures on a device that is not the CPU: a pretended one, so that this runs everywhere."""

import json
import os
import subprocess
import sys

import pytest

from support.places import REPOSITORY, TESTS
from support.pretend_device import ON_TWO

CALLS = (  # a quick choice of support.untouched.CALLS
    *("run with groups", "run with gradients", "readout", "frozen", "checks", "hooks.skip, damp and parallel"),
    *("hooks.add_noise", "hooks.stochastic_depth", "effects.matrix", "ablation.damage", "lens.layers"),
    *("displacement.principal_components", "fidelity.compare", "features.activations", "scan.run", "scan.plan"),
    *("search.first_order", "harvest", "width.widen", "units.importance"),
)


@pytest.fixture(scope="module")
def outcomes(model_folder):
    """What each call gave there."""
    command = [sys.executable, "-W", "ignore", "-m", "support.pretend_device", str(model_folder("llama")), *CALLS]
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{REPOSITORY}"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("call", [*CALLS, *(f"{call}, on two" for call in ON_TWO)])
def test_a_call_stays_on_the_device_of_the_model(outcomes, call):
    assert "error" not in outcomes[call], outcomes[call]["error"]
    assert outcomes[call]["difference"] < 1e-4
