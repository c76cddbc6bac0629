import fixtures
import pytest
import torch

from surgery import Stack, hooks

EVERY = (*fixtures.ARCHITECTURES, "native-ln", "native-rms")
SOME = ("gpt2", "gpt_neox", "gemma2", "qwen3")


def ids(batch: int = 3, pos: int = 9) -> torch.Tensor:
    return torch.randint(4, fixtures.N_VOCAB, (batch, pos), generator=torch.Generator().manual_seed(0))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


# every intervention that a wiring can say, with that wiring
SAME = {
    "skip": (lambda m: hooks.skip(m, 1, 3), ":1 3:"),
    "skip one": (lambda m: hooks.skip(m, -2), ":2 3:"),
    "skip attention": (lambda m: hooks.skip(m, 1, 3, part="attn"), ":1 1.mlp 2.mlp 3:"),
    "skip mlp": (lambda m: hooks.skip(m, 2, part="mlp"), ":2 2.attn 3:"),
    "parallel": (lambda m: hooks.parallel(m, 1, 4), ":1 {*1:4}"),
    "parallel mean": (lambda m: hooks.parallel(m, 0, 3, mean=True), "mean{*0:3} 3:"),
    "damp": (lambda m: hooks.damp(m, 2, 0.3), ":2 0.3*2 3:"),
    "damp with a negative factor": (lambda m: hooks.damp(m, 1, -1.5), ":1 -1.5*1 2:"),
    "damp mlp": (lambda m: hooks.damp(m, 3, 0.5, part="mlp"), None),
    "composed": (lambda m: hooks.skip(m, 0) + hooks.parallel(m, 1, 3) + hooks.damp(m, 3, 0.5), "{1|2} 0.5*3"),
}


def wiring_of(case: str, stack: Stack) -> str:
    if case == "damp mlp":  # in sequential blocks the MLP reads what the attention wrote
        return ":3 {3.attn|0.5*3.mlp}" if stack.parallel_sublayers else ":3 3.attn 0.5*3.mlp"
    return SAME[case][1]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("case", SAME)
def test_equal_to_the_wiring(load, name, case):
    model = load(name)
    stack = Stack(model)
    expected = stack.run(ids(), wiring_of(case, stack))
    found = model.run_with_hooks(ids(), return_type="logits", fwd_hooks=SAME[case][0](model))
    assert close(found, expected, 2e-5)
    assert not close(found, stack.run(ids()), 1e-3)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("case", SAME)
