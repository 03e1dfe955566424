"""Sessions without a page: when questions are accepted, what is kept, and how a new scan or a closed page ends an answer."""

import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from med3dvlm.app.key_images import key_image
from med3dvlm.app.scans import example
from med3dvlm.app.session import BUSY, NO_SCAN, Session
from med3dvlm.app.sessions import FULL, Sessions
from med3dvlm.app.turns import BROKEN, Turn, history
from med3dvlm.app.workstation import Workstation
from med3dvlm.volume import VolumeError

from .conftest import Parrot


def told(session: Session, parrot: Parrot, question: str) -> Turn:
    session.ask(question)
    turn = session.claim()
    for _ in session.answer(parrot, turn):
        pass
    return turn


@pytest.fixture
def session() -> Session:
    session = Session()
    session.open(example("Chest phantom"))
    return session


def test_asking_again_replaces_the_last_question_and_its_answer(session) -> None:
    parrot = Parrot()
    told(session, parrot, "First?")
    told(session, parrot, "Second?")
    for words in (None, "Changed?"):
        session.ask_again(words)
        list(session.answer(parrot, session.claim()))
        assert [message["content"] for message in parrot.histories[-1]][::2] == ["First?"]
    assert [turn.question for turn in session.turns] == ["First?", "Changed?"]
    with pytest.raises(ValueError, match="type a question"):
        session.ask_again("  ")
    assert [turn.question for turn in session.turns] == ["First?", "Changed?"]  # nothing lost
    assert parrot.encoded == [len(session.scan.volume.array)]  # once for all answers


def test_one_answer_is_written_at_a_time(session) -> None:
    session.ask("First?")
    with pytest.raises(ValueError, match=BUSY):
        session.ask("Second?")
    with pytest.raises(ValueError, match=BUSY):
        session.ask_again()
    assert session.claim() is session.turns[0] and session.claim() is None


def test_a_question_stopped_while_it_waits_is_never_written(session) -> None:
    session.ask("First?")
    session.stop()
    assert session.turns[0].state == "stopped" and session.claim() is None
    session.ask("Second?")
    assert history(session.turns) == []


def test_a_new_scan_ends_the_answer_about_the_old_one(session) -> None:
    parrot = Parrot()
    session.ask("slowly")
    turn = session.claim()
    writing = session.answer(parrot, turn)
    while not turn.answer:
        next(writing)
    number = session.number
    session.open(example("Abdomen phantom"))
    list(writing)
    assert turn.state == "stopped" and parrot.running == 0
    assert session.turns == [] and session.features is None and session.number > number
    session.close()
    with pytest.raises(ValueError, match=NO_SCAN.split(":")[0]):
        session.ask("Anything?")


def test_an_error_of_the_model_is_shown_but_not_logged(session, caplog) -> None:
    def fail(*_: object, **__: object) -> Iterator[str]:
        yield "The"
        raise RuntimeError("no place for Doe^Jane")

    session.ask("First?")
    turn = session.claim()
    list(session.answer(SimpleNamespace(encode=id, stream=fail), turn))
    assert turn.state == "failed" and turn.answer == BROKEN
    assert f"RuntimeError in {__file__}" in caplog.text and "Doe" not in caplog.text
    session.ask("Second?")


def test_results_of_an_old_scan_are_not_used_for_the_new_one(session) -> None:
    old, draft = session.scan, Turn("Report.")
    session.draft = draft
    assert session.set_draft(draft, "About the old one.") and session.report == "About the old one."

    def encode(volume: object) -> str:
        session.open(example("Abdomen phantom"))  # while the encoder is at work
        return "features of the old one"

    session.encoded(SimpleNamespace(encode=encode))
    assert session.features is None and session.report == ""
    assert not session.set_draft(draft, "More about the old one.") and session.report == ""
    session.set_overlay(old, "heat")
    assert session.overlay is None


def test_a_report_counts_as_changed_only_when_a_person_edits_it(session) -> None:
    """The page reports every change of the text, including those by the draft itself, some of them late."""
    workstation = Workstation(Parrot())
    for _ in workstation.draft_report(session):
        if session.draft.open:
            workstation.edit_report(session, session.report[:5])
    words = session.report
    assert len(words) > 20 and not session.edited
    for late in (words[:7], words):
        workstation.edit_report(session, late)
    assert session.report == words and not session.edited
    workstation.edit_report(session, words + " Changed.")
    assert session.edited and session.author == "model, changed by hand"
    with pytest.raises(ValueError, match="changed by hand"):
        list(workstation.draft_report(session))
    assert session.report == words + " Changed."
    list(workstation.draft_report(session))
    assert session.report == words and not session.edited
    workstation.edit_report(session, "By hand.")
    workstation.chat = SimpleNamespace(encode=id)  # whose draft fails
    with pytest.raises(ValueError, match="changed by hand"):
        list(workstation.draft_report(session))
    list(workstation.draft_report(session))
    assert session.report == "By hand." and session.edited


