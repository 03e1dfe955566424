"""A server for programs: OpenAI's chat completions about scans, uploads, reports, findings, embeddings, metrics.

    med3dvlm serve outputs/demo/model
    med3dvlm serve outputs/demo/model --host 0.0.0.0 --api-key-file keys.txt

It listens on 127.0.0.1 unless there are keys. Nothing that was asked and nothing of a scan's identity is logged; uploads lie in a private
folder while they are read. docs/serving.md says how to ask it.
"""

import asyncio
import re
import signal
import threading
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from med3dvlm.app.guard import Guard
from med3dvlm.app.hosting import HERE_ONLY, check_free, load, private
from med3dvlm.app.turns import BROKEN
from med3dvlm.inference.engine import Engine
from med3dvlm.inference.engines import add_engine, check_engine, start_engine
from med3dvlm.inference.transformers_engine import SLOTS
from med3dvlm.programs import Parser, positive
from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.search import Embedder
from med3dvlm.serving.answers import Answers
from med3dvlm.serving.errors import Refused, refusal, unusable
from med3dvlm.serving.keys import Keys
from med3dvlm.serving.limits import Gate
from med3dvlm.serving.metrics import Metrics
from med3dvlm.serving.routes import Service, routes
from med3dvlm.serving.scans import Limits, Scans

PRIVATE = "med3dvlm-serve-"  # prefix of the folder of uploads
REMEDY = "ask it as localhost, or start it with --api-key-file, with which it may have any name"
UNKNOWN_PATHS = {
    404: "There is nothing at this path; the API is below /v1, and /openapi.json lists its paths.",
    405: "This path is not for this method; /openapi.json lists the methods of each path.",
}
SECONDS_TO_END = 10  # for answers to be ended, when the server is stopped


def build(
    chat: Any,
    engine: Engine,
    folder: Path,
    name: str,
    limits: Limits | None = None,
    keys: Keys | None = None,
    embedder: Embedder | None = None,
) -> ASGIApp:
    """Build the server as an ASGI application; uploads lie in `folder` while they are read."""
    limits = limits or Limits()
    scans = Scans(chat, folder, limits, embedder)
    metrics = Metrics(engine.stats, lambda: len(scans))

    @asynccontextmanager
    async def sweeping(_: FastAPI) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(min(60.0, limits.scan_seconds / 10))
                scans.forget()

        task = asyncio.create_task(sweep())
        yield
        task.cancel()

    app = FastAPI(
        title="Med3DVLM", description=RESEARCH_NOTICE, docs_url=None, redoc_url=None, lifespan=sweeping
    )  # those pages load scripts from elsewhere
    app.include_router(routes(Service(name, chat, Answers(engine, metrics, limits.waiting), scans, metrics, embedder)))

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(ValueError)
    async def cannot_be_used(_: Request, error: ValueError) -> Response:
        return unusable(error).response()

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:  # `Gate` notes it
        return Refused(500, BROKEN).response()

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, Refused):  # raised while the body was read
            return error.__cause__.response()
        return Refused(error.status_code, UNKNOWN_PATHS.get(error.status_code) or f"{error.detail.rstrip('.')}.").response()

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        return _malformed(error).response()

    max_bytes = limits.upload_bytes * 4 // 3 + 2**20  # base64, and the words around it
    guarded: ASGIApp = Gate(app, keys, max_bytes, 2 * max_bytes, lambda path, status: metrics.requests.labels(path, str(status)).inc())
    return guarded if keys else Guard(guarded, rates={}, refuse=refusal, remedy=REMEDY)


def _malformed(error: RequestValidationError) -> Refused:
    """Describe one error of a body in a sentence that quotes no value but a short one."""
    first = max(error.errors(), key=lambda each: len(each["loc"]))  # of a field that may be several things, what it is most like
    place = ".".join(part for part in map(str, first["loc"]) if re.fullmatch(r"\w+", part) and part not in ("body", "str"))
    if first["type"] == "extra_forbidden":
        return Refused(400, f"The field {place!r:.80} is not known here; leave it out.", place, "unknown_parameter")
    if first["type"] == "json_invalid" or not place:
        return Refused(400, "The body is not a JSON object; send one, with the header Content-Type: application/json.", code="invalid_json")
    words = first["msg"]
    if first["type"] == "model_attributes_type":
        words = "This must be an object" + (', such as {"id": "scan-..."}' if place.endswith("scan") else "")
    return Refused(400, f"{place}: {words}.", place, "invalid_value")


