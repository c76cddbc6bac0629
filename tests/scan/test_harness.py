"""The evaluation harness on our models must say what our own probes say."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from lm_eval import tasks as registry

from support import fixtures
from surgery import Stack, hooks
from surgery.corpus.probes import Probe, ProbeSet
from surgery.rebuild import tape
from surgery.scan import harness

WIRING = ":2 1:3 1:"

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
GENERATE = """
output_type: generate_until
generation_kwargs: {until: ["<eos>"], max_gen_toks: 1, do_sample: false}
doc_to_target: "{{said}}"
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: first, filter: [{function: take_first}]}
"""


@pytest.fixture
def questions(tmp_path):
    """Questions in the words of the test models, four choices each; a folder with two tasks that ask them."""
    generator = random.Random(0)
    words = [f"w{i}" for i in range(60)]
    probes = []
    for _ in range(18):
        choices = tuple(generator.sample(words, 4))
        probes.append(Probe(" ".join(generator.sample(words, 6)), generator.choice(choices), choices=choices))
    lines = [
        {"question": p.prompt, "choices": p.choices, "answer": p.choices.index(p.answer), "said": p.answer}
        for p in probes
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    for name, kind in [("our_choice", CHOICE), ("our_words", GENERATE)]:
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    return ProbeSet("ours", tuple(probes)), tmp_path


def own_choice(model, probes, wiring=":"):
    """The share of right choices by our own encoding and execution."""
    stack = Stack(model)
    encoded = probes.encode(stack)
    log_p = stack.run(encoded.tokens, wiring)[:, :-1].log_softmax(-1)
    each = log_p.gather(2, encoded.tokens.ids[:, 1:, None])[..., 0]
    loglik = (each * encoded.scored[:, 1:]).sum(1).reshape(-1, 4)  # the right choice comes first
    return float((loglik.argmax(1) == 0).double().mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_local_task_says_what_our_probes_say(name, load, questions):
    probes, folder = questions
    model = load(name)
    found = harness.tasks(model, ["our_choice"], include=folder)
    assert found[["task", "metric"]].to_numpy().tolist() == [["our_choice", "acc"]]
    share = own_choice(model, probes)
    assert found["value"].tolist() == [pytest.approx(share)]
    assert found["stderr"].tolist() == [pytest.approx((share * (1 - share) / 17) ** 0.5)]


def test_a_taped_model_and_an_intervention(load, questions):
    probes, folder = questions
    model = load("llama")
    clean, wired, skipped = (own_choice(model, probes, wiring) for wiring in (":", WIRING, ":1 2:"))
    assert len({clean, wired, skipped}) == 3  # or this test could not fail
    taped = harness.tasks(tape.together(model, WIRING), ["our_choice"], include=folder)
    assert taped["value"].tolist() == [pytest.approx(wired)]
    with model.hooks(fwd_hooks=hooks.skip(model, 1)):
        hooked = harness.tasks(model, ["our_choice"], include=folder)
    assert hooked["value"].tolist() == [pytest.approx(skipped)]
    assert harness.tasks(model, ["our_choice"], include=folder)["value"].tolist() == [pytest.approx(clean)]


def test_generation_limit_and_filters(load, questions):
    probes, folder = questions
    model = load("llama")
    stack = Stack(model)
    first = stack.run(stack.tokens([probe.prompt for probe in probes.probes]))[:, -1].argmax(-1)
    said = [fixtures.WORDS[i] for i in first]
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for line, word in zip(lines, said):
        line["said"] = word
    lines = [line for line in lines if line["said"].startswith("w")][:10]  # marks are not text
    for line in lines[::2]:
        line["said"] = "nothing"
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = harness.tasks(model, ["our_words"], include=folder, limit=10)
    assert found[["metric", "value"]].to_numpy().tolist() == [["exact_match (first)", 0.5]]


def test_worked_examples_are_drawn_by_the_seed(load, questions):
    model = load("llama")
    seeds = [0, 0, 1, 2, 3]
    found = [harness.tasks(model, ["our_choice"], include=questions[1], shots=3, seed=seed) for seed in seeds]
    assert found[0].equals(found[1])
    assert len({float(each["value"].iloc[0]) for each in found}) > 1


def test_nothing_of_the_callers_is_touched(load, questions, capfd):
    model = load("gpt2")
    vocabulary, special = len(model.tokenizer), dict(model.tokenizer.special_tokens_map)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    states = np.random.get_state()[1].tolist(), torch.get_rng_state()
    harness.tasks(model, ["our_choice"], include=questions[1], limit=4)
    assert np.random.get_state()[1].tolist() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (len(model.tokenizer), dict(model.tokenizer.special_tokens_map)) == (vocabulary, special)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert capfd.readouterr() == ("", "")


def test_generators_are_seeded_and_put_back():
    drawn = []
    for seed in (0, 0, 1):
        state = random.getstate()
        with harness._undisturbed(seed, progress=False):
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
        assert random.getstate() == state
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2]))


def test_what_cannot_be_asked(load, questions, monkeypatch):
    every = registry.TaskManager  # reads the thousands of tasks that the harness brings, for half a minute

    def only_own(include_path, include_defaults=False):
        return every(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(registry, "TaskManager", only_own)
    folder = questions[1]
    model = load("llama")
    for tasks, include, message in [
        ([], folder, "at least one task"),
        (["our_choise", str(folder / "our_words.yaml")], folder, "no task 'our_choise'; did you mean our_choice"),
        (["our_choice"], folder / "none", "no folder .*none"),
    ]:
        with pytest.raises(ValueError, match=message):
            harness.tasks(model, tasks, include=include)
    with pytest.raises(ValueError, match="no task 'zzz'; give a folder"):
        harness._require("zzz", ["our_choice"])
    (folder / "questions.jsonl").unlink()
    with pytest.raises(ValueError, match="the data of our_choice cannot be had"):
        harness.tasks(model, ["our_choice"], include=folder)
    with pytest.raises(ValueError, match="not a Hugging Face model with a tokenizer"):
        harness.tasks(fixtures.native(), ["our_choice"], include=folder)


def test_without_the_harness(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r'not installed.*pip install -e "\.\[eval\]"'):
        harness.tasks(load("llama"), ["lambada_openai"])
