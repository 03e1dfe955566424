"""Prepared data: every volume once through the VolumeProcessor, kept as whole numbers, beside the records and the processor itself.

    <root>/preprocessor_config.json           how the volumes were made
    <root>/studies.jsonl  questions.jsonl     the records
    <root>/split_<part>.json                  split file of a split within another one, as M3D's test1k within test
    <root>/volumes/<study id>.safetensors     "voxels" (D, H, W) uint8 or int16, perhaps "mask 0", "mask 1", ... (packed bits), and in the
                                              header the volume's line of the index
    <root>/index.jsonl                        a line a volume: from which scan, in which state, read how; checksum; what was found
    <root>/failures.jsonl                     studies that could not be prepared: study, file, reason
    <root>/warnings.jsonl                     what is doubtful about the others, such as which of several series was taken: study, file, warnings
    <root>/summary.json  summary.png          counts, distributions and a fingerprint of records, settings and volumes

Volumes leave the store as they lie in it. `VolumeProcessor.dequantize` makes them what the model sees, after they have been moved to
the device: a fourth (uint8) or half (int16) of the bytes to move, and the same bits as the direct way from the scan file.

Why plain voxels in a safetensors file. CPU time in ms of reading one volume with one thread, medians, page cache warm: a real head CT at
128 x 256 x 256 uint8 (m3d), and the same CT with noise filling 256 x 512 x 512 int16 (the shape of ct_rate):

    | format                               | uint8, MB | ms   | int16, MB | ms  |
    |--------------------------------------|-----------|------|-----------|-----|
    | safetensors, mapped, checksum, copy  |       8.4 |  1.4 |       134 |  16 |
    | .npy                                 |       8.4 |  1.2 |       134 |  22 |
    | blosc2, LZ4 level 5, bit shuffle     |       4.5 |  8.8 |        58 | 161 |
    | blosc2, LZ4HC level 9, no shuffle    |       3.6 |  4.3 |           |     |
    | blosc2, zstd level 1, bit shuffle    |       3.4 | 13.8 |        46 | 166 |
    | blosc2, zstd level 5, shuffle        |       3.1 | 18.1 |        41 | 194 |
    | zarr 3, the same zstd 1, one shard   |       3.6 | 25.5 |        46 | 545 |

M3D-Cap, 120,000 volumes, takes 1.0 TB this way, and 2.4 TB as .nii.gz float32, which its release prepares. Compression would save another
2.3 to 2.7-fold and make reading 3 to 13 times as long, in every epoch (LZ4HC, the fastest to read, takes 1.7 s to write). CT-RATE's
volumes, of which much is padding, shrink more; a store that must be smaller lies well on a file system that compresses (ZFS, btrfs, with
LZ4 or zstd), without a word of code here. What remains between .npy, zarr and safetensors is the same bytes; safetensors is there already
(weights), maps the file into memory, so that all processes of a node share one copy in the page cache, and its header takes what was
found about the volume, so that volume and record appear with one rename. One file a volume: 8 MB and more read as fast as longer ones,
none needs a lock to be written, and a damaged one is one volume. A reader opens and closes the file with every volume: no handles to
inherit, so workers may be forked or spawned.

Each volume is compared with the index's checksum (XXH3, 64 bits) whenever it is read, in 0.2 ms for 8.4 MB; records and index when
the folder is opened. `med3dvlm prepare --verify` reads all volumes and makes the damaged ones anew.

Masks lie beside the voxels on the same grid: of each the bits of the box that holds it, compressed by zlib, with a checksum of its own.
Reading a volume does not touch them.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from med3dvlm.datasets.masks import unpack
from med3dvlm.files import checksum, read_lines
from med3dvlm.preprocessing import SETTINGS, VolumeProcessor
from med3dvlm.records import Question, Study, read_questions, read_studies
from med3dvlm.remote.address import is_address
from med3dvlm.remote.cache import Cache
from med3dvlm.remote.store import RemoteStore, Sums, volume_name
from med3dvlm.reports.findings import named_labels

T = TypeVar("T")

CHECKED = ("studies.jsonl", "questions.jsonl", "index.jsonl", "failures.jsonl")  # their checksums are in summary.json
READS = 5  # of a volume in a cache: it may have made room for another before it is opened


def volume_path(root: Path, study: Study) -> Path:
    return root / volume_name(study.id)


def read_voxels(path: Path, expected: str) -> Tensor:
    """Return the voxels (D, H, W) of a stored volume, mapped into memory.

    Raises:
        FileNotFoundError: there is no such volume.
        ValueError: it is damaged, or another than the one of the checksum `expected`.
    """
    return _tensors(path, {"voxels": expected})[0]


def read_stored_masks(path: Path, size: Sequence[int], stored: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Tensor:
    """Return masks (K, D, H, W) bool of a stored volume by their names; raises as `read_voxels` does.

    Args:
        stored: "masks" of the volume's line in the index: for each name its "voxels", "box", "place" in the file, "checksum".
    """
    result = np.zeros((len(names), *size), bool)
    filled = [(number, stored[name]) for number, name in enumerate(names) if stored[name]["voxels"]]
    contents = _tensors(path, {f"mask {mask['place']}": mask["checksum"] for _, mask in filled}) if filled else []
    for (number, mask), content in zip(filled, contents, strict=True):
        unpack(content.numpy().tobytes(), mask["box"], result[number])
    return torch.from_numpy(result)


def _tensors(path: Path, expected: Mapping[str, str]) -> list[Tensor]:
    """Return tensors of a stored volume by name, each compared with its checksum."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}, a prepared volume, is missing; run: med3dvlm prepare")
    try:
        with safe_open(path, "pt") as file:
            tensors: list[Tensor] = [file.get_tensor(name) for name in expected]
    except SafetensorError as error:
        raise ValueError(f"{path}, a prepared volume, is damaged ({error}); run: med3dvlm prepare with --verify") from error
    if any(checksum(tensor.numpy()) != known for tensor, known in zip(tensors, expected.values(), strict=True)):
        raise ValueError(f"{path}, a prepared volume, does not have the checksum of the index; run: med3dvlm prepare with --verify")
    return tensors


