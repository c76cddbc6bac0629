"""A study within a budget: planned, interrupted, gone on with, and honest about what it cut."""

import json
from pathlib import Path

import pytest

from support import fixtures, made_up
from surgery import report, study
from surgery.planning import agenda as agendas
from surgery.planning.machine import Machine
from surgery.records import tables
from surgery.series import part as series_part

PROMPTS = [" ".join(f"w{(7 * i + 3 * j * j) % 90}" for j in range(6)) for i in range(24)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The names of the parts in the order in which they are measured; measurements take no time."""
    names: list[str] = []
    made_up.replace_measures(fixtures.N_LAYERS, monkeypatch.setattr)
    for part in study.PARTS:

        def measure(subject, folder, settings, part=part, real=part.measure):
            names.append(part.name)
            return real(subject, folder, settings)

        monkeypatch.setitem(part.__dict__, "measure", measure)
    return names


def run(model_folder, text, out, *names, **options):
    said: list[str] = []
    study.run(names or study.MEASURED, str(model_folder("llama")), text, out, say=said.append, **options)
    return said


def settings(out: Path) -> dict:
    return tables.read_manifest(out / made_up.SERIES)["settings"]


def slow(monkeypatch, factor: float) -> None:
    """A machine on which a pass through a layer takes ``factor`` seconds a token."""
    machine = Machine(forward=factor, backward=factor, readouts=factor, products=0)
    monkeypatch.setattr(study.Machine, "of", lambda *_: machine)


def test_the_most_important_part_comes_first_and_the_agenda_lists_its_files(measured, model_folder, text, tmp_path):
    run(model_folder, text, tmp_path, budget="none")
    assert measured == ["windows", "scan", "reversion", "calibration", "measures"]  # 4 layers have no anatomy
    agenda = agendas.Agenda.read(tmp_path)
    assert agenda.missing == []
    assert set(agenda.done["windows"].files) == {"series_windows.csv", "series_windows.manifest.json"}
    assert all(agenda.holds(tmp_path, name) for name in agenda.done)
    assert agenda.plan.left_out["anatomy"].startswith("it needs at least 6 layers")


def test_the_same_study_measures_nothing_twice_and_another_one_begins_anew(measured, model_folder, text, tmp_path):
    run(model_folder, text, tmp_path, budget="none")
    measured.clear()
    said = run(model_folder, text, tmp_path, budget="none")
    assert measured == []
    assert f"going on with the study in {tmp_path}: 5 of 5 parts are done" in said
    (tmp_path / "measures.csv").write_text("measure\n")  # changed: measured again
    run(model_folder, text, tmp_path, budget="none")
    assert measured == ["measures"]
    measured.clear()
    run(model_folder, text, tmp_path, budget="none", seed=1)
    assert measured[:2] == ["windows", "scan"]


def test_an_interrupted_study_leaves_a_page_and_goes_on_with_the_same_plan(
    measured, monkeypatch, model_folder, text, tmp_path
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    whole, out = tmp_path / "whole", tmp_path / "interrupted"
    run(model_folder, text, whole, budget="none")
    with monkeypatch.context() as interrupted:
        interrupted.setattr(series_part, "calibrate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model_folder, text, out, budget="none")
    page = (out / report.PAGE).read_text()
    assert "Not measured yet: calibration, measures. The same command goes on with that." in page
    measured.clear()
    monkeypatch.setattr(study.Machine, "of", lambda *_: pytest.fail("it was planned again"))
    run(model_folder, text, out, budget="none")
    assert measured == ["calibration", "measures"]
    assert "Not measured yet" not in (out / report.PAGE).read_text()
    assert {path.name: path.read_bytes() for path in out.glob("*.csv")} == {
        path.name: path.read_bytes() for path in whole.glob("*.csv")
    }


def test_a_small_budget_takes_fewer_prompts_and_the_page_says_what_was_cut(
    measured, monkeypatch, model_folder, text, tmp_path
):
    slow(monkeypatch, 9.5e-3)
    monkeypatch.setattr(study, "PARTS", (series_part.WINDOWS_PART,))
    said = run(model_folder, text, tmp_path, budget="2m")
    plan = agendas.Agenda.read(tmp_path).plan
    assert 0.5 * 120 < plan.seconds <= 120
    assert (plan.prompts, settings(tmp_path)["prompts"]) == (16, 16)
    assert any(line.startswith("Plan for a budget of 2 min: 16 prompts") for line in said)
    page = (tmp_path / report.PAGE).read_text()
    assert "What was planned, and what was cut" in page
    assert all(part.cut in page for part in plan.parts)


def test_a_budget_that_nothing_fits_into_is_refused_with_what_would(
    measured, monkeypatch, model_folder, text, tmp_path
):
    slow(monkeypatch, 10.0)
    with pytest.raises(ValueError, match=r"nothing fits into 60 s.*--budget"):
        run(model_folder, text, tmp_path, budget="1m")
    assert measured == []
    assert list(tmp_path.iterdir()) == []


def test_parts_that_take_longer_than_planned_cut_the_rest(measured, monkeypatch, model_folder, text, tmp_path):
    slow(monkeypatch, 1e-3)
    clock = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: clock[0])
    real = series_part.windows

    def long_windows(*arguments: object):
        clock[0] += 75
        return real(*arguments)

    monkeypatch.setattr(series_part, "windows", long_windows)
    said = run(model_folder, text, tmp_path, budget="2m")
    assert any(line.startswith("the parts so far took longer than planned, so the rest is cut.") for line in said)
    plan = agendas.Agenda.read(tmp_path).plan
    assert "the parts before it took longer than planned" in plan.left_out.values()
    assert plan.parts[0].name == "windows"


def test_the_plan_alone_measures_nothing_and_writes_nothing(measured, model_folder, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = study.plan(model=str(model_folder("llama")), text=text, budget="none")
    assert [part.name for part in plan.parts] == ["windows", "scan", "reversion", "calibration", "measures"]
    assert plan.seconds > 0
    assert measured == []
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_agenda_is_no_reason_to_stop(measured, model_folder, text, tmp_path):
    run(model_folder, text, tmp_path, budget="none")
    (tmp_path / agendas.FILE).write_text(json.dumps({"format": 1, "done": {}}))
    report.build(tmp_path)
    measured.clear()
    run(model_folder, text, tmp_path, budget="none")
    assert measured[0] == "windows"


def test_windows_killed_between_two_batches_go_on_to_the_same_table(monkeypatch, model_folder, text, tmp_path):
    def run(out, **options):
        arguments = [str(model_folder("llama")), text, out]
        return study.run(["series"], *arguments, budget="none", batch_size=8, max_length=2, **options)

    monkeypatch.setattr(study, "PARTS", (series_part.WINDOWS_PART,))
    run(tmp_path / "whole")
    real, calls = series_part.Recording.sums, []

    def sums(recording, prompts, advance):
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(recording, prompts, advance)

    monkeypatch.setattr(series_part.Recording, "sums", sums)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    assert len(list((tmp_path / "killed" / series_part.PIECES).iterdir())) == 2
    run(tmp_path / "killed")
    assert [prompts.start for prompts in calls] == [0, 8, 16, 16]
    assert not (tmp_path / "killed" / series_part.PIECES).exists()
    whole, killed = ((tmp_path / name / made_up.SERIES).read_bytes() for name in ("whole", "killed"))
    assert whole == killed
