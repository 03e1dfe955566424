"""`--mcp`: the tools that another program's agent is offered, through the protocol's own client."""

import ast
import asyncio
import base64

import chat as app
import pytest
from desk import Desk
from page import build
from scans import sweep

from .conftest import Parrot, files_with_content

pytest.importorskip("mcp", reason="the mcp package is not installed: pip install 'med3dvlm[mcp]'")


def test_answer_and_report_are_tools_and_nothing_else_is(scan, tmp_path, monkeypatch) -> None:
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    desk = Desk(Parrot())
    blocks = build(desk)
    address = app.launch(blocks, desk, mcp=True)
    packed = f"data:application/gzip;base64,{base64.b64encode(scan().read_bytes()).decode()}"

    async def use() -> tuple[list[str], str]:
        async with streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            tools = [tool.name for tool in (await session.list_tools()).tools]
            told = await session.call_tool("answer", {"scan": packed, "question": "Which organ?"})
            return tools, told.content[0].text

    try:
        tools, told = asyncio.run(use())
    finally:
        blocks.close(verbose=False)
    assert sorted(tools) == ["answer", "report"]
    assert files_with_content(tmp_path)  # the scan came here, and nowhere else
    sweep(tmp_path, 0)
    assert files_with_content(tmp_path) == []
    answer = ast.literal_eval(told)
    assert "10 slices." in answer["answer"] and "not a medical device" in answer["notice"]
