"""A fresh middle between frozen ends: on real architectures, what its loss is, and what goes wrong."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import surgery
from surgery import Stack, graft, models, reversion, series
from surgery.corpus.splits import Split
from surgery.graft import grafting, linear_maps, study
from surgery.graft.grafting import Objective, Schedule
from surgery.instruments import fidelity, known_networks
from surgery.models.tokens import Tokens
from surgery.models.weights_hash import weights_sha256
from surgery.rebuild import layout
from surgery.records import tables
from surgery.stats.sampling import Sampling
from surgery.training.activations import Pairs
from surgery.training.ledger import Counter

SHORT = Schedule(steps=4, batch=8, every=2, warmup=2, learning_rate=5e-3)
SPAN = (1, 3)


def ragged(count, n_vocab=90, seed=0):
    """Prompts of 6 to 10 random words, padded on the right."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 11, (count, 1), generator=draw)
    lengths[0] = 10
    mask = torch.arange(10) < lengths
    return Tokens(torch.randint(4, n_vocab, (count, 10), generator=draw) * mask, mask)


CORPUS, HELDOUT = ragged(24), ragged(8, seed=1)


@functools.cache
def network(seed=0):
    return Stack(known_networks.random_network(n_layers=4, d_model=16, seed=seed))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The activations of ``network()``; nothing may change their files."""
    return harvested(network(), tmp_path_factory.mktemp("pairs"))


def harvested(stack, folder, corpus=CORPUS, span=SPAN, dtype=torch.float32):
    return graft.latents(stack, corpus, *span, folder / "latents", dtype=dtype)


def weights_of(model):
    """Parameters by name, of the plain twin where there is one."""
    return {name: parameter.detach().clone() for name, parameter in layout.source_of(model).named_parameters()}


def layer(model, place):
    prefix = f"{layout.layers_path(model)}.{place}."
    return {name.removeprefix(prefix): w for name, w in weights_of(model).items() if name.startswith(prefix)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits(model, tokens=HELDOUT):
    return Stack(model).run(tokens)[tokens.mask]


# --- a middle in every kind of model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma2", "native-gated"])
def test_a_new_middle_between_the_old_ends(load, name, tmp_path):
    teacher = Stack(load(name))
    before, pairs = weights_sha256(teacher.model), harvested(teacher, tmp_path)
    grown = graft.train(teacher, pairs, HELDOUT, tmp_path / "run", objective=Objective(1.0, 0.1, 0.1), schedule=SHORT)
    assert weights_sha256(teacher.model) == before
    assert grown.span == SPAN
    assert grown.curve["unexplained_whitened"].iloc[-1] < grown.curve["unexplained_whitened"].iloc[0]
    old, new = weights_of(teacher.model), weights_of(grown.model)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    inside = {
        name
        for name in old
        if any(name.startswith(f"{layout.layers_path(teacher.model)}.{place}.") for place in (1, 2))
    }
    assert changed <= inside
    assert sum(old[name].numel() for name in inside) == grown.parameters
    twin = models.plain(grown.model)
    if twin is None:  # TransformerLens' own models have no folder to be opened from
        assert not (tmp_path / "run" / "model").exists()
        return
    found = logits(grown.model)
    bridge = grown.model(HELDOUT.ids[:1], return_type="logits")
    assert torch.allclose(twin(HELDOUT.ids[:1]).logits, bridge, atol=1e-4)
    assert torch.allclose(found[:10], bridge[0], atol=1e-4)  # the first prompt is 10 long
    assert torch.allclose(logits(surgery.load(tmp_path / "run" / "model")), found, atol=1e-5)


def test_teacher_and_student_are_proved_once_each(load, tmp_path, monkeypatch):
    proofs, prove = [], Stack._settle
    monkeypatch.setattr(Stack, "_settle", lambda stack: proofs.append(stack.model) or prove(stack))
    teacher = Stack(load("llama"))
    data = Split(CORPUS, HELDOUT[:1], HELDOUT[1:])
    pairs = harvested(teacher, tmp_path)
    grown = graft.train(teacher, pairs, HELDOUT, tmp_path / "run", schedule=SHORT)
    assert (tmp_path / "run" / "model").is_dir()
    study.judge(teacher, grown, pairs, data)
    study.maps(teacher, pairs, data)
    assert len(proofs) == 2
    assert proofs[0] is teacher.model
    assert proofs[1] is grown.model
    healed = graft.heal(teacher, grown, pairs, HELDOUT, tmp_path / "healed", schedule=SHORT)
    study.judge(teacher, healed, pairs, data)
    assert len(proofs) == 3
    assert proofs[2] is healed.model


def test_a_middle_of_another_depth_and_width_is_a_model_like_any_other(load, tmp_path):
    teacher = Stack(load("llama"))
    grown = graft.train(
        teacher, harvested(teacher, tmp_path), HELDOUT, tmp_path / "run", depth=3, d_mlp=48, schedule=SHORT
    )
    assert grown.span == (1, 4)
    assert grown.model.cfg.n_layers == 5
    assert {tuple(w.shape) for name, w in layer(grown.model, 2).items() if "up_proj" in name} == {(48, 32)}
    assert same(layer(grown.model, 0), layer(teacher.model, 0))
    assert same(layer(grown.model, 4), layer(teacher.model, 3))
    stack = Stack(grown.model)
    assert torch.equal(logits(surgery.load(tmp_path / "run" / "model")), logits(grown.model))
    windows = series.windows(stack, HELDOUT, sampling=Sampling(resamples=0))
    assert windows["stop"].max() == 5
    assert windows["S"].notna().all()
    assert len(reversion.layers(stack, HELDOUT, causal=False)) == 5
    assert torch.isfinite(stack.run(HELDOUT, ":4 2:")[HELDOUT.mask]).all()


def test_a_learnable_middle_beats_the_best_linear_map(tmp_path):
    teacher = Stack(known_networks.serial_network(n_layers=3, width=4))
    corpus, heldout = Tokens.of(known_networks.tokens(64, 8)), Tokens.of(known_networks.tokens(16, 8, seed=1))
    pairs = harvested(teacher, tmp_path, corpus, (0, 1))
    grown = graft.train(
        teacher,
        pairs,
        heldout,
        tmp_path / "run",
        d_mlp=64,
        schedule=Schedule(steps=100, batch=32, every=100, learning_rate=0.03, warmup=10),
    )
    best = linear_maps.linear(pairs.moments(range(54), skip_first=False), pairs.moments(range(54, 64)))
    linear = fidelity.measure(teacher, heldout, best, 0, 1, sampling=Sampling(resamples=0)).iloc[0]
    assert 0.2 < linear["unexplained"] < 1  # a rectifier bends, so a line does not do
    assert grown.curve["unexplained"].iloc[-1] < 0.5 * linear["unexplained"] < grown.curve["unexplained"].iloc[0]
    assert grown.curve["kl"].iloc[-1] < linear["kl"]


# --- where it starts -------------------------------------------------------------------------------------------------


def terms(teacher, pairs, objective, student=None, weigh=None, prompts=(0, 1, 2)):
    """Sums, weights and the batch of a student's loss; the teacher itself if no student is given."""
    task = graft.Task(
        teacher,
        Stack(student or teacher.model),
        SPAN,
        "middle",
        pairs,
        HELDOUT,
        objective,
        weigh or grafting._equal_weights,
        None,
        "unexplained",
    )
    batch = task.with_teacher(task.batch(list(prompts)))
    sums, weights = task.student(batch)
    return sums / weights, weights.detach(), batch


