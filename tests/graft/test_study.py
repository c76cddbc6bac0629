"""The whole experiment on small numbers: its files, going on after a kill, several processes, and the command line."""

import dataclasses
import signal
import socket
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import surgery
from support.processes import Script
from surgery import Stack, cli, models
from surgery.corpus import splits
from surgery.graft import study
from surgery.graft.grafting import Objective, Schedule
from surgery.models.tokens import Tokens
from surgery.records import tables as frames

SCHEDULE = Schedule(steps=4, batch=8, every=2, warmup=2)
SMALL = dict(count=64, judged=16, schedule=SCHEDULE, device="cpu")
OPTIONS = ["--prompts", 64, "--judged", 16, "--batch", 8, "--device", "cpu"]
PROMPTS = [" ".join(f"w{(7 * i + 3 * j * j) % 90}" for j in range(4 + i % 5)) for i in range(40)]


def run(*arguments):
    return CliRunner().invoke(cli.app, ["graft", *map(str, arguments)])


def command(*arguments, **environment):
    """``surgery graft`` as a process of its own."""
    code = "from surgery import cli; cli.main()"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return Script(
        f"import torch; torch.set_num_threads({torch.get_num_threads()}); {code}",
        "graft",
        *arguments,
        environment=threads | environment,
    )


