"""The workstation driven by programs over localhost: the example that med3dvlm/app/api.py gives, wrong input, several sessions at once."""

import gc
import json
import re
import socket
import urllib.error
import urllib.request
import weakref
from pathlib import Path

import nibabel
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from med3dvlm.app import api
from med3dvlm.app.scans import sweep
from med3dvlm.app.session import BUSY, NO_ANSWER, NO_QUESTION, NO_SCAN
from med3dvlm.prompts import RESEARCH_NOTICE

from .browsing import wait_for
from .conftest import files_with_content
from .test_scans import two_series

APP = Path(__file__).parents[2] / "app"


def read(session: Client, *paths: Path) -> dict:
    return session.predict([handle_file(path) for path in paths], api_name="/open")


def asked(session: Client, question: str) -> dict:
    return session.predict(question, api_name="/ask")


def test_the_example_runs(server, scan, monkeypatch) -> None:
    example = re.search(r"\n((?:    .*\n)+)", api.__doc__)[1].replace("\n    ", "\n").strip()
    example = example.replace("http://127.0.0.1:7860", server.address).replace("scan.nii.gz", str(scan()))
    lines = [line.partition("  #")[0].replace("...", "print(state)") for line in example.splitlines()]
    assert len(lines) == 6
    exec("\n".join(lines), {})
    assert [len(history) for history in server.parrot.histories[-3:]] == [0, 2, 0]


def test_a_scan_is_described_without_its_name_and_not_kept(server, client, scan) -> None:
    answer = read(client(), scan())
    for fact in ("NIfTI", "10 × 20 × 30", "2.5 × 1 × 1 mm", "SAR, axial slices", "Hounsfield units"):
        assert fact in str(answer["facts"])
    assert "Doe" not in str(answer) and str(server.uploads) not in str(answer)
    assert files_with_content(server.uploads) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("<img src=x>notes.txt", "no scan that can be opened here; open one file (.nii, .nii.gz"),
        ("text.nii.gz", "cannot be read"),
        ("empty.nii.gz", "empty"),
        ("cut.nii.gz", "cannot be read"),
        ("flat.nii", "2D image"),
        ("header.MHD", "save the scan as one .mha"),
        ("escape.zip", "outside"),
    ],
)
def test_a_wrong_file_is_refused_and_the_open_scan_stays(server, client, scan, tmp_path, name, words) -> None:
    session, wrong = client(), tmp_path / name
    read(session, scan())
    wrong.write_bytes({"empty": b"", "cut.": scan().read_bytes()[:900]}.get(name[:4].strip("."), b"not a scan"))
    if name == "empty.nii.gz":
        wrong.write_bytes(b"")
    if name == "flat.nii":
        nibabel.save(nibabel.Nifti1Image(np.zeros((20, 30), np.int16), np.eye(4)), wrong)
    if name == "escape.zip":
        import zipfile

        with zipfile.ZipFile(wrong, "w") as archive:
            archive.writestr("../escape.nii.gz", scan().read_bytes())
    with pytest.raises(AppError) as told:
        read(session, wrong)
    sentence = str(told.value)
    assert words in sentence and sentence.rstrip().endswith((".", "…")) and "Traceback" not in sentence
    assert "notes" not in sentence and str(server.uploads) not in sentence
    assert files_with_content(server.uploads) == []
    assert "10 slices." in asked(session, "still there?")["answer"]


def test_another_series_of_a_study_is_opened_by_its_number(server, client, tmp_path) -> None:
    session, (files, _) = client(), two_series(tmp_path)
    opened = read(session, *files)
    assert [(number, is_open) for number, _, is_open in opened["series"]] == [(1, True), (2, False)]
    switched = session.predict(2, api_name="/series")
    assert [is_open for *_, is_open in switched["series"]] == [False, True] and switched["facts"]["Size"] != opened["facts"]["Size"]
    for number, words in ((7, "no series 7"), (1.5, "of a wrong type"), (None, "of a wrong type")):
        with pytest.raises(AppError, match=words):
            session.predict(number, api_name="/series")
    session.close()
    wait_for(lambda: gc.collect() and files_with_content(server.uploads) == [])