def test_from_the_old_weights_there_is_nothing_to_learn(pairs, tmp_path):
    teacher = network()
    curves = {
        old: graft.train(
            teacher, pairs, HELDOUT, tmp_path / str(old), old=old, schedule=replace(SHORT, steps=1)
        ).curve.iloc[0]
        for old in (0.0, 0.5, 1.0)
    }
    assert curves[1.0]["unexplained"] < 1e-10
    assert abs(curves[1.0]["damage"]) < 1e-6
    assert curves[1.0]["unexplained"] < curves[0.5]["unexplained"] < curves[0.0]["unexplained"]

    def slope(old):
        student = layout.build(teacher.model, layout.middle(4, *SPAN, old=old))
        terms(teacher, pairs, Objective(), student)[0].sum().backward()
        return sum(float(p.grad.norm()) for p in student.parameters() if p.grad is not None)

    assert slope(1.0) < 1e-4 * slope(0.0)


def test_float16_activations_round_a_little(tmp_path):
    teacher = network()
    pairs = harvested(teacher, tmp_path, dtype=torch.float16)
    assert 0 < float(terms(teacher, pairs, Objective())[0][0].detach()) < 1e-3


# --- what is learned -------------------------------------------------------------------------------------------------


def later(pairs):
    """All prompts without each one's first token, which moments leave out."""
    found = pairs.batch(range(pairs.n_prompts))
    return replace(found, tokens=Tokens(found.tokens.ids, found.tokens.ensemble()))


