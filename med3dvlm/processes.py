"""The processes of one training, on one node or several: what they tell each other outside of its steps.

A node is a machine. Without a process group each function is that of a process alone.
"""

import secrets
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from med3dvlm.programs import complain, user_message

T = TypeVar("T")
P = ParamSpec("P")
CHUNK = 2**26  # bytes of a file that are sent at a time
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")  # in the words of torch's backends


def rank_and_count() -> tuple[int, int]:
    """Return this process's number, from 0, and the number of processes."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)


@contextmanager
def connected(remedy: str = "start the same command on all nodes again") -> Iterator[None]:
    """Raise ConnectionError, one sentence, where another process or node has ended, or cannot be reached, within the context."""
    try:
        yield
    except RuntimeError as error:
        rank, count = rank_and_count()
        known = isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in LOST)
        if count == 1 or not known:
            raise
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"process {rank} on node {socket.gethostname()} lost the connection to another one, which has ended or cannot be reached: its own log "
            f"says why; {remedy} ({reason[:200]})"
        ) from error


def gathered(value: T) -> list[T]:
    """Return the values of all processes, in their order."""
    _, count = rank_and_count()
    if count == 1:
        return [value]
    values: list[T | None] = [None] * count
    with connected():
        torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def together(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Return the function's result. Where it fails in one process all end, and the first one raises the error with the name of the node.

    The function itself may not wait for other processes.
    """
    if rank_and_count()[1] == 1:
        return function(*arguments, **options)
    failure: Exception | None = None
    try:
        result = function(*arguments, **options)
    except Exception as error:
        failure = error
    sentence = None if failure is None else user_message(failure)
    if failure is not None and sentence is None:
        traceback.print_exception(failure)
        sentence = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
    require_all(sentence)
    return result


def require_all(complaint: str | None) -> None:
    """End all processes where one has something to complain of. The first process says so, once, before any of them leaves.

    Raises:
        SystemExit: with code 2, in all processes.
    """
    rank, count = rank_and_count()
    complaints = gathered(None if complaint is None else (complaint, socket.gethostname()))
    found = {each[0]: (number, each[1]) for number, each in reversed(list(enumerate(complaints))) if each is not None}
    if not found:
        return
    if rank == 0:
        sentence, (number, node) = min(found.items(), key=lambda item: item[1])
        everywhere = len(found) == 1 and None not in complaints
        complain(sentence if everywhere or count == 1 else f"node {node} (process {number} of {count}): {sentence}")
        sys.stderr.flush()
    gathered(None)  # a launcher kills the others when one ends
    raise SystemExit(2)


def sharing(folder: Path) -> list[int]:
    """Return the processes that see the same folder as this one, including itself: those of its node, or all where the disk is shared.

    Each writes a file for a moment, and looks which of the others' are there.
    """
    rank, count = rank_and_count()
    if count == 1:
        return [0]
    word = gathered(secrets.token_hex(8))[0]
    together(folder.mkdir, parents=True, exist_ok=True)
    probes = [folder / f".{word}-{number}" for number in range(count)]
    together(probes[rank].touch)
    seen = [number for number, probe in enumerate(probes) if probe.exists()]
    gathered(None)  # all have looked
    probes[rank].unlink()
    return seen


def send_files(root: Path, names: Sequence[str], source: int, receives: bool) -> None:
    """Copy files below a folder from the disk of one process to those that ask for them. All processes call it.

    Args:
        names: paths below `root`; those of the source count.
        receives: whether this process writes what it gets.
    """
    rank, _ = rank_and_count()
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    with connected():
        sizes = [(name, (root / name).stat().st_size) for name in names] if rank == source else []
        for name, size in gathered(sizes)[source]:
            path = root / name
            if receives:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"")
            for start in range(0, size, CHUNK):
                part = torch.empty(min(CHUNK, size - start), dtype=torch.uint8)
                if rank == source:
                    with path.open("rb") as file:
                        file.seek(start)
                        part = torch.frombuffer(bytearray(file.read(len(part))), dtype=torch.uint8)
                part = part.to(device)
                torch.distributed.broadcast(part, source)
                if receives:
                    with path.open("ab") as file:
                        file.write(part.cpu().numpy().tobytes())
