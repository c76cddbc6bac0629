"""A whole scan on the bundled model, through the library and the command line."""

import html
import json
from collections import Counter
from dataclasses import asdict

import pandas as pd
import pytest
import transformers
from typer.testing import CliRunner

import surgery
from support.pages import section as part
from support.pages import words
from support.places import SHARED
from surgery import report, scan
from surgery.cli import app
from surgery.corpus import bundled, probes
from surgery.corpus.probes import Probe, ProbeSet
from surgery.models import stack
from surgery.records import tables
from surgery.scan import controls, study

FILES = tuple(f"scan_{name}.csv" for name in ("controls", "groups", "search", "table", "validation", "winners"))


@pytest.fixture(scope="module")
def babel():
    return surgery.Stack(surgery.load("babel"))


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan")
    result = study.run(family="parallel", out=folder, count=28, top=3)
    report.build(folder)
    return folder, result


def test_what_a_scan_leaves_behind(scanned):
    folder, result = scanned
    assert sorted(path.name for path in folder.glob("*.csv")) == sorted(FILES)
    for name in FILES[1:]:
        assert len(tables.read(folder / name))
    assert tables.read(folder / FILES[0]).empty, "none of another family"
    assert {path.name for path in folder.glob("*.png")} == {"pareto.png", "group_bars.png"}
    assert len(result.table) == 66
    assert len(result.winners) == 3
    assert result.luck.wirings == 66
    assert set(result.groups["wiring"]) == set(result.winners["wiring"])
    assert result.groups["group"].nunique() == 7


def test_the_halves_share_no_probe_and_the_winners_are_the_best_of_the_first(scanned):
    folder, result = scanned
    table, winners = result.table, result.winners
    search, validation = (tables.read(folder / name) for name in ("scan_search.csv", "scan_validation.csv"))
    assert search["prompt"].nunique() + validation["prompt"].nunique() == 28
    assert winners["wiring"].tolist() == table.nlargest(3, "gain")["wiring"].tolist()
    assert set(validation["metric"]) == {"loglik", "exact"}
    again = validation[(validation["wiring"] == winners["wiring"][0]) & (validation["metric"] == "loglik")]
    assert winners["gain_validation"][0] == pytest.approx((again["value"] - again["baseline"]).mean())


def test_a_model_is_proven_and_hashed_once_and_every_half_encoded_once(model_folder, tmp_path, monkeypatch):
    """However many scans, tables and manifests a run makes of them."""
    probe_set = ProbeSet("words", tuple(Probe(f"w{i} w{i + 1}", f"w{i + 2}", group=f"g{i % 2}") for i in range(12)))
    questions = tmp_path / "words.jsonl"
    questions.write_text("\n".join(json.dumps(asdict(probe)) for probe in probe_set.probes))
    counts: Counter[str] = Counter()
    texts: Counter[tuple[str, ...]] = Counter()

    def counted(name, function):
        def count(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return count

    def tokenize(self, text, *args, **kwargs):
        texts[tuple(text)] += 1
        return call(self, text, *args, **kwargs)

    call = transformers.PreTrainedTokenizerBase.__call__
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "__call__", tokenize)
    monkeypatch.setattr(stack, "weights_sha256", counted("hashed", stack.weights_sha256))
    monkeypatch.setattr(stack.Stack, "_settle", counted("proven", stack.Stack._settle))
    monkeypatch.setattr(ProbeSet, "encode", counted("encoded", ProbeSet.encode))
    study.run(str(model_folder("llama")), "repeat", str(questions), tmp_path / "results", top=2)
    assert (counts["proven"], counts["hashed"], counts["encoded"]) == (1, 1, 4)  # the halves, all, other answers
    for half in probe_set.split(0):
        assert texts[tuple(probe.prompt for probe in half.probes)] == 1
        assert texts[tuple(f"{probe.prompt} {probe.answer}" for probe in half.probes)] == 1


