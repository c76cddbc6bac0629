"""The command line: every kind of bad input is refused in words, and what is wrong with it before torch is there."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch

import surgery
from support import fixtures, made_up
from support.commands import hurry, python, refused, run, write_prompts
from surgery import console, study
from surgery.corpus import text_files
from surgery.records import tables

WINDOWS = ("series_windows.csv", "series_windows.manifest.json")


@pytest.fixture(scope="module")
def model(model_folder) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("text"))


@pytest.fixture
def quick(monkeypatch):
    hurry(monkeypatch)


def test_an_unknown_measurement_lists_what_there_is(tmp_path):
    result = run("study", "sequels", "--out", tmp_path / "x")
    assert result.exit_code == 2
    assert "there is no 'sequels', did you mean 'series'? There are series, reversion, scan, anatomy." in " ".join(
        result.stderr.split()
    )
    with pytest.raises(ValueError, match="there is no measurement 'sequels'; there are series, reversion, scan"):
        study.run(["sequels"], out=tmp_path / "x")


@pytest.mark.parametrize(
    "arguments", [["--prompts", 0], ["--max-length", 1], ["--max-tokens", 1], ["--nonsense"], ["--seed", "x"]]
)
def test_wrong_options_are_wrong_usage(arguments):
    result = run("study", *arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot read", "it does not exist"]),
        (b"", ["holds no prompt", "it is empty"]),
        (b" \n\n \n", ["holds no prompt"]),
        (b"\x80\x81 binary", ["is not text", "not UTF-8"]),
        (b"some\x00thing", ["is not text", "null bytes"]),
        (b"w1 w2 w3\n\n\nw4 w5\n\nw6", []),
    ],
)
def test_a_text_file_that_cannot_be_used(quick, model, tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    result = run("study", "--model", model, "--text", path, "--out", tmp_path / "results")
    if words:
        refused(result, str(path), *words)
    else:
        assert result.exit_code == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{text: w1}", ["line 2 is not JSON"]),
        ('["w1"]', ["line 2 has no text", '{"text": "..."}']),
        ('{"prompt": "w1"}', ["line 2 has no text"]),
        ('{"text": 5}', ["line 2 has no text"]),
    ],
)
def test_a_line_of_json_that_cannot_be_used_is_named(model, tmp_path, line, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "w1 w2 w3"}\n' + line)
    refused(run("study", "--model", model, "--text", path, "--out", tmp_path / "results"), str(path), *words)


def test_a_prompt_too_short_is_named_by_its_line(load, tmp_path):
    stack = surgery.Stack(load("llama"))
    stack.model.tokenizer.backend_tokenizer.post_processor = None  # no <bos>: one word is one token
    path = tmp_path / "prompts.txt"
    path.write_text("w1 w2 w3\n\nw4\n")
    with pytest.raises(
        ValueError, match=r"prompts\.txt, line 3: the prompt \('w4'\) has 1 token; a prompt needs at least 2"
    ):
        study.tokenise(stack, text_files.read_prompts(path), path, 16)


def test_long_prompts_are_cut(load):
    stack = surgery.Stack(load("llama"))
    tokens = study.tokenise(stack, [(1, "w1 " * 500), (2, "w1 w2")], None, 6)
    assert tokens.mask.sum(1).tolist() == [6, 3]
    assert study.tokenise(stack, [(1, "w1 " * 500)], None, 10**6).ids.shape[1] == stack.n_ctx


def test_a_directory_as_text_is_said(model, tmp_path):
    refused(run("study", "--model", model, "--text", tmp_path, "--out", tmp_path / "r"), "it is a folder, not a file")


def test_a_model_without_prompts_of_its_own_needs_a_text(model, tmp_path):
    refused(run("study", "--model", model, "--out", tmp_path / "r"), "--text FILE")


def test_an_unknown_model_is_said(text, tmp_path):
    refused(
        run("study", "--model", "no-such-model", "--text", text, "--out", tmp_path / "r"), "no model 'no-such-model'"
    )
    refused(run("check", "--model", "no-such-model"), "no model 'no-such-model'")


def test_missing_weights_are_said(text, tmp_path):
    folder = fixtures.save("llama", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    refused(run("study", "--model", folder, "--text", text, "--out", tmp_path / "r"), "has no weights")


def test_weights_that_are_not_numbers_are_said(text, tmp_path):
    broken = fixtures.hugging_face("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "model")
    fixtures.tokenizer().save_pretrained(tmp_path / "model")
    result = run("study", "--model", tmp_path / "model", "--text", text, "--out", tmp_path / "r")
    refused(result, "not finite")
    assert list((tmp_path / "r").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_found_out_before_anything_is_opened(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "load", lambda *_: pytest.fail("the model was opened"))
    (tmp_path / "taken").write_text("")
    result = run("study", "--model", model, "--text", text, "--out", tmp_path / "taken")
    refused(result, "cannot write to the folder", "it is a file, not a folder", "choose another")


def test_a_disk_that_fills_up_leaves_whole_files_only(quick, model, text, tmp_path, monkeypatch):
    real, count = os.fsync, [0]

    def fill(descriptor):
        count[0] += 1
        if count[0] > 6:  # the agenda, two files of the windows, the agenda twice, one file: the next fills the disk
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fill)
    out = tmp_path / "results"
    refused(
        run("study", "--model", model, "--text", text, "--out", out), "no space left on the disk", "reversion_layers"
    )
    assert {file.name for file in out.iterdir()} == {*WINDOWS, "study.json"}
    assert len(tables.read(out / made_up.SERIES)) == 6


def test_a_folder_without_results_has_no_report(tmp_path):
    refused(run("report", tmp_path), "holds no measurement", "surgery study --out")


def test_debug_shows_where_an_error_comes_from(tmp_path):
    result = run("report", tmp_path, "--debug")
    assert isinstance(result.exception, ValueError)


def test_what_is_shown_is_no_markup_and_moves_no_terminal(capsys):
    result = run("check", "--model", "[/x]\x1b[31m[red]")
    refused(result, "[/x]\\x1b[31m[red]")
    console.say("[bold]a\x07\nb")
    assert capsys.readouterr().err == "[bold]a\\x07\nb\n"


WRONG = """
import contextlib, io, json, sys
from surgery import cli
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try: cli.app(words)
        except SystemExit as end: code = end.code
    print(code, "torch" in sys.modules, errors.getvalue().strip())
