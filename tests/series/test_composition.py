import functools

import numpy as np
import pytest
import torch

from surgery import Stack
from surgery.instruments import known_networks
from surgery.models.errors import ModelError
from surgery.records import tables
from surgery.series.composition import COLUMNS, HEADS, KINDS, compositions


@functools.cache
def measured(share):
    model = known_networks.mixed_network(share, n_layers=4)
    return compositions(Stack(model), ["MLP-MLP"], draws=4).set_index(["earlier", "later"])


def test_parallel_network_composes_nothing():
    frame = measured(0.0)
    assert frame["mean"].max() < 1e-12
    assert np.allclose(frame["baseline"], 1 / np.sqrt(40), rtol=0.2)


def test_serial_network_composes_neighbours_alone():
    frame = measured(1.0)
    neighbours = frame.index.get_level_values("later") - frame.index.get_level_values("earlier") == 1
    assert (frame["excess"][neighbours] > 0.1).all()
    assert frame["mean"][~neighbours].max() < 1e-12


def test_between_parallel_and_serial_it_rises():
    readings = [measured(share).loc[(1, 2), "mean"] for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert (np.diff(readings) > 0.01).all()


def test_attention_that_writes_nothing_is_undefined():
    frame = compositions(Stack(known_networks.parallel_network(n_layers=2)))
    assert frame[["mean", "max", "baseline", "excess"]].isna().all().all()


def test_untrained_heads_have_no_excess():
    frame = compositions(Stack(known_networks.random_network(n_layers=4)), KINDS, draws=4)
    assert frame["excess"].abs().max() < 0.02
    assert frame["kind"].unique().tolist() == list(KINDS)
    assert frame[["mean", "max"]].min().min() > 0
    assert (frame["max"] <= 1).all()
    assert np.allclose(frame["baseline"], 1 / np.sqrt(48), rtol=0.15)


def linear_part(module, d_model):
    """Column by column, by running the norm on large one-hot vectors beside what it does to their opposites."""
    basis = torch.eye(d_model)
    scale = basis - basis.mean(-1, keepdim=True) if "LayerNorm" in type(module.original_component).__name__ else basis
    rms = scale.square().mean(-1, keepdim=True).sqrt()
    return ((module(1e4 * basis) - module(-1e4 * basis)) / 2 * rms).detach().double()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_heads_are_composed_as_their_whole_matrices_say(load, name):
    stack = Stack(load(name))
    earlier, later = stack.model.blocks[0], stack.model.blocks[2]

    def whole(block, key):
        weight = getattr(block.attn, key).detach().double()
        return weight.repeat_interleave(4 // len(weight), 0)

    norms = [linear_part(block.ln1, 32) for block in (earlier, later)]
    query, key, value = (norms[1] @ whole(later, name) for name in ("W_Q", "W_K", "W_V"))
    written = norms[0] @ whole(earlier, "W_V") @ whole(earlier, "W_O")
    read = {"Q": query @ key.mT, "K": key @ query.mT, "V": value @ whole(later, "W_O")}
    found = compositions(stack).set_index(["earlier", "later", "kind"])
    for kind, matrices in read.items():
        expected = [float((a @ b).norm() / a.norm() / b.norm()) for a in written for b in matrices]
        row = found.loc[(0, 2, kind)]
        assert row["mean"] == pytest.approx(np.mean(expected), rel=1e-4)
        assert row["max"] == pytest.approx(np.max(expected), rel=1e-4)


def test_a_head_that_reads_what_another_writes_stands_out(load):
    stack = Stack(load("native-rms"))
    before = compositions(stack).set_index(["earlier", "later", "kind"])
    with torch.no_grad():  # head 1 of layer 3 asks for what head 0 of layer 1 writes
        weight = {name.replace("._original_component", ""): value for name, value in stack.model.named_parameters()}
        weight["layers.3.attn.q.weight"][8:16] = weight["layers.1.attn.o.weight"][:, :8].T
    after = compositions(stack).set_index(["earlier", "later", "kind"])
    assert after.loc[(1, 3, "Q"), "excess_max"] > before.loc[(1, 3, "Q"), "excess_max"] + 0.1
    assert after.loc[(1, 3, "V"), "excess_max"] == pytest.approx(before.loc[(1, 3, "V"), "excess_max"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2", "olmo2", "opt", "qwen3"])
def test_every_architecture_is_measured_and_left_as_it_was(load, name):
    stack = Stack(load(name))
    before = {name: value.clone() for name, value in stack.model.named_parameters()}
    frame = compositions(stack, KINDS)
    assert np.isfinite(frame.drop(columns="kind")).all().all()
    assert frame["mean"].between(0, 1).all()
    assert all(torch.equal(value, before[name]) for name, value in stack.model.named_parameters())


def test_tables_can_be_written_and_the_seed_decides(tmp_path):
    stack = Stack(known_networks.random_network(n_layers=3))
    first, again, other = (compositions(stack, seed=seed) for seed in (0, 0, 1))
    assert first.equals(again)
    assert not np.allclose(first["baseline"], other["baseline"])
    assert np.allclose(first["mean"], other["mean"])
    tables.write(first, tmp_path / "composition.csv", {}, COLUMNS)
    assert set(first) == set(COLUMNS)


def test_weights_that_are_not_there_are_refused_in_a_sentence(load):
    stack = Stack(load("mixtral"))
    assert set(compositions(stack)["kind"]) == set(HEADS)
    for kinds in (["MLP"], ["MLP-Q"]):
        with pytest.raises(ModelError, match=r"no single matrix mlp.W_.*ask for heads, kinds=\('Q', 'K', 'V'\)"):
            compositions(stack, kinds)
    with pytest.raises(ModelError, match=r"no single matrix mlp\.W_in"):
        compositions(Stack(load("native-attention-only")), ["MLP-MLP"])


@pytest.mark.parametrize(
    ("kinds", "draws", "message"),
    [
        (["A"], 1, "are Q, K, V, MLP, MLP-Q, MLP-K, MLP-V, MLP-MLP, got A"),
        ([], 1, "got none"),
        (["Q"], 0, "got draws=0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(kinds, draws, message):
    with pytest.raises(ValueError, match=message):
        compositions(Stack(known_networks.random_network(n_layers=2)), kinds, draws=draws)
