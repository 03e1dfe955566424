"""The chat page driven through its API over localhost, with a model that only repeats what it was given."""

import base64
import html
import io
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "app"))

import chat as app

from med3dvlm.volume import Volume

APP = Path(app.__file__).parent


class Parrot:
    """Answers with what it was asked, about which scan and after how many words; knows only scans of 10 slices."""

    def __init__(self) -> None:
        self.histories: list[list[dict[str, str]]] = []

    def familiarity(self, volume: Volume) -> SimpleNamespace:
        return SimpleNamespace(message=None if len(volume.array) == 10 else "Unlike <anything> seen in training.")

    def stream(self, volume: Volume, question: str, history: list[dict[str, str]]) -> Iterator[str]:
        self.histories.append(history)
        if question == "too small":
            raise ValueError("The volume is too small for the encoder.")
        if question == "silence":
            return
        for word in f"{volume.array.shape[0]} slices. <b>{question}</b> & {len(history)}".split(" "):
            time.sleep(0.02)
            yield word + " "


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    uploads, parrot = tmp_path_factory.mktemp("uploads"), Parrot()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        blocks = app.build(parrot)
        address = app.launch(blocks)
        yield SimpleNamespace(address=address, uploads=uploads, parrot=parrot, port=blocks.server_port)
        blocks.close(verbose=False)


@pytest.fixture
def client(server: SimpleNamespace) -> Callable[[], Client]:
    return lambda: Client(server.address, verbose=False, analytics_enabled=False, download_files=False)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def write(slices: int = 10, name: str = "scan.nii.gz") -> Path:
        array = np.random.default_rng(slices).integers(-1000, 1000, (30, 20, slices)).astype(np.int16)
        path = tmp_path_factory.mktemp("scans") / name
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.5, 1.0])), path)
        return path

    return write


def read(session: Client, path: Path) -> dict[str, Any]:
    names = ["status", "facts", "axial", "coronal", "sagittal", *(f"{plane} slider" for plane in app.PLANES), "windows"]
    answer = dict(zip(names, session.predict(handle_file(path), api_name="/read"), strict=False))
    answer["status"] = html.unescape(answer["status"]["value"])
    return answer


def size_and_mean(figure: str) -> tuple[tuple[int, int], float]:
    data = re.search(r"data:image/png;base64,([^\"]+)", figure)
    picture = Image.open(io.BytesIO(base64.b64decode(data[1])))
    return picture.size, float(np.asarray(picture).mean())


def conversation(answer: tuple[Any, ...]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"][0]["text"]) for message in answer[1]]


def files_with_content(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_scan_is_described_shown_and_not_kept(server, client, scan) -> None:
    session = client()
    answer = read(session, scan())
    facts = html.unescape(answer["facts"])
    for fact in ("scan.nii.gz", "10 × 20 × 30", "2.5 × 1 × 1 mm", "SAR, axial slices", "Hounsfield units"):
        assert fact in facts
    assert str(server.uploads) not in str(answer)
    assert size_and_mean(answer["axial"])[0] == (30, 20)  # width, height
    assert size_and_mean(answer["coronal"])[0] == (30, 25)
    assert size_and_mean(answer["sagittal"])[0] == (20, 25)
    assert all(f">{side}</i>" in answer["axial"] for side in "APRL")
    assert (answer["axial slider"]["maximum"], answer["axial slider"]["value"]) == (10, 5)
    assert answer["windows"]["visible"]
    assert files_with_content(server.uploads) == []

    figure = session.predict("Soft tissue", 10, api_name="/axial")
    assert "10/10" in figure and figure != answer["axial"]
    bone = session.predict("Bone", 5, 10, 15, api_name="/window")[0]
    assert size_and_mean(bone)[1] != size_and_mean(answer["axial"])[1]


@pytest.mark.parametrize("name", ["<img src=x>notes.txt", "text.nii.gz", "empty.nii.gz", "cut.nii.gz", "flat.nii", "header.MHD"])
def test_a_wrong_file_gets_a_sentence_and_the_open_scan_stays(server, client, scan, tmp_path, name) -> None:
    session, wrong = client(), tmp_path / name
    read(session, scan())
    wrong.write_bytes({"empty": b"", "cut.": scan().read_bytes()[:900]}.get(name[:4].strip(), b"not a scan"))
    if name == "flat.nii":
        nibabel.save(nibabel.Nifti1Image(np.zeros((20, 30), np.int16), np.eye(4)), wrong)

    answer = session.predict(handle_file(wrong), api_name="/read")

    raw = answer[0]["value"]
    assert name != "header.MHD" or "save the scan as one .mha file" in html.unescape(raw)
    sentence = re.sub("<[^>]+>", "", raw)
    assert 'class="bar error"' in raw and "<img" not in raw
    assert html.unescape(sentence).count(".") >= 1 and "Traceback" not in sentence
    assert str(server.uploads) not in html.unescape(raw)
    assert files_with_content(server.uploads) == []
    assert "10 slices." in conversation(session.predict("still there?", api_name="/ask"))[-1][1]


def test_an_upload_cannot_name_another_file_of_the_machine(server, client, tmp_path) -> None:
    private, wrong = tmp_path / "private.raw", tmp_path / "scan.mha"
    private.write_bytes(np.arange(6000, dtype=np.int16).tobytes())
    header = "ObjectType = Image\nNDims = 3\nDimSize = 30 20 10\nElementType = MET_SHORT\n"
    wrong.write_text(f"{header}ElementDataFile = {private}\n")
    answer = client().predict(handle_file(wrong), api_name="/read")
    assert "names another place for the voxels" in html.unescape(answer[0]["value"]) and "data:image" not in str(answer)


def test_an_answer_streams_is_escaped_and_remembered(server, client, scan) -> None:
    session = client()
    read(session, scan())
    job = session.submit("First?", api_name="/ask")
    job.result()
    lengths = [len(conversation(part)[-1][1]) for part in job.outputs()[1:]]  # the first holds the question alone
    assert len(lengths) >= 4 and lengths == sorted(lengths)

    answer = session.predict("Second?", api_name="/ask")
    assert answer[0] == ""  # the field is free for the next question
    assert conversation(answer) == [
        ("user", "First?"),
        ("assistant", "10 slices. &lt;b&gt;First?&lt;/b&gt; &amp; 0 "),
        ("user", "Second?"),
        ("assistant", "10 slices. &lt;b&gt;Second?&lt;/b&gt; &amp; 2 "),
    ]
    first = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "10 slices. <b>First?</b> & 0 "},
    ]
    assert server.parrot.histories[-1] == first  # the model reads what it wrote, not what the page escaped

    for question, sentence in (("too small", "The volume is too small for the encoder."), ("silence", app.NO_ANSWER)):
        answer = session.predict(question, api_name="/ask")
        assert answer[0] == question and conversation(answer)[-1] == ("assistant", sentence)
    session.predict(api_name="/clear")
    session.predict("Third?", api_name="/ask")
    assert server.parrot.histories[-1] == []

    session.predict("Fourth?", api_name="/ask")
    read(session, scan(12))
    session.predict("Fifth?", api_name="/ask")
    assert server.parrot.histories[-1] == []  # a new scan starts a new conversation