def test_a_saved_report_names_its_scan_and_its_author(session) -> None:
    workstation = Workstation(Parrot(), "demo/parrot")
    saved = json.loads(workstation.save_report(session, "json", "Typed by hand."))
    assert saved["author"] == "hand" and "Draft" not in saved["notice"] and "model" not in saved["origin"]
    assert saved["origin"]["sha256"] == hashlib.sha256(session.scan.volume.array.tobytes()).hexdigest()
    session.report = ""
    list(workstation.draft_report(session))
    words = session.report
    saved = json.loads(workstation.save_report(session, "json", words))
    assert saved["author"] == "model" and saved["origin"]["model"] == "demo/parrot"
    assert any("confidence" in note for note in saved["notes"])
    saved = workstation.save_report(session, "txt", words + " And more.").decode()
    assert saved.startswith("Draft written by a model and changed by hand.") and "confidence" not in saved


def test_key_images_are_the_slices_that_the_viewer_shows(session) -> None:
    workstation, scan = Workstation(Parrot()), session.scan
    with pytest.raises(ValueError, match="no plane 'oblique'"):
        workstation.add_key_image(session, "oblique", 0, (0, 1))
    with pytest.raises(ValueError, match="no slice 9999"):
        workstation.add_key_image(session, "axial", 9998, (0, 1))
    with pytest.raises(ValueError, match="window"):
        workstation.add_key_image(session, "axial", 0, (1, 1))
    for number, plane in enumerate(("axial", "coronal", "sagittal")):
        image = workstation.add_key_image(session, plane, 3, (-160, 240))
        shown = np.asarray(Image.open(io.BytesIO(image.png)), dtype=float)
        stored = np.take(scan.picture.stored, 3, number).astype(float)
        expected = 255 * np.clip((stored + 160) / 400, 0, 1)
        rows, columns = (np.linspace(0, stored.shape[i] - 1, shown.shape[i]).round().astype(int) for i in range(2))
        assert abs(np.median(shown - expected[np.ix_(rows, columns)])) <= 1
        height, width = np.delete(np.multiply(scan.picture.stored.shape, scan.picture.facts["spacing"]), number)  # mm
        assert shown.shape[0] / shown.shape[1] == pytest.approx(height / width, rel=0.02)
        assert (image.place is None) == (plane != "axial")
    place = session.key_images[1].place
    np.testing.assert_array_equal(scan.picture.stored[3], scan.volume.array[place])  # an axial phantom, rows and columns as on a screen
    with zipfile.ZipFile(io.BytesIO(workstation.save_report(session, "zip", "A nodule."))) as archive:
        assert archive.read("key_image_3.png") == image.png and "sagittal, slice 4 of" in archive.read("report.txt").decode()
    uneven = replace(scan, as_filed=False)  # resampled between the slices of the files
    assert key_image(uneven, "axial", 3, (0, 1)).place is None and key_image(scan, "axial", 3, (0, 1)).place == place
    workstation.remove_key_image(session, 2)
    assert [label.partition(",")[0] for label, _, _ in workstation.report_data(session)["pictures"]] == ["axial", "sagittal"]
    for _ in range(18):
        workstation.add_key_image(session, "axial", 0, (0, 1))
    with pytest.raises(ValueError, match="at most 20"):
        workstation.add_key_image(session, "axial", 0, (0, 1))
    session.open(example("Abdomen phantom"))
    assert session.key_images == {}


def test_a_scan_without_room_beside_the_open_ones_is_refused(scan, tmp_path) -> None:
    def sent(slices: int) -> list[str]:
        return [str(shutil.copy(scan(slices), tmp_path / f"{slices}.nii.gz"))]

    workstation = Workstation(Parrot())
    one, two = workstation.sessions.get("one"), workstation.sessions.get("two")
    scans = [workstation.open_uploads(one, sent(10)), workstation.open_uploads(two, sent(9))]
    workstation.room = sum(scan.nbytes for scan in scans)
    with pytest.raises(VolumeError, match="close another page, or crop the scan"):
        workstation.open_uploads(two, sent(11))
    assert two.scan is scans[1]
    workstation.open_uploads(two, sent(8))  # in place of its own
    workstation.open_uploads(one, sent(11))


