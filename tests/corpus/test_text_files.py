"""Text files as they are found: a line ends at a newline and nowhere else."""

import json

import pytest

from surgery.corpus import probes
from surgery.corpus.text_files import read_prompts

ODD = "one\u2028two\u2029three\x85four\x0cfive\x1csix"


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_line_of_json_ends_at_a_newline_only(tmp_path, name, end, mark):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in (ODD, "second")]
    (tmp_path / name).write_bytes(mark + (end.join(lines) + end).encode())
    assert read_prompts(tmp_path / name) == [(1, ODD), (2, "second")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_so_does_a_line_of_text(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(end.join([ODD, "", "  second  "]).encode())
    assert read_prompts(tmp_path / "a.txt") == [(1, ODD), (3, "  second  ")]


def test_a_list_in_one_json_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, "two"], indent=1))
    assert read_prompts(path) == [(1, "one"), (2, "two")]
    assert read_prompts(path, most=1) == [(1, "one")]
    for content, message in (
        ('{"text": "one"}', "is not a JSON list"),
        ('[{"words": 1}]', r"entry 1 has no text"),
        ('["a",', "entry 2 is not JSON"),
        ('["a" "b"]', "entry 2 is not JSON: there is no comma"),
        ("[" * 100_000, "entry 1 is not JSON: it is nested too deeply"),
        ("", "holds no prompt"),
        ("[]", "holds no prompt"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(path)


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.yaml", "a.html"])
def test_other_formats_are_not_read_as_lines_of_text(tmp_path, name):
    (tmp_path / name).write_text("text\nthe first row\n")
    with pytest.raises(ValueError, match=r"prompts are not read from \.\w+ files; give \.jsonl"):
        read_prompts(tmp_path / name)


def test_probes_too(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps({"prompt": ODD, "answer": "seven"}, ensure_ascii=False).encode() + b"\r\n")
    assert probes.load(path).probes[0].prompt == ODD
