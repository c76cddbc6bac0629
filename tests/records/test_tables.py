"""Round trip, documentation of columns, and nothing half-written under a final name."""

import errno
import json
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from support import made_up
from surgery.records import tables


@pytest.fixture
def path(tmp_path):
    return tmp_path / "series_windows.csv"


@pytest.fixture
def broken_disk(monkeypatch):
    """Make a system call of the writer fail from its n-th use on."""

    def install(call: str, error: BaseException, works: int = 0) -> None:
        real, used = getattr(os, call), [0]

        def failing(*args):
            used[0] += 1
            if used[0] > works:
                raise error
            return real(*args)

        monkeypatch.setattr(os, call, failing)

    return install


def standing(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir()}


def test_a_frame_reads_back_float_for_float(path):
    frame = made_up.reversion()
    frame["kappa"] = np.linspace(0, 1, 6) / 3
    frame.loc[2, "regime"] = None
    frame["half_life"] = [np.nan, np.inf, 1e-300, -1 / 3, 0.1 + 0.2, 5e300]
    assert_frame_equal(
        tables.read(tables.write(frame, path, {}, dict.fromkeys(frame, "a column"))), frame, check_exact=True
    )


@given(st.lists(st.floats(), min_size=1))
def test_any_float_reads_back_exactly(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("floats") / "x.csv"
    read = tables.read(tables.write(pd.DataFrame({"start": 1, "S": values}), path, {}, made_up.COLUMNS[made_up.SERIES]))
    np.testing.assert_array_equal(read["S"].to_numpy(float), np.array(values))


def test_single_precision_reads_back_as_the_number_it_is(path):
    frame = pd.DataFrame({"start": [1], "S": np.array([0.1], dtype=np.float32)})
    assert tables.read(tables.write(frame, path, {}, dict.fromkeys(frame, "a column")))["S"][0] == float(
        np.float32(0.1)
    )


def test_yes_and_no_read_back_as_such(path):
    frame = pd.DataFrame({"start": [1, 2], "regime": [True, False]})
    assert_frame_equal(tables.read(tables.write(frame, path, {}, dict.fromkeys(frame, "a column"))), frame)


def test_text_that_a_spreadsheet_would_run_is_written_so_that_it_does_not_and_reads_back(path):
    texts = ["=1+1", "-1:", "@SUM(A1)", "'=x", "'tis", "a;=b", "\t=x", '"=x', ":4 2:", "a,b", "x\n+1", "=\r1"]
    frame = pd.DataFrame({"group": texts, "value": np.linspace(-1, 1, len(texts)), "=name": -1})
    tables.write(frame, path, {}, dict.fromkeys(frame, "a column"))
    lines = path.read_text().splitlines()
    assert lines[0] == "group,value,'=name"
    assert lines[1:3] == ["'=1+1,-1.0,-1", "'-1:,-0.8181818181818181,-1"]
    assert_frame_equal(tables.read(path), frame, check_exact=True)


def test_a_table_without_such_text_is_written_as_ever(path):
    frame = pd.DataFrame({"wiring": [":4 2:", "'tis"], "value": [-1.0, 2.0]})
    tables.write(frame, path, {}, dict.fromkeys(frame, "a column"))
    assert path.read_text() == "wiring,value\n:4 2:,-1.0\n'tis,2.0\n"
    assert tables.read_manifest(path)["types"] == {"wiring": "text", "value": "float"}


def test_a_manifest_that_was_changed_is_noticed(path):
    tables.write(made_up.series(), path, {"seed": 0}, made_up.COLUMNS[made_up.SERIES])
    place = path.parent / "series_windows.manifest.json"
    place.write_text(place.read_text().replace('"seed": 0', '"seed": 8'))
    with pytest.raises(ValueError, match=r"was changed since it was written; measure series_windows\.csv again"):
        tables.read(path)


def test_the_manifest_explains_the_columns_and_names_the_file(path):
    tables.write(made_up.series(), path, made_up.manifest(), made_up.COLUMNS[made_up.SERIES])
    manifest = json.loads((path.parent / "series_windows.manifest.json").read_text())
    assert manifest["model"]["name"] == "toy"
    assert manifest["file"] == path.name
    assert manifest["rows"] == 15
    assert list(manifest["columns"]) == list(made_up.series().columns)
    assert all(len(meaning) > 10 for meaning in manifest["columns"].values())


def test_an_undocumented_column_is_refused_and_nothing_written(path):
    with pytest.raises(ValueError, match="columns without a meaning: mystery"):
        tables.write(made_up.series().assign(mystery=1), path, {}, made_up.COLUMNS[made_up.SERIES])
    assert standing(path) == {}


def test_a_column_of_ones_own_is_explained_in_place(path):
    tables.write(
        made_up.series().assign(mystery=1),
        path,
        {},
        made_up.COLUMNS[made_up.SERIES] | {"mystery": "a column of one's own"},
    )
    assert tables.read_manifest(path)["columns"]["mystery"] == "a column of one's own"


def test_an_edited_file_is_noticed(path):
    tables.write(made_up.series(), path, {}, made_up.COLUMNS[made_up.SERIES])
    path.write_text(path.read_text().replace("0.65", "0.95", 1))
    with pytest.raises(ValueError, match="not the file its manifest describes"):
        tables.read(path)


def test_a_file_without_manifest_is_refused(path):
    tables.write(made_up.series(), path, {}, made_up.COLUMNS[made_up.SERIES])
    (path.parent / "series_windows.manifest.json").unlink()
    with pytest.raises(ValueError, match=r"without its manifest.*does not exist"):
        tables.read(path)


def test_a_manifest_without_hash_is_refused(path):
    tables.write(made_up.series(), path, {}, made_up.COLUMNS[made_up.SERIES])
    (path.parent / "series_windows.manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="sha256 is missing"):
        tables.read(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("works", [0, 1])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_part_of_a_file(path, broken_disk, call, works, error):
    broken_disk(call, error, works)
    with pytest.raises(type(error)):
        tables.write(made_up.series(), path, {}, made_up.COLUMNS[made_up.SERIES])
    left = standing(path)
    assert set(left) <= {"series_windows.manifest.json"}, "only a whole manifest may stand"
    assert bool(left) == (call == "replace" and works == 1)
    for content in left.values():
        json.loads(content)


@pytest.mark.parametrize("works", [0, 1])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_leaves_the_earlier_result_as_it_was(path, broken_disk, works, error):
    tables.write(made_up.series(), path, {}, made_up.COLUMNS[made_up.SERIES])
    before = standing(path)
    broken_disk("fsync", error, works)
    with pytest.raises(type(error)):
        tables.write(made_up.series(8), path, {}, made_up.COLUMNS[made_up.SERIES])
    assert standing(path) == before
    assert len(tables.read(path)) == 15


def test_an_interruption_between_the_two_files_is_noticed_on_reading(path, broken_disk):
    tables.write(made_up.series(), path, {}, made_up.COLUMNS[made_up.SERIES])
    broken_disk("replace", KeyboardInterrupt(), works=1)
    with pytest.raises(KeyboardInterrupt):
        tables.write(made_up.series(8), path, {}, made_up.COLUMNS[made_up.SERIES])
    with pytest.raises(ValueError, match="a run was interrupted"):
        tables.read(path)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "there is no space left on the disk"),
        (errno.EACCES, "there is no permission"),
        (errno.EROFS, "the disk is read-only"),
        (errno.EIO, "input/output error"),
    ],
)
def test_a_refusal_of_the_system_is_one_sentence_with_the_path(path, broken_disk, number, words):
    broken_disk("fsync", OSError(number, os.strerror(number)))
    with pytest.raises(OSError, match=words) as caught:
        tables.write(made_up.series(), path, {}, made_up.COLUMNS[made_up.SERIES])
    assert str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Errno" not in str(caught.value)


def test_a_folder_in_the_way_is_said(path):
    path.mkdir()
    with pytest.raises(OSError, match=r"series_windows\.csv: it is a folder"):
        tables.write(made_up.series(), path, {}, made_up.COLUMNS[made_up.SERIES])


@pytest.mark.parametrize("columns", made_up.COLUMNS.values(), ids=made_up.COLUMNS)
def test_every_column_has_its_interval_explained(columns):
    assert any(name.endswith("_low") for name in columns)
    for name in columns:
        if name.endswith("_low"):
            assert columns[name.removesuffix("_low")]
            assert columns[f"{name.removesuffix('_low')}_high"]
