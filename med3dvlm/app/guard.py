"""Protection against other web pages: only the server's own page and programs of this machine may send it requests.

A web page from elsewhere can send requests to this server by the browser of somebody who uses it, or give its own name the address of
this machine ("DNS rebinding"). So a request has to name this server as its Host, and one that a web page sends has to come from the
page of this server (Origin). The Model Context Protocol demands the latter of every server.

`Guard` also says in every answer what the page may load, limits how fast one client may call, and keeps the words of a failed request
out of the log.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from med3dvlm.app.turns import MALFORMED, log

LOCAL = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    # Gradio's page has scripts of its own inside and makes functions of strings, so these cannot be forbidden; but nothing is loaded from,
    # sent to, or shown inside another place.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# Group of calls -> how many at once, and how many a second after that
RATES = {"/login": (60, 1.0), "": (600, 20.0)}
HEARTBEAT = "/gradio_api/heartbeat/"
MAX_CLIENTS = 4096  # clients whose calls are counted


class Guard:
    """ASGI middleware that checks Host and Origin and limits the rate of calls. `hosts` are more names, with or without a port, under which
    the server may be addressed; `connection(name)` is entered for as long as the session of that name has Gradio's heartbeat; `rates` are as
    RATES, and `refuse` answers as `refusal` does; `remedy` is what to do about a name that is not the server's.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Iterable[str] = (),
        connection: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        rates: Mapping[str, tuple[int, float]] = RATES,
        refuse: Callable[..., ASGIApp] | None = None,
        remedy: str = "open it as localhost, or start it with --allow-host and the name",
    ) -> None:
        self.app, self.hosts, self.connection = app, {host.lower() for host in hosts}, connection
        self._rates = {path: Rate(*limits) for path, limits in rates.items()}
        self._refuse, self._remedy = refuse or refusal, remedy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), False
        client = (scope.get("client") or ("",))[0]

        async def sent(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if problem := self._problem(scope, headers):
            await self._refuse(403, problem)(scope, receive, sent)
            return
        if wait := self._wait(scope, client):
            await self._refuse(429, f"These are too many calls at once; try again in {wait:.0f} seconds.", wait)(scope, receive, sent)
            return
        try:
            held = scope["path"].startswith(HEARTBEAT)
            with self.connection(scope["path"].removeprefix(HEARTBEAT)) if held else nullcontext():
                await self.app(scope, receive, sent)
        except Exception as error:  # noqa: BLE001  the server's log would quote it
            log(error)
            if not started:
                await self._refuse(500, MALFORMED)(scope, receive, sent)

    def _problem(self, scope: Scope, headers: Headers) -> str:
        """Return one sentence why the request is refused, or ""."""
        host = headers.get("host", "").lower()
        if not self._ours(host, scope):
            return f"This is not a name of this server; {self._remedy}."
        origin = headers.get("origin")
        if origin is not None and not self._ours(urlsplit(origin).netloc.lower(), scope):
            return "This request comes from another web page, and only the page of this server may send one."
        return ""

    def _ours(self, host: str, scope: Scope) -> bool:
        """Return whether a Host, or the host in an Origin, is the server's."""
        name, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "")
        address, listens = scope.get("server") or ("", None)  # where the connection came in
        own = {*LOCAL, f"[{address}]" if ":" in address else address}
        return host in self.hosts or name in self.hosts or (name in own and (port or "80") == str(listens))

    def _wait(self, scope: Scope, client: str) -> float:
        """Return the seconds until the client may call again, 0 for now. Reading is not counted; sending several files counts as one call
        each.
        """
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].endswith("/upload"):
            return 0.0
        rate = self._rates.get(scope["path"].rstrip("/")) or self._rates.get("")
        return rate.wait(client) if rate else 0.0


class Rate:
    """Token bucket per client: `most` calls at once, then `a_second`."""

    def __init__(self, most: int, a_second: float) -> None:
        self._most, self._a_second = most, a_second
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # calls left, and when that was

    def wait(self, client: str) -> float:
        """Return the seconds until the next call is allowed; 0 counts as a call."""
        now = time.monotonic()
        left, then = self._left.pop(client, (float(self._most), now))
        left = min(self._most, left + (now - then) * self._a_second)
        due = left >= 1
        self._left[client] = (left - due, now)
        if len(self._left) > MAX_CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if due else max(1.0, (1 - left) / self._a_second)


def refusal(status: int, words: str, wait: float = 0.0) -> Any:
    """Return the response to a refused request, in the form that Gradio's clients read."""
    return JSONResponse({"detail": words, "error": words}, status, {"Retry-After": f"{wait:.0f}"} if wait else None)
