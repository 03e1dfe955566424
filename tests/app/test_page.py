"""Earlier defects of the page: answers out of sight, lost reports, controls without effect, a stopped server, low contrast."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from med3dvlm.app import chat as app
from med3dvlm.app.analysis import Analysis
from med3dvlm.app.page import build
from med3dvlm.app.workstation import Workstation

from .browsing import PATIENCE, ask, come, count, expect, opened, upload, wait_for
from .conftest import REPORT, Parrot

IN_SIGHT = """() => { const log = document.querySelector(".log").getBoundingClientRect(), last = document.querySelector(".turn:last-child .line");
const line = last.getBoundingClientRect(); return line.bottom <= log.bottom + 1 && line.top >= log.top }"""


@pytest.mark.parametrize(("width", "height"), [(1200, 800), (1024, 700), (390, 844)])
def test_the_newest_answer_stays_in_sight(visit, scan, width, height) -> None:
    page = visit(width, height)
    opened(page, scan())
    for number in range(1, 5):
        ask(page, f"Question {number}, which is long enough to take more than a line?")
        expect(page.locator(".answered.done")).to_have_count(number)
        wait_for(lambda: page.evaluate(IN_SIGHT), 5)
    page.locator(".log").evaluate("log => { log.scrollTop = 0 }")  # who reads an earlier one is left there
    page.wait_for_timeout(100)
    page.set_viewport_size({"width": width, "height": height - 60})
    page.wait_for_timeout(100)
    assert page.locator(".log").evaluate("log => log.scrollTop") == 0


def test_a_changed_report_is_not_lost_by_opening_or_leaving(visit, scan, tmp_path) -> None:
    page = visit()
    opened(page, scan())
    page.get_by_role("tab", name="Report").click()
    field = page.locator("#report textarea")
    field.fill("My words.")
    asked: list[str] = []

    def refuse(dialog: Any) -> None:
        asked.append(dialog.type)
        dialog.dismiss()

    page.on("dialog", refuse)
    page.get_by_role("button", name="Chest phantom").click()
    wait_for(lambda: asked == ["confirm"])
    upload(page, scan(12))
    wait_for(lambda: asked == ["confirm", "confirm"])
    page.evaluate("setTimeout(() => location.reload())")
    wait_for(lambda: asked == ["confirm", "confirm", "beforeunload"] or not page.wait_for_timeout(50))
    assert field.input_value() == "My words." and "/ 10" in count(page)

    with page.expect_download() as download:
        page.get_by_role("button", name="Text").click()
    assert "My words." in Path(download.value.path()).read_text()
    page.get_by_role("button", name="Chest phantom").click()  # saved: nothing to ask
    wait_for(lambda: "/ 10" not in count(page))
    expect(field).to_have_value("")
    field.fill("Of the phantom.")
    page.remove_listener("dialog", refuse)
    page.once("dialog", lambda dialog: dialog.accept())
    upload(page, scan(12))
    wait_for(lambda: "/ 12" in count(page))
    expect(field).to_have_value("")


def test_a_report_cannot_be_edited_while_it_is_drafted(visit, server, scan) -> None:
    page = visit()
    opened(page, scan())
    page.get_by_role("tab", name="Report").click()
    field, draft, end = page.locator("#report textarea"), page.locator("#draft"), page.locator("#end-draft")
    expect(end).to_be_disabled()
    server.parrot.report = "A nodule." + " word" * 10_000
    try:
        draft.click()
        expect(field).not_to_be_editable()
        expect(draft).to_be_disabled()
        expect(field).to_have_value(re.compile("nodule"))
        expect(field).not_to_be_editable()
        end.click()
        expect(field).to_be_editable()
        expect(end).to_be_disabled()
    finally:
        server.parrot.report = REPORT
    page.once("dialog", lambda dialog: pytest.fail("a draft that nobody changed is no reason to ask"))
    page.get_by_role("button", name="Abdomen phantom").click()
    wait_for(lambda: "/ 10" not in count(page))


def test_controls_without_effect_are_disabled(visit, scan) -> None:
    page = visit()
    named = {"Ask": "Open a scan first", "Show": "Open a scan first", "Clear conversation": "There is no conversation yet"}
    buttons = {name: page.get_by_role("button", name=name, exact=True) for name in named}
    for name, reason in named.items():
        expect(buttons[name]).to_be_disabled()
        assert buttons[name].get_attribute("title") == reason
    page.get_by_role("tab", name="Similar cases").click()
    expect(page.locator("#search")).to_be_disabled()
    page.get_by_role("tab", name="Conversation").click()
    opened(page, scan())
    for field, name in (("Your question", "Ask"), ("A finding to look for", "Show")):
        expect(buttons[name]).to_be_disabled()
        page.get_by_label(field).fill("words")
        expect(buttons[name]).to_be_enabled()
    buttons["Ask"].click()
    expect(page.locator(".answered.done")).to_have_count(1)
    expect(buttons["Clear conversation"]).to_be_enabled()
    ask(page, "slowly")
    expect(page.locator(".answered.writing")).to_be_visible()
    expect(page.get_by_label("Your question")).to_have_value("")
    page.get_by_label("Your question").fill("meanwhile")
    expect(buttons["Ask"]).to_be_disabled()
    page.get_by_role("button", name="Stop").first.click()
    expect(buttons["Ask"]).to_be_enabled()
    page.get_by_role("tab", name="Similar cases").click()
    expect(page.locator("#search")).to_be_enabled()


def test_a_stopped_server_is_reported_and_the_report_can_be_saved(browser, scan, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    workstation = Workstation(Parrot(), "parrot", analysis=Analysis())
    blocks = build(workstation)
    context = browser.new_context(accept_downloads=True)
    try:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        come(page, app.launch(blocks, workstation))
        opened(page, scan())
        page.get_by_role("tab", name="Report").click()
        page.locator("#report textarea").fill("My words.")
        page.get_by_role("button", name="Text").wait_for()
        page.get_by_role("tab", name="Conversation").click()
        ask(page, "slowly")
        expect(page.locator(".answered.writing")).to_be_visible()
        blocks.close(verbose=False)
        expect(page.locator(".lost")).to_contain_text("connection to the server is lost")
        expect(page.locator(".answered.writing")).to_have_count(0)
        expect(page.locator(".answered").last).to_contain_text("connection lost")
        page.get_by_role("tab", name="Report").click()
        expect(page.locator("#draft")).to_be_disabled()
        with page.expect_download() as download:
            page.get_by_role("button", name="Text").click()
        assert Path(download.value.path()).read_text() == "My words."
        expect(page.locator(".reading .problem")).to_contain_text("without notes")
    finally:
        context.close()
        blocks.close(verbose=False)


# Every text that is seen, the colour behind it and its contrast after WCAG 2.2; colours may be given in any way that a canvas understands.
PALE = """() => {
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data]; };
const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
const light = (colour) => { const [r, g, b] = colour.slice(0, 3).map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const over = (front, back) => front.slice(0, 3).map((v, i) => v * front[3] / 255 + back[i] * (1 - front[3] / 255));
const behind = (node) => { const layers = []; for (; node; node = node.parentElement) layers.unshift(rgba(getComputedStyle(node).backgroundColor));
  return layers.reduce((back, front) => over(front, back), [255, 255, 255]); };
const ratio = (one, two) => { const [a, b] = [light(one), light(two)].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); };
const seen = (node) => !node.closest(":disabled, .tools") && node.getClientRects().length
  && node.checkVisibility({ visibilityProperty: true, opacityProperty: true });
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let text = walker.nextNode(); text; text = walker.nextNode()) {
  const node = text.parentElement;
  if (!text.data.trim() || !seen(node) || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(node.tagName)) continue;
  found.push([text.data.trim().slice(0, 30), ratio(over(rgba(getComputedStyle(node).color), behind(node)), behind(node)), 4.5]);
}
for (const node of document.querySelectorAll("input, textarea")) {
  if (!seen(node) || !node.placeholder) continue;
  found.push([node.placeholder.slice(0, 30), ratio(over(rgba(getComputedStyle(node, "::placeholder").color), behind(node)), behind(node)), 4.5]);
}
for (const node of document.querySelectorAll("#question, #phrase, .hint, .save, #examples button, #clear, #report textarea")) {
  const edge = ratio(rgba(getComputedStyle(node).borderTopColor), behind(node.parentElement));
  if (seen(node)) found.push(["edge of " + (node.id || node.className), edge, 3]);
}
return found.filter(([, contrast, least]) => contrast < least).map(([words, contrast]) => `${words}: ${contrast.toFixed(2)}`); }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_and_control_has_enough_contrast(visit, scan, scheme) -> None:
    page = visit(1280, 800, scheme)
    pale = page.evaluate(PALE)
    opened(page, scan(12))
    expect(page.locator("#notice")).to_contain_text("Unlike")
    ask(page, "doubtful?")
    expect(page.locator(".answered.done .chip")).to_have_text("low confidence, 25 %, on a scan unlike the training data")
    page.get_by_label("Your question").fill("words")
    page.get_by_role("button", name="Sampling").click()
    page.locator(".keys summary").click()
    pale += page.evaluate(PALE)
    page.get_by_role("tab", name="Report").click()
    page.locator("#draft").click()
    expect(page.locator(".reading .chip.absent")).to_be_visible()
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)  # a transition
    pale += page.evaluate(PALE)
    page.get_by_role("tab", name="Similar cases").click()
    page.locator("#search").click()
    expect(page.locator(".cases article").first).to_be_visible()
    pale += page.evaluate(PALE)
    assert not pale, sorted(set(pale))


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    array = np.full((30, 20, 10), 12345, np.int16)
    array[0] = -1024
    path = tmp_path_factory.mktemp("bright") / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.5, 1.0])), path)
    return path


