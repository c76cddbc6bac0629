"""``study.json``: a study goes on where it was, and never with files that are not its own."""

import pytest

from planning.test_plans import choose, part
from surgery.planning.agenda import FILE, Agenda, Done, hashes


@pytest.fixture
def agenda(tmp_path):
    (tmp_path / "table.csv").write_text("a\n1\n")
    agenda = Agenda({"model": "m", "seed": 0}, choose([part("first", 1), part("second", 1)]), {})
    return agenda.with_part("first", Done(hashes(tmp_path, ["table.csv"]), 1.5, 2.0**30))


def test_an_agenda_is_read_as_it_was_written(agenda, tmp_path):
    agenda.write(tmp_path)
    again = Agenda.read(tmp_path)
    assert again == agenda
    assert again.missing == ["second"]
    assert again.holds(tmp_path, "first")
    assert not again.holds(tmp_path, "second")


def test_a_part_whose_file_was_changed_or_is_gone_is_not_done(agenda, tmp_path):
    (tmp_path / "table.csv").write_text("a\n2\n")
    assert not agenda.holds(tmp_path, "first")
    (tmp_path / "table.csv").unlink()
    assert not agenda.holds(tmp_path, "first")


@pytest.mark.parametrize("damage", [lambda text: text.replace("1.5", "2.5"), lambda text: text[:-9], lambda _: "[]"])
def test_a_damaged_agenda_begins_anew(agenda, tmp_path, damage):
    agenda.write(tmp_path)
    path = tmp_path / FILE
    path.write_text(damage(path.read_text()))
    assert Agenda.read(tmp_path) is None


def test_there_is_no_agenda_in_an_empty_folder(tmp_path):
    assert Agenda.read(tmp_path) is None