def test_above_the_limit_the_longest_idle_session_closes() -> None:
    sessions = Sessions(most=2)
    one, two = sessions.get("one"), sessions.get("two")
    one.open(example("Chest phantom"))
    two.open(example("Chest phantom"))
    assert sessions.get("one") is one
    three = sessions.get("three")
    assert two.scan is None and one.scan is not None and len(sessions) == 2
    assert sessions.by_token(one.token) is one and sessions.by_token(two.token) is None
    sessions.close("one")
    assert one.scan is None and sessions.get("three") is three


def test_programs_do_not_close_sessions_in_use() -> None:
    sessions = Sessions(most=3)
    page = sessions.connect("page")
    page.open(example("Chest phantom"))
    with sessions.connection("connected"):
        connected = sessions.get("connected")
        connected.open(example("Chest phantom"))
        for number in range(70):
            sessions.get(f"call {number}")
        assert page.scan is not None and connected.scan is not None and len(sessions) == 3
        asked = sessions.get("call 69")
        asked.open(example("Chest phantom"))
        asked.ask("Which?")
        with pytest.raises(ValueError, match=re.escape(FULL)):
            sessions.get("one more")  # an answer is being written there
        asked.stop()
        sessions.get("one more")
        assert asked.scan is None
        sessions.connect("second page")
        sessions.connect("third page")  # takes a program's place
        assert connected.scan is None and page.scan is not None
    with pytest.raises(ValueError, match=re.escape(FULL)):
        sessions.connect("fourth page")
    sessions.disconnect("page")
    sessions.connect("fourth page")  # takes the place of one that is gone
    assert page.scan is None


def test_a_reloaded_page_continues_its_session(monkeypatch) -> None:
    sessions, parrot = Sessions(), Parrot()
    page = sessions.connect("before", "", "anna")
    page.open(example("Chest phantom"))
    page.report = "Typed by hand."
    page.ask("slowly")
    writing = page.answer(parrot, page.claim())
    while not page.turns[0].answer:
        next(writing)
    sessions.disconnect("before")
    assert [turn.state for turn in page.turns] == ["stopped"]
    writing.close()
    assert [turn.state for turn in page.turns] == ["stopped"] and page.turns[0].answer
    for token, owner in (("", "anna"), ("wrong", "anna"), (page.token, "ben"), (page.token, None)):
        other = sessions.connect("another", token, owner)
        assert other is not page and other.scan is None
        sessions.close("another")
    sessions.get("after")  # what the page asked for before it said who it is
    assert sessions.connect("after", page.token, "anna") is page and sessions.get("after") is page and len(sessions) == 1
    assert page.scan is not None and page.report == "Typed by hand." and page.left is None
    sessions.disconnect("after")  # cut off
    assert sessions.get("after") is page and page.left is None


def test_sessions_with_an_unsaved_report_are_kept_longer(monkeypatch) -> None:
    planned = []
    monkeypatch.setattr(
        "med3dvlm.app.sessions.threading.Timer", lambda seconds, act, given: planned.append((seconds, lambda: act(*given))) or Mock()
    )
    sessions = Sessions()
    for name, report, saved, seconds in (
        ("none", "", "", 600),
        ("unsaved", "Mine.", "", 4 * 3600),
        ("saved", "Mine.", "Mine.", 600),
    ):
        page = sessions.connect(name)
        page.open(example("Chest phantom"))
        page.report, page.saved = report, saved
        sessions.disconnect(name)
        assert planned[-1][0] == seconds
    sessions.get("saved")  # came back
    for _, act in planned:
        act()
    assert len(sessions) == 1 and sessions.get("saved").scan is not None

    sessions.disconnect("saved")
    back = sessions.connect("unsaved")
    back.report = "Mine."
    sessions.disconnect("unsaved")
    assert sessions.close_gone() and not sessions.close_gone() and sessions.get("unsaved") is back  # memory is needed


def test_text_typed_while_a_draft_is_written_stays(session) -> None:
    workstation = Workstation(Parrot())
    writing = workstation.draft_report(session, "")
    for _ in range(3):
        next(writing)
    workstation.edit_report(session, "A nodule that I see.")
    assert list(writing) == [] and session.report == "A nodule that I see." and session.author == "model, changed by hand"
    session.open(example("Abdomen phantom"))
    with pytest.raises(ValueError, match="changed by hand and not saved"):
        list(workstation.draft_report(session, "Typed just now."))
    assert session.report == "Typed just now."
    workstation.save_report(session, "txt", "Typed just now.")
    for _ in workstation.draft_report(session, "Typed just now."):  # saved, so nothing is lost
        if session.draft.open:
            workstation.edit_report(session, "Typed just now.")  # comes late
    assert session.author == "model"
