"""Answers on top of the page: numbers, nulls, small figures; and what each chapter answers, and does not."""

import math

import pandas as pd
import pytest

from support import made_up, made_up_page
from support.made_up_walks import planted
from surgery.anatomy import chapter as anatomy
from surgery.anatomy import files as anatomy_files
from surgery.compiler import chapter as compiler
from surgery.compiler import files as compiler_files
from surgery.dropout import chapter as dropout
from surgery.dropout.files import MODELS
from surgery.dropout.verdicts import MEASURES
from surgery.graft import chapter as graft
from surgery.graft import middle_chapter as middle
from surgery.graft import study, walk_study
from surgery.page.answers import HEIGHT, UNDECIDED, WIDTH, Answer
from surgery.reversion import chapter as reversion
from surgery.scan import chapter as scan
from surgery.scan import study as scan_study
from surgery.series import chapter as series

UNKNOWN = (math.nan, math.nan, math.nan)


def test_a_number_with_its_interval_and_null():
    answer = Answer("?", "yes", "S", (0.634, 0.6, 0.66), (0.3, 0.4), "untrained layers")
    assert (answer.number, answer.held_to) == ("0.63 [0.60, 0.66]", "untrained layers: 0.30 to 0.40")
    assert Answer("?", "yes", effect=(0.6, math.nan, math.nan)).number == "0.60 (no interval)"
    assert Answer("?", "yes", null=(0.0, 0.0), null_name="no loss", digits=3).held_to == "no loss: 0.000"
    assert (Answer("?", "no").number, Answer("?", "no").held_to) == ("", "")


@pytest.mark.parametrize(
    "effect", [(0.5, 0.4, 0.6), (-3.0, -5.0, 1.0), (0.0, 0.0, 0.0), (1e9, 1.0, 2e9), (0.5, math.nan, 1)]
)
@pytest.mark.parametrize("null", [(0.0, 0.0), (0.3, 0.35), (-9.0, 9.0), (math.nan, math.nan)])
def test_the_small_figure_stays_inside_and_in_order(effect, null):
    at = Answer("?", "yes", effect=effect, null=null).places
    assert at["low"] <= at["value"] <= at["high"]
    assert at["null_low"] <= at["null_high"]
    assert all(8 <= place <= WIDTH - 8 for place in at.values())
    assert HEIGHT < WIDTH


@pytest.mark.parametrize("effect", [UNKNOWN, (math.inf, 0.0, 1.0), (-math.inf, 0.0, 1.0), (0.5, -math.inf, 1.0)])
def test_no_figure_of_what_is_not_finite(effect):
    assert Answer("?", UNDECIDED, effect=effect).places == {}


def of_dropout(seeds: int = 4, **slopes: float):
    """Every measure at 1 for three rates of dropout, ``slopes`` along the rate; seeds differ in their slopes."""
    rows = [
        {"rate": rate, "seed": seed, "matched": matched}
        | {name: 1 + (slopes.get(name, 0.0) + 0.1 * (-1) ** seed) * rate for name in MEASURES}
        for matched in ("steps", "loss")
        for seed in range(seeds)
        for rate in (0.0, 0.2, 0.4)
    ]
    return dropout.answers({MODELS: pd.DataFrame(rows)}, {})


def scanned(*verdicts, **baseline):
    settings = made_up_page.SETTINGS | {"baseline": made_up_page.BASELINE | baseline}
    return scan.answers(made_up_page.scan(*verdicts), {scan_study.TABLE: made_up.manifest() | {"settings": settings}})


def compiled(cost: float):
    about = made_up.manifest() | {"settings": made_up_page.COMPILE_SETTINGS}
    tables = {compiler_files.FRONTIER: made_up_page.compiled(cost)}
    return compiler.CHAPTER.answers(tables, {compiler_files.FRONTIER: about})


def of_series(**values):
    return series.answers({series.WINDOWS: made_up.series(**values)}, {})


def of_reversion(**values):
    return reversion.CHAPTER.answers({made_up.REVERSION: made_up.reversion(**values)}, {})


def of_anatomy(p_drift=0.01, power=0.9, verdict="supported", **ends):
    tables = made_up_page.anatomy()
    tables[anatomy_files.SEGMENTS] = tables[anatomy_files.SEGMENTS].assign(p_drift=p_drift, power=power)
    tables[anatomy_files.ENDS] = tables[anatomy_files.ENDS].assign(**ends)
    return anatomy.CHAPTER.answers(tables, {})


def grafted(half: float = 0.01, **damage: float):
    rows = [
        {"method": name, "seed": math.nan if "linear" in name else 0.0}
        | made_up.graft_scores()
        | made_up.with_interval("damage", value, half)
        for name, value in damage.items()
    ]
    return graft.answers({study.METHODS: pd.DataFrame(rows)}, {})


def walked(seeds=4, **gains):
    return middle.answers({walk_study.METHODS: planted(seeds=seeds, **gains)}, {})


def networks(**changed: float) -> pd.DataFrame:
    frame = made_up.networks()
    for name, value in changed.items():
        frame.loc[frame["network"] == name, "S"] = value
    return frame


