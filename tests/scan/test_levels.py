"""How much of a scan fits into a budget: rounds before fewer probes, never above what was asked for, the same again."""

import json
import math
from types import SimpleNamespace

import pytest

import surgery
from support import fixtures
from surgery import report
from surgery.corpus.probes import Probe, ProbeSet
from surgery.planning.machine import Machine
from surgery.planning.parts import Shape
from surgery.records import tables
from surgery.scan import levels, say, study

QUICK = Machine(forward=1e-6, backward=3e-6, readouts=1e-6, products=1e-14, half=0.5)
STOPPED = SimpleNamespace(monotonic=lambda: 0.0)  # a plan does not depend on how long it took to get there
WIRINGS = levels.repeats(12, 12)
SHAPE = Shape(
    n_layers=12,
    d_model=64,
    d_mlp=256,
    d_vocab=90,
    prompts=100,
    longest=10,
    tokens=1000,
    max_length=12,
    batch_size=64,
    half=0.5,
)


@pytest.fixture(scope="module")
def babel():
    return surgery.Stack(surgery.load("babel"))


def probe_set(count):
    return surgery.corpus.probes.named("babel", count)


def plan(babel, folder, monkeypatch, budget, speed=1e-6, **options):
    folder.mkdir(exist_ok=True)
    machine = Machine(speed, 3 * speed, speed, 1e-14, half=0.5)
    monkeypatch.setattr(Machine, "of", classmethod(lambda *_: machine))
    options = {"family": "repeat", "asked": {"seed": 0}} | options
    monkeypatch.setattr(levels, "time", STOPPED)
    return levels.plan(babel, probe_set(128), WIRINGS, folder, budget=budget, began=0.0, **options)


def test_levels_rise_from_rounds_in_bfloat16_to_the_full_scan_in_float32():
    listed = [(level.settings["share"], level.settings["precision"]) for level in levels.levels(SHAPE, WIRINGS)]
    assert listed == [*((share, "bf16") for share in levels.SHARES), (1, "bf16"), (1, "float32")]
    seconds = [QUICK.seconds(level.work) for level in levels.levels(SHAPE, WIRINGS)]
    assert seconds == sorted(seconds)
    cuts = [level.cut for level in levels.levels(SHAPE, WIRINGS)]
    assert cuts[0] == "90 % of a full scan (spans are searched in rounds)"
    assert cuts[-2:] == ["float32 in the search", ""]


def test_levels_keep_to_what_was_asked_for():
    rungs = levels.levels(SHAPE, WIRINGS, shares=(0.1, 0.2), precision="float32")
    assert [level.settings["precision"] for level in rungs] == ["float32", "float32"]
    assert rungs[0].cut == "50 % of the scan that was asked for (spans are searched in rounds)"
    assert rungs[1].cut == ""
    assert levels.levels(SHAPE, WIRINGS, shares=(0.05,))[0].fair


def test_what_is_planned_fits_and_more_time_never_buys_less(babel, tmp_path, monkeypatch):
    before = 0.0
    for number, budget in enumerate((20, 21, 22, 24, 40, 1000, math.inf)):
        made, again = plan(babel, tmp_path / str(number), monkeypatch, budget, speed=5e-5)
        assert not again
        assert made.seconds <= budget
        probes = made.prompts * min(1, made.parts[0].settings["share"] / levels.FAIR_SHARE)
        assert probes >= before
        before = probes
        if made.prompts < 128:
            assert made.parts[0].settings["share"] >= levels.FAIR_SHARE or made.prompts == levels.COUNTS[0]
    assert made.prompts == 128
    assert made.parts[0].settings == {"share": 1, "precision": "float32"}
    assert made.cuts == []


def test_a_plan_is_kept_whatever_the_machine_does_and_made_anew_for_another_command(babel, tmp_path, monkeypatch):
    first, _ = plan(babel, tmp_path, monkeypatch, 25, speed=5e-5)
    again, kept = plan(babel, tmp_path, monkeypatch, 25, speed=2e-4)
    assert kept
    assert again == first
    other, kept = plan(babel, tmp_path, monkeypatch, 25, speed=5e-5, share=0.1)
    assert not kept
    assert other.parts[0].settings["share"] == 0.1