def test_under_run_with_cache(load, name, case):
    model = load(name)
    stack = Stack(model)
    expected = stack.run(ids(), wiring_of(case, stack))
    with model.hooks(fwd_hooks=SAME[case][0](model)):
        logits, cache = model.run_with_cache(ids())
    assert close(logits, expected, 2e-5)
    assert close(stack.readout(cache["blocks.3.hook_resid_post"]), expected, 2e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2"])
@pytest.mark.parametrize("case", ["skip", "skip mlp", "parallel", "damp", "composed"])
@pytest.mark.parametrize("cached", [True, False], ids=["kv-cache", "recomputed"])
def test_inside_generate(load, name, case, cached):
    """Greedy decoding under hooks, with and without the key-value cache, against one Stack run per token."""
    model = load(name)
    stack = Stack(model)
    tokens = ids(batch=2, pos=5)
    for _ in range(6):
        following = stack.run(tokens, wiring_of(case, stack), positions=[-1]).argmax(-1)
        tokens = torch.cat([tokens, following], dim=1)
    with model.hooks(fwd_hooks=SAME[case][0](model)):
        made = model.generate(
            ids(batch=2, pos=5), max_new_tokens=6, do_sample=False, stop_at_eos=False, use_past_kv_cache=cached,
            return_type="tokens", verbose=False,
        )  # fmt: skip
    assert made.tolist() == tokens.tolist()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("case", SAME)
def test_no_hook_is_left_after_an_exception(load, name, case):
    model = load(name)
    before = Stack(model).run(ids())

    def burst(x, hook):
        raise ZeroDivisionError

    fwd_hooks = [*SAME[case][0](model), ("blocks.2.hook_resid_post", burst)]
    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks(ids(), fwd_hooks=fwd_hooks)
    assert all(not point.fwd_hooks for point in model.hook_dict.values())
    assert close(model(ids(), return_type="logits"), before)


@pytest.mark.parametrize("name", SOME)
def test_the_same_list_serves_many_runs(load, name):
    model = load(name)
    for case in ("parallel", "skip", "damp"):
        fwd_hooks = SAME[case][0](model)
        for size in (3, 2):
            expected = Stack(model).run(ids()[:size], SAME[case][1])
            assert close(model.run_with_hooks(ids()[:size], fwd_hooks=fwd_hooks), expected, 2e-5)


@pytest.mark.parametrize("name", SOME)
def test_freeze_norms_is_the_frozen_stack(load, name):
    model = load(name)
    stack = Stack(model)
    context = stack.context(ids())
    with stack.frozen(context):
        expected = stack.execute(":1 3:", context.x0, context)
    fwd_hooks = hooks.skip(model, 1, 3) + hooks.freeze_norms(stack.norm_scales(ids()))
    store: dict[int, torch.Tensor] = {}
    model.run_with_hooks(ids(), fwd_hooks=fwd_hooks + hooks.record_stream(store))
    assert close(store[4], expected, 2e-5)
    with pytest.raises(ValueError, match=r"taken on a batch of shape \[3, 9\], this one has \[2, 9\]"):
        model.run_with_hooks(ids()[:2], fwd_hooks=hooks.freeze_norms(stack.norm_scales(ids())))


def test_norm_scales_are_those_of_a_cache(load):
    model = load("gpt2")
    scales = Stack(model).norm_scales(ids())
    _, cache = model.run_with_cache(ids(), names_filter=lambda name: name in scales)
    assert len(scales) == 8
    assert all(close(scales[name], cache[name]) for name in scales)


@pytest.mark.parametrize("name", SOME)
def test_replace_update_by_the_update_of_another_prompt(load, name):
    model = load(name)
    stack = Stack(model)
    context = stack.context(ids())
    stream = stack.stream(context)
    foreign = stack.update(1, stream[1], context).flip(0)
    expected = stack.readout(stack.execute("2:", stream[1] + foreign, context))
    assert close(model.run_with_hooks(ids(), fwd_hooks=hooks.replace_update(1, foreign)), expected, 2e-5)
    same = model.run_with_hooks(ids(), fwd_hooks=hooks.replace_update(1, lambda x, u: u.flip(0)))
    assert close(same, expected, 2e-5)
    with pytest.raises(
        ValueError, match=r"update of shape \[5, 1\] cannot replace one of shape \[3, 9, 32\] at layer 1"
    ):
        model.run_with_hooks(ids(), fwd_hooks=hooks.replace_update(1, torch.zeros(5, 1)))


@pytest.mark.parametrize("name", SOME)
def test_mean_ablate(load, name):
    model = load(name)
    stack = Stack(model)
    context = stack.context(ids())
    stream = stack.stream(context)
    mean = (stream[3] - stream[2]).mean((0, 1))
    expected = stack.readout(stack.execute("3:", stream[2] + mean, context))
    assert close(model.run_with_hooks(ids(), fwd_hooks=hooks.mean_ablate({2: mean})), expected, 2e-5)
    zero = torch.zeros(fixtures.D_MODEL)
    no_mlp = stack.run(ids(), ":1 1.attn 2:")
    assert close(model.run_with_hooks(ids(), fwd_hooks=hooks.mean_ablate({"1.mlp": zero})), no_mlp, 2e-5)


def test_add_noise_is_seeded_and_of_the_size_asked(load):
    model = load("llama")
    clean, noisy = {}, {}
    model.run_with_hooks(ids(), fwd_hooks=hooks.record_stream(clean))
    fwd_hooks = hooks.add_noise(0.1, seed=3, layers=[2])
    model.run_with_hooks(ids(), fwd_hooks=fwd_hooks + hooks.record_stream(noisy))
    # the recorder comes after the noise at layer 2's entry, and sees it
    ratio = (noisy[2] - clean[2]).pow(2).mean(-1).sqrt() / clean[2].pow(2).mean(-1).sqrt()
    assert ratio.mean().item() == pytest.approx(0.1, rel=0.15)
    assert torch.equal(noisy[1], clean[1])
    again = {}
    model.run_with_hooks(ids(), fwd_hooks=fwd_hooks + hooks.record_stream(again))
    assert torch.equal(again[4], noisy[4])
    other = {}
    model.run_with_hooks(ids(), fwd_hooks=hooks.add_noise(0.1, seed=4, layers=[2]) + hooks.record_stream(other))
    assert not close(other[4], noisy[4], 1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: hooks.skip(m, 4), "layer 4: the model has layers 0 to 3"),
        (lambda m: hooks.skip(m, 2, 2), r"layers \[2, 2\)"),
        (lambda m: hooks.parallel(m, 1, 9), r"layers \[1, 9\)"),
        (lambda m: hooks.mean_ablate({"third": torch.zeros(32)}), "'third' is neither a layer like 3 nor a sublayer"),
        (lambda m: hooks.freeze_norms({}), "no norm scales given"),
    ],
)
def test_bad_requests(load, call, message):
    with pytest.raises(ValueError, match=message):
        call(load("llama"))


def test_a_part_that_is_not_there(load):
    with pytest.raises(ValueError, match="layer 1 of this model has no mlp"):
        hooks.skip(load("native-attention-only"), 1, part="mlp")
