"""`--mcp`: the tools for agents, called by the protocol's own client as their descriptions say."""

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import httpx
import pytest

from med3dvlm.app import chat as app
from med3dvlm.app.page import build
from med3dvlm.app.scans import sweep
from med3dvlm.app.workstation import Workstation

from .conftest import Parrot, files_with_content

pytest.importorskip("mcp", reason="the mcp package is not installed: pip install 'med3dvlm[mcp]'")
START = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}
ACCEPT = {"Accept": "application/json, text/event-stream"}


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[SimpleNamespace]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    workstation = Workstation(Parrot(), max_bytes=2**20)
    blocks = build(workstation)
    address = app.launch(blocks, workstation, mcp=True)
    yield SimpleNamespace(address=address, uploads=tmp_path / "uploads", workstation=workstation, url=f"{address}gradio_api/mcp/")
    blocks.close(verbose=False)


def called(server: SimpleNamespace, *calls: tuple[str, dict[str, str]]) -> tuple[list, list]:
    """Returns the tools and the result of each call."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def use() -> tuple[list, list]:
        async with streamablehttp_client(server.url) as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            return (await session.list_tools()).tools, [await session.call_tool(*call) for call in calls]

    return asyncio.run(use())


def sent(server: SimpleNamespace, path: Path) -> str:
    answer = httpx.post(f"{server.address}gradio_api/upload", files={"files": (path.name, path.read_bytes())})
    return answer.json()[0]


def test_a_scan_is_passed_as_described_and_the_answer_is_json(server, scan) -> None:
    uploaded = sent(server, scan(11))
    packed = f"data:application/gzip;base64,{base64.b64encode(scan(12).read_bytes()).decode()}"
    places = (uploaded, f"{server.address}gradio_api/file={quote(uploaded)}", packed)
    tools, results = called(
        server,
        *(("answer", {"scan": place, "question": "Which organ?"}) for place in places),
        ("report", {"scan": uploaded}),
    )
    assert sorted(tool.name for tool in tools) == ["answer", "report"]
    for tool in tools:
        assert "/gradio_api/upload" in tool.inputSchema["properties"]["scan"]["description"] and "scan" in tool.inputSchema["required"]
    for result, slices in zip(results, (11, 11, 12, 11), strict=True):
        assert not result.isError
        (content,) = result.content
        answer = json.loads(content.text)
        assert result.structuredContent == answer
        assert "not a medical device" in answer["notice"] and answer["outside_training_data"] and answer["state"] == "done"
        assert f"{slices} slices." in answer["answer"] or "nodule" in answer["answer"]
    assert "nodule" in results[-1].structuredContent["answer"]
    assert len(server.workstation.sessions) == 0
    sweep(server.uploads, 0)
    assert files_with_content(server.uploads) == []


def test_a_file_that_is_no_scan_is_refused(server, scan, tmp_path) -> None:
    private = tmp_path / "private.nii.gz"
    private.write_bytes(scan().read_bytes())
    inside = server.uploads / "hash" / "scan-of-somebody" / "scan.dcm"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(b"scan")
    no_scan = base64.b64encode(b"no scan").decode()
    for given, words in (
        (str(private), "There is no such upload"),
        (str(server.uploads / ".." / private.name), "There is no such upload"),
        (str(inside), "There is no such upload"),
        (str(server.uploads), "There is no such upload"),
        (f"{server.address}gradio_api/file=/etc/passwd", "There is no such upload"),
        ("http://127.0.0.1:9/scan.nii.gz", "fetches nothing from an address"),
        ("file:///etc/passwd", "fetches nothing from an address"),
        ("data:application/gzip,abc", "not in base64"),
        ("data:;base64,äö", "not in base64"),
        (f"data:;base64,{'A' * 2**21}", "more than 1 MiB"),
        (f"data:;base64,{no_scan}", "no scan that can be opened"),
        (no_scan * 1000, "There is no such upload"),
        ("\0", "There is no such upload"),
        ("", "There is no such upload"),
    ):
        _, (result,) = called(server, ("answer", {"scan": given, "question": "Which organ?"}))
        assert result.isError and words in result.content[0].text, given
        assert str(tmp_path) not in result.content[0].text and "Traceback" not in result.content[0].text
    _, results = called(
        server, ("answer", {"scan": sent(server, scan()), "question": " "}), ("answer", {"question": "Which?"}), ("other", {})
    )
    assert all(result.isError for result in results) and "type a question" in results[0].content[0].text


def test_requests_need_the_right_origin_and_host(server) -> None:
    def status(**headers: str) -> int:
        return httpx.post(server.url, json=START, headers=ACCEPT | headers).status_code

    assert status() == status(Origin=server.address.rstrip("/")) == 200
    assert status(Origin="https://evil.example") == status(Origin="null") == status(Host="evil.example") == 403