@pytest.mark.parametrize("whiten", ["std", "principal", "none"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 2.0])
def test_the_latent_loss_is_the_unexplained_share_of_the_whitened_update(pairs, whiten, floor):
    scale = grafting._Scale.of(
        pairs.moments(), Objective(whiten=whiten, floor=floor, cap=float("inf")), torch.device("cpu")
    )
    some = later(pairs)
    u = (some.x_stop - some.x_start)[some.tokens.mask].double()

    def loss(u_hat):
        x = some.x_start.clone()
        x[some.tokens.mask] += u_hat.float()
        total, count = scale.unexplained(x, some)
        return float(total / count)

    if whiten == "principal":
        variance, axes = torch.linalg.eigh(torch.cov(u.T, correction=0))
    else:
        variance, axes = u.var(0, correction=0), torch.eye(u.shape[1], dtype=torch.float64)
    deviation = torch.ones_like(variance) if whiten == "none" else variance.clamp(min=0).sqrt()
    w = axes / deviation.clamp(min=floor * float(deviation.median()))
    guess = 0.3 * u.flip(0)
    by_hand = ((guess - u) @ w).square().sum(-1).mean() / ((u - u.mean(0)) @ w).square().sum(-1).mean()
    assert loss(guess) == pytest.approx(float(by_hand), rel=1e-3)
    assert loss(u.mean(0)) == pytest.approx(1, rel=1e-3)
    assert loss(u) < 1e-9


def test_dimensions_that_the_middle_never_writes_do_not_own_the_loss(tmp_path):
    teacher = Stack(known_networks.serial_network(n_layers=4, width=4))  # writes 2 of 5 subspaces
    pairs = harvested(teacher, tmp_path)
    student = layout.build(teacher.model, layout.middle(4, *SPAN))
    for whiten in ("std", "principal"):
        assert 0.1 < float(terms(teacher, pairs, Objective(whiten=whiten), student)[0][0].detach()) < 1e4


def test_a_massive_token_counts_as_cap_times_the_usual_one():
    d = torch.arange(40.0).reshape(1, 20, 2).sin()
    d[0, 0] = 1e4
    pairs = Pairs(Tokens.of(torch.ones(1, 20, dtype=torch.long)), torch.zeros(1, 20, 2), d)
    one = torch.eye(2)
    scale = grafting._Scale(torch.zeros(2), one, float(d[0, 1:].square().sum(-1).mean()), 9.0)
    total, count = scale.unexplained(torch.zeros_like(d), pairs)  # nothing is predicted: every error is the update
    assert float(total) == pytest.approx(9 + 19, rel=1e-5)
    assert float(count) == pytest.approx(19, abs=1e-4)
    total, count = replace(scale, cap=float("inf")).unexplained(torch.zeros_like(d), pairs)
    assert float(count) == 20
    assert float(total) > 1e7


