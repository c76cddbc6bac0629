import collections
import json
import re
from dataclasses import replace

import pytest
import torch

import surgery
from support import fixtures
from surgery import Stack
from surgery.corpus import probes, questions
from surgery.corpus.babel import LANGUAGES, Babel, Problem
from surgery.corpus.probes import Probe, ProbeSet


@pytest.fixture(scope="module")
def stack():
    return Stack(surgery.load("babel"))


@pytest.fixture
def word_stack(load):
    """A random model that knows ``w0 w1 w2 ...`` and reads 64 tokens."""
    return Stack(load("llama"))


class Pieces:
    """A tokenizer that takes the longest piece it knows, without a beginning mark: seams can be straddled."""

    pad_token_id = unk_token_id = bos_token_id = eos_token_id = None
    bos_token = unk_token = None

    def __init__(self, *pieces, end=None):
        self.pieces, self.eos_token_id, self.end = pieces, end, [] if end is None else [end]
        self.eos_token = "</s>"

    def __call__(self, texts, return_attention_mask):
        return {"input_ids": [self.cut(text) + self.end for text in texts]}

    def cut(self, text):
        if not text:
            return []
        best = max((piece for piece in self.pieces if text.startswith(piece)), key=len)
        return [self.pieces.index(best), *self.cut(text[len(best) :])]

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


