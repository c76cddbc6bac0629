"""Charts of made-up tables: which kind, what they say in words, what hover and click tell; numbers that are none."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import vl_convert

import surgery
from support import made_up, made_up_page
from surgery.chapters import every_chapter
from surgery.page import charts
from surgery.page.parts import Chart, vega
from surgery.records import tables

WIRINGS = pd.DataFrame(
    {
        "wiring": [":3 2:", ":", ":2 1:"],
        "gain": [0.1, 0.0, 0.2],
        "gain_low": [0.0, 0.0, 0.1],
        "gain_high": [0.2, 0.0, 0.3],
    }
)
FRAMES = {
    "window": (made_up.series(), "S", "window of layers"),
    "layer": (made_up.reversion(), "kappa_excess", "layer"),
    "frontier": (made_up_page.compiled(), "cost", "number of layers saved"),
    "wirings": (WIRINGS, "gain", "row"),
    "words": (pd.DataFrame({"network": ["a", "b"], "S": [0.1, 0.2]}), "S", "row"),
    "numbers": (pd.DataFrame({"S": [0.1, 0.2]}), "S", "row"),
}
OUTLIER = [0.1, 0.2, 0.15, 0.1, 99.0]


def drawn(frame: pd.DataFrame, measure: str | None = None, **options) -> dict:
    """The chart as the page embeds it, compiled as a browser would: an error here is an empty figure there."""
    spec = charts.embedded(surgery.plot(frame, measure, **options))
    assert json.loads(str(Chart("", "", spec).json)) == spec, "as it stands in the page: no NaN, no markup"
    vl_convert.vegalite_to_vega(spec, vl_version="v6_1")
    return spec


def values(spec: dict) -> list[dict]:
    """The rows of the chart, without the line at 0."""
    data = [part["data"]["name"] for part in (spec, *spec.get("layer", [])) if "data" in part]
    return next(rows for rows in map(spec["datasets"].get, data) if "zero" not in rows[0])


def channels(spec: dict, name: str) -> list[dict]:
    """An encoding channel of every layer that has it."""
    parts = [spec, *spec.get("layer", [])]
    return [part["encoding"][name] for part in parts if name in part.get("encoding", {})]


@pytest.mark.parametrize("kind", FRAMES)
def test_every_kind_of_table_is_drawn_and_told(kind):
    frame, measure, by = FRAMES[kind]
    spec = drawn(frame)
    assert charts.default(frame) == measure
    assert f", by {by}. From " in spec["description"]
    assert "$schema" not in spec, "no address in the page"
    assert spec["width"] == "container"
    told = {tip["field"] for tips in channels(spec, "tooltip") if isinstance(tips, list) for tip in tips}
    assert measure in told
    assert set(values(spec)[0]) >= told - {"last"}


@pytest.mark.parametrize("kind", FRAMES)
def test_one_row_is_drawn(kind):
    frame, measure, _ = FRAMES[kind]
    row = frame[frame["saved"] > 0].head(1) if "saved" in frame else frame.head(1)
    assert values(drawn(row))[0][measure] == pytest.approx(float(row[measure].iloc[0]))


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_left_out(kind, number):
    frame, measure, _ = FRAMES[kind]
    frame = frame.assign(**{measure: frame[measure].astype(float)})
    frame.loc[frame.index[0], measure] = number
    assert "nan" not in drawn(frame)["description"]
    every = drawn(frame.assign(**{measure: number}))
    assert every["description"].endswith("Undefined everywhere")


def test_a_click_copies_the_wiring_or_the_window():
    copied = {kind: charts.copied(surgery.plot(frame)) for kind, (frame, *_) in FRAMES.items()}
    assert copied == dict.fromkeys(FRAMES, "") | {"window": "window", "frontier": "wiring", "wirings": "wiring"}
    assert values(drawn(made_up.series()))[0]["window"] == "0:2"


def test_wirings_are_sorted_and_no_more_than_can_be_read():
    assert [row["wiring"] for row in values(drawn(WIRINGS))] == [":2 1:", ":3 2:", ":"]
    many = pd.DataFrame({"wiring": [f":{i} 0:" for i in range(99)], "gain": np.arange(99.0)})
    shown = values(drawn(many))
    assert (len(shown), shown[0]["gain"]) == (charts.MOST, 98)


def test_rows_of_the_same_name_stay_apart():
    names = [row["network"] for row in values(drawn(pd.DataFrame({"network": ["a", "a"], "S": [0.1, 0.2]})))]
    assert len(set(names)) == 2
    assert [name.strip(charts.WORDS) for name in names] == ["a", "a"]


def test_a_value_far_out_does_not_squash_the_others():
    far = drawn(pd.DataFrame({"layer": range(5), "kappa": OUTLIER}))
    near = drawn(pd.DataFrame({"layer": range(5), "kappa": [*OUTLIER[:4], 0.3]}))
    scale = [channel["scale"] for channel in channels(far, "y") if channel.get("field") == "kappa"]
    assert all(part["type"] == "symlog" and part["constant"] == pytest.approx(0.2) for part in scale)
    assert "symlog" not in json.dumps(near)
    listed = drawn(pd.DataFrame({"name": list("abcde"), "D": OUTLIER}))
    assert "symlog" in json.dumps(listed)
    (colour,) = channels(drawn(made_up.series().assign(N=[*np.linspace(0, 1, 14), 99.0]), "N"), "color")
    assert colour["scale"]["domain"][1] < 50, "nor its colour"
    assert colour["scale"]["clamp"]


def test_colours_are_fixed_between_0_and_1_and_centred_where_there_are_both_signs():
    (S,) = channels(drawn(made_up.series(), "S"), "color")
    (excess,) = channels(drawn(made_up.series().assign(S_excess=np.linspace(-0.2, 0.1, 15)), "S_excess"), "color")
    assert S["scale"]["domain"] == [0, 1]
    assert excess["scale"]["domain"][0] == -excess["scale"]["domain"][1]


def test_layers_are_whole_and_not_too_many():
    for count in (1, 6, 12, 80):
        spec = drawn(pd.DataFrame({"layer": range(count), "kappa": 0.1}))
        marked = channels(spec, "x")[0]["axis"]["values"]
        assert all(isinstance(layer, int) for layer in marked)
        assert marked[0] == 0
        assert len(marked) <= 13


def test_a_null_is_shaded_and_an_interval_too():
    spec = drawn(made_up.reversion(), "kappa")
    assert [channel["field"] for channel in channels(spec, "y2")] == [
        "kappa_rotated_high",
        "kappa_untrained_high",
        "kappa_high",
    ]


def test_text_from_outside_is_neither_markup_nor_control_and_columns_are_no_paths():
    evil = "</script><b>\u202e\x1b" + "x" * 200
    frame = pd.DataFrame({"network": [evil, "b"], "a.b[0]": ["c", evil], "S:Q": [0.1, 0.2]})
    spec = drawn(frame)
    first = values(spec)[0]
    assert first["S_Q"] == 0.1
    assert "a_b_0_" in first
    assert not {"\u202e", "\x1b"} & set(json.dumps(spec, ensure_ascii=False))
    assert max(len(text) for row in values(spec) for text in row.values() if isinstance(text, str)) < 80
    assert "<" not in str(Chart("", "", spec).json)


def test_the_meaning_of_a_column_is_told_where_the_table_has_it(tmp_path):
    tables.write(WIRINGS, tmp_path / "gains.csv", made_up.manifest(), dict.fromkeys(WIRINGS, "right answers more"))
    assert drawn(tables.read(tmp_path / "gains.csv"))["description"] == "right answers more, by row. From 0 to 0.2"
    assert drawn(WIRINGS, told="Gains")["description"] == "Gains. From 0 to 0.2"
    assert drawn(WIRINGS, title="Gains of repeats")["title"] == "Gains of repeats"


@pytest.mark.parametrize(
    ("frame", "measure", "says"),
    [
        (WIRINGS, "gains", r"no numbers in 'gains' to draw; this table has 3 rows and gain, gain_low, gain_high"),
        (WIRINGS, "wiring", "no numbers in 'wiring' to draw"),
        (WIRINGS[:0], None, "to draw; this table has 0 rows"),
        (WIRINGS[["wiring"]], None, "there are no numbers to draw; this table has 3 rows and -"),
    ],
)
def test_what_cannot_be_drawn_is_told(frame, measure, says):
    with pytest.raises(ValueError, match=says):
        surgery.plot(frame, measure)


def test_the_charts_of_every_chapter_compile(tmp_path):
    made_up_page.write_every_chapter(tmp_path)
    files = {path.name: tables.read(path) for path in tmp_path.glob("*.csv")}
    manifests = {name: tables.read_manifest(tmp_path / name) for name in files}
    drawn_by = {part.name: part.charts(files, manifests) for part in every_chapter() if part.present([*files])}
    assert {name for name, made in drawn_by.items() if made} == set(drawn_by) - {"measures"}
    for made in drawn_by.values():
        for chart in made.values():
            vl_convert.vegalite_to_vega(charts.embedded(chart), vl_version="v6_1")
    assert {name for made in drawn_by.values() for name in map(charts.copied, made.values())} == {
        "",
        "window",
        "wiring",
    }


def test_the_library_cannot_end_its_script_element():
    assert "</script" not in vega()
    assert "vegaEmbed" in vega()
