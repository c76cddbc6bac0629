"""A model compiled from end to end: files, sentences, a checkpoint that is the wiring; and what is refused."""

import json

import pandas as pd
import pytest
import torch
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from support import fixtures
from support.known_wirings import difference
from surgery.compiler import files, say, search, speed, study
from surgery.compiler import floor as floors
from surgery.records import tables
from surgery.report import build

OPTIONS = {"prompts": 24, "shallowest": 10, "rounds": 1}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The bundled model, compiled on a few easy problems."""
    folder = tmp_path_factory.mktemp("compiled")
    return study.run("babel", folder, allow=0.05, ways=("norms",), **OPTIONS), folder


def test_the_checkpoint_is_the_wiring_that_the_sentence_names(compiled):
    result, folder = compiled
    wiring = json.loads((folder / "compile_frontier.manifest.json").read_text())["settings"]["timed"]
    assert wiring in result.sentences[0]
    model = surgery.Stack(surgery.load("babel"))
    tokens = model.tokens(surgery.corpus.bundled.prompts(4))
    opened = surgery.Stack(surgery.load(str(result.folder)))
    assert opened.n_layers < 12
    assert difference(opened.run(tokens)[tokens.mask], model.run(tokens, wiring)[tokens.mask]) < 1e-5


def test_tables_figure_and_page_are_there(compiled):
    result, folder = compiled
    assert set(tables.read(folder / files.FRONTIER)["family"]) >= {"side by side", "left out", "both"}
    times = tables.read(folder / files.SPEED)
    assert times["model"].unique().tolist()[:3] == ["original", "compiled", "side by side, not fused"]
    assert (times.loc[times["model"] == "original", "ratio"] == 1).all()
    drafts = tables.read(folder / files.DRAFT)
    assert drafts["draft"].tolist() == ["compiled", "early exit of the same depth", "as many layers left out"]
    assert (drafts["shared"] > 0).all()
    assert (drafts["same"] == 1).all()
    healed = tables.read(folder / files.HEAL)
    assert healed["way"].tolist() == ["none", "norms"]
    assert healed["operations"].tolist()[0] == 0 < healed["operations"].tolist()[1]
    page = build(folder).read_text()
    for figure in ("compile.png", "compile_floor.png"):
        assert (folder / figure).stat().st_size > 10_000
    assert "From series to parallel" in page
    assert result.sentences[0][:40] in page


def test_the_same_command_again_measures_nothing_anew(compiled, monkeypatch):
    result, folder = compiled
    before = (folder / "scans" / "measured.csv").read_bytes()
    again = study.run("babel", folder, allow=0.05, **{**OPTIONS, "rounds": 0})
    pd.testing.assert_frame_equal(again.frontier, result.frontier)
    assert (folder / "scans" / "measured.csv").read_bytes() == before
    assert not (folder / files.SPEED).exists()


def test_where_nothing_is_allowed_nothing_is_saved(tmp_path):
    result = study.run("babel", tmp_path, allow=0.0, prompts=24, shallowest=11, rounds=0)
    assert result.folder is None
    assert "no wiring is shown to save a layer of 12" in result.sentences[0]


def test_a_model_that_cannot_be_fused_is_told(load, tmp_path):
    stack = surgery.Stack(load("olmo2"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(i * j) % 80}" for j in range(1, 9)) for i in range(1, 25)))
    halves = study.texts(stack, "olmo2", str(text), 24, 16)
    assert halves.metric == "loss"
    result = study.measure(stack, halves, tmp_path / "out", allow=10.0, shallowest=3, rounds=0)
    assert "norms all heads at once" in result.refused
    assert result.folder is None
    assert "It cannot be fused" in result.sentences[-1]


@pytest.fixture
def words(tmp_path):
    """A file of running text that a model of the matrix can read."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(i * j) % 80}" for j in range(1, 9)) for i in range(1, 49)))
    return str(text)


def test_branches_and_healing_stand_on_the_page_and_another_wiring_is_healed_anew(opened, words, tmp_path):
    stack = opened("llama")
    halves = study.texts(stack, "llama", words, 48, 16)
    run = {"ways": ("norms",), "families": tuple(search.FAMILIES), "rounds": 1, "shallowest": stack.n_layers - 2}
    out = tmp_path / "out"
    loose = study.measure(stack, halves, out, allow=10.0, **run)
    frame = tables.read(out / files.FRONTIER)
    assert (frame["saved"] % 1 != 0).any(), "branches save halves of layers"
    assert set(tables.read(out / files.DRAFT)["draft"]) >= {"compiled", "early exit of the same depth"}
    assert "Healed by norms" in "".join(loose.sentences)
    assert "What healing recovers" in build(out).read_text()
    tight = study.measure(stack, halves, out, allow=1e-9, **{**run, "shallowest": stack.n_layers - 1})
    assert tight.healed["way"].tolist() == ["none", "norms"]
    assert tight.folder is None


def test_a_healed_model_within_the_allowance_is_saved_and_is_the_answer(opened, words, tmp_path, monkeypatch):
    stack = opened("llama")
    halves = study.texts(stack, "llama", words, 48, 16)
    measured = study.heal.measure

    def well(*args, **options):
        frame = measured(*args, **options)
        return frame.assign(cost=[1e-3, 1e-5], cost_low=[5e-4, 0.0], cost_high=[2e-3, 2e-5])

    monkeypatch.setattr(study.heal, "measure", well)
    monkeypatch.setattr(study.frontier, "best", lambda frame, allow: frame[frame["saved"] == 0].iloc[0])
    result = study.measure(
        stack, halves, tmp_path, allow=1e-4, ways=("norms",), rounds=0, shallowest=stack.n_layers - 1
    )
    assert result.folder is not None
    assert surgery.load(str(result.folder)).cfg.n_layers == stack.n_layers - 1
    assert f"yes, healed: 1 of {stack.n_layers} layers" in build(tmp_path).read_text()


