"""Run programs: their flags, their names, and their error messages.

A program is a module with `main(argv: Sequence[str] | None = None) -> int | None`, which parses with `Parser`. `run` calls it, for the
command line, the scripts and `python -m` alike, and returns the exit code: 0, or what main returns; 2 with one sentence where the input, a
setting or the place of the output is at fault; 130 after Ctrl+C. A defect keeps its traceback; --traceback shows it for every error.
"""

import argparse
import errno
import logging
import re
import shlex
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError

Main: TypeAlias = Callable[[Sequence[str] | None], int | None]

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
# Extra of the package -> the modules that it brings.
EXTRAS = {
    "train": ("accelerate", "deepspeed", "ninja", "open_clip", "peft", "torchvision"),
    "evaluate": ("bert_score", "evaluate", "nltk", "rouge_score", "sacrebleu", "sklearn"),
    "chat": ("gradio", "starlette"),
    "mcp": ("mcp",),
    "run": ("jsonschema", "pyarrow"),
    "serve": ("fastapi", "prometheus_client", "python_multipart", "uvicorn"),
    "search": ("datasketch", "faiss"),
    "dicom": ("highdicom",),
    "gguf": ("gguf",),
    "quantize": ("bitsandbytes",),
    "cloud": ("aiohttp",),
    "ray": ("ray",),
    "s3": ("s3fs",),
    "gs": ("gcsfs",),
}
# What torch makes of an error in a loader's worker: its whole traceback as a text, of which the last place and the message are wanted.
IN_WORKER = re.compile(
    r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback.*\n"
    r"  File \"(?P<file>[^\"]+)\", line \d+.*?\n(?=\w)[\w.]+: (?P<sentence>.*)",
    re.S,
)
CHATTY = ("bitsandbytes.backends.cpu.ops",)  # warns, when PEFT imports it, of a faster kernel that could be downloaded
BOOLEANS = dict.fromkeys(("true", "yes", "1"), True) | dict.fromkeys(("false", "no", "0"), False)

# The name of the program that runs, how it was called, and its words.
_running: ContextVar[tuple[str, str, Sequence[str]] | None] = ContextVar("running", default=None)


def run(program: str | Main, argv: Sequence[str] | None = None, name: str | None = None) -> int:
    """Run a program; returns its exit code.

    Args:
        program: its module or its main function. A module is imported here, so that one that needs a missing extra says which.
        argv: its words, those of this process by default.
        name: what it is called in messages, the name of the file that was started by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    called, name = name or sys.argv[0], name or Path(sys.argv[0]).name
    outer = _running.get()
    wants_traceback = "--traceback" in [*words, *(outer[2] if outer else ())]
    token = _running.set((name, called, words))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for library in CHATTY:
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        main: Main = import_module(program).main if isinstance(program, str) else program
        return main([word for word in words if word != "--traceback"]) or 0
    except (ImportError, OSError, ValueError, SafetensorError, BrokenExecutor) as error:
        sentence = user_message(error)
        if wants_traceback or sentence is None:
            raise
        complain(sentence)
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted; started again, the same command continues\n")
        return 130
    finally:
        _running.reset(token)


def complain(sentence: str) -> None:
    """Say what is wrong, in the name of the program that runs."""
    running = _running.get()
    sys.stderr.write(f"{running[0] if running else Path(sys.argv[0]).name}: error: {sentence}\n")


def command_line() -> str:
    """Return the running program and its arguments, for the record of a run."""
    _, called, words = _running.get() or ("", sys.argv[0], sys.argv[1:])
    return f"{called} {shlex.join(words)}".strip()


def user_message(error: Exception) -> str | None:
    """Return the error in one line if the user can fix it; None for a defect: an error of a library over arguments of ours."""
    if isinstance(error, ImportError):
        return _missing_extra(error)
    if isinstance(error, (OSError, ValueError)) and (match := IN_WORKER.match(str(error))):
        ours = isinstance(error, OSError) or Path(__file__).resolve().parent in Path(match["file"]).resolve().parents
        return " ".join(match["sentence"].split()) if ours else None
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        return place + REASONS.get(error.errno, error.strerror or str(error))
    if isinstance(error, SafetensorError):
        code = re.search(r"os error (\d+)", str(error))
        return f"a weights file: {REASONS.get(int(code[1]) if code else 0, str(error))}"
    if isinstance(error, BrokenExecutor):
        return "a worker process was killed, perhaps for lack of memory; run the command again with fewer --workers"
    if isinstance(error, ValueError) and _raised_in_library(error):
        return None
    return " ".join(str(error).split()) or type(error).__name__


def _missing_extra(error: ImportError) -> str | None:
    """Return which extra to install, where one of its modules is missing. transformers names accelerate in a text only."""
    words = {error.name.split(".")[0]} if error.name else set(re.findall(r"\w+", str(error)))
    for extra, modules in EXTRAS.items():
        if found := sorted(words & set(modules)):
            return f"{found[0]} is not installed, which this needs; install it by: pip install 'med3dvlm[{extra}]'"
    return None


def _raised_in_library(error: Exception) -> bool:
    """Return whether an installed library's code raised it, not ours."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename).resolve().parents if frames else ()
    libraries = {
        Path(path).resolve() for name, path in sysconfig.get_paths().items() if name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    return Path(__file__).resolve().parent not in raised_in and not libraries.isdisjoint(raised_in)


class Parser(argparse.ArgumentParser):
    """An argparse parser with one style of options.

    "_" and "-" are the same in the name of an option, and help shows "-". A flag (argparse.BooleanOptionalAction, see `add_flag`) is --name or
    --no-name, and --name true or --name false is understood, too. A parser is called what the program is that runs.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        running = _running.get()
        if running:
            options.setdefault("prog", running[0])
        super().__init__(*arguments, **options)
        self.add_argument("--traceback", action="store_true", help="on an error, show the place in the code")

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument as argparse does; option names are spelled with "-"."""
        return super().add_argument(*dict.fromkeys(map(_spelled, names)), **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; all its other ways to parse call this."""
        return super().parse_known_args(self._translated(sys.argv[1:] if args is None else args), namespace)

    def _translated(self, words: Sequence[str]) -> list[str]:
        end = words.index("--") if "--" in words else len(words)
        given: list[str] = []
        for word in words[:end]:
            name, equals, value = _spelled(word).partition("=")
            if equals and self._is_flag(name) and value.lower() in BOOLEANS:
                given.append(name if BOOLEANS[value.lower()] else f"--no-{name[2:]}")
            elif given and self._is_flag(given[-1]) and word.lower() in BOOLEANS:
                if not BOOLEANS[word.lower()]:
                    given[-1] = f"--no-{given[-1][2:]}"
            else:
                given.append(_spelled(word))
        return [*given, *words[end:]]

    def _is_flag(self, name: str) -> bool:
        return (
            isinstance(self._option_string_actions.get(name), argparse.BooleanOptionalAction)
            and f"--no-{name[2:]}" in self._option_string_actions
        )


def _spelled(word: str) -> str:
    """Return a word with "-" in place of "_" where it names an option."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def add_flag(parser: argparse.ArgumentParser, name: str, default: bool, explanation: str) -> None:
    """Add `--name` and `--no-name`."""
    text = f"{explanation} (default: {'yes' if default else 'no'})"
    parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=text)


def positive(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
