"""A draft changes nothing but the time: the text is the original's, whoever drafts and whatever the two share."""

import math

import pandas as pd
import pytest
import torch

from support import fixtures
from surgery.compiler import acceptance, draft, draft_speed, shared_cache
from surgery.models.errors import ModelError
from surgery.models.loading import plain
from surgery.rebuild import fuse, tape
from surgery.wiring.value import Wiring

PROMPT = torch.tensor([[1, 17, 40, 23, 9, 61]])
LONG = torch.tensor([[1, 17, 40, 23, 9, 61, 5, 33, 70, 12, 88]])  # twice the window of the models that have one
PAIR = ":1 {1.attn | 2.attn} {1.mlp | 2.mlp} 3:"
TWICE = ":3 1:"


def greedy(model, count, prompt=PROMPT, **options):
    return model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, **options)


def tensors(part):
    return {id(tensor) for tensor in part.model.parameters()}


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gpt_neox", "opt", "mistral", "gemma2", "gemma3", "mixtral"])
def test_the_text_is_the_original_s(opened, name):
    model = opened(name).model
    models = draft.pair(model, ":2 3:")
    assert models.n_shared == 2, "the layers before the first that differs"
    expected = greedy(plain(model), 14, LONG)
    for block in (1, 4):
        assert torch.equal(draft.write(models, LONG, 14, block=block).ids, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_early_exits_compiled_drafts_and_strangers(opened, name):
    model = opened(name).model
    expected = greedy(plain(model), 14, LONG)
    for other, n_shared in ((":2", 2), (PAIR, 1), (fixtures.hugging_face(name, seed=7), 0), (plain(model), 3)):
        made = draft.generate(model, other, LONG, 14, block=3)
        assert torch.equal(made.ids, expected)
        assert made.n_shared == n_shared
        assert 0 <= made.acceptance <= 1


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_taped_model_drafts_and_is_drafted_for(opened, name):
    model = opened(name).model
    twice, pair = tape.together(model, TWICE), tape.together(model, PAIR)
    for original, drafter, n_shared in ((twice, model, 3), (pair, model, 1), (twice, pair, 1)):
        expected = greedy(plain(original), 12, LONG)
        made = draft.generate(original, drafter, LONG, 12, block=3)
        assert torch.equal(made.ids, expected)
        assert made.n_shared == n_shared


@pytest.mark.parametrize("draft_wiring", [":2", PAIR])
def test_hugging_face_s_own_assisted_generation_takes_taped_models(opened, draft_wiring):
    model = opened("llama").model
    assistant = plain(tape.together(model, draft_wiring))
    for original in (model, tape.together(model, TWICE)):
        text = greedy(plain(original), 16, assistant_model=assistant)
        assert torch.equal(text, greedy(plain(original), 16))
        assert torch.equal(text, draft.generate(original, assistant, PROMPT, 16).ids)


def test_weights_are_shared_and_only_fused_layers_are_new(opened):
    model = opened("llama").model
    models = draft.pair(model, PAIR)
    own = {id(tensor) for tensor in plain(model).parameters()}
    assert tensors(models.shared) <= own
    assert tensors(models.original) <= own
    new = [tensor for tensor in models.draft.model.parameters() if id(tensor) not in own]
    inside = {id(tensor) for tensor in shared_cache.layers_of(models.draft.model)[0].parameters()}
    assert new
    assert {id(tensor) for tensor in new} <= inside, "layer 3 and the readout are the original's"


def test_shared_keys_are_kept_once_and_all_are_cut_together(opened):
    models = draft.pair(opened("mistral").model, PAIR)
    cache = shared_cache.SharedCache(models)
    cache.logits(models.draft, LONG, 1)
    cache.logits(models.original, LONG, 1)
    assert [len(of.layers) for of in cache.of.values()] == [1, 3, 2]
    cache.forget(7)
    assert [of.read for of in cache.of.values()] == [7, 7, 7]
    assert [layer.get_seq_length() for of in cache.of.values() for layer in of.layers] == [7] * 6
    again = cache.logits(models.original, LONG, 4)
    whole = plain(opened("mistral").model)(LONG).logits[:, -4:]
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-5)


def test_layers_that_only_look_alike_are_not_shared(opened):
    model = plain(opened("llama").model)
    for change in ("weight", "embedding", "setting"):
        other = fixtures.hugging_face("llama")
        with torch.no_grad():
            if change == "weight":
                other.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
            elif change == "embedding":
                other.model.embed_tokens.weight[90] += 1
            else:
                other.model.layers[1].self_attn.scaling *= 2
        models = draft.pair(model, other)
        assert models.n_shared == {"weight": 2, "embedding": 0, "setting": 1}[change]


def test_the_original_as_its_own_draft_is_kept_whole(opened):
    original = plain(opened("llama").model)
    made = draft.generate(original, original, PROMPT, 21, block=4)
    assert made.kept == (4, 4, 4, 4)
    assert (made.acceptance, made.per_step) == (1, 5)


def test_the_model_stays_as_it_was(opened):
    model = plain(opened("llama").model)
    before = [(type(module), dict(module._forward_hooks), set(vars(module))) for module in model.modules()]
    draft.generate(model, fixtures.hugging_face("llama"), PROMPT, 4)
    assert before == [(type(module), dict(module._forward_hooks), set(vars(module))) for module in model.modules()]
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_texts(opened, count):
    original = plain(opened("llama").model)
    made = draft.generate(original, original, PROMPT, count)
    assert made.ids.shape[1] == PROMPT.shape[1] + count
    assert torch.equal(made.ids, greedy(original, count) if count else PROMPT)