"""


def test_a_wrong_command_is_told_without_torch(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder").mkdir()
    out = ["--out", str(tmp_path / "out")]
    wrong = {
        ("study", "--model", "smolm2", *out): "did you mean 'smollm2'?",
        ("study", "--model", "a b/c", *out): "no model 'a b/c'",
        ("check", "--model", "./none"): "there is no folder ./none",
        ("check", "--model", str(tmp_path / "folder")): "is a folder without config.json",
        ("check", "--model", str(tmp_path / "taken")): "is a file; give the folder",
        ("tape", ":", "--device", "cuda0", *out): "there is no device 'cuda0'",
        ("tape", ":", "--out", str(tmp_path)): "is not an empty folder",
        ("study", "--device", "meta", *out): "holds no weights",
        ("study", "--text", str(tmp_path / "none.txt"), *out): "it does not exist",
        ("study", "--text", str(tmp_path / "empty.txt"), *out): "holds no prompt",
        ("scan", "--budget", "soon", *out): "is no budget: a budget is a number of seconds, minutes or hours",
        ("graft", "--budget", "10", *out): "such as 90s, 10m or 2h, or none for everything",
        ("plan", "--budget", "0m"): "is no budget",
        ("scan", "--probes", "recal", *out): "there is no probe set 'recal'",
        ("scan", "--probes", str(tmp_path / "empty.jsonl"), *out): "holds no probe",
        ("scan", "--family", "repeats", *out): "did you mean 'repeat'?",
        ("graft", "--text", str(tmp_path / "none.txt"), *out): "it does not exist",
        ("graft", "--heldout", str(tmp_path / "empty.txt"), *out): "holds no prompt",
        ("graft", "--middle", "9:4", *out): "--middle is start:stop",
        ("study", "--out", str(tmp_path / "taken")): "it is a file, not a folder",
    }
    done = python("-c", WRONG, json.dumps(list(wrong)))
    said = re.split(r"^(?=[0-9] (?:True|False) )", done.stdout, flags=re.MULTILINE)[1:]
    assert len(said) == len(wrong)
    for answer, (words, expected) in zip(said, wrong.items(), strict=True):
        code, torch_imported, sentence = answer.split(" ", 2)
        assert torch_imported == "False", words
        assert code == ("2" if "--middle" in words or "--family" in words else "1"), answer
        assert expected in " ".join(sentence.split()), words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["study series", "check", "scan", "tape :", "graft"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--device banana", "there is no device 'banana' here; give cpu"),
        ("--device meta", "holds no weights"),
        ("--dtype float3", "did you mean 'float32'?"),
    ],
)
def test_devices_and_number_formats_that_are_not_there_are_refused(tmp_path, command, option, message):
    out = [] if command == "check" else ["--out", str(tmp_path / "out")]
    result = run(*command.split(), *option.split(), *out)
    assert result.exit_code == (2 if "dtype" in option else 1)
    assert message in result.output.replace("\n", " ")


def test_the_error_of_a_wiring_points_at_the_place(tmp_path):
    first, text, caret, example = run("tape", "(2*((0)*50000))*50000", "--out", tmp_path / "taped").stderr.splitlines()
    assert first.startswith("error: 50000 times")
    assert text[caret.index("^") :] == "50000"
    assert example.startswith("for example")