class Model:
    """As much of a model as encoding needs."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def cut(found, *pieces, **options):
    """What a model with a tokenizer of these pieces is scored on, piece by piece, and the encoded set."""
    stack = object.__new__(Stack)
    stack.model, stack.device = Model(tokenizer=Pieces(*pieces, **options)), torch.device("cpu")
    stack.name, stack.n_ctx, stack.d_vocab = "pieces", 64, len(pieces)
    encoded = found.encode(stack)
    return [[pieces[i] for i in row[keep]] for row, keep in zip(encoded.tokens.ids, encoded.scored)], encoded


def write(path, *entries):
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return path


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file(tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        {"prompt": "2 + 2 =", "answer": "4", "group": "sums", "choices": ["5", "4"]},
        "",
        {"prompt": "Grüße", "answer": " aus\u2028Köln"},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    found = probes.load(path, joiner="")
    assert (found.name, found.joiner, len(found)) == ("mine", "", 2)
    assert found.probes[0] == Probe("2 + 2 =", "4", "sums", ("5", "4"))
    assert found.probes[0].answers == ("4", "5")
    assert found.probes[1] == Probe("Grüße", " aus\u2028Köln")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"answer": "4"}', '"prompt" is missing'),
        ('{"prompt": "2"}', '"answer" is missing'),
        ('{"prompt": "2", "answer": 4}', '"answer" is not a string but 4'),
        ('{"prompt": null, "answer": "4"}', '"prompt" is not a string but null'),
        ('{"prompt": "2", "answer": "4", "group": []}', '"group" is not a string'),
        ('{"prompt": "2", "answer": "4", "choices": "4"}', '"choices" is not a list of strings but "4"'),
        ('{"prompt": "2", "answer": "4", "choices": [4]}', '"choices" is not a list of strings'),
        ('{"prompt": "2", "answer": "4", "anwser": "4"}', 'no field "anwser"; there are prompt, answer, group'),
        ('{"prompt": "2", "answer": " "}', "the answer is empty"),
        ('{"prompt": "2", "answer": "4", "choices": ["5"]}', "'4' is not among the choices"),
        ('{"prompt": "2", "answer": "4", "choices": ["4", "4"]}', "a choice occurs twice"),
        ('{"prompt": "2", "answer": "4", "choices": ["4", ""]}', "a choice is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", {"prompt": "2", "answer": "4"}, "", line, {"prompt": "2", "answer": "4"})
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: .*{re.escape(message)}") as caught:
        probes.load(path)
    assert "\n" not in str(caught.value)


def test_a_bad_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\x80\x81")
    for name, message in [
        ("empty.jsonl", "holds no probe"),
        ("binary.jsonl", "line 1 is not text: byte 1 is not UTF-8"),
        ("none.jsonl", "cannot read .*does not exist"),
        (".", "cannot read .*is a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            probes.load(tmp_path / name)


# --- encoding --------------------------------------------------------------------------------------------------------


def test_the_answers_tokens_are_scored(stack):
    found = ProbeSet("two", (Probe("p3 pf1 >other", "o2", "a"), Probe("o1 of1 of2 >spelled", "b a", "b")))
    encoded = found.encode(stack)
    words = [[Babel().vocabulary[i] for i in row] for row in encoded.tokens.ids.tolist()]
    assert words[0] == ["<bos>", "p3", "pf1", ">other", "o2", "<pad>", "<pad>"]
    assert [[w for w, s in zip(row, keep) if s] for row, keep in zip(words, encoded.scored)] == [["o2"], ["b", "a"]]
    assert encoded.tokens.mask.sum(1).tolist() == [5, 7]
    assert (encoded.probe, encoded.choice, encoded.groups) == ((0, 1), (0, 0), ("a", "b"))
    assert encoded.credit.tolist() == [[0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0.5, 0.5]]
    assert encoded.sha256 == found.sha256


def test_the_bundled_model_answers_its_probes(stack):
    """Greedy, teacher-forced, from the encoded rows alone: the whole path from corpus to scored tokens is right."""
    encoded = probes.babel(16, range(5), seed=3).encode(stack)
    said = stack.run(encoded.tokens)[:, :-1].argmax(-1) == encoded.tokens.ids[:, 1:]
    exact = (said | ~encoded.scored[:, 1:]).all(1)
    assert exact.float().mean() > 0.95
    assert (said * encoded.credit[:, 1:]).sum(1).mean() >= exact.float().mean()


def test_running_text_is_scored_from_its_second_token(word_stack):
    encoded = probes.text(["w1 w2 w3", "w4 w5"]).encode(word_stack)
    assert encoded.tokens.ids.tolist() == [[1, 5, 6, 7], [1, 8, 9, 0]]
    assert encoded.scored.tolist() == [[False, True, True, True], [False, True, True, False]]


def test_running_text_without_a_beginning_mark():
    scored, _ = cut(probes.text(["abc"]), "a", "b", "c")
    assert scored == [["b", "c"]]


def test_running_text_is_cut_and_read_from_files(tmp_path, word_stack):
    lines = ["w1 w2 w3", "w4 w5", "w6"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    write(tmp_path / "b.jsonl", *({"text": line} for line in lines))
    for name in ("a.txt", "b.jsonl"):
        found = probes.text(tmp_path / name, most=2, max_tokens=3)
        assert (found.name, len(found)) == (name, 2)
        assert found.encode(word_stack).tokens.ids.tolist() == [[1, 5, 6], [1, 8, 9]]
    assert probes.text(lines[:2]).sha256 != probes.text(lines[:2], max_tokens=3).sha256


def test_choices_have_a_row_each_the_right_one_first(stack):
    found = ProbeSet("c", (Probe("p3 >other", "o2", choices=("o1", "o2", "b a")), Probe("p1 >plain", "p1")))
    encoded = found.encode(stack)
    assert encoded.probe == (0, 0, 0, 1)
    assert encoded.choice == (0, 1, 2, 0)
    words = [
        " ".join(Babel().vocabulary[i] for i in row[keep]) for row, keep in zip(encoded.tokens.ids, encoded.scored)
    ]
    assert words == ["o2", "o1", "b a", "p1"]


def test_a_token_that_straddles_the_seam_belongs_to_the_answer():
    pieces = ("x", " ", "=", "=4", "4", "1")
    assert cut(ProbeSet("s", (Probe("x=", "41"),), joiner=""), *pieces)[0] == [["=4", "1"]]
    assert cut(ProbeSet("s", (Probe("x=", "14"),), joiner=""), *pieces)[0] == [["1", "4"]]
    assert cut(ProbeSet("s", (Probe("x=", "41"),)), *pieces)[0] == [[" ", "4", "1"]]
    both = ProbeSet("s", (Probe("x=", "1", choices=("1", "4")),), joiner="")
    assert cut(both, *pieces)[0] == [["=", "1"], ["=4"]]  # from the same token on


def test_the_joiner_stands_where_no_white_space_does():
    for prompt, answer in [("x", "y"), ("x ", "y"), ("x", " y")]:
        _, encoded = cut(ProbeSet("s", (Probe(prompt, answer),)), "x", "y", " ")
        assert encoded.tokens.ids.tolist() == [[0, 2, 1]]


def test_an_end_mark_that_the_tokenizer_adds_is_not_scored():
    assert cut(ProbeSet("s", (Probe("x", "y"),), joiner=""), "x", "y", "</s>", end=2)[0] == [["y"]]
    asked = ProbeSet("s", (Probe("x", "y</s>"),), joiner="")
    assert cut(asked, "x", "y", "</s>", end=2)[0] == [["y", "</s>", "</s>"]]  # asked for


def test_credit_is_shared_by_characters():
    _, encoded = cut(ProbeSet("s", (Probe("x =", "1234"), Probe("x =", "4"))), "x", " ", "=", "123", "4")
    assert encoded.credit.tolist() == [[0, 0, 0, 0, 0.75, 0.25], [0, 0, 0, 0, 1, 0]]
    _, blank = cut(ProbeSet("s", (Probe("", "x\n\n"),)), "x", "\n")
    assert blank.credit.tolist() == [[0, 0.5, 0.5]]


def test_what_cannot_be_asked_is_named(word_stack):
    good = Probe("w1", "w2")
    for bad, message in [
        (Probe("w1", "nothing"), "probe 2 .'w1'.* does not know"),
        (Probe("w1", "w2", choices=("w2", "nothing")), "probe 2 .'w1'.* does not know"),
        (Probe("w1 " * 70, "w2"), r"probe 2 .'w1 .*\.\.\..* has 72 tokens, the model reads 64"),
        (Probe("", "w1 " * 70), "71 tokens, .*cut the text with max_tokens=64"),
    ]:
        with pytest.raises(ValueError, match=message):
            ProbeSet("mine", (good, bad)).encode(word_stack)
    with pytest.raises(ValueError, match="the answer 'y' has no token of its own"):
        cut(ProbeSet("mine", (Probe("x", "y"),), joiner=""), "xy", "x", "y")  # one token: nothing predicts it
    with pytest.raises(ValueError, match=r"probe 1 \('x'\): has fewer than 2 tokens"):
        cut(probes.text(["x"]), "x")
    with pytest.raises(ValueError, match="no tokenizer"):
        ProbeSet("mine", (good,)).encode(Stack(fixtures.native()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProbeSet("none", ()), "none holds no probe"),
        (lambda: probes.text([]), "holds no probe"),
        (lambda: probes.text(["a b", " "]), "the text is empty"),
        (lambda: probes.text(["a b"], max_tokens=1), "at least 2"),
        (lambda: ProbeSet("one", (Probe("a", "b"),) * 3).split(), "one probe only"),
        (
            lambda: probes.named("babble"),
            "no probe set 'babble' .did you mean 'babel'.*; there are babel, babel-pairs, arithmetic",
        ),
        (lambda: probes.named("babel", 0), "at least 1"),
        (lambda: probes.babel(2, [1], targets=["latin"]), "no language 'latin'; there are plain"),
        (lambda: probes.babel(2, [1], group="length"), "'k', 'pair' or 'both'"),
        (lambda: questions.arithmetic(3, signs="+/"), "some of"),
        (lambda: questions.arithmetic(101, digits=[1], signs="+"), "only 100 different"),
        (lambda: questions.recall(3, words=["a", "b", "a"], pairs=[2]), "at least 4 different words, and there are 2"),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- splitting and hashing -------------------------------------------------------------------------------------------


def test_the_halves_cover_and_share_nothing():
    found = ProbeSet("n", tuple(Probe(str(i), "x", f"g{i % 7}") for i in range(41)))
    search, validation = found.split(seed=1)
    assert (search.name, validation.name) == ("n (search)", "n (validation)")
    assert set(search.probes) | set(validation.probes) == set(found.probes)
    assert not set(search.probes) & set(validation.probes)
    assert abs(len(search) - len(validation)) == 1
    counts = [collections.Counter(probe.group for probe in half.probes) for half in (search, validation)]
    assert all(abs(counts[0][group] - counts[1][group]) <= 1 for group in counts[0])
    assert search == found.split(seed=1)[0]
    assert search != found.split(seed=2)[0]
    assert [p for p in found.probes if p in set(search.probes)] == list(search.probes)  # in their order


def test_copies_of_a_probe_stay_together():
    found = ProbeSet("n", tuple(Probe(str(i % 5), "x") for i in range(20)), joiner="", max_tokens=9)
    halves = found.split()
    assert not set(halves[0].probes) & set(halves[1].probes)
    assert sum(map(len, halves)) == 20
    assert all((half.joiner, half.max_tokens) == ("", 9) for half in halves)


def test_the_hash_is_of_the_content():
    one = ProbeSet("a", (Probe("p", "q", "g", ("q", "r")), Probe("s", "t")))
    assert replace(one, name="b").sha256 == one.sha256
    changed = [
        replace(one, probes=one.probes[::-1]),
        replace(one, joiner=""),
        replace(one, max_tokens=5),
        *(
            replace(one, probes=(replace(one.probes[0], **change), one.probes[1]))
            for change in ({"prompt": "P"}, {"answer": "r"}, {"group": "h"}, {"choices": ("q", "s")})
        ),
    ]
    assert len({one.sha256, *(other.sha256 for other in changed)}) == 8


# --- generated -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", probes.NAMES)
def test_every_set_is_seeded_different_and_of_the_size_asked(name):
    found = probes.named(name, 61, seed=4)
    assert (found.name, len(found)) == (name, 61)
    assert found == probes.named(name, 61, seed=4)
    assert found.sha256 != probes.named(name, 61, seed=5).sha256
    assert len(set(found.probes)) == 61
    assert all(probe.group for probe in found.probes)
    sizes = collections.Counter(probe.group for probe in found.probes).values()
    assert max(sizes) - min(sizes) <= 1
    search, validation = found.split()
    assert {probe.group for probe in search.probes} == {probe.group for probe in validation.probes}


def test_a_set_stays_what_it_was():
    """Equal on every Python and platform, or results of different machines could not be compared."""
    assert {name: probes.named(name, 32).sha256[:8] for name in probes.NAMES} == {
        "babel": "c34de7cf",
        "babel-pairs": "755142ec",
        "arithmetic": "6a986517",
        "tracking": "d72fc1fb",
        "recall": "176631cf",
        "copying": "1e8bd2b9",
        "induction": "d198052a",
    }


@pytest.mark.parametrize("name", ["babel", "babel-pairs"])
def test_babel_in_the_models_words(stack, name):
    found = probes.named(name, 70)
    assert found.encode(stack).scored.any(1).all()
    assert {probe.group for probe in found.probes} == (
        {f"k={k}" for k in range(7)} if name == "babel" else {f"{a}>{b}" for a in LANGUAGES for b in LANGUAGES}
    )


def parsed(probe):
    """The problem a Babel probe asks, read back from its words."""
    *asked, request = probe.prompt.split()
    source = next(language for language in LANGUAGES if asked[0][0] == language[0] and language != "spelled")
    asked = asked[::-1] if source == "reversed" else asked
    return Problem(int(asked[0][1:]), tuple(int(word[2:]) for word in asked[1:]), source, request[1:])


def test_babel_is_right_held_out_and_from_the_languages_asked():
    languages = ["plain", "reversed"]
    for heldout in (True, False):
        found = probes.babel(20, [0, 1, 3], 5, sources=languages, targets=["other", "spelled"], heldout=heldout)
        for probe in found.probes:
            problem = parsed(probe)
            assert problem.source in languages
            assert problem.target in ("other", "spelled")
            assert probe.group == f"k={problem.k}"
            assert probe.answer.split() == Babel().answer(problem)
            assert Babel().heldout(problem) is heldout
    assert len(probes.babel(20, [0, 1, 3])) == 16 + 20 + 20  # that is all there is with k = 0
    both = probes.babel(1, [2], sources=["plain"], targets=["other"], group="both")
    assert both.probes[0].group == "k=2 plain>other"


def test_arithmetic_is_right():
    for spaced in (False, True):
        for probe in questions.arithmetic(90, seed=1, spaced=spaced):
            a, sign, b = re.fullmatch(r"(.*) ([-+*]) (.*) =", probe.prompt).groups()
            a, b, answer = (int(number.replace(" ", "")) for number in (a, b, probe.answer))
            assert answer == {"+": a + b, "-": a - b, "*": a * b}[sign]
            assert answer >= 0
            assert probe.group == f"{sign} digits={len(str(a))}"
            assert spaced or " " not in probe.answer


def test_tracking_is_right():
    for probe in questions.tracking(60, seed=1):
        start, *swaps, asked = probe.prompt.split(" . ")
        boxes = {line.split()[1]: line.split()[3] for line in start.split(" , ")}
        assert probe.group == f"swaps={len(swaps)}"
        for swap in swaps:
            _, one, _, other = swap.split()
            boxes[one], boxes[other] = boxes[other], boxes[one]
        assert boxes[asked.split()[1]] == probe.answer
        assert set(probe.choices) == set(boxes.values())


def test_recall_is_right():
    for probe in questions.recall(30, seed=1):
        table, asked = probe.prompt.split(" . ")
        values = dict(pair.split(" : ") for pair in table.split(" , "))
        assert values[asked.removesuffix(" :")] == probe.answer
        assert probe.choices == tuple(values.values())
        assert probe.group == f"pairs={len(values)}"
        assert not set(values) & set(values.values())


def test_copying_and_induction_are_right(word_stack):
    words = [f"w{i}" for i in range(20)]
    for probe in questions.copying(30, words=words):
        assert probe.prompt == f"{probe.answer} ="
        assert probe.group == f"words={len(probe.answer.split())}"
    found = questions.induction(30, words=words)
    for probe in found:
        seen = probe.prompt.split()
        assert seen.count(seen[-1]) == 2
        assert seen[seen.index(seen[-1]) + 1] == probe.answer
        assert probe.group == f"words={len(set(seen))}"
    assert ProbeSet("w", found).encode(word_stack).scored.sum() == 30
