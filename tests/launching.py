"""Start stage scripts and commands as `deepspeed`, `torchrun`, `python` and a shell do, from a process that has imported everything already.

A launcher gives each process its rank and the address of the first by environment variables, and runs the script as __main__. This
module does the same in forks of one server process: a start takes a fraction of a second instead of ten. For shell scripts there are programs
named `python`, `med3dvlm` and as the launchers, which run in such forks, as does what they start.
"""

import atexit
import ctypes
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TIMEOUT = 300  # seconds
MODULES = {
    "med3dvlm": "med3dvlm.cli",
    "torchrun": "torch.distributed.run",
    "deepspeed": "deepspeed.launcher.runner",
    "accelerate": "accelerate.commands.accelerate_cli",
}  # program -> module
PROGRAM = r"""#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"3"], [0, 1, 2])
    server.sendall(json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode() + b"\n")
    sys.exit(int(server.recv(9) or 1))
"""


def context() -> ForkServerContext:
    """Return the server, started at first use, whose processes have one thread, no GPU and no network."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.preloaded"])
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return forks


def launch(launcher: str, processes: int, script: str, *flags: object, log: Path, kill_at: Path | None = None) -> list[int]:
    """Return the exit codes of the script's processes; their output is added to the log.

    Args:
        launcher: deepspeed, torchrun or python (one process without rank).
        kill_at: a file; when it exists, the first process is killed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    started = []
    for rank in range(processes):
        told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        argv = [script, *map(str, flags)]
        if launcher == "deepspeed":
            argv.insert(1, f"--local_rank={rank}")
        started.append(start(*argv, log=log, **({} if launcher == "python" else told)))
    deadline = time.monotonic() + TIMEOUT
    while kill_at is not None and started[0].is_alive():
        if kill_at.exists() or time.monotonic() > deadline:
            started[0].kill()
        time.sleep(0.01)
    for process in started:
        process.join(TIMEOUT)
        if process.exitcode != 0:  # as launchers do: when one fails, all end
            for other in started:
                other.kill()
    for process in started:
        process.join()
    return [int(process.exitcode or 0) for process in started]


def start(*words: object, log: Path, **variables: str) -> BaseProcess:
    """Start what `python` does with these words; signals can be sent to it."""
    process = context().Process(target=_run, args=([*map(str, words)], variables, str(log)))
    process.start()
    return process


@cache
def programs() -> Path:
    """Return a folder with programs that run in forks of the server while this process lives."""
    folder = Path(tempfile.mkdtemp(prefix="programs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "server"))
    listener.listen()
    for name in ("python", *MODULES):
        (folder / name).write_text(PROGRAM.format(python=sys.executable, address=str(folder / "server")))
        (folder / name).chmod(0o755)
    forks = context()

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            forks.Process(target=_answer, args=(connection,)).start()
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return folder


def _answer(connection: socket.socket) -> None:
    """Run as the program that was called, with its host, descriptors, arguments, folder and variables; report the exit code to it."""
    with connection:
        _, descriptors, *_ = socket.recv_fds(connection, 1, 3)
        (program, *words), folder, variables = json.loads(connection.makefile().readline())
        _enter(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
        sys.executable = str(Path(program).with_name("python"))  # so that what it starts is a fork, too
        threading.Thread(target=lambda: connection.recv(1) or os._exit(1), daemon=True).start()
        for place, descriptor in enumerate(descriptors):
            os.dup2(descriptor, place)
            os.close(descriptor)
        sys.stdin = open(0, closefd=False)
        os.chdir(folder)
        os.environ.clear()
        os.environ |= variables
        try:
            name = Path(program).name
            _be(["-m", MODULES[name], *words] if name in MODULES else words)
            code: object = 0
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
            code = 1
        if isinstance(code, str):
            print(code, file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        connection.sendall(str(code if isinstance(code, int) else int(code is not None)).encode())


def _enter(process: int) -> None:
    """Enter the namespaces of another process (network, name, disks) where they differ."""
    for kind in ("net", "uts", "mnt"):
        if os.readlink(f"/proc/{process}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"):
            with open(f"/proc/{process}/ns/{kind}") as space:
                if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"the {kind} namespace of process {process} cannot be entered")


def _be(words: Sequence[str]) -> None:
    """Do what `python` does with these words; its processes are started as in a program that no fork server started."""
    multiprocessing.set_start_method(None, force=True)
    how, *rest = words if words[0] != "-u" else words[1:]
    if how == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif how == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        sys.path.insert(0, "")
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [how, *rest]
        sys.path.insert(0, str(Path(how).resolve().parent))
        runpy.run_path(how, run_name="__main__")


def _run(words: Sequence[str], variables: dict[str, str], log: str) -> None:
    """Do what `python` does with these words, in the repository; what it prints is added to the log."""
    os.chdir(REPOSITORY)
    os.environ |= variables
    tempfile.tempdir = None  # where the variables say now
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    _be(words)
