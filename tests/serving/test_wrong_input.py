"""Wrong requests get one sentence in OpenAI's form of errors, and the server continues."""

import asyncio
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from med3dvlm.programs import run
from med3dvlm.serving.keys import Keys
from med3dvlm.serving.limits import Gate
from med3dvlm.serving.scans import Limits
from tests.app.test_scans import mixed_series

from .conftest import about, data_url, serving

SECRET = "a-question-that-nobody-may-read"


def one_sentence(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".") and "\n" not in error["message"] and "Traceback" not in error["message"]
    assert "X-Research-Notice" in answer.headers
    return error["message"]


@pytest.fixture
def http(server: SimpleNamespace) -> httpx.Client:
    with httpx.Client(base_url=server.address, trust_env=False, timeout=60) as client:
        yield client


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": SECRET}]}, 400, "No scan is given"),
        ({"messages": about("scan-unknown", SECRET)}, 404, "no scan of this id"),
        ({"messages": about("", SECRET)}, 404, "no scan of this id"),
        ({"messages": [{"role": "user", "content": [{"type": "scan", "scan": {}}]}]}, 400, "one of the two"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.b/c.nii"}}]}]}, 400, "nothing is fetched"),
        ({"messages": [{"role": "user", "content": [{"type": "scan", "scan": {"url": "data:;base64,###"}}]}]}, 400, "not base64"),
        ({"messages": [{"role": "user", "content": [{"type": "scan", "scan": {"url": "data:;base64,QUJD"}}]}]}, 400, "no scan that can be opened"),
        ({"messages": [{"role": "user", "content": [{"type": "scan", "scan": {"url": "data:;base64,"}}]}]}, 400, "empty"),
        ({"messages": [{"role": "tool", "content": SECRET}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": SECRET}]}]}, 400, "'text', 'scan', 'image_url', 'file'"),
        ({"model": "gpt-5"}, 404, "There is no model 'gpt-5' here"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 2}, 400, "n: "),
        ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
        ({"top_logprobs": 2}, 400, "logprobs to true"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "at most 4"),
        ({"stop": ""}, 400, "at least one character"),
        ({"presence_penalty": 1}, 400, "presence_penalty"),
        ({"places": True}, 400, "does not point"),
        ({"tools": []}, 400, "'tools' is not known"),
        ({"temprature": 1}, 400, "'temprature' is not known"),
        ({"messages": about("ID", "why " * 2000)}, 400, "shorter question"),
        ({"messages": about("ID", "  ")}, 400, "question is empty"),
        ({"messages": [*about("ID", "a"), {"role": "assistant", "content": "b"}]}, 400, "must be the user's"),
        ({"messages": [{"role": "system", "content": [{"type": "scan", "scan": {"id": "ID"}}]}, *about("ID", "a")]}, 400, "one of the user"),
        ({"messages": about("ID", "a") + about("OTHER", "a")}, 400, "2 scans are given"),
    ],
)  # fmt: skip
def test_wrong_chat_requests(http: httpx.Client, upload, change: dict[str, Any], status: int, words: str, caplog) -> None:
    ids = {"ID": upload(0), "OTHER": upload(1)} if "ID" in json.dumps(change) else {"ID": "none"}
    body = {"model": "tiny", "messages": about(ids["ID"], SECRET), "max_tokens": 3} | change
    written = json.dumps(body)
    for name, id in ids.items():
        written = written.replace(f'"{name}"', f'"{id}"')
    if "messages" not in change and status != 404:
        written = written.replace('"none"', f'"{upload(0)}"')
    for stream in (False, True):
        answer = http.post("/v1/chat/completions", json=json.loads(written) | {"stream": stream})
        assert answer.status_code == status, answer.text
        assert words in one_sentence(answer) and SECRET not in answer.text
    assert SECRET not in caplog.text


def test_other_wrong_requests(server, http: httpx.Client, tmp_path: Path) -> None:
    mixed = [("file", (path.name, path.read_bytes())) for path in mixed_series(tmp_path / "mixed")]
    for method, path, sent, status, words in (
        ("POST", "/v1/chat/completions", {"content": "{"}, 400, "not a JSON object"),
        ("GET", "/v1/nothing", {}, 404, "nothing at this path"),
        ("DELETE", "/v1/chat/completions", {}, 405, "not for this method"),
        ("GET", "/v1/scans/scan-none", {}, 404, "no scan of this id"),
        ("DELETE", "/v1/scans/scan-none", {}, 404, "no scan of this id"),
        ("POST", "/v1/scans", {"data": {"series": "1"}}, 400, "No file is sent"),
        ("POST", "/v1/scans", {"files": {"file": ("Doe_Jane.nii.gz", b"")}}, 400, "empty"),
        ("POST", "/v1/scans", {"files": {"file": ("Doe_Jane.nii.gz", b"no scan at all")}}, 400, ""),
        ("POST", "/v1/scans", {"files": {"file": ("Doe_Jane.pdf", b"%PDF")}}, 400, "no scan that can be opened"),
        ("POST", "/v1/scans", {"files": {"file": ("a.dcm", b"abc")}, "data": {"series": "one"}}, 400, "series must be the number"),
        ("POST", "/v1/scans", {"files": mixed}, 400, "by series number, or give its files alone: 1: 4 slices"),
        ("POST", "/v1/reports", {"json": {"scan": "scan-none"}}, 400, 'must be an object, such as {"id": "scan-..."}'),
        ("GET", "/v1/scans", {"headers": {"Host": "elsewhere"}}, 403, "start it with --api-key-file"),
        ("POST", "/v1/findings", {"json": {}}, 400, "one of the two"),
        ("POST", "/v1/embeddings", {"json": {"input": "text"}}, 400, "--contrastive"),
        ("POST", "/v1/embeddings", {"json": {"input": []}}, 400, "empty"),
    ):
        answer = http.request(method, path, **sent)
        assert answer.status_code == status, (path, answer.text)
        assert words in one_sentence(answer), answer.text
        assert (answer.json()["error"]["code"] == "ambiguous_series") == (sent.get("files") is mixed)
        assert "Doe" not in answer.text and str(server.folder) not in answer.text
    assert list(server.folder.iterdir()) == []


def test_other_web_pages_and_names_are_refused(server, http: httpx.Client) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        answer = http.get("/v1/models", headers=headers)
        assert answer.status_code == 403 and answer.json()["error"]["message"]


def test_uploads_are_bounded_in_size_number_and_time(tmp_path: Path, scan) -> None:
    file = scan(0).read_bytes()
    limits = Limits(upload_bytes=2 * len(file), scans=2, scan_seconds=0.5)
    with serving(tmp_path, limits=limits) as server, httpx.Client(base_url=server.address, trust_env=False, timeout=60) as http:

        def send(content: bytes = file) -> httpx.Response:
            return http.post("/v1/scans", files={"file": ("scan.nii.gz", content)})

        answer = send(file + b"0" * 2 * len(file))
        assert answer.status_code == 400 and "are taken; crop or pack it" in one_sentence(answer)

        def endless() -> Any:
            for _ in range(10):
                yield b"0" * 2**20

        for content in (endless(), b"0" * 3 * 2**20):  # without a Content-Length and with one
            answer = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413 and "crop or pack" in one_sentence(answer)
        ids = [send().json()["id"] for _ in range(2)]
        answer = send()
        assert answer.status_code == 429 and "delete one" in one_sentence(answer)
        assert http.delete(f"/v1/scans/{ids[0]}").json() == {"id": ids[0], "object": "scan.deleted", "deleted": True}
        assert [each["id"] for each in http.get("/v1/scans").json()["data"]] == ids[1:]
        assert send().status_code == 200
        import time

        time.sleep(0.6)
        assert http.get(f"/v1/scans/{ids[1]}").status_code == 404 and http.get("/v1/scans").json()["data"] == []
        messages = [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(scan(0))}}, {"type": "text", "text": "a"}]}
        ]
        for number in range(4):  # those within messages give way to each other
            messages[0]["content"][0]["image_url"]["url"] = data_url(scan(number))
            assert http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2}).status_code == 200


