"""What the documents say runs, and what runs is documented."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import typer.main

import surgery
from support.places import REPOSITORY
from surgery.cli import app

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "data/README.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
ROOMS = [module.name for module in pkgutil.iter_modules(surgery.__path__)]
FILE = re.compile(r"\.(py|pyi|csv|png|html|md|json|jsonl|safetensors|yaml|txt|toml)$")
OF_OTHERS = ("AutoModelForCausalLM",)  # names of other libraries that the documents speak of


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_link_inside_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_command_and_option_is_documented():
    text = (REPOSITORY / "docs" / "commands.md").read_text()
    shared = text.split("## All commands", 1)[1].split("\n## ", 1)[0]
    for name, command in typer.main.get_command(app).commands.items():
        section = text.split(f"## `surgery {name}", 1)[1].split("\n## ", 1)[0]
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option not in ("--help", "--model"):
                    assert f"`{option}`" in section + shared, option
            default = getattr(parameter, "default", None)
            if parameter.name in ("prompts", "max_tokens"):
                assert re.search(rf"`--{parameter.name.replace('_', '-')}`.*\| {default} \|", section), parameter.name


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make (\w+)", (REPOSITORY / "README.md").read_text(), flags=re.MULTILINE))
    assert {"study", "test"} <= named <= targets


def resolves(name: str) -> bool:
    """Whether ``surgery.<name>`` is there: a module, what a module holds, or a field of a class."""
    thing = surgery
    for part in name.split("."):
        try:
            thing = getattr(thing, part)
        except (AttributeError, ImportError):
            if inspect.ismodule(thing):
                try:
                    thing = importlib.import_module(f"{thing.__name__}.{part}")
                except ImportError:
                    return False
            else:
                return part in getattr(thing, "__annotations__", {})
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_name_that_is_documented_is_there(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    names = {
        name
        for code in re.findall(r"`([^`\n]+)`", prose)
        for name in re.findall(r"(?<![\w/.\"'-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", code)
        if not FILE.search(name) and not name.startswith(OF_OTHERS)
    }
    missing = [
        name
        for name in sorted(names)
        if not any(resolves(place + name.removeprefix("surgery.")) for place in ("", *(f"{room}." for room in ROOMS)))
    ]
    assert missing == []


def test_every_paper_that_is_named_is_in_the_list_of_references():
    texts = [*(REPOSITORY / "surgery").rglob("*.py"), *(REPOSITORY / "studies").glob("*.py"), *PAGES]
    named = {number for path in texts for number in re.findall(r"arXiv[ \n:]+(\d{4}\.\d{4,5})", path.read_text())}
    listed = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{4,5})", (REPOSITORY / "docs/references.md").read_text()))
    assert len(named) > 30
    assert named - listed == set()


def test_every_figure_is_in_the_gallery():
    figures = {path.relative_to(REPOSITORY / "docs").as_posix() for path in (REPOSITORY / "docs").rglob("*.png")}
    assert figures == set(re.findall(r"\]\(([^)]+\.png)\)", (REPOSITORY / "docs/gallery.md").read_text()))


def test_every_wiring_that_the_site_draws_is_one():
    drawn = [
        (wiring, int(n_layers))
        for page in PAGES
        for n_layers, body in re.findall(r"^```\{wiring\} (\d+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        for wiring in body.splitlines()
    ]
    assert len(drawn) > 10
    assert all(surgery.Wiring.parse(*case).draw().n_boxes for case in drawn)


def test_every_page_is_in_the_contents_of_the_site():
    docs = REPOSITORY / "docs"
    listed = set(re.findall(r"^([\w/]+)$", (docs / "index.md").read_text(), flags=re.MULTILINE))
    pages = {page.relative_to(docs).with_suffix("").as_posix() for page in docs.rglob("*.md")}
    assert pages - {"index"} == {name for name in listed if (docs / f"{name}.md").exists()}


def test_a_page_is_carried_to_the_site_with_links_that_still_lead_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs"))
    build = importlib.import_module("build")
    build.carry(REPOSITORY / "CONTRIBUTING.md", tmp_path / "CONTRIBUTING.md", tmp_path)
    text = (tmp_path / "CONTRIBUTING.md").read_text()
    assert "](extending.md#rooms)" in text
    assert "](CHANGELOG.md)" in text
    build.carry(REPOSITORY / "docs/findings/parts.md", tmp_path / "findings/parts.md", tmp_path)
    assert "](../data/atlas.md)" in (tmp_path / "findings/parts.md").read_text()


def test_docstrings_and_names_become_what_the_site_can_read(monkeypatch):
    pytest.importorskip("sphinx")  # Python 3.11
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs"))
    assert doctest.testmod(importlib.import_module("sphinx_extension")) == (0, 2)


def test_a_name_that_is_not_there_would_be_found():
    assert resolves("series.windows")
    assert resolves("scan.search")
    assert not resolves("series.wimdows")
    assert not resolves("frames.COLUMNS")
