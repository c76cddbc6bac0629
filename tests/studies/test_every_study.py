"""Every study script says how to run it."""

from support.studies import STUDIES


def test_every_study_says_how_to_run_it():
    for script in STUDIES.glob("*.py"):
        assert f"python studies/{script.name}" in script.read_text().split('"""')[1]
