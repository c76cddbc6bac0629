"""A package of a user's own is on the command line and in the library, and a broken one stops nothing."""

import json
import sys

import pandas as pd
import pytest
import torch

from support import made_up, package
from support.commands import python, refused, run, write_prompts
from surgery import Stack, catalogue, chapters, plugins, report, study
from surgery.chapters import MEASURED
from surgery.corpus import probes
from surgery.models.names import BUNDLED, WHEELS
from surgery.page.parts import PAGE
from surgery.planning import own
from surgery.records import tables
from surgery.scan import study as scan_study
from surgery.wiring import families


@pytest.fixture
def ends(tmp_path, monkeypatch):
    """The package, installed for one test."""
    monkeypatch.syspath_prepend(str(package.write(tmp_path / "site")))
    yield
    sys.modules.pop("ends_package", None)


@pytest.fixture(scope="module")
def model(model_folder):
    return model_folder("llama")


def test_what_a_package_adds_is_listed_beside_what_is_built_in(ends):
    listed = json.loads(run("list", "families", "--json").stdout)["families"]
    assert [entry["name"] for entry in listed] == [*families.NAMES, "broken", "ends"]
    assert listed[-1] == {"name": "ends", "about": "What I measure", "package": "ends_package 1.2"}
    result = run("list", "families")
    assert "note: the family broken of ends_package 1.2 cannot be used: there is no module no_such" in result.stderr
    assert "ends" in result.stdout.split()
    for kind, name in (("probes", "weekdays"), ("measures", "sizes")):
        assert name in run("list", kind).stdout.split()


@pytest.mark.parametrize("kind", list(catalogue.KINDS))
def test_every_kind_is_listed_with_a_line_on_each(kind):
    listed = catalogue.entries(kind)
    assert all(entry.about.strip() and "\n" not in entry.about for entry in listed)
    said = run("list", kind)
    assert said.exit_code == 0
    assert all(f"\n{entry.name} " in said.stdout for entry in listed)


def test_what_is_listed_is_what_there_is():
    assert set(catalogue.MODELS) == {*BUNDLED, *WHEELS}
    assert set(catalogue.MEASURES) == set(MEASURED)


def test_its_family_is_scanned_by_name(ends, model, tmp_path):
    text = write_prompts(tmp_path)
    options = ["--model", model, "--text", text, "--out", tmp_path / "r"]
    table = scan_study.run(str(model), "ends", text=text, out=tmp_path / "r", top=1).table
    assert set(table["wiring"]) == {"1:", ":3"}
    refused(run("scan", "--family", "broken", *options), "the family broken of ends_package 1.2 cannot be used")
    assert "did you mean 'ends'?" in run("scan", "--family", "end", *options).stderr


def test_its_probes_are_asked_by_name(ends, model, tmp_path):
    made = probes.named("weekdays", 6, seed=1)
    assert (made.name, len(made)) == ("weekdays", 6)
    options = ["--model", model, "--family", "swap", "--prompts", 8, "--out", tmp_path / "r", "--top", 1]
    result = run("scan", "--probes", "weekdays", *options)
    assert result.exit_code == 0, result.output
    assert tables.read_manifest(tmp_path / "r" / "scan_table.csv")["settings"]["metric"] == "loglik"


def test_its_measure_is_part_of_a_study(ends, model, tmp_path, monkeypatch):
    made_up.replace_measures(4, monkeypatch.setattr)
    text, out = write_prompts(tmp_path), tmp_path / "r"
    result = run("study", "reversion", "sizes", "--model", model, "--text", text, "--out", out)
    assert result.exit_code == 0, result.output
    frame = tables.read(out / "sizes.csv")
    stack = Stack(str(model))
    stream = stack.stream(stack.tokens(text.read_text().splitlines()))[:-1].double()
    assert frame["size"].tolist() == pytest.approx(stream.square().mean((1, 2, 3)).sqrt().tolist(), rel=1e-6)
    assert tables.read_manifest(out / "sizes.csv")["columns"] == {"layer": "its index", "size": "root mean square"}
    assert "sizes" in json.loads((out / "study.json").read_text())["done"]
    (measure,) = own.installed(["sizes"], MEASURED)
    section = measure.chapter.on_page({"sizes.csv": frame}, {})
    assert section.paragraphs == ["How large the stream is that enters each layer."]
    assert [cell.value for cell in section.tables[0].rows[2]] == ["2", f"{frame['size'][2]:.4g}"]


def test_the_page_of_a_study_has_a_chapter_of_its_measure(ends, model, tmp_path, monkeypatch):
    broken = "[surgery.measures]\nodd = other_package:ODD\n"
    monkeypatch.syspath_prepend(str(package.write(tmp_path / "other", broken, "ODD = 3\n", "other_package")))
    with pytest.warns(UserWarning, match="the measure odd of other_package 1.2 cannot be used"):
        every = [*chapters.every_chapter(), *own.chapters(MEASURED)]
    monkeypatch.setattr(report, "every_chapter", lambda: every)
    text, out = write_prompts(tmp_path), tmp_path / "r"
    result = run("study", "sizes", "--model", model, "--text", text, "--out", out)
    assert result.exit_code == 0, result.output
    page = (out / PAGE).read_text()
    assert 'id="sizes"' in page
    assert "How large is it?" in page


