"""The pages in a real browser: silent, alone, legible, reachable by keyboard, and right."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

from fedtl.results import pages
from fedtl.results.page import run_page
from fedtl.results.tables import read_run

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]

NAMES = ("run", "bare", "split", "gap", "backbones")

PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def folder(made: Path, made_runs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of pages as files."""
    path = tmp_path_factory.mktemp("pages")
    names, domains = made_runs.names_of(8), ["photo", "<b>sketch</b>"] * 4
    image = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
    examples = [{"name": n, "images": [{"source": image, "label": "<dog>"}]} for n in names[:2]]
    bare = made_runs.write_run(path / "bare", references=False, gap=False)
    found = {
        "run": run_page(read_run(made), examples, ["A note."]),
        "bare": run_page(read_run(bare)),
        "split": pages.split_page(made_runs.split_facts(names, domains, 6)),
        "gap": pages.gap_page(made_runs.gap_facts(names, domains, 6)),
        "backbones": pages.backbones_page(made_runs.backbone_facts()),
    }
    for name, text in found.items():
        (path / f"{name}.html").write_text(text)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all tests here."""
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Shown:
    """A page that is open, and what it did that it must not."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        own = path.as_uri()

        def judge(route: Any) -> None:
            if route.request.url == own or route.request.url.startswith("data:"):
                route.continue_()
            else:
                self.complaints.append(f"asked for {route.request.url}")
                route.abort()

        self.context.route("**/*", judge)
        self.page.goto(own)

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_silent_and_asks_nobody(name: str, browser: Any, folder: Path) -> None:
    with Shown(browser, folder / f"{name}.html") as shown:
        shown.page.wait_for_load_state("networkidle")
        shown.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert shown.complaints == []
        assert shown.page.locator("h1").count() == 1


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("run", "light"),
        ("run", "dark"),
        ("gap", "light"),
        ("split", "light"),
        ("backbones", "dark"),
    ],
)
def test_axe_finds_nothing_serious(name: str, scheme: str, browser: Any, folder: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with Shown(browser, folder / f"{name}.html", color_scheme=scheme, bypass_csp=True) as shown:
        shown.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        found = Axe().run(shown.page).response["violations"]
        serious = [
            (one["id"], one["nodes"][0]["html"][:200])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == []


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_a_phone(name: str, browser: Any, folder: Path) -> None:
    with Shown(browser, folder / f"{name}.html", viewport=PHONE) as shown:
        shown.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        width = shown.page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"]
        wide = shown.page.evaluate(
            """[...document.querySelectorAll('body *')].filter(e => {
                const box = e.getBoundingClientRect();
                return box.right > innerWidth + 1 && !e.closest('.scroll') && !e.closest('.skip');
            }).map(e => e.outerHTML.slice(0, 80))"""
        )
        assert wide == []


def test_dark_is_dark_and_figures_follow(browser: Any, folder: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        with Shown(browser, folder / "run.html", color_scheme=scheme) as shown:
            colours[scheme] = shown.page.evaluate(
                """[getComputedStyle(document.body).backgroundColor,
                    getComputedStyle(document.querySelector('svg text')).fill]"""
            )

    def light(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    paper, ink = map(light, colours["light"])
    assert paper > 200 > 130 > ink
    paper, ink = map(light, colours["dark"])
    assert paper < 60 < 130 < ink


def test_print_shows_whole_tables_on_white(browser: Any, folder: Path) -> None:
    with Shown(browser, folder / "run.html", color_scheme="dark") as shown:
        shown.page.emulate_media(media="print")
        colour, overflow, navigation = shown.page.evaluate(
            """[getComputedStyle(document.body).backgroundColor,
                getComputedStyle(document.querySelector('.tall')).overflowY,
                getComputedStyle(document.querySelector('nav')).display]"""
        )
        assert colour == "rgb(255, 255, 255)"
        assert (overflow, navigation) == ("visible", "none")
        assert len(shown.page.pdf()) > 20_000


def test_the_keyboard_reaches_links_tables_and_headings(browser: Any, folder: Path) -> None:
    with Shown(browser, folder / "run.html") as shown:
        press = shown.page.keyboard.press
        press("Tab")
        focused = "document.activeElement.className"
        assert shown.page.evaluate(focused) == "skip"
        box = shown.page.locator(".skip").bounding_box()
        assert box is not None
        assert box["x"] >= 0  # it can be seen while it has the focus
        press("Enter")
        assert shown.page.evaluate("document.activeElement.id") == "main"
        reached = []
        for _ in range(60):
            press("Tab")
            reached.append(
                shown.page.evaluate(
                    """[document.activeElement.tagName,
                        document.activeElement.getAttribute('aria-label'),
                        getComputedStyle(document.activeElement).outlineStyle]"""
                )
            )
        assert ["DIV", "Table of all clients", "solid"] in reached
        assert any(tag == "BUTTON" and outline == "solid" for tag, _, outline in reached)
        assert any(tag == "SUMMARY" for tag, _, _ in reached)


def test_headings_sort_the_table_and_undefined_stays_last(browser: Any, folder: Path) -> None:
    with Shown(browser, folder / "run.html") as shown:
        table = shown.page.locator("#client-table")
        head = table.locator("thead tr:last-child th").nth(6)
        assert head.inner_text().startswith("Difference")
        for order in ("ascending", "descending"):
            head.locator("button").press("Enter")
            assert head.get_attribute("aria-sort") == order
            values = shown.page.evaluate(
                """[...document.querySelectorAll('#client-table tbody tr')]
                   .map(row => row.cells[6].dataset.v)"""
            )
            assert values[-1] == ""
            numbers = [float(value) for value in values[:-1]]
            assert numbers == sorted(numbers, reverse=order == "descending")


def test_it_reads_without_its_script(browser: Any, folder: Path) -> None:
    with Shown(browser, folder / "run.html", java_script_enabled=False) as shown:
        assert shown.page.locator("#client-table tbody tr").count() == 12
        assert "Difference" in shown.page.locator("#client-table").inner_text()


def test_numbers_are_those_of_the_parquet(browser: Any, folder: Path, made: Path) -> None:
    rows = pq.read_table(made / "clients.parquet").to_pylist()
    last = {row["client"]: row for row in rows if row["split"] == "test" and row["round"] == 8}
    far = {row["client"]: row for row in rows if row["split"] == "everyone"}
    summary = json.loads((made / "summary.json").read_text())
    with Shown(browser, folder / "run.html") as shown:
        found = shown.page.evaluate(
            """[...document.querySelectorAll('#client-table tbody tr')].map(row =>
                 [...row.cells].map(cell => cell.dataset.v ?? cell.innerText))"""
        )
        assert len(found) == len(last)
        for client, cells in enumerate(found):
            own, everywhere = last[client], far[client]
            expected = {
                3: own["accuracy"],
                4: own["local_only_accuracy"],
                5: own["personal_accuracy"],
                7: own["p_holm"],
                8: everywhere["accuracy"],
                9: everywhere["local_only_accuracy"],
                10: everywhere["personal_accuracy"],
                13: own["examples"],
            }
            for place, value in expected.items():
                if value is None:
                    assert cells[place] == ""
                else:
                    assert float(cells[place]) == pytest.approx(value, abs=1e-11)
            assert cells[1] == own["advice"]
        shared = shown.page.locator("tr[data-head=federated] td").first
        value = float(shared.get_attribute("data-v") or "nan")
        assert value == pytest.approx(summary["final"]["accuracy"], abs=1e-11)
        assert shared.inner_text() == f"{100 * value:.1f}\u00a0%"
