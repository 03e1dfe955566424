"""A radiology workstation in the browser: look at one's own scan and talk with a model about it, on this machine only.

    med3dvlm chat outputs/demo/model
    med3dvlm chat outputs/demo/model --port 8080 --mcp
    med3dvlm chat outputs/demo/model --host 0.0.0.0 --auth-file accounts.json    # for others; see accounts.py

Nothing leaves the machine: the server listens on 127.0.0.1 unless told otherwise, the page fetches nothing from elsewhere, uploads lie in a
private folder until they were read (DICOM files, which a Structured Report refers to, until the scan is closed; what an agent sends, and what
nobody read, for some minutes), and each browser session has a scan of its own.

Where to find what: layout.py (what stands where) and events.py (what each control does), which page.py connects; workstation.py (what can be
done), session.py, sessions.py and turns.py (who is there and what was said), scans.py (files in), viewer.py and viewer.js (the viewer; layout.py
lists its other scripts), common.js, conversation.js, report.js, page_load.js, page_unload.js, analysis.py (overlays, similar cases, segmentation),
masks.py and masks.js (masks of findings), key_images.py (slices for the report), routes.py (what the browser fetches), api.py (functions for
programs), mcp_tools.py (for agents), accounts.py and guard.py (who may come in).
"""

import os
import re
import signal
import threading
import warnings
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from med3dvlm.app.accounts import Accounts
from med3dvlm.app.analysis import find_segmenter
from med3dvlm.app.analysis import load as load_analysis
from med3dvlm.app.guard import Guard
from med3dvlm.app.hosting import HERE_ONLY, check_free, load, private
from med3dvlm.app.layout import THEME, file
from med3dvlm.app.mcp_tools import tools
from med3dvlm.app.page import build
from med3dvlm.app.routes import routes
from med3dvlm.app.scans import sweep
from med3dvlm.app.workstation import Workstation
from med3dvlm.inference.engines import add_engine, check_engine, start_engine
from med3dvlm.programs import Parser
from med3dvlm.prompts import RESEARCH_NOTICE

PRIVATE = "med3dvlm-chat-"  # prefix of the folder of uploads
SECONDS_UNREAD = 300.0  # after which an upload that nobody read goes