ANSWERS = {  # what is measured, and the verdicts of the chapter
    "in series": (lambda: of_series(), ["in series", "no"]),
    "in parallel, at no loss": (
        lambda: of_series(S=0.2, S_excess=-0.2, preference=0.8, loss_parallel_sum=0.0),
        ["in parallel", "yes"],
    ),
    "as untrained": (lambda: of_series(S=0.4, S_excess=0.0), ["as untrained layers do", "no"]),
    "series of one prompt": (lambda: of_series(n_prompts=1), [UNDECIDED, UNDECIDED]),
    "reverts": (lambda: of_reversion(), ["in 5 of 5 layers"]),
    "reverts not": (lambda: of_reversion(kappa_excess=-0.1, restoring="no"), ["no"]),
    "reversion open": (lambda: of_reversion(restoring=UNDECIDED), [UNDECIDED]),
    "reversion of one prompt": (lambda: of_reversion(n_prompts=1, kappa=math.nan), [UNDECIDED]),
    "helps": (lambda: scanned("vanished", "survived", "survived in part"), ["yes: 2 of 21"]),
    "helps in part alone": (lambda: scanned("survived in part"), ["yes: 1 of 21"]),
    "helps not": (lambda: scanned("vanished", "as a temperature"), ["no"]),
    "help open": (lambda: scanned("vanished", UNDECIDED), ["not shown"]),
    "no task": (lambda: scanned("survived", low=0.0), ["not asked: the model cannot do the task"]),
    "no winner": (lambda: scanned(), ["no"]),
    "parts": (lambda: of_anatomy(), ["before layers 4 and 9", "yes"]),
    "no parts": (lambda: of_anatomy(p_drift=0.5), ["no parts", "yes"]),
    "parts open": (lambda: of_anatomy(p_drift=0.5, power=0.2, p_windows=0.5), ["not shown", UNDECIDED]),
    "ends of one token": (lambda: of_anatomy(token_share=0.9), ["before layers 4 and 9", UNDECIDED]),
    "saves": (lambda: compiled(0.01), ["yes: 3 of 6 layers"]),
    "saves nothing": (lambda: compiled(0.5), ["not at that loss"]),
    "a middle as good": (lambda: grafted(0.001, graft=0.0, linear=0.5), ["yes"]),
    "a middle in part": (lambda: grafted(graft=0.2, linear=0.5), ["in part"]),
    "a middle no better than a line": (lambda: grafted(graft=0.6, linear=0.5), ["no"]),
    "a middle without anything beside it": (lambda: grafted(graft=0.6), ["no"]),
    "a middle that may be as good": (lambda: grafted(0.1, graft=0.05, linear=0.5), [UNDECIDED]),
    "a middle without interval": (lambda: grafted(math.nan, graft=0.0, linear=0.5), [UNDECIDED]),
    "a middle not scored": (lambda: grafted(graft=math.nan), []),
    "a walk helps": (lambda: walked(relabelled=0.1), ["yes"]),
    "a walk helps not": (lambda: walked(noise=1e-6), ["no"]),
    "a walk of one seed": (lambda: walked(seeds=1, relabelled=0.1), [UNDECIDED]),
    "dropout as predicted": (lambda: of_dropout(psi=-1.0, additivity=1.0), ["yes", "yes"]),
    "dropout against": (lambda: of_dropout(psi=1.0, additivity=-1.0), ["no, the opposite", "no, the opposite"]),
    "dropout of one seed": (lambda: of_dropout(seeds=1, psi=-1.0, additivity=1.0), [UNDECIDED, UNDECIDED]),
    "dropout does nothing": (lambda: of_dropout(), [UNDECIDED, UNDECIDED]),
    "measured well": (lambda: series.CALIBRATION.answers({series.NETWORKS: networks()}, {}), ["yes"]),
    "measured badly": (lambda: series.CALIBRATION.answers({series.NETWORKS: networks(serial=0.9)}, {}), ["no"]),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_verdict_of_what_is_known(name):
    answer, verdicts = ANSWERS[name]
    assert [one.verdict for one in answer()] == verdicts


def test_the_number_of_a_scan_is_that_of_a_confirmed_wiring():
    (answer,) = scanned("as a temperature", "survived")
    assert ":3 1:" in answer.measure, "not the larger gain that a temperature explains"
    assert answer.effect == pytest.approx((0.175, 0.125, 0.225))


def test_what_gains_no_more_than_a_temperature_is_held_to_it():
    (answer,) = scanned("as a temperature", "vanished")
    assert answer.held_to == "one temperature for all logits: 0.01", "its gain, not its share of the wiring's"
    (answer,) = scanned("undecided", "vanished")
    assert answer.held_to == "the model as it is: 0.00"


def test_ends_that_differ_no_more_than_shuffled_windows_say_so():
    answer = of_anatomy(p_windows=0.5)[-1]
    assert (answer.verdict, "(p 0.500 with windows shuffled)" in answer.measure) == (UNDECIDED, True)
