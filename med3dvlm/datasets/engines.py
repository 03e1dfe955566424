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
from functools import partial
from typing import Any, Protocol

from med3dvlm.workers import worker_processes

ENGINES = ("local", "ray")
TRIES = 4  # of an item, before its processes have been killed so often that it is at fault
WINDOW = 10_000  # items that are given to Ray at a time: enough for its autoscaler to see how many machines are wanted

Lost = Callable[[str], Any]


class Engine(Protocol):
    """An opened engine."""

    def __call__(self, function: Callable[..., Any], *items: Iterable[Any], lost: Lost) -> Iterator[Any]: ...


def open_engine(name: str, workers: int, gpus: bool = False) -> AbstractContextManager[Engine]:
    """Return the engine of this name, one of ENGINES.

    Args:
        workers: processes of the local one; 0: this process does the work.
        gpus: each item takes a GPU, in a Ray cluster that has any.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r} is unknown; known: {', '.join(ENGINES)}")
    return ray_cluster(gpus) if name == "ray" else local_processes(workers) if workers else nullcontext(_run_here)


def _run_here(function: Callable[..., Any], *items: Iterable[Any], lost: Lost) -> Iterator[Any]:
    return map(function, *items)


@contextmanager
def local_processes(count: int) -> Iterator[Engine]:
    """Open an engine of so many processes of this machine."""
    with worker_processes(count) as pool:

        def run(function: Callable[..., Any], *items: Iterable[Any], lost: Lost) -> Iterator[Any]:
            return pool.map(function, *items)

        yield run


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
        yield partial(_run_on_ray, int(gpus and ray.cluster_resources().get("GPU", 0) >= 1))
    finally:
        if ours:
            ray.shutdown()


def _run_on_ray(gpus: int, function: Callable[..., Any], *items: Iterable[Any], lost: Lost) -> Iterator[Any]:
    import ray

    work = ray.put(function)
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD")(_call)
    pending: deque[tuple[Any, tuple[Any, ...]]] = deque()
    for arguments in zip(*items, strict=True):
        if len(pending) == WINDOW:
            yield _result(task, work, *pending.popleft(), lost)
        pending.append((task.remote(_version(), work, arguments), arguments))
    while pending:
        yield _result(task, work, *pending.popleft(), lost)


def _result(task: Any, work: Any, promised: Any, arguments: tuple[Any, ...], lost: Lost) -> Any:
    """Wait for an item, which is started again where its process was killed: Ray itself would repeat for ever what takes too much memory."""
    import ray
    from ray.exceptions import LocalRayletDiedError, NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

    for left in range(TRIES - 1, -1, -1):
        try:
            return ray.get(promised)
        except RayTaskError as error:
            raise error.cause from None
        except (LocalRayletDiedError, NodeDiedError, OutOfMemoryError, WorkerCrashedError) as error:
            if not left:
                memory = isinstance(error, OutOfMemoryError)
                reason = "memory does not suffice for it" if memory else "the process that worked on it was killed"
                return lost(f"{reason}, {TRIES} times on several machines")
            promised = task.remote(_version(), work, arguments)
    raise AssertionError("the last try returns or raises")


def _version() -> str:
    return str(sys.modules["med3dvlm"].__dict__["__version__"])  # importing the whole package is not for this module


def _call(version: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Do the work on one item, in a process of Ray's."""
    import socket

    import torch

    if version != _version():
        raise ValueError(
            f"machine {socket.gethostname()} has med3dvlm {_version()}, and {version} was started; install one version everywhere"
        )
    torch.set_num_threads(1)
    return function(*arguments)