def test_an_upload_over_the_limit_is_refused(server, client, tmp_path) -> None:
    files = [tmp_path / f"Doe{number}.dcm" for number in (1, 2)]
    for number, path in enumerate(files):
        path.write_bytes(np.random.default_rng(number).bytes(700_000))
    with pytest.raises(AppError, match=re.escape("The upload has 1.3 MiB but at most 1 MiB are taken")):
        read(client(), *files)
    with pytest.raises(AppError, match="holds no DICOM|cannot be read|not DICOM|not a DICOM"):
        read(client(), files[0])
    assert files_with_content(server.uploads) == []


def test_an_upload_cannot_name_another_file_of_the_machine(client, tmp_path) -> None:
    private, wrong = tmp_path / "private.raw", tmp_path / "scan.mha"
    private.write_bytes(np.arange(6000, dtype=np.int16).tobytes())
    header = "ObjectType = Image\nNDims = 3\nDimSize = 30 20 10\nElementType = MET_SHORT\n"
    wrong.write_text(f"{header}ElementDataFile = {private}\n")
    with pytest.raises(AppError, match="names another place for the voxels"):
        read(client(), wrong)


def test_nothing_is_fetched_from_an_address(client) -> None:
    far = {"path": "http://127.0.0.1:9/scan.nii.gz", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AppError, match="fetches nothing from an address"):
        client().predict([far], api_name="/open")


