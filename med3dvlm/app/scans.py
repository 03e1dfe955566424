"""Turn uploaded files, or a phantom, into an open scan: read it, pack it for the browser, describe it, and delete the files.

A file's name may name a patient. So each upload gets a plain name before anything looks at it, and neither the page nor a message nor a
log shows the name that it came with.
"""

import dataclasses
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.app.viewer import Picture, describe, picture
from med3dvlm.datasets.phantom import Acquisition, draw, plan_phantoms
from med3dvlm.formats import FORMATS
from med3dvlm.formats.base import AmbiguousSeriesError
from med3dvlm.formats.dicom import is_dicom
from med3dvlm.volume import Volume, VolumeError, read_volume

KINDS = {ending: each.title for ending, each in FORMATS.items() if not each.detached}
OPENED = f"one file ({', '.join(KINDS)}) or all files of a DICOM series"
MAY_BE_DICOM = ("DICOM", "DICOM series", "zip archive")
PICTURES = (".png", ".jpg", ".jpeg")
MAX_FILES = 20_000
PREFIX = "scan-"  # of the folders of scans that are read, or open
EXAMPLES = {"Chest phantom": "chest", "Abdomen phantom": "abdomen"}


class Upload:
    """An upload: `path` to read, `kind` in words, and a `folder` that is deleted when nobody has a scan of it open any more. DICOM files are
    kept until then for a Structured Report, which refers to them, and for the study's other series.
    """

    def __init__(self, path: Path, kind: str, folder: str) -> None:
        self.path, self.kind, self.folder = path, kind, folder
        self.delete = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class OpenScan:
    """A scan that is open: the volume, its picture for the browser, facts and warnings, and of a DICOM study the upload and the number
    `series`, None for the likeliest.
    """

    volume: Volume
    picture: Picture
    facts: dict[str, str]
    warnings: tuple[str, ...]
    upload: Upload | None = None
    series: int | None = None
    resampled: bool = False  # the volume was straightened, so its voxels are not those of the file
    as_filed: bool = True  # each slice of the volume is one of the file's, though perhaps moved within its plane

    @property
    def files(self) -> Path | None:
        """Return the files of a DICOM study, which `read_volume` can read again."""
        return None if self.upload is None else self.upload.path

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory of the volume and its picture."""
        return int(self.volume.array.nbytes + self.picture.stored.nbytes)


@dataclass(frozen=True, eq=False)
class Undecided:
    """A DICOM study, one of whose `series` a person has to choose; see `Volume.series`."""

    upload: Upload
    series: tuple[str, ...]


class UndecidedError(VolumeError):
    """An upload of which nothing is opened before a series is chosen."""

    def __init__(self, message: str, study: Undecided) -> None:
        super().__init__(message)
        self.study = study


def read_uploads(uploads: Sequence[Path], max_bytes: int, keep: bool = False, straighten: bool = False) -> OpenScan:
    """Read the scan in one file, or in all files of a series together, and delete the uploads whatever happens (DICOM files when the scan is
    closed).

    With `keep` they stay: Gradio stores equal uploads of several callers once, and another caller may still read them. `straighten` is for
    `read_volume`.

    Raises:
        UndecidedError: a person has to choose one of the study's series, whose files are kept for that.
        VolumeError: they hold no scan, or are larger than `max_bytes` together; one sentence without a file's name.
    """
    kept = take_uploads(uploads, max_bytes, keep)
    try:
        scan = read_series(kept, None, straighten)
    except AmbiguousSeriesError as error:
        raise UndecidedError(str(error), Undecided(kept, error.series)) from None
    except BaseException:
        kept.delete()
        raise
    if scan.upload is None:
        kept.delete()
    return scan


def take_uploads(uploads: Sequence[Path], max_bytes: int, keep: bool = False) -> Upload:
    """Move the uploads into a folder of their own under plain names. Checks and arguments are those of `read_uploads`."""
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=uploads[0].parent)
    try:
        path, kind = _plainly_named(uploads, Path(folder), max_bytes, os.link if keep else shutil.move)
    except BaseException:
        shutil.rmtree(folder)
        raise
    finally:
        for upload in () if keep else uploads:
            upload.unlink(missing_ok=True)
    return Upload(path, kind, folder)


def read_without_paths(upload: Upload, series: int | None, straighten: bool = False) -> tuple[Volume, bool, bool]:
    """Read an upload. Its warnings, and the VolumeError that may be raised, hold no path.

    Returns the volume, whether it was resampled, and whether each of its slices is one of the file's.
    """

    def plain(words: str) -> str:
        words = re.sub(rf"{re.escape(upload.folder)}(/[\w.]+)?: ", "", words)
        words = re.sub(rf"{re.escape(upload.folder)}/?", "", words).strip()
        return words[:1].upper() + words[1:]

    try:
        read = read_volume(upload.path, series=series)
        volume = read.straighten() if straighten else read
    except AmbiguousSeriesError as error:
        raise AmbiguousSeriesError(plain(str(error)), error.series) from None
    except VolumeError as error:
        raise VolumeError(plain(str(error))) from None
    volume = dataclasses.replace(volume, source="scan", warnings=tuple(plain(warning) for warning in volume.warnings))
    return volume, straighten and not read.regular, not straighten or read.slice_positions is None


def read_series(upload: Upload, series: int | None, straighten: bool = False) -> OpenScan:
    """Read the series of that number in `volume.series`, None for the likeliest. Raises VolumeError as `read_uploads` does."""
    volume, resampled, as_filed = read_without_paths(upload, series, straighten)
    scan = opened(volume, upload.kind, upload if upload.kind in MAY_BE_DICOM else None, series)
    return dataclasses.replace(scan, resampled=resampled, as_filed=as_filed)


def series_choices(scan: OpenScan | None, undecided: Undecided | None) -> list[list[Any]]:
    """Return the series of the undecided study, or else of the scan's, as [number, words, whether it is open]; none where there is no choice."""
    if undecided is not None:
        lines = undecided.series
    else:
        lines = () if scan is None or scan.upload is None else scan.volume.series
    numbered = [line.partition(": ") for line in lines if len(lines) > 1]
    return sorted([int(number), words, place == 0 and undecided is None] for place, (number, _, words) in enumerate(numbered))