def test_no_scan_or_no_question_gets_a_sentence(client, scan) -> None:
    session = client()
    answer = session.predict("Anything?", api_name="/ask")
    assert answer[0] == "Anything?" and conversation(answer) == [("assistant", app.NO_SCAN)]
    read(session, scan())
    assert conversation(session.predict("  ", api_name="/ask")) == [("assistant", app.NO_QUESTION)]


def test_an_unfamiliar_scan_is_said_to_be_one(client, scan) -> None:
    session = client()
    assert not session.predict(api_name="/familiarity")["visible"]  # no scan
    read(session, scan(12))
    notice = session.predict(api_name="/familiarity")
    assert notice["visible"] and "Unlike &#60;anything&#62; seen in training" in notice["value"]
    read(session, scan())
    assert not session.predict(api_name="/familiarity")["visible"]


def test_sessions_see_their_own_scan_also_when_two_upload_the_same_file(client, scan) -> None:
    one, two = client(), client()
    read(one, scan(10))
    assert conversation(two.predict("Mine?", api_name="/ask")) == [("assistant", app.NO_SCAN)]
    assert "data:image" not in two.predict("Bone", 1, api_name="/axial")
    read(two, scan(12))
    assert "12 slices." in conversation(two.predict("Mine?", api_name="/ask"))[-1][1]
    assert "10 slices." in conversation(one.predict("Mine?", api_name="/ask"))[-1][1]

    same, sessions = scan(14), [client(), client()]
    uploads = [session.submit(handle_file(same), api_name="/read") for session in sessions]
    assert all("data:image" in upload.result()[2] for upload in uploads)
    assert all("14 slices." in str(session.predict("Mine?", api_name="/ask")) for session in sessions)


def test_the_server_is_local_and_the_page_fetches_nothing_from_elsewhere(server) -> None:
    socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
    with pytest.raises(OSError):  # an address of this machine that a server on 0.0.0.0 would answer, too
        socket.create_connection(("127.0.0.2", server.port), timeout=5)
    page = urllib.request.urlopen(server.address).read().decode()
    style = urllib.request.urlopen(server.address + "theme.css").read().decode()
    assert app.NOTICE in page
    assert not re.findall(r"(?:src|href)=[\"'](?:https?:)?//", page)
    assert not re.findall(r"(?:url\(|@import)[\s\"']*(?:https?:)?//", style)
    assert '"stylesheets":[]' in page.replace(" ", "") and '"analytics_enabled":false' in page.replace(" ", "")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{server.address}gradio_api/file={APP / 'chat.py'}")


def test_no_model_is_one_sentence_and_exit_code_2(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text("{}")
    for model, words in ((tmp_path / "nowhere", "no model directory"), (tmp_path, "holds no weights")):
        assert app.main(["--model", str(model)]) == 2
        error = capsys.readouterr().err
        assert words in error and str(model) in error and error.count("\n") == 1


def test_the_program_serves_and_removes_its_private_folder_at_the_end(tmp_path) -> None:
    """The program itself in a process of its own, its model replaced by one that loads at once."""
    model, temporary = tmp_path / "model", tmp_path / "temporary"
    model.mkdir()
    temporary.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    program = f"""
        import runpy, sys, types
        fake = types.ModuleType("med3dvlm.inference")
        fake.Med3DChat = type("Med3DChat", (), {{"from_pretrained": classmethod(lambda cls, path: cls())}})
        sys.modules["med3dvlm.inference"] = fake
        sys.argv = ["chat.py", "--model", {str(model)!r}, "--port", "{free_port()}"]
        sys.path.insert(0, {str(APP)!r})
        runpy.run_path({str(APP / "chat.py")!r}, run_name="__main__")
    """
    environment = {**os.environ, "TMPDIR": str(temporary)}
    arguments = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(arguments, cwd=APP.parent, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line and app.NOTICE in line
            (private,) = temporary.glob("med3dvlm-chat-*")
            assert private.stat().st_mode & 0o077 == 0
            urllib.request.urlopen(re.search(r"http://\S+", line)[0], timeout=10)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()
    assert not private.exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
