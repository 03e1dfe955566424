"""The workstation for agents: `--mcp` offers two tools, `answer` and `report`, by the Model Context Protocol at /gradio_api/mcp/ (streamable HTTP).

An agent sends a scan in one of two ways, which the tools' descriptions name:

- it posts the file to /gradio_api/upload (multipart, field `files`), as `curl -F files=@scan.nii.gz` does, and gives the path that comes
  back, or the URL /gradio_api/file=PATH of this server;
- it gives the file's content itself as a data URI in base64.

Nothing is fetched from another address. Calls belong to no session, and nothing of a call is kept.
"""

import base64
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import anyio.to_thread
from gradio.utils import get_upload_folder
from pydantic import Field
from starlette.routing import BaseRoute, Route

from med3dvlm.app.api import once
from med3dvlm.app.scans import PREFIX
from med3dvlm.app.session import Session
from med3dvlm.app.turns import error_message
from med3dvlm.app.workstation import Workstation
from med3dvlm.prompts import REPORT_PROMPTS, RESEARCH_NOTICE

PATH = "/gradio_api/mcp"
MAX_PATH_LENGTH = 4096  # characters
FILE = "/gradio_api/file="
SCAN = (
    "The scan: one NIfTI, NRRD, MHA, npy or npz file, or a zip of a DICOM series. Either POST the file to /gradio_api/upload of this server "
    "(multipart form, field 'files') and give the path that comes back; or give the content as a data URI, 'data:;base64,...'. "
    "Other addresses are not fetched."
)
NOT_HERE = "There is no such upload; POST the file to /gradio_api/upload (field 'files') and give the path that comes back, or a data URI."


def tools(workstation: Workstation, parallel: int = 2) -> tuple[list[BaseRoute], Callable[[Any], AbstractAsyncContextManager[None]]]:
    """Return the routes, and the lifespan that an application with them needs. At most `parallel` calls run at a time.

    Raises:
        ImportError: the package mcp is not installed.
    """
    try:
        from mcp.server.fastmcp import FastMCP
        from mcp.server.transport_security import TransportSecuritySettings
        from mcp.types import ToolAnnotations
    except ImportError:
        raise ImportError("--mcp needs the package mcp; install it with `pip install 'med3dvlm[mcp]'`.") from None

    unchecked = TransportSecuritySettings(enable_dns_rebinding_protection=False)  # guard.py checks Host and Origin of all requests
    server = FastMCP(
        "Med3DVLM", RESEARCH_NOTICE, stateless_http=True, streamable_http_path=PATH, log_level="ERROR", transport_security=unchecked
    )
    few: list[anyio.CapacityLimiter] = []  # made where the loop runs
    harmless = ToolAnnotations(readOnlyHint=True, openWorldHint=False)

    async def worked(scan: str, question: str) -> dict[str, Any]:
        session = Session()
        if not few:
            few.append(anyio.CapacityLimiter(parallel))
        try:
            return await anyio.to_thread.run_sync(
                lambda: call(workstation, session, scan, question), limiter=few[0], abandon_on_cancel=True
            )
        finally:
            session.stop()  # the client went away and waits for no answer

    @server.tool(annotations=harmless)
    async def answer(
        scan: Annotated[str, Field(description=SCAN)], question: Annotated[str, Field(description="In plain words.")]
    ) -> dict[str, Any]:
        """Answer a question about one 3D scan. Research software, not a medical device."""
        return await worked(scan, question)

    @server.tool(annotations=harmless)
    async def report(scan: Annotated[str, Field(description=SCAN)]) -> dict[str, Any]:
        """Draft the radiology report of one 3D scan. Research software, not a medical device."""
        return await worked(scan, REPORT_PROMPTS[0])

    (route,) = server.streamable_http_app().routes
    assert isinstance(route, Route)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async with server.session_manager.run():
            yield

    return [Route(path, route.endpoint) for path in (PATH, f"{PATH}/")], lifespan


def call(workstation: Workstation, session: Session, scan: str, question: str) -> dict[str, Any]:
    """Return what a tool returns about a scan. Raises ValueError."""
    try:
        with tempfile.TemporaryDirectory(prefix="agent-", dir=get_upload_folder()) as folder:
            path, keep = received(scan, Path(folder), workstation.max_bytes)
            return once(workstation, session, [str(path)], question, keep)
    except Exception as error:  # noqa: BLE001  told in a sentence
        raise ValueError(error_message(error)) from None


def received(scan: str, folder: Path, max_bytes: int) -> tuple[Path, bool]:
    """Resolve an agent's reference to a scan file. Returns its path, and whether it stays there; inline content is written into the folder.

    Raises:
        ValueError: they name no upload, or the content is no base64 or too large.
    """
    if scan.startswith("data:"):
        kind, _, content = scan.partition(",")
        if not kind.endswith(";base64"):
            raise ValueError("The data URI is not in base64; begin it with 'data:;base64,'.")
        if len(content) * 3 // 4 > max_bytes:
            raise ValueError(f"The scan has more than {max_bytes / 2**20:g} MiB; crop or pack it.")
        try:
            (folder / "scan").write_bytes(base64.b64decode(content, validate=True))
        except ValueError:
            raise ValueError("The data URI is not in base64; send the file's bytes in base64.") from None
        return folder / "scan", False
    place = scan
    if "://" in scan:
        place = unquote(urlsplit(scan).path)
        if not place.startswith(FILE):
            raise ValueError(f"This server fetches nothing from an address. {NOT_HERE}")
        place = place.removeprefix(FILE)
    if len(place) > MAX_PATH_LENGTH or "\0" in place:
        raise ValueError(NOT_HERE)
    private, path = Path(get_upload_folder()).resolve(), Path(place).resolve()
    inside = path.relative_to(private).parts if path.is_relative_to(private) else ()
    if not inside or any(part.startswith(PREFIX) for part in inside) or not path.is_file():
        raise ValueError(NOT_HERE)
    return path, True
