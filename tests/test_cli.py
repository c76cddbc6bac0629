"""The command line: a whole study on a small model, every kind of bad input, and instant help."""

import functools
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import typer.main
from typer.testing import CliRunner, Result

import surgery
from support import fixtures, made_up
from support.commands import PROMPTS, hurry, python, refused, run, write_prompts
from support.places import TESTS
from surgery import cli, console, graft, progress, report, scan, study
from surgery.anatomy import boundaries
from surgery.anatomy import files as anatomy_files
from surgery.anatomy import study as anatomy_study
from surgery.chapters import MEASURED
from surgery.records import tables
from surgery.reversion import files as reversion_files
from surgery.reversion import study as reversion_study
from surgery.scan import study as scan_study
from surgery.series import side_by_side
from surgery.training.precisions import MIXED, STORED
from surgery.wiring.families import every_repeat

HEADERS = TESTS / "support" / "csv_headers.txt"  # as version 0.1.0 wrote them
SCAN = ("scan_search", "scan_table", "scan_validation", "scan_winners", "scan_groups", "scan_controls")
REVERSION = [name.removesuffix(".csv") for name in reversion_files.COLUMNS]
TABLES = ("series_windows", *REVERSION, "calibration", "measures", "costs", *SCAN)
RESULTS = {
    *(f"{name}.csv" for name in TABLES),
    *(f"{name}.manifest.json" for name in TABLES),
    *(f"{name}.png" for name in ("series", *reversion_files.CAPTIONS, "calibration", "brain_scan", "pareto")),
    "report.html",
    "study.json",
}
WHOLE = ("--budget", "none")  # however slow the machine


