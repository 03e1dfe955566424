"""Atomic writes: each file is written under a temporary name, synced to disk and renamed, so that it exists whole or not at all.

JSON and JSON lines are UTF-8. A line ends at "\\n" alone: a text may hold the other characters that Python's splitlines cuts at.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

DETECTOR_FILE = "out_of_distribution.safetensors"  # beside a model: how far a scan lies from the scans that it was trained on
PART = ".part"  # ends the name of a file that is being written
MODEL_CONFIGS = ("config.json", "adapter_config.json")  # transformers or PEFT recognises a model's folder by one of them


def checksum(content: Any) -> str:
    """Return the XXH3 of bytes, or of a contiguous array's bytes, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(content)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return the text of such a file."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return for each setting of `now` that was another before what it was and is, as in "split (test, not validation)".

    Settings that are tables, as that of versions is, are compared key by key.
    """
    found: list[str] = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            found += (f"{name}: {each}" for each in differences(old, value))
        elif old != value:
            found.append(f"{name} ({json.dumps(old)}, not {json.dumps(value)})")
    return found


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records as JSON lines."""
    write_text(path, json_lines(records))


def json_lines(records: Iterable[dict[str, Any]]) -> str:
    """Return the text of a JSON-lines file."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8."""
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="")


def read_lines(path: Path, repair: bool = False) -> list[dict[str, Any]]:
    """Read the records of a JSON-lines file, none where there is no file. Half a line at its end is ignored, and with `repair` cut off.

    Raises:
        ValueError: a whole line is not valid JSON.
    """
    content = path.read_bytes() if path.is_file() else b""
    *whole, rest = content.split(b"\n")
    if repair and rest:
        with path.open("r+b") as file:
            file.truncate(len(content) - len(rest))
    records = []
    for number, line in enumerate(whole, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not valid JSON ({error}); delete the file and run again") from error
    return records


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield a temporary path beside `destination`; the file is renamed to `destination` when it is on the disk, and deleted on failure.

    Its own name is hidden, ends in PART and is nobody else's, so that processes, of several machines even, may write one destination.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = destination.with_name(f".{uuid.uuid4().hex}{PART}")
    try:
        yield aside
        share(aside)
        with aside.open("r+b") as file:
            os.fsync(file.fileno())  # or a machine that loses power might keep the new name of an empty file
        aside.replace(destination)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `destination`, which is renamed to `destination` when all is written, and deleted on failure.

    Raises:
        FileExistsError: `destination` exists and is not empty.
    """
    require_free(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        yield aside
        share(aside)
        aside.replace(destination)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def share(path: Path) -> None:
    """Give a file, or a folder with its content, the permissions of newly made files: libraries make temporary folders and weights private."""
    umask = os.umask(0o022)
    os.umask(umask)
    for one in (path, *path.rglob("*")):
        if not one.is_symlink():
            one.chmod((0o777 if one.is_dir() else 0o666) & ~umask)


def require_free(destination: Path) -> None:
    """Raise FileExistsError where `destination` exists and is not an empty folder, before any work is done."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists and would be overwritten; delete it or choose another name")


def install_model(aside: Path, folder: Path) -> None:
    """Replace the model in `folder` by the one saved in `aside`; at no time does the folder hold parts of both.

    The configuration, without which a folder is no model, goes first and comes last. Old weights go with what was measured on them
    (out-of-distribution detection); any other file stays.
    """
    share(aside)
    if not folder.exists() or not any(folder.iterdir()):
        aside.replace(folder)
        return
    for path in (*(folder / name for name in MODEL_CONFIGS), *folder.glob("*.safetensors*")):
        path.unlink(missing_ok=True)
    for path in sorted(aside.iterdir(), key=lambda path: path.name in MODEL_CONFIGS):
        if path.is_dir():  # a model within
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    aside.rmdir()
