"""The tables of docs/validity.md are whole: every simulation has a section, a paragraph, and rows without gaps."""

import inspect
import re
import types

import pandas as pd
import pytest

from benchmarks import validity
from support.places import REPOSITORY

TABLE = re.compile(
    r"\n\n(?P<text>[^\n#|<][^|]*?)\n\n<!-- (?P<module>\w+): (?P<point>.+?) -->\n(?P<rows>.*?)<!-- end of", re.S
)
SECTIONS = [found.groupdict() for found in TABLE.finditer(validity.PAGE.read_text())]
ROW = {"point": "luck", "case": "|a|", "nominal": 1, "before": 2, "after": 3}
PAGE = "text\n<!-- one: luck -->\nold\n<!-- end of table -->\n<!-- two: luck -->\nold\n<!-- end of table -->\n"


def cells(section: dict[str, str]) -> list[list[str]]:
    """The rows of a table below its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section["rows"].splitlines()[2:]]


def test_every_simulation_is_run_and_has_a_table():
    files = {path.stem for path in (REPOSITORY / "benchmarks" / "simulations").glob("*.py")}
    assert files == set(validity.MODULES) == {section["module"] for section in SECTIONS}
    assert len(SECTIONS) == validity.PAGE.read_text().count("<!-- end of table -->")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section["point"])
def test_every_row_has_a_point_a_case_what_it_should_read_and_what_it_read(section):
    assert section["point"]
    assert len(section["text"]) > 60
    assert cells(section)
    for row in cells(section):
        assert len(row) == len(validity.KEYS) - 1
        assert all(row), row


def test_rows_take_the_place_of_those_that_the_module_had():
    page = validity.written(PAGE, "two", pd.DataFrame([ROW]), quick=True)
    assert page.startswith("text\n<!-- one: luck -->\nold\n<!-- end of table -->\n<!-- two: luck -->\n| case")
    assert page.endswith("after (quick run) |\n|---|---|---|---|\n| /a/ | 1 | 2 | 3 |\n<!-- end of table -->\n")
    with pytest.raises(ValueError, match="no table of three: luck"):
        validity.written(PAGE, "three", pd.DataFrame([ROW]))


def test_a_module_that_fails_costs_only_its_own_rows(monkeypatch, tmp_path, capsys):
    simulations = {"two": types.SimpleNamespace(rows=lambda quick: [ROW])}
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(validity, "PAGE", page)
    monkeypatch.setattr(validity, "MODULES", ("one", "two"))
    monkeypatch.setattr(validity, "simulation", simulations.__getitem__)
    with pytest.raises(SystemExit, match="failed: one"):
        validity.main(["--only", "one", "two", "--write"])
    assert "| /a/ | 1 | 2 | 3 |" in page.read_text()
    assert "KeyError" in capsys.readouterr().err


def test_it_says_how_it_is_used(capsys):
    with pytest.raises(SystemExit, match="0"):
        validity.main(["--help"])
    assert "--only" in capsys.readouterr().out


def test_every_simulation_has_rows():
    for name in validity.MODULES:
        assert inspect.signature(validity.simulation(name).rows).parameters["quick"].default is False