@pytest.fixture(scope="module")
def model(model_folder) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def studied(model, text, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A whole study: its folder, and what the command printed; every other measure on networks of four layers."""
    out = tmp_path_factory.mktemp("study") / "results"
    with pytest.MonkeyPatch.context() as smaller:
        smaller.setattr(side_by_side, "networks", functools.partial(side_by_side.networks, 4))
        return out, run("study", "--model", model, "--text", text, "--out", out, "--max-length", 3, *WHOLE)


@pytest.fixture
def quick(monkeypatch):
    hurry(monkeypatch)


def test_the_tables_of_a_study_begin_with_the_header_lines_that_they_always_had(studied):
    headers = dict(line.split(": ") for line in HEADERS.read_text().splitlines())
    written = {path.name: path.read_text().split("\n", 1)[0] for path in studied[0].glob("*.csv")}
    assert len(written) == len(TABLES)
    assert written == {name: headers[name] for name in written}


def test_a_study_leaves_everything_behind(studied, text):
    out, result = studied
    assert result.exit_code == 0, result.output
    assert {file.name for file in out.iterdir()} == RESULTS
    windows, layers = tables.read(out / made_up.SERIES), tables.read(out / made_up.REVERSION)
    assert len(windows) == 5
    assert set(windows["n_prompts"]) == {len(PROMPTS)}
    assert list(layers["layer"]) == [0, 1, 2, 3]
    assert {"kappa", "kappa_untrained", "restoring"} <= set(layers)
    assert tables.read(out / made_up.SCAN)["wiring"].tolist() == [
        str(wiring) for wiring in every_repeat(fixtures.N_LAYERS) if wiring.depth <= fixtures.N_LAYERS + 3
    ]
    assert tables.read_manifest(out / made_up.SCAN)["settings"]["metric"] == "loss"
    assert "read S =" in result.stdout
    assert "So no winner is named among 9 wirings" in result.stdout, "of random weights, it cannot do the task"
    assert "the measure reads what it must" in result.stdout
    assert str(out / "report.html") in result.stdout
    manifest = tables.read_manifest(out / made_up.SERIES)
    assert manifest["tokens"]["prompts"] == len(PROMPTS)
    assert manifest["settings"]["text"] == str(text)
    assert manifest["versions"]["torch"] == torch.__version__


def test_the_same_study_gives_the_same_numbers(studied, model, text, tmp_path):
    assert run("study", "reversion", "--model", model, "--text", text, "--out", tmp_path, *WHOLE).exit_code == 0
    again = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
    assert again == {name: (studied[0] / name).read_bytes() for name in again}
    assert made_up.REVERSION in again


@pytest.mark.parametrize(("name", "file"), [("series", made_up.SERIES), ("reversion", made_up.REVERSION)])
def test_one_measurement_can_be_asked_for(quick, model, text, tmp_path, name, file):
    out = tmp_path / "results"
    assert run("study", name, "--model", model, "--text", text, "--out", out).exit_code == 0
    left = {path.name for path in out.iterdir()}
    assert file in left
    assert left < RESULTS


def test_prompts_are_the_first_of_a_jsonl_file(quick, model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"text": prompt}) for prompt in PROMPTS) + "\n")
    run("study", "series", "--model", model, "--text", path, "--out", tmp_path / "jsonl", "--prompts", 3)
    (tmp_path / "three.txt").write_text("\n\n".join(PROMPTS[:3]))
    run("study", "series", "--model", model, "--text", tmp_path / "three.txt", "--out", tmp_path / "plain")
    hashes = [tables.read_manifest(tmp_path / out / made_up.SERIES)["tokens"]["sha256"] for out in ("jsonl", "plain")]
    assert hashes[0] == hashes[1]


def test_the_scan_asks_the_bundled_model_its_own_problems(tmp_path):
    result = run("study", "scan", "--prompts", 28, "--max-length", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert tables.read_manifest(tmp_path / made_up.SCAN)["settings"]["metric"] == "loglik"
    assert "23 wirings were tried on 14 prompts" in result.stdout
    assert tables.read(tmp_path / made_up.GROUPS)["group"].nunique() == 7


def test_a_folder_with_a_scan_of_something_else_is_refused_before_anything_is_measured(model, text, tmp_path):
    options = ["study", "--model", model, "--text", text, "--out", tmp_path / "r"]
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "scan_search.csv.part").write_text("{}\n")
    refused(run(*options), "scan_search.csv.part holds another scan, with model none")
    assert not (tmp_path / "r" / made_up.SERIES).exists()


def test_the_anatomy_of_the_bundled_model_is_printed_and_put_on_the_page(tmp_path):
    result = run("study", "anatomy", "--model", "babel", "--prompts", 20, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "That the ends are more parallel than the middle is " in " ".join(result.stdout.split())
    assert {path.name for path in tmp_path.glob("anatomy_*.csv")} == set(anatomy_files.COLUMNS)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(anatomy_files.CAPTIONS)
    assert set(tables.read(tmp_path / made_up.ENDS)["kind"]) == {"all", "k=0", "k=1, 2", "k=3, 4"}
    assert 'id="anatomy"' in (tmp_path / report.PAGE).read_text()


def test_too_few_prompts_for_an_anatomy_are_said(tmp_path):
    result = run("study", "anatomy", "--prompts", 5, "--out", tmp_path)
    refused(result, "anatomy cannot be measured: it needs at least 6 layers and 16 prompts; there are 12 and 5")
    assert list(tmp_path.iterdir()) == []


def test_a_stream_without_anatomy_ends_no_study(monkeypatch, tmp_path):
    def undefined(*_: object, **__: object) -> None:
        raise boundaries.UndefinedError("a feature of babel is not finite: a layer writes nothing")

    monkeypatch.setattr(anatomy_study, "measure", undefined)
    monkeypatch.setattr(reversion_study, "measure", made_up.measure_reversion)
    result = run("study", "reversion", "anatomy", "--prompts", 16, "--out", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "anatomy: left out, a feature of babel is not finite" in result.stderr
    refused(run("study", "anatomy", "--prompts", 16, "--out", tmp_path), "a feature of babel is not finite")


def test_too_few_prompts_for_a_scan_leave_it_out(quick, model, tmp_path):
    (tmp_path / "two.txt").write_text("\n".join(PROMPTS[:2]))
    options = ["--model", model, "--text", tmp_path / "two.txt", "--out", tmp_path / "r"]
    result = run("study", *options)
    assert result.exit_code == 0
    assert "left out: it needs at least 4 different prompts" in result.stderr


def test_the_report_is_made_again_from_the_files(tmp_path):
    tables.write(made_up.series(), tmp_path / made_up.SERIES, made_up.manifest(), made_up.COLUMNS[made_up.SERIES])
    result = run("report", tmp_path)
    assert result.exit_code == 0
    assert (tmp_path / "report.html").exists()


def test_json_is_one_object_on_standard_output_and_the_rest_is_on_the_other_stream(quick, model, text, tmp_path):
    options = ["study", "series", "--model", model, "--text", text, "--out", tmp_path / "r"]
    result = run(*options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["page"] == str(tmp_path / "r" / "report.html")
    assert set(found["files"]) == {str(path) for path in (tmp_path / "r").iterdir()}
    assert found["verdicts"] == report.summary(tmp_path / "r") != []
    assert found["seconds"] > 0
    assert found["memory"] > 2**27
    assert "opening" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["report", "nowhere"], 1, "nowhere holds no measurement"),
        (["study", "sequels"], 2, "did you mean 'series'?"),
        (["tape", ":"], 2, "Missing option '--out'"),
        (["no-such-command"], 2, "No such command"),
    ],
)
def test_an_error_in_json_keeps_its_exit_code(arguments, code, said):
    result = run(*arguments, "--json")
    assert result.exit_code == code
    assert said in json.loads(result.stdout)["error"]


def test_a_quiet_command_says_nothing_but_its_result_and_errors(quick, model, text, tmp_path):
    result = run("study", "series", "--model", model, "--text", text, "--out", tmp_path / "r", "--quiet")
    assert result.stderr == ""
    assert "The page is" in result.stdout
    refused(run("report", tmp_path, "-q"), "holds no measurement")


def test_failed_checks_are_in_json_too(model, monkeypatch):
    failing = pd.DataFrame({"check": ["a"], "passed": [False]})
    monkeypatch.setattr(surgery.Stack, "checks", lambda self: failing)
    monkeypatch.setattr(pd.DataFrame, "to_string", lambda *_, **__: "")
    result = run("check", "--model", model, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["checks"] == [{"check": "a", "passed": False}]
    assert "1 of 1 checks failed" in json.loads(result.stdout)["error"]


def test_of_several_processes_the_first_one_talks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    heard = []

    @console.command
    def command() -> console.Result:
        heard.append(progress._shown.get())
        return console.Result("")

    command(debug=False, quiet=False, as_json=True)
    assert heard == [False]
    assert capsys.readouterr() == ("", "")


def test_check_prints_every_check_of_the_stack(model):
    result = run("check", "--model", model)
    assert result.exit_code == 0, result.output
    assert "identity wiring" in result.stdout
    assert "largest_difference" in result.stdout


def test_a_failed_check_is_an_error(model, monkeypatch):
    failing = pd.DataFrame(
        {"check": ["a"], "compared_with": ["b"], "largest_difference": [1.0], "tolerance": [1e-5], "passed": [False]}
    )
    monkeypatch.setattr(surgery.Stack, "checks", lambda self: failing)
    result = run("check", "--model", model)
    assert result.exit_code == 1
    assert "1 of 1 checks failed" in result.stderr


def test_version():
    assert run("--version").stdout == f"surgery {surgery.__version__}\n"


@pytest.mark.parametrize(
    ("command", "option", "choices", "default"),
    [
        ("scan", "--family", tuple(scan_study.FAMILIES), "repeat"),
        ("scan", "--metric", scan.METRICS, None),
        ("graft", "--precision", MIXED, "no"),
        ("graft", "--stored", STORED, "float16"),
        ("graft", "--unfrozen", graft.PARTS[1:], "junction"),
    ],
)
def test_choices_are_those_of_the_library(monkeypatch, command, option, choices, default):
    parameter = next(p for p in typer.main.get_command(cli.app).commands[command].params if option in p.opts)
    assert parameter.metavar == f"[{'|'.join(choices)}]"
    assert parameter.default == default
    assert default is None or default in choices
    monkeypatch.setenv("COLUMNS", "200")
    assert f"{option} [{'|'.join(choices)}]" in " ".join(run(command, "--help").stdout.split())
    result = run(command, option, f"{choices[0]}x")
    assert result.exit_code == 2
    assert f"did you mean {choices[0]!r}? There are {', '.join(choices)}." in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("surgery ", ["study", "plan", "check", "report", "scan", "tape", "graft", "compile", "list", "view"]),
        ("surgery study re", ["reversion"]),
        ("surgery scan --family s", ["skip", "swap"]),
        ("surgery graft --stored b", ["bfloat16"]),
        ("surgery scan --probes in", ["induction"]),
        ("surgery check --model sm", ["smollm2"]),
        ("surgery list m", ["models", "metrics", "measures"]),
    ],
)
def test_the_shell_completes_commands_and_choices(words, completions):
    environment = {
        "_SURGERY_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    result = CliRunner().invoke(cli.app, env=environment, prog_name="surgery")
    assert result.exit_code == 0
    assert result.stdout.split() == completions


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], ["study", "--help"], ["report", "-h"], ["--version"], ["list", "models"]]
)
def test_help_imports_nothing_heavy(arguments):
    script = (
        "import sys\nfrom surgery import cli\n"
        "try: cli.main()\nexcept SystemExit as end: assert end.code == 0\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'torch', 'transformer_lens', 'transformers', 'pandas', 'numpy', 'matplotlib', 'jinja2'}))"
    )
    done = python("-c", script, *arguments)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", list(typer.main.get_command(cli.app).commands))
def test_options_are_in_groups(monkeypatch, command):
    """All but the one that asks for help, and what belongs to one command alone."""
    parameters = typer.main.get_command(cli.app).commands[command].params
    shared = {"--model", "--device", "--dtype", "--budget", "--batch-size", "--json", "--quiet", "--debug", "--seed"}
    for parameter in parameters:
        if shared & set(parameter.opts):
            assert parameter.rich_help_panel, parameter.opts


@pytest.mark.parametrize(
    ("old", "new"), [("--old", "--old-weights"), ("--judged", "--heldout-prompts"), ("--latent", "--update-loss")]
)
@pytest.mark.parametrize("equals", [False, True])
def test_an_option_of_an_earlier_version_goes_on_working_with_a_note(tmp_path, old, new, equals):
    """Its value is read as that of today's option, here refused for its range."""
    result = run("graft", *([f"{old}=-3"] if equals else [old, -3]), "--out", tmp_path)
    assert result.exit_code == 2
    assert f"note: {old} is called {new} now" in result.stderr
    assert f"Invalid value for '{new}'" in result.stderr
    in_json = run("graft", old, -3, "--json")
    assert f"'{new}'" in json.loads(in_json.stdout)["error"]
    assert "note" not in in_json.stderr


def test_the_prompts_of_a_scan_used_to_be_counted():
    result = run("scan", "--count", 1)
    assert "note: --count is called --prompts now" in result.stderr
    assert "Invalid value for '--prompts'" in result.stderr
    assert "No such option" in run("study", "--count", 1).stderr


def test_a_study_and_a_scan_call_the_same_thing_the_same():
    commands = typer.main.get_command(cli.app).commands
    study_options, scan_options = (
        {option for parameter in commands[name].params for option in parameter.opts} for name in ("study", "scan")
    )
    assert {"--text", "--probes", "--prompts", "--model", "--out", "--budget", "--seed"} <= study_options & scan_options


def test_a_text_is_scanned_as_a_study_reads_it(model, tmp_path):
    text = tmp_path / "prompts.jsonl"
    text.write_text("\n".join(json.dumps({"text": prompt}) for prompt in PROMPTS))
    options = ["--model", model, "--family", "swap", "--out", tmp_path / "r", "--top", 1]
    result = run("scan", "--text", text, *options)
    assert result.exit_code == 0, result.output
    assert tables.read_manifest(tmp_path / "r" / "scan_table.csv")["settings"]["metric"] == "loss"
    refused(run("scan", "--text", text, "--probes", "recall", *options), "asks --probes, or scores --text")


def test_a_study_scans_the_probes_that_are_named(model, text, tmp_path):
    probes = tmp_path / "mine.jsonl"
    probes.write_text("\n".join(json.dumps({"prompt": f"w{i} w2", "answer": f"w{i + 3}"}) for i in range(8)))
    options = ["study", "scan", "--model", model, "--text", text, "--max-length", 2, *WHOLE]
    result = run(*options, "--probes", probes, "--out", tmp_path / "r")
    assert result.exit_code == 0, result.output
    manifest = tables.read_manifest(tmp_path / "r" / made_up.SCAN)
    assert manifest["settings"]["metric"] == "loglik"
    refused(run(*options, "--probes", "recal", "--out", tmp_path / "q"), "did you mean 'recall'?")


def test_an_error_of_usage_has_no_frame():
    said = run("scan", "--family", "repeats").stderr
    assert said.startswith("Usage: ")
    assert "did you mean 'repeat'? There are repeat, skip" in said
    assert not set(said) & set("│╭╰")


@pytest.mark.parametrize("command", ["study", "check", "report", "scan", "list", "view"])
def test_every_command_has_help_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: surgery {command}" in " ".join(result.stdout.split())


def test_the_command_line_knows_the_measurements():
    assert cli.MEASURED == study.MEASURED == MEASURED


def test_python_dash_m_is_the_command():
    done = python("-m", "surgery", "--version")
    assert done.stdout == f"surgery {surgery.__version__}\n"


def test_half_precision_is_checked_with_its_own_tolerance():
    result = run("check", "--dtype", "bfloat16", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "1e-01" in result.output