def test_scans_are_private_to_their_key(tmp_path: Path, scan) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("# who\nanna anna-s-long-secret-key\n\nanother-long-secret-key\n")
    folder = tmp_path / "uploads"
    folder.mkdir()
    with serving(folder, keys=Keys.load(path)) as server:
        anna, other, nobody = (
            openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0)
            for key in ("anna-s-long-secret-key", "another-long-secret-key", "anna-s-long-secret-kez")
        )
        for call in (nobody.models.list, lambda: nobody.get("/metrics", cast_to=object)):
            with pytest.raises(openai.AuthenticationError, match="no key of this server"):
                call()
        sent = {"files": {"file": ("a.nii.gz", scan(0).read_bytes())}, "headers": {"Authorization": "Bearer anna-s-long-secret-key"}}
        id = httpx.post(f"{server.address}/v1/scans", trust_env=False, timeout=60, **sent).json()["id"]
        assert anna.chat.completions.create(model="tiny", messages=about(id, "a"), max_tokens=2).choices
        with pytest.raises(openai.NotFoundError, match="no scan of this id"):
            other.chat.completions.create(model="tiny", messages=about(id, "a"), max_tokens=2)
        assert httpx.get(f"{server.address}/healthz", trust_env=False).status_code == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "holds no key"), ("short", "at least 16"), ("a b c", "NAME KEY"), ("k" * 20 + "\n" + "k" * 20, "twice"),
     (f"a {'k' * 20}\na {'l' * 20}", "same name")],
)  # fmt: skip
def test_wrong_key_files(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as raised:
        Keys.load(path)
    assert "kkk" not in str(raised.value).replace(str(path), "")  # pytest names the folder after the case


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--port", "0"], "is not a port"),
        (["nowhere"], "There is no model directory"),
        (["nowhere", "--host", "0.0.0.0"], "give --api-key-file"),
        (["nowhere", "--api-key-file", "none.txt"], "none.txt"),
    ],
)
def test_a_server_that_cannot_start(words: list[str], said: str, capsys, free_port: str) -> None:
    words = words if "--port" in words else [*words, "--port", free_port]
    assert run("med3dvlm.serving.server", words, "med3dvlm serve") == 2
    assert said in capsys.readouterr().err


