"""Find the scans of a worklist: below a folder, in a list, or in a table with questions about them.

A scan's id is its path without the ending, relative to the folder, or to the list or table; where these name scans elsewhere, to the
deepest folder that holds them all. A table may give other ids, and so keep what a path tells out of every output.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from med3dvlm.datasets.cells import ABOUT_THE_SCAN, cell_text, scan_setting
from med3dvlm.datasets.csv_files import csv_rows, is_missing, json_rows, own_names
from med3dvlm.formats import READERS
from med3dvlm.formats.dicom import is_dicom, study_of
from med3dvlm.formats.pictures import pictures
from med3dvlm.records import check_inside

TABLES, LISTS = (".csv", ".tsv", ".jsonl", ".parquet"), (".txt", ".lst")
COLUMNS = ("image", "id", "question", *ABOUT_THE_SCAN)
FILES = tuple(ending for ending in READERS if ending != ".dcm")


@dataclass(frozen=True)
class Scan:
    """A file or a folder, the questions about it, and the arguments of `read_volume`. A DICOM study may hold several cases."""

    id: str
    path: Path
    questions: tuple[str, ...] = ()
    reading: dict[str, Any] = field(default_factory=dict)


def scans_of(source: Path, out: Path) -> tuple[list[Scan], list[str]]:
    """Return all scans in the order of their paths, or of the table; and sentences about what was left out.

    Args:
        source: a folder, a list (.txt: a path a line), a table, or one scan.
        out: the folder of the results, which holds no scans; other folders of results are left out, too.

    Raises:
        FileNotFoundError, ValueError: there is no scan, or list or table are wrong; the message says where.
    """
    notes: list[str] = []
    if source.is_dir():
        scans, notes = _below(source, out)
        if not scans:
            raise ValueError(
                f"there is no scan below {source}; a scan is {', '.join(FILES)}, DICOM files, or a folder of numbered pictures"
            )
    elif not source.is_file():
        raise FileNotFoundError(f"{source} is not there; name a folder of scans, a list (.txt), or a table ({', '.join(TABLES)})")
    elif source.suffix.lower() in TABLES:
        scans, notes = _of_table(source)
    elif source.suffix.lower() in LISTS:
        scans = _of_list(source)
    else:
        scans = [Scan(_without_ending(source.name), source)]
    if twice := [name for name, count in Counter(scan.id for scan in scans).items() if count > 1]:
        raise ValueError(f"{len(twice)} ids are those of several scans, the first is {twice[0]!r}; give each an id of its own (column id)")
    return scans, notes


def _without_ending(name: str) -> str:
    ending = next((ending for ending in FILES if name.lower().endswith(ending)), "")
    return name[: -len(ending) or None]


def _named(scans: Iterable[Scan]) -> list[Scan]:
    """Shorten ids, which are paths, by the ending, unless two scans would then have one id."""
    kept = list(scans)
    count = Counter(_without_ending(scan.id) for scan in kept)
    return [replace(scan, id=short) if count[short := _without_ending(scan.id)] == 1 else scan for scan in kept]


def _below(root: Path, out: Path) -> tuple[list[Scan], list[str]]:
    """Find every scan file, DICOM study and folder of pictures. Names that begin with a dot are left out."""
    found: list[Path] = []
    links: list[str] = []
    studies: dict[Path, str] = {}  # folder with DICOM files -> study of the first that says it
    unlisted: list[OSError] = []
    for place, folders, names in os.walk(root, onerror=unlisted.append):
        folder = Path(place)
        links += [str(folder / name) for name in folders if (folder / name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _is_results(folder / name, out))
        files = [folder / name for name in sorted(names) if not name.startswith(".")]
        found += (scans := [file for file in files if file.name.lower().endswith(FILES)])
        dicom = next((file for file in files if _may_be_dicom(file)), None)
        if dicom is not None:
            studies[folder] = study_of(files) or f"unknown {folder}"
        elif not scans and len(seen := pictures(folder)) > 1 and all(re.search(r"\d", picture.stem) for picture in seen):
            found.append(folder)
    found += [Path(error.filename) for error in unlisted]  # cannot be read, which their results will say
    tops = _study_folders(root, studies)
    found = [path for path in found if not (path.is_dir() and tops & {path, *path.parents})]  # pictures beside DICOM are previews
    notes = [f"Links to folders are not followed: {', '.join(links)}"] if links else []
    return _named(
        Scan(path.relative_to(root).as_posix() if path != root else root.resolve().name or "scan", path) for path in sorted({*found, *tops})
    ), notes


def _is_results(folder: Path, out: Path) -> bool:
    return folder.resolve() == out.resolve() or all((folder / name).is_file() for name in ("run.json", "progress.jsonl"))


def _may_be_dicom(file: Path) -> bool:
    return file.suffix.lower() == ".dcm" or (not file.name.lower().endswith(FILES) and file.is_file() and is_dicom(file))


def _study_folders(root: Path, studies: dict[Path, str]) -> set[Path]:
    """Return for each DICOM study the deepest folder that holds all its files, if no other study lies there; else the folders with files."""
    below: dict[Path, set[str]] = defaultdict(set)
    for folder, study in studies.items():
        for ancestor in _up_to(root, folder):
            below[ancestor].add(study)
    together: dict[Path, list[Path]] = defaultdict(list)
    for folder in studies:
        # A folder with DICOM files of its own is read with all below it.
        together[[place for place in _up_to(root, folder) if place in studies or len(below[place]) == 1][-1]].append(folder)
    return {Path(os.path.commonpath(folders)) for folders in together.values()}


def _up_to(root: Path, folder: Path) -> list[Path]:
    ancestors = [folder, *folder.parents]
    return ancestors[: ancestors.index(root) + 1]


def _of_list(path: Path) -> list[Scan]:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    paths = dict.fromkeys(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not paths:
        raise ValueError(f"{path} lists no scan; write a path a line")
    return _relative([(text, Scan("", path.parent / text)) for text in paths], path)


def _relative(named: Sequence[tuple[str, Scan]], table: Path) -> list[Scan]:
    """Give scans without an id their path, relative to the table or to the deepest folder that holds all of them."""
    base = Path(os.path.abspath(table.parent))
    whole = {text: Path(os.path.abspath(scan.path)) for text, scan in named}
    if any(base not in place.parents for place in whole.values()):
        base = Path(os.path.commonpath([place.parent for place in whole.values()]))
    paths = _named(replace(scan, id=whole[text].relative_to(base).as_posix()) for text, scan in named)
    return [scan if scan.id else by_path for (_, scan), by_path in zip(named, paths, strict=True)]


def _of_table(path: Path) -> tuple[list[Scan], list[str]]:
    known: dict[str, dict[str, Any]] = {}  # image -> what its rows say
    asked: dict[str, list[str]] = {}
    unused: dict[str, None] = {}
    for where, row in _rows(path):
        try:
            unused |= dict.fromkeys(name for name in row if name not in COLUMNS)
            cells = {name: cell_text(name, row[name]) for name in COLUMNS if name in row}
            cells = {name: text for name, text in cells.items() if not is_missing(text)}
            image = cells.pop("image", "")
            if not image:
                raise ValueError("image is empty; name the scan's file or folder")
            if "id" in cells:
                check_inside(cells["id"], "id")
            before = known.setdefault(image, {"where": where})
            asked.setdefault(image, []).extend([cells.pop("question")] if "question" in cells else [])
            for name, text in cells.items():
                value = scan_setting(name, text) if name in ABOUT_THE_SCAN else text
                if before.setdefault(name, value) != value:
                    raise ValueError(
                        f"{name} is {value!r} but {before['where']} states {before[name]!r} of the same image; state one of them"
                    )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not known:
        raise ValueError(f"{path} has no rows")
    named = [
        (image, Scan(facts.get("id", ""), path.parent / image, tuple(dict.fromkeys(asked[image])), _reading(facts)))
        for image, facts in known.items()
    ]
    return _relative(named, path), [f"Columns that are not used: {', '.join(unused)}"] if unused else []


def _reading(facts: dict[str, Any]) -> dict[str, Any]:
    reading = {name: facts[name] for name in ABOUT_THE_SCAN if name in facts}
    pair = [reading.pop(name) for name in ("slope", "intercept") if name in reading]
    if len(pair) == 1:
        raise ValueError(f"{facts['where']}: of slope and intercept one is empty; state both or neither")
    return reading | ({"rescale": pair} if pair else {})


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a table, with our spelling of known columns."""
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from csv_rows(path, ("image",), COLUMNS)
        return
    rows = json_rows(path) if path.suffix.lower() == ".jsonl" else _parquet_rows(path)
    for where, row in rows:
        names = own_names(list(row), COLUMNS)
        if "image" not in names:
            raise ValueError(f"{where} lacks the column image; it has {names}")
        yield where, dict(zip(names, row.values(), strict=True))


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows = read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path} is no Parquet table, or a damaged one; write it again") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row
