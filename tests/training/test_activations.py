"""Latents: the pairs are the model's own streams, and nothing that happens to a disk or a process changes them."""

import errno
import json
import os
import re
import signal
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

import surgery
from support.places import TESTS
from support.processes import Script
from support.ragged_tokens import KILLED, LENGTHS, corpus
from surgery.instruments import known_networks
from surgery.models.engine import Engine
from surgery.training import activations
from surgery.training import harvest as harvesting
from surgery.training.activations import open_latents, size_in_bytes
from surgery.training.harvest import harvest

N = sum(LENGTHS)


@pytest.fixture(scope="module")
def stack() -> surgery.Stack:
    return surgery.Stack(known_networks.random_network(n_layers=4))


@pytest.fixture
def made(stack, tmp_path):
    """A harvest of several shards."""
    return harvest(stack, corpus(), 1, 3, tmp_path / "made", shard_tokens=20)


def standing(folder) -> dict[str, bytes]:
    """All bytes but those that say how long it took."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {name: re.sub(rb'"(seconds|checksum)": [^\n]*', b"", content) for name, content in found.items()}


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_pairs_are_the_streams_of_the_model(opened, tmp_path, name, side):
    stack, tokens = opened(name), corpus(side)
    streams = stack.stream(tokens)
    for dtype, rounding in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8), (torch.float32, 0.0)):
        folder = tmp_path / str(dtype)
        found = harvest(stack, tokens, 1, 3, folder, dtype=dtype, batch_size=3, shard_tokens=25)
        order = [7, 0, 4, 9, 4, 2]
        pairs = found.batch(order)
        assert torch.equal(pairs.tokens.mask.sum(1), torch.tensor(LENGTHS)[order])
        assert not pairs.tokens.padded_left
        for row, prompt in enumerate(order):
            n = LENGTHS[prompt]
            assert torch.equal(pairs.tokens.ids[row, :n], tokens.ids[prompt][tokens.mask[prompt]])
            for kept, layer in ((pairs.x_start, 1), (pairs.x_stop, 3)):
                real = streams[layer, prompt][tokens.mask[prompt]]
                allowed = rounding * real.abs() + 1e-5 * real.abs().max()  # batches of other shapes round otherwise
                assert ((kept[row, :n] - real).abs() <= allowed).all()
                assert (kept[row, n:] == 0).all()
        assert (found.n_prompts, found.n_tokens, found.d_model) == (10, N, 32)
        assert (found.start, found.stop, found.dtype, found.lengths.tolist()) == (1, 3, dtype, LENGTHS)


@pytest.mark.parametrize("span", [(0, 2), (2, 4)])
def test_one_end_may_be_left_to_train(stack, tmp_path, span):
    tokens = corpus()
    pairs = harvest(stack, tokens, *span, tmp_path, dtype=torch.float32).batch(range(10))
    for kept, layer in ((pairs.x_start, span[0]), (pairs.x_stop, span[1])):
        torch.testing.assert_close(kept[tokens.mask], stack.stream(tokens)[layer][tokens.mask])


def test_ids_without_padding_are_a_corpus(stack, tmp_path):
    assert harvest(stack, known_networks.tokens(4, 6), 1, 3, tmp_path).lengths.tolist() == [6] * 4


def test_only_the_layers_before_stop_run_and_each_once(stack, tmp_path, monkeypatch):
    run, own = [], Engine.layer
    monkeypatch.setattr(Engine, "layer", lambda self, index, *rest: (run.append(index), own(self, index, *rest))[1])
    harvest(stack, corpus(), 1, 3, tmp_path, batch_size=5)
    assert run == [*range(stack.n_layers), *[0, 1, 2] * 2]  # first, for its identity, all of it on two short prompts


def test_prompts_of_similar_length_share_a_batch(stack, tmp_path, monkeypatch):
    shapes, own = [], surgery.Stack.context
    monkeypatch.setattr(
        surgery.Stack, "context", lambda self, tokens: (shapes.append(tokens.ids.shape), own(self, tokens))[1]
    )
    harvest(stack, corpus(), 1, 3, tmp_path, batch_size=5)
    assert shapes == [(5, 14), (5, 5)]


def test_files_are_plain_safetensors_in_the_order_of_the_corpus(stack, made):
    tokens, folder = corpus(), made.folder
    shards = [load_file(folder / shard.file) for shard in made.shards]
    assert [shard.tokens for shard in made.shards] == [19, 16, 13, 15]
    assert torch.cat([shard["lengths"] for shard in shards]).tolist() == LENGTHS
    assert torch.equal(torch.cat([shard["tokens"] for shard in shards]), tokens.ids[tokens.mask].int())
    for name, layer in (("x_start", 1), ("x_stop", 3)):
        kept = torch.cat([shard[name] for shard in shards])
        assert kept.dtype == torch.float16
        torch.testing.assert_close(kept.float(), stack.stream(tokens)[layer][tokens.mask], rtol=1e-3, atol=1e-3)
    manifest = json.loads((folder / "latents.json").read_text())
    assert {key: manifest[key] for key in ("model", "identity", "corpus_sha256")} == made.source
    assert (manifest["start"], manifest["stop"], manifest["n_prompts"], manifest["n_tokens"]) == (1, 3, 10, N)
    assert manifest["versions"]["surgery"] == surgery.__version__


def test_the_size_is_what_lies_on_the_disk(stack, made):
    bytes_ = sum(shard.bytes for shard in made.shards)
    assert bytes_ == sum((made.folder / shard.file).stat().st_size for shard in made.shards)
    assert 0 < bytes_ - size_in_bytes(N, stack.d_model, torch.float16) - 4 * len(LENGTHS) < 400 * len(made.shards)
    assert size_in_bytes(7, 5, torch.float32) == 7 * (2 * 5 * 4 + 4)


def test_a_long_prompt_has_a_shard_of_its_own(stack, tmp_path):
    found = harvest(stack, corpus(lengths=[2, 12, 3, 3]), 1, 3, tmp_path, shard_tokens=6)
    assert [(shard.prompts, shard.tokens) for shard in found.shards] == [(1, 2), (1, 12), (2, 6)]


def test_what_is_in_memory_does_not_grow_with_the_corpus(stack, tmp_path, monkeypatch):
    largest, own = [], harvesting._stored
    monkeypatch.setattr(harvesting, "_stored", lambda *args: (largest.append(args[1].numel()), own(*args))[1])
    tokens = corpus(lengths=[8] * 60)
    found = harvest(stack, tokens, 1, 3, tmp_path, batch_size=4, shard_tokens=64)
    assert len(found.shards) == 8
    assert max(largest) == 4 * 8 * stack.d_model
    assert found._mapped == {}, "opening maps nothing"
    found.batch([0, 9])
    assert set(found._mapped) == {0, 1}


# --- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [None, [8, 1, 4, 3]])
@pytest.mark.parametrize("skip_first", [True, False])
def test_moments_are_those_of_the_tokens(made, monkeypatch, prompts, skip_first):
    monkeypatch.setattr(activations, "_ROWS", 5)  # many chunks
    pairs = made.batch(range(10) if prompts is None else prompts)
    keep = pairs.tokens.ensemble(skip_first)
    x = pairs.x_start[keep].double()
    u = pairs.x_stop[keep].double() - x
    found = made.moments(prompts, skip_first=skip_first)
    assert found.count == len(x)
    cx, cu = x - x.mean(0), u - u.mean(0)
    for name, expected in (
        ("mean_x", x.mean(0)),
        ("mean_u", u.mean(0)),
        ("xx", cx.T @ cx / len(x)),
        ("xu", cx.T @ cu / len(x)),
        ("uu", cu.T @ cu / len(x)),
    ):
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-10, atol=1e-12)


def test_a_mean_much_larger_than_the_spread_costs_no_digits(made, monkeypatch):
    monkeypatch.setattr(activations, "_ROWS", 5)
    plain = made.moments().xx
    for shard in range(len(made.shards)):
        tensors = made._tensors(shard)
        tensors["x_start"] = tensors["x_start"].double() + 1e6
        tensors["x_stop"] = tensors["x_stop"].double() + 1e6
    shifted = made.moments().xx
    assert float((shifted - plain).abs().max() / plain.abs().max()) < 1e-8


def test_moments_of_one_token_are_refused(made):
    with pytest.raises(ValueError, match="at least two tokens, these prompts have 0"):
        made.moments([2])


# --- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("works", range(5))  # renames in turn: of a shard, of the manifest that names it, and so on
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_is_resumed_is_what_was_never_interrupted(stack, made, tmp_path, monkeypatch, works, error):
    whole, folder, own, used = standing(made.folder), tmp_path / "again", os.replace, []

    def failing(*paths):
        used.append(paths)
        if len(used) > works:
            raise error
        own(*paths)

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", failing)
        with pytest.raises(type(error)) as caught:
            harvest(stack, corpus(), 1, 3, folder, shard_tokens=20)
        if isinstance(error, OSError):
            assert "no space left on the disk" in str(caught.value)
            assert "\n" not in str(caught.value)
    left = standing(folder)
    assert len(left) == -(-works // 2) + (works >= 2), "whole shards only, and a manifest from the first on"
    assert all(whole[name] == content for name, content in left.items() if name != "latents.json")
    if works >= 2:
        with pytest.raises(ValueError, match=r"not finished: it has \d+ of 10 prompts; call harvest again"):
            open_latents(folder)
    harvest(stack, corpus(), 1, 3, folder, shard_tokens=20)
    assert standing(folder) == whole


def test_a_killed_harvest_goes_on(stack, made, tmp_path):
    folder = tmp_path / "killed"
    process = Script(KILLED, folder, TESTS)
    assert process.wait() == -signal.SIGKILL, process.errors
    left = sorted(path.name for path in folder.iterdir())
    assert left[0].startswith(".latents-00002.safetensors."), "killed in the middle of the third"
    left = [name for name in left if not name.endswith(".partial")]
    assert left == [
        "latents-00000.safetensors",
        "latents-00001.safetensors",
        "latents.json",
    ]
    harvest(stack, corpus(), 1, 3, folder, shard_tokens=20)
    found, expected = standing(folder), standing(made.folder)
    assert found.keys() == expected.keys()
    assert found["latents.json"] == expected["latents.json"], "every hash is the same"


@pytest.mark.parametrize("damage", ["missing", "short", "changed", "another"])
def test_only_a_damaged_shard_is_made_anew(stack, made, damage):
    whole, path = standing(made.folder), made.folder / "latents-00001.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        other = (made.folder / "latents-00002.safetensors").read_bytes()
        changed = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"short": content[:-7], "changed": changed, "another": other}[damage])
    words = {
        "missing": "it does not exist",
        "short": f"has {len(content) - 7} bytes instead of {len(content)}",
        "changed": "was changed",
        "another": f"has {len(whole['latents-00002.safetensors'])} bytes instead of",
    }[damage]
    with pytest.raises(ValueError, match=rf"latents-00001\.safetensors .*{words}.*; call harvest again"):
        open_latents(made.folder).verify()
    if damage != "changed":  # a bit among the numbers shows only when all is read
        with pytest.raises(ValueError, match=words):
            open_latents(made.folder)
    before = {path.name: path.stat().st_mtime_ns for path in made.folder.glob("*.safetensors")}
    again = harvest(stack, corpus(), 1, 3, made.folder, shard_tokens=20)
    again.verify()
    assert standing(made.folder) == whole
    after = {path.name: path.stat().st_mtime_ns for path in made.folder.glob("*.safetensors")}
    assert [name for name in sorted(after) if after[name] != before.get(name)] == [path.name]


def test_a_finished_harvest_runs_nothing_again(stack, made, monkeypatch):
    monkeypatch.setattr("surgery.training.harvest._make_shard", lambda *_: pytest.fail("something was harvested"))
    said = []
    again = harvest(stack, corpus("left"), 1, 3, made.folder, shard_tokens=20, say=said.append)
    assert torch.equal(again.batch([3]).x_stop, made.batch([3]).x_stop)
    assert said == ["0 tokens of 0 prompts, 0 bytes (0 GB) in 0 of 4 shards"]


def test_what_a_living_process_writes_is_left_alone(stack, tmp_path):
    living = tmp_path / f".latents-00000.safetensors.{os.getppid()}.partial"
    living.write_bytes(b"half")
    harvest(stack, corpus(), 1, 3, tmp_path)
    assert living.exists()


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(start=2), r"start 1 \(now 2\)"),
        (dict(stop=4), r"stop 3 \(now 4\)"),
        (dict(dtype=torch.bfloat16), r"dtype float16 \(now bfloat16\)"),
        (dict(shard_tokens=21), r"shard_tokens 20 \(now 21\)"),
        (dict(corpus=corpus(seed=1)), r"corpus [0-9a-f]{8} \(now [0-9a-f]{8}\)"),
        (dict(stack=1), r"model.weights [0-9a-f]{8} \(now [0-9a-f]{8}\), model.logits"),
    ],
)
def test_another_harvest_in_the_same_folder_is_refused(stack, made, asked, words):
    before = standing(made.folder)
    if "stack" in asked:
        asked = {"stack": surgery.Stack(known_networks.random_network(n_layers=4, seed=1))}
    usual = dict(stack=stack, corpus=corpus(), start=1, stop=3, out=made.folder, shard_tokens=20)
    with pytest.raises(ValueError, match=rf"holds latents with {words}; harvest into another folder"):
        harvest(**(usual | asked))
    assert standing(made.folder) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(start=2, stop=2), r"no layers \[2, 2\) .* it needs 0 <= start < stop <= 4, for example start=1, stop=2"),
        (dict(start=3, stop=2), r"no layers \[3, 2\)"),
        (dict(start=-1, stop=2), r"no layers \[-1, 2\)"),
        (dict(start=1, stop=5), r"no layers \[1, 5\)"),
        (dict(start=0, stop=4), r"all of .* nothing of it would stay fixed; take start >= 1 or stop <= 3"),
        (dict(dtype=torch.float64), "not in torch.float64"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(shard_tokens=0), "shard_tokens must be at least 1, got 0"),
        (dict(corpus=corpus()[:0]), "no prompt in this corpus"),
        (dict(corpus=corpus(lengths=[4, 0, 2])), "prompt 1 has no token"),
        (dict(corpus=corpus(lengths=[4, 99])), "prompt 1 has 99 tokens, .* reads 64; cut it"),
    ],
)
def test_what_cannot_be_harvested_is_said_and_writes_nothing(stack, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        harvest(**(dict(stack=stack, corpus=corpus(), start=1, stop=3, out=tmp_path / "out") | options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1e6, r"entering layer 1 reach .*e\+0\d, torch.float16 ends at 65504; harvest with dtype=torch.bfloat16"),
        (float("inf"), "entering layer 1 are not finite"),
        (float("nan"), "entering layer 1 are not finite"),
    ],
)
def test_activations_that_do_not_fit_are_said(stack, tmp_path, monkeypatch, factor, words):
    own = surgery.Stack.execute
    monkeypatch.setattr(
        surgery.Stack, "execute", lambda self, wiring, x, context: own(self, wiring, x, context) * factor
    )
    with pytest.raises(ValueError, match=words):
        harvest(stack, corpus(), 1, 3, tmp_path)
    assert standing(tmp_path) == {}
    if factor == 1e6:
        found = harvest(stack, corpus(), 1, 3, tmp_path, dtype=torch.bfloat16).batch([4])
        assert float(found.x_start.abs().max()) > 65504


def test_the_size_is_said_before_anything_runs(stack, tmp_path, monkeypatch):
    said = []
    making = lambda *_: (_ for _ in ()).throw(RuntimeError("a shard is made"))  # noqa: E731
    monkeypatch.setattr("surgery.training.harvest._make_shard", making)
    with pytest.raises(RuntimeError, match="a shard is made"):
        harvest(stack, corpus(), 1, 3, tmp_path, say=said.append)
    (sentence,) = said
    assert sentence.startswith(f"{N} tokens of 10 prompts, ")
    assert int(sentence.split(", ")[1].split()[0].replace(",", "")) >= size_in_bytes(N, stack.d_model, torch.float16)
    assert sentence.endswith(" in 1 of 1 shards")


def test_a_disk_too_small_is_said_before_anything_is_written(stack, tmp_path, monkeypatch):
    monkeypatch.setattr(harvesting.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(1000))
    with pytest.raises(OSError, match=r"the latents need .* GB and .* has 1e-06 GB free; choose another folder"):
        harvest(stack, corpus(), 1, 3, tmp_path)
    assert standing(tmp_path) == {}


def test_no_permission_is_said(stack, tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=r"cannot write to the folder .* there is no permission; choose another one"):
        harvest(stack, corpus(), 1, 3, tmp_path)


def test_a_disk_that_fills_up_meanwhile_is_said(stack, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*latents-00000\.safetensors: there is no space left on the disk"):
        harvest(stack, corpus(), 1, 3, tmp_path)
    assert standing(tmp_path) == {}


def test_folders_without_latents_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no latents in .* \(it does not exist\); make them by harvest"):
        open_latents(tmp_path / "nowhere")
    for content, words in (("{", "is not a manifest of latents"), ("{}", "does not say 'surgery latents 2'")):
        (tmp_path / "latents.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            open_latents(tmp_path)


@pytest.mark.parametrize("prompt", [-1, 10])
def test_prompts_that_are_not_there_are_refused(made, prompt):
    with pytest.raises(ValueError, match=rf"no prompt {prompt} in .*: it has 0 to 9"):
        made.batch([0, prompt])


def test_an_empty_batch_is_refused(made):
    with pytest.raises(ValueError, match="no prompt in this batch"):
        made.batch([])


def test_a_shard_that_goes_while_it_is_open_is_said(made):
    (made.folder / "latents-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*latents-00003\.safetensors: .*; call harvest again"):
        made.batch([9])
