"""What a browser fetches beside the page: the voxels of its own scan. Nothing of it is ever written to a disk.

Each address holds the session's secret token, which only its own page was told; it ends with the session.
"""

from desk import Desk
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PRIVATE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def routes(desk: Desk) -> list[Route]:
    """The routes that `launch` puts before Gradio's own."""

    def scan(request: Request) -> Response:
        session = desk.sessions.by_token(request.path_params["token"])
        if session is None or session.scan is None or session.number != request.path_params["number"]:
            return gone()
        headers = PRIVATE | {"Content-Encoding": "gzip"}
        return Response(session.scan.picture.packed, media_type="application/octet-stream", headers=headers)

    return [Route("/desk/{token}/scan/{number:int}", scan)]


def gone() -> Response:
    return Response("This scan is not open any more.", 404, PRIVATE, "text/plain")