def launch(
    blocks: gr.Blocks,
    workstation: Workstation,
    port: int | None = None,
    host: str = HERE_ONLY[0],
    accounts: Accounts | None = None,
    mcp: bool = False,
    hosts: Sequence[str] = (),
) -> str:
    """Start the server without blocking and return its address. Port None takes the first free one from 7860; `hosts`: other names of the
    server.
    """
    checks = [Middleware(Guard, hosts, workstation.sessions.connection)]
    # run_history would keep questions and answers in the browser
    off: dict[str, Any] = dict.fromkeys(("share", "run_history", "enable_monitoring", "ssr_mode", "pwa"), False)
    look: dict[str, Any] = {"theme": THEME, "css": file("style.css"), "footer_links": [], "quiet": True}
    more, lifespan = tools(workstation) if mcp else ([], None)
    login: Any = None if accounts is None else accounts.allows  # Gradio awaits it
    blocks.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, max_file_size=workstation.max_bytes, mcp_server=False,
        auth=login, auth_message=RESEARCH_NOTICE if accounts else None,
        app_kwargs={"routes": [*routes(workstation), *more], "lifespan": lifespan, "middleware": checks}, **look, **off,
    )  # fmt: skip
    return str(blocks.local_url)


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder for uploads, readable by this user alone and deleted at the end. Also deletes what a killed chat left behind."""
    with private(PRIVATE) as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        ended = threading.Event()

        def sweep_now_and_then() -> None:
            while not ended.wait(SECONDS_UNREAD / 10):
                sweep(folder, SECONDS_UNREAD)

        threading.Thread(target=sweep_now_and_then, daemon=True).start()
        try:
            yield folder
        finally:
            ended.set()


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model once and serve until Ctrl+C or SIGTERM.

    Raises:
        OSError, ValueError: there is no model to load, the port is taken or the host is refused.
    """
    arguments = options().parse_args(argv)
    model: Path = arguments.model or arguments.named_model
    try:
        if arguments.host not in HERE_ONLY and arguments.auth_file is None:
            raise ValueError(
                f"--host {arguments.host} would let others in without a password; give --auth-file, too (made by `med3dvlm accounts`)."
            )
        if arguments.mcp and arguments.auth_file is not None:
            raise ValueError("--mcp has no accounts and would let everybody in; leave out --mcp or --auth-file.")
        check_engine(arguments.engine, arguments.vllm_url, arguments.quantize)
        check_free(arguments.host, arguments.port)
        if min(arguments.limit, arguments.parallel) < 1:
            raise ValueError(f"--limit {arguments.limit} and --parallel {arguments.parallel} must be at least 1.")
        if wrong := [
            name for name in arguments.allow_host if not re.fullmatch(r"[\w.-]+(:\d+)?|\[[\da-f:]+\](:\d+)?", name, re.IGNORECASE)
        ]:
            raise ValueError(f"--allow-host {wrong[0]} is not a name or an address; give it as scans.example.org or 192.0.2.1:7860.")
        accounts = None if arguments.auth_file is None else Accounts.load(arguments.auth_file)
        chat = load(model, arguments.quantize)
        start_engine(chat, arguments.engine, arguments.vllm_url)
        analysis = load_analysis(chat, arguments.contrastive, arguments.index, arguments.segmenter or find_segmenter(model))
        for ending in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(ending, signal.default_int_handler)  # so that the private folder is deleted then, too
        warnings.simplefilter("ignore")  # a library's may quote a header
        with private_folder():
            workstation = Workstation(chat, "/".join(model.resolve().parts[-2:]), arguments.limit * 2**20, analysis)
            blocks = build(workstation, arguments.parallel, accounts is not None)
            address = launch(blocks, workstation, arguments.port, arguments.host, accounts, arguments.mcp, arguments.allow_host)
            print(f"Med3DVLM listens on {address} (Ctrl+C ends it). {RESEARCH_NOTICE}", flush=True)
            blocks.block_thread()
    except KeyboardInterrupt:  # while the model was loaded
        return 130
    return 0


def options() -> Parser:
    """Return the parser of the command line."""
    about = "Look at a scan and talk with a model about it, in the browser."
    parser = Parser(description=about, epilog=RESEARCH_NOTICE, usage="%(prog)s MODEL [options]")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("model", metavar="MODEL", type=Path, nargs="?", help="the folder of a trained model")
    model.add_argument("--model", dest="named_model", type=Path, help=SUPPRESS)
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    parser.add_argument(
        "--host", default=HERE_ONLY[0], help="address to listen on; one that other machines reach needs --auth-file (default: %(default)s)"
    )
    parser.add_argument("--auth-file", type=Path, help="accounts that may use the page, made by `med3dvlm accounts`")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME[:PORT]",
        help="another name by which browsers may address the server (repeatable)",
    )
    parser.add_argument("--limit", type=int, default=4096, metavar="MIB", help="largest upload (default: %(default)s MiB)")
    parser.add_argument(
        "--parallel", type=int, default=16, help="how many answers are written at the same time; others wait (default: %(default)s)"
    )
    parser.add_argument(
        "--contrastive", type=Path, help="directory of a contrastive model (stage 1), to show where a scan matches a phrase"
    )
    parser.add_argument("--index", type=Path, help="index of cases, made by `med3dvlm index`, to show the cases most like the scan")
    parser.add_argument(
        "--segmenter", type=Path, metavar="FOLDER",
        help="directory of a segmentation model, which draws findings (default: segmenter or segmentation within or beside the model)",
    )  # fmt: skip
    add_engine(parser.add_argument)
    parser.add_argument("--mcp", action="store_true", help="also offer answer and report as MCP tools, under /gradio_api/mcp/")
    return parser
