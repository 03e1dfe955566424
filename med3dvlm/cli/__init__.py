"""The command line: `med3dvlm COMMAND --help` says what each takes.

Results go to stdout; warnings, progress and notices to stderr. The exit code is 0, or 1 where `prepare` had to leave studies
out, or 2 with one sentence where the input or the place of the output is at fault, or 130 after Ctrl+C. Files appear under
their names when they are whole.
"""

# Each group of commands stands in a module of its own, which imports at its top only what starts at once: torch, transformers and the
# file formats are imported by the command that needs them.

import argparse
import errno
import logging
import re
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor

from safetensors import SafetensorError

from med3dvlm.cli import cases, data, models, scans, segment

REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run the command again",
    errno.EDQUOT: "your share of the disk is full; free some space and run the command again",
    errno.EFBIG: "the file grows larger than is allowed here; write to another disk",
    errno.EACCES: "access is not permitted; choose another place or ask for the right",
    errno.EPERM: "access is not permitted; choose another place or ask for the right",
    errno.EROFS: "this disk can only be read; choose another place",
    errno.ENOENT: "there is no such file or folder; check the path",
    errno.ENOTDIR: "a part of this path is a file, not a folder; check the path",
    errno.EEXIST: "a file of this name stands where a folder is needed; choose another name",
    errno.EISDIR: "this is a folder but a file is needed; check the path",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return arguments.run(arguments) or 0
    except (OSError, ValueError, SafetensorError, BrokenExecutor) as error:
        if arguments.traceback:
            raise
        print(f"med3dvlm: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("med3dvlm: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="med3dvlm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traceback", action="store_true", help="where something fails, show the place in the code")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (scans, data, models, segment, cases):
        group.add_commands(commands)
    return parser


def _sentence(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        return place + REASONS.get(error.errno, error.strerror or str(error))
    if isinstance(error, SafetensorError):
        code = re.search(r"os error (\d+)", str(error))
        return f"a weights file: {REASONS.get(int(code[1]) if code else 0, str(error))}"
    if isinstance(error, BrokenExecutor):
        return "a worker process was killed, perhaps for want of memory; run the command again with fewer --workers"
    return " ".join(str(error).split()) or type(error).__name__
