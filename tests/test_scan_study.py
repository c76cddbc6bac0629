"""A whole scan on the bundled model, through the library and the command line."""

import pandas
import pytest
from typer.testing import CliRunner

from surgery import frames, scan_study
from surgery.cli import app

FILES = ("scan_search.csv", "scan_table.csv", "scan_validation.csv", "scan_winners.csv")


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan")
    return folder, scan_study.run(family="parallel", out=folder, count=28, top=3)


def test_what_a_scan_leaves_behind(scanned):
    folder, (table, winners, luck) = scanned
    assert sorted(path.name for path in folder.glob("*.csv")) == sorted(FILES)
    for name in FILES:
        assert len(frames.read(folder / name))
    assert len(table) == 66
    assert len(winners) == 3
    assert luck.wirings == 66


def test_the_halves_share_no_probe_and_the_winners_are_the_best_of_the_first(scanned):
    folder, (table, winners, _) = scanned
    search, validation = (frames.read(folder / name) for name in ("scan_search.csv", "scan_validation.csv"))
    assert search["prompt"].nunique() + validation["prompt"].nunique() == 28
    assert winners["wiring"].tolist() == table.nlargest(3, "gain")["wiring"].tolist()
    again = validation[validation["wiring"] == winners["wiring"][0]]
    assert winners["gain_validation"][0] == pytest.approx((again["value"] - again["baseline"]).mean())


def test_the_same_command_changes_nothing(scanned):
    folder, (table, _, _) = scanned
    before = {name: (folder / name).read_bytes() for name in FILES}
    again, _, _ = scan_study.run(family="parallel", out=folder, count=28, top=3)
    pandas.testing.assert_frame_equal(table, again)
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_on_the_command_line(tmp_path):
    done = CliRunner().invoke(app, ["scan", "--family", "swap", "--count", "14", "--top", "2", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "wirings are better than the model as it is" in done.output
    assert "verdict" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--family", "sideways"], "there is no family 'sideways'; there are repeat"),
        (["--probes", "nonsense"], "there is no probe set 'nonsense'"),
        (["--metric", "accuracy", "--count", "14"], "no metric 'accuracy'"),
    ],
)
def test_bad_requests(options, message, tmp_path):
    done = CliRunner().invoke(app, ["scan", *options, "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")


def test_tape_on_the_command_line(tmp_path):
    done = CliRunner().invoke(app, ["tape", ":3 1:", "--out", str(tmp_path / "taped")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "taped" / "model.safetensors").exists()
    refused = CliRunner().invoke(app, ["tape", ":3 {3|4} 5:", "--out", str(tmp_path / "group")])
    assert refused.exit_code == 1
    assert "a plain checkpoint cannot express" in refused.output.replace("\n", " ")