def test_padding_does_not_count(pairs):
    scale = grafting._Scale.of(pairs.moments(), Objective(), torch.device("cpu"))
    found = pairs.batch(range(6))
    x = torch.where(found.tokens.mask.unsqueeze(-1), found.x_start, 1e6)
    assert [float(a) for a in scale.unexplained(x, found)] == pytest.approx(
        [float(a) for a in scale.unexplained(found.x_start, found)], rel=1e-6
    )


def test_kl_and_cross_entropy_are_those_of_the_whole_model(load, tmp_path):
    teacher = Stack(load("gemma2"))
    pairs = harvested(teacher, tmp_path)
    student = layout.build(teacher.model, layout.middle(4, *SPAN))

    def weigh(tokens):
        return torch.where(tokens.ids % 2 == 0, 1.0, 0.25) * tokens.mask

    for weights in (None, weigh):
        each_term, totals, batch = terms(teacher, pairs, Objective(0.0, 1.0, 1.0), student, weights)
        found, tokens = each_term.detach(), batch.pairs.tokens
        p, q = (Stack(model).run(tokens)[:, :-1].log_softmax(-1) for model in (teacher.model, student))
        w = (weights or grafting._equal_weights)(tokens)[:, 1:]
        each = cross_entropy(q.transpose(1, 2), tokens.ids[:, 1:], reduction="none")
        assert float(found[1]) == pytest.approx(float(((p.exp() * (p - q)).sum(-1) * w).sum() / w.sum()), rel=1e-4)
        assert float(found[2]) == pytest.approx(float((each * w).sum() / w.sum()), rel=1e-5)
        assert totals[1:].tolist() == pytest.approx([float(w.sum())] * 2)
    assert float(terms(teacher, pairs, Objective(0.0, 1.0, 0.0))[0][1].detach()) == pytest.approx(0, abs=1e-6)


# --- interrupted -----------------------------------------------------------------------------------------------------


