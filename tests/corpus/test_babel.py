import collections

import numpy as np
import pytest

from surgery.corpus.babel import Babel, Problem, exact

CORPUS = Babel()


def test_a_problem_in_every_language_by_hand():
    f1, f4 = CORPUS.tables[1], CORPUS.tables[4]
    answer = int(f4[f1[3]])
    asked = {
        "plain": "<bos> p3 pf1 pf4 >plain",
        "other": "<bos> o3 of1 of4 >plain",
        "spelled": "<bos> b o sf1 sf4 >plain",
        "reversed": "<bos> rf4 rf1 r3 >plain",
    }
    for language, text in asked.items():
        problem = Problem(3, (1, 4), language, "plain")
        assert " ".join(CORPUS.words(problem)) == f"{text} p{answer} <eos>"
    spelled = CORPUS.answer(Problem(7, (), "plain", "spelled"))
    assert spelled == ["d", "o"]


def test_functions_are_different_bijections():
    assert CORPUS.tables.shape == (6, 10)
    assert (np.sort(CORPUS.tables, axis=1) == np.arange(10)).all()
    assert len({tuple(row) for row in CORPUS.tables}) == 6
    assert (Babel(seed=1).tables != CORPUS.tables).any()


def test_answers_are_uniform_at_every_length():
    for k in range(4):
        count = collections.Counter(CORPUS.solve(problem) for problem in CORPUS.problems(k, ["plain"], ["plain"]))
        assert len(set(count.values())) == 1
        assert len(count) == 10


def test_the_spelling_is_one_to_one():
    spelled = {tuple(CORPUS.answer(Problem(symbol, (), "plain", "spelled"))) for symbol in range(10)}
    assert len(spelled) == 10
    assert len({first for first, _ in spelled}) < 10  # no letter alone gives the symbol away
    assert len({second for _, second in spelled}) < 10


def test_held_out_problems():
    for k in (0, 1):  # one in ten of each language pair and function, each missing symbol taught by other pairs
        out = [problem for problem in CORPUS.problems(k) if CORPUS.heldout(problem)]
        assert len(out) == 16 * 6**k
        kept = {(p.symbol, p.chain) for p in CORPUS.problems(k) if not CORPUS.heldout(p)}
        assert len(kept) == 10 * 6**k
    for k in (2, 3):  # held out in every pair or in none
        sides = collections.defaultdict(set)
        for problem in CORPUS.problems(k):
            sides[problem.symbol, problem.chain].add(CORPUS.heldout(problem))
        assert all(len(side) == 1 for side in sides.values())
        share = np.mean([side == {True} for side in sides.values()])
        assert 0.07 < share < 0.13


def test_samples_are_seeded_balanced_and_from_the_side_asked():
    problems = CORPUS.sample(3, 64, seed=5)
    assert problems == CORPUS.sample(3, 64, seed=5)
    assert problems != CORPUS.sample(3, 64, seed=6)
    assert all(CORPUS.heldout(problem) and problem.k == 3 for problem in problems)
    pairs = collections.Counter((problem.source, problem.target) for problem in problems)
    assert set(pairs.values()) == {4}
    assert len(pairs) == 16
    assert not any(CORPUS.heldout(problem) for problem in CORPUS.sample(2, 32, seed=0, heldout=False))


def test_encoding_marks_the_answer_and_pads_on_the_right():
    problems = [Problem(3, (1,), "spelled", "spelled"), Problem(3, (), "plain", "plain")]
    tokens, answers = CORPUS.encode(problems)
    vocabulary = np.array(CORPUS.vocabulary)
    assert " ".join(vocabulary[tokens[1]]) == "<bos> p3 >plain p3 <eos> <pad> <pad> <pad>"
    assert vocabulary[tokens[0][answers[0]]].tolist() == CORPUS.answer(problems[0])
    assert vocabulary[tokens[1][answers[1]]].tolist() == ["p3"]


def test_exact_counts_a_spelled_answer_only_when_both_letters_are_right():
    tokens, answers = CORPUS.encode([Problem(3, (1,), "plain", "spelled")])
    predicted = np.roll(tokens, -1, axis=1)
    assert exact(predicted, tokens, answers).tolist() == [True]
    first, second = np.flatnonzero(answers[0])
    for place in (first, second):
        wrong = predicted.copy()
        wrong[0, place - 1] += 1
        assert exact(wrong, tokens, answers).tolist() == [False]
    elsewhere = predicted.copy()
    elsewhere[0, 0] += 1
    assert exact(elsewhere, tokens, answers).tolist() == [True]


def test_the_tokenizer_agrees_with_the_corpus(tmp_path):
    tokenizer = CORPUS.tokenizer()
    for problem in CORPUS.sample(2, 16, seed=0):
        tokens, _ = CORPUS.encode([problem])
        assert tokenizer(" ".join(CORPUS.words(problem)[1:]))["input_ids"] == tokens[0].tolist()


@pytest.mark.parametrize(("sizes", "message"), [({"n_symbols": 100}, "2 to 44"), ({"n_functions": 0}, "at least 1")])
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        Babel(**sizes)
