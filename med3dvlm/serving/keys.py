"""API keys: a file with one key a line, optionally after a name.

anna sk-8f0c...
# a comment
"""

import hashlib
import hmac
from pathlib import Path

MIN_LENGTH = 16


class Keys:
    """API keys read from a file. Hashes are compared, all of them each time, so that the time reveals nothing."""

    def __init__(self, names: dict[str, str]) -> None:
        self._owners = [(hashlib.sha256(key.encode()).digest(), name) for key, name in names.items()]

    @classmethod
    def load(cls, path: Path) -> "Keys":
        """Read the file. Raises OSError, or ValueError where a line is not a key. No key is quoted."""
        names: dict[str, str] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) > 2 or len(words[-1]) < MIN_LENGTH:
                raise ValueError(
                    f"{path}, line {number}: a line must be NAME KEY, or KEY alone, with a KEY of at least {MIN_LENGTH} characters."
                )
            if words[-1] in names:
                raise ValueError(f"{path}, line {number}: this key is there twice; give each name its own.")
            names[words[-1]] = words[0] if len(words) == 2 else f"key {number}"
        if len(set(names.values())) < len(names):
            raise ValueError(f"{path}: two keys have the same name; give each its own.")
        if not names:
            raise ValueError(f"{path} holds no key; write one a line, such as `openssl rand -hex 24` gives.")
        return cls(names)

    def owner(self, authorization: str) -> str | None:
        """Return the name of the key in the header "Bearer KEY"; None for any other key."""
        scheme, _, key = authorization.partition(" ")
        given, found = hashlib.sha256(key.strip().encode()).digest(), None
        for known, name in self._owners:
            if hmac.compare_digest(known, given):
                found = name
        return found if scheme.lower() == "bearer" else None
