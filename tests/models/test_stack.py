"""The Stack: exact on every architecture, under every wiring, and without a trace in the model."""

import pytest
import torch
import transformers
from transformer_lens import TransformerBridge

import surgery
from support import fixtures
from surgery import Stack, Wiring, hooks
from surgery.models.errors import ModelError
from surgery.models.loading import plain
from surgery.models.stack import Context
from surgery.models.tokens import Tokens

EVERY = (*fixtures.ARCHITECTURES, *fixtures.NATIVE)
TEXTS = ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w9 w4 w4", "w5 w6 w7 w8 w1 w2"]
DENSE = ("gpt2", "gpt_neox", "gemma2", "llama", "native-gated")  # one of each kind of block


def ids(seed: int = 0, batch: int = 3, pos: int = 9) -> torch.Tensor:
    return torch.randint(4, fixtures.N_VOCAB, (batch, pos), generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def by_hand(model: TransformerBridge, tokens: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Independent of the Stack: the layer list of a plain Hugging Face model re-indexed, as anyone would."""
    twin = plain(model)
    config = twin.base_model.config
    parent, name, row = next(
        (module, name, child)
        for module in twin.base_model.modules()
        for name, child in module.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == fixtures.N_LAYERS
    )
    types = getattr(config, "layer_types", None)
    try:
        setattr(parent, name, torch.nn.ModuleList(row[layer] for layer in order))
        config.num_hidden_layers = len(order)
        if types is not None:
            config.layer_types = [types[layer] for layer in order]
        with torch.no_grad():
            return twin(tokens, use_cache=False).logits
    finally:
        setattr(parent, name, row)
        config.num_hidden_layers = len(row)
        if types is not None:
            config.layer_types = types


@pytest.mark.parametrize("name", EVERY)
def test_every_check_passes_on_every_architecture(opened, name):
    checks = opened(name).checks()
    assert checks["passed"].all(), checks.to_string()
    assert len(checks) == (6 if name in fixtures.NATIVE else 7)


@pytest.mark.parametrize("name", EVERY)
def test_identity_is_the_model_in_double_precision(opened, name):
    stack = opened(name, dtype=torch.float64)
    expected = stack.model(ids(), return_type="logits", use_cache=False)
    # transformers' and TransformerLens' RMSNorm round to float32 inside, in both paths alike
    assert close(stack.run(ids()), expected, 1e-10)


@pytest.mark.parametrize("name", fixtures.ARCHITECTURES)
@pytest.mark.parametrize(
    ("wiring", "order"),
    [
        (":", [0, 1, 2, 3]),
        (":1 2:", [0, 2, 3]),
        (":3 1:", [0, 1, 2, 1, 2, 3]),
        ("::-1", [3, 2, 1, 0]),
        ("0 2 1 3", [0, 2, 1, 3]),
    ],
)
def test_serial_wirings_equal_a_reindexed_layer_list(opened, name, wiring, order):
    stack = opened(name)
    expected = by_hand(stack.model, ids(), order)
    assert close(stack.run(ids(), wiring), expected, 2e-5)


@pytest.mark.parametrize("name", DENSE)
def test_groups_follow_their_definition(opened, name):
    stack = opened(name)
    context = stack.context(ids())
    x = stack.stream(context)[1]
    u1, u2 = stack.update(1, x, context), stack.update(2, x, context)
    assert close(stack.execute("{1|2}", x, context), x + u1 + u2)
    assert close(stack.execute("mean{1|2}", x, context), x + (u1 + u2) / 2)
    assert close(stack.execute("0.25*(1 2)", x, context), x + 0.25 * (stack.execute("1 2", x, context) - x))
    chains = (stack.execute("1 2", x, context) - x) + (stack.execute("3 0", x, context) - x)
    assert close(stack.execute("{1 2 | 3 0}", x, context), x + chains)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "native-attention-only"])
def test_sublayers_add_up_to_the_layer(opened, name):
    stack = opened(name)
    together = "{2.attn|2.mlp}" if stack.parallel_sublayers else "2.attn 2.mlp"
    assert stack.parallel_sublayers == (name in ("gptj", "gpt_neox"))
    assert close(stack.run(ids(), f":2 {together} 3:"), stack.run(ids()))
    assert not close(stack.run(ids(), ":2 2.attn 3:"), stack.run(ids()), 1e-3)


@pytest.mark.parametrize("name", DENSE)
def test_frozen_norms_by_their_definition(opened, name):
    """Twice the stream through norms frozen at its own scales reads twice the normalised stream, not the same again."""
    stack = opened(name)
    model = stack.model
    context = stack.context(ids())
    x = stack.stream(context)[2]
    with stack.frozen(context):
        at_clean, at_other = stack.update(2, x, context), stack.update(2, 1.5 * x, context)
    assert close(at_clean, stack.update(2, x, context), 2e-5)
    assert not close(at_other, stack.update(2, 1.5 * x, context), 1e-2)
    with stack.frozen(context, scales := stack.norm_scales(ids())):
        at_other = stack.update(2, 1.5 * x, context)
    with model.hooks(fwd_hooks=hooks.freeze_norms(scales)):  # the hooks freeze the same denominators
        assert close(stack.update(2, 1.5 * x, context), at_other, 1e-4)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_under_a_rewiring(opened, name, side):
    stack = opened(name)
    alone = [stack.run(ids(i, batch=1, pos=length), ":3 1:")[0] for i, length in enumerate((9, 4, 7))]
    rows = Tokens(torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.bool))
    for i, length in enumerate((9, 4, 7)):
        place = slice(9 - length, 9) if side == "left" else slice(0, length)
        rows.ids[i, place], rows.mask[i, place] = ids(i, batch=1, pos=length)[0], True
    assert close(stack.run(rows, ":3 1:")[rows.mask], torch.cat(alone))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "native-ln"])
def test_positions_read_out_are_those_of_all_logits(opened, name):
    stack = opened(name)
    everything, mask = stack.run(ids()), torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 2] = mask[1, 8] = True
    assert close(stack.run(ids(), positions=mask), everything[mask])
    assert close(stack.run(ids(), positions=[-1]), everything[:, [-1]])
    assert close(stack.run(stack.context(ids()), positions=slice(2, 5)), everything[:, 2:5])


@pytest.mark.parametrize("name", DENSE)
def test_gradients_flow_when_asked(load, name):
    model = load(name)
    stack = Stack(model)
    assert not stack.run(ids()).requires_grad
    stack.run(ids(), ":2 1:", grad=True).square().mean().backward()
    weights = plain(model) or model.original_model
    layers = [p.grad for n, p in weights.named_parameters() if ".1." in n and p.requires_grad]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in layers)


def test_gradients_through_a_layer_used_twice(load):
    """The derivative with respect to a layer's weight is the sum over its passes: checked against finite
    differences."""
    model = load("gpt2", dtype=torch.float64)
    stack = Stack(model)
    weight = plain(model).transformer.h[1].mlp.c_proj.weight
    stack.run(ids(), ":2 1:", grad=True).sum().backward()
    step = torch.zeros_like(weight)
    step[3, 5] = 1e-4
    with torch.no_grad():
        weight += step
        above = stack.run(ids(), ":2 1:").sum()
        weight -= 2 * step
        below = stack.run(ids(), ":2 1:").sum()
        weight += step
    assert weight.grad[3, 5].item() == pytest.approx(((above - below) / 2e-4).item(), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "native-rms"])
def test_hooks_fire_once_per_pass_and_only_then(opened, name):
    stack = opened(name)
    model = stack.model
    seen: list[torch.Tensor] = []
    quiet = stack.run(ids(), ":3 1:")
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: seen.append(x.clone()))]):
        heard = stack.run(ids(), ":3 1:")
    assert close(heard, quiet)
    assert len(seen) == 2
    assert not close(seen[0], seen[1], 1e-3)
    stack.run(ids(), ":3 1:")
    assert len(seen) == 2


def test_a_context_made_before_hooks_were_attached_still_serves(opened):
    stack = opened("llama")
    model = stack.model
    context = stack.context(ids())
    x = stack.stream(context)[1]
    quiet = stack.execute("1:", x, context)
    fired = []
    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", lambda p, hook: fired.append(p.shape))]):
        assert close(stack.execute("1:", x, context), quiet)
        assert close(stack.run(context), stack.run(ids()))
    assert fired == [(3, 4, 9, 9)] * 3


def test_tap_sees_every_pass_and_may_replace_it(opened):
    stack = opened("qwen3")
    seen = []
    stack.run(ids(), ":2 {1|3} 0.5*(2)", tap=lambda layer, before, after: seen.append((layer.index, before, after)))
    assert [index for index, *_ in seen] == [0, 1, 1, 3, 2]
    assert torch.equal(seen[0][2], seen[1][1])
    skipped = stack.run(ids(), ":", tap=lambda layer, before, after: before if layer.index == 2 else None)
    assert torch.equal(skipped, stack.run(ids(), ":2 3:"))


def test_the_stream_is_the_models_own(opened):
    model = opened("olmo2").model
    store: dict[int, torch.Tensor] = {}
    with model.hooks(fwd_hooks=hooks.record_stream(store)):
        logits = model(ids(), return_type="logits")
    stream = Stack(model).stream(ids())
    assert stream.shape == (5, 3, 9, fixtures.D_MODEL)
    assert close(stream, torch.stack([store[layer] for layer in range(5)]))
    assert close(Stack(model).readout(stream[-1]), logits)


def test_nothing_is_left_behind(load):
    """No weight, hook, config field or instance attribute differs after use, also after an exception in the middle."""
    model = load("gemma2")
    twin = plain(model)

    def state() -> list:
        modules = [*twin.modules(), *model.modules()]
        attributes = [sorted(key for key in vars(module) if key == "forward") for module in modules]
        fired = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
        return [attributes, fired, repr(twin.config), [float(p.detach().double().sum()) for p in twin.parameters()]]

    stack = Stack(model)
    before = state()

    def burst(layer, x, y):
        raise ZeroDivisionError

    context = stack.context(ids())
    for action in (
        lambda: stack.run(ids(), ":2 1:", tap=burst),
        lambda: stack.run(context, "{0.mlp|1.attn}", tap=burst),
        lambda: stack.update(1, torch.zeros(1, 1, 3), context),
    ):
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            action()
    with pytest.raises(ZeroDivisionError), stack.frozen(context):
        stack.execute(":", context.x0, context, tap=burst)
    stack.checks()
    assert state() == before


def test_saving_and_training_the_plain_twin_still_works(load, tmp_path):
    model = load("llama")
    twin = plain(model)
    before = Stack(model).run(ids())
    twin.save_pretrained(tmp_path / "saved")
    fixtures.tokenizer().save_pretrained(tmp_path / "saved")
    assert close(Stack(surgery.load(tmp_path / "saved")).run(ids()), before, 1e-6)
    twin.train()
    twin(ids(), labels=ids()).loss.backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= 0.05 * parameter.grad
    twin.eval()
    assert not close(Stack(model).run(ids()), before, 1e-3)
    assert close(Stack(model).run(ids()), model(ids(), return_type="logits"))  # one set of weights


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_the_twin_costs_no_memory(opened, name):
    model = opened(name).model
    mine = {p.data_ptr() for p in model.original_model.parameters()}
    assert mine == {p.data_ptr() for p in plain(model).parameters()}


def test_a_bridge_that_was_edited_is_measured_as_it_is(load):
    """GPT-NeoX' adapter splits query, key and value into parameters of its own; the Stack must follow the user's
    bridge."""
    model = load("gpt_neox")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention.q._original_component.weight"):
                parameter.mul_(3.0)
    stack = Stack(model)
    assert close(stack.run(ids()), model(ids(), return_type="logits"))
    assert not close(stack.run(ids()), plain(model)(ids()).logits, 1e-3)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_a_processed_bridge_is_measured_as_it_is(load, name):
    """Folding norms and centring weights changes streams and shifts logits; the Stack follows, through the bridge's
    blocks."""
    model = load(name)
    before = Stack(model).stream(ids())
    model.enable_compatibility_mode()
    stack = Stack(model)
    assert stack.checks()["passed"].all()
    assert close(stack.run(ids()), model(ids(), return_type="logits"))
    if name == "gpt2":  # writing weights are centred where the norm does not see the mean
        assert stack.stream(ids()).mean(-1).abs().max() < 1e-5 < before.mean(-1).abs().max()


def test_update_without_a_context_is_that_of_an_unpadded_batch(opened):
    stack = opened("mistral")
    context = stack.context(ids())
    x = stack.stream(context)[2]
    assert torch.equal(stack.update(2, x), stack.update(2, x, context))
    assert torch.equal(stack.update(-1, x), stack.update(3, x))


def test_reading_tokens(opened):
    stack = opened("llama")
    tokens = stack.tokens(TEXTS)
    assert tokens.ids.shape == (3, 10)
    assert tokens.ids[1].tolist() == [1, 13, 8, 8] + [0] * 6
    assert tokens.mask.sum(1).tolist() == [10, 4, 7]
    assert stack.tokens(TEXTS, padding_side="left").positions[1].tolist() == [0] * 7 + [1, 2, 3]
    assert stack.tokens(TEXTS, max_length=3, prepend_bos=False).ids[0].tolist() == [5, 6, 7]
    assert tokens.ensemble().sum(1).tolist() == [9, 3, 6]
    assert [len(part) for part in tokens.batches(2)] == [2, 1]
    many = Tokens.of(torch.arange(21).unsqueeze(1))
    assert [len(part) for part in many.batches(5)] == [5, 4, 4, 4, 4]  # even: no prompt is left over by itself
    assert torch.cat([part.ids for part in many.batches(8)]).equal(many.ids)
    assert not list(many[:0].batches(5))


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no text"),
        (["w1 w2", "w3"], {"prepend_bos": False}, r"prompt 2 \('w3'\) has 1 token; a prompt needs at least 2"),
        (["w1 " * 100], {}, "has 101 tokens, the model reads 64"),
        (["w1 w2"], {"padding_side": "middle"}, "'left' or 'right', got 'middle'"),
    ],
)
def test_bad_text(opened, texts, options, message):
    with pytest.raises(ValueError, match=message):
        opened("llama").tokens(texts, **options)


def test_bad_requests(opened):
    stack = opened("llama")
    with pytest.raises(ValueError, match=r"is for 6 layers, .* has 4"):
        stack.run(ids(), Wiring.of(6))
    with pytest.raises(ValueError, match=r"layer 9: .* has layers 0 to 3"):
        stack.update(9, torch.zeros(1, 2, fixtures.D_MODEL))
    with pytest.raises(ValueError, match="tokens must be integer ids"):
        stack.run(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="frozen norms belong to a batch of shape"), stack.frozen(stack.context(ids())):
        stack.update(1, torch.zeros(1, 2, fixtures.D_MODEL))
    with pytest.raises(ValueError, match=r"runs sublayers, but the layers of .* have only attn"):
        opened("native-attention-only").run(ids(), ": 1.mlp")
    with pytest.raises(TypeError, match="TransformerBridge"):
        Stack(3)


def test_weights_that_are_not_finite_are_named(load):
    model = load("llama")
    with torch.no_grad():
        plain(model).model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"weights that are not finite: .*(layers|blocks)\.2\..* first at \[0, 0\]"):
        Stack(model)


def test_a_model_that_is_not_its_layers_is_refused(load):
    """A model whose forward does something between the layers that the Stack does not see must not open."""
    model = load("llama")
    norm = model.original_model.model.layers[1].post_attention_layernorm.original_component
    forward, calls = norm.forward, []

    def drift(*args, **kwargs):  # answers differently every time
        calls.append(1)
        return forward(*args, **kwargs) * (1 + 0.01 * len(calls))

    norm.forward = drift
    with pytest.raises(ModelError, match="cannot be opened exactly"):
        Stack(model)


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_models_without_attention_in_every_layer_are_refused(kind, tmp_path):
    config = {
        "mamba": lambda: transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
        "jamba": lambda: transformers.JambaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            use_mamba_kernels=False,
            mamba_d_state=4,
            mamba_dt_rank=4,
        ),
    }[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="not a decoder-only transformer with attention in every layer"):
        Stack(surgery.load(model))


def test_a_context_can_be_passed_around(opened):
    stack = opened("phi3")
    context = stack.context(ids())
    assert isinstance(context, Context)
    assert stack.context(context) is context
    assert close(stack.run(context, ":2 1:"), stack.run(ids(), ":2 1:"))
