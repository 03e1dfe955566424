"""The page in a real browser: Chromium, driven by Playwright, against a model that only repeats what it was given."""

import re
from pathlib import Path
from typing import Any

import pytest

from med3dvlm.prompts import RESEARCH_NOTICE

from .browsing import ask, changes, count, expect, grey, opened, upload, wait_for
from .conftest import REPORT, files_with_content
from .test_scans import dicom_series


def test_look_and_ask(visit, server, scan) -> None:
    page = visit(1600, 1000, "dark")
    expect(page.get_by_text(RESEARCH_NOTICE)).to_be_visible()
    expect(page.get_by_text("No scan yet")).to_be_visible()
    ask(page, "Anything?")
    expect(page.locator(".conversation .problem")).to_contain_text("open a scan first")
    page.wait_for_timeout(1500)  # and it stays
    expect(page.locator(".conversation .problem")).to_be_visible()
    assert page.get_by_label("Your question").input_value() == "Anything?"
    opened(page, scan())
    assert "Doe" not in page.content()
    for fact in ("NIfTI", "10 × 20 × 30", "2.5 × 1 × 1 mm", "SAR, axial slices", "Hounsfield units"):
        expect(page.locator("#facts")).to_contain_text(fact)
    assert "5 / 10" in count(page) and "10.0 mm" in count(page)

    axial = page.locator("[data-plane=axial] canvas")
    axial.hover()
    with changes(lambda: count(page)):
        page.mouse.wheel(0, 100)
    assert "6 / 10" in count(page)
    with changes(lambda: count(page, "coronal")):
        axial.click(position={"x": 60, "y": 300})  # the crosshair moves the other planes
    with changes(lambda: grey(page)):
        page.get_by_role("button", name="Lung").click()
    assert page.get_by_label("Window width").input_value() == "1500"
    with changes(lambda: page.get_by_label("Window width").input_value()):
        axial.hover()
        page.mouse.down(button="right")
        page.mouse.move(700, 500, steps=3)
        page.mouse.up(button="right")
    with changes(lambda: grey(page)):
        page.get_by_label("Zoom in").click()
    with changes(lambda: grey(page)):
        page.get_by_role("button", name="Reset").click()
    assert page.get_by_label("Window width").input_value() == "400"
    axial.dblclick(position={"x": 200, "y": 200})
    expect(page.locator("[data-plane=coronal]")).to_be_hidden()
    axial.dblclick(position={"x": 200, "y": 200})
    expect(page.locator("[data-plane=coronal]")).to_be_visible()

    ask(page, "<img src=x onerror=document.title='run'>")
    answer = page.locator(".answered").last
    expect(answer).to_contain_text("confidence 90 %")
    expect(answer).to_contain_text("10 slices. <b><img src=x onerror=document.title='run'></b> ${1 + 1} & 0")
    expect(answer).to_contain_text("1.5 s · 10 tokens")
    assert page.title() == "Med3DVLM" and page.locator(".conversation img").count() == 0
    assert "whether they are true" in (answer.locator(".chip").get_attribute("title") or "")
    ask(page, "doubtful?")
    expect(page.locator(".answered").last).to_contain_text("low confidence, 25 %")
    page.get_by_role("button", name="Retry").click()
    wait_for(lambda: len(server.parrot.histories[-1]) == 2 and "done" in (page.locator(".answered").last.get_attribute("class") or ""))
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("The question, to be changed").fill("Changed?")
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".answered").last).to_contain_text("<b>Changed?</b> ${1 + 1} & 2")
    assert page.locator(".turn").count() == 2
    page.get_by_role("button", name="Clear conversation").click()
    expect(page.get_by_text("Ask about the scan", exact=True)).to_be_visible()


def test_nothing_of_the_previous_scan_stays(visit, server, scan) -> None:
    """Neither the conversation, while a question is being edited, nor a waiting question is kept."""
    page = visit()
    opened(page, scan())
    ask(page, "First?")
    expect(page.locator(".answered").last).to_contain_text("confidence")
    page.get_by_role("button", name="Edit").click()
    upload(page, scan(12))
    expect(page.locator("#facts")).to_contain_text("12 × 20 × 30")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_label("The question, to be changed")).to_have_count(0)
    wait_for(lambda: "/ 12" in count(page))
    ask(page, "slowly")
    wait_for(lambda: server.parrot.running)
    page.get_by_role("button", name="Clear conversation").click()
    ask(page, "Second?")
    expect(page.locator(".answered").last).to_contain_text("12 slices. <b>Second?</b>")
    expect(page.locator(".turn")).to_have_count(1)


