"""Where work on studies is done: this process or processes of this machine, or a Ray cluster. The work on one study, or on a batch of them,
is the same function.

An engine is opened as a context and is then a `map`: engine(function, *items, lost=...) yields the results in the order of the items. Where a
process was killed while it worked on an item, Ray's engine gives it to another process; `lost` (reason) makes the result of an item that has
killed too many. Processes of this machine have no such second try: the run stops, and continues when it is started again.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from med3dvlm.workers import worker_processes

ENGINES = ("local", "ray")
TRIES = 4  # of an item, before its processes have been killed so often that it is at fault
WINDOW = 10_000  # items that are given to Ray at a time: enough for its autoscaler to see how many machines are wanted

Lost = Callable[[str], Any]
Begin = Callable[..., Callable[[], Any]]  # begins the work on an item and returns a function that waits for the result


@dataclass(frozen=True)
class Engine:
    """An opened engine.

    Args:
        start: (function, lost), gives what begins the work on each item.
        workers: items that are worked on at the same time.
        window: items that are begun before the first result is waited for.
    """

    start: Callable[[Callable[..., Any], Lost], Begin]
    workers: int
    window: int = WINDOW

    def __call__(self, function: Callable[..., Any], *items: Iterable[Any], lost: Lost) -> Iterator[Any]:
        begin = self.start(function, lost)
        pending: deque[Callable[[], Any]] = deque()
        for arguments in zip(*items, strict=True):
            if len(pending) == self.window:
                yield pending.popleft()()
            pending.append(begin(*arguments))
        while pending:
            yield pending.popleft()()


def open_engine(name: str, workers: int, gpus: bool = False) -> AbstractContextManager[Engine]:
    """Return the engine of this name, one of ENGINES.

    Args:
        workers: processes of the local one; 0: this process does the work.
        gpus: each item takes a GPU, in a Ray cluster that has any.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r} is unknown; known: {', '.join(ENGINES)}")
    here = Engine(lambda function, lost: partial(partial, function), 1, 1)
    return ray_cluster(gpus) if name == "ray" else local_processes(workers) if workers else nullcontext(here)


@contextmanager
def local_processes(count: int) -> Iterator[Engine]:
    """Open an engine of so many processes of this machine."""
    with worker_processes(count) as pool:
        yield Engine(lambda function, lost: lambda *arguments: pool.submit(function, *arguments).result, count)


@contextmanager
def ray_cluster(gpus: bool = False) -> Iterator[Engine]:
    """Open an engine of the Ray cluster that RAY_ADDRESS names or that runs on this machine, or else of a cluster of this machine alone.

    Every item takes one core, and with `gpus` a GPU where there is one. All machines need this version of the package, and see the same
    files at the same paths.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        there = ray.cluster_resources()
        yield Engine(partial(_start_on_ray, int(gpus and there.get("GPU", 0) >= 1)), max(1, int(there.get("CPU", 1))))
    finally:
        if ours:
            ray.shutdown()


def _start_on_ray(gpus: int, function: Callable[..., Any], lost: Lost) -> Begin:
    import ray

    work = ray.put(function)
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD")(_call)

    def begin(*arguments: Any) -> Callable[[], Any]:
        again = partial(task.remote, _version(), work, arguments)
        return partial(_result, again(), again, lost)

    return begin


def _result(promised: Any, again: Callable[[], Any], lost: Lost) -> Any:
    """Wait for an item, which is started again where its process was killed: Ray itself would repeat for ever what takes too much memory."""
    import ray
    from ray.exceptions import LocalRayletDiedError, NodeDiedError, ObjectLostError, OutOfMemoryError, RayTaskError, WorkerCrashedError

    for left in range(TRIES - 1, -1, -1):
        try:
            return ray.get(promised)
        except RayTaskError as error:
            raise error.cause from None
        except (LocalRayletDiedError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError) as error:
            if not left:
                memory = isinstance(error, OutOfMemoryError)
                reason = "there is too little memory for it" if memory else "the process that worked on it was killed"
                return lost(f"{reason}, {TRIES} times on several machines")
            promised = again()
    raise AssertionError("the last try returns or raises")


def _version() -> str:
    return str(sys.modules["med3dvlm"].__dict__["__version__"])  # importing the whole package is not for this module


def _call(version: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Do the work on one item, in a process of Ray's."""
    import socket

    import torch

    if version != _version():
        raise ValueError(
            f"machine {socket.gethostname()} has med3dvlm {_version()}, but the run was started with {version}; install one version everywhere"
        )
    torch.set_num_threads(1)
    return function(*arguments)
