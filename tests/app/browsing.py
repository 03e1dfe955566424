"""Helpers of the browser tests: one Chromium by Playwright, and actions on a page."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PATIENCE = 60_000  # ms, for a machine that is busy with other tests


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium; .ci/run installs Debian's")
    sync_api.expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, server: SimpleNamespace) -> Iterator[Callable[..., Any]]:
    """visit(width, height, color_scheme) is the page of a new person. At the end no page may have complained or asked another machine."""
    complaints, contexts = [], []

    def open_page(width: int = 1280, height: int = 800, color_scheme: str = "light") -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=color_scheme, accept_downloads=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("response", lambda answer: complaints.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)
        page.on("request", lambda request: complaints.append(request.url) if not local(request.url, server.address) else None)
        come(page, server.address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints, complaints


def come(page: Any, address: str) -> None:
    page.goto(address)
    page.wait_for_selector(".workstation")
    page.wait_for_selector("#talk [data-state]")  # the right side is there, too


def expect(thing: Any) -> Any:
    from playwright import sync_api

    return sync_api.expect(thing)


def local(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def upload(page: Any, *paths: Path) -> None:
    page.locator("#loader input[type=file]").set_input_files(paths)


def opened(page: Any, *paths: Path) -> None:
    upload(page, *paths)
    page.wait_for_selector(".workstation[data-state=open]")
    page.wait_for_function("document.querySelector('.stage .count').textContent.includes('/')")


def ask(page: Any, words: str) -> None:
    page.get_by_label("Your question").fill(words)
    page.get_by_label("Your question").press("Enter")


def count(page: Any, plane: str = "axial") -> str:
    return page.locator(f"[data-plane={plane}] .count").text_content() or ""


def grey(page: Any, plane: str = "axial") -> int:
    """Returns a hundred times the mean red of the plane's canvas, which differs between two pictures."""
    return page.evaluate(
        """plane => { const canvas = document.querySelector(`[data-plane=${plane}] canvas`);
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return Math.round(400 * pixels.reduce((sum, value, index) => sum + (index % 4 ? 0 : value), 0) / pixels.length) }""",
        plane,
    )


@contextmanager
def changes(look: Callable[[], object]) -> Iterator[None]:
    before = look()
    yield
    wait_for(lambda: look() != before)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