def test_too_few_texts_are_refused(opened, tmp_path):
    text = tmp_path / "few.txt"
    text.write_text("\n".join(f"w{i} w{i + 1} w{i + 2}" for i in range(8)))
    with pytest.raises(ValueError, match=r"8 texts are too few .* give 12 or more"):
        study.texts(opened("llama"), "llama", str(text), 192, 16)


def test_questions_of_a_file_are_judged_by_their_answers(opened, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"w{i} w{i + 1}", "answer": f"w{i + 2}"}) for i in range(24)))
    halves = study.texts(opened("llama"), "llama", str(file), 24, 16)
    assert halves.metric == "loglik"
    assert len(halves.chosen_by.groups) == 6
    assert len(halves.measured_on.groups) == 12


def test_every_group_of_questions_is_in_each_part(opened, tmp_path):
    lines = [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i + 2}", "group": "abc"[i % 3]} for i in range(36)]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, [*lines, lines[0]])))
    halves = study.texts(opened("llama"), "llama", str(file), 36, 16)
    parts = [{tuple(ids) for ids in part.tokens.ids.tolist()} for part in (halves.chosen_by, halves.measured_on)]
    assert not parts[0] & parts[1], "all copies of a question are in one part"
    for part in (halves.chosen_by, halves.measured_on):
        assert set(part.groups) == set("abc")


def test_another_allowance_replaces_the_compiled_model(tmp_path):
    run = {"prompts": 24, "shallowest": 10, "rounds": 0}
    loose = study.run("babel", tmp_path, allow=100.0, **run)
    assert surgery.load(str(loose.folder)).cfg.n_layers == 10
    assert study.run("babel", tmp_path, allow=0.0, **run).folder is None
    assert not (tmp_path / "compiled").exists()


def test_speed_is_told_side_by_side():
    config = LlamaConfig(**fixtures._rope)
    deep, shallow = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    shallow.model.layers = shallow.model.layers[:1]
    shallow.config.num_hidden_layers = 1
    frame = speed.measure({"deep": deep, "shallow": shallow}, batches=(2,), prompt=8, written=4, rounds=3, d_vocab=90)
    assert frame["phase"].tolist() == ["prefill", "prefill", "decode", "decode"]
    assert (frame.loc[frame["model"] == "deep", ["ratio", "floor"]] == 1).all(axis=None)
    assert (frame.loc[frame["model"] == "shallow", "floor"] > 1).all()
    assert (frame["ratio_low"] <= frame["ratio"]).all()
    assert (frame["per_second"] > 0).all()


def test_every_step_that_is_timed_as_compiled_is_compiled(monkeypatch):
    traced, torch_compile = [], torch.compile

    def backend(graph, inputs):
        traced.append(len(graph.graph.nodes))
        return graph

    monkeypatch.setattr(torch, "compile", lambda model: torch_compile(model, backend=backend))  # no minutes of C++
    models = {name: LlamaForCausalLM(LlamaConfig(**fixtures._rope)).eval() for name in ("one", "two")}
    timed = {"batches": (1, 2), "prompt": 8, "written": 12, "rounds": 2, "d_vocab": 90, "compiled": True}
    frame = speed.measure(models, **timed)
    assert frame.groupby("runs").size().to_dict() == {"plain": 8, "torch.compile": 8}
    assert 0 < len(traced) <= 2 * 2 * 2, "models, batches and phases: none for a later token"
    torch._dynamo.reset()
    monkeypatch.setattr(speed, "_ONLY_COMPILED", dynamo.patch(recompile_limit=1, fail_on_recompile_limit_hit=True))
    with pytest.raises(FailOnRecompileLimitHit):
        speed.measure(models, **timed)
    torch._dynamo.reset()


def test_the_floor_is_layers_bytes_and_operations():
    machine = floors.Machine(layer=1e-3, byte=1e-9, operation=1e-12)
    floor = floors.Floor(layers=10, weights=1_000_000, machine=machine)
    assert floor.seconds("decode", 1, 128) == pytest.approx(0.01 + 4e-3)
    half = floors.Floor(layers=10, weights=1_000_000, machine=machine, size=2)
    assert half.seconds("decode", 1, 128) == pytest.approx(0.01 + 2e-3)
    assert floor.seconds("prefill", 16, 1024) == pytest.approx(0.01 + 2 * 1e6 * 16 * 1024 * 1e-12)


def test_sentences_name_the_allowance_and_the_rivals():
    rows = [("side by side", 12, 0, 0.0, 0.0, 0.0), ("side by side", 11, 1, 0.002, 0.0, 0.004)]
    rows += [("side by side", 10, 2, 0.03, 0.02, 0.04), ("left out", 10, 2, 0.3, 0.2, 0.4)]
    rows += [
        ("left out", 12, 0, 0.0, 0.0, 0.0),
        ("random pairs", 10, 2, 0.5, 0.4, 0.6),
        ("random pairs", 10, 2, 0.7, 0.4, 0.8),
    ]
    frame = pd.DataFrame(rows, columns=["family", "depth", "saved", "cost", "cost_low", "cost_high"])
    frame = frame.assign(wiring=["w" + str(place) for place in range(len(frame))], n_prompts=40)
    told = say.sentences({files.FRONTIER: frame}, 0.01, "loss", 12, "")
    assert told[0].startswith("On 40 fresh texts 1 of 12 layers in a row are saved for 0.01 nats a token, side by side")
    assert "0.05: 2 side by side, 0 left out" in told[1]
    assert "random pairs +0.500 to +0.700" in told[2]