def test_nothing_of_a_question_or_a_name_is_logged(server, http: httpx.Client, upload, caplog) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(f"about {SECRET}")

    id = upload(3)
    with caplog.at_level(logging.DEBUG, "med3dvlm"), caplog.at_level(logging.DEBUG, "uvicorn"):
        handle = server.chat.model.language_model.model.register_forward_pre_hook(fail)
        for stream in (False, True):
            answer = http.post("/v1/chat/completions", json={"messages": about(id, SECRET), "stream": stream})
            assert answer.status_code == 500 and "went wrong" in one_sentence(answer)
        handle.remove()
    assert "RuntimeError in" in caplog.text
    assert SECRET not in caplog.text and "Doe" not in caplog.text
    assert http.post("/v1/chat/completions", json={"messages": about(id, SECRET), "max_tokens": 2}).status_code == 200


def test_internal_errors(server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog, scan) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(server.chat, "encode", fail)
    answer = http.post("/v1/scans", files={"file": ("a.nii.gz", scan(9).read_bytes())})
    assert answer.status_code == 500 and "went wrong" in one_sentence(answer)
    ends = time.monotonic() + 20
    while "RuntimeError in" not in caplog.text:  # logged once the answer is on its way
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert SECRET not in caplog.text and not list(server.folder.iterdir())


def test_messages_of_libraries_are_not_passed_on(
    server: SimpleNamespace, http: httpx.Client, upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only our own ValueErrors describe what is wrong with the request."""
    id = upload(0)
    for place in ("chat.prompt", "scans"):
        with monkeypatch.context() as broken:
            if place == "scans":
                broken.setattr("med3dvlm.serving.scans.take_uploads", lambda paths, limit: json.loads(SECRET))
                answer = http.post("/v1/scans", files={"file": ("a.nii", b"voxels")})
            else:
                broken.setattr(server.chat, "prompt", lambda *arguments: json.loads(SECRET))
                answer = http.post("/v1/chat/completions", json={"messages": about(id, "Where?"), "max_tokens": 3})
        assert answer.status_code == 500 and "Something went wrong here" in one_sentence(answer) and "Expecting" not in answer.text


def test_large_bodies_are_read_one_at_a_time() -> None:
    """With a limit of 100 bytes each and 150 in all, the second body waits for the first; forms are written to files."""
    inside, statuses = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await inside.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    gate = Gate(app, None, 100, 150, lambda path, status: statuses.append(status))

    async def post(length: int, kind: str = "application/json", declared: bool = True) -> None:
        headers = [(b"content-type", kind.encode()), *([(b"content-length", str(length).encode())] if declared else [])]

        async def receive() -> Any:
            return {"type": "http.request", "body": b"x" * length}

        async def send(message: Any) -> None:
            pass

        await gate({"type": "http", "method": "POST", "path": "/v1/x", "headers": headers}, receive, send)

    async def ask() -> None:
        first = asyncio.create_task(post(90))
        await asyncio.sleep(0)
        await post(90)
        await post(90, declared=False)
        assert statuses == [429, 429]
        others = [asyncio.create_task(post(90, "multipart/form-data; boundary=b")), asyncio.create_task(post(50))]
        await asyncio.sleep(0)
        inside.set()
        await asyncio.gather(first, *others)
        await post(100)
        assert statuses[2:] == [200] * 4

    asyncio.run(ask())