def test_a_family_without_spans_is_scanned_whole_on_fewer_probes(babel, tmp_path, monkeypatch):
    made, _ = plan(babel, tmp_path, monkeypatch, 15, speed=5e-5, family="swap")
    assert made.parts[0].settings["share"] == 1
    assert made.prompts < 128


def test_a_budget_that_holds_no_scan_is_refused_in_words(babel, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no scan fits into 12 s, of which opening the model .* more with --budget"):
        plan(babel, tmp_path, monkeypatch, 12, speed=1e-2)
    assert list(tmp_path.iterdir()) == []


# --- a whole scan ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """One kind of question after the other, as files often are."""
    probes = ProbeSet("words", tuple(Probe(f"w{i} w{i + 1}", f"w{i + 2}", group=f"g{i // 20}") for i in range(40)))
    file = tmp_path_factory.mktemp("questions") / "words.jsonl"
    lines = [{"prompt": probe.prompt, "answer": probe.answer, "group": probe.group} for probe in probes.probes]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def scan(model, questions, folder, speed, monkeypatch, **options):
    machine = Machine(speed, 3 * speed, speed, 1e-14, half=0.5)
    monkeypatch.setattr(Machine, "of", classmethod(lambda *_: machine))
    for module in (levels, study):
        monkeypatch.setattr(module, "time", STOPPED)
    said = []
    outcome = study.run(str(model), "repeat", str(questions), folder, top=2, say=said.append, **options)
    return outcome, said


def test_a_scan_within_a_budget_says_what_it_cut_and_goes_on_with_its_plan(
    model_folder, questions, tmp_path, monkeypatch
):
    model, speed = model_folder("llama"), 15e-3 / fixtures.N_LAYERS
    outcome, said = scan(model, questions, tmp_path, speed, monkeypatch, budget="40s")
    assert any(line.startswith("Plan for a budget of 40 s: ") for line in said)
    settings = tables.read_manifest(tmp_path / study.TABLE)["settings"]["plan"]
    assert settings == dict(outcome.plan)
    assert settings["budget"] == 40
    asked = sum(tables.read_manifest(tmp_path / name)["tokens"]["prompts"] for name in (study.TABLE, study.CONTROLS))
    assert f"{asked} of 40 probes" in settings["cuts"]
    assert set(outcome.table["n_prompts"]) <= set(range(asked))
    sentence = say.planned(settings)[0]
    assert sentence.startswith(f"To fit into 40 s this was cut: {asked} of 40 probes")
    assert sentence in outcome.limits
    report.build(tmp_path)
    assert sentence in (tmp_path / report.PAGE).read_text()
    again, said = scan(model, questions, tmp_path, 100 * speed, monkeypatch, budget="40s")
    assert any(line.startswith("going on with the plan in ") for line in said)
    assert again.table.equals(outcome.table)
    assert again.winners.equals(outcome.winners)


def test_a_scan_without_limits_is_the_scan_that_it_always_was(model_folder, questions, tmp_path, monkeypatch):
    model = model_folder("llama")
    whole, _ = scan(model, questions, tmp_path / "whole", 1e-9, monkeypatch)
    none, _ = scan(model, questions, tmp_path / "none", 1e-9, monkeypatch, budget="none")
    assert none.table.equals(whole.table)
    assert whole.plan is None
    assert none.plan["cuts"] == []
    assert none.limits == whole.limits
    assert not (tmp_path / "whole" / levels.FILE).exists()


def test_what_is_no_budget_is_refused_before_the_model_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "load", lambda *_, **__: pytest.fail("the model was opened"))
    with pytest.raises(ValueError, match="'soon' is no budget"):
        study.run(out=tmp_path, budget="soon")
