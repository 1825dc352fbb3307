"""The served page in a real browser: drop, choose, type; asks nobody else, legible, by keyboard."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedtl.serve.app import Limits, make_app
from fedtl.serve.predictor import open_predictor

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium")
PHONE = {"width": 360, "height": 740}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server of pictures and one of rows, in threads of this process."""
    import uvicorn

    place = Path(__file__).parents[1] / "unit" / "serve" / "conftest.py"
    spec = importlib.util.spec_from_file_location("small_models_for_pages", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder, started, found = tmp_path_factory.mktemp("pages"), [], {}
    for kind in ("images", "rows"):
        predictor = open_predictor(module.write_model(folder / f"{kind}.onnx", kind))
        config = uvicorn.Config(
            make_app(predictor, Limits()), log_level="error", access_log=False, loop="asyncio"
        )
        server, listening = uvicorn.Server(config), socket.socket()
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(
            target=lambda s=server, one=listening: asyncio.run(s.serve([one])), daemon=True
        )
        thread.start()
        started.append((server, thread, listening))
        found[kind] = f"http://127.0.0.1:{listening.getsockname()[1]}"
    for server, _, _ in started:
        end = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < end
            time.sleep(0.02)
    yield found
    for server, thread, listening in started:
        server.should_exit = True
        thread.join(20)
        listening.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def show(browser: Any, addresses: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """Opens a page; whatever it asks of others, or complains of, fails the test."""
    contexts, complaints = [], []

    def open_page(kind: str, path: str = "/", **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))

        def judge(route: Any) -> None:
            if route.request.url.startswith((addresses[kind], "blob:")):
                route.continue_()
            else:
                complaints.append(f"asked for {route.request.url}")
                route.abort()

        context.route("**/*", judge)
        page.goto(addresses[kind] + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    expected = "the server responded with a status of 422"
    assert [text for text in complaints if expected not in text] == []


def picture() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def choose(page: Any, data: bytes) -> None:
    page.locator("#file").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": data}
    )


def test_a_chosen_picture_gets_labels_with_bars(show: Callable[..., Any]) -> None:
    page = show("images")
    choose(page, picture())
    page.wait_for_selector("#found:not([hidden])")
    rows = page.locator("#bars li")
    assert rows.count() == 3
    shares = [float(t.split()[0]) for t in page.locator(".share").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.3)
    answer = page.locator("#answer").inner_text()
    assert answer.startswith(rows.first.locator(".name").inner_text())
    widths = page.evaluate(
        "[...document.querySelectorAll('.fill')].map(e => parseFloat(e.style.width))"
    )
    assert widths == pytest.approx(shares, abs=0.06)
    assert page.locator("#picture").is_visible()


def test_a_dropped_picture_and_one_that_is_none(show: Callable[..., Any]) -> None:
    page = show("images")
    drop = """([bytes, type]) => {
        const given = new DataTransfer();
        given.items.add(new File([new Uint8Array(bytes)], 'x.png', {type}));
        dispatchEvent(new DragEvent('drop', {dataTransfer: given, cancelable: true}));
    }"""
    page.evaluate(drop, [list(picture()), "image/png"])
    page.wait_for_selector("#found:not([hidden])")
    page.evaluate(drop, [list(b"<script>alert(1)</script>"), "image/png"])
    page.wait_for_selector("#error:not([hidden])")
    assert "this picture cannot be used" in page.locator("#error").inner_text()
    assert not page.locator("#found").is_visible()
    assert not page.locator("#picture").is_visible()


def test_a_row_by_keyboard_alone(show: Callable[..., Any]) -> None:
    page = show("rows")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("1, 2; 3 4")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#found:not([hidden])")
    page.keyboard.type(" 5")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "another width" in page.locator("#error").inner_text()


def test_a_picture_is_chosen_by_keyboard(show: Callable[..., Any]) -> None:
    page = show("images")
    page.keyboard.press("Tab")
    with page.expect_file_chooser() as chooser:
        # Keys reach the page by another way than the wish to see its file choosers, which a busy
        # machine delivers later: an answer from the page shows that the wish has arrived.
        assert page.evaluate("document.activeElement.id") == "drop"
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    page.wait_for_selector("#found:not([hidden])")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("kind", "path"), [("images", "/"), ("rows", "/"), ("images", "/docs")])
def test_axe_finds_nothing_serious_and_it_fits_a_phone(
    show: Callable[..., Any], kind: str, path: str, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = show(kind, path, color_scheme=scheme, viewport=PHONE, bypass_csp=True)
    if (kind, path) == ("images", "/"):
        choose(page, picture())
        page.wait_for_selector("#found:not([hidden])")
    violations = Axe().run(page).response["violations"]
    serious = [
        (one["id"], one["nodes"][0]["html"][:200])
        for one in violations
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
    assert (light > 200) == (scheme == "light")


def test_names_are_shown_as_they_are(show: Callable[..., Any]) -> None:
    page = show("images")
    choose(page, picture())
    page.wait_for_selector("#found:not([hidden])")
    assert page.locator("#bars b").count() == 0
    assert "<b>dog</b>" in page.locator("#bars").inner_text()
    assert "It knows <i>three</i> things." in page.locator("main").inner_text()