@dataclass(frozen=True)
class Opening:
    """What opened prepared data, so that a process elsewhere can: `PreparedData`'s arguments, and folder and size of its cache."""

    root: str
    exclude_failures: bool
    split_file: str | None
    cache: tuple[str, str] | None = None

    def reopen(self) -> "PreparedData":
        return PreparedData(self.root, self.exclude_failures, self.split_file, Cache(*self.cache) if self.cache else None)


def _everywhere(place: str | Path) -> str:
    """Return a path that does not depend on the working folder."""
    return str(place) if is_address(place) else os.path.abspath(place)


class PreparedData:
    """A prepared folder, opened: one of this machine, or one at an address (s3://, gs://, https://, see docs/cluster.md).

    Of an address the records are read once and its volumes when they are asked for; both lie in the cache then. `root` is what was opened,
    `folder` where its records, and what is computed from them, lie on this machine.

    Args:
        cache: for data at an address; by default the user's, of 50 GB.
        exclude_failures: go on without the studies listed in failures.jsonl; by default they are an error.
        split_file: JSON {split: [study ids]} in the place of the records' own splits, as `med3dvlm audit` writes it. Studies that it
            leaves out belong to no split; the fingerprint is that of this choice.

    Raises:
        FileNotFoundError: the folder is not prepared, or not to the end.
        ValueError: some studies failed, records or index are not as they were written, or the split file is not about these studies.
        OSError: the address cannot be read, or the cache not be written.
    """

    def __init__(
        self,
        root: str | Path,
        exclude_failures: bool = False,
        split_file: str | Path | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.opening = Opening(_everywhere(root), exclude_failures, None if split_file is None else _everywhere(split_file))
        self.remote: RemoteStore | None = None
        self.root: str | Path = Path(root)
        self.folder = Path(root)
        if isinstance(root, str) and is_address(root):
            self.remote = RemoteStore(root, cache or Cache())
            self.opening = replace(self.opening, cache=(str(self.remote.cache.folder), self.remote.cache.size_text))
            self.root, self.folder = self.remote.address.address, self.remote.folder
            self.remote.read_records(CHECKED)
        if not (self.folder / "summary.json").is_file():
            raise FileNotFoundError(f"{self.root} holds no finished preparation (no summary.json); run: med3dvlm prepare")
        self.summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8-sig"))
        for name in CHECKED:
            path = self.folder / name
            if not path.is_file() or checksum(path.read_bytes()) != self.summary.get("checksums", {}).get(name):
                raise ValueError(f"{path} is not the file that was written with summary.json; run: med3dvlm prepare")
        failures = read_lines(self.folder / "failures.jsonl")
        if failures and not exclude_failures:
            first, reason = failures[0]["study"], failures[0]["reason"].rstrip(".")
            raise ValueError(
                f"{len(failures)} studies of {self.root} could not be prepared, the first is {first}: {reason}; mend the files and prepare "
                "again, or pass --exclude-failures true"
            )
        self.processor = read_processor(self.folder, str(self.root))
        studies = read_studies(self.folder / "studies.jsonl")
        self._studies = [replace(study, labels=named_labels(study.labels)) for study in studies]
        self._questions = read_questions(self.folder / "questions.jsonl")
        index = read_lines(self.folder / "index.jsonl")
        self._checksums = {line["study"]: line["checksum"] for line in index}
        self._masks: dict[str, dict[str, Any]] = {line["study"]: line.get("masks", {}) for line in index}
        self._spacings = {line["study"]: line.get("grid_spacing") for line in index}
        if self.remote is not None:
            self.remote.volume_size = self.volume_size
            self.require_room(1)
        if split_file is not None:
            self._split_by(self._beside(split_file))

    def _beside(self, file: str | Path) -> Path:
        """Return a file that may lie beside the data at the address."""
        place = str(file)
        if self.remote is not None and place.startswith(f"{self.root}/"):
            return self.remote.record(place.removeprefix(f"{self.root}/"))
        return Path(file)

    @property
    def volume_size(self) -> int:
        """Return the bytes of a prepared volume: of its voxels, or with masks on average."""
        voxels = math.prod(self.processor.size) * self.processor.stored_dtype.itemsize
        return max(voxels, int(self.summary.get("disk_gb", 0) * 1e9 / max(1, len(self._checksums))))

    def require_room(self, volumes: int) -> None:
        """Raise ValueError or OSError where the cache cannot hold as many volumes as are read at a time; only data at an address need it."""
        if self.remote is not None:
            self.remote.cache.require(int(self.summary["disk_gb"] * 1e9), volumes * self.volume_size)

    def fetch(self, studies: Sequence[Study]) -> None:
        """Fetch volumes of data at an address into the cache, several at a time; local data are unchanged."""
        if self.remote is not None:
            self.remote.fetch({study.id: self.sums(study) for study in studies})

    def sums(self, study: Study) -> Sums:
        """Return the checksums of the tensors in the file of a study's volume."""
        masks = self._masks[study.id].values()
        return {"voxels": self.checksum(study)} | {f"mask {mask['place']}": mask["checksum"] for mask in masks if mask["voxels"]}

    def _read(self, study: Study, read: Callable[[Path], T]) -> T:
        """Return `read` of the file of a study's volume."""
        if self.remote is None:
            return read(volume_path(self.folder, study))
        for left in range(READS - 1, -1, -1):
            path = self.remote.volume(study.id, self.sums(study))
            try:
                return read(path)
            except FileNotFoundError:
                if not left:
                    raise
            except ValueError:  # damaged since it was fetched
                if not left:
                    raise
                self.remote.drop(study.id)
        raise AssertionError("the last read returns or raises")

    def _split_by(self, path: Path) -> None:
        try:
            listed = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path}, the split file, is not valid JSON ({error})") from error
        if not isinstance(listed, dict) or not all(isinstance(ids, list) for ids in listed.values()):
            raise ValueError(f"{path} must hold {{split: [study ids]}}, as `med3dvlm audit` writes it")
        split_of = {str(study): split for split, ids in listed.items() for study in ids}
        if len(split_of) < sum(map(len, listed.values())):
            raise ValueError(f"{path} names a study twice; each belongs to one split at most")
        if unknown := split_of.keys() - {study.id for study in self._studies}:
            raise ValueError(f"{path} names {len(unknown)} studies that {self.root} does not hold, as {min(unknown)}; audit this data")
        self._studies = [replace(study, split=split_of[study.id]) for study in self._studies if study.id in split_of]
        splits = {split: len(ids) for split, ids in sorted(listed.items())}
        choice = json.dumps([self.summary["fingerprint"], {split: sorted(ids) for split, ids in sorted(listed.items())}])
        self.summary |= {"studies": len(self._studies), "splits": splits, "fingerprint": checksum(choice.encode())}

    def studies(self, split: str) -> list[Study]:
        found = [study for study in self._studies if study.split == split]
        if not found:
            raise ValueError(f"{self.root} has no studies of split {split!r}; it has {self.summary['splits']}")
        return found

    def questions(self, split: str) -> list[Question]:
        known = {study.id for study in self._studies if study.split == split}
        return [question for question in self._questions if question.study in known]

    def checksum(self, study: Study) -> str:
        """Return the checksum of its prepared volume from the index: equal volumes have equal checksums."""
        return str(self._checksums[study.id])

    def volume(self, study: Study) -> Tensor:
        """Return (1, D, H, W) of the processor's `stored_dtype`; `dequantize` turns it into what the processor returns for the scan file.

        Raises:
            FileNotFoundError, ValueError: the volume is missing or damaged.
        """
        return self._read(study, lambda path: read_voxels(path, self.checksum(study))).unsqueeze(0)

    def require_volumes(self) -> None:
        """Raise FileNotFoundError where a prepared volume is missing; those at an address are looked for when they are read."""
        if self.remote is not None:
            return
        here = {os.path.join(folder, name) for folder, _, names in os.walk(self.folder / "volumes") for name in names}
        for study in self._studies:
            if str(path := volume_path(self.folder, study)) not in here:
                raise FileNotFoundError(f"{path}, a prepared volume, is missing; run: med3dvlm prepare")

    def spacing(self, study: Study) -> tuple[float, float, float] | None:
        """Return (z, y, x) in mm of the voxels of `volume`; None where the scan's is unknown, or was not kept by an older preparation."""
        kept = self._spacings[study.id]
        return None if kept is None else (kept[0], kept[1], kept[2])

    def mask_names(self, study: Study) -> list[str]:
        """Return the names of the study's masks that hold a voxel of the prepared volume. `study.masks` has the facts about each."""
        return [name for name, mask in self._masks[study.id].items() if mask["voxels"]]

    def masks(self, study: Study, names: Sequence[str] | None = None) -> Tensor:
        """Return masks (K, D, H, W) bool on the grid of `volume`.

        Args:
            names: those of `mask_names` by default; any of `study.masks`, of which an empty one is all False.

        Raises:
            ValueError: the study has no such mask; FileNotFoundError, ValueError: the volume is missing or damaged.
        """
        known = self._masks[study.id]
        names = self.mask_names(study) if names is None else names
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"study {study.id} of {self.root} has no mask {unknown[0]!r}; it has {', '.join(known) or 'none'}")
        return self._read(study, lambda path: read_stored_masks(path, self.processor.size, known, names))


def read_processor(folder: Path, name: str) -> VolumeProcessor:
    """Return the processor in a folder that holds prepared data, or a copy of what an address holds; `name` is what the user calls it.

    Raises:
        OSError: its file is missing or cannot be read.
        ValueError: its file is damaged.
    """
    (folder / "preprocessor_config.json").read_bytes()  # what the system says of it, since transformers' OSError is for damaged ones, too
    try:
        return VolumeProcessor.from_pretrained(folder)
    except (AttributeError, OSError, TypeError, ValueError) as error:
        reason = str(error).rstrip(".") if isinstance(error, TypeError | ValueError) else "it is no JSON object"
        raise ValueError(
            f"{name}/preprocessor_config.json does not hold the settings of a preprocessing ({reason}); copy it anew, or delete it and run: "
            "med3dvlm prepare"
        ) from error


def same_preprocessing(model: VolumeProcessor, data: PreparedData) -> None:
    """Raise ValueError unless the data was prepared in the way that the model expects."""
    for name in SETTINGS:
        wanted, found = getattr(model, name), getattr(data.processor, name)
        if wanted != found:
            raise ValueError(f"the model takes volumes of {name} {wanted}, but {data.root} was prepared with {found}; prepare it anew")