class Server(uvicorn.Server):
    """Ends the answers in progress as soon as it is told to stop."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        threading.Thread(target=self.engine.close, daemon=True).start()


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model once, and serve until Ctrl+C or SIGTERM.

    Raises:
        OSError, ValueError: there is no model to load, the port is taken or the host is refused.
    """
    arguments = options().parse_args(argv)
    if arguments.host not in HERE_ONLY and arguments.api_key_file is None:
        raise ValueError(f"--host {arguments.host} would let everybody in; give --api-key-file, too (a file with a key a line).")
    check_engine(arguments.engine, arguments.vllm_url, arguments.quantize)
    check_free(arguments.host, arguments.port)
    keys = None if arguments.api_key_file is None else Keys.load(arguments.api_key_file)
    warnings.simplefilter("ignore")  # a library's may quote a header
    chat = load(arguments.model, arguments.quantize)
    embedder = None if arguments.contrastive is None else Embedder(arguments.contrastive)
    engine = start_engine(chat, arguments.engine, arguments.vllm_url, arguments.parallel)
    limits = Limits(
        arguments.limit * 2**20, arguments.scans, max(arguments.scans, 1024), 60.0 * arguments.minutes, float(arguments.seconds)
    )
    name = arguments.name or "/".join(arguments.model.resolve().parts[-2:])
    for ending in (signal.SIGTERM, signal.SIGHUP):  # uvicorn passes them on at its end, and the private folder is to go then, too
        signal.signal(ending, signal.default_int_handler)
    with private(PRIVATE) as folder:
        app = build(chat, engine, folder, name, limits, keys, embedder)
        config = uvicorn.Config(
            app, arguments.host, arguments.port, log_level="warning", access_log=False, timeout_graceful_shutdown=SECONDS_TO_END,
            server_header=False,
        )  # fmt: skip
        print(f"Med3DVLM serves {name} on http://{arguments.host}:{arguments.port}/v1 (Ctrl+C ends it). {RESEARCH_NOTICE}", flush=True)
        try:
            Server(config, engine).run()
        except KeyboardInterrupt:
            pass
        finally:
            engine.close()
    return 0


def options() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description="Serve a model to programs, in the words of OpenAI's API.", epilog=RESEARCH_NOTICE)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="the folder of a trained model")
    add_engine(add)
    add("--port", type=int, default=8000, help="(default: %(default)s)")
    add(
        "--host",
        default=HERE_ONLY[0],
        help="address to listen on; one that other machines reach needs --api-key-file (default: %(default)s)",
    )
    add("--api-key-file", type=Path, metavar="FILE", help="keys that are let in, a line each: NAME KEY, or KEY alone")
    add("--name", help="name of the model in requests (default: the last two folders of its path)")
    add(
        "--contrastive",
        type=Path,
        metavar="FOLDER",
        help="a contrastive model (stage 1), to embed texts and for probabilities of findings",
    )
    add(
        "--parallel",
        type=positive,
        default=SLOTS,
        metavar="N",
        help="answers written at a time, without vLLM; others wait (default: %(default)s)",
    )
    add("--limit", type=positive, default=1024, metavar="MIB", help="largest upload (default: %(default)s MiB)")
    add("--scans", type=positive, default=64, metavar="N", help="scans kept for one key (default: %(default)s)")
    add(
        "--minutes",
        type=positive,
        default=60,
        metavar="N",
        help="minutes for which a scan is kept after its last use (default: %(default)s)",
    )
    add(
        "--seconds",
        type=positive,
        default=600,
        metavar="N",
        help="time limit of an answer, which then ends as it is (default: %(default)s)",
    )
    return parser
