"""Architectures beyond the matrix open exactly or are refused; benchmarks/architectures.py has them all."""

import importlib.util

import pytest
import torch
from torch import nn

import surgery
from support import fixtures
from support.places import REPOSITORY
from surgery import Stack
from surgery.models.errors import ModelError
from surgery.models.loading import plain, untrained
from surgery.models.norms import FrozenNorm
from surgery.rebuild import tape

_spec = importlib.util.spec_from_file_location("architectures", REPOSITORY / "benchmarks" / "architectures.py")
architectures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architectures)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("GPTNeoForCausalLM", "global and local"),  # attention inside a module of its own
        ("OpenAIGPTLMHeadModel", ""),  # layers that return lists
        ("GPTBigCodeForCausalLM", "multi-query"),
        ("BloomForCausalLM", ""),  # attention that adds the stream itself
        ("FalconForCausalLM", "7B: one norm"),
        ("OlmoForCausalLM", ""),  # norms that show no epsilon
        ("BertLMHeadModel", "decoder"),
        ("DeepseekV3ForCausalLM", ""),
    ],
)
def test_exact_on_64_tokens_with_padding_and_windows_exceeded(name, variant):
    assert architectures.outcome(name, architectures.VARIANTS.get(name, {"": {}})[variant])[0] == "exact"


@pytest.mark.parametrize(
    ("name", "variant", "sentence"),
    [
        ("FalconForCausalLM", "RW: ALiBi, serial", "gives other logits than the model itself, by"),
        ("FalconForCausalLM", "40B: two norms", "TransformerLens cannot wrap FalconForCausalLM"),
        ("FalconForCausalLM", "11B: new, one norm", "TransformerLens cannot wrap FalconForCausalLM"),
        ("PhiForCausalLM", "qk-layernorm", "TransformerLens cannot wrap PhiForCausalLM"),
        ("GPTNeoXForCausalLM", "no attention bias", "TransformerLens cannot wrap GPTNeoXForCausalLM"),
        ("OPTForCausalLM", "350M: norm after", "TransformerLens' wrapper of it fails on two prompts"),
        ("BertLMHeadModel", "encoder", "is not causal"),
        ("MambaForCausalLM", "", "not a decoder-only transformer with attention in every layer"),
    ],
)
def test_refused_in_a_sentence(name, variant, sentence):
    result, what = architectures.outcome(name, architectures.VARIANTS.get(name, {"": {}})[variant])
    assert result == "refused"
    assert sentence in what


def test_layers_that_cannot_be_split_run_whole():
    stack = Stack(architectures.small("BloomForCausalLM", {}))
    ids = torch.arange(4, 12)[None]
    assert not torch.allclose(stack.run(ids, ":2 1:"), stack.run(ids), atol=1e-3)
    with pytest.raises(ValueError, match="cannot be split exactly"):
        stack.run(ids, ": 2.mlp")


def quantised(model):
    model.lm_head.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda model: model.to("meta"), "weights that are not loaded"),
        (nn.DataParallel, r"is a DataParallel around a model; give the model inside it: load\(model\.module\)"),
        (lambda model: model.to(torch.float8_e4m3fn), "weights in float8_e4m3fn, which are not plain floats"),
        (quantised, r"weights in int8, which are not plain floats \(38 in float32, 1 in int8\)"),
        (
            lambda model: model.half() and model.model.norm.float() and model,
            r"several types \(\d+ in float16, 1 in float32\); make them one: model.to\(torch.float16\)",
        ),
        (lambda model: model.model, "no adapter for LlamaModel"),
        (lambda _: nn.Linear(2, 2), "is a Linear, not a Hugging Face model"),
    ],
)
def test_unusual_models_are_refused_in_a_sentence(change, sentence):
    with pytest.raises(ModelError, match=sentence):
        surgery.load(change(fixtures.hugging_face("llama")))


@torch.no_grad()
def test_a_norm_that_shows_no_epsilon_is_measured():
    class Hidden(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.inside = norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x)

    probe = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for norm in (nn.LayerNorm(32, 1e-5), nn.RMSNorm(32, 1e-6), nn.LayerNorm(32, 1e-12), nn.LayerNorm(32, 1e-2)):
        shown, hidden = FrozenNorm(norm, probe), FrozenNorm(Hidden(norm), probe)
        for x in (probe, 1e-3 * probe):
            assert torch.allclose(hidden.scale(x), shown.scale(x), rtol=2e-4, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_untrained_has_the_layers_that_are_left(load, name):
    shorter = tape.together(load(name), ":1 2:")
    assert len(untrained(shorter).blocks) == 3
    model = fixtures.hugging_face(name)
    layers = model.get_submodule(load(name).blocks[0].name.rpartition(".")[0])
    del layers[1]
    cut = surgery.load(model) if name != "gpt2" else None
    if cut is not None:
        assert Stack(cut).n_layers == len(untrained(cut).blocks) == 3
        assert Stack(untrained(cut)).checks()["passed"].all()


def test_streams_of_a_rewired_run(opened):
    stack, ids = opened("llama"), torch.arange(4, 12)[None]
    recorded = stack.record(ids, ":2 {2|3.attn} 0.5*(1 2)")
    assert [name for name, _ in recorded] == ["embed", "0", "1", "2", "3.attn", "{2 | 3.attn}", "1", "2", "0.5*(1:3)"]
    streams = stack.stream(ids, ":2 {2|3.attn} 0.5*(1 2)")
    assert torch.equal(streams, torch.stack([x for _, x in recorded]))
    assert torch.equal(stack.readout(streams[-1]), stack.readout(recorded[-1][1]))
    expected = stack.run(ids, ":2 {2|3.attn} 0.5*(1 2)")
    assert (stack.readout(streams[-1]) - expected).abs().max() <= 1e-5 * expected.abs().max()
    context = stack.context(ids)
    assert torch.allclose(streams[5], stack.execute("{2|3.attn}", streams[2], context))
    assert torch.allclose(streams[-1], stack.execute("0.5*(1 2)", streams[5], context))
    assert plain(stack.model) is not None
