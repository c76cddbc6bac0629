"""Hooks: the same as the wiring that says so, wherever TransformerLens takes hooks; and dropout."""

import pytest
import torch

from support import fixtures
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
def test_equal_to_the_wiring(opened, name, case):
    stack = opened(name)
    expected = stack.run(ids(), wiring_of(case, stack))
    found = stack.model.run_with_hooks(ids(), return_type="logits", fwd_hooks=SAME[case][0](stack.model))
    assert close(found, expected, 2e-5)
    assert not close(found, stack.run(ids()), 1e-3)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("case", SAME)
def test_under_run_with_cache(opened, name, case):
    stack = opened(name)
    expected = stack.run(ids(), wiring_of(case, stack))
    with stack.model.hooks(fwd_hooks=SAME[case][0](stack.model)):
        logits, cache = stack.model.run_with_cache(ids())
    assert close(logits, expected, 2e-5)
    assert close(stack.readout(cache["blocks.3.hook_resid_post"]), expected, 2e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2"])
@pytest.mark.parametrize("case", ["skip", "skip mlp", "parallel", "damp", "composed"])
def test_inside_generate(opened, name, case):
    """Greedy decoding under hooks, with and without the key-value cache, against one Stack run per token."""
    stack = opened(name)
    tokens = ids(batch=2, pos=5)
    for _ in range(4):
        following = stack.run(tokens, wiring_of(case, stack), positions=[-1]).argmax(-1)
        tokens = torch.cat([tokens, following], dim=1)
    for cached in (True, False):
        with stack.model.hooks(fwd_hooks=SAME[case][0](stack.model)):
            made = stack.model.generate(
                ids(batch=2, pos=5),
                max_new_tokens=4,
                do_sample=False,
                stop_at_eos=False,
                use_past_kv_cache=cached,
                return_type="tokens",
                verbose=False,
            )
        assert made.tolist() == tokens.tolist(), f"cached: {cached}"


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("case", SAME)
def test_no_hook_is_left_after_an_exception(opened, name, case):
    stack = opened(name)
    before = stack.run(ids())

    def burst(x, hook):
        raise ZeroDivisionError

    fwd_hooks = [*SAME[case][0](stack.model), ("blocks.2.hook_resid_post", burst)]
    with pytest.raises(ZeroDivisionError):
        stack.model.run_with_hooks(ids(), fwd_hooks=fwd_hooks)
    assert all(not point.fwd_hooks for point in stack.model.hook_dict.values())
    assert close(stack.model(ids(), return_type="logits"), before)


@pytest.mark.parametrize("name", SOME)
def test_the_same_list_serves_many_runs(opened, name):
    stack = opened(name)
    for case in ("parallel", "skip", "damp"):
        fwd_hooks = SAME[case][0](stack.model)
        for size in (3, 2):
            expected = stack.run(ids()[:size], SAME[case][1])
            assert close(stack.model.run_with_hooks(ids()[:size], fwd_hooks=fwd_hooks), expected, 2e-5)


@pytest.mark.parametrize("name", SOME)
def test_freeze_norms_is_the_frozen_stack(opened, name):
    stack = opened(name)
    context = stack.context(ids())
    scales = stack.norm_scales(ids())  # hooks keep denominators; ``frozen`` by itself keeps means as well
    with stack.frozen(context, scales):
        expected = stack.execute(":1 3:", context.x0, context)
    fwd_hooks = hooks.skip(stack.model, 1, 3) + hooks.freeze_norms(scales)
    store: dict[int, torch.Tensor] = {}
    stack.model.run_with_hooks(ids(), fwd_hooks=fwd_hooks + hooks.record_stream(store))
    assert close(store[4], expected, 2e-5)
    with pytest.raises(ValueError, match=r"taken on a batch of shape \[3, 9\], this one has \[2, 9\]"):
        stack.model.run_with_hooks(ids()[:2], fwd_hooks=hooks.freeze_norms(stack.norm_scales(ids())))


def test_norm_scales_are_those_of_a_cache(opened):
    model = opened("gpt2").model
    scales = Stack(model).norm_scales(ids())
    _, cache = model.run_with_cache(ids(), names_filter=lambda name: name in scales)
    assert len(scales) == 8
    assert all(close(scales[name], cache[name]) for name in scales)


@pytest.mark.parametrize("name", SOME)
def test_replace_update_by_the_update_of_another_prompt(opened, name):
    stack = opened(name)
    model = stack.model
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
def test_mean_ablate(opened, name):
    stack = opened(name)
    model = stack.model
    context = stack.context(ids())
    stream = stack.stream(context)
    mean = (stream[3] - stream[2]).mean((0, 1))
    expected = stack.readout(stack.execute("3:", stream[2] + mean, context))
    assert close(model.run_with_hooks(ids(), fwd_hooks=hooks.mean_ablate({2: mean})), expected, 2e-5)
    zero = torch.zeros(fixtures.D_MODEL)
    no_mlp = stack.run(ids(), ":1 1.attn 2:")
    assert close(model.run_with_hooks(ids(), fwd_hooks=hooks.mean_ablate({"1.mlp": zero})), no_mlp, 2e-5)


def test_add_noise_is_seeded_and_of_the_size_asked(opened):
    model = opened("llama").model
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
def test_bad_requests(opened, call, message):
    with pytest.raises(ValueError, match=message):
        call(opened("llama").model)


def test_a_part_that_is_not_there(opened):
    with pytest.raises(ValueError, match="layer 1 of this model has no mlp"):
        hooks.skip(opened("native-attention-only").model, 1, part="mlp")


# --- dropout -----------------------------------------------------------------------------------------------------

POST = "blocks.1.hook_mlp_out"


def kept(model, fwd_hooks, name=POST, tokens=None):
    """What stands at a hook point before and after the hooks."""
    seen = []

    def look(x, hook):
        seen.append(x.detach().clone())

    with torch.no_grad():
        model.run_with_hooks(ids() if tokens is None else tokens, fwd_hooks=[(name, look), *fwd_hooks, (name, look)])
    return seen


@pytest.mark.parametrize("name", SOME)
def test_dropout_zeroes_a_share_and_scales_the_rest(opened, name):
    model = opened(name).model
    before, after = kept(model, hooks.dropout(model, POST, 0.25), tokens=ids(16, 20))
    dropped = after == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)  # of 10240 units
    assert torch.equal(after[~dropped], (before / 0.75)[~dropped])