@pytest.mark.filterwarnings("default:the measure odd")
def test_a_broken_measure_is_named_and_left_out(ends, model, tmp_path, monkeypatch):
    made_up.replace_measures(4, monkeypatch.setattr)
    monkeypatch.syspath_prepend(
        str(
            package.write(
                tmp_path / "other", "[surgery.measures]\nodd = other_package:ODD\n", "ODD = 3\n", "other_package"
            )
        )
    )
    text, out = write_prompts(tmp_path), tmp_path / "r"
    result = run("study", "reversion", "odd", "--model", model, "--text", text, "--out", out)
    assert result.exit_code == 0, result.output
    assert "left out: the measure odd of other_package 1.2 cannot be used: its entry point holds a int" in result.stderr
    refused(run("study", "odd", "--model", model, "--text", text, "--out", tmp_path / "q"), "odd of other_package 1.2")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("def weekdays(count, seed): return [1, 2]", "it gives a int among its probes"),
        ("def weekdays(count): return []", "TypeError"),
        ("", "has no attribute 'weekdays'"),
    ],
)
def test_whatever_a_package_raises_becomes_a_sentence(tmp_path, monkeypatch, module, said):
    entries = "[surgery.probes]\nweekdays = odd_package:weekdays\n"
    monkeypatch.syspath_prepend(str(package.write(tmp_path, entries, module, "odd_package")))
    with pytest.raises(
        plugins.PluginError, match=f"the probe set weekdays of odd_package 1.2 cannot be used: .*{said}"
    ):
        probes.named("weekdays", 4)
    sys.modules.pop("odd_package", None)


def test_names_that_are_taken_or_are_no_words_are_left_out_and_told(tmp_path, monkeypatch):
    entries = "[surgery.families]\nrepeat = a:b\nTwo Words = a:b\nmine = a:b\n"
    for name in ("first_package", "second_package"):
        monkeypatch.syspath_prepend(str(package.write(tmp_path / name, entries, "", name)))
    found = plugins.installed("families", families.NAMES)
    assert {name: plugin.package for name, plugin in found.items()} == {"mine": "first_package 1.2"}
    said = " ".join(plugins.refused("families", families.NAMES))
    assert "family repeat of first_package 1.2: left out, surgery has that name already" in said
    assert "family Two Words of first_package 1.2: left out, a name has small letters" in said
    assert "family mine of second_package 1.2: left out, first_package 1.2 has that name already" in said


def test_listing_and_completing_import_neither_torch_nor_the_package(ends, tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from surgery import cli\n"
        "try: cli.main()\nexcept SystemExit as end: assert not end.code\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'pandas', 'numpy', 'ends_package'}))"
    )
    done = python("-c", script, "list", "families")
    assert "ends" in done.stdout.split()
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_measure_has_one_name():
    def nothing(stack, tokens, *, sampling):
        return pd.DataFrame({"a": [torch.pi]})

    one, other = (own.measure(name, nothing, {"a": "pi"}, "Pi?") for name in ("one", "other"))
    with pytest.raises(ValueError, match="the part answers 'one', the chapter 'other'"):
        own.Measure(one.part, other.chapter)


def test_an_unknown_name_lists_those_of_packages_too(ends, tmp_path):
    with pytest.raises(ValueError, match=r"there are series, .*, sizes"):
        study.check(["nothing"], "babel", None)
    with pytest.raises(ValueError, match=r"there is no family 'nothing'; there are .*, ends"):
        scan_study.run("babel", "nothing", out=tmp_path)


# --- the page ---


def test_a_page_is_opened_and_its_place_printed(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    page = tmp_path / PAGE
    page.write_text("<p>")
    result = run("view", tmp_path)
    assert (result.exit_code, result.stdout) == (0, f"{page}\n")
    assert opened == [page.as_uri()]
    assert json.loads(run("view", tmp_path, "--json").stdout)["page"] == str(page)


def test_without_a_browser_the_place_is_printed_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    (tmp_path / PAGE).write_text("<p>")
    result = run("view", tmp_path)
    assert result.stdout == f"{tmp_path / PAGE}\n"
    assert "no browser could be opened here; open the page yourself" in result.stderr


def test_where_there_is_no_page_it_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr("webbrowser.open", lambda address: pytest.fail("a page was opened"))
    refused(run("view", tmp_path / "none"), "there is no folder", "surgery study --out")
    refused(run("view", tmp_path), "has no page and no results; measure first: surgery study --out")
    (tmp_path / "series_windows.csv").write_text("")
    refused(run("view", tmp_path), f"has results, but no page; write it with: surgery report {tmp_path}")