def test_resumed_is_uninterrupted_bit_for_bit(pairs, tmp_path, monkeypatch):
    teacher, objective = network(), Objective(1.0, 0.5, 0.5)

    def train(folder):
        return graft.train(teacher, pairs, HELDOUT, tmp_path / folder, objective=objective, schedule=SHORT)

    whole, look, looks = train("whole"), graft.Task.evaluate, []

    def interrupted(task):
        looks.append(task)
        if len(looks) == 3:
            raise KeyboardInterrupt
        return look(task)

    monkeypatch.setattr(grafting.Task, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("part")
    assert tables.read(tmp_path / "part" / "curve.csv")["step"].tolist() == [0, 2]
    monkeypatch.undo()
    resumed = train("part")
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
    assert np.array_equal(resumed.curve["unexplained"], whole.curve["unexplained"])
    assert weights_sha256(train("part").model) == weights_sha256(whole.model)  # finished: the same again


# --- healing ---------------------------------------------------------------------------------------------------------


def test_healing_changes_what_it_says_and_keeps_the_books(pairs, tmp_path):
    teacher = network()
    grown = graft.train(teacher, pairs, HELDOUT, tmp_path / "run", depth=1, schedule=SHORT)
    before = weights_sha256(grown.model)
    for parts, changed in (("junction", {1, 2}), ("all", {0, 1, 2})):
        healed = graft.heal(teacher, grown, pairs, HELDOUT, tmp_path / parts, parts=parts, schedule=SHORT)
        assert weights_sha256(grown.model) == before
        assert healed.span == (1, 2)
        assert changed == {i for i in range(3) if not same(layer(healed.model, i), layer(grown.model, i))}
        outside = {n for n in weights_of(grown.model) if not n.startswith(f"{layout.layers_path(grown.model)}.")}
        old, new = weights_of(grown.model), weights_of(healed.model)
        assert {torch.equal(old[name], new[name]) for name in outside} == {parts == "junction"}
        books = healed.ledger.frame().set_index(["phase", "teacher"])
        assert set(books.index) == {
            ("harvest", True),
            ("training", False),
            ("healing", False),
            ("healing: teacher", True),
        }
        kept = grown.ledger.frame().set_index(["phase", "teacher"])
        assert books.loc[kept.index].equals(kept)
        assert healed.curve["operations"].iloc[0] == grown.curve["operations"].iloc[-1]
        assert healed.curve["kl"].iloc[-1] < healed.curve["kl"].iloc[0]


# --- the ledger ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 3])
def test_the_harvest_costs_its_share_of_a_forward_pass(tmp_path, stop):
    teacher, corpus = network(), Tokens.of(known_networks.tokens(80, 12))
    pairs = harvested(teacher, tmp_path, corpus, (1, stop))
    context = teacher.context(corpus)
    _, counted = Counter()("forward", lambda: teacher.execute(":", context.x0, context))
    harvest = pairs.ledger(teacher).frame().iloc[0]
    assert harvest["teacher"]
    assert harvest["tokens"] == 80 * 12
    assert harvest["operations"] == pytest.approx(counted * stop / 4, rel=0.02)
    assert harvest["seconds"] == pairs.seconds > 0


# --- what goes wrong -------------------------------------------------------------------------------------------------


def refused(said, teacher, pairs, folder, error=ValueError, **options):
    with pytest.raises(error, match=said):
        graft.train(teacher, pairs, HELDOUT, folder / "run", **{"schedule": SHORT, **options})


def test_activations_that_are_not_this_model_s_or_were_damaged_are_told(tmp_path):
    teacher = network()
    pairs = harvested(teacher, tmp_path)
    refused("not of native as it is now, but with weights .*: harvest them again", network(seed=1), pairs, tmp_path)
    shard = tmp_path / "latents" / pairs.shards[0].file
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    refused(shard.name, teacher, pairs, tmp_path)


def test_what_cannot_be_is_told(pairs, tmp_path):
    teacher = network()
    refused(
        "a batch of 32 prompts needs as many, there are 24", teacher, pairs, tmp_path, schedule=replace(SHORT, batch=32)
    )
    student = layout.build(teacher.model, layout.middle(4, *SPAN))
    for parts, objective, said in (
        ("ends", Objective(), "parts is middle, junction, all, got 'ends'"),
        ("junction", Objective(), "learns from kl or cross_entropy only"),
        ("all", Objective(), "not all 0"),
    ):
        with pytest.raises(ValueError, match=said):
            graft.fit(
                teacher, student, SPAN, pairs, HELDOUT, tmp_path / "x", parts=parts, objective=objective, schedule=SHORT
            )
    for wrong, said in (
        ({"latent": 0.0}, "not all 0"),
        ({"kl": -1.0}, "factors of 0 or more"),
        ({"whiten": "zca"}, "whiten is std, principal or none, got 'zca'"),
        ({"cap": 0.0}, "cap above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Objective(**wrong)
    for span in ((2, 2), (0, 4), (3, 1), (1, 5)):
        with pytest.raises(ValueError, match=r"nothing of it would stay fixed|layers"):
            harvested(teacher, tmp_path / "no", span=span)
    refused("depth = -1", teacher, pairs, tmp_path, depth=-1)
    assert not (tmp_path / "run").exists()


def test_half_precision_is_told(load, tmp_path):
    teacher = Stack(load("llama", torch.bfloat16))
    pairs = harvested(teacher, tmp_path, dtype=torch.bfloat16)
    refused("in torch.bfloat16, which training would round away", teacher, pairs, tmp_path)


@pytest.mark.parametrize("every", [1, 4])
def test_a_learning_rate_that_blows_up_is_told_and_the_checkpoint_named(pairs, tmp_path, every):
    refused(
        r"step.*checkpoint of\s+step \d is whole.*try a smaller learning rate",
        network(),
        pairs,
        tmp_path,
        schedule=replace(SHORT, learning_rate=1e30, warmup=1, every=every),
    )
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
