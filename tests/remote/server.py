"""A file server on localhost with faulty responses on request."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DELAY = 0.3  # seconds of a slow answer


class Server(ThreadingHTTPServer):
    """Serves a folder.

    `faults` maps the end of a path to what happens to its next requests, one after the other: a status, "cut" (the connection ends in the
    middle), "short" (half the file, as if it were whole), "flipped" (a bit), "slow". `asked` counts the requests.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.faults: dict[str, list[object]] = {}
        self.asked: Counter[str] = Counter()
        self.order: list[str] = []
        self.lists = False  # whether a folder is answered with a list of its files

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        self.server.order.append(self.path)
        planned = next((faults for end, faults in self.server.faults.items() if self.path.endswith(end) and faults), [])
        fault = planned.pop(0) if planned else None
        if fault == "slow":
            time.sleep(DELAY)
        if isinstance(fault, int):
            return self.send_error(fault)
        path = Path(self.translate_path(self.path))
        if path.is_dir() and self.server.lists:
            return super().do_GET()  # a page of links
        if not path.is_file():
            return self.send_error(404)
        content = bytearray(path.read_bytes())
        if fault == "flipped":
            content[len(content) // 2] ^= 1
        if fault == "short":
            del content[len(content) // 2 :]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        if fault == "cut":
            self.close_connection = True


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
