"""Files that are there whole or not at all: each is written aside and renamed.

JSON and JSON lines are UTF-8. A line ends at "\\n" alone: a text may hold the other characters that Python's splitlines cuts at.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODEL_CONFIGS = ("config.json", "adapter_config.json")  # by one of them transformers or PEFT knows a folder as a model


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    _write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records that are all known as JSON lines."""
    _write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_lines(path: Path, repair: bool = False) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, none where there is no file. Half a line at its end is left out and with `repair` cut off.

    Raises:
        ValueError: a whole line is no JSON.
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
            raise ValueError(f"{path} line {number} is no JSON ({error}); delete the file and run again") from error
    return records


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` to write to, which takes its name when all is written, and is deleted when something fails.

    Raises:
        FileExistsError: `destination` exists and is not empty.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists and would be overwritten; delete it or choose another name")
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        yield aside
        umask = os.umask(0o022)
        os.umask(umask)
        aside.chmod(0o777 & ~umask)  # a temporary folder is closed to others
        aside.replace(destination)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def install_model(aside: Path, folder: Path) -> None:
    """Move a saved model from `aside` into `folder`, which holds the old model, none, or the new one, at no time parts of both.

    The configuration, without which a folder is no model, goes first and comes last. Old weights go with what was measured on them
    (familiarity); any other file stays.
    """
    if not folder.exists() or not any(folder.iterdir()):
        aside.replace(folder)
        return
    for path in (*(folder / name for name in MODEL_CONFIGS), *folder.glob("*.safetensors*")):
        path.unlink(missing_ok=True)
    for path in sorted(aside.iterdir(), key=lambda path: path.name in MODEL_CONFIGS):
        path.replace(folder / path.name)
    aside.rmdir()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