def test_dropout_keeps_the_expectation(opened):
    model = opened("llama").model
    fwd_hooks = hooks.dropout(model, POST, 0.3, seed=1)
    runs = [kept(model, fwd_hooks) for _ in range(100)]
    before, after = runs[0][0], torch.stack([after for _, after in runs])
    error = (after.mean(0) - before) / (0.3 / 0.7 / 100) ** 0.5 / before.abs()  # in standard errors
    assert abs(error.mean()) < 0.15  # of 864 units
    assert error.std().item() == pytest.approx(1, abs=0.1)


def test_dropout_made_again_with_the_same_seed_draws_the_same_masks_in_the_same_order(opened):
    model = opened("gpt2").model
    first, again, other = (
        [kept(model, made)[1] for _ in range(3)]
        for made in (
            hooks.dropout(model, POST, 0.5, 3),
            hooks.dropout(model, POST, 0.5, 3),
            hooks.dropout(model, POST, 0.5, 4),
        )
    )
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    beside = kept(model, hooks.dropout(model, ["blocks.3.hook_attn_out", POST], 0.5, 3))
    assert torch.equal(beside[1], first[0])  # whatever else is dropped


def test_a_shared_mask_is_one_subnetwork_in_every_call(opened):
    model = opened("llama").model
    name = "blocks.2.mlp.out.hook_in"
    fwd_hooks = hooks.dropout(model, name, 0.4, shared=True)
    masks = [kept(model, fwd_hooks, name, ids(batch, pos))[1] == 0 for batch, pos in ((3, 9), (2, 5))]
    first = masks[0][0, 0]
    assert 0 < first.sum() < len(first)
    assert all((mask == first).all() for mask in masks)
    other = kept(model, hooks.dropout(model, name, 0.4, seed=1, shared=True), name)[1] == 0
    assert not (other[0, 0] == first).all()