def test_number_fields_are_exact_and_ignore_empty_input(visit, bright) -> None:
    page = visit()
    opened(page, bright)
    expect(page.locator("[data-plane=axial] .value")).to_have_text(re.compile(r"^12345( HU)?$"))
    level, width = page.get_by_label("Window level"), page.get_by_label("Window width")
    for field, value in ((level, level.input_value()), (width, width.input_value())):
        for words in ("", "12e"):
            field.fill("") if not words else (field.focus(), page.keyboard.type(words))
            field.press("Enter")
            field.blur()
            expect(field).to_have_value(value)
    level.fill("12345")
    level.press("Enter")
    expect(level).to_have_value("12345")


def test_the_tool_stays_selected_after_a_click_in_the_picture(visit, scan) -> None:
    page = visit()
    opened(page, scan())
    tool = page.get_by_role("button", name="Pan", exact=True)
    tool.click()
    page.locator("[data-plane=axial] canvas").click()
    page.locator("[data-plane=coronal] canvas").click()
    assert tool.get_attribute("aria-pressed") == "true"
    assert page.locator(".tools [data-tool][aria-pressed=true]").count() == 1


def test_the_crosshair_returns_when_the_overlay_is_removed(visit, scan) -> None:
    page = visit()
    opened(page, scan())
    where: Callable[[], str] = lambda: page.locator("#viewer [data-at]").get_attribute("data-at") or ""  # noqa: E731
    before = where()
    for leave in ("Clear conversation", "Hide"):
        ask(page, "Which organ?")
        page.get_by_role("button", name="Where did it look?").click()
        wait_for(lambda: where() != before)
        assert where() == "6,15,25"  # the middle of the hot place in conftest.py's `spot`, as displayed
        page.get_by_role("button", name=leave).click()
        wait_for(lambda: where() == before)
    page.get_by_role("button", name="Where did it look?").click()
    wait_for(lambda: where() != before)
    page.locator("[data-plane=axial]").press("ArrowDown")  # who moves on stays there
    wait_for(lambda: where().startswith("7,"))
    page.get_by_role("button", name="Hide").click()
    assert where().startswith("7,")


@pytest.mark.parametrize(("width", "height"), [(1024, 700), (390, 844)])
def test_slice_counters_are_fully_visible_beside_the_picture(visit, scan, width, height) -> None:
    page = visit(width, height)
    opened(page, scan())
    for plane in ("axial", "coronal", "sagittal"):
        head, canvas = (page.locator(f"[data-plane={plane}] {part}").bounding_box() for part in (".head", "canvas"))
        assert head["y"] + head["height"] <= canvas["y"] + 1
        assert page.locator(f"[data-plane={plane}] .head").evaluate("head => head.scrollWidth <= head.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    tools = page.locator(".tools button, .tools input, .tools select").all()
    assert all((box := tool.bounding_box()) and box["x"] + box["width"] <= width for tool in tools)
