"""SC and SL on streams whose content and language are known."""

import numpy as np
import pytest
import torch

from support.exact_networks import network
from surgery import Stack
from surgery.anatomy import convergence
from surgery.anatomy.convergence import Utterance
from surgery.corpus import parallel_sentences
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import weights
from surgery.stats.sampling import Sampling

CONTENTS, TONGUES = 6, 4
UTTERANCES = [Utterance(str(c), str(t), f"{c} {t}") for c in range(CONTENTS) for t in range(TONGUES)]


def stack(maps, monkeypatch):
    """Sentences are (any token, token of content c and language t): content in the first half of the stream."""
    generator = torch.Generator().manual_seed(0)
    what, how = torch.randn(CONTENTS, 8, generator=generator), torch.randn(TONGUES, 8, generator=generator)
    embedding = torch.cat([torch.cat([what[c], 2 * how[t]]) for c in range(CONTENTS) for t in range(TONGUES)])
    model = Stack(network(maps, embedding.reshape(-1, 16).double()))
    ids = {utterance.text: i for i, utterance in enumerate(UTTERANCES)}
    monkeypatch.setattr(model, "tokens", lambda texts: Tokens.of(torch.tensor([[0, ids[text]] for text in texts])))
    return model


def test_where_content_wins_is_where_language_is_taken_away_and_brought_back(monkeypatch):
    tongue = torch.diag(torch.cat([torch.zeros(8), torch.ones(8)])).double()
    nothing = torch.zeros(16, 16).double()
    curve = convergence.curve(
        stack([nothing, -0.9 * tongue, nothing, 9 * tongue, nothing], monkeypatch),
        UTTERANCES,
        sampling=Sampling(resamples=40),
    )
    frame = curve.frame
    assert (frame["difference"] > 0).tolist() == [False, False, True, True, False, False]
    assert curve.reach()[0].tolist() == [1, 3]
    assert (
        (frame["same_content_low"] <= frame["same_content"]) & (frame["same_content"] <= frame["same_content_high"])
    ).all()


def test_cosines_are_those_of_every_pair(monkeypatch):
    model = stack([torch.zeros(16, 16).double()], monkeypatch)
    frame = convergence.curve(model, UTTERANCES, sampling=Sampling(resamples=3)).frame
    x = model.stream(model.tokens([utterance.text for utterance in UTTERANCES]))[0, :, 1].double()
    x = x - x.mean(0)
    x = x / x.norm(dim=1, keepdim=True)
    pairs = [(i, j) for i in range(len(UTTERANCES)) for j in range(i)]
    same = [float(x[i] @ x[j]) for i, j in pairs if UTTERANCES[i].content == UTTERANCES[j].content]
    other = [float(x[i] @ x[j]) for i, j in pairs if UTTERANCES[i].language == UTTERANCES[j].language]
    assert frame["same_content"][0] == pytest.approx(np.mean(same))
    assert frame["same_language"][0] == pytest.approx(np.mean(other))


def test_a_model_without_content_has_no_reach(monkeypatch):
    model = stack([torch.diag(torch.cat([-torch.ones(8), torch.zeros(8)])).double()], monkeypatch)
    assert np.isnan(convergence.curve(model, UTTERANCES, sampling=Sampling(resamples=5)).reach()[0]).all()


def test_the_bundled_sentences_are_complete_and_distinct():
    assert len(parallel_sentences.TOPICS) == 12
    for texts in parallel_sentences.TOPICS.values():
        assert set(parallel_sentences.LANGUAGES) <= set(texts)
        assert set(texts) - set(parallel_sentences.LANGUAGES) in (set(), set(parallel_sentences.NOTATIONS))
    texts = [utterance.text for utterance in convergence.parallel()]
    assert len(texts) == len(set(texts)) == 12 * 8 + 6 * 3


def test_babel_asks_the_same_in_every_language():
    utterances = convergence.babel(5)
    assert len({utterance.content for utterance in utterances}) == 5
    assert len(utterances) == 20


def test_bad_input_is_refused(monkeypatch):
    model = stack([torch.zeros(16, 16).double()], monkeypatch)
    with pytest.raises(ValueError, match="1 contents in 4 languages"):
        convergence.curve(model, UTTERANCES[:4])
    with pytest.raises(ValueError, match="a content occurs twice"):
        convergence.curve(model, [*UTTERANCES, UTTERANCES[0]])
    with pytest.raises(ValueError, match="no sentences in Klingon"):
        convergence.parallel(["Klingon", "English"])


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_mean_cosines_of_resamples_are_those_of_one_resample_at_a_time(mean):
    vectors = mean + torch.randn(24, 9, generator=torch.Generator().manual_seed(0)).double()
    content, language = torch.arange(24) // 4, torch.arange(24) % 4
    same_content, same_language = (names[:, None] == names for names in (content, language))
    kinds = {"same_content": same_content & ~same_language, "neither": ~same_content & ~same_language}
    drawn = weights(6, 20)[:, content]
    found = convergence._mean_cosines(vectors @ vectors.T, drawn, kinds)
    for row, times in enumerate(drawn):
        centred = vectors - times @ vectors / times.sum()
        cosines = torch.nn.functional.normalize(centred, dim=1) @ torch.nn.functional.normalize(centred, dim=1).T
        for name, kind in kinds.items():
            often = kind * times[:, None] * (1 if name == "same_content" else times)
            plain = float((often * cosines).sum() / often.sum())  # NaN where a single content was drawn
            assert found[name][row] == pytest.approx(plain, abs=1e-9, nan_ok=True)