@pytest.mark.parametrize("name", [*SOME, "native-ln"])
def test_nothing_changes_where_p_is_zero(opened, name):
    model = opened(name).model
    own = model(ids(), return_type="logits")
    for fwd_hooks in (
        hooks.dropout(model, lambda point: point.endswith(("attn.hook_out", "mlp.hook_out", "hook_pattern")), 0.0),
        hooks.dropout(model, POST, 0.0, shared=True),
        hooks.stochastic_depth(model, 0.0),
        hooks.stochastic_depth(model, 0.0, part="attn"),
    ):
        assert torch.equal(model.run_with_hooks(ids(), return_type="logits", fwd_hooks=fwd_hooks), own)


@pytest.mark.parametrize("name", SOME)
def test_dropout_under_the_stack_is_that_of_the_model_and_leaves_nothing(opened, name):
    stack = opened(name)
    model = stack.model
    before = stack.run(ids())

    def made():
        chosen = hooks.dropout(model, lambda point: point.endswith("mlp.hook_out"), 0.2, 5)
        return chosen + hooks.stochastic_depth(model, 0.2, 5)

    own = model.run_with_hooks(ids(), return_type="logits", fwd_hooks=made())
    with model.hooks(fwd_hooks=made()):
        assert close(stack.run(ids()), own)
    assert not close(own, before, 1e-3)
    assert torch.equal(stack.run(ids()), before)
    assert all(not point.fwd_hooks for point in model.hook_dict.values())


def test_stochastic_depth_drops_whole_updates_prompt_by_prompt(opened):
    stack = opened("gpt2")
    model, tokens = stack.model, ids(64, 5)
    clean, found = stack.stream(tokens), {}
    fwd_hooks = hooks.stochastic_depth(model, 0.25, start=1, stop=2) + hooks.record_stream(found)
    with model.hooks(fwd_hooks=fwd_hooks):
        model(tokens)
    update, own = found[2] - found[1], clean[2] - clean[1]
    dropped = (update == 0).all((1, 2))
    assert close(update[~dropped], own[~dropped] / 0.75)
    assert 5 <= dropped.sum() <= 28  # 16 expected, 3.5 standard deviations
    assert close(found[1], clean[1])
    for seed, part in ((0, "mlp"), (1, "attn")):
        name = f"blocks.2.hook_{part}_out"
        whole, some = kept(model, hooks.stochastic_depth(model, 0.5, seed, 2, 3, part), name, tokens)
        gone = (some == 0).all((1, 2))
        assert 0 < gone.sum() < 64
        assert torch.equal(some[~gone], whole[~gone] / 0.5)


def test_stochastic_depth_near_one_is_a_skip(opened):
    model = opened("llama").model
    found = model.run_with_hooks(ids(), fwd_hooks=hooks.stochastic_depth(model, 1 - 1e-9, start=1, stop=3))
    assert close(found, Stack(model).run(ids(), ":1 3:"))


