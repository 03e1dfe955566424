"""The scans of a server: uploaded, read and encoded once, private to their owner, and kept for a limited time.

Files lie in the server's private folder while they are read; what is kept is the encoder's output, which the questions need.
"""

import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from torch import Tensor

from med3dvlm.app.scans import natural_key, read_without_paths, take_uploads, upload_ending
from med3dvlm.app.viewer import describe
from med3dvlm.inference.out_of_distribution import Features
from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.serving.errors import Refused
from med3dvlm.volume import Volume

BLOCK = 2**20


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Args:
        upload_bytes: of one upload.
        scans, all_scans: of one owner, and in all.
        scan_seconds: for which a scan is kept after its last use.
        answer_seconds: after which an answer ends as it is.
        waiting: requests that wait for the engine; more are refused.
    """

    upload_bytes: int = 2**30
    scans: int = 64
    all_scans: int = 1024
    scan_seconds: float = 3600.0
    answer_seconds: float = 600.0
    waiting: int = 256


@dataclass(eq=False)
class KnownScan:
    """`outside` says that the scan is unlike the training data, where it is; `embedding` (P,) is the contrastive model's, where there is one.
    `digest` is that of a scan which came within a message and is known again by its bytes."""

    id: str
    owner: str
    features: Features
    facts: dict[str, str]
    warnings: tuple[str, ...]
    outside: str | None
    embedding: Tensor | None = None
    digest: str | None = None
    volume: Volume | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    used: float = field(default_factory=time.monotonic)

    def shown(self, seconds: float) -> dict[str, Any]:
        names = ("id", "created", "facts", "warnings")
        expires = int(time.time() + self.used + seconds - time.monotonic()) if seconds else None
        shown = {name: getattr(self, name) for name in names}
        return {"object": "scan", **shown, "expires_at": expires, "outside_training_data": self.outside, "notice": RESEARCH_NOTICE}


class Scans:
    """Reads uploaded scans and keeps their features.

    Args:
        chat: the Med3DChat that encodes them.
        folder: where files lie while they are read.
        embedder: a contrastive model, see `search.Embedder`.
    """

    def __init__(self, chat: Any, folder: Path, limits: Limits, embedder: Any = None) -> None:
        self.chat, self.folder, self.limits, self.embedder = chat, folder, limits, embedder
        self._lock, self.reading = Lock(), Lock()  # the latter, while the encoder works: its memory is for one scan at a time
        self._known: dict[str, KnownScan] = {}
        self._expected = Counter[str]()  # scans of each owner that are being read

    def add(self, owner: str, files: Sequence[tuple[str, BinaryIO]], series: int | None = None) -> KnownScan:
        """Read a scan from one file, or in all files of a series, and encode it.

        Raises:
            Refused: there is no room.
            VolumeError: they hold no scan, or too many bytes.
        """
        return self._add(owner, files, series)

    def from_bytes(self, owner: str, content: bytes, name: str = "") -> KnownScan:
        """Add the scan of a message; the same bytes again are the same scan."""
        digest = hashlib.sha256(content).hexdigest()
        with self._lock:
            self._forget()
            found = next((scan for scan in self._known.values() if (scan.owner, scan.digest) == (owner, digest)), None)
            if found is not None:
                found.used = time.monotonic()
                return found
        return self._add(owner, [(name, BytesIO(content))], None, digest)

    def get(self, owner: str, id: str) -> KnownScan:
        """Return a scan. Raises Refused where the owner has no such scan, or no longer has it."""
        with self._lock:
            self._forget()
            scan = self._known.get(id)
            if scan is None or scan.owner != owner:
                raise Refused(
                    404, "There is no scan of this id; it may have expired or been deleted: upload it again.", "scan", "scan_not_found"
                )
            scan.used = time.monotonic()
            return scan

    def of(self, owner: str) -> list[KnownScan]:
        with self._lock:
            self._forget()
            return [scan for scan in self._known.values() if scan.owner == owner and scan.digest is None]

    def delete(self, owner: str, id: str) -> None:
        self.get(owner, id)
        with self._lock:
            self._known.pop(id, None)

    def __len__(self) -> int:
        return len(self._known)

    def forget(self) -> None:
        """Let go of the scans that have expired."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        now = time.monotonic()
        for id in [id for id, scan in self._known.items() if now - scan.used > self.limits.scan_seconds]:
            del self._known[id]

    def _add(self, owner: str, files: Sequence[tuple[str, BinaryIO]], series: int | None, digest: str | None = None) -> KnownScan:
        """Read a scan, for which a place is held meanwhile."""
        self._reserve(owner)
        scan = None
        try:
            scan = self._read(owner, files, series, digest)
        finally:
            with self._lock:
                self._expected[owner] -= 1
                self._expected = +self._expected  # without those who wait for none
                if scan is not None:
                    self._known[scan.id] = scan
        return scan

    def _reserve(self, owner: str) -> None:
        """Reserve room for a scan; where needed, the owner's least recently used scan that came within a message is deleted."""
        with self._lock:
            self._forget()
            own = [scan for scan in self._known.values() if scan.owner == owner]
            if len(own) + self._expected[owner] >= self.limits.scans:
                if not (sent := [scan for scan in own if scan.digest]):
                    raise Refused(
                        429,
                        f"{len(own)} scans are kept for you and at most {self.limits.scans} can be; delete one.",
                        "file",
                        "too_many_scans",
                    )
                del self._known[min(sent, key=lambda scan: scan.used).id]
            if len(self._known) + self._expected.total() >= self.limits.all_scans:
                raise Refused(429, "The server keeps as many scans as it can; try again later.", "file", "too_many_scans")
            self._expected[owner] += 1

    def _read(self, owner: str, files: Sequence[tuple[str, BinaryIO]], series: int | None, digest: str | None = None) -> KnownScan:
        paths: list[Path] = []
        upload, prefix = None, secrets.token_hex(8)
        try:
            for number, (name, content) in enumerate(sorted(files, key=lambda each: natural_key(each[0])), start=1):
                path = self.folder / f"{prefix}-{number:06d}{upload_ending(name)}"
                paths.append(path)
                with path.open("wb") as out:
                    while block := content.read(BLOCK):
                        out.write(block)
            upload = take_uploads(paths, self.limits.upload_bytes)
            volume, _, _ = read_without_paths(upload, series)
            with self.reading:
                embedding = None
                if self.embedder is not None:
                    pixels = self.embedder.processor.image_processor(volume)["pixel_values"]
                    embedding = self.embedder.volumes(pixels)[0]
                features = self.chat.encode(volume)
            familiar = self.chat.out_of_distribution(features)
            outside = None if familiar is None else familiar.message
            scan = KnownScan(
                f"scan-{secrets.token_urlsafe(16)}",
                owner,
                features,
                describe(volume, upload.kind),
                volume.warnings,
                outside,
                embedding,
                digest,
                None if getattr(self.chat.model, "pointing", None) is None else volume,
            )
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
            if upload is not None:
                upload.delete()
        return scan
