"""Turn a scan of a worklist into cases as the models take them: choose series, read, prepare. Worker processes do this."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.datasets.outputs import require_seen
from med3dvlm.formats import archive
from med3dvlm.formats.dicom import Series, is_dicom, series_in
from med3dvlm.formats.dicom_header import dicom_files
from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.programs import user_message
from med3dvlm.reports.draft import scan_facts
from med3dvlm.volume import Volume, VolumeError, read_volume
from med3dvlm.worklist.scans import Scan
from med3dvlm.worklist.series import chosen


@dataclass(frozen=True)
class Failure:
    """The reason why there is no result, in one sentence that names the scan by its id alone."""

    id: str
    reason: str


@dataclass(frozen=True)
class Case:
    """One volume to ask about: its voxels for each processor, as `VolumeProcessor.quantize` gives them, and facts about the scan.

    `series` is the number by which `read_volume` finds it again, None for the first or only one.
    """

    id: str
    scan: Scan
    voxels: tuple[NDArray[Any], ...]
    facts: dict[str, Any]
    warnings: tuple[str, ...]
    series: int | None


def read_cases(scan: Scan, processors: Sequence[VolumeProcessor], rule: str) -> list[Case | Failure]:
    """Read the cases of a scan, in the order of their series. Whatever is wrong with a file becomes a Failure."""
    try:
        with _opened(scan.path) as place:
            return [_case(scan, place, id, picked, count, processors, rule) for id, picked, count in _picked(scan, place, rule)]
    except Exception as error:  # noqa: BLE001  each is told of in failures.jsonl
        return [_failure(scan.id, error, scan)]


def read_on_any_machine(root: Path, scan: Scan, processors: Sequence[VolumeProcessor], rule: str) -> list[Case | Failure]:
    """Read as `read_cases`; raises FileNotFoundError on a machine that does not see `root`, below which all scans are."""
    require_seen(root)
    return read_cases(scan, processors, rule)


def open_volume(case: Case) -> Volume:
    """Read the case's volume again.

    Raises:
        VolumeError: the files have changed.
    """
    with _opened(case.scan.path) as place:
        volume = read_volume(place, **case.scan.reading | ({} if case.series is None else {"series": case.series}))
    if scan_facts(volume)["sha256"] != case.facts["sha256"]:
        raise VolumeError("the scan was changed while it was worked on; run the command again")
    return volume


@contextmanager
def _opened(path: Path) -> Iterator[Path]:
    """Yield the scan itself, or the unpacked content of an archive."""
    if path.name.lower().endswith(".zip") and path.is_file():
        with archive.opened(path, str(path)) as inside:
            yield inside
    else:
        yield path


def _picked(scan: Scan, place: Path, rule: str) -> list[tuple[str, Series | None, int]]:
    """Return for each case its id, its DICOM series if it has one, and the number of series in its study."""
    with_dicom = dicom_files(place, str(place)) if place.is_dir() else place.is_file() and place.stat().st_size and is_dicom(place)
    if not with_dicom:
        return [(scan.id, None, 0)]
    series = series_in(place, str(place))
    studies = {one.study for one in series}
    if (number := scan.reading.get("series")) is not None:
        return [(scan.id, next((one for one in series if one.number == number), None), len(series))]
    cases: list[tuple[str, Series | None, int]] = []
    for one in chosen(series, rule):
        count = sum(other.study == one.study for other in series)
        parts = [scan.id, *([f"study-{one.study[:8]}"] if len(studies) > 1 else [])]
        parts += [f"series-{one.number}"] if rule == "all" and count > 1 else []
        cases.append(("/".join(parts), one, count))
    return cases


def _case(
    scan: Scan, place: Path, id: str, series: Series | None, count: int, processors: Sequence[VolumeProcessor], rule: str
) -> Case | Failure:
    number: int | None = None  # None reads the first, with warnings of what is doubtful about it
    if series is not None and (series.number > 1 or rule == "all"):
        number = series.number
    chosen: dict[str, Any] = {} if number is None else {"series": number}
    try:
        volume = read_volume(place, **chosen | scan.reading)
        voxels = tuple(processor.quantize(processor.transform(volume)).numpy() for processor in processors)
        facts = scan_facts(volume)
        if series is not None:
            facts["series"] = {
                "study": series.study,
                "series": series.series,
                "number": series.number,
                "of": count,
                "rule": rule if "series" not in scan.reading else "stated",
            }
        warnings = tuple(_plain(warning, scan, place) for warning in volume.warnings)
        return Case(id, scan, tuple(map(np.ascontiguousarray, voxels)), facts, warnings, number)
    except Exception as error:  # noqa: BLE001  as above
        return _failure(id, error, scan, place)


def _failure(id: str, error: Exception, scan: Scan, place: Path | None = None) -> Failure:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return Failure(id, "there is too little memory for this scan; run with fewer --workers or on a larger machine")
    reason = user_message(error) if isinstance(error, (ImportError, OSError, ValueError)) else None
    return Failure(id, _plain(reason or f"this cannot be read, by a defect of the reader ({type(error).__name__})", scan, place))


def _plain(words: str, scan: Scan, place: Path | None) -> str:
    """Remove the path of the scan, which may name the patient, from a sentence."""
    for path in {str(place), str(scan.path)}:
        words = words.replace(f"{path}: ", "").replace(path, "the scan")
    return words