def test_the_same_command_changes_nothing(scanned):
    folder, result = scanned
    before = {name: (folder / name).read_bytes() for name in FILES}
    again = study.run(family="parallel", out=folder, count=28, top=3)
    pd.testing.assert_frame_equal(result.table, again.table)
    assert result.sentences == again.sentences
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_on_the_command_line(tmp_path):
    done = CliRunner().invoke(app, ["scan", "--family", "swap", "--count", "14", "--top", "2", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for said in (
        "66 wirings were tried on 7 prompts. ",
        "measured again on 7 prompts that took no part in the choice",
        "By group, on the validation half",
        "The model as it is: ",
        "7 prompts in the search half, fewer than 128: only large effects can be shown",
        str(tmp_path / "report.html"),
    ):
        assert said in done.output, said
    assert (tmp_path / "report.html").exists()


def test_the_page_of_a_scan_says_what_the_scan_says(scanned):
    folder, result = scanned
    page = (folder / "report.html").read_text()
    for sentence in result.sentences:
        assert sentence in words(page)
    assert report.summary(folder) == result.sentences[: len(report.summary(folder))]
    section = html.unescape(part(page, "scan"))
    for row in result.winners.itertuples():
        assert f"<td><code>{row.wiring}</code></td><td>{row.gain_search:.3f}" in section
        assert f"{row.gain_validation:.3f}" in section
        assert f"<td>{row.verdict}</td>" in section


def test_probes_of_one_group_have_no_bars(babel, tmp_path):
    texts = probes.text(bundled.prompts(8))
    result = study.measure(babel, texts, tmp_path, metric="loss", longest=1, top=2)
    assert result.table["wiring"].tolist() == ["0 :", *(f":{i + 1} {i}:" for i in range(1, 11)), ": 11"]
    assert result.groups.empty
    report.build(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"brain_scan.png", "pareto.png"}
    assert "nats per token" in (tmp_path / "report.html").read_text()


def test_painters_are_one_call(babel):
    probe_set = probes.named("babel", 14)
    table = study.painters(babel, probe_set, sizes=[2, 10])
    assert len(table) == len(controls.painters(12, [2, 10]))
    assert set(table["variant"]) == set(controls.painters(12, [2])["variant"])
    skipped = table[(table["variant"] == "skip") & (table["size"] == 10)].iloc[0]
    rows = scan.run(babel, [skipped["wiring"]], probe_set, metrics=("loglik",))
    assert skipped["gain"] == pytest.approx((rows["value"] - rows["baseline"]).mean())
    assert skipped["gain"] < table.loc[table["size"] == 2, "gain"].min(), "ten layers are missed more than two"


def test_painters_on_the_command_line(tmp_path):
    options = ["scan", "--family", "painters", "--count", "14", "--top", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    table = tables.read(tmp_path / "painters.csv")
    assert sorted(set(table["size"])) == list(range(2, 12))
    assert {path.name for path in tmp_path.glob("*.png")} == {"painters.png", "group_bars.png"}
    assert "A centred window of 7 layers, from the least harmful change on" in (tmp_path / "report.html").read_text()


def test_too_few_probes_for_two_halves(babel, tmp_path):
    with pytest.raises(ValueError, match="a scan needs at least 4 different probes, half of them to validate on, and"):
        study.measure(babel, probes.text(["p1 >other o1"] * 9), tmp_path)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--family", "repaet"], 2, "'--family': there is no 'repaet', did you mean 'repeat'? There are repeat, skip,"),
        (["--probes", "nonsense"], 1, "there is no probe set 'nonsense'"),
        (["--metric", "accuracy"], 2, "'--metric': there is no 'accuracy'. There are loglik, exact, credit, loss, kl,"),
    ],
)
def test_bad_requests(options, code, message, tmp_path):
    done = CliRunner().invoke(app, ["scan", *options, "--out", str(tmp_path)])
    assert done.exit_code == code
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "sideways"}, "there is no family 'sideways'; there are repeat"),
        ({"metric": "accuracy", "count": 14}, "no metric 'accuracy'"),
    ],
)
def test_bad_requests_to_the_library(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        study.run(out=tmp_path, **settings)


def test_tape_on_the_command_line(tmp_path):
    done = CliRunner().invoke(app, ["tape", ":3 1:", "--out", str(tmp_path / "taped")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "taped" / "model.safetensors").exists()
    refused = CliRunner().invoke(app, ["tape", ":3 {3|4} 5:", "--out", str(tmp_path / "group")])
    assert refused.exit_code == 1
    assert "a plain checkpoint cannot express" in refused.output.replace("\n", " ")


def test_a_model_without_questions_of_its_own_is_asked_what_it_should_be_asked(model_folder, tmp_path):
    done = CliRunner().invoke(app, ["scan", "--model", str(model_folder("llama")), "--out", str(tmp_path / "none")])
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    assert "llama be asked? It has no questions of its own: name a built-in set with" in said
    assert "(arithmetic, tracking, recall, copying, induction), a .jsonl file of questions" in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("questions", ["babel", "arithmetic", "tracking", "recall", "copying", "induction"])
def test_a_story_model_wins_at_nothing_that_it_cannot_do(stories, questions, tmp_path):
    stack = surgery.Stack(surgery.load(stories))
    result = study.measure(stack, probes.named(questions, 64), tmp_path, longest=2, top=3)
    assert not result.baseline.done
    assert set(result.winners["verdict"]) <= {"not above chance", "no gain"}
    assert len(result.sentences) == 2
    assert "It is not shown to do this task" in result.sentences[0]
    assert "So no winner is named" in result.sentences[1]


def test_a_story_model_reads_stories_and_no_repeat_reads_them_better(stories, tmp_path):
    lines = [json.loads(line)["text"] for line in (SHARED / "text" / "tinystories_100.jsonl").read_text().splitlines()]
    (tmp_path / "stories.txt").write_text("\n".join(" ".join(line.split()) for line in lines))
    result = study.run(str(stories), questions=str(tmp_path / "stories.txt"), out=tmp_path, count=40, top=3)
    assert (result.metric, result.baseline.measure, result.baseline.done) == ("loss", "loss", True)
    assert "nats per token" in result.sentences[0]
    assert not result.winners["verdict"].str.startswith("survived").any()


def test_a_share_of_a_scan_is_searched_in_rounds(tmp_path):
    result = study.run(out=tmp_path, count=56, share=0.15, top=3)
    assert 0.1 < result.effort.share <= 0.15
    assert len(result.table) == 78
    assert result.winners["wiring"].tolist() == result.table["wiring"].head(3).tolist()
    assert result.winners["gain_search"].tolist() == result.table["gain"].head(3).tolist()
    assert not (tmp_path / "scan_search.csv").exists()
    assert len(list((tmp_path / study.ROUNDS).glob("*.csv"))) == result.effort.rounds
    written = tables.read_manifest(tmp_path / study.TABLE)
    assert written["settings"]["effort"] == asdict(result.effort)
    assert written["columns"]["gain"].startswith("what a full scan of the search half would read")
    page = words(report.build(tmp_path).read_text())
    said = [sentence for sentence in result.sentences if "successive halving" in sentence]
    assert len(said) == 1
    assert said[0].split(" The largest")[0] in page


def test_a_share_needs_spans():
    with pytest.raises(ValueError, match="repeat or skip"):
        study.run(family="swap", share=0.2)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        study.run(share=0)
