"""The prepared data at an address: its records in a folder here, and its volumes fetched into the cache when they are asked for."""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from med3dvlm.files import atomic_file, checksum
from med3dvlm.remote.address import FIRST_TRIES, Address
from med3dvlm.remote.cache import Cache

AT_ONCE = 8  # files that one process fetches at the same time

Sums = Mapping[str, str]  # of a volume: tensor -> its checksum


class RemoteStore:
    """Prepared data at an address.

    Args:
        volume_size: bytes of a volume, roughly.
    """

    def __init__(self, address: str, cache: Cache, volume_size: int = 0) -> None:
        self.address, self.cache, self.volume_size = Address(address), cache, volume_size
        self.folder = cache.folder / self.address.key

    def read_records(self, checked: Iterable[str]) -> None:
        """Bring the records of the store into `folder`: what lies there and has the checksums of summary.json is not fetched again.

        Args:
            checked: names of the files whose checksums are in summary.json.

        Raises:
            FileNotFoundError, PermissionError, OSError, ValueError: one sentence.
        """
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with self.cache.lock(self.address.key):
            try:
                self._record("summary.json")
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{self.address.address} holds no finished preparation (no summary.json); check the address, or copy what "
                    "`med3dvlm prepare` wrote to it"
                ) from error
            sums = json.loads((self.folder / "summary.json").read_text(encoding="utf-8-sig")).get("checksums", {})
            self._record("preprocessor_config.json")
            for name in checked:
                path, wanted = self.folder / name, sums.get(name)
                if not path.is_file() or checksum(path.read_bytes()) != wanted:
                    self._record(name, wanted)

    def _record(self, name: str, wanted: str | None = None) -> None:
        def check(path: Path) -> None:
            if wanted is not None and checksum(path.read_bytes()) != wanted:
                raise ValueError("it is not the file that was written with summary.json")

        with atomic_file(self.folder / name) as aside:
            self.address.fetch(name, aside, check, tries=FIRST_TRIES)

    def record(self, name: str) -> Path:
        """Return a file of the store that is not a volume, fetched again."""
        with self.cache.lock(self.address.key):
            self._record(name)
        return self.folder / name

    def volume(self, study: str, sums: Sums) -> Path:
        """Return the file of a study's volume, fetched and compared with its checksums where it is missing."""
        name = volume_name(study)

        def fetch(path: Path) -> None:
            self.address.fetch(name, path, lambda path: check_volume(path, sums), self.volume_size)

        return self.cache.get(f"{self.address.key}/{name}", fetch, self.volume_size)

    def drop(self, study: str) -> None:
        """Delete what is here of a volume, since it is damaged."""
        self.cache.drop(f"{self.address.key}/{volume_name(study)}")

    def fetch(self, wanted: Mapping[str, Sums]) -> None:
        """Fetch the volumes of studies, several at a time."""
        with ThreadPoolExecutor(min(AT_ONCE, max(1, len(wanted)))) as pool:
            list(pool.map(self.volume, wanted, wanted.values()))


def volume_name(study: str) -> str:
    """Return the path of a study's volume below its store."""
    return f"volumes/{study}.safetensors"


def check_volume(path: Path, sums: Sums) -> None:
    """Raise ValueError where a volume's file is incomplete, or another than the index says."""
    try:
        with safe_open(path, "np") as file:
            whole = all(checksum(file.get_tensor(name)) == wanted for name, wanted in sums.items())
    except SafetensorError as error:
        raise ValueError("it arrived damaged") from error
    if not whole:
        raise ValueError("it does not have the checksum of the index")
