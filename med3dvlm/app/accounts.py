"""Accounts of a shared workstation: a file of names and hashed passwords. This program writes it, and the chat reads it by --auth-file.

    med3dvlm accounts accounts.json anna            # asks for the password; a name that is there gets a new one
    med3dvlm chat outputs/demo/model --auth-file accounts.json --host 0.0.0.0

A password is kept as scrypt's hash with a salt of its own (RFC 7914; n = 2^15, r = 8, p = 1: 32 MiB and about a tenth of a second a guess).
"""

import asyncio
import getpass
import hashlib
import hmac
import json
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from med3dvlm.files import PART
from med3dvlm.programs import Parser

MIN_LENGTH = 8
SECONDS_AFTER_WRONG = 1.0
COST = {"n": 2**15, "r": 8, "p": 1, "maxmem": 2**26}


class Accounts:
    """Accounts read from a file. Gradio calls `allows`."""

    def __init__(self, hashes: dict[str, str]) -> None:
        self._hashes = hashes
        self._nobody = hashed("", os.urandom(16))  # so that an unknown name takes as long as a known one
        self._few = asyncio.Semaphore(2)  # two checks at a time, as each takes 32 MiB and a core

    @classmethod
    def load(cls, path: Path) -> "Accounts":
        """Read the accounts. Raise FileNotFoundError or ValueError for a file that is missing, of another kind, or empty."""
        if not path.is_file():
            raise FileNotFoundError(f"There is no accounts file {path}; make one with `med3dvlm accounts {path} NAME`.")
        try:
            hashes = json.loads(path.read_text(encoding="utf-8-sig"))
            if not all(isinstance(value, str) and len(bytes.fromhex(value)) == 48 for value in hashes.values()):
                raise ValueError("an entry is not a hash")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not an accounts file ({error}); make another with `med3dvlm accounts FILE NAME`.") from None
        if not hashes:
            raise ValueError(f"{path} holds no account; add one with `med3dvlm accounts {path} NAME`.")
        return cls(hashes)

    async def allows(self, name: str, password: str) -> bool:
        """Return whether name and password match. After a wrong password this client waits a second; guard.py limits how often a client may
        try.
        """
        async with self._few:
            fits = await asyncio.to_thread(self, name, password)
        if not fits:
            await asyncio.sleep(SECONDS_AFTER_WRONG)
        return fits

    def __call__(self, name: str, password: str) -> bool:
        kept = bytes.fromhex(self._hashes.get(name, self._nobody))
        return hmac.compare_digest(kept, bytes.fromhex(hashed(password, kept[:16]))) and name in self._hashes


def hashed(password: str, salt: bytes) -> str:
    """Return salt (16 bytes) and hash (32 bytes) as hexadecimal digits."""
    return (salt + hashlib.scrypt(password.encode(), salt=salt, dklen=32, **COST)).hex()


def add(path: Path, name: str, password: str) -> None:
    """Set the password of `name` in the file, which is created if missing and readable by its owner alone.

    Raises:
        ValueError: the name is empty, the password too short, or the file of another kind.
    """
    if not name.strip() or name != name.strip():
        raise ValueError(f"The name is {name!r} but must be a word without spaces around it.")
    if len(password) < MIN_LENGTH:
        raise ValueError(f"The password has {len(password)} characters but needs at least {MIN_LENGTH}.")
    hashes = Accounts.load(path)._hashes if path.exists() else {}
    aside = path.with_name(f".{uuid.uuid4().hex}{PART}")
    aside.touch(mode=0o600, exist_ok=False)  # `atomic_file` would let others read it
    try:
        aside.write_text(json.dumps(hashes | {name: hashed(password, os.urandom(16))}, indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Ask for a password (or read it from a pipe) and keep its hash. Raises ValueError as `add` does."""
    parser = Parser(description="Add an account for the chat, or give it a new password.")
    parser.add_argument("file", type=Path, help="the accounts file, created where it does not exist")
    parser.add_argument("name", help="name of the account")
    arguments = parser.parse_args(argv)
    password = getpass.getpass(f"Password for {arguments.name}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    add(arguments.file, arguments.name, password)
    print(f"{arguments.file} now has an account for {arguments.name}")
