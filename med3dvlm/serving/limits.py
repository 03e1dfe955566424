"""ASGI middleware around all routes: the owner of a request, its largest size, and its record."""

from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from med3dvlm.app.turns import BROKEN, log
from med3dvlm.serving.errors import NOTICE_HEADER, Refused
from med3dvlm.serving.keys import Keys

OPEN = ("/healthz",)


class Gate:
    """Admits requests with a key and at most `max_bytes`. `noted(path, status)` is called for every answer. The key's owner is stored in the
    scope's state as `owner`, "" where there are no keys.

    Bodies that stay in memory, all but multipart forms, have at most `max_held` bytes together; who comes then is told to try again.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, max_bytes: int, max_held: int, noted: Callable[[str, int], None]) -> None:
        self.app, self.keys, self.max_bytes, self.max_held, self.noted = app, keys, max_bytes, max_held, noted
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, status = Headers(scope=scope), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(NOTICE_HEADER)
            await send(message)

        stays = not headers.get("content-type", "").startswith("multipart/")  # forms go to files
        taken = held = 0

        def hold(length: int) -> None:
            nonlocal held
            if stays and length > held:
                if self._held + length - held > self.max_held:
                    raise Refused(429, "The server holds as many large requests as it can; try again in a moment.", code="busy")
                self._held += length - held
                held = length

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_bytes:
                raise self._too_large()
            hold(taken)
            return message

        try:
            owner: str | None = "" if self.keys is None else self.keys.owner(headers.get("authorization", ""))
            if owner is None and scope["path"] not in OPEN:
                raise Refused(
                    401, "The request has no key of this server; send the header Authorization: Bearer KEY.", code="invalid_api_key"
                )
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length) > self.max_bytes:
                raise self._too_large()
            if length.isdecimal():
                hold(int(length))
            scope.setdefault("state", {})["owner"] = owner
            await self.app(scope, bounded, sent)
        except Refused as refused:
            if not status:
                await refused.response()(scope, receive, sent)
        except Exception as error:  # noqa: BLE001  the server's log would quote it
            log(error)
            if not status:
                await Refused(500, BROKEN).response()(scope, receive, sent)
        finally:
            self._held -= held
            route: Any = scope.get("route")
            self.noted(getattr(route, "path", "other"), status)

    def _too_large(self) -> Refused:
        return Refused(
            413,
            f"The request has more than {self.max_bytes / 2**20:.0f} MiB; crop or pack the scan.",
            code="too_large",
        )