def sweep(private: Path, seconds: float) -> None:
    """Delete uploads that nobody has read for so many seconds, as after a closed page. Files of open scans stay."""
    for path in private.rglob("*"):
        if not any(part.startswith(PREFIX) for part in path.relative_to(private).parts):
            with suppress(FileNotFoundError):  # somebody read it just now
                if path.is_file() and time.time() - path.stat().st_mtime > seconds:
                    path.unlink()


def opened(volume: Volume, kind: str, upload: Upload | None = None, series: int | None = None) -> OpenScan:
    """Make an OpenScan of a volume; `kind` says what it was read from."""
    return OpenScan(volume, picture(volume), describe(volume, kind), volume.warnings, upload, series)


@lru_cache
def example(name: str) -> OpenScan:
    """Return one of EXAMPLES: a CT phantom with a finding, drawn at the first call and always the same.

    Raises:
        VolumeError: there is no such example.
    """
    if name not in EXAMPLES:
        raise VolumeError(f"There is no example {str(name)[:40]!r}; there are {', '.join(EXAMPLES)}.")
    region = EXAMPLES[name]
    plan = next(plan for plan in plan_phantoms(40, seed=7) if plan.body.region == region and plan.body.findings)
    canvas = draw(plan.body, Acquisition("axial", "portal venous phase", plan.acquisition.seed, detail=2.0))
    edges = np.linalg.norm(canvas.directions, axis=0)  # mm along (D, H, W)
    direction = canvas.directions / edges
    letters = "".join("RAS"[axis] if column[axis] > 0 else "LPI"[axis] for column in direction.T for axis in [np.abs(column).argmax()])
    spacing = tuple(float(mm) for mm in edges)
    array = canvas.array.astype(np.int16)
    volume = Volume(array, spacing, letters, direction, "HU", source=name)  # type: ignore[arg-type]
    return opened(volume, f"{name}, drawn by this program; no patient")


def _plainly_named(uploads: Sequence[Path], folder: Path, max_bytes: int, move: Callable[[Path, Path], Any]) -> tuple[Path, str]:
    """Move the uploads into the folder under plain names. Returns the path to read, and its kind in words."""
    size = sum(upload.stat().st_size for upload in uploads)
    if size > max_bytes:
        raise VolumeError(f"The upload has {size / 2**20:.1f} MiB but at most {max_bytes / 2**20:g} MiB are taken; crop or pack it.")
    if len(uploads) > MAX_FILES:
        raise VolumeError(f"{len(uploads)} files were sent but at most {MAX_FILES} are taken; give one series, or a zip of it.")
    endings = [_ending(upload) for upload in uploads]
    if any(ending in FORMATS and FORMATS[ending].detached for ending in endings):
        raise VolumeError("An .mhd or .nhdr file has its voxels in another file; save the scan as one .mha or .nrrd file.")
    if len(uploads) == 1:
        if uploads[0].stat().st_size and not (endings[0] in KINDS or is_dicom(uploads[0])):
            raise VolumeError(f"This is no scan that can be opened here; open {OPENED}.")
        path = folder / f"scan{endings[0]}"
        move(uploads[0], path)
        return path, KINDS.get(endings[0], "DICOM")
    if any(ending in FORMATS and ending != ".dcm" for ending in endings):
        raise VolumeError(f"{len(uploads)} files were sent, and not all are of one DICOM series; open one scan at a time.")
    for number, upload in enumerate(sorted(uploads, key=lambda upload: natural_key(upload.name)), start=1):
        move(upload, folder / f"{number:05d}{_ending(upload)}")
    return folder, "pictures" if set(endings) <= set(PICTURES) else "DICOM series"


def upload_ending(name: str) -> str:
    """Return the ending of a file's name that names a format, in lower case, else ""."""
    known = sorted((*FORMATS, *PICTURES), key=len, reverse=True)
    return next((ending for ending in known if name.lower().endswith(ending)), "")


def _ending(upload: Path) -> str:
    """Return the upload's ending by its name, or without one by the file's first bytes, else ""."""
    if ending := upload_ending(upload.name):
        return ending
    with upload.open("rb") as file:
        start = file.read(352)
    signed = [(ending, each.signature) for ending, each in FORMATS.items() if each.signature]
    return next((ending for ending, (place, sign) in signed if start[place:].startswith(sign)), "")


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts slice 9 before slice 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
