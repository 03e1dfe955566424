"""Files at an address, fetched with patience: what may pass is tried again, what cannot is one sentence.

fsspec brings the file systems (s3fs for s3://, gcsfs for gs://, aiohttp for https://) and their credentials, from the environment or its own
configuration. Its asynchronous ones do not survive a fork, so each process opens its own.
"""

import errno
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 8  # of a file while the work goes on: a minute
FIRST_TRIES = 4  # of the first file: seconds
PATIENCE = 60.0  # seconds until an answer
SLOWEST = 200_000  # bytes a second, on average, that are waited for
LONGEST_PAUSE = 20.0  # seconds between two tries
LATER = (408, 425, 429)  # HTTP's words for: try again. So are all from 500
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")  # of boto and Google
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # faults of the disk that is written to
DEFECTS = (AttributeError, AssertionError, ImportError, LookupError, NameError, NotImplementedError, TypeError)


def is_address(place: object) -> bool:
    """Whether it is "scheme://...": no path of this machine."""
    return isinstance(place, str) and re.match(r"[A-Za-z][\w+.-]*://", place) is not None


class Address:
    """A folder at such an address.

    Raises:
        ValueError: the address names no file system that is known, or holds what belongs into the environment.
        ImportError: the package of its file system is missing.
    """

    def __init__(self, address: str, patience: float = PATIENCE) -> None:
        from fsspec import available_protocols, get_filesystem_class

        self.address, self.patience = address.rstrip("/"), patience
        self.http = self.address.startswith(("http://", "https://"))
        scheme = self.address.split("://")[0].split("::")[0]
        if self.http and re.search(r"[?#]|//[^/]*@", self.address):
            shown = re.sub(r"//[^/]*@", "//", self.address).split("?")[0]
            raise ValueError(f"{shown} comes with a password, a query or a fragment; write the plain address of the folder")
        if scheme not in available_protocols():
            raise ValueError(
                f"{self.address}: {scheme}:// is not a kind of address that fsspec knows; write s3://, gs://, https:// or a path"
            )
        get_filesystem_class(scheme)
        self.key = hashlib.sha256(self.address.encode()).hexdigest()[:16]  # names a folder for it
        self._opened: tuple[int, Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _file_system(self) -> tuple[Any, str]:
        """Return the file system of this process, and the folder's path in it."""
        if self._opened is None or self._opened[0] != os.getpid():
            from fsspec.core import url_to_fs

            self._opened = (os.getpid(), *url_to_fs(self.address))
        return self._opened[1:]

    def fetch(
        self, name: str, path: Path, check: Callable[[Path], None] = lambda path: None, expected: int = 0, tries: int = TRIES
    ) -> None:
        """Write the file of this name to `path`.

        Args:
            check: (path), raises ValueError where the file is not whole; then it is fetched again.
            expected: bytes, roughly; more are waited for longer.

        Raises:
            FileNotFoundError, PermissionError, OSError: one sentence.
        """

        def get() -> None:
            self.ask("get_file", self.place(name), str(path), expected=expected)
            check(path)

        self.patiently(name, get, tries)

    def patiently(self, name: str, action: Callable[[], T], tries: int = TRIES) -> T:
        """Return what the action on a file gives, after some tries; raises as `fetch`."""
        pause = 0.5
        for left in range(tries - 1, -1, -1):
            try:
                return action()
            except DEFECTS:
                raise
            except Exception as error:  # each file system has errors of its own
                if isinstance(error, FileExistsError) or (isinstance(error, OSError) and error.errno in LOCAL):
                    raise
                reason, passes = self._explained(error)
                if not passes or not left:
                    raise self._final(name, error, reason, passes) from error
                logger.warning("%s: %s; trying again", f"{self.address}/{name}".rstrip("/"), reason)
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1))  # many processes that failed together come back one by one
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("the last try returns or raises")

    def place(self, name: str) -> str:
        """Return the path of a file of this name in its file system, of the folder itself without a name."""
        root = self._file_system()[1]
        return f"{root}/{quote(name) if self.http else name}" if name else root

    def ask(self, operation: str, *arguments: Any, expected: int = 0, **options: Any) -> Any:
        """Return one result of the file system, within the time that so many bytes may take."""
        from fsspec.asyn import sync

        fs, _ = self._file_system()
        if not fs.async_impl:
            return getattr(fs, operation)(*arguments, **options)
        return sync(fs.loop, getattr(fs, f"_{operation}"), *arguments, timeout=self.patience + expected / SLOWEST, **options)

    def _explained(self, error: Exception) -> tuple[str, bool]:
        """Describe an error without secrets; return that and whether it may be temporary."""
        status = getattr(error, "status", None)
        if isinstance(error, FileNotFoundError):
            return "it is not there", False
        if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in NO_CREDENTIALS:
            return "access is refused", False
        if isinstance(status, int) and status >= 400:
            return f"the server answers with status {status}", status >= 500 or status in LATER
        if isinstance(error, TimeoutError):  # asyncio's and fsspec's are, too
            return f"no whole answer came in {self.patience:g} s", True
        if isinstance(error, ValueError):
            return str(error), True
        what = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
        return f"the connection fails ({what})", True

    def _final(self, name: str, error: Exception, reason: str, passes: bool) -> Exception:
        place = f"{self.address}/{name}".rstrip("/")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(f"{place} is not there; check the address")
        if not passes and reason == "access is refused":
            return PermissionError(f"{place}: access is refused; check the rights, and the credentials in the environment of this process")
        remedy = "check address and network, and run the command again" if passes else "check the address"
        return OSError(f"{place}: {reason}; {remedy}")
