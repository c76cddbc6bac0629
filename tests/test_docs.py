"""What the documents say runs, and what runs is documented."""

import re
from pathlib import Path

import pytest
import typer.main

from support.places import REPOSITORY
from surgery.cli import app

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_command_and_option_is_documented():
    text = (REPOSITORY / "docs" / "commands.md").read_text()
    for name, command in typer.main.get_command(app).commands.items():
        section = text.split(f"## `surgery {name}", 1)[1].split("\n## ", 1)[0]
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option not in ("--help", "--debug", "--model"):
                    assert f"`{option}`" in section, option
            default = getattr(parameter, "default", None)
            if parameter.name in ("prompts", "max_tokens"):
                assert re.search(rf"`--{parameter.name.replace('_', '-')}`.*\| {default} \|", section), parameter.name


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make (\w+)", (REPOSITORY / "README.md").read_text(), flags=re.MULTILINE))
    assert {"study", "test"} <= named <= targets