def test_stop_sampling_and_closing_the_page_during_an_answer(visit, server, scan) -> None:
    page = visit()
    opened(page, scan())
    ask(page, "slowly")
    page.get_by_role("button", name="Stop").first.click()
    expect(page.locator(".answered").last).to_contain_text("stopped")
    page.get_by_role("button", name="Sampling").click()
    number, slider = (page.locator(f"#sampling input[type={kind}]").first for kind in ("number", "range"))

    def taken() -> bool:
        number.fill("0.5")  # what is typed while the section still opens is lost
        number.press("Enter")
        return slider.input_value() == "0.5"

    wait_for(taken)
    ask(page, "Sampled?")
    expect(page.locator(".answered").last).to_contain_text("confidence")
    assert server.parrot.sampling[-1] == {"temperature": 0.5, "top_p": 1}
    ask(page, "slowly once more")
    wait_for(lambda: server.parrot.running)
    ask(page, "Meanwhile?")
    expect(page.locator(".conversation .problem")).to_contain_text("An answer is being written")
    with changes(lambda: page.locator(".answered").last.text_content()):
        pass
    expect(page.locator(".conversation .problem")).to_be_visible()
    page.close()
    wait_for(lambda: not server.parrot.running)
    assert files_with_content(server.uploads) == []


def test_an_unreadable_file_is_reported_in_view_and_the_open_scan_stays(visit, scan, tmp_path) -> None:
    page = visit(820, 1180)
    opened(page, scan())
    wrong = tmp_path / "<b>notes.nii.gz"
    wrong.write_bytes(b"not a scan")
    upload(page, wrong)
    expect(page.locator("#status .bar.error")).to_contain_text("cannot be read as")
    expect(page.locator("#loader input[type=file]")).to_be_attached()
    ask(page, "word " * 10_000)
    expect(page.locator(".conversation .problem")).to_contain_text("at most 4000")
    ask(page, " ")
    expect(page.locator(".conversation .problem")).to_contain_text("type a question")
    ask(page, "too small")
    expect(page.locator(".answered.failed")).to_contain_text("The volume is too small for the encoder.")
    ask(page, "still there?")
    expect(page.locator(".answered").last).to_contain_text("10 slices.")
    large = tmp_path / "large.npy"
    large.write_bytes(bytes(2**20 + 1))
    upload(page, large)
    expect(page.get_by_text(re.compile("size", re.I)).last).to_be_visible()


def test_a_dicom_series_is_reported_and_saved(visit, tmp_path) -> None:
    page = visit()
    opened(page, *dicom_series(tmp_path / "series"))
    expect(page.locator("#facts")).to_contain_text("DICOM series")
    expect(page.locator("#notice")).to_contain_text("Unlike <anything> seen in training.")
    page.get_by_role("tab", name="Report").click()
    page.get_by_role("button", name="Draft the report").click()
    expect(page.locator(".reading .chip.present")).to_have_text("lung nodule")
    expect(page.locator(".reading .chip.absent")).to_have_text("pleural effusion")
    expect(page.locator(".reading")).to_contain_text("Impression")
    page.locator("#report textarea").press("Control+End")
    page.locator("#report textarea").type(" Ascites is present.")
    expect(page.locator(".reading .chip.present")).to_have_count(2)
    for label, words in (("Text", b"Ascites is present."), ("JSON", b'"sections"'), ("DICOM", b"DICM")):
        assert words in saved(page, label)
    text = saved(page, "Text").decode()
    assert "Unlike <anything> seen in training." in text and "Model: parrot" in text and "changed by hand" in text
    page.locator("#report textarea").press("Control+End")
    for _ in range(len("Ascites is present.")):
        page.locator("#report textarea").press("Backspace")
    assert b"Ascites" not in saved(page, "Text")  # what is seen is saved, however it came about
    expect(page.locator(".reading .chip.present")).to_have_count(1)
    page.locator("#report textarea").fill("Cardiomegaly.")
    expect(page.locator(".reading .chip.present")).to_have_text("cardiomegaly")
    page.get_by_role("button", name="Draft the report").click()
    expect(page.locator(".reading .problem")).to_contain_text("changed by hand")
    assert page.locator("#report textarea").input_value() == "Cardiomegaly."
    page.get_by_role("button", name="Draft the report").click()
    expect(page.locator(".reading .chip.present")).to_have_text("lung nodule")


def saved(page: Any, label: str) -> bytes:
    with page.expect_download() as download:
        page.get_by_role("button", name=label).click()
    return Path(download.value.path()).read_bytes()


def test_a_draft_that_was_stopped_says_so(visit, server, scan) -> None:
    page = visit()
    opened(page, scan())
    server.parrot.report = "A nodule." + " word" * 10_000
    try:
        page.get_by_role("tab", name="Report").click()
        page.get_by_role("button", name="Draft the report").click()
        wait_for(lambda: server.parrot.running)
        page.locator("#drafting").get_by_role("button", name="Stop").click()
        expect(page.locator(".reading .line")).to_contain_text("incomplete")
    finally:
        server.parrot.report = REPORT
    assert b"Incomplete" in saved(page, "Text")


