"""What the documents say runs, and what runs is documented."""

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


def test_a_name_that_is_not_there_would_be_found():
    assert resolves("series.windows")
    assert resolves("scan.search")
    assert not resolves("series.wimdows")
    assert not resolves("frames.COLUMNS")