def test_queue_and_session_cannot_be_bypassed(server) -> None:
    for name, body in (("example", {"data": ["Chest phantom"]}), ("stop", {"data": []})):
        request = urllib.request.Request(
            f"{server.address}gradio_api/run/{name}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=10)
    assert server.workstation.sessions.get("").scan is None


def test_one_file_uploaded_by_two_sessions_and_twice_in_one_request(server, client, scan) -> None:
    path = scan(11)
    jobs = [session.submit(handle_file(path), "Which?", api_name="/answer") for session in (client(), client(), client())]
    assert all("11 slices." in job.result(timeout=60)["answer"] for job in jobs)
    sweep(server.uploads, 0)
    assert files_with_content(server.uploads) == []
    assert "11 × 20 × 30" in str(read(client(), path, path)["facts"])
    assert files_with_content(server.uploads) == []


def test_an_answer_streams_and_is_remembered(server, client, scan) -> None:
    session = client()
    read(session, scan())
    job = session.submit("First?", api_name="/ask")
    first = job.result()
    lengths = [len(part["answer"]) for part in job.outputs()]
    assert len(lengths) >= 4 and lengths == sorted(lengths)
    assert first["answer"].strip() == "10 slices. <b>First?</b> ${1 + 1} & 0"  # as it was said; the page shows it as text
    assert (first["state"], first["seconds"], first["confidence"], first["low"]) == ("done", 1.5, 0.9, False)

    second = session.predict("doubtful?", 0.7, 0.9, api_name="/sample")
    assert second["low"] and server.parrot.sampling[-1] == {"temperature": 0.7, "top_p": 0.9}
    assert server.parrot.histories[-1] == [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": first["answer"]},
    ]
    for question, sentence in (("too small", "The volume is too small for the encoder."), ("silence", NO_ANSWER)):
        failed = asked(session, question)
        assert (failed["state"], failed["answer"]) == ("failed", sentence)
    asked(session, "After failures?")
    assert len(server.parrot.histories[-1]) == 4  # what failed was not said
    session.predict(api_name="/clear")
    asked(session, "Third?")
    assert server.parrot.histories[-1] == []
    read(session, scan(12))
    asked(session, "Fourth?")
    assert server.parrot.histories[-1] == []  # a new scan starts a new conversation


def test_missing_and_too_long_inputs_are_refused(client, scan) -> None:
    session = client()
    with pytest.raises(AppError, match=re.escape(NO_SCAN)):
        asked(session, "Anything?")
    read(session, scan())
    with pytest.raises(AppError, match=re.escape(NO_QUESTION)):
        asked(session, "  ")
    with pytest.raises(AppError, match="has 49999 characters but at most 4000"):
        asked(session, "word " * 10_000)
    with pytest.raises(AppError, match="There is no example"):
        session.predict("Nothing", api_name="/example")


def test_stop_ends_an_answer_and_a_second_question_waits_its_turn(server, client, scan) -> None:
    session = client()
    read(session, scan())
    job = session.submit("slowly", api_name="/ask")
    wait_for(lambda: server.parrot.running)
    with pytest.raises(AppError, match=re.escape(BUSY)):
        asked(session, "Meanwhile?")
    session.predict(api_name="/stop")
    stopped = job.result(timeout=60)
    assert stopped["state"] == "stopped" and stopped["answer"].count("word") < 10_000
    assert server.parrot.running == 0
    assert asked(session, "Next?")["state"] == "done"


def test_a_scan_out_of_distribution_is_reported(client, scan) -> None:
    session = client()
    assert session.predict(api_name="/notice") == ""  # no scan
    read(session, scan(12))
    assert session.predict(api_name="/notice") == "Unlike <anything> seen in training."
    read(session, scan())
    assert session.predict(api_name="/notice") == ""
    assert asked(session, "Familiar?")["unlike"] is False
    read(session, scan(12))
    unlike = asked(session, "Unlike?")
    assert unlike["unlike"] and unlike["confidence"] == 0.9 and not unlike["low"]
    answer = session.predict(handle_file(scan(12)), "Whole?", api_name="/answer")
    assert "12 slices." in answer["answer"] and answer["outside_training_data"] and answer["notice"] == RESEARCH_NOTICE
    assert "nodule" in session.predict(handle_file(scan(12)), api_name="/report")["answer"]


def test_sessions_see_their_own_scan_also_when_two_upload_the_same_file(server, client, scan) -> None:
    one, two = client(), client()
    read(one, scan(10))
    with pytest.raises(AppError, match=re.escape(NO_SCAN)):
        asked(two, "Mine?")
    read(two, scan(12))
    assert "12 slices." in asked(two, "Mine?")["answer"]
    assert "10 slices." in asked(one, "Mine?")["answer"]

    same, sessions = scan(14), [client() for _ in range(3)]
    jobs = [session.submit([handle_file(same)], api_name="/open") for session in sessions]
    assert all("14 × 20 × 30" in str(job.result()) for job in jobs)
    assert all("14 slices." in asked(session, "Mine?")["answer"] for session in sessions)


def test_a_closed_session_frees_its_memory_and_stops_its_answer(server, client, scan) -> None:
    session = client()
    read(session, scan())
    workstation = server.workstation.sessions.get(session.session_hash)
    volume = weakref.ref(workstation.scan.volume)
    session.submit("slowly", api_name="/ask")
    wait_for(lambda: server.parrot.running)
    session.close()
    wait_for(lambda: server.workstation.sessions.by_token(workstation.token) is None and not server.parrot.running)
    wait_for(lambda: gc.collect() and volume() is None)


def test_the_browsers_bytes_need_the_sessions_own_secret(server, client, scan) -> None:
    session = client()
    read(session, scan())
    name = session.session_hash
    workstation = server.workstation.sessions.get(name)
    url = f"{server.address}workstation/{workstation.token}/scan/{workstation.number}"
    with urllib.request.urlopen(url) as answer:
        stored = np.frombuffer(answer.read(), "<i2").reshape(10, 20, 30)
        assert answer.headers["Cache-Control"] == "no-store"
    np.testing.assert_array_equal(stored, workstation.scan.picture.stored)
    read(session, scan(12))
    for wrong in (url, url.replace(workstation.token, "A" * 32), url.replace(workstation.token, "%C3%A9"), url.replace("scan", "report")):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(wrong)


def test_the_server_is_local_and_the_page_fetches_nothing_from_elsewhere(server) -> None:
    socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
    with pytest.raises(OSError):  # an address of this machine that a server on 0.0.0.0 would answer, too
        socket.create_connection(("127.0.0.2", server.port), timeout=5)
    page = urllib.request.urlopen(server.address).read().decode()
    style = urllib.request.urlopen(server.address + "theme.css").read().decode()
    assert RESEARCH_NOTICE in page
    assert not re.findall(r"(?:src|href)=[\"'](?:https?:)?//", page)
    assert not re.findall(r"(?:url\(|@import)[\s\"']*(?:https?:)?//", style)
    assert '"stylesheets":[]' in page.replace(" ", "") and '"analytics_enabled":false' in page.replace(" ", "")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{server.address}gradio_api/file={APP / 'chat.py'}")