def test_agreement_is_counted_and_predicts_what_a_step_keeps(opened):
    stack = opened("llama")
    tokens = stack.tokens([" ".join(f"w{(i * j) % 80}" for j in range(1, 20)) for i in range(1, 9)])
    assert acceptance.agreement(stack, ":", tokens) == 1
    shared = acceptance.agreement(stack, PAIR, tokens)
    same = (stack.run(tokens).argmax(-1) == stack.run(tokens, PAIR).argmax(-1))[tokens.mask]
    assert shared == pytest.approx(float(same.double().mean()))
    assert draft_speed.agreement(draft.pair(stack.model, PAIR), tokens) == pytest.approx(shared)
    early = acceptance.agreement(stack, ":2", tokens)
    assert draft_speed.agreement(draft.pair(stack.model, ":2"), tokens) == pytest.approx(early)
    known = acceptance.singles(stack, tokens)
    assert known["disagreement"][1] == pytest.approx(1 - shared)
    assert acceptance.combined(known, stack.wiring(PAIR)) == pytest.approx(shared)
    per_step, speed = draft_speed.expected(0.5, 2, 0.25)
    assert per_step == pytest.approx(1 + 0.5 + 0.25)
    assert speed == pytest.approx(1.75 / 1.5)
    assert draft_speed.expected(1.0, 3, 0.5) == (4, pytest.approx(1.6))
    assert draft_speed.expected(0.5, 2, 0.25, shared=0.2, further=0.5)[1] == pytest.approx(1.75 / (0.5 + 0.2 + 1.6))
    assert draft_speed.expected(0.5, 2, 0.25, shared=0.2) == draft_speed.expected(0.5, 2, 0.25)


def test_agreement_is_predicted_from_the_other_pairs_alone():
    S = [0.05, 0.1, 0.2, 0.4, 0.1, 0.3, 0.6, 0.2, 0.15, 0.5, 0.25]
    known = pd.DataFrame({"layer": range(11), "S": S, "disagreement": [0.2 * s**1.5 for s in S], "n_tokens": 10**7})
    wiring = Wiring.parse(f":2 {fuse.group((2, 3))} 4:6 {fuse.group((6, 7))} 8:", 12)
    true = acceptance.combined(known, wiring)
    inside = known["layer"].isin([2, 6])
    predicted = acceptance.predict(known.assign(disagreement=known["disagreement"].where(~inside, 0.9)), wiring)
    assert predicted.middle == pytest.approx(true, abs=1e-3)
    assert predicted.low <= predicted.middle <= predicted.high
    noise = [1.5, 0.5, 1, 2, 0.7, 1.2, 1, 0.4, 2, 0.6, 1.1]
    scattered = acceptance.predict(known.assign(disagreement=known["disagreement"] * noise), wiring)
    assert scattered.low < true < scattered.high
    assert scattered.high - scattered.low > 10 * (predicted.high - predicted.low)
    for other in (":10", ":", ":3 5:"):
        assert math.isnan(acceptance.predict(known, Wiring.parse(other, 12)).middle)


def test_intervals_of_the_prediction_hold_as_often_as_they_say():
    """The null: pairs that scatter about a line, of which the wiring's are drawn like all others."""
    rng, covered, total = torch.Generator().manual_seed(0), 0, 200
    wiring = Wiring.parse(f":2 {fuse.group((2, 3))} 4:6 {fuse.group((6, 7))} 8:", 12)
    for _ in range(total):
        S = torch.rand(11, generator=rng, dtype=torch.float64) * 0.6 + 0.05
        d = 0.1 * S * torch.exp(0.5 * torch.randn(11, generator=rng, dtype=torch.float64))
        known = pd.DataFrame({"layer": range(11), "S": S, "disagreement": d, "n_tokens": 10**7})
        predicted = acceptance.predict(known, wiring, draws=1000)
        covered += predicted.low < acceptance.combined(known, wiring) < predicted.high
    assert 0.91 < covered / total < 0.99


def test_every_draft_has_its_row(opened):
    stack = opened("llama")
    tokens = stack.tokens([" ".join(f"w{(i * j) % 80}" for j in range(1, 12)) for i in range(1, 5)])
    drafts = {"compiled": (PAIR, PAIR), "early exit": (":3", ":3")}
    prompts = [tokens.ids[:1, :6], tokens.ids[1:2, :6]]
    frame = draft_speed.measure(stack, drafts, tokens, prompts, max_new_tokens=6).set_index("draft")
    assert list(frame.columns) == list(draft_speed.COLUMNS)[1:]
    assert frame["shared"].tolist() == [1, 3]
    assert frame["layers"].tolist() == [3, 3]
    assert (frame["same"] == 1).all()
    assert (frame[["cost", "ratio", "ratio_expected"]] > 0).all(axis=None)
    assert frame["agreement_predicted"].isna().all(), "two pairs are too few to fit to"


def test_what_cannot_be_drafted_is_told(opened):
    original = plain(opened("llama").model)
    with pytest.raises(ValueError, match="one prompt at a time"):
        draft.generate(original, original, PROMPT.repeat(2, 1))
    config = fixtures.CONFIGS["llama"]()
    config.vocab_size = 50
    with pytest.raises(ValueError, match="vocabularies of 96 and 50"):
        draft.generate(original, type(original)(config), PROMPT)
    with pytest.raises(ValueError, match="is no bridge"):
        draft.generate(original, ":2", PROMPT)
    native = fixtures.native()
    with pytest.raises(ModelError, match="no Hugging Face form"):
        draft.generate(native, native, PROMPT)