def test_reloading_restores_the_page(visit, server, scan) -> None:
    page = visit()
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#loader input[type=file]").set_input_files(scan(13))
    page.wait_for_selector(".workstation[data-state=open]")
    page.get_by_label("Your question").fill("Which organ?")
    page.keyboard.press("Enter")
    expect(page.locator(".answered.done")).to_have_count(1)
    page.get_by_role("tab", name="Report").click()
    page.locator("#report textarea").type("Typed by hand.")
    expect(page.locator(".reading .save").first).to_be_visible()
    token = page.locator("#ticket textarea, #ticket input").input_value()
    session = server.workstation.sessions.by_token(token)
    wait_for(lambda: session.report == "Typed by hand.")
    assert page.evaluate("sessionStorage.length") == 0
    page.reload()
    page.wait_for_selector(".workstation[data-state=open]")
    assert "/ 13" in count(page)
    expect(page.locator(".answered.done")).to_contain_text("13 slices.")
    page.get_by_role("tab", name="Report").click()
    expect(page.locator("#report textarea")).to_have_value("Typed by hand.")
    assert b"Typed by hand." in saved(page, "Text")
    assert server.workstation.sessions.by_token(token) is session and session.left is None
    assert page.evaluate("sessionStorage.length") == 0
    page.goto("about:blank")
    wait_for(lambda: session.left is not None)
    assert session.scan is not None


def test_saliency_overlay_and_similar_cases(visit, scan) -> None:
    page = visit()
    opened(page, scan())
    ask(page, "Which organ?")
    with changes(lambda: grey(page)):
        page.get_by_role("button", name="Where did it look?").click()
    expect(page.locator(".overlay .label")).to_have_text("What moved the answer to “Which organ?”")
    page.get_by_role("button", name="Hide").click()
    expect(page.locator(".overlay")).to_be_hidden()
    page.get_by_label("A finding to look for").fill("An effusion")
    with changes(lambda: grey(page)):
        page.get_by_label("A finding to look for").press("Enter")
    expect(page.locator(".overlay .label")).to_have_text("Where the scan resembles “An effusion”")
    with changes(lambda: grey(page)):
        page.get_by_label("Overlay opacity").fill("0")
    page.get_by_label("A finding to look for").fill("nothing")
    page.get_by_label("A finding to look for").press("Enter")
    expect(page.locator("#status .bar.error")).to_have_text("The phrase says nothing.")
    page.get_by_role("tab", name="Similar cases").click()
    page.get_by_role("button", name="Find similar cases").click()
    expect(page.locator(".cases article")).to_have_count(2)
    expect(page.locator(".cases")).to_contain_text("<b>Clear</b> lungs.")


def test_two_people_see_their_own_scan(visit, scan) -> None:
    one, two = visit(), visit()
    opened(one, scan(10))
    opened(two, scan(12))
    ask(one, "slowly mine?")
    ask(two, "Mine?")  # while the other's answer is written
    expect(two.locator(".answered").last).to_contain_text("12 slices. <b>Mine?</b>")
    expect(one.locator(".answered.writing")).to_contain_text("10 slices.")
    assert "/ 12" in count(two) and "/ 10" in count(one)
    one.get_by_role("button", name="Stop").first.click()


def test_everything_works_by_keyboard(visit) -> None:
    page = visit()
    page.get_by_role("button", name="Chest phantom").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".workstation[data-state=open]")
    page.locator("[data-plane=axial]").focus()
    page.wait_for_function("document.querySelector('[data-plane=axial]').getAttribute('aria-valuetext')")
    with changes(lambda: count(page)):
        page.keyboard.press("ArrowDown")
    with changes(lambda: grey(page)):
        page.keyboard.press("2")
    assert page.get_by_label("Window width").input_value() == "1500"
    for key in ("+", "r", "c"):
        with changes(lambda: grey(page)):
            page.keyboard.press(key)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.plane") == "coronal"
    page.get_by_label("Your question").focus()
    page.keyboard.type("Typed?")
    page.keyboard.press("Enter")
    expect(page.locator(".answered").last).to_contain_text("<b>Typed?</b>")
    hint = page.locator(".hint").first
    hint.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(2)


@pytest.mark.parametrize(("width", "height", "scheme"), [(1600, 1000, "light"), (1280, 800, "dark"), (820, 1180, "dark")])
def test_nothing_is_cut_off_at_any_size(visit, width, height, scheme) -> None:
    page = visit(width, height, scheme)
    page.get_by_role("button", name="Abdomen phantom").click()
    page.wait_for_selector(".workstation[data-state=open]")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    boxes = [page.locator(part).bounding_box() for part in ("#left", "#right", ".masthead", ".stage", "#question")]
    assert all(box and box["x"] >= 0 and box["x"] + box["width"] <= width + 1 for box in boxes)
    left, right = boxes[:2]
    assert right["y"] >= left["y"] + left["height"] if width < 1000 else right["x"] >= left["x"] + left["width"]
    assert boxes[3]["width"] > 0.5 * min(width, 1000)
    shades = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).slice(0, 3).map(Number)")
    assert (max(shades) < 80) == (scheme == "dark")
