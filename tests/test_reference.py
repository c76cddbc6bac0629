"""The bundled model is as good as its data card says."""

import json
from dataclasses import asdict

import pandas as pd
import pytest
import torch

import surgery
from surgery import models
from surgery.corpus.babel import Babel, exact

FOLDER = models.reference_folder()


@pytest.fixture(scope="module")
def stack():
    return surgery.Stack(surgery.load("babel"))


def test_it_was_trained_on_this_corpus(stack):
    recipe = json.loads((FOLDER / "recipe.json").read_text())
    assert recipe["corpus"] == asdict(Babel())
    assert stack.n_layers == recipe["recipe"]["n_layers"] >= 12
    assert sum(p.numel() for p in models.plain(stack.model).parameters()) <= 3_000_000
    assert stack.d_vocab == len(Babel().vocabulary)


def test_it_answers_held_out_problems_in_every_language_pair():
    table = pd.read_csv(FOLDER / "accuracy.csv")
    short = table[table.k <= 3]
    assert len(short) == 4 * 16
    assert short.exact.min() >= 0.95, short[short.exact < 0.95].to_string()


@pytest.mark.parametrize("k", range(5))
def test_the_table_is_what_the_weights_do(stack, k):
    """Held-out problems drawn anew, answered through the Stack: within sampling error of the accuracy table."""
    corpus = Babel()
    problems = corpus.sample(k, 320, seed=7)
    tokens, answers = corpus.encode(problems)
    predicted = stack.run(torch.from_numpy(tokens)).argmax(-1).numpy()
    found = exact(predicted, tokens, answers).mean()
    table = pd.read_csv(FOLDER / "accuracy.csv").query("k == @k")
    expected = table.exact.mean()
    spread = max(0.01, 3 * (expected * (1 - expected) / 320) ** 0.5)
    assert abs(found - expected) <= spread


def test_it_generates_what_it_scores(stack):
    """Greedy decoding with the key-value cache says the answers that teacher forcing counts as exact."""
    corpus = Babel()
    problems = [problem for problem in corpus.sample(2, 64, seed=3) if problem.target == "spelled"][:8]
    tokens, answers = corpus.encode(problems)
    right = exact(stack.run(torch.from_numpy(tokens)).argmax(-1).numpy(), tokens, answers)
    for problem, good in zip(problems, right, strict=True):
        question = torch.tensor([[corpus.token_ids[word] for word in corpus.question(problem)]])
        made = stack.model.generate(
            question, max_new_tokens=2, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
        )
        said = [corpus.vocabulary[token] for token in made[0, -2:].tolist()]
        assert (said == corpus.answer(problem)) == good


def test_words_it_does_not_know_are_refused(stack):
    with pytest.raises(ValueError, match=r"prompt 2 \('hello world'\) contains words"):
        stack.tokens(["p1 >plain", "hello world"])
