"""Routes that a browser fetches beside the page: the voxels of its own scan, its own report. Nothing is written to disk.

Each address holds the session's secret token, which only its own page knows and which ends with the session.
"""

from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from med3dvlm.app.masks import SAVES as MASK_SAVES
from med3dvlm.app.workstation import MAX_REPORT, SAVES, Workstation

MEDIA = {"txt": "text/plain", "md": "text/markdown", "json": "application/json", "zip": "application/zip", "dcm": "application/dicom"}
PRIVATE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def routes(workstation: Workstation) -> list[Route]:
    """Return the routes that `launch` puts before Gradio's own."""

    def scan(request: Request) -> Response:
        session = workstation.sessions.by_token(request.path_params["token"])
        if session is None or session.scan is None or session.number != request.path_params["number"]:
            return gone()
        picture = session.scan.picture
        headers = PRIVATE | {"Content-Length": str(2 * picture.stored.size)}
        return StreamingResponse(picture.planes(), headers=headers, media_type="application/octet-stream")

    def overlay(request: Request) -> Response:
        session = workstation.sessions.by_token(request.path_params["token"])
        if session is None or session.overlay is None or session.overlays != request.path_params["number"]:
            return gone()
        return Response(session.overlay.heat.tobytes(), headers=PRIVATE, media_type="application/octet-stream")

    def mask(request: Request) -> Response:
        session = workstation.sessions.by_token(request.path_params["token"])
        if session is None or (found := session.masks.get(request.path_params["number"])) is None:
            return gone()
        return Response(found.bits, headers=PRIVATE, media_type="application/octet-stream")

    def masks(request: Request) -> Response:
        session, kind = workstation.sessions.by_token(request.path_params["token"]), request.path_params["kind"]
        if session is None or kind not in MASK_SAVES:
            return gone()
        try:
            content = workstation.save_masks(session, kind)
        except ValueError as error:
            return Response(str(error), 409, PRIVATE, "text/plain")
        return Response(content, media_type=MEDIA[kind], headers=PRIVATE | {"Content-Disposition": f"attachment; filename=masks.{kind}"})

    async def report(request: Request) -> Response:
        session, kind = workstation.sessions.by_token(request.path_params["token"]), request.path_params["kind"]
        if session is None or kind not in SAVES:
            return gone()
        if int(request.headers.get("content-length") or 0) > 8 * MAX_REPORT:
            return Response(f"The report has more than {MAX_REPORT} characters; shorten it.", 409, PRIVATE, "text/plain")
        text = (await request.body()).decode("utf-8", "replace")
        try:
            content = await run_in_threadpool(workstation.save_report, session, kind, text)
        except ValueError as error:
            return Response(str(error), 409, PRIVATE, "text/plain")
        return Response(content, media_type=MEDIA[kind], headers=PRIVATE | {"Content-Disposition": f"attachment; filename=report.{kind}"})

    def picture(request: Request) -> Response:
        session = workstation.sessions.by_token(request.path_params["token"])
        if session is None or (image := session.key_images.get(request.path_params["number"])) is None:
            return gone()
        return Response(image.png, headers=PRIVATE, media_type="image/png")

    def first_script(request: Request) -> Response:
        return FileResponse(Path(__file__).parent / "page_unload.js", headers=PRIVATE, media_type="text/javascript")

    return [
        Route("/workstation/{token}/picture/{number:int}", picture),
        # The one script that Gradio's page asks for before its own; it is for pages in frames of others, which this one is not.
        Route("/static/js/iframeResizer.contentWindow.min.js", first_script),
        Route("/workstation/{token}/scan/{number:int}", scan),
        Route("/workstation/{token}/overlay/{number:int}", overlay),
        Route("/workstation/{token}/mask/{number:int}", mask),
        Route("/workstation/{token}/masks/{kind}", masks),
        Route("/workstation/{token}/report/{kind}", report, methods=["POST"]),
    ]


def gone() -> Response:
    return Response("This scan is not open any more.", 404, PRIVATE, "text/plain")