def test_what_is_dropped_passes_no_gradient_there_and_its_weights_learn_elsewhere(load):
    model = load("llama")
    name, rows = "blocks.1.mlp.out.hook_in", model.blocks[1].mlp.out.original_component.weight

    def gradients(shared):
        held = []

        def hold(x, hook):
            x.retain_grad()
            held.append(x)

        rows.grad = None
        rows.requires_grad_(True)
        after = [(name, hold), *hooks.dropout(model, name, 0.5, shared=shared), (name, lambda x, hook: held.append(x))]
        model.run_with_hooks(ids(), return_type="logits", fwd_hooks=after)[..., 5].square().sum().backward()
        return held[1] == 0, held[0].grad, rows.grad

    dropped, passed, learnt = gradients(False)
    assert dropped.any((0, 1)).all()  # every unit is dropped somewhere
    assert (passed[dropped] == 0).all()
    assert (passed[~dropped] != 0).float().mean() > 0.99
    assert (learnt != 0).any(0).all()  # and yet all their weights learn
    dropped, _, learnt = gradients(True)
    assert ((learnt != 0).any(0) == ~dropped[0, 0]).all()  # in a subnetwork those of dropped units do not


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: hooks.dropout(m, POST, 1.0), r"from 0 to below 1; got p=1.0"),
        (lambda m: hooks.dropout(m, POST, -0.1), r"got p=-0.1"),
        (lambda m: hooks.stochastic_depth(m, 1.5), r"got p=1.5"),
        (
            lambda m: hooks.dropout(m, "blocks.1.hook_mlp_ouf", 0.1),
            "no hook point 'blocks.1.hook_mlp_ouf': near it are",
        ),
        (
            lambda m: hooks.dropout(m, "nowhere at all", 0.1),
            "no hook point 'nowhere at all': model.hook_dict lists all",
        ),
        (lambda m: hooks.dropout(m, lambda name: False, 0.1), "no hook point is chosen"),
        (lambda m: hooks.dropout(m, [], 0.1), "no hook point is chosen"),
        (lambda m: hooks.dropout(m, "blocks.0.attn.hook_attn_scores", 0.1), "drop hook_pattern instead"),
        (lambda m: hooks.dropout(m, "blocks.0.attn.hook_pattern", 0.1, shared=True), "drop it without shared"),
        (lambda m: hooks.stochastic_depth(m, 0.1, start=2, stop=9), r"layers \[2, 9\)"),
        (lambda m: m.run_with_hooks(ids(), fwd_hooks=hooks.dropout(m, "embed.hook_in", 0.1)), "not activations"),
    ],
)
def test_dropout_that_cannot_be(opened, call, message):
    with pytest.raises(ValueError, match=message):
        call(opened("llama").model)


def test_layers_outside_the_model_are_refused_and_negative_ones_count_from_the_end(load):
    model = load("llama")
    update = torch.zeros(fixtures.D_MODEL)
    last = fixtures.N_LAYERS - 1
    assert hooks.add_noise(0.1, 0, layers=[-1], model=model)[0][0] == f"blocks.{last}.hook_in"
    assert hooks.replace_update(-1, update, model=model)[0][0] == f"blocks.{last}.hook_resid_pre"
    assert hooks.mean_ablate({"-1.attn": update}, model=model)[0][0] == f"blocks.{last}.hook_attn_out"
    for bad in (-fixtures.N_LAYERS - 1, fixtures.N_LAYERS):
        for make in (
            lambda bad=bad: hooks.add_noise(0.1, 0, layers=[bad], model=model),
            lambda bad=bad: hooks.replace_update(bad, update, model=model),
            lambda bad=bad: hooks.mean_ablate({bad: update}, model=model),
            lambda bad=bad: hooks.skip(model, bad),
            lambda bad=bad: hooks.damp(model, bad, 0.5),
            lambda bad=bad: hooks.parallel(model, 0, bad + fixtures.N_LAYERS + 1 if bad < 0 else bad + 1),
            lambda bad=bad: hooks.stochastic_depth(model, 0.5, start=bad),
        ):
            with pytest.raises(ValueError, match="the model has layers 0 to 3"):
                make()
    for make in (
        lambda: hooks.add_noise(0.1, 0, layers=[-1]),
        lambda: hooks.replace_update(-1, update),
        lambda: hooks.mean_ablate({-1: update}),
    ):
        with pytest.raises(ValueError, match="counts from the end of a model: give the model too"):
            make()
    noisy = hooks.add_noise(0.5, 0, layers=[-1], model=model)
    with model.hooks(fwd_hooks=noisy):
        assert not torch.allclose(model(ids()), load("llama")(ids()), atol=1e-3)