def weights(folder, name="training"):
    return load_file(folder / name / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graft")
    return folder, study.run(out=folder, heal=2, **SMALL)


# --- what it leaves --------------------------------------------------------------------------------------------------


def test_interrupted_while_healing_it_leaves_a_page_of_the_graft(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(study.grafting, "heal", interrupt)
    result = run(*OPTIONS, "--steps", 2, "--every", 2, "--heal", 2, "--out", tmp_path)
    assert result.exit_code == 130
    assert f"the page of what there is so far is {tmp_path / 'report.html'}" in result.stderr.replace("\n", "")
    assert frames.read(tmp_path / study.METHODS)["method"].tolist()[-1] == "graft"
    assert 'id="graft"' in (tmp_path / "report.html").read_text()


def test_it_leaves_its_tables_figure_and_model(small):
    folder, found = small
    for name in ("latents/latents.json", "training/curve.csv", "healing/curve.csv", "graft.png"):
        assert (folder / name).is_file()
    assert (folder / "graft.png").read_bytes()[:4] == b"\x89PNG"
    for name, documented in study.COLUMNS.items():
        table = frames.read(folder / name)
        assert set(table) <= set(documented)
        manifest = frames.read_manifest(folder / name)
        assert manifest["settings"]["span"] == [4, 9]
        assert manifest["settings"]["found"] == found.sentences
    watched, reported = (frames.read_manifest(folder / name) for name in ("training/curve.csv", study.METHODS))
    assert watched["tokens"] != reported["tokens"], "training is not stopped by the prompts that are reported on"
    methods = frames.read(folder / study.METHODS)
    assert methods["method"].tolist() == ["skip", "mean update", "linear map", "graft", "healed"]
    assert methods["seed"].isna().tolist() == [True, True, True, False, False]
    assert methods["steps"].iloc[3:].tolist() == [4, 2]
    assert methods["parameters"].iloc[:3].tolist() == [0, 128, 128 * 128 + 128]
    assert (methods["unexplained"] > 0).all()
    ledger = frames.read(folder / study.LEDGER)
    healed = ledger[ledger["method"] == "healed"]
    assert healed["phase"].tolist() == ["harvest", "training", "healing", "healing: teacher"]
    assert healed["teacher"].tolist() == [True, False, False, True]
    curves = frames.read(folder / study.CURVES)
    assert curves.groupby("method", sort=False)["step"].apply(list).to_dict() == {"graft": [0, 2, 4], "healed": [0, 2]}
    opened = Stack(surgery.load(folder / "training" / "model"))
    assert opened.n_layers == 12


def test_its_sentences_say_every_method_and_its_price(small):
    _, found = small
    assert len(found.sentences) == 1 + len(found.methods)
    assert "Layers 4 to 8 of 12 replaced" in found.sentences[0]
    for sentence, method in zip(found.sentences[1:], found.methods["method"], strict=True):
        assert sentence.startswith(f"{method.capitalize()}: ")
        assert ("operations" in sentence) == (method in ("graft", "healed"))
        assert "exact answers" in sentence


def test_called_again_it_only_gives_its_result_again(small, monkeypatch):
    folder, found = small
    before = {
        path: path.stat().st_mtime_ns for name in ("latents", "training") for path in (folder / name).rglob("*.s*")
    }

    def never(*_):
        raise AssertionError("a step was made again")

    monkeypatch.setattr(study.grafting.Task, "batch", never)
    again = study.run(out=folder, heal=2, **SMALL)
    same = [name for name in found.methods if name != "seconds"]
    pd.testing.assert_frame_equal(again.methods[same], found.methods[same])
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_schedule_in_the_same_folder_is_refused(small):
    folder, _ = small
    with pytest.raises(ValueError, match="belongs to another run"):
        study.run(out=folder, **SMALL | {"schedule": dataclasses.replace(SCHEDULE, steps=6)})


# --- data ------------------------------------------------------------------------------------------------------------


def test_babel_brings_a_corpus_held_out_prompts_and_weights_its_answers():
    data = splits.babel(40, 10, seed=1)
    assert (len(data.corpus), len(data.heldout)) == (40, 10)
    assert data.answers.any(1).all()
    weighed = data.weigh(data.heldout)
    assert torch.equal(weighed == 1, data.answers)
    assert weighed.unique().tolist() == pytest.approx([0, splits.QUESTIONS, 1])
    assert torch.equal(weighed > 0, data.heldout.mask)
    other = splits.babel(40, 10, seed=2)
    assert other.corpus.ids.tolist() != data.corpus.ids.tolist()
    assert torch.equal(other.heldout.ids, data.heldout.ids)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def words(stack, tokens):
    return [stack.model.tokenizer.decode(ids[mask][1:]) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


def test_texts_are_cut_in_three_parts_or_judged_by_others(load, text, tmp_path):
    stack = Stack(load("llama"))
    data = splits.texts(stack, text, None, 30, 512, 128)
    assert [words(stack, part) for part in (data.corpus, data.stop, data.heldout)] == [
        PROMPTS[:24],
        PROMPTS[24:27],
        PROMPTS[27:30],
    ]
    assert data.answers is None
    assert len(splits.texts(stack, text, None, 40, 2, 128).heldout) == 2
    other = tmp_path / "other.txt"
    other.write_text("w5 w6 w7\nw8 w9\nw1 w2")
    data = splits.texts(stack, text, other, 40, 2, 128)
    assert words(stack, data.corpus) == PROMPTS[:38]
    assert words(stack, data.stop) == PROMPTS[38:]
    assert words(stack, data.heldout) == ["w5 w6 w7", "w8 w9"]
    assert words(stack, splits.texts(stack, text, other, 40, 2, 4).heldout) == ["w5 w6 w7", "w8 w9"]
    with pytest.raises(ValueError, match=r"has 9 different prompts: give 10 or more"):
        splits.texts(stack, text, None, 9, 512, 128)


def test_equal_texts_are_in_one_part_only_and_held_out_once(load, tmp_path):
    stack, text, other = Stack(load("llama")), tmp_path / "prompts.txt", tmp_path / "other.txt"
    again = [PROMPTS[0].replace(" ", "   "), PROMPTS[38], f"  {PROMPTS[39]}", PROMPTS[35]]  # also from the last tenths
    text.write_text("\n".join(PROMPTS[:20] + again + PROMPTS[20:] + PROMPTS[36:]))
    data = splits.texts(stack, text, None, 100, 512, 128)
    parts = [words(stack, part) for part in (data.corpus, data.stop, data.heldout)]
    bare = [{prompt.strip() for prompt in part} for part in parts]
    assert sum(map(len, bare)) == len(set(PROMPTS))
    assert set().union(*bare) == set(PROMPTS)
    assert [len(part) for part in parts[1:]] == [4, 4]
    assert parts[0].count(PROMPTS[0]) + parts[0].count(again[0]) == 2, "the corpus keeps its repetitions"
    other.write_text("\n".join(["w5 w6 w7", PROMPTS[3], "w5  w6 w7", "w8 w9"]))
    assert words(stack, splits.texts(stack, text, other, 100, 512, 128).heldout) == ["w5 w6 w7", "w8 w9"]
    other.write_text("\n".join(PROMPTS[:4]))
    with pytest.raises(ValueError, match=r"every prompt of .*other\.txt is in .*prompts\.txt too"):
        splits.texts(stack, text, other, 100, 512, 128)


def test_texts_that_the_cut_makes_equal_are_the_same_and_so_is_what_links_them(load):
    stack = Stack(load("llama"))
    written = ["w1 w2 w3", "w1  w2 w4", "w1 w2 w5 w6", "w7 w8", "w7 w8 w9", "w7 w8 w9 w3"]
    assert splits.same_texts(stack, written, 128) == [0, 1, 2, 3, 4, 5]
    assert splits.same_texts(stack, written, 4) == [0, 1, 2, 3, 4, 4], "<bos> and three words"
    assert splits.same_texts(stack, ["w1 w2", "w3", "w1  w2", "w1 w2 w5"], 3) == [0, 1, 0, 0]


@pytest.mark.parametrize("k", [5, 1])
def test_no_problem_of_babel_is_in_two_parts(k):
    data = splits.babel(400, 60, shares=(1 / k,) * k)
    parts = [set(splits.contents_of(part)) for part in (data.corpus, data.stop, data.heldout)]
    assert all(parts)
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert len(parts[1]) == len(data.stop)
    assert data.stop_answers.any(1).all()


@pytest.mark.parametrize("shared", [(0, 1), (0, 2), (1, 2)])
def test_a_split_with_a_prompt_in_two_parts_is_refused(shared):
    parts = [Tokens.of(torch.arange(10 * i, 10 * i + 8).reshape(4, 2)) for i in range(3)]
    splits.Split(*parts)
    first, second = (parts[i] for i in shared)
    padded = Tokens.of(first.ids[1:2]).pad(3, "right")
    parts[shared[1]] = Tokens(
        torch.cat([second.pad(3, "right").ids, padded.ids]), torch.cat([second.pad(3, "right").mask, padded.mask])
    )
    with pytest.raises(ValueError, match="none may be in two parts"):
        splits.Split(*parts)


# --- the command line ------------------------------------------------------------------------------------------------


def test_a_model_of_one_s_own_learns_from_a_text(model_folder, text, tmp_path):
    out = tmp_path / "out"
    result = run(
        "--model",
        model_folder("llama"),
        "--middle",
        "1:3",
        "--text",
        text,
        "--out",
        out,
        "--depth",
        1,
        "--d-mlp",
        48,
        "--steps",
        2,
        "--batch",
        4,
        "--every",
        1,
        "--precision",
        "bf16",
        "--stored",
        "float32",
        "--device",
        "cpu",
    )
    assert result.exit_code == 0, result.output
    assert "Layers 1 to 2 of 4 replaced" in result.stdout
    assert "exact answers" not in result.stdout
    assert str(out / "training" / "model") in result.stdout
    run_ = frames.read_manifest(out / "training" / "curve.csv")["run"]
    assert run_["schedule"]["precision"] == "bf16"
    opened = surgery.load(out / "training" / "model")
    assert opened.cfg.n_layers == 3
    assert Stack(opened).dtype == torch.float32
    assert weights(out)["model.layers.1.mlp.up_proj.weight"].shape == (48, 32)


def test_help_says_how_to_train_on_several_processes():
    result = run("--help")
    assert result.exit_code == 0
    assert "accelerate launch" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--middle", "4"], 2, "--middle is start:stop, such as 4:9"),
        (["--middle", "four:nine"], 2, "--middle is start:stop"),
        (["--stored", "int8"], 2, "'--stored': there is no 'int8'. There are float16, bfloat16, float32."),
        (["--old", 2], 2, "--old"),
        (["--steps", 0], 2, "--steps"),
        (["--middle", "9:4"], 2, "--middle is start:stop"),
        (["--middle", "0:12"], 1, "nothing of it would stay fixed"),
        (["--latent", 0], 1, "not all 0"),
        (["--precision", "f16"], 2, "'--precision': there is no 'f16', did you mean 'fp16'? There are no, bf16, fp16."),
        (["--unfrozen", "middle"], 2, "'--unfrozen': there is no 'middle'. There are junction, all."),
        (["--batch", 65], 1, "a batch of 65 prompts needs as many, there are 64"),
        (["--text", "nowhere.txt"], 1, "nowhere.txt"),
        (["--d-mlp", 48, "--old", 1], 1, "old=0.0"),
    ],
)
def test_wrong_options_are_told(arguments, code, said, tmp_path):
    result = run(*OPTIONS, "--out", tmp_path, *arguments)
    assert result.exit_code == code, result.output
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr


def test_a_model_without_prompts_of_its_own_needs_a_text(model_folder, tmp_path):
    result = run("--model", model_folder("llama"), "--middle", "1:3", "--out", tmp_path)
    assert result.exit_code == 1
    assert "give a text file with --text FILE" in result.stderr


def test_interrupted_it_says_so(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(study.grafting, "train", interrupted)
    result = run(*OPTIONS, "--out", tmp_path)
    assert result.exit_code == 130
    assert "interrupted: nothing is half-written" in result.stderr


# --- killed, and shared ----------------------------------------------------------------------------------------------


LONGER = Schedule(steps=6, batch=8, every=2, learning_rate=0.05)
BOTH_TERMS = ["--steps", 6, "--every", 2, "--kl", 0.5, "--cross-entropy", 0.5, "--learning-rate", 0.05]


def in_this_process(out):
    """What the command with ``OPTIONS`` and ``BOTH_TERMS`` does, without its page."""
    return study.run(out=out, **SMALL | {"objective": Objective(1.0, 0.5, 0.5), "schedule": LONGER})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run on one process."""
    folder = tmp_path_factory.mktemp("whole")
    in_this_process(folder)
    return folder


def test_killed_it_goes_on_to_the_same_weights_bit_for_bit(whole, tmp_path):
    process = command(*OPTIONS, *BOTH_TERMS, "--out", tmp_path)
    curve, began = tmp_path / "training" / "curve.csv", time.monotonic()
    while not (curve.exists() and len(curve.read_text().splitlines()) > 2):
        assert not process.ended, process.errors
        assert time.monotonic() - began < 240
        time.sleep(0.01)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "training" / "model").exists()
    steps = pd.read_csv(curve)["step"].max()
    assert 2 <= steps < LONGER.steps
    in_this_process(tmp_path)
    expected, resumed = weights(whole), weights(tmp_path)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    tables = [frames.read(folder / "training" / "curve.csv") for folder in (whole, tmp_path)]
    same = [name for name in tables[0] if name != "seconds"]
    pd.testing.assert_frame_equal(tables[0][same], tables[1][same])


def test_two_processes_learn_what_one_does(whole, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    both = [
        command(*OPTIONS, *BOTH_TERMS, "--out", tmp_path, **shared, RANK=rank, LOCAL_RANK=rank)  # as torchrun says it
        for rank in ("0", "1")
    ]
    out = "".join(process.output.read() for process in both)
    for process in both:
        assert process.wait() == 0, process.errors
    told = "".join(process.errors for process in both)
    assert told.count("on 2 processes") == 1
    assert out.count("replaced") == 1  # only the main process speaks
    one, two = (frames.read(folder / "training" / "curve.csv") for folder in (whole, tmp_path))
    measured = ["loss", "unexplained", "unexplained_whitened", "cross_entropy", "kl", "cross_entropy_answers"]
    pd.testing.assert_frame_equal(two[measured], one[measured], rtol=1e-4)
    assert two["tokens"].tolist() == one["tokens"].tolist()
    # each pads its half to a length of its own
    assert (two["operations"].iloc[1:] < one["operations"].iloc[1:]).all()
    books = [frames.read(folder / study.LEDGER).set_index("phase")["tokens"].to_dict() for folder in (whole, tmp_path)]
    assert books[0] == books[1]
    start = {name: tensor for name, tensor in models.plain(surgery.load("babel")).state_dict().items()}
    a, b = weights(whole), weights(tmp_path)
    for name in a:
        moved = (a[name] - start[name]).norm()
        assert (a[name] - b[name]).norm() <= 2e-3 * moved, name
