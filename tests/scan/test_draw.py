"""The figures of a scan show the table: every measured cell in its place, what is sure marked, nothing made up."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection

from surgery.page.drawing import png
from surgery.scan import controls, draw
from surgery.wiring.families import every_repeat, every_skip
from surgery.wiring.value import Wiring


def table(n_layers=12, times=2, gain=lambda start, stop: start / 10 - stop / 20, p_max=0.5):
    """Every repeated span with a gain by formula."""
    rows = [(str(wiring), span) for wiring, span in zip(every_repeat(n_layers, times), spans(n_layers))]
    gains = np.array([gain(*span) for _, span in rows], dtype=float)
    ends = {"gain_low": gains - 0.1, "gain_high": gains + 0.1, "p": p_max, "p_max": p_max, "q": p_max, "n_prompts": 40}
    return pd.DataFrame({"wiring": [wiring for wiring, _ in rows], "gain": gains, **ends})


def spans(n_layers):
    return [(i, j) for i in range(n_layers) for j in range(i + 1, n_layers + 1)]


def heat(figure):
    """The gains drawn, NaN where blank, at [last layer, first layer]."""
    return figure.axes[0].images[1].get_array().filled(np.nan)


def outlines(figure):
    lines = [part for part in figure.axes[0].collections if isinstance(part, LineCollection)]
    return {part.get_linewidths()[0]: len(part.get_segments()) for part in lines}


def test_the_brain_scan_shows_every_gain_in_its_cell_and_nothing_else():
    shown = heat(draw.brain_scan(table(), 12))
    for start in range(12):
        for last in range(12):
            if last >= start:
                assert shown[last, start] == pytest.approx(start / 10 - (last + 1) / 20)
            else:
                assert np.isnan(shown[last, start])


def test_what_is_not_finite_is_marked_and_gives_no_mean():
    frame = table(6).assign(n_not_finite=0)
    frame.loc[frame["wiring"] == ":4 2:", "gain"] = -np.inf
    figure = draw.brain_scan(frame, 6)
    assert [part.get_position() for part in figure.axes[0].texts if part.get_text() == "×"] == [(2, 3)]
    assert "×: not finite on some prompt, 1" in figure.get_supxlabel()
    by_start = [bar.get_height() for bar in figure.axes[1].patches]
    assert np.isnan(by_start).tolist() == [place == 2 for place in range(6)]
    assert png(figure)
    scatter = draw.pareto(frame, 6)
    assert "1 of 21 wirings lose more than is shown" in scatter.get_supxlabel()
    assert png(scatter)
    groups = pd.concat([frame.head(4).assign(group="a"), frame.head(4).assign(group="b", gain=-np.inf)])
    bars = draw.group_bars(groups)
    assert sum(part.get_text() == "×" for part in bars.axes[0].texts) == 4
    assert png(bars)
    windows = frame.head(4).assign(variant="skip", size=[1, 2, 3, 4], gain=[-0.1, -np.inf, -0.3, -0.4])
    (line, _) = draw.painters(windows).axes[0].lines
    assert np.isnan(line.get_ydata()).tolist() == [False, True, False, False]


def test_spans_not_measured_stay_blank_and_do_not_enter_the_means():
    whole = table()
    figure = draw.brain_scan(whole[whole["wiring"] != ":4 2:"], 12)
    shown = heat(figure)
    assert np.isnan(shown[3, 2])
    assert np.isfinite(shown).sum() == 77
    grey = figure.axes[0].images[0].get_array().filled(np.nan)
    assert np.argwhere(np.isfinite(grey)).tolist() == [[3, 2]]
    by_start = [bar.get_height() for bar in figure.axes[1].patches]
    by_stop = [bar.get_width() for bar in figure.axes[2].patches]
    np.testing.assert_allclose(by_start, np.nanmean(shown, axis=0))
    np.testing.assert_allclose(by_stop, np.nanmean(shown, axis=1))
    assert by_start[2] != pytest.approx(np.nanmean(heat(draw.brain_scan(whole, 12)), axis=0)[2])


def test_wirings_that_are_no_repeated_span_are_left_out():
    others = table(6).assign(wiring=[":", *map(str, every_skip(6))])
    both = draw.brain_scan(pd.concat([table(6), others]), 6)
    np.testing.assert_array_equal(heat(both), heat(draw.brain_scan(table(6), 6)))
    with pytest.raises(ValueError, match="none of the 21 wirings runs one span 2 times"):
        draw.brain_scan(others, 6)
    with pytest.raises(ValueError, match=r"the span \(0, 1\) has several rows"):
        draw.brain_scan(pd.concat([table(6), table(6)]), 6)


def test_spans_repeated_three_times_have_a_scan_of_their_own():
    mixed = pd.concat([table(6), table(6, times=3, gain=lambda start, stop: 1.0)])
    assert np.nanmin(heat(draw.brain_scan(mixed, 6, times=3))) == 1
    assert np.nanmax(heat(draw.brain_scan(mixed, 6))) < 1


def test_sure_gains_are_outlined_and_counted():
    frame = table(gain=lambda start, stop: 0.1)
    assert not any(outlines(draw.brain_scan(frame, 12)).values())
    frame.loc[frame["wiring"].isin([":4 2:", ":5 2:"]), "p_max"] = 0.01
    figure = draw.brain_scan(frame, 12)
    assert outlines(figure)[1.8] == 6
    assert "2 better, 0 worse of 78" in figure.get_supxlabel()


def test_sure_losses_have_a_thinner_line_that_leaves_out_what_was_not_measured():
    frame = table(gain=lambda start, stop: -0.1)
    frame.loc[frame["wiring"] == ":5 2:", "p_max"] = 0.01
    assert outlines(draw.brain_scan(frame, 12))[0.8] == 4
    assert outlines(draw.brain_scan(frame[frame["wiring"] != ":5 3:"], 12))[0.8] == 3


@pytest.mark.parametrize(("harm", "logarithmic"), [(0.5, False), (30.0, True)])
def test_colours_are_centred_at_0_and_show_gains_beside_huge_losses(harm, logarithmic):
    frame = table(gain=lambda start, stop: 0.2 if start == 5 else -harm)
    norm = draw.brain_scan(frame, 12).axes[0].images[1].norm
    assert norm(0) == pytest.approx(0.5)
    assert norm(0.2) == pytest.approx(1 - norm(-0.2))
    assert norm(0.2) > 0.55
    assert (type(norm).__name__ == "SymLogNorm") == logarithmic


def test_gains_are_printed_only_where_they_fit():
    assert len(draw.brain_scan(table(16), 16).axes[0].texts) == 16 * 17 / 2
    assert not draw.brain_scan(table(17), 17).axes[0].texts


@pytest.mark.parametrize(("n_layers", "constant"), [*itertools.product([1, 2, 24], [0.0, 1.0, -1.0]), (48, 1.0)])
def test_any_depth_and_any_constant_is_drawn(n_layers, constant):
    frame = table(n_layers, gain=lambda start, stop: constant)
    assert png(draw.brain_scan(frame, n_layers)).startswith(b"\x89PNG")
    assert png(draw.pareto(frame, n_layers)).startswith(b"\x89PNG")


def test_the_front_rises_from_the_cheapest_and_keeps_only_what_gains_more():
    frame = pd.DataFrame(
        {
            "wiring": [":3 2:", ":4 2:", ":5 2:", ":6 2:", ":3 4:"],
            "gain": [0.2, 0.1, 0.4, 0.4, -0.3],
            "p_max": [0.01, 0.5, 0.5, 0.5, 0.5],
        }
    )
    axes = draw.pareto(frame, 8).axes[0]
    front = next(line for line in axes.lines if line.get_label() == "front")
    assert list(front.get_xdata())[:-1] == [-1, 0, 1, 3]
    assert list(front.get_ydata()) == [-0.3, 0, 0.2, 0.4, 0.4]
    assert [text.get_text() for text in axes.texts] == [":5 2:", ":3 2:", ":3 4:"]
    better = next(line for line in axes.lines if line.get_label().startswith("better"))
    assert list(better.get_ydata()) == [0.2]


def test_extra_depth_is_that_of_the_wiring():
    wirings = [":6 4:", ":4 6:", ":6 0.5*(4:6) 6:", ":4 {*4:6} 6:", "7.attn :"]
    frame = pd.DataFrame({"wiring": wirings, "gain": 1.0, "p_max": 0.01})
    axes = draw.pareto(frame, 8).axes[0]
    better = next(line for line in axes.lines if line.get_label().startswith("better"))
    assert list(better.get_xdata()) == [Wiring.parse(text, 8).depth - 8 for text in wirings] == [2, -2, 2, 0, 0.5]


def test_what_falls_below_the_pareto_figure_is_counted():
    frame = table(gain=lambda start, stop: 0.1 if start == stop - 1 else -5.0)
    assert "66 of 78 wirings lose more than is shown" in draw.pareto(frame, 12).get_supxlabel()
    assert not draw.pareto(table(gain=lambda start, stop: 0.1), 12).get_supxlabel()


def grouped(wirings=(":6 4:", ":7 4:"), groups=("k = 1", "k = 2", "k = 3")):
    rows = [
        {"wiring": wiring, "group": group, "gain": place - at / 2, "p_max": 0.01 if group == "k = 2" else 0.9}
        for place, wiring in enumerate(wirings)
        for at, group in enumerate(groups)
    ]
    frame = pd.DataFrame(rows).assign(n_prompts=20)
    return frame.assign(gain_low=frame["gain"] - 0.2, gain_high=frame["gain"] + 0.3)


def test_bars_stand_for_every_wiring_in_every_group_with_its_interval():
    figure = draw.group_bars(grouped())
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0, -0.5, -1, 1, 0.5, 0]
    whiskers = [segment for lines in axes.collections for segment in lines.get_segments()]
    assert [tuple(segment[:, 1]) for segment in whiskers[:1]] == [(-0.2, 0.3)]
    assert [text.get_text() for text in axes.texts] == ["*", "*"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["k = 1\n(20)", "k = 2\n(20)", "k = 3\n(20)"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [":6 4:", ":7 4:"]


def test_bars_of_chosen_wirings_and_what_cannot_be_drawn():
    axes = draw.group_bars(grouped(), [":7 4:"]).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [1, 0.5, 0]
    with pytest.raises(ValueError, match="wiring :9 4: is not in the table"):
        draw.group_bars(grouped(), [":9 4:"])
    with pytest.raises(ValueError, match="9 wirings are too many"):
        draw.group_bars(grouped([f":{stop} 1:" for stop in range(2, 11)]))
    with pytest.raises(ValueError, match="a row per group"):
        draw.group_bars(table())


def test_painters_has_a_line_per_variant_in_order_of_size():
    rows = [
        {"variant": variant, "size": size, "gain": -size * slope, "gain_low": -size, "gain_high": 0.0}
        for variant, slope in (("skip", 1.0), ("reverse", 0.5))
        for size in (6, 2, 4)
    ]
    axes = draw.painters(pd.DataFrame(rows)).axes[0]
    skip, reverse = axes.lines[:2]
    assert (skip.get_label(), reverse.get_label()) == ("skip", "reverse")
    assert list(skip.get_xdata()) == [2, 4, 6]
    assert list(skip.get_ydata()) == [-2, -4, -6]
    assert list(reverse.get_ydata()) == [-1, -2, -3]
    assert len(axes.collections) == 2


def test_painters_takes_the_reorder_family_as_it_is_listed_and_averages_random_orders():
    listed = controls.painters(6, [2, 4])
    gains = {wiring: float(place) for place, wiring in enumerate(listed["wiring"].unique())}
    found = pd.DataFrame({"wiring": list(gains), "gain": list(gains.values())})
    found = found.assign(gain_low=found["gain"] - 1, gain_high=found["gain"] + 1)
    axes = draw.painters(listed.merge(found, on="wiring")).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {*listed["variant"], "the unmodified model"}
    orders = listed[(listed["variant"] == "random order") & (listed["size"] == 4)]["wiring"]
    assert lines["random order"].get_ydata()[1] == pytest.approx(np.mean([gains[wiring] for wiring in orders]))
    with pytest.raises(ValueError, match="no column variant: merge it"):
        draw.painters(found)


def test_groups_stand_in_the_order_of_their_numbers():
    axes = draw.group_bars(grouped(groups=("k=10", "k=9", "k=2"))).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["k=2\n(20)", "k=9\n(20)", "k=10\n(20)"]


def test_a_scan_draws_what_it_has_data_for_and_says_the_unit():
    scanned, none = table(6), grouped().iloc[:0]
    assert set(draw.of_scan(scanned, none, 6, "loss")) == {"brain_scan", "pareto"}
    drawn = draw.of_scan(scanned.assign(wiring=[*map(str, every_skip(6)), ":"]), grouped(), 6, "exact")
    assert set(drawn) == {"pareto", "group_bars"}
    for drawing in drawn.values():
        assert drawing.figure.axes[0].get_ylabel() == "gain over the unmodified model (share of answers)"
        assert "half" in drawing.caption


def test_a_figure_drawn_again_is_the_same_file():
    once, again = (png(draw.brain_scan(table(), 12)) for _ in range(2))
    assert once == again
