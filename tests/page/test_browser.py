"""The page in a real browser, Chromium without a window: links, copying, sorting, folding, hover, sizes, ink, paper."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from matplotlib.figure import Figure

from support.made_up_page import write_every_chapter
from surgery import report
from surgery.page import chapters, drawing

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (390, 768, 1400)
DRAWN = "document.querySelectorAll('.chart svg').length === document.querySelectorAll('.chart').length"


class Visit:
    """A page that is open in a browser, what it said on the console, and the addresses that it asked for."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        self.again()

    def again(self) -> None:
        """The page as it is when it is opened."""
        self.page.set_viewport_size({"width": 1400, "height": 900})
        self.page.emulate_media(media="screen", color_scheme="light", reduced_motion="reduce")
        self.page.goto(self.address)
        self.page.wait_for_function(DRAWN)

    def copied(self) -> str:
        """The text that the page says it copied, once it does."""
        self.page.wait_for_selector("#told.shown")
        return self.page.inner_text("#told").removeprefix("copied: ")


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    """The page of every chapter; skipped where there is no browser."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH, so the page was not tried in a browser: apt-get install chromium")
    wide = drawing.png(Figure(figsize=(13, 3)))  # drawing all figures takes longer than the rest of this file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapters, "png", lambda figure: wide)
        path = report.build(write_every_chapter(tmp_path_factory.mktemp("page")))
    assert path.stat().st_size < 5_000_000
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield Visit(browser.new_page(), f"file://{path}")
        browser.close()


@pytest.fixture
def page(visit: Visit) -> Any:
    """The page as it is when it is opened, in a wide window."""
    visit.again()
    return visit.page


def test_it_draws_every_chart_and_asks_for_nothing(visit, page):
    assert page.locator(".chart svg").count() == 8
    assert visit.errors == []
    assert set(visit.requests) == {visit.address}


def test_the_contents_lead_to_their_sections_and_unfold_them(page):
    links = page.locator("nav a")
    assert links.count() == 12
    for link in links.all():
        name = link.get_attribute("href").removeprefix("#")
        link.click()
        page.wait_for_function(f"Math.abs(document.getElementById('{name}').getBoundingClientRect().top) < innerHeight")
    for name in ("what", "columns", "provenance"):
        assert page.locator(f"#{name} > details").get_attribute("open") is not None
    page.locator("#columns > details > summary").click()
    page.locator("nav a[href='#columns']").click()
    page.wait_for_selector("#columns > details[open]", timeout=2000)  # the address is the same, and it opens again


def test_an_answer_leads_to_its_chapter(page):
    page.get_by_role("link", name="Can layers run side by side").click()
    assert page.url.endswith("#compile")


def test_a_click_on_a_wiring_copies_it(visit, page):
    code = page.locator("#compile .headline code")
    code.click()
    assert visit.copied() == code.inner_text() == "{*0:2} {*2:4} {*4:6} 6:"
    page.locator("#scan summary", has_text="largest gains").click()
    page.locator("#scan td code").nth(1).press("Enter")
    assert visit.copied() == ":3 1:"


def test_a_click_on_a_mark_copies_its_wiring_or_window(visit, page):
    page.locator("#scan .mark-symbol.role-mark path").first.click()
    assert visit.copied() == ":2 0:"
    page.locator("#series .mark-rect.role-mark path").first.click()
    page.wait_for_function("document.getElementById('told').textContent.endsWith(' 0:2')")


def test_hover_shows_the_row(page):
    page.locator("#scan .mark-symbol.role-mark path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    shown = page.inner_text("#vg-tooltip-element")
    for part in (":2 0:", "gain_low", "0.15", "undecided"):
        assert part in shown, part


def test_a_table_is_sorted_by_number_and_by_word(page):
    page.locator("#compile summary", has_text="frontier").click()
    table = page.locator("#compile table")

    def column(place: int) -> list[str]:
        return [text.split()[0] for text in table.locator(f"tbody td:nth-child({place})").all_inner_texts()]

    head = table.locator("th").nth(2)
    head.locator("button").click()
    numbers = [float(text) for text in column(3)]
    assert len(numbers) == 6
    assert head.get_attribute("aria-sort") == "ascending"
    assert numbers == sorted(numbers)
    head.locator("button").click()
    assert [float(text) for text in column(3)] == sorted(numbers, reverse=True)
    table.locator("th").first.locator("button").click()
    assert column(1) == ["left"] * 3 + ["side"] * 3
    assert head.get_attribute("aria-sort") is None
    table.locator("th").first.locator("button").click()
    assert column(1) == ["side"] * 3 + ["left"] * 3


def test_numbers_with_commas_and_exponents_are_sorted_as_numbers_and_gaps_go_last(page):
    page.locator("#graft summary", has_text="What every method reached").click()
    table = page.locator("#graft table").first
    place = table.locator("th").all_inner_texts().index("operations") + 1
    button = table.locator("th").nth(place - 1).locator("button")
    for _ in range(2):
        button.click()
        assert table.locator(f"tbody td:nth-child({place})").all_inner_texts()[-1] == "", "skip spends nothing"


def test_details_are_folded_and_open(page):
    findings = page.locator("#series details.findings")
    assert not findings.locator("p").first.is_visible()
    findings.locator("summary").click()
    assert findings.locator("p").first.is_visible()
    assert page.locator("#series details[open]").count() == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_runs_over_the_edge(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    page.wait_for_function(f"[...document.querySelectorAll('.chart svg')].every(svg => svg.clientWidth <= {width})")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = f"""[...document.querySelectorAll('main *')].filter(part => !part.closest('.table, .chart')
        && part.getBoundingClientRect().right > {width}).map(part => part.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []
    cut = """[...document.querySelectorAll('.chart')].flatMap(place =>
        [...place.querySelectorAll('text')].filter(text => {
        const inner = text.getBoundingClientRect(), outer = place.getBoundingClientRect();
        return inner.width && (inner.left < outer.left - 1 || inner.right > outer.right + 1);
    }).map(text => place.id + ': ' + text.textContent))"""
    assert page.evaluate(cut) == [], "no label is outside its chart"
    sizes = "[...document.querySelectorAll('.chart text')].map(text => parseFloat(getComputedStyle(text).fontSize))"
    assert min(page.evaluate(sizes)) >= 10, "and all can be read"


def test_labels_of_an_axis_do_not_overlap_in_a_narrow_window(page):
    page.set_viewport_size({"width": 390, "height": 900})
    page.reload()
    page.wait_for_function(DRAWN)
    overlapping = """[...document.querySelectorAll('.chart .role-axis-label')].flatMap(axis => {
        const boxes = [...axis.querySelectorAll('text')].filter(text => text.getAttribute('opacity') !== '0')
            .map(text => text.getBoundingClientRect());
        return boxes.filter((a, i) => boxes.some((b, j) => j > i && a.left < b.right && b.left < a.right
            && a.top < b.bottom - 2 && b.top < a.bottom - 2)).map(() => axis.closest('.chart').id);
    })"""
    assert page.evaluate(overlapping) == []


def test_in_the_dark_the_ink_of_charts_is_light(page):
    ink = "getComputedStyle(document.querySelector('#chart-series text')).fill"
    mark = "getComputedStyle(document.querySelector('#chart-graft .mark-symbol.role-mark path')).fill"
    paper = "getComputedStyle(document.body).backgroundColor"
    light = [page.evaluate(part) for part in (ink, mark, paper)]
    page.emulate_media(color_scheme="dark")
    dark = [page.evaluate(part) for part in (ink, mark, paper)]
    assert light == ["rgb(29, 29, 31)", "rgb(0, 114, 178)", "rgb(255, 255, 255)"]
    assert dark == ["rgb(230, 231, 234)", "rgb(90, 174, 240)", "rgb(22, 24, 28)"]


def test_on_paper_there_are_no_links_to_click_and_nothing_is_folded(page):
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("nav").is_visible()
    assert not page.locator(".tool").first.is_visible()
    assert page.locator("#series details.findings p").first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('#chart-series text')).fill") == "rgb(0, 0, 0)"


@pytest.mark.parametrize(("kind", "begins"), [("svg", b"<svg"), ("png", b"\x89PNG")])
def test_a_chart_is_saved(page, kind, begins):
    with page.expect_download() as download:
        page.locator(f"#compile [data-save={kind}]").click()
    assert download.value.suggested_filename == f"compile.{kind}"
    assert download.value.path().read_bytes().startswith(begins)


def test_heads_say_what_they_mean(page):
    page.locator("#series summary", has_text="Neighbours").click()
    heads = page.locator("#series th button[title]")
    assert page.locator("#series th", has_text="R").first.locator("button").get_attribute("title")
    assert heads.count() >= 10


def test_no_test_here_left_an_error_or_a_request(visit):
    """Last in this file: nothing that was clicked did."""
    assert visit.errors == []
    assert {address.split("#")[0] for address in visit.requests if not address.startswith("data:")} == {visit.address}
