"""Start stage scripts as `deepspeed`, `torchrun` and `python` do, from a process that has imported everything already.

A launcher gives each process its rank and the address of the first by environment variables, and runs the script as __main__. So does this,
in forks of one server process: a start takes a fraction of a second, where a launcher and its imports take ten.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
IMPORTS = [
    "torch",
    "deepspeed",
    "transformers.trainer",
    "peft",
    "open_clip.loss",
    "med3dvlm.training.contrastive",
    "med3dvlm.inference.chat",
]
TIMEOUT = 300  # seconds


def context() -> ForkServerContext:
    """The server, started at first use, whose processes have one thread, see no GPU and reach no network."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(IMPORTS)
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return forks


def launch(launcher: str, processes: int, script: str, *flags: object, log: Path, kill_at: Path | None = None) -> list[int]:
    """The exit codes of the script's processes; what they print is added to the log.

    Args:
        launcher: deepspeed, torchrun or python (one process that is told nothing).
        kill_at: a file; when it is there, the first process is killed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    started, forks = [], context()
    for rank in range(processes):
        told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        argv = [script, *map(str, flags)]
        if launcher == "deepspeed":
            argv.insert(1, f"--local_rank={rank}")
        started.append(forks.Process(target=_run, args=(argv, {} if launcher == "python" else told, str(log))))
        started[-1].start()
    deadline = time.monotonic() + TIMEOUT
    while kill_at is not None and started[0].is_alive():
        if kill_at.exists() or time.monotonic() > deadline:
            os.kill(int(started[0].pid or 0), signal.SIGKILL)
        time.sleep(0.01)
    for process in started:
        process.join(TIMEOUT)
        if process.exitcode != 0:  # as launchers do: when one fails, all end
            for other in started:
                other.kill()
    for process in started:
        process.join()
    return [int(process.exitcode or 0) for process in started]


def _run(argv: list[str], variables: dict[str, str], log: str) -> None:
    os.chdir(REPOSITORY)
    os.environ |= variables
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
