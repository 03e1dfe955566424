"""Requests from other web pages, under other host names, too many of them, or malformed, as raw HTTP to the served page."""

import json
import time
from types import SimpleNamespace

import httpx
import pytest

from med3dvlm.app.guard import Rate
from med3dvlm.app.turns import MALFORMED

WORDS = "Is-there-a-secret-finding?"


@pytest.fixture
def http(server: SimpleNamespace) -> httpx.Client:
    with httpx.Client(base_url=server.address, trust_env=False) as client:
        yield client


def test_only_the_servers_own_names_are_answered(server, http) -> None:
    for host in (f"localhost:{server.port}", f"127.0.0.1:{server.port}", f"LOCALHOST:{server.port}"):
        assert http.get("/", headers={"Host": host}).status_code == 200, host
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "localhost",
        f"localhost:{server.port + 1}",
        "",
        "[::1",
        f"localhost.evil:{server.port}",
    ):
        for path in ("/", "/config", "/gradio_api/info", "/workstation/token/scan/1", "/gradio_api/heartbeat/me"):
            answer = http.get(path, headers={"Host": host})
            assert answer.status_code == 403 and "--allow-host" in answer.json()["detail"], (host, path)


def test_other_web_pages_are_refused_everywhere(server, http) -> None:
    called = {"data": ["Chest phantom"], "session_hash": "elsewhere"}
    before = len(server.workstation.sessions)
    for origin in ("https://evil.example", "null", f"http://localhost:{server.port + 1}", f"http://evil.example:{server.port}"):
        for path, sent in (
            ("/gradio_api/queue/join", {"json": called}),
            ("/gradio_api/call/example", {"json": called}),
            ("/gradio_api/upload", {"files": {"files": ("scan.nii", b"scan")}}),
            ("/gradio_api/mcp/", {"json": {}}),
            ("/login", {"data": {"username": "anna", "password": "guess"}}),
        ):
            answer = http.post(path, headers={"Origin": origin}, **sent)
            assert answer.status_code == 403 and "another web page" in answer.json()["detail"], (origin, path)
    assert len(server.workstation.sessions) == before and not list(server.uploads.rglob("scan.nii"))
    assert http.get("/", headers={"Origin": server.address.rstrip("/")}).status_code == 200


def test_every_response_has_a_content_security_policy(server, http) -> None:
    for answer in (http.get("/"), http.get("/nowhere"), http.get("/", headers={"Host": "evil.example"}), http.get("/theme.css")):
        policy = answer.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy
        assert answer.headers["X-Frame-Options"] == "DENY" and answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_malformed_calls_are_refused_and_not_logged(http, capfd, caplog) -> None:
    def told(name: str, data: list[object]) -> object:
        event = http.post(f"/gradio_api/call/{name}", json={"data": data}).json()["event_id"]
        answer = http.get(f"/gradio_api/call/{name}/{event}", timeout=20).text
        assert answer.startswith("event: error"), answer
        return json.loads(answer.partition("data: ")[2])

    outside = {"path": f"/etc/{WORDS}.nii", "meta": {"_type": "gradio.FileData"}}
    for name, data in (
        ("ask", [WORDS, "one too many"]),
        ("ask", []),
        ("ask", [None]),
        ("sample", [WORDS, None, 1]),
        ("example", [None]),
        ("sample", [WORDS, "warm", WORDS]),
        ("sample", [{"a": WORDS}, 0, 1]),
        ("open", [WORDS]),
        ("open", [[outside]]),
        ("answer", [outside, WORDS]),
        ("example", [[WORDS]]),
    ):
        error = told(name, data)
        assert error and error["error"], (name, data, error)
        assert error["error"].endswith(".") and "\n" not in error["error"]
    for body in (b"{" + WORDS.encode(), b"[]", json.dumps({"data": WORDS}).encode()):
        answer = http.post("/gradio_api/queue/join", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422)
    for path in ("/gradio_api/call/v2/nothing", "/gradio_api/call/nothing"):
        assert http.post(path, json={"data": [WORDS]}).status_code in (404, 500)
    broken = http.post("/gradio_api/queue/join", json={"data": [WORDS], "fn_index": 99999, "session_hash": WORDS})
    assert broken.status_code in (404, 500) and WORDS not in broken.text
    written = "".join(capfd.readouterr()) + caplog.text
    assert WORDS not in written and "Traceback" not in written


def test_rate_limits_apply_to_each_client() -> None:
    rate = Rate(3, 5.0)
    assert [rate.wait("one") for _ in range(3)] == [0, 0, 0]
    assert rate.wait("one") > 0 and rate.wait("two") == 0
    time.sleep(0.25)
    assert rate.wait("one") == 0


def test_too_many_logins_get_a_retry_after_header(server, http) -> None:
    answers = [http.post("/login", data={"username": "anna", "password": "guess"}) for _ in range(70)]
    assert answers[0].status_code != 429 and answers[-1].status_code == 429
    assert int(answers[-1].headers["Retry-After"]) >= 1 and "try again in" in answers[-1].json()["detail"]
    assert http.get("/").status_code == 200 and http.post("/gradio_api/queue/join", json={}).status_code != 429


def test_an_allowed_host_is_answered_with_and_without_its_port() -> None:
    import asyncio

    from med3dvlm.app.guard import Guard

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(host: str, origin: str | None = None, listens: int = 7860) -> int:
        found = []

        async def send(message) -> None:
            found.append(message)

        headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "headers": headers,
            "server": ("192.0.2.7", listens),
            "client": ("192.0.2.1", 1),
        }
        asyncio.run(Guard(app, ("scans.example", "tunnel:9000"))(scope, None, send))
        return found[0]["status"]

    for host in ("scans.example", "Scans.Example:443", "tunnel:9000", "192.0.2.7:7860", "[::1]:7860"):
        assert status(host, f"https://{host}") == 200, host
    for host in ("tunnel", "tunnel:9001", "other.example", "192.0.2.8:7860"):
        assert status(host) == 403, host
    assert status("localhost", listens=80) == 200 and status("localhost") == 403
    assert MALFORMED.endswith(".")
