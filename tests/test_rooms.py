"""The house: what imports what, what a user finds in it, and the columns of the files that it leaves."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import beartype
import jaxtyping
import pytest
import torch
from jaxtyping import Float

import surgery
from support.places import REPOSITORY
from surgery.chapters import CHAPTERS, MEASURED, every_chapter
from surgery.models.tokens import Tokens
from surgery.moved import MOVED
from surgery.stats import bootstrap

PACKAGE = REPOSITORY / "surgery"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
VALUES = {"load", "Sampling", "Stack", "Wiring"}
HEADERS = Path(__file__).parent / "support" / "csv_headers.txt"


def private_imports(path: Path) -> list[str]:
    """Names with a leading underscore that a file takes from a module of ours."""
    return [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("surgery")
        for alias in node.names
        if alias.name.startswith("_")
    ]


def test_a_private_import_would_be_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("from surgery.models.stack import Stack, _choose\n")
    assert private_imports(file) == ["surgery.models.stack._choose"]


@pytest.mark.parametrize("folder", ["surgery", "studies", "benchmarks"])
def test_no_private_name_is_imported_across_modules(folder):
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    assert files
    assert {str(path): names for path in files if (names := private_imports(path))} == {}


def test_a_user_finds_the_rooms_and_little_else():
    tools = {"atlas", "cli", "hooks", "plot", "report", "study", "tape"}
    assert set(dir(surgery)) == {*ROOMS, *VALUES, *tools}
    assert all(getattr(surgery, name) is not None for name in dir(surgery))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_lists_its_modules_and_every_name_in_it_resolves(room):
    package = importlib.import_module(f"surgery.{room}")
    modules = {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"}
    assert modules <= set(dir(package))
    for name in dir(package):
        assert getattr(package, name) is not None
    assert package.__doc__


@pytest.mark.parametrize("room", ROOMS)
def test_no_module_of_a_room_has_the_name_of_one_of_its_verbs(room):
    package = importlib.import_module(f"surgery.{room}")
    for path in (PACKAGE / room).glob("[!_]*.py"):
        assert getattr(package, path.stem).__name__ == f"surgery.{room}.{path.stem}"


@pytest.mark.parametrize(("old", "new"), MOVED.items(), ids=MOVED)
def test_a_moved_module_is_pointed_to_and_there(old, new):
    assert importlib.import_module(f"surgery.{new}")
    with pytest.raises(ImportError, match=rf"surgery\.{old} has moved: import surgery\.{re.escape(new)}"):
        importlib.import_module(f"surgery.{old}")
    with pytest.raises(AttributeError, match=rf"has moved: import surgery\.{re.escape(new)}"):
        getattr(surgery, old)


def test_a_name_that_never_was_is_told_with_what_there_is():
    with pytest.raises(AttributeError, match=r"surgery has no 'sergery'; it has Sampling, Stack, Wiring, anatomy"):
        surgery.sergery  # noqa: B018


def test_importing_surgery_costs_no_torch():
    code = "import sys, surgery; dir(surgery); assert not {'torch', 'pandas', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_chapters_are_registered_under_their_own_names():
    assert [chapter.name for chapter in every_chapter()] == list(CHAPTERS)
    assert set(MEASURED) <= set(CHAPTERS)
    files = [file for chapter in every_chapter() for file in chapter.files]
    assert len(files) == len(set(files)), "no file belongs to two chapters"


def test_files_of_a_study_have_the_columns_that_they_always_had():
    """The header lines that version 0.1.0 wrote, each column with a meaning in the chapter that owns the file."""
    headers = dict(line.split(": ") for line in HEADERS.read_text().splitlines())
    owned = {file: columns for chapter in every_chapter() for file, columns in chapter.files.items()}
    assert headers
    for file, header in headers.items():
        if file in owned:
            missing = set(header.split(",")) - set(owned[file])
            assert not missing, f"{file}: {sorted(missing)}"


def test_shapes_are_checked_in_every_room_that_has_arrays(pytestconfig):
    checked = pytestconfig.getoption("--jaxtyping-packages").split(",")
    with_arrays = {
        room for room in ROOMS if any("jaxtyping" in path.read_text() for path in PACKAGE.glob(f"{room}/*.py"))
    }
    assert {f"surgery.{name}" for name in (*with_arrays, "hooks")} == {
        name for name in checked if "beartype" not in name
    }


def test_a_wrong_shape_or_type_is_noticed_where_a_signature_names_an_array():
    with pytest.raises(jaxtyping.TypeCheckError):
        bootstrap.rotation(torch.zeros(2, 3))
    with pytest.raises(jaxtyping.TypeCheckError):
        Tokens(torch.zeros(2, 3), torch.ones(2, 3).bool())


def half(x: Float[torch.Tensor, "batch pos"], by: int = 2, **_: Any) -> Float[torch.Tensor, "batch pos"]:
    return x[: len(x) // by]


def test_what_is_returned_is_checked_with_the_arguments_and_an_error_of_the_function_stays_its_own():
    checked = jaxtyping.jaxtyped(half, typechecker=beartype.beartype)
    assert checked(torch.ones(3, 1), by=1, other=2).shape == (3, 1)
    with pytest.raises(jaxtyping.TypeCheckError, match="returned"):
        checked(torch.ones(4, 1))
    with pytest.raises(jaxtyping.TypeCheckError, match="by"):
        checked(torch.ones(4, 1), by="2")
    with pytest.raises(ZeroDivisionError):
        checked(torch.ones(4, 1), by=0)
